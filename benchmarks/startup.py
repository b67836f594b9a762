"""Time from an interpreter that has imported nothing to a model that is ready, beside the least it could take."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
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
    "bare, with PreTrainedModel": f"{BARE}; from transformers import PreTrainedModel",  # which any model class needs
    "load_model.py": "sys.path.insert(0, folder); from load_model import load_pretrained_encoder as l; model = l()",
    "bat_audio": "from bat_audio import load_pretrained_encoder as load; model = load(checkpoint=folder)",
    "AutoModel": (
        "from transformers import AutoModel; model = AutoModel.from_pretrained(folder, trust_remote_code=True)"
    ),
}


PACKAGES = 12  # whose imports take longest


def make_snapshot(checkpoint: Path, folder: Path):
    """The files of a Hub repository: this package's code with a checkpoint's config and weights."""
    folder.mkdir()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.json"), checkpoint / "config.json"]:
        shutil.copy(file, folder)
    os.symlink(checkpoint / "model.safetensors", folder / "model.safetensors")


def import_times(code: str, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds that the modules of each package take by themselves when the code is run."""
    command = [sys.executable, "-X", "importtime", "-c", f"import sys; folder = sys.argv[1]; {code}", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    seconds = Counter()
    for microseconds, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", result.stderr, re.MULTILINE):
        seconds[module.partition(".")[0]] += int(microseconds) / 1e6
    return seconds


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
    bare, ours = (import_times(WAYS[way], folder, environment) for way in ("bare", "bat_audio"))
    rows = [
        {"package": package, "seconds": seconds, "seconds of bare": bare.get(package, 0.0)}
        for package, seconds in ours.most_common(PACKAGES)
    ]
    section.tables.append(Table("What importing bat_audio takes, by package", rows))
    for way in ("load_model.py", "bat_audio", "AutoModel"):
        section.judge(f"ready to run by {way} / bare", ratio(seconds[way], seconds["bare"]).median, at_most=1.15)
        share = ratio(seconds[way], seconds["bare, with PreTrainedModel"]).median
        section.notes.append(f"{way} / bare, with PreTrainedModel, which every model class imports: {share:.3f}")
    return section
