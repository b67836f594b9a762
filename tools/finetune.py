"""Fine-tuning and probing on Transformers' Trainer: from labelled sounds to a model folder with a card.

    finetune(FinetuneSettings(train="sounds", out="my-model", preset="probe"))

Runs unchanged in one process and under `accelerate launch` or torchrun. The data's order and augmentation depend on the
seed alone, so that a resumed run, or one on more processes, sees the same clips.
"""

import contextlib
import copy
import hashlib
import json
import math
from pathlib import Path

import torch
import transformers
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from transformers.utils import logging

from bat_audio.configuration_bat import BatConfig
from bat_audio.load_model import HERE, HUB_REPOSITORY, find_weights, load_pretrained_encoder
from bat_audio.modeling_bat import (
    IGNORED_LABEL,
    BatForAudioClassification,
    BatForAudioFrameClassification,
    BatForClassification,
    BatModel,
)
from bat_audio.processing_bat import BatFeatureExtractor
from bat_audio_tools.folders import lock, whole
from bat_audio_tools.machine import require
from bat_audio_tools.names import public_name
from bat_audio_tools.settings import FinetuneSettings
from bat_audio_tools.training.card import write_card
from bat_audio_tools.training.clips import Augmentation, ClipDataset
from bat_audio_tools.training.examples import Example, check_clips, label_names, read_examples, split_examples
from bat_audio_tools.training.folder import claim, last_whole_checkpoint, training_folder
from bat_audio_tools.training.trainer import (
    BatTrainer,
    config_from_json,
    parameter_groups,
    training_arguments,
)

LORA_TARGETS = r".*\.attn\.(qkv|gate|proj)"  # A bare "proj" would match the patch embedding too.
# Clips with none or several labels are no surprise where they are at least this share of all.
FEW = 0.1

logger = logging.get_logger(__name__)


class FinetuneTrainer(BatTrainer):
    """Trainer that computes the validation loss exactly, over all clips at once."""

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        # Trainer's own loss is a mean over batches, the last of which may be shorter or filled up with clips of another
        # process.
        output = super().evaluation_loop(*args, **kwargs)
        logits, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
        output.metrics["eval_loss"] = self.accelerator.unwrap_model(self.model).compute_loss(logits, labels).item()
        return output


