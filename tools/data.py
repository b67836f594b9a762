"""Data for fine-tuning: labelled clips from folders, manifests and `datasets`, and a dataset of features and targets.

`read_examples` lists the clips, `split_examples` holds some out, and `ClipDataset` makes features and targets of them.

Shapes: T frames of 10 ms, M mel bands, C labels, S = T/16 steps of 160 ms.
"""

import contextlib
import csv
import importlib
import io
import itertools
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import fsspec
import numpy as np
import torch
from huggingface_hub.errors import HTTPError
from torch import nn
from transformers.utils import logging

from bat_audio.processing_bat import PATCH_FRAMES, BatAudioProcessor, announced_frames, fit_frames
from bat_audio.tools.card import hub_id

# Of sound files, besides the names of libsndfile's formats.
OTHER_SUFFIXES = {".aif", ".aifc", ".iff", ".oga", ".opus", ".sf", ".snd", ".sph"}
MANIFEST_SUFFIXES = (".csv", ".parquet")
MANIFEST_COLUMNS = ("path", "labels", "label", "start", "duration", "onset", "offset")
IGNORED_STEP = -100.0  # target of the steps behind a clip's end, which the frame-wise loss leaves out
TIME_TOLERANCE = 1e-6  # s; times that were stored as float32 are off by less

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class EmbeddedAudio:
    """A sound file inside a `datasets` dataset; its bytes are read only when asked for."""

    dataset: "datasets.Dataset"  # noqa: F821
    row: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}, row {self.row}"

    def open(self) -> io.BytesIO:
        file = io.BytesIO(self.dataset[self.row]["audio"]["bytes"])
        file.name = str(self)  # stands in the errors of load_audio
        return file


@dataclass(frozen=True)
class Example:
    """One clip: a sound file, or the part of it that begins at `start` and lasts `duration`.

    Args:
        source: path of the sound file, or the file inside a dataset.
        labels: what the clip holds, each label once; may be empty.
        start, duration: the part, in seconds; a duration of None reaches to the end of the file.
        events: (onset, offset, label), in seconds from the clip's start; only for frame-wise training.
    """

    source: str | EmbeddedAudio
    labels: tuple[str, ...]
    start: float = 0.0
    duration: float | None = None
    events: tuple[tuple[float, float, str], ...] = ()

    def load(self, processor: BatAudioProcessor) -> torch.Tensor:
        """The waveform (samples,) at the processor's rate; errors as of `load_audio`."""
        return processor.load_audio(self.open(), self.start, self.duration)

    def open(self) -> str | io.BytesIO:
        return self.source if isinstance(self.source, str) else self.source.open()


