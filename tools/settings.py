"""Settings of embedding, fine-tuning, probing (paper, section 4) and pre-training, with the authors' own as presets.

The fields of these classes, with their help, are the options of the command line. It imports this file before anything
else, so this file imports nothing that takes time.
"""

import math
import os
from dataclasses import dataclass, field, fields, replace
from typing import Any

PRESETS = {
    "probe": {
        "head": "cgp",
        "freeze_encoder": True,
        "steps": 4000,
        "learning_rate": 1e-3,
        "beta2": 0.999,
        "layer_decay": 1.0,
        "drop_path": 0.0,
        "mixup": 0.0,
        "freq_masks": 0,
        "time_masks": 0,
        "roll": False,
    },
    "finetune": {
        "head": "linear",
        "freeze_encoder": False,
        "steps": 40000,
        "learning_rate": 5e-5,
        "beta2": 0.95,
        "layer_decay": 0.75,
        "drop_path": 0.1,
        "mixup": 0.9,
        "freq_masks": 2,
        "time_masks": 2,
        "roll": True,
    },
}
POOLS = ("cls", "mean", "cls+mean")
ENGINES = ("local", "ray")
SEGMENT = 10.24  # The published encoder takes so many seconds at once.
LONGEST = 1_000_000  # A window of embed has at most so many seconds.
EXPORT_FORMATS = ("onnx", "pt2")
HEADS = ("linear", "linear_cgp", "cgp", "protobin")  # As in `BatConfig`, whose import would take seconds.
HEAD_POOLINGS = ("cls", "mean")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _by_preset(name: str, help: str) -> Any:
    """An option of `finetune` whose default the preset decides, which its help tells."""
    defaults = " or ".join(f"{values[name]} ({preset})" for preset, values in PRESETS.items())
    return _option(None, f"{help} Default: {defaults}.")


def _free(default: Any, help: str) -> Any:
    """An option on which no row of a table depends, so that it may change between a run and its continuation."""
    return field(default=default, metadata={"help": help, "is_free": True})


CHANNEL = "Channel of the sounds: mean of all, or a number from 0 on. The column channel of a list goes before."