class EvaluateLastStep(TrainerCallback):
    """Transformers 4 saves the last step, but evaluates it only where it is a multiple of `eval_steps`."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def finetune(settings: FinetuneSettings) -> dict[str, float]:
    """Train a model with a head and write it, with its card and plots, to the folder `settings.out`.

    The model is the one that did best on the validation data, by macro mAP or, with one label per clip, by accuracy.
    Checkpoints, from which the same call goes on after a crash, and logs lie in the folder `OUT.training`.

    Returns:
        The validation metrics of the model: `loss`, `f1` (macro) and `map` (macro) or `accuracy`.

    Raises:
        ValueError: settings or data that do not fit together, or clips that cannot be read; the message says how.
        OSError: no data or no weights there, a folder in the way, or another run in the training folder.
        ImportError: a library of the extra `train` is missing.
    """
    settings = settings.with_preset()
    out = Path(settings.out)
    work = training_folder(out)
    for library in ("matplotlib.figure", "sklearn.metrics", *(["peft"] if settings.lora else [])):
        require(library)  # If it is missing, the error comes before the training, not at its end.

    train, validation = _read_data(settings)
    labels = label_names(train)
    multi_label = settings.multi_label
    if multi_label is None:
        multi_label = settings.frames or _has_several_labels([*train, *validation])
    if not multi_label and len(labels) < 2:
        raise ValueError(f"All clips have the label {labels[0]}; telling classes apart takes at least two.")
    args = _training_arguments(settings, len(train), work, "map" if multi_label or settings.frames else "accuracy")
    transformers.set_seed(settings.seed)
    model = build_model(settings, labels, multi_label)
    checkpointing = settings.gradient_checkpointing
    # Without checkpointing, all blocks' tokens would be kept for the few weights that mix them.
    if checkpointing is None:
        checkpointing = settings.freeze_encoder and model.head.mixes_blocks
    if checkpointing:
        model.gradient_checkpointing_enable()
    num_frames = settings.num_frames or model.config.input_shape[0]
    extractor = BatFeatureExtractor.from_model_config(model.config)
    extractor.num_frames = num_frames
    if args.process_index == 0:
        check_clips([*train, *validation], extractor.processor)
    augmentation = Augmentation(
        mixup=settings.mixup,
        freq_masks=settings.freq_masks,
        time_masks=settings.time_masks,
        roll=settings.roll,
        gain_db=settings.gain_db,
    )
    kinds = {"multi_label": multi_label, "frames": settings.frames, "seed": settings.seed}
    clips = (labels, extractor.processor, num_frames)
    num_items = args.max_steps * settings.batch_size
    row = ClipDataset(
        train, *clips, augmentation=augmentation, epochs=math.ceil(num_items / len(train)), shuffle=True, **kinds
    )
    trainer = FinetuneTrainer(
        model=_add_lora(model, settings.lora) if settings.lora else model,
        args=args,
        # There are no more items than the run takes, so that a run resumed at its end is at its end.
        train_dataset=Subset(row, range(num_items)),
        eval_dataset=ClipDataset(validation, *clips, **kinds),
        compute_metrics=_frame_metrics if settings.frames else classification_metrics,
        callbacks=[EvaluateLastStep()],
    )
    groups = parameter_groups(trainer.model, settings.learning_rate, settings.weight_decay, settings.layer_decay)
    trainer.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2))
    with lock(work) if args.process_index == 0 else contextlib.nullcontext():
        with args.main_process_first(desc="claiming the training folder"):
            if args.process_index == 0:
                claim(work, settings, _describe_clips([train, validation]))
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(work))
        metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
        metrics = {name: metrics[name] for name in ("loss", "accuracy", "map", "f1") if name in metrics}
        if trainer.is_world_process_zero():
            model = trainer.accelerator.unwrap_model(trainer.model)
            model = model.merge_and_unload() if settings.lora else model
            _write_folder(out, model, extractor, settings, metrics, trainer.state.log_history, len(train))
        trainer.accelerator.wait_for_everyone()
    return metrics


def build_model(settings: FinetuneSettings, labels: list[str], multi_label: bool) -> BatForClassification:
    """The encoder of the settings with a new head for these labels, frozen where they say so."""
    if settings.untrained:
        config = BatConfig() if settings.config is None else config_from_json(settings.config)
        encoder = BatModel(config)
    else:
        encoder = load_pretrained_encoder(checkpoint=settings.checkpoint)
    config = copy.deepcopy(encoder.config)
    fields = {
        "head_type": settings.head,
        "head_pooling": settings.head_pooling,
        "num_prototypes": settings.num_prototypes,
        "head_norm": True,
        "head_dropout": None,
        "multi_label_loss": settings.multi_label_loss,
        "drop_path_rate": settings.drop_path,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": f"{'multi' if multi_label else 'single'}_label_classification",
    }
    # Making a new config checks the values. It gets the old one's implementation of attention.
    config = BatConfig(**{**config.to_dict(), **fields}, attn_implementation=config._attn_implementation)
    model_class = BatForAudioFrameClassification if settings.frames else BatForAudioClassification
    model = model_class(config)
    model.bat.load_state_dict(encoder.state_dict())
    if settings.freeze_encoder:
        model.freeze_base_model()
    return model


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics of logits (N, C): with labels (N,) `accuracy` and macro `f1`; with labels (N, C) macro `map` and `f1`.

    mAP is the mean over the classes that occur; F1 takes classes as found at a probability of 0.5.
    """
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score

    logits, labels = prediction.predictions, prediction.label_ids
    if labels.ndim == 1:
        found = logits.argmax(axis=1)
        f1 = f1_score(labels, found, average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(labels, found)), "f1": float(f1)}
    occurring = labels.any(axis=0)
    if not occurring.any():
        raise ValueError("The validation data holds no label, so there is nothing to measure.")
    labels, logits = labels[:, occurring], logits[:, occurring]
    f1 = f1_score(labels, logits > 0, average="macro", zero_division=0)
    return {"map": float(average_precision_score(labels, logits, average="macro")), "f1": float(f1)}


