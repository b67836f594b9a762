"""Export: the written files compute what the PyTorch model does, without this package, and nothing else is written."""

import json
import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import example_pictures, run_python, tiny_model
from test_convert import HEADS, tiny_probe
from typer.testing import CliRunner

from bat_audio import BatAudioProcessor, BatFeatureExtractor, BatModel, load_pretrained_encoder
from bat_audio.pipeline_bat import BatAudioClassificationPipeline
from bat_audio.processing_bat import fit_frames
from bat_audio_tools import export as export_module
from bat_audio_tools.cli import app
from bat_audio_tools.export import ExportGraph, FrontEnd, _module_names, export
from bat_tiny.demo import BAT_TINY

# Clips and frames: one patch; not a multiple of 16; one whole chunk of 64; longer; two chunks and frames too many.
SHAPES = [(1, 16), (2, 57), (1, 64), (3, 83), (2, 137)]
LAST_LINEAR = "encoder.blocks.1.mlp.fc2"  # of the tiny models' two blocks


def random_features(batch: int, frames: int) -> torch.Tensor:
    return torch.rand(batch, 1, frames, 128, generator=torch.Generator().manual_seed(frames))


def random_waveform(batch: int, frames: int) -> torch.Tensor:
    """Noise that gives so many frames and fades by 120 dB, the last of several clips silent."""
    noise = 2 * torch.rand(batch, 160 * frames - 7, generator=torch.Generator().manual_seed(frames)) - 1
    noise[1:][-1:] = 0
    return noise * torch.logspace(0, -6, noise.shape[1])


