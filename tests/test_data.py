"""Data for fine-tuning: every source gives the same clips, and augmented items are what the same draws make by hand."""

import csv
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader

from bat_audio import BatAudioProcessor, load_audio
from bat_audio_tools.sounds.listing import list_inputs
from bat_audio_tools.sounds.manifests import sound_suffixes
from bat_audio_tools.training.clips import Augmentation, ClipDataset, frame_targets
from bat_audio_tools.training.examples import Example, check_clips, label_names, read_examples, split_examples

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

NUM_FRAMES = 96
PROCESSOR = BatAudioProcessor(NUM_FRAMES)
LABELS = ["bird", "cat", "dog"]
FULL = Augmentation(
    mixup=0.6, freq_masks=2, freq_width=16, time_masks=2, time_width=20, roll=True, gain_db=6
)  # everything at once


def sound(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A gliding tone in noise, so that every clip and every part of it is another."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return 0.4 * np.sin(2 * np.pi * (300 + 200 * seed + 900 * time) * time) + 0.02 * noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FOLDER/label/[part/]sound: six clips of other lengths, rates and formats."""
    folder = tmp_path_factory.mktemp("sounds") / "klänge, groß"
    for number, (name, rate) in enumerate(
        [
            ("bird/a.wav", 16000),
            ("bird/more/b.flac", 22050),
            ("cat/a.wav", 8000),
            ("cat/b.OGG", 44100),
            ("dog/c.wav", 48000),
            ("dog/d.wav", 16000),
        ]
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, sound(0.5 + 0.15 * number, rate, number), rate, format=name[-4:].strip("."))
    (folder / "dog" / ".hidden.wav").write_bytes(b"")
    (folder / ".cache").mkdir()
    (folder / "README.md").write_text("no class")
    return folder


@pytest.fixture(scope="module")
def files(folder) -> list:
    return sorted(
        str(file) for file in folder.rglob("*.*") if file.parent.name in ("more", *LABELS) and file.stem[0] != "."
    )


def write_csv(path, columns: list[str], rows: list) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def write_parquet(path, columns: list[str], rows: list) -> str:
    parquet.write_table(pyarrow.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))), path)
    return str(path)


def assert_same_items(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def items(dataset) -> list:
    return [dataset[index] for index in range(len(dataset))]


# Sources


def test_all_sources_give_the_same_items(folder, files, tmp_path):
    labels = [LABELS.index(file[len(str(folder)) + 1 :].split("/")[0]) for file in files]
    names = [LABELS[label] for label in labels]
    relative = [file[len(str(folder)) + 1 :] for file in files]
    columns = {"audio": files, "label": labels, "other": [[1.0]] * 6}
    table = datasets.Dataset.from_dict(columns).cast_column("label", datasets.ClassLabel(names=LABELS))
    sounds = table.cast_column("audio", datasets.Audio())
    shuffled = sounds.select([5, 0, 3, 1, 4, 2])
    datasets.DatasetDict(train=sounds, test=sounds.select([0])).save_to_disk(
        tmp_path / "saved"
    )  # with the bytes inside
    shuffled.save_to_disk(tmp_path / "shuffled")
    mixed = datasets.concatenate_datasets(
        [datasets.load_from_disk(tmp_path / "saved")["train"].select(range(3)), sounds.select(range(3, 6))]
    )
    sources = {
        "folder": folder,
        "folder as text": str(folder),
        "csv": write_csv(folder / "m.csv", ["path", "label", "fold"], list(zip(relative, names, labels, strict=True))),
        "parquet": write_parquet(
            folder / "m.parquet", ["path", "labels"], list(zip(relative, [[n] for n in names], strict=True))
        ),
        "absolute": write_csv(tmp_path / "a.csv", ["labels", "path"], list(zip(names, files, strict=True))),
        "paths": table,
        "text labels": datasets.Dataset.from_dict({"audio": files, "labels": [[name] for name in names]}),
        "numpy format": sounds.with_format("numpy"),
        "dict of one": datasets.DatasetDict(train=sounds),
        "reordered": shuffled.select([1, 3, 5, 2, 4, 0]),
        "saved reordered": datasets.load_from_disk(tmp_path / "shuffled").select([1, 3, 5, 2, 4, 0]),
        "mixed": mixed,
    }
    expected = [
        {"input_features": PROCESSOR(load_audio(file))[0], "labels": torch.tensor(label)}
        for file, label in zip(files, labels, strict=True)
    ]
    for name, source in [*sources.items(), ("saved", tmp_path / "saved")]:
        examples = read_examples(source, split="train" if name == "saved" else None)
        assert label_names(examples) == LABELS, name
        assert_same_items(items(ClipDataset(examples, LABELS, PROCESSOR, NUM_FRAMES)), expected)
    assert len(read_examples(tmp_path / "saved", split="test")) == 1
    for file in ("m.csv", "m.parquet"):
        (folder / file).unlink()


def test_several_labels_and_none(files, tmp_path):
    text = ["dog;bird", "", " cat ; dog "]
    lists = [["dog", "bird"], [], ["cat", "dog"]]
    numbers = datasets.Dataset.from_dict({"audio": files[:3], "labels": [[2, 0], None, [1, 2]]})
    feature = [datasets.ClassLabel(names=LABELS)]
    expected = [("dog", "bird"), (), ("cat", "dog")]
    for source in (
        write_csv(tmp_path / "m.csv", ["path", "labels"], list(zip(files, text, strict=False))),
        write_parquet(tmp_path / "t.parquet", ["path", "label"], list(zip(files, text, strict=False))),
        write_parquet(tmp_path / "l.parquet", ["path", "labels"], list(zip(files, lists, strict=False))),
        datasets.Dataset.from_dict({"audio": files[:3], "labels": lists}),
        numbers.cast_column("labels", feature),
        # One row per label of a clip.
        write_csv(
            tmp_path / "rows.csv",
            ["path", "label"],
            [(files[0], "dog"), (files[1], ""), (files[2], "cat"), (files[0], "bird"), (files[2], "dog")],
        ),
    ):
        examples = read_examples(source)
        assert [example.labels for example in examples] == expected
        targets = [
            item["labels"].tolist() for item in items(ClipDataset(examples, LABELS, PROCESSOR, 96, multi_label=True))
        ]
        assert targets == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]


