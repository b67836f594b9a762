"""What users call things: files and addresses, Hub repositories, and how a model card may tell them."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any


def is_address(path: str) -> bool:
    """Whether a path is one for fsspec, such as s3://bucket/sound.wav; a file of this name here is not."""
    return ("://" in path or "::" in path) and not os.path.lexists(path)


def chain_of(path: str) -> tuple[str, str, str]:
    """A path or address in three parts: the caches before it, the file or folder itself, and what that lies in.

    "simplecache::zip://a.wav::s3://bucket/b.zip" gives "simplecache::", "zip://a.wav" and "::s3://bucket/b.zip".
    """
    if not is_address(path):
        return "", path, ""
    # A cache of fsspec has no path of its own; it takes that of the files which it keeps.
    caches, itself, around = re.fullmatch(
        r"((?:(?:blockcache|cached|filecache|simplecache)(?:://)?::)*)(.*?)(::.*)?", path, re.DOTALL
    ).groups("")
    if around and re.fullmatch("[a-z]+", itself):  # "zip::b.zip" is short for "zip://::b.zip", all of the archive.
        itself += "://"
    return caches, itself, around


def suffix_of(path: str) -> str:
    """The suffix of a path or address, in small letters."""
    return os.path.splitext(chain_of(path)[1])[1].lower()


def local_path(path: str) -> str:
    """The path without the file:// of an address that needs none; any other path as it is."""
    return path if "::" in path else path.removeprefix("file://")


def unreadable_kind(path: str) -> str | None:
    """Why nobody should open what is at a path, if it is no file: a pipe can keep one waiting, a device has no end.

    Folders, addresses, and what is not there at all are left to those who open them.
    """
    path = local_path(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        if os.path.islink(path):
            return "It is a link that leads to no file that can be read; mend the link or leave it out."
        return None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    kind = "a pipe (FIFO)" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    return f"It is {kind}, which is never opened; save its sound to a file and name that, or leave it out."


def check_file(path: str | Path):
    """Raise a FileNotFoundError if a path is neither an address nor that of a file; a device or pipe is one."""
    if not is_address(str(path)) and (not os.path.exists(path) or os.path.isdir(path)):
        raise FileNotFoundError(f"{path}: {'a folder; name a file in it' if os.path.isdir(path) else 'no such file'}.")


def check_folder(path: str | Path):
    """Raise a FileNotFoundError if a path is neither an address nor that of a folder."""
    if not is_address(str(path)) and not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: no such folder.")


def check_model_folder(folder: Path):
    """Raise a FileNotFoundError if there is no config.json in a folder."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: no config.json. Expected a folder that save_pretrained, bat-audio convert or "
            "bat-audio finetune wrote, or a checkpoint folder of Trainer."
        )


def check_checkpoint(checkpoint: str | None):
    """Raise a FileNotFoundError if nothing is there, and the name cannot be one of the Hub; None is always right."""
    if checkpoint is not None and not os.path.exists(checkpoint) and not hub_id(checkpoint):
        raise FileNotFoundError(
            f"No weights at {checkpoint}: no such file or folder. Expected a folder with config.json and "
            'model.safetensors, a .safetensors file, or a Hub repository "namespace/name".'
        )


def hub_id(value: Any) -> str | None:
    """The value, if it may be the name of a Hub repository and is no file here."""
    if not isinstance(value, str) or value.count("/") != 1 or os.path.lexists(value):
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # This takes longer than most answers.

    try:
        validate_repo_id(value)
    except HFValidationError:
        return None
    return value


def check_repository(repo_id: str):
    """Raise an OSError if a name is not that of a Hub repository with its namespace."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it has no namespace")
    except HFValidationError as error:
        raise OSError(f'repo_id={repo_id!r} is not of the form "namespace/name": {error}') from error


def public_name(value: Any) -> str:
    """What a card may tell of a setting; of a path it is only the last part, not the folders around it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(public_name, value))
    if not isinstance(value, str | Path | int | float | None):
        return type(value).__name__  # A dataset in memory, for example, has no name of its own.
    text = str(value)
    is_path = isinstance(value, Path) or os.path.exists(text)
    if is_path or text.startswith(("/", "~")) or PureWindowsPath(text).is_absolute():
        text = re.split(r"[\\/]", os.path.abspath(text))[-1]
    return one_line(text)


def one_line(text: str) -> str:
    """Text without line breaks, control characters and halves of surrogate pairs."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", text)


def some_of(items: Sequence) -> str:
    return ", ".join(map(str, items[:3])) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
