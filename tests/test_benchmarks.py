"""The benchmarks run and write their reports, and their statistics are right; what they measure is never tested."""

import json
import sys
import time

import pytest
import torch
from conftest import ROOT, run, tiny_config, tiny_model
from programs import run_code

sys.path.append(str(ROOT))  # the benchmarks are no part of the installed package
import benchmarks.__main__
from benchmarks import front_end, harness, startup
from benchmarks.harness import Case, Section, Spread, Table

# Charts and tables that each section writes.
SECTIONS = {
    "encoder": (1, 6),
    "long_audio": (2, 3),
    "front_end": (1, 1),
    "memory": (4, 4),
    "startup": (1, 1),
    "embed": (1, 3),
    "profile": (0, 4),
}
MAY_BE_LEFT_OUT = ("int8 compiled", "torchaudio")  # on machines that lack instructions, or a torchaudio for this torch


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """Narrow, but with chunks of the published length."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(chunk_time_patches=64).save_pretrained(folder)
    return folder


@pytest.fixture
def brief(monkeypatch):
    """Measurements and clips are short, and a section's processes of its own are forked: the figures mean nothing."""

    def run_forked(code: str, *arguments, **environment):
        return json.loads(run_code(code, *arguments, cwd=ROOT, **environment).stdout.splitlines()[-1])

    for module in (harness, startup):
        monkeypatch.setattr(module, "run_code", run_forked)
    monkeypatch.setattr(harness, "SECONDS_PER_MEASUREMENT", {"cpu": 0.01})
    monkeypatch.setattr(front_end, "SECONDS", 1)
    monkeypatch.setattr(benchmarks.__main__, "disable_progress_bar", lambda: None)  # of the other tests too


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


def test_a_case_that_fails_in_the_rounds_is_dropped_and_the_others_go_on():
    calls = []

    def fail_later(_):
        calls.append("call")
        if len(calls) > harness.WARM_UP_CALLS + 1 + 1:  # warm, measured once, and through the first round
            raise torch.OutOfMemoryError("CUDA out of memory.")
        time.sleep(1)

    cases = {"fails": lambda: Case(fail_later, lambda: None), "works": lambda: Case(time.sleep, lambda: 0.1)}
    seconds, left_out = harness.interleave(cases, rounds=4)
    assert seconds.keys() == {"works"}
    assert len(seconds["works"]) == 4
    assert left_out == {"fails": "OutOfMemoryError: CUDA out of memory."}
    assert len(calls) == harness.WARM_UP_CALLS + 3
    assert harness.median_ratio(seconds, "works", "fails") is None


def test_calls_are_counted_by_a_call_after_those_that_record_and_compile():
    durations = iter([0.3, 0.3, 0.3])
    cases = {"compiles": lambda: Case(lambda _: time.sleep(next(durations, 0.02)), lambda: made.append(0))}
    made = []
    harness.interleave(cases, rounds=1)
    calls = len(made) - harness.WARM_UP_CALLS - 1
    assert 5 <= calls <= 10  # of 0.02 s


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


def test_counted_operations_of_ast_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.encoder import AST_TOKENS, audio_spectrogram_transformer, count_operations

    config = tiny_config(chunk_time_patches=64, use_gate=False)
    # The counter does not know the CPU's attention, but the products of which the plain one is made.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        audio_spectrogram_transformer(config)(torch.rand(1, 1, 1024, 128))
    assert count_operations(config, 1024, **AST_TOKENS) == counter.get_total_flops()


def test_fastest_floor_is_kept_and_none_is_needed():
    from benchmarks.encoder import keep_fastest_floor

    seconds = {"floor, a": [2.0, 2.0], "compiled": [3.0, 3.0], "floor, b": [1.0, 1.0]}
    kept, note = keep_fastest_floor(seconds)
    assert list(kept.items()) == [("floor", [1.0, 1.0]), ("compiled", [3.0, 3.0])]
    assert "floor, b" in note
    kept, note = keep_fastest_floor({"compiled": [3.0]})
    assert kept == {"compiled": [3.0]}
    assert "no floor" in note


def test_memory_is_shown_with_its_spread_where_measured_several_times():
    from benchmarks.memory import memory_table

    once, thrice = memory_table("Title", {"once": [2_000_000], "thrice": [1_000_000, 4_000_000, 3_000_000]}).rows
    assert once == {"case": "once", "memory / once": 1.0, "MB": 2.0}
    assert thrice == {"case": "thrice", "memory / once": 1.5, "MB": Spread(3.0, 1.0, 4.0)}