def read_examples(source, frames: bool = False, split: str | None = None) -> list[Example]:
    """The clips of a data source, in its order (those of a folder sorted by name).

    Args:
        source: one of

            - a folder of class folders, FOLDER/label/**/*.wav, with files of any format that libsndfile reads; hidden
              files are left out, and other files with a warning;
            - a CSV (commas, UTF-8) or Parquet file with the columns `path` (relative to the file's own folder) and
              `labels`, and optionally `start` and `duration` in seconds. Rows about the same part of a sound file are
              one clip with the labels of all of them;
            - a `datasets.Dataset` or `DatasetDict`, a folder written by its save_to_disk, or the name of one on the
              Hub, with the columns `audio` and `labels`, and optionally `start` and `duration`.

            The column `labels`, or else `label`, holds text (several labels are separated by ";"), class numbers, a
            list of these, or nothing for a clip without labels.
        frames: read events for frame-wise training. In a CSV or Parquet file every row is then an event, with its
            times in the columns `onset` and `offset`, in seconds from the clip's start; a row with neither times nor
            labels is a clip without events. A dataset has the column `events` in place of `labels`: for every clip a
            list of dicts with `onset`, `offset` and `label`.
        split: which dataset of a DatasetDict.

    Raises:
        ValueError: missing columns or sounds, wrong times or labels; the message names file, row and column.
        OSError: the source, or a sound file that it names, is not there.
        ImportError: pyarrow, datasets or soundfile is needed and missing.
    """
    name = "the dataset"
    if isinstance(source, str | Path):
        name, path = str(source), Path(source)
        dataset = load_named_dataset(source)
        if dataset is not None:
            source = dataset
        elif split is not None:
            raise ValueError(f"split={split!r} chooses from a DatasetDict, but {name} is none; leave it out.")
        elif path.is_dir():
            if frames:
                raise ValueError(
                    f"{name}: a folder tells no onsets; frame-wise training needs a .csv or .parquet file."
                )
            return _folder_examples(path)
    is_manifest = isinstance(source, str | Path)
    rows = _manifest_rows(path, frames) if is_manifest else _dataset_rows(source, name, frames, split)

    clips: dict[tuple, dict] = {}  # (file, start, duration) -> its events, as the keys of a dict
    for where, file, cells in rows:
        clip = file, read_seconds(cells, "start", where) or 0.0, read_seconds(cells, "duration", where)
        if clip[2] == 0:
            raise ValueError(f"{where}: duration=0 holds no sound; leave it empty to reach to the end of the file.")
        clips.setdefault(clip, {}).update(dict.fromkeys(_events(cells, where, clip[2], frames)))
    if not clips:
        raise ValueError(f"{name}: there are no rows in it.")
    files = {file for file, _, _ in clips if isinstance(file, str)}
    missing = sorted(file for file in files if not os.path.isfile(file))
    if missing:
        raise FileNotFoundError(
            f"{name}: {len(missing)} of {len(files)} sound files are not there: {_some(missing)}. Correct the paths"
            + (", which are relative to the folder of this file." if is_manifest else ".")
        )
    return [
        Example(
            file, tuple(dict.fromkeys(event[2] for event in events)), start, duration, tuple(events) if frames else ()
        )
        for (file, start, duration), events in clips.items()
    ]


def sound_suffixes() -> set[str]:
    """How the names of files end that libsndfile reads, in small letters."""
    suffixes = {f".{name.lower()}" for name in require("soundfile").available_formats()} | OTHER_SUFFIXES
    return suffixes - {".raw"}  # which has no header to tell what is in it


def _folder_examples(folder: Path) -> list[Example]:
    suffixes = sound_suffixes()

    def is_sound(path: Path) -> bool:
        return path.suffix.lower() in suffixes

    paths = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    stray = [path for path in paths if is_sound(path) and path.is_file()]
    if stray:
        raise ValueError(
            f"{folder}: {len(stray)} sounds lie in no class folder: {_some(stray)}. Expected FOLDER/label/sound: move "
            "them into the folder of their class, or elsewhere."
        )
    examples, skipped = [], []
    for class_folder in filter(Path.is_dir, paths):
        files = []
        for parent, subfolders, names in os.walk(class_folder, followlinks=True):
            subfolders[:] = [name for name in subfolders if name[0] != "."]
            files += [Path(parent, name) for name in names if name[0] != "."]
        sounds = sorted(filter(is_sound, files))
        if not sounds:
            raise ValueError(
                f"{class_folder}: no sound file in this class folder that can be read ({' '.join(sorted(suffixes))}); "
                "fill it or remove it."
            )
        skipped += sorted(set(files) - set(sounds))
        examples += [Example(str(file), (class_folder.name,)) for file in sounds]
    if not examples:
        raise ValueError(f"{folder}: no class folders in it; expected FOLDER/label/sound.wav.")
    if skipped:
        logger.warning(f"{folder}: {len(skipped)} files are left out that are no sounds by name (first: {skipped[0]}).")
    return examples


