"""The encoder in all ways to run it, over the floor: the bare matrix products of the same shapes.

Shapes: B clips, T frames, M mel bands, D width, H heads, L blocks; N patch tokens of a picture, S = 1 + N.
"""

import functools
import math
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
    median_ratio,
    progress,
    ratio,
    reason,
    time_calls,
    timing_rows,
)

SECOND_FRAMES = 112  # A clip of 1 s has 100 frames, which are rounded up to whole patches.
# AST has overlapping patches, and two more tokens, for the class and for distillation.
AST_TOKENS = {"stride": (10, 10), "prefix": 2}
SOUNDS = sorted(file for file in (ROOT / "examples").iterdir() if file.is_file() and file.suffix not in (".md", ".png"))


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


def matrix_products(
    config: BatConfig, frames: int, stride: tuple[int, int] | None = None, prefix: int = 1
) -> list[Product]:
    """All matrix products of the encoder for a clip of at most one chunk, in their order.

    For other encoders of this width, `stride` is from patch to patch and `prefix` counts the tokens before the patches.
    """
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    sizes = zip((frames, config.n_mels), config.patch_size, stride or config.patch_size, strict=True)
    patches = math.prod((size - patch) // step + 1 for size, patch, step in sizes)
    tokens, hidden, head_width = patches + prefix, int(width * config.mlp_ratio), width // heads
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


def count_operations(config: BatConfig, frames: int, **tokens) -> int:
    """Floating-point operations of a clip's matrix products, an addition and a multiplication apart.

    For transformers' AST, `tokens` is `AST_TOKENS`.
    """
    return sum(product.operations for product in matrix_products(config, frames, **tokens))


class Floor:
    """The matrix products alone, `clips` clips at a time.

    Every block has weights of its own, as in the model, so that they come from memory; activations are the same random
    numbers in every block. Outputs are allocated beforehand. With `biases`, where some libraries have the
    faster code, products are as in Linear.
    """

    def __init__(
        self,
        products: list[Product],
        batch: int,
        clips: int,
        biases: bool,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        self.passes, self.steps = batch // clips, []
        # For each product, its left operand, right operand and output. Weights are made below, for each layer.
        buffers = {}
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
                weight = None if heads else random(columns, inner).t()  # torch.nn.Linear stores its weight so.
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
    """The times with one floor, called so, at their head; and a note that says which one it was.

    Without any floor the times are as they were, and the first case can be their base.
    """
    kinds = [name for name in seconds if name.startswith("floor")]
    if not kinds:
        return seconds, "no floor could be measured, times are over those of the first case"
    fastest = min(kinds, key=lambda name: statistics.median(seconds[name]))
    others = {name: values for name, values in seconds.items() if name not in kinds}
    return {"floor": seconds[fastest], **others}, f"the fastest floor was taken: {fastest}"


def published_way(model: BatModel) -> Callable:
    """How the published release computes: attention weights in memory, and every block's tokens kept.

    `forward` would split the batch on a CPU to stay in cache; `encode_chunks` takes the batch as a whole.
    """
    model.set_attn_implementation("eager")
    return lambda features: model.encode_chunks(features.to(model.dtype), output_hidden_states=True)


def encoders(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], Callable]]:
    """What loads the encoder in each of its ways and, with the same tokens and width, timm's ViT without gates."""

    def load(**options):
        return load_pretrained_encoder(device, dtype, folder, **options)

    def load_timm():
        import timm

        config = BatConfig.from_pretrained(folder)
        vit = timm.create_model(
            "vit_base_patch16_224",
            img_size=tuple(config.input_shape),
            in_chans=1,
            num_classes=0,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.mlp_ratio,
        )
        return vit.to(device, dtype).eval()

    return {
        "published way": lambda: published_way(load()),
        "eager sdpa": load,
        "compiled": lambda: load(compile=True),
        "compiled whole": lambda: torch.compile(load(), fullgraph=True),
        "int8 compiled": lambda: load(quantization="int8", compile=True),
        "timm ViT-B/16": load_timm,
    }


