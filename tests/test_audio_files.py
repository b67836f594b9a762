"""Sound files: what is read equals soundfile and soxr, parts equal the whole, and bad files are refused by name."""

import io
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from bat_audio import BatAudioProcessor, audio_bat, load_audio, resample

soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")

FORMATS = [
    *(("wav", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")),
    *(("flac", subtype) for subtype in ("PCM_S8", "PCM_16", "PCM_24")),
    ("aiff", "PCM_16"),
    ("ogg", "VORBIS"),
    ("ogg", "OPUS"),
    ("mp3", "MPEG_LAYER_III"),
]
RATES = [8000, 11025, 16000, 22050, 24000, 32000, 44099, 44100, 48000, 96000]


def sound(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Coloured noise (samples, channels) in -1..1."""
    white = np.random.default_rng(seed).standard_normal((samples, channels)).astype(np.float32)
    smooth = np.cumsum(white - white.mean(0), axis=0)
    return 0.3 * white / np.abs(white).max() + 0.6 * smooth / max(1, np.abs(smooth).max())


def reference(file, rate: int = 16000) -> torch.Tensor:
    """The whole file as mono samples, by the libraries themselves."""
    samples, file_rate = soundfile.read(file, dtype="float32", always_2d=True)
    return torch.from_numpy(soxr.resample(samples.mean(axis=1), file_rate, rate, quality="HQ"))


def assert_close(actual, expected, tolerance: float = 1e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Decoding


@pytest.mark.parametrize(("extension", "subtype"), FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats(tmp_path, extension, subtype, channels):
    path = tmp_path / f"sound.{extension}"
    rate = 24000 if subtype == "OPUS" else 22050
    time = np.arange(rate) / rate
    samples = np.stack([0.3 * np.sin(2700 * time * (1 + time)) + 0.02 * sound(rate)[:, 0]] * channels, axis=1)
    soundfile.write(path, samples, rate, subtype=subtype)
    waveform = load_audio(path)
    assert waveform.dtype == torch.float32
    assert_close(waveform, reference(path))
    original = soxr.resample(samples.mean(axis=1), rate, 16000, quality="HQ")
    assert np.corrcoef(waveform[100:15000], original[100:15000])[0, 1] > 0.94  # two samples of delay would give 0.9


@pytest.mark.parametrize("rate", RATES)
def test_rates(tmp_path, rate):
    path = tmp_path / "sound.wav"
    soundfile.write(path, sound(rate // 4, 2), rate)
    assert_close(load_audio(path), reference(path))
    assert_close(load_audio(path, sampling_rate=22050), reference(path, 22050))


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_stays_in_tune_time_and_strength(tmp_path, rate):
    """Without the libraries' word: 1 kHz at any rate is 1 kHz at 16 kHz, from the same sample on."""
    path = tmp_path / "tone.wav"
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate), rate, subtype="FLOAT")
    expected = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(16000, dtype=torch.float64) / 16000).float()
    waveform = load_audio(path)
    assert abs(len(waveform) - 16000) <= 1
    assert_close(waveform[1600:14400], expected[1600:14400], 1e-4)


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels_are_averaged_and_16_khz_is_untouched(tmp_path, channels):
    path = tmp_path / "sound.wav"
    samples = sound(4000, channels)
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    assert np.array_equal(load_audio(path).numpy(), samples.mean(axis=1))


def test_samples_beyond_1_are_kept(tmp_path):
    path = tmp_path / "loud.wav"
    soundfile.write(path, 3 * sound(4000), 16000, subtype="FLOAT")
    assert np.array_equal(load_audio(path).numpy(), 3 * sound(4000)[:, 0])


@pytest.mark.parametrize(
    ("extension", "subtype"), [("wav", "PCM_16"), ("flac", "PCM_16"), ("ogg", None), ("mp3", None)]
)
def test_forms_of_a_file_are_equal(tmp_path, monkeypatch, extension, subtype):
    path = tmp_path / f"ein Ton, grün.{extension}"
    soundfile.write(path, sound(9000), 22050, subtype=subtype)
    expected = load_audio(path)
    monkeypatch.chdir(tmp_path)
    with path.open("rb") as file:
        for form in (str(path), path.name, Path(path.name), path.read_bytes(), io.BytesIO(path.read_bytes()), file):
            assert torch.equal(load_audio(form), expected)
        assert not file.closed
        file.seek(0)
        assert torch.equal(load_audio(file, 0.1, 0.2), load_audio(path, 0.1, 0.2))


