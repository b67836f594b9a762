"""Model cards: metadata that the Hub reads, text that shows every name as it is, snippets that run, true plots."""

import re
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config
from huggingface_hub import ModelCard
from programs import run_code

from bat_audio import BatFeatureExtractor, BatForAudioClassification, BatForAudioFrameClassification, BatModel
from bat_audio_tools.training.card import block_weights_figure, loss_figure, write_card, write_encoder_card

ODD_NAMES = [
    "rain | wind",
    "<b>bold</b>",
    "</details>",
    "`code`",
    "*a* _b_ ~~c~~",
    "[link](https://example.org)",
    "![picture](x.png)",
    "$x^2$",
    "&amp;",
    "back\\slash \\| end\\",
    "---",
    "# heading",
    "- item: 'quoted' \"twice\"",
    "犬 🚒 naïve",
]
HISTORY = [
    {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.5, "step": 10},
    {"eval_loss": 1.8, "eval_accuracy": 0.4, "eval_map": 0.3, "eval_runtime": 2.0, "epoch": 0.5, "step": 10},
    {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 5e-4, "epoch": 1.0, "step": 20},
    {"eval_loss": 1.1, "eval_accuracy": 0.7, "eval_map": 0.6, "eval_runtime": 2.0, "epoch": 1.0, "step": 20},
    {"train_runtime": 9.0, "train_loss": 1.5, "epoch": 1.0, "step": 20},
    {"eval_loss": 0.9, "eval_accuracy": 0.8, "eval_map": 0.7, "eval_runtime": 2.0, "epoch": 1.0, "step": 20},
]


