"""Peak memory of the full-size encoder with a cgp head: fed block by block, and from the dict of all blocks' tokens.

    python benchmarks/head_memory.py [--batch 32]

Every case runs in a process of its own; printed is what it needed beyond the model and its input: allocated memory on a
GPU, else the growth of the process. The weights are random, which memory does not depend on.
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import torch

from bat_audio import BatConfig, BatForAudioClassification

sys.path.insert(0, str(Path(__file__).parent.parent))  # Run by its name, this file would not find `benchmarks`.
from benchmarks.harness import peak_growth

CASES = {
    "inference, block by block": "streamed",
    "inference, on the dict": "dict",
    "probe step, block by block": "probe",
    "probe step, with gradient checkpointing": "probe checkpointed",
    "probe step, on the dict": "probe dict",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--case", choices=CASES.values(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        return print(peak_bytes(options.case, options.batch))

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}, batch {options.batch} x 10.24 s")
    copy = options.batch * 513 * 768 * 4
    print(f"one block's tokens: {copy / 1e6:.0f} MB")
    for name, case in CASES.items():
        command = [sys.executable, __file__, "--batch", str(options.batch), "--case", case]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:40s} {peak / 1e6:7.0f} MB = {peak / copy:5.1f} copies of one block's tokens")


def peak_bytes(case: str, batch: int, folder: str | None = None, device: str | None = None) -> int:
    """Bytes of one of the cases beyond the model and its input; `folder` has the config of another size."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = BatConfig() if folder is None else BatConfig.from_pretrained(folder)
    config.head_type, config.num_labels = "cgp", 50
    model = BatForAudioClassification(config).to(device).train("probe" in case)
    model.freeze_base_model()
    if case == "probe checkpointed":
        model.gradient_checkpointing_enable()
    features = torch.rand(batch, 1, 1024, 128, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)

    def step(size: int):
        with torch.set_grad_enabled(model.training):
            if "dict" in case:
                with torch.no_grad():
                    layers = model.bat.extract_features(features[:size])
                loss = torch.nn.functional.cross_entropy(model.head(layers), labels[:size])
            else:
                loss = model(features[:size], labels=labels[:size]).loss
        if model.training:
            loss.backward()

    step(1)  # This allocates what does not depend on the batch, such as the gradients.
    return peak_growth(lambda: step(batch), device)


if __name__ == "__main__":
    main()
