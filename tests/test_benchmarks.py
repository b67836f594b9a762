"""The benchmarks run and write their reports, and their statistics are right; what they measure is never tested."""

import json
import sys
import time

import pytest
import torch
from conftest import ROOT, run, tiny_config, tiny_model

sys.path.append(str(ROOT))  # the benchmarks are no part of the installed package
from benchmarks import harness
from benchmarks.harness import Case, Section, Spread, Table

# Charts and tables that each section writes.
SECTIONS = {
    "encoder": (1, 4),
    "long_audio": (1, 2),
    "front_end": (1, 1),
    "memory": (4, 4),
    "startup": (1, 1),
    "embed": (1, 3),
}
MAY_BE_LEFT_OUT = ("int8 compiled", "torchaudio")  # on machines that lack instructions, or a torchaudio for this torch


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """Narrow, but with chunks of the published length."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(chunk_time_patches=64).save_pretrained(folder)
    return folder


def test_ratios_are_of_the_same_round():
    seconds = {"base": [1.0, 10.0, 100.0], "other": [2.0, 10.0, 300.0]}
    assert harness.ratio(seconds["other"], seconds["base"]) == Spread(median=2.0, min=1.0, max=3.0)
    base, other = harness.timing_rows(seconds, "base")
    assert base["time / base"] == Spread(1.0, 1.0, 1.0)
    assert other["time / base"] == Spread(2.0, 1.0, 3.0)
    assert other["ms per clip"] == Spread(10_000.0, 2000.0, 300_000.0)
    assert other["clips per second"] == 0.1


def test_interleaving_gives_each_call_a_fresh_input_and_leaves_out_what_fails():
    made, seen = [], []

    def make_input() -> int:
        made.append(len(made))
        return made[-1]

    def sleep(item: int):
        seen.append(item)
        time.sleep(0.1)

    def fail():
        raise ImportError("no such library\nat all")

    cases = {"slow": lambda: Case(sleep, make_input, clips=4), "missing": fail}
    seconds, left_out = harness.interleave(cases, rounds=3)
    assert seen == made
    assert seconds.keys() == {"slow"}
    assert len(seconds["slow"]) == 3
    assert min(seconds["slow"]) >= 0.1 / 4
    assert left_out == {"missing": "ImportError: no such library"}


def test_peak_growth_sees_what_is_freed_again():
    size = 1 << 28
    grown = harness.in_fresh_process(peak_of_a_passing_tensor, size, PYTHONPATH=str(ROOT / "tests"))
    assert 0.9 * size < grown < 1.2 * size


def peak_of_a_passing_tensor(size: int) -> int:
    return harness.peak_growth(lambda: torch.ones(size // 4).sum())


def test_counted_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.encoder import count_operations, published_way

    model = tiny_model(chunk_time_patches=64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        published_way(model)(torch.rand(1, 1, 1024, 128))
    assert count_operations(model.config, 1024) == counter.get_total_flops()


def test_floor_multiplies_the_whole_batch():
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.encoder import count_operations, floors

    config = tiny_config(chunk_time_patches=64)
    for make_floor in floors(config, 4, "cpu").values():
        with FlopCounterMode(display=False) as counter:
            make_floor()(None)
        assert counter.get_total_flops() == 4 * count_operations(config, 1024)


def test_verdicts_and_report(tmp_path):
    section = Section(
        "Some name", [Table("A title", [{"case": "one", "MB": 1234.5}, {"case": "two", "MB": 0.12345}], "MB")]
    )
    section.judge("low", 1.05, at_most=1.05)
    section.judge("high", 1.9, at_least=2.0)
    section.leave_out({"three": "no"})
    assert [verdict["reached"] for verdict in section.verdicts] == ["yes", "no"]
    harness.write_report(tmp_path, harness.describe_machine(), [section])
    report = (tmp_path / "results.md").read_text()
    for line in ("| low | <= 1.05 | 1.05 | yes |", "| one | 1234 |", "| two | 0.1235 |", "- three left out: no"):
        assert f"\n{line}\n" in report
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert data["sections"][0]["tables"][0]["rows"][0] == {"case": "one", "MB": 1234.5}
    assert (tmp_path / "some-name-a-title.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_section_runs(section, tiny_checkpoint, tmp_path):
    if section == "encoder":
        pytest.importorskip("timm")
        pytest.importorskip("torchao")
    charts, tables = SECTIONS[section]
    options = ["--quick", "--checkpoint", tiny_checkpoint, "--out", tmp_path, "--only", section]
    run([sys.executable, "-m", "benchmarks", *map(str, options)], cwd=ROOT)
    (result,) = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert f"## {result['name']}" in (tmp_path / "results.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == charts
    assert len(result["tables"]) == tables
    assert result["verdicts"]
    assert [note for note in result["notes"] if "left out" in note and not note.startswith(MAY_BE_LEFT_OUT)] == []


@pytest.mark.slow
def test_gpu_section_runs_on_a_cpu(tiny_checkpoint, tmp_path):
    """With two sizes and the same code as on a GPU, whose events and CUDA graphs stay untested."""
    pytest.importorskip("timm")
    from benchmarks import gpu

    settings = harness.Settings(folder=tiny_checkpoint, scratch=tmp_path, rounds=2)
    section = gpu.run(settings, dtypes=[torch.bfloat16], batches=[1, 64], size=64)
    cases = [row["case"] for row in section.tables[0].rows]
    assert cases == ["floor", "published way", "eager sdpa", "compiled", "timm ViT-B/16", "reduce-overhead"]
    assert len(section.tables) == 4
    assert len(section.verdicts) == 2
    assert len(section.notes) == 1  # nothing was left out
