"""BAT ready to use from a script.

    from load_model import load_audio_processor, load_pretrained_encoder

or from a shell, to look at the embeddings of sound files:

    python load_model.py clip.wav [more files]

Works beside the other files of the repository (a folder on sys.path, a Hub snapshot) and as bat_audio.load_model.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    # The program has no use for torchao, which Transformers would import, for a second and with two warnings.
    sys.modules.setdefault("torchao", None)

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._triton import has_triton
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
from transformers.utils import logging

HUB_REPOSITORY = "lrauch/BAT-vit-b16-pretrainedAS2M"
HUB_COMMIT = "175109327540c72f4b678b149e7cfaf0ee45d3e9"
# This path is not resolved, because the files of a Hub snapshot are links into another folder.
HERE = Path(__file__).parent
# To Transformers a plain folder is remote code, while the installed package has registered its classes.
AUTO_OPTIONS = {"trust_remote_code": not __package__}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNTRAINED_NOTICE = "UNTRAINED: this encoder has random weights. Its numbers mean nothing."

SAVE_HELP = "also write the float32 tensors FILE:last_hidden_state (tokens, width) and FILE:pooler_output (width,) here"

logger = logging.get_logger("bat.load_model")


def load_pretrained_encoder(
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    untrained: bool = False,
    compile: bool = False,
    quantization: str | None = None,
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
        compile: compile the blocks on their first call, one for all, for faster inference and training. (Training
            with stochastic depth compiles one for each of its rates, and by torch's default no more than eight.)
        quantization: "int8" for the blocks' linear layers, but the very last, with 8-bit weights (per output channel)
            and inputs (per token), by torchao; for inference, fast only together with `compile`, and not to be saved.
        **kwargs: more options for `BatModel.from_pretrained`, for example `attn_implementation` or `strict`, but no
            fields of the config.

    Raises:
        OSError: no weights could be had, or a download is damaged; the message says where it looked and what to do. Or
            there is no compiler for `compile`, or no header of Python.
        ValueError: no such device, dtype or quantization, a machine that has no use for it, or a checkpoint that does
            not hold exactly a BAT encoder.
        ImportError: torchao is missing.
    """
    if untrained and (checkpoint is not None or revision is not None):
        raise ValueError("untrained=True takes no checkpoint and no revision: there are no weights to load.")
    if device is not None:
        check_device(device)
    if compile:
        check_compiler(device)
    quantization_config = None if quantization is None else _quantization_config(quantization, device)
    dtype = torch.float32 if dtype is None else getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r} is not one in which encoders run; expected one of {', '.join(map(str, DTYPES))}."
        )
    weights = None if untrained else find_weights(checkpoint, revision)
    config = AutoConfig.from_pretrained(HERE, **AUTO_OPTIONS)
    if weights is None:
        logger.warning(UNTRAINED_NOTICE)
        model = AutoModel.from_config(config, dtype=dtype, **AUTO_OPTIONS, **kwargs)
    else:
        # The class depends on how this file was loaded. A model without memory tells which one it is.
        with torch.device("meta"):
            model_class = type(AutoModel.from_config(config, **AUTO_OPTIONS))
        if (weights.parent / "config.json").is_file():
            config = _read_config(model_class.config_class, weights.parent)
        is_standard = weights.name == "model.safetensors"
        try:
            model = model_class.from_pretrained(
                weights.parent if is_standard else None,
                config=config,
                state_dict=None if is_standard else load_file(weights),
                dtype=dtype,
                **kwargs,
            )
        except SafetensorError as error:
            raise OSError(f"{weights} is not a whole safetensors file ({error}). Copy or download it again.") from error
    model = (model if device is None else model.to(device)).eval()
    if quantization_config is not None:
        from torchao.quantization import quantize_

        # The last product stays as it is: its inputs have a wide range, its rounding errors go straight into the
        # output, and the CLS token there can be small. The smallest cosine between BAT-tiny's tokens and those of
        # float32 was 0.965 with this product in 8 bits, and 0.987 without.
        last_product = model.blocks[-1].mlp.fc2
        quantize_(
            model.blocks,
            quantization_config,
            lambda module, _: isinstance(module, nn.Linear) and module is not last_product,
        )
    if compile:
        for block in model.blocks:  # All blocks share their code, so one compiled graph serves all.
            block.compile()
    return model


def load_audio_processor(device: str | torch.device | None = None, num_frames: int | None = 1024):
    """The front end: a module from mono 16 kHz waveforms (B, samples) to log-mel features (B, 1, num_frames, 128).

    Args:
        device: where its tables live; waveforms may lie on any device, and features are made where the waveform is.
        num_frames: frames of 10 ms in the features, a multiple of 16; None is as long as the audio.

    Raises:
        ValueError: the device is not there, or `num_frames` is no multiple of 16.
    """
    if device is not None:
        check_device(device)
    return AutoFeatureExtractor.from_pretrained(HERE, num_frames=num_frames, **AUTO_OPTIONS).processor.to(device)