def _frame_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The `classification_metrics` over all steps of all clips that have labels."""
    logits, labels = (array.reshape(-1, array.shape[-1]) for array in (prediction.predictions, prediction.label_ids))
    has_label = (labels != IGNORED_LABEL).all(axis=1)
    return classification_metrics(EvalPrediction(logits[has_label], labels[has_label]))


def _read_data(settings: FinetuneSettings) -> tuple[list, list]:
    examples = read_examples(settings.train, settings.frames, settings.train_split, settings.channel)
    if settings.validation is not None:
        return examples, read_examples(
            settings.validation, settings.frames, settings.validation_split, settings.channel
        )
    if settings.validation_split is not None:
        return examples, read_examples(settings.train, settings.frames, settings.validation_split, settings.channel)
    return split_examples(examples, settings.validation_fraction, settings.seed)


def _has_several_labels(examples: list[Example]) -> bool:
    """Whether classes are to be scored one by one, which a few clips with none or several labels decide too."""
    odd = [example for example in examples if len(example.labels) != 1]
    if 0 < len(odd) < FEW * len(examples):
        logger.warning(
            f"{len(odd)} of {len(examples)} clips have none or several labels (first: {odd[0].source}), so every class "
            "is scored by itself. If they are mistakes, correct them; --no-multi-label refuses such clips."
        )
    return bool(odd)


def _describe_clips(data: list[list[Example]]) -> str:
    clips = [[(str(e.source), e.labels, e.start, e.duration, e.events) for e in examples] for examples in data]
    return f"{sum(map(len, data))} of digest {hashlib.sha256(repr(clips).encode()).hexdigest()[:12]}"


def _training_arguments(settings: FinetuneSettings, num_clips: int, work: Path, metric: str) -> TrainingArguments:
    steps = settings.steps
    if settings.epochs is not None:
        steps = max(1, round(settings.epochs * num_clips / settings.batch_size))
    eval_every = settings.eval_every or max(1, steps // 20)
    return training_arguments(
        settings,
        work,
        steps,
        save_every=eval_every,
        log_every=max(1, eval_every // 5),
        eval_strategy="steps",
        eval_steps=eval_every,
        save_total_limit=2,  # These are the best and the last one, from which even a finished run can go on.
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        label_names=["labels"],
    )


def _add_lora(model: BatForClassification, rank: int) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, modules_to_save=["head"])
    return get_peft_model(model, targets)


def _write_folder(
    out: Path,
    model: BatForClassification,
    extractor: BatFeatureExtractor,
    settings: FinetuneSettings,
    metrics: dict[str, float],
    log_history: list[dict],
    num_clips: int,
):
    with whole(out) as partial:
        extractor.save_pretrained(partial)
        model.save_pretrained(partial)
        write_card(
            partial,
            model,
            name=out.name,
            base_model=_base_model(settings),
            dataset=str(settings.train) if isinstance(settings.train, str | Path) else None,
            evaluation=_validation_name(settings),
            metrics=metrics,
            settings={name: value for name, value in vars(settings).items() if value is not None},
            log_history=log_history,
            num_clips=num_clips,
        )
        (partial / "eval_results.json").write_text(json.dumps(metrics, indent=2))


def _base_model(settings: FinetuneSettings) -> str | None:
    """What training started from, if that is known: weights beside the code may be anyone's."""
    if settings.untrained or settings.checkpoint:
        return settings.checkpoint
    return None if find_weights().parent == HERE else HUB_REPOSITORY


def _validation_name(settings: FinetuneSettings) -> str:
    """The data that the metrics are measured on, as the card names it."""
    data = settings.train if settings.validation is None else settings.validation
    name = public_name(data) if isinstance(data, str | Path) else "an unnamed dataset"
    if settings.validation_split is not None:
        return f"the split {settings.validation_split} of {name}"
    return name if settings.validation is not None else f"a held-out {100 * settings.validation_fraction:g} % of {name}"