def test_numbers_as_labels_stay_as_written(files, tmp_path):
    source = write_csv(tmp_path / "m.csv", ["path", "label"], [(files[0], "007"), (files[1], "NA"), (files[2], "nan")])
    expected = [("007",), ("NA",), ("nan",)]
    assert [example.labels for example in read_examples(source)] == expected
    Path(source).write_bytes(b"\xef\xbb\xbf" + Path(source).read_bytes())  # the byte order mark of Excel
    assert [example.labels for example in read_examples(source)] == expected
    source = write_parquet(tmp_path / "m.parquet", ["path", "label"], [(files[0], 7), (files[1], 0)])
    assert [example.labels for example in read_examples(source)] == [("7",), ("0",)]


def test_folder_takes_all_formats_of_libsndfile_and_reports_other_files(tmp_path, caplog):
    written = {
        "a.aif": "AIFF", "b.aiff": "AIFF", "c.au": "AU", "d.caf": "CAF", "e.flac": "FLAC", "f.mp3": "MP3",
        "g.ogg": "OGG", "h.rf64": "RF64", "i.voc": "VOC", "j.W64": "W64", "k.wav": "WAV",
    }  # fmt: skip
    (tmp_path / "sounds" / "dog").mkdir(parents=True)
    for name, format in written.items():
        soundfile.write(tmp_path / "sounds" / "dog" / name, sound(0.2, 44100), 44100, format=format)
    for name in ("notes.txt", "cover.jpg", "samples.raw", ".hidden.txt"):
        (tmp_path / "sounds" / "dog" / name).write_bytes(b"?")
    transformers.utils.logging.enable_propagation()
    examples = read_examples(tmp_path / "sounds")
    transformers.utils.logging.disable_propagation()
    assert [Path(example.source).name for example in examples] == list(written)
    check_clips(examples, PROCESSOR)
    assert re.search(r"sounds: 3 files are left out that are no sounds by name \(first: \S*cover.jpg\)", caplog.text)


def test_folder_takes_what_embed_takes(tmp_path):
    (tmp_path / "dog").mkdir()
    for suffix in (".txt", ".jpg", *sound_suffixes()):
        (tmp_path / "dog" / f"a{suffix}").touch()
    listed = [item.path for item, _ in list_inputs([tmp_path], None)]
    assert [clip.source for clip in read_examples(tmp_path)] == listed
    assert len(listed) == len(sound_suffixes())


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and devices")
def test_clips_that_are_no_files_are_named_as_broken(files, tmp_path):
    (tmp_path / "sounds" / "dog").mkdir(parents=True)
    odd = [str(tmp_path / "sounds" / "dog" / name) for name in ("a.wav", "b.wav", "c.wav")]
    os.mkfifo(odd[0])
    Path(odd[1]).symlink_to("/dev/zero")
    Path(odd[2]).symlink_to("nowhere.wav")
    good = tmp_path / "sounds" / "dog" / "d.wav"
    good.write_bytes(Path(files[0]).read_bytes())
    paths = [*odd, str(good)]
    for source in (
        tmp_path / "sounds",
        write_csv(tmp_path / "m.csv", ["path", "label"], [(path, "dog") for path in paths]),
        write_parquet(tmp_path / "m.parquet", ["path", "label"], [(path, "dog") for path in paths]),
        datasets.Dataset.from_dict({"audio": paths, "label": ["dog"] * 4}),
    ):
        examples = read_examples(source)
        assert [clip.source for clip in examples] == paths
        message = r"3 of 4 clips cannot be used; .*a.wav: It is a pipe .*b.wav: It is a device.*c.wav: It is a link"
        with pytest.raises(ValueError, match=message):
            check_clips(examples, PROCESSOR)


