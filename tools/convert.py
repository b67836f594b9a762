"""Conversion of the authors' own checkpoints and trained probes into folders that Transformers loads.

`convert` reads tensors only: a pickle that asks for anything else is refused, and no code in it is run.
"""

import argparse
import copy
import math
import pathlib
import pickle
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bat_audio.configuration_bat import BatConfig
from bat_audio.modeling_bat import BatForAudioClassification, BatForAudioFrameClassification, BatModel
from bat_audio_tools.folders import check_new, whole

STUDENT_PREFIX = "student.encoder."
TEACHER_PREFIX = "teacher."  # Checkpoints of bat-audio pretrain have the teacher's weights under this prefix.
HEAD_PREFIX = "head."
HEAD_NAMES = {"fc.weight", "fc.bias", "ln.weight", "ln.bias", "block_attention", "prototype_vectors"}
# A head's type is told by whether it has prototype_vectors, and whether it has block_attention.
HEAD_TYPES = {(True, True): "cgp", (True, False): "protobin", (False, True): "linear_cgp", (False, False): "linear"}
# The shapes of these tensors tell the config. They must have so many axes.
ENCODER_AXES = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
HEAD_AXES = {"head.fc.weight": 2, "head.prototype_vectors": 4}
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16}  # The keys are widths, the values numbers of attention heads.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    ema: bool = False,
    config: BatConfig | str | Path | None = None,
    labels: Sequence[str] | str | Path | None = None,
    head_pooling: str = "cls",
    frames: bool = False,
) -> Path:
    """Write a checkpoint of the authors' code as a model folder with weights, config, code and feature extractor.

    The result is a `BatModel`; with weights named `head.*` a `BatForAudioClassification` or, with `frames`, a
    `BatForAudioFrameClassification`. Decoder, teacher and optimiser of a pre-training file are left aside; all other
    weights must be exactly the model's. Weights keep their dtype, which the config names; of several dtypes in one
    file, all take the smallest one that holds every value. The folder appears whole or not at all.

    Args:
        source: a .safetensors file or a pickle of torch.save. Its weights are named as in `BatModel`, with
            `student.encoder.` in front, as in the checkpoints of bat-audio pretrain, or without, at the top or under
            "state_dict"; or it holds them under "encoder" and "ema_encoder". More rows of `pos_embed` than the config
            needs are dropped.
        out: the folder to write, which does not exist or is empty.
        ema: take the moving average, "ema_encoder" instead of "encoder" or `teacher.` instead of `student.encoder.`.
        config: for what shapes cannot tell, such as `layer_norm_first`, the front end or the number of attention heads
            of an unpublished width; a config or the path of a config.json. It must agree with all shapes; fields of the
            head that are left at their defaults are taken from the weights. None is the published setting.
        labels: names of the classes, or the path of a text file with one name per line.
        head_pooling: of the head, "cls" or "mean", as in `BatConfig`.
        frames: the head classifies every time patch instead of the clip.

    Returns:
        `out`.

    Raises:
        OSError: `source` is not there, damaged or no checkpoint, or `out` cannot be written.
        ValueError: `source` is a pickle that wants to run code, its weights do not fit, are not finite or disagree with
            an argument; the message names them.
    """
    source, out = Path(source), Path(out)
    check_new(out)
    config = copy.deepcopy(config) if not isinstance(config, str | Path) else _read_config(Path(config))
    labels = labels if not isinstance(labels, str | Path) else _read_labels(Path(labels))
    contents = _read_checkpoint(source)
    try:
        weights = _check_tensors(_select_weights(contents, ema))
        config = _complete_encoder_config(weights, config)
        model_class = BatModel
        if _has_head(weights):
            model_class = BatForAudioFrameClassification if frames else BatForAudioClassification
            config = _complete_head_config(weights, config, labels, head_pooling)
        elif labels is not None or frames or head_pooling != "cls":
            raise ValueError("it holds no head.* weights, so labels, head_pooling and frames have no meaning.")
        model = _build_model(model_class, config, weights)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    with whole(out) as partial:
        model.save_pretrained(partial)
    return out


