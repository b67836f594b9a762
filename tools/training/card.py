"""Model cards, README.md with metadata for the Hub: of a trained BAT classifier, with plots, and of an encoder."""

import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

from bat_audio.modeling_bat import BatForClassification, BatModel
from bat_audio_tools.names import hub_id, one_line, public_name

# A card's text names so many classes. Where there are more, a table that unfolds has all of them.
LISTED_CLASSES = 10
LOSS_PLOT = "plots/loss.png"
PRETRAINING_PLOT = "plots/pretraining.png"
BLOCKS_PLOT = "plots/block_weights.png"
CAPTIONS = {
    LOSS_PLOT: "Loss and validation metrics over the training steps",
    PRETRAINING_PLOT: "Losses, and the variances over clips that a collapse would bring to zero, over the steps",
    BLOCKS_PLOT: "Weights with which the head mixes the blocks of the encoder",
}
METRIC_NAMES = {"loss": "Loss", "accuracy": "Accuracy", "map": "mAP", "f1": "F1"}
EFFORT = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")
# These are Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
HEADS = {
    "linear": "a linear layer on the last block's {pooled}",
    "linear_cgp": "a linear layer on a learnt mix of all blocks' {pooled}",
    "cgp": "convex gated probing: {prototypes} prototypes compared with a learnt mix of all blocks",
    "protobin": "{prototypes} binary prototypes compared with the last block's patch tokens",
}
CLIP_SNIPPET = """\
from transformers import pipeline

classifier = pipeline("audio-classification", model=".", trust_remote_code=True)
for prediction in classifier("clip.wav", top_k=5):  # a path, or an array of mono samples at {rate} Hz
    print(f"{{prediction['score']:.3f}} {{prediction['label']}}")
"""
FRAME_SNIPPET = """\
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioFrameClassification

extractor = AutoFeatureExtractor.from_pretrained(".", trust_remote_code=True)
model = AutoModelForAudioFrameClassification.from_pretrained(".", trust_remote_code=True).eval()
waveform = extractor.load_audio("clip.wav")
inputs = extractor(waveform, sampling_rate={rate}, padding="longest", return_tensors="pt")
with torch.inference_mode():
    logits = model(**inputs).logits  # (1, steps of {step} ms, classes)
for event in model.decode_events(logits, durations=[len(waveform) / {rate}])[0]:
    print(f"{{event['onset']:.2f}} to {{event['offset']:.2f}} s: {{event['label']}} ({{event['score']:.2f}})")
"""
ENCODER_BODY = """\
# {name}

A [BAT](https://arxiv.org/abs/2602.16305) (Better Audio Transformer) encoder of {blocks} blocks and width {width}; \
{parameters:,} parameters. It turns {seconds:g} s of sound into {patches} patch tokens and one embedding.

With `pip install torch transformers soundfile soxr`, in this folder; elsewhere its path, or the name of its Hub \
repository, takes the place of `"."`. `trust_remote_code` lets the code in this repository run on your machine.

```python
from transformers import pipeline

embed = pipeline("feature-extraction", model=".", trust_remote_code=True)
embedding = embed("clip.wav")  # a path, or an array of mono samples at {rate} Hz
print(len(embedding))
```

`AutoModel`, `AutoModelForAudioClassification` and `AutoModelForAudioFrameClassification` load it too; the last two \
put a new head on it, which is to be trained. {origin}
"""


def write_encoder_card(
    folder: str | Path,
    model: BatModel,
    name: str,
    *,
    base_model: str | Path | None = None,
    num_recordings: int | None = None,
    hours: float | None = None,
    settings: Mapping[str, Any] | None = None,
    log_history: Sequence[Mapping[str, float]] | None = None,
) -> Path:
    """Write README.md for a saved encoder and return its path.

    The card says what the model itself shows, and what is given here of its pre-training. Of paths it shows the last
    part alone.

    Args:
        folder: where `model.save_pretrained` has saved the model. Its README.md is replaced.
        base_model: what pre-training went on from: a Hub repository, a path, or a name.
        num_recordings, hours: what it was pre-trained on.
        settings: of the pre-training, for a table.
        log_history: of the pre-training, for plots/pretraining.png.
    """
    config = model.config
    metadata = ModelCardData(
        library_name="transformers",
        license="mit",
        pipeline_tag="feature-extraction",
        tags=["audio", "audio-embeddings", "bat", "custom_code"],
    )
    body = ENCODER_BODY.format(
        name=_escape(name),
        blocks=config.num_hidden_layers,
        width=config.hidden_size,
        parameters=model.num_parameters(),
        seconds=config.input_shape[0] * config.hop_length / config.sample_rate,
        patches=math.prod(config.grid_size),
        rate=config.sample_rate,
        origin=_pretraining_origin(num_recordings, hours, base_model),
    )
    if settings:
        rows = ((key, public_name(value)) for key, value in settings.items())
        body += f"\n## Pre-training\n\n{table(('Setting', 'Value'), rows)}\n"
    if log_history:
        figure = pretraining_figure(log_history)
        (Path(folder) / PRETRAINING_PLOT).parent.mkdir(exist_ok=True)
        figure.savefig(Path(folder) / PRETRAINING_PLOT, dpi=150)
        body += f"\n![{CAPTIONS[PRETRAINING_PLOT]}]({PRETRAINING_PLOT})\n"
    path = Path(folder) / "README.md"
    path.write_text(f"---\n{metadata.to_yaml()}\n---\n\n{body}", encoding="utf-8")
    return path