# Parts

PART_FILES = [
    *(("wav", rate) for rate in (8000, 11025, 16000, 44099, 44100, 96000)),
    *(("flac", rate) for rate in (22050, 48000)),
    *(("ogg", rate) for rate in (22050, 44100)),
    *(("mp3", rate) for rate in (16000, 22050, 44100, 48000)),
]
PART_SECONDS = 2.5


@pytest.fixture(scope="module")
def part_files(tmp_path_factory) -> dict:
    """Per format and rate a file and all of its samples at 16 kHz."""
    folder, files = tmp_path_factory.mktemp("parts"), {}
    for extension, rate in PART_FILES:
        path = folder / f"{rate}.{extension}"
        soundfile.write(path, sound(int(PART_SECONDS * rate), 2), rate)
        files[extension, rate] = path, load_audio(path)
    return files


@pytest.mark.parametrize(("extension", "rate"), PART_FILES)
@given(start=st.floats(0, 2.4), duration=st.none() | st.floats(1e-3, 3))
@settings(max_examples=40, deadline=None)
def test_part_equals_the_same_part_of_the_whole(part_files, extension, rate, start, duration):
    path, whole = part_files[extension, rate]
    first = round(start * 16000)
    expected = whole[first:] if duration is None else whole[first : first + round(duration * 16000)]
    assert_close(load_audio(path, start, duration), expected, 1e-5)


@pytest.mark.parametrize("rate", [8000, 22050, 44099, 48000])
def test_neighbouring_parts_make_the_whole(tmp_path, rate):
    path = tmp_path / "sound.wav"
    soundfile.write(path, sound(2 * rate), rate)
    parts = [load_audio(path, start, 0.25) for start in np.arange(0, 2, 0.25)]
    assert_close(torch.cat(parts), load_audio(path), 1e-5)


@pytest.mark.parametrize(("rate", "margin"), [(16000, 0.21), (44100, 0.22), (44099, 1.21)])
def test_only_the_needed_part_is_read(tmp_path, monkeypatch, rate, margin):
    """44099 Hz and 16 kHz have whole seconds only in common, where such a part must begin."""
    path, read = tmp_path / "long.wav", []
    soundfile.write(path, np.zeros(20 * rate), rate, subtype="PCM_U8")
    original = soundfile.SoundFile.read

    def spy(*arguments, **options):
        samples = original(*arguments, **options)
        read.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    assert len(load_audio(path, 11.9, 0.5)) == 8000
    assert 0.5 * rate < sum(read) <= (0.5 + margin) * rate
    read.clear()
    assert len(load_audio(path)) == 20 * 16000
    assert sum(read) == 20 * rate


def test_duration_beyond_the_end_reads_to_the_end(part_files):
    for path, whole in part_files.values():
        assert torch.equal(load_audio(path, duration=1e9), whole)
        assert_close(load_audio(path, 2, 60), whole[32000:], 1e-5)


@pytest.mark.parametrize(
    ("start", "duration", "message"),
    [
        (2.5, None, "holds? nothing from 2.5 s on"),
        (60, 1, "holds? nothing from 60 s on"),
        (1e30, None, "holds? nothing from"),
        (2.49999, None, "holds nothing from 2.49999 s on"),
        (0, 1e-6, "holds nothing from 0 s on for 1e-06 s"),
        (-0.1, None, "start=-0.1 must be at least 0 s"),
        (0, 0, "duration=0 above 0 s"),
        (0, -1, "duration=-1 above 0 s"),
        (float("nan"), None, "start=nan"),
        (float("inf"), None, "start=inf .*finite"),
        (0, float("nan"), "duration=nan"),
        (0, float("inf"), "duration=inf .*finite"),
    ],
)
def test_parts_outside_the_file_are_refused(part_files, start, duration, message):
    for extension, rate in (("wav", 44100), ("flac", 48000), ("ogg", 44100), ("mp3", 44100)):
        path, _ = part_files[extension, rate]
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            load_audio(path, start, duration)


# Resampling


