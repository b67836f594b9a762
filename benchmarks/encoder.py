"""The encoder in all ways to run it, over the floor: the bare matrix products of the same shapes.

Shapes: B clips, T frames, M mel bands, D width, H heads, L blocks; N patch tokens of a picture, S = 1 + N.
"""

import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bat_audio import BatConfig, BatModel, load_audio, load_audio_processor, load_pretrained_encoder
from benchmarks.harness import (
    ROOT,
    Case,
    Section,
    Settings,
    Spread,
    Table,
    in_fresh_process,
    interleave,
    progress,
    ratio,
    time_calls,
    timing_rows,
)

SECOND_FRAMES = 112  # of a clip of 1 s, in whole patches
SOUNDS = [file for file in sorted((ROOT / "examples").iterdir()) if file.suffix not in (".md", ".png")]


class Product(NamedTuple):
    """A matrix product of one clip, (rows, inner) x (inner, columns), in each of `layers` blocks.

    Args:
        heads: how many such products each block has; 0 for a product with weights, which all clips share.
    """

    name: str
    layers: int
    heads: int
    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> int:
        return 2 * self.layers * max(self.heads, 1) * self.rows * self.inner * self.columns


def matrix_products(config: BatConfig, frames: int) -> list[Product]:
    """All matrix products of the encoder for a clip of at most one chunk, in their order."""
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    patches = frames // config.patch_size[0] * config.grid_size[1]
    tokens, hidden, head_width = patches + 1, int(width * config.mlp_ratio), width // heads
    products = [
        Product("patches", 1, 0, patches, config.patch_size[0] * config.patch_size[1], width),
        Product("qkv", layers, 0, tokens, width, 3 * width),
        Product("q k^T", layers, heads, tokens, head_width, tokens),
        Product("weights v", layers, heads, tokens, tokens, head_width),
        Product("gate", layers, 0, tokens, width, width),
        Product("proj", layers, 0, tokens, width, width),
        Product("fc1", layers, 0, tokens, width, hidden),
        Product("fc2", layers, 0, tokens, hidden, width),
    ]
    return [product for product in products if config.use_gate or product.name != "gate"]


def count_operations(config: BatConfig, frames: int) -> int:
    """Floating-point operations of a clip's matrix products, an addition and a multiplication apart."""
    return sum(product.operations for product in matrix_products(config, frames))


class Floor:
    """The matrix products alone, `clips` clips at a time.

    Every block has weights of its own, as in the model, so that they come from memory; activations are the same random
    numbers in every block. Outputs are allocated beforehand. With `biases`, where some libraries have the
    faster code, products are as in Linear.
    """

    def __init__(self, products: list[Product], batch: int, clips: int, biases: bool, device: str, dtype: torch.dtype):
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        self.passes, self.steps = batch // clips, []
        buffers = {}  # left and right operand and output of each product; weights follow
        for name, _, heads, rows, inner, columns in products:
            if heads:
                right = random(clips * heads, columns, inner).transpose(1, 2)
                buffers[name] = random(clips * heads, rows, inner), right, random(clips * heads, rows, columns)
            else:
                buffers[name] = random(clips * rows, inner), None, random(clips * rows, columns)
        for layer in range(max(product.layers for product in products)):
            for name, layers, heads, _, inner, columns in products:
                if layer >= layers:
                    continue
                left, right, out = buffers[name]
                weight = None if heads else random(columns, inner).t()  # as Linear stores it
                if heads:
                    self.steps.append(functools.partial(torch.bmm, left, right, out=out))
                elif biases:
                    self.steps.append(functools.partial(torch.addmm, random(columns), left, weight, out=out))
                else:
                    self.steps.append(functools.partial(torch.mm, left, weight, out=out))

    def __call__(self, _):
        for _ in range(self.passes):
            for step in self.steps:
                step()


def floors(
    config: BatConfig, batch: int, device: str, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], Callable]]:
    """The floor over the whole batch and, on a CPU, over parts of it, whose working sets stay in cache."""
    products = matrix_products(config, config.input_shape[0])
    parts = {1, torch.get_num_threads(), batch} if torch.device(device).type == "cpu" else {batch}
    return {
        f"floor, {clips} at a time{', with biases' if biases else ''}": (
            lambda clips=clips, biases=biases: Floor(products, batch, clips, biases, device, dtype)
        )
        for clips in sorted(parts)
        for biases in (False, True)
        if batch % clips == 0
    }


