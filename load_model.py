"""BAT ready to use from a script.

    from load_model import load_audio_processor, load_pretrained_encoder

or from a shell, to look at the embeddings of sound files:

    python load_model.py clip.wav [more files]

Works beside the other files of the repository (a folder on sys.path, a Hub snapshot) and as bat_audio.load_model.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils.sha import sha_fileobj
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
from transformers.utils import logging

HUB_REPOSITORY = "lrauch/BAT-vit-b16-pretrainedAS2M"
HUB_COMMIT = "175109327540c72f4b678b149e7cfaf0ee45d3e9"
HERE = Path(__file__).parent  # not resolved: the files of a Hub snapshot are links into another folder
# A plain folder is remote code to Transformers; the installed package has registered its classes.
AUTO_OPTIONS = {"trust_remote_code": not __package__}
UNTRAINED_NOTICE = "UNTRAINED: this encoder has random weights. Its numbers mean nothing."

logger = logging.get_logger("bat.load_model")


def load_pretrained_encoder(
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    untrained: bool = False,
    **kwargs,
):
    """The BAT encoder with pretrained weights, in eval mode.

    Without `checkpoint`, `model.safetensors` beside this file is used if there is one, and no network is touched.
    Otherwise config.json and model.safetensors of the published release come from the Hugging Face cache or Hub.
    Only these two data files are fetched, never code.

    Args:
        device: where to put the model; None leaves it on the CPU (or where a `device_map` puts it).
        dtype: of the weights, for example "bfloat16"; float32 by default.
        checkpoint: a folder with config.json and model.safetensors, a .safetensors file (with config.json beside it,
            or of the published size), or a Hub repository "namespace/name".
        revision: commit, branch or tag on the Hub; by default a pinned commit of the published release, "main" of
            another repository.
        untrained: random weights instead, for trying things out; they are announced by a warning.
        **kwargs: more options for `BatModel.from_pretrained`, for example `attn_implementation` or `strict`.

    Raises:
        OSError: no weights could be had, or a download is damaged; the message says where it looked and what to do.
        ValueError: the device is not there, or the checkpoint does not hold exactly a BAT encoder.
    """
    if device is not None:
        _check_device(device)
    dtype = torch.float32 if dtype is None else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config = AutoConfig.from_pretrained(HERE, **AUTO_OPTIONS)
    with torch.device("meta"):  # only to learn the class, whichever way it is loaded
        model_class = type(AutoModel.from_config(config, **AUTO_OPTIONS))

    if untrained:
        logger.warning(UNTRAINED_NOTICE)
        model = model_class(config).to(dtype)
    else:
        weights = _find_weights(checkpoint, revision)
        if (weights.parent / "config.json").is_file():
            config = _read_config(model_class.config_class, weights.parent)
        state_dict = None if weights.name == "model.safetensors" else load_file(weights)
        source = weights.parent if state_dict is None else None
        model = model_class.from_pretrained(source, config=config, state_dict=state_dict, dtype=dtype, **kwargs)
    return (model if device is None else model.to(device)).eval()


def load_audio_processor(device: str | torch.device | None = None, num_frames: int | None = 1024):
    """The front end: a module from mono 16 kHz waveforms (B, samples) to log-mel features (B, 1, num_frames, 128).

    Args:
        device: where its tables live; waveforms may lie on any device, and features are made where the waveform is.
        num_frames: frames of 10 ms in the features, a multiple of 16; None is as long as the audio.

    Raises:
        ValueError: the device is not there, or `num_frames` is no multiple of 16.
    """
    if device is not None:
        _check_device(device)
    return AutoFeatureExtractor.from_pretrained(HERE, num_frames=num_frames, **AUTO_OPTIONS).processor.to(device)


def _check_device(device: str | torch.device):
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises AssertionError
        raise ValueError(
            f"device={str(device)!r} is not there: {str(error).splitlines()[0]} (torch {torch.__version__}, "
            f"{torch.cuda.device_count()} CUDA devices). Use device='cpu' or install a torch build for this machine."
        ) from error
