"""Fine-tuning: accumulated, checkpointed, resumed and distributed runs equal the plain one; groups and metrics."""

import csv
import json
import math
import shutil
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import assert_same_weights, run, tiny_config
from huggingface_hub import ModelCard
from programs import Program, run_code, run_program, run_two_processes
from safetensors.torch import load_file
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    TrainerCallback,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import EvalPrediction

from bat_audio import BatConfig, BatForAudioClassification
from bat_audio.load_model import HERE, HUB_REPOSITORY
from bat_audio_tools import finetune as finetune_module
from bat_audio_tools.finetune import FinetuneTrainer, build_model, classification_metrics, finetune
from bat_audio_tools.settings import PRESETS, FinetuneSettings
from bat_audio_tools.training import trainer as trainer_module
from bat_audio_tools.training.clips import Augmentation
from bat_audio_tools.training.trainer import parameter_groups

PLAIN = {"mixup": 0.0, "freq_masks": 0, "time_masks": 0, "roll": False}  # no augmentation
SOUNDS = ("clicks", "hiss", "hum")


def sound(kind: str, seed: int, samples: int = 8000) -> np.ndarray:
    """Sounds of different texture, which a tiny network tells apart after some forty steps."""
    rng, n = np.random.default_rng(seed), np.arange(samples)
    if kind == "hiss":
        wave = rng.standard_normal(samples)
    elif kind == "clicks":
        wave = 1.0 * (n % (1600 + 100 * seed) < 16)
    else:
        wave = sum(np.sin(2 * np.pi * (100 + seed) * harmonic * n / 16000) for harmonic in range(1, 30))
    return 0.02 * wave + 0.0002 * rng.standard_normal(samples)


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    """A folder of class folders with 8 clips of half a second of each sound."""
    folder = tmp_path_factory.mktemp("data") / "sounds"
    for kind in SOUNDS:
        (folder / kind).mkdir(parents=True)
        for seed in range(8):
            soundfile.write(folder / kind / f"{seed}.wav", sound(kind, seed), 16000)
    return folder


