"""Unlabelled clips for pre-training: a survey of recordings of any format and length, and a dataset of their stretches.

Shapes: T frames of 10 ms, M mel bands; V views of a clip, each with K of its patches.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import nn
from transformers.utils import logging

from bat_audio.audio_bat import Sound, load_audio
from bat_audio.processing_bat import BatAudioProcessor, fit_frames
from bat_audio_tools.folders import whole
from bat_audio_tools.sounds.listing import SCHEMA, list_inputs, name_of, read_dataset
from bat_audio_tools.sounds.manifests import without_decoding
from bat_audio_tools.sounds.reading import Input, opened
from bat_audio_tools.training.clips import EpochOrder
from bat_audio_tools.training.masked_regression import block_masks

SURVEY_CHUNK = 4096  # So many recordings are measured at a time.
LISTED = 3  # A message names so many broken recordings; broken.txt lists all of them.
logger = logging.get_logger(__name__)


class Recordings:
    """The recordings of a data source: where they are, and how many seconds they last.

    Args:
        data: one source or several, as for `bat-audio embed`.
        split: of a dataset.
        channel: as of `list_inputs`.

    Raises:
        ValueError, OSError: as of `list_inputs` and `read_dataset`.
    """

    def __init__(self, data, split: str | None, channel: str = "mean"):
        sources = data if isinstance(data, list | tuple) else [data]
        named = read_dataset(sources, split)
        self.sounds = None if named is None else without_decoding(*named)
        self._sources, self._named, self._channel = sources, named, channel

    def survey(self, folder: Path, skip_broken: bool) -> dict:
        """Measure every recording by its header and write folder/recordings.parquet, unless it lists them already.

        Returns:
            `recordings` and `hours` that can be used, `broken` that cannot, and `digest` of the list.

        Raises:
            ValueError: there are broken ones, and they are not to be skipped; folder/broken.txt has them all. Or all
                are broken.
        """
        table, facts = folder / "recordings.parquet", {}
        if table.is_file():
            facts = json.loads(parquet.read_metadata(table).metadata[b"survey"])
            digest = hashlib.sha256()
            for item in self._items():
                digest.update(name_of(item))
            if facts["digest"] != digest.hexdigest():
                facts = {}
        if not facts:
            facts = self._measure(folder)
        if facts["broken"]:
            problem = f"{facts['broken']} of {facts['broken'] + facts['recordings']} recordings cannot be read"
            first = "; ".join(facts["first_broken"])
            if not (skip_broken and facts["recordings"]):
                table.unlink()  # The next run measures the recordings again, some of which may be mended.
                raise ValueError(
                    f"{problem} ({first}). {folder / 'broken.txt'} lists them: mend or remove them, or leave them out "
                    "with --skip-broken."
                )
            logger.warning(f"{problem} and are left out ({first}); {folder / 'broken.txt'} lists them.")
        return facts

    def _items(self) -> Iterator[Input]:
        return (item for item, _ in list_inputs(self._sources, self._named, self._channel))

    def _measure(self, folder: Path) -> dict:
        schema = SCHEMA.append(pa.field("seconds", pa.float64()))
        count, seconds, broken, items, digest = 0, 0.0, [], self._items(), hashlib.sha256()
        with (
            whole(folder / "recordings.parquet") as partial,
            ThreadPool() as threads,
            parquet.ParquetWriter(partial, schema) as writer,
        ):
            while chunk := list(islice(items, SURVEY_CHUNK)):
                rows = []
                for item, measured in zip(chunk, threads.map(self._seconds, chunk), strict=True):
                    digest.update(name_of(item))
                    if isinstance(measured, str):
                        broken.append(f"{item.path}: {measured}")
                    else:
                        rows.append({**vars(item), "seconds": measured})
                        count, seconds = count + 1, seconds + measured
                writer.write_table(pa.Table.from_pylist(rows, schema))
            if broken:
                (folder / "broken.txt").write_text("".join(f"{line}\n" for line in broken), encoding="utf-8")
            facts = {
                "recordings": count,
                "hours": round(seconds / 3600, 3),
                "broken": len(broken),
                "first_broken": broken[:LISTED],
                "digest": digest.hexdigest(),
            }
            writer.add_key_value_metadata({"survey": json.dumps(facts)})
        return facts

    def _seconds(self, item: Input) -> float | str:
        """The seconds of the part of a recording to be used, or the reason why there are none."""
        if item.problem is not None:
            return item.problem
        try:
            with opened(item.path, item.content(self.sounds)) as source, Sound(source) as sound:
                seconds = sound.measure() - item.start
        except Exception as error:  # A decoder may raise anything for a damaged file.
            return " ".join(str(error).split()) or type(error).__name__
        if item.duration is not None:
            seconds = min(seconds, item.duration)
        return seconds if seconds > 0 else f"holds nothing from {item.start} s on"


class MaskedClips(torch.utils.data.Dataset):
    """Stretches of recordings, and the patches of them that a student sees, for a `Trainer` or `DataLoader`.

    Item i is a dict of `input_features` (1, T, M) in 0..1 and `ids_keep` (V, K), see `block_masks`.

    In every epoch a recording gives one stretch for every `clip_seconds` of its length, rounded, but at least one. Each
    stretch is from a random place, and every epoch has them in an order of its own. They are rotated in time by a
    random shift and zero-padded to `clip_seconds` before the features are made; the authors padded to the longest clip
    of a batch. An item depends on nothing but the seed and its place in the row of epochs.

    Args:
        recordings: surveyed into `folder`.
        processor: makes the features, which are zero-padded to `num_frames`.
        clip_seconds: length of the stretches; a shorter recording is a clip by itself.
        masks: arguments `count`, `grid`, `keep` and `block` of `block_masks`.
        num_items: length of the row.
        skip_broken: take the next clip in place of one that cannot be decoded, with a warning.

    Raises:
        ValueError, OSError: when an item is made, a clip that cannot be decoded; the message names it.
    """

    def __init__(
        self,
        recordings: Recordings,
        folder: Path,
        processor: BatAudioProcessor,
        num_frames: int,
        *,
        clip_seconds: float,
        masks: dict,
        num_items: int,
        seed: int = 0,
        skip_broken: bool = False,
    ):
        self.recordings = recordings
        self.table = parquet.read_table(folder / "recordings.parquet").combine_chunks()
        self.processor = processor
        self.num_frames = num_frames
        self.clip_seconds = clip_seconds
        self.masks = masks
        self.num_items = num_items
        self.seed = seed
        self.skip_broken = skip_broken
        stretches = np.maximum(1, np.round(self.table["seconds"].to_numpy() / clip_seconds)).astype(np.int64)
        self.ends = stretches.cumsum()  # Stretch i belongs to the first recording whose end is above i.
        self.order = EpochOrder(int(self.ends[-1]), seed, shuffle=True)

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        place = range(self.num_items)[place]
        _, stretch = self.order[place]
        generator = np.random.default_rng([self.seed, place])
        row = int(np.searchsorted(self.ends, stretch, side="right"))
        facts = self.table.slice(row, 1).to_pylist()[0]
        seconds = facts.pop("seconds")
        item = Input(**facts)
        try:
            features = self._features(item, seconds, generator)
        except (OSError, ValueError) as error:
            message = str(error) if str(error).startswith(item.path) else f"{item.path}: {error}"
            if not self.skip_broken:
                raise ValueError(f"{message} Mend it or leave it out and begin anew, or use --skip-broken.") from error
            logger.warning_once(f"{message} The next clip takes its place, whenever it is its turn.")
            return self[(place + 1) % self.num_items]
        masks = torch.Generator().manual_seed(int(generator.integers(2**63)))
        return {"input_features": features, "ids_keep": block_masks(**self.masks, generator=masks)}

    def _features(self, item: Input, seconds: float, generator: np.random.Generator) -> torch.Tensor:
        rate = self.processor.sample_rate
        start, duration = item.start, item.duration
        if seconds > self.clip_seconds:
            start, duration = start + generator.uniform(0, seconds - self.clip_seconds), self.clip_seconds
        with opened(item.path, item.content(self.recordings.sounds)) as source:
            waveform = load_audio(source, start, duration, rate, item.channel_to_read)
        samples = round(self.clip_seconds * rate)
        waveform = waveform[:samples]  # The sound may be longer than its header tells.
        if len(waveform) == 0:
            raise ValueError(f"{item.path}: holds no samples from {start} s on.")
        waveform = waveform.roll(int(generator.integers(len(waveform))))
        waveform = nn.functional.pad(waveform, (0, samples - len(waveform)))
        return fit_frames(self.processor.log_mel(waveform), self.num_frames)[0]
