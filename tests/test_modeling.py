"""The encoder: every way of computing the same thing gives the same result."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from conftest import run_python, tiny_config, tiny_model

from bat_audio import BatModel
from bat_audio.modeling_bat import BatBlock, BatDropPath

CHUNK = 64  # frames of one chunk of the tiny model
CLOSE = {"rtol": 0, "atol": 5e-6}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def random_features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def block_by_block(model: BatModel, features: torch.Tensor) -> list[list[torch.Tensor]]:
    """The reference for long inputs: per clip and chunk, the embedded tokens and every block's output."""
    whole_patches = features[:, :, : features.shape[2] // 16 * 16]
    chunks = []
    for chunk in whole_patches.split(CHUNK, dim=2):
        layers = [model.embed(chunk)]
        for block in model.blocks:
            layers.append(block(layers[-1])[0])
        chunks.append(layers)
    return chunks


# Inputs


def test_input_forms_are_equal():
    model, features = tiny_model(), random_features(2, 1, 48, 128)
    expected = model(features).last_hidden_state
    for form in (features[:, 0], features.transpose(2, 3), features[:, 0].transpose(1, 2)):
        assert torch.equal(model(form).last_hidden_state, expected)
    assert torch.equal(model(input_values=features).last_hidden_state, expected)
    assert torch.equal(model.forward_encoder(features), expected)


def test_frames_beyond_the_last_patch_are_dropped():
    model, features = tiny_model(), random_features(1, 1, 3 * CHUNK + 47, 128)
    whole = model(features[:, :, : 3 * CHUNK + 32]).last_hidden_state
    torch.testing.assert_close(model(features).last_hidden_state, whole, **CLOSE)


@pytest.mark.parametrize(
    ("features", "got"),
    [
        (torch.rand(2, 2, 64, 128), "shape (2, 2, 64, 128) and torch.float32"),
        (torch.rand(1, 1, 64, 80), "shape (1, 1, 64, 80) and torch.float32"),
        (torch.rand(1, 64, 80), "shape (1, 64, 80) and torch.float32"),
        (torch.rand(1, 1, 15, 128), "shape (1, 1, 15, 128) and torch.float32"),
        (torch.rand(1, 1, 128, 15), "shape (1, 1, 128, 15) and torch.float32"),
        (torch.ones(1, 1, 64, 128, dtype=torch.int64), "shape (1, 1, 64, 128) and torch.int64"),
        (torch.rand(0, 1, 64, 128), "shape (0, 1, 64, 128) and torch.float32"),
        (torch.rand(1, 1, 0, 128), "shape (1, 1, 0, 128) and torch.float32"),
        (torch.rand(64, 128), "shape (64, 128) and torch.float32"),
        (torch.rand(1, 1, 1, 64, 128), "shape (1, 1, 1, 64, 128) and torch.float32"),
        ([[0.0]], "type list"),
    ],
)
def test_wrong_input_is_refused(features, got):
    with pytest.raises(ValueError, match="BatModel got input_features") as error:
        tiny_model()(features)
    assert str(error.value) == (
        f"BatModel got input_features of {got}; expected log-mel features as a floating-point tensor (batch, 1, "
        "frames, 128), (batch, frames, 128) or mel-first (batch, 1, 128, frames), with at least one clip and 16 frames."
    )


def test_neither_or_both_inputs_are_refused():
    model, features = tiny_model(), random_features(1, 1, 64, 128)
    with pytest.raises(ValueError, match="neither input_features nor input_values"):
        model()
    with pytest.raises(ValueError, match="both input_features and input_values"):
        model(features, input_values=features)


# Outputs


def test_output_fields():
    model, features = tiny_model(), random_features(2, 1, 48, 128)
    output = model(features, output_hidden_states=True, output_attentions=True)
    tokens = output.last_hidden_state
    assert tokens.shape == (2, 1 + 3 * 8, 32)
    assert torch.equal(output.pooler_output, tokens[:, 0])
    for time in range(3):
        for mel in range(8):
            assert torch.equal(output.patch_tokens[:, :, time, mel], tokens[:, 1 + 8 * time + mel])
    assert len(output.hidden_states) == 1 + 2
    assert torch.equal(output.hidden_states[0], model.embed(features))
    assert torch.equal(output.hidden_states[-1], tokens)
    assert [weights.shape for weights in output.attentions] == [(2, 2, 25, 25)] * 2
    plain = model(features)
    assert plain.hidden_states is None
    assert plain.attentions is None
    as_tuple = model(features, return_dict=False)
    assert len(as_tuple) == 3
    assert torch.equal(as_tuple[1], plain.pooler_output)
    everything = model(features, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert len(everything) == len(output.keys()) == 5
    assert torch.equal(everything[3][1], output["hidden_states"][1])
    assert torch.equal(everything[4][1], output["attentions"][1])


def test_extract_features_are_the_blocks_outputs():
    model, features = tiny_model(), random_features(2, 1, 2 * CHUNK + 16, 128)
    blocks = model(features, output_hidden_states=True).hidden_states[1:]
    layers = model.extract_features(features)
    assert torch.equal(layers["cls_tokens"], torch.stack([tokens[:, 0] for tokens in blocks]))
    patches = torch.stack([tokens[:, 1:].transpose(1, 2).unflatten(2, (9, 8)) for tokens in blocks])
    assert torch.equal(layers["patch_tokens"], patches)


def test_config_chooses_default_outputs():
    model = tiny_model(output_hidden_states=True, attn_implementation="eager")
    model.config.output_attentions = True
    output = model(random_features(1, 1, 32, 128))
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2


def test_other_layers_tokens_are_kept_only_when_asked_for():
    model, features = tiny_model(num_hidden_layers=4), random_features(1, 1, 64, 128)
    produced = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: produced.append(weakref.ref(output[0])))

    def alive_at_the_end(**options) -> int:
        produced.clear()
        with torch.no_grad():
            output = model(features, **options)
        gc.collect()
        alive = sum(reference() is not None for reference in produced)
        assert output.last_hidden_state is not None
        return alive

    assert alive_at_the_end() == 1
    assert alive_at_the_end(output_hidden_states=True) == 4


# Batches and chunks


@pytest.mark.parametrize("frames", [16, 48, CHUNK, 2 * CHUNK + 20])
@pytest.mark.parametrize("device", DEVICES)
def test_batch_equals_single(frames, device):
    model, features = tiny_model().to(device), random_features(3, 1, frames, 128).to(device)
    together = model(features).last_hidden_state
    alone = torch.cat([model(clip[None]).last_hidden_state for clip in features])
    torch.testing.assert_close(together, alone, **CLOSE)


@pytest.mark.parametrize("max_chunks_per_pass", [1, 4, 16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "frames", [CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 16, 3 * CHUNK - 1, 3 * CHUNK, 3 * CHUNK + 17, 7 * CHUNK]
)
def test_folded_chunks_equal_chunk_by_chunk(frames, batch, max_chunks_per_pass):
    model = tiny_model(max_chunks_per_pass=max_chunks_per_pass)
    features = random_features(batch, 1, frames, 128)
    output = model(features, output_hidden_states=True)
    reference = block_by_block(model, features)
    for layer, tokens in enumerate(output.hidden_states):
        cls_tokens = torch.stack([chunk[layer][:, 0] for chunk in reference]).mean(0)
        patches = torch.cat([chunk[layer][:, 1:] for chunk in reference], dim=1)
        torch.testing.assert_close(tokens[:, 0], cls_tokens, **CLOSE)
        torch.testing.assert_close(tokens[:, 1:], patches, **CLOSE)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize(
    ("batch", "frames", "expected"),
    [
        (1, 11 * CHUNK + 32, [4, 4, 3, 1]),
        (2, 4 * CHUNK, [4, 4]),
        (3, 2 * CHUNK + 16, [3, 3, 3]),
        (9, CHUNK, [9]),
        (9, 32, [9]),
    ],
)
def test_chunks_share_passes_of_bounded_size(batch, frames, expected):
    model, rows = tiny_model(max_chunks_per_pass=4), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model(random_features(batch, 1, frames, 128))
    assert rows == expected


@pytest.mark.parametrize(
    ("batch", "frames", "expected"),
    [(5, CHUNK, [2, 2, 1]), (1, 4 * CHUNK + 32, [2, 2, 1]), (5, CHUNK // 2, [4, 1]), (3, 16, [3])],
)
def test_inference_takes_a_few_clips_per_core(monkeypatch, batch, frames, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model, rows = tiny_model(), []
    features = random_features(batch, 1, frames, 128)
    together = model(features, output_hidden_states=True, output_attentions=True)  # with a graph: all at once
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.inference_mode():
        output = model(features, output_hidden_states=True, output_attentions=True)
    assert rows == expected
    torch.testing.assert_close(output.to_tuple(), together.to_tuple(), **CLOSE)


def test_long_input_on_a_cpu_passes_as_much_as_stays_in_cache(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model, features, rows = tiny_model(), random_features(1, 1, 5 * CHUNK + 32, 128), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model(features)
    assert rows == [5, 1]
    rows.clear()
    with torch.inference_mode():
        model(features)
    assert rows == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("batch", "frames", "expected"),
    [(1, 5 * CHUNK, [2, 2, 1]), (5, CHUNK, [2, 2, 1]), (9, CHUNK // 2, [4, 4, 1]), (3, CHUNK + 16, [2, 1, 3])],
)
def test_many_cores_take_no_more_than_the_chunks_of_a_pass(monkeypatch, batch, frames, expected):
    """Over time and batch, so that large batches are bounded too; short clips count as parts of a chunk."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    model, rows = tiny_model(max_chunks_per_pass=2), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.inference_mode():
        model(random_features(batch, 1, frames, 128))
    assert rows == expected


def test_batch_of_long_clips_in_inference_equals_single(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model, rows = tiny_model(), []
    features = random_features(3, 1, 2 * CHUNK + 32, 128)
    with torch.inference_mode():
        alone = [model(clip[None]).to_tuple() for clip in features]
        model.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        together = model(features).to_tuple()
    assert rows == [2, 1, 2, 1, 3]  # two passes of three chunks, and one of the shorter rests
    torch.testing.assert_close(together, tuple(map(torch.cat, zip(*alone, strict=True))), **CLOSE)


def test_attentions_of_long_inputs():
    model, features = tiny_model(max_chunks_per_pass=4), random_features(2, 1, 3 * CHUNK + 32, 128)
    attentions = model(features, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        assert weights.shape == (2 * 4, 2, 33, 33)
        for clip in range(2):
            for number, chunk in enumerate(features[clip : clip + 1].split(CHUNK, dim=2)):
                alone = model(chunk, output_attentions=True).attentions[layer]
                tokens = alone.shape[-1]
                folded = weights[4 * clip + number]
                torch.testing.assert_close(folded[:, :tokens, :tokens], alone[0], **CLOSE)
                assert folded[:, tokens:].abs().sum() == 0
                assert folded[:, :, tokens:].abs().sum() == 0


# Attention implementations


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(implementation):
    features = random_features(2, 1, CHUNK, 128)
    model = tiny_model(attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        torch.testing.assert_close(
            model(features).last_hidden_state, tiny_model()(features).last_hidden_state, rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_output_attentions_are_real_under_every_implementation(implementation):
    features = random_features(2, 1, 48, 128)
    output = tiny_model(attn_implementation=implementation)(features, output_attentions=True)
    eager = tiny_model(attn_implementation="eager")(features, output_attentions=True)
    for weights, expected in zip(output.attentions, eager.attentions, strict=True):
        torch.testing.assert_close(weights, expected, **CLOSE)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 25), **CLOSE)
    torch.testing.assert_close(output.last_hidden_state, eager.last_hidden_state, **CLOSE)


def test_attention_implementation_can_be_changed_later(caplog):
    model = tiny_model()
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert model.blocks[0].attn.config._attn_implementation == "eager"
    assert "does not support" not in caplog.text


def test_flash_attention_is_declared():
    """The flag lets Transformers choose it; without the package or a GPU its own error says what is missing."""
    assert BatModel._supports_flash_attn
    if not torch.cuda.is_available():
        with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
            tiny_model(attn_implementation="flash_attention_2")


# Training


def gradients(model: BatModel, features: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(features).last_hidden_state.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def saved_bytes(model: BatModel, features: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters left out."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(features)
    return sum(kept.values())


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(options):
    model, features = tiny_model(num_hidden_layers=4).train(), random_features(2, 1, CHUNK + 32, 128)
    plain, plain_bytes = gradients(model, features), saved_bytes(model, features)
    model.gradient_checkpointing_enable(options)
    assert model.is_gradient_checkpointing
    calls = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, features)
    assert len(calls) == 2 * 2 * 4  # forward and recomputation, two passes, four blocks
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    assert saved_bytes(model, features) < 0.35 * plain_bytes
    model.gradient_checkpointing_disable()
    calls.clear()
    gradients(model, features)
    assert len(calls) == 2 * 4


def test_gradient_checkpointing_trains_blocks_behind_frozen_embeddings():
    model, features = tiny_model().train(), random_features(1, 1, 48, 128)
    for module in (model.patch_embed, model.pre_norm):
        module.requires_grad_(False)
    model.cls_token.requires_grad_(False)
    plain = gradients(model, features)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, features)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_every_parameter_gets_a_gradient():
    for changes in ({}, {"layer_norm_first": True, "init_scale_values": 0.1, "pos_trainable": True}):
        model = tiny_model(**changes).train()
        assert gradients(model, random_features(1, 1, 48, 128)).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    drop_path, branch = BatDropPath(rate), torch.ones(4000, 3, 2)
    dropped = drop_path(branch)
    per_sample = dropped.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    if rate == 1:
        assert dropped.abs().sum() == 0
    else:
        kept = per_sample[per_sample[:, 0] > 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
        assert abs(dropped.mean() - 1) < 0.03
    assert drop_path.eval()(branch) is branch


def test_drop_path_rate_rises_linearly():
    model = tiny_model(num_hidden_layers=5, drop_path_rate=0.4)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert tiny_model(num_hidden_layers=1, drop_path_rate=0.4).blocks[0].drop_path.rate == 0


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_regularisation_acts_in_training_only(field, implementation):
    features = random_features(4, 1, 48, 128)
    model = tiny_model(attn_implementation=implementation, **{field: 0.5})
    plain = tiny_model(attn_implementation=implementation)
    assert torch.equal(model(features).last_hidden_state, plain(features).last_hidden_state)
    model.train()
    first, second = model(features).last_hidden_state, model(features).last_hidden_state
    assert not torch.equal(first, second)


def test_layer_scale_starts_at_its_value():
    model = BatModel(tiny_config(init_scale_values=0.01))
    for block in model.blocks:
        assert torch.equal(block.ls1.s, torch.full((32,), 0.01))
        assert torch.equal(block.ls2.s, torch.full((32,), 0.01))


def test_initial_weights():
    torch.manual_seed(0)
    model = BatModel(tiny_config(hidden_size=192, num_attention_heads=3))
    weight = model.blocks[0].mlp.fc1.weight
    bound = (6 / (192 + 768)) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound
    assert abs(weight.std() - bound / 3**0.5) < 0.02 * bound
    assert model.blocks[0].mlp.fc1.bias.abs().sum() == 0
    assert torch.equal(model.pre_norm.weight, torch.ones(192))
    assert 0.015 < model.cls_token.std() < 0.025
    assert torch.equal(model.pos_embed, model.position_table())


def test_frozen_positions_stay_frozen_and_trainable_ones_move(tmp_path):
    features = random_features(1, 1, 48, 128)
    for pos_trainable in (False, True):
        tiny_model(pos_trainable=pos_trainable).save_pretrained(tmp_path)
        model = BatModel.from_pretrained(tmp_path).train()
        before = model.pos_embed.clone()
        assert ("pos_embed" in dict(model.named_parameters())) == pos_trainable
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradients(model, features)
        optimizer.step()
        assert torch.equal(model.pos_embed, before) != pos_trainable
        assert model.pos_embed.requires_grad == pos_trainable


# Precision, compilation and placement


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_error_is_no_larger_than_the_eager_model_s_own(dtype, device):
    features = random_features(2, 1, 2 * CHUNK, 128).to(device)
    with torch.no_grad():
        exact = tiny_model().double().to(device)(features.double()).last_hidden_state

        def error(implementation: str) -> float:
            model = tiny_model(attn_implementation=implementation).to(device, dtype)
            output = model(features).last_hidden_state
            assert output.dtype == dtype
            return (output.double() - exact).abs().mean().item()

        assert error("sdpa") <= 3 * error("eager")


def test_autocast_keeps_the_model_usable():
    features = random_features(1, 1, CHUNK + 16, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_model()(features, output_hidden_states=True)
    exact = tiny_model()(features).last_hidden_state
    assert (output.last_hidden_state - exact).abs().max() < 0.1


CASES = {
    "short": ({}, 48, {}),
    "chunks": ({}, 2 * CHUNK + 16, {}),
    "all outputs": ({}, CHUNK + 16, {"output_hidden_states": True, "output_attentions": True}),
    "prenorm": ({"layer_norm_first": True, "init_scale_values": 0.1, "pre_norm": False, "use_gate": False}, 48, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_graph_breaks(case):
    changes, frames, options = CASES[case]
    torch.compiler.reset()
    model, features = tiny_model(**changes), random_features(2, 1, frames, 128)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(features, **options)
    plain = model(features, **options)
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, **CLOSE, msg=key)


def test_one_compiled_model_takes_many_lengths():
    """Each length has a graph of its own; that of the gradients, which takes as long, is compiled in the next test."""
    torch.compiler.reset()
    model = tiny_model().requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for frames in (16, 48, CHUNK, CHUNK + 16, 2 * CHUNK, 3 * CHUNK + 32):
        features = random_features(2, 1, frames, 128)
        torch.testing.assert_close(compiled(features).last_hidden_state, model(features).last_hidden_state, **CLOSE)


def test_training_step_compiles_without_graph_breaks():
    torch.compiler.reset()
    model, features = tiny_model(drop_path_rate=0.0).train(), random_features(2, 1, CHUNK + 16, 128)
    plain = gradients(model, features)
    step = torch.compile(lambda x: model(x).last_hidden_state.square().mean(), fullgraph=True, backend="aot_eager")
    model.zero_grad()
    step(features).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_compiled_equals_eager():
    torch.compiler.reset()
    model, features = tiny_model(), random_features(2, 1, CHUNK + 16, 128)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(
            compiled(features).last_hidden_state, model(features).last_hidden_state, rtol=0, atol=2e-5
        )


def test_device_map_splits_between_blocks(tmp_path):
    model, features = tiny_model(), random_features(1, 1, CHUNK + 16, 128)
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in model.named_children()}
    device_map |= {"cls_token": "cpu", "pos_embed": "cpu", "blocks.0": "cpu", "blocks.1": "disk"}
    del device_map["blocks"]
    split = BatModel.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        assert torch.equal(split(features).last_hidden_state, model(features).last_hidden_state)
    automatic = BatModel.from_pretrained(tmp_path / "model", device_map="auto").eval()
    features = features.to(automatic.device)
    torch.testing.assert_close(automatic(features).last_hidden_state.cpu(), model(features.cpu()).last_hidden_state)
    assert BatModel._no_split_modules == [BatBlock.__name__]


def test_input_embeddings_can_be_replaced():
    model, features = tiny_model(), random_features(1, 1, 32, 128)
    assert model.get_input_embeddings() is model.patch_embed.proj
    before = model(features).last_hidden_state
    replacement = copy.deepcopy(model.patch_embed.proj)
    model.set_input_embeddings(replacement)
    assert torch.equal(model(features).last_hidden_state, before)
    torch.nn.init.zeros_(replacement.weight)
    assert not torch.equal(model(features).last_hidden_state, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu():
    model, features = tiny_model(), random_features(2, 1, 2 * CHUNK + 32, 128)
    cpu = model(features).last_hidden_state
    cuda = copy.deepcopy(model).cuda()(features.cuda()).last_hidden_state
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=1e-3)


PEAK_OF_MINUTES = """
import re, sys, torch
from bat_audio import BatConfig, BatModel

def status(key):
    return int(re.search(rf"^{key}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.MULTILINE)[1]) * 1024

model = BatModel(BatConfig(num_hidden_layers=1)).eval()
features = torch.rand(1, 1, int(sys.argv[1]) * 6000, 128)
with torch.inference_mode():
    model(features[:, :, :1024])
    before = status("VmRSS")
    tokens = model(features).last_hidden_state
print(status("VmHWM") - before - 4 * tokens.numel())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_beyond_the_output_does_not_grow_with_the_length():
    """It did: small tensors that stayed between the passes kept freed memory from being used again."""
    # Every large tensor is mapped by itself, so that what glibc keeps of freed ones does not count.
    environment = {"OMP_NUM_THREADS": 1, "MALLOC_MMAP_THRESHOLD_": 2**20}
    ten_minutes, hour = (int(run_python(PEAK_OF_MINUTES, minutes, **environment).stdout) for minutes in (10, 60))
    print(f"beyond the output: {ten_minutes / 1e6:.1f} MB in ten minutes, {hour / 1e6:.1f} MB in an hour")
    assert hour < 1.1 * ten_minutes + 3e6
    assert hour < 25e6  # 17 MB: a block of one chunk; with 16 chunks in a pass it was 49 MB