def _pretraining_origin(num_recordings: int | None, hours: float | None, base_model: str | Path | None) -> str:
    if num_recordings is None:
        return "This card says nothing about what the encoder was trained on."
    begin = "random weights" if base_model is None else _reference(base_model, "https://huggingface.co/")
    return f"It was pre-trained from {begin} on {num_recordings:,} recordings of {hours:,.1f} hours, without labels."


def write_card(
    folder: str | Path,
    model: BatForClassification,
    *,
    name: str | None = None,
    base_model: str | Path | None = None,
    dataset: str | Path | None = None,
    evaluation: str | None = None,
    metrics: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    log_history: Sequence[Mapping[str, float]] | None = None,
    num_clips: int | None = None,
) -> Path:
    """Write README.md and plots/ into the folder of a saved model and return the card's path.

    The card says only what is given here and what the model itself shows. Of paths it shows the last part alone.

    Args:
        folder: where `model.save_pretrained` has saved the model. Its README.md is replaced.
        model: a `BatForAudioClassification` or `BatForAudioFrameClassification`.
        name: of the model; None for the folder's.
        base_model: what training started from: a Hub repository, a path, or a name.
        dataset: what it was trained on: a Hub dataset, a path, or a name.
        evaluation: the data that the metrics were measured on and that chose the best of the checkpoints evaluated.
        metrics: values measured on the evaluation data, with or without Trainer's "eval_" in front.
        settings: of the training, for a table.
        log_history: as in Trainer's `state.log_history`, for plots/loss.png.
        num_clips: how many clips it was trained on.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Save the model there first (model.save_pretrained).")
    name = one_line(name or public_name(folder))
    metrics = _plain_metrics(metrics or {})
    figures = {}
    if any("loss" in entry or "eval_loss" in entry for entry in log_history or ()):
        figures[LOSS_PLOT] = loss_figure(log_history)
    if model.head.block_attention is not None:
        figures[BLOCKS_PLOT] = block_weights_figure(model.head.block_attention)
    metadata = _metadata(name, base_model, dataset, evaluation, metrics)
    if model.head.per_frame:  # For this kind of model, the Hub would show a pipeline call that fails.
        metadata.pipeline_tag = None
    checkpoints = len({entry["step"] for entry in log_history or () if "eval_loss" in entry})
    measured = _measured(evaluation, checkpoints)
    body = _body(model, name, base_model, dataset, measured, metrics, settings or {}, num_clips, set(figures))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".card.") as partial:
        (Path(partial) / "plots").mkdir()
        for file, figure in figures.items():
            figure.savefig(Path(partial) / file, dpi=150)
        (Path(partial) / "README.md").write_text(f"---\n{metadata.to_yaml()}\n---\n\n{body}", encoding="utf-8")
        for file in (*figures, "README.md"):
            (folder / file).parent.mkdir(exist_ok=True)
            os.replace(Path(partial) / file, folder / file)
    return folder / "README.md"


def loss_figure(log_history: Sequence[Mapping[str, float]]) -> "matplotlib.figure.Figure":  # noqa: F821
    """Training and validation loss over the steps and, where there are any, the validation metrics below them.

    Args:
        log_history: dicts with `step` and some of `loss`, `eval_loss` and other `eval_...`, as Trainer logs them; up to
            the end of training.
    """
    curves = {}
    for entry in log_history:
        # The training ended here. What is evaluated later is the best model, whatever step it is from.
        if "train_runtime" in entry:
            break
        for key, value in entry.items():
            if key == "loss" or (key.startswith("eval_") and key.removeprefix("eval_") not in EFFORT):
                curves.setdefault(key, {})[entry["step"]] = value
    losses = {"loss": "Training", "eval_loss": "Validation"}
    scores = [key for key in curves if key not in losses]
    figure, axes = _figure(panels=2 if scores else 1)
    styles = dict(zip(losses, ({"color": BLUE, "marker": "."}, {"color": VERMILION, "marker": "o"}), strict=True))
    for number, key in enumerate(scores):
        styles[key] = {"color": (GREEN, PURPLE, ORANGE, SKY)[number % 4], "marker": "sD^v"[number % 4]}
    for key, curve in curves.items():
        axis, label = (axes[0], losses[key]) if key in losses else (axes[-1], _metric_name(key))
        axis.plot(*zip(*curve.items(), strict=True), label=label, markersize=4, **styles[key])
    axes[0].set_ylabel("Loss")
    if scores:
        axes[-1].set_ylabel("Validation metric")
    for axis in axes:
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("Training step (optimiser updates)")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def pretraining_figure(log_history: Sequence[Mapping[str, float]]) -> "matplotlib.figure.Figure":  # noqa: F821
    """Losses of a pre-training over the steps, and the variances over clips that would go to zero in a collapse.

    Args:
        log_history: dicts with `step` and what `MaskedRegression` gives.
    """
    panels = (
        ("Loss", {"local_loss": "Local", "global_loss": "Global"}),
        (
            "Variance",
            {"target_variance": "Targets", "mean_target_variance": "Mean target", "cls_variance": "CLS token"},
        ),
    )
    figure, axes = _figure(panels=len(panels))
    steps = [entry["step"] for entry in log_history]
    for axis, (label, curves) in zip(axes, panels, strict=True):
        for (key, name), colour in zip(curves.items(), (BLUE, VERMILION, GREEN), strict=False):
            axis.plot(steps, [entry[key] for entry in log_history], color=colour, label=name)
        axis.set_ylabel(label)
        axis.set_yscale("log")
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("Training step (optimiser updates)")
    return figure


def block_weights_figure(block_attention: torch.Tensor) -> "matplotlib.figure.Figure":  # noqa: F821
    """Bars of the weights softmax(block_attention) (L,) with which a head mixes the encoder's blocks."""
    weights = block_attention.detach().float().cpu().softmax(dim=0).tolist()
    figure, (axis,) = _figure(panels=1)
    blocks = range(1, len(weights) + 1)
    axis.bar(blocks, weights, color=BLUE, width=0.75)
    axis.axhline(1 / len(weights), color=VERMILION, linestyle="--", label="Equal weights")
    axis.set_xticks(blocks)
    axis.set_xlabel("Block of the encoder (1 is next to the input)")
    axis.set_ylabel("Weight (all add up to 1)")
    axis.set_ylim(0, 1.2 * max(weights))  # This leaves room for the legend.
    axis.legend(frameon=False)
    return figure


