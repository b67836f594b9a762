"""Broken recordings are listed with the reason and stop nothing else; rows that are not finite stop the run."""

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from embed_tables import RATE, broken_files, read, read_errors, run_embed

from bat_audio import load_audio, load_pretrained_encoder
from bat_audio_tools.embedding import encoder, windows
from bat_audio_tools.embedding.windows import BrokenRecordingError
from bat_audio_tools.sounds.reading import Input


def test_broken_files_are_listed_with_the_reason(recordings, checkpoint, tmp_path):
    reasons = broken_files(tmp_path / "broken")
    summary = run_embed([str(tmp_path / "broken"), str(recordings)], tmp_path / "out", checkpoint)
    errors = {Path(row["path"]).name: row for row in read_errors(tmp_path / "out")}
    assert errors.keys() == {name for name, reason in reasons.items() if reason}
    for name, row in errors.items():
        assert any(part in row["error"] for part in reasons[name].split("|")), row
        assert str(tmp_path) not in row["error"]
        assert row["id"] == row["path"]
    assert summary["failed"] == len(errors)
    assert summary["files"] == len(reasons) + 12
    run_embed([str(recordings)], tmp_path / "sounds", checkpoint)
    whole = read(tmp_path / "out")
    alone = read(tmp_path / "sounds")
    assert summary["rows"] == len(whole) == 3 + len(alone)
    assert whole.slice(3).drop(["embedding"]).equals(alone.drop(["embedding"]))


def test_broken_part_of_a_recording(checkpoint, tmp_path):
    samples = 0.1 * np.random.default_rng(0).standard_normal(10 * 8000)
    samples[[8000 * 3 + 4000, 8000 * 4 + 4000, 8000 * 8 + 4000]] = np.nan
    soundfile.write(tmp_path / "long.wav", samples, 8000, subtype="FLOAT")
    summary = run_embed([str(tmp_path)], tmp_path / "out", checkpoint, segment=1.0)
    assert summary["failed"] == 1
    assert read(tmp_path / "out")["start_s"].to_pylist() == [0, 1, 2, 5, 6, 7, 9]
    errors = [(row["start_s"], row["end_s"], row["error"]) for row in read_errors(tmp_path / "out")]
    assert errors == [(3, 5, "holds NaN or infinite samples."), (8, 9, "holds NaN or infinite samples.")]


def test_no_recording_is_left(checkpoint, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    summary = run_embed([str(tmp_path / "text.wav")], tmp_path / "out", checkpoint)
    assert (summary["rows"], summary["failed"], summary["files"]) == (0, 1, 1)
    assert len(pd.read_parquet(tmp_path / "out" / "embeddings")) == 0


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="other processes load what is patched")
@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_kill_their_process(workers, recordings, checkpoint, tmp_path, monkeypatch):
    def load(source, start, *arguments):
        if "second_2" in source or ("long.flac" in source and start > 20):
            os.kill(os.getpid(), signal.SIGKILL)
        return load_audio(source, start, *arguments)

    run_embed([str(recordings)], tmp_path / "whole", checkpoint, num_frames=16)
    monkeypatch.setattr(windows, "load_audio", load)
    monkeypatch.setattr(windows, "PART_SECONDS", 10)
    run_embed([str(recordings)], tmp_path / "out", checkpoint, workers=workers, num_frames=16)
    errors = [(Path(row["path"]).name, row["start_s"], row["end_s"]) for row in read_errors(tmp_path / "out")]
    assert errors == [("second_2.wav", 0, 10.24), ("long.flac", 20.48, pytest.approx(51.2))]
    assert all(row["error"] == windows.KILLS for row in read_errors(tmp_path / "out"))
    left_out = [("second_2.wav", 0.0), *(("long.flac", start) for start in (20.48, 30.72, 40.96))]
    whole = read(tmp_path / "whole").select(["path", "start_s", "end_s"]).to_pylist()
    expected = [row for row in whole if (Path(row["path"]).name, round(row["start_s"], 2)) not in left_out]
    assert read(tmp_path / "out").select(["path", "start_s", "end_s"]).to_pylist() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_stops_at_the_first(workers, recordings, checkpoint, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    inputs = [str(recordings / "second_*.wav"), str(tmp_path / "text.wav")]
    options = {"workers": workers, "shard_size": 5}
    with pytest.raises(BrokenRecordingError, match=r"text\.wav: cannot be read .* without strict"):
        run_embed(inputs, tmp_path / "out", checkpoint, strict=True, **options)
    assert [path.name for path in (tmp_path / "out" / "embeddings").iterdir()] == ["part-00000.parquet"]
    run_embed(inputs, tmp_path / "out", checkpoint, **options)  # goes on without
    with pytest.raises(BrokenRecordingError, match="1 recordings are broken"):
        run_embed(inputs, tmp_path / "out", checkpoint, strict=True, **options)


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="must become a user who may not read everything")
def test_permission_denied(recordings, checkpoint):
    # Outside the folders of pytest, which no other user may enter.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        for name in ("open.wav", "closed.wav"):
            shutil.copy(recordings / "second_0.wav", folder)
            os.replace(f"{folder}/second_0.wav", f"{folder}/{name}")
        os.chmod(f"{folder}/open.wav", 0o644)
        os.chmod(f"{folder}/closed.wav", 0)
        load_audio(recordings / "second_0.wav")  # the other user may not even read the libraries
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


# Rows that are not finite


def test_rows_too_large_for_float16(recordings, checkpoint, tmp_path, monkeypatch):
    call = encoder.Encoder.__call__

    def scale(*arguments):
        rows = call(*arguments)
        rows[0]["tokens"] = rows[0]["tokens"] * 1e6
        return rows

    monkeypatch.setattr(encoder.Encoder, "__call__", scale)
    inputs = [str(recordings / f"second_{number}.wav") for number in range(3)]
    with pytest.raises(BrokenRecordingError, match=r"column tokens of .*second_0\.wav at 0\.00 s\. .*--float16"):
        run_embed(inputs, tmp_path / "16", checkpoint, tokens=True, float16=True)
    run_embed(inputs, tmp_path / "32", checkpoint, tokens=True)


def test_nan_of_the_model(recordings, checkpoint, tmp_path):
    model = load_pretrained_encoder(checkpoint=checkpoint)
    with torch.no_grad():
        model.cls_token.fill_(torch.nan)
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(BrokenRecordingError, match=r"column embedding of .* and 2 more\. .*another checkpoint"):
        run_embed([str(recordings / "second_*.wav")], tmp_path / "out", str(tmp_path / "nan"))
    assert list((tmp_path / "out" / "embeddings").iterdir()) == []
