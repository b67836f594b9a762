"""What the sections share: timing in interleaved rounds, peak memory, fresh processes, and the report."""

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "timm", "onnxruntime", "torchao", "torchaudio", "safetensors")
CPU_FLAGS = r"avx2|avx512f|avx512_bf16|avx512_vnni|avx_vnni|amx_\w+|asimd\w*|i8mm|bf16|sve2?"
SECONDS_PER_MEASUREMENT = {"cpu": 0.2, "cuda": 0.05}  # Short calls are repeated until they last this long together.
MOST_CALLS = 50  # A measurement repeats a call at most so often.
WARM_UP_CALLS = 3  # Each case is called so often before it is timed. CUDA graphs record the second call.
PAUSE = 0.05  # Seconds before a measurement, in which the threads of the case before go to sleep.
BLUE, GREY = "#0072B2", "#666666"  # The colour-blind can tell these two apart.


@dataclass
class Settings:
    """What a run is asked for.

    Args:
        folder: the checkpoint, config.json and model.safetensors.
        scratch: a folder for files that the sections make.
        rounds: how often each case is timed.
        batch: clips of a forward pass.
        quick: short inputs, small batches and few processes, to see that everything runs.
        device: where it runs, for the sections that can run on either.
    """

    folder: Path
    scratch: Path
    rounds: int = 6
    batch: int = 4
    quick: bool = False
    device: str = "cpu"


# Timing


@dataclass
class Case:
    """What is timed: `call` with an input of `make_input`, of which each call gets a fresh one, made before.

    Args:
        clips: how many clips a call takes; times are per clip.
    """

    call: Callable[[Any], Any]
    make_input: Callable[[], Any]
    clips: int = 1


