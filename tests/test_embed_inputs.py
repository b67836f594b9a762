"""What `bat-audio embed` lists: files, folders, globs, manifests, datasets and addresses, each recording once."""

import csv
import io
import os
import re
import shutil
import signal
import socket
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pandas as pd
import pytest
import soundfile
import torch
from embed_tables import (
    read,
    read_errors,
    run_embed,
    vectors,
)
from encoded import encode
from pyarrow import parquet

from bat_audio_tools.sounds.listing import Plan, list_inputs, write_plan
from bat_audio_tools.sounds.manifests import check_source, sound_suffixes
from bat_audio_tools.sounds.reading import Input


def list_rows(inputs, out, checkpoint, **options) -> list[tuple]:
    run_embed(inputs, out, checkpoint, **options)
    columns = ("id", "path", "start_s", "end_s")
    return [tuple(row[name] for name in columns) for row in read(out).to_pylist()]


def paths_of(*sources) -> list[str]:
    """What is listed, each input once, without embedding it."""
    plan = io.BytesIO()
    write_plan(list_inputs([str(source) for source in sources], None), plan, 5)
    plan = Plan(plan)
    return [item.path for unit in range(plan.num_units) for item in plan.unit(unit)]


def write_list(file: Path, rows: list[dict]):
    """A list as its suffix says; a .txt has the paths alone."""
    if file.suffix == ".txt":
        file.write_text("".join(f"{row['path']}\n" for row in rows))
    elif file.suffix == ".csv":
        pd.DataFrame(rows).to_csv(file, index=False)
    else:
        pd.DataFrame(rows).to_parquet(file)