def _manifest_rows(file: Path, frames: bool) -> Iterator[tuple[str, str, dict]]:
    """The name, sound file and cells of each row, the labels in the cell `labels`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file or folder.")
    if file.suffix.lower() not in MANIFEST_SUFFIXES:
        raise ValueError(f"{file}: expected a folder, or a file that ends in .csv or .parquet.")
    columns = manifest_columns(str(file))
    target = "label" if "label" in columns and "labels" not in columns else "labels"
    check_columns(columns, str(file), ["path", target, *(["onset", "offset"] if frames else [])])
    for where, cells in manifest_rows(str(file), MANIFEST_COLUMNS):
        yield where, str(file.parent / cells["path"]), {**cells, "labels": cells[target]}


def manifest_columns(file: str) -> list[str]:
    """The columns of a CSV (commas, UTF-8) or Parquet file, which may be an address of fsspec; errors as below."""
    with _open_manifest(file) as manifest:
        return list(manifest.fieldnames or []) if isinstance(manifest, csv.DictReader) else manifest.schema_arrow.names


def manifest_rows(file: str, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """The name and cells of each row of a CSV or Parquet file; of a Parquet file only the columns that are named.

    Raises:
        ValueError: it cannot be read, or a row has too many cells or no path; the message names the row.
        OSError: it is not there.
    """

    def named_rows():
        if isinstance(manifest, csv.DictReader):
            for cells in manifest:
                where = f"{file}, line {manifest.line_num}"
                if None in cells or None in cells.values():  # more or fewer cells than columns
                    number = len(manifest.fieldnames)
                    raise ValueError(f"{where}: expected {number} cells as in line 1; quote cells that hold commas.")
                yield where, cells
        else:
            known = [column for column in manifest.schema_arrow.names if column in columns]
            batches = manifest.iter_batches(columns=known)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"{file}, row {number}", cells) for number, cells in enumerate(rows))

    with _open_manifest(file) as manifest:
        for where, cells in named_rows():
            if not isinstance(cells["path"], str) or not cells["path"]:
                raise ValueError(f"{where}: path={cells['path']!r} names no sound file.")
            yield where, cells


@contextlib.contextmanager
def _open_manifest(file: str) -> Iterator["csv.DictReader | pyarrow.parquet.ParquetFile"]:  # noqa: F821
    with fsspec.open(file, "rb") as content:
        if file.lower().endswith(".csv"):
            try:
                yield csv.DictReader(io.TextIOWrapper(content, "utf-8-sig", newline=""), strict=True)
            except (UnicodeDecodeError, csv.Error) as error:
                raise ValueError(f"{file}: cannot be read as CSV in UTF-8: {error}.") from error
        else:
            arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
            try:
                yield parquet.ParquetFile(content)
            except (arrow.ArrowException, OSError) as error:
                raise ValueError(f"{file}: cannot be read as Parquet: {error}") from error


def load_named_dataset(source: str | Path) -> "datasets.Dataset | datasets.DatasetDict | None":  # noqa: F821
    """The dataset in a folder of save_to_disk, or of this name on the Hub; None where the source can be neither.

    Raises:
        OSError: it looks like a name on the Hub, but there is no such dataset.
    """
    path = Path(source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return require("datasets").load_from_disk(str(path))
    if not hub_id(source) or path.suffix.lower() in MANIFEST_SUFFIXES:
        return None
    try:
        return require("datasets").load_dataset(source)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # HTTPError: of the Hub's client, no OSError
        raise OSError(
            f"{source}: no such file or folder here, and no dataset of that name could be had from the Hub "
            f"({type(error).__name__}: {error})."
        ) from error


def _dataset_rows(
    dataset, name: str, frames: bool, split: str | None
) -> Iterator[tuple[str, str | EmbeddedAudio, dict]]:
    """The same of a `datasets` dataset; an event is a row of its own."""
    datasets = require("datasets")
    dataset, name = choose_split(dataset, name, split)
    columns = dataset.column_names
    target = "events" if frames else "label" if "label" in columns and "labels" not in columns else "labels"
    check_columns(columns, name, ["audio", target])
    names = dataset.features[target]  # of the classes, where they are numbers
    while not (names is None or isinstance(names, datasets.ClassLabel)):
        if isinstance(names, list):  # as datasets 3 writes lists of dicts
            names = names[0]
        else:
            names = names.get("label") if isinstance(names, dict) else getattr(names, "feature", None)
    others = dataset.select_columns([column for column in (target, "start", "duration") if column in columns])
    for number, (cells, file) in enumerate(zip(others.with_format(None), dataset_sounds(dataset, name), strict=True)):
        where = f"{name}, row {number}"
        events = (cells[target] or [{}]) if frames else [{"label": cells[target]}]
        if isinstance(events, dict):  # a list of dicts in the form of a dict of lists
            events = [dict(zip(events, values, strict=True)) for values in zip(*events.values(), strict=True)] or [{}]
        for event in events:
            labels = event.get("label")
            if names is not None and labels is not None:
                try:
                    labels = [names.int2str(label) for label in (labels if isinstance(labels, list) else [labels])]
                except ValueError as error:
                    raise ValueError(
                        f"{where}, column {target}: {error}; expected 0..{names.num_classes - 1}."
                    ) from error
            yield where, file, {**cells, **event, "labels": labels}


def choose_split(dataset, name: str, split: str | None) -> tuple["datasets.Dataset", str]:  # noqa: F821
    """The dataset of this split, and its name; raises a ValueError where it cannot be told."""
    datasets = require("datasets")
    if isinstance(dataset, datasets.DatasetDict):
        if split is None and len(dataset) == 1:
            split = next(iter(dataset))
        if split not in dataset:
            raise ValueError(f"{name}: split={split!r} is none of its splits; choose from {', '.join(dataset)}.")
        dataset, name = dataset[split], f"{name}, split {split}"
    elif split is not None:
        raise ValueError(f"split={split!r} chooses from a DatasetDict, but {name} is none; leave it out.")
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"Got a data source of type {type(dataset).__name__}; expected a folder, a .csv or .parquet file, or a "
            "datasets.Dataset or DatasetDict."
        )
    return dataset, name


def dataset_sounds(dataset: "datasets.Dataset", name: str) -> Iterator[str | EmbeddedAudio]:  # noqa: F821
    """The sound of each row in the column `audio`; raises a ValueError where there is none."""
    audio = without_decoding(dataset, name)
    all_embedded = audio.flatten().data.column("audio.bytes").null_count == 0  # tells without reading them
    for number in range(len(audio)):
        sound = {} if all_embedded else audio[number]["audio"] or {}
        is_embedded = all_embedded or sound.get("bytes") is not None
        if not is_embedded and not sound.get("path"):
            raise ValueError(f"{name}, row {number}: the column audio is empty.")
        yield EmbeddedAudio(audio, number, name) if is_embedded else sound["path"]


def without_decoding(dataset: "datasets.Dataset", name: str) -> "datasets.Dataset":  # noqa: F821
    """The column `audio` as dicts with `bytes` and `path`; raises a ValueError where it is none of audio."""
    datasets = require("datasets")
    try:
        return dataset.select_columns("audio").cast_column("audio", datasets.Audio(decode=False)).with_format(None)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: the column audio holds no sound files, neither paths nor bytes ({error})."
        ) from error


def check_columns(columns: Sequence[str], name: str, required: Sequence[str]):
    missing = [column for column in required if column not in columns]
    if missing:
        raise ValueError(
            f"{name}: no column {' and no '.join(map(repr, missing))} among {', '.join(map(repr, columns)) or 'none'}; "
            "add it, or rename a column (commas separate those of a CSV file)."
        )


def read_seconds(cells: dict, column: str, where: str) -> float | None:
    value = cells.get(column)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{where}: {column}={value!r} is no time; expected seconds from 0 on, or nothing.")
    return seconds


def _events(cells: dict, where: str, duration: float | None, frames: bool) -> list[tuple]:
    """(onset, offset, label) of each label in the row; without times they are None, which `frames` does not allow."""
    labels = cells["labels"]
    if isinstance(labels, str):
        labels = labels.split(";") if labels.strip() else []
    elif not isinstance(labels, list):
        labels = [] if labels is None else [labels]
    for label in labels:
        if not isinstance(label, str | int) or not str(label).strip():
            raise ValueError(f"{where}: labels={cells['labels']!r} holds {label!r}, which is no label; expected text.")
    onset, offset = read_seconds(cells, "onset", where), read_seconds(cells, "offset", where)
    times = f"{where}: onset={onset} and offset={offset}"
    if (onset is None) != (offset is None) or (frames and (onset is None) != (not labels)):
        raise ValueError(f"{times} with {len(labels)} labels; an event needs all three, a clip without events none.")
    if onset is not None and not onset < (offset if duration is None else min(offset, duration)):
        end = "" if duration is None else f" and before the clip's end at duration={duration}"
        raise ValueError(f"{times}: the onset must come before the offset{end}.")
    return [(onset, offset, str(label).strip()) for label in labels]


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
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def _some(items: Sequence) -> str:
    return ", ".join(map(str, items[:3])) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def check_clips(examples: Sequence[Example], processor: BatAudioProcessor):
    """Read every clip's header and first window, and that of its last event: a small part of the time of an epoch.

    Raises:
        ValueError: clips that cannot be read, start behind the end of their file, are too short, or have events behind
            their end.
        FileNotFoundError: a file has vanished.
    """
    window, soundfile = processor.n_fft / processor.sample_rate, require("soundfile")

    def problem(example: Example) -> str | None:
        duration = window if example.duration is None else min(window, example.duration)
        try:
            processor.log_mel(replace(example, duration=duration).load(processor))
            with soundfile.SoundFile(example.open()) as file:
                is_cut = announced_frames(file) > file.frames
            if is_cut:
                example.load(processor)  # says so, if the clip reaches into what is missing
            if example.events:
                last_onset = max(onset for onset, _, _ in example.events)
                replace(example, start=example.start + last_onset, duration=window).load(processor)
        except ValueError as error:
            message = str(error)
            return message if message.startswith(str(example.source)) else f"{example.source}: {message}"

    with ThreadPool() as threads:  # hides the latency of network drives
        problems = list(filter(None, threads.imap(problem, examples, chunksize=64)))
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(examples)} clips cannot be used; mend them, or leave them out. {_some(problems)}"
        )


def label_names(examples: Iterable[Example]) -> list[str]:
    """The labels of all examples, sorted: the model's classes; raises a ValueError when there are none."""
    names = sorted({label for example in examples for label in example.labels})
    if not names:
        raise ValueError("None of the examples has a label.")
    return names