def exported_program(
    folder: Path, out: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The encoder as torch.export's program, made in float32 on the CPU if it is not there."""
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(export_once(folder, out / "encoder.pt2", format="pt2"))
    return move_to_device_pass(program, device).module().to(dtype)


def exported_session(folder: Path, out: Path, int8: bool = False) -> Callable:
    """The encoder in onnxruntime on the CPU, exported if the file is not there."""
    import onnxruntime

    file = export_once(folder, out / f"encoder{'-int8' if int8 else ''}.onnx", format="onnx", int8=int8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda features: session.run(None, {"input_features": features.numpy()})


def export_once(folder: Path, file: Path, **options) -> Path:
    """The file, made if it is not there."""
    from bat_audio_tools.export import export

    if not file.exists():
        export(folder, file, **options)
    return file


def audio_spectrogram_transformer(
    config: BatConfig, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable:
    """transformers' AST of the encoder's width and depth, whose patches overlap: 1214 tokens for 10.24 s."""
    from transformers import ASTConfig, ASTModel

    ast_config = ASTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=int(config.hidden_size * config.mlp_ratio),
        max_length=config.input_shape[0],
        num_mel_bins=config.n_mels,
        time_stride=AST_TOKENS["stride"][0],
        frequency_stride=AST_TOKENS["stride"][1],
    )
    ast_config._attn_implementation = "sdpa"
    model = ASTModel(ast_config).to(device, dtype).eval()
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


def short_clips(model: BatModel, batch: int) -> dict[str, Callable[[], Case]]:
    """The encoder, and its matrix products alone, on clips of 1 s and of 10.24 s."""
    cases, config = {}, model.config
    # On a CPU the encoder takes one clip of 10.24 s per core at a time, and the floor does the same.
    cores = math.gcd(batch, torch.get_num_threads())
    for name, frames, clips in (("1 s", SECOND_FRAMES, batch), ("10.24 s", config.input_shape[0], cores)):
        make_features = functools.partial(random_features, config, batch, frames)
        make_floor = functools.partial(Floor, matrix_products(config, frames), batch, clips, biases=True)
        cases[f"floor of {name}"] = lambda floor=make_floor, features=make_features: Case(floor(), features, batch)
        cases[name] = lambda features=make_features: Case(model, features, batch)
    return cases


def run(settings: Settings) -> Section:
    section = Section("Encoder")
    folder, batch, rounds = settings.folder, settings.batch, settings.rounds
    config = BatConfig.from_pretrained(folder)
    calls = {
        **floors(config, batch, "cpu"),
        **encoders(folder),
        "onnxruntime": lambda: exported_session(folder, settings.scratch),
        "onnxruntime int8": lambda: exported_session(folder, settings.scratch, int8=True),
        "torch.export": lambda: exported_program(folder, settings.scratch),
        "torch.export compiled": lambda: torch.compile(exported_program(folder, settings.scratch)),
        "transformers AST": lambda: audio_spectrogram_transformer(config),
    }
    half_calls = {
        **floors(config, batch, "cpu", torch.bfloat16),
        "compiled": encoders(folder, dtype=torch.bfloat16)["compiled"],
    }
    half_cases = picture_cases(half_calls, config, batch, dtype=torch.bfloat16)
    cases = {**picture_cases(calls, config, batch), **{f"bfloat16 {name}": case for name, case in half_cases.items()}}
    torch._dynamo.reset()
    with progress("encoder"):
        seconds, left_out = interleave(cases, rounds)
    section.leave_out(left_out)
    half = {name: seconds.pop(f"bfloat16 {name}") for name in half_cases if f"bfloat16 {name}" in seconds}
    clips = f"{batch} clips of {config.input_shape[0] / 100} s"
    seconds, floor = keep_fastest_floor(seconds)
    section.notes.append(f"float32: {floor}")
    if seconds:
        base = next(iter(seconds))
        section.tables.append(Table(f"{clips} in float32", timing_rows(seconds, base), f"time / {base}", 1))
    half, floor = keep_fastest_floor(half)
    section.notes.append(f"bfloat16: {floor}")
    if half:
        rows = timing_rows(half, next(iter(half)))
        if "eager sdpa" in seconds:
            for row in rows:
                row["time / eager sdpa in float32"] = ratio(half[row["case"]], seconds["eager sdpa"])
        section.tables.append(Table(f"{clips} in bfloat16, over a floor of its own", rows))
    for name, target in (("compiled", 1.08), ("eager sdpa", 1.20)):
        section.judge(f"{name} encoder / floor", median_ratio(seconds, name, "floor"), at_most=target)

    model = load_pretrained_encoder(checkpoint=folder)
    for clips in sorted({1, batch}):
        together = "alone" if clips == 1 else f"{clips} at a time"
        with progress(f"short clips, {together}"):
            short, left_out = interleave(short_clips(model, clips), rounds)
        section.leave_out(left_out)
        if short:
            section.tables.append(Table(f"Short clips {together}, eager sdpa", timing_rows(short, [*short][-1])))
        share = median_ratio(short, "1 s", "10.24 s")
        section.judge(f"1 s of audio, unpadded / 10.24 s, {together}", share, at_most=0.14)
        share = median_ratio(short, "floor of 1 s", "floor of 10.24 s")
        if share is not None:
            section.notes.append(
                f"1 s {together}: its matrix products take {share:.3f} of the time of those of 10.24 s"
            )

    for name in INT8_WAYS:
        section.judge(f"eager sdpa / {name}", median_ratio(seconds, "eager sdpa", name), at_least=2.0)
    with progress("tokens of int8"):
        cosines, left_out = token_cosines(settings)
    section.leave_out(left_out)
    rows = [
        {"case": case, "mean cosine": mean, "smallest cosine": smallest} for case, (mean, smallest) in cosines.items()
    ]
    if rows:
        section.tables.append(Table("Tokens of int8 beside float32", rows))
    for case in (*cosines, *left_out):
        mean, smallest = cosines.get(case, (None, None))
        section.judge(f"{case}: mean token cosine", mean, at_least=0.995)
        section.judge(f"{case}: smallest token cosine", smallest, at_least=0.98)

    with progress("compile times"):
        section.tables.append(Table("Compiling", compile_times(settings)))
    return section


def token_cosines(settings: Settings) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """Mean and smallest cosine of int8 tokens with float32 ones, over a batch of random pictures and the examples.

    For the checkpoint's weights, for those of the tests' golden files, which are far from initial ones, and for
    BAT-tiny, which is trained; and which of the ways fail on this machine or with these weights, and why.
    """
    golden, tiny = settings.scratch / "golden", settings.scratch / "tiny"
    tiny.mkdir(exist_ok=True)
    in_fresh_process(write_golden_checkpoint, settings.folder, golden)
    cosines, left_out = {}, {}
    models = {
        "checkpoint": (settings.folder, settings.scratch),
        "golden weights": (golden, golden),
        "BAT-tiny": (ROOT / "examples" / "bat-tiny", tiny),
    }
    for weights, (folder, out) in models.items():
        features = pictures(BatConfig.from_pretrained(folder))
        with torch.inference_mode():
            expected = load_pretrained_encoder(checkpoint=folder).forward_encoder(features)
        for way, make_call in INT8_WAYS.items():
            case = f"{way}, {weights}"
            torch._dynamo.reset()  # After too many compilations torch would run the blocks uncompiled.
            try:
                call = make_call(folder, out)
                with torch.inference_mode():
                    similar = nn.functional.cosine_similarity(call(features), expected, dim=-1)
                cosines[case] = similar.mean().item(), similar.min().item()
            except Exception as error:  # The weights may lose too much, or a library be missing.
                left_out[case] = reason(error)
    return cosines, left_out


def pictures(config: BatConfig) -> torch.Tensor:
    """Features (B, 1, T, M) of random numbers and of the examples, cut into pieces of one chunk."""
    frames = config.input_shape[0]
    processor, sounds = load_audio_processor(num_frames=frames), [load_audio(file).flatten() for file in SOUNDS]
    pieces = [
        piece for sound in sounds for piece in sound.split(frames * config.hop_length) if len(piece) > config.n_fft
    ]
    return torch.cat([random_features(config, len(sounds)), *(processor(piece) for piece in pieces)])


def tokens_of_onnx(folder: Path, out: Path) -> Callable:
    run_session = exported_session(folder, out, int8=True)
    return lambda features: torch.from_numpy(run_session(features)[0])


# For each way to run in int8, a function that makes the encoder, from features to tokens.
INT8_WAYS = {
    "int8 compiled": lambda folder, out: encoders(folder)["int8 compiled"]().forward_encoder,
    "onnxruntime int8": tokens_of_onnx,
}


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
