"""BAT-tiny: what is shipped is what was judged, hears more than an untrained network, and can be made anew."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, THREADS, assert_same_weights
from programs import run_code
from safetensors.torch import load_file
from speech_commands import make_speech_commands
from threadpoolctl import threadpool_limits

from bat_audio import BatModel, load_pretrained_encoder
from bat_audio.load_model import load_audio_processor
from bat_tiny import model as bat_tiny
from bat_tiny.demo import BAT_TINY, EXAMPLES, similarities, time_statistics
from bat_tiny.sounds import SCENES

RESULTS = json.loads((BAT_TINY / "results.json").read_text())
# Percentage points by which the shipped model is at least better than all others, by task and method.
MARGINS = {
    "instrument_family": {"5 nearest neighbours": 2, "linear probe": 10},
    "recorded_language": {"5 nearest neighbours": 7, "linear probe": 0.5},
    "sound_source": {"5 nearest neighbours": 6, "linear probe": 9},
    "spoken_word": {"5 nearest neighbours": 10, "linear probe": 19},
}


def test_shipped_model_is_small_and_loads_in_float32():
    files = [file for file in BAT_TINY.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6
    model, stored = load_pretrained_encoder(checkpoint=BAT_TINY), load_file(BAT_TINY / "model.safetensors")
    assert model.num_parameters() < 3e6
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert model.dtype == torch.float32
    assert_same_weights(model.state_dict(), {name: weight.float() for name, weight in stored.items()})


def test_shipped_code_is_that_of_the_repository():
    """Copies, since links break in clones on Windows and in uploads to the Hub."""
    code = sorted(ROOT.glob("*_bat.py"))
    assert {file.name for file in code} == {file.name for file in BAT_TINY.glob("*.py")}
    for file in code:
        is_same = file.read_bytes() == (BAT_TINY / file.name).read_bytes()
        assert is_same, f"{file.name} has changed; copy it with: cp *_bat.py examples/bat-tiny/"


LOAD_WITH_REMOTE_CODE = """
import sys
from transformers import AutoFeatureExtractor, AutoModel, pipeline
folder, sound = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
embed = pipeline("feature-extraction", model=folder, trust_remote_code=True)
assert "bat_audio" not in sys.modules and type(model).__module__.startswith("transformers_modules")
features = extractor(extractor.load_audio(sound), sampling_rate=16000, padding="longest", return_tensors="pt")
print(model.dtype, model(**features).pooler_output.shape, len(embed(sound)))
print(model.state_dict()["cls_token"].double().sum().item())
"""


@pytest.mark.slow
def test_shipped_folder_loads_with_the_code_in_it(tmp_path):
    arguments = BAT_TINY, EXAMPLES / "tabla_loop_44k.mp3"
    printed = run_code(LOAD_WITH_REMOTE_CODE, *arguments, cwd=tmp_path, HF_MODULES_CACHE=tmp_path / "modules").stdout
    size, cls_token = printed.splitlines()
    assert size == "torch.float32 torch.Size([1, 192]) 192"
    assert float(cls_token) == load_file(BAT_TINY / "model.safetensors")["cls_token"].double().sum().item()


def test_results_are_of_the_shipped_weights():
    assert RESULTS["weights_sha256"] == hashlib.sha256((BAT_TINY / "model.safetensors").read_bytes()).hexdigest()


def test_nothing_collapsed_in_the_training():
    """Targets differ between clips all the time, and CLS tokens by much of what the targets' means differ by."""
    assert RESULTS["log"][-1]["step"] >= 4500
    for line in RESULTS["log"]:
        assert line["target_variance"] > 0.7
        assert line["cls_variance"] > 0.5 * line["mean_target_variance"] > 5e-4
    losses = [line["local_loss"] for line in RESULTS["log"]]
    assert losses[-1] < 0.5 * losses[0]


def test_shipped_results_are_better_by_the_margins():
    assert MARGINS.keys() == RESULTS["frozen"].keys()
    for task, least in MARGINS.items():
        margins = bat_tiny.margins(RESULTS["frozen"][task])
        assert margins.keys() == least.keys()
        assert all(margins[method] > least[method] for method in least), (task, margins)


def test_card_has_the_results():
    card = (BAT_TINY / "README.md").read_text()
    for task, rows in RESULTS["frozen"].items():
        for name, scores in rows.items():
            cells = " | ".join(bat_tiny.percentages(scores))
            assert f"| {task} | {name} | {cells} |".replace("_", r"\_") in card
    for task, scores in RESULTS["heads"].items():
        assert f"| {task} | {' | '.join(bat_tiny.percentages(scores))} |".replace("_", r"\_") in card
    assert (BAT_TINY / "plots" / "pretraining.png").exists()