def split_examples(examples: Sequence[Example], fraction: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, both in their old order; the clips of one file stay together.

    Of every label about `fraction` of the clips go to validation, but never all of them; rare labels choose first.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or so few files that nothing can be held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} of the examples to hold out must lie between 0 and 1.")
    counts: dict[object, Counter] = defaultdict(Counter)  # of each file the clips with each label
    files = [os.path.realpath(e.source) if isinstance(e.source, str) else e.source for e in examples]
    for file, example in zip(files, examples, strict=True):
        counts[file].update(example.labels or [None])
    total = sum(counts.values(), Counter())
    order = list(counts)
    np.random.default_rng(seed).shuffle(order)
    members = defaultdict(list)
    for file in order:
        for label in counts[file]:
            members[label].append(file)
    held, undecided, held_files, owed = Counter(), set(order), set(), 0.0
    for rare in sorted(total, key=lambda label: (total[label], label or "")):
        # What rounding leaves over is passed on, so that many small classes together give their fraction.
        wanted = fraction * total[rare] + owed
        for file in members[rare]:
            leaves_some = all(held[label] + count < total[label] for label, count in counts[file].items())
            if file in undecided and leaves_some and held[rare] + counts[file][rare] / 2 < wanted:
                held.update(counts[file])
                held_files.add(file)
        undecided.difference_update(members[rare])
        owed = min(1.0, max(-1.0, wanted - held[rare]))
    if not held_files:
        raise ValueError(
            f"fraction={fraction} of {len(counts)} files leaves no file for validation; raise it, or name other data."
        )
    return (
        [example for file, example in zip(files, examples, strict=True) if file not in held_files],
        [example for file, example in zip(files, examples, strict=True) if file in held_files],
    )


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training clips; none by default.

    Args:
        mixup: probability of mixing a clip with another one of the dataset, lam * clip + (1 - lam) * other.
        mixup_alpha: lam comes from Beta(mixup_alpha, mixup_alpha).
        freq_masks, freq_width: number of SpecAugment's masks of 0 to `freq_width` mel bands.
        time_masks, time_width: number of masks of 0 to `time_width` frames of 10 ms.
        roll: rotate every clip, and its events, by a random time.
        gain_db: raise or lower every clip by up to so many dB; matters in mixtures alone, as features are scaled.

    Raises:
        ValueError: a value outside its range.
    """

    mixup: float = 0.0
    mixup_alpha: float = 0.8
    freq_masks: int = 0
    freq_width: int = 16
    time_masks: int = 0
    time_width: int = 64
    roll: bool = False
    gain_db: float = 0.0

    def __post_init__(self):
        wrong = [name for name, value in vars(self).items() if not 0 <= value < math.inf]
        if wrong or self.mixup > 1 or self.mixup_alpha == 0:
            raise ValueError(f"{self}: expected finite values from 0 on, mixup up to 1 and mixup_alpha above 0.")


def frame_targets(
    events: Iterable[tuple[float, float, int]],
    num_labels: int,
    num_steps: int,
    seconds: float,
    step: float = 0.16,
    shift: float = 0.0,
) -> torch.Tensor:
    """Which events are heard at each step: (num_steps, num_labels) float32 of 0, 1 and -100.

    A step is active when an event covers at least half of it; an event too short for that marks the step that it covers
    most. An event lasts at most to the clip's end, and the steps behind that are -100.

    Args:
        events: onset and offset in seconds, and the label's number.
        num_steps: steps of the result; events behind them are cut off.
        seconds: length of the clip.
        step: seconds of a step.
        shift: seconds from 0 to `seconds` by which the clip is rotated; what leaves at the end comes in at the start.
    """
    edges = step * np.arange(max(num_steps, math.ceil(seconds / step)) + 1)
    targets = np.zeros((len(edges) - 1, num_labels), dtype=np.float32)
    for onset, offset, label in events:
        covered = np.zeros(len(targets))  # seconds of each step
        for moved in (shift, shift - seconds):
            begin, end = max(onset + moved, 0), min(min(offset, seconds) + moved, seconds)
            covered += np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin), 0, None)
        active = covered >= step / 2 - TIME_TOLERANCE
        targets[active if active.any() else covered.argmax(), label] = 1
    targets[edges[:-1] >= seconds] = IGNORED_STEP
    return torch.from_numpy(targets[:num_steps])


class EpochOrder:
    """The places of a long row of epochs, each of which has all items once; with `shuffle` in an order of its own."""

    def __init__(self, num_items: int, seed: int, shuffle: bool):
        self.num_items = num_items
        self.seed = seed
        self.shuffle = shuffle
        self._order = (-1, np.arange(num_items))  # an epoch and its order

    def __getitem__(self, place: int) -> tuple[int, int]:
        """The epoch and the item at this place."""
        epoch, index = divmod(place, self.num_items)
        if self.shuffle:
            if self._order[0] != epoch:
                self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_items))
            index = int(self._order[1][index])
        return epoch, index


class ClipDataset(torch.utils.data.Dataset):
    """Features and targets of examples, for a `Trainer` or `DataLoader`.

    Item i is a dict of `input_features` (1, T, M) in 0..1 and `labels`: the class number, () int64, or probabilities
    (C,) float32 when the augmentation has mixup; with `multi_label`, 0 or 1 for every label, (C,) float32; with
    `frames`, the same at every step, (S, C), as of `frame_targets`.

    Augmentation in this order: decode, roll, gain, mixup, log-mel features, SpecAugment. The epochs follow each other
    in one long row of items, each of which depends on nothing but the seed and its place: it is the same in any
    process, in any order and after resuming.

    Args:
        labels: the model's classes, in its order; see `label_names`.
        processor: makes the features, which are cut or zero-padded to `num_frames`, a multiple of 16.
        epochs: how often every example occurs, each time with other random changes.
        shuffle: give every epoch an order of its own.

    Raises:
        ValueError: a label that is not among `labels`, a clip with none or several where one is needed, or examples
            without events for `frames`. When an item is made: a clip that cannot be decoded, is too short, or has
            events behind its end; the message names it.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        labels: Sequence[str],
        processor: BatAudioProcessor,
        num_frames: int,
        *,
        multi_label: bool = False,
        frames: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        epochs: int = 1,
        shuffle: bool = False,
    ):
        if num_frames < 1 or num_frames % PATCH_FRAMES:
            raise ValueError(f"num_frames={num_frames} must be a positive multiple of {PATCH_FRAMES}.")
        unknown = sorted({label for example in examples for label in example.labels} - set(labels))
        if unknown:
            raise ValueError(f"{len(unknown)} labels are not among the model's {len(labels)}: {_some(unknown)}.")
        if frames:
            wrong = [example.source for example in examples if example.labels and not example.events]
            problem = "have labels but no events; read them with frames=True"
            seconds = num_frames * processor.hop_length / processor.sample_rate
            unheard = [e.source for e in examples if any(onset >= seconds for onset, _, _ in e.events)]
            if unheard:
                raise ValueError(
                    f"{len(unheard)} of {len(examples)} clips have events behind num_frames={num_frames} ({seconds:g} "
                    f"s), which would never be heard: {_some(unheard)}. Raise num_frames, or divide the recordings "
                    "with the columns start and duration."
                )
        else:
            wrong = [example.source for example in examples if len(example.labels) != 1 and not multi_label]
            problem = "have not exactly one label; correct them, or train with multi_label"
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(examples)} clips {problem}: {_some(wrong)}.")
        self.examples = examples
        self.label2id = {label: number for number, label in enumerate(labels)}
        self.processor = processor
        self.num_frames = num_frames
        self.multi_label = multi_label
        self.frames = frames
        self.augmentation = augmentation or Augmentation()
        self.seed = seed
        self.epochs = epochs
        self.order = EpochOrder(len(examples), seed, shuffle)

    def __len__(self) -> int:
        return self.epochs * len(self.examples)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        epoch, index = self.order[range(len(self))[place]]
        changes = self.augmentation
        generator = np.random.default_rng([self.seed, epoch, index])
        waveform, targets = self._clip(index, generator)
        if changes.mixup and generator.random() < changes.mixup:
            other, other_targets = self._clip(int(generator.integers(len(self.examples))), generator)
            lam = generator.beta(changes.mixup_alpha, changes.mixup_alpha)
            length = max(len(waveform), len(other))
            waveform, other = (nn.functional.pad(w, (0, length - len(w))) for w in (waveform, other))
            waveform = lam * waveform + (1 - lam) * other
            both_ended = (targets < 0) & (other_targets < 0)
            targets = lam * targets.clamp_min(0) + (1 - lam) * other_targets.clamp_min(0)
            targets[both_ended] = IGNORED_STEP
        elif not (self.frames or self.multi_label or changes.mixup):
            targets = targets.argmax()
        try:
            features = fit_frames(self.processor.log_mel(waveform), self.num_frames)[0]
        except ValueError as error:
            raise ValueError(f"{self.examples[index].source}: {error}") from error
        for axis, masks, width in (
            (2, changes.freq_masks, changes.freq_width),
            (1, changes.time_masks, changes.time_width),
        ):
            for _ in range(masks):
                size = min(int(generator.integers(width + 1)), features.shape[axis])
                features.narrow(axis, int(generator.integers(features.shape[axis] - size + 1)), size).zero_()
        return {"input_features": features, "labels": targets}

    def _clip(self, index: int, generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The rolled and scaled waveform (samples,) and its targets, (C,) or (S, C)."""
        example, rate = self.examples[index], self.processor.sample_rate
        waveform = example.load(self.processor)
        samples = len(waveform)
        shift = int(generator.integers(samples)) if self.augmentation.roll else 0
        if self.augmentation.gain_db:
            waveform = waveform * 10 ** (generator.uniform(-1, 1) * self.augmentation.gain_db / 20)
        if self.frames:
            events = [(onset, offset, self.label2id[label]) for onset, offset, label in example.events]
            late = [event for event in example.events if event[0] >= samples / rate]
            if late:
                raise ValueError(
                    f"{example.source}: {samples / rate:.3f} s long, but it has events behind its end: {_some(late)}."
                )
            step = PATCH_FRAMES * self.processor.hop_length / rate
            steps = self.num_frames // PATCH_FRAMES
            targets = frame_targets(events, len(self.label2id), steps, samples / rate, step, shift / rate)
        else:
            targets = torch.zeros(len(self.label2id))
            targets[[self.label2id[label] for label in example.labels]] = 1
        return waveform.roll(shift), targets