def _read_checkpoint(source: Path) -> Mapping:
    """What the file holds, read without running anything in it."""
    if not source.is_file():
        raise FileNotFoundError(f"{source}: {'a folder; name the file in it' if source.is_dir() else 'no such file'}.")
    try:
        if source.suffix == ".safetensors":
            return load_file(source)
        # The authors' newer trainer saves its command line in objects of these classes, which only hold values.
        with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath]):
            contents = torch.load(source, weights_only=True, map_location="cpu")
    except SafetensorError as error:
        raise OSError(f"{source} is not a whole safetensors file ({error}). Copy or download it again.") from error
    except Exception as error:  # Damaged and foreign files raise nearly everything.
        wanted = re.search(r"GLOBAL (\S*\w)\s", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted:
            raise ValueError(
                f"{source} is a pickle that wants to use {wanted[1]}, which may run any code; it was refused and "
                "nothing in it was run. Get the weights as .safetensors, or as a torch.save of plain tensors."
            ) from error
        # torch puts its reason after advice to load the file unsafely.
        reason = str(error.__context__ or error).partition(". ")[0].partition("\n")[0].rstrip(".")
        raise OSError(
            f"{source} cannot be read as a checkpoint ({type(error).__name__}: {reason}); nothing in it was run. Is it "
            "a whole file of torch.save, or a .safetensors file under that name? Copy or download it again."
        ) from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{source} holds a {type(contents).__name__}, not a dict of weights.")
    return contents


def _select_weights(contents: Mapping, ema: bool) -> dict:
    """The entries of encoder and head, under the encoder's bare names and `head.*`."""
    weights = contents.get("state_dict", contents)
    if isinstance(weights, Mapping) and isinstance(weights.get("encoder"), Mapping):
        parts = weights
        weights = parts.get("ema_encoder", {}) if ema else parts["encoder"]
        ema = ema and not weights
        if isinstance(weights, Mapping) and isinstance(parts.get("head"), Mapping):
            weights = {**weights, **{f"{HEAD_PREFIX}{name}": value for name, value in parts["head"].items()}}
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise ValueError("its weights are not a dict from names to tensors.")
    prefix = TEACHER_PREFIX if ema else STUDENT_PREFIX
    if any(name.startswith(prefix) for name in weights):
        ema = False
        weights = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith((prefix, HEAD_PREFIX))
        }
    if ema:
        raise ValueError('it holds neither "ema_encoder" nor teacher.*; leave ema=True (--ema) out.')
    unknown = [name for name in weights if name.startswith(HEAD_PREFIX) and name[len(HEAD_PREFIX) :] not in HEAD_NAMES]
    if unknown:
        raise ValueError(
            f"its head holds {', '.join(unknown)}, so it is of another kind than {', '.join(HEAD_TYPES.values())}, "
            "and cannot be converted."
        )
    return dict(weights)


def _has_head(weights: Mapping) -> bool:
    return any(name.startswith(HEAD_PREFIX) for name in weights)


def _check_tensors(weights: dict) -> dict[str, torch.Tensor]:
    """The weights in one dtype, each with memory of its own, if all are finite and the telling ones are there."""
    foreign = [
        name
        for name, value in weights.items()
        if not (isinstance(value, torch.Tensor) and value.dtype in DTYPES and value.layout is torch.strided)
    ]
    if foreign:
        raise ValueError(
            f"not dense floating-point tensors: {', '.join(foreign)}. Expected are the weights themselves, or a dict "
            'with them under "state_dict", "encoder" or "ema_encoder".'
        )
    required = set(ENCODER_AXES) | {"head.fc.weight"} if _has_head(weights) else set(ENCODER_AXES)
    missing = sorted(required - weights.keys())
    if missing:
        raise ValueError(
            f"no whole set of BAT weights: {', '.join(missing)} missing. Expected the names of BatModel, bare or under "
            f"{STUDENT_PREFIX}; found {len(weights)} names, the first being {', '.join(list(weights)[:5])}."
        )
    for name, axes in {**ENCODER_AXES, **HEAD_AXES}.items():
        if name in weights and (weights[name].ndim != axes or 0 in weights[name].shape):
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}; expected {axes} axes, none empty.")
    infinite = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if infinite:
        raise ValueError(f"NaN or infinite values in {', '.join(infinite)}.")
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})
    # The tensors are copied, because those that share memory cannot be saved as safetensors.
    return {
        name: tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def _find(weights: dict[str, torch.Tensor], ending: str) -> tuple[bool, str]:
    """Whether a weight's name ends like this, and words for what was found."""
    name = next((name for name in weights if name.endswith(ending)), None)
    return (False, f"the absence of {ending}") if name is None else (True, f"{name} {tuple(weights[name].shape)}")


def _complete_encoder_config(weights: dict[str, torch.Tensor], config: BatConfig | None) -> BatConfig:
    """The config that the shapes tell, or the given one if it agrees with them."""
    width, mlp_width = weights["cls_token"].shape[-1], len(weights["blocks.0.mlp.fc1.weight"])
    blocks = {match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, weights) if match}
    has_layer_scale, layer_scale = _find(weights, ".ls1.s")
    told = {  # Each field has its value, and what tells it.
        "hidden_size": (width, _find(weights, "cls_token")[1]),
        "patch_size": (
            list(weights["patch_embed.proj.weight"].shape[2:]),
            _find(weights, "patch_embed.proj.weight")[1],
        ),
        "num_hidden_layers": (len(blocks), f"the number of blocks up to blocks.{max(blocks, key=int)}"),
        "mlp_ratio": (mlp_width / width, _find(weights, "blocks.0.mlp.fc1.weight")[1]),
        "qkv_bias": _find(weights, ".attn.qkv.bias"),
        "use_gate": _find(weights, ".attn.gate.weight"),
        "pre_norm": _find(weights, "pre_norm.weight"),
        # The config's value is only where training started from; the trained one is in the weights.
        "init_scale_values": (1.0 if has_layer_scale else None, layer_scale),
    }
    if config is None:
        if width not in PUBLISHED_HEADS:
            raise ValueError(
                f"width {width} (cls_token) is none of the published {', '.join(map(str, PUBLISHED_HEADS))}, so the "
                "number of attention heads is not known: give a config (--config) with num_attention_heads."
            )
        fields = {field: value for field, (value, _) in told.items()}
        return BatConfig(**fields, num_attention_heads=PUBLISHED_HEADS[width])

    def agrees(field: str, value) -> bool:
        given = getattr(config, field)
        if field == "mlp_ratio":
            return int(width * given) == mlp_width
        if field == "init_scale_values":
            return (given is None) == (value is None)
        return given == value

    _refuse(config, {field: entry for field, entry in told.items() if not agrees(field, entry[0])})
    return config


