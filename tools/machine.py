"""What this machine has: optional libraries and devices."""

import importlib


def require(library: str, extra: str = "train"):
    """An optional library, or an ImportError that says how to install it."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f'This needs {library} ({error}): pip install "bat-audio[{extra}]"') from error


def pick_device(device: str) -> str:
    """The device itself or, for "auto", the kind of GPU that there is, and else "cpu"."""
    if device != "auto":
        return device
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
