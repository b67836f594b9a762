"""The encoder and the front end on a GPU: precisions, batch sizes, and the share of what matrix products reach."""

from collections.abc import Callable, Sequence

import torch

from bat_audio import BatConfig
from benchmarks.encoder import (
    AST_TOKENS,
    audio_spectrogram_transformer,
    count_operations,
    encoders,
    exported_program,
    floors,
    keep_fastest_floor,
    picture_cases,
)
from benchmarks.front_end import front_ends
from benchmarks.harness import (
    Case,
    Section,
    Settings,
    Spread,
    Table,
    interleave,
    median_ratio,
    progress,
    ratio,
    timing_rows,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BATCHES = (1, 8, 64, 256)
CEILING_SIZE = 8192  # The ceiling is the speed of a product of square matrices with so many rows.
WAYS = ("published way", "eager sdpa", "compiled", "timm ViT-B/16")


def ceiling(size: int, device: str, dtype: torch.dtype) -> Case:
    """One large square product, which is taken for the most that this device can do."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return Case(lambda _: torch.mm(left, right, out=out), lambda: None)


def run(
    settings: Settings,
    dtypes: Sequence[torch.dtype] = DTYPES,
    batches: Sequence[int] = BATCHES,
    size: int = CEILING_SIZE,
) -> Section:
    """Every dtype with every batch size; front ends and ceiling are timed in the same rounds as the encoders."""
    section = Section(
        "CUDA",
        notes=[
            "float32 is in full precision, without TF32, the ceiling included.",
            "The floor's attention products write out the attention matrix, which SDPA's kernels do not.",
        ],
    )
    ceilings = []
    # By default torch uses TF32 for convolutions, but not for matrix products. The patches are made by a convolution.
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        for dtype in dtypes:
            for batch in batches:
                ceilings += add_tables(section, settings, dtype, batch, size)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    if ceilings:
        section.tables.append(Table(f"Ceiling: a product of two {size} x {size} matrices", ceilings))
    return section


def add_tables(section: Section, settings: Settings, dtype: torch.dtype, batch: int, size: int) -> list[dict]:
    """Tables, verdicts and notes of one dtype and batch size; returns the row of its ceiling."""
    folder, device = settings.folder, settings.device
    config = BatConfig.from_pretrained(folder)
    name, frames = str(dtype).removeprefix("torch."), config.input_shape[0]
    run_name = f"{name}, batch {batch}"
    cases = {
        "ceiling": lambda: ceiling(size, device, dtype),
        **picture_cases(encoder_calls(settings, config, dtype, batch), config, batch, device=device, dtype=dtype),
        **front_ends(batch, device),
    }
    torch._dynamo.reset()  # Otherwise torch would compile one graph for several batch sizes.
    with progress(run_name):
        seconds, left_out = interleave(cases, settings.rounds, device)
    section.leave_out({f"{case} in {run_name}": why for case, why in left_out.items()})
    most = [2 * size**3 / value for value in seconds.pop("ceiling", [])]  # Operations per second.
    front = {case: seconds.pop(case) for case in front_ends(batch, device) if case in seconds}
    seconds, floor = keep_fastest_floor(seconds)
    section.notes.append(f"{run_name}: {floor}")

    ungated = BatConfig.from_pretrained(folder, use_gate=False)
    others = {
        "timm ViT-B/16": count_operations(ungated, frames),
        "transformers AST": count_operations(ungated, frames, **AST_TOKENS),
    }
    speeds = {  # Operations per second.
        case: [others.get(case, count_operations(config, frames)) / value for value in values]
        for case, values in seconds.items()
    }
    if seconds:
        base = next(iter(seconds))
        rows = timing_rows(seconds, base)
        for row in rows:
            row["TFLOP/s"] = Spread.of([speed / 1e12 for speed in speeds[row["case"]]])
            if most:
                row["share of ceiling"] = ratio(speeds[row["case"]], most)
        section.tables.append(Table(run_name, rows, "share of ceiling" if most else f"time / {base}", 1))
    if front:
        rows = timing_rows(front, next(iter(front)))
        section.tables.append(Table(f"Front end, batch {batch} x 10 s ({name} run)", rows))
    if (dtype, batch) == (torch.bfloat16, 64):
        share = ratio(speeds["compiled"], most).median if most and "compiled" in speeds else None
        section.judge("CUDA, bf16, compiled, batch 64: share of the ceiling", share, at_least=0.6)
        share = median_ratio({**seconds, **front}, "BatAudioProcessor", "compiled")
        section.judge("front end / encoder (bf16, compiled), CUDA, batch 64", share, at_most=0.05)
    return [{"run": run_name, "TFLOP/s": Spread.of([value / 1e12 for value in most])}] if most else []


def encoder_calls(
    settings: Settings, config: BatConfig, dtype: torch.dtype, batch: int
) -> dict[str, Callable[[], Callable]]:
    """What makes each encoder, and the floors: on a GPU of the whole batch, with biases and without."""
    folder, device = settings.folder, settings.device
    ways = encoders(folder, device, dtype)
    calls = {**floors(config, batch, device, dtype), **{way: ways[way] for way in WAYS}}
    calls["torch.export"] = lambda: exported_program(folder, settings.scratch, device, dtype)
    calls["transformers AST"] = lambda: audio_spectrogram_transformer(config, device, dtype)
    if dtype == torch.bfloat16:  # What int8 leaves as it is runs in bfloat16.
        calls["int8 compiled"] = ways["int8 compiled"]
    if batch == 1:  # This mode takes CUDA graphs, which save the most where kernels are short.
        calls["reduce-overhead"] = lambda: torch.compile(ways["eager sdpa"](), fullgraph=True, mode="reduce-overhead")
    return calls
