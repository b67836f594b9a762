"""A real training run: ten spoken words, learned from random weights, recognised from voices never heard before."""

import shutil
from pathlib import Path

import pytest
import torch
from speech_commands import WORDS, make_speech_commands
from transformers import AutoModelForAudioClassification, pipeline

from bat_audio import BatConfig, BatModel
from bat_audio_tools.finetune import finetune
from bat_audio_tools.settings import FinetuneSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("training"),  # trained once
    pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="the program espeak-ng speaks the words"),
]
# Three blocks of width 64 over clips of one second, cut into 7 x 8 patches.
ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layer_norm_first": True,
    "input_shape": [112, 128],
    "chunk_time_patches": 7,
}
GOOD_ACCURACY = 0.9


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "speech"
    make_speech_commands(folder)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """An encoder of random weights, whose patch embedding is large enough to be heard beside the positions.

    As initialised the sounds are a tenth of the size of the positions, which costs a run this short its first half.
    """
    torch.manual_seed(0)
    model = BatModel(BatConfig(**ENCODER))
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(10)
        model.patch_embed.proj.bias.copy_(-0.3 * model.patch_embed.proj.weight.sum((1, 2, 3)))  # 0.3: the mean feature
    folder = tmp_path_factory.mktemp("untrained")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(speech) -> dict:
    """Validation takes place once, after the last step: nothing is chosen by the test clips."""
    return {
        "train": str(speech / "train"),
        "validation": str(speech / "test"),
        "batch_size": 32,
        "layer_decay": 1.0,
        "num_frames": 112,
        "roll": False,
        "freq_masks": 0,
        "time_masks": 0,
        "drop_path": 0.0,
        "eval_every": 10**6,
        "num_workers": 1,
        "report_to": "none",
        "bf16": False,
    }


@pytest.fixture(scope="module")
def trained(options, untrained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "words"
    changes = {"epochs": 12, "learning_rate": 2e-3, "head_pooling": "mean", "mixup": 0.5}
    finetune(FinetuneSettings(out=str(out), checkpoint=str(untrained), **options, **changes))
    return out


def test_ten_words_from_scratch(trained, speech):
    classify = pipeline("audio-classification", model=str(trained), trust_remote_code=True)
    files = sorted((speech / "test").rglob("*.wav"))
    found = [scores[0]["label"] for scores in classify([str(file) for file in files], batch_size=40, top_k=1)]
    accuracy = sum(label == file.parent.name for label, file in zip(found, files, strict=True)) / len(files)
    print(f"fine-tuned from scratch: accuracy {accuracy:.4f} on {len(files)} clips of unheard voices")
    assert sorted(set(found)) == sorted(WORDS)
    assert accuracy > GOOD_ACCURACY


@pytest.mark.parametrize("head", ["linear", "linear_cgp", "cgp", "protobin"])
def test_every_head_probes_the_frozen_encoder(trained, options, tmp_path, head):
    out = tmp_path / head
    changes = {"preset": "probe", "head": head, "epochs": 2, "num_prototypes": 256, "head_pooling": "mean"}
    metrics = finetune(FinetuneSettings(out=str(out), checkpoint=str(trained), **options, **changes))
    print(f"probe with head {head}: {metrics}")
    assert metrics["accuracy"] > GOOD_ACCURACY
    before, after = (AutoModelForAudioClassification.from_pretrained(folder) for folder in (trained, out))
    for name, tensor in before.bat.state_dict().items():
        assert torch.equal(tensor, after.bat.state_dict()[name]), name