@pytest.mark.parametrize("shape", [(4410,), (3, 4410), (2, 1, 4410), (2, 3, 4410)])
@pytest.mark.parametrize("rate", [8000, 44100, 44099])
def test_resample_equals_soxr_row_by_row(shape, rate):
    waveform = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = [soxr.resample(row, rate, 16000, quality="HQ") for row in waveform.reshape(-1, 4410).numpy()]
    resampled = resample(waveform, rate)
    assert resampled.shape[:-1] == shape[:-1]
    assert torch.equal(resampled, torch.from_numpy(np.stack(rows)).reshape(*shape[:-1], -1))
    assert torch.equal(resample(waveform.mT.contiguous().mT if waveform.ndim > 1 else waveform, rate), resampled)
    expected = [soxr.resample(row, rate, 22050, quality="HQ") for row in waveform.reshape(-1, 4410).numpy()]
    assert torch.equal(resample(waveform, rate, 22050).reshape(len(rows), -1), torch.from_numpy(np.stack(expected)))


def test_equal_rates_return_the_tensor_itself():
    for waveform in (torch.randn(2, 100), torch.randn(100, device="meta")):
        assert resample(waveform, 16000) is waveform
        assert resample(waveform, 8000, 8000) is waveform


def test_resample_keeps_the_dtype():
    waveform = torch.randn(2, 4410, generator=torch.Generator().manual_seed(0))
    assert_close(resample(waveform.double(), 44100).float(), resample(waveform, 44100), 1e-5)
    assert resample(waveform.double(), 44100).dtype == torch.float64
    assert_close(resample(waveform.half(), 44100).float(), resample(waveform, 44100), 1e-2)
    assert resample(waveform.half(), 44100).dtype == torch.float16


@pytest.mark.parametrize("waveform", [np.zeros(4410), torch.zeros(4410).short(), torch.zeros(0), torch.zeros(0, 4410)])
def test_resample_refuses_what_is_no_audio(waveform):
    with pytest.raises(ValueError, match=r"resample got .*expected a floating-point tensor"):
        resample(waveform, 44100)


def kaiser_best(waveform: torch.Tensor, rate: int) -> torch.Tensor:
    """The resampler of other devices, on the CPU."""
    try:
        return audio_bat._resample_kaiser_best(waveform, rate, 16000)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_devices_resampler_is_close_to_soxr(rate):
    noise = torch.randn(2, 2 * rate, generator=torch.Generator().manual_seed(0))
    spectrum = torch.fft.rfft(noise)
    frequencies = torch.fft.rfftfreq(noise.shape[-1], 1 / rate)
    spectrum[:, frequencies > 0.85 * min(rate, 16000) / 2] = 0
    waveform = 0.2 * torch.fft.irfft(spectrum, n=noise.shape[-1])
    expected, actual = resample(waveform, rate), kaiser_best(waveform, rate)
    assert abs(actual.shape[-1] - expected.shape[-1]) <= 1
    length = min(actual.shape[-1], expected.shape[-1])
    assert_close(actual[:, :length], expected[:, :length], 2e-2)
    assert_close(actual[:, 800:31200], expected[:, 800:31200], 1e-3)


@pytest.mark.parametrize("name", ["drum_roll_22k.ogg", "guitar_chord_44k.ogg", "cash_register_48k.flac"])
def test_other_devices_features_are_within_a_tenth(name):
    samples, rate = soundfile.read(ROOT / "examples" / name, dtype="float32", always_2d=True)
    waveform = torch.from_numpy(samples.mean(axis=1))
    processor = BatAudioProcessor(num_frames=240)
    difference = (processor(kaiser_best(waveform, rate)) - processor(resample(waveform, rate))).abs()
    assert difference.max() < 0.1
    assert difference.mean() < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_tensors_are_resampled_there():
    waveform = torch.randn(2, 44100, generator=torch.Generator().manual_seed(0))
    expected = kaiser_best(waveform, 44100)
    resampled = resample(waveform.cuda(), 44100)
    assert resampled.device.type == "cuda"
    assert_close(resampled.cpu(), expected, 1e-4)


# Libraries that are missing or broken