@pytest.fixture(scope="session")
def events(tmp_path_factory) -> Path:
    """A manifest of 12 clips of two lengths, with a hiss at three times and a hum at one."""
    folder = tmp_path_factory.mktemp("events")
    rows = []
    for number in range(12):
        wave = np.zeros(int(16000 * (0.96 if number % 2 else 0.64)))
        for label, start in (("hiss", 0.16 * (number % 3)), ("hum", 0.32)):
            first = int(16000 * start)
            wave[first : first + 5120] += sound(label, number, 5120)
            rows.append([f"{number}.wav", label, start, start + 0.32])
        soundfile.write(folder / f"{number}.wav", wave, 16000)
    with (folder / "events.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "labels", "onset", "offset"], *rows])
    return folder / "events.csv"


@pytest.fixture(scope="session")
def tiny_json(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    tiny_config(input_shape=[64, 128]).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture
def options(sounds, tiny_json, tmp_path) -> dict:
    """Options of a short run from random weights, in which nothing depends on the process but augmentation."""
    return {
        "train": str(sounds),
        "out": str(tmp_path / "model"),
        "validation_fraction": 0.25,
        "untrained": True,
        "config": str(tiny_json),
        "steps": 12,
        "eval_every": 4,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "layer_decay": 1.0,
        "head_pooling": "mean",
        "drop_path": 0.0,
        "num_frames": 64,
        "num_workers": 0,
        "report_to": "none",
        "bf16": False,
    }


def trained(options: dict, **changes) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and weights of a run."""
    settings = FinetuneSettings(**{**options, **changes})
    metrics = finetune(settings)
    return metrics, load_file(Path(settings.out) / "model.safetensors")


@pytest.fixture
def trainers(monkeypatch) -> list[FinetuneTrainer]:
    """The trainers of all runs in this process; each has its number of training steps as `steps_made`."""
    made = []

    class Watched(FinetuneTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.steps_made = 0
            made.append(self)

        def training_step(self, *args, **kwargs):
            self.steps_made += 1
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(finetune_module, "FinetuneTrainer", Watched)
    return made


def give_accuracies(monkeypatch, *accuracies: float):
    """Let the next evaluations find these accuracies, and one more be an error."""
    left = iter(accuracies)
    monkeypatch.setattr(finetune_module, "classification_metrics", lambda prediction: {"accuracy": next(left)})


def checkpoints(options: dict) -> dict[int, Path]:
    """The checkpoints of a run by their step, in order."""
    folders = Path(f"{options['out']}.training").glob("checkpoint-*")
    return dict(sorted((int(folder.name.removeprefix("checkpoint-")), folder) for folder in folders))


def log_of(options: dict) -> list[dict]:
    """What Trainer logged until the last checkpoint."""
    *_, last = checkpoints(options).values()
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def assert_same_gradients(options: dict, others: dict):
    """Of every step, by the norm before clipping: AdamW and clipping make weights blind to the gradients' scale."""
    one, other = ([entry for entry in log_of(run) if "grad_norm" in entry] for run in (options, others))
    assert len(one) == len(other) == options["steps"]
    for mine, theirs in zip(one, other, strict=True):
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=2e-4)  # Transformers 4 rounds it to four digits


def command_line(options: dict) -> list[str]:
    words = ["finetune", options["train"]]
    for name, value in options.items():
        if name != "train":
            flag = name.replace("_", "-")
            words += (
                [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
            )
    return words


# Parts


def test_parameter_groups_follow_depth_and_kind():
    model = BatForAudioClassification(tiny_config(head_type="cgp", num_prototypes=5, num_labels=3))
    found = {}
    for group in parameter_groups(model, 1.0, 0.05, 0.5):
        for parameter in group["params"]:
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    named = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    assert named["head.fc.weight"] == (1.0, 0.05)
    assert named["head.fc.bias"] == (1.0, 0.0)
    assert named["head.block_attention"] == named["head.prototype_vectors"] == (1.0, 0.0)
    assert named["bat.blocks.1.attn.qkv.weight"] == (0.5, 0.05)
    assert named["bat.blocks.0.mlp.fc1.weight"] == (0.25, 0.05)
    assert named["bat.blocks.0.norm1.weight"] == (0.25, 0.0)
    assert named["bat.patch_embed.proj.weight"] == named["bat.cls_token"] == (0.125, 0.05)
    assert named["bat.pre_norm.bias"] == (0.125, 0.0)
    model.freeze_base_model()
    groups = parameter_groups(model, 1.0, 0.05, 0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.head.parameters()))


def test_metrics_of_single_labels():
    logits = np.array([[2.0, 1, 0], [0, 1, 2], [0, 3, 1], [5, 0, 0]])
    metrics = classification_metrics(EvalPrediction(logits, np.array([0, 2, 2, 0])))
    assert metrics["accuracy"] == 0.75
    assert metrics["f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_metrics_of_multiple_labels():
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0.0]])
    logits = np.array([[3.0, -1, 0], [4, 2, 0], [1, 1, 0]])
    metrics = classification_metrics(EvalPrediction(logits, labels))
    # Class 0 is ranked 2nd and 3rd, class 1 1st and 2nd; class 2 does not occur.
    assert metrics["map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2)
    assert metrics["f1"] == pytest.approx((2 * (2 / 3) / (2 / 3 + 1) + 1) / 2)


def test_presets_are_the_authors():
    probe = FinetuneSettings(train="x", out="y", preset="probe").with_preset()
    assert (probe.learning_rate, probe.beta2, probe.steps, probe.warmup * probe.steps) == (1e-3, 0.999, 4000, 400)
    assert (probe.batch_size, probe.weight_decay, probe.freeze_encoder, probe.head) == (48, 0.05, True, "cgp")
    tuned = FinetuneSettings(train="x", out="y").with_preset()
    assert (tuned.learning_rate, tuned.beta2, tuned.layer_decay) == (5e-5, 0.95, 0.75)
    assert (tuned.steps, tuned.warmup * tuned.steps, tuned.drop_path, tuned.mixup) == (40000, 4000, 0.1, 0.9)
    assert (tuned.freq_masks, tuned.time_masks, tuned.roll, tuned.multi_label_loss) == (2, 2, True, "asymmetric")
    assert FinetuneSettings(train="x", out="y", mixup=0.0).with_preset().mixup == 0.0
    assert all(value is not None for preset in PRESETS.values() for value in preset.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "fast"}, "preset='fast'"),
        ({"checkpoint": "x"}, "takes no checkpoint"),
        ({"untrained": False}, "config belongs to untrained"),
        ({"epochs": 3.0}, "give one of them"),
        ({"lora": 4, "freeze_encoder": True}, "lora=4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"warmup": 5}, "warmup=5"),
        ({"gradient_accumulation": 3}, "batch_size=8 must be a multiple of 3"),
        ({"head": "mlp"}, "head='mlp' is not known"),
        ({"mixup": 2.0}, "mixup"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"layer_decay": -1.0}, "layer_decay=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"beta2": 1.0}, "beta2=1.0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"report_to": "paper"}, "report_to='paper' is not installed"),
        ({"frames": True, "multi_label": False}, "leave multi_label out"),
    ],
)
def test_wrong_settings_are_refused_and_leave_nothing(options, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(FinetuneSettings(**{**options, **changes}))
    assert list(tmp_path.iterdir()) == []


def test_folder_in_the_way_is_refused(options, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        finetune(FinetuneSettings(**options))


# Runs


def test_run_writes_a_model_that_loads_with_its_classes_and_metrics(options, sounds):
    metrics, _ = trained(options, steps=48, eval_every=16, **PLAIN)
    folder = Path(options["out"])
    assert metrics["accuracy"] == 1.0
    assert json.loads((folder / "eval_results.json").read_text()) == metrics
    card = ModelCard.load(folder / "README.md")
    assert {"Accuracy": 1.0}.items() <= {r.metric_name: r.metric_value for r in card.data.eval_results}.items()
    assert card.data.eval_results[0].dataset_name == "a held-out 25 % of sounds"
    assert "Measured on a held-out 25 % of sounds. The model is the best of 3 checkpoints" in card.text
    assert "starting from" not in card.text

    model = AutoModelForAudioClassification.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(SOUNDS))
    assert model.config.problem_type == "single_label_classification"
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert extractor.num_frames == 64
    for label in SOUNDS:
        inputs = extractor(extractor.load_audio(sounds / label / "1.wav"), sampling_rate=16000, return_tensors="pt")
        assert model.config.id2label[model(**inputs).logits.argmax().item()] == label


def test_epochs_are_counted_in_clips(options, tmp_path):
    """4 epochs of 18 clips in batches of 8 are 9 steps; the preset has steps too."""
    options["eval_every"] = 9
    _, expected = trained(options, steps=9)
    options = {**options, "out": str(tmp_path / "epochs"), "epochs": 4.0}
    _, weights = trained({name: value for name, value in options.items() if name != "steps"})
    assert_same_weights(expected, weights)


def test_best_checkpoint_is_the_one_written(options):
    metrics, weights = trained(options, steps=24)
    scores = {entry["step"]: entry["eval_accuracy"] for entry in log_of(options) if "eval_accuracy" in entry}
    assert list(scores) == [4, 8, 12, 16, 20, 24]
    assert metrics["accuracy"] == max(scores.values())
    best = checkpoints(options)[max(scores, key=scores.get)]
    assert_same_weights(weights, load_file(best / "model.safetensors"))


@pytest.mark.parametrize("accuracies", [(0.2, 0.8), (0.8, 0.2)])
def test_last_steps_are_validated_once_and_may_be_the_best(options, monkeypatch, accuracies):
    give_accuracies(monkeypatch, *accuracies, 0.5)  # the last one is that of the model written
    _, weights = trained(options, steps=6, eval_every=4)
    assert [entry["step"] for entry in log_of(options) if "eval_loss" in entry] == [4, 6]
    best = checkpoints(options)[6 if accuracies[1] > accuracies[0] else 4]
    assert_same_weights(weights, load_file(best / "model.safetensors"))


def test_settings_reach_optimizer_schedule_and_training_data(options, trainers):
    changes = {"mixup": 0.3, "freq_masks": 1, "time_masks": 3, "roll": True, "gain_db": 4.0, "seed": 5}
    options.update(steps=20, eval_every=5, warmup=0.25, beta2=0.9, **changes)
    trained(options)
    (trainer,) = trainers
    rates = {}
    for step in range(20):  # the 20 updates, of which the first 5 warm up
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 5) / 15))
        rates[step + 1] = pytest.approx(1e-3 * step / 5 if step < 5 else 1e-6 + (1e-3 - 1e-6) * cosine)
    assert {entry["step"]: entry["learning_rate"] for entry in log_of(options) if "learning_rate" in entry} == rates
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.9)}
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), torch.optim.AdamW)
    row = trainer.train_dataset.dataset
    assert row.augmentation == Augmentation(mixup=0.3, freq_masks=1, time_masks=3, roll=True, gain_db=4.0)
    assert (row.order.shuffle, row.seed) == (True, 5)
    assert trainer.eval_dataset.augmentation == Augmentation()
    assert not trainer.eval_dataset.order.shuffle


