"""Windows go up to where the sound ends, whatever the header says, and none lies behind it."""

import io
import multiprocessing
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import soundfile
import torch
from embed_tables import RATE, read, read_errors, run_embed, vectors
from encoded import encode

from bat_audio import load_audio
from bat_audio_tools.embedding import windows
from bat_audio_tools.sounds.reading import Input


def noise(seconds: float, rate: int = RATE) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate)).clip(-5, 5)


def spans(out) -> list[tuple[float, float]]:
    return [(row["start_s"], row["end_s"]) for row in read(out).select(["start_s", "end_s"]).to_pylist()]


def with_flac_length(content: bytes, length: int) -> bytes:
    content = bytearray(content)
    struct.pack_into(">I", content, 22, length & 0xFFFFFFFF)
    content[21] = content[21] & 0xF0 | length >> 32
    return bytes(content)


@pytest.mark.parametrize(("seconds", "workers"), [(5.0, 0), (25.0, 2), (130.3, 0), (130.3, 2)])
def test_streamed_flac(seconds, workers, checkpoint, tmp_path):
    soundfile.write(tmp_path / "whole.flac", noise(seconds), RATE)
    content = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "streamed.flac").write_bytes(with_flac_length(content, 0))
    for name in ("whole", "streamed"):
        options = {"num_frames": 16, "workers": workers}
        run_embed([str(tmp_path / f"{name}.flac")], tmp_path / name, checkpoint, **options)
        run_embed([str(tmp_path / f"{name}.flac")], tmp_path / f"{name}-1", checkpoint, whole=True, **options)
    for suffix in ("", "-1"):
        both = [tmp_path / f"{name}{suffix}" for name in ("whole", "streamed")]
        assert spans(both[0]) == spans(both[1])
        assert read_errors(both[1]) == []
        torch.testing.assert_close(*(vectors(read(out), "embedding") for out in both), rtol=0, atol=1e-5)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="other processes load what is patched")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_length_that_is_far_too_large_is_soon_given_up(workers, checkpoint, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "damaged.flac", noise(30), RATE)
    content = (tmp_path / "damaged.flac").read_bytes()
    (tmp_path / "damaged.flac").write_bytes(with_flac_length(content, (1 << 36) - 1))
    reads = multiprocessing.Value("i", 0)

    def load(*arguments):
        with reads.get_lock():
            reads.value += 1
        return load_audio(*arguments)

    monkeypatch.setattr(windows, "load_audio", load)
    run_embed([str(tmp_path)], tmp_path / "out", checkpoint, num_frames=16, workers=workers)
    assert spans(tmp_path / "out") == [(0, 10.24), (10.24, 20.48)]
    (error,) = read_errors(tmp_path / "out")
    assert "truncated or damaged" in error["error"]
    assert error["start_s"] == 20.48
    assert error["end_s"] == pytest.approx((1 << 36) / RATE, abs=11)
    assert reads.value < 150