def interleave(
    cases: dict[str, Callable[[], Case]], rounds: int, device: str = "cpu"
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every case once per round, in a new random order each round, under inference mode.

    Args:
        cases: what makes each case; it is then called a few times to warm up, which compiles what there is to compile.

    Returns:
        Seconds per clip of each case in each round; and, of the cases that failed on the way, why. The others go on.
    """
    ready, left_out, order = {}, {}, random.Random(0)
    for name, make_case in cases.items():
        try:
            ready[name] = _prepare(make_case, device)
        except Exception as error:  # A library may be missing, or refuse this machine.
            left_out[name] = reason(error)
        if name in left_out:  # Not inside `except`, where the error still holds what the call held.
            _free_memory(device)
    seconds = {name: [] for name in ready}
    for _ in range(rounds):
        for name in order.sample(list(ready), len(ready)):
            try:
                seconds[name].append(_measure(*ready[name], device))
            except Exception as error:  # For example, the memory may run out.
                left_out[name] = reason(error)
            if name in left_out:
                del ready[name], seconds[name]
                _free_memory(device)
    return seconds, left_out


def _prepare(make_case: Callable[[], Case], device: str) -> tuple[Case, int]:
    """A case that is warm, and the calls of a measurement."""
    case = make_case()
    with torch.inference_mode():
        for _ in range(WARM_UP_CALLS):
            case.call(case.make_input())
        once = time_calls(case.call, [case.make_input()], device)
    calls = math.ceil(SECONDS_PER_MEASUREMENT[torch.device(device).type] / max(once, 1e-6))
    return case, min(calls, MOST_CALLS)


@torch.inference_mode()
def _measure(case: Case, calls: int, device: str) -> float:
    inputs = [case.make_input() for _ in range(calls)]
    time.sleep(PAUSE)
    return time_calls(case.call, inputs, device) / case.clips


def _free_memory(device: str):
    """Give back what a case that failed has left, which the others need."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """An error in one line, for a note."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def time_calls(call: Callable[[Any], Any], inputs: list, device: str = "cpu") -> float:
    """Seconds per call, over one call for each input; on a GPU by its own clock."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for item in inputs:
            call(item)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / len(inputs)
    begin = time.perf_counter()
    for item in inputs:
        call(item)
    return (time.perf_counter() - begin) / len(inputs)


@dataclass
class Spread:
    """Median, smallest and largest of a figure over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{show(self.median)} ({show(self.min)} to {show(self.max)})"


def ratio(seconds: list[float], base: list[float]) -> Spread:
    """Of two cases, round by round: what slows a whole round down cancels out."""
    return Spread.of([a / b for a, b in zip(seconds, base, strict=True)])


def median_ratio(seconds: dict[str, list[float]], name: str, base: str) -> float | None:
    """The median of `ratio`; None where one of the two cases was left out."""
    return ratio(seconds[name], seconds[base]).median if {name, base} <= seconds.keys() else None


def timing_rows(seconds: dict[str, list[float]], base: str) -> list[dict]:
    """Rows of a table: each case's time over the base's, and its speed."""
    rows = []
    for name, values in seconds.items():
        per_clip = Spread.of(values)
        rows.append(
            {
                "case": name,
                f"time / {base}": ratio(values, seconds[base]),
                "ms per clip": Spread(*(1000 * value for value in asdict(per_clip).values())),
                "clips per second": 1 / per_clip.median,
            }
        )
    return rows


# Memory, and processes of their own


def peak_growth(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that a call holds at its peak beyond what is held before it, its result included.

    Allocated memory on a GPU, else resident memory of this process, in which nothing else should have gone on before:
    memory that is free but not yet returned to the system would be missing from the figure.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # From here on, Linux measures the peak anew.
    except OSError:  # This is not Linux, or it is not allowed. The peak so far stands for what is held now.
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    with contextlib.suppress(AttributeError):  # Only glibc keeps freed memory, and can return it.
        ctypes.CDLL(None).malloc_trim(0)
    before = _status_bytes("VmRSS")
    reset.write_text("5")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def run_code(code: str, *arguments, **environment) -> Any:
    """What code prints as JSON in its last line, in a fresh interpreter without a network.

    Raises:
        RuntimeError: it failed; the message ends with the error.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        raise RuntimeError(f"in a process of its own: {reason[0]}")
    return json.loads(result.stdout.splitlines()[-1])


def in_fresh_process(function: Callable, *arguments, **environment) -> Any:
    """A function of a module of this package, called in a fresh interpreter; arguments and result as JSON has them."""
    code = (
        "import importlib, json, sys; module, name, arguments = json.loads(sys.argv[1]); "
        "print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))"
    )
    call = json.dumps([function.__module__, function.__name__, arguments], default=str)
    return run_code(code, call, **environment)


# Report


@dataclass
class Table:
    """Rows with the same columns, the first of which names them.

    Args:
        rows: text, numbers or a `Spread` for each column.
        chart: the column to draw; None for no chart.
        line: where the chart has a line to compare with.
    """

    title: str
    rows: list[dict[str, Any]]
    chart: str | None = None
    line: float | None = None


@dataclass
class Section:
    """Results of one part of the benchmark."""

    name: str
    tables: list[Table] = field(default_factory=list)
    verdicts: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def judge(self, what: str, value: float | None, at_most: float | None = None, at_least: float | None = None):
        """Compare a figure with what it should reach; None where it could not be measured, which is said too."""
        target = f">= {at_least}" if at_most is None else f"<= {at_most}"
        if value is None:
            measured, reached = "not measured", "unknown"
        else:
            is_reached = value >= at_least if at_most is None else value <= at_most
            measured, reached = value, "yes" if is_reached else "no"
        self.verdicts.append({"figure": what, "target": target, "measured": measured, "reached": reached})

    def leave_out(self, reasons: dict[str, str]):
        self.notes += [f"{name} left out: {reason}" for name, reason in reasons.items()]


def show(value: Any) -> str:
    """A cell of a table: numbers with four digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown_table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown(machine: dict[str, Any], sections: list[Section]) -> str:
    """The report as one Markdown text, what should be reached first."""
    parts = ["# Benchmarks", markdown_table([{"machine": key, "": value} for key, value in machine.items()])]
    verdicts = [verdict for section in sections for verdict in section.verdicts]
    if verdicts:
        parts += ["## What should be reached", markdown_table(verdicts)]
    for section in sections:
        parts.append(f"## {section.name}")
        for table in section.tables:
            parts += [f"### {table.title}", markdown_table(table.rows)]
        if section.notes:
            parts.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(parts) + "\n"


def write_report(out: Path, machine: dict[str, Any], sections: list[Section]):
    """results.md, results.json, and a PNG chart for each table that has one."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(markdown(machine, sections))
    data = {"machine": machine, "sections": [asdict(section) for section in sections]}
    (out / "results.json").write_text(json.dumps(data, indent=1))
    for section in sections:
        for table in section.tables:
            if table.chart is not None:
                name = re.sub(r"\W+", "-", f"{section.name} {table.title}".lower()).strip("-")
                draw_bars(out / f"{name}.png", table)


def draw_bars(path: Path, table: Table):
    """A horizontal bar for each row, from smallest to largest with a mark where the rounds differ."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(table.rows[0]))
    spreads = [v if isinstance(v, Spread) else Spread(v, v, v) for v in (row[table.chart] for row in table.rows)]
    medians = [spread.median for spread in spreads]
    errors = [[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]]
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(medians)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{row[first]}: {show(float(median))}" for row, median in zip(table.rows, medians, strict=True)]
    axes.barh(labels, medians, xerr=errors, color=BLUE, ecolor=GREY, capsize=3)
    if table.line is not None:
        axes.axvline(table.line, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(table.chart)
    axes.set_title(table.title)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, GPU and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    machine = {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "instructions": " ".join(re.findall(rf"\b(?:{CPU_FLAGS})\b", flags[1])) if flags else "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "GPU": "none",
        "system": platform.platform(),
        "Python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        machine["GPU"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            machine["GPU driver"] = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    return machine


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """Say on standard error what goes on, and how long it took."""
    print(f"{text} ...", end=" ", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    yield
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