class StartError(OSError):
    """A run cannot begin: weights cannot be had, or the folder cannot be used. Nothing has been computed."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Everything that decides a run of `finetune`; None where the preset decides. The command line has these options.

    Raises:
        ValueError: options that exclude each other or are out of range.
    """

    train: Any = field(metadata={"help": "Class folders, a .csv or .parquet file, or a dataset: saved, or of the Hub."})
    out: str = field(metadata={"help": "Folder to write the trained model to; must not exist."})
    validation: Any = _option(None, "Validation data; default: held out of the training data.")  # noqa: RUF009
    validation_fraction: float = _option(0.1, "Share of the training clips to hold out where there is no --validation.")
    train_split: str | None = _option(None, "Split of a DatasetDict to train on.")
    validation_split: str | None = _option(None, "Split of a DatasetDict to validate on.")

    channel: str = _option("mean", CHANNEL)

    checkpoint: str | None = _option(None, "Encoder: folder, .safetensors or Hub name; default: the published weights.")
    untrained: bool = _option(False, "Start from random weights.")
    config: str | None = _option(None, "config.json of the encoder for --untrained; default: the published size.")

    preset: str = _option("finetune", f"The authors' settings: {' or '.join(PRESETS)}.")
    head: str | None = _by_preset("head", "linear, linear_cgp, cgp or protobin.")
    head_pooling: str = _option("cls", "What stands for a clip, cls or mean.")
    num_prototypes: int = _option(10000, "Prototypes of cgp and protobin.")
    frames: bool = _option(False, "Classify every 160 ms instead of the clip; the data needs onsets and offsets.")
    multi_label: bool | None = _option(None, "Several labels per clip; default: as the data is.")
    multi_label_loss: str = _option("asymmetric", "bce or asymmetric.")

    freeze_encoder: bool | None = _by_preset(
        "freeze_encoder", "Probe: train the head alone on the encoder in eval mode."
    )
    lora: int | None = _option(
        None,
        "Train low-rank adapters of this rank in the encoder, merged at the end; they want a higher --learning-rate.",
    )
    steps: int | None = _by_preset(
        "steps", "Optimiser steps; the authors' probes: 4,000 on ESC-50, 20,000 on AudioSet-20k."
    )
    epochs: float | None = _option(None, "Passes through the data, instead of --steps.")
    warmup: float = _option(0.1, "Share of the steps with a rising learning rate; then it falls as a cosine.")
    batch_size: int = _option(48, "Clips of one optimiser step, over all processes.")
    gradient_accumulation: int = _option(1, "Parts in which a process handles its share of a batch.")
    learning_rate: float | None = _by_preset("learning_rate", "Peak learning rate of the head.")
    layer_decay: float | None = _by_preset(
        "layer_decay", "Factor on the learning rate from each block to the one below."
    )
    weight_decay: float = _option(
        0.05, "Not applied to biases, norms, block weights and prototypes; the authors' probe on ESC-50: 0.2."
    )
    beta2: float | None = _by_preset("beta2", "Second beta of AdamW.")
    drop_path: float | None = _by_preset("drop_path", "Stochastic depth of the last block, 0..1.")

    mixup: float | None = _by_preset("mixup", "Probability of mixing a clip with another.")
    freq_masks: int | None = _by_preset("freq_masks", "Masks of up to 16 mel bands.")
    time_masks: int | None = _by_preset("time_masks", "Masks of up to 64 frames of 10 ms.")
    roll: bool | None = _by_preset("roll", "Rotate clips in time.")
    gain_db: float = _option(0.0, "Random gain of up to so many dB, before mixing.")

    num_frames: int | None = _option(
        None, "Frames of 10 ms that clips are cut or padded to, a multiple of 16; default: the encoder's input, 1024."
    )
    bf16: bool | None = _option(None, "bfloat16 autocast; default: on GPUs that have it.")
    gradient_checkpointing: bool | None = _option(
        None,
        "Compute activations again in the backward pass, to save memory; default: where a head mixes the blocks of a "
        "frozen encoder, which then runs twice.",
    )
    num_workers: int = _option(4, "Processes that read and decode sound files, for each training process.")
    eval_every: int | None = _option(None, "Steps between validations and checkpoints; default: a twentieth of all.")
    seed: int = _option(0, "Of the new weights, the order of the clips and their augmentation.")
    report_to: str = _option(
        "tensorboard", "Where Trainer logs: tensorboard, wandb, ..., several with commas, or none."
    )

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is not known; expected {' or '.join(PRESETS)}.")
        object.__setattr__(self, "channel", check_channel(self.channel))
        if self.head not in (None, *HEADS):
            raise ValueError(f"head={self.head!r} is not known; expected {', '.join(HEADS)}.")
        check_head_pooling(self.head_pooling)
        if self.untrained and self.checkpoint:
            raise ValueError("untrained starts from random weights, so it takes no checkpoint.")
        if self.config and not self.untrained:
            raise ValueError("config belongs to untrained; a checkpoint has its own.")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"Got steps={self.steps} and epochs={self.epochs}; give one of them.")
        freezes = PRESETS[self.preset]["freeze_encoder"] if self.freeze_encoder is None else self.freeze_encoder
        if self.lora is not None and (self.lora < 1 or freezes):
            raise ValueError(
                f"lora={self.lora} needs a rank of at least 1 and an encoder that is not frozen, "
                "as with preset='finetune'."
            )
        if self.frames and self.multi_label is False:
            raise ValueError("frames takes any number of classes at each step, or none; leave multi_label out.")
        _check_ranges(
            self,
            positive=(
                *("batch_size", "gradient_accumulation", "steps", "epochs", "eval_every", "num_frames"),
                *("learning_rate", "layer_decay"),
            ),
            not_negative=("weight_decay", "num_workers", "seed"),
        )
        if self.beta2 is not None and not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2={self.beta2} must be from 0 to below 1.")

    def with_preset(self) -> "FinetuneSettings":
        """The settings with the preset's value wherever there was None."""
        preset = {name: value for name, value in PRESETS[self.preset].items() if getattr(self, name) is None}
        if self.epochs is not None:
            del preset["steps"]
        return replace(self, **preset)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Everything that decides a run of `pretrain`; the defaults are the authors'. The command line has these options.

    Raises:
        ValueError: options that exclude each other or are out of range.
    """

    data: Any = field(
        metadata={"help": "Files, folders, globs in quotes, lists of files (.txt, .csv or .parquet), or a dataset."}
    )
    out: str = field(metadata={"help": "Folder to write the encoder to; must not exist."})
    split: str | None = _option(None, "Split of a dataset.")
    channel: str = _option("mean", CHANNEL)
    init: str | None = _option(
        None, "Encoder to go on from: folder, .safetensors or Hub name; default: random weights."
    )
    config: str | None = _option(None, "config.json of a new encoder; default: the published size.")
    skip_broken: bool = _option(False, "Leave out sounds that cannot be read; they are listed in OUT.training.")

    clip_seconds: float | None = _option(
        None,
        "Longest stretch of a recording that is a clip; default: 10, or the encoder's input where that is shorter.",
    )
    views: int = _option(16, "Masks of each clip, which share one target.")
    keep: float = _option(0.2, "Share of a clip's patches that the student sees.")
    mask_block: int = _option(5, "Side of the blocks of patches that it sees, an odd number.")
    decoder_blocks: int = _option(6, "Blocks of the decoder.")

    steps: int = _option(400_000, "Optimiser steps.")
    batch_size: int = _option(24, "Clips of one optimiser step, over all processes.")
    gradient_accumulation: int = _option(1, "Parts in which a process handles its share of a batch.")
    learning_rate: float = _option(5e-4, "Peak learning rate.")
    warmup: float = _option(0.1325, "Share of the steps with a rising learning rate; then it falls as a cosine.")
    weight_decay: float = _option(0.05, "Not applied to biases and norms.")
    beta2: float = _option(0.95, "Second beta of AdamW.")
    max_grad_norm: float = _option(0.0, "Norm to which gradients are clipped; 0: not at all.")
    ema_decay: float = _option(0.9998, "Share of the teacher that a step keeps, at the start.")
    ema_final_decay: float = _option(0.99999, "The same from step --ema-steps on; rises linearly in between.")
    ema_steps: int = _option(100_000, "See --ema-final-decay.")

    bf16: bool | None = _option(None, "bfloat16 autocast; default: on GPUs that have it.")
    compile: bool = _option(False, "Compile the blocks.")
    gradient_checkpointing: bool = _option(False, "Compute activations again in the backward pass, to save memory.")
    num_workers: int = _option(4, "Processes that read and decode sound files, for each training process.")
    log_every: int = _option(100, "Steps between the lines of the log.")
    save_every: int = _option(5000, "Steps between checkpoints.")
    save_total_limit: int = _option(2, "How many checkpoints to keep, the last ones.")
    seed: int = _option(0, "Of the new weights, the order of the clips, their stretches and their masks.")
    report_to: str = _option(
        "tensorboard", "Where Trainer logs: tensorboard, wandb, ..., several with commas, or none."
    )

    def __post_init__(self):
        object.__setattr__(self, "channel", check_channel(self.channel))
        if self.init and self.config:
            raise ValueError("config belongs to a new encoder; that of init has its own.")
        if self.mask_block < 1 or self.mask_block % 2 == 0:
            raise ValueError(f"mask_block={self.mask_block} must be an odd number.")
        for name in ("keep", "ema_decay", "ema_final_decay", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to below 1.")
        _check_ranges(
            self,
            positive=(
                *("clip_seconds", "views", "decoder_blocks", "steps", "batch_size", "gradient_accumulation"),
                *("learning_rate", "ema_steps", "log_every", "save_every", "save_total_limit"),
            ),
            not_negative=("weight_decay", "max_grad_norm", "num_workers", "seed"),
        )


def _check_ranges(settings: FinetuneSettings | PretrainSettings, positive: tuple[str, ...], not_negative: tuple):
    if not 0 <= settings.warmup <= 1:
        raise ValueError(f"warmup={settings.warmup} is a share of the steps, from 0 to 1.")
    for name in positive:
        if getattr(settings, name) is not None and getattr(settings, name) <= 0:
            raise ValueError(f"{name}={getattr(settings, name)} must be above 0.")
    for name in not_negative:
        if getattr(settings, name) < 0:
            raise ValueError(f"{name}={getattr(settings, name)} must not be below 0.")


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What decides on the row that the encoder makes of a window of sound, and where it is computed.

    `layers` may also be a list of numbers.

    Raises:
        ValueError: an option is out of range.
    """

    checkpoint: str | None = _free(None, "Encoder: folder, .safetensors or Hub name; default: the published weights.")
    revision: str | None = _free(None, "Commit, branch or tag of the encoder on the Hub.")
    pool: str = _option("cls", f"What stands for a clip: {', '.join(POOLS)}. Padding does not count.")
    layers: str | None = _option(None, "Also write the CLS tokens of these blocks, counted from 1, such as 6,12.")
    tokens: bool = _option(False, "Also write the column tokens, one vector for every 160 ms.")
    num_frames: int = _option(1024, "Frames of 10 ms that shorter clips are zero-padded to, a multiple of 16.")
    device: str = _free("auto", "cpu, cuda, cuda:1, mps, or auto for a GPU where there is one.")
    bf16: bool | None = _option(None, "Run the encoder in bfloat16; default: on GPUs that have it.")
    compile: bool = _option(False, "Compile the encoder's blocks on their first call.")
    batch_size: int = _option(32, "Clips of one forward pass.")

    def __post_init__(self):
        if isinstance(self.layers, list | tuple):
            object.__setattr__(self, "layers", ",".join(map(str, self.layers)))
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} is not known; expected {', '.join(POOLS)}.")
        if self.batch_size <= 0:
            raise ValueError(f"batch_size={self.batch_size} must be above 0.")
        if self.num_frames < 16 or self.num_frames % 16:
            raise ValueError(f"num_frames={self.num_frames} must be a positive multiple of 16.")
        _ = self.layer_numbers  # This raises a ValueError for what are no numbers.

    @property
    def layer_numbers(self) -> list[int]:
        try:
            return [] if self.layers is None else [int(number) for number in self.layers.split(",")]
        except ValueError as error:
            raise ValueError(f"layers={self.layers!r}: expected numbers separated by commas, such as 6,12.") from error


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(RowSettings):
    """Everything that decides a run of `embed`. The command line has these options.

    `out` may also be a Path. `inputs` are None with `stored_inputs`, and only then.

    Raises:
        ValueError: options that exclude each other or are out of range.
    """

    inputs: Any = field(
        metadata={
            "is_free": True,
            "help": "Files, folders, globs, lists of files (.txt, or .csv or .parquet with the column path and perhaps "
            "id, start, duration and channel), or a dataset: saved, or of the Hub.",
        }
    )
    out: str = field(metadata={"is_free": True, "help": "Folder to write, or its address (s3://, gs://, hf://)."})
    stored_inputs: bool = _free(
        False, "Name no inputs, but go on with those that the table was begun with, whatever has come or gone since."
    )
    split: str | None = _free(None, "Split of a dataset that has several.")
    channel: str = _option("mean", CHANNEL)

    segment: float | None = _option(None, f"Length of the windows, in seconds; default: {SEGMENT}.")
    hop: float | None = _option(
        None, "From one window's start to the next one's, in seconds; default: the length. More leaves gaps."
    )
    whole: bool = _option(False, "One row per recording instead of windows; long ones run in chunks.")
    float16: bool = _option(False, "Store float16 instead of float32.")

    workers: int | None = _free(None, "Processes that decode and resample; default: one per core.")
    shard_size: int = _option(512, "Files of a shard, the most that an interrupted run has to do again.")
    strict: bool = _free(False, "Stop at the first broken file instead of listing it in errors.parquet.")
    retry: bool = _free(False, "Embed those shards again in which recordings were broken, once these are mended.")
    engine: str = _free("local", f"{' or '.join(ENGINES)}.")
    ray_address: str | None = _free(None, "Ray cluster to run on; default: RAY_ADDRESS, or one on this machine.")
    cpus_per_actor: int | None = _free(None, "Ray: cores of an actor, which holds an encoder; default: up to 4.")
    gpus_per_actor: float | None = _free(None, "Ray: GPUs of an actor; default: 1 where there are any.")

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "out", os.fspath(self.out))
        object.__setattr__(self, "channel", check_channel(self.channel))
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is not known; expected {', '.join(ENGINES)}.")
        if self.whole and (self.segment is not None or self.hop is not None):
            raise ValueError("whole makes one row per recording, so it takes no segment and no hop.")
        for name in ("ray_address", "cpus_per_actor", "gpus_per_actor"):
            if getattr(self, name) is not None and self.engine != "ray":
                raise ValueError(f"{name}={getattr(self, name)!r} belongs to engine='ray'.")
        for name in ("segment", "hop"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= LONGEST:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 s and at most {LONGEST} s.")
        for name in ("shard_size", "cpus_per_actor"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.gpus_per_actor is not None and not 0 <= self.gpus_per_actor < math.inf:
            raise ValueError(f"gpus_per_actor={self.gpus_per_actor} must be at least 0 and finite.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers={self.workers} must be at least 0, which decodes between the forward passes.")

    @property
    def window(self) -> tuple[float, float] | None:
        """Length and hop in seconds, with the defaults in their places; None for whole recordings."""
        segment = self.segment or SEGMENT
        return None if self.whole else (segment, self.hop or segment)

    def that_decide(self) -> dict:
        """The settings on which the rows depend."""
        settings = {item.name: getattr(self, item.name) for item in fields(self) if "is_free" not in item.metadata}
        return {**settings, **dict(zip(("segment", "hop"), self.window or (None, None), strict=True))}


def check_head_pooling(head_pooling: str):
    if head_pooling not in HEAD_POOLINGS:
        raise ValueError(f"head_pooling={head_pooling!r} is not known; expected {' or '.join(HEAD_POOLINGS)}.")


def check_channel(channel: str | int) -> str:
    """The channel as text; raises a ValueError where it is neither "mean" nor a number from 0 on."""
    text = str(channel)
    if text != "mean" and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"channel={channel!r} is unknown; expected mean, or the number of a channel from 0 on.")
    return text


def channel_number(channel: str | int) -> str | int:
    """The channel as `load_audio` takes it; errors as of `check_channel`."""
    text = check_channel(channel)
    return text if text == "mean" else int(text)


def check_part(start: float, duration: float | None):
    """Raise a ValueError for a part of a recording, in seconds, that cannot be."""
    if not 0 <= start < math.inf or not (duration is None or 0 < duration < math.inf):
        raise ValueError(f"start={start} must be at least 0 s and duration={duration} above 0 s, both finite.")


def check_export(format: str, from_waveform: bool, num_frames: int | None, int8: bool):
    """Raise a ValueError for options of `export` that are not known or exclude each other."""
    if format not in EXPORT_FORMATS:
        raise ValueError(f"format={format!r} is not known; expected {' or '.join(map(repr, EXPORT_FORMATS))}.")
    if int8 and format != "onnx":
        raise ValueError(f"int8 is made with onnxruntime; leave it out for format={format!r}, or choose 'onnx'.")
    if num_frames is not None and not from_waveform:
        raise ValueError(
            f"num_frames={num_frames} is for from_waveform, where the graph makes the features; without it they come "
            "from the caller, who cuts or pads them."
        )
    if num_frames is not None and (num_frames < 16 or num_frames % 16):
        raise ValueError(f"num_frames={num_frames} must be a positive multiple of 16.")