def _figure(panels: int):
    try:
        from matplotlib.figure import Figure  # Without pyplot there are no windows and no global state.
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "bat-audio[train]"') from error
    figure = Figure(figsize=(7, 0.6 + 2.6 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    plain = {key.removeprefix("eval_"): float(value) for key, value in metrics.items()}
    return {key: value for key, value in plain.items() if key not in (*EFFORT, "epoch")}


def _metric_name(key: str) -> str:
    key = key.removeprefix("eval_")
    return METRIC_NAMES.get(key, key)


def _measured(evaluation: str | None, checkpoints: int) -> str:
    """Say what data the metrics were measured on, and whether the same data chose the model."""
    if evaluation is None:
        return "Measured on data that this card does not name."
    chosen = (
        f" The model is the best of {checkpoints} checkpoints on these same clips, so on new ones expect a little less."
    )
    data = _reference(evaluation, "https://huggingface.co/datasets/")
    return f"Measured on {data}.{chosen if checkpoints > 1 else ''}"


def _metadata(
    name: str,
    base_model: str | Path | None,
    dataset: str | Path | None,
    evaluation: str | None,
    metrics: dict[str, float],
) -> ModelCardData:
    evaluated_on = "unknown" if evaluation is None else public_name(evaluation)  # The Hub requires a name.
    results = [
        EvalResult(
            task_type="audio-classification",
            task_name="Audio Classification",
            dataset_type=evaluated_on,
            dataset_name=evaluated_on,
            metric_type=key,
            metric_name=_metric_name(key),
            metric_value=value,
        )
        for key, value in metrics.items()
        if key != "loss" and math.isfinite(value)
    ]
    return ModelCardData(
        library_name="transformers",
        license="mit",
        pipeline_tag="audio-classification",
        tags=["audio", "bat", "custom_code"],
        base_model=hub_id(base_model),
        datasets=[hub_id(dataset)] if hub_id(dataset) else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _body(
    model: BatForClassification,
    name: str,
    base_model: str | Path | None,
    dataset: str | Path | None,
    measured: str,
    metrics: dict[str, float],
    settings: Mapping[str, Any],
    num_clips: int | None,
    plots: set[str],
) -> str:
    config, per_frame = model.config, model.head.per_frame
    is_single_label = config.problem_type == "single_label_classification" or not (per_frame or config.problem_type)
    step = config.patch_size[0] * config.hop_length * 1000 // config.sample_rate  # ms
    labels = [config.id2label[index] for index in range(config.num_labels)]
    pooled = "CLS token" if config.head_pooling == "cls" else "mean patch token"
    pooled = "patch tokens at each time step" if per_frame else pooled
    head = HEADS[config.head_type].format(pooled=pooled, prototypes=f"{config.num_prototypes:,}")
    parts = (f"{num_clips:,} clips" if num_clips else "", _reference(dataset, "https://huggingface.co/datasets/"))
    data = " of ".join(filter(None, parts)) or "data that this card does not name"
    origin = f", starting from {_reference(base_model, 'https://huggingface.co/')}" if base_model is not None else ""
    snippet = (FRAME_SNIPPET if per_frame else CLIP_SNIPPET).format(rate=config.sample_rate, step=step)
    forced = " A sound of another kind gets one of them all the same." if is_single_label else ""

    sections = [
        f"# {_escape(name)}",
        f"Classifies sound: {'one' if is_single_label else 'any number'} of {len(labels)} classes for "
        f"{f'every {step} ms of a recording' if per_frame else 'a clip'}. Trained on {data}{origin}.",
        "The model is a [BAT](https://arxiv.org/abs/2602.16305) (Better Audio Transformer) encoder of "
        f"{config.num_hidden_layers} blocks and width {config.hidden_size} with {head}; "
        f"{model.num_parameters():,} parameters in all.",
        "## Classes",
        _class_list(labels),
        "## Use",
        "With `pip install torch transformers soundfile soxr`, in this folder; elsewhere its path, or the name of its "
        'Hub repository, takes the place of `"."`. `clip.wav` is a sound file of any sampling rate and length (WAV, '
        "FLAC, OGG or MP3). `trust_remote_code` lets the code in this repository run on your machine.",
        f"```python\n{snippet}```",
        f"Scores lie between 0 and 1 {'and add up to 1 over the classes' if is_single_label else 'for each class'}.",
    ]
    if metrics:
        rows = ((_metric_name(key), f"{value:.4f}") for key, value in metrics.items())
        sections += ["## Evaluation", measured, table(("Metric", "Value"), rows)]
    if settings or plots:
        sections.append("## Training")
    if settings:
        sections.append(table(("Setting", "Value"), ((key, public_name(value)) for key, value in settings.items())))
    sections += [f"![{caption}]({file})" for file, caption in CAPTIONS.items() if file in plots]
    sections += [
        "## Limitations",
        f"- The model was trained on {data}. This card says nothing about recordings unlike those.\n"
        f"- It knows its {len(labels)} classes and no others.{forced}\n"
        f"- It hears mono sound at {config.sample_rate} Hz, so nothing above {config.sample_rate // 2} Hz, and scales "
        "the features of each clip by the clip's own extremes, so that absolute loudness is lost.",
        "## Versions",
        table(("Library", "Version"), [("Transformers", transformers.__version__), ("PyTorch", torch.__version__)]),
    ]
    return "\n\n".join(sections) + "\n"


def _class_list(labels: list[str]) -> str:
    """The first classes in a sentence and, where there are more, all of them in a table that unfolds."""
    first = ", ".join(map(_escape, labels[:LISTED_CLASSES]))
    if len(labels) <= LISTED_CLASSES:
        return f"{first}."
    listed = table(("Index", "Class"), enumerate(labels))
    return (
        f"{first} and {len(labels) - LISTED_CLASSES} more.\n\n"
        f"<details>\n<summary>All {len(labels)} classes</summary>\n\n{listed}\n\n</details>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown of a table whose cells show as they are."""
    lines = [header, ["---"] * len(header), *([_escape(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Text as one line of Markdown that shows it as it is: no markup, no HTML, no table borders, no mathematics."""
    return re.sub(r"([\\`*_\[\]<>|~$&#!])", r"\\\1", one_line(text))


def _reference(value: Any, host: str) -> str:
    """A link to the Hub, or the bare name; nothing for None."""
    if value is None:
        return ""
    return f"[{_escape(value)}]({host}{value})" if hub_id(value) else _escape(public_name(value))