@pytest.mark.parametrize(("library", "extension"), [("soundfile", "wav"), ("soxr", "wav"), ("av", "mp3")])
def test_missing_library_is_named_with_its_cure(tmp_path, monkeypatch, library, extension):
    path = tmp_path / f"sound.{extension}"
    soundfile.write(path, sound(4000), 44100)
    monkeypatch.setitem(sys.modules, library, None)
    calls = [lambda: load_audio(path)]
    if library == "soxr":
        calls.append(lambda: resample(torch.zeros(4000), 44100))
    for call in calls:
        with pytest.raises(ImportError, match=rf"needs {library} \(.*{library}.*\): pip install {library}"):
            call()
    waveform = torch.from_numpy(sound(4000)[:, 0])
    assert resample(waveform, 16000) is waveform
    assert BatAudioProcessor(32)(waveform).any()


CURE = r"Install a torch and torchaudio that belong together .*, or resample on the CPU"


def test_missing_torchaudio_is_named_with_its_cure(monkeypatch):
    """A tensor without data stands for one on an accelerator: it may not go through soxr."""
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(ImportError, match=rf"on meta needs a working torchaudio \(.*torchaudio.*\)\. {CURE}"):
        resample(torch.zeros(4000, device="meta"), 44100)
    assert len(resample(torch.zeros(44100), 44100)) == 16000


@pytest.mark.parametrize("first_kind", ["OSError", "RuntimeError"])
def test_broken_torchaudio_harms_nothing_else(tmp_path, first_kind):
    """A torchaudio built for another torch raises these when it is imported, here also by Transformers."""
    package = tmp_path / "site" / "torchaudio"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import builtins, os\nraise getattr(builtins, os.environ['KIND'])('broken')\n")
    path = tmp_path / "sound.wav"
    soundfile.write(path, sound(20000), 44100)
    code = """if True:
        import os, re, sys
        sys.path.insert(0, sys.argv[1])
        import torch
        from bat_audio import BatAudioProcessor, BatFeatureExtractor, load_audio, resample
        waveform = load_audio(sys.argv[2])
        assert len(resample(torch.zeros(2, 32000), 32000)[1]) == 16000
        features = BatFeatureExtractor()(waveform, sampling_rate=16000, return_tensors="pt").input_features
        assert torch.equal(features, BatAudioProcessor()(waveform))
        for kind in ("ImportError", "OSError", "RuntimeError"):
            os.environ["KIND"] = kind
            try:
                resample(torch.zeros(4000, device="meta"), 44100)
            except ImportError as error:
                assert re.search(sys.argv[3], str(error)), error
            else:
                raise AssertionError(kind)
        torch.save(features, sys.argv[4])
    """
    saved = tmp_path / "features.pt"
    message = rf"on meta needs a working torchaudio \(broken\)\. {CURE}"
    run_python(code, ROOT, path, message, saved, PYTHONPATH=package.parent, KIND=first_kind)
    assert_close(torch.load(saved), BatAudioProcessor()(load_audio(path)))


# Bad files


