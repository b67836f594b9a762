"""Pre-training by masked latent regression on Transformers' Trainer: from a pile of sounds to an encoder with a card.

    pretrain(PretrainSettings(data="sounds", out="my-encoder"))

Runs unchanged in one process and under `accelerate launch` or torchrun, on one machine or many that share a file
system. Clips and masks depend on the seed and their place alone, so that a resumed run, or one on more processes, sees
the same.
"""

import contextlib
import itertools
import math
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bat_audio.configuration_bat import BatConfig
from bat_audio.load_model import check_compiler, load_pretrained_encoder
from bat_audio.modeling_bat import BatModel
from bat_audio.processing_bat import BatFeatureExtractor
from bat_audio_tools.folders import lock, whole
from bat_audio_tools.machine import require
from bat_audio_tools.settings import PretrainSettings
from bat_audio_tools.training.card import write_encoder_card
from bat_audio_tools.training.folder import claim, last_whole_checkpoint, training_folder
from bat_audio_tools.training.masked_clips import MaskedClips, Recordings
from bat_audio_tools.training.masked_regression import MaskedRegression, block_masks
from bat_audio_tools.training.trainer import (
    BatTrainer,
    config_from_json,
    parameter_groups,
    training_arguments,
)

LONGEST_CLIP = 10.0  # The authors' clips last so many seconds; the published input of 10.24 s has zeros after them.
ENCODER_FOLDER = "encoder"  # Each checkpoint has its encoder in this folder, for AutoModel.
LOGGED = ("local_loss", "global_loss", "target_variance", "mean_target_variance", "cls_variance")


class PretrainTrainer(BatTrainer):
    """Logs the parts of the loss, and writes the encoder of every checkpoint as a model folder too."""

    def compute_loss(self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, **kwargs):
        outputs = model(**inputs)
        self.parts.append(torch.stack([outputs[name].detach().mean() for name in LOGGED]))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def train(self, *args, **kwargs):
        self.parts = []  # It has an entry for each forward pass since the last line of the log.
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs:
            means = self.accelerator.reduce(torch.stack(self.parts).mean(0), "mean")
            logs = {**logs, **dict(zip(LOGGED, means.tolist(), strict=True))}
            self.parts = []
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        super()._save(output_dir, state_dict)
        self.model.student.encoder.save_pretrained(Path(output_dir, ENCODER_FOLDER))


class MoveTeacher(TrainerCallback):
    """Updates the teacher after every step, with a decay that rises linearly and then stays."""

    def __init__(self, model: MaskedRegression, settings: PretrainSettings):
        self.model = model
        self.settings = settings

    def decay(self, step: int) -> float:
        """The share of the teacher that its update after this step keeps; the first step is 0."""
        share = min(step / self.settings.ema_steps, 1.0)
        return (1 - share) * self.settings.ema_decay + share * self.settings.ema_final_decay

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.model.update_teacher(self.decay(state.global_step - 1))


def pretrain(settings: PretrainSettings) -> dict[str, float]:
    """Train an encoder and write it, with its card and plots, to the folder `settings.out`.

    Checkpoints, from which the same call goes on after a crash, and logs lie in the folder `OUT.training`. Each holds
    student, decoder and teacher in model.safetensors, which `convert` reads, and the encoder as a model folder.

    Returns:
        The last line of the log: `loss`, its parts `local_loss` and `global_loss`, and `target_variance`,
        `mean_target_variance` and `cls_variance`, see `MaskedRegression`.

    Raises:
        ValueError: settings or data that do not fit together, or recordings that cannot be read.
        OSError: no data or no weights there, a folder in the way, or another run in the training folder.
        ImportError: a library of the extra `train` is missing.
    """
    out = Path(settings.out)
    work = training_folder(out)
    require("matplotlib.figure")  # If it is missing, the error comes before the training, not at its end.
    recordings = Recordings(settings.data, settings.split, settings.channel)
    args = training_arguments(
        settings,
        work,
        settings.steps,
        save_every=settings.save_every,
        log_every=min(settings.log_every, settings.steps),
        save_total_limit=settings.save_total_limit,
        max_grad_norm=settings.max_grad_norm or math.inf,  # With 0, Transformers 4 would not log the norm.
        eval_strategy="no",
    )
    if settings.compile:
        check_compiler(args.device)
    transformers.set_seed(settings.seed)
    model = MaskedRegression(build_encoder(settings), settings.decoder_blocks)
    model.gradient_checkpointing = settings.gradient_checkpointing
    if settings.compile:
        student = model.student
        for block in itertools.chain(student.encoder.blocks, student.decoder.blocks, model.teacher.blocks):
            block.compile()
    config = model.config
    clip_seconds = _clip_seconds(settings, config)
    masks = {"count": settings.views, "grid": config.grid_size, "keep": settings.keep, "block": settings.mask_block}
    block_masks(**masks)  # Wrong values raise their error here, not in a worker.
    with lock(work) if args.process_index == 0 else contextlib.nullcontext():
        with args.main_process_first(local=False, desc="surveying the recordings"):
            facts = recordings.survey(work, settings.skip_broken)
            if args.process_index == 0:
                claim(work, settings, f"{facts['recordings']} of digest {facts['digest'][:12]}")
        clips = MaskedClips(
            recordings,
            work,
            BatFeatureExtractor.from_model_config(config).processor,
            config.input_shape[0],
            clip_seconds=clip_seconds,
            masks=masks,
            num_items=settings.steps * settings.batch_size,
            seed=settings.seed,
            skip_broken=settings.skip_broken,
        )
        trainer = PretrainTrainer(model=model, args=args, train_dataset=clips, callbacks=[MoveTeacher(model, settings)])
        groups = parameter_groups(model, settings.learning_rate, settings.weight_decay, layer_decay=1.0)
        trainer.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2))
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(work))
        log = [entry for entry in trainer.state.log_history if LOGGED[0] in entry]
        if trainer.is_world_process_zero():
            _write_folder(out, model, settings, facts, log)
        trainer.accelerator.wait_for_everyone()
    return {name: log[-1][name] for name in ("loss", *LOGGED)}


def build_encoder(settings: PretrainSettings) -> BatModel:
    """A new encoder, or that of the checkpoint to go on from, in float32."""
    if settings.init is None:
        if settings.config is None:
            return BatModel(BatConfig())
        return BatModel(config_from_json(settings.config))
    pretrained = load_pretrained_encoder(checkpoint=settings.init)
    encoder = BatModel(BatConfig(**pretrained.config.to_dict()))
    encoder.load_state_dict(pretrained.state_dict())
    return encoder


def _clip_seconds(settings: PretrainSettings, config: BatConfig) -> float:
    longest = config.input_shape[0] * config.hop_length / config.sample_rate
    if settings.clip_seconds is None:
        return min(LONGEST_CLIP, longest)
    if settings.clip_seconds > longest:
        raise ValueError(f"clip_seconds={settings.clip_seconds} is longer than the encoder's input of {longest:g} s.")
    return settings.clip_seconds


def _write_folder(out: Path, model: MaskedRegression, settings: PretrainSettings, facts: dict, log: list[dict]):
    with whole(out) as partial:
        model.student.encoder.save_pretrained(partial)
        write_encoder_card(
            partial,
            model.student.encoder,
            out.name,
            base_model=settings.init,
            num_recordings=facts["recordings"],
            hours=facts["hours"],
            settings={name: value for name, value in vars(settings).items() if value is not None},
            log_history=log,
        )
