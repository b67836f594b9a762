"""The encoder and front end against outputs of the published implementation, stage by stage."""

import pytest
import torch
from conftest import load_golden, recipe_weights

from bat_audio import BatAudioProcessor, BatConfig, BatFeatureExtractor, BatModel
from bat_audio.modeling_bat import BatBlock

TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["encoder_tiny", "encoder_tiny_prenorm_layerscale", "encoder_tiny_nogate"])
def test_encoder(name, attn_implementation):
    golden, metadata = load_golden(name)
    model = BatModel(BatConfig(**metadata["config"], attn_implementation=attn_implementation)).eval()
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    torch.testing.assert_close(model.pos_embed, weights["pos_embed"], **TOLERANCE)
    model.load_state_dict(weights)
    for tag in metadata["inputs"]:
        with torch.no_grad():
            tokens = model.forward_encoder(golden[f"{tag}.input_features"])
            layers = model.extract_features(golden[f"{tag}.input_features"])
        torch.testing.assert_close(tokens, golden[f"{tag}.last_hidden_state"], **TOLERANCE)
        torch.testing.assert_close(layers["cls_tokens"], golden[f"{tag}.cls_tokens"], **TOLERANCE)
        torch.testing.assert_close(layers["patch_tokens"], golden[f"{tag}.patch_tokens"], **TOLERANCE)


def test_full_size_encoder():
    golden, metadata = load_golden("encoder_full")
    model = BatModel(BatConfig(**metadata["config"])).eval()
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 92_734_464
    model.load_state_dict(recipe_weights(model, metadata["seed"]))
    with torch.no_grad():
        output = model(golden["clip.input_features"], output_hidden_states=True)
    cls_tokens = torch.stack([tokens[:, 0] for tokens in output.hidden_states[1:]])
    torch.testing.assert_close(
        output.last_hidden_state[:, ::19, ::7], golden["clip.last_hidden_state_sampled"], **TOLERANCE
    )
    torch.testing.assert_close(cls_tokens, golden["clip.cls_tokens"], **TOLERANCE)


@pytest.mark.parametrize("tag", ["ten_seconds", "mixed_loudness", "long_crop"])
def test_front_end(tag):
    golden, _ = load_golden("frontend")
    waveform, expected = golden[f"{tag}.waveform"], golden[f"{tag}.input_features"]
    torch.testing.assert_close(BatAudioProcessor()(waveform), expected, rtol=0, atol=5e-5)
    features = BatFeatureExtractor()(waveform.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    torch.testing.assert_close(features, expected, rtol=0, atol=5e-5)


def test_pretraining_building_blocks():
    """The published training step, made of the encoder's own parts: they are what pre-training builds on."""
    golden, metadata = load_golden("pretraining")
    sizes = {"hidden_size": metadata["dim"], "num_attention_heads": metadata["heads"]}
    config = BatConfig(**sizes, num_hidden_layers=metadata["depth"], attn_implementation="eager")

    def weights(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}

    student, teacher = BatModel(config), BatModel(config)
    student.load_state_dict(weights("student.encoder."))
    teacher.load_state_dict(weights("teacher."))
    decoder_weights = weights("student.decoder.")
    features, ids_keep = golden["input_features"], golden["ids_keep"].long()
    views = metadata["views"]

    with torch.no_grad():
        patches = teacher.extract_features(features)["patch_tokens"].flatten(3).transpose(2, 3)  # (L, B, N, D)
        patches = (patches - patches.mean(2, keepdim=True)) / (
            patches.var(2, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()
        target = torch.nn.functional.layer_norm(patches.mean(0), [metadata["dim"]], eps=1e-6)  # (B, N, D)

        tokens = student.patch_embed(features) + student.pos_embed
        tokens = tokens.repeat_interleave(views, dim=0)  # clip 0 in all its views, then clip 1
        index = ids_keep[:, :, None].expand(-1, -1, metadata["dim"])
        tokens = torch.cat([student.cls_token.expand(len(tokens), -1, -1), tokens.gather(1, index)], dim=1)
        tokens = student.pre_norm(tokens)
        for block in student.blocks:
            tokens, _ = block(tokens)
        student_cls, kept = tokens[:, 0], tokens[:, 1:]

        grid = decoder_weights["mask_token"].expand(len(kept), target.shape[1], -1).scatter(1, index, kept)
        hidden = grid + decoder_weights["pos_embed"]
        for i in range(metadata["decoder_depth"]):
            block = BatBlock(student.config).eval()
            prefix = f"blocks.{i}."
            block.load_state_dict(
                {k.removeprefix(prefix): v for k, v in decoder_weights.items() if k.startswith(prefix)}
            )
            hidden, _ = block(hidden)
        student_patches = hidden @ decoder_weights["out_proj.weight"].T  # (B*V, N, D)

    target = target.repeat_interleave(views, dim=0)
    dropped = torch.ones(student_patches.shape[:2]).scatter(1, ids_keep, 0.0)
    local_loss = ((student_patches - target).square().mean(-1) * dropped).sum() / dropped.sum()
    global_loss = (student_cls - target.mean(1)).square().mean()
    torch.testing.assert_close(target[:1], golden["target"], **TOLERANCE)
    torch.testing.assert_close(student_cls, golden["student_cls"], **TOLERANCE)
    torch.testing.assert_close(student_patches[:1], golden["student_patches"], **TOLERANCE)
    torch.testing.assert_close(local_loss, golden["local_loss"][0], **TOLERANCE)
    torch.testing.assert_close(global_loss, golden["global_loss"][0], **TOLERANCE)