def test_speech_is_more_like_speech_than_untrained_or_by_the_features():
    """In the demo, whose two voices speak different languages, one of them over a telephone."""
    english, french = (EXAMPLES / name for name in ("speech_en_8k.wav", "speech_fr_16k.flac"))
    others = sorted(set(EXAMPLES.glob("*_*k.*")) - {english, french})
    model, processor = load_pretrained_encoder(checkpoint=BAT_TINY), load_audio_processor(num_frames=None)
    cosines = similarities(model, [english, french, *others])
    assert cosines[0, 1:].argmax() == 0
    torch.manual_seed(0)
    untrained = similarities(BatModel(model.config).eval(), [english, french, *others])
    features = torch.stack(
        [time_statistics(processor.log_mel(processor.load_audio(file))[0, 0]) for file in (english, french, *others)]
    )
    features = torch.nn.functional.normalize(features - features.mean(dim=0), dim=1)
    assert cosines[0, 1] > max(untrained[0, 1], features[0] @ features[1]) + 0.1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="the program espeak-ng speaks the words")
def test_words_are_told_apart_better_than_without_training(tmp_path):
    """Other words, voices and noise than it was judged on."""
    make_speech_commands(tmp_path / "tasks" / "words", train_utterances=15, test_utterances=15)
    bat_tiny.initial_encoder(tmp_path / "tasks" / "words" / "train").save_pretrained(tmp_path / "initial")
    bat_tiny.random_encoder().save_pretrained(tmp_path / "random")
    encoders = {"BAT-tiny": BAT_TINY, "initial": tmp_path / "initial", "random": tmp_path / "random"}
    with threadpool_limits(THREADS):
        results = bat_tiny.evaluate(encoders, tmp_path / "tasks")["words"]
    margins = bat_tiny.margins(results)
    assert margins["5 nearest neighbours"] > 2
    assert margins["linear probe"] > 5


@pytest.mark.slow
def test_build_makes_what_is_missing(tmp_path, monkeypatch):
    """All of it, with two steps, on sounds of two classes; what is there is not made again."""
    made = []
    monkeypatch.setattr(bat_tiny, "make_sounds", lambda folder: made.append(folder) or make_tones(folder))
    few = {"steps": 2, "num_workers": 1, "report_to": "none"}
    recipe = {**bat_tiny.RECIPE, **few, "batch_size": 2, "gradient_accumulation": 1}
    monkeypatch.setattr(bat_tiny, "RECIPE", recipe)
    monkeypatch.setattr(bat_tiny, "PROBE", {**bat_tiny.PROBE, **few, "eval_every": 2})
    work = tmp_path / "build"
    bat_tiny.build(work)
    encoder, model = BatModel.from_pretrained(work / "encoder"), BatModel.from_pretrained(work / "model")
    assert_same_weights(model.state_dict(), encoder.half().float().state_dict())
    assert {weight.dtype for weight in load_file(work / "model" / "model.safetensors").values()} == {torch.float16}
    assert load_pretrained_encoder(checkpoint=work / "model").dtype == torch.float32
    assert {file.name for file in BAT_TINY.glob("*.*")} <= {file.name for file in (work / "model").glob("*.*")}
    stored, shipped = (json.loads((folder / "config.json").read_text()) for folder in (work / "model", BAT_TINY))
    for name in ("auto_map", "custom_pipelines", "dtype"):
        assert stored[name] == shipped[name]
    assert model.num_parameters() < 3e6
    assert sum(file.stat().st_size for file in (work / "model").rglob("*") if file.is_file()) < 8e6
    results = json.loads((work / "model" / "results.json").read_text())
    assert set(results["frozen"]["pitch"]) == {"BAT-tiny", "initial", "random", "log-mel"}
    assert set(results["heads"]["pitch"]) == set(bat_tiny.HEADS)
    assert results["frozen"]["pitch"]["log-mel"] == {"5 nearest neighbours": 1.0, "linear probe": 1.0}
    assert [line["step"] for line in results["log"]] == [2]
    card = (work / "model" / "README.md").read_text()
    assert "for 2 steps" in card
    for name, scores in results["frozen"]["pitch"].items():
        assert f"| pitch | {name} | {' | '.join(bat_tiny.percentages(scores))} |" in card
    assert f"| pitch | {' | '.join(bat_tiny.percentages(results['heads']['pitch']))} |" in card
    assert (work / "model" / "plots" / "pretraining.png").exists()
    shutil.rmtree(work / "model")
    before = (work / "encoder" / "model.safetensors").stat().st_mtime_ns
    bat_tiny.build(work)
    assert made == [work / "sounds"]
    assert (work / "encoder" / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads((work / "model" / "results.json").read_text()) == results


def make_tones(folder: Path):
    """A low and a high tone in noise, as the task of `make_sounds`' layout."""
    rng = np.random.default_rng(0)
    time = np.arange(16000) / 16000
    for part in (*(f"pretrain/{kind}" for kind in SCENES), "tasks/pitch/train", "tasks/pitch/test"):
        for label, frequency in (("low", 300), ("high", 3000)):
            (folder / part / label).mkdir(parents=True)
            for number in range(6):
                sound = 0.5 * np.sin(2 * np.pi * frequency * time) + 0.01 * rng.standard_normal(len(time))
                soundfile.write(folder / part / label / f"{number}.flac", sound, 16000)
    packages = {"sounds": {"version": "1.0", "taken": "tones", "licences": ["CC0"]}}
    parts = {part: {"files": 12, "seconds": 12.0} for part in (*(f"pretrain/{kind}" for kind in SCENES), "pitch/test")}
    sources = {"packages": packages, "parts": parts}
    (folder / "sources.json").write_text(json.dumps(sources))
