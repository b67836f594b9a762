"""One run at a time in a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock

LOCK_WAIT = 10  # s; the workers of a killed run hold its lock until they notice, after 5 s


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be; an OSError says that one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(folder / "lock", timeout=LOCK_WAIT))
        except Timeout as error:
            raise OSError(
                f"{folder} is in use by another run; let that end, or name another folder to write."
            ) from error
        yield