def test_probe_leaves_the_encoder_as_it_was(options, tmp_path):
    for head in ("linear", "cgp"):
        changes = {"preset": "probe", "head": head, "num_prototypes": 7, "out": str(tmp_path / head)}
        settings = FinetuneSettings(**{**options, **changes})
        _, weights = trained(options, **changes)
        transformers.set_seed(settings.seed)
        start = build_model(settings.with_preset(), list(SOUNDS), False).state_dict()
        assert start.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, start[name]) == name.startswith("bat."), name


@pytest.mark.parametrize("kind", ["clips", "frames", "lora"])
def test_gradient_accumulation_gives_the_same_update(options, events, tmp_path, kind):
    changes = {"frames": {"train": str(events), "frames": True, **PLAIN}, "lora": {"lora": 2}}
    options.update(changes.get(kind, {}), steps=3, eval_every=3)
    accumulated = {**options, "gradient_accumulation": 4, "out": str(tmp_path / "parts")}
    _, whole = trained(options)
    _, parts = trained(accumulated)
    assert_same_weights(whole, parts, atol=2e-5)
    assert_same_gradients(options, accumulated)


@pytest.mark.parametrize("preset", ["finetune", "probe"])
def test_gradient_checkpointing_gives_the_same_weights(options, tmp_path, trainers, preset):
    """It is the default where a frozen encoder's blocks are mixed."""
    options.update(preset=preset, head="cgp", num_prototypes=7, steps=3, eval_every=3)
    _, plain = trained(options, gradient_checkpointing=False, out=str(tmp_path / "plain"))
    _, again = trained(options, gradient_checkpointing=True, out=str(tmp_path / "checkpointed"))
    assert_same_weights(plain, again, atol=1e-6)
    trained(options)
    trained(options, head="linear", out=str(tmp_path / "linear"))
    is_default = preset == "probe"
    assert [trainer.model.is_gradient_checkpointing for trainer in trainers] == [False, True, is_default, False]


