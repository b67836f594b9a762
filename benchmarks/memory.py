"""Peak memory of inference, training and loading, each case in a process of its own."""

import tempfile
from pathlib import Path

import torch

from bat_audio import BatConfig, BatModel, load_pretrained_encoder
from benchmarks import head_memory
from benchmarks.encoder import encoders, random_features
from benchmarks.harness import Section, Settings, Table, in_fresh_process, peak_growth, progress


def inference_peak(folder: str, way: str, batch: int, frames: int | None, device: str) -> int:
    """Bytes beyond the model and its input (B, 1, T, M)."""
    call = encoders(Path(folder), device)[way]()
    config = BatConfig.from_pretrained(folder)
    features = random_features(config, batch, frames, device=device)
    with torch.inference_mode():
        call(features[:1, :, : config.input_shape[0]])  # allocates what does not depend on the input
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

    step(features[:1])  # allocates the gradients
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


def memory_table(title: str, sizes: dict[str, int]) -> Table:
    base = next(iter(sizes))
    rows = [{"case": case, f"memory / {base}": size / sizes[base], "MB": size / 1e6} for case, size in sizes.items()]
    return Table(title, rows, "MB")


def run(settings: Settings) -> Section:
    section = Section(f"Memory ({settings.device})")
    batch, head_batch = (2, 2) if settings.quick else (8, 32)
    folder, device = settings.folder, settings.device

    with progress("memory of inference"):
        ways = ("published way", "eager sdpa")
        sizes = {way: in_fresh_process(inference_peak, folder, way, batch, None, device) for way in ways}
    section.tables.append(memory_table(f"Inference, {batch} clips: beyond model and input", sizes))
    share = sizes["eager sdpa"] / sizes["published way"]
    section.judge(f"extra peak memory / the published way's, batch {batch}", share, at_most=0.25)

    with progress("memory of training"):
        steps = {"plain": False, "gradient checkpointing": True}
        sizes = {name: in_fresh_process(training_peak, folder, batch, step, device) for name, step in steps.items()}
    title = f"Training step, {batch} clips in bfloat16 autocast: beyond weights, gradients and input"
    section.tables.append(memory_table(title, sizes))
    share = sizes["gradient checkpointing"] / sizes["plain"]
    section.judge(f"training step, batch {batch}: checkpointed memory / plain", share, at_most=0.35)

    if device == "cpu":
        with progress("memory of loading"):
            cases = {"loading": False, "loading, and reading every weight": True}
            sizes = {name: in_fresh_process(loading_peak, folder, reads) for name, reads in cases.items()}
        weights = (folder / "model.safetensors").stat().st_size
        section.tables.append(memory_table("Loading", {"weights": weights, **sizes}))
        peak = max(sizes.values())
        section.judge("peak memory of loading and reading the weights / their size", peak / weights, at_most=1.1)

    with progress("memory of heads"):
        sizes = {
            name: in_fresh_process(head_memory.peak_bytes, case, head_batch, folder, device)
            for name, case in head_memory.CASES.items()
        }
    section.tables.append(memory_table(f"Frozen encoder with a cgp head, {head_batch} clips", sizes))
    return section
