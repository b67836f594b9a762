"""Windows of samples to rows of embeddings: the encoder on a device, and the buckets in which its batches are formed.

Shapes: B windows, T frames, M mel bands, D width, L blocks, t time patches of 160 ms.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from bat_audio.configuration_bat import BatConfig
from bat_audio.load_model import HERE, check_device, find_weights, load_pretrained_encoder
from bat_audio.processing_bat import PATCH_FRAMES, BatFeatureExtractor, fit_frames
from bat_audio_tools.embedding.table import PLACE, vectors_array
from bat_audio_tools.embedding.windows import BrokenRecordingError, Window
from bat_audio_tools.machine import pick_device
from bat_audio_tools.settings import RowSettings

BUCKET_WINDOWS = 256  # A bucket holds at most so many windows.
BUCKET_SECONDS = 1800  # A bucket holds at most so many seconds of sound, unless a single recording is longer.


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

    def __init__(self, settings: RowSettings):
        device, dtype = compute_on(settings)
        self.device = torch.device(device)
        self.model = load_pretrained_encoder(
            device, dtype, settings.checkpoint, settings.revision, compile=settings.compile
        )
        self.processor = BatFeatureExtractor.from_model_config(self.model.config).processor.to(device)
        self.settings = settings

    def num_frames(self, window: Window) -> int:
        return max(self.processor.num_patches(len(window.samples)) * PATCH_FRAMES, self.settings.num_frames)

    def most_windows(self, num_frames: int) -> int:
        """The number of windows that run at once: `batch_size`, or fewer longer ones, which take no more memory."""
        return max(1, min(self.settings.batch_size, self.settings.batch_size * self._input_frames // num_frames))

    @property
    def _input_frames(self) -> int:
        return self.model.config.input_shape[0]

    @torch.inference_mode()
    def __call__(self, windows: list[Window]) -> list[dict[str, torch.Tensor]]:
        """What the table gets of each window, as float32 on the device: vectors, and `tokens` (t, D).

        The windows have one number of frames.
        """
        settings = self.settings
        output, cls_tokens = self.model.encode(self._features(windows), head=ClsTokens() if settings.layers else None)
        columns = {f"cls_{number}": cls_tokens[number - 1].float() for number in settings.layer_numbers}
        pooled = {"cls": output.pooler_output.float()}
        if settings.tokens or "mean" in settings.pool:
            tokens = output.patch_tokens.float().mean(dim=3).transpose(1, 2)  # (B, t, D)
            lengths = [self.processor.num_patches(len(window.samples)) for window in windows]
            with_sound = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
            pooled["mean"] = torch.stack([row.mean(dim=0) for row in with_sound])
            if settings.tokens:
                columns["tokens"] = with_sound
        columns["embedding"] = torch.cat([pooled[name] for name in settings.pool.split("+")], dim=1)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _features(self, windows: list[Window]) -> torch.Tensor:
        """The features (B, 1, T, M) of windows; those of the same number of samples are transformed together."""
        groups = defaultdict(list)
        for place, window in enumerate(windows):
            groups[len(window.samples)].append(place)
        parts = []
        for places in groups.values():
            waveforms = torch.from_numpy(np.stack([windows[place].samples for place in places]))
            # The copy to the GPU goes on in the background only if it is from pinned memory.
            if self.device.type == "cuda":
                waveforms = waveforms.pin_memory()
            features = self.processor.log_mel(waveforms.to(self.device, non_blocking=True))
            parts.append(fit_frames(features, self.num_frames(windows[0])))
        order = torch.tensor(list(itertools.chain(*groups.values()))).argsort()
        return torch.cat(parts)[order.to(self.device)]


class Bucket:
    """Clips that run in batches of one length, and become rows of the table in the order in which they came.

    Args:
        embedded: is called with the windows of each batch when it has run.
    """

    def __init__(self, encoder: Encoder, embedded: Callable[[list[Window]], None]):
        self.encoder, self.embedded = encoder, embedded
        self.windows, self.rows, self.seconds, self.waiting = [], [], 0.0, defaultdict(list)

    @property
    def is_full(self) -> bool:
        return len(self.windows) >= BUCKET_WINDOWS or self.seconds >= BUCKET_SECONDS

    def add(self, window: Window):
        num_frames = self.encoder.num_frames(window)
        self.waiting[num_frames].append(len(self.windows))
        self.windows.append(window)
        self.rows.append(None)
        self.seconds += window.end_s - window.start_s
        if len(self.waiting[num_frames]) == self.encoder.most_windows(num_frames):
            self._encode(num_frames)

    def encode_rest(self):
        for num_frames in sorted(self.waiting):
            self._encode(num_frames)

    def _encode(self, num_frames: int):
        places = self.waiting.pop(num_frames)
        windows = [self.windows[place] for place in places]
        for place, row in zip(places, self.encoder(windows), strict=True):
            self.rows[place], self.windows[place].samples = row, None
        self.embedded(windows)

    @torch.inference_mode()
    def table(self, schema: pa.Schema) -> pa.Table:
        """The rows; waits for the device where it is still at work.

        Raises:
            BrokenRecordingError: there are NaN or infinite values in them.
        """
        columns = []
        for field in schema:
            if field.name in PLACE:
                columns.append(pa.array([window.place[field.name] for window in self.windows], field.type))
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
        """Raise a BrokenRecordingError for vectors that are not finite; `rows` are the places of their windows."""
        finite = np.isfinite(vectors.flatten().to_numpy(zero_copy_only=False)).reshape(len(vectors), -1).all(axis=1)
        if finite.all():
            return
        bad = [self.windows[place] for place in np.unique(rows[~finite])]
        places = ", ".join(f"{window.input.path} at {window.start_s:.2f} s" for window in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        if pa.types.is_float16(vectors.type.value_type):
            cure = "Begin another table without float16 (--float16), whose numbers end at 65504"
        else:
            cure = "Begin another table in float32 (--no-bf16), or with another checkpoint"
        raise BrokenRecordingError(f"NaN or infinite values in the column {name} of {places}{more}. {cure}.")


def buckets(windows: Iterable[Window], encoder: Encoder, embedded: Callable[[list[Window]], None]) -> Iterator[Bucket]:
    """The windows in buckets, with all their batches under way; `embedded` is as of `Bucket`."""
    bucket = Bucket(encoder, embedded)
    for window in windows:
        bucket.add(window)
        if bucket.is_full:
            bucket.encode_rest()
            yield bucket
            bucket = Bucket(encoder, embedded)
    if bucket.windows:
        bucket.encode_rest()
        yield bucket


def compute_on(settings: RowSettings) -> tuple[str, str]:
    """The device and dtype that `auto` and a `bf16` of None mean on this machine.

    Raises:
        ValueError: the device is not there.
    """
    device = pick_device(settings.device)
    check_device(device)
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, "bfloat16" if bf16 else "float32"


def encoder_config(settings: RowSettings) -> tuple[Path, BatConfig]:
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
