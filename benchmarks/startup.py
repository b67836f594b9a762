"""Time from an interpreter that has imported nothing to a model that is ready, beside the least it could take."""

import os
import shutil
from pathlib import Path

from benchmarks.harness import ROOT, Section, Settings, Spread, Table, progress, ratio, run_code

TIMED = """
import time
begin = time.perf_counter()
import sys
folder = sys.argv[1]
{code}
print(time.perf_counter() - begin)
"""
BARE = (
    "import torch, transformers; from safetensors.torch import load_file; w = load_file(folder + '/model.safetensors')"
)
WAYS = {
    "bare": BARE,
    # Every model class of Transformers needs PreTrainedModel.
    "bare, with PreTrainedModel": f"{BARE}; from transformers import PreTrainedModel",
    "load_model.py": "sys.path.insert(0, folder); from load_model import load_pretrained_encoder as l; model = l()",
    "bat_audio": "from bat_audio import load_pretrained_encoder as load; model = load(checkpoint=folder)",
    "AutoModel": (
        "from transformers import AutoModel; model = AutoModel.from_pretrained(folder, trust_remote_code=True)"
    ),
}


def make_snapshot(checkpoint: Path, folder: Path):
    """The files of a Hub repository: this package's code with a checkpoint's config and weights."""
    folder.mkdir()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.json"), checkpoint / "config.json"]:
        shutil.copy(file, folder)
    os.symlink(checkpoint / "model.safetensors", folder / "model.safetensors")


def run(settings: Settings) -> Section:
    section = Section("Startup")
    folder = settings.scratch / "snapshot"
    make_snapshot(settings.folder.resolve(), folder)
    # The first round fills the caches of files and of remote code, and does not count.
    seconds = {way: [] for way in WAYS}
    environment = {"HF_MODULES_CACHE": str(settings.scratch / "modules")}
    with progress("startup"):
        for _ in range(1 + settings.rounds):
            for way, code in WAYS.items():
                seconds[way].append(run_code(TIMED.format(code=code), folder, **environment))
    seconds = {way: values[1:] for way, values in seconds.items()}
    rows = [
        {"case": way, "time / bare": ratio(values, seconds["bare"]), "seconds": Spread.of(values)}
        for way, values in seconds.items()
    ]
    section.tables.append(Table("Import and load in a fresh process", rows, "time / bare", 1))
    for way in ("load_model.py", "bat_audio", "AutoModel"):
        section.judge(f"ready to run by {way} / bare", ratio(seconds[way], seconds["bare"]).median, at_most=1.15)
        share = ratio(seconds[way], seconds["bare, with PreTrainedModel"]).median
        section.notes.append(f"{way} / bare, with PreTrainedModel, which every model class imports: {share:.3f}")
    return section
