"""The encoder and the front end on a GPU: precisions, batch sizes, and the share of what matrix products reach."""

from collections.abc import Sequence

import torch

from bat_audio import BatConfig
from benchmarks.encoder import count_operations, encoders, floors, keep_fastest_floor, picture_cases
from benchmarks.front_end import front_ends
from benchmarks.harness import Case, Section, Settings, Spread, Table, interleave, progress, ratio, timing_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BATCHES = (1, 8, 64, 256)
CEILING_SIZE = 8192  # rows and columns of the product whose speed is the ceiling
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
    section = Section("CUDA", notes=["Products in float32 are in full precision, without TF32, ceiling included."])
    config = BatConfig.from_pretrained(settings.folder)
    operations = count_operations(config, config.input_shape[0])
    ungated = BatConfig.from_pretrained(settings.folder, use_gate=False)
    timm_operations = count_operations(ungated, config.input_shape[0])
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for batch in batches:
            torch._dynamo.reset()  # a graph for this batch size, not one for several
            ways = [*WAYS, "reduce-overhead"] if batch == 1 else WAYS
            calls = encoders(settings.folder, settings.device, dtype)
            calls = {**floors(config, batch, settings.device, dtype), **{way: calls[way] for way in ways}}
            cases = {
                "ceiling": lambda dtype=dtype: ceiling(size, settings.device, dtype),
                **picture_cases(calls, config, batch, device=settings.device, dtype=dtype),
                **front_ends(batch, settings.device),
            }
            with progress(f"{name}, batch {batch}"):
                seconds, left_out = interleave(cases, settings.rounds, settings.device)
            section.leave_out({f"{case} in {name}, batch {batch}": reason for case, reason in left_out.items()})
            if "ceiling" not in seconds:
                continue
            most = [2 * size**3 / value for value in seconds.pop("ceiling")]  # operations per second
            front = {case: seconds.pop(case) for case in front_ends(batch, settings.device) if case in seconds}
            seconds, _ = keep_fastest_floor(seconds)
            rows = timing_rows(seconds, "floor")
            for row in rows:
                counted = timm_operations if row["case"].startswith("timm") else operations
                speeds = [counted / value for value in seconds[row["case"]]]
                row["TFLOP/s"] = Spread.of([speed / 1e12 for speed in speeds])
                row["share of ceiling"] = ratio(speeds, most)
            title = f"{name}, batch {batch}; ceiling {Spread.of([value / 1e12 for value in most])} TFLOP/s"
            section.tables.append(Table(title, rows, "share of ceiling", 1))
            if front:
                base = next(iter(front))
                section.tables.append(Table(f"Front end, batch {batch} x 10 s ({name} run)", timing_rows(front, base)))
            if "compiled" in seconds and (dtype, batch) == (torch.bfloat16, 64):
                share = ratio([operations / value for value in seconds["compiled"]], most).median
                section.judge("CUDA, bf16, compiled, batch 64: share of the ceiling", share, at_least=0.6)
                if "BatAudioProcessor" in front:
                    share = ratio(front["BatAudioProcessor"], seconds["compiled"]).median
                    section.judge("front end / encoder (bf16, compiled), CUDA, batch 64", share, at_most=0.05)
    return section