def test_name_that_is_no_file_here_is_a_dataset_of_the_hub(files, tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict({"audio": files, "label": [0, 0, 1, 1, 2, 2]})
    on_hub = {"me/sounds": datasets.DatasetDict(train=table, test=table.select([3]))}

    def load_dataset(name):
        if name not in on_hub:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.")
        return on_hub[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert read_examples("me/sounds", split="train") == read_examples(table)
    assert read_examples("me/sounds", split="test") == read_examples(table)[3:4]
    with pytest.raises(ValueError, match="me/sounds: split=None is none of its splits; choose from train, test"):
        read_examples("me/sounds")
    with pytest.raises(
        OSError, match=r"me/noise: no such file or folder here, and no dataset of that name .*DatasetNot"
    ):
        read_examples("me/noise")
    for name in ("me/noise.csv", "./me/noise", Path("me/noise"), "me/more/noise"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_examples(name)
    (tmp_path / "me" / "sounds" / "dog").mkdir(parents=True)
    soundfile.write(tmp_path / "me" / "sounds" / "dog" / "1.wav", sound(0.2), 16000)
    assert [example.labels for example in read_examples("me/sounds")] == [("dog",)]


EVENTS = [[(0.1, 0.3, "dog"), (0.2, 0.65, "bird")], [], [(0.0, 0.05, "dog")]]


def test_all_sources_give_the_same_frame_items(files, tmp_path):
    names = ["path", "start", "duration", "onset", "offset", "label"]
    rows = []
    for file, events in zip(files[1:], EVENTS, strict=False):
        rows += [(file, 0.1, 0.5, *event) for event in events] or [(file, 0.1, 0.5, None, None, None)]
    clips = {"audio": files[1:4], "start": [0.1] * 3, "duration": [0.5] * 3}
    dicts = [[dict(zip(("onset", "offset", "label"), event, strict=True)) for event in events] for events in EVENTS]
    number = {
        "onset": datasets.Value("float32"),
        "offset": datasets.Value("float32"),
        "label": datasets.ClassLabel(names=LABELS),
    }
    numbered = datasets.Dataset.from_dict({**clips, "events": dicts}).cast_column("events", [number])
    lists = [{key: [event[key] for event in events] for key in number} for events in dicts]
    in_lists = (
        datasets.Dataset.from_dict({"events": lists}, features=datasets.Features(events=datasets.Sequence(number)))
        .add_column("audio", files[1:4])
        .add_column("start", [0.1] * 3)
        .add_column("duration", [0.5] * 3)
    )
    assert isinstance(in_lists[0]["events"], dict)
    sources = [
        write_csv(tmp_path / "m.csv", names, rows[::-1]),  # rows need no order; those of a clip need not be neighbours
        write_parquet(tmp_path / "m.parquet", names, rows),
        datasets.Dataset.from_dict({**clips, "events": dicts}),
        numbered,
        in_lists,
    ]
    wanted = []
    for file, events in zip(files[1:], EVENTS, strict=False):
        numbered_events = [(onset, offset, LABELS.index(label)) for onset, offset, label in events]
        targets = frame_targets(numbered_events, 3, 6, 0.5)
        wanted.append({"input_features": PROCESSOR(load_audio(file, 0.1, 0.5))[0], "labels": targets})
    for source in sources:
        examples = sorted(read_examples(source, frames=True), key=lambda clip: clip.source)
        assert_same_items(items(ClipDataset(examples, LABELS, PROCESSOR, NUM_FRAMES, frames=True)), wanted)
    # The same file serves clip-wise training.
    assert [set(clip.labels) for clip in read_examples(sources[1])] == [{"dog", "bird"}, set(), {"dog"}]
    assert not any(clip.events for clip in read_examples(sources[1]))


def test_a_part_equals_a_slice_of_the_whole(files, tmp_path):
    for file in files:
        whole = load_audio(file)
        source = write_csv(
            tmp_path / "m.csv",
            ["path", "label", "start", "duration"],
            [(file, "dog", 0.1, 0.3), (file, "dog", "0.25", ""), (file, "cat", "", 0.2)],
        )
        expected = [whole[1600:6400], whole[4000:], whole[:3200]]
        dataset = ClipDataset(read_examples(source), LABELS, PROCESSOR, NUM_FRAMES)
        for item, waveform in zip(dataset, expected, strict=True):
            # Resampled alone, a part differs from the whole by 1e-5, which the decibels of quiet bands raise.
            torch.testing.assert_close(item["input_features"], PROCESSOR(waveform)[0], atol=2e-3, rtol=0)


names = st.text(st.characters(exclude_characters=";", exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip)
spaces = st.sampled_from(["", " ", "  "])


@given(st.lists(st.tuples(spaces, names.filter(bool), spaces), max_size=4))
@example([("", '"', ""), ("", ",", " ")])
@settings(max_examples=60, deadline=None)
def test_csv_labels_are_read_back(files, tmp_path_factory, labels):
    path = tmp_path_factory.getbasetemp() / "labels.csv"
    source = write_csv(path, ["path", "labels"], [(files[0], ";".join(map("".join, labels)))])
    assert read_examples(source)[0].labels == tuple(dict.fromkeys(label for _, label, _ in labels))


# Errors of sources

CSV_ERRORS = {
    "no label column": ("path,class\nA,dog\n", False, r"no column 'labels' among 'path', 'class'"),
    "no path column": ("file;label\nA;dog\n", False, r"no column 'path' and no 'labels' among 'file;label'"),
    "no onsets": ("path,label\nA,dog\n", True, r"no column 'onset' and no 'offset'"),
    "empty": ("", False, r"no column 'path'"),
    "no rows": ("path,label\n", False, r"no rows"),
    "comma": ("path,label\nA,dog\nA,dog, cat\n", False, r"line 3: expected 2 cells"),
    "short row": ("path,label\nA\n", False, r"line 2: expected 2 cells"),
    "quotes": ('path,label\nA,"dog\n', False, r"cannot be read as CSV"),
    "no path": ("path,label\nA,dog\n,dog\n", False, r"line 3: path='' names no sound file"),
    "empty label": ("path,labels\nA,dog;;cat\n", False, r"line 2: labels='dog;;cat' holds '', which is no label"),
    "negative start": ("path,label,start\nA,dog,-0.5\n", False, r"line 2: start='-0.5' is no time"),
    "NaN start": ("path,label,start\nA,dog,nan\n", False, r"line 2: start='nan' is no time"),
    "infinite duration": ("path,label,duration\nA,dog,inf\n", False, r"line 2: duration='inf' is no time"),
    "endless start": ("path,label,start\nA,dog,1e308\n", False, r"line 2: start='1e308' is no time"),
    "endless duration": ("path,label,duration\nA,dog,1e308\n", False, r"line 2: duration='1e308' is no time"),
    "no duration": ("path,label,duration\nA,dog,0\n", False, r"line 2: duration=0 holds no sound"),
    "words": ("path,label,start\nA,dog,\"0,5\"\n", False, r"line 2: start='0,5' is no time"),
    "reversed": ("path,label,onset,offset\nA,dog,0.3,0.2\n", True, r"line 2: onset=0.3 and offset=0.2: the onset"),
    "no length": ("path,label,onset,offset\nA,dog,0.2,0.2\n", True, r"line 2: onset=0.2 and offset=0.2: the onset"),
    "outside": ("path,label,duration,onset,offset\nA,dog,1,1.5,2\n", True, r"line 2: onset=1.5 .* duration=1.0"),
    "NaN onset": ("path,label,onset,offset\nA,dog,NaN,0.2\n", True, r"line 2: onset='NaN' is no time"),
    "no offset": ("path,label,onset,offset\nA,dog,0.1,\n", True, r"line 2: onset=0.1 and offset=None with 1 labels"),
    "no times": ("path,label,onset,offset\nA,dog,,\n", True, r"line 2: onset=None and offset=None with 1 labels"),
    "no label": ("path,label,onset,offset\nA,,0.1,0.2\n", True, r"line 2: onset=0.1 and offset=0.2 with 0 labels"),
}  # fmt: skip


@pytest.mark.parametrize("case", CSV_ERRORS)
def test_csv_errors(files, tmp_path, case):
    text, frames, message = CSV_ERRORS[case]
    path = tmp_path / "data.csv"
    path.write_text(re.sub("^A", files[0].replace(", ", "_").replace("\\", "/"), text, flags=re.MULTILINE))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}"):
        read_examples(path, frames=frames)


def test_missing_sound_files_are_counted_at_the_start(files, tmp_path):
    rows = [(files[0], "dog"), *((f"gone{number}.wav", "dog") for number in range(5))]
    message = r"5 of 6 sound files are not there: .*gone0.wav, .*gone1.wav, .*gone2.wav and 2 more\..*relative"
    with pytest.raises(FileNotFoundError, match=message):
        read_examples(write_csv(tmp_path / "m.csv", ["path", "label"], rows))
    table = datasets.Dataset.from_dict({"audio": [files[0], "/gone.wav"], "label": ["dog", "cat"]})
    with pytest.raises(FileNotFoundError, match=r"the dataset: 1 of 2 sound files are not there: /gone.wav"):
        read_examples(table)


def test_folder_errors(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"c: no class folders"):
        read_examples(tmp_path / "c")
    (tmp_path / "c").rmdir()
    (tmp_path / "a" / "1.wav").touch()
    with pytest.raises(ValueError, match=r"b: no file in this class folder is a sound"):
        read_examples(tmp_path)
    (tmp_path / "b" / "1.jpg").touch()
    with pytest.raises(ValueError, match=r"b: no file in this class folder is a sound by its name .*\.wav"):
        read_examples(tmp_path)
    (tmp_path / "2.wav").symlink_to("nowhere.wav")  # It may be broken.
    with pytest.raises(ValueError, match=r"1 sounds lie in no class folder: \S*2.wav\. Expected FOLDER/label/sound"):
        read_examples(tmp_path)
    with pytest.raises(ValueError, match="a folder tells no onsets"):
        read_examples(tmp_path, frames=True)
    with pytest.raises(ValueError, match="split='train' chooses from a DatasetDict"):
        read_examples(tmp_path, split="train")


def test_other_source_errors(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.csv: no such file or folder"):
        read_examples(tmp_path / "none.csv")
    for name, message in {
        "list.txt": "ends in .csv or .parquet",
        "m.csv": "cannot be read as CSV in UTF-8",
        "m.parquet": "cannot be read as Parquet",
    }.items():
        (tmp_path / name).write_bytes(b"path,label\n\xe4.wav,dog\n")
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            read_examples(tmp_path / name)
    with pytest.raises(ValueError, match="of type dict"):
        read_examples({})


def test_dataset_errors(files):
    table = datasets.Dataset.from_dict({"audio": files[:2], "label": [0, -1], "number": [1, 2], "none": ["a", None]})
    table = table.cast_column("label", datasets.ClassLabel(names=LABELS))
    both = datasets.DatasetDict(train=table, test=table)
    for source, options, message in [
        (table, {}, r"row 1, column label: .*-1.*; expected 0..2"),
        (table.rename_column("label", "class"), {}, r"the dataset: no column 'labels' among .*'class'"),
        (table, {"frames": True}, "no column 'events'"),
        (table.remove_columns("audio"), {}, "no column 'audio'"),
        (table.remove_columns("audio").rename_column("number", "audio"), {}, "column audio holds no sound files"),
        (
            table.remove_columns("audio").rename_column("none", "audio").select([1]),
            {},
            "row 0: the column audio is empty",
        ),
        (table, {"split": "train"}, "split='train' chooses from a DatasetDict"),
        (both, {}, "split=None is none of its splits; choose from train, test"),
        (both, {"split": "dev"}, "split='dev' is none of its splits"),
        (both, {"split": "train"}, "the dataset, split train, row 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_examples(source, **options)


def test_missing_library_names_the_extra(monkeypatch, tmp_path):
    (tmp_path / "m.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'needs pyarrow.parquet .*pip install "bat-audio\[train\]"'):
        read_examples(tmp_path / "m.parquet")


# Splits

clips = st.lists(st.tuples(st.integers(0, 12), st.sets(st.sampled_from("abcd"), max_size=2)), min_size=8, max_size=60)


@given(clips, st.floats(0.05, 0.6), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_split_keeps_files_together_and_labels_in_training(clips, fraction, seed):
    examples = [Example(f"{file}.wav", tuple(sorted(labels)), start=i) for i, (file, labels) in enumerate(clips)]
    try:
        training, validation = split_examples(examples, fraction, seed)
    except ValueError:  # too few files
        return
    assert split_examples(examples, fraction, seed) == (training, validation)
    assert sorted([*training, *validation], key=lambda e: e.start) == examples
    assert training == sorted(training, key=lambda e: e.start)
    assert validation == sorted(validation, key=lambda e: e.start)
    assert not {e.source for e in training} & {e.source for e in validation}
    assert {label for e in training for label in e.labels} == {label for e in examples for label in e.labels}
    assert validation


@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.floats(0.02, 0.5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_split_is_stratified(sizes, fraction, seed):
    """With one clip per file and label, every class gives its share up to rounding, and so do all together."""
    examples = [Example(f"{c}-{i}.wav", (str(c),)) for c, size in enumerate(sizes) for i in range(size)]
    if fraction * sum(sizes) <= 1:
        return
    _, validation = split_examples(examples, fraction, seed)
    for c, size in enumerate(sizes):
        assert abs(sum(e.labels == (str(c),) for e in validation) - fraction * size) <= 1.5 + 1e-9
    assert abs(len(validation) - fraction * sum(sizes)) <= 1


def test_split_keeps_to_the_share_of_rare_labels():
    examples = [Example(f"{i}.wav", ("common", "rare") if i % 10 == 0 else ("common",)) for i in range(200)]
    for seed in range(5):
        held = [label for example in split_examples(examples, 0.2, seed)[1] for label in example.labels]
        assert (held.count("rare"), held.count("common")) == (4, 40)


def test_split_depends_on_the_seed_and_finds_files_under_other_names(tmp_path):
    examples = [Example(f"{i}.wav", ("a",)) for i in range(50)]
    halves = [split_examples(examples, 0.5, seed)[0] for seed in range(2)]
    assert halves[0] != halves[1]
    (tmp_path / "a.wav").touch()
    (tmp_path / "b.wav").symlink_to("a.wav")
    same = [Example(str(tmp_path / name), ("a",)) for name in ("a.wav", "b.wav")]
    with pytest.raises(ValueError, match="of 1 files leaves no file"):
        split_examples(same, 0.5)
    with pytest.raises(ValueError, match="fraction=1 "):
        split_examples(same, 1)


# Frame targets

times = st.floats(0, 3).flatmap(lambda onset: st.tuples(st.just(onset), st.floats(0.001, 1.5)))


@given(times, st.floats(3, 4.6), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_every_event_marks_its_time(event, seconds, turn):
    onset, offset = event[0], min(sum(event), seconds)
    if onset >= offset:
        return
    targets = frame_targets([(onset, sum(event), 0)], 1, 32, seconds)
    assert (targets == 1).any()
    assert abs((targets == 1).sum() * 0.16 - (offset - onset)) <= 0.16 + 1e-5  # half a step at each edge
    assert torch.equal(targets[:, 0] == -100, torch.arange(32) * 0.16 >= seconds)
    rolled = frame_targets([(onset, offset, 0)], 1, 32, seconds, shift=turn * seconds)
    assert (rolled == 1).any()
    assert abs((rolled == 1).sum() * 0.16 - (offset - onset)) <= 2 * 0.16 + 1e-5  # up to four edges


@given(
    st.integers(16000, 40000),
    st.integers(0, 39999),
    st.integers(1280, 39999),
    st.integers(0, 39999),
    st.integers(1, 20),
)
@example(25600, 0, 25600, 5, 10)
@settings(max_examples=100, deadline=None)
def test_targets_equal_those_counted_in_the_rolled_signal(samples, onset, length, shift, steps):
    """A step is active when half of its samples are in the event, wherever rolling put them."""
    onset, shift = onset % samples, shift % samples
    signal = torch.zeros(samples)
    signal[onset : onset + length] = 1
    rolled = signal.roll(shift)
    padded = torch.nn.functional.pad(rolled, (0, 2560 * 20))
    counts = padded[: 2560 * (len(padded) // 2560)].reshape(-1, 2560).sum(dim=1)
    expected = (counts >= 1280).float()
    if not expected.any():
        expected[counts.argmax()] = 1
    expected[torch.arange(len(expected)) * 2560 >= samples] = -100
    targets = frame_targets(
        [(onset / 16000, (onset + length) / 16000, 0)], 1, steps, samples / 16000, shift=shift / 16000
    )
    assert torch.equal(targets[:, 0], expected[:steps])


def test_hand_made_targets():
    events = [
        (0.08, 0.32, 0),  # half of step 0, all of step 1
        (0.32, 0.39, 0),  # less than half of any step: the one that it covers most
        (0.62, 0.67, 1),  # 0.02 s of step 3, 0.03 s of step 4
        (0.8, 9.0, 2),  # to the end
    ]
    expected = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [-100] * 3])
    assert torch.equal(frame_targets(events, 3, 8, 1.1), expected.float())
    assert torch.equal(frame_targets(events, 3, 5, 1.1), expected[:5].float())  # the rest is cut off, not moved


# Items


def dataset_of(folder, kind: str = "single", augmentation=FULL, seed: int = 7, num_frames: int = NUM_FRAMES, **order):
    """The clips of the folder, in frame-wise training with one or two events and one clip without."""
    examples = read_examples(folder)
    if kind == "frames":
        examples = [
            Example(e.source, e.labels, events=((0.1 * i, 0.1 * i + 0.2, e.labels[0]), (0.4, 0.45, "cat"))[: i % 3])
            for i, e in enumerate(examples)
        ]
        examples = [Example(e.source, e.labels if e.events else (), events=e.events) for e in examples]
    options = {"multi_label": kind == "multi", "frames": kind == "frames", **order}
    return ClipDataset(examples, LABELS, PROCESSOR, num_frames, augmentation=augmentation, seed=seed, **options)


def clip_by_hand(dataset, index: int, generator):
    """Waveform and targets after roll and gain."""
    example = dataset.examples[index]
    waveform = load_audio(example.source)
    shift = int(generator.integers(len(waveform))) if dataset.augmentation.roll else 0
    gain = 10 ** (generator.uniform(-1, 1) * dataset.augmentation.gain_db / 20) if dataset.augmentation.gain_db else 1
    if dataset.frames:
        events = [(onset, offset, LABELS.index(label)) for onset, offset, label in example.events]
        targets = frame_targets(events, 3, NUM_FRAMES // 16, len(waveform) / 16000, shift=shift / 16000)
    else:
        targets = torch.tensor([float(label in example.labels) for label in LABELS])
    return torch.cat([waveform[len(waveform) - shift :], waveform[: len(waveform) - shift]]) * gain, targets


@pytest.mark.parametrize("kind", ["single", "multi", "frames"])
def test_items_are_what_the_same_draws_make_by_hand(folder, kind):
    dataset = dataset_of(folder, kind, seed=20, epochs=3)
    mixed = one_ended = both_ended = 0
    for place in range(18):
        epoch, index = divmod(place, 6)
        generator = np.random.default_rng([20, epoch, index])
        waveform, targets = clip_by_hand(dataset, index, generator)
        if generator.random() < FULL.mixup:
            mixed += 1
            other, other_targets = clip_by_hand(dataset, generator.integers(6), generator)
            lam = generator.beta(0.8, 0.8)
            mixture = torch.zeros(max(len(waveform), len(other)))
            mixture[: len(waveform)] += lam * waveform
            mixture[: len(other)] += (1 - lam) * other
            padding = (targets == -100).logical_and(other_targets == -100)
            both_ended += padding.any()
            one_ended += (targets == -100).logical_xor(other_targets == -100).any()
            targets = torch.where(targets == -100, 0, targets) * lam + torch.where(
                other_targets == -100, 0, other_targets
            ) * (1 - lam)
            targets[padding] = -100
            waveform = mixture
        features = PROCESSOR(waveform)[0]
        for _ in range(FULL.freq_masks):
            width = generator.integers(17)
            first = generator.integers(128 - width + 1)
            features[:, :, first : first + width] = 0
        for _ in range(FULL.time_masks):
            width = generator.integers(21)
            first = generator.integers(96 - width + 1)
            features[:, first : first + width] = 0
        torch.testing.assert_close(dataset[place]["input_features"], features, atol=1e-4, rtol=0)
        torch.testing.assert_close(dataset[place]["labels"], targets)
    assert 6 < mixed < 15
    assert kind != "frames" or (one_ended > 2 and both_ended > 2)


def test_rolled_tone_bursts_stay_at_their_events(tmp_path):
    """Each label is a tone of its own; where its energy lies in the rolled features is where the targets are 1."""
    time = np.arange(24000) / 16000
    signal, events = np.zeros(24000), ((0.1, 0.5, "cat"), (0.4, 1.0, "dog"), (1.1, 1.5, "bird"))
    bands = {}
    for (onset, offset, label), frequency in zip(events, (500, 1500, 4000), strict=True):
        tone = np.sin(2 * np.pi * frequency * time)
        signal += 0.3 * tone * ((time >= onset) & (time < offset))
        bands[label] = PROCESSOR.log_mel(torch.from_numpy(tone).float())[0, 0, 50].argmax()
    soundfile.write(tmp_path / "bursts.wav", signal, 16000, subtype="FLOAT")
    examples = [Example(str(tmp_path / "bursts.wav"), ("bird", "cat", "dog"), events=events)] * 12
    dataset = ClipDataset(examples, LABELS, PROCESSOR, 160, frames=True, augmentation=Augmentation(roll=True))
    positions = set()
    for item in items(dataset):
        loud = item["input_features"][0][:, [bands[label] for label in LABELS]] > 0.8  # (160, 3)
        share = loud.float().unflatten(0, (10, 16)).mean(dim=1)
        clear = (share - 0.5).abs() > 0.2  # elsewhere the window's length of 64 ms decides
        valid = item["labels"] >= 0
        assert torch.equal(valid.sum(dim=0), torch.tensor([10, 10, 10]))
        assert torch.equal((share > 0.5)[clear & valid], item["labels"][clear & valid] == 1)
        assert clear.float().mean() > 0.7
        positions.add(tuple(item["labels"].flatten().tolist()))
    assert len(positions) > 6


def test_mixup_happens_as_often_as_asked_and_masks_stay_in_their_widths(folder):
    clip = read_examples(folder)[0]
    examples = [Example(clip.source, (LABELS[i % 3],), duration=0.1) for i in range(100)]
    masks = Augmentation(mixup=0.3, freq_masks=1, freq_width=5, time_masks=1, time_width=4)
    dataset = ClipDataset(examples, LABELS, PROCESSOR, 16, augmentation=masks)
    plain = PROCESSOR(load_audio(clip.source, 0, 0.1))[0, 0, :11]
    soft, widths = [], set()
    for item in items(dataset):
        torch.testing.assert_close(item["labels"].sum(), torch.tensor(1.0))
        soft.append(item["labels"].max() < 1)
        # All clips sound the same, so mixing changes no features and the masks are what differs.
        same = torch.isclose(item["input_features"][0, :11], plain, atol=1e-3)
        masked = item["input_features"][0, :11] == 0
        assert (same | masked).all()
        bands, frames = masked.all(dim=0).sum(), masked.all(dim=1).sum()
        assert bands <= 5 + 8  # the clip's own silent bands
        widths.add(int(frames))
    assert widths == {0, 1, 2, 3, 4}
    assert 0.1 < np.mean(soft) < 0.3  # a third of the partners have the same label


def test_without_mixup_targets_are_hard_and_features_those_of_the_processor(folder):
    dataset = dataset_of(folder, augmentation=Augmentation(gain_db=0))
    assert_same_items(items(dataset), items(dataset_of(folder, augmentation=None)))
    rolled = items(dataset_of(folder, augmentation=Augmentation(roll=True, gain_db=10)))
    assert [item["labels"].item() for item in rolled] == [0, 0, 1, 1, 2, 2]
    soft = items(dataset_of(folder, augmentation=Augmentation(mixup=1e-9)))
    assert torch.equal(torch.stack([item["labels"] for item in soft]), torch.eye(3)[[0, 0, 1, 1, 2, 2]])


# Determinism


@pytest.mark.parametrize("kind", ["single", "frames"])
def test_items_depend_on_seed_epoch_and_index_only(folder, kind, tmp_path):
    dataset = dataset_of(folder, kind, epochs=3)
    whole = items(dataset)
    assert_same_items([dataset[place] for place in (11, 6, 9, 9, -1)], [whole[place] for place in (11, 6, 9, 9, 17)])
    assert_same_items(items(dataset_of(folder, kind)), whole[:6])
    assert not torch.equal(whole[0]["input_features"], whole[6]["input_features"])
    assert not torch.equal(items(dataset_of(folder, kind, seed=8))[0]["input_features"], whole[0]["input_features"])

    for workers in (0, 1, 2):
        assert_same_items(list(DataLoader(dataset, None, num_workers=workers)), whole)
    batch = next(iter(DataLoader(dataset, 6)))
    assert torch.equal(batch["labels"], torch.stack([item["labels"] for item in whole[:6]]))


def test_shuffling_gives_every_epoch_an_order_of_its_own(folder):
    plain = items(dataset_of(folder, augmentation=None))
    shuffled = items(dataset_of(folder, augmentation=None, epochs=5, shuffle=True))
    features = torch.stack([item["input_features"] for item in plain])
    places = [int((features == item["input_features"]).flatten(1).all(dim=1).nonzero()) for item in shuffled]
    orders = [tuple(places[start : start + 6]) for start in range(0, 30, 6)]
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders)
    assert len(set(orders)) > 1


def test_spawned_workers_give_the_same_items(folder, files, tmp_path):
    """Fresh processes, with another hash seed, get all by pickling; embedded sounds stay where they are."""
    table = datasets.Dataset.from_dict({"audio": files, "label": [0, 0, 1, 1, 2, 2]})
    table.cast_column("audio", datasets.Audio()).save_to_disk(tmp_path / "saved")
    examples = read_examples(tmp_path / "saved")
    embedded = ClipDataset(examples, ["0", "1", "2"], PROCESSOR, NUM_FRAMES, augmentation=FULL, seed=7)
    assert len(pickle.dumps(examples)) < 5000
    both = ConcatDataset([dataset_of(folder), embedded])
    loader = DataLoader(both, None, num_workers=1, multiprocessing_context="spawn")
    assert_same_items(list(loader), items(both))
    assert_same_items(items(both.datasets[0]), items(embedded))


# Errors of datasets


def test_dataset_refuses_what_it_cannot_train_on(folder, files):
    def make(labels, names=LABELS, num_frames=NUM_FRAMES, **options):
        examples = [Example(files[0], ("dog",)), *(Example(file, labels) for file in files[1:])]
        return ClipDataset(examples, names, PROCESSOR, num_frames, **options)

    for labels in ((), ("dog", "cat")):
        with pytest.raises(
            ValueError, match=f"5 of 6 clips have not exactly one label.*{re.escape(files[1])}.* 2 more"
        ):
            make(labels)
        assert make(labels, multi_label=True)[1]["labels"].sum() == len(labels)
    with pytest.raises(ValueError, match="2 labels are not among the model's 1: cat, dog"):
        make(("cat",), ["bird"])
    with pytest.raises(ValueError, match="have labels but no events; read them with frames=True"):
        make(("cat",), frames=True)
    with pytest.raises(ValueError, match="num_frames=100 must be"):
        make(("cat",), num_frames=100)
    with pytest.raises(ValueError, match="None of the examples has a label"):
        label_names([Example(files[0], ())])


def test_clips_that_cannot_be_used_are_errors_with_their_names(files, tmp_path):
    def dataset(example, **options):
        return ClipDataset([example], LABELS, PROCESSOR, NUM_FRAMES, **options)

    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"bad.wav: cannot be read as audio"):
        dataset(Example(str(bad), ("dog",)))[0]
    with pytest.raises(ValueError, match=re.escape(f"{files[0]}: cannot be read as audio") + ".* from 100.0 s on"):
        dataset(Example(files[0], ("dog",), start=100.0))[0]
    with pytest.raises(ValueError, match=re.escape(files[0]) + ".*320 samples are too few for one window"):
        dataset(Example(files[0], ("dog",), duration=0.02))[0]
    late = Example(files[0], ("dog",), events=((0.1, 0.2, "dog"), (0.6, 0.7, "dog")))
    with pytest.raises(ValueError, match=r"1 of 1 clips have events behind num_frames=48 \(0.48 s\)"):
        ClipDataset([late], LABELS, PROCESSOR, 48, frames=True)
    with pytest.raises(ValueError, match=re.escape(files[0]) + r": 0.500 s long, .*\(0.6, 0.7, 'dog'\)"):
        dataset(late, frames=True)[0]
    table = datasets.Dataset.from_dict({"audio": [{"bytes": b"no sound", "path": "a.wav"}], "label": ["dog"]})
    with pytest.raises(ValueError, match=r"the dataset, row 0: cannot be read as audio"):
        dataset(read_examples(table)[0])[0]
    with pytest.raises(IndexError):
        dataset(late)[1]


def test_all_clips_that_cannot_be_used_are_named_at_the_start(folder, files, tmp_path):
    """With what their items would raise; clips that pass have items."""
    good = read_examples(folder)
    check_clips(good, PROCESSOR)
    whole = (folder / "dog" / "d.wav").read_bytes()
    contents = {"bad.wav": b"RIFF", "empty.ogg": b"", "cut.wav": whole[: len(whole) // 2]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    soundfile.write(tmp_path / "nan.wav", np.full(2000, np.nan), 16000, subtype="FLOAT")
    table = datasets.Dataset.from_dict({"audio": [{"bytes": b"no sound", "path": "a.wav"}], "label": ["dog"]})
    bad = [
        *(Example(str(tmp_path / name), ("dog",)) for name in (*contents, "nan.wav")),
        Example(files[0], ("dog",), start=100.0),
        Example(files[1], ("dog",), duration=0.02),
        *read_examples(table),
    ]
    for clip in bad:
        with pytest.raises(ValueError, match=re.escape(str(clip.source))) as raised:
            ClipDataset([clip], LABELS, PROCESSOR, NUM_FRAMES)[0]
        with pytest.raises(ValueError, match=f"^1 of 7 clips cannot be used; .* {re.escape(str(raised.value))}$"):
            check_clips([*good, clip], PROCESSOR)
    with pytest.raises(ValueError, match=r"7 of 13 clips .*bad.wav.*empty.ogg.*cut.wav.* and 4 more"):
        check_clips([*bad, *good], PROCESSOR)
    late = Example(files[0], ("dog",), events=((0.6, 0.7, "dog"), (0.1, 0.2, "dog")))  # the file ends at 0.5 s
    with pytest.raises(ValueError, match=re.escape(files[0]) + ".* hold nothing from 0.6 s on"):
        check_clips([late], PROCESSOR)
    check_clips([Example(files[0], ("dog",), events=((0.1, 0.2, "dog"), (0.49, 0.6, "dog")))], PROCESSOR)


@pytest.mark.parametrize(
    "settings", [{"mixup": 1.5}, {"mixup": -0.1}, {"mixup_alpha": 0}, {"freq_masks": -1}, {"gain_db": float("nan")}]
)
def test_augmentation_refuses_values_out_of_range(settings):
    with pytest.raises(ValueError, match="expected finite values"):
        Augmentation(**settings)
