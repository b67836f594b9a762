"""The front end: features equal torchaudio's, belong to their clip alone, and wrong audio is refused in plain words."""

import copy
import json
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor, PreTrainedModel

import bat_audio
from bat_audio import BatAudioProcessor, BatConfig, BatFeatureExtractor, processing_bat

RATE = 16000
EQUAL = {"rtol": 0, "atol": 1e-6}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DTYPES = [np.float32, np.float64, np.float16, np.int16]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many short clips: the threads of parallel test processes would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chirp(samples: int, first: float = 50, last: float = 7900) -> torch.Tensor:
    t = torch.arange(samples, dtype=torch.float64) / samples
    phase = 2 * torch.pi * samples / RATE * (first * t + (last - first) / 2 * t**2)
    return 0.5 * phase.sin().float()


def voice(samples: int, seed: int = 0) -> torch.Tensor:
    """A tone in noise: its features span many dB at every loudness, so that rounding stays far below 1e-6."""
    return noise(samples, seed=seed) + 0.5 * torch.sin(0.1 * (1 + seed % 7) * torch.arange(samples))


def extract(audio, **options) -> torch.Tensor:
    """Features of an extractor of 64 frames, which cuts clips of 10240 samples and more."""
    options = {"sampling_rate": RATE, "return_tensors": "pt", **options}
    return BatFeatureExtractor(num_frames=64)(audio, **options).input_features


def torchaudio_features(waveform: torch.Tensor, top_db: float = 80, **settings) -> torch.Tensor:
    """Features (1, 1, T, n_mels) of one clip (samples,), uncut, from torchaudio's transforms."""
    transforms = torchaudio_module("transforms")
    settings = {"sample_rate": RATE, "n_fft": 1024, "hop_length": 160, "n_mels": 128, "f_min": 0.0, **settings}
    mel = transforms.MelSpectrogram(**settings, power=2)(waveform[None, None])
    decibel = transforms.AmplitudeToDB("power", top_db=top_db)(mel)
    return ((decibel - decibel.min()) / (decibel.max() - decibel.min() + 1e-8)).transpose(2, 3)


def torchaudio_module(name: str):
    try:
        import torchaudio.functional
        import torchaudio.transforms
    except (ImportError, OSError, RuntimeError) as error:  # a build for another torch raises all three
        pytest.skip(f"torchaudio cannot be imported: {error}")
    return getattr(torchaudio, name)


# Features