def expected_outputs(model, features: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        encoded = (model if isinstance(model, BatModel) else model.bat)(features)
        expected = {"last_hidden_state": encoded.last_hidden_state, "pooler_output": encoded.pooler_output}
        return expected if isinstance(model, BatModel) else {"logits": model(features).logits, **expected}


def assert_same(found: dict, expected: dict[str, torch.Tensor], tolerance: float = 1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(torch.as_tensor(found[name]), expected[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def exporter():
    if torch.__version__.startswith(("2.6.", "2.7.", "2.8.", "2.9.", "2.10.")):
        pytest.skip("exporting needs torch 2.11")


@pytest.fixture(scope="module")
def encoder(exporter, tmp_path_factory):
    """An encoder, its ONNX file, and what `export` returned."""
    folder = tmp_path_factory.mktemp("encoder")
    model = tiny_model()
    model.save_pretrained(folder / "model")
    return model, folder / "bat.onnx", export(folder / "model", folder / "bat.onnx", format="onnx")


@pytest.fixture(scope="module")
def classifier(exporter, tmp_path_factory):
    """A model with a head, its ONNX files of waveforms in float32 and int8, and what `export` returned for int8."""
    folder = tmp_path_factory.mktemp("classifier")
    model = tiny_probe(**HEADS["cgp"])
    model.save_pretrained(folder / "model")
    write_int8 = export_module._write_int8

    def keep_float32(model, float32, path):
        os.link(float32, folder / "float32.onnx")
        return write_int8(model, float32, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "_write_int8", keep_float32)
        results = export(folder / "model", folder / "int8.onnx", format="onnx", from_waveform=True, int8=True)
    assert sorted(file.name for file in folder.iterdir()) == ["float32.onnx", "int8.onnx", "model"]
    return model, folder / "float32.onnx", folder / "int8.onnx", results


def run_onnx(path, inputs: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: inputs.numpy()}), strict=True))


# What the graph computes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("head", [None, *HEADS])
def test_graph_equals_the_model(head, frames, shape):
    model = tiny_model() if head is None else tiny_probe(frames=frames, **HEADS[head])
    features = random_features(*shape)
    with torch.inference_mode():
        assert_same(ExportGraph(model, None)(features), expected_outputs(model, features))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changes", [{}, {"n_fft": 512, "hop_length": 200, "top_db": 60.0}, {"num_frames": 64}])
def test_front_end_equals_the_processor(shape, changes):
    processor = BatAudioProcessor(**{"num_frames": None, **changes})
    waveform = random_waveform(*shape)
    torch.testing.assert_close(FrontEnd(processor)(waveform), processor(waveform), rtol=0, atol=1e-4)


@pytest.mark.parametrize("samples", [513, 2559, 2560])
def test_front_end_of_hard_clips(samples):
    processor = BatAudioProcessor(num_frames=None)
    time = torch.arange(samples) / 16000
    clips = {
        "silence": torch.zeros(samples),
        "offset": torch.full((samples,), 0.5),
        "tone": (2 * torch.pi * 440 * time).sin(),
        "click": torch.zeros(samples).index_fill(0, torch.tensor([300]), 1.0),
        "quiet": 1e-5 * random_waveform(1, 17)[0, :samples],
        "chirp": (2 * torch.pi * (50 + 4000 * time) * time).sin(),
    }
    waveform = torch.stack(list(clips.values()))
    torch.testing.assert_close(FrontEnd(processor)(waveform), processor(waveform), rtol=0, atol=1e-4)


# Files


@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_equals_torch(encoder, shape):
    model, path, results = encoder
    features = random_features(*shape)
    assert_same(run_onnx(path, features), expected_outputs(model, features))
    assert results.keys() == {"last_hidden_state", "pooler_output"}
    assert max(results.values()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_from_waveforms_equals_torch(classifier, shape):
    model, float32, _, _ = classifier
    waveform = random_waveform(*shape)
    expected = expected_outputs(model, BatAudioProcessor(num_frames=None)(waveform))
    assert_same(run_onnx(float32, waveform), expected, tolerance=1e-4)


@pytest.mark.usefixtures("exporter")
@pytest.mark.parametrize(("format", "num_frames"), [("onnx", 96), ("pt2", 64)])  # a chunk is 64
def test_num_frames_gives_what_padded_features_give(tmp_path, format, num_frames):
    model, path = tiny_probe(**HEADS["linear_cgp"]), tmp_path / f"model.{format}"
    model.save_pretrained(tmp_path / "model")
    results = export(tmp_path / "model", path, format=format, from_waveform=True, num_frames=num_frames)
    assert max(results.values()) < 1e-4
    extractor = BatFeatureExtractor(num_frames=num_frames)
    pipe = BatAudioClassificationPipeline(model=model, feature_extractor=extractor, function_to_apply="none")
    for batch, frames in SHAPES:
        waveform = random_waveform(batch, frames)
        expected = expected_outputs(model, BatAudioProcessor(num_frames=num_frames)(waveform))
        found = run_onnx(path, waveform) if format == "onnx" else torch.export.load(path).module()(waveform)
        assert_same(found, expected, tolerance=1e-4)
        if frames <= num_frames:  # the pipeline does not cut
            scores = {score["label"]: score["score"] for score in pipe(waveform[0])}
            logits = [scores[label] for label in model.config.id2label.values()]
            torch.testing.assert_close(torch.as_tensor(found["logits"])[0], torch.tensor(logits), rtol=0, atol=1e-4)
    if format == "onnx":
        assert {entry.key: entry.value for entry in onnx.load(path).metadata_props}["num_frames"] == str(num_frames)


@pytest.mark.slow
@pytest.mark.usefixtures("exporter")
@pytest.mark.parametrize(
    ("head", "frames"),
    [(head, frames) for head in HEADS for frames in (False, True) if frames or head != "cgp"],  # `classifier` is one
)
def test_onnx_of_every_head_equals_torch(tmp_path, head, frames):
    model = tiny_probe(frames=frames, **HEADS[head])
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.onnx", format="onnx")
    for shape in [(1, 64), (2, 137)]:
        features = random_features(*shape)
        assert_same(run_onnx(tmp_path / "model.onnx", features), expected_outputs(model, features))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_close(classifier, shape):
    model, _, int8, results = classifier
    waveform = random_waveform(*shape)
    expected = expected_outputs(model, BatAudioProcessor(num_frames=None)(waveform))
    found = {name: torch.from_numpy(output) for name, output in run_onnx(int8, waveform).items()}
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() < 0.1 * tensor.norm(), name
        assert 1e-4 < results[name] < 0.5  # of the int8 file, not of the float32 graph
    cosines = torch.nn.functional.cosine_similarity(found["last_hidden_state"], expected["last_hidden_state"], dim=-1)
    assert 0.99 < cosines.min() < 0.999999
    assert 0.99 < results["min_cosine"] <= results["mean_cosine"] < 0.999999


def test_int8_of_trained_weights(exporter, tmp_path):
    results = export(BAT_TINY, tmp_path / "int8.onnx", format="onnx", int8=True)
    pictures = example_pictures()
    expected = expected_outputs(load_pretrained_encoder(checkpoint=BAT_TINY), pictures)["last_hidden_state"]
    tokens = torch.from_numpy(run_onnx(tmp_path / "int8.onnx", pictures)["last_hidden_state"])
    cosines = torch.nn.functional.cosine_similarity(tokens, expected, dim=-1)
    print(f"mean cosine {cosines.mean():.5f}, smallest {cosines.min():.5f}; in export {results['min_cosine']:.5f}")
    assert cosines.mean() > 0.999
    assert min(cosines.min(), results["min_cosine"]) > 0.98


def test_int8_quantises_the_blocks_alone(classifier):
    model, float32, int8, _ = classifier
    graph = onnx.load(int8).graph
    before, after = ([node.op_type for node in nodes] for nodes in (onnx.load(float32).graph.node, graph.node))
    quantised = 2 * 5 - 1  # two blocks of qkv, gate, proj, fc1, fc2, without the last
    assert after.count("MatMulInteger") == quantised
    assert after.count("MatMul") == before.count("MatMul") + before.count("Gemm") - quantised  # a Gemm is split
    assert after.count("Conv") == before.count("Conv")
    (last,) = (node for node in graph.node if node.op_type == "MatMul" and LAST_LINEAR in _module_names(node))
    (weight,) = (onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == last.input[1])
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, model.bat.blocks[1].mlp.fc2.weight.detach().numpy().T)


def write_products(path, modules: list[str]):
    """An ONNX file of products of `x` with a weight, one for each module."""
    nodes, outputs, weights = [], [], []
    for number, module in enumerate(modules):
        node = onnx.helper.make_node("MatMul", ["x", f"weight{number}"], [f"y{number}"], name=f"{module} {number}")
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(["", module, f"linear_{number}"]))
        nodes.append(node)
        outputs.append(onnx.helper.make_tensor_value_info(f"y{number}", onnx.TensorProto.FLOAT, [2, 4]))
        weights.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), f"weight{number}"))
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 4])]
    graph = onnx.helper.make_graph(nodes, "products", inputs, outputs, weights)
    opset = onnx.helper.make_opsetid("", export_module.OPSET)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def test_int8_knows_the_last_product_by_its_name(tmp_path):
    write_products(tmp_path / "float32.onnx", [LAST_LINEAR, "encoder.blocks.0.mlp.fc2", "head.fc"])
    export_module._write_int8(tiny_model(), tmp_path / "float32.onnx", tmp_path / "int8.onnx")
    nodes = onnx.load(tmp_path / "int8.onnx").graph.node
    assert [node.name for node in nodes if node.op_type == "MatMul"] == [f"{LAST_LINEAR} 0", "head.fc 2"]
    assert [node.op_type for node in nodes].count("MatMulInteger") == 1


