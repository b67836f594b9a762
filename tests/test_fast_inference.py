"""Compiled and quantised encoders compute what the plain one does, and say so where the machine cannot have them."""

import sys
import sysconfig

import pytest
import torch
from conftest import example_pictures, recipe_weights, tiny_model

from bat_audio import BatConfig, BatModel, load_model, load_pretrained_encoder
from bat_tiny.demo import BAT_TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def has_int8():
    """Skips where torchao's int8 cannot be had, which has its own errors below."""
    utils = pytest.importorskip("torchao.utils")
    if utils.should_reduce_range(torch.device("cpu")):
        pytest.skip("this CPU has no VNNI")


def features(batch: int, frames: int) -> torch.Tensor:
    return torch.rand(batch, 1, frames, 128, generator=torch.Generator().manual_seed(frames))


def encode(model: BatModel, batch: int, frames: int) -> torch.Tensor:
    with torch.inference_mode():
        return model(features(batch, frames)).last_hidden_state


def cosines(tokens: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(tokens, expected, dim=-1)


def test_compiled_equals_eager_and_one_graph_serves_all_blocks(folder):
    eager = load_pretrained_encoder(checkpoint=folder)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = load_pretrained_encoder(checkpoint=folder, compile=True)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    torch.testing.assert_close(encode(compiled, 2, 64), encode(eager, 2, 64), rtol=0, atol=5e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for batch, frames in [(1, 16), (3, 48), (1, 200)]:
        torch.testing.assert_close(encode(compiled, batch, frames), encode(eager, batch, frames), rtol=0, atol=5e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_one_graph_serves_more_blocks_than_torch_compiles_a_function_for():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(num_hidden_layers=10).train()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    model(features(2, 64)).last_hidden_state.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_encoder_is_saved_and_trained_like_any(folder, tmp_path):
    eager, compiled = (load_pretrained_encoder(checkpoint=folder, compile=compile) for compile in (False, True))
    gradients = []
    for model in (eager, compiled):
        model.train()
        model(features(2, 64)).last_hidden_state.square().mean().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    compiled.save_pretrained(tmp_path / "saved")
    again = load_pretrained_encoder(checkpoint=tmp_path / "saved")
    assert all(torch.equal(tensor, eager.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.usefixtures("has_int8")
def test_int8_is_close_and_compiled_int8_is_the_same(folder):
    eager = load_pretrained_encoder(checkpoint=folder)
    int8 = load_pretrained_encoder(checkpoint=folder, quantization="int8")
    assert type(int8.blocks[0].mlp.fc1.weight).__name__ == "Int8Tensor"
    assert type(int8.patch_embed.proj.weight) is type(int8.blocks[-1].mlp.fc2.weight) is torch.nn.Parameter
    compiled = load_pretrained_encoder(checkpoint=folder, quantization="int8", compile=True)
    for batch, frames in [(2, 64), (1, 200)]:
        expected = encode(eager, batch, frames)
        assert not torch.equal(encode(int8, batch, frames), expected)
        assert cosines(encode(int8, batch, frames), expected).min() > 0.99
        # Rounding to 8 bits turns float32's last digit into a step here and there.
        assert cosines(encode(compiled, batch, frames), encode(int8, batch, frames)).min() > 0.9999


@pytest.mark.slow
@pytest.mark.usefixtures("has_int8")
@pytest.mark.parametrize("weights", ["initial", "recipe"])
def test_int8_of_the_full_size(tmp_path, weights):
    torch.manual_seed(0)
    model = BatModel(BatConfig()).eval()
    if weights == "recipe":
        model.load_state_dict(recipe_weights(model, seed=1))
    expected = encode(model, 1, 1024)
    model.save_pretrained(tmp_path)
    found = cosines(encode(load_pretrained_encoder(checkpoint=tmp_path, quantization="int8"), 1, 1024), expected)
    print(f"int8, {weights} weights: mean cosine {found.mean():.5f}, smallest {found.min():.5f}")
    assert found.mean() > 0.995
    assert found.min() > 0.98


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": "int8"}], ids=["bfloat16", "int8"])
def test_trained_weights_in_low_precision(options, compile, request):
    """BAT-tiny on the example sounds: what training does to weights is what low precision could stumble over.

    Some of its CLS tokens are short, and the error of the last product in 8 bits would turn them by more than this.
    """
    if "quantization" in options:
        request.getfixturevalue("has_int8")
    torch._dynamo.reset()  # which would leave the blocks as they are after compiling too many others
    model = load_pretrained_encoder(checkpoint=BAT_TINY)
    fast = load_pretrained_encoder(checkpoint=BAT_TINY, compile=compile, **options)
    pictures = example_pictures()
    with torch.inference_mode():
        expected = model(pictures).last_hidden_state
        tokens = fast(pictures.to(fast.dtype)).last_hidden_state.float()
    found = cosines(tokens, expected)
    print(f"mean cosine {found.mean():.5f}, smallest {found.min():.5f}")
    assert found.mean() > 0.999
    assert found.min() > (0.98 if "quantization" in options else 0.97)  # bfloat16: 0.982, and CPUs differ


# Refusals


def test_int8_without_torchao_is_an_error(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"needs torchao.*pip install --upgrade torchao"):
        load_pretrained_encoder(checkpoint=folder, quantization="int8")


def test_int8_where_it_is_of_no_use_is_an_error(folder, monkeypatch):
    utils = pytest.importorskip("torchao.utils")
    with pytest.raises(ValueError, match="of no use here: there is no 8-bit matrix product for meta"):
        load_pretrained_encoder(device="meta", checkpoint=folder, quantization="int8")
    monkeypatch.setattr(utils, "should_reduce_range", lambda device: True)
    with pytest.raises(ValueError, match=r"of no use here: torch finds no AVX512-VNNI, .*\. Leave quantization out\.$"):
        load_pretrained_encoder(checkpoint=folder, quantization="int8")
    monkeypatch.setattr(load_model, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(
        ValueError, match=r"Tesla T4 is older than compute capability 8.0. Use dtype=\"float16\" instead"
    ):
        load_pretrained_encoder(device="cuda", checkpoint=folder, quantization="int8")


def test_unknown_quantization_is_refused(folder):
    with pytest.raises(ValueError, match="quantization='int4' is not known; expected \"int8\" or None"):
        load_pretrained_encoder(checkpoint=folder, quantization="int4")


def test_compiling_without_a_compiler_is_an_error(folder):
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(OSError, match=r"compile=True needs a C\+\+ compiler"),
    ):
        load_pretrained_encoder(checkpoint=folder, compile=True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Triton brings a compiler")
@pytest.mark.parametrize("variable", [None, "no-such-compiler"])
def test_compiling_for_a_gpu_without_a_c_compiler_is_an_error(folder, monkeypatch, tmp_path, variable):
    monkeypatch.setattr(load_model, "check_device", lambda device: None)
    monkeypatch.setattr(load_model, "has_triton", lambda: True)
    if variable is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", variable)
    with pytest.raises(OSError, match=r"compile=True needs a C compiler on CUDA.*apt install gcc"):
        load_pretrained_encoder(device="cuda", checkpoint=folder, compile=True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python brings its header")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiling_without_python_s_header_is_an_error(folder, monkeypatch, tmp_path, device):
    monkeypatch.setattr(load_model, "check_device", lambda device: None)
    monkeypatch.setattr(load_model, "has_triton", lambda: True)
    load_model.check_compiler(device)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    with pytest.raises(OSError, match=r"compile=True needs Python's header Python\.h.*apt install python3-dev"):
        load_pretrained_encoder(device=device, checkpoint=folder, compile=True)


def test_compiling_for_a_gpu_without_triton_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(load_model, "check_device", lambda device: None)
    monkeypatch.setattr(load_model, "has_triton", lambda: False)
    with pytest.raises(OSError, match="compile=True needs Triton"):
        load_pretrained_encoder(device="cuda", checkpoint=folder, compile=True)