def check_device(device: str | torch.device):
    """Raise a ValueError where no tensor can be on a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # A torch without CUDA raises AssertionError.
        raise ValueError(
            f"device={str(device)!r} is not there: {str(error).splitlines()[0]} (torch {torch.__version__}, "
            f"{torch.cuda.device_count()} CUDA devices). Use device='cpu' or install a torch build for this machine."
        ) from error


def check_compiler(device: str | torch.device | None):
    """An OSError where blocks cannot be compiled; else it would come with the first clip, and be long."""
    device_type = torch.device(device or "cpu").type
    is_linux = sys.platform == "linux"  # Elsewhere Triton and Python bring what they need.
    if device_type == "cuda":
        if not has_triton():
            raise OSError(
                "compile=True needs Triton and a GPU of compute capability 7.0 or newer on CUDA. Install a torch build "
                "that brings Triton, or leave compile out."
            )
        # Triton chooses its compiler in this way.
        candidates = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        compiler = next(filter(None, map(shutil.which, candidates)), None)
        if is_linux and compiler is None:
            raise OSError(
                "compile=True needs a C compiler on CUDA, gcc, clang or what the variable CC names. Install one (for "
                "example apt install gcc), or leave compile out."
            )
    elif device_type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            compiler = cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise OSError(
                "compile=True needs a C++ compiler on a CPU, g++ or what the variable CXX names. Install one (for "
                "example apt install g++), or leave compile out."
            ) from error
    else:
        return
    if is_linux and not _finds_python_header(compiler):
        raise OSError(
            f"compile=True needs Python's header Python.h, which {compiler} does not find. Install it (for example "
            "apt install python3-dev), or leave compile out."
        )


def _finds_python_header(compiler: str) -> bool:
    """Asks the compiler, which also looks where variables like CPATH say."""
    # Like torch and Triton, this looks in the folder of the Python installation too, because packages may be installed
    # elsewhere.
    folders = [sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")]
    command = [compiler, "-E", "-x", "c", "-include", "Python.h", *(f"-I{folder}" for folder in folders), os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _quantization_config(quantization: str, device: str | torch.device | None):
    """torchao's config; errors as in `load_pretrained_encoder`."""
    if quantization != "int8":
        raise ValueError(f'quantization={quantization!r} is not known; expected "int8" or None.')
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig
        from torchao.utils import should_reduce_range
    except ImportError as error:
        raise ImportError(
            f'quantization="int8" needs torchao 0.18 or newer ({error}): pip install --upgrade torchao'
        ) from error
    device = torch.device(device or "cpu")
    if device.type not in ("cpu", "cuda"):
        reason, advice = f"there is no 8-bit matrix product for {device.type}", 'Use dtype="bfloat16" instead.'
    elif device.type == "cpu" and should_reduce_range(device):
        reason, advice = "torch finds no AVX512-VNNI, for which its 8-bit products are made", "Leave quantization out."
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        advice = 'Use dtype="float16" instead.'
    else:
        # torchao's settings of the compiler would hold for all other models too, so they are not made.
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    raise ValueError(f'quantization="int8" is of no use here: {reason}. {advice}')


def find_weights(checkpoint: str | Path | None = None, revision: str | None = None) -> Path:
    """The file with the weights, downloaded if need be; arguments and errors as in `load_pretrained_encoder`."""
    if checkpoint is None:
        beside = HERE / "model.safetensors"
        if beside.is_file() and revision is None:
            return beside
        return _download(HUB_REPOSITORY, revision or HUB_COMMIT)
    path = Path(checkpoint)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.is_file():
        if revision is not None:
            raise ValueError(f"revision={revision!r} belongs to a Hub repository, but {path} is a local file.")
        _refuse_pretraining(path)
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(checkpoint)) or path.suffix == ".safetensors":
        raise FileNotFoundError(
            f"No weights at {path}: no such file. Expected a folder with config.json and model.safetensors, a "
            '.safetensors file, or a Hub repository "namespace/name".'
        )
    return _download(str(checkpoint), revision or "main")