def test_lora_trains_the_attention_alone_and_is_merged(options):
    settings = FinetuneSettings(**{**options, "lora": 2})
    _, weights = trained(options, lora=2, steps=8)
    transformers.set_seed(settings.seed)
    start = build_model(settings.with_preset(), list(SOUNDS), False).state_dict()
    changed = {name for name in weights if not torch.equal(weights[name], start[name])}
    adapted = {f"bat.blocks.{i}.attn.{name}.weight" for i in range(2) for name in ("qkv", "gate", "proj")}
    assert {name for name in changed if name.startswith("bat.")} == adapted
    assert weights.keys() == start.keys()
    assert {name for name in start if name.startswith("head.")} <= changed


def test_checkpoint_is_where_training_starts(options, tmp_path):
    """Fine-tuning again from a fine-tuned model: its encoder, a new head for other classes."""
    trained(options)
    again = {**options, "untrained": False, "checkpoint": options["out"], "out": str(tmp_path / "again")}
    del again["config"]
    _, weights = trained(again, preset="probe", head="linear", steps=2, eval_every=2)
    first = load_file(Path(options["out"]) / "model.safetensors")
    assert all(torch.equal(weights[name], first[name]) for name in first if name.startswith("bat."))
    assert "starting from model." in ModelCard.load(Path(again["out"]) / "README.md").text


