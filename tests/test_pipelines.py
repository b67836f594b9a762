"""Pipelines: every kind of clip, any batch, and every door give what the model and the extractor give by hand."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import run_python, tiny_config, tiny_model
from hub_server import HubServer
from transformers import AudioClassificationPipeline

from bat_audio import BatFeatureExtractor, BatForAudioClassification, BatForAudioFrameClassification, load_audio
from bat_audio.pipeline_bat import BatAudioClassificationPipeline, BatFeatureExtractionPipeline

LABELS = ["rain", "wind", "frog", "bird", "gust", "hail"]


def noise(seconds, seed=0, rate=16000):
    return np.random.RandomState(seed).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)


def classifier_model(cls=BatForAudioClassification, **changes):
    torch.manual_seed(0)
    model = cls(tiny_config(id2label=dict(enumerate(LABELS)), **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def embedder(**options):
    return BatFeatureExtractionPipeline(
        model=tiny_model(), feature_extractor=BatFeatureExtractor(), device="cpu", **options
    )


def classifier(pipeline_class=BatAudioClassificationPipeline, *, problem_type=None, **options):
    model = classifier_model(problem_type=problem_type)
    return pipeline_class(model=model, feature_extractor=BatFeatureExtractor(), device="cpu", **options)


def features_by_hand(waveform, padding="max_length"):
    return BatFeatureExtractor()(waveform, sampling_rate=16000, padding=padding, return_tensors="pt").input_features


@torch.no_grad()
def logits_by_hand(model, waveform):
    return model(features_by_hand(waveform)).logits[0]


def as_dict(scores):
    return {entry["label"]: entry["score"] for entry in scores}


@pytest.fixture
def sound(tmp_path):
    """A sound of 1 s in a 16 kHz file, and its samples."""
    soundfile.write(tmp_path / "sound.wav", noise(1), 16000, subtype="FLOAT")
    return tmp_path / "sound.wav", noise(1)


def test_every_kind_of_clip_is_the_same_clip(sound):
    path, waveform = sound
    stereo = SimpleNamespace(data=torch.from_numpy(np.stack([2 * waveform, 0 * waveform])), sample_rate=16000)
    clips = [
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        waveform,
        waveform.astype(np.float64),
        torch.from_numpy(waveform),
        {"array": waveform, "sampling_rate": 16000},
        {"raw": torch.from_numpy(waveform), "sampling_rate": 16000, "path": "elsewhere.wav"},
        {"array": waveform.tolist(), "sampling_rate": 16000},
        {"bytes": path.read_bytes(), "path": "elsewhere.wav"},
        {"bytes": None, "path": str(path)},
        SimpleNamespace(get_all_samples=lambda: stereo),
    ]
    with torch.no_grad():
        expected = tiny_model()(features_by_hand(waveform)).pooler_output[0]
    pipe = embedder()
    for clip in clips:
        embedding = pipe(clip)
        assert isinstance(embedding, list)
        torch.testing.assert_close(torch.tensor(embedding), expected)
    pipe, expected = classifier(), logits_by_hand(classifier_model(), waveform).softmax(-1)
    for clip in clips:
        assert as_dict(pipe(clip)) == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), rel=1e-5)


def test_other_rates_are_resampled_as_in_training(tmp_path):
    waveform = noise(1, rate=44100)
    soundfile.write(tmp_path / "sound.wav", waveform, 44100, subtype="PCM_16")
    integers, _ = soundfile.read(tmp_path / "sound.wav", dtype="int16")
    pipe = embedder(return_tensors=True)
    expected = pipe(load_audio(tmp_path / "sound.wav"))
    for array in (integers, integers / 32768):
        torch.testing.assert_close(pipe({"array": array, "sampling_rate": 44100}), expected)
    torch.testing.assert_close(pipe(tmp_path / "sound.wav"), expected)
    assert not torch.allclose(pipe({"array": integers, "sampling_rate": 16000}), expected, atol=1e-3)


def test_pooling():
    waveform = noise(1)
    with torch.no_grad():
        tokens = tiny_model()(features_by_hand(waveform)).last_hidden_state[0]
    pipe = embedder(return_tensors=True)
    torch.testing.assert_close(pipe(waveform), tokens[0])
    torch.testing.assert_close(pipe(waveform, pool="mean"), tokens[1:].mean(dim=0))
    torch.testing.assert_close(pipe(waveform, pool=None), tokens)
    assert pipe(waveform, pool=None, return_tensors=False) == pipe(waveform, pool=None).tolist()
    chosen_at_the_start = embedder(pool="mean")
    assert chosen_at_the_start(waveform) == pipe(waveform, pool="mean").tolist()
    assert chosen_at_the_start(waveform, pool="cls") == pipe(waveform).tolist()


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(513, 1024), (163839, 1024), (163840, 1024), (163841, 1040), (200000, 1264), (2 * 163840, 2048)],
)
def test_short_clips_are_padded_and_long_ones_run_whole(samples, frames):
    waveform = noise(samples / 16000)
    features = features_by_hand(waveform, "max_length" if samples <= 163840 else "longest")[:, :, :frames]
    assert features.shape[2] == frames
    with torch.no_grad():
        expected = tiny_model()(features).last_hidden_state[0]
    torch.testing.assert_close(embedder(return_tensors=True, pool=None)(waveform), expected)


CLIPS = [noise(seconds, seed) for seed, seconds in enumerate((1, 11, 0.5, 12.2, 11, 1))]


@pytest.mark.parametrize("pool", ["cls", "mean", None])
@pytest.mark.parametrize("batch_size", [2, 4])
def test_batch_of_embeddings_is_each_alone(batch_size, pool):
    pipe = embedder(return_tensors=True, pool=pool)
    alone = [pipe(clip) for clip in CLIPS]
    together = pipe(CLIPS, batch_size=batch_size)
    assert len({len(tokens) for tokens in alone}) == (1 if pool else 3)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


def test_batch_of_scores_is_each_alone():
    pipe = classifier()
    for one, other in zip([pipe(clip) for clip in CLIPS], pipe(CLIPS, batch_size=4), strict=True):
        assert as_dict(one) == pytest.approx(as_dict(other), rel=1e-4)


def test_lists_generators_and_columns(sound):
    path, waveform = sound
    pipe = embedder()
    expected = [pipe(waveform), pipe(CLIPS[1])]
    assert pipe([path, CLIPS[1]]) == expected
    assert pipe((path, CLIPS[1])) == expected
    assert pipe([]) == pipe(()) == []
    stream = pipe(clip for clip in (path, CLIPS[1]))
    assert not isinstance(stream, list)
    assert list(stream) == expected
    table = datasets.Dataset.from_dict({"audio": [str(path)] * 3}).cast_column("audio", datasets.Audio(decode=False))
    assert pipe(table["audio"], batch_size=2) == [pytest.approx(expected[0], abs=1e-5)] * 3


@pytest.mark.parametrize(
    ("problem_type", "function"),
    [(None, "softmax"), ("single_label_classification", "softmax"), ("multi_label_classification", "sigmoid")],
)
def test_scores_by_hand(problem_type, function):
    waveform = noise(1)
    logits = logits_by_hand(classifier_model(), waveform)
    functions = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "none": logits}
    expected = {name: dict(zip(LABELS, scores.tolist(), strict=True)) for name, scores in functions.items()}
    pipe = classifier(problem_type=problem_type)
    scores = pipe(waveform)
    assert as_dict(scores) == pytest.approx(expected[function], rel=1e-5)
    assert scores == sorted(scores, key=lambda entry: -entry["score"])
    assert pipe(waveform, top_k=2) == scores[:2]
    chosen_at_the_start = classifier(problem_type=problem_type, top_k=2)
    assert chosen_at_the_start(waveform) == scores[:2]
    assert chosen_at_the_start(waveform, top_k=None) == scores
    for choice in functions:
        assert as_dict(pipe(waveform, function_to_apply=choice)) == pytest.approx(expected[choice], rel=1e-5)
        chosen_at_the_start = classifier(problem_type=problem_type, function_to_apply=choice)
        assert as_dict(chosen_at_the_start(waveform)) == pytest.approx(expected[choice], rel=1e-5)


def test_transformers_own_pipeline_agrees(sound):
    _, waveform = sound
    stock, ours = classifier(AudioClassificationPipeline), classifier()
    for clips in (waveform, [waveform, CLIPS[2]]):
        assert str(stock(clips)) == str(ours(clips))


def test_half_precision():
    model = tiny_model().bfloat16()
    pipe = BatFeatureExtractionPipeline(model=model, feature_extractor=BatFeatureExtractor(), device="cpu")
    with torch.no_grad():
        expected = model(features_by_hand(CLIPS[0])).pooler_output[0]
    assert pipe(CLIPS[0]) == expected.tolist()


def test_embedding_of_a_model_with_a_head_is_its_encoders():
    model = classifier_model()
    pipes = [
        BatFeatureExtractionPipeline(model=part, feature_extractor=BatFeatureExtractor(), device="cpu")
        for part in (model, model.bat)
    ]
    assert pipes[0](CLIPS[0]) == pipes[1](CLIPS[0])


def test_text_is_no_sound(tmp_path):
    (tmp_path / "notes.txt").write_text("no sound " * 100)
    with pytest.raises(ValueError, match=r"notes\.txt: cannot be read as audio: it holds text"):
        embedder()(tmp_path / "notes.txt")


def test_damaged_files_are_not_repaired(sound):
    path, _ = sound
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for pipe in (embedder(), classifier()):
        with pytest.raises(ValueError, match="truncated"):
            pipe(path)


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        ("nowhere.wav", FileNotFoundError, "nowhere.wav: no such file"),
        (np.zeros((2, 16000), np.float32), ValueError, r"shape \(2, 16000\).*Average the channels"),
        (np.zeros(0, np.float32), ValueError, "not empty"),
        (noise(0.01), ValueError, "too few for one window"),
        ({"array": noise(1)}, ValueError, "no sampling_rate"),
        ({"audio": noise(1), "label": 1}, ValueError, "Got dict"),
        (0.5, ValueError, "Got float 0.5"),
        (None, ValueError, "Got NoneType"),
    ],
)
def test_what_is_no_clip_is_refused(clip, error, message):
    for pipe in (embedder(), classifier()):
        with pytest.raises(error, match=message):
            pipe(clip)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="pool='max' is not known"):
        embedder(pool="max")
    with pytest.raises(ValueError, match="unknown options truncation"):
        embedder()(noise(1), truncation=True)
    with pytest.raises(ValueError, match="function_to_apply"):
        classifier()(noise(1), function_to_apply="tanh")


def test_frame_model_is_refused():
    model = classifier_model(BatForAudioFrameClassification)
    with pytest.raises(ValueError, match="decode_events"):
        BatAudioClassificationPipeline(model=model, feature_extractor=BatFeatureExtractor(), device="cpu")


BOTH_TASKS = """
import json, sys
from transformers import pipeline
def run():
    embedder = pipeline("feature-extraction", model=folder, trust_remote_code=True)
    classifier = pipeline("audio-classification", model=folder, trust_remote_code=True)
    modules = [type(embedder).__module__, type(classifier).__module__]
    print(json.dumps([embedder(clips), classifier(clips, batch_size=2), modules]))
