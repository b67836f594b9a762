"""Labelled clips from folders, manifests and `datasets`.

`read_examples` lists the clips, `check_clips` reads the beginning of each, and `split_examples` holds some out.
"""

import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from bat_audio.audio_bat import Sound
from bat_audio.processing_bat import BatAudioProcessor
from bat_audio_tools.machine import require
from bat_audio_tools.names import some_of, unreadable_kind
from bat_audio_tools.settings import channel_number
from bat_audio_tools.sounds.manifests import (
    MANIFEST_SUFFIXES,
    EmbeddedAudio,
    check_columns,
    choose_split,
    dataset_sounds,
    load_named_dataset,
    manifest_columns,
    manifest_rows,
    read_channel,
    read_seconds,
    sound_suffixes,
)

MANIFEST_COLUMNS = ("path", "labels", "label", "start", "duration", "channel", "onset", "offset")
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Example:
    """One clip: a sound file, or the part of it that begins at `start` and lasts `duration`.

    Args:
        source: path of the sound file, or the file inside a dataset.
        labels: what the clip holds, each label once; may be empty.
        start, duration: the part, in seconds; a duration of None reaches to the end of the file.
        events: (onset, offset, label), in seconds from the clip's start; only for frame-wise training.
        channel: of the file, "mean" or a number from 0 on.
    """

    source: str | EmbeddedAudio
    labels: tuple[str, ...]
    start: float = 0.0
    duration: float | None = None
    events: tuple[tuple[float, float, str], ...] = ()
    channel: str = "mean"

    def load(self, processor: BatAudioProcessor) -> torch.Tensor:
        """The waveform (samples,) at the processor's rate; errors as of `load_audio`."""
        return processor.load_audio(self.open(), self.start, self.duration, channel_number(self.channel))

    def open(self) -> str | io.BytesIO:
        return self.source if isinstance(self.source, str) else self.source.open()