@pytest.mark.parametrize("loudness", [1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("samples", [513, 4000, 4001, 16000, 50000])
def test_features_equal_torchaudio(samples, loudness):
    """At -120 dB only 20 dB are left between clip and floor, which magnifies the rounding of torchaudio's filters."""
    for waveform in (voice(samples), noise(samples) + chirp(samples), chirp(samples)):
        expected = torchaudio_features(loudness * waveform)
        features = BatAudioProcessor().log_mel(loudness * waveform)
        torch.testing.assert_close(features, expected, rtol=0, atol=2e-5 if loudness > 1e-6 else 5e-5)


@pytest.mark.parametrize("samples", [5000, 20000])
def test_padding_comes_after_normalising(samples):
    waveform = noise(samples)
    expected = torchaudio_features(waveform)[:, :, :64]
    expected = torch.nn.functional.pad(expected, (0, 0, 0, 64 - expected.shape[2]))
    torch.testing.assert_close(BatAudioProcessor(num_frames=64)(waveform), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("sample_rate", "n_fft", "n_mels", "f_min"),
    [(16000, 1024, 128, 0.0), (16000, 400, 40, 0.0), (16000, 1024, 128, 50.0), (48000, 2048, 64, 20.0)],
)
def test_mel_filters_equal_torchaudio(sample_rate, n_fft, n_mels, f_min):
    expected = torchaudio_module("functional").melscale_fbanks(
        n_fft // 2 + 1, f_min, sample_rate / 2, n_mels, sample_rate, norm=None, mel_scale="htk"
    )
    filters = processing_bat.htk_mel_filters(sample_rate, n_fft, n_mels, f_min)
    torch.testing.assert_close(filters, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [{"n_fft": 512, "n_mels": 40}, {"hop_length": 320}, {"f_min": 300.0}, {"top_db": 30.0}, {"n_mels": 64}],
)
def test_settings_reach_the_result(changes):
    waveform = voice(8000)
    expected = torchaudio_features(waveform, **changes)
    torch.testing.assert_close(BatAudioProcessor(**changes).log_mel(waveform), expected, rtol=0, atol=2e-5)
    features = BatFeatureExtractor(**changes, num_frames=16)(waveform, sampling_rate=RATE, return_tensors="pt")
    torch.testing.assert_close(features.input_features, expected[:, :, :16], rtol=0, atol=2e-5)


def test_another_sampling_rate_reaches_the_result():
    waveform = voice(8000)
    extractor = BatFeatureExtractor(sampling_rate=8000, num_frames=48, n_mels=64)
    features = extractor(waveform, sampling_rate=8000, return_tensors="pt").input_features
    expected = torchaudio_features(waveform, sample_rate=8000, n_mels=64)[:, :, :48]
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="at 16000 Hz, but BAT needs 8000 Hz"):
        extractor(waveform, sampling_rate=16000)


@given(seed=st.integers(0, 1000), samples=st.integers(513, 5000), loudness=st.floats(-12, 2))
@settings(max_examples=100, deadline=None)
def test_values_span_0_to_1(seed, samples, loudness):
    features = BatAudioProcessor().log_mel(10**loudness * voice(samples, seed))
    assert features.min() == 0
    assert features.max() <= 1
    assert features.max() > 0.999 or features.max() == 0  # all below -100 dB: as silence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int16])
def test_silence_gives_zeros(dtype):
    assert not BatAudioProcessor(num_frames=32)(torch.zeros(3, 3000, dtype=dtype)).any()
    assert not extract(np.zeros(3000)).any()


@given(gain=st.floats(0.01, 1), samples=st.integers(513, 5000))
@settings(max_examples=100, deadline=None)
def test_loudness_of_a_loud_clip_does_not_matter(gain, samples):
    """While the clip's maximum is above -20 dB, the floor 80 dB below it hides the absolute one at -100 dB."""
    waveform, processor = voice(samples), BatAudioProcessor()
    assert processor._mel_power(gain * waveform[None]).max() > 1e-2
    torch.testing.assert_close(processor.log_mel(gain * waveform), processor.log_mel(waveform), rtol=0, atol=1e-4)


def test_absolute_floor_shows_in_quiet_clips():
    processor, waveform = BatAudioProcessor(), chirp(5000)
    assert (processor.log_mel(1e-5 * waveform) - processor.log_mel(waveform)).abs().max() > 0.1


# Every clip is treated alone

CLIPS = st.lists(
    st.tuples(st.integers(0, 1000), st.floats(-6, 0), st.integers(513, 20000), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=5,
)


def make_clip(seed: int, loudness: float, samples: int, dtype) -> np.ndarray:
    waveform = 10**loudness * voice(samples, seed).numpy()
    return (waveform * 32767).round().clip(-32768, 32767).astype(dtype) if dtype == np.int16 else waveform.astype(dtype)


def expected_features(clips: list[np.ndarray], num_frames: int) -> torch.Tensor:
    """Every clip's features on their own, cut, and padded with zeros by hand."""
    expected = torch.zeros(len(clips), 1, num_frames, 128)
    for row, clip in zip(expected, clips, strict=True):
        alone = BatAudioProcessor().log_mel(torch.from_numpy(clip))[0, :, :num_frames]
        row[:, : alone.shape[1]] = alone
    return expected


@given(clips=CLIPS)
@settings(max_examples=50, deadline=None)
def test_neighbours_in_a_list_do_not_matter(clips):
    clips = [make_clip(*clip) for clip in clips]
    longest = -(-(max(map(len, clips)) // 160 + 1) // 16) * 16
    for padding, num_frames in (("max_length", 64), ("longest", longest)):
        expected = expected_features(clips, num_frames)
        for form in (clips, tuple(torch.from_numpy(clip) for clip in clips)):
            features = extract(form, padding=padding)
            torch.testing.assert_close(features, expected, **EQUAL)
            for row, clip in zip(features, clips, strict=True):
                assert not row[:, len(clip) // 160 + 1 :].any()


@given(clips=CLIPS, samples=st.integers(513, 20000), dtype=st.sampled_from(DTYPES))
@settings(max_examples=50, deadline=None)
def test_neighbours_in_an_array_do_not_matter(clips, samples, dtype):
    batch = np.stack([make_clip(seed, loudness, samples, dtype) for seed, loudness, _, _ in clips])
    expected = expected_features(list(batch), 64)
    torch.testing.assert_close(BatAudioProcessor(64)(torch.from_numpy(batch)), expected, **EQUAL)
    torch.testing.assert_close(extract(batch), expected, **EQUAL)
    torch.testing.assert_close(extract(list(batch)), expected, **EQUAL)


def test_loud_neighbour_does_not_lift_a_quiet_clip():
    """The maximum over the whole batch would erase a clip that is more than 80 dB quieter."""
    quiet = 1e-5 * voice(5000)
    together = BatAudioProcessor(32)(torch.stack([quiet, voice(5000, seed=1)]))
    assert (together[0] > 0.5).any()
    torch.testing.assert_close(together[:1], BatAudioProcessor(32)(quiet), **EQUAL)


def test_order_of_a_list_is_kept():
    lengths = [2000, 700, 2000, 5000, 700, 5000, 600]
    clips = [voice(samples, seed) for seed, samples in enumerate(lengths)]
    features = extract(clips)
    for row, clip in zip(features, clips, strict=True):
        torch.testing.assert_close(row, extract(clip)[0], **EQUAL)
    torch.testing.assert_close(extract(clips[::-1]), features.flip(0), **EQUAL)


# Forms of audio


def test_shapes_of_a_waveform_are_equal():
    waveform, processor = noise(2, 3000), BatAudioProcessor(32)
    expected = processor(waveform)
    for read in (processor, lambda audio: extract(audio)[:, :, :32]):
        assert torch.equal(read(waveform[:, None]), expected)
        torch.testing.assert_close(read(waveform[0]), expected[:1], **EQUAL)
        torch.testing.assert_close(read(waveform[:1, None]), expected[:1], **EQUAL)


def test_int16_is_the_float_over_32768():
    waveform = torch.randint(-32768, 32768, (2, 3000), generator=torch.Generator().manual_seed(0))
    processor = BatAudioProcessor(32)
    assert torch.equal(processor(waveform.short()), processor(waveform.float() / 32768))
    assert torch.equal(extract(waveform.short().numpy()), extract((waveform.double() / 32768).numpy()))


def test_forms_of_one_clip_are_equal():
    waveform = noise(3000)
    array = waveform.numpy()
    expected = extract(waveform)
    read_only = array.copy()
    read_only.flags.writeable = False
    strided = np.zeros((3000, 3), dtype=np.float32)
    strided[:, 1] = array
    forms = {
        "array": array,
        "float64": array.astype(np.float64),
        "read-only": read_only,
        "negative stride": array[::-1].copy()[::-1],
        "not contiguous": strided[:, 1],
        "big-endian": array.astype(">f4"),
        "broadcast": np.broadcast_to(array, (1, 3000)),
        "Fortran order": np.asfortranarray(array[None]),
        "list of floats": array.tolist(),
        "tuple of floats": tuple(array.tolist()),
        "list of numpy floats": list(array),
        "list of an array": [array],
        "list of a list": [array.tolist()],
        "list of a tensor": [waveform],
        "tensor not contiguous": torch.from_numpy(strided)[:, 1],
        "double tensor": waveform.double(),
    }
    for name, form in forms.items():
        assert torch.equal(extract(form), expected), name


def test_waveform_is_left_as_it_was():
    waveform = noise(2, 3000)
    before = waveform.clone()
    BatAudioProcessor(32)(waveform)
    extract(waveform.numpy())
    assert torch.equal(waveform, before)


# Frames


@pytest.mark.parametrize("samples", [513, 639, 640, 17759, 17760, 17920, 81920, 170000])
def test_cutting_and_padding(samples):
    waveform = noise(samples)
    whole = BatAudioProcessor().log_mel(waveform)
    frames = samples // 160 + 1
    assert whole.shape == (1, 1, frames, 128)
    for num_frames in (16, 112, 512, 1024, None):
        features = BatAudioProcessor(num_frames)(waveform)
        assert features.shape[2] == (num_frames or -(-frames // 16) * 16)
        assert torch.equal(features[:, :, :frames], whole[:, :, : features.shape[2]])
        assert not features[:, :, frames:].any()


def test_normalised_over_the_whole_clip_before_cutting():
    waveform = 0.01 * noise(30000)
    waveform[20000:] *= 1000
    cut = BatAudioProcessor(64)(waveform)
    assert torch.equal(cut, BatAudioProcessor(None)(waveform)[:, :, :64])
    assert cut.max() < 0.7
    assert BatAudioProcessor(64)(waveform[:10240]).max() > 0.999


@pytest.mark.parametrize("num_frames", [10, 0, -16, 1023])
def test_broken_patches_are_refused(num_frames):
    for build in (BatAudioProcessor, lambda n: BatFeatureExtractor(num_frames=n)):
        with pytest.raises(ValueError, match=rf"num_frames={num_frames} must be a positive multiple of 16"):
            build(num_frames)


@pytest.mark.parametrize("block_frames", [1, 7, 10**6])
@pytest.mark.parametrize("clips", [1, 3])
def test_blocks_do_not_matter(monkeypatch, clips, block_frames):
    waveform = noise(clips, 60000)
    expected = BatAudioProcessor().log_mel(waveform)
    monkeypatch.setattr(processing_bat, "BLOCK_FRAMES_CPU", block_frames)
    torch.testing.assert_close(BatAudioProcessor().log_mel(waveform), expected, **EQUAL)


# The extractor


def test_wrong_sampling_rate_is_refused():
    for rate in (44100, 8000, 0):
        with pytest.raises(ValueError, match=rf"audio at {rate} Hz, but BAT needs 16000 Hz. Resample"):
            BatFeatureExtractor()(noise(3000), sampling_rate=rate)


def test_missing_sampling_rate_gives_a_warning(caplog):
    assert torch.equal(extract(noise(3000), sampling_rate=None), extract(noise(3000)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no sampling_rate and takes the audio to be at 16000 Hz" in caplog.text


def test_return_types_hold_equal_values():
    clips = [noise(3000), noise(700, seed=1)]
    tensor = extract(clips)
    array = extract(clips, return_tensors="np")
    arrays = extract(clips, return_tensors=None)
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, tensor.numpy())
    assert isinstance(arrays, list)
    assert all(isinstance(clip, np.ndarray) for clip in arrays)
    assert np.array_equal(np.stack(arrays), array)
    assert array.dtype == np.float32
    assert extract(noise(3000).requires_grad_(), return_tensors="np").dtype == np.float32


@pytest.mark.parametrize(
    ("option", "value"), [("return_tensors", "tf"), ("return_tensors", "jax"), ("padding", True), ("padding", "short")]
)
def test_unknown_options_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r} is not known; expected"):
        extract(noise(3000), **{option: value})


def test_num_frames_none_is_as_long_as_the_longest_clip():
    extractor, clips = BatFeatureExtractor(num_frames=None), [noise(3000), noise(9000)]
    features = extractor(clips, sampling_rate=RATE, return_tensors="pt").input_features
    assert torch.equal(features, extract(clips, padding="longest"))
    assert features.shape[2] == 64


def test_device_argument_keeps_the_values():
    assert torch.equal(extract(noise(3000), device="cpu"), extract(noise(3000)))
    assert torch.equal(extract([noise(3000).numpy()], device=torch.device("cpu")), extract(noise(3000)))


@needs_cuda
def test_cuda_equals_cpu():
    clips = [noise(3000), 1e-4 * voice(20000), noise(3000, seed=1)]
    expected = extract(clips)
    on_device = extract(clips, device="cuda")
    from_device = extract([clip.cuda() for clip in clips])
    module = BatAudioProcessor(64).cuda()(clips[1].cuda())
    tables_on_cpu = BatAudioProcessor(64)(clips[1].cuda())
    for features in (on_device, from_device, module, tables_on_cpu):
        assert features.device.type == "cuda"
    assert isinstance(extract(clips, device="cuda", return_tensors="np"), np.ndarray)
    for features in (on_device, from_device):
        torch.testing.assert_close(features.cpu(), expected, rtol=0, atol=1e-4)
    for features in (module, tables_on_cpu):
        torch.testing.assert_close(features.cpu(), expected[1:2], rtol=0, atol=1e-4)


@needs_cuda
def test_cuda_names_the_broken_clip():
    clips = [noise(600).cuda(), torch.full((600,), torch.nan).cuda()]
    with pytest.raises(ValueError, match=r"NaN, infinite or huge samples .* in clip 1;"):
        extract(clips)


CHANGED = {"num_frames": 112, "n_fft": 512, "hop_length": 320, "f_min": 100.0, "top_db": 60.0, "n_mels": 64}


@pytest.mark.parametrize("changes", [{}, CHANGED, {"num_frames": None}])
def test_saving_and_loading(tmp_path, changes):
    extractor, clips = BatFeatureExtractor(**changes), [noise(3000), noise(9000)]
    extractor.save_pretrained(tmp_path)
    expected = extractor(clips, sampling_rate=RATE, return_tensors="pt").input_features
    for load in (BatFeatureExtractor, AutoFeatureExtractor):
        loaded = load.from_pretrained(tmp_path)
        assert type(loaded) is bat_audio.BatFeatureExtractor
        assert settings_of(loaded) == settings_of(extractor)
        assert torch.equal(loaded(clips, sampling_rate=RATE, return_tensors="pt").input_features, expected)


def test_auto_processor_loads_the_extractor(tmp_path):
    try:
        from transformers import AutoProcessor
    except (ImportError, OSError, RuntimeError) as error:  # Transformers 5 imports torchaudio for it
        pytest.skip(str(error))
    extractor = BatFeatureExtractor(num_frames=112)
    extractor.save_pretrained(tmp_path)
    BatConfig().save_pretrained(tmp_path)  # Transformers 4 asks for it
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is BatFeatureExtractor
    assert settings_of(loaded) == settings_of(extractor)


def settings_of(extractor: BatFeatureExtractor) -> dict:
    """What is written to preprocessor_config.json, without what loading and saving add."""
    return {key: value for key, value in json.loads(extractor.to_json_string()).items() if key != "auto_map"}


def test_options_of_loading_reach_the_processor(tmp_path):
    BatFeatureExtractor().save_pretrained(tmp_path)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path, num_frames=112, top_db=60.0)
    assert extractor.num_frames == extractor.processor.num_frames == 112
    assert extractor.processor.top_db == 60


def test_settings_are_plain_json():
    extractor = BatFeatureExtractor(**CHANGED)
    assert "processor" not in extractor.to_dict()
    assert json.loads(json.dumps(extractor.to_dict())) == extractor.to_dict()
    assert settings_of(extractor).items() >= CHANGED.items()
    rebuilt = BatFeatureExtractor.from_dict(json.loads(extractor.to_json_string()))
    assert settings_of(rebuilt) == settings_of(extractor)


def test_published_settings_are_the_defaults():
    published = json.loads((ROOT / "preprocessor_config.json").read_text())
    assert published.pop("auto_map") == {"AutoFeatureExtractor": "processing_bat.BatFeatureExtractor"}
    assert published == settings_of(BatFeatureExtractor())


def test_settings_of_older_versions_still_load(tmp_path):
    """They had three more options, none of which ever had an effect on the features."""
    BatFeatureExtractor(num_frames=64).save_pretrained(tmp_path)
    file, old = tmp_path / "preprocessor_config.json", {"padding_value": 0.0, "padding_side": "right"}
    settings = json.loads(file.read_text())
    assert not settings.keys() & {*old, "return_attention_mask"}
    file.write_text(json.dumps({**settings, **old, "return_attention_mask": False}))
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert torch.equal(extract_with(loaded, noise(3000)), extract(noise(3000))[:, :, :64])


@pytest.mark.parametrize("samples", [513, 2559, 2560, 2561, 5120, 16000])
def test_patches_with_sound_begin_before_the_end(samples):
    processor = BatAudioProcessor(None)
    assert processor.num_patches(samples) == len(range(0, samples, 2560))
    assert processor(noise(samples)).shape[2] // 16 - processor.num_patches(samples) in (0, 1)


def test_copies_work_as_the_original():
    waveform = noise(3000)
    for original in (BatFeatureExtractor(num_frames=64), BatAudioProcessor(64)):
        copies = (copy.deepcopy(original), pickle.loads(pickle.dumps(original)))
        for clone in copies:
            features = clone(waveform) if isinstance(clone, BatAudioProcessor) else extract_with(clone, waveform)
            assert torch.equal(features, extract(waveform))


def extract_with(extractor: BatFeatureExtractor, waveform: torch.Tensor) -> torch.Tensor:
    return extractor(waveform, sampling_rate=RATE, return_tensors="pt").input_features


# The module


def test_processor_has_nothing_to_save_or_train():
    processor = BatAudioProcessor()
    assert not processor.state_dict()
    assert not list(processor.parameters())
    assert torch.equal(processor.to("cpu")(noise(3000)), BatAudioProcessor()(noise(3000)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_float32_under_autocast(dtype):
    waveform, processor = torch.ones(1, 3000) * voice(3000).sign(), BatAudioProcessor(32)  # power above float16's range
    with torch.autocast("cpu", dtype=dtype):
        features = processor(waveform)
    assert features.dtype == torch.float32
    assert torch.equal(features, processor(waveform))


FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
AUDIO = {
    **{str(dtype): noise(3000).to(dtype) for dtype in FLOATS},
    "int16": (32767 * noise(3000)).short(),
    "array": noise(3000).numpy(),
    "list": noise(3000).tolist(),
}


def all_features(processor: BatAudioProcessor) -> dict[str, torch.Tensor]:
    """Of every form of audio, by the extractor and, where the form is a tensor, by the processor too."""
    features = {name: extract(audio) for name, audio in AUDIO.items()}
    tensors = {name: audio for name, audio in AUDIO.items() if isinstance(audio, torch.Tensor)}
    return {**features, **{f"{name}, processor": processor(audio) for name, audio in tensors.items()}}


def assert_all_equal(features: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert features.keys() == expected.keys()
    for name, values in features.items():
        assert values.dtype == torch.float32, name
        assert torch.equal(values, expected[name]), name


@pytest.fixture
def no_tables():
    """As in a process that has made no features yet."""
    processing_bat.front_end_tables.cache_clear()


@pytest.mark.parametrize("dtype", FLOATS)
def test_default_dtype_does_not_matter(no_tables, dtype):
    torch.set_default_dtype(dtype)
    try:
        processor = BatAudioProcessor(64)
        features = all_features(processor)
    finally:
        torch.set_default_dtype(torch.float32)
    processing_bat.front_end_tables.cache_clear()
    assert_all_equal(features, all_features(BatAudioProcessor(64)))
    assert_all_equal(all_features(processor), features)


def test_default_device_does_not_matter(no_tables):
    """Models are often built on the device "meta", without memory for their weights."""
    with torch.device("meta"):
        processor = BatAudioProcessor(64)
        features = all_features(processor)
    processing_bat.front_end_tables.cache_clear()
    assert_all_equal(features, all_features(BatAudioProcessor(64)))


def test_inference_mode_before_does_not_matter(no_tables):
    with torch.inference_mode():
        expected = BatAudioProcessor(64)(noise(3000))
    waveform = noise(3000).requires_grad_()
    features = BatAudioProcessor(64)(waveform)
    features.sum().backward()
    assert waveform.grad.isfinite().all()
    assert torch.equal(features.detach(), expected)


MOVES = {
    **{f"to {dtype}": lambda module, dtype=dtype: module.to(dtype) for dtype in FLOATS},
    "to CPU and bfloat16": lambda module: module.to("cpu", torch.bfloat16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
    "there and back": lambda module: module.half().double().float(),
    "type": lambda module: module.type(torch.float16),
    "cpu": lambda module: module.cpu(),
    "meta and back": lambda module: module.to("meta").to_empty(device="cpu"),
    "shared memory": lambda module: module.share_memory(),
    "copy": lambda module: copy.deepcopy(module.half()),
    "pickle": lambda module: pickle.loads(pickle.dumps(module.half())),
}


@pytest.mark.parametrize("move", MOVES)
def test_moves_of_the_module_do_not_matter(move):
    expected = all_features(BatAudioProcessor(64))
    alone = MOVES[move](BatAudioProcessor(64))
    in_another = MOVES[move](torch.nn.Sequential(torch.nn.Linear(1, 1), BatAudioProcessor(64)))[1]
    for processor in (alone, in_another):
        assert_all_equal(all_features(processor), expected)
        assert not processor.state_dict()


class ModelWithFrontEnd(PreTrainedModel):
    """A user's model that makes its own features."""

    config_class = BatConfig

    def __init__(self, config):
        super().__init__(config)
        self.front_end, self.layer = BatAudioProcessor(64), torch.nn.Linear(1, 1)
        self.post_init()


@pytest.mark.parametrize("dtype", FLOATS)
def test_models_may_hold_a_processor(tmp_path, dtype):
    """Transformers builds a model on the device "meta", with its dtype as the default, and loads the weights after."""
    ModelWithFrontEnd(BatConfig()).save_pretrained(tmp_path)
    model = ModelWithFrontEnd.from_pretrained(tmp_path, dtype=dtype)
    assert model.layer.weight.dtype == dtype
    assert_all_equal(all_features(model.front_end), all_features(BatAudioProcessor(64)))


@needs_cuda
@pytest.mark.parametrize("dtype", FLOATS)
def test_tables_move_to_cuda_and_stay_float32(dtype):
    waveform = noise(3000).cuda()
    expected = BatAudioProcessor(64)(waveform)
    for processor in (BatAudioProcessor(64).to("cuda", dtype), BatAudioProcessor(64).to(dtype).cuda()):
        assert processor.window.is_cuda
        assert processor.mel_filters.is_cuda
        assert torch.equal(processor(waveform), expected)
        torch.testing.assert_close(processor.cpu()(noise(3000)), expected.cpu(), rtol=0, atol=1e-4)


def test_gradients_reach_the_waveform():
    direction = noise(2, 3000, seed=1)
    waveform = noise(2, 3000).requires_grad_()
    weights = torch.rand(2, 1, 32, 128, generator=torch.Generator().manual_seed(0))

    def score(audio: torch.Tensor) -> torch.Tensor:
        return (BatAudioProcessor(32)(audio) * weights).sum()

    score(waveform).backward()
    assert waveform.grad.isfinite().all()
    assert (waveform.grad.abs().amax(1) > 0).all()
    with torch.no_grad():
        step = 1e-3
        difference = (score(waveform + step * direction) - score(waveform - step * direction)) / (2 * step)
    torch.testing.assert_close((waveform.grad * direction).sum(), difference, rtol=0.05, atol=0)
    through_extractor = noise(2, 3000).requires_grad_()
    (extract(through_extractor)[:, :, :32] * weights).sum().backward()
    assert torch.equal(through_extractor.grad, waveform.grad)


def test_gradient_of_silence_is_finite():
    waveform = torch.zeros(1, 3000, requires_grad=True)
    BatAudioProcessor(32)(waveform).sum().backward()
    assert waveform.grad.isfinite().all()


def test_compiles():
    torch.compiler.reset()
    processor, waveform = BatAudioProcessor(32), noise(2, 3000)
    compiled = torch.compile(processor, backend="aot_eager")
    torch.testing.assert_close(compiled(waveform), processor(waveform), **EQUAL)
    with pytest.raises(ValueError, match=r"huge samples .* in clip 1;"):
        compiled(waveform * torch.tensor([[1], [torch.inf]]))


def test_files_and_resampling_are_at_hand_at_the_owner_s_rate():
    file = ROOT / "examples" / "speech_fr_16k.flac"
    waveform = noise(2, 4410)
    for owner, rate in (
        (BatAudioProcessor(), 16000),
        (BatFeatureExtractor(), 16000),
        (BatAudioProcessor(sample_rate=8000), 8000),
        (BatFeatureExtractor(sampling_rate=8000), 8000),
    ):
        loaded = owner.load_audio(file, start=1.0, duration=0.5)
        assert torch.equal(loaded, bat_audio.load_audio(file, 1.0, 0.5, sampling_rate=rate))
        assert torch.equal(owner.resample(waveform, 44100), bat_audio.resample(waveform, 44100, rate))


@pytest.mark.parametrize("setting", [*CHANGED, "sampling_rate"])
def test_changed_settings_reach_the_features(setting):
    """There and back, beside another extractor that keeps its settings."""
    value, waveform = {**CHANGED, "sampling_rate": 8000}[setting], torch.logspace(0, -6, 8000) * noise(8000)
    extractor, other, fresh = BatFeatureExtractor(), BatFeatureExtractor(), BatFeatureExtractor(**{setting: value})
    before, original = features_of(extractor, waveform), getattr(extractor, setting)
    setattr(extractor, setting, value)
    changed = features_of(extractor, waveform)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, features_of(fresh, waveform))
    assert torch.equal(changed, extractor.processor(waveform))
    assert torch.equal(features_of(other, waveform), before)
    setattr(extractor, setting, original)
    assert torch.equal(features_of(extractor, waveform), before)


def features_of(extractor: BatFeatureExtractor, waveform: torch.Tensor) -> torch.Tensor:
    return extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features


def test_tables_are_computed_once_for_each_setting(no_tables, monkeypatch):
    computed, compute = [], processing_bat.htk_mel_filters

    def count(*arguments):
        computed.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(processing_bat, "htk_mel_filters", count)
    extractors = [BatFeatureExtractor(), BatFeatureExtractor(f_min=100.0), BatFeatureExtractor(num_frames=64)]
    for extractor in [*extractors, *map(copy.deepcopy, extractors), *extractors]:
        features_of(extractor, noise(3000))
    assert computed == [(16000, 1024, 128, 0.0), (16000, 1024, 128, 100.0)]


def test_use_leaves_no_trace_in_an_extractor():
    """Datasets recognises work that is done already by the pickled extractor."""
    extractor = BatFeatureExtractor()
    before, settings = pickle.dumps(extractor), extractor.to_json_string()
    features_of(extractor, noise(3000))
    assert pickle.dumps(extractor) == before
    assert extractor.to_json_string() == settings


def test_a_processor_s_tables_are_its_own():
    expected, changed = BatAudioProcessor(64)(noise(3000)), BatAudioProcessor(64)
    changed.window.zero_()
    changed.mel_filters.zero_()
    assert torch.equal(BatAudioProcessor(64)(noise(3000)), expected)
    assert torch.equal(extract(noise(3000)), expected)


@pytest.mark.parametrize("amplitude", [1e-12, 1.0, 1e6, 0.9e15])
def test_features_are_finite_at_every_accepted_amplitude(amplitude):
    features = BatAudioProcessor()(noise(2, 4000).clamp(-1, 1) * amplitude)
    assert features.isfinite().all()
    assert 0 <= features.min() <= features.max() <= 1


@pytest.mark.parametrize(("amplitude", "dtype"), [(1e16, torch.float32), (1e30, torch.float32), (1e200, torch.float64)])
def test_amplitudes_that_would_overflow_are_refused(amplitude, dtype):
    with pytest.raises(ValueError, match=r"huge samples \(above 1e\+15\) in clip 1;"):
        BatAudioProcessor()(torch.tensor([[0.0], [amplitude]], dtype=dtype).expand(2, 4000))


# Forked processes

# The parent computes with several threads, of which none is in the processes that it forks.
FORKING = """
import multiprocessing
import signal

import torch
from bat_audio import BatAudioProcessor, BatFeatureExtractor, processing_bat, resample

def give_up(*_):
    raise TimeoutError("the forked processes do not answer")

clips = torch.rand(4, 160000, generator=torch.Generator().manual_seed(0)) - 0.5
extractor, processor = BatFeatureExtractor(), BatAudioProcessor()

def features_of(clip):
    processing_bat.front_end_tables.cache_clear()
    options = {"sampling_rate": 16000, "return_tensors": "pt"}
    return {
        "extractor": extractor(clip, **options).input_features.numpy(),
        "list": extractor([clip, clip[:50000]], **options).input_features.numpy(),
        "processor": processor(clip).numpy(),
        "uncut": processor.log_mel(clip).numpy(),
        "built anew": BatAudioProcessor(f_min=100.0)(clip).numpy(),
        "resampled": extractor.resample(clip, 44100).numpy(),
        "resampled by the function": resample(clip, 44100).numpy(),
        "threads": torch.get_num_threads(),
    }

def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), torch.as_tensor(values), rtol=0, atol=1e-6, msg=name)

torch.set_num_threads(4)
expected = [features_of(clip) for clip in clips]
assert all(features["threads"] == 4 for features in expected)
signal.signal(signal.SIGALRM, give_up)
signal.alarm(60)
"""
WAYS_TO_FORK = {
    "multiprocessing": """
with multiprocessing.get_context("fork").Pool(2) as pool:
    for found, wanted in zip(pool.map(features_of, clips), expected, strict=True):
        assert_equal(found, wanted)
""",
    "datasets": """
from datasets import Dataset
mapped = Dataset.from_dict({"place": range(4)}).map(lambda row: features_of(clips[row["place"]]), num_proc=2)
for found, wanted in zip(mapped.remove_columns("place"), expected, strict=True):
    assert_equal(found, wanted)
""",
}


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.parametrize("way", WAYS_TO_FORK)
def test_forked_processes_make_the_same_features(tmp_path, way):
    """Their number of threads, with which users compute other things, is left as it is."""
    run_python(FORKING + WAYS_TO_FORK[way], HF_DATASETS_CACHE=tmp_path)


# Errors

MONO = r"expected mono clips as a float or int16 tensor \(samples,\), \(batch, samples\) or \(batch, 1, samples\)"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_clips_that_are_not_finite_are_named(bad, dtype):
    waveform = noise(4, 3000).to(dtype)
    waveform[1, 5] = bad
    waveform[3, -1] = bad
    for read in (BatAudioProcessor(), extract, lambda audio: extract(audio.numpy())):
        with pytest.raises(ValueError, match=r"\(4, 3000\).*NaN, infinite or huge samples .* in clip 1, 3;"):
            read(waveform)
    with pytest.raises(ValueError, match=r"\(3000,\).*NaN, infinite or huge samples .* in clip 0;"):
        extract(waveform[1])


def test_clips_of_a_list_are_named_by_their_place_in_the_list():
    """Lists are sorted by length on the way: the number must still be the caller's."""
    clips = [noise(700), noise(600), noise(700), noise(600), noise(900)]
    clips[3] = torch.full((600,), torch.nan)
    with pytest.raises(ValueError, match=r"NaN, infinite or huge samples .* in clip 3;"):
        extract(clips)
    clips[3] = noise(512)
    with pytest.raises(ValueError, match=r"\(clip 3 of the list\): 512 samples are too few"):
        extract(clips)
    clips[3] = np.zeros(600, dtype=np.int64)
    with pytest.raises(ValueError, match=r"int64 \(clip 3 of the list\); expected mono clips"):
        extract(clips)
    clips[3] = noise(600, 2)
    with pytest.raises(ValueError, match=r"Clip 3 of the list has shape \(600, 2\).*Average the channels first"):
        extract(clips)
    clips[3] = "three.wav"
    with pytest.raises(ValueError, match=r"clip 3 of the list as str 'three.wav'.*Read files with load_audio"):
        extract(clips)


def test_shortest_clip():
    """Half a window and a sample, as the reflection at the ends needs."""
    assert extract(noise(513)).any()
    for audio in (noise(512), noise(2, 512), noise(2, 1, 1), [noise(512)]):
        with pytest.raises(ValueError, match=r"too few for one window; at least 513 \(0.032 s\) are needed. Zero-pad"):
            extract(audio)
    assert BatAudioProcessor(n_fft=512)(noise(257)).any()
    with pytest.raises(ValueError, match="at least 257"):
        BatAudioProcessor(n_fft=512)(noise(256))


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(0), rf"shape \(0,\).*no samples; {MONO}"),
        (torch.zeros(0, 3000), r"shape \(0, 3000\).*no samples"),
        (torch.zeros(3, 0), r"shape \(3, 0\).*no samples"),
        (torch.zeros(600, dtype=torch.int32), rf"torch.int32; {MONO}. Scale other integers to floats in -1..1"),
        (torch.zeros(600, dtype=torch.int64), "torch.int64.*Scale other integers"),
        (torch.zeros(600, dtype=torch.uint8), "torch.uint8.*Scale other integers"),
        (torch.zeros(600, dtype=torch.bool), "torch.bool.*Scale other integers"),
        (torch.zeros(600, dtype=torch.complex64), "torch.complex64.*complex audio is refused"),
        (torch.zeros(3000, 2), r"shape \(3000, 2\).*looks like \(samples, channels\).*Average the channels first"),
        (torch.zeros(3000, 1), r"shape \(3000, 1\).*looks like \(samples, channels\)"),
        (torch.zeros(4, 2, 3000), r"shape \(4, 2, 3000\).*: 2 channels; expected mono.*Average the channels first"),
        (torch.zeros(1, 1, 1, 3000), rf"shape \(1, 1, 1, 3000\) and torch.float32; {MONO}"),
        (torch.tensor(0.5), rf"shape \(\) and torch.float32; {MONO}"),
    ],
)
def test_wrong_waveforms_are_refused(waveform, message):
    for read in (BatAudioProcessor(), extract, lambda audio: extract(audio.numpy())):
        with pytest.raises(ValueError, match=message):
            read(waveform)


FILES = "Read files with load_audio"


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([], "an empty list; expected an array, a tensor or a non-empty list of mono clips"),
        ((), "an empty tuple"),
        ([[]], r"shape \(1, 0\).*\(clip 0 of the list\): no samples"),
        ([noise(600), torch.zeros(0)], r"\(clip 1 of the list\): no samples"),
        ([0] * 600, "torch.int64.*Scale other integers"),
        ([True] * 600, "torch.bool"),
        ([1j] * 600, r"Clip 0 of the list has shape \(\); expected mono clips"),
        ([noise(2, 600)], r"Clip 0 of the list has shape \(2, 600\).*Average the channels first"),
        ([noise(1, 600)], r"Clip 0 of the list has shape \(1, 600\)"),
        ([[[0.1] * 600]], r"Clip 0 of the list has shape \(1, 600\)"),
        ([[0.1, [0.2]], [0.1]], r"clip 0 of the list as list \[0.1, \[0.2\]\], no array of numbers \(.*inhomogeneous"),
        ([0.1, [0.2, 0.3]], r"audio as list \[0.1, \[0.2, 0.3\]\], no array of numbers"),
        ([0.1, "loud"], r"audio as list \[0.1, 'loud'\], no array of numbers"),
        ("clip.wav", f"audio as str 'clip.wav'; expected.*{FILES}"),
        (ROOT / "clip.wav", rf"audio as \w+Path.*{FILES}"),
        (b"RIFF", f"audio as bytes b'RIFF'.*{FILES}"),
        (["clip.wav"], f"clip 0 of the list as str 'clip.wav', no array of numbers.*{FILES}"),
        (None, "audio as NoneType None; expected"),
        ([None], "clip 0 of the list as NoneType None, no array of numbers"),
        (0.5, "audio as float 0.5; expected"),
        ({"array": [0.1], "sampling_rate": 16000}, "audio as dict {'array': .*from a dict, pass its array"),
        ([{"array": [0.1]}], "clip 0 of the list as dict {'array': .*from a dict, pass its array"),
        ((value for value in [0.1]), "audio as generator"),
        (np.array(["a"] * 600), "audio as ndarray .*no array of numbers"),
        (np.array([None] * 600), "audio as ndarray .*no array of numbers"),
    ],
)
def test_what_is_no_audio_is_refused(audio, message):
    with pytest.raises(ValueError, match=message):
        extract(audio)


@pytest.mark.parametrize("waveform", [np.zeros(600, dtype=np.float32), [0.1] * 600, None, "clip.wav"])
def test_processor_takes_tensors_only(waveform):
    with pytest.raises(ValueError, match=f"type {type(waveform).__name__}; {MONO}"):
        BatAudioProcessor()(waveform)
