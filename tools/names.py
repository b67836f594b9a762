"""What users call things: files and addresses, Hub repositories, and how a model card may tell them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any


def is_address(path: str) -> bool:
    """Whether a path is one for fsspec, such as s3://bucket/sound.wav; a file of this name here is not."""
    return ("://" in path or "::" in path) and not os.path.lexists(path)


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
    if not isinstance(value, str) or value.count("/") != 1 or os.path.exists(value):
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
