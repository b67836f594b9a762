"""The heads alone and on the encoder: golden outputs, block by block = on the dict, losses, events, loading."""

import inspect
import math

import pytest
import torch
from conftest import TESTS, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from bat_audio import BatConfig, BatForAudioClassification, BatForAudioFrameClassification, BatHead, BatModel
from bat_audio.modeling_bat import BlockReader, asymmetric_loss

GOLDEN = load_file(TESTS / "golden" / "heads.safetensors")
HEADS = ["linear", "linear_cgp", "cgp", "protobin"]
POOLINGS = ["cls", "mean"]


def head_model(cls=BatForAudioClassification, **changes):
    """A tiny model with a head, in eval mode, with weights far from their initial values."""
    torch.manual_seed(1)
    settings = {"num_labels": 3, "num_prototypes": 7, "num_hidden_layers": 3, **changes}
    model = cls(tiny_config(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def features_of(batch=2, frames=64):
    return torch.rand(batch, 1, frames, 128, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("name", "head_type", "pooling", "per_frame"),
    [
        ("linear_cls", "linear", "cls", False),
        ("linear_mean", "linear", "mean", False),
        ("linear_frame", "linear", "cls", True),
        ("linear_cgp_cls", "linear_cgp", "cls", False),
        ("linear_cgp_frame", "linear_cgp", "mean", True),
        ("cgp_cls", "cgp", "cls", False),
        ("cgp_mean", "cgp", "mean", False),
        ("cgp_frame", "cgp", "cls", True),
        ("protobin_clip", "protobin", "cls", False),
        ("protobin_frame", "protobin", "cls", True),
    ],
)
def test_golden(name, head_type, pooling, per_frame):
    layers, _, width = GOLDEN["cls_tokens"].shape
    config = BatConfig(
        head_type=head_type, head_pooling=pooling, num_prototypes=11, num_labels=5, hidden_size=width,
        num_hidden_layers=layers, num_attention_heads=3,
    )  # fmt: skip
    head = BatHead(config, per_frame=per_frame).eval()
    prefix = f"{name}.weights."
    head.load_state_dict({key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)})
    logits = head({"cls_tokens": GOLDEN["cls_tokens"], "patch_tokens": GOLDEN["patch_tokens"]})
    torch.testing.assert_close(logits, GOLDEN[f"{name}.output"], rtol=0, atol=1e-5)


def test_linear_without_norm_is_one_linear_layer():
    model = head_model(head_norm=False)
    expected = model.head.fc(model.bat(features_of()).pooler_output)
    torch.testing.assert_close(model(features_of()).logits, expected)


def test_binary_prototypes_pass_their_gradient_straight_through():
    model = head_model(head_type="protobin")
    vectors = model.head.prototype_vectors
    signs = nn.Parameter(torch.where(vectors >= 0, 1.0, -1.0))
    model(features_of()).logits.sum().backward()
    gradient = vectors.grad.clone()
    model.head.prototype_vectors = signs
    model(features_of()).logits.sum().backward()
    torch.testing.assert_close(gradient, signs.grad)


def test_dropout_is_the_heads_own_unless_given():
    for name in HEADS:
        assert head_model(head_type=name).head.dropout.p == (0.2 if name == "cgp" else 0)
    assert head_model(head_type="cgp", head_dropout=0.0).head.dropout.p == 0


@pytest.mark.parametrize("frames", [64, 80, 200], ids=["one chunk", "chunk and rest", "three chunks and rest"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("cls", [BatForAudioClassification, BatForAudioFrameClassification])
def test_block_by_block_equals_the_dict(monkeypatch, cls, head_type, pooling, frames):
    model = head_model(cls, head_type=head_type, head_pooling=pooling, max_chunks_per_pass=2)
    features = features_of(frames=frames)
    logits = model(features).logits
    torch.testing.assert_close(logits, model.head(model.bat.extract_features(features)))
    assert logits.shape == ((2, 3) if cls is BatForAudioClassification else (2, frames // 16, 3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # inference then takes one chunk at a time
    with torch.inference_mode():
        torch.testing.assert_close(model(features).logits, logits)


@pytest.mark.parametrize("head_type", HEADS)
def test_batch_equals_single(head_type):
    for cls in (BatForAudioClassification, BatForAudioFrameClassification):
        model = head_model(cls, head_type=head_type)
        features = features_of(batch=3, frames=80)
        singles = [model(clip[None]).logits for clip in features]
        torch.testing.assert_close(model(features).logits, torch.cat(singles))


@pytest.mark.parametrize("head_type", ["cgp", "protobin"])
def test_prototypes_in_parts_equal_all_at_once(monkeypatch, head_type):
    model = head_model(head_type=head_type)
    whole = model(features_of()).logits
    monkeypatch.setattr("bat_audio.modeling_bat.PROTOTYPES_AT_ONCE", 3)
    torch.testing.assert_close(model(features_of()).logits, whole)
    with torch.no_grad():
        torch.testing.assert_close(model(features_of()).logits, whole)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("head_type", HEADS)
def test_gradient_checkpointing_gives_the_same_gradients(head_type, frozen):
    def gradients(checkpointed):
        model = head_model(head_type=head_type, head_dropout=0.0).train()
        if frozen:
            model.freeze_base_model()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(features_of(frames=80), labels=torch.tensor([0, 2])).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert all(name.startswith("head.") for name in plain) == frozen
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


class PatchMean:
    """A reader that is no head: the sum over the blocks of each clip's mean patch token, beside the last CLS token."""

    block_attention = None

    def mix_patches(self, mix, layer, patch_tokens):
        return patch_tokens if mix is None else mix + patch_tokens

    def mix_cls(self, cls_tokens):
        return cls_tokens[-1]

    def classify(self, cls_mix, patch_mix):
        return torch.cat([cls_mix, patch_mix.mean(dim=(2, 3))], dim=1)


@pytest.mark.parametrize("reader", [BatHead, PatchMean])
def test_readers_follow_the_protocol(reader):
    methods = {name: value for name, value in vars(BlockReader).items() if callable(value) and name[0] != "_"}
    assert {"mix_patches", "mix_cls", "classify"} <= methods.keys()
    for name, method in methods.items():
        assert list(inspect.signature(getattr(reader, name)).parameters) == list(inspect.signature(method).parameters)
    instance = BatHead(tiny_config()) if reader is BatHead else reader()
    assert all(hasattr(instance, name) for name in BlockReader.__annotations__)


@pytest.mark.parametrize("frames", [64, 200], ids=["one chunk", "three chunks and rest"])
def test_any_reader_is_fed_block_by_block(monkeypatch, frames):
    model, features = tiny_model(num_hidden_layers=3, max_chunks_per_pass=2), features_of(batch=3, frames=frames)
    layers = model.extract_features(features)
    expected = torch.cat([layers["cls_tokens"][-1], layers["patch_tokens"].sum(dim=0).mean(dim=(2, 3))], dim=1)
    output, found = model.encode(features, head=PatchMean())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(output.last_hidden_state, model(features).last_hidden_state)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # Inference then takes two clips or chunks at a time.
    with torch.inference_mode():
        torch.testing.assert_close(model.encode(features, head=PatchMean())[1], expected)


def peak_bytes(step) -> int:
    """Most bytes that were allocated at a time during the call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    balance = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            balance += event.nbytes()
            highest = max(highest, balance)
    return highest


@pytest.mark.parametrize("head_type", ["linear_cgp", "cgp"])
def test_checkpointed_probe_holds_few_blocks_tokens(head_type):
    """Peak memory of forward and backward pass does not grow with the number of blocks; without checkpoints it does."""

    def peak(layers, checkpointing):
        model = head_model(head_type=head_type, head_pooling="mean", num_hidden_layers=layers).train()
        model.freeze_base_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        labels = torch.zeros(8, dtype=torch.long)
        model(features_of(batch=8), labels=labels).loss.backward()  # the gradients' own memory
        return peak_bytes(lambda: model(features_of(batch=8), labels=labels).loss.backward())

    one_copy = 8 * 33 * 32 * 4
    assert peak(16, True) - peak(4, True) < one_copy
    if head_type == "cgp":
        assert peak(16, False) - peak(4, False) > 6 * one_copy


def test_checkpointed_probe_under_autocast_equals_the_plain_one():
    def gradient(checkpointing):
        model = head_model(head_type="cgp", head_dropout=0.0).train()
        model.freeze_base_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(features_of(), labels=torch.tensor([0, 2])).loss
        loss.backward()
        return model.head.block_attention.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-7)


def test_inference_holds_few_blocks_tokens():
    """Peak memory of the encoder with a cgp head does not grow with the number of blocks."""

    def peak(layers):
        model = head_model(head_type="cgp", num_hidden_layers=layers)
        with torch.no_grad():
            return peak_bytes(lambda: model(features_of(batch=8)))

    assert peak(12) - peak(3) < 8 * 33 * 32 * 4


@pytest.mark.parametrize("head_type", HEADS)
def test_compiled_equals_eager(head_type):
    model = head_model(head_type=head_type)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(features_of(frames=80)).logits, model(features_of(frames=80)).logits)


def test_hidden_states_and_attentions_are_the_encoders():
    model = head_model(head_type="cgp")
    output = model(features_of(), output_hidden_states=True, output_attentions=True)
    expected = model.bat(features_of(), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output.hidden_states, expected.hidden_states)
    torch.testing.assert_close(output.attentions, expected.attentions)
    logits, hidden_states = model(features_of(), output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(logits, output.logits)
    torch.testing.assert_close(hidden_states, expected.hidden_states)


def test_low_precision_is_close():
    for head_type in HEADS:
        model = head_model(head_type=head_type)
        expected = model(features_of()).logits
        reduced = model.to(torch.bfloat16)(features_of()).logits
        assert reduced.dtype == torch.bfloat16
        assert (reduced.float() - expected).abs().max() < 0.05 * expected.abs().max() + 0.02


# Losses


def test_cross_entropy_of_indices_equals_that_of_certain_classes():
    model = head_model()
    labels = torch.tensor([2, 0])
    loss = model(features_of(), labels=labels).loss
    assert model.config.problem_type == "single_label_classification"
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(features_of()).logits, labels))
    certain = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(model(features_of(), labels=certain).loss, loss)
    soft = 0.3 * certain + 0.7 * certain.flip(0)
    mixed = 0.3 * loss + 0.7 * model(features_of(), labels=labels.flip(0)).loss
    torch.testing.assert_close(model(features_of(), labels=soft).loss, mixed)


def test_multi_label_losses_equal_plain_loops():
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    model = head_model()
    logits = model(features_of()).logits
    loss = model(features_of(), labels=labels).loss
    assert model.config.problem_type == "multi_label_classification"
    asymmetric = head_model(multi_label_loss="asymmetric")(features_of(), labels=labels.float()).loss

    plain_terms, asymmetric_terms = [], []
    for logit, label in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        plain_terms.append(-math.log(p if label else 1 - p))
        asymmetric_terms.append(-math.log(p) if label else -p * math.log(1 - p))
    assert loss.item() == pytest.approx(sum(plain_terms) / 6, rel=1e-5)
    assert asymmetric.item() == pytest.approx(sum(asymmetric_terms) / 6, rel=1e-5)


def test_asymmetric_loss_has_no_gradient_through_its_weight():
    logits = torch.tensor([0.7, -1.2, 2.0], requires_grad=True)
    labels = torch.tensor([0.0, 1.0, 0.0])
    asymmetric_loss(logits, labels).sum().backward()
    p = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, torch.where(labels == 1, p - 1, p * p))
    extreme = torch.tensor([100.0, -100.0])
    assert asymmetric_loss(extreme, torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("problem", ["single", "multi"])
def test_frames_without_label_do_not_count(problem):
    model = head_model(BatForAudioFrameClassification, problem_type=f"{problem}_label_classification")
    logits = model(features_of()).logits  # (2, 4, 3)
    indices = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    labels = indices if problem == "single" else nn.functional.one_hot(indices, 3).float()
    kept = torch.tensor([[True, True, False, True], [False, True, True, False]])
    loss = model(
        features_of(), labels=labels.masked_fill(~kept if problem == "single" else ~kept[..., None], -100)
    ).loss
    function = nn.functional.cross_entropy if problem == "single" else nn.functional.binary_cross_entropy_with_logits
    # The mean over the clips, whatever number of steps they have, so that micro-batches add up to the batch.
    clips = [function(logits[clip, kept[clip]], labels[clip, kept[clip]]) for clip in range(2)]
    torch.testing.assert_close(loss, sum(clips) / 2)


@pytest.mark.parametrize("labels", [torch.full((2, 4), -100), torch.full((2, 4, 3), -100.0)])
def test_batch_without_labels_has_no_loss_and_no_gradient(labels):
    model = head_model(BatForAudioFrameClassification)
    loss = model(features_of(), labels=labels).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad is None or not p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (torch.zeros(3, dtype=torch.long), None),
        (torch.zeros(2, 4), None),
        (torch.zeros(2), None),
        (torch.zeros(2, dtype=torch.long), "multi_label_classification"),
        (torch.zeros(2, 1), None),
    ],
)
def test_labels_of_another_shape_are_refused(labels, problem_type):
    with pytest.raises(ValueError, match=r"got labels of shape \("):
        head_model(problem_type=problem_type)(features_of(), labels=labels)


def test_regression_is_refused():
    with pytest.raises(ValueError, match="regression"):
        head_model(problem_type="regression")(features_of(), labels=torch.zeros(2, 3))


# Events


def plain_events(probabilities, threshold, median_frames):
    """Events of (t, classes) probabilities by loops: (onset step, end step, class, score)."""
    steps, classes = probabilities.shape
    margin, events = median_frames // 2, []
    for label in range(classes):
        column = probabilities[:, label].tolist()
        padded = [column[0]] * margin + column + [column[-1]] * margin
        active = [sorted(padded[i : i + median_frames])[margin] >= threshold for i in range(steps)]
        start = None
        for i, is_active in enumerate([*active, False]):
            if is_active and start is None:
                start = i
            elif not is_active and start is not None:
                events.append((start, i, label, sum(column[start:i]) / (i - start)))
                start = None
    return sorted(events, key=lambda event: event[0])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 5]), st.sampled_from([0.2, 0.5, 0.9]), st.integers(1, 20))
def test_events_equal_plain_loops(seed, median_frames, threshold, steps):
    model = EVENTS_MODEL
    logits = 3 * torch.randn(2, steps, 3, generator=torch.Generator().manual_seed(seed))
    for clip, events in zip(logits, model.decode_events(logits, threshold, median_frames), strict=True):
        expected = plain_events(clip.sigmoid(), threshold, median_frames)
        found = [(e["onset"], e["offset"], model.config.label2id[e["label"]], e["score"]) for e in events]
        assert found == [
            (pytest.approx(0.16 * first), pytest.approx(0.16 * end), label, pytest.approx(score, rel=1e-5))
            for first, end, label, score in expected
        ]


EVENTS_MODEL = head_model(BatForAudioFrameClassification)


def test_events_of_single_label_models_use_softmax():
    model = head_model(BatForAudioFrameClassification, problem_type="single_label_classification")
    logits = torch.tensor([[[4.0, 3.0, 0.0], [0.0, 3.0, 4.0]]])
    events = model.decode_events(logits)[0]
    assert [(event["onset"], event["label"]) for event in events] == [(0.0, "LABEL_0"), (0.16, "LABEL_2")]


def test_thresholds_of_each_class():
    logits = torch.zeros(1, 2, 3)
    labels = [event["label"] for event in EVENTS_MODEL.decode_events(logits, [0.4, 0.5, 0.6])[0]]
    assert labels == ["LABEL_0", "LABEL_1"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 5]), st.lists(st.floats(0.01, 3.2), min_size=1, max_size=3))
def test_events_of_padded_clips_equal_those_of_each_alone(seed, median_frames, durations):
    logits = 3 * torch.randn(len(durations), 20, 3, generator=torch.Generator().manual_seed(seed))
    for clip, duration, events in zip(
        logits, durations, EVENTS_MODEL.decode_events(logits, 0.5, median_frames, durations), strict=True
    ):
        alone = EVENTS_MODEL.decode_events(clip[None, : math.ceil(duration / 0.16 - 1e-6)], 0.5, median_frames)[0]
        ends = [{"offset": min(e["offset"], duration), "score": pytest.approx(e["score"], rel=1e-5)} for e in alone]
        assert events == [{**event, **end} for event, end in zip(alone, ends, strict=True)]


def test_durations_may_be_a_tensor():
    (event,) = EVENTS_MODEL.decode_events(torch.tensor([[[5.0, -5, -5]] * 4]), durations=torch.tensor([0.5]))[0]
    assert type(event["offset"]) is float
    assert event["offset"] == 0.5


def test_wrong_event_arguments_are_refused():
    for threshold in ([0.5, 0.5], 1.5, [0.5, -1, 0.5]):
        with pytest.raises(ValueError, match="threshold="):
            EVENTS_MODEL.decode_events(torch.zeros(1, 4, 3), threshold)
    for durations in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="2 times in s above 0"):
            EVENTS_MODEL.decode_events(torch.zeros(2, 4, 3), durations=durations)
    with pytest.raises(ValueError, match=r"\(2, 4\); expected \(batch, time, 3\)"):
        EVENTS_MODEL.decode_events(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="median_frames=2"):
        EVENTS_MODEL.decode_events(torch.zeros(1, 4, 3), median_frames=2)


# Freezing, loading and saving


def test_frozen_encoder_stays_in_eval_mode_and_gets_no_gradient():
    model = head_model(head_type="linear_cgp", drop_path_rate=0.5, hidden_dropout_prob=0.5)
    model.freeze_base_model()
    model.train()
    assert model.head.training
    assert not any(module.training for module in model.bat.modules())
    model(features_of(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is None for parameter in model.bat.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("cls", [BatForAudioClassification, BatForAudioFrameClassification])
def test_saved_and_loaded_gives_the_same_logits(tmp_path, cls, head_type):
    model = head_model(cls, head_type=head_type, id2label={0: "a", 1: "b", 2: "c"})
    model.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(loaded(features_of()).logits, model(features_of()).logits)


def test_encoder_checkpoint_gives_a_model_with_a_new_head(tmp_path):
    encoder = tiny_model()
    encoder.save_pretrained(tmp_path)
    options = {"num_labels": 4, "head_type": "cgp", "num_prototypes": 50}
    model, info = BatForAudioClassification.from_pretrained(tmp_path, output_loading_info=True, **options)
    new = {"head.block_attention", "head.prototype_vectors", "head.fc.weight", "head.fc.bias"}
    assert set(info["missing_keys"]) == new
    assert torch.equal(model.bat(features_of()).last_hidden_state, encoder(features_of()).last_hidden_state)
    assert (model.head.block_attention == 1).all()
    assert model.head.fc.weight.abs().max() <= math.sqrt(6 / (150 + 4))  # Xavier-uniform
    assert (model.head.fc.bias == 0).all()
    assert model.head.prototype_vectors.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "field", [{"head_type": "cpg"}, {"head_pooling": "max"}, {"num_prototypes": 0}, {"drop_path_rate": 3.0}]
)
def test_wrong_field_is_refused_on_loading(tmp_path, field):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=next(iter(field))):
        BatForAudioClassification.from_pretrained(tmp_path, **field)


def test_encoder_comes_out_of_a_head_checkpoint(tmp_path):
    model = head_model(head_type="cgp")
    model.save_pretrained(tmp_path)
    encoder = BatModel.from_pretrained(tmp_path)
    assert torch.equal(encoder(features_of()).last_hidden_state, model.bat(features_of()).last_hidden_state)


def test_head_in_part_is_an_error(tmp_path):
    head_model(head_norm=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"2 missing: head\.ln\.bias, head\.ln\.weight"):
        BatForAudioClassification.from_pretrained(tmp_path, head_norm=True)
    BatForAudioClassification.from_pretrained(tmp_path, head_norm=True, strict=False)
    with pytest.raises(ValueError, match=r"misshapen: head\.fc\.bias \(expected \(5,\)\)"):
        BatForAudioClassification.from_pretrained(tmp_path, num_labels=5)
    model = head_model(head_type="linear_cgp")
    model.save_pretrained(tmp_path / "mixing")
    with pytest.raises(ValueError, match=r"1 unexpected: head\.block_attention"):
        BatForAudioClassification.from_pretrained(tmp_path / "mixing", head_type="linear")


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (BatForAudioClassification, BatForAudioFrameClassification),
        (BatForAudioFrameClassification, BatForAudioClassification),
    ],
)
def test_head_of_the_other_kind_is_an_error(tmp_path, saved, other):
    """Their weights have the same names and shapes, so the outputs would be nonsense without a word."""
    model = head_model(saved)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"trained in a {saved.__name__}.*load it with AutoModelFor"):
        other.from_pretrained(tmp_path)
    loaded = other.from_pretrained(tmp_path, strict=False)
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)


def test_misnamed_encoder_weights_are_still_an_error(tmp_path):
    model = head_model()
    state = {name.replace("bat.blocks.1", "bat.layers.1"): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="missing"):
        BatForAudioClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head_type", "mlp"),
        ("head_pooling", "max"),
        ("head_norm", 1),
        ("head_dropout", 1.5),
        ("num_prototypes", 0),
        ("multi_label_loss", "focal"),
    ],
)
def test_wrong_config_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        BatConfig(**{field: value})