@pytest.mark.parametrize("is_published", [True, False])
def test_card_names_the_published_weights_only_where_they_are_certain(options, tmp_path, monkeypatch, is_published):
    """A model.safetensors beside the code may be any."""
    trained(options, steps=1)
    loaded = finetune_module.load_pretrained_encoder(checkpoint=options["out"])
    monkeypatch.setattr(finetune_module, "load_pretrained_encoder", lambda checkpoint: loaded)
    found = (tmp_path / "hub" if is_published else HERE) / "model.safetensors"
    monkeypatch.setattr(finetune_module, "find_weights", lambda: found)
    options.update(untrained=False, config=None, out=str(tmp_path / "again"))
    trained(options, steps=1)
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert card.data.base_model == (HUB_REPOSITORY if is_published else None)
    assert (HUB_REPOSITORY in card.text) == is_published


def test_dataset_of_the_hub_with_splits(options, sounds, monkeypatch):
    files = sorted(map(str, sounds.rglob("*.wav")))
    table = datasets.Dataset.from_dict({"audio": files, "label": [Path(file).parent.name for file in files]})
    on_hub = {"me/sounds": datasets.DatasetDict(train=table, test=table.select(range(0, 24, 3)))}
    monkeypatch.setattr(datasets, "load_dataset", on_hub.__getitem__)
    trained(options, train="me/sounds", train_split="train", validation_split="test", steps=1)
    card = ModelCard.load(Path(options["out"]) / "README.md")
    assert card.data.datasets == ["me/sounds"]
    assert "Trained on 24 clips of [me/sounds](https://huggingface.co/datasets/me/sounds)." in card.text
    assert card.data.eval_results[0].dataset_name == "the split test of me/sounds"
    assert "Measured on the split test of me/sounds." in card.text


def test_frames_from_a_manifest(options, events):
    metrics, _ = trained({**options, "train": str(events)}, frames=True, steps=60, eval_every=20, **PLAIN)
    assert metrics["map"] > 0.98
    model = AutoModelForAudioFrameClassification.from_pretrained(options["out"])
    extractor = AutoFeatureExtractor.from_pretrained(options["out"])
    waveform = extractor.load_audio(events.with_name("1.wav"))
    logits = model(**extractor(waveform, sampling_rate=16000, return_tensors="pt")).logits
    found = {e["label"]: (e["onset"], e["offset"]) for e in model.decode_events(logits, durations=[0.64])[0]}
    assert found["hum"] == pytest.approx((0.32, 0.64))
    assert found["hiss"][0] == pytest.approx(0.16)


