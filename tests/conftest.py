"""Shared fixtures: tiny models, golden files, and copies of the repository in the layouts in which people use it."""

import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

from bat_audio import BatConfig, BatModel, load_audio, load_audio_processor

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent
# The test processes share the cores; more threads than cores would only wait for each other.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(THREADS)
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or every process that compiles starts others, which import torch
SNAPSHOT_FILES = [*ROOT.glob("*.py"), *ROOT.glob("*.json"), ROOT / "README.md", ROOT / "LICENSE"]


def tiny_config(**changes) -> BatConfig:
    """A 2-block encoder of width 32 that takes the published input; 4 patches of time make a chunk."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_time_patches": 4}
    return BatConfig(**{**settings, **changes})


def tiny_model(**changes) -> BatModel:
    """A tiny encoder in eval mode with seeded weights that are far from their initial values."""
    torch.manual_seed(0)
    model = BatModel(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def example_pictures() -> torch.Tensor:
    """Features (B, 1, 256, 128) of the example sounds, cut into pieces of 2.56 s that overlap by half."""
    processor, piece = load_audio_processor(num_frames=256), 256 * 160
    sounds = [load_audio(file).flatten() for file in sorted((ROOT / "examples").glob("*_*k.*"))]
    starts = [(sound, start) for sound in sounds for start in range(0, len(sound) - piece // 2, piece // 2)]
    return torch.cat([processor(sound[start : start + piece][None]) for sound, start in starts])


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a golden file, and its metadata with the JSON values decoded."""
    with safe_open(TESTS / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, {key: json.loads(value) for key, value in file.metadata().items()}


def recipe_weights(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """The synthetic weights of the full-size golden file, made from the parameters' names; pos_embed stays."""
    weights = {}
    for name, tensor in model.state_dict().items():
        r = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(tensor.numel())
        r = r.reshape(tensor.shape)
        if name == "pos_embed":
            r = tensor.numpy()
        elif tensor.ndim == 1:
            r = (1 if name.endswith((".weight", ".s")) else 0) + 0.1 * r
        elif name == "cls_token":
            r = 0.5 * r
        else:
            r = r * 1.5 / math.sqrt(np.prod(tensor.shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(r, dtype=np.float32))
    return weights


def assert_same_weights(one: dict, other: dict, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        if tolerance and name.endswith("attn.qkv.bias"):
            # The keys' bias has no gradient but rounding noise, which AdamW scales up.
            one[name].unflatten(0, (3, -1))[1] = other[name].unflatten(0, (3, -1))[1] = 0
        torch.testing.assert_close(one[name], other[name], **{"rtol": 0, "atol": 0, **tolerance}, msg=name)


def run_python(code: str, *arguments: str, cwd: Path | None = None, check: bool = True, **environment):
    """Run code in a fresh interpreter, by default offline; variables given as None are removed."""
    return run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, check=check, **environment)


def run(command: list[str], cwd: Path | None = None, check: bool = True, **environment):
    result = subprocess.run(command, cwd=cwd, env=environment_with(environment), capture_output=True, text=True)
    assert not check or result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result


def environment_with(changes: dict) -> dict[str, str]:
    """This process's environment, offline and with its threads, and with these changes; None removes a variable."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": THREADS, **changes}
    return {name: str(value) for name, value in environment.items() if value is not None}


def pytest_collection_modifyitems(items):
    """Slow tests first: at the end of a run the test processes wait for each other's fast ones."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled, for all test processes: the first makes it, the others wait for it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / f"{name}.lock"):
        if not (shared / name).exists():
            partial = tmp_path_factory.mktemp(name)
            make(partial)
            partial.rename(shared / name)
    return shared / name


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A tiny encoder for which 10.24 s are four chunks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(chunk_time_patches=16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory) -> Path:
    """Recordings of several formats, rates, channels and lengths, in folders."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "a" / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, seconds: float, rate: int, channels: int = 1, **form):
        shape = (round(seconds * rate), channels)
        soundfile.write(folder / name, 0.1 * rng.standard_normal(shape).clip(-5, 5), rate, **form)

    write("a/exact.wav", 10.24, 8000)
    write("a/long.flac", 45.5, 8000)
    write("a/b/stereo.wav", 3.3, 44100, channels=2)
    write("a/b/short.wav", 0.1, 16000, subtype="PCM_U8")
    write("mp3.mp3", 12.0, 22050)
    write("ogg.ogg", 11.0, 48000)
    write("two.wav", 20.48, 16000, subtype="FLOAT")
    for number in range(5):
        write(f"second_{number}.wav", 1.0, 16000)
    (folder / "notes.txt").write_text("no sound")
    write(".hidden.wav", 1.0, 16000)
    return folder


@pytest.fixture(scope="session")
def full_weights(tmp_path_factory) -> Path:
    """model.safetensors of the published size with the golden recipe's weights."""

    def make(folder: Path):
        _, metadata = load_golden("encoder_full")
        with torch.device("meta"):
            shapes = BatModel(BatConfig())
        shapes = shapes.to_empty(device="cpu")
        shapes.pos_embed.copy_(shapes.position_table())
        weights = recipe_weights(shapes, metadata["seed"])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return made_once(tmp_path_factory, "full", make) / "model.safetensors"


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory, full_weights) -> Path:
    """The files of a Hub snapshot with full-size weights, in a plain folder."""
    folder = tmp_path_factory.mktemp("plain") / "bat-base"
    folder.mkdir()
    for file in SNAPSHOT_FILES:
        shutil.copy(file, folder)
    os.link(full_weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def snapshot_folder(tmp_path_factory, plain_folder) -> Path:
    """The same as the Hub cache lays it out: links with the files' names into a folder of blobs."""
    base = tmp_path_factory.mktemp("hub") / "models--lrauch--BAT"
    blobs, snapshot = base / "blobs", base / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain_folder.iterdir())):
        os.link(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


@pytest.fixture(scope="session")
def installed_folder(tmp_path_factory) -> Path:
    """A folder to put on PYTHONPATH that holds the package as pip installs it from the sources."""

    def install(target: Path):
        # From a copy, because building leaves files in the source folder.
        source = tmp_path_factory.mktemp("source") / "bat"
        source.mkdir()
        for file in [*SNAPSHOT_FILES, ROOT / "pyproject.toml"]:
            shutil.copy(file, source)
        shutil.copytree(ROOT / "tools", source / "tools")
        options = ["--no-deps", "--no-build-isolation", f"--target={target}"]
        command = [sys.executable, "-m", "pip", "install", *options, source]
        subprocess.run(command, check=True, capture_output=True, text=True)

    return made_once(tmp_path_factory, "site", install)
