"""Settings of `bat-audio embed` in Python and on the command line, and its exit status."""

import json
import sys

import pytest
from conftest import run
from embed_tables import broken_files, read, read_errors
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
    assert embed_program()[0] == 2
