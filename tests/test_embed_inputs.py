"""What `bat-audio embed` lists: files, folders, globs, manifests, datasets and addresses, each recording once."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from embed_tables import (
    read,
    read_errors,
    run_embed,
    vectors,
)
from pyarrow import parquet

from bat_audio_tools.sounds.listing import write_plan
from bat_audio_tools.sounds.reading import Input


def list_rows(inputs, out, checkpoint, **options) -> list[tuple]:
    run_embed(inputs, out, checkpoint, **options)
    columns = ("id", "path", "start_s", "end_s")
    return [tuple(row[name] for name in columns) for row in read(out).to_pylist()]


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
    assert "No such file" in read_errors(tmp_path / "out")[0]["error"]


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
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(recordings / "a"), "/bucket/sounds", recursive=True)
    memory.pipe("/bucket/list.csv", b"path,id\nsounds/exact.wav,x\n")
    run_embed(["memory://bucket/sounds"], "memory://bucket/out", checkpoint)
    run_embed([str(recordings / "a")], tmp_path / "local", checkpoint)
    memory.get("/bucket/out", str(tmp_path / "out"), recursive=True)
    remote, local = read(tmp_path / "out"), read(tmp_path / "local")
    assert remote.drop(["id", "path"]).equals(local.drop(["id", "path"]))
    paths = [path.replace(str(recordings / "a"), "memory:///bucket/sounds") for path in local["path"].to_pylist()]
    assert remote["path"].to_pylist() == paths
    listed = list_rows(["memory://bucket/list.csv"], tmp_path / "listed", checkpoint)
    assert listed == [("x", "memory://bucket/sounds/exact.wav", 0, 10.24)]
    memory.pipe("/bucket/text.wav", b"no sound")
    run_embed(["memory://bucket/text.wav"], tmp_path / "broken", checkpoint)
    assert read_errors(tmp_path / "broken")[0]["error"].startswith("cannot be read as audio")
    globbed = list_rows(["memory://bucket/sounds/*.wav"], tmp_path / "globbed", checkpoint)
    assert [row[1] for row in globbed] == ["memory:///bucket/sounds/exact.wav"]


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
def test_what_only_ffmpeg_reads(recordings, checkpoint, tmp_path):
    command = ["ffmpeg", "-v", "error", "-i", recordings / "a/long.flac", tmp_path / "long.m4a"]
    subprocess.run(command, check=True)
    listed = list_rows([str(tmp_path)], tmp_path / "out", checkpoint)
    assert [row[2] for row in listed] == [0, 10.24, 20.48, 30.72, 40.96]
    assert listed[-1][3] == pytest.approx(45.5, abs=0.1)
    run_embed([str(recordings / "a/long.flac")], tmp_path / "flac", checkpoint)
    both = (vectors(read(tmp_path / name), "embedding") for name in ("out", "flac"))
    assert torch.cosine_similarity(*both).min() > 0.99


def test_globs_match_sounds_only(recordings, checkpoint, tmp_path, caplog):
    for name in ("a.wav", "b.WAV"):
        shutil.copy(recordings / "second_0.wav", tmp_path / name)
    (tmp_path / "notes.txt").write_text("Recorded on Monday\nby the lake\n")
    (tmp_path / "sites.csv").write_text("file,site\na.wav,lake\n")
    listed = list_rows([str(tmp_path / "*")], tmp_path / "out", checkpoint)
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
    assert [row[1] for row in listed] == [*inputs[:2], str(tmp_path / "memory:/x.wav")]


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