def _refuse_pretraining(path: Path):
    """A ValueError for student and teacher in one file, whose names would fill a page as unexpected and missing."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
    except SafetensorError:  # Loading the file, which comes next, tells about the damage.
        return
    if any(name.startswith("student.") for name in names):
        encoder = path.parent / "encoder"
        is_in_place = path.name == "model.safetensors" and encoder.is_dir()
        named = f"Name {encoder}, its encoder, or make" if is_in_place else "Make"
        raise ValueError(
            f"{path} is a checkpoint of a pre-training, with more than an encoder. {named} one with bat-audio convert "
            "(--ema for the teacher's)."
        )


def _download(repository: str, revision: str) -> Path:
    """config.json and model.safetensors of a Hub repository, from the cache or the Hub."""
    try:
        _download_file(repository, "config.json", revision)
        return _download_file(repository, "model.safetensors", revision)
    except (OSError, HTTPError) as error:  # The Hub client's HTTPErrors need not be OSErrors.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        beside = f"{HERE / 'model.safetensors'} (no such file), " if repository == HUB_REPOSITORY else ""
        raise OSError(
            f"No pretrained weights: looked for {beside}the cache {constants.HF_HUB_CACHE} and "
            f"{constants.ENDPOINT}/{repository} at revision {revision} ({type(error).__name__}: {reason}). Connect to "
            "the Hub once so that the weights are cached, or put model.safetensors beside load_model.py (hf download "
            f"{repository} model.safetensors --local-dir .), or name another checkpoint. To try things out, take "
            "BAT-tiny, a small demonstration model in every clone of the repository: checkpoint='examples/bat-tiny' in "
            "Python, --checkpoint examples/bat-tiny on the command line."
        ) from error


def _download_file(repository: str, filename: str, revision: str) -> Path:
    is_new = not isinstance(try_to_load_from_cache(repository, filename, revision=revision), str)
    if is_new:  # Without a network this fails at once, while the Hub client would retry for half a minute.
        get_session().head(constants.ENDPOINT, timeout=5)
    path = Path(hf_hub_download(repository, filename, revision=revision, etag_timeout=5))
    if is_new:  # The Hub client checks the size of a download, but not its content.
        advertised = get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), timeout=5).etag
        with path.open("rb") as file:
            actual = sha_fileobj(file).hex()
        if advertised is not None and len(advertised) == len(actual) and advertised != actual:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise OSError(f"{filename} arrived damaged (sha256 {actual}, not {advertised}) and was deleted; try again")
    return path


def _read_config(config_class, folder: Path):
    """The config beside a checkpoint, which must be BAT's; its auto_map is never followed."""
    model_type = config_class.get_config_dict(folder)[0].get("model_type")
    if model_type != config_class.model_type:
        raise ValueError(f"{folder / 'config.json'}: model_type is {model_type!r}, not {config_class.model_type!r}.")
    return config_class.from_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    """Print the embeddings of sound files; returns 0, or 1 when a file or the weights could not be read."""
    parser = argparse.ArgumentParser(description="Embed sound files with BAT and print what comes out.")
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="sound file of any rate and length: WAV, FLAC, OGG, MP3"
    )
    parser.add_argument(
        "--checkpoint", help="folder, .safetensors file or Hub repository (default: the published weights)"
    )
    parser.add_argument("--device", help='for example "cpu" or "cuda:1" (default: cuda where there is one)')
    parser.add_argument("--save", type=Path, metavar="FILE.safetensors", help=SAVE_HELP)
    parser.add_argument("--untrained", action="store_true", help="random weights, to try things out without a download")
    options = parser.parse_intermixed_args(arguments)
    if options.untrained and options.checkpoint:
        parser.error("--untrained and --checkpoint exclude each other")
    if options.save and not options.save.parent.is_dir():
        parser.error(f"--save {options.save}: there is no folder {options.save.parent}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")

    if options.untrained:
        print(f"*** {UNTRAINED_NOTICE} ***", flush=True)
    logging.disable_progress_bar()  # Loading the weights takes a second.
    try:
        model = load_pretrained_encoder(device, checkpoint=options.checkpoint, untrained=options.untrained)
        processor = load_audio_processor(device, num_frames=None)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    results, failed = {}, False
    for file in options.files:
        try:
            waveform = processor.load_audio(file)
            features = processor(waveform.to(device))
        except (ImportError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        with torch.inference_mode():
            output = model(features)
        tokens, embedding = output.last_hidden_state, output.pooler_output
        first_values = " ".join(f"{value:+.4f}" for value in embedding[0, :6].tolist())
        print(
            f"{file}: {len(waveform) / processor.sample_rate:.2f} s, features {tuple(features.shape)}, tokens "
            f"{tuple(tokens.shape)}, embedding {tuple(embedding.shape)} = {first_values} ..."
        )
        results[f"{file}:last_hidden_state"] = tokens[0].cpu()
        results[f"{file}:pooler_output"] = embedding[0].cpu().clone()
    if options.save and results:
        partial = options.save.with_name(f"{options.save.name}.partial")
        save_file(results, partial)
        os.replace(partial, options.save)
        print(f"saved {options.save}")
    if options.untrained:
        print(f"*** {UNTRAINED_NOTICE} ***")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