def keep_fastest_floor(seconds: dict[str, list[float]]) -> tuple[dict[str, list[float]], str]:
    """The times with one floor, called so; and which one it was."""
    kinds = [name for name in seconds if name.startswith("floor")]
    fastest = min(kinds, key=lambda name: statistics.median(seconds[name]))
    others = {name: values for name, values in seconds.items() if name not in kinds}
    return {"floor": seconds[fastest], **others}, fastest


def published_way(model: BatModel) -> Callable:
    """How the published release computes: attention weights in memory, and every block's tokens kept.

    `forward` would split the batch on a CPU to stay in cache; its inner method takes the batch as a whole.
    """
    model.set_attn_implementation("eager")
    return lambda features: model._encode_pass(features.to(model.dtype), True, False, None)


def encoders(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], Callable]]:
    """What loads the encoder in each of its ways and, with the same tokens and width, timm's ViT without gates."""

    def load(**options):
        return load_pretrained_encoder(device, dtype, folder, **options)

    def load_timm():
        import timm

        config = BatConfig.from_pretrained(folder)
        sizes = {"embed_dim": config.hidden_size, "depth": config.num_hidden_layers}
        vit = timm.create_model(
            "vit_base_patch16_224",
            img_size=tuple(config.input_shape),
            in_chans=1,
            num_classes=0,
            num_heads=config.num_attention_heads,
            **sizes,
        )
        return vit.to(device, dtype).eval()

    return {
        "published way": lambda: published_way(load()),
        "eager sdpa": load,
        "compiled": lambda: load(compile=True),
        "compiled whole": lambda: torch.compile(load(), fullgraph=True),
        "reduce-overhead": lambda: torch.compile(load(), fullgraph=True, mode="reduce-overhead"),
        "int8 compiled": lambda: load(quantization="int8", compile=True),
        "timm ViT-B/16": load_timm,
    }


def exported(folder: Path, out: Path, file_format: str, int8: bool = False) -> Callable:
    """The encoder of an exported file, made if it is not there."""
    from bat_audio.tools.export import export

    file = out / f"encoder{'-int8' if int8 else ''}.{file_format}"
    if not file.exists():
        export(folder, file, format=file_format, int8=int8)
    if file_format == "pt2":
        return torch.export.load(file).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda features: session.run(None, {"input_features": features.numpy()})


def audio_spectrogram_transformer(config: BatConfig) -> Callable:
    """transformers' AST of the encoder's width and depth, whose patches overlap: 1214 tokens for 10.24 s."""
    from transformers import ASTConfig, ASTModel

    ast_config = ASTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=int(config.hidden_size * config.mlp_ratio),
        max_length=config.input_shape[0],
        num_mel_bins=config.n_mels,
    )
    ast_config._attn_implementation = "sdpa"
    model = ASTModel(ast_config).eval()
    return lambda features: model(features.squeeze(1))


def random_features(config: BatConfig, batch: int, frames: int | None = None, **options) -> torch.Tensor:
    return torch.rand(batch, 1, frames or config.input_shape[0], config.n_mels, **options)


def picture_cases(
    calls: dict[str, Callable[[], Callable]], config: BatConfig, batch: int, **options
) -> dict[str, Callable[[], Case]]:
    """What makes the case of each call, on a batch of whole pictures; options are those of `torch.rand`."""

    def make_features() -> torch.Tensor:
        return random_features(config, batch, **options)

    return {
        name: lambda make_call=make_call: Case(make_call(), make_features, batch) for name, make_call in calls.items()
    }


