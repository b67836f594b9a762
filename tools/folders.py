"""What a command writes: files and folders that appear whole or not at all, and one run at a time in a folder."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

PICTURES = (".png", ".pdf", ".svg")
LOCK_WAIT = 10  # Seconds to wait, because the workers of a killed run hold its lock until they notice, after 5 s.


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be; an OSError says that one is in it."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(folder / "lock", timeout=LOCK_WAIT))
        except Timeout as error:
            raise OSError(
                f"{folder} is in use by another run; let that end, or name another folder to write."
            ) from error
        yield


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `out` when the block ends, and vanishes when it fails.

    So `out` appears whole or not at all. It has the same name and suffix meanwhile, in a hidden folder beside `out`,
    whose own folder must be there. A file that is there already is replaced; so is a folder, if it is empty.
    """
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / out.name
        yield partial
        os.replace(partial, out)


def check_new(out: Path):
    """Raise an error that says what is in the way of a new file or folder `out`; an empty folder is not.

    Raises:
        FileNotFoundError: its own folder is not there.
        FileExistsError: there is something of this name already.
    """
    _check_parent(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; name another (--out), or remove it first.")


def _check_parent(out: Path):
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; make it first.")


def check_picture(out: Path):
    """Raise an error that says why no picture can be written to `out`.

    Raises:
        ValueError: the suffix is not that of a picture.
        FileNotFoundError: its folder is not there.
    """
    if out.suffix.lower() not in PICTURES:
        raise ValueError(f"{out}: the picture's format is told by its suffix; expected one of {', '.join(PICTURES)}.")
    _check_parent(out)


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    from huggingface_hub.utils.sha import sha_fileobj

    with file.open("rb") as content:
        return sha_fileobj(content).hex()
