"""Settings of `bat-audio embed` in Python and on the command line, and its exit status."""

import json
import math
import sys

import pytest
from conftest import run
from embed_tables import broken_files, read, read_errors, run_embed
from programs import Program

from bat_audio_tools.embed import embed
from bat_audio_tools.settings import EmbedSettings


def test_paths_and_lists(recordings, checkpoint, tmp_path):
    settings = {"checkpoint": checkpoint, "workers": 0, "device": "cpu"}
    embed(EmbedSettings(inputs=recordings / "second_0.wav", out=tmp_path / "out", layers=[1, 2], **settings))
    assert read(tmp_path / "out").column_names[-2:] == ["cls_1", "cls_2"]
    embed(EmbedSettings(inputs=recordings / "second_0.wav", out=str(tmp_path / "out"), layers="1,2", **settings))
    with pytest.raises(ValueError, match="layers='1,x': expected numbers"):
        EmbedSettings(inputs="x", out="out", layers=[1, "x"])


@pytest.mark.parametrize("name", ["segment", "hop"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0, 0.0, 1e300])
def test_times_of_windows_are_finite(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* must be above 0 s and at most"):
        EmbedSettings(inputs="x", out="out", **{name: value})


FAILED_STARTS = [
    ({"device": "foo"}, "device='foo' is not there"),
    ({"device": "cuda:99"}, "device='cuda:99' is not there"),
    ({"checkpoint": "nowhere"}, "No weights at nowhere"),
    ({"checkpoint": "empty"}, "weights"),
    ({"layers": "7"}, "the encoder has the blocks 1 to 2"),
    ({"segment": 0.001}, "windows must have at least"),
    ({"inputs": "nowhere.wav"}, "no such file"),
    ({"inputs": "empty"}, "no sounds in it"),
    ({"inputs": "bad.csv"}, "no column 'path'"),
    ({"inputs": []}, "Name the inputs"),
    ({"stored_inputs": True}, "name no others"),
    ({"inputs": None, "stored_inputs": True}, "holds no shards of a table"),
    ({"split": "train"}, "chooses from a dataset"),
]


@pytest.mark.parametrize(("wrong", "message"), FAILED_STARTS, ids=[str(wrong) for wrong, _ in FAILED_STARTS])
def test_a_failed_start_leaves_nothing(wrong, message, recordings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("file\nx.wav\n")
    options = {"inputs": [str(recordings)], "out": "deep/out", "checkpoint": checkpoint, **wrong}
    with pytest.raises((ValueError, OSError), match=message):
        run_embed(**options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "empty"]


def embed_program(*words) -> tuple[int, str, str]:
    return Program("embed", *words).end()


@pytest.mark.slow
def test_exit_status_and_summary(recordings, checkpoint, tmp_path):
    common = ["-o", str(tmp_path / "out"), "--checkpoint", checkpoint, "--workers", "1"]
    result = run([sys.executable, "-m", "bat_audio_tools.cli", "embed", str(recordings / "a"), *common])
    summary = json.loads(result.stdout)
    assert summary["table"] == str(tmp_path / "out")
    assert (summary["files"], summary["rows"], summary["failed"]) == (4, 8, 0)
    assert summary["audio_hours"] == pytest.approx((10.24 + 45.5 + 3.3 + 0.1) / 3600, rel=1e-3)
    assert "clips/s" in result.stderr
    assert "audio-hours/s" in result.stderr

    broken_files(tmp_path / "broken")
    part = ("-o", tmp_path / "part", "--checkpoint", checkpoint, "--workers", 1)
    status, printed, errors = embed_program(tmp_path / "broken", *part)
    assert status == 1, errors
    assert json.loads(printed)["failed"] == len(read_errors(tmp_path / "part"))
    *_, told, first, second, third = errors.splitlines()
    assert told == f"broken recordings: 8, listed in {tmp_path}/part.run/errors.parquet; the first:"
    assert [line.strip() for line in (first, second, third)] == json.loads(printed)["first_errors"]

    status, printed, errors = embed_program(recordings / "a", *common, "--pool", "mean")
    assert (status, printed) == (2, "")
    assert errors.splitlines()[-1].startswith(f"error: {tmp_path}/out: the table in it was begun in another way: ")
    assert embed_program(tmp_path / "none.wav", *common)[0] == 2
    status, _, errors = embed_program("sounds/missing", *common)
    assert status == 2
    assert "no such file or folder here, and no dataset of that name could be had from the Hub" in errors
    assert embed_program(recordings / "a", "-o", tmp_path / "out2", "--checkpoint", "nowhere")[0] == 2
    assert embed_program(recordings / "a", "-o", "/dev/null/out", "--checkpoint", checkpoint)[0] == 2
    assert embed_program(recordings, *common, "--pool", "max")[0] == 2
    assert embed_program(recordings, *common, "--no-such-option")[0] == 2
    assert embed_program(recordings, *common, "--stored-inputs")[0] == 2
    assert embed_program()[0] == 2
