"""Settings of `bat-audio embed`."""

import os
from dataclasses import dataclass, field, fields
from typing import Any

from bat_audio.tools.recipes import _option

POOLS = ("cls", "mean", "cls+mean")
ENGINES = ("local", "ray")
SEGMENT = 10.24  # s, the encoder's input


def _free(default: Any, help: str) -> Any:
    """An option on which no row depends, so that it may change between a run and its continuation."""
    return field(default=default, metadata={"help": help, "is_free": True})


class StartError(OSError):
    """A run cannot begin: weights cannot be had, or the folder cannot be used. Nothing has been computed."""


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """Everything that decides a run of `embed`. The command line has these options.

    `out` may also be a Path, and `layers` a list of numbers.

    Raises:
        ValueError: options that exclude each other or are out of range.
    """

    inputs: Any = field(
        metadata={
            "is_free": True,
            "help": "Files, folders, globs, lists of files (.txt, or .csv or .parquet with the column path and perhaps "
            "id, start and duration), or a dataset: saved, or of the Hub.",
        }
    )
    out: str = field(metadata={"is_free": True, "help": "Folder to write, or its address (s3://, gs://, hf://)."})
    checkpoint: str | None = _free(None, "Encoder: folder, .safetensors or Hub name; default: the published weights.")
    revision: str | None = _free(None, "Commit, branch or tag of the encoder on the Hub.")
    stored_inputs: bool = _free(
        False, "Go on with the list of inputs that the table was begun with, whatever has come or gone since."
    )
    split: str | None = _free(None, "Split of a dataset that has several.")

    segment: float | None = _option(None, f"Length of the windows, in seconds; default: {SEGMENT}.")
    hop: float | None = _option(
        None, "From one window's start to the next one's, in seconds; default: the length. More leaves gaps."
    )
    whole: bool = _option(False, "One row per recording instead of windows; long ones run in chunks.")
    num_frames: int = _option(1024, "Frames of 10 ms that shorter clips are zero-padded to, a multiple of 16.")
    pool: str = _option("cls", f"What stands for a clip: {', '.join(POOLS)}. Padding does not count.")
    frames: bool = _option(False, "Also write `tokens`, one vector for every 160 ms.")
    layers: str | None = _option(None, "Also write the CLS tokens of these blocks, counted from 1, such as 6,12.")
    float16: bool = _option(False, "Store float16 instead of float32.")

    device: str = _free("auto", "cpu, cuda, cuda:1, mps, or auto for a GPU where there is one.")
    bf16: bool | None = _option(None, "Run the encoder in bfloat16; default: on GPUs that have it.")
    compile: bool = _option(False, "Compile the encoder's blocks on their first call.")
    batch_size: int = _option(32, "Clips of one forward pass.")
    workers: int | None = _free(None, "Processes that decode and resample; default: one per core.")
    shard_size: int = _option(512, "Files of a shard, the most that an interrupted run has to do again.")
    strict: bool = _free(False, "Stop at the first broken file instead of listing it in errors.parquet.")
    retry: bool = _free(False, "Embed those shards again in which recordings were broken, once these are mended.")
    engine: str = _free("local", f"{' or '.join(ENGINES)}.")
    ray_address: str | None = _free(None, "Ray cluster to run on; default: RAY_ADDRESS, or one on this machine.")
    cpus_per_actor: int | None = _free(None, "Ray: cores of an actor, which holds an encoder; default: up to 4.")
    gpus_per_actor: float | None = _free(None, "Ray: GPUs of an actor; default: 1 where there are any.")

    def __post_init__(self):
        object.__setattr__(self, "out", os.fspath(self.out))
        if isinstance(self.layers, list | tuple):
            object.__setattr__(self, "layers", ",".join(map(str, self.layers)))
        for name, known in (("pool", POOLS), ("engine", ENGINES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; expected {', '.join(known)}.")
        if self.whole and (self.segment is not None or self.hop is not None):
            raise ValueError("whole makes one row per recording, so it takes no segment and no hop.")
        for name in ("ray_address", "cpus_per_actor", "gpus_per_actor"):
            if getattr(self, name) is not None and self.engine != "ray":
                raise ValueError(f"{name}={getattr(self, name)!r} belongs to engine='ray'.")
        for name in ("segment", "hop", "batch_size", "shard_size", "cpus_per_actor"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers={self.workers} must be at least 0, which decodes between the forward passes.")
        if self.num_frames < 16 or self.num_frames % 16:
            raise ValueError(f"num_frames={self.num_frames} must be a positive multiple of 16.")
        _ = self.layer_numbers  # refuses what are no numbers

    @property
    def layer_numbers(self) -> list[int]:
        try:
            return [] if self.layers is None else [int(number) for number in self.layers.split(",")]
        except ValueError as error:
            raise ValueError(f"layers={self.layers!r}: expected numbers separated by commas, such as 6,12.") from error

    @property
    def window(self) -> tuple[float, float] | None:
        """Length and hop in seconds, with the defaults in their places; None for whole recordings."""
        segment = self.segment or SEGMENT
        return None if self.whole else (segment, self.hop or segment)

    def that_decide(self) -> dict:
        """The settings on which the rows depend."""
        settings = {item.name: getattr(self, item.name) for item in fields(self) if "is_free" not in item.metadata}
        return {**settings, **dict(zip(("segment", "hop"), self.window or (None, None), strict=True))}
