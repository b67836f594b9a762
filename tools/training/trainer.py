"""What fine-tuning and pre-training share: Trainer with its arguments, order and parameter groups, and new encoders."""

import difflib
import json
import os
import re
from pathlib import Path

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from bat_audio.configuration_bat import BatConfig
from bat_audio.load_model import HERE
from bat_audio_tools.settings import FinetuneSettings, PretrainSettings

FINAL_LEARNING_RATE = 1e-6  # The cosine schedule ends at this learning rate.
WITHOUT_DECAY = ("block_attention", "prototype_vectors")
# Some version of Transformers writes these fields into every config.json, though a new config of the installed version
# may lack them.
COMMON_FIELDS = {
    *("_commit_hash", "_name_or_path", "architectures", "attn_implementation", "auto_map", "custom_pipelines"),
    *("dtype", "torch_dtype", "model_type", "num_labels", "transformers_version", "use_cache"),
}


class BatTrainer(Trainer):
    """Trainer for data in its own order, which is shuffled already."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def config_from_json(path: str | Path) -> BatConfig:
    """Read the config of a new encoder from a JSON file with some fields of BatConfig.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object, or has fields that are none of BatConfig's.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path}: no such file; config (--config) is a JSON file with fields of BatConfig.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # The content is not JSON, or not even UTF-8.
        raise ValueError(f"{path} is no JSON ({error}); expected fields of BatConfig.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds {fields!r:.50}; expected an object with fields of BatConfig.")
    refuse_unknown_fields(fields, path)
    return BatConfig.from_dict(fields)


def refuse_unknown_fields(fields: dict, path: str | Path):
    """Raise a ValueError for fields in a user's config.json that no BatConfig has: a typo would be kept silently."""
    # The published config.json has some fields that a new BatConfig lacks, so it is asked for them.
    known = {*BatConfig.from_pretrained(HERE).to_dict(), *COMMON_FIELDS}
    unknown = []
    for name in sorted(fields.keys() - known):
        near = difflib.get_close_matches(name, known, n=1)
        unknown.append(f"{name} (did you mean {near[0]}?)" if near else name)
    if unknown:
        raise ValueError(f"{path}: unknown fields: {', '.join(unknown)}. Expected fields of BatConfig.")


def training_arguments(
    settings: FinetuneSettings | PretrainSettings, work: Path, steps: int, save_every: int, log_every: int, **others
) -> TrainingArguments:
    """Arguments of a run in the folder `work`; a ValueError names settings that do not fit the machine."""
    loggers, report_to = get_available_reporting_integrations(), settings.report_to.replace(" ", "").split(",")
    if report_to not in (["none"], ["all"]) and not set(report_to) <= set(loggers):
        raise ValueError(
            f"report_to={settings.report_to!r} is not installed; there are {', '.join(loggers)}, several of them with "
            "commas, or all or none."
        )
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # Trainer obeys this variable too, and Transformers 4 sets it for all later runs in the process.
    if settings.bf16 is not None:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if settings.bf16 else "no"
    args = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": min(1.0, FINAL_LEARNING_RATE / settings.learning_rate)},
        warmup_steps=round(settings.warmup * steps),
        bf16=has_bf16 if settings.bf16 is None else settings.bf16,
        save_strategy="steps",
        save_steps=save_every,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        dataloader_num_workers=settings.num_workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to=report_to,
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        **others,
    )
    shares = args.world_size * max(1, args.n_gpu) * settings.gradient_accumulation
    if settings.batch_size % shares:
        raise ValueError(
            f"batch_size={settings.batch_size} must be a multiple of {shares}: {args.world_size} processes with "
            f"{max(1, args.n_gpu)} devices each, times gradient_accumulation={settings.gradient_accumulation}."
        )
    args.per_device_train_batch_size = args.per_device_eval_batch_size = settings.batch_size // shares
    return args


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """AdamW's groups of the trained parameters, by their depth and whether they decay.

    The head learns with `learning_rate`, block i of L with `layer_decay ** (L - i)` of it, and the embeddings below
    the blocks with the smallest share. Biases, norms, block weights and prototypes do not decay.
    """
    blocks = model.config.num_hidden_layers
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = re.search(r"\bblocks\.(\d+)\.", name)
        depth = int(block[1]) + 1 if block else blocks + 1 if re.search(r"\bhead\.", name) else 0
        decays = parameter.ndim > 1 and not any(part in name for part in WITHOUT_DECAY)
        group = groups.setdefault((depth, decays), {
            "params": [],
            "lr": learning_rate * layer_decay ** (blocks + 1 - depth),
            "weight_decay": weight_decay if decays else 0.0,
        })  # fmt: skip
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
