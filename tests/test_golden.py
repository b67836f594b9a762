"""The encoder and front end against outputs of the published implementation, stage by stage."""

import pytest
import torch
from conftest import load_golden, recipe_weights

from bat_audio import BatAudioProcessor, BatConfig, BatFeatureExtractor, BatModel

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
