"""BAT-tiny, a small encoder for demonstrations: made from nothing, and judged on held-out sounds.

    python -m bat_tiny build/bat-tiny

makes the sounds, pre-trains on them, and writes the model with its card and results.json to build/bat-tiny/model. What
is there already is not made again, so that a stopped build goes on. Needs the extras `train` and `tiny`.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bat_audio import BatConfig, BatModel
from bat_audio.load_model import load_audio_processor, load_pretrained_encoder
from bat_audio.processing_bat import BatAudioProcessor, load_audio
from bat_audio_tools.finetune import finetune
from bat_audio_tools.folders import file_digest, whole
from bat_audio_tools.machine import require
from bat_audio_tools.pretrain import LOGGED, pretrain
from bat_audio_tools.settings import FinetuneSettings, PretrainSettings
from bat_audio_tools.training.card import table
from bat_audio_tools.training.examples import read_examples
from bat_audio_tools.training.folder import last_whole_checkpoint
from bat_tiny.demo import time_statistics, tokens_over_time
from bat_tiny.sounds import SCENES, make_sounds

# The encoder has 2.9 million parameters and takes 2.56 s of sound at a time.
CONFIG = {
    "input_shape": [256, 128],
    "chunk_time_patches": 16,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
}
PIECES = 400  # The patch projection is made from so many sounds.
# These settings are smaller than the authors': the training takes minutes on a large GPU, and most of a day on two
# CPU cores.
RECIPE = {
    "steps": 5200,
    "views": 8,
    "keep": 0.25,
    "mask_block": 3,
    "decoder_blocks": 2,
    "batch_size": 256,
    # Smaller parts fit a CPU's memory and caches.
    "gradient_accumulation": 1 if torch.cuda.is_available() else 16,
    "learning_rate": 1.2e-3,
    "warmup": 0.04,
    "ema_decay": 0.999,
    "ema_final_decay": 0.9998,
    "ema_steps": 5200,
    "num_workers": os.cpu_count(),
    "log_every": 50,
    "save_every": 500,
}
SPLITS = ("train", "test")
NEIGHBOURS = 5
STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # The linear probe chooses its inverse regularisation from these.
HEADS = ("linear", "cgp")
PROBE = {
    "preset": "probe",
    "head_pooling": "mean",
    "learning_rate": 0.01,  # This is ten times the preset's, because the steps are few.
    "steps": 400,
    "eval_every": 400,
    "gradient_checkpointing": False,
    "num_frames": 256,
    "num_prototypes": 500,
}
CARD = """\
# BAT-tiny