def test_a_checkpoint_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit):
        benchmarks.__main__.main(["--checkpoint", "/nowhere"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("--checkpoint /nowhere: there is no config.json")


def test_verdicts_and_report(tmp_path):
    section = Section(
        "Some name", [Table("A title", [{"case": "one", "MB": 1234.5}, {"case": "two", "MB": 0.12345}], "MB")]
    )
    section.judge("low", 1.05, at_most=1.05)
    section.judge("high", 1.9, at_least=2.0)
    section.judge("none", None, at_most=1.0)
    section.leave_out({"three": "no"})
    assert [verdict["reached"] for verdict in section.verdicts] == ["yes", "no", "unknown"]
    harness.write_report(tmp_path, harness.describe_machine(), [section])
    report = (tmp_path / "results.md").read_text()
    verdicts = "| low | <= 1.05 | 1.05 | yes |", "| none | <= 1.0 | not measured | unknown |"
    for line in (*verdicts, "| one | 1234 |", "| two | 0.1235 |", "- three left out: no"):
        assert f"\n{line}\n" in report
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert data["sections"][0]["tables"][0]["rows"][0] == {"case": "one", "MB": 1234.5}
    assert (tmp_path / "some-name-a-title.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("section", SECTIONS)
def test_section_runs(section, tiny_checkpoint, tmp_path):
    if section == "encoder":
        pytest.importorskip("timm")
        pytest.importorskip("torchao")
    charts, tables = SECTIONS[section]
    folders = ["--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path)]
    options = ["--quick", "--rounds", "1", *folders, "--only", section]
    if section == "profile":  # of all sections, one as users start it
        run([sys.executable, "-m", "benchmarks", *options], cwd=ROOT)
    else:
        benchmarks.__main__.main(options)
    (result,) = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert f"## {result['name']}" in (tmp_path / "results.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == charts
    assert len(result["tables"]) == tables
    assert bool(result["verdicts"]) == (section != "profile")
    is_left_out = any(note.startswith(MAY_BE_LEFT_OUT) for note in result["notes"])
    assert is_left_out or "unknown" not in [verdict["reached"] for verdict in result["verdicts"]]
    assert [note for note in result["notes"] if "left out" in note and not note.startswith(MAY_BE_LEFT_OUT)] == []


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_gpu_section_runs_on_a_cpu(tiny_checkpoint, tmp_path):
    """With two sizes and the same code as on a GPU, whose events and CUDA graphs stay untested."""
    pytest.importorskip("timm")
    from benchmarks import gpu

    settings = harness.Settings(folder=tiny_checkpoint, scratch=tmp_path, rounds=1)
    section = gpu.run(settings, dtypes=[torch.bfloat16], batches=[1, 64], size=64)
    cases = ["floor", *gpu.WAYS, "torch.export", "transformers AST", "int8 compiled", "reduce-overhead"]
    left_out = {note.split(" in ")[0] for note in section.notes if "left out" in note}
    assert left_out <= set(MAY_BE_LEFT_OUT)
    encoders, front_end, *_, ceilings = section.tables
    assert [row["case"] for row in encoders.rows] == [case for case in cases if case not in left_out]
    assert "ASTFeatureExtractor" in [row["case"] for row in front_end.rows]
    assert [row["run"] for row in ceilings.rows] == ["bfloat16, batch 1", "bfloat16, batch 64"]
    assert [table.title for table in section.tables if table.chart] == ["bfloat16, batch 1", "bfloat16, batch 64"]
    assert len(section.tables) == 5
    assert [verdict["reached"] for verdict in section.verdicts if verdict["reached"] == "unknown"] == []


@pytest.mark.slow
def test_profile_tells_what_takes_the_time(tiny_checkpoint, tmp_path):
    from benchmarks import operations

    settings = harness.Settings(folder=tiny_checkpoint, scratch=tmp_path)
    encoder, front_end = operations.run_cuda(settings, batch=1).tables
    for table, operation in ((encoder, "aten::addmm"), (front_end, "aten::_fft_r2c")):
        rows = {row["operation"]: row for row in table.rows}
        assert rows[operation]["calls"] >= 1
        assert rows[operation]["ms"] > 0
        assert 0.3 < sum(row["share"] for row in rows.values()) <= 1.0001


@pytest.mark.usefixtures("brief")
def test_gpu_section_keeps_the_other_rows_without_floor_and_ceiling(tiny_checkpoint, tmp_path, monkeypatch):
    from benchmarks import gpu

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu, "ceiling", fail)
    monkeypatch.setattr(gpu, "encoder_calls", lambda *_: {"floor, 64 at a time": fail, "compiled": lambda: torch.abs})
    settings = harness.Settings(folder=tiny_checkpoint, scratch=tmp_path, rounds=1)
    section = gpu.run(settings, dtypes=[torch.bfloat16], batches=[64])
    (row,) = section.tables[0].rows
    assert row["time / compiled"] == Spread(1.0, 1.0, 1.0)
    assert "ceiling in bfloat16, batch 64 left out: OutOfMemoryError: CUDA out of memory." in section.notes
    assert "bfloat16, batch 64: no floor could be measured, times are over those of the first case" in section.notes
    assert [verdict["measured"] for verdict in section.verdicts][:1] == ["not measured"]
    harness.write_report(tmp_path / "out", harness.describe_machine(), [section])
