"""The bar of `bat-audio embed` tells what is embedded, and so do its rates; and the end of a run tells what failed."""

import itertools
import os
import shutil

import numpy as np
import pytest
import soundfile
from embed_tables import RATE, read, read_errors, run_embed

from bat_audio_tools import embed as embed_module
from bat_audio_tools.embedding import encoder, windows


@pytest.fixture
def watched(monkeypatch) -> list[tuple[float, int]]:
    """What the bar says, in percent, and the clips in its rates, at the start, and before and after each batch."""
    seen, bars = [], []
    begin, call, finish = embed_module.Progress.__init__, encoder.Encoder.__call__, embed_module.Progress.finish

    def note():
        seen.append((bars[-1].bar.n, bars[-1].clips))

    def begin_and_note(self, *arguments):
        begin(self, *arguments)
        bars.append(self)
        seen.clear()
        note()

    def call_between_notes(*arguments):
        note()
        return call(*arguments)

    def note_and_finish(self):
        note()
        finish(self)
        note()

    monkeypatch.setattr(embed_module.Progress, "__init__", begin_and_note)
    monkeypatch.setattr(encoder.Encoder, "__call__", call_between_notes)
    monkeypatch.setattr(embed_module.Progress, "finish", note_and_finish)
    return seen


def noise(seconds: float) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(round(seconds * RATE))


def check_order(seen: list[tuple[float, int]]):
    percents = [percent for percent, _ in seen]
    assert percents == sorted(percents)
    assert percents[-2] == pytest.approx(embed_module.ALMOST)
    assert max(percents[:-1]) < 100
    assert percents[-1] == 100


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken_at", [None, 30])
def test_a_long_recording_counts_by_what_is_embedded(workers, broken_at, watched, checkpoint, tmp_path):
    samples = noise(150)
    if broken_at is not None:
        samples[broken_at * RATE + RATE // 2] = np.nan
    soundfile.write(tmp_path / "x.wav", samples, RATE, subtype="FLOAT")
    run_embed([str(tmp_path / "x.wav")], tmp_path / "out", checkpoint, segment=1.0, num_frames=16, workers=workers)
    check_order(watched)
    for percent, clips in watched[1:-2]:
        done = clips + (broken_at is not None and clips + 32 > broken_at)
        assert percent == pytest.approx(100 * done / 150)
    assert [clips for _, clips in watched[1:5]] == [0, 32, 64, 96]


def test_recordings_count_by_their_sizes(watched, checkpoint, tmp_path):
    for name, seconds in (("a", 1), ("b", 100), ("c", 1), ("d", 50)):
        soundfile.write(tmp_path / f"{name}.wav", noise(seconds), RATE)
    options = {"segment": 1.0, "num_frames": 16, "shard_size": 1}
    run_embed([str(tmp_path)], tmp_path / "out", checkpoint, **options)
    check_order(watched)
    for percent, clips in watched[:-2]:
        assert percent == pytest.approx(100 * clips / 152, abs=0.1)
    (tmp_path / "out" / "embeddings" / "part-00003.parquet").unlink()
    run_embed([str(tmp_path)], tmp_path / "out", checkpoint, **options)  # begins where it stands
    check_order(watched)
    assert watched[0] == (pytest.approx(100 * 102 / 152, abs=0.1), 0)


def untold(file):
    """Take the length out of a FLAC file's header, as in one that was streamed."""
    content = bytearray(file.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    file.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_recording_that_does_not_tell_its_length(workers, watched, checkpoint, tmp_path):
    soundfile.write(tmp_path / "x.flac", noise(300), RATE)
    untold(tmp_path / "x.flac")
    run_embed([str(tmp_path / "x.flac")], tmp_path / "out", checkpoint, segment=1.0, num_frames=16, workers=workers)
    assert len(read(tmp_path / "out")) == 300
    check_order(watched)
    batches = watched[1:9]  # the last ones come when its end is known
    assert all(later > percent for (percent, _), (later, _) in itertools.pairwise(batches))
    assert batches[-1][0] < 95


def test_the_first_reasons_are_told(checkpoint, tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.wav").write_text("no sound")
    shutil.copy(tmp_path / "0.wav", tmp_path / "5.wav")
    summary = run_embed([str(tmp_path)], tmp_path / "out", checkpoint, shard_size=2)
    errors = read_errors(tmp_path / "out")
    assert len(errors) == summary["failed"] == 6
    assert summary["first_errors"] == [f"{row['path']} at 0.00 s: {row['error']}" for row in errors[:3]]
    assert summary["errors"] == os.path.join(f"{tmp_path}/out.run", "errors.parquet")
    with pytest.raises(
        windows.BrokenRecordingError, match=r"6 recordings are broken; .*0\.wav at 0\.00 s: cannot be read"
    ):
        run_embed([str(tmp_path)], tmp_path / "out", checkpoint, shard_size=2, strict=True)
