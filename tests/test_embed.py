"""Tables of embeddings: equal to the plain model, whatever the batches, and whatever stopped the run before."""

import csv
import errno
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import soundfile
import torch
from conftest import THREADS, tiny_model
from pyarrow import parquet

from bat_audio import BatAudioProcessor, load_audio, load_pretrained_encoder
from bat_audio.processing_bat import fit_frames
from bat_audio_tools import folders
from bat_audio_tools.embed import embed
from bat_audio_tools.embedding import encoder, windows
from bat_audio_tools.embedding.windows import BrokenRecordingError
from bat_audio_tools.settings import EmbedSettings, StartError
from bat_audio_tools.sounds import reading
from bat_audio_tools.sounds.listing import write_plan
from bat_audio_tools.sounds.reading import Input

RATE = 16000
PROGRAM = [sys.executable, "-m", "bat_audio_tools.cli", "embed"]


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    """Recordings of several formats, rates, channels and lengths, in folders."""
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "a" / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, seconds: float, rate: int, channels: int = 1, **form):
        shape = (round(seconds * rate), channels)
        soundfile.write(folder / name, 0.1 * rng.standard_normal(shape).clip(-5, 5), rate, **form)

    write("a/exact.wav", 10.24, 8000)
    write("a/long.flac", 45.5, 8000)
    write("a/b/stereo.wav", 3.3, 44100, channels=2)
    write("a/b/short.wav", 0.1, 16000, subtype="PCM_U8")
    write("mp3.mp3", 12.0, 22050)
    write("ogg.ogg", 11.0, 48000)
    write("two.wav", 20.48, 16000, subtype="FLOAT")
    for number in range(5):
        write(f"second_{number}.wav", 1.0, 16000)
    (folder / "notes.txt").write_text("no sound")
    write(".hidden.wav", 1.0, 16000)
    return folder


def run_embed(inputs, out, checkpoint, **options) -> dict:
    options = {"workers": 0, "device": "cpu", **options}
    return embed(EmbedSettings(inputs=inputs, out=str(out), checkpoint=checkpoint, **options))


def read(out) -> pa.Table:
    return parquet.read_table(Path(out) / "embeddings")


def read_errors(out) -> list[dict]:
    return parquet.read_table(Path(out) / "errors.parquet").to_pylist()


def assert_same_table(out, other):
    assert read(out).equals(read(other))
    assert read_errors(out) == read_errors(other)
    assert [p.name for p in sorted(Path(out, "embeddings").iterdir())] == [
        p.name for p in sorted(Path(other, "embeddings").iterdir())
    ]


def vectors(table: pa.Table, column: str) -> torch.Tensor:
    return torch.tensor(np.stack(table[column].to_numpy(zero_copy_only=False)).astype(np.float32))


