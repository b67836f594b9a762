"""Every format through every door gives the same samples, and odd files give what is in them; no program is needed."""

import contextlib
import functools
import gzip
import io
import os
import re
import socket
import struct
import tempfile
import threading
import tracemalloc
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import av
import numpy as np
import pandas
import pytest
import soundfile
import soxr
import torch
from conftest import TESTS, tiny_model
from embed_tables import run_embed
from encoded import FORMATS, chirp, encode, encoded, write_encoded
from pyarrow import parquet

from bat_audio import BatAudioProcessor, BatFeatureExtractor, Sound, audio_bat, load_audio
from bat_audio.pipeline_bat import BatFeatureExtractionPipeline
from bat_audio_tools import similar
from bat_audio_tools.embedding import windows
from bat_audio_tools.settings import EmbedSettings, FinetuneSettings, PretrainSettings
from bat_audio_tools.sounds import manifests
from bat_audio_tools.sounds.listing import list_inputs
from bat_audio_tools.sounds.reading import Input
from bat_audio_tools.training import masked_clips
from bat_audio_tools.training.examples import Example, read_examples

RATE = 16000
SECONDS = 5.37


@pytest.fixture(autouse=True)
def no_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@functools.cache
def pipe() -> BatFeatureExtractionPipeline:
    return BatFeatureExtractionPipeline(model=tiny_model(), feature_extractor=BatFeatureExtractor(), device="cpu")


def embed_door(path, segment: float | None = None) -> np.ndarray:
    """The samples of all windows of `embed`, put together."""
    hop = 0 if segment is None else round(segment * RATE)
    cut = windows.Cut(rate=RATE, shortest=1, segment=hop or None, hop=hop)
    found = list(windows.read_windows(None, cut, [(0, Input(str(path), str(path)), None)], ahead=1))
    assert [window.error for _, window in found if window.error] == []
    return np.concatenate([window.samples for _, window in found])