def wav(samples: np.ndarray, rate: int = 16000, subtype: str | None = None, **header) -> bytes:
    """A WAV file as bytes; header fields (rate, channels) can be set to anything."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    content = bytearray(file.getvalue())
    for name, value in header.items():
        place, form = {"header_rate": (24, "<I"), "header_channels": (22, "<H")}[name]
        struct.pack_into(form, content, place, value)
    return bytes(content)


def with_sample(value: float, subtype: str = "FLOAT") -> bytes:
    samples = sound(4000).astype(np.float64)
    samples[2000] = value
    return wav(samples, subtype=subtype)


RANDOM = np.random.default_rng(0).bytes(20000)
BAD_FILES = {
    "empty.wav": (b"", "the file is empty"),
    "text.wav": (b"This is no sound.\n" * 100, "it holds text, no sound"),
    "page.mp3": ("<html>Zu viele Anfragen, später!</html>".encode(), "it holds text, no sound"),
    "random.wav": (RANDOM, "Format not recognised"),
    "random.flac": (b"fLaC" + RANDOM, "."),
    "random.ogg": (b"OggS" + RANDOM, "."),
    "random": (RANDOM, "Format not recognised"),
    "header.wav": (wav(sound(4000))[:20], "."),
    "rate0.wav": (wav(sound(4000), header_rate=0), "."),
    "rate1.wav": (wav(sound(4000), header_rate=1), "its rate of 1 Hz is too low for sound"),
    "channels0.wav": (wav(sound(4000), header_channels=0), "Channel count is zero"),
    "nothing.wav": (wav(sound(4000)[:0]), "no sound in it could be decoded"),
    "tiny.wav": (wav(sound(1), rate=96000), "it holds nothing from 0.0 s on"),
    "nan.wav": (with_sample(np.nan), "NaN or infinite samples"),
    "inf.wav": (with_sample(-np.inf), "NaN or infinite samples"),
    "huge.wav": (with_sample(1e300, "DOUBLE"), "NaN or infinite samples"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path, name):
    content, reason = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{reason}"):
            load_audio(source)
    with pytest.raises(ValueError, match=f"^<bytes>: .*{reason}"):
        load_audio(content)
    with path.open("rb") as file, pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{reason}"):
        load_audio(file)
    with pytest.raises(ValueError, match=f"^<BytesIO>: .*{reason}"):
        load_audio(io.BytesIO(content))


@given(content=st.binary(max_size=300), magic=st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"FORM", b"ID3"]))
@settings(max_examples=150, deadline=None)
def test_random_bytes_are_refused_or_sound(content, magic):
    assert_sound_or_refused(magic + content)


@given(place=st.integers(0, 60), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_damaged_headers_are_refused_or_sound(place, value):
    content = bytearray(wav(sound(600)))
    content[place] = value
    assert_sound_or_refused(bytes(content))


def assert_sound_or_refused(content: bytes):
    message = "<bytes>: "
    try:
        assert load_audio(content).isfinite().all()
    except ValueError as error:
        message = str(error)
    assert message.startswith("<bytes>: ")


def test_what_is_no_file_is_refused(tmp_path):
    missing, folder = "no such file", "a folder; name the files in it"
    for path, reason in (
        (tmp_path / "missing.wav", missing),
        (str(tmp_path / "missing.wav"), missing),
        ("no\0file.wav", missing),
        (tmp_path, folder),
        (str(tmp_path), folder),
    ):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))}: {reason}"):
            load_audio(path)
    (tmp_path / "sound.raw").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=r"sound\.raw: cannot be read as audio: no format of sound"):
        load_audio(tmp_path / "sound.raw")
    for source, name in ((None, "NoneType"), ([0.1, 0.2], "list"), (np.zeros(3), "ndarray")):
        with pytest.raises(ValueError, match=f"^<{name}>: got a sound file as {name}; expected a path, the bytes of"):
            load_audio(source)


# Truncated files, and MP3 files without a length


def encoded(extension: str, samples: np.ndarray, rate: int = 16000, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=extension.upper(), **options)
    return file.getvalue()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated_flac_is_refused(share):
    content = encoded("flac", sound(64000))
    cut = content[: int(share * len(content))]
    with pytest.raises(ValueError, match=r"^<bytes>: cannot be read as audio: "):
        load_audio(cut)


def test_flac_that_announces_more_than_it_holds_is_refused():
    content = bytearray(encoded("flac", sound(64000)))
    assert struct.unpack_from(">I", content, 22) == (64000,)
    struct.pack_into(">I", content, 22, 96000)
    with pytest.raises(ValueError, match=r"^<bytes>: cannot be read as audio: "):
        load_audio(bytes(content))


def test_streamed_flac_without_its_length_is_whole():
    content = bytearray(encoded("flac", sound(64000)))
    whole = load_audio(content)
    struct.pack_into(">I", content, 22, 0)
    assert torch.equal(load_audio(content), whole)
    assert torch.equal(load_audio(content, 1, 0.5), whole[16000:24000])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_wav_is_refused(share):
    content = encoded("wav", sound(64000))
    with pytest.raises(ValueError, match=r"truncated: its header tells 4\.00 s, which are not all there"):
        load_audio(content[: int(share * len(content))])


def test_truncated_wav_gives_the_parts_that_are_there():
    content = encoded("wav", sound(64000))
    whole, cut = load_audio(content), content[: len(content) // 2]
    assert torch.equal(load_audio(cut, 0.5, 1.0), whole[8000:24000])
    for start, duration in ((1.5, 1.0), (3.0, 0.5), (0.5, None)):
        with pytest.raises(ValueError, match=r"truncated: its header tells 4\.00 s, which are not all there"):
            load_audio(cut, start, duration)
    with pytest.raises(ValueError, match=r"640\d\d samples at 16000 Hz holds? nothing from 4\.5 s on"):
        load_audio(cut, 4.5)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF - 36])
def test_wav_from_a_recorder_that_did_not_know_the_length_is_whole(size):
    content = bytearray(encoded("wav", sound(16000)))
    place = content.index(b"data") + 4
    content[place : place + 4] = size.to_bytes(4, "little")
    assert torch.equal(load_audio(content), load_audio(encoded("wav", sound(16000))))


def test_truncated_ogg_ends_early_or_is_refused():
    """It ends with the last of its pages that is whole; there are few in a short file."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 200000)
    content = encoded("ogg", samples)
    whole, lengths = load_audio(content), []
    for share in (0.4, 0.7, 0.95):
        part = load_audio(content[: int(share * len(content))])
        assert_close(part, whole[: len(part)])
        lengths.append(len(part))
    assert 0 < lengths[0] < lengths[1] < lengths[2] < len(whole)
    with pytest.raises(ValueError, match="<bytes>: cannot be read as audio"):
        load_audio(content[:1000])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_mp3_gives_a_warning(caplog, share):
    content = encoded("mp3", sound(64000))
    whole = load_audio(content)
    assert not caplog.records
    part = load_audio(content[: int(share * len(content))])
    assert "<bytes>: truncated: its header tells 4.00 s, which are not all there." in caplog.text
    assert abs(len(part) - share * 64000) < 4000
    assert_close(part[:-2000], whole[: len(part) - 2000])
    caplog.clear()
    assert_close(load_audio(content[: int(share * len(content))], duration=0.2), whole[:3200])
    assert not caplog.records


