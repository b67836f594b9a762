"""Peak memory of inference, training and loading, each case in a process of its own."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bat_audio import BatConfig, BatModel, load_pretrained_encoder
from benchmarks import head_memory
from benchmarks.encoder import encoders, random_features
from benchmarks.harness import Section, Settings, Spread, Table, in_fresh_process, peak_growth, progress


def inference_peak(folder: str, way: str, batch: int, frames: int | None, device: str) -> int:
    """Bytes beyond the model and its input (B, 1, T, M)."""
    call = encoders(Path(folder), device)[way]()
    config = BatConfig.from_pretrained(folder)
    features = random_features(config, batch, frames, device=device)
    with torch.inference_mode():
        call(features[:1, :, : config.input_shape[0]])  # This allocates what does not depend on the input.
        return peak_growth(lambda: call(features), device)


def training_peak(folder: str, batch: int, is_checkpointed: bool, device: str) -> int:
    """Bytes of a training step in bfloat16 autocast beyond weights, gradients and input."""
    model = load_pretrained_encoder(device, checkpoint=folder).train()
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    features = random_features(model.config, batch, device=device)

    def step(clips: torch.Tensor):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = model(clips).last_hidden_state.float().square().mean()
        loss.backward()

    step(features[:1])  # This allocates the gradients.
    return peak_growth(lambda: step(features), device)


def loading_peak(folder: str, reads_weights: bool) -> int:
    """Bytes by which a process grows that has loaded a tiny encoder before, and so imported everything.

    Where the file is mapped into memory, weights come in when they are read first.
    """
    with tempfile.TemporaryDirectory() as tiny:
        BatModel(BatConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tiny)
        load_pretrained_encoder(checkpoint=tiny)

    def load():
        model = load_pretrained_encoder(checkpoint=folder)
        if reads_weights:
            for weight in model.state_dict().values():
                weight.sum()

    return peak_growth(load)


def memory_table(title: str, sizes: dict[str, list[int]]) -> Table:
    """Rows of a table of bytes; what was measured several times with its spread."""
    base = statistics.median(next(iter(sizes.values())))
    rows = []
    for case, values in sizes.items():
        median, megabytes = statistics.median(values), [value / 1e6 for value in values]
        share = {f"memory / {next(iter(sizes))}": median / base}
        rows.append({"case": case, **share, "MB": Spread.of(megabytes) if len(values) > 1 else megabytes[0]})
    return Table(title, rows, "MB")


def peaks(processes: int, function: Callable, cases: dict[str, tuple]) -> dict[str, list[int]]:
    """Bytes of a function with each case's arguments, measured in several processes of its own."""
    sizes = {case: [] for case in cases}
    for _ in range(processes):
        for case, arguments in cases.items():
            sizes[case].append(in_fresh_process(function, *arguments))
    return sizes


def run(settings: Settings) -> Section:
    section = Section(f"Memory ({settings.device})")
    batch, head_batch, processes = (2, 2, 1) if settings.quick else (8, 32, 3)
    folder, device = settings.folder, settings.device

    with progress("memory of inference"):
        cases = {way: (folder, way, batch, None, device) for way in ("published way", "eager sdpa")}
        sizes = peaks(processes, inference_peak, cases)
    section.tables.append(memory_table(f"Inference, {batch} clips: beyond model and input", sizes))
    share = statistics.median(sizes["eager sdpa"]) / statistics.median(sizes["published way"])
    section.judge(f"extra peak memory / the published way's, batch {batch}", share, at_most=0.25)

    with progress("memory of training"):
        steps = {"plain": False, "gradient checkpointing": True}
        cases = {name: (folder, batch, is_checkpointed, device) for name, is_checkpointed in steps.items()}
        sizes = peaks(processes, training_peak, cases)
    title = f"Training step, {batch} clips in bfloat16 autocast: beyond weights, gradients and input"
    section.tables.append(memory_table(title, sizes))
    share = statistics.median(sizes["gradient checkpointing"]) / statistics.median(sizes["plain"])
    section.judge(f"training step, batch {batch}: checkpointed memory / plain", share, at_most=0.35)

    if device == "cpu":
        with progress("memory of loading"):
            cases = {"loading": (folder, False), "loading, and reading every weight": (folder, True)}
            sizes = peaks(processes, loading_peak, cases)
        weights = (folder / "model.safetensors").stat().st_size
        section.tables.append(memory_table("Loading", {"weights": [weights], **sizes}))
        peak = max(map(statistics.median, sizes.values()))
        section.judge("peak memory of loading and reading the weights / their size", peak / weights, at_most=1.1)

    with progress("memory of heads"):
        cases = {name: (case, head_batch, folder, device) for name, case in head_memory.CASES.items()}
        sizes = peaks(processes, head_memory.peak_bytes, cases)
    section.tables.append(memory_table(f"Frozen encoder with a cgp head, {head_batch} clips", sizes))
    if processes > 1:
        section.notes.append(f"Memory was measured {processes} times, of which ratios take the median.")
    return section