folder, *clips = sys.argv[1:]
run()
import bat_audio
run()
"""


@pytest.fixture(scope="module")
def multi_label_folder(tmp_path_factory):
    """A saved multi-label model, a clip in a file, and the two tasks' results for it."""
    folder = tmp_path_factory.mktemp("model") / "weather"
    model = classifier_model(problem_type="multi_label_classification", head_type="linear_cgp")
    model.save_pretrained(folder)
    clip = folder.parent / "clip.wav"
    soundfile.write(clip, noise(1), 16000, subtype="FLOAT")
    with torch.no_grad():
        embedding = model.bat(features_by_hand(noise(1))).pooler_output[0].tolist()
    scores = logits_by_hand(model, noise(1)).sigmoid().tolist()
    return folder, clip, embedding, dict(zip(LABELS, scores, strict=True))


def check_both_tasks(result, embedding, scores, clips):
    """Both with remote code alone and beside the installed package."""
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        embeddings, predictions, modules = json.loads(line)
        assert embeddings == [pytest.approx(embedding, abs=1e-5)] * clips
        assert [as_dict(prediction) for prediction in predictions] == [pytest.approx(scores, abs=1e-5)] * clips
        assert all(module.startswith("transformers_modules.") for module in modules)
    assert "is not supported" not in result.stderr  # as Transformers says of every remote class


def test_both_tasks_from_a_folder(multi_label_folder, tmp_path):
    folder, clip, embedding, scores = multi_label_folder
    result = run_python(BOTH_TASKS, folder, clip, clip, HF_MODULES_CACHE=tmp_path)
    check_both_tasks(result, embedding, scores, clips=2)


def test_both_tasks_from_the_hub_with_a_clip_from_a_url(multi_label_folder, tmp_path):
    folder, clip, embedding, scores = multi_label_folder
    with HubServer({file.name: file.read_bytes() for file in [*folder.iterdir(), clip]}) as hub:
        url = f"{hub.endpoint}/{hub.repo_id}/resolve/main/clip.wav"
        result = run_python(BOTH_TASKS, hub.repo_id, url, **{**hub.env(tmp_path), "HF_HUB_OFFLINE": None})
    check_both_tasks(result, embedding, scores, clips=1)


def test_url_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer({}) as hub, pytest.raises(Exception, match="404"):
        embedder()(f"{hub.endpoint}/{hub.repo_id}/resolve/main/clip.wav")