def test_onnx_file_tells_what_it_is(classifier):
    model, *paths, _ = classifier
    for path in paths:
        file = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(file)
        assert [entry.version for entry in file.opset_import if entry.domain == ""] == [export_module.OPSET]
        assert [tensor.name for tensor in file.graph.input] == ["waveform"]
        assert [tensor.name for tensor in file.graph.output] == ["logits", "last_hidden_state", "pooler_output"]
        metadata = {entry.key: entry.value for entry in file.metadata_props}
        assert metadata["sample_rate"] == "16000"
        assert "num_frames" not in metadata
        assert json.loads(metadata["id2label"]) == {str(key): name for key, name in model.config.id2label.items()}
        assert "BatForAudioClassification" in metadata["description"]


RUN_WITHOUT_TORCH = """
import sys
import numpy as np
import onnxruntime

model, name, inputs, outputs, tolerance = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
expected = np.load(outputs)
found = session.run(list(expected), {name: np.load(inputs)})
for name, output in zip(expected, found, strict=True):
    np.testing.assert_allclose(output, expected[name], rtol=0, atol=float(tolerance), err_msg=name)
assert not {"torch", "transformers", "bat_audio"} & set(sys.modules), sys.modules.keys()
print(*expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["encoder", "classifier", "int8"])
def test_onnx_needs_onnxruntime_alone(file, request, tmp_path):
    model, path, int8, *_ = request.getfixturevalue("encoder" if file == "encoder" else "classifier")
    name, inputs, tolerance = "waveform", random_waveform(2, 137), 1e-4
    if file == "encoder":
        name, inputs, tolerance = "input_features", random_features(2, 137), 1e-5
        expected = expected_outputs(model, inputs)
    elif file == "int8":  # which is only close to torch
        path, expected, tolerance = int8, run_onnx(int8, inputs), 1e-5
    else:
        expected = expected_outputs(model, BatAudioProcessor(num_frames=None)(inputs))
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    np.savez(tmp_path / "outputs.npz", **{name: np.asarray(output) for name, output in expected.items()})
    arguments = (path, name, tmp_path / "inputs.npy", tmp_path / "outputs.npz", tolerance)
    assert run_python(RUN_WITHOUT_TORCH, *arguments).stdout.split() == list(expected)


@pytest.mark.usefixtures("exporter")
def test_pt2_equals_torch(tmp_path):
    model = tiny_probe(frames=True, **HEADS["protobin"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    results = export(tmp_path / "model", tmp_path / "model.pt2", format="pt2", from_waveform=True)
    assert max(results.values()) < 1e-4
    metadata = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=metadata).module()
    assert json.loads(metadata["metadata.json"])["sample_rate"] == "16000"
    for shape in SHAPES:
        waveform = random_waveform(*shape)
        features = BatAudioProcessor(num_frames=None)(waveform)
        with torch.inference_mode():
            assert_same(program(waveform), expected_outputs(model.float(), features), tolerance=1e-4)


# Refusals


@pytest.fixture
def refuses(tmp_path):
    """A function that asserts that `export` of a tiny encoder raises and leaves the folder as it was."""
    tiny_model().save_pretrained(tmp_path / "model")

    def check(match, error=ValueError, checkpoint=tmp_path / "model", out=tmp_path / "out", format="pt2", **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=match):
            export(checkpoint, out, format=format, **options)
        assert sorted(tmp_path.rglob("*")) == before

    return check


def test_arguments_that_make_no_sense_are_refused(tmp_path, refuses):
    refuses("format='tflite' is not known; expected 'onnx' or 'pt2'", format="tflite")
    refuses("int8 is made with onnxruntime; leave it out for format='pt2'", int8=True)
    refuses("num_frames=64 is for from_waveform, .*; without it they come from the caller", num_frames=64)
    refuses("num_frames=0 must be a positive multiple of 16", num_frames=0, from_waveform=True)
    refuses("num_frames=65 must be a positive multiple of 16", num_frames=65, from_waveform=True)
    refuses("exists already; name another", FileExistsError, out=tmp_path / "model")
    refuses("there is no folder", FileNotFoundError, out=tmp_path / "no" / "out")
    refuses("No weights at .*no such file", OSError, checkpoint=tmp_path / "nowhere")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    refuses("is a file; expected a folder", checkpoint=tmp_path / "weights.safetensors")


def test_missing_packages_are_named(refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refuses("onnxscript.*pip install onnx onnxruntime onnxscript", ImportError, format="onnx")


@pytest.fixture
def spoiled_graph(exporter, monkeypatch):
    """Lets the graph's `pooler_output` be a little different from the model's."""
    forward = ExportGraph.forward

    def spoil(graph, inputs):
        outputs = forward(graph, inputs)
        return {**outputs, "pooler_output": 1.01 * outputs["pooler_output"]}

    monkeypatch.setattr(ExportGraph, "forward", spoil)


@pytest.mark.usefixtures("spoiled_graph")
def test_graph_that_computes_something_else_is_refused(refuses):
    refuses("computes something else .* pooler_output .* differs by")


@pytest.mark.usefixtures("spoiled_graph")
def test_command_that_is_refused_leaves_no_file(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "model.pt2"), "--format", "pt2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "error: The exported graph computes something else than the PyTorch model" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "fit", [lambda frames: min(frames, 320), lambda frames: max(frames, 320)], ids=["cuts only", "pads only"]
)
def test_frames_of_another_number_are_refused(refuses, monkeypatch, fit):
    def run(waveform):
        features = BatAudioProcessor(num_frames=None)(waveform)
        return expected_outputs(tiny_model(), fit_frames(features, fit(features.shape[2])))

    monkeypatch.setattr(export_module, "_write_program", lambda *_: run)
    refuses("computes something else .* last_hidden_state has the shape", from_waveform=True, num_frames=320)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda x: 1.01 * x, "differs by"),
        (lambda x: x * torch.nan, "differs by"),
        (lambda x: x[:, 1:], "has the shape"),
    ],
)
def test_difference_nan_and_another_shape_are_refused(refuses, monkeypatch, spoil, reason):
    def run(inputs):
        outputs = expected_outputs(tiny_model(), inputs)
        return {**outputs, "last_hidden_state": spoil(outputs["last_hidden_state"])}

    monkeypatch.setattr(export_module, "_write_program", lambda *_: run)
    refuses(f"computes something else .* last_hidden_state .*{reason}")


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        (
            "last_hidden_state",
            lambda x: x + 0.2 * torch.randn_like(x),
            "lose too much as int8: .* expected 0.995 and 0.98",
        ),
        ("last_hidden_state", lambda x: 2 * x, "lose too much as int8: the error of last_hidden_state is 100% of it"),
        ("pooler_output", lambda x: x * torch.nan, "lose too much as int8: the error of pooler_output is nan%"),
        ("pooler_output", torch.neg, "lose too much as int8: the error of pooler_output is 200% of it"),
        ("pooler_output", lambda x: x[:1, :1], "pooler_output has the shape"),
    ],
)
def test_int8_that_is_too_coarse_is_refused(refuses, monkeypatch, name, spoil, reason):
    def run(inputs):
        return expected_outputs(tiny_model(), inputs)

    def run_coarsely(inputs):
        outputs = run(inputs)
        return {**outputs, name: spoil(outputs[name])}

    monkeypatch.setattr(export_module, "_write_onnx", lambda *_: run)
    monkeypatch.setattr(export_module, "_write_int8", lambda *_: run_coarsely)
    refuses(reason, format="onnx", int8=True)


def test_failing_runtimes_are_one_line(refuses, monkeypatch):
    class StrangeError(Exception):
        pass

    def fail(*_):
        raise StrangeError("no such operator\nat all")

    monkeypatch.setattr(export_module, "_write_onnx", lambda *_: fail)
    refuses(r"torch \S+ cannot run the exported graph \(StrangeError: no such operator\)\.$", format="onnx")
    monkeypatch.setattr(export_module, "_write_onnx", lambda *_: lambda x: expected_outputs(tiny_model(), x))
    monkeypatch.setattr(export_module, "_write_int8", fail)
    refuses(r"cannot quantise the exported graph \(StrangeError: no such operator\)\.$", format="onnx", int8=True)


@pytest.mark.parametrize("modules", [["encoder.blocks.0.mlp.fc2"], [LAST_LINEAR, LAST_LINEAR]])
def test_int8_without_its_last_product_is_refused(refuses, monkeypatch, modules):
    def write(model, processor, path):
        write_products(path, modules)
        return lambda inputs: expected_outputs(model, inputs)

    monkeypatch.setattr(export_module, "_write_onnx", write)
    found = modules.count(LAST_LINEAR)
    reason = rf"cannot quantise the exported graph \(ValueError: {found} products belong to {LAST_LINEAR}, .*\)\.$"
    refuses(reason, format="onnx", int8=True)


def test_graph_that_cannot_be_traced_is_refused(refuses, monkeypatch):
    monkeypatch.setattr(ExportGraph, "forward", lambda graph, inputs: {"pooler_output": inputs[: int(inputs.sum())]})
    refuses(r"torch \S+ cannot export")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("stopped")])
def test_interruption_leaves_nothing_behind(tmp_path, refuses, monkeypatch, error):
    written = []

    def fail(*_):
        written.extend(file.name for file in tmp_path.glob(".*/*"))
        raise error

    monkeypatch.setattr(export_module, "_trace", lambda *_: torch.export.export(torch.nn.Identity(), (torch.zeros(1),)))
    monkeypatch.setattr(export_module, "_compare", fail)
    refuses(str(error), type(error))
    assert written == ["out"]


@pytest.mark.usefixtures("exporter")
def test_command(tmp_path):
    tiny_probe().save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "model.pt2"), "--format", "pt2"]
    arguments += ["--from-waveform", "--num-frames", "64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "logits: max difference" in result.output
    assert json.loads(result.stdout.splitlines()[-1])["file"] == str(tmp_path / "model.pt2")
    metadata = {"metadata.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=metadata)
    assert json.loads(metadata["metadata.json"])["num_frames"] == "64"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "model.pt2 exists already; name another (--out), or remove it first." in result.output