def read_examples(source, frames: bool = False, split: str | None = None, channel: str = "mean") -> list[Example]:
    """The clips of a data source, in its order (those of a folder sorted by name).

    Args:
        source: one of

            - a folder of class folders, FOLDER/label/**/*.wav, with sound files of any format; hidden files are left
              out, and other files with a warning;
            - a CSV (commas, UTF-8) or Parquet file with the columns `path` (relative to the file's own folder) and
              `labels`, and optionally `start` and `duration` in seconds and `channel`. Rows about the same part of a
              sound file are one clip with the labels of all of them;
            - a `datasets.Dataset` or `DatasetDict`, a folder written by its save_to_disk, or the name of one on the
              Hub, with the columns `audio` and `labels`, and optionally `start`, `duration` and `channel`.

            The column `labels`, or else `label`, holds text (several labels are separated by ";"), class numbers, a
            list of these, or nothing for a clip without labels.
        frames: read events for frame-wise training. In a CSV or Parquet file every row is then an event, with its
            times in the columns `onset` and `offset`, in seconds from the clip's start; a row with neither times nor
            labels is a clip without events. A dataset has the column `events` in place of `labels`: for every clip a
            list of dicts with `onset`, `offset` and `label`.
        split: which dataset of a DatasetDict.
        channel: of the clips for which no column tells one, "mean" or a number from 0 on.

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
            return _folder_examples(path, channel)
    is_manifest = isinstance(source, str | Path)
    rows = _manifest_rows(path, frames) if is_manifest else _dataset_rows(source, name, frames, split)

    # The keys are clips (file, start, duration, channel), the values dicts whose keys are a clip's events, each once.
    clips: dict[tuple, dict] = {}
    for where, file, cells in rows:
        start, duration = read_seconds(cells, "start", where) or 0.0, read_seconds(cells, "duration", where)
        clip = file, start, duration, read_channel(cells, where) or channel
        if duration == 0:
            raise ValueError(f"{where}: duration=0 holds no sound; leave it empty to reach to the end of the file.")
        clips.setdefault(clip, {}).update(dict.fromkeys(_events(cells, where, duration, frames)))
    if not clips:
        raise ValueError(f"{name}: there are no rows in it.")
    files = {file for file, *_ in clips if isinstance(file, str)}
    missing = sorted(file for file in files if not os.path.isfile(file) and not unreadable_kind(file))
    if missing:
        raise FileNotFoundError(
            f"{name}: {len(missing)} of {len(files)} sound files are not there: {some_of(missing)}. Correct the paths"
            + (", which are relative to the folder of this file." if is_manifest else ".")
        )
    return [
        Example(
            source=file,
            labels=tuple(dict.fromkeys(event[2] for event in events)),
            start=start,
            duration=duration,
            events=tuple(events) if frames else (),
            channel=channel,
        )
        for (file, start, duration, channel), events in clips.items()
    ]


def _folder_examples(folder: Path, channel: str) -> list[Example]:
    suffixes = sound_suffixes()

    def is_sound(path: Path) -> bool:
        return path.suffix.lower() in suffixes

    paths = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    stray = [path for path in paths if is_sound(path) and not path.is_dir()]
    if stray:
        raise ValueError(
            f"{folder}: {len(stray)} sounds lie in no class folder: {some_of(stray)}. Expected FOLDER/label/sound: "
            "move them into the folder of their class, or elsewhere."
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
                f"{class_folder}: no file in this class folder is a sound by its name (.wav, .flac, .mp3, .m4a, ...); "
                "fill it or remove it."
            )
        skipped += sorted(set(files) - set(sounds))
        examples += [Example(str(file), (class_folder.name,), channel=channel) for file in sounds]
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


def _dataset_rows(
    dataset, name: str, frames: bool, split: str | None
) -> Iterator[tuple[str, str | EmbeddedAudio, dict]]:
    """The name, sound and cells of each row of a `datasets` dataset, in the form of `_manifest_rows`.

    Every event is a row of its own.
    """
    datasets = require("datasets")
    dataset, name = choose_split(dataset, name, split)
    columns = dataset.column_names
    target = "events" if frames else "label" if "label" in columns and "labels" not in columns else "labels"
    check_columns(columns, name, ["audio", target])
    # Labels that are numbers get their names from a ClassLabel, which may lie inside other features.
    names = dataset.features[target]
    while not (names is None or isinstance(names, datasets.ClassLabel)):
        if isinstance(names, list):  # This is how datasets 3 describes lists of dicts.
            names = names[0]
        else:
            names = names.get("label") if isinstance(names, dict) else getattr(names, "feature", None)
    others = dataset.select_columns(
        [column for column in (target, "start", "duration", "channel") if column in columns]
    )
    for number, (cells, file) in enumerate(zip(others.with_format(None), dataset_sounds(dataset, name), strict=True)):
        where = f"{name}, row {number}"
        events = (cells[target] or [{}]) if frames else [{"label": cells[target]}]
        # A list of dicts may come in the form of a dict of lists.
        if isinstance(events, dict):
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


def check_clips(examples: Sequence[Example], processor: BatAudioProcessor):
    """Read every clip's header and first window, and that of its last event: a small part of the time of an epoch.

    Raises:
        ValueError: clips that cannot be read, start behind the end of their file, are too short, or have events behind
            their end.
        FileNotFoundError: a file has vanished.
    """
    window = processor.n_fft / processor.sample_rate

    def problem(example: Example) -> str | None:
        if kind := unreadable_kind(str(example.source)):
            return f"{example.source}: {kind}"
        duration = window if example.duration is None else min(window, example.duration)
        try:
            processor.log_mel(replace(example, duration=duration).load(processor))
            with Sound(example.open()) as sound:
                is_cut = sound.problem is not None
            if is_cut:
                example.load(processor)  # This raises an error if the clip reaches into the missing part.
            if example.events:
                last_onset = max(onset for onset, _, _ in example.events)
                replace(example, start=example.start + last_onset, duration=window).load(processor)
        except ValueError as error:
            message = str(error)
            return message if message.startswith(str(example.source)) else f"{example.source}: {message}"

    with ThreadPool() as threads:  # Threads hide the latency of network drives.
        problems = list(filter(None, threads.imap(problem, examples, chunksize=64)))
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(examples)} clips cannot be used; mend them, or leave them out. "
            f"{some_of(problems)}"
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
    counts: dict[object, Counter] = defaultdict(Counter)  # The clips of each file are counted by their labels.
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
        # What rounding leaves over goes to the next label, so that many small classes together give their fraction.
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