def _complete_head_config(
    weights: dict[str, torch.Tensor], config: BatConfig, labels: Sequence[str] | None, head_pooling: str
) -> BatConfig:
    """The config with the fields of the head, if what it says of the head beyond the defaults agrees with them."""
    has_prototypes, prototypes = _find(weights, "head.prototype_vectors")
    mixes_blocks, block_attention = _find(weights, "head.block_attention")
    classes, classifier = len(weights["head.fc.weight"]), _find(weights, "head.fc.weight")[1]
    told = {  # Each field has its value, and what tells it.
        "head_type": (HEAD_TYPES[has_prototypes, mixes_blocks], f"{prototypes} with {block_attention}"),
        "num_labels": (classes, classifier),
        "head_pooling": (head_pooling, "the argument head_pooling"),
    }
    if has_prototypes:
        told["num_prototypes"] = (len(weights["head.prototype_vectors"]), prototypes)
    else:
        told["head_norm"] = _find(weights, "head.ln.weight")
    default = BatConfig()

    def is_given(field: str) -> bool:
        # Two classes are the default, but not if they have names.
        field = "id2label" if field == "num_labels" else field
        return getattr(config, field) != getattr(default, field)

    given = {field: entry for field, entry in told.items() if is_given(field)}
    _refuse(config, {field: entry for field, entry in given.items() if getattr(config, field) != entry[0]})
    for field, (value, _) in told.items():
        setattr(config, field, value)
    if labels is not None:
        if not all(isinstance(label, str) and label for label in labels):
            raise ValueError(f"labels={labels!r:.60}: expected names that are not empty.")
        if len(labels) != classes or len(set(labels)) != classes:
            raise ValueError(
                f"{len(labels)} labels, {len(set(labels))} of them different, for the {classes} classes of "
                f"{classifier}; expected one name for each."
            )
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    return BatConfig.from_dict(config.to_dict())  # This checks the new fields.


def _refuse(config: BatConfig, disagreements: dict[str, tuple]):
    """Raise a ValueError if there are disagreements: for each field its value, and what tells it."""
    lines = [
        f"\n  {field}={getattr(config, field)!r}, but {origin} says {value!r}"
        for field, (value, origin) in disagreements.items()
    ]
    if lines:
        raise ValueError(f"the config does not belong to these weights:{''.join(lines)}")


def _build_model(model_class: type[BatModel], config: BatConfig, weights: dict[str, torch.Tensor]):
    """The model that holds exactly these weights."""
    rows, found = math.prod(config.grid_size), weights["pos_embed"].shape[1]
    if found < rows:
        raise ValueError(
            f"pos_embed has {found} rows, fewer than the {rows} patches of input_shape={config.input_shape} by "
            f"patch_size={config.patch_size}; give a config with the input_shape that it was trained with."
        )
    weights = {**weights, "pos_embed": weights["pos_embed"][:, :rows].clone()}
    with torch.device("meta"):
        model = model_class(config)
    if model_class is not BatModel:
        prefix = f"{model.base_model_prefix}."
        weights = {name if name.startswith(HEAD_PREFIX) else prefix + name: weights[name] for name in weights}
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:  # Its message lists what is missing, unexpected or misshapen.
        raise ValueError(str(error)) from error
    return model


def _read_config(path: Path) -> BatConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; config is a BatConfig or the path of a config.json.")
    fields, _ = BatConfig.get_config_dict(path)
    if fields.get("model_type") != BatConfig.model_type:
        raise ValueError(f"{path}: model_type is {fields.get('model_type')!r}, not {BatConfig.model_type!r}.")
    return BatConfig.from_dict(fields)


def _read_labels(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one name per line.")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); expected one name per line.") from error