def saved(folder, labels=("rain", "wind"), cls=BatForAudioClassification, **changes):
    torch.manual_seed(0)
    settings = {"problem_type": "single_label_classification", "num_prototypes": 5, **changes}
    model = cls(tiny_config(id2label=dict(enumerate(labels)), **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def metadata_of(card):
    return ModelCard.load(card).data.to_dict()


def test_metadata(tmp_path):
    model = saved(tmp_path / "my-model")
    card = write_card(
        tmp_path / "my-model",
        model,
        base_model="lrauch/BAT-vit-b16-pretrainedAS2M",
        dataset="someone/sounds",
        evaluation="someone/other-sounds",
        metrics={"eval_loss": 0.5, "eval_accuracy": np.float32(0.75), "eval_f1": float("nan"), "eval_runtime": 3.0},
    )
    result = {
        "task": {"type": "audio-classification", "name": "Audio Classification"},
        "dataset": {"type": "someone/other-sounds", "name": "someone/other-sounds"},
        "metrics": [{"type": "accuracy", "name": "Accuracy", "value": 0.75}],
    }
    assert metadata_of(card) == {
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "audio-classification",
        "tags": ["audio", "bat", "custom_code"],
        "base_model": "lrauch/BAT-vit-b16-pretrainedAS2M",
        "datasets": ["someone/sounds"],
        "model-index": [{"name": "my-model", "results": [result]}],
    }
    text = card.read_text(encoding="utf-8")
    assert "Measured on [someone/other-sounds](https://huggingface.co/datasets/someone/other-sounds)." in text
    assert "| Accuracy | 0.7500 |" in text
    assert "| Loss | 0.5000 |" in text
    assert "runtime" not in text


def test_evaluation_tells_that_its_clips_chose_the_model(tmp_path):
    known = {"evaluation": tmp_path / "held-out.csv", "metrics": {"accuracy": 0.8}}
    card = write_card(tmp_path, saved(tmp_path), log_history=HISTORY, **known)
    assert "Measured on held-out.csv. The model is the best of 2 checkpoints on these same clips" in card.read_text()
    assert metadata_of(card)["model-index"][0]["results"][0]["dataset"]["name"] == "held-out.csv"
    card = write_card(tmp_path, saved(tmp_path), log_history=HISTORY[:2], **known)
    assert "Measured on held-out.csv.\n" in card.read_text()
    card = write_card(tmp_path, saved(tmp_path), metrics={"accuracy": 0.8})
    assert "Measured on data that this card does not name." in card.read_text()


def test_card_without_anything_to_tell(tmp_path):
    card = write_card(tmp_path, saved(tmp_path), name="a: name")
    assert metadata_of(card).keys() == {"library_name", "license", "pipeline_tag", "tags"}
    text = card.read_text(encoding="utf-8")
    assert "# a: name" in text
    for absent in ("Evaluation", "Training", "None", "nan", "plots/", "started"):
        assert absent not in text
    assert not (tmp_path / "plots").exists()


def test_paths_of_the_machine_do_not_show(tmp_path, monkeypatch):
    (tmp_path / "data" / "birds").mkdir(parents=True)
    model = saved(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    settings = {
        "train": str(tmp_path / "data" / "birds"),
        "validation": Path("/home/somebody/data/frogs.csv"),
        "windows": "C:\\Users\\somebody\\data",
        "home": "~/somebody/x",
        "several": ["/home/somebody/a", "/home/somebody/b"],
        "in_memory": object(),
        "optimizer": "adamw/8bit",
        "rate": 5e-05,
        "lora": None,
    }
    for dataset in (settings["train"], "data/birds", Path("data/birds"), "./data/birds/"):
        known = {"base_model": "/home/somebody/bat", "dataset": dataset, "num_clips": 1200}
        card = write_card(tmp_path / "model", model, settings=settings, **known)
        text = card.read_text(encoding="utf-8")
        assert "Trained on 1,200 clips of birds, starting from bat." in text
        for leaked in (str(tmp_path), "somebody", "data/"):
            assert leaked not in text
        assert not metadata_of(card).keys() & {"datasets", "base_model"}
    for row in ("train | birds", "validation | frogs.csv", "windows | data", "home | x", "several | a, b",
                "in\\_memory | object", "optimizer | adamw/8bit", "rate | 5e-05", "lora | None"):  # fmt: skip
        assert f"| {row} |" in text


def rendered_cells(card):
    """The cells of the card's tables as a Markdown parser renders them, without their markup."""
    markdown_it = pytest.importorskip("markdown_it")
    body = ModelCard.load(card).text
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(body)
    assert html.count("<details>") == html.count("</details>") == 1
    return [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", html, re.DOTALL)]


def test_names_show_as_they_are(tmp_path):
    odd = [*ODD_NAMES, "two\nlines\x00\u2028end"]
    settings = {name: name for name in ODD_NAMES}
    model = saved(tmp_path / "a_b*c*", odd)
    card = write_card(tmp_path / "a_b*c*", model, evaluation="<i>| data", settings=settings, metrics={"a|b": 0.5})
    assert metadata_of(card)["model-index"][0]["name"] == "a_b*c*"
    assert metadata_of(card)["model-index"][0]["results"][0]["dataset"]["name"] == "<i>| data"
    cells = rendered_cells(card)
    expected = [cell for index, name in enumerate(ODD_NAMES) for cell in (str(index), name)]
    assert cells[: len(expected)] == expected
    assert cells[len(expected) + 1] == "two lines  end"
    assert cells[len(expected) + 2 :][:2] == ["a|b", "0.5000"]
    assert cells[len(expected) + 4 :][: 2 * len(ODD_NAMES)] == [name for name in ODD_NAMES for _ in range(2)]


def test_long_class_lists_unfold(tmp_path):
    names = [f"class {index}" for index in range(12)]
    text = write_card(tmp_path, saved(tmp_path, names)).read_text(encoding="utf-8")
    assert f"{', '.join(names[:10])} and 2 more." in text
    assert text.count("| 11 | class 11 |") == 1
    text = write_card(tmp_path, saved(tmp_path, names[:10])).read_text(encoding="utf-8")
    assert f"{', '.join(names[:10])}." in text
    assert "<details>" not in text


SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run_snippet(folder, tmp_path):
    """What the card's snippet prints in the model's folder, and the clip that it listens to."""
    waveform = np.random.RandomState(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    soundfile.write(folder / "clip.wav", waveform, 16000, subtype="FLOAT")
    (code,) = SNIPPET.findall((folder / "README.md").read_text(encoding="utf-8"))
    printed = run_code(code, cwd=folder, HF_MODULES_CACHE=tmp_path / "modules").stdout
    return printed.splitlines(), BatFeatureExtractor(), waveform


def test_clip_snippet_runs(tmp_path):
    model = saved(tmp_path / "model", problem_type="multi_label_classification")
    write_card(tmp_path / "model", model)
    printed, extractor, waveform = run_snippet(tmp_path / "model", tmp_path)
    features = extractor(waveform, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        scores = model(**features).logits[0].sigmoid()
    expected = sorted(zip(scores.tolist(), ("rain", "wind"), strict=True), reverse=True)
    assert printed == [f"{score:.3f} {label}" for score, label in expected]


def test_encoder_snippet_runs(tmp_path):
    torch.manual_seed(0)
    model = BatModel(tiny_config())
    model.save_pretrained(tmp_path / "model")
    text = write_encoder_card(tmp_path / "model", model, "a|name").read_text(encoding="utf-8")
    assert "# a\\|name" in text
    assert f"{model.num_parameters():,} parameters. It turns 10.24 s of sound into 512 patch tokens" in text
    printed, _, _ = run_snippet(tmp_path / "model", tmp_path)
    assert printed == ["32"]


def test_frame_snippet_runs(tmp_path):
    model = saved(tmp_path / "model", cls=BatForAudioFrameClassification, problem_type="multi_label_classification")
    write_card(tmp_path / "model", model)
    printed, extractor, waveform = run_snippet(tmp_path / "model", tmp_path)
    features = extractor(waveform, sampling_rate=16000, padding="longest", return_tensors="pt")
    assert "pipeline_tag" not in metadata_of(tmp_path / "model" / "README.md")
    with torch.no_grad():
        (events,) = model.decode_events(model(**features).logits, durations=[1.0])
    assert events
    assert printed == [
        f"{event['onset']:.2f} to {event['offset']:.2f} s: {event['label']} ({event['score']:.2f})" for event in events
    ]


@pytest.mark.parametrize(
    ("cls", "changes", "sentences"),
    [
        (BatForAudioClassification, {}, ["one of 2 classes for a clip", "add up to 1", "all the same"]),
        (
            BatForAudioClassification,
            {"problem_type": "multi_label_classification", "head_type": "cgp"},
            ["any number of 2 classes for a clip", "for each class", "5 prototypes"],
        ),
        (
            BatForAudioFrameClassification,
            {"problem_type": None, "head_type": "linear_cgp"},
            ["any number of 2 classes for every 160 ms", "mix of all blocks' patch tokens", "for each class"],
        ),
        (BatForAudioClassification, {"head_pooling": "mean"}, ["linear layer on the last block's mean patch token"]),
    ],
)
def test_card_describes_the_model(tmp_path, cls, changes, sentences):
    model = saved(tmp_path, cls=cls, **changes)
    text = write_card(tmp_path, model).read_text(encoding="utf-8")
    for sentence in [*sentences, f"{model.num_parameters():,} parameters", "2 blocks and width 32"]:
        assert sentence in text


def test_loss_figure_shows_the_history():
    losses, scores = loss_figure(HISTORY).axes
    curves = {line.get_label(): line.get_xydata().tolist() for axis in (losses, scores) for line in axis.lines}
    assert curves == {
        "Training": [[10, 2.0], [20, 1.0]],
        "Validation": [[10, 1.8], [20, 1.1]],
        "Accuracy": [[10, 0.4], [20, 0.7]],
        "mAP": [[10, 0.3], [20, 0.6]],
    }
    assert [line.get_label() for line in losses.lines] == ["Training", "Validation"]
    (losses,) = loss_figure([entry for entry in HISTORY if "loss" in entry]).axes
    assert losses.get_xlabel() == "Training step (optimiser updates)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bars_are_the_softmax_of_the_block_attention(dtype):
    block_attention = torch.nn.Parameter(torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=dtype))
    (axis,) = block_weights_figure(block_attention).axes
    assert [bar.get_x() + bar.get_width() / 2 for bar in axis.patches] == pytest.approx([1, 2, 3, 4])
    heights = block_attention.detach().double().softmax(0).tolist()
    assert [bar.get_height() for bar in axis.patches] == pytest.approx(heights, rel=1e-5)


def test_plots_are_written_and_shown(tmp_path):
    model = saved(tmp_path, head_type="linear_cgp")
    card = write_card(tmp_path, model, log_history=HISTORY)
    shown = re.findall(r"!\[.*?\]\((.*?)\)", card.read_text(encoding="utf-8"))
    assert shown == ["plots/loss.png", "plots/block_weights.png"]
    for file in shown:
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".card*"))


def test_history_without_evaluation_and_without_anything(tmp_path):
    history = [entry for entry in HISTORY if "eval_loss" not in entry]
    assert "plots/loss.png" in write_card(tmp_path, saved(tmp_path), log_history=history).read_text(encoding="utf-8")
    assert "plots/" not in write_card(tmp_path, saved(tmp_path), log_history=[]).read_text(encoding="utf-8")


def test_missing_folder_and_missing_matplotlib(tmp_path, monkeypatch):
    model = saved(tmp_path / "model", head_type="linear_cgp")
    with pytest.raises(FileNotFoundError, match="Save the model there first"):
        write_card(tmp_path / "elsewhere", model)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "bat-audio\[train\]"'):
        write_card(tmp_path / "model", model)
    assert not (tmp_path / "model" / "README.md").exists()
