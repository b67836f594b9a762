"""From a pile of recordings to a table of embeddings: `bat-audio embed`.

The stages: list the recordings and cut the list into units (`embed_inputs`), decode them into windows (`embed_decode`),
encode these in batches of one length, and write a shard for each unit (`embed_table`). An engine says where they run.

What the table holds depends on settings, inputs and the kind of device, but not on the engine, on the number of
processes, or on where an earlier run was stopped: units are fixed beforehand, and batches are formed in each by itself.

Shapes: B clips, T frames, M mel bands, D width, L blocks, t time patches of 160 ms.
"""

import contextlib
import errno
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub.utils.sha import sha_fileobj
from tqdm import tqdm

from bat_audio.configuration_bat import BatConfig
from bat_audio.load_model import HERE, find_weights, load_pretrained_encoder
from bat_audio.processing_bat import PATCH_FRAMES, BatFeatureExtractor, fit_frames
from bat_audio.tools.data import pick_device, require, without_decoding
from bat_audio.tools.embed_decode import READ_AHEAD, Clip, Cut, DecodingProcesses, read_clips
from bat_audio.tools.embed_inputs import Input, Plan, is_address, list_inputs, read_dataset, write_plan
from bat_audio.tools.embed_settings import EmbedSettings, StartError
from bat_audio.tools.embed_table import PLACE, Table, row_schema, vectors_array

POOL_CLIPS = 256  # that are sorted by length and written together
POOL_SECONDS = 1800  # of sound in them, at most; one longer recording is a pool by itself
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ClsTokens:
    """A `BlockReader` that gives every block's CLS tokens (L, B, D), so that no other tokens are kept."""

    block_attention = None

    def mix_patches(self, mix: None, layer: int, patch_tokens: torch.Tensor) -> None:
        return None

    def mix_cls(self, cls_tokens: torch.Tensor) -> torch.Tensor:
        return cls_tokens

    def classify(self, cls_mix: torch.Tensor, patch_mix: None) -> torch.Tensor:
        return cls_mix


