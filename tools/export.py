"""Export of a model as one file that runs without this package: ONNX, or a program of torch.export.

`export` traces the model with any batch and length, writes the file, runs it, and keeps it only if it computes what the
PyTorch model does.

Shapes: B clips, T frames, M mel bands, D width, C chunks; t = T/16 time patches, f = M/16 mel patches, N = t*f.
"""

import ast
import json
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bat_audio.load_model import find_weights
from bat_audio.modeling_bat import BatModel, BatPreTrainedModel
from bat_audio.processing_bat import PATCH_FRAMES, POWER_FLOOR, BatAudioProcessor, BatFeatureExtractor
from bat_audio_tools.folders import check_new, whole
from bat_audio_tools.publish import load_folder
from bat_audio_tools.settings import check_export

OPSET = 18  # This version of ONNX's operators is read by onnxruntime 1.14 and newer.
# An output may differ from PyTorch's by this share of its largest value, or of SMALL where that is larger.
TOLERANCE, SMALL = 1e-3, 1e-2
# The cosines of int8 tokens with float32 ones must reach the first value on average, and the second one each.
MIN_MEAN_COSINE, MIN_COSINE = 0.995, 0.98
# As int8, the error of an output may be this share of it. Tokens of a cosine of 0.98 are off by a share of 0.2.
MAX_INT8_ERROR = 0.25
NOTHING_WRITTEN = f"Nothing was written; try another version of torch (this is {torch.__version__}) or onnxruntime."
ATTENTION = "bat_export"  # The masked attention is registered under this name while the graph runs.