def test_files_globs_and_folders_count_once(recordings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(recordings)
    inputs = ["./second_1.wav", "a/b", "second_*.wav", "a/./b/.//stereo.wav", "a/**/s*.wav"]
    paths = [row[1] for row in list_rows(inputs, tmp_path / "out", checkpoint)]
    # Paths as they were given first.
    first = ["./second_1.wav", "a/b/short.wav", "a/b/stereo.wav"]
    assert paths == [*first, *(f"second_{i}.wav" for i in (0, 2, 3, 4))]


def test_other_names_of_the_same_change_nothing_else(tmp_path):
    """The digest of the list is that of the paths as they were given first: an unfinished table goes on by it."""
    named, other = (Input("./a.wav", "./a.wav"), 0), (Input("a.wav", "a.wav"), 0)
    digests = [write_plan(inputs, tmp_path / "plan.parquet", 5) for inputs in ([named], [named, other], [other])]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_a_file_in_the_folders_place(recordings, checkpoint, tmp_path, monkeypatch):
    """It is refused before the weights are loaded or a cluster is asked."""
    monkeypatch.setattr("bat_audio_tools.embed.engine", None)
    (tmp_path / "out").write_text("not a table")
    with pytest.raises(ValueError, match="out: a file; name a folder to write"):
        run_embed([str(recordings)], tmp_path / "out", checkpoint)
    assert (tmp_path / "out").read_text() == "not a table"


def test_names_with_magic_characters(recordings, checkpoint, tmp_path):
    file = tmp_path / "take[1]*.wav"
    shutil.copy(recordings / "second_0.wav", file)
    assert list_rows([str(file)], tmp_path / "out", checkpoint) == [(str(file), str(file), 0, 1)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest(kind, recordings, checkpoint, tmp_path):
    shutil.copy(recordings / "two.wav", tmp_path)
    other = str(recordings / "second_0.wav")
    rows = [
        {"path": "two.wav", "id": "x", "start": 1.5, "duration": 2.0},
        {"path": "two.wav", "id": "y", "start": 12.0, "duration": None},
        {"path": other, "id": None, "start": None, "duration": None},
        {"path": "two.wav", "id": "x", "start": 1.5, "duration": 2.0},  # counts once
    ]
    if kind == "csv":
        with open(tmp_path / "list.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pd.DataFrame(rows).to_parquet(tmp_path / "list.parquet")
    two = str(tmp_path / "two.wav")
    listed = list_rows([str(tmp_path / f"list.{kind}")], tmp_path / "out", checkpoint)
    assert listed == [("x", two, 1.5, 3.5), ("y", two, 12.0, 20.48), (other, other, 0, 1)]
    run_embed([str(tmp_path / f"list.{kind}")], tmp_path / "short", checkpoint, segment=1.5)
    assert read(tmp_path / "short").slice(0, 2)["end_s"].to_pylist() == [3.0, 3.5]


def test_text_list(recordings, checkpoint, tmp_path):
    (tmp_path / "list.txt").write_text(f"{recordings}/second_0.wav\n\nmissing.wav\n")
    listed = list_rows(str(tmp_path / "list.txt"), tmp_path / "out", checkpoint)
    assert [row[1] for row in listed] == [f"{recordings}/second_0.wav"]
    assert read_errors(tmp_path / "out")[0]["path"] == str(tmp_path / "missing.wav")
    assert "no such file" in read_errors(tmp_path / "out")[0]["error"]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_dataset(inside, workers, recordings, checkpoint, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted(map(str, recordings.glob("second_*.wav")))
    audio = [{"path": None, "bytes": Path(file).read_bytes()} if inside else file for file in files]
    dataset = datasets.Dataset.from_dict({"audio": audio, "id": list("abcde"), "start": [0.0] * 4 + [0.5]})
    dataset = dataset.cast_column("audio", datasets.Audio())
    listed = list_rows(dataset, tmp_path / "out", checkpoint, workers=workers)
    paths = [f"the dataset, row {number}" for number in range(5)] if inside else files
    assert listed == [(id, path, 0.5 * (id == "e"), 1.0) for id, path in zip("abcde", paths, strict=True)]
    dataset.save_to_disk(str(tmp_path / "saved"))
    run_embed([str(tmp_path / "saved")], tmp_path / "saved_out", checkpoint)
    run_embed([str(recordings / "second_*.wav")], tmp_path / "files", checkpoint)
    for out in ("out", "saved_out"):
        four = vectors(read(tmp_path / out), "embedding")[:4]
        torch.testing.assert_close(four, vectors(read(tmp_path / "files"), "embedding")[:4], rtol=0, atol=1e-5)


def test_addresses(recordings, checkpoint, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(recordings / "a"), "/bucket/sounds", recursive=True)
    memory.pipe("/bucket/list.csv", b"path,id\nsounds/exact.wav,x\n")
    run_embed(["memory://bucket/sounds"], "memory://bucket/out", checkpoint)
    run_embed([str(recordings / "a")], tmp_path / "local", checkpoint)
    memory.get("/bucket/out", str(tmp_path / "out"), recursive=True)
    remote, local = read(tmp_path / "out"), read(tmp_path / "local")
    assert remote.drop(["id", "path"]).equals(local.drop(["id", "path"]))
    paths = [path.replace(str(recordings / "a"), "memory://bucket/sounds") for path in local["path"].to_pylist()]
    assert remote["path"].to_pylist() == paths
    listed = list_rows(["memory://bucket/list.csv"], tmp_path / "listed", checkpoint)
    assert listed == [("x", "memory://bucket/sounds/exact.wav", 0, 10.24)]
    memory.pipe("/bucket/text.wav", b"no sound")
    run_embed(["memory://bucket/text.wav"], tmp_path / "broken", checkpoint)
    assert read_errors(tmp_path / "broken")[0]["error"].startswith("cannot be read as audio")
    globbed = list_rows(["memory://bucket/sounds/*.wav"], tmp_path / "globbed", checkpoint)
    assert [row[1] for row in globbed] == ["memory://bucket/sounds/exact.wav"]


@pytest.fixture(scope="module")
def chained(recordings, tmp_path_factory) -> list[tuple[str, str, str]]:
    """Addresses of copies of one folder: a {} in each stands for the path in it."""
    folder = tmp_path_factory.mktemp("chained")
    shutil.copytree(recordings / "a", folder / "a")
    shutil.copy(recordings / "second_0.wav", folder / "a" / "b" / ".hidden.wav")
    for suffix in (".csv", ".txt", ".parquet"):
        write_list(folder / "a" / f"list{suffix}", [{"path": name} for name in ("long.flac", "b/short.wav")])
    with zipfile.ZipFile(folder / "in [1].zip", "w") as archive:
        for file in (folder / "a").rglob("*"):
            archive.write(file, file.relative_to(folder))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder / "a"), "/chained/a", recursive=True)
    memory.pipe("/chained/in.zip", (folder / "in [1].zip").read_bytes())
    archive = f"{folder}/in [1].zip"
    return [
        f"zip://{{}}::file://{archive}",
        f"zip:///{{}}::{archive}",
        "zip://{}::memory://chained/in.zip",
        "zip://{}::simplecache::memory://chained/in.zip",
        "simplecache::zip://{}::memory://chained/in.zip",
        "simplecache::memory://chained/{}",
        "filecache::memory:///chained/{}",
        f"simplecache::file://{folder}/{{}}",
        f"file://{folder}/{{}}",
        "memory://chained/{}",
    ]


def test_chained_addresses_list_as_a_local_folder_does(chained, recordings):
    every = ["a/exact.wav", "a/long.flac", "a/b/short.wav", "a/b/stereo.wav"]
    named = ["a/long.flac", "a/b/short.wav"]
    for form in chained:
        for source, names in {
            "a/b/stereo.wav": ["a/b/stereo.wav"],
            "a": every,
            "a/": every,
            "a/*": ["a/b/short.wav", "a/b/stereo.wav", "a/exact.wav", "a/long.flac"],
            "a/*/s*.wav": ["a/b/short.wav", "a/b/stereo.wav"],
            "a/**/*.flac": ["a/long.flac"],
            "a/list.csv": named,
            "a/list.txt": named,
            "a/list.parquet": named,
        }.items():
            listed = paths_of(form.format(source))
            assert listed == [form.format(name) for name in names]
            for path, name in zip(listed, names, strict=True):
                with fsspec.open(path, "rb") as file:
                    assert file.read() == (recordings / name).read_bytes(), path
    whole = [form for form in chained if form.startswith("zip")]
    for form in whole:
        archive = form.partition("::")[2]
        assert paths_of(f"zip::{archive}") == [f"zip://{name}::{archive}" for name in every]


def test_chained_addresses_are_embedded(chained, recordings, checkpoint, tmp_path):
    run_embed([str(recordings / "a")], tmp_path / "local", checkpoint)
    local = read(tmp_path / "local")
    for number, form in enumerate((chained[0], chained[3], chained[5])):
        run_embed([form.format("a")], tmp_path / str(number), checkpoint, workers=2 * (number == 0))
        table = read(tmp_path / str(number))
        assert table["embedding"].equals(local["embedding"])
        assert table["id"].equals(table["path"])
        names = [os.path.relpath(path, recordings) for path in local["path"].to_pylist()]
        assert table["path"].to_pylist() == [form.format(name) for name in names]


def test_rows_of_a_list_may_be_addresses_of_any_kind(chained, tmp_path):
    rows = [{"path": form.format("a/exact.wav")} for form in chained]
    for suffix in (".csv", ".txt", ".parquet"):
        write_list(tmp_path / f"list{suffix}", rows)
        assert paths_of(tmp_path / f"list{suffix}") == [row["path"] for row in rows]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("zip://a.wav::nowhere.zip", FileNotFoundError, "no such file or folder"),
        ("zip://a.wav::text.zip", OSError, "cannot be listed .*not a zip file"),
        ("zip://nowhere.wav::in.zip", FileNotFoundError, "no such file or folder"),
        ("zip://*.flac::in.zip", ValueError, "no sounds in it"),
        ("zip://list.tsv::in.zip", ValueError, "lists are .txt"),
        ("nothing://x.wav", OSError, "cannot be listed .*Protocol not known: nothing"),
        ("simplecache::memory://nowhere", FileNotFoundError, "no such file or folder"),
    ],
)
def test_addresses_where_nothing_is(source, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.zip").write_text("These are words.")
    with zipfile.ZipFile("in.zip", "w") as archive:
        archive.writestr("a.wav", b"")
        archive.writestr("list.tsv", b"path\n")
    with pytest.raises(error, match=f"^{re.escape(source)}: {message}"):
        paths_of(source)


# What is no file


@pytest.fixture
def one_minute() -> Iterator[None]:
    """A test that opens a pipe or device fails after a minute, in place of waiting for ever."""

    def give_up(*_):
        raise TimeoutError("something was opened that has no end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def no_files(tmp_path) -> Iterator[dict[str, str]]:
    """Paths that are named like sounds, and what is there; nobody may open them."""
    folder = tmp_path / "odd"
    folder.mkdir()
    os.mkfifo(folder / "pipe.wav")
    (folder / "endless.wav").symlink_to("/dev/zero")
    (folder / "broken.wav").symlink_to("nowhere.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    (folder / "to_pipe.wav").symlink_to("pipe.wav")
    kinds = {"pipe": "a pipe", "endless": "a device", "broken": "a link", "loop": "a link", "to_pipe": "a pipe"}
    with socket.socket(socket.AF_UNIX) as end:
        here = os.getcwd()
        os.chdir(folder)  # The address of a socket may be shorter than the path of the folder.
        end.bind("socket.wav")
        os.chdir(here)
        yield {f"{folder}/{name}.wav": f"It is {kind}" for name, kind in {**kinds, "socket": "a socket"}.items()}


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
def test_what_is_no_file_is_listed_with_the_reason_and_never_opened(no_files, recordings, checkpoint, tmp_path):
    assert no_files
    folder = os.path.dirname(next(iter(no_files)))
    good = str(recordings / "second_0.wav")
    lists = [str(tmp_path / f"list{suffix}") for suffix in (".csv", ".txt", ".parquet")]
    for file in lists:
        write_list(Path(file), [{"path": path} for path in (*no_files, good)])
    ways = [[folder, good], [f"{folder}/*", good], [*no_files, good], *([file] for file in lists)]
    for number, sources in enumerate([*ways, [f"file://{folder}", good]]):
        problems = {item.path.removeprefix("file://"): item.problem for item, _ in list_inputs(sources, None)}
        assert problems.keys() == {*no_files, good}
        assert problems.pop(good) is None
        assert all(problems[path].startswith(kind) for path, kind in no_files.items())
        summary = run_embed(sources, tmp_path / str(number), checkpoint, workers=number % 2)
        assert (summary["files"], summary["failed"], summary["rows"]) == (len(no_files) + 1, len(no_files), 1)
        errors = {row["path"].removeprefix("file://"): row["error"] for row in read_errors(tmp_path / str(number))}
        assert errors == problems
    for path in no_files:
        check_source(path)
    embedded = datasets_of(list(no_files))
    problems = {item.path: item.problem for item, _ in list_inputs([embedded], (embedded, "the dataset"))}
    assert problems == errors


def datasets_of(paths: list[str]):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"audio": paths}).cast_column("audio", datasets.Audio())


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
@pytest.mark.parametrize("name", ["list.csv", "list.txt", "list.parquet"])
def test_a_list_that_is_no_file(name, tmp_path, one_minute):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: no list of sounds. It is a pipe"):
        paths_of(tmp_path / name)


def test_a_mended_link_is_read_by_retry(recordings, checkpoint, tmp_path):
    """The table goes on: what was wrong with a file does not make it another list of inputs."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").symlink_to("../sound.wav")
    shutil.copy(recordings / "second_0.wav", tmp_path / "in" / "b.wav")
    source = [str(tmp_path / "in")]
    assert run_embed(source, tmp_path / "out", checkpoint)["failed"] == 1
    shutil.copy(recordings / "second_1.wav", tmp_path / "sound.wav")
    assert run_embed(source, tmp_path / "out", checkpoint, retry=True)["failed"] == 0
    run_embed(source, tmp_path / "new", checkpoint)
    assert read(tmp_path / "out").equals(read(tmp_path / "new"))


# Names


SOUND_NAMES = """
    mp2 wv tta avi flv mpg mpeg ts mts weba m4b ogv spx opus aac m4a mka mkv webm mov mp4 m4v 3gp 3g2 amr ac3 eac3
    ape dts wma wmv asf oga ogg flac mp3 aif aiff aifc au snd caf wav w64 rf64 voc sph sf gsm shn tak thd mlp oma ra
    rm mpc dsf nut
"""
OTHER_NAMES = """
    txt csv tsv json xml html pdf md log py png jpg jpeg gif bmp tif webp avif heic heif mjpg mjpeg jp2 jxl svg psd
    mks srt vtt ass ssa sub sup m3u m3u8 pls cue ism mpd sdp ffmeta raw zip gz
"""


def test_sounds_are_known_by_their_names(tmp_path, monkeypatch):
    for name in (SOUND_NAMES + OTHER_NAMES).split():
        (tmp_path / f"a.{name}").touch()
        (tmp_path / f"b.{name.upper()}").touch()
    names = [name for suffix in SOUND_NAMES.split() for name in (f"a.{suffix}", f"b.{suffix.upper()}")]
    for source in (tmp_path, tmp_path / "*"):
        assert [os.path.basename(path) for path in paths_of(source)] == sorted(names)
    monkeypatch.chdir(tmp_path)
    for suffix in sound_suffixes():  # What is missing is not looked for on the Hub.
        with pytest.raises(FileNotFoundError, match=rf"my/sound{suffix}: no such file"):
            check_source(f"my/sound{suffix}")
    for name in OTHER_NAMES.split():
        if name not in ("txt", "csv"):  # These are lists.
            check_source(f"my/sound.{name}")


# Spellings


def test_one_recording_counts_once_however_it_is_spelled(recordings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/sub", "d/other", "far/deep"):
        Path(name).mkdir(parents=True)
    shutil.copy(recordings / "second_0.wav", "d/sub/a..b.wav")
    shutil.copy(recordings / "second_1.wav", "d/a.wav")
    shutil.copy(recordings / "second_2.wav", "far/a.wav")
    Path("d/link").symlink_to("../far/deep")
    spellings = ["d/sub", "./d/sub", "d//sub", "d/sub/", "d/./sub", "d/sub/../sub", "d/other/../sub/.", "../{}/d/sub"]
    spellings = [spelling.format(tmp_path.name) for spelling in spellings]
    spellings += [f"{tmp_path}/{spelling}" for spelling in spellings]
    spellings += [f"file://{spelling}" for spelling in spellings] + [f"/{tmp_path}/d/sub"]
    write_list(tmp_path / "list.csv", [{"path": f"{spelling}/a..b.wav"} for spelling in spellings])
    for ways in (spellings, [f"{spelling}/a..b.wav" for spelling in spellings], [f"{s}/*.wav" for s in spellings]):
        for first in ways[::3]:
            listed = paths_of(first, *ways)
            assert listed == paths_of(first)
            assert len(listed) == 1
    assert paths_of("d/sub", "list.csv") == paths_of("list.csv", "d/sub") == ["d/sub/a..b.wav"]
    # The folder above d/link is far, so these are two recordings.
    assert paths_of("d/link/../a.wav", "d/a.wav", "far/a.wav") == ["d/link/../a.wav", "d/a.wav"]
    # There is nothing in a folder that is not there.
    assert len(paths_of("d/a.wav", *write_paths(tmp_path, ["d/none/../a.wav", "d/a.wav"]))) == 2
    table = list_rows(["d//sub", "d/sub", str(tmp_path / "d")], tmp_path / "out", checkpoint)
    assert [row[:2] for row in table] == [("d//sub/a..b.wav",) * 2, (f"{tmp_path}/d/a.wav",) * 2]


def write_paths(folder: Path, paths: list[str]) -> list[str]:
    write_list(folder / "paths.txt", [{"path": path} for path in paths])
    return ["paths.txt"]


def test_parts_of_one_recording_are_inputs_of_their_own(tmp_path):
    (tmp_path / "a.wav").touch()
    parts = [(0, 1), (1, 1), (1, 2), (0, None), (0, 1)]
    for path in ("a.wav", "./a.wav"):
        rows = [{"path": path, "start": start, "duration": duration} for start, duration in parts]
        write_list(tmp_path / f"{len(path)}.csv", rows)
    inputs = [str(tmp_path / "5.csv"), str(tmp_path / "7.csv"), str(tmp_path)]
    assert len(paths_of(*inputs)) == 4


def test_seconds_of_a_list(recordings, checkpoint, tmp_path):
    shutil.copy(recordings / "two.wav", tmp_path)
    for column in ("start", "duration"):
        for number, value in enumerate(["1e308", "1e13", "nan", "inf", "-inf", "-1", "-1e-9", "soon", "0,5", "1e999"]):
            rows = [{"path": "two.wav", "id": "x", column: "1"}, {"path": "two.wav", "id": "y", column: value}]
            for suffix, where in ((".csv", "line 3"), (".parquet", "row 1")):
                file = tmp_path / f"{column}{number}{suffix}"
                write_list(file, rows)
                message = f"{file}, {where}: {column}={value!r} is no time"
                with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                    paths_of(file)
                with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                    run_embed([str(file)], tmp_path / "out", checkpoint)
        for number, value in enumerate([1e308, float("inf"), -1.0]):
            file = tmp_path / f"number{column}{number}.parquet"
            write_list(file, [{"path": "two.wav", column: 1.0}, {"path": "two.wav", column: value}])
            with pytest.raises(ValueError, match=rf"row 1: {column}={re.escape(repr(value))} is no time"):
                paths_of(file)


def test_times_far_behind_the_end(recordings, checkpoint, tmp_path):
    shutil.copy(recordings / "two.wav", tmp_path)
    rows = [("two.wav", 1e12, ""), ("two.wav", 1e12, 1e12), ("two.wav", 19, 1e12), ("two.wav", 19, "")]
    lines = "".join(f"{path},{start},{duration}\n" for path, start, duration in rows)
    (tmp_path / "list.csv").write_text(f"path,start,duration\n{lines}")
    summary = run_embed([str(tmp_path / "list.csv")], tmp_path / "out", checkpoint)
    assert (summary["files"], summary["failed"], summary["rows"]) == (4, 2, 2)
    assert all("two.wav" in row["path"] and "hold" in row["error"] for row in read_errors(tmp_path / "out"))
    one, other = vectors(read(tmp_path / "out"), "embedding")
    assert torch.equal(one, other)


def test_what_libsndfile_does_not_read(recordings, checkpoint, tmp_path):
    samples, rate = soundfile.read(recordings / "a/long.flac", dtype="float32", always_2d=True)
    (tmp_path / "long.m4a").write_bytes(encode(samples.mean(axis=1), "mp4", "aac", rate))
    listed = list_rows([str(tmp_path)], tmp_path / "out", checkpoint)
    assert [row[2] for row in listed] == [0, 10.24, 20.48, 30.72, 40.96]
    assert listed[-1][3] == pytest.approx(45.5, abs=0.1)
    run_embed([str(recordings / "a/long.flac")], tmp_path / "flac", checkpoint)
    both = (vectors(read(tmp_path / name), "embedding") for name in ("out", "flac"))
    assert torch.cosine_similarity(*both).min() > 0.99


def test_globs_match_sounds_only(recordings, checkpoint, tmp_path, caplog):
    (tmp_path / "in").mkdir()
    for name in ("a.wav", "b.WAV"):
        shutil.copy(recordings / "second_0.wav", tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("Recorded on Monday\nby the lake\n")
    (tmp_path / "in" / "sites.csv").write_text("file,site\na.wav,lake\n")
    listed = list_rows([str(tmp_path / "in" / "*")], tmp_path / "out", checkpoint)
    assert [Path(row[1]).name for row in listed] == ["a.wav", "b.WAV"]
    assert "2 files are left out that are no sounds by name" in caplog.text


def test_loops_of_links_are_left_out(recordings, checkpoint, tmp_path, caplog):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    shutil.copy(recordings / "second_0.wav", tmp_path / "in" / "sub")
    (tmp_path / "in" / "sub" / "up").symlink_to("..")
    (tmp_path / "in" / "twin").symlink_to("sub")  # no loop
    listed = list_rows([str(tmp_path / "in")], tmp_path / "out", checkpoint)
    paths = [os.path.relpath(row[1], tmp_path / "in") for row in listed]
    assert paths == ["sub/second_0.wav", "twin/second_0.wav"]
    assert f"{tmp_path}/in/sub/up: left out, a link to a folder around it" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are in Unicode")
def test_names_that_are_not_utf8_are_listed(recordings, checkpoint, tmp_path):
    shutil.copy(recordings / "second_0.wav", tmp_path / "good.wav")
    shutil.copy(recordings / "second_0.wav", os.fsencode(tmp_path) + b"/caf\xe9.wav")
    assert len(list_rows([str(tmp_path)], tmp_path / "out", checkpoint)) == 1
    (error,) = read_errors(tmp_path / "out")
    assert error["path"] == f"{tmp_path}/caf\\xe9.wav"
    assert error["error"].startswith("Its name is not in UTF-8")


def test_names_that_look_like_addresses(recordings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("take 12::30.wav", "memory:/x.wav"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(recordings / "second_0.wav", name)
    inputs = [str(tmp_path / "take 12::30.wav"), "memory://x.wav", str(tmp_path)]
    listed = list_rows(inputs, tmp_path / "out", checkpoint)
    assert [row[1] for row in listed] == inputs[:2]  # The folder holds the same two.


def test_rows_of_one_long_recording_share_shards(recordings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("bat_audio_tools.sounds.listing.UNIT_BYTES", 50_000)  # the file has 650 kB
    shutil.copy(recordings / "two.wav", tmp_path)
    rows = "".join(f"two.wav,{second},0.2\n" for second in range(8))
    rest = "".join(f"two.wav,{second},\n" for second in (18, 19, 20))
    for name, content in (("parts", rows), ("rests", rest)):
        (tmp_path / f"{name}.csv").write_text(f"path,start,duration\n{content}")
        run_embed([str(tmp_path / f"{name}.csv")], tmp_path / name, checkpoint, shard_size=4, num_frames=16)
    sizes = {
        name: [len(parquet.read_table(file)) for file in sorted((tmp_path / name / "embeddings").iterdir())]
        for name in ("parts", "rests")
    }
    assert sizes == {"parts": [4, 4], "rests": [1, 2]}


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("none/here.wav", FileNotFoundError, "none/here.wav: no such file"),
        ("*.none", ValueError, "no sounds in it"),
        ("empty", ValueError, "no sounds in it"),
        ("bad.csv", ValueError, "no column 'path' among 'file'"),
        ("zero.csv", ValueError, "line 2: duration=0"),
        ("time.csv", ValueError, "line 2: start='soon' is no time"),
        ("list.tsv", ValueError, "list.tsv: lists are .txt"),
    ],
)
def test_wrong_inputs(inputs, error, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("file\nx.wav\n")
    (tmp_path / "list.tsv").write_text("path\tid\nx.wav\t1\n")
    (tmp_path / "zero.csv").write_text("path,duration\nx.wav,0\n")
    (tmp_path / "time.csv").write_text("path,start\nx.wav,soon\n")
    with pytest.raises(error, match=message.replace("*", r"\*")):
        run_embed([inputs], "out", checkpoint)
    assert not list(tmp_path.glob("out*"))