A small demonstration model: a [BAT](https://arxiv.org/abs/2602.16305) (Better Audio Transformer) encoder of
{parameters:,} parameters, pre-trained by masked latent regression for {steps:,} steps on {hours:.1f} hours of
scenes, put together from a few hours of sounds that any Debian machine can fetch or make. It turns every 2.56 s of
sound into 128 patch tokens and an embedding of width {width}.

**It is** for demonstrations, tests and benchmarks that want trained weights without a download. **It is not** the
published BAT, nor a small version of it: that one has heard thousands of hours of real sounds, this one a few, most
of them synthesised, and its figures say nothing about the published model. Take an encoder trained on real
recordings for real work.

```python
from transformers import pipeline

embed = pipeline("feature-extraction", model="examples/bat-tiny", trust_remote_code=True)
embedding = embed("examples/tabla_loop_44k.mp3")  # 192 numbers
```

This folder holds the code that it needs, so `AutoModel` and `AutoFeatureExtractor` load it in the same way. With the
package `bat_audio` installed, `load_pretrained_encoder(checkpoint="examples/bat-tiny")` needs no remote code, and
`bat-audio embed`, `show` and `finetune` take the model with `--checkpoint examples/bat-tiny`.

The weights are stored in float16, and the results below are of these rounded weights; the model computes in float32.
This command makes the model from nothing, in `build/bat-tiny/model`:

```bash
python -m bat_tiny build/bat-tiny
```

## Results

Accuracy on held-out sounds: voices, instruments and recordings of a task's test part are neither in its training
part nor in the pre-training, which had no labels. There are 10 families of instruments, 5 languages, 14 sources and 20
words. In `recorded_language` the recordings are others, but every language has one speaker, whose voice may give it
away. In `sound_source` half of the classes have one package each, which its actors or its way of recording may give
away.

The encoder is frozen; its patch tokens are averaged over the blocks, and of every mel band the mean and standard
deviation over time are taken. The embedding was not judged. The others are

- initial: the same of the network with the weights that its training began with, which are random but for a patch
  projection that fits the sounds;
- random: the same with a random projection too;
- log-mel: the same statistics of the features.

Neighbours are the nearest by cosine of standardised values.

{results}

Percentage points by which BAT-tiny is above the best of the others:

{margins}

Heads trained on the frozen encoder for {steps_of_heads} steps by `bat-audio finetune --preset probe
--head-pooling mean`, with a learning rate of {learning_rate} and inputs of {num_frames} frames: linear on the last
block, and cgp, convex gated probing of all blocks, with {num_prototypes} prototypes. Neither has converged after so few
steps:

{heads}

## Sounds

Made by `python -m bat_tiny.sounds` of these Debian packages, which keep their licences; the sounds do not come with the
model. Some of the sounds in the repository's `examples/` are among them.

{packages}

{training}

In a collapse the variances would go to zero. That of the mean target, which the CLS token is trained to be, is small by
construction: targets are normalised over the patches of each clip.
"""


def build(work: Path):
    """Make everything in the folder `work`: `sounds`, the pre-trained `encoder`, and the `model` to ship."""
    work.mkdir(parents=True, exist_ok=True)
    sounds, random, initial, encoder, model = (
        work / name for name in ("sounds", "random", "initial", "encoder", "model")
    )
    if not sounds.exists():
        make_sounds(sounds)
    for folder, make in ((random, random_encoder), (initial, partial(initial_encoder, sounds / "pretrain"))):
        if not folder.exists():
            with whole(folder) as begun:
                make().save_pretrained(begun)
    if not encoder.exists():
        data = [str(sounds / "pretrain" / kind) for kind in SCENES]
        pretrain(PretrainSettings(data=data, out=str(encoder), init=str(initial), **RECIPE))
    if not model.exists():
        with whole(model) as shipped:
            store(encoder, shipped)
            results = evaluate({"BAT-tiny": shipped, "initial": initial, "random": random}, sounds / "tasks")
            heads = probe(shipped, sounds / "tasks", work / "probes")
            describe(shipped, encoder, results, heads, json.loads((sounds / "sources.json").read_text()))


def random_encoder() -> BatModel:
    torch.manual_seed(0)
    return BatModel(BatConfig(**CONFIG))


def initial_encoder(sounds: Path) -> BatModel:
    """Random weights, but for a patch projection that fits the sounds in the folder.

    With random weights alone, projected patches are a tenth of the size of the positions that are added to them, and
    hardly more of a patch than its loudness is left, so that a new teacher's targets would tell little else. Here both
    are of the same size, and the projection is half whitened: the principal components of the patches count by the
    square root of what they would count otherwise.
    """
    model = random_encoder()
    projection, processor = model.patch_embed.proj, BatAudioProcessor(num_frames=None)
    files = sorted(sounds.rglob("*.*"))
    features = [processor.log_mel(load_audio(file)) for file in files[:: max(1, len(files) // PIECES)]]
    size, _, *patch = projection.weight.shape
    patches = torch.cat([nn.functional.unfold(clip, patch, stride=patch)[0] for clip in features], dim=1)
    variances, components = torch.linalg.eigh(patches.double().cov())
    variances, components = variances[-size:].clamp(min=1e-6), components[:, -size:]
    rotation = nn.init.orthogonal_(torch.empty(size, size))
    weight = rotation @ (components * variances**-0.25).T.float() / variances.sqrt().mean().sqrt()
    with torch.no_grad():
        projection.weight.copy_(weight.reshape(projection.weight.shape))
        projection.bias.copy_(-weight @ patches.mean(1))
    return model


def evaluate(encoders: dict[str, Path], tasks: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracies by task, representation and method, of frozen encoders and of log-mel features.

    Args:
        encoders: model folders by the name of the representation.
        tasks: folder of `make_sounds`, TASK/{train,test}/LABEL/*.flac.
    """
    processor = load_audio_processor(num_frames=None)
    representations = {
        name: partial(tokens_over_time, load_pretrained_encoder(checkpoint=checkpoint), processor)
        for name, checkpoint in encoders.items()
    }
    representations["log-mel"] = lambda waveform: processor.log_mel(waveform)[0, 0]  # (T, M)
    return {
        task.name: {
            name: accuracies(*(part for split in SPLITS for part in statistics(frames, task / split, processor)))
            for name, frames in representations.items()
        }
        for task in sorted(tasks.iterdir())
    }


@torch.inference_mode()
def statistics(
    frames: Callable[[torch.Tensor], torch.Tensor], sounds: Path, processor: BatAudioProcessor
) -> tuple[np.ndarray, list[str]]:
    """The `time_statistics` of what `frames` makes of every waveform, (N, 2*C), and the label of each."""
    rows, labels = [], []
    for example in read_examples(sounds):
        rows.append(time_statistics(frames(example.load(processor))).numpy())
        labels += example.labels
    return np.stack(rows), labels


def accuracies(
    train: np.ndarray, train_labels: list[str], test: np.ndarray, test_labels: list[str]
) -> dict[str, float]:
    """Accuracies of nearest neighbours by cosine, and of a linear probe whose strength the training part decides."""
    require("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    methods = {
        f"{NEIGHBOURS} nearest neighbours": KNeighborsClassifier(NEIGHBOURS, metric="cosine"),
        "linear probe": GridSearchCV(LogisticRegression(max_iter=2000), {"C": STRENGTHS}, cv=3),
    }
    return {
        name: make_pipeline(StandardScaler(), method).fit(train, train_labels).score(test, test_labels)
        for name, method in methods.items()
    }


def probe(encoder: Path, tasks: Path, work: Path) -> dict[str, dict[str, float]]:
    """Accuracies by task and head, of heads trained on the frozen encoder for a fixed number of steps."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    scores = {}
    for task in sorted(tasks.iterdir()):
        data = {"train": str(task / "train"), "validation": str(task / "test"), "checkpoint": str(encoder)}
        scores[task.name] = {}
        for head in HEADS:
            out = work / f"{task.name}-{head}"
            scores[task.name][head] = finetune(FinetuneSettings(**data, out=str(out), head=head, **PROBE))["accuracy"]
    return scores


def store(encoder: Path, out: Path):
    """Write the encoder to a new model folder, in float16, with all that loads it with remote code."""
    BatModel.from_pretrained(encoder).half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"  # The weights are stored in float16, but computed with in float32.
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def describe(model: Path, encoder: Path, results: dict, heads: dict, sources: dict):
    """Add results.json, a card that says what the model is worth, and the plots of its training.

    Args:
        model: folder of `store`.
        encoder: folder of `pretrain`, with its training folder beside it.
        results, heads: of `evaluate` and `probe`.
        sources: sources.json of `make_sounds`.
    """
    shutil.copytree(encoder / "plots", model / "plots")
    checkpoint = last_whole_checkpoint(encoder.with_name(f"{encoder.name}.training"))
    history = json.loads(Path(checkpoint, "trainer_state.json").read_text())["log_history"]
    log = [{name: entry[name] for name in ("step", *LOGGED)} for entry in history if LOGGED[0] in entry]
    digest = file_digest(model / "model.safetensors")
    figures = {"weights_sha256": digest, "frozen": results, "heads": heads, "log": log}
    (model / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
    _, metadata, body = (encoder / "README.md").read_text().split("---\n", 2)
    methods = list(next(iter(results.values()))["log-mel"])
    card = CARD.format(
        parameters=BatModel.from_pretrained(model).num_parameters(),
        steps=log[-1]["step"],
        width=CONFIG["hidden_size"],
        hours=sum(sources["parts"][f"pretrain/{kind}"]["seconds"] for kind in SCENES) / 3600,
        results=table(
            ("task", "representation", *methods),
            ((task, name, *percentages(scores)) for task, rows in results.items() for name, scores in rows.items()),
        ),
        margins=table(
            ("task", "clips tested", *methods),
            (
                (
                    task,
                    sources["parts"][f"{task}/test"]["files"],
                    *(f"{margin:+.1f}" for margin in margins(scores).values()),
                )
                for task, scores in results.items()
            ),
        ),
        steps_of_heads=PROBE["steps"],
        **{name: PROBE[name] for name in ("learning_rate", "num_frames", "num_prototypes")},
        heads=table(("task", *HEADS), ((task, *percentages(scores)) for task, scores in heads.items())),
        packages=table(
            ("package", "what was taken", "licences of the package's files"),
            (
                (f"{name} {package['version']}", package["taken"], ", ".join(package["licences"]))
                for name, package in sources["packages"].items()
            ),
        ),
        training=body[body.index("## Pre-training") :].strip(),
    )
    (model / "README.md").write_text(f"---\n{metadata}---\n\n{card}")


def margins(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Percentage points by which BAT-tiny is above the best of the others, by method; of one task's results."""
    others = [other for name, other in scores.items() if name != "BAT-tiny"]
    return {
        method: 100 * (score - max(other[method] for other in others)) for method, score in scores["BAT-tiny"].items()
    }


def percentages(scores: dict[str, float]) -> list[str]:
    return [f"{100 * score:.1f} %" for score in scores.values()]