class Encoder:
    """The encoder and its front end on a device.

    Raises:
        ValueError: no such device, or a checkpoint that is none.
        OSError: there are no weights.
    """

    def __init__(self, settings: EmbedSettings):
        device, dtype = compute_on(settings)
        self.device = torch.device(device)
        self.model = load_pretrained_encoder(
            device, dtype, settings.checkpoint, settings.revision, compile=settings.compile
        )
        self.processor = BatFeatureExtractor.from_model_config(self.model.config).processor.to(device)
        self.settings = settings

    def num_frames(self, clip: Clip) -> int:
        return max(self.processor.num_patches(len(clip.samples)) * PATCH_FRAMES, self.settings.num_frames)

    def most_clips(self, num_frames: int) -> int:
        """That run at once: `batch_size`, or so many longer ones as take no more memory."""
        return max(1, min(self.settings.batch_size, self.settings.batch_size * self._input_frames // num_frames))

    @property
    def _input_frames(self) -> int:
        return self.model.config.input_shape[0]

    @torch.inference_mode()
    def __call__(self, clips: list[Clip]) -> list[dict[str, torch.Tensor]]:
        """What the table gets of each clip, as float32 on the device: vectors, and `tokens` (t, D).

        The clips have one number of frames.
        """
        settings = self.settings
        output, cls_tokens = self.model.encode(self._features(clips), head=ClsTokens() if settings.layers else None)
        columns = {f"cls_{number}": cls_tokens[number - 1].float() for number in settings.layer_numbers}
        pooled = {"cls": output.pooler_output.float()}
        if settings.frames or "mean" in settings.pool:
            tokens = output.patch_tokens.float().mean(dim=3).transpose(1, 2)  # (B, t, D)
            lengths = [self.processor.num_patches(len(clip.samples)) for clip in clips]
            with_sound = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
            pooled["mean"] = torch.stack([row.mean(dim=0) for row in with_sound])
            if settings.frames:
                columns["tokens"] = with_sound
        columns["embedding"] = torch.cat([pooled[name] for name in settings.pool.split("+")], dim=1)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _features(self, clips: list[Clip]) -> torch.Tensor:
        """(B, 1, T, M); clips of the same number of samples are transformed together."""
        groups = defaultdict(list)
        for place, clip in enumerate(clips):
            groups[len(clip.samples)].append(place)
        parts = []
        for places in groups.values():
            waveforms = torch.from_numpy(np.stack([clips[place].samples for place in places]))
            if self.device.type == "cuda":  # only from pinned memory the copy does not wait
                waveforms = waveforms.pin_memory()
            features = self.processor.log_mel(waveforms.to(self.device, non_blocking=True))
            parts.append(fit_frames(features, self.num_frames(clips[0])))
        order = torch.tensor(list(itertools.chain(*groups.values()))).argsort()
        return torch.cat(parts)[order.to(self.device)]


class Pool:
    """Clips that run in batches of one length, and become rows of the table in the order in which they came."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.clips, self.rows, self.seconds, self.waiting = [], [], 0.0, defaultdict(list)

    @property
    def is_full(self) -> bool:
        return len(self.clips) >= POOL_CLIPS or self.seconds >= POOL_SECONDS

    def add(self, clip: Clip):
        num_frames = self.encoder.num_frames(clip)
        self.waiting[num_frames].append(len(self.clips))
        self.clips.append(clip)
        self.rows.append(None)
        self.seconds += clip.end_s - clip.start_s
        if len(self.waiting[num_frames]) == self.encoder.most_clips(num_frames):
            self._encode(num_frames)

    def encode_rest(self):
        for num_frames in sorted(self.waiting):
            self._encode(num_frames)

    def _encode(self, num_frames: int):
        places = self.waiting.pop(num_frames)
        for place, row in zip(places, self.encoder([self.clips[place] for place in places]), strict=True):
            self.rows[place], self.clips[place].samples = row, None

    @torch.inference_mode()
    def table(self, schema: pa.Schema) -> pa.Table:
        """The rows; waits for the device where it is still at work.

        Raises:
            BrokenRecordingError: there are NaN or infinite values in them.
        """
        columns = []
        for field in schema:
            if field.name in PLACE:
                columns.append(pa.array([clip.place[field.name] for clip in self.clips], field.type))
                continue
            values = [row[field.name] for row in self.rows]
            if field.name == "tokens":
                offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
                vectors = vectors_array(torch.cat(values).cpu().numpy(), field.type.value_type)
                self._check_finite(field.name, vectors, np.repeat(np.arange(len(values)), np.diff(offsets)))
                columns.append(pa.ListArray.from_arrays(offsets, vectors, field.type))
            else:
                vectors = vectors_array(torch.stack(values).cpu().numpy(), field.type)
                self._check_finite(field.name, vectors, np.arange(len(values)))
                columns.append(vectors)
        return pa.table(columns, schema=schema)

    def _check_finite(self, name: str, vectors: pa.FixedSizeListArray, rows: np.ndarray):
        """`rows` are the places of the clips that the vectors belong to."""
        finite = np.isfinite(vectors.flatten().to_numpy(zero_copy_only=False)).reshape(len(vectors), -1).all(axis=1)
        if finite.all():
            return
        bad = [self.clips[place] for place in np.unique(rows[~finite])]
        places = ", ".join(f"{clip.input.path} at {clip.start_s:.2f} s" for clip in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        if pa.types.is_float16(vectors.type.value_type):
            cure = "Begin another table without float16 (--float16), whose numbers end at 65504"
        else:
            cure = "Begin another table in float32 (--no-bf16), or with another checkpoint"
        raise BrokenRecordingError(f"NaN or infinite values in the column {name} of {places}{more}. {cure}.")


def pools(clips: Iterable[Clip], encoder: Encoder) -> Iterator[Pool]:
    """The clips in pools, with all their batches under way."""
    pool = Pool(encoder)
    for clip in clips:
        pool.add(clip)
        if pool.is_full:
            pool.encode_rest()
            yield pool
            pool = Pool(encoder)
    if pool.clips:
        pool.encode_rest()
        yield pool


def compute_on(settings: EmbedSettings) -> tuple[str, str]:
    """The device and dtype that `auto` and a `bf16` of None mean on this machine."""
    device = pick_device(settings.device)
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, "bfloat16" if bf16 else "float32"


def read_config(settings: EmbedSettings) -> tuple[Path, BatConfig]:
    """The file with the weights, and the config that belongs to it.

    Raises:
        OSError: there are no weights.
        ValueError: the encoder lacks one of the layers.
    """
    weights = find_weights(settings.checkpoint, settings.revision)
    config = BatConfig.from_pretrained(weights.parent if (weights.parent / "config.json").is_file() else HERE)
    layers = settings.layer_numbers
    if layers and not 1 <= min(layers) <= max(layers) <= config.num_hidden_layers:
        raise ValueError(f"layers={settings.layers!r}: the encoder has the blocks 1 to {config.num_hidden_layers}.")
    return weights, config


def file_digest(file: Path) -> str:
    """SHA-256 in hexadecimal."""
    with file.open("rb") as content:
        return sha_fileobj(content).hex()


def describe(settings: EmbedSettings, weights: Path, config: BatConfig, inputs: dict) -> dict:
    """What metadata.json says, so that a table can be traced and continued."""
    # The Hub's cache keeps models--namespace--name/snapshots/commit/model.safetensors.
    repository = re.fullmatch(r"models--(.+)--(.+)", weights.parent.parent.parent.name)
    device, dtype = compute_on(settings)
    packages = {"bat_audio": "bat-audio", "torch": "torch", "transformers": "transformers"}
    return {
        "checkpoint": "/".join(repository.groups()) if repository else str(weights.absolute()),
        "commit": weights.parent.name if repository else None,
        "weights_sha256": file_digest(weights),
        "config": {name: getattr(config, name) for name in _config_names()},
        "device": device,
        "versions": {name: importlib.metadata.version(package) for name, package in packages.items()},
        "settings": {**settings.that_decide(), "bf16": dtype == "bfloat16"},
        "inputs": inputs,
    }


def _config_names() -> list[str]:
    """Of BAT's own settings, without those that Transformers adds, which differ between its versions."""
    parameters = inspect.signature(BatConfig.__init__).parameters.values()
    return [item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD and item.name != "self"]


# Of metadata.json; the digest of the weights decides on the checkpoint.
MAY_CHANGE = {"checkpoint", "commit", "device", "versions.torch", "versions.transformers"}


def begin(settings: EmbedSettings, table: Table, sources: list, dataset: tuple | None):
    """Write a table's plan and metadata, or see that it was begun in the same way.

    Raises:
        ValueError: the folder holds a table that was begun in another way; or an input has no sounds.
        FileNotFoundError: an input is not there.
        OSError: there are no weights, or the folder cannot be written.
    """
    weights, config = read_config(settings)
    Cut.of(settings, config)  # refuses windows that are too short
    table.prepare()
    goes_on = table.exists("metadata.json") and bool(table.finished_units())  # else nothing would be lost
    stored = table.read_json("metadata.json") if goes_on else {}
    if settings.stored_inputs:
        if not goes_on:
            raise ValueError(
                f"{table.address}: holds no shards of a table whose list of inputs could be taken; leave out "
                "stored_inputs (--stored-inputs)."
            )
        inputs = stored["inputs"]
    else:
        # The first plan stays: a file may have another size since then, and the units other limits.
        with open(os.devnull, "wb") if goes_on else table.write("inputs.parquet") as file:
            inputs = write_plan(list_inputs(sources, dataset), file, settings.shard_size)
        inputs["folder"] = os.getcwd() if dataset is None and any(map(_is_relative, sources)) else None
    inputs["fingerprint"] = None if dataset is None else dataset[0]._fingerprint
    metadata = json.loads(json.dumps(describe(settings, weights, config, inputs)))  # as it will be read
    if not goes_on:
        table.write_json("metadata.json", metadata)
        return
    then, now = _flatten(stored), _flatten(metadata)
    changes = {name: value for name, value in now.items() if value != then.get(name) and name not in MAY_CHANGE}
    if changes:
        said = ", ".join(f"{name} was {then.get(name)!r} and is {value!r}" for name, value in changes.items())
        cure = "Repeat the first command to go on with it, or choose another folder."
        if all(name in ("inputs.files", "inputs.sha256", "inputs.folder") for name in changes):
            cure += (
                " With stored_inputs (--stored-inputs) it goes on with the list of inputs that it was begun with, in "
                "which relative paths are meant from the current folder."
            )
        raise ValueError(f"{table.address}: the table in it was begun in another way: {said}. {cure}")


def _is_relative(source: str | Path) -> bool:
    return not is_address(str(source)) and not os.path.isabs(source)


def _flatten(metadata: dict) -> dict:
    parts = (
        {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        for name, value in metadata.items()
    )
    return {name: value for part in parts for name, value in part.items()}


class BrokenRecordingError(OSError):
    """A recording cannot be embedded, and is not to be left out: the settings are strict, or the vectors not finite."""


class Progress:
    """The bar of a run: files done, clips/s, audio-hours/s and the time left."""

    def __init__(self, num_inputs: int, done: int):
        self.clips, self.seconds, self.failed = 0, 0.0, 0
        every = 0.5 if sys.stderr.isatty() else 30.0  # s; a log is not to be filled with bars
        self.bar = tqdm(total=num_inputs, initial=done, unit="file", mininterval=every, miniters=0)
        self.began = time.perf_counter()
        self.lock = threading.Lock()  # the thread that writes rows reports them

    def add(self, files: int = 0, clips: int = 0, seconds: float = 0.0, failed: int = 0):
        with self.lock:
            self._add(files, clips, seconds, failed)

    def _add(self, files: int, clips: int, seconds: float, failed: int):
        self.clips, self.seconds, self.failed = self.clips + clips, self.seconds + seconds, self.failed + failed
        rates = self.rates()
        self.bar.set_postfix_str(
            f"{rates['clips_per_second']:.1f} clips/s, {rates['audio_hours_per_second']:.3g} audio-hours/s, "
            f"{self.failed} failed",
            refresh=False,
        )
        self.bar.update(files)

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {
            "seconds": seconds,
            "clips_per_second": self.clips / seconds,
            "audio_hours_per_second": self.seconds / 3600 / seconds,
        }


class Stages:
    """The stages of a run that has begun, for an engine to join: `clips` decodes units, `write` makes one's shard."""

    def __init__(self, settings: EmbedSettings, dataset: tuple | None):
        self.settings, self.dataset = settings, dataset
        self.sounds = None if dataset is None else without_decoding(*dataset)
        self.table = Table(settings.out)
        self.plan = Plan(self.table.open("inputs.parquet"))
        _, config = read_config(settings)
        self.cut = Cut.of(settings, config)
        self.schema = row_schema(
            config.hidden_size, settings.pool, settings.layer_numbers, settings.frames, settings.float16
        )

    def clips(self, units: Iterable[int], executor: Executor | None, workers: int) -> Iterator[tuple[int, Clip]]:
        """The windows of the units' recordings, each with its unit."""

        def content(item: Input) -> bytes | None:
            return None if item.row is None else self.sounds[item.row]["audio"]["bytes"]

        inputs = ((unit, item, content(item)) for unit in units for item in self.plan.unit(unit))
        return read_clips(executor, self.cut, inputs, READ_AHEAD * workers)

    def write(self, unit: int, clips: Iterable[Clip], encoder: Encoder, report: Callable):
        """Encode a unit's windows and write its shard, with the broken ones in its list of errors.

        Args:
            report: gets the numbers of files, clips, seconds of sound, and failed files, as they come.

        Raises:
            BrokenRecordingError: there is a broken one, and the settings are strict.
            OSError: the shard cannot be written.
        """

        def whole_clips() -> Iterator[Clip]:
            last = None
            for clip in clips:
                if clip.error is not None and self.settings.strict:
                    raise BrokenRecordingError(
                        f"{clip.input.path}: {clip.error} Mend it, leave it out, or run without strict."
                    )
                failed = shard.failed
                if clip.error is not None:
                    shard.add_error(clip)
                report(files=clip.input != last, failed=shard.failed - failed)
                last = clip.input
                if clip.error is None:
                    yield clip

        def write_rows(pool: Pool):
            shard.add(pool.table(self.schema), pool.seconds)
            report(clips=len(pool.clips), seconds=pool.seconds)

        # A thread fetches the rows from the device and writes them, while the next ones are under way.
        with self.table.write_shard(unit, self.schema) as shard, ThreadPoolExecutor(1) as thread:
            written = thread.submit(int)
            for pool in pools(whole_clips(), encoder):
                written.result()
                written = thread.submit(write_rows, pool)
            written.result()


@contextlib.contextmanager
def on_this_machine(settings: EmbedSettings) -> Iterator[tuple[EmbedSettings, Callable]]:
    """The engine for one machine: decoding in processes of their own, the encoder in this one."""
    device, dtype = compute_on(settings)
    yield replace(settings, device=device, bf16=dtype == "bfloat16"), run_locally


def run_locally(stages: Stages, units: list[int], report: Callable):
    workers = stages.settings.workers
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Before torch has threads or a GPU.
    with DecodingProcesses(workers) if workers else contextlib.nullcontext() as executor:
        encoder = Encoder(stages.settings)
        for unit, clips in itertools.groupby(stages.clips(units, executor, workers), key=itemgetter(0)):
            stages.write(unit, (clip for _, clip in clips), encoder, report)


def engine(settings: EmbedSettings) -> contextlib.AbstractContextManager[tuple[EmbedSettings, Callable]]:
    """Where to run: the settings with the device and dtype there, and what runs units of `Stages` on it."""
    if settings.engine == "local":
        return on_this_machine(settings)
    require("ray.data", "ray")
    from bat_audio.tools.embed_ray import on_ray

    return on_ray(settings)


def explain(error: Exception) -> str:
    """One line about what stopped a run."""
    if isinstance(error, OSError):
        return str(error)
    reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    if isinstance(error, MemoryError) or "memory" in reason:
        reason += (
            " A smaller batch_size (--batch-size) takes less memory; where there are shards already, begin another "
            "table with it."
        )
    return reason


def embed(settings: EmbedSettings) -> dict[str, float]:
    """Embed recordings into a table, see `embed_table`. A run that was stopped goes on when it is repeated.

    Returns:
        `files`, `failed` of them, `rows` and `audio_hours` of the table; `seconds`, `clips_per_second` and
        `audio_hours_per_second` of this run.

    Raises:
        ValueError: inputs, settings, and what the folder holds do not go together; nothing has been computed.
        FileNotFoundError: an input or the checkpoint's file or folder is not there.
        StartError: weights cannot be had, or the folder cannot be written or is in use by another run.
        BrokenRecordingError: a recording is broken and the settings are strict, or embeddings are not finite.
        OSError: the table cannot be written further, memory is lacking, or a process was killed.
        ImportError: soundfile, soxr, pyarrow or Ray is missing.
    """
    for library in ("soundfile", "soxr"):
        require(library, "embed")
    sources = settings.inputs if isinstance(settings.inputs, list | tuple) else [settings.inputs]
    table = Table(settings.out)
    if table.is_local and os.path.isfile(table.folder):
        raise ValueError(f"{table.address}: a file; name a folder to write (--out).")
    with contextlib.ExitStack() as stack:
        settings, run = stack.enter_context(engine(settings))
        try:
            dataset = read_dataset(sources, settings.split)
            if not table.exists("metadata.json") and (others := table.other_files()):
                raise ValueError(
                    f"{table.address}: holds other files, such as {others[0]}, but no table to go on with."
                )
            stack.enter_context(table.lock())
            begin(settings, table, sources, dataset)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in FULL_DISK:
                raise OSError(f"{table.address}: {error} (nothing is lost; the same command goes on)") from error
            raise StartError(str(error)) from error
        stages = Stages(settings, dataset)
        plan, finished = stages.plan, table.finished_units()
        if settings.retry:
            finished = {unit for unit in finished if not table.read_footer(unit)["failed"]}
        progress = Progress(plan.num_inputs, sum(map(plan.size, finished)))
        with progress.bar:
            try:
                if units := [unit for unit in range(plan.num_units) if unit not in finished]:
                    run(stages, units, progress.add)
                counts = table.finish(plan.num_units)
            except BrokenRecordingError:
                raise
            except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: torch's, above all a lack of memory
                done = f"{len(table.finished_units())} of {plan.num_units} shards are done"
                raise OSError(
                    f"{table.address}: {explain(error)} ({done}; the same command goes on from there)"
                ) from error
    if settings.strict and counts["failed"]:
        raise BrokenRecordingError(
            f"{counts['failed']} recordings are broken; {table.address}/errors.parquet lists them."
        )
    return {"files": plan.num_inputs, **counts, **progress.rates()}
