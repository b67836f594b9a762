"""Saving and loading: bit-equal, strict by default, on every door that Transformers has."""

import json

import pytest
import torch
from conftest import TESTS, tiny_config, tiny_model
from programs import run_code
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from bat_audio import BatConfig, BatModel, BatPreTrainedModel
from bat_audio.modeling_bat import AUTO_MAP


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny checkpoint, and the model in it."""
    model = tiny_model(init_scale_values=0.5)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_then_load_is_bit_equal(saved, dtype):
    folder, model = saved
    model.to(dtype).save_pretrained(folder)
    for loaded in (BatModel.from_pretrained(folder, dtype=dtype), AutoModel.from_pretrained(folder, dtype=dtype)):
        assert not loaded.training
        assert loaded.config.to_dict().items() >= {"init_scale_values": 0.5, "hidden_size": 32}.items()
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        features = torch.rand(1, 1, 80, 128)
        assert torch.equal(loaded(features).last_hidden_state, model(features).last_hidden_state)


def test_state_dict_names_are_the_published_ones():
    block = [f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")]
    block += [f"attn.{layer}.{kind}" for layer in ("qkv", "proj", "gate") for kind in ("weight", "bias")]
    block += [f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")] + ["ls1.s", "ls2.s"]
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    names |= {"pre_norm.weight", "pre_norm.bias"} | {f"blocks.{i}.{name}" for i in range(2) for name in block}
    assert tiny_model(init_scale_values=0.5).state_dict().keys() == names


def test_checkpoint_that_does_not_fit_is_refused_with_a_list(saved):
    folder, _ = saved

    def spoil(weights):
        del weights["blocks.0.attn.gate.weight"], weights["pos_embed"]
        weights["blocks.7.attn.gate.weight"] = torch.zeros(32, 32)
        weights["pre_norm.weight"] = torch.zeros(16)

    change_weights(folder, spoil)
    for load in (BatModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="does not hold the weights of this BatModel") as error:
            load(folder)
        message = str(error.value)
        assert "2 missing: blocks.0.attn.gate.weight, pos_embed" in message
        assert "1 unexpected: blocks.7.attn.gate.weight" in message
        assert "1 misshapen: pre_norm.weight (expected (32,))" in message
        assert "strict=False" in message


def test_misshapen_weights_alone_are_refused(saved):
    folder, _ = saved
    change_weights(folder, lambda weights: weights.update(cls_token=torch.zeros(1, 1, 8)))
    with pytest.raises(ValueError, match=r"1 misshapen: cls_token \(expected \(1, 1, 32\)\)"):
        BatModel.from_pretrained(folder)
    loaded = BatModel.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert 0 < loaded.cls_token.std() < 0.1


@pytest.mark.parametrize("load", [BatModel.from_pretrained, AutoModel.from_pretrained])
def test_lenient_load_initializes_what_is_missing_and_nothing_else(saved, load):
    folder, model = saved
    missing = ["pos_embed", "blocks.0.mlp.fc1.bias", "blocks.1.ls1.s", "pre_norm.weight"]

    def remove(weights):
        for name in missing:
            del weights[name]

    change_weights(folder, remove)
    loaded, info = load(folder, strict=False, output_loading_info=True)
    assert set(info["missing_keys"]) == set(missing)
    initial = BatModel(tiny_config(init_scale_values=0.5)).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, initial[name] if name in missing else model.state_dict()[name]), name


class HeadModel(BatPreTrainedModel):
    """What a user puts on top of the encoder."""

    def __init__(self, config):
        super().__init__(config)
        self.bat = BatModel(config)
        self.head = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()


def test_head_model_and_encoder_load_from_each_other(saved, tmp_path):
    folder, encoder = saved
    with_head, info = HeadModel.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"head.weight", "head.bias"}
    with_head.save_pretrained(tmp_path / "head")
    for model in (with_head.bat, BatModel.from_pretrained(tmp_path / "head")):
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
    again = HeadModel.from_pretrained(tmp_path / "head")
    assert torch.equal(again.head.weight, with_head.head.weight)
    change_weights(tmp_path / "head", lambda weights: weights.update({"head.bias": torch.zeros(5)}))
    with pytest.raises(ValueError, match=r"1 misshapen: head.bias \(expected \(3,\)\)"):
        HeadModel.from_pretrained(tmp_path / "head")


@pytest.mark.parametrize("load", [HeadModel.from_pretrained, BatModel.from_pretrained])
def test_encoder_faults_are_found_across_head_and_encoder(saved, tmp_path, load):
    folder, _ = saved
    if load.__self__ is BatModel:
        HeadModel.from_pretrained(folder).save_pretrained(tmp_path / "head")
        folder = tmp_path / "head"
    weights = load_file(folder / "model.safetensors")
    prefix = "bat." if "bat.cls_token" in weights else ""

    def spoil(weights):
        del weights[f"{prefix}blocks.0.attn.gate.weight"]
        weights[f"{prefix}blocks.7.norm1.weight"] = torch.zeros(32)

    change_weights(folder, spoil)
    with pytest.raises(ValueError, match=r"1 missing: .*blocks.0.attn.gate.weight\n.*1 unexpected: .*blocks.7.norm1"):
        load(folder)


def test_loading_info_is_returned_when_asked_for(saved):
    folder, _ = saved
    model, info = BatModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, BatModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_auto_classes_know_the_installed_package():
    config = AutoConfig.for_model("bat", hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    assert isinstance(config, BatConfig)
    assert isinstance(AutoModel.from_config(config), BatModel)


@pytest.mark.parametrize("major", [4, 5])
def test_config_written_by_the_other_major_version_is_the_same(major):
    expected = BatConfig(
        hidden_size=384,
        num_attention_heads=6,
        drop_path_rate=0.1,
        init_scale_values=1e-5,
        layer_norm_eps=1e-12,
        recording_site="pond",
    )
    assert BatConfig.from_pretrained(TESTS / "golden" / f"config_transformers{major}") == expected


AUTO_MAPS = {
    "config.json": AUTO_MAP,
    "preprocessor_config.json": {"AutoFeatureExtractor": "processing_bat.BatFeatureExtractor"},
}
SAVE_AND_LOAD = """
import sys, torch
from pathlib import Path
from transformers import AutoFeatureExtractor, AutoModel
source, target = map(Path, sys.argv[1:])
model = AutoModel.from_pretrained(source, trust_remote_code=True).eval()
extractor = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=True)
model.save_pretrained(target)
extractor.save_pretrained(target)
print(sorted(file.name for file in target.iterdir()))
features = torch.rand(1, 1, 160, 128, generator=torch.Generator().manual_seed(0))
print(model(features).last_hidden_state.double().sum().item())
"""
LOAD = """
import sys, torch
from transformers import AutoFeatureExtractor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
extractor = AutoFeatureExtractor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not hasattr(sys.modules.get("bat_audio"), "BatModel")
features = torch.rand(1, 1, 160, 128, generator=torch.Generator().manual_seed(0))
print(model(features).last_hidden_state.double().sum().item())
print(extractor.to_dict() == AutoFeatureExtractor.from_pretrained(sys.argv[1], trust_remote_code=True).to_dict())
"""


def test_saved_folder_carries_the_code_and_loads_alone(tmp_path, saved):
    source, _ = saved  # saved by the installed package, so its code is that of the repository
    first = run_code(SAVE_AND_LOAD, source, tmp_path / "out", HF_MODULES_CACHE=tmp_path / "modules1")
    files, value = first.stdout.splitlines()
    code = {"audio_bat.py", "configuration_bat.py", "modeling_bat.py", "pipeline_bat.py", "processing_bat.py"}
    assert code <= set(json.loads(files.replace("'", '"')))
    for reference in ("config.json", "preprocessor_config.json"):
        auto_map = json.loads((tmp_path / "out" / reference).read_text())["auto_map"]
        assert auto_map == AUTO_MAPS[reference]
    original, copied = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert original.keys() == copied.keys()
    assert all(torch.equal(original[name], copied[name]) for name in original)
    second = run_code(LOAD, tmp_path / "out", HF_MODULES_CACHE=tmp_path / "modules2")
    assert second.stdout.splitlines() == [value, "True"]