class FrontEnd(nn.Module):
    """`BatAudioProcessor` as a graph: waveforms (B, samples) to features (B, 1, T, M).

    The Fourier transform is a convolution with windowed cosines and sines, which every runtime has; unlike in the
    processor, nothing is checked.
    """

    def __init__(self, processor: BatAudioProcessor):
        super().__init__()
        self.n_fft, self.hop_length, self.top_db = processor.n_fft, processor.hop_length, processor.top_db
        self.num_frames = processor.num_frames
        basis = torch.view_as_real(torch.fft.rfft(torch.diag(processor.window.double())))  # (n_fft, n_fft/2 + 1, 2)
        self.register_buffer("basis", basis.permute(2, 1, 0).reshape(-1, 1, self.n_fft).float())
        self.register_buffer("mel_filters", processor.mel_filters)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(waveform[:, None], (self.n_fft // 2, self.n_fft // 2), mode="reflect")
        spectrum = nn.functional.conv1d(padded, self.basis, stride=self.hop_length)
        power = spectrum.unflatten(1, (2, -1)).square().sum(dim=1)  # (B, n_fft/2 + 1, T)
        decibel = 10 * (power.transpose(1, 2) @ self.mel_filters).clamp_min(POWER_FLOOR).log10()
        high = decibel.amax(dim=(1, 2), keepdim=True)
        decibel = torch.maximum(decibel, high - self.top_db)
        low = decibel.amin(dim=(1, 2), keepdim=True)
        # The processor adds 1e-8 instead, but onnxruntime takes that for adding zero and leaves it out, so that silence
        # would become NaN.
        features = ((decibel - low) / (high - low).clamp_min(1e-8)).unsqueeze(1)
        if self.num_frames is not None:
            # Long clips are padded too: a condition on the length would tie the graph to one side of it.
            return nn.functional.pad(features, (0, 0, 0, self.num_frames))[:, :, : self.num_frames]
        frames = features.shape[2]
        whole_frames = (frames + PATCH_FRAMES - 1) // PATCH_FRAMES * PATCH_FRAMES
        return nn.functional.pad(features, (0, 0, 0, whole_frames - frames))


class ExportGraph(nn.Module):
    """A model as one graph for any batch and length, where `BatModel.encode` loops over the chunks of a long input.

    All chunks run at once: the last one is filled up to the others' length, nothing attends to the filling, and it is
    dropped in the end. The memory therefore grows with the length. An input of at most one chunk has no filling.

    Args:
        model: the encoder, or a model with a head.
        front_end: what makes features of the input; None where the input is features.
    """

    def __init__(self, model: BatPreTrainedModel, front_end: FrontEnd | None):
        super().__init__()
        self.front_end = nn.Identity() if front_end is None else front_end
        self.encoder = getattr(model, "bat", model)
        self.head = getattr(model, "head", None)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """`logits` where there is a head, `last_hidden_state` (B, 1 + N, D) and `pooler_output` (B, D)."""
        features = self.front_end(inputs)
        config = self.encoder.config
        patch_frames, most = config.patch_size[0], config.chunk_time_patches
        batch, _, frames, mels = features.shape
        mel_patches = config.grid_size[1]
        # These sizes are read from tensors, because expressions of the input's shape would tie the graph to the shape
        # that it is made from.
        time_patches = _opaque_size(frames // patch_frames)
        length = _opaque_size(torch.sym_min(time_patches, most), most)  # A chunk has so many time patches.
        chunks = _opaque_size((time_patches + most - 1) // most)
        torch._check(chunks * length >= time_patches)

        # The filling repeats the last frame.
        places = torch.arange(chunks * length * patch_frames, device=features.device).clamp(max=frames - 1)
        rows = features[:, 0, places].reshape(batch * chunks, 1, length * patch_frames, mels)
        is_patch = torch.arange(chunks * length, device=features.device) < time_patches
        is_patch = is_patch.reshape(chunks, length, 1).expand(-1, -1, mel_patches).flatten(1)
        is_token = nn.functional.pad(is_patch, (1, 0), value=True)  # (C, S); CLS is the first token.
        with _masked_attention(config, is_token.repeat(batch, 1)[:, None, None]):
            whole = self.encoder.encode_chunks(rows, mix_patches=None if self.head is None else self.head.mix_patches)

        tokens, patch_mix = whole.layers[-1].unflatten(0, (batch, chunks)), whole.patch_mix  # (B, C, S, D)
        cls = tokens[:, :, 0].mean(dim=1)  # (B, D)
        patches = tokens[:, :, 1:].flatten(1, 2)[:, : time_patches * mel_patches]
        outputs = {"last_hidden_state": torch.cat([cls[:, None], patches], dim=1), "pooler_output": cls}
        if self.head is None:
            return outputs
        if patch_mix is not None:  # (B*C, D, t', f') -> (B, D, t, f')
            patch_mix = patch_mix.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :time_patches]
        cls_tokens = whole.cls_tokens.unflatten(0, (batch, chunks)).mean(dim=1)  # (B, L, D)
        return {"logits": self.head.classify(self.head.mix_cls(cls_tokens.transpose(0, 1)), patch_mix), **outputs}


def _opaque_size(size: int, most: int | None = None) -> int:
    """The same size, 1 to `most`, as one that the trace knows nothing else about."""
    size = torch.scalar_tensor(size, dtype=torch.int64).item()
    torch._check(size >= 1)
    if most is not None:
        torch._check(size <= most)
    return size


@contextmanager
def _masked_attention(config, is_key: torch.Tensor) -> Iterator[None]:
    """Let the encoder attend only where `is_key` (B*C, 1, 1, S) is true."""

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=is_key, scale=scaling)
        return context.transpose(1, 2), None

    usual = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = attend
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual
        del ALL_ATTENTION_FUNCTIONS[ATTENTION]


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: str,
    from_waveform: bool = False,
    num_frames: int | None = None,
    int8: bool = False,
) -> dict[str, float]:
    """Write a model as one file for ONNX runtimes or torch.export, after checking what it computes.

    The graph takes features (B, 1, T, M) as in `BatModel.forward`, with any B and any T of at least one patch, in
    float32 whatever the checkpoint's dtype. Its outputs are `last_hidden_state` and `pooler_output` of the encoder and,
    before them, the `logits` of a model with a head. Long inputs give what the model gives, but all chunks at once, so
    that memory grows with the length. The file is run on fresh inputs of several shapes, some longer than a chunk, and
    compared with the PyTorch model; it appears only if it passes.

    "onnx" is a single file of opset 18 with the input `input_features` or `waveform`. Its metadata tells `sample_rate`,
    `num_frames` where it is given and, of a model with a head, `id2label` as JSON and `problem_type`. "pt2" is the
    program of torch.export, which runs wherever torch does: `torch.export.load("bat.pt2").module()(features)` gives a
    dict of the outputs. Make it fast with torch.compile, not with AOTInductor, whose package of it computes other
    values (seen with torch 2.14).

    Args:
        checkpoint: a model folder of `save_pretrained`, `convert` or `finetune`, or a Hub repository "namespace/name".
        out: the file to write, which does not exist.
        format: "onnx" or "pt2".
        from_waveform: take mono clips (B, samples) at the config's rate, at least n_fft/2 + 1 samples in -1..1, which
            are not checked, and make the features in the graph, as `BatAudioProcessor(num_frames)` does.
        num_frames: with `from_waveform`, cut or zero-pad the features to so many frames, a multiple of 16, as
            `BatFeatureExtractor` does for training; None is as long as the clip, rounded up to whole patches.
        int8: quantise the Linear layers of the encoder's blocks but the very last, for "onnx" only: their weights to 8
            bits per output channel and their inputs, while running, by the largest and smallest value over the batch.

    Returns:
        The largest absolute difference of each of the file's outputs from PyTorch in float32; for int8 also
        "mean_cosine" and "min_cosine" of its tokens.

    Raises:
        ValueError: an unknown format, int8 for "pt2", `num_frames` without `from_waveform` or of another size, no whole
            BAT model in the checkpoint, a torch older than 2.11 that cannot export it, or an exported graph that
            computes something else; no file is left then.
        OSError: no checkpoint, `out` exists, or it cannot be written.
        ImportError: the packages that write and run ONNX are missing.
    """
    out = Path(out)
    check_export(format, from_waveform, num_frames, int8)
    check_new(out)
    if out.is_dir():
        raise FileExistsError(f"{out} is a folder; name the file to write (--out).")
    if format == "onnx":
        _check_libraries()
    model = load_folder(_find_folder(checkpoint)).float().eval()
    processor = None
    if from_waveform:
        extractor = BatFeatureExtractor.from_model_config(model.config)
        extractor.num_frames = num_frames
        processor = extractor.processor  # This raises a ValueError for a wrong num_frames.
    checks = _make_checks(model, processor)
    with whole(out) as partial, _quiet():
        graph = partial.with_name(f"float32-{out.name}") if int8 else partial
        write = _write_onnx if format == "onnx" else _write_program
        with _plain_errors(f"export this model as {format}"):
            run = write(model, processor, graph)
        results = _compare(checks, run)
        if int8:
            with _plain_errors("quantise the exported graph"):
                run = _write_int8(model, graph, partial)
            results = _compare_int8(checks, run)
    return results


@contextmanager
def _plain_errors(doing: str) -> Iterator[None]:
    """A ValueError of one line for whatever exporters and runtimes raise, which is nearly everything."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        advice = "" if torch.__version__ >= "2.11" else " Use torch 2.11 or newer."
        raise ValueError(
            f"torch {torch.__version__} cannot {doing} ({type(error).__name__}: {reason}).{advice}"
        ) from error


def _check_libraries():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Writing and running ONNX needs more packages ({error}): pip install onnx onnxruntime onnxscript"
        ) from error


def _find_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint, downloaded if need be."""
    weights = find_weights(checkpoint)
    if weights.name != "model.safetensors":
        raise ValueError(f"{checkpoint} is a file; expected a folder with config.json and model.safetensors.")
    return weights.parent


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the exporters' and the quantiser's advice to their developers."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _make_input(
    model: BatPreTrainedModel, processor: BatAudioProcessor | None, batch: int, frames: int
) -> torch.Tensor:
    """Random features, or clips of noise that fades by 120 dB, the last of several silent, of at least one patch."""
    if processor is None:
        return torch.rand(batch, 1, max(frames, model.config.patch_size[0]), model.config.n_mels)
    samples = max(frames * processor.hop_length - 1, processor.n_fft // 2 + 1)
    waveform = (2 * torch.rand(batch, samples) - 1) * torch.logspace(0, -6, samples)
    waveform[1:][-1:] = 0
    return waveform


def _make_checks(model: BatPreTrainedModel, processor: BatAudioProcessor | None) -> list[tuple[torch.Tensor, dict]]:
    """Inputs of several shapes, and what the PyTorch model makes of them.

    Some are longer than a chunk or, where the processor has `num_frames`, shorter and longer than that.
    """
    patch_frames, chunk_frames = (
        model.config.patch_size[0],
        model.config.chunk_time_patches * model.config.patch_size[0],
    )
    encoder, head = getattr(model, "bat", model), getattr(model, "head", None)
    num_frames = None if processor is None else processor.num_frames
    if num_frames is None:
        shapes = [(3, 5 * patch_frames + 3), (1, 2 * chunk_frames), (2, chunk_frames + 3 * patch_frames - 1)]
    else:
        shapes = [(3, num_frames - 3), (1, num_frames), (2, 2 * num_frames + 3)]
    checks = []
    for batch, frames in [(1, 1), *shapes]:
        inputs = _make_input(model, processor, batch, frames)
        with torch.inference_mode():
            output, logits = encoder.encode(inputs if processor is None else processor(inputs), head=head)
        expected = {} if head is None else {"logits": logits}
        expected.update(last_hidden_state=output.last_hidden_state, pooler_output=output.pooler_output)
        checks.append((inputs, expected))
    return checks


def _trace(model: BatPreTrainedModel, processor: BatAudioProcessor | None) -> torch.export.ExportedProgram:
    config = model.config
    graph = ExportGraph(model, None if processor is None else FrontEnd(processor)).eval()
    if processor is None:
        axes = {0: Dim("batch"), 2: Dim("frames", min=config.patch_size[0])}
    else:
        axes = {0: Dim("batch"), 1: Dim("samples", min=processor.n_fft // 2 + 1)}
    # The example is two clips a little longer than a chunk. A single clip would be taken for a fixed batch of 1.
    example = _make_input(model, processor, 2, (config.chunk_time_patches + 1) * config.patch_size[0])
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=(axes,), strict=False)


def _write_program(model: BatPreTrainedModel, processor: BatAudioProcessor | None, path: Path) -> Callable:
    """Write the program of torch.export; returns what runs the file."""
    extra_files = {"metadata.json": json.dumps(_metadata(model, processor))}
    torch.export.save(_trace(model, processor), path, extra_files=extra_files)
    return torch.export.load(path).module()


def _write_onnx(model: BatPreTrainedModel, processor: BatAudioProcessor | None, path: Path) -> Callable:
    """Write the ONNX graph as one file; returns what runs the file."""
    outputs = ["last_hidden_state", "pooler_output"]
    program = torch.onnx.export(
        _trace(model, processor),
        dynamo=True,
        opset_version=OPSET,
        input_names=["input_features" if processor is None else "waveform"],
        output_names=outputs if isinstance(model, BatModel) else ["logits", *outputs],
        verbose=False,
    )
    program.model.metadata_props.update(_metadata(model, processor))
    program.save(path, external_data=False)
    return _onnx_runner(path)


def _write_int8(model: BatPreTrainedModel, float32: Path, path: Path) -> Callable:
    """Quantise the Linear layers of the blocks, but the very last, in an ONNX file; returns what runs the new file.

    Raises a ValueError if the very last one is not there exactly once.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Only products with weights are quantised, not those of two activations. The front end and the heads stay in
    # float32, and so does the last product of the last block, whose rounding would go right into the output.
    graph = onnx.load(float32).graph
    weights = {tensor.name for tensor in graph.initializer}
    linears = {
        node.name: _module_names(node) for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights
    }
    last = f"encoder.blocks.{model.config.num_hidden_layers - 1}.mlp.fc2"
    found = sum(last in names for names in linears.values())
    if found != 1:
        raise ValueError(f"{found} products belong to {last}, which stays in float32; expected one")
    quantised = [
        name
        for name, modules in linears.items()
        if any(module.startswith("encoder.blocks.") for module in modules) and last not in modules
    ]
    # The weights are unsigned, because CPUs without VNNI add products of signed ones in 16 bits, which overflow unless
    # the weights have only 7 bits. With 7 bits the model is a little faster but coarser: for one encoder's tokens the
    # mean cosine was 0.987 instead of 0.997.
    quantize_dynamic(float32, path, nodes_to_quantize=quantised, per_channel=True, weight_type=QuantType.QUInt8)
    return _onnx_runner(path)


def _module_names(node) -> list[str]:
    """The modules, each inside the one before, from which the exporter made a node of an ONNX graph."""
    return [
        name
        for entry in node.metadata_props
        if entry.key.endswith("name_scopes")  # Its value is a list of names as Python writes it.
        for name in ast.literal_eval(entry.value)
    ]


def _metadata(model: BatPreTrainedModel, processor: BatAudioProcessor | None) -> dict[str, str]:
    """What a program that has only the file needs to know."""
    metadata = {
        "description": f"{type(model).__name__} (BAT, Better Audio Transformer, https://arxiv.org/abs/2602.16305)",
        "sample_rate": str(model.config.sample_rate),
    }
    if processor is not None and processor.num_frames is not None:
        metadata["num_frames"] = str(processor.num_frames)
    if not isinstance(model, BatModel):
        metadata["id2label"] = json.dumps(model.config.id2label, ensure_ascii=False)
        metadata["problem_type"] = str(model.config.problem_type)
    return metadata


def _onnx_runner(path: Path) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = session.run(names, {session.get_inputs()[0].name: inputs.numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return run


def _outputs(
    checks: list[tuple[torch.Tensor, dict]], run: Callable
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, found and expected value of each output of each check; a ValueError if the shapes differ."""
    for inputs, expected in checks:
        with _plain_errors("run the exported graph"):
            found = run(inputs)
        for name, tensor in expected.items():
            if found[name].shape != tensor.shape:
                raise ValueError(
                    f"The exported graph computes something else than the PyTorch model: {name} has the shape "
                    f"{tuple(found[name].shape)} instead of {tuple(tensor.shape)}. {NOTHING_WRITTEN}"
                )
            yield name, found[name], tensor


def _compare(checks: list[tuple[torch.Tensor, dict]], run: Callable) -> dict[str, float]:
    """The largest difference of each output; a ValueError if one is above `TOLERANCE`."""
    differences = {}
    for name, found, expected in _outputs(checks, run):
        limit = TOLERANCE * max(SMALL, expected.abs().max().item())
        difference = (found - expected).abs().max().item()
        if not difference <= limit:  # This holds for NaN too.
            raise ValueError(
                f"The exported graph computes something else than the PyTorch model: {name} {tuple(expected.shape)} "
                f"differs by {difference:.2g}, more than {limit:.2g}. {NOTHING_WRITTEN}"
            )
        differences[name] = max(differences.get(name, 0.0), difference)
    return differences


def _compare_int8(checks: list[tuple[torch.Tensor, dict]], run: Callable) -> dict[str, float]:
    """The largest difference of each output, and mean and smallest cosine of the tokens.

    Raises a ValueError if a cosine is below its limit, or if an output's root-mean-square error, as a share of the
    output's own root mean square over all checks, is above `MAX_INT8_ERROR`.
    """
    differences, cosines, squares = {}, [], defaultdict(lambda: [0.0, 0.0])
    for name, found, expected in _outputs(checks, run):
        error = found - expected
        differences[name] = max(differences.get(name, 0.0), error.abs().max().item())
        squares[name][0] += error.square().sum().item()
        squares[name][1] += expected.square().sum().item()
        if name == "last_hidden_state":
            cosines.append(nn.functional.cosine_similarity(found, expected, dim=-1).flatten())
    mean, least = torch.cat(cosines).mean().item(), torch.cat(cosines).min().item()
    if not (mean >= MIN_MEAN_COSINE and least >= MIN_COSINE):
        raise ValueError(
            f"These weights lose too much as int8: the tokens' cosine with float32 is {mean:.4f} on average and "
            f"{least:.4f} at least; expected {MIN_MEAN_COSINE} and {MIN_COSINE}. Nothing was written; leave int8 out."
        )
    for name, (errors, size) in squares.items():
        share = math.sqrt(errors / max(size, 1e-30))
        if not share <= MAX_INT8_ERROR:
            raise ValueError(
                f"These weights lose too much as int8: the error of {name} is {share:.0%} of it; "
                f"expected at most {MAX_INT8_ERROR:.0%}. Nothing was written; leave int8 out."
            )
    return {**differences, "mean_cosine": mean, "min_cosine": least}
