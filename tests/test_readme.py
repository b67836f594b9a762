"""Every command and snippet of README.md and of the pages in docs/ runs and prints what it says."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, SNAPSHOT_FILES, THREADS, run, tiny_config
from hub_server import HubServer
from programs import Forks
from safetensors.torch import load_file

from bat_audio import BatConfig, BatForAudioClassification, BatModel

pytestmark = pytest.mark.slow

PAGES = {page.stem: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
ALL_PAGES = "\n".join(PAGES.values())
BLOCKS = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
# What a line prints, if a comment says so; what follows two spaces explains it.
PRINTS = re.compile(r"^print\(.*\)  # (.*?)(?:  .*)?$", re.MULTILINE)
# Two steps of training instead of hundreds.
SHORT = {
    "finetune": {"--steps": "2", "--batch-size": "4", "--num-frames": "112"},
    "pretrain": {"--steps": "2", "--batch-size": "1", "--views": "2", "--num-workers": "0"},
}
SHORT_IN_PYTHON = {"steps=200": 'steps=2, batch_size=4, num_frames=112, report_to="none"'}
# What the programs import beside BAT; in a process with a clone's own variables, which these read.
LIBRARIES = (
    *("accelerate", "datasets", "matplotlib.pyplot", "pandas", "sklearn.metrics", "torch", "transformers.pipelines"),
    "transformers.trainer",
)


class Clone:
    """A copy of the repository in `folder`, with an encoder of this config and data to train on, and a Hub."""

    def __init__(self, parent: Path, site: Path, config: BatConfig):
        self.folder, self.weights = parent / "bat", parent / "model.safetensors"
        self.folder.mkdir()
        for file in SNAPSHOT_FILES:
            shutil.copy(file, self.folder)
        shutil.copytree(ROOT / "examples", self.folder / "examples")
        torch.manual_seed(0)
        model = BatModel(config)
        model.save_pretrained(self.folder)
        shutil.copy(self.folder / "model.safetensors", self.weights)
        torch.save({f"student.encoder.{name}": tensor for name, tensor in model.state_dict().items()}, self.authors)
        tiny_config().save_pretrained(self.folder / "small")
        rng = np.random.default_rng(0)
        for label in ("cat", "dog"):
            (self.folder / "sounds" / label).mkdir(parents=True)
            for i in range(6):
                soundfile.write(self.folder / f"sounds/{label}/{i}.wav", 0.1 * rng.standard_normal(16000), 16000)
        events = [f"sounds/{label}/{i}.wav,{label},0.1,0.6" for label in ("cat", "dog") for i in range(6)]
        (self.folder / "events.csv").write_text("\n".join(["path,labels,onset,offset", *events]))
        self.hub = HubServer({name: (self.folder / name).read_bytes() for name in ("config.json", "model.safetensors")})
        self.hub.user = "me"
        changes = {"HF_TOKEN": self.hub.token, "PYTHONPATH": str(site), "OMP_NUM_THREADS": str(THREADS)}
        self.environment = {**self.hub.env(parent / "home"), **changes}

    @property
    def authors(self) -> Path:
        return self.folder / "BAT_base.pt"

    @functools.cached_property
    def forks(self) -> Forks:
        return Forks(LIBRARIES, self.environment)

    def __enter__(self) -> "Clone":
        self.hub.__enter__()
        return self

    def __exit__(self, *exception):
        if "forks" in vars(self):
            self.forks.end()
        self.hub.__exit__(*exception)
        shutil.rmtree(self.folder)

    def run_page(self, name: str) -> dict[str, str]:
        """Run all commands and snippets of a page, one after the other; returns what each command has printed."""
        printed = {}
        for language, code in BLOCKS.findall(PAGES[name]):
            if language == "python":
                self.run_snippet(code)
            else:
                printed |= {line: self.run_command(shlex.split(line, comments=True)) for line in code.splitlines()}
        return printed

    def run_snippet(self, code: str):
        expected = PRINTS.findall(code)
        assert expected, code
        for usual, short in SHORT_IN_PYTHON.items():
            code = code.replace(usual, short)
        lines = self.run_program("code", code).splitlines()
        assert [line for line in lines if line in expected] == expected, (code, lines)

    def run_command(self, words: list[str]) -> str:
        match words:
            case ["bat-audio", *arguments]:
                return self.run_program("module", "bat_audio_tools.cli", *shortened(arguments))
            case ["accelerate", "launch", "-m", module, *arguments]:
                launch = "accelerate.commands.launch", "--num_processes", "1", "-m", module
                return self.run_program("module", *launch, *shortened(arguments))
            case ["python" | ".venv/bin/python", script, *arguments]:
                return self.run_program("script", script, *arguments)
            case ["hf", *arguments]:
                (self.folder / "model.safetensors").unlink()
                printed = self.run_program("module", "huggingface_hub.cli.hf", *arguments)
                assert (self.folder / "model.safetensors").read_bytes() == self.weights.read_bytes()
                return printed
            case ["make" | "pip", *_]:
                return ""  # The tests of targets and extras look at these.
        raise AssertionError(f"No test runs {shlex.join(words)}")

    def run_program(self, kind: str, *words: str) -> str:
        done = self.forks.run(kind, *words, cwd=self.folder, environment=self.environment)
        assert done.returncode == 0, (words, done)
        return done.stdout


def shortened(arguments: list[str]) -> list[str]:
    """The arguments of `bat-audio`, with few steps and short clips for a training."""
    short = SHORT.get(arguments[0], {})
    kept = [word for i, word in enumerate(arguments) if not {word, arguments[i - 1]} & short.keys()]
    return [*kept, *(word for option in short.items() for word in option)]


@pytest.fixture
def clone(request, tmp_path, installed_folder) -> Iterator[Clone]:
    """With a tiny encoder, or one of the config that the test wants."""
    with Clone(tmp_path, installed_folder, getattr(request, "param", tiny_config())) as clone:
        yield clone


def test_every_page_has_a_test():
    assert PAGES.keys() == {"README", "use", "embed", "train", "pretrain", "speed", "formats"}


def test_readme_is_short():
    assert len(PAGES["README"].splitlines()) <= 280


@pytest.mark.parametrize("clone", [BatConfig(num_hidden_layers=2)], indirect=True)
def test_readme(clone):
    printed = clone.run_page("README")
    searches = [text for command, text in printed.items() if "bat-audio similar" in command]
    assert len(searches) == 2
    for search in searches:
        assert len(search.splitlines()) == 1 + 5
    for trained in ("my-probe", "my-tiny-probe", "my-model", "my-tiny-model"):
        assert json.loads((clone.folder / trained / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog"}
    assert (clone.folder / "guitar.png").exists()
    transcript = re.search(r"prints the following lines.*?```text\n(.*?)```", PAGES["README"], re.DOTALL)[1]
    lines = next(text for command, text in printed.items() if "load_model.py" in command).splitlines()
    for line, expected in zip(lines, transcript.splitlines(), strict=True):
        assert line.startswith(expected.removesuffix("...")), (line, expected)


@pytest.mark.parametrize("clone", [BatConfig()], indirect=True)
def test_use(clone):
    clone.run_page("use")


@pytest.mark.parametrize("clone", [BatConfig(num_hidden_layers=6)], indirect=True)
def test_embed(clone):
    printed = clone.run_page("embed")
    search = next(text for command, text in printed.items() if "bat-audio similar" in command)
    assert len(search.splitlines()) == 1 + 5
    assert (clone.folder / "guitar.png").exists()
    assert (clone.folder / "tabla.png").exists()


def test_train(clone):
    clone.run_page("train")
    for trained in ("my-probe", "my-model", "my-model-2", "my-linear", "my-events"):
        assert json.loads((clone.folder / trained / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog"}
    check = "import sys; from huggingface_hub import hf_hub_download; print(hf_hub_download(*sys.argv[1:]))"
    published = clone.run_program("code", check, "me/my-model", "model.safetensors").strip()
    assert Path(published).read_bytes() == (clone.folder / "my-model" / "model.safetensors").read_bytes()


def test_pretrain(clone, monkeypatch):
    monkeypatch.setitem(PAGES, "pretrain", PAGES["pretrain"].replace("checkpoint-400000", "checkpoint-2"))
    clone.run_page("pretrain")
    teacher = load_file(clone.folder / "my-teacher" / "model.safetensors")
    assert teacher.keys() == load_file(clone.folder / "my-small-encoder" / "model.safetensors").keys()
    assert "pre-trained from [lrauch/BAT" in (clone.folder / "my-encoder" / "README.md").read_text()


def test_speed(clone):
    clone.run_page("speed")


@pytest.mark.parametrize("clone", [BatConfig(num_hidden_layers=2)], indirect=True)
def test_formats(clone):
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    BatForAudioClassification(BatConfig(num_hidden_layers=2, **labels)).save_pretrained(clone.folder / "my-model")
    clone.run_page("formats")
    converted, original = load_file(clone.folder / "bat-base" / "model.safetensors"), load_file(clone.weights)
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)


def test_demo_transcript(tmp_path):
    transcript = re.search(r"and prints\n\n```text\n(.*?)```", PAGES["README"], re.DOTALL)[1]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": None}
    printed = run([sys.executable, "-m", "bat_tiny.demo"], **nowhere).stdout
    printed, transcript = (text[text.index("***") :].split() for text in (printed, transcript))
    for word, expected in zip(printed, transcript, strict=True):
        if re.fullmatch(r"-?\d\.\d\d", expected):
            assert float(word) == pytest.approx(float(expected), abs=0.021)
        else:
            assert word == expected


def test_memory_benchmark_runs():
    """With one clip; the figures of docs/train.md are for 32."""
    printed = run([sys.executable, str(ROOT / "benchmarks" / "head_memory.py"), "--batch", "1", "--case", "streamed"])
    assert int(printed.stdout) >= 0


def test_make_targets_and_extras_exist():
    for target in set(re.findall(r"(?:`|^)make (\w+)", ALL_PAGES, re.MULTILINE)):
        result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r'"(?:\.|bat-audio)?\[([\w,]+)\]"', ALL_PAGES):
        assert all(f"\n{extra} = [" in project for extra in extras.split(",")), extras


def test_files_that_the_pages_name_exist():
    for file in set(re.findall(r"(?:examples|benchmarks|docs)/[\w./-]*\w", ALL_PAGES)):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")], ids=str)
def test_links_lead_somewhere(page):
    """To a file that exists, and to a heading that it has."""
    for target in re.findall(r"\]\(([^):]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target