def test_a_broken_window_of_a_streamed_recording_is_left_out(checkpoint, tmp_path):
    samples = noise(130.3)
    samples[[5 * RATE, 121 * RATE]] = np.nan
    soundfile.write(tmp_path / "x.wav", samples, RATE, subtype="FLOAT")
    content = bytearray((tmp_path / "x.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = bytes(4)  # A recorder that streams may write a size of zero.
    (tmp_path / "x.wav").write_bytes(content)
    run_embed([str(tmp_path / "x.wav")], tmp_path / "out", checkpoint, segment=10.0, num_frames=16)
    assert [start for start, _ in spans(tmp_path / "out")] == [*range(10, 120, 10), 130]
    assert [row["start_s"] for row in read_errors(tmp_path / "out")] == [0, 120]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("suffix", "form", "codec", "rate"),
    [("webm", "webm", "libopus", 48000), ("mka", "matroska", "aac", RATE), ("aac", "adts", "aac", RATE)],
)
def test_what_was_written_into_a_pipe(suffix, form, codec, rate, workers, checkpoint, tmp_path):
    """No length in the header."""
    content = encode(noise(133, rate).astype(np.float32), form, codec, rate, seekable=False)
    (tmp_path / f"x.{suffix}").write_bytes(content)
    summary = run_embed([str(tmp_path / f"x.{suffix}")], tmp_path / "out", checkpoint, num_frames=16, workers=workers)
    assert (summary["rows"], summary["failed"]) == (13, 0)
    places = spans(tmp_path / "out")
    assert places[:-1] == [(pytest.approx(10.24 * i), pytest.approx(10.24 * (i + 1))) for i in range(12)]
    assert places[-1] == (pytest.approx(122.88), pytest.approx(133, abs=0.15))


def test_a_picture_that_is_longer_than_the_sound(checkpoint, tmp_path):
    with av.open(str(tmp_path / "x.mp4"), "w") as file:
        sound, picture = file.add_stream("aac", rate=RATE, layout="mono"), file.add_stream("mpeg4", rate=5)
        picture.width = picture.height = 64
        frame = av.AudioFrame.from_ndarray(noise(25).astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for packet in [*sound.encode(frame), *sound.encode(None)]:
            file.mux(packet)
        for _ in range(5 * 60):
            file.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        file.mux(picture.encode(None))
    summary = run_embed([str(tmp_path / "x.mp4")], tmp_path / "out", checkpoint, num_frames=16)
    assert (summary["rows"], summary["failed"]) == (3, 0)


def test_damage_in_what_only_ffmpeg_reads_is_listed(checkpoint, tmp_path):
    content = bytearray(encode(noise(60).astype(np.float32), "matroska", "aac", RATE))
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    (tmp_path / "x.mka").write_bytes(content)
    summary = run_embed([str(tmp_path / "x.mka")], tmp_path / "out", checkpoint, num_frames=16)
    assert summary["failed"] == 1
    assert 1 <= summary["rows"] <= 4
    (error,) = read_errors(tmp_path / "out")
    assert error["error"].endswith("Nothing behind it was read.")
    assert error["start_s"] == spans(tmp_path / "out")[-1][1]


def mp3(samples: np.ndarray, mode: str, *, with_length: bool) -> bytes:
    """The length lies in a first frame without sound."""
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="MP3", bitrate_mode=mode, compression_level=0.5)
    content = file.getvalue()
    return content if with_length else content[content.index(content[:2], 4) :]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", ["too short", "too long", "right"])
def test_mp3(case, workers, checkpoint, tmp_path):
    quiet, loud = np.zeros(RATE * 90), noise(40)
    order = {"too short": (loud, quiet), "too long": (quiet, loud), "right": (loud, quiet)}[case]
    (tmp_path / "x.mp3").write_bytes(mp3(np.concatenate(order), "VARIABLE", with_length=case == "right"))
    estimate = soundfile.info(tmp_path / "x.mp3").duration
    assert {"too short": estimate < 110, "too long": estimate > 150, "right": estimate == 130}[case], estimate
    for whole in (False, True):
        out = tmp_path / str(whole)
        options = {"num_frames": 16, "workers": workers, "whole": whole}
        summary = run_embed([str(tmp_path / "x.mp3")], out, checkpoint, **options)
        assert (summary["rows"], summary["failed"]) == (1 if whole else 13, 0)
        assert spans(out)[-1][1] == pytest.approx(130, abs=0.2)


def test_truncated_mp3(checkpoint, tmp_path):
    for name in ("told", "untold"):
        content = mp3(noise(60), "CONSTANT", with_length=name == "told")
        (tmp_path / f"{name}.mp3").write_bytes(content[: len(content) * 3 // 4])
        run_embed([str(tmp_path / f"{name}.mp3")], tmp_path / name, checkpoint, num_frames=16)
        run_embed([str(tmp_path / f"{name}.mp3")], tmp_path / f"{name}-1", checkpoint, whole=True, num_frames=16)
    assert spans(tmp_path / "told")[-1][1] == pytest.approx(40.96)  # where the last window ends that is all there
    assert spans(tmp_path / "untold")[-1][1] == pytest.approx(45, abs=2)
    for name in ("told", "told-1"):
        (error,) = read_errors(tmp_path / name)
        assert "truncated: its header tells 60.00 s, which are not all there" in error["error"]
    assert read_errors(tmp_path / "untold") == read_errors(tmp_path / "untold-1") == []


def test_truncated_wav_keeps_what_is_there(checkpoint, tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(60), RATE)
    content = (tmp_path / "x.wav").read_bytes()
    (tmp_path / "x.wav").write_bytes(content[: len(content) * 3 // 4])
    summary = run_embed([str(tmp_path / "x.wav")], tmp_path / "out", checkpoint, num_frames=16)
    assert (summary["rows"], summary["failed"]) == (4, 1)
    errors = read_errors(tmp_path / "out")
    assert errors[0]["start_s"] == 40.96
    assert errors[-1]["end_s"] == pytest.approx(61.44)
    assert all("truncated" in row["error"] for row in errors)


def test_overlapping_windows_are_sent_once(tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(150), RATE)
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


def test_samples_that_wait_are_bounded(tmp_path, monkeypatch):
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