def test_multi_label_manifest_with_bce(options, tmp_path):
    with (tmp_path / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "labels"])
        for number in range(16):
            labels = [label for place, label in enumerate(SOUNDS) if number >> place & 1]
            parts = [sound(label, number, 2560) * (label in labels) for label in SOUNDS]
            wave = np.concatenate(parts) + 0.0002 * sound("hiss", 99, 7680)
            soundfile.write(tmp_path / f"{number}.wav", wave, 16000)
            writer.writerow([f"{number}.wav", ";".join(labels)])
    manifest = str(tmp_path / "clips.csv")
    changes = {"train": manifest, "validation": manifest, "steps": 80, "eval_every": 40, "multi_label_loss": "bce"}
    metrics, _ = trained({**options, **changes, **PLAIN})
    assert metrics["map"] > 0.9
    assert "Measured on clips.csv. The model is the best of 2" in (Path(options["out"]) / "README.md").read_text()
    assert BatConfig.from_pretrained(options["out"]).problem_type == "multi_label_classification"


# Interrupted and distributed runs


def torchrun(*words: str):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "bat_audio_tools.cli"]
    run([sys.executable, *launch, *words], CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_killed_and_resumed_run_equals_the_uninterrupted_one(options, tmp_path):
    # Dropout and drop path take part, whose random numbers must go on where they were, whichever process reads clips.
    options = {**options, "head": "cgp", "num_prototypes": 7, "drop_path": 0.3, "steps": 60, "eval_every": 10}
    expected, weights = trained(options, out=str(tmp_path / "whole"))
    options["num_workers"] = 1

    work = Path(f"{options['out']}.training")
    program = Program(*command_line(options))
    while not (work / "checkpoint-20" / "trainer_state.json").exists():
        assert program.is_running(), program.end()
        time.sleep(0.005)
    program.kill()
    assert not Path(options["out"]).exists()
    # As if it had been killed while it wrote one more checkpoint.
    partial = work / "checkpoint-30"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(work / "checkpoint-20", partial)
    (partial / "trainer_state.json").unlink()
    (partial / "optimizer.pt").write_bytes(b"half")

    result = json.loads(run_program(*command_line(options)).splitlines()[-1])
    assert {name: result[name] for name in expected} == expected
    assert_same_weights(load_file(Path(options["out"]) / "model.safetensors"), weights)


def test_begun_folder_refuses_other_settings_and_data(options, sounds, tmp_path):
    options["train"] = str(shutil.copytree(sounds, tmp_path / "sounds"))
    _, weights = trained(options)
    shutil.rmtree(options["out"])
    with pytest.raises(ValueError, match=r"other settings or data \(batch_size=8, now 4\)"):
        trained(options, batch_size=4)
    _, again = trained(options, num_workers=1, report_to="tensorboard")  # which change nothing
    assert_same_weights(weights, again)
    shutil.rmtree(options["out"])
    (tmp_path / "sounds" / "hum" / "3.wav").unlink()
    with pytest.raises(ValueError, match=r"other settings or data \(clips='24 of digest .*', now '23 of"):
        trained(options)
    shutil.rmtree(f"{options['out']}.training/", ignore_errors=False)
    trained(options)


def shorten(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def of_two_processes(checkpoint: Path):
    """As if it were of two processes, of which the second was killed before it had written its part."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "train_batch_size": 4}))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")


@pytest.mark.parametrize(
    "damage",
    [
        lambda checkpoint: shorten(checkpoint / "trainer_state.json"),
        lambda checkpoint: shorten(checkpoint / "rng_state.pth"),
        lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
        of_two_processes,
    ],
)
def test_damaged_checkpoint_gives_way_to_the_one_before(options, monkeypatch, trainers, damage):
    options.update(steps=9, eval_every=3, drop_path=0.3)  # whose random numbers must go on where they were
    give_accuracies(monkeypatch, 0.1, 0.2, 0.3, 0.3)
    metrics, weights = trained(options)
    shutil.rmtree(options["out"])
    assert list(checkpoints(options)) == [6, 9]
    damage(checkpoints(options)[9])
    give_accuracies(monkeypatch, 0.3, 0.3)
    assert trained(options)[0] == metrics
    assert_same_weights(weights, load_file(Path(options["out"]) / "model.safetensors"))
    assert [trainer.steps_made for trainer in trainers] == [9, 3]


def test_clips_that_cannot_be_read_are_named_before_training(options, sounds, tmp_path, trainers):
    options["train"] = str(shutil.copytree(sounds, tmp_path / "sounds"))
    for kind in SOUNDS:
        soundfile.write(tmp_path / "sounds" / kind / "2.wav", sound(kind, 1, 100), 16000)
    (tmp_path / "sounds" / "hum" / "7.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"4 of 24 clips .*2.wav: .*100 samples are too few.* and 1 more"):
        trained(options)
    assert trainers == []
    shutil.rmtree(tmp_path / "sounds")
    shutil.copytree(sounds, tmp_path / "sounds")
    trained(options, steps=1)  # nothing stands in the way


@pytest.mark.parametrize("library", ["matplotlib.figure", "sklearn.metrics", "peft"])
def test_missing_library_is_found_before_training(options, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'needs {library} .*pip install "bat-audio\[train\]"'):
        trained(options, lora=2)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_could_not_be_written_is_written_by_the_next_call(options, monkeypatch, trainers):
    """Without training again, though the best step is not the last."""
    options.update(steps=6, eval_every=3)
    give_accuracies(monkeypatch, 0.8, 0.2, 0.8, 0.8)

    def fill_disk(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "write_card", fill_disk)
        with pytest.raises(OSError, match="disk full"):
            trained(options)
    assert not Path(options["out"]).exists()
    best = load_file(checkpoints(options)[3] / "model.safetensors")
    _, weights = trained(options)
    assert_same_weights(weights, best)
    assert [trainer.steps_made for trainer in trainers] == [6, 0]


@pytest.mark.slow
def test_folder_in_use_is_refused(options, monkeypatch):
    """By the command line, while a run of this process is about to write its model."""
    results, write = [], finetune_module._write_folder

    def start_another_and_write(*args):
        results.append(Program(*command_line(options)).end())
        write(*args)

    monkeypatch.setattr(finetune_module, "_write_folder", start_another_and_write)
    trained(options, steps=1)
    ((status, _, errors),) = results
    assert status == 1
    assert f"error: {options['out']}.training is in use by another run" in errors


@pytest.mark.parametrize("eval_every", [6, 10**6])
def test_run_resumed_at_its_end_is_at_its_end(options, eval_every):
    options.update(steps=6, eval_every=eval_every)
    metrics, weights = trained(options)
    shutil.rmtree(options["out"])
    again, same = trained(options)
    assert again == metrics
    assert_same_weights(weights, same)


def test_bf16_and_tensorboard(options, tmp_path):
    _, single = trained(options, out=str(tmp_path / "single"))
    _, half = trained(options, bf16=True, report_to="tensorboard")
    assert_same_weights(single, half, atol=2e-2)
    assert any(not torch.equal(single[name], half[name]) for name in single)
    assert list(Path(f"{options['out']}.training").rglob("events.out.tfevents.*"))
    _, again = trained(options, out=str(tmp_path / "again"))  # Transformers 4 hands bf16 on in the environment
    assert_same_weights(single, again, atol=1e-5)


def test_several_loggers(options, monkeypatch):
    logged = []

    class Paper(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            logged.append(logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "paper", Paper)
    monkeypatch.setattr(trainer_module, "get_available_reporting_integrations", lambda: ["tensorboard", "paper"])
    for wrong in ("tensorboard,pencil", "tensorboard,none", ""):
        with pytest.raises(ValueError, match="is not installed; there are tensorboard, paper, several of them with"):
            trained(options, report_to=wrong)
    trained(options, steps=1, report_to="tensorboard, paper")
    assert logged
    assert list(Path(f"{options['out']}.training").rglob("events.out.tfevents.*"))


def test_few_clips_with_several_labels_are_reported(options, sounds, tmp_path, caplog):
    files = [[str(file), file.parent.name] for file in sorted(sounds.rglob("*.wav"))]
    files[5][1] = "hum;hiss"
    with (tmp_path / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "labels"], *files])
    caplog.set_level("WARNING")
    transformers.utils.logging.enable_propagation()
    options.update(train=str(tmp_path / "clips.csv"), steps=1, eval_every=1)
    trained(options)
    transformers.utils.logging.disable_propagation()
    assert f"1 of 24 clips have none or several labels (first: {files[5][0]})" in caplog.text
    with pytest.raises(ValueError, match="have not exactly one label"):
        trained(options, multi_label=False, out=str(tmp_path / "single"))


def test_one_class_is_refused(options, sounds, tmp_path):
    shutil.copytree(sounds / "hum", tmp_path / "sounds" / "hum")
    with pytest.raises(ValueError, match="All clips have the label hum"):
        trained(options, train=str(tmp_path / "sounds"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["finetune", "probe", "frames"])
def test_two_processes_equal_one(options, events, tmp_path, kind):
    """With uneven shares of the validation clips, of which there are 6; without dropout, which each process draws."""
    options = {**options, "preset": "finetune", "head": "linear_cgp", "steps": 6, "eval_every": 3}
    if kind == "frames":
        options.update(train=str(events), frames=True, **PLAIN)
    if kind == "probe":
        options["preset"] = kind
    alone = {**options, "out": str(tmp_path / "one")}
    expected, weights = trained(alone)
    launch = torchrun if kind == "finetune" else run_two_processes
    launch(*command_line(options))
    metrics = json.loads((Path(options["out"]) / "eval_results.json").read_text())
    assert metrics == {name: pytest.approx(value, abs=1e-4) for name, value in expected.items()}
    assert_same_weights(load_file(Path(options["out"]) / "model.safetensors"), weights, atol=1e-4)
    assert_same_gradients(alone, options)


@pytest.mark.slow
def test_accelerate_launch_with_two_processes(options, tmp_path):
    options = {**options, "steps": 4, "eval_every": 2}
    _, weights = trained(options, out=str(tmp_path / "one"))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    run([sys.executable, *launch, "-m", "bat_audio_tools.cli", *command_line(options)])
    assert_same_weights(load_file(Path(options["out"]) / "model.safetensors"), weights, atol=1e-4)


def test_errors_are_one_line(options, tmp_path):
    status, _, printed = Program(*command_line({**options, "train": str(tmp_path / "nothing")})).end()
    assert status == 2
    assert [line for line in printed.splitlines() if line.startswith("error: ")] == printed.splitlines()[-1:]
    assert "nothing" in printed
    assert "Traceback" in Program(*command_line({**options, "train": "nothing"}), "--debug").end()[2]


@pytest.mark.slow
def test_spoilt_clip_is_one_line(options, sounds, tmp_path):
    options["train"] = str(shutil.copytree(sounds, tmp_path / "sounds"))
    (tmp_path / "sounds" / "hum" / "1.wav").write_bytes(b"RIFF")
    for workers in (0, 1):
        status, _, printed = Program(*command_line({**options, "num_workers": workers})).end()
        errors = [line for line in printed.splitlines() if "error: " in line]
        assert status == 2
        assert len(errors) == 1
        assert str(Path("hum") / "1.wav") in errors[0]
        assert "Traceback" not in printed


@pytest.mark.slow
def test_folder_loads_without_the_package(options):
    trained(options, steps=2, eval_every=2)
    code = """
import sys
from transformers import pipeline
scores = pipeline("audio-classification", model=sys.argv[1], trust_remote_code=True)(sys.argv[2])
assert "bat_audio" not in sys.modules
print(sorted(score["label"] for score in scores))
"""
    sound = Path(options["train"]) / "hum" / "0.wav"
    printed = run_code(code, options["out"], sound, HF_MODULES_CACHE=Path(options["out"]).parent / "modules").stdout
    assert printed.splitlines()[-1] == str(list(SOUNDS))
