"""Run the benchmarks and write results.md, results.json and charts."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from bat_audio import BatConfig, BatModel
from benchmarks import embed, encoder, front_end, gpu, long_audio, memory, operations, startup
from benchmarks.harness import ROOT, Settings, describe_machine, markdown, write_report

# For each section, the function that runs it and the device that it runs on.
SECTIONS = {
    "encoder": (encoder.run, "cpu"),
    "long_audio": (long_audio.run, "cpu"),
    "front_end": (front_end.run, "cpu"),
    "memory": (memory.run, "cpu"),
    "startup": (startup.run, "cpu"),
    "embed": (embed.run, "cpu"),
    "profile": (operations.run_cpu, "cpu"),
    "cuda": (gpu.run, "cuda"),
    "cuda_profile": (operations.run_cuda, "cuda"),
    "cuda_long_audio": (long_audio.run, "cuda"),
    "cuda_memory": (memory.run, "cuda"),
    "cuda_embed": (embed.run, "cuda"),
}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    sections = [name for name, (_, device) in SECTIONS.items() if device == "cpu" or torch.cuda.is_available()]
    parser.add_argument(
        "--only", nargs="+", choices=sections, default=sections, metavar="SECTION", help=", ".join(sections)
    )
    parser.add_argument("--checkpoint", type=Path, help="model folder (default: the published size, random weights)")
    parser.add_argument("--rounds", type=int, help="how often everything is timed (default: 6)")
    parser.add_argument("--batch", type=int, help="clips of a forward pass on the CPU (default: 4)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="see that it runs: 2 rounds, 2 clips, short inputs")
    options = parser.parse_args(arguments)
    for file in ("config.json", "model.safetensors"):
        if options.checkpoint is not None and not (options.checkpoint / file).is_file():
            parser.error(f"--checkpoint {options.checkpoint}: there is no {file}")
    disable_progress_bar()  # The bar of loading weights would break up the lines that report what goes on.
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            folder=options.checkpoint or Path(scratch) / "random",
            scratch=Path(scratch),
            rounds=options.rounds or (2 if options.quick else 6),
            batch=options.batch or (2 if options.quick else 4),
            quick=options.quick,
        )
        if options.checkpoint is None:
            torch.manual_seed(0)
            BatModel(BatConfig()).save_pretrained(settings.folder)
        machine = {
            **describe_machine(),
            "weights": str(options.checkpoint or "random, of the published size"),
            "run": f"{settings.rounds} rounds{', quick: figures mean little' if options.quick else ''}",
        }
        done = []
        for name in options.only:
            run, device = SECTIONS[name]
            done.append(run(replace(settings, device=device)))
            write_report(options.out, machine, done)
    print(markdown(machine, done))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
