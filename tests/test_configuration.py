"""BatConfig: validation, round trips and equality."""

import json

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from bat_audio import BatConfig, modeling_bat

RELEASE_KEYS = set(
    """model_type input_shape patch_size hidden_size num_hidden_layers num_attention_heads mlp_ratio qkv_bias
    hidden_dropout_prob attention_probs_dropout_prob drop_path_rate layer_norm_eps pre_norm layer_norm_first
    init_scale_values use_gate pos_trainable chunk_time_patches sample_rate n_fft hop_length n_mels f_min top_db
    feature_normalization auto_map pretraining_dataset""".split()  # noqa: SIM905
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_shape", [1000, 128]),
        ("input_shape", [1024]),
        ("input_shape", [1024.0, 128]),
        ("patch_size", [16, 0]),
        ("patch_size", 16),
        ("hidden_size", 100),
        ("hidden_size", 0),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 0),
        ("mlp_ratio", 0),
        ("mlp_ratio", float("nan")),
        ("qkv_bias", 1),
        ("hidden_dropout_prob", 1.5),
        ("attention_probs_dropout_prob", -0.1),
        ("drop_path_rate", "0.1"),
        ("layer_norm_eps", 0.0),
        ("pre_norm", None),
        ("init_scale_values", "small"),
        ("chunk_time_patches", 0),
        ("chunk_time_patches", 65),
        ("max_chunks_per_pass", 0),
        ("sample_rate", -16000),
        ("n_mels", 64),
        ("f_min", 8000),
        ("top_db", 0),
        ("feature_normalization", "dataset"),
    ],
)
def test_invalid_value_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*is not valid, expected") as error:
        BatConfig(**{field: value})
    assert f"{field}={value!r}" in str(error.value)


def test_width_that_heads_or_positions_cannot_divide_is_refused():
    with pytest.raises(ValueError, match=r"hidden_size=768 .* a multiple of num_attention_heads=7"):
        BatConfig(num_attention_heads=7)
    with pytest.raises(ValueError, match=r"hidden_size=6 .* a multiple of 4"):
        BatConfig(hidden_size=6, num_attention_heads=2)


def test_defaults_are_the_release_and_config_json():
    shipped = json.loads((ROOT / "config.json").read_text())
    defaults = BatConfig().to_dict()
    assert set(shipped) >= RELEASE_KEYS
    assert set(shipped) - RELEASE_KEYS == {"architectures", "custom_pipelines", "max_chunks_per_pass"}
    for key, value in shipped.items():
        if key not in ("auto_map", "architectures", "custom_pipelines", "pretraining_dataset"):
            assert defaults[key] == value, key
    assert shipped["auto_map"] == modeling_bat.AUTO_MAP
    assert shipped["custom_pipelines"] == modeling_bat.CUSTOM_PIPELINES


def test_config_with_the_release_keys_loads_unchanged(tmp_path):
    released = json.loads((ROOT / "config.json").read_text())
    released = {key: released[key] for key in RELEASE_KEYS}
    (tmp_path / "config.json").write_text(json.dumps(released))
    loaded = BatConfig.from_pretrained(tmp_path).to_dict()
    assert {key: loaded[key] for key in released} == released


@st.composite
def configs(draw):
    heads = draw(st.integers(1, 4))
    patch = draw(st.sampled_from([8, 16]))
    time_patches, mel_patches = draw(st.integers(1, 80)), draw(st.integers(1, 8))
    probability = st.floats(0, 1)
    return BatConfig(
        input_shape=(patch * time_patches, patch * mel_patches),
        patch_size=draw(st.sampled_from([(patch, patch), [patch, patch]])),
        n_mels=patch * mel_patches,
        hidden_size=4 * heads * draw(st.integers(1, 8)),
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 4)),
        mlp_ratio=draw(st.one_of(st.integers(1, 4), st.floats(0.5, 4))),
        qkv_bias=draw(st.booleans()),
        hidden_dropout_prob=draw(probability),
        attention_probs_dropout_prob=draw(probability),
        drop_path_rate=draw(probability),
        layer_norm_eps=draw(st.floats(1e-12, 1e-3)),
        pre_norm=draw(st.booleans()),
        layer_norm_first=draw(st.booleans()),
        init_scale_values=draw(st.none() | st.floats(1e-6, 1)),
        use_gate=draw(st.booleans()),
        pos_trainable=draw(st.booleans()),
        chunk_time_patches=draw(st.integers(1, time_patches)),
        max_chunks_per_pass=draw(st.integers(1, 64)),
        recording_site=draw(st.text(max_size=5)),
        notes=draw(st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)),
    )


@given(configs())
def test_round_trip_is_exact(tmp_path_factory, config):
    assert BatConfig(**json.loads(config.to_json_string())) == config
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    loaded = BatConfig.from_pretrained(folder)
    assert loaded == config
    loaded.save_pretrained(folder / "again")
    assert (folder / "again" / "config.json").read_text() == (folder / "config.json").read_text()


@given(configs(), configs())
def test_equal_exactly_when_the_fields_are(first, second):
    def fields(config):
        return {key: value for key, value in vars(config).items() if key != "transformers_version"}

    assert (first == second) == (fields(first) == fields(second))


@pytest.mark.parametrize("change", [{"hidden_size": 384}, {"use_gate": False}, {"recording_site": "pond"}])
def test_configs_that_differ_are_unequal(change):
    assert BatConfig() == BatConfig()
    assert BatConfig(**change) != BatConfig()