def without_length(mp3: bytes) -> bytes:
    """An MP3 file without its first frame, which only holds the length."""
    assert b"Info" in mp3[:200] or b"Xing" in mp3[:200]
    return mp3[mp3.index(mp3[:2], 4) :]


MP3_DELAY = 576 + 529  # samples of silence in front, encoder and decoder


def id3_tag(size: int) -> bytes:
    return b"ID3\x03\x00\x00" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(size)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("tag", [b"", id3_tag(50000)], ids=["plain", "tagged"])
def test_mp3_without_its_length_is_read_to_the_end(caplog, tag, mode):
    content = encoded("mp3", sound(64000), bitrate_mode=mode, compression_level=0.5)
    whole, plain = load_audio(content), load_audio(tag + without_length(content))
    assert not caplog.records
    # Without that header nothing says how much silence encoder and decoder have put in front.
    assert_close(plain[MP3_DELAY:][:64000], whole)


# Files are left alone


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_files_are_closed(tmp_path):
    good, bad = tmp_path / "good.flac", tmp_path / "bad.flac"
    soundfile.write(good, sound(4000), 16000)
    bad.write_bytes(good.read_bytes()[:2000])

    def open_files() -> list[str]:
        links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
        return [os.readlink(link) for link in links if os.path.lexists(link)]

    before = good.read_bytes()
    for _ in range(3):
        load_audio(good)
        with pytest.raises(ValueError, match=r"holds? nothing from 99 s on"):
            load_audio(good, start=99)
        with pytest.raises(ValueError, match=r"bad\.flac: cannot be read"):
            load_audio(bad)
    assert not [link for link in open_files() if str(tmp_path) in link]
    assert good.read_bytes() == before


# The example files


def example_rows() -> dict[str, list[str]]:
    table = re.findall(r"^\| `(\S+\.\w+)` \|(.+)\|$", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in row.split("|")] for name, row in table if row.count("|") > 4}


def test_every_example_is_in_the_table():
    files = (path for path in (ROOT / "examples").iterdir() if path.is_file())
    sounds = {path.name for path in files if path.suffix not in (".md", ".png")}
    assert sounds == example_rows().keys()
    assert sounds


@pytest.mark.parametrize("name", sorted(example_rows()))
def test_examples_are_what_their_table_says(name):
    path = ROOT / "examples" / name
    _, rate, channels, seconds, *_ = example_rows()[name]
    info = soundfile.info(path)
    assert info.samplerate == int(rate)
    assert info.channels == int(channels.split()[0])
    assert info.frames / info.samplerate == pytest.approx(float(seconds), abs=0.0006)
    waveform = load_audio(path)
    assert len(waveform) / 16000 == pytest.approx(float(seconds), abs=0.001)
    assert_close(waveform, reference(path))
    assert 0.05 < waveform.abs().max() <= 1.1
    assert_close(load_audio(path, 1, 0.5), waveform[16000:24000], 1e-5)