def run(settings: Settings) -> Section:
    section = Section("Encoder")
    folder, batch, rounds = settings.folder, settings.batch, settings.rounds
    config = BatConfig.from_pretrained(folder)
    calls = {
        **floors(config, batch, "cpu"),
        **encoders(folder),
        "bfloat16 compiled": lambda: load_pretrained_encoder(checkpoint=folder, dtype="bfloat16", compile=True),
        "onnxruntime": lambda: exported(folder, settings.scratch, "onnx"),
        "onnxruntime int8": lambda: exported(folder, settings.scratch, "onnx", int8=True),
        "torch.export": lambda: exported(folder, settings.scratch, "pt2"),
        "transformers AST": lambda: audio_spectrogram_transformer(config),
    }
    del calls["reduce-overhead"]  # CUDA graphs
    torch._dynamo.reset()
    with progress("encoder"):
        seconds, left_out = interleave(picture_cases(calls, config, batch), rounds)
    section.leave_out(left_out)
    seconds, floor = keep_fastest_floor(seconds)
    section.notes.append(f"The fastest floor was taken: {floor}.")
    title = f"{batch} clips of {config.input_shape[0] / 100} s, float32 where not named otherwise"
    section.tables.append(Table(title, timing_rows(seconds, "floor"), "time / floor", 1))
    for name, target in (("compiled", 1.08), ("eager sdpa", 1.20)):
        if name in seconds:
            section.judge(f"{name} encoder / floor", ratio(seconds[name], seconds["floor"]).median, at_most=target)

    model = load_pretrained_encoder(checkpoint=folder)
    lengths = {"1 s": SECOND_FRAMES, "10.24 s": config.input_shape[0]}
    with progress("short clip"):
        short, _ = interleave(
            {
                name: lambda frames=frames: Case(model, lambda: random_features(config, 1, frames))
                for name, frames in lengths.items()
            },
            rounds,
        )
    section.tables.append(Table("One clip, eager sdpa", timing_rows(short, "10.24 s")))
    section.judge("1 s of audio, unpadded / 10.24 s", ratio(short["1 s"], short["10.24 s"]).median, at_most=0.14)

    for name in ("int8 compiled", "onnxruntime int8"):
        if name in seconds:
            section.judge(f"eager sdpa / {name}", ratio(seconds["eager sdpa"], seconds[name]).median, at_least=2.0)
    with progress("tokens of int8"):
        rows, left_out = token_cosines(settings)
    section.leave_out(left_out)
    if rows:
        section.tables.append(Table("Tokens of int8 beside float32", rows))
    for case, mean, smallest in map(dict.values, rows):
        section.judge(f"{case}: mean token cosine", mean, at_least=0.995)
        section.judge(f"{case}: smallest token cosine", smallest, at_least=0.98)

    with progress("compile times"):
        section.tables.append(Table("Compiling", compile_times(settings)))
    return section


def token_cosines(settings: Settings) -> tuple[list[dict], dict[str, str]]:
    """Mean and smallest cosine of int8 tokens with float32 ones, over a batch of random pictures and the examples.

    For the checkpoint's weights, and for those of the tests' golden files, which are far from initial ones; and which
    of the ways refuse this machine or these weights, and why.
    """
    golden = settings.scratch / "golden"
    in_fresh_process(write_golden_checkpoint, settings.folder, golden)
    config = BatConfig.from_pretrained(settings.folder)
    processor = load_audio_processor(num_frames=config.input_shape[0])
    sounds = [processor(load_audio(file)) for file in SOUNDS]
    features = torch.cat([random_features(config, len(sounds)), *sounds])
    rows, left_out = [], {}
    for weights, folder, out in (("checkpoint", settings.folder, settings.scratch), ("golden weights", golden, golden)):
        ways = {
            "int8 compiled": lambda folder=folder: encoders(folder)["int8 compiled"]().forward_encoder,
            "onnxruntime int8": lambda folder=folder, out=out: tokens_of_onnx(exported(folder, out, "onnx", int8=True)),
        }
        with torch.inference_mode():
            expected = load_pretrained_encoder(checkpoint=folder).forward_encoder(features)
        for name, make_call in ways.items():
            case = f"{name}, {weights}"
            try:
                call = make_call()
            except (ImportError, ValueError) as error:
                left_out[case] = str(error)
                continue
            with torch.inference_mode():
                cosines = nn.functional.cosine_similarity(call(features), expected, dim=-1)
            smallest = cosines.min().item()
            rows.append({"case": case, "mean cosine": cosines.mean().item(), "smallest cosine": smallest})
    return rows, left_out


def tokens_of_onnx(run_session: Callable) -> Callable:
    return lambda features: torch.from_numpy(run_session(features)[0])


def write_golden_checkpoint(folder: str, golden: str):
    """A checkpoint of the same size as another with the weights that the tests' golden files were made with.

    In a process of its own, because the tests' helpers set the number of threads.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import load_golden, recipe_weights

    model = BatModel(BatConfig.from_pretrained(folder))
    model.load_state_dict(recipe_weights(model, load_golden("encoder_full")[1]["seed"]))
    model.save_pretrained(golden)


def compile_times(settings: Settings) -> list[dict]:
    """Seconds of the first call, with nothing compiled before, in processes of their own."""
    ways = ("compiled", "compiled whole")
    seconds = {way: [] for way in ways}
    for _ in range(min(settings.rounds, 3)):
        for way in ways:
            with tempfile.TemporaryDirectory() as cache:
                arguments = settings.folder, way, settings.batch
                seconds[way].append(in_fresh_process(first_call_seconds, *arguments, TORCHINDUCTOR_CACHE_DIR=cache))
    return [{"case": way, "seconds of the first call": Spread.of(values)} for way, values in seconds.items()]


def first_call_seconds(folder: str, way: str, batch: int) -> float:
    model = encoders(folder)[way]()
    with torch.inference_mode():
        return time_calls(model, [random_features(model.config, batch)])