class TestRows:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_frames": 16},
            {"segment": 2.5, "hop": 1.0, "num_frames": 256},
            {"segment": 12.0, "batch_size": 3},
            {"whole": True},
            {"whole": True, "num_frames": 16, "batch_size": 2},
        ],
        ids=str,
    )
    def test_are_those_of_the_plain_model(self, options, sounds, checkpoint, tmp_path):
        settings = {"pool": "cls+mean", "frames": True, "layers": "1,2", **options}
        run_embed([str(sounds)], tmp_path / "out", checkpoint, **settings)
        model, processor = load_pretrained_encoder(checkpoint=checkpoint), BatAudioProcessor(num_frames=None)
        segment = None if "whole" in options else options.get("segment", 10.24)
        for row in read(tmp_path / "out").to_pylist():
            waveform = load_audio(row["path"], row["start_s"], segment)
            assert row["end_s"] == row["start_s"] + len(waveform) / RATE
            patches = -(-len(waveform) // 2560)
            features = fit_frames(processor.log_mel(waveform), max(16 * patches, options.get("num_frames", 1024)))
            with torch.inference_mode():
                output = model(features, output_hidden_states=True)
            tokens = output.patch_tokens[0, :, :patches].mean(dim=2).T
            embedding = torch.cat([output.pooler_output[0], tokens.mean(dim=0)])
            torch.testing.assert_close(torch.tensor(row["embedding"]), embedding, rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.tensor(row["tokens"]), tokens, rtol=0, atol=1e-5)
            for layer in (1, 2):
                expected = output.hidden_states[layer][0, 0]
                torch.testing.assert_close(torch.tensor(row[f"cls_{layer}"]), expected, rtol=0, atol=1e-5)

    def test_are_those_of_the_pipeline(self, checkpoint, sounds, tmp_path):
        from transformers import pipeline

        run_embed([str(sounds)], tmp_path / "out", checkpoint, whole=True)
        embedder = pipeline("feature-extraction", model=checkpoint, trust_remote_code=True, device="cpu")
        table = read(tmp_path / "out")
        for path, embedding in zip(table["path"].to_pylist(), vectors(table, "embedding"), strict=True):
            torch.testing.assert_close(torch.tensor(embedder(path)), embedding, rtol=0, atol=1e-5)

    def test_cover_the_recordings(self, sounds, checkpoint, tmp_path):
        run_embed([str(sounds)], tmp_path / "out", checkpoint)
        windows = {}
        for row in read(tmp_path / "out").select(["id", "path", "start_s", "end_s"]).to_pylist():
            assert row["id"] == row["path"]
            windows.setdefault(os.path.relpath(row["path"], sounds), []).append((row["start_s"], row["end_s"]))
        mp3_end = len(load_audio(sounds / "mp3.mp3")) / RATE
        assert windows == {  # in the order of the rows too
            "mp3.mp3": [(0, 10.24), (10.24, mp3_end)],
            "ogg.ogg": [(0, 10.24), (10.24, 11.0)],
            **{f"second_{number}.wav": [(0, 1)] for number in range(5)},
            "two.wav": [(0, 10.24), (10.24, 20.48)],
            "a/exact.wav": [(0, 10.24)],
            "a/long.flac": [(0, 10.24), (10.24, 20.48), (20.48, 30.72), (30.72, 40.96), (40.96, 45.5)],
            "a/b/short.wav": [(0, 0.1)],
            "a/b/stereo.wav": [(0, 3.3)],
        }
        assert next(iter(windows)) == "mp3.mp3"
        assert list(windows)[-4:] == ["a/exact.wav", "a/long.flac", "a/b/short.wav", "a/b/stereo.wav"]

    @pytest.mark.parametrize(
        ("samples", "segment", "hop", "expected"),
        [
            (50000, 16000, 16000, [0, 16000, 32000, 48000]),
            (48000, 16000, 16000, [0, 16000, 32000]),
            (48512, 16000, 16000, [0, 16000, 32000]),  # the rest is too short for one frame
            (48513, 16000, 16000, [0, 16000, 32000, 48000]),
            (48000, 16000, 8000, [0, 8000, 16000, 24000, 32000]),
            (48001, 16000, 8000, [0, 8000, 16000, 24000, 32000, 40000]),
            (40000, 16000, 20000, [0, 20000]),
            (100, 16000, 16000, [0]),
        ],
    )
    def test_last_window(self, samples, segment, hop, expected):
        cut = windows.Cut(rate=RATE, shortest=513, segment=segment, hop=hop)
        assert [number * hop for number in range(cut.num_windows(samples))] == expected

    def test_long_recordings_are_read_in_parts(self, checkpoint, tmp_path):
        soundfile.write(tmp_path / "long.wav", 0.1 * np.random.default_rng(0).standard_normal(11025 * 150), 11025)
        soundfile.write(tmp_path / "next.wav", 0.1 * np.random.default_rng(1).standard_normal(8000), 8000)
        options = {"segment": 2.0, "hop": 1.5, "num_frames": 16}
        run_embed([str(tmp_path)], tmp_path / "parts", checkpoint, workers=2, **options)
        starts = read(tmp_path / "parts")["start_s"].to_pylist()
        assert starts[-2] > windows.PART_SECONDS
        whole = load_audio(tmp_path / "long.wav")
        model, processor = load_pretrained_encoder(checkpoint=checkpoint), BatAudioProcessor(num_frames=None)
        for row in (0, 1, 57, 80, 81, 99):
            part = whole[24000 * row : 24000 * row + 32000]
            with torch.inference_mode():
                expected = model(fit_frames(processor.log_mel(part), 16 * -(-len(part) // 2560))).pooler_output[0]
            embedding = vectors(read(tmp_path / "parts"), "embedding")[row]
            torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-5)
        assert starts == [1.5 * number for number in range(100)] + [0.0]

    def test_do_not_depend_on_batches_or_processes(self, sounds, checkpoint, tmp_path):
        options = {"pool": "cls+mean", "frames": True, "num_frames": 16}
        run_embed([str(sounds)], tmp_path / "one", checkpoint, batch_size=1, **options)
        run_embed([str(sounds)], tmp_path / "many", checkpoint, batch_size=16, **options)
        run_embed([str(sounds)], tmp_path / "processes", checkpoint, batch_size=16, workers=3, **options)
        one, many = read(tmp_path / "one"), read(tmp_path / "many")
        assert one.drop(["embedding", "tokens"]).equals(many.drop(["embedding", "tokens"]))
        torch.testing.assert_close(vectors(one, "embedding"), vectors(many, "embedding"), rtol=0, atol=1e-5)
        assert_same_table(tmp_path / "many", tmp_path / "processes")

    def test_pools_that_fill_up_keep_the_order(self, sounds, checkpoint, tmp_path, monkeypatch):
        run_embed([str(sounds)], tmp_path / "one", checkpoint, num_frames=16)
        monkeypatch.setattr("bat_audio_tools.embedding.encoder.BUCKET_WINDOWS", 3)
        run_embed([str(sounds)], tmp_path / "buckets", checkpoint, num_frames=16)
        one, buckets = read(tmp_path / "one"), read(tmp_path / "buckets")
        assert one.drop(["embedding"]).equals(buckets.drop(["embedding"]))
        torch.testing.assert_close(vectors(one, "embedding"), vectors(buckets, "embedding"), rtol=0, atol=1e-5)

    def test_float16_is_rounded_float32(self, sounds, checkpoint, tmp_path):
        options = {"frames": True, "layers": "2"}
        run_embed([str(sounds)], tmp_path / "32", checkpoint, **options)
        run_embed([str(sounds)], tmp_path / "16", checkpoint, float16=True, **options)
        half = read(tmp_path / "16")
        for column in ("embedding", "cls_2"):
            assert half.schema.field(column).type == pa.list_(pa.float16(), 32)
            assert torch.equal(vectors(half, column), vectors(read(tmp_path / "32"), column).half().float())

    def test_bf16_is_near_float32(self, sounds, checkpoint, tmp_path):
        run_embed([str(sounds)], tmp_path / "32", checkpoint)
        run_embed([str(sounds)], tmp_path / "16", checkpoint, bf16=True)
        full, half = (vectors(read(tmp_path / name), "embedding") for name in ("32", "16"))
        assert torch.cosine_similarity(full, half).min() > 0.99
        assert not torch.equal(full, half)

    @pytest.mark.slow
    def test_compiled_equal_plain(self, sounds, checkpoint, tmp_path):
        run_embed([str(sounds)], tmp_path / "plain", checkpoint)
        run_embed([str(sounds)], tmp_path / "compiled", checkpoint, compile=True)
        plain, compiled = (vectors(read(tmp_path / name), "embedding") for name in ("plain", "compiled"))
        torch.testing.assert_close(plain, compiled, rtol=0, atol=1e-5)


class TestInputs:
    """What is listed; the rows themselves are tested above."""

    def listed(self, inputs, out, checkpoint, **options) -> list[tuple]:
        run_embed(inputs, out, checkpoint, **options)
        columns = ("id", "path", "start_s", "end_s")
        return [tuple(row[name] for name in columns) for row in read(out).to_pylist()]

    def test_files_globs_and_folders_count_once(self, sounds, checkpoint, tmp_path, monkeypatch):
        monkeypatch.chdir(sounds)
        inputs = ["./second_1.wav", "a/b", "second_*.wav", "a/./b/.//stereo.wav", "a/**/s*.wav"]
        paths = [row[1] for row in self.listed(inputs, tmp_path / "out", checkpoint)]
        # Paths as they were given first.
        first = ["./second_1.wav", "a/b/short.wav", "a/b/stereo.wav"]
        assert paths == [*first, *(f"second_{i}.wav" for i in (0, 2, 3, 4))]

    def test_other_names_of_the_same_change_nothing_else(self, tmp_path):
        """The digest of the list is that of the paths as they were given first: an unfinished table goes on by it."""
        named, other = (Input("./a.wav", "./a.wav"), 0), (Input("a.wav", "a.wav"), 0)
        digests = [write_plan(inputs, tmp_path / "plan.parquet", 5) for inputs in ([named], [named, other], [other])]
        assert digests[0] == digests[1]
        assert digests[0] != digests[2]

    def test_a_file_in_the_folders_place(self, sounds, checkpoint, tmp_path, monkeypatch):
        """It is refused before the weights are loaded or a cluster is asked."""
        monkeypatch.setattr("bat_audio_tools.embed.engine", None)
        (tmp_path / "out").write_text("not a table")
        with pytest.raises(ValueError, match="out: a file; name a folder to write"):
            run_embed([str(sounds)], tmp_path / "out", checkpoint)
        assert (tmp_path / "out").read_text() == "not a table"

    def test_names_with_magic_characters(self, sounds, checkpoint, tmp_path):
        file = tmp_path / "take[1]*.wav"
        shutil.copy(sounds / "second_0.wav", file)
        assert self.listed([str(file)], tmp_path / "out", checkpoint) == [(str(file), str(file), 0, 1)]

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_manifest(self, kind, sounds, checkpoint, tmp_path):
        shutil.copy(sounds / "two.wav", tmp_path)
        other = str(sounds / "second_0.wav")
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
        listed = self.listed([str(tmp_path / f"list.{kind}")], tmp_path / "out", checkpoint)
        assert listed == [("x", two, 1.5, 3.5), ("y", two, 12.0, 20.48), (other, other, 0, 1)]
        run_embed([str(tmp_path / f"list.{kind}")], tmp_path / "short", checkpoint, segment=1.5)
        assert read(tmp_path / "short").slice(0, 2)["end_s"].to_pylist() == [3.0, 3.5]

    def test_text_list(self, sounds, checkpoint, tmp_path):
        (tmp_path / "list.txt").write_text(f"{sounds}/second_0.wav\n\nmissing.wav\n")
        listed = self.listed(str(tmp_path / "list.txt"), tmp_path / "out", checkpoint)
        assert [row[1] for row in listed] == [f"{sounds}/second_0.wav"]
        assert read_errors(tmp_path / "out")[0]["path"] == str(tmp_path / "missing.wav")
        assert "No such file" in read_errors(tmp_path / "out")[0]["error"]

    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_dataset(self, inside, workers, sounds, checkpoint, tmp_path):
        datasets = pytest.importorskip("datasets")
        files = sorted(map(str, sounds.glob("second_*.wav")))
        audio = [{"path": None, "bytes": Path(file).read_bytes()} if inside else file for file in files]
        dataset = datasets.Dataset.from_dict({"audio": audio, "id": list("abcde"), "start": [0.0] * 4 + [0.5]})
        dataset = dataset.cast_column("audio", datasets.Audio())
        listed = self.listed(dataset, tmp_path / "out", checkpoint, workers=workers)
        paths = [f"the dataset, row {number}" for number in range(5)] if inside else files
        assert listed == [(id, path, 0.5 * (id == "e"), 1.0) for id, path in zip("abcde", paths, strict=True)]
        dataset.save_to_disk(str(tmp_path / "saved"))
        run_embed([str(tmp_path / "saved")], tmp_path / "saved_out", checkpoint)
        run_embed([str(sounds / "second_*.wav")], tmp_path / "files", checkpoint)
        for out in ("out", "saved_out"):
            four = vectors(read(tmp_path / out), "embedding")[:4]
            torch.testing.assert_close(four, vectors(read(tmp_path / "files"), "embedding")[:4], rtol=0, atol=1e-5)

    def test_addresses(self, sounds, checkpoint, tmp_path):
        import fsspec

        memory = fsspec.filesystem("memory")
        memory.put(str(sounds / "a"), "/bucket/sounds", recursive=True)
        memory.pipe("/bucket/list.csv", b"path,id\nsounds/exact.wav,x\n")
        run_embed(["memory://bucket/sounds"], "memory://bucket/out", checkpoint)
        run_embed([str(sounds / "a")], tmp_path / "local", checkpoint)
        memory.get("/bucket/out", str(tmp_path / "out"), recursive=True)
        remote, local = read(tmp_path / "out"), read(tmp_path / "local")
        assert remote.drop(["id", "path"]).equals(local.drop(["id", "path"]))
        paths = [path.replace(str(sounds / "a"), "memory:///bucket/sounds") for path in local["path"].to_pylist()]
        assert remote["path"].to_pylist() == paths
        listed = self.listed(["memory://bucket/list.csv"], tmp_path / "listed", checkpoint)
        assert listed == [("x", "memory://bucket/sounds/exact.wav", 0, 10.24)]
        memory.pipe("/bucket/text.wav", b"no sound")
        run_embed(["memory://bucket/text.wav"], tmp_path / "broken", checkpoint)
        assert read_errors(tmp_path / "broken")[0]["error"].startswith("cannot be read as audio")
        globbed = self.listed(["memory://bucket/sounds/*.wav"], tmp_path / "globbed", checkpoint)
        assert [row[1] for row in globbed] == ["memory:///bucket/sounds/exact.wav"]

    @pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
    def test_what_only_ffmpeg_reads(self, sounds, checkpoint, tmp_path):
        command = ["ffmpeg", "-v", "error", "-i", sounds / "a/long.flac", tmp_path / "long.m4a"]
        subprocess.run(command, check=True)
        listed = self.listed([str(tmp_path)], tmp_path / "out", checkpoint)
        assert [row[2] for row in listed] == [0, 10.24, 20.48, 30.72, 40.96]
        assert listed[-1][3] == pytest.approx(45.5, abs=0.1)
        run_embed([str(sounds / "a/long.flac")], tmp_path / "flac", checkpoint)
        both = (vectors(read(tmp_path / name), "embedding") for name in ("out", "flac"))
        assert torch.cosine_similarity(*both).min() > 0.99

    def test_globs_match_sounds_only(self, sounds, checkpoint, tmp_path, caplog):
        for name in ("a.wav", "b.WAV"):
            shutil.copy(sounds / "second_0.wav", tmp_path / name)
        (tmp_path / "notes.txt").write_text("Recorded on Monday\nby the lake\n")
        (tmp_path / "sites.csv").write_text("file,site\na.wav,lake\n")
        listed = self.listed([str(tmp_path / "*")], tmp_path / "out", checkpoint)
        assert [Path(row[1]).name for row in listed] == ["a.wav", "b.WAV"]
        assert "2 files are left out that are no sounds by name" in caplog.text

    def test_loops_of_links_are_left_out(self, sounds, checkpoint, tmp_path, caplog):
        (tmp_path / "in" / "sub").mkdir(parents=True)
        shutil.copy(sounds / "second_0.wav", tmp_path / "in" / "sub")
        (tmp_path / "in" / "sub" / "up").symlink_to("..")
        (tmp_path / "in" / "twin").symlink_to("sub")  # no loop
        listed = self.listed([str(tmp_path / "in")], tmp_path / "out", checkpoint)
        paths = [os.path.relpath(row[1], tmp_path / "in") for row in listed]
        assert paths == ["sub/second_0.wav", "twin/second_0.wav"]
        assert f"{tmp_path}/in/sub/up: left out, a link to a folder around it" in caplog.text

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are in Unicode")
    def test_names_that_are_not_utf8_are_listed(self, sounds, checkpoint, tmp_path):
        shutil.copy(sounds / "second_0.wav", tmp_path / "good.wav")
        shutil.copy(sounds / "second_0.wav", os.fsencode(tmp_path) + b"/caf\xe9.wav")
        assert len(self.listed([str(tmp_path)], tmp_path / "out", checkpoint)) == 1
        (error,) = read_errors(tmp_path / "out")
        assert error["path"] == f"{tmp_path}/caf\\xe9.wav"
        assert error["error"].startswith("Its name is not in UTF-8")

    def test_names_that_look_like_addresses(self, sounds, checkpoint, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("take 12::30.wav", "memory:/x.wav"):
            Path(name).parent.mkdir(exist_ok=True)
            shutil.copy(sounds / "second_0.wav", name)
        inputs = [str(tmp_path / "take 12::30.wav"), "memory://x.wav", str(tmp_path)]
        listed = self.listed(inputs, tmp_path / "out", checkpoint)
        assert [row[1] for row in listed] == [*inputs[:2], str(tmp_path / "memory:/x.wav")]

    def test_rows_of_one_long_recording_share_shards(self, sounds, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr("bat_audio_tools.sounds.listing.UNIT_BYTES", 50_000)  # the file has 650 kB
        shutil.copy(sounds / "two.wav", tmp_path)
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
    def test_wrong_inputs(self, inputs, error, message, checkpoint, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        (tmp_path / "bad.csv").write_text("file\nx.wav\n")
        (tmp_path / "list.tsv").write_text("path\tid\nx.wav\t1\n")
        (tmp_path / "zero.csv").write_text("path,duration\nx.wav,0\n")
        (tmp_path / "time.csv").write_text("path,start\nx.wav,soon\n")
        with pytest.raises(error, match=message.replace("*", r"\*")):
            run_embed([inputs], "out", checkpoint)
        assert not list(tmp_path.glob("out/*.json"))


def broken_files(folder: Path) -> dict[str, str | None]:
    """Files that are broken in many ways, and the reason for each, None where it is only unusual."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal(16000)

    def wav(samples, rate=16000, form="WAV", **options) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format=form, **options)
        return file.getvalue()

    whole, header_rate = wav(noise), 24  # the offset of the rate in a WAV header
    contents = {
        "empty.wav": (b"", "Format not recognised|System error"),
        "truncated.wav": (whole[:9000], "truncated"),
        "truncated.flac": (wav(noise, form="FLAC")[:9000], "truncated|lost sync|flac"),
        "text.wav": (b"These are words, and no sound at all.\n" * 50, "Format not recognised"),
        "nan.wav": (wav(np.full(16000, np.nan), subtype="FLOAT"), "NaN"),
        "zero_rate.wav": (whole[:header_rate] + bytes(4) + whole[header_rate + 4 :], "rate|sound|audio"),
        "one_sample.wav": (wav(noise[:1]), "1 samples are too few"),
        "huge.wav": (wav(noise * 1e20, subtype="FLOAT"), "above 1e"),
        "eight_bit.wav": (wav(noise, subtype="PCM_U8"), None),
        "float.wav": (wav(noise, subtype="FLOAT"), None),
        "seven_one.wav": (wav(noise[:, None].repeat(8, axis=1)), None),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: reason for name, (_, reason) in contents.items()}


class TestBrokenFiles:
    def test_are_listed_with_the_reason(self, sounds, checkpoint, tmp_path):
        reasons = broken_files(tmp_path / "broken")
        summary = run_embed([str(tmp_path / "broken"), str(sounds)], tmp_path / "out", checkpoint)
        errors = {Path(row["path"]).name: row for row in read_errors(tmp_path / "out")}
        assert errors.keys() == {name for name, reason in reasons.items() if reason}
        for name, row in errors.items():
            assert any(part in row["error"] for part in reasons[name].split("|")), row
            assert str(tmp_path) not in row["error"]
            assert row["id"] == row["path"]
        assert summary["failed"] == len(errors)
        assert summary["files"] == len(reasons) + 12
        run_embed([str(sounds)], tmp_path / "sounds", checkpoint)
        whole = read(tmp_path / "out")
        alone = read(tmp_path / "sounds")
        assert summary["rows"] == len(whole) == 3 + len(alone)
        assert whole.slice(3).drop(["embedding"]).equals(alone.drop(["embedding"]))

    def test_part_of_a_recording(self, checkpoint, tmp_path):
        samples = 0.1 * np.random.default_rng(0).standard_normal(10 * 8000)
        samples[[8000 * 3 + 4000, 8000 * 4 + 4000, 8000 * 8 + 4000]] = np.nan
        soundfile.write(tmp_path / "long.wav", samples, 8000, subtype="FLOAT")
        summary = run_embed([str(tmp_path)], tmp_path / "out", checkpoint, segment=1.0)
        assert summary["failed"] == 1
        assert read(tmp_path / "out")["start_s"].to_pylist() == [0, 1, 2, 5, 6, 7, 9]
        errors = [(row["start_s"], row["end_s"], row["error"]) for row in read_errors(tmp_path / "out")]
        assert errors == [(3, 5, "holds NaN or infinite samples."), (8, 9, "holds NaN or infinite samples.")]

    def test_none_is_left(self, checkpoint, tmp_path):
        (tmp_path / "text.wav").write_text("no sound")
        summary = run_embed([str(tmp_path / "text.wav")], tmp_path / "out", checkpoint)
        assert (summary["rows"], summary["failed"], summary["files"]) == (0, 1, 1)
        assert len(pd.read_parquet(tmp_path / "out" / "embeddings")) == 0

    @pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="other processes load what is patched")
    @pytest.mark.parametrize("workers", [1, 2])
    def test_that_kill_their_process(self, workers, sounds, checkpoint, tmp_path, monkeypatch):
        def load(source, start, *arguments):
            if "second_2" in source or ("long.flac" in source and start > 20):
                os.kill(os.getpid(), signal.SIGKILL)
            return load_audio(source, start, *arguments)

        run_embed([str(sounds)], tmp_path / "whole", checkpoint, num_frames=16)
        monkeypatch.setattr(reading, "load_audio", load)
        monkeypatch.setattr(windows, "PART_SECONDS", 10)
        run_embed([str(sounds)], tmp_path / "out", checkpoint, workers=workers, num_frames=16)
        errors = [(Path(row["path"]).name, row["start_s"], row["end_s"]) for row in read_errors(tmp_path / "out")]
        assert errors == [("second_2.wav", 0, 10.24), ("long.flac", 20.48, pytest.approx(51.2))]
        assert all(row["error"] == windows.KILLS for row in read_errors(tmp_path / "out"))
        left_out = [("second_2.wav", 0.0), *(("long.flac", start) for start in (20.48, 30.72, 40.96))]
        whole = read(tmp_path / "whole").select(["path", "start_s", "end_s"]).to_pylist()
        expected = [row for row in whole if (Path(row["path"]).name, round(row["start_s"], 2)) not in left_out]
        assert read(tmp_path / "out").select(["path", "start_s", "end_s"]).to_pylist() == expected

    @pytest.mark.parametrize("workers", [0, 2])
    def test_strict_stops_at_the_first(self, workers, sounds, checkpoint, tmp_path):
        (tmp_path / "text.wav").write_text("no sound")
        inputs = [str(sounds / "second_*.wav"), str(tmp_path / "text.wav")]
        options = {"workers": workers, "shard_size": 5}
        with pytest.raises(BrokenRecordingError, match=r"text\.wav: cannot be read .* without strict"):
            run_embed(inputs, tmp_path / "out", checkpoint, strict=True, **options)
        assert [path.name for path in (tmp_path / "out" / "embeddings").iterdir()] == ["part-00000.parquet"]
        run_embed(inputs, tmp_path / "out", checkpoint, **options)  # goes on without
        with pytest.raises(BrokenRecordingError, match="1 recordings are broken"):
            run_embed(inputs, tmp_path / "out", checkpoint, strict=True, **options)

    @pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="must become a user who may not read everything")
    def test_permission_denied(self, sounds, checkpoint):
        # Outside the folders of pytest, which no other user may enter.
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o777)
            for name in ("open.wav", "closed.wav"):
                shutil.copy(sounds / "second_0.wav", folder)
                os.replace(f"{folder}/second_0.wav", f"{folder}/{name}")
            os.chmod(f"{folder}/open.wav", 0o644)
            os.chmod(f"{folder}/closed.wav", 0)
            load_audio(sounds / "second_0.wav")  # the other user may not even read the libraries
            cut = windows.Cut(rate=RATE, shortest=513, segment=None, hop=0)
            reading, writing = os.pipe()
            if not (child := os.fork()):
                try:
                    os.setuid(65534)
                    found = [
                        windows.decode_first(cut, Input(name, f"{folder}/{name}"), None).stretches[0].error
                        for name in ("open.wav", "closed.wav")
                    ]
                    os.write(writing, json.dumps(found).encode())
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            os.close(writing)
            with os.fdopen(reading) as answer:
                assert json.load(answer) == [None, f"[Errno 13] Permission denied: '{folder}/closed.wav'"]


class TestLengthsThatHeadersDoNotTell:
    """Windows up to where the sound ends, whatever the header says, and none behind it."""

    @staticmethod
    def noise(seconds: float, rate: int = RATE) -> np.ndarray:
        return 0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate)).clip(-5, 5)

    @staticmethod
    def places(out) -> list[tuple[float, float]]:
        return [(row["start_s"], row["end_s"]) for row in read(out).select(["start_s", "end_s"]).to_pylist()]

    @staticmethod
    def convert(source, target, *options):
        subprocess.run(["ffmpeg", "-v", "error", "-i", source, *options, target], check=True)

    @staticmethod
    def with_flac_length(content: bytes, length: int) -> bytes:
        content = bytearray(content)
        struct.pack_into(">I", content, 22, length & 0xFFFFFFFF)
        content[21] = content[21] & 0xF0 | length >> 32
        return bytes(content)

    @pytest.mark.parametrize(("seconds", "workers"), [(5.0, 0), (25.0, 2), (130.3, 0), (130.3, 2)])
    def test_streamed_flac(self, seconds, workers, checkpoint, tmp_path):
        soundfile.write(tmp_path / "whole.flac", self.noise(seconds), RATE)
        content = (tmp_path / "whole.flac").read_bytes()
        (tmp_path / "streamed.flac").write_bytes(self.with_flac_length(content, 0))
        for name in ("whole", "streamed"):
            options = {"num_frames": 16, "workers": workers}
            run_embed([str(tmp_path / f"{name}.flac")], tmp_path / name, checkpoint, **options)
            run_embed([str(tmp_path / f"{name}.flac")], tmp_path / f"{name}-1", checkpoint, whole=True, **options)
        for suffix in ("", "-1"):
            both = [tmp_path / f"{name}{suffix}" for name in ("whole", "streamed")]
            assert self.places(both[0]) == self.places(both[1])
            assert read_errors(both[1]) == []
            torch.testing.assert_close(*(vectors(read(out), "embedding") for out in both), rtol=0, atol=1e-5)

    @pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="other processes load what is patched")
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_length_that_is_far_too_large_is_soon_given_up(self, workers, checkpoint, tmp_path, monkeypatch):
        soundfile.write(tmp_path / "damaged.flac", self.noise(30), RATE)
        content = (tmp_path / "damaged.flac").read_bytes()
        (tmp_path / "damaged.flac").write_bytes(self.with_flac_length(content, (1 << 36) - 1))
        reads = multiprocessing.Value("i", 0)

        def load(*arguments):
            with reads.get_lock():
                reads.value += 1
            return load_audio(*arguments)

        monkeypatch.setattr(reading, "load_audio", load)
        run_embed([str(tmp_path)], tmp_path / "out", checkpoint, num_frames=16, workers=workers)
        assert self.places(tmp_path / "out") == [(0, 10.24), (10.24, 20.48)]
        last = read_errors(tmp_path / "out")[-1]
        assert last["error"] == "Not read any further, after 360 s that cannot be read."
        assert last["end_s"] == pytest.approx((1 << 36) / RATE, abs=11)
        assert reads.value < 150

    def test_a_broken_window_of_a_streamed_recording_is_left_out(self, checkpoint, tmp_path):
        samples = self.noise(130.3)
        samples[[5 * RATE, 121 * RATE]] = np.nan
        soundfile.write(tmp_path / "x.wav", samples, RATE, subtype="FLOAT")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(windows, "known_seconds", lambda source: None)
            run_embed([str(tmp_path / "x.wav")], tmp_path / "out", checkpoint, segment=10.0, num_frames=16)
        assert [start for start, _ in self.places(tmp_path / "out")] == [*range(10, 120, 10), 130]
        assert [row["start_s"] for row in read_errors(tmp_path / "out")] == [0, 120]

    @pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(
        ("form", "options"),
        [("webm", ["-c:a", "libopus"]), ("matroska", ["-c:a", "aac"]), ("adts", ["-c:a", "aac"])],
    )
    def test_what_only_ffmpeg_reads(self, form, options, workers, checkpoint, tmp_path, monkeypatch):
        soundfile.write(tmp_path / "x.wav", self.noise(133), RATE)
        command = ["ffmpeg", "-v", "error", "-i", tmp_path / "x.wav", *options, "-f", form, "-"]
        content = subprocess.run(command, check=True, capture_output=True).stdout  # a pipe: no length in the header
        suffix = {"webm": "webm", "matroska": "mka", "adts": "aac"}[form]
        (tmp_path / f"x.{suffix}").write_bytes(content)
        find = shutil.which("ffmpeg")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "ffmpeg").symlink_to(find)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # ffprobe is not needed
        summary = run_embed(
            [str(tmp_path / f"x.{suffix}")], tmp_path / "out", checkpoint, num_frames=16, workers=workers
        )
        assert (summary["rows"], summary["failed"]) == (13, 0)
        places = self.places(tmp_path / "out")
        assert places[:-1] == [(pytest.approx(10.24 * i), pytest.approx(10.24 * (i + 1))) for i in range(12)]
        assert places[-1] == (pytest.approx(122.88), pytest.approx(133, abs=0.15))

    @pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
    def test_a_picture_that_is_longer_than_the_sound(self, checkpoint, tmp_path):
        soundfile.write(tmp_path / "x.wav", self.noise(25), RATE)
        picture = ["-f", "lavfi", "-i", "color=c=black:s=64x64:r=5:d=60", "-c:v", "mpeg4", "-c:a", "aac"]
        self.convert(tmp_path / "x.wav", tmp_path / "x.mp4", *picture)
        summary = run_embed([str(tmp_path / "x.mp4")], tmp_path / "out", checkpoint, num_frames=16)
        assert (summary["rows"], summary["failed"]) == (3, 0)

    @pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
    def test_damage_in_what_only_ffmpeg_reads_is_listed(self, checkpoint, tmp_path):
        soundfile.write(tmp_path / "x.wav", self.noise(60), RATE)
        self.convert(tmp_path / "x.wav", tmp_path / "x.mka", "-c:a", "aac")
        content = bytearray((tmp_path / "x.mka").read_bytes())
        content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
        (tmp_path / "x.mka").write_bytes(content)
        summary = run_embed([str(tmp_path / "x.mka")], tmp_path / "out", checkpoint, num_frames=16)
        assert summary["failed"] == 1
        assert 1 <= summary["rows"] <= 4
        (error,) = read_errors(tmp_path / "out")
        assert error["error"].endswith("Nothing behind it was read.")
        assert error["start_s"] == self.places(tmp_path / "out")[-1][1]

    @pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("case", ["too short", "too long", "right"])
    def test_mp3(self, case, workers, checkpoint, tmp_path):
        quiet, loud = np.zeros(RATE * 90), self.noise(40)
        order = {"too short": (loud, quiet), "too long": (quiet, loud), "right": (loud, quiet)}[case]
        soundfile.write(tmp_path / "x.wav", np.concatenate(order), RATE)
        header = [] if case == "right" else ["-write_xing", "0"]
        self.convert(tmp_path / "x.wav", tmp_path / "x.mp3", "-q:a", "2", *header)
        estimate = soundfile.info(tmp_path / "x.mp3").duration
        assert {"too short": estimate < 90, "too long": estimate > 180, "right": estimate == 130}[case]
        for whole in (False, True):
            out = tmp_path / str(whole)
            options = {"num_frames": 16, "workers": workers, "whole": whole}
            summary = run_embed([str(tmp_path / "x.mp3")], out, checkpoint, **options)
            assert (summary["rows"], summary["failed"]) == (1 if whole else 13, 0)
            assert self.places(out)[-1][1] == pytest.approx(130, abs=0.2)

    @pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
    def test_truncated_mp3(self, checkpoint, tmp_path):
        soundfile.write(tmp_path / "x.wav", self.noise(60), RATE)
        self.convert(tmp_path / "x.wav", tmp_path / "told.mp3", "-q:a", "4")
        self.convert(tmp_path / "x.wav", tmp_path / "untold.mp3", "-b:a", "64k", "-write_xing", "0")
        for name in ("told", "untold"):
            content = (tmp_path / f"{name}.mp3").read_bytes()
            (tmp_path / f"{name}.mp3").write_bytes(content[: len(content) * 3 // 4])
            run_embed([str(tmp_path / f"{name}.mp3")], tmp_path / name, checkpoint, num_frames=16)
            run_embed([str(tmp_path / f"{name}.mp3")], tmp_path / f"{name}-1", checkpoint, whole=True, num_frames=16)
        for name in ("told", "untold"):
            assert self.places(tmp_path / name)[-1][1] == pytest.approx(45, abs=2)
        assert read_errors(tmp_path / "told")[-1]["end_s"] == pytest.approx(61.44)  # to the end of the last window
        assert read_errors(tmp_path / "told-1")[0]["error"].startswith("truncated: it holds 4")
        assert read_errors(tmp_path / "untold") == read_errors(tmp_path / "untold-1") == []

    def test_truncated_wav_keeps_what_is_there(self, checkpoint, tmp_path):
        soundfile.write(tmp_path / "x.wav", self.noise(60), RATE)
        content = (tmp_path / "x.wav").read_bytes()
        (tmp_path / "x.wav").write_bytes(content[: len(content) * 3 // 4])
        summary = run_embed([str(tmp_path / "x.wav")], tmp_path / "out", checkpoint, num_frames=16)
        assert (summary["rows"], summary["failed"]) == (4, 1)
        errors = read_errors(tmp_path / "out")
        assert errors[0]["start_s"] == 40.96
        assert errors[-1]["end_s"] == pytest.approx(61.44)
        assert all("truncated" in row["error"] for row in errors)

    def test_overlapping_windows_are_sent_once(self, tmp_path):
        soundfile.write(tmp_path / "x.wav", self.noise(150), RATE)
        cut = windows.Cut(rate=RATE, shortest=513, segment=163840, hop=2560)
        item = Input("x", str(tmp_path / "x.wav"))
        part = next(cut.parts(windows.decode_first(cut, item, None).rest))
        found = windows.decode_part(cut, item, None, part)
        assert len(part) == 750
        assert len(pickle.dumps(found)) < 1.2 * 4 * (120 + 10.24) * RATE
        cut_out = [window for stretch in found.stretches for window in cut.windows(item, stretch)]
        assert len(cut_out) == 750
        whole = load_audio(tmp_path / "x.wav").numpy()
        for number in (1, 400, 750):
            expected = whole[2560 * number :][:163840]
            np.testing.assert_allclose(cut_out[number - 1].samples, expected, atol=1e-5)

    def test_samples_that_wait_are_bounded(self, tmp_path, monkeypatch):
        """Not the number of recordings."""
        monkeypatch.setattr(windows, "READ_AHEAD_BYTES", 4000)
        begun, calls = [], 0

        class Counting(ThreadPoolExecutor):
            def submit(self, *arguments):
                begun.append(arguments)
                return super().submit(*arguments)

        def decode(size: int) -> windows.Found:
            return windows.Found([windows.Stretch(range(1), np.zeros(size, np.float32))])

        most = {100: 8, 500: 2, 5000: 1}  # samples: how many are under way then
        for size, expected in most.items():
            begun.clear()
            with Counting(2) as executor:
                tasks = ((0, (size,)) for _ in range(40))
                waiting = []
                for calls, _ in enumerate(windows.read_ahead(executor, decode, tasks, 8), start=1):
                    waiting.append(len(begun) - calls)
            assert calls == 40
            assert max(waiting) <= expected
            assert max(waiting[10:-10]) == expected - 1


class TestReadingBack:
    @pytest.fixture(scope="class")
    @staticmethod
    def table(sounds, checkpoint, tmp_path_factory):
        out = tmp_path_factory.mktemp("table") / "out"
        run_embed([str(sounds)], out, checkpoint, shard_size=5, tokens=True, layers="1")
        (out.parent / "half").mkdir()
        run_embed([str(sounds)], out.parent / "half" / "out", checkpoint, shard_size=5, tokens=True, float16=True)
        return out

    def test_pandas_and_pyarrow(self, table):
        frame, rows = pd.read_parquet(table / "embeddings"), parquet.read_table(table / "embeddings")
        assert len(frame) == len(rows) == 19
        assert list(frame) == rows.column_names == ["id", "path", "start_s", "end_s", "embedding", "cls_1", "tokens"]
        assert np.stack(frame["embedding"]).shape == (19, 32)
        assert np.array_equal(np.stack(frame["embedding"]), vectors(rows, "embedding").numpy())
        assert np.stack(frame["tokens"][0]).shape == (64, 32)
        half = pd.read_parquet(table.parent / "half" / "out" / "embeddings")
        assert np.stack(half["embedding"]).dtype == np.float16

    def test_polars(self, table):
        polars = pytest.importorskip("polars")
        frame = polars.read_parquet(table / "embeddings")
        expected = vectors(parquet.read_table(table / "embeddings"), "embedding").numpy()
        assert np.array_equal(frame["embedding"].to_numpy(), expected)
        assert polars.read_parquet(table.parent / "half" / "out" / "embeddings")["embedding"].to_numpy().shape == (
            19,
            32,
        )

    def test_datasets(self, table, tmp_path):
        datasets = pytest.importorskip("datasets")
        for out in (table, table.parent / "half" / "out"):
            rows = parquet.read_table(out / "embeddings")
            folder = str(out / "embeddings")
            dataset = datasets.load_dataset("parquet", data_dir=folder, split="train", cache_dir=str(tmp_path))
            assert dataset["path"][:] == rows["path"].to_pylist()
            assert torch.equal(torch.tensor(dataset["embedding"][:]), vectors(rows, "embedding"))

    def test_metadata_traces_the_table(self, table, checkpoint):
        metadata = json.loads((table / "metadata.json").read_text())
        assert metadata["checkpoint"] == f"{checkpoint}/model.safetensors"
        assert metadata["commit"] is None
        assert metadata["settings"]["segment"] == metadata["settings"]["hop"] == 10.24
        assert metadata["settings"]["layers"] == "1"
        assert metadata["inputs"]["files"] == 12
        assert metadata["versions"].keys() == {"bat_audio", "torch", "transformers"}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """60 recordings of three lengths, six of them broken."""
    folder = tmp_path_factory.mktemp("many")
    make_many(folder, 60, broken_every=10)
    return folder


def make_many(folder: Path, number: int, broken_every: int):
    broken_files(folder.parent / "broken")
    ways = sorted((folder.parent / "broken").iterdir())
    rng = np.random.default_rng(0)
    for place in range(number):
        file = folder / f"{place // 50:03d}" / f"{place:05d}.wav"
        file.parent.mkdir(exist_ok=True)
        if place % broken_every == 0:
            shutil.copy(ways[place // broken_every % len(ways)], file)
        else:
            soundfile.write(file, 0.1 * rng.standard_normal(16000 + 4000 * (place % 3)), 16000)


def command(inputs, out, checkpoint, *options) -> list[str]:
    options = [str(option) for option in ("--workers", 2, "--device", "cpu", *options)]
    return [*PROGRAM, str(inputs), "-o", str(out), "--checkpoint", checkpoint, *options]


SMALL = ("--shard-size", 4, "--num-frames", 16, "--segment", 0.5)


def start(command: list[str], **options) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def hear_ctrl_c():
    """As at a terminal: tests that a shell runs in the background ignore it, and so would their processes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_shards(out: Path, number: int, process: subprocess.Popen, seconds: float = math.inf):
    deadline = time.monotonic() + seconds
    while len(list(out.glob("embeddings/*"))) < number and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def unfinished(out: Path) -> list[str]:
    return [path.name for path in out.rglob("*") if path.name.startswith(".")]


def descendants(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestResuming:
    @pytest.fixture(scope="class")
    @staticmethod
    def uninterrupted(many, checkpoint, tmp_path_factory):
        out = tmp_path_factory.mktemp("uninterrupted") / "out"
        process = start(command(many, out, checkpoint, *SMALL))
        printed, errors = process.communicate()
        assert process.returncode == 1, errors
        summary = json.loads(printed)
        assert summary["files"] == 60
        assert summary["failed"] == len(pd.read_parquet(out / "errors.parquet"))
        return out

    @pytest.mark.slow
    def test_after_kill_9(self, many, checkpoint, uninterrupted, tmp_path):
        out, shards = tmp_path / "out", {}
        for number in (0, 1, 4, 7):
            process = start(command(many, out, checkpoint, *SMALL))
            wait_for_shards(out, number, process)
            time.sleep(0.05 * random.random())
            os.kill(process.pid, signal.SIGSTOP)  # a fast machine would finish before the kill
            processes = descendants(process.pid)
            process.kill()
            process.communicate()
            # A shard that was there stays as it was.
            assert all((out / "embeddings" / name).stat().st_ino == inode for name, inode in shards.items())
            shards = {path.name: path.stat().st_ino for path in out.glob("embeddings/*")}
            deadline = time.monotonic() + 20
            while any(map(is_running, processes)) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not any(map(is_running, processes))
        assert not (out / "errors.parquet").exists()
        process = start(command(many, out, checkpoint, *SMALL))
        process.communicate()
        assert process.returncode == 1
        assert_same_table(out, uninterrupted)
        assert all((out / "embeddings" / name).stat().st_ino == inode for name, inode in shards.items())
        assert unfinished(out) == []

    @pytest.mark.slow
    def test_after_20_kills_over_2000_files(self, checkpoint, tmp_path):
        (tmp_path / "many").mkdir()
        make_many(tmp_path / "many", 2000, broken_every=100)
        if os.getuid():  # root may read everything
            (tmp_path / "many" / "000" / "00001.wav").chmod(0)
        options = ("--shard-size", 25, "--num-frames", 16, "--segment", 1)
        begun = time.monotonic()
        process = start(command(tmp_path / "many", tmp_path / "whole", checkpoint, *options))
        wait_for_shards(tmp_path / "whole", 1, process)
        loaded = time.monotonic() - begun
        process.communicate()
        rest = time.monotonic() - begun - loaded
        order, out = random.Random(0), tmp_path / "out"
        for _ in range(20):
            done = len(list(out.glob("embeddings/*")))
            process = start(command(tmp_path / "many", out, checkpoint, *options))
            # From before the folder is there to behind the next shard. None lasts longer than two shards take, however
            # fast the machine has become since it was timed, so that the 80 shards suffice for 20 kills.
            if order.random() < 0.5:
                wait_for_shards(out, done + 1, process, loaded * order.uniform(0.3, 1))
            else:
                wait_for_shards(out, done + 1, process)
                wait_for_shards(out, done + 2, process, rest / 80 * order.random())
            assert process.poll() is None, process.communicate()
            process.kill()
            process.communicate()
        process = start(command(tmp_path / "many", tmp_path / "out", checkpoint, *options))
        summary = json.loads(process.communicate()[0])
        assert summary["files"] == 2000
        reasons = [row["error"] for row in read_errors(tmp_path / "out")]
        assert any("Permission denied" in reason for reason in reasons) == bool(os.getuid())
        assert_same_table(tmp_path / "out", tmp_path / "whole")
        assert unfinished(tmp_path / "out") == []

    @pytest.mark.slow
    def test_after_ctrl_c(self, many, checkpoint, uninterrupted, tmp_path):
        for attempt in range(3):  # Python loses a Ctrl-C that comes inside a destructor, and goes on
            out = tmp_path / f"out_{attempt}"
            process = start(command(many, out, checkpoint, *SMALL), start_new_session=True, preexec_fn=hear_ctrl_c)
            wait_for_shards(out, 1, process)
            os.kill(process.pid, signal.SIGSTOP)  # a fast machine would finish before the Ctrl-C
            processes = descendants(process.pid)
            assert len(list(out.glob("embeddings/*"))) < 15
            os.killpg(process.pid, signal.SIGINT)  # to the whole group of processes, as a terminal sends it
            os.kill(process.pid, signal.SIGCONT)
            printed, errors = process.communicate()
            if "Exception ignored" not in errors:
                break
        assert process.returncode == 130, errors
        assert printed == ""
        assert errors.splitlines()[-1] == "interrupted; the same command goes on from there"
        assert "Traceback" not in errors
        assert unfinished(out) == []
        assert not any(map(is_running, processes))
        process = start(command(many, out, checkpoint, *SMALL))
        process.communicate()
        assert_same_table(out, uninterrupted)

    @pytest.mark.slow
    def test_on_a_full_disk(self, many, checkpoint, tmp_path):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000))  # bytes of a file; as if the disk was full then

        options = ("--shard-size", 20, "--tokens", "--segment", 0.5, "--num-frames", 16)
        process = start(command(many, tmp_path / "out", checkpoint, *options), preexec_fn=limit)
        _, errors = process.communicate()
        assert process.returncode == 1, errors
        reason = f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}"
        done = "(0 of 3 shards are done; the same command goes on from there)"
        assert errors.splitlines()[-1] == f"error: {tmp_path / 'out'}: {reason} {done}"
        assert unfinished(tmp_path / "out") == []
        for out in ("out", "whole"):
            process = start(command(many, tmp_path / out, checkpoint, *options))
            process.communicate()
        assert_same_table(tmp_path / "out", tmp_path / "whole")

    def test_after_a_failed_write(self, sounds, checkpoint, tmp_path, monkeypatch):
        run_embed([str(sounds)], tmp_path / "whole", checkpoint, shard_size=3)

        def fail(self, rows, seconds):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("bat_audio_tools.embedding.table.ShardWriter.add", fail)
            with pytest.raises(OSError, match=r"No space left on device \(0 of 4 shards"):
                run_embed([str(sounds)], tmp_path / "out", checkpoint, shard_size=3)
        assert unfinished(tmp_path / "out") == []
        run_embed([str(sounds)], tmp_path / "out", checkpoint, shard_size=3)
        assert_same_table(tmp_path / "out", tmp_path / "whole")

    def test_of_a_finished_run_computes_nothing(self, sounds, checkpoint, tmp_path, monkeypatch):
        first = run_embed([str(sounds)], tmp_path / "out", checkpoint)
        monkeypatch.delattr("bat_audio_tools.embedding.stages.Encoder")
        second = run_embed([str(sounds)], tmp_path / "out", checkpoint)
        assert all(first[name] == second[name] for name in ("files", "rows", "failed", "audio_hours"))

    def test_of_what_was_mended(self, sounds, checkpoint, tmp_path):
        shutil.copytree(sounds / "a", tmp_path / "a")
        (tmp_path / "a" / "exact.wav").write_text("no sound")
        run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1)
        shards = {path.name: path.stat().st_ino for path in (tmp_path / "out" / "embeddings").iterdir()}
        shutil.copy(sounds / "a" / "exact.wav", tmp_path / "a")
        assert run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1)["failed"] == 1
        assert run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1, retry=True)["failed"] == 0
        run_embed([str(tmp_path / "a")], tmp_path / "whole", checkpoint, shard_size=1)
        assert_same_table(tmp_path / "out", tmp_path / "whole")
        after = {path.name: path.stat().st_ino for path in (tmp_path / "out" / "embeddings").iterdir()}
        assert [name for name in shards if after[name] != shards[name]] == ["part-00000.parquet"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"pool": "mean"}, "settings.pool was 'cls' and is 'mean'"),
            ({"segment": 5.0}, "settings.segment was 10.24 and is 5.0, settings.hop was 10.24 and is 5.0"),
            ({"float16": True}, "settings.float16 was False and is True"),
            ({"bf16": True}, "settings.bf16 was False and is True"),
            ({"shard_size": 3}, "settings.shard_size was 512 and is 3"),
        ],
    )
    def test_with_other_settings_is_refused(self, change, message, sounds, checkpoint, tmp_path):
        run_embed([str(sounds)], tmp_path / "out", checkpoint)
        before = read(tmp_path / "out")
        with pytest.raises(ValueError, match=message):
            run_embed([str(sounds)], tmp_path / "out", checkpoint, **change)
        assert read(tmp_path / "out").equals(before)
        run_embed([str(sounds)], tmp_path / "out", checkpoint, workers=1, segment=10.24)  # decides nothing

    def test_with_other_inputs_or_weights_is_refused(self, sounds, checkpoint, tmp_path):
        shutil.copytree(sounds / "a", tmp_path / "a")
        run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint)
        tiny_model(hidden_size=64, chunk_time_patches=16).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="weights_sha256 was"):
            run_embed([str(tmp_path / "a")], tmp_path / "out", str(tmp_path / "other"))
        shutil.move(checkpoint, f"{checkpoint}-moved")
        try:
            run_embed([str(tmp_path / "a")], tmp_path / "out", f"{checkpoint}-moved")
        finally:
            shutil.move(f"{checkpoint}-moved", checkpoint)
        shutil.copy(sounds / "two.wav", tmp_path / "a")
        with pytest.raises(ValueError, match=r"inputs\.files was 4 and is 5"):
            run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint)

    def test_with_the_stored_inputs(self, sounds, checkpoint, tmp_path):
        shutil.copytree(sounds / "a", tmp_path / "a")
        with pytest.raises(ValueError, match=r"holds no shards .* leave out stored_inputs"):
            run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1, stored_inputs=True)
        run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1)
        run_embed([str(tmp_path / "a")], tmp_path / "whole", checkpoint, shard_size=1)
        (tmp_path / "out" / "embeddings" / "part-00001.parquet").unlink()
        shutil.copy(sounds / "two.wav", tmp_path / "a")
        with pytest.raises(ValueError, match=r"inputs\.files was 4 and is 5, .* \(--stored-inputs\) it goes on"):
            run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1)
        run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1, stored_inputs=True)
        assert_same_table(tmp_path / "out", tmp_path / "whole")

    def test_from_another_folder_is_refused(self, sounds, checkpoint, tmp_path, monkeypatch):
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
            shutil.copy(sounds / "second_0.wav", tmp_path / name)
        monkeypatch.chdir(tmp_path / "here")
        run_embed(["second_0.wav"], tmp_path / "out", checkpoint)
        monkeypatch.chdir(tmp_path / "there")
        with pytest.raises(ValueError, match=r"inputs\.folder was '.*here' and is '.*there'\. .*--stored-inputs"):
            run_embed(["second_0.wav"], tmp_path / "out", checkpoint)

    def test_with_another_config_is_refused(self, sounds, checkpoint, tmp_path):
        shutil.copytree(checkpoint, tmp_path / "model")
        run_embed([str(sounds / "second_0.wav")], tmp_path / "out", str(tmp_path / "model"))
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "top_db": 40.0}))
        with pytest.raises(ValueError, match=r"config\.top_db was 80(\.0)? and is 40\.0\. Repeat"):
            run_embed([str(sounds / "second_0.wav")], tmp_path / "out", str(tmp_path / "model"))

    def test_with_another_dataset_is_refused(self, sounds, checkpoint, tmp_path):
        datasets = pytest.importorskip("datasets")

        def dataset(*files):
            audio = [{"path": None, "bytes": (sounds / file).read_bytes()} for file in files]
            return datasets.Dataset.from_dict({"audio": audio}).cast_column("audio", datasets.Audio())

        run_embed(dataset("second_0.wav", "second_1.wav"), tmp_path / "out", checkpoint)
        run_embed(dataset("second_0.wav", "second_1.wav"), tmp_path / "out", checkpoint)
        with pytest.raises(ValueError, match=r"inputs\.fingerprint was '\w+' and is"):
            run_embed(dataset("second_2.wav", "second_3.wav"), tmp_path / "out", checkpoint)

    def test_of_a_table_without_shards_begins_anew(self, sounds, checkpoint, tmp_path, monkeypatch):
        def fail(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual.")

        with monkeypatch.context() as patch:
            patch.setattr(encoder.Encoder, "__call__", fail)
            with pytest.raises(
                OSError, match=r"OutOfMemoryError: CUDA out of memory\. .*GiB\. A smaller .*--batch-size"
            ):
                run_embed([str(sounds)], tmp_path / "out", checkpoint)
        run_embed([str(sounds)], tmp_path / "out", checkpoint, batch_size=4, shard_size=5)
        run_embed([str(sounds)], tmp_path / "whole", checkpoint, batch_size=4, shard_size=5)
        assert_same_table(tmp_path / "out", tmp_path / "whole")

    def test_beside_another_run_is_refused(self, sounds, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "LOCK_WAIT", 0.2)
        with folders.lock(tmp_path / "out"), pytest.raises(StartError, match="in use by another run"):
            run_embed([str(sounds / "a")], tmp_path / "out", checkpoint)
        run_embed([str(sounds / "a")], tmp_path / "out", checkpoint)

    def test_of_shards_without_metadata_is_refused(self, sounds, checkpoint, tmp_path):
        run_embed([str(sounds / "a")], tmp_path / "out", checkpoint)
        for name in ("metadata.json", "errors.parquet"):
            (tmp_path / "out" / name).unlink()
        with pytest.raises(ValueError, match=r"such as embeddings/part-00000\.parquet, but no table"):
            run_embed([str(sounds / "a")], tmp_path / "out", checkpoint, pool="mean")

    @pytest.mark.parametrize("name", ["write_json", "finish"])
    def test_after_a_disk_was_full_before_or_behind_the_shards(self, name, sounds, checkpoint, tmp_path, monkeypatch):
        def fail(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(f"bat_audio_tools.embedding.table.Table.{name}", fail)
            with pytest.raises(OSError, match=r"No space left on device \(.*the same command goes on") as failure:
                run_embed([str(sounds / "a")], tmp_path / "out", checkpoint)
        assert not isinstance(failure.value, StartError)  # whose exit status would be 2
        assert run_embed([str(sounds / "a")], tmp_path / "out", checkpoint)["rows"] == 8

    def test_into_a_folder_with_other_files_is_refused(self, sounds, checkpoint, tmp_path):
        (tmp_path / "letter.txt").write_text("no table")
        with pytest.raises(ValueError, match=r"holds other files, such as letter\.txt, but no table"):
            run_embed([str(sounds)], tmp_path, checkpoint)


class TestNotFinite:
    def test_too_large_for_float16(self, sounds, checkpoint, tmp_path, monkeypatch):
        call = encoder.Encoder.__call__

        def scale(*arguments):
            rows = call(*arguments)
            rows[0]["tokens"] = rows[0]["tokens"] * 1e6
            return rows

        monkeypatch.setattr(encoder.Encoder, "__call__", scale)
        inputs = [str(sounds / f"second_{number}.wav") for number in range(3)]
        with pytest.raises(BrokenRecordingError, match=r"column tokens of .*second_0\.wav at 0\.00 s\. .*--float16"):
            run_embed(inputs, tmp_path / "16", checkpoint, tokens=True, float16=True)
        run_embed(inputs, tmp_path / "32", checkpoint, tokens=True)

    def test_nan_of_the_model(self, sounds, checkpoint, tmp_path):
        model = load_pretrained_encoder(checkpoint=checkpoint)
        with torch.no_grad():
            model.cls_token.fill_(torch.nan)
        model.save_pretrained(tmp_path / "nan")
        with pytest.raises(BrokenRecordingError, match=r"column embedding of .* and 2 more\. .*another checkpoint"):
            run_embed([str(sounds / "second_*.wav")], tmp_path / "out", str(tmp_path / "nan"))
        assert list((tmp_path / "out" / "embeddings").iterdir()) == []


class TestSettings:
    def test_paths_and_lists(self, sounds, checkpoint, tmp_path):
        settings = {"checkpoint": checkpoint, "workers": 0, "device": "cpu"}
        embed(EmbedSettings(inputs=sounds / "second_0.wav", out=tmp_path / "out", layers=[1, 2], **settings))
        assert read(tmp_path / "out").column_names[-2:] == ["cls_1", "cls_2"]
        embed(EmbedSettings(inputs=sounds / "second_0.wav", out=str(tmp_path / "out"), layers="1,2", **settings))
        with pytest.raises(ValueError, match="layers='1,x': expected numbers"):
            EmbedSettings(inputs="x", out="out", layers=[1, "x"])


class TestCommandLine:
    def run(self, *arguments, **options) -> tuple[int, str, str]:
        process = start([*PROGRAM, *map(str, arguments)], **options)
        printed, errors = process.communicate()
        return process.returncode, printed, errors

    @pytest.mark.slow
    def test_exit_status_and_summary(self, sounds, checkpoint, tmp_path):
        common = ("-o", tmp_path / "out", "--checkpoint", checkpoint, "--workers", 1)
        status, printed, errors = self.run(sounds / "a", *common)
        assert status == 0, errors
        summary = json.loads(printed)
        assert summary["table"] == str(tmp_path / "out")
        assert (summary["files"], summary["rows"], summary["failed"]) == (4, 8, 0)
        assert summary["audio_hours"] == pytest.approx((10.24 + 45.5 + 3.3 + 0.1) / 3600, rel=1e-3)
        assert "clips/s" in errors
        assert "audio-hours/s" in errors

        status, printed, errors = self.run(sounds / "a", *common, "--pool", "mean")
        assert (status, printed) == (2, "")
        assert errors.splitlines()[-1].startswith(f"error: {tmp_path}/out: the table in it was begun in another way: ")
        assert self.run(tmp_path / "none.wav", *common)[0] == 2
        status, _, errors = self.run("sounds/missing", *common)
        assert status == 2
        assert "no such file or folder here, and no dataset of that name could be had from the Hub" in errors
        assert self.run(sounds / "a", "-o", tmp_path / "out2", "--checkpoint", "nowhere")[0] == 2
        assert self.run(sounds / "a", "-o", "/dev/null/out", "--checkpoint", checkpoint)[0] == 2
        assert self.run(sounds, *common, "--pool", "max")[0] == 2
        assert self.run(sounds, *common, "--no-such-option")[0] == 2
        assert self.run()[0] == 2