def pretrain_door(path, folder) -> np.ndarray:
    """What a clip of `pretrain` is made of, rotated back."""
    recordings = masked_clips.Recordings([str(path)], None)
    assert recordings.survey(folder, skip_broken=False)["recordings"] == 1
    seconds = parquet.read_table(folder / "recordings.parquet")["seconds"][0].as_py()
    assert seconds == pytest.approx(SECONDS, abs=0.2)
    heard = []

    class Processor(BatAudioProcessor):
        def log_mel(self, waveform, places=None):
            heard.append(waveform.numpy())
            return super().log_mel(waveform, places)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "roll", lambda waveform, shift: waveform)
        masks = {"count": 1, "grid": (64, 8), "keep": 0.2, "block": 5}
        masked_clips.MaskedClips(
            recordings, folder, Processor(1024), 1024, clip_seconds=10.0, masks=masks, num_items=1
        )[0]
    return heard[0]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of embeddings to search in."""
    folder = tmp_path_factory.mktemp("table")
    tiny_model().save_pretrained(folder / "model")
    (folder / "x.wav").write_bytes(encoded("pcm.wav"))
    run_embed([str(folder / "x.wav")], folder / "table", folder / "model", num_frames=16)
    return folder / "table"


def similar_door(path, table) -> np.ndarray:
    heard = []

    class Hearing(similar.Encoder):
        def __call__(self, found):
            heard.extend(window.samples for window in found)
            return super().__call__(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similar, "Encoder", Hearing)
        assert len(similar.similar(path, table, device="cpu")) == 1
    return heard[0]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_through_every_door(name, table, tmp_path):
    path = write_encoded(tmp_path, name, SECONDS)
    content = path.read_bytes()
    expected = load_audio(path).numpy()
    _, codec, rate, tolerance = FORMATS[name]
    assert len(expected) / RATE == pytest.approx(SECONDS, abs=tolerance + 1e-3)
    original = load_audio(encode(chirp(SECONDS, rate), "wav", "pcm_s16le", rate)).numpy()
    shift = round(np.argmax(np.correlate(expected[:32000], original[8000:24000])) - 8000)
    length = min(len(expected) - max(0, shift), len(original)) - 2000
    similarity = np.corrcoef(expected[max(0, shift) :][:length], original[max(0, -shift) :][:length])[0, 1]
    assert similarity > (0.8 if "adpcm" in codec or codec.startswith("g7") else 0.9)
    doors = {
        "load_audio, bytes": lambda: load_audio(content).numpy(),
        "load_audio, file": lambda: load_audio(io.BytesIO(content)).numpy(),
        "load_audio, path without suffix": lambda: load_audio(path.rename(tmp_path / "nameless")).numpy(),
        "pipeline, path": lambda: pipe().load_clip(str(tmp_path / "nameless")).numpy(),
        "pipeline, bytes": lambda: pipe().load_clip(content).numpy(),
        "finetune": lambda: Example(str(tmp_path / "nameless"), ("a",)).load(BatAudioProcessor()).numpy(),
        "similar": lambda: similar_door(tmp_path / "nameless", table),
        "embed, whole": lambda: embed_door(tmp_path / "nameless"),
        "embed, windows": lambda: embed_door(tmp_path / "nameless", 0.7),
    }
    for door, read in doors.items():
        samples = read()
        assert len(samples) == len(expected), door
        np.testing.assert_allclose(samples, expected, rtol=0, atol=1e-6, err_msg=door)
    (tmp_path / "nameless").rename(path)
    clip = pretrain_door(path, tmp_path)
    np.testing.assert_allclose(clip[: len(expected)], expected[: len(clip)], rtol=0, atol=1e-6)
    assert not clip[len(expected) :].any()


@pytest.mark.parametrize("name", ["speex.spx", "theora_vorbis.ogv"])
def test_what_pyav_cannot_write(name, tmp_path):
    path = TESTS / "sounds" / name
    samples = load_audio(path).numpy()
    assert len(samples) == pytest.approx(1.3 * RATE, abs=2)
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) / len(samples) * RATE == pytest.approx(440, abs=2)
    np.testing.assert_array_equal(load_audio(path.read_bytes()), samples)
    np.testing.assert_array_equal(pipe().load_clip(str(path)), samples)
    np.testing.assert_array_equal(embed_door(path, 0.5), samples)


@pytest.mark.parametrize(("rate", "channels"), [(384000, 1), (8001, 1), (RATE, 64)])
def test_unusual_rates_and_numbers_of_channels(rate, channels):
    file = io.BytesIO()
    samples = chirp(2.0, rate)
    soundfile.write(file, np.repeat(samples[:, None], channels, axis=1), rate, format="WAV", subtype="FLOAT")
    expected = soxr.resample(samples, rate, RATE, quality="HQ")
    for content in (file.getvalue(), wav_of_unknown_length(file.getvalue())):
        np.testing.assert_allclose(load_audio(content).numpy(), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(load_audio(content, 0.5, 0.7).numpy(), expected[8000:19200], rtol=0, atol=1e-5)


def wav_of_unknown_length(content: bytes) -> bytes:
    """As a recorder writes it that streams; FFmpeg decodes it."""
    place = content.index(b"data") + 4
    return content[:place] + bytes(4) + content[place + 4 :]


# AAC fills up bands with noise that depends on what was decoded before.
NOISE = {"aac": 3e-4}


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_is_the_same_part_of_the_whole(name):
    content = encoded(name, 8.0)
    whole = load_audio(content)
    for start, duration in ((0.0, 0.4), (1.3, 2.0), (4.567, 0.5), (7.5, None), (7.5, 99.0)):
        part = load_audio(content, start, duration)
        end = None if duration is None else round((start + duration) * RATE)
        expected = whole[round(start * RATE) : end]
        assert abs(len(part) - len(expected)) <= 1
        length = min(len(part), len(expected))
        atol = NOISE.get(FORMATS[name][1], 2e-6)
        torch.testing.assert_close(part[:length], expected[:length], rtol=0, atol=atol)
    with pytest.raises(ValueError, match=r"holds? nothing from 60\.0 s"):
        load_audio(content, 60.0)


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "aac"), ("adts", "aac"), ("flac", "flac"), ("mp3", "libmp3lame")]
)
def test_a_part_costs_what_the_part_costs(container, codec, monkeypatch):
    """Of ten minutes, only seconds are decoded."""
    content = encode(np.tile(chirp(5, 44100), 120), container, codec, 44100)
    decoded = []
    to_float = audio_bat._to_float
    monkeypatch.setattr(audio_bat, "_to_float", lambda frame: decoded.append(frame.samples) or to_float(frame))
    blocks = audio_bat._LibsndfileDecoder.blocks
    monkeypatch.setattr(
        audio_bat._LibsndfileDecoder,
        "blocks",
        lambda *arguments: (decoded.append(len(block)) or block for block in blocks(*arguments)),
    )
    assert len(load_audio(content, 500.0, 1.0)) == RATE
    assert 0 < sum(decoded) < 20 * 44100


@pytest.mark.parametrize(
    ("container", "codec"), [("webm", "libopus"), ("matroska", "aac"), ("flac", "flac"), ("adts", "aac")]
)
def test_what_was_written_into_a_pipe_is_whole(container, codec):
    rate = 48000 if codec == "libopus" else 44100
    content = encode(chirp(SECONDS, rate), container, codec, rate, seekable=False)
    samples = load_audio(content)
    assert len(samples) / RATE == pytest.approx(SECONDS, abs=0.05)
    with Sound(content) as sound:
        assert sound.measure() == pytest.approx(SECONDS, abs=0.1)


def test_long_recordings_take_little_memory(tmp_path):
    """Eight minutes decoded block by block."""
    path = tmp_path / "long.m4a"
    path.write_bytes(encode(np.tile(chirp(5, 44100), 96), "mp4", "aac", 44100))
    with Sound(path) as sound:
        blocks = sound.waveform()
        next(blocks)
        tracemalloc.start()
        samples = sum(map(len, blocks))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert samples > 470 * RATE
    assert peak < 16 << 20


# Odd files


def wav(samples: np.ndarray, rate: int = RATE, *, size: int | None = None, tag=b"RIFF", before=b"", extra=b"") -> bytes:
    """A WAV file of 16 bits, whose data size can be set to anything."""
    data = (samples * 32767).astype("<i2").tobytes()
    body = b"WAVE" + extra + b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return before + tag + struct.pack("<I", min(len(body), 2**32 - 1)) + body


def id3(size: int = 300) -> bytes:
    return b"ID3\x03\x00\x00" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(size)


CHIRP = chirp(SECONDS, RATE)
SOUNDFILE_FORMATS = ["WAV", "WAVEX", "RF64", "AIFF", "AU", "FLAC", "W64", "CAF"]
TRUNCATED = ["tta.tta", "mp3.wav", "ac3.wav", "g722.wav", "yamaha.wav"]  # which FFmpeg decodes
CUT = windows.Cut(rate=RATE, shortest=513, segment=RATE, hop=RATE)
PLAIN = load_audio(wav(CHIRP)).numpy()


@pytest.mark.parametrize("size", [0, 0x70000000, 0x7FFF0000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF])
def test_a_recorder_that_did_not_know_the_length(size, tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(wav(CHIRP, size=size))
    np.testing.assert_array_equal(load_audio(path).numpy(), PLAIN)
    np.testing.assert_array_equal(embed_door(path, 1.0), PLAIN)
    np.testing.assert_array_equal(load_audio(path, 2.0, 1.0).numpy(), PLAIN[2 * RATE : 3 * RATE])


def test_tags_and_sizes_that_are_a_little_wrong():
    data = len(CHIRP) * 2
    ds64 = b"ds64" + struct.pack("<IQQQI", 28, data + 100, data, len(CHIRP), 0)
    contents = {
        "BW64": wav(CHIRP, tag=b"BW64", size=0xFFFFFFFF, extra=ds64),
        "RF64": wav(CHIRP, tag=b"RF64", size=0xFFFFFFFF, extra=ds64),
        "ID3 before RIFF": wav(CHIRP, before=id3()),
        "two tags before RIFF": wav(CHIRP, before=id3() + id3(70000)),
        "a size one byte too large": wav(CHIRP, size=data + 1),
        "a chunk behind the samples": wav(CHIRP) + b"LIST" + struct.pack("<I", 4) + b"INFO",
    }
    for name, content in contents.items():
        np.testing.assert_array_equal(load_audio(content).numpy(), PLAIN, err_msg=name)
    # A last sample that is not whole is no sample; all before it are there, to the last.
    np.testing.assert_array_equal(load_audio(wav(CHIRP, size=data - 1)[:-1]).numpy(), PLAIN[:-1])
    mp3 = encoded("mp3.wav")
    np.testing.assert_array_equal(load_audio(id3() + mp3), load_audio(mp3))


@pytest.mark.parametrize("head", [b"RIFF\x00\x00\x00\x00WAVE", b"caff\x00\x01\x00\x00", b"ID3\x03\x00\x00" + bytes(4)])
def test_zeros_are_no_chunks_to_be_counted(head):
    """A file whose fetching was broken off may hold gigabytes of them."""

    class Counting(io.BytesIO):
        reads = 0

        def read(self, *size):
            Counting.reads += 1
            return super().read(*size)

    file = Counting(head * 200_000 if head.startswith(b"ID3") else head + bytes(2_000_000))
    audio_bat._data_sizes(file)
    audio_bat._behind_tag(file)
    assert Counting.reads < 4000


def test_mp3_inside_wav_is_read_to_the_last_sample():
    content = encode(chirp(5.4, 44100), "wav", "libmp3lame", 44100)
    for odd in (content, content + bytes(1)):
        samples = load_audio(odd, sampling_rate=44100)
        assert len(samples) % 1152 == 0
        assert 5.4 * 44100 < len(samples) < 5.5 * 44100


@pytest.mark.parametrize("tag", [b"", id3()], ids=["plain", "tagged"])
def test_files_that_were_joined_are_read_to_the_end(tag, tmp_path):
    single = encoded("mp3.mp3")
    path = tmp_path / "joined.mp3"
    path.write_bytes((tag + single[single.index(b"\xff\xfb") :]) * 3)
    one, three = load_audio(single), load_audio(path)
    for start in (7.0, 12.5):
        expected = three[round(start * RATE) :][: RATE // 2]
        np.testing.assert_allclose(load_audio(path, start, 0.5), expected, rtol=0, atol=1e-6)
    assert len(three) == pytest.approx(3 * len(one), abs=0.15 * RATE)
    np.testing.assert_allclose(three[: len(one) - 100], one[:-100], atol=1e-5)
    end = three[-len(one) + 2000 :]
    assert max(np.correlate(end, one[-8000:-4000])) > 0.99 * one[-8000:-4000].square().sum()
    np.testing.assert_array_equal(embed_door(path, 1.0), three)
    oggs = []
    for seed in (1, 2):
        ogg = io.BytesIO()
        soundfile.write(ogg, chirp(2 + seed, 44100), 44100, format="OGG")
        oggs.append(bytearray(ogg.getvalue()))
    assert oggs[0][14:18] != oggs[1][14:18]
    chained = bytes(oggs[0] + oggs[1])
    assert len(load_audio(chained)) == pytest.approx(7 * RATE, abs=0.05 * RATE)
    np.testing.assert_allclose(load_audio(chained, 5.0, 0.5), load_audio(chained)[5 * RATE :][: RATE // 2], atol=1e-6)


def test_a_wav_file_beyond_4_gib_whose_size_wrapped_round(tmp_path):
    """60 s by its header, 37 hours by its size; the file is sparse."""
    path = tmp_path / "field.wav"
    content = wav(np.tile(chirp(10, RATE), 6))
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(len(content) + 2**32)
    reason = r"its header tells 60\.00 s, but 4294967296 bytes follow, as in a WAV file above 4 GiB"
    with pytest.raises(ValueError, match=f"field.wav: cannot be read as audio: {reason}"):
        load_audio(path)
    assert len(load_audio(path, 50, 10)) == 10 * RATE
    cut = windows.Cut(rate=RATE, shortest=513, segment=10 * RATE, hop=10 * RATE)
    found = [window for _, window in windows.read_windows(None, cut, [(0, Input("x", str(path)), None)], ahead=1)]
    assert [(window.start_s, window.end_s) for window in found[:6]] == [(10 * i, 10 * i + 10) for i in range(6)]
    assert all(window.samples is not None for window in found[:6])
    assert {window.error for window in found[6:]} == {found[-1].error}
    assert re.search(reason, found[-1].error)
    assert found[-1].end_s == pytest.approx(60 + 2**31 / RATE, abs=11)


@pytest.mark.parametrize("form", [*SOUNDFILE_FORMATS, *TRUNCATED, "alac.m4a"])
def test_truncated_files_are_refused_whole_and_read_in_parts(form, tmp_path):
    if form == "alac.m4a":  # The index stands in front, and the samples were cut off.
        path = tmp_path / "x.m4a"
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as file:
            stream = file.add_stream("alac", rate=44100, layout="mono")
            frame = av.AudioFrame.from_ndarray(chirp(8, 44100)[None], format="fltp", layout="mono")
            frame.sample_rate = 44100
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                file.mux(packet)
        content = path.read_bytes()
        assert content.index(b"moov") < content.index(b"mdat")
    elif form in TRUNCATED:
        content = encoded(form, 8)
    else:
        file = io.BytesIO()
        soundfile.write(file, chirp(8, RATE), RATE, format=form)
        content = file.getvalue()
    cut = content[: len(content) * 3 // 4]
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        load_audio(cut)
    np.testing.assert_allclose(load_audio(cut, 1, 2), load_audio(content, 1, 2), atol=1e-5)
    (tmp_path / "cut").write_bytes(cut)
    windows_found = list(windows.read_windows(None, CUT, [(0, Input("x", str(tmp_path / "cut")), None)], ahead=1))
    errors = [window for _, window in windows_found if window.error]
    assert len({window.error for window in errors}) == 1  # They become one row for the whole stretch.
    assert errors == [window for _, window in windows_found][-len(errors) :]
    assert errors[0].start_s in (4, 5, 6)
    assert len(windows_found) - len(errors) == errors[0].start_s


def test_channels_of_opposite_phase(caplog):
    samples = np.stack([CHIRP, -CHIRP], axis=1)
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    content = file.getvalue()
    audio_bat.logger.warning_once.cache_clear()
    assert np.abs(load_audio(content)).max() < 1e-6
    assert "<bytes>: its channels cancel each other out" in caplog.text
    caplog.clear()
    for channel, sign in ((0, 1), (1, -1)):
        np.testing.assert_allclose(load_audio(content, channel=channel), sign * CHIRP, atol=1e-6)
    for wrong in (2, -1, "left", True, 0.0):
        with pytest.raises(ValueError, match=f"channel={wrong!r}".replace(".", r"\.")):
            load_audio(content, channel=wrong)
    load_audio(encoded("alac.m4a"), channel=0)
    assert not caplog.records


@pytest.fixture
def two_channels(tmp_path):
    """A file whose channels cancel each other out, and the samples of its second one."""
    path = tmp_path / "two.wav"
    soundfile.write(path, np.stack([CHIRP, -CHIRP], axis=1), RATE, subtype="FLOAT")
    return path, -CHIRP


def test_channels_of_lists_and_options(two_channels, tmp_path):
    """The column of a list goes before the option."""
    path, second = two_channels
    (tmp_path / "list.csv").write_text("path,labels,channel,start\ntwo.wav,a,1,0\ntwo.wav,a,,1\ntwo.wav,a,mean,2\n")
    pandas.DataFrame({"path": ["two.wav", "two.wav"], "labels": "a", "channel": [1, None]}).to_parquet(
        tmp_path / "list.parquet"
    )
    expected = {"list.csv": ["1", "0", "mean"], "list.parquet": ["1", "0"], "two.wav": ["0"]}
    for name, channels in expected.items():
        items = [item for item, _ in list_inputs([str(tmp_path / name)], None, channel="0")]
        assert [item.channel for item in items] == channels
        if name != "two.wav":
            assert [example.channel for example in read_examples(tmp_path / name, channel="0")] == channels
    _, window = next(windows.read_windows(None, CUT, [(0, replace(items[0], channel="1"), None)], ahead=1))
    np.testing.assert_array_equal(window.samples, second[:RATE])
    example = Example(str(path), ("a",), channel="1")
    np.testing.assert_array_equal(example.load(BatAudioProcessor()), second)
    for wrong in ("left", "-1", "1.5"):
        (tmp_path / "wrong.csv").write_text(f"path,labels,channel\ntwo.wav,a,{wrong}\n")
        for read in (
            lambda: list(list_inputs([str(tmp_path / "wrong.csv")], None)),
            lambda: read_examples(tmp_path / "wrong.csv"),
        ):
            with pytest.raises(ValueError, match=rf"wrong\.csv, line 2: channel='{wrong}' is unknown; expected mean"):
                read()
        for settings in (EmbedSettings, FinetuneSettings, PretrainSettings):
            first = {EmbedSettings: "inputs", FinetuneSettings: "train", PretrainSettings: "data"}[settings]
            with pytest.raises(ValueError, match=f"channel='{wrong}' is unknown"):
                settings(**{first: "x"}, out="x", channel=wrong)


@pytest.mark.parametrize("told", [3_000_000_000, 0x90000000, 0xF0000000])
def test_a_large_recording_that_was_copied_in_part(told):
    with pytest.raises(ValueError, match="truncated: its header tells"):
        load_audio(wav(CHIRP, size=told))


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("WAV", "GSM610"),
        ("WAV", "IMA_ADPCM"),
        ("WAV", "MS_ADPCM"),
        ("WAV", "G721_32"),
        ("AU", "G723_24"),
        ("WAV", "ALAW"),
    ],
)
def test_codecs_of_libsndfile_that_are_decoded_from_the_start(form, subtype):
    file = io.BytesIO()
    soundfile.write(file, chirp(3, 8000), 8000, format=form, subtype=subtype)
    samples = load_audio(file.getvalue())
    assert len(samples) == pytest.approx(3 * RATE, abs=1000)
    original = load_audio(wav(chirp(3, 8000), 8000)).numpy()
    assert np.corrcoef(samples[500:40000], original[500:40000])[0, 1] > 0.8
    np.testing.assert_allclose(load_audio(file.getvalue(), 1, 0.5), samples[RATE : RATE * 3 // 2], atol=1e-5)


@pytest.mark.parametrize("name", ["opus.webm", "mp3.mp3", "ac3.ac3", "aac.m4a"])
def test_damage_in_the_middle_is_told(name, caplog):
    content = bytearray(encoded(name, 8))
    whole = len(load_audio(bytes(content)))
    place = len(content) // 2
    content[place : place + 6000] = np.random.default_rng(0).bytes(6000)
    audio_bat.logger.warning_once.cache_clear()
    caplog.clear()
    told = ""
    with contextlib.suppress(ValueError):
        assert len(load_audio(bytes(content))) > whole - 1600 or "<bytes>: " in caplog.text
        told = "read"
    if not told:
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            load_audio(bytes(content))


# What is no file of sound


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "link to a device"])
def test_what_is_no_regular_file_is_refused_at_once(kind, tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    with contextlib.ExitStack() as stack:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            monkeypatch.chdir(tmp_path)  # The path of a socket must be short.
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind("x.wav")
        else:
            path.symlink_to("/dev/zero")
        path = "/dev/zero" if kind == "device" else str(path)
        with pytest.raises(ValueError, match=rf"{path}: a pipe, socket or device"):
            load_audio(path)


PLAYLISTS = {
    "x.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:5,\n{target}\n#EXT-X-ENDLIST\n",
    "x.m3u": "{target}\n",
    "x.ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "x.pls": "[playlist]\nFile1={target}\n",
    "x.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 0\n",
    "x.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT5S"><Period><AdaptationSet mimeType="audio/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>',
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_lists_inside_a_sound_file_lead_nowhere(name, tmp_path):
    """Neither to other files nor to the network; the bytes that would make it no text do not change that."""
    secret = write_encoded(tmp_path, "pcm.wav")
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for target in (str(secret), secret.name, f"http://127.0.0.1:{server.server_port}/x.wav", f"file:{secret}"):
                text = PLAYLISTS[name].format(target=target, port=server.server_port).encode()
                for content in (text, text + b"\n#\xff\xfe\n"):
                    for file in (name, "song.mp3", "song.wav"):
                        (tmp_path / file).write_bytes(content)
                        with pytest.raises(ValueError, match="cannot be read as audio"):
                            load_audio(tmp_path / file)
                    with pytest.raises(ValueError, match="cannot be read as audio"):
                        load_audio(content)
        finally:
            server.shutdown()
            thread.join()
    assert asked == []


@pytest.mark.parametrize("seconds", [10**6, 10**9])
def test_seconds_that_a_header_claims_take_no_memory(seconds):
    flac = io.BytesIO()
    soundfile.write(flac, CHIRP, RATE, format="FLAC")
    content = bytearray(flac.getvalue())
    frames = min(seconds * RATE, 2**36 - 1)
    struct.pack_into(">I", content, 22, frames & 0xFFFFFFFF)
    content[21] = content[21] & 0xF0 | frames >> 32
    tracemalloc.start()
    with pytest.raises(ValueError, match="cannot be read as audio"):
        load_audio(bytes(content))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20


def test_the_two_lists_of_containers_agree():
    """One decides without torch which files are listed, the other which are read."""
    other_names_of_mov = {"mp4", "m4a", "3gp", "3g2", "mj2"}
    assert set(audio_bat.CONTAINERS.split(",")) - other_names_of_mov <= set(manifests.CONTAINERS.split())


def test_text_is_called_text(tmp_path):
    for name, encoding in (("notes.mp3", "utf-8"), ("page.wav", "latin-1"), ("list.m4a", "utf-16")):
        (tmp_path / name).write_text("Überhaupt kein Klang.\n" * 50, encoding=encoding)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as audio: it holds text, no sound"):
            load_audio(tmp_path / name)


def test_nothing_is_said_to_stderr(tmp_path, capfd):
    """libmpg123 writes notes for what it does not understand."""
    (tmp_path / "random.mp3").write_bytes(np.random.default_rng(0).bytes(50000))
    (tmp_path / "joined.mp3").write_bytes(encoded("mp3.mp3") * 2)
    (tmp_path / "inside.wav").write_bytes(encoded("mp3.wav"))
    for file in sorted(tmp_path.iterdir()):
        with contextlib.suppress(ValueError):
            load_audio(file)
    assert capfd.readouterr().err == ""


# Objects


class Upload:
    """As web frameworks hand them over: it stands at its end."""

    def __init__(self, content: bytes):
        self.file, self.filename = io.BytesIO(content), "x.m4a"
        self.file.seek(0, io.SEEK_END)
        self.read, self.seek, self.tell, self.seekable = (
            self.file.read,
            self.file.seek,
            self.file.tell,
            self.file.seekable,
        )


class AsyncUpload:
    async def read(self, size: int = -1) -> bytes:
        return b""


@pytest.mark.parametrize("name", ["pcm.wav", "mp3.mp3", "aac.m4a"])
def test_objects_that_can_be_read(name, tmp_path):
    content = encoded(name)
    expected = load_audio(content)
    path = write_encoded(tmp_path, name)
    reading, writing = os.pipe()
    writer = threading.Thread(target=lambda: os.fdopen(writing, "wb").write(content))
    writer.start()
    with os.fdopen(reading, "rb") as pipe_object:
        from_pipe = load_audio(pipe_object)
    writer.join()
    assert torch.equal(from_pipe, expected)
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(content))
    for source in (Upload(content), memoryview(content), os.path.relpath(path), _PathLike(path)):
        assert torch.equal(load_audio(source), expected)
    # FastAPI hands over small uploads as the first of these.
    with tempfile.SpooledTemporaryFile() as spooled, path.open("a+b") as appending, gzip.open(packed) as unpacking:
        spooled.write(content)
        for source in (spooled, appending, unpacking):
            assert torch.equal(load_audio(source), expected)
    assert path.read_bytes() == content
    for source in (path.open(encoding="latin-1"), io.StringIO("text"), AsyncUpload(), 5, None, np.zeros(5), b"".join):
        with pytest.raises(ValueError, match="expected a path, the bytes of a file, or a file opened in binary"):
            load_audio(source)


class _PathLike:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)
