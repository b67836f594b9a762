"""Conversion: what the authors' files hold comes out bit for bit, and everything else is refused."""

import argparse
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from programs import run_code
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from bat_audio import (
    BatConfig,
    BatFeatureExtractor,
    BatForAudioClassification,
    BatForAudioFrameClassification,
    BatModel,
)
from bat_audio_tools.convert import convert

HEADS = {
    "linear": {},
    "linear without norm": {"head_norm": False},
    "linear_cgp": {"head_type": "linear_cgp"},
    "cgp": {"head_type": "cgp", "num_prototypes": 5},
    "protobin": {"head_type": "protobin", "num_prototypes": 5},
}
FEATURES = torch.rand(1, 1, 32, 128, generator=torch.Generator().manual_seed(0))


def tiny_probe(frames: bool = False, **changes):
    """A tiny model with a head, with seeded weights that are far from their initial values."""
    torch.manual_seed(1)
    model_class = BatForAudioFrameClassification if frames else BatForAudioClassification
    model = model_class(tiny_config(num_labels=3, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def authors_weights(model, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights under the authors' names: the encoder's with the prefix, the head's under `head.`."""
    weights = {name.removeprefix("bat."): tensor for name, tensor in model.state_dict().items()}
    return {name if name.startswith("head.") else prefix + name: tensor for name, tensor in weights.items()}


def write(path: Path, contents) -> Path:
    save_file(contents, path) if path.suffix == ".safetensors" else torch.save(contents, path)
    return path


def trainer_file(encoder: dict, ema_encoder: dict) -> dict:
    """What the newer trainer saves."""
    return {
        "encoder": encoder,
        "decoder": {"mask_token": torch.zeros(1, 1, 32)},
        "ema_encoder": ema_encoder,
        "optimized_steps": 400000,
        "args": argparse.Namespace(lr=5e-4, betas=[0.9, 0.95], data=Path("as2m"), nested=argparse.Namespace(seed=None)),
    }


def spoiled(model, **changes) -> dict[str, torch.Tensor]:
    """The authors' weights, with some replaced or, by None, removed; `__` in a keyword is the dot of the name."""
    weights = authors_weights(model)
    weights.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.fixture
def refuses(tmp_path):
    """A function that asserts that `convert` raises and leaves the folder as it was."""

    def check(source, match, error=ValueError, out=tmp_path / "out", **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=match) as info:
            convert(source, out, **{"config": tiny_config(), **options})
        assert sorted(tmp_path.rglob("*")) == before
        return str(info.value)

    return check


# Formats


def assert_same_model(folder, model):
    """The folder loads as the model's class, with equal weights and outputs."""
    loaded = type(model).from_pretrained(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(FEATURES)[0], model(FEATURES)[0])


@pytest.mark.parametrize("head", [None, "linear", "cgp"])
@pytest.mark.parametrize("prefix", ["", "student.encoder."])
@pytest.mark.parametrize(
    "layout", ["top.pt", "state_dict.pt", "legacy.pt", "top.safetensors", "encoder.pt", "ema_encoder.pt"]
)
def test_every_format_round_trips(tmp_path, layout, prefix, head):
    model = tiny_model() if head is None else tiny_probe(**HEADS[head])
    weights = authors_weights(model, prefix)
    if prefix:
        weights["student.decoder.mask_token"] = torch.zeros(1, 1, 32)
        weights["teacher.encoder.cls_token"] = torch.ones(1, 1, 32)
    if "encoder" in layout:
        other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        contents = trainer_file(weights, other) if layout == "encoder.pt" else trainer_file(other, weights)
    elif layout == "state_dict.pt":
        contents = {"state_dict": weights, "optimizer": {"state": {0: {"step": torch.ones(())}}}, "epoch": 3}
    else:
        contents = weights
    source = tmp_path / layout
    if layout == "legacy.pt":
        torch.save(contents, source, _use_new_zipfile_serialization=False)
    else:
        write(source, contents)
    config, before = tiny_config(), tiny_config().to_dict()
    out = convert(source, tmp_path / "out", config=config, ema=layout == "ema_encoder.pt")
    assert out == tmp_path / "out"
    assert config.to_dict() == before
    assert_same_model(out, model)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["out", layout])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("head_pooling", ["cls", "mean"])
@pytest.mark.parametrize("frames", [False, True])
def test_options_of_the_head(tmp_path, head, head_pooling, frames):
    model = tiny_probe(frames, head_pooling=head_pooling, **HEADS[head])
    source = write(tmp_path / "probe.pt", authors_weights(model))
    labels = ["jay", "wren", "coot"]
    out = convert(
        source, tmp_path / "out", config=tiny_config(), labels=labels, head_pooling=head_pooling, frames=frames
    )
    assert_same_model(out, model)
    config = BatConfig.from_pretrained(out)
    assert config.id2label == dict(enumerate(labels))
    assert config.label2id == {"jay": 0, "wren": 1, "coot": 2}
    assert config.architectures == [type(model).__name__]
    for field in ("head_type", "head_pooling", "head_norm", "num_prototypes"):
        assert getattr(config, field) == getattr(model.config, field) or head in ("cgp", "protobin"), field


LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification
from transformers import AutoModelForAudioFrameClassification
features, out = load_file(sys.argv[1])["features"], {}
for folder in sys.argv[3:]:
    auto_classes = [AutoModel, AutoModelForAudioClassification, AutoModelForAudioFrameClassification]
    auto_class = auto_classes[["encoder", "clip", "frames"].index(folder.rpartition("-")[2])]
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    assert extractor.num_frames == 1024 and extractor.sampling_rate == 16000
    out[folder] = model(features)[0].detach()
assert not hasattr(sys.modules.get("bat_audio"), "BatModel")
save_file(out, sys.argv[2])
"""


def test_fresh_process_computes_the_same(tmp_path):
    models = {"encoder": tiny_model(), "clip": tiny_probe(**HEADS["cgp"]), "frames": tiny_probe(True)}
    expected = {}
    for name, model in models.items():
        source = write(tmp_path / f"{name}.pt", authors_weights(model))
        folder = convert(source, tmp_path / f"bat-{name}", config=tiny_config(), frames=name == "frames")
        expected[str(folder)] = model(FEATURES)[0]
    save_file({"features": FEATURES}, tmp_path / "features.safetensors")
    results = tmp_path / "results.safetensors"
    run_code(LOAD, tmp_path / "features.safetensors", results, *expected, HF_MODULES_CACHE=tmp_path / "modules")
    found = load_file(results)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_longer_position_table_is_cut(tmp_path):
    model = tiny_model()
    longer = torch.cat([model.pos_embed, torch.ones(1, 88, 32)], dim=1)
    source = write(tmp_path / "a.pt", spoiled(model, pos_embed=longer))
    assert_same_model(convert(source, tmp_path / "out", config=tiny_config()), model)


def test_weights_that_share_memory(tmp_path):
    model = tiny_model()
    weights = authors_weights(model)
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    parts = flat.split([tensor.numel() for tensor in weights.values()])
    shared = {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}
    shared["blocks.1.norm1.weight"] = shared["blocks.0.norm1.weight"]
    source = write(tmp_path / "a.pt", shared)
    model.blocks[1].norm1.weight.data = model.blocks[0].norm1.weight.data
    assert_same_model(convert(source, tmp_path / "out", config=tiny_config()), model)


@pytest.mark.parametrize(
    ("encoder_dtype", "head_dtype", "expected"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_dtype_is_kept_or_the_smallest_that_holds_all(tmp_path, encoder_dtype, head_dtype, expected):
    weights = authors_weights(tiny_probe())
    weights = {n: t.to(head_dtype if n.startswith("head.") else encoder_dtype) for n, t in weights.items()}
    out = convert(write(tmp_path / "a.pt", weights), tmp_path / "out", config=tiny_config())
    saved = load_file(out / "model.safetensors")
    for name, tensor in weights.items():
        found = saved[name if name.startswith("head.") else f"bat.{name}"]
        assert found.dtype == expected
        assert torch.equal(found, tensor.to(expected))
    assert json.loads((out / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


# Config


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 384, "num_attention_heads": 6},
        {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1, "mlp_ratio": 0.3},
        {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 1, "mlp_ratio": 0.25},
        {"hidden_size": 384, "num_attention_heads": 6, "qkv_bias": False, "use_gate": False, "pre_norm": False},
        {"hidden_size": 384, "num_attention_heads": 6, "init_scale_values": 1.0, "patch_size": [16, 32]},
    ],
)
def test_config_is_told_by_the_weights(tmp_path, changes):
    model = tiny_model(**{"mlp_ratio": 0.5, "chunk_time_patches": 64, **changes})
    out = convert(write(tmp_path / "a.pt", authors_weights(model)), tmp_path / "out")
    assert_same_model(out, model)
    found, expected = BatConfig.from_pretrained(out).to_dict(), model.config.to_dict()
    written = {"transformers_version", "architectures", "auto_map", "custom_pipelines", "dtype", "mlp_ratio"}
    assert {k: v for k, v in found.items() if k not in written} == {
        k: v for k, v in expected.items() if k not in written
    }
    assert int(found["hidden_size"] * found["mlp_ratio"]) == model.blocks[0].mlp.fc1.out_features


@pytest.mark.parametrize("form", ["object", "file"])
def test_given_config_adds_what_shapes_cannot_tell(tmp_path, form):
    changes = {
        "layer_norm_first": True,
        "num_attention_heads": 4,
        "init_scale_values": 0.5,
        "mlp_ratio": 2.7,
        "top_db": 60,
        "head_type": "cgp",
        "num_prototypes": 5,
        "id2label": {0: "jay", 1: "wren", 2: "coot"},
        "label2id": {"jay": 0, "wren": 1, "coot": 2},
        "problem_type": "multi_label_classification",
        "recording_site": "pond",
    }
    model = tiny_probe(**changes)
    given = tiny_config(**changes)
    if form == "file":
        given.save_pretrained(tmp_path / "given")
        given = str(tmp_path / "given" / "config.json")
    out = convert(write(tmp_path / "a.pt", authors_weights(model)), tmp_path / "out", config=given)
    assert_same_model(out, model)
    found = BatConfig.from_pretrained(out)
    assert {field: getattr(found, field) for field in changes} == changes
    assert AutoFeatureExtractor.from_pretrained(out).top_db == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"hidden_size=64, but cls_token \(1, 1, 32\) says 32"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers=3, but the number of blocks up to blocks.1 says 2"),
        ({"mlp_ratio": 2}, r"mlp_ratio=2, but blocks.0.mlp.fc1.weight \(128, 32\) says 4.0"),
        ({"qkv_bias": False}, r"qkv_bias=False, but blocks.0.attn.qkv.bias \(96,\) says True"),
        ({"use_gate": False}, r"use_gate=False, but blocks.0.attn.gate.weight \(32, 32\) says True"),
        ({"pre_norm": False}, r"pre_norm=False, but pre_norm.weight \(32,\) says True"),
        ({"init_scale_values": 0.5}, r"init_scale_values=0.5, but the absence of .ls1.s says None"),
        ({"patch_size": [16, 32]}, r"patch_size=\[16, 32\], but patch_embed.proj.weight .* says \[16, 16\]"),
        (
            {"head_type": "protobin"},
            r"head_type='protobin', but head.prototype_vectors .* head.block_attention .* 'cgp'",
        ),
        ({"num_prototypes": 6}, r"num_prototypes=6, but head.prototype_vectors \(5, 32, 1, 1\) says 5"),
        ({"num_labels": 4}, r"num_labels=4, but head.fc.weight \(3, 15\) says 3"),
        ({"id2label": {0: "jay", 1: "wren"}}, r"num_labels=2, but head.fc.weight \(3, 15\) says 3"),
        ({"head_pooling": "mean"}, "head_pooling='mean', but the argument head_pooling says 'cls'"),
    ],
)
def test_config_that_disagrees_is_refused(tmp_path, refuses, changes, message):
    source = write(tmp_path / "a.pt", authors_weights(tiny_probe(**HEADS["cgp"])))
    refuses(source, message, config=tiny_config(**changes))


def test_disagreeing_norm_of_the_head_is_refused(tmp_path, refuses):
    source = write(tmp_path / "a.pt", authors_weights(tiny_probe()))
    refuses(source, r"head_norm=False, but head.ln.weight \(32,\) says True", config=tiny_config(head_norm=False))


def test_unpublished_width_needs_a_config(tmp_path, refuses):
    source = write(tmp_path / "a.pt", authors_weights(tiny_model()))
    refuses(source, "width 32 .* give a config .* with num_attention_heads", config=None)


def test_config_file_must_be_one_of_bat(tmp_path, refuses):
    source = write(tmp_path / "a.pt", authors_weights(tiny_model()))
    refuses(source, "no such file; config is", OSError, config=tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    refuses(source, "model_type is 'vit', not 'bat'", config=tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "bat"')
    refuses(source, "config.json.*not a valid JSON", OSError, config=tmp_path / "config.json")


# Labels


def test_labels_from_a_file(tmp_path):
    source = write(tmp_path / "a.pt", authors_weights(tiny_probe()))
    (tmp_path / "labels.txt").write_text("\ufeffKohlmeise\nAmsel, Männchen\n鳥\n", encoding="utf-8")
    out = convert(source, tmp_path / "out", config=tiny_config(), labels=tmp_path / "labels.txt")
    loaded = AutoModelForAudioClassification.from_pretrained(out)
    assert loaded.config.id2label == {0: "Kohlmeise", 1: "Amsel, Männchen", 2: "鳥"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"], r"2 labels, 2 of them different, for the 3 classes of head.fc.weight \(3, 32\)"),
        (["a", "b", "a"], "3 labels, 2 of them different"),
        (["a", "b", ""], "expected names that are not empty"),
        (["a", "b", 3], "expected names that are not empty"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, refuses, labels, message):
    source = write(tmp_path / "a.pt", authors_weights(tiny_probe()))
    refuses(source, message, labels=labels)


def test_label_files_that_cannot_be_read_are_refused(tmp_path, refuses):
    source = write(tmp_path / "a.pt", authors_weights(tiny_probe()))
    (tmp_path / "labels.txt").write_bytes(b"M\xfcnchen\nb\nc\n")
    refuses(source, "labels.txt: not UTF-8", labels=str(tmp_path / "labels.txt"))
    refuses(source, "nowhere.txt", OSError, labels=tmp_path / "nowhere.txt")


@pytest.mark.parametrize("options", [{"labels": ["a"]}, {"frames": True}, {"head_pooling": "mean"}])
def test_options_of_a_head_without_head_are_refused(tmp_path, refuses, options):
    source = write(tmp_path / "a.pt", authors_weights(tiny_model()))
    refuses(source, "holds no head", **options)


def test_unknown_pooling_is_refused(tmp_path, refuses):
    source = write(tmp_path / "a.pt", authors_weights(tiny_probe()))
    refuses(source, "head_pooling='max' is not valid", head_pooling="max")


# Strictness


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"blocks__1__attn__gate__weight": None}, ["Missing", '"bat.blocks.1.attn.gate.weight"']),
        ({"blocks__0__attn__gate__weight": None}, ["Missing", '"bat.blocks.0.attn.gate.weight"']),
        ({"decoder__x": torch.zeros(3)}, ["Unexpected", '"bat.decoder.x"']),
        (
            {"pre_norm__weight": torch.zeros(16), "blocks__0__norm1__bias": None, "x": torch.zeros(3)},
            ["mismatch for bat.pre_norm.weight", '"bat.blocks.0.norm1.bias"', '"bat.x"'],
        ),
        ({"head__ln__bias": None}, ["Missing", '"head.ln.bias"']),
        ({"head__fc__weight": torch.zeros(3, 31)}, ["mismatch for head.fc.weight"]),
        ({"head__block_attention": torch.zeros(3)}, ["mismatch for head.block_attention"]),
        ({"head__fc__weight": None}, ["head.fc.weight missing"]),
        ({"cls_token": None, "patch_embed__proj__weight": None}, ["cls_token, patch_embed.proj.weight missing"]),
        ({"blocks__0__mlp__fc1__weight": torch.zeros(3)}, ["blocks.0.mlp.fc1.weight has shape (3,); expected 2 axes"]),
        ({"cls_token": torch.zeros(1, 1, 0)}, ["cls_token has shape (1, 1, 0)"]),
        ({"pos_embed": torch.zeros(1, 511, 32)}, ["pos_embed has 511 rows, fewer than the 512 patches"]),
        ({"pos_embed": torch.zeros(1, 512, 16)}, ["mismatch for bat.pos_embed"]),
        ({"cls_token": torch.full((1, 1, 32), torch.nan)}, ["NaN or infinite values in cls_token"]),
        (
            {"head__fc__bias": torch.tensor([0, torch.inf, 0]), "pos_embed": torch.full((1, 600, 32), -torch.inf)},
            ["NaN or infinite values in pos_embed, head.fc.bias"],
        ),
        ({"head__fc__bias": torch.zeros(3).long(), "epoch": 3}, ["dense floating-point tensors: head.fc.bias, epoch"]),
        ({"head__fc__bias": torch.ones(3).to_sparse()}, ["not dense floating-point tensors: head.fc.bias"]),
        ({"head__group_scale": torch.zeros(3)}, ["its head holds head.group_scale", "linear_cgp"]),
    ],
)
def test_weights_that_do_not_fit_are_listed(tmp_path, refuses, changes, messages):
    source = write(tmp_path / "probe.pt", spoiled(tiny_probe(head_type="linear_cgp"), **changes))
    message = refuses(source, "probe.pt: ")
    for part in messages:
        assert part in message


def test_head_beside_the_encoder_is_converted_too(tmp_path):
    model = tiny_probe(head_type="linear")
    weights = authors_weights(model)
    head = {name.removeprefix("head."): weights.pop(name) for name in list(weights) if name.startswith("head.")}
    source = write(tmp_path / "probe.pt", {"encoder": weights, "head": head})
    converted = load_file(convert(source, tmp_path / "out", config=model.config) / "model.safetensors")
    assert all(torch.equal(converted[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", ["encoder", "bare", "student"])
def test_missing_moving_average_is_refused(tmp_path, refuses, layout):
    contents = authors_weights(tiny_model(), "student.encoder." if layout == "student" else "")
    if layout == "encoder":
        contents = trainer_file(contents, {})
        del contents["ema_encoder"]
    source = write(tmp_path / "a.pt", contents)
    refuses(source, 'holds neither "ema_encoder" nor teacher', ema=True)
    convert(source, tmp_path / "out", config=tiny_config())


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([torch.zeros(3)], "holds a list, not a dict"),
        ({}, "cls_token, patch_embed.proj.weight, pos_embed missing.*found 0 names"),
        ({"fc.weight": torch.zeros(3)}, "cls_token.*missing.* found 1 names, the first being fc.weight"),
        ({"state_dict": [1]}, "not a dict from names to tensors"),
        ({3: torch.zeros(3)}, "not a dict from names to tensors"),
        ({"encoder": {}, "ema_encoder": {}}, "cls_token.*missing"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, refuses, contents, message):
    refuses(write(tmp_path / "a.pt", contents), message)


# Files


class RunsCode:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["top", "weight", "args"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_that_wants_to_run_code_is_refused(tmp_path, refuses, place, is_zip):
    made, code = tmp_path / "made", RunsCode(tmp_path / "made")
    contents = trainer_file(authors_weights(tiny_model()), {})
    if place == "top":
        contents = code
    elif place == "weight":
        contents["encoder"]["cls_token"] = code
    else:
        contents["args"].nested.run = code
    source = tmp_path / "evil.pt"
    torch.save(contents, source, _use_new_zipfile_serialization=is_zip)
    message = refuses(source, rf"wants to use {os.system.__module__}.system, .* nothing in it was run")
    assert "weights_only" not in message
    assert not made.exists()
    torch.load(source, weights_only=False)  # it would really have run
    assert made.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_plain_pickle_that_wants_to_run_code_is_refused(tmp_path, refuses):
    for protocol in (2, pickle.HIGHEST_PROTOCOL):  # torch reads the first alone
        source = tmp_path / f"{protocol}.pkl"
        source.write_bytes(pickle.dumps({"cls_token": RunsCode(tmp_path / "made")}, protocol=protocol))
        message = refuses(source, "nothing in it was run", ValueError if protocol == 2 else OSError)
        assert "weights_only" not in message
        assert not (tmp_path / "made").exists()


def test_only_namespaces_and_paths_are_let_through(tmp_path, refuses):
    contents = trainer_file(authors_weights(tiny_model()), {})
    contents["args"].generator = random.Random(0)
    refuses(write(tmp_path / "a.pt", contents), r"wants to use random\.Random, which")
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):  # nowhere else
        torch.load(write(tmp_path / "b.pt", argparse.Namespace(a=1)), weights_only=True)


@pytest.mark.parametrize("suffix", ["zip.pt", "legacy.pt", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, refuses, suffix, kept):
    source, weights = tmp_path / f"cut.{suffix}", authors_weights(tiny_model())
    if suffix == "legacy.pt":
        torch.save(weights, source, _use_new_zipfile_serialization=False)
    else:
        write(source, weights)
    content = source.read_bytes()
    source.write_bytes(content[: int(kept * len(content))])
    message = refuses(source, "Copy or download it again", OSError)
    assert "weights_only" not in message
    assert str(source) in message


def test_what_is_no_checkpoint_is_refused(tmp_path, refuses):
    refuses(tmp_path / "nowhere.pt", "nowhere.pt: no such file", OSError)
    refuses(tmp_path, "a folder; name the file in it", OSError)
    (tmp_path / "notes.pt").write_text("hello world")
    refuses(tmp_path / "notes.pt", "cannot be read as a checkpoint", OSError)
    (tmp_path / "notes.safetensors").write_text("hello world")
    refuses(tmp_path / "notes.safetensors", "not a whole safetensors file", OSError)


def test_target_that_is_there_is_not_touched(tmp_path, refuses):
    model = tiny_model()
    source = write(tmp_path / "a.pt", authors_weights(model))
    refuses(source, r"exists already; name another \(--out\), or remove it", FileExistsError, out=source)
    refuses(source, "there is no folder", FileNotFoundError, out=tmp_path / "no" / "out")
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", config=tiny_config())  # an empty folder is no loss
    refuses(source, "exists already", FileExistsError)
    assert_same_model(tmp_path / "out", model)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch, error):
    source = write(tmp_path / "a.pt", authors_weights(tiny_model()))
    written = []

    def fail(extractor, folder, **options):  # the last file of a model folder
        written.extend(file.name for file in Path(folder).iterdir())
        raise error

    monkeypatch.setattr(BatFeatureExtractor, "save_pretrained", fail)
    with pytest.raises(type(error)):
        convert(source, tmp_path / "out", config=tiny_config())
    assert "model.safetensors" in written
    assert list(tmp_path.iterdir()) == [source]
    monkeypatch.undo()
    convert(source, tmp_path / "out", config=tiny_config())
    assert BatModel.from_pretrained(tmp_path / "out")
