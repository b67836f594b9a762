"""Every snippet and command of the README runs and prints what it says."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, run, run_python, tiny_config
from hub_server import HubServer
from safetensors.torch import load_file

from bat_audio import BatConfig, BatModel

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
TASKS = README[README.index("## From encoder to finished task") : README.index("## Looking at it")]
LOOKING = README[README.index("## Looking at it") : README.index("## Pre-training")]
PRETRAINING = README[README.index("## Pre-training") : README.index("## Shapes")]
SNIPPETS = re.findall(r"```python\n(.*?)```", README.replace(TASKS, ""), re.DOTALL)
SIZES = re.compile(r"torch\.Size\(\[[\d, ]+\]\)")
# What each line prints, if a comment says so.
PRINTS = re.compile(r"^print\(.*\)  # (\d+|\[.*\]|torch\.Size\(.*\))$", re.MULTILINE)


@contextmanager
def cloned(tmp_path_factory, files: Path):
    """The repository's files, with weights and examples, a Hub that has the weights, and data to train on."""
    folder = tmp_path_factory.mktemp("clone") / "bat"
    shutil.copytree(files, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / "sounds" / label).mkdir(parents=True)
        for number in range(6):
            soundfile.write(folder / "sounds" / label / f"{number}.wav", 0.1 * rng.standard_normal(16000), 16000)
    events = [f"sounds/{label}/{i}.wav,{label},0.1,0.6" for label in ("cat", "dog") for i in range(6)]
    (folder / "events.csv").write_text("\n".join(["path,labels,onset,offset", *events]))
    with HubServer({name: (files / name).read_bytes() for name in ("config.json", "model.safetensors")}) as hub:
        hub.user = "me"
        environment = {**hub.env(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": None, "HF_TOKEN": hub.token}
        yield folder, environment
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, plain_folder):
    with cloned(tmp_path_factory, plain_folder) as folder_and_environment:
        yield folder_and_environment


@pytest.fixture(scope="module")
def shallow_clone(tmp_path_factory, plain_folder):
    """For training: with an encoder of the published width, but two blocks."""
    files = tmp_path_factory.mktemp("shallow") / "bat"
    shutil.copytree(plain_folder, files, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    torch.manual_seed(0)
    model = BatModel(BatConfig(num_hidden_layers=2))
    model.config.auto_map = BatConfig.from_pretrained(plain_folder).auto_map
    model.save_pretrained(files)
    with cloned(tmp_path_factory, files) as (folder, environment):
        original = {f"student.encoder.{name}": t for name, t in model.state_dict().items()}
        torch.save(original, folder / "BAT_base.pt")
        yield folder, environment


def test_readme_has_the_snippets():
    assert len(SNIPPETS) == 6


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_prints_what_it_says(number, clone, installed_folder):
    folder, environment = clone
    code = SNIPPETS[number]
    expected = [size for line in code.splitlines() if "#" in line for size in SIZES.findall(line.partition("#")[2])]
    printed = run_python(code, cwd=folder, PYTHONPATH=installed_folder, **environment).stdout
    assert expected
    assert SIZES.findall(printed) == expected


def test_tasks_one_after_the_other(shallow_clone, installed_folder):
    """Every command and snippet of the section, with two steps of training instead of hundreds."""
    folder, environment = shallow_clone
    environment = {**environment, "PYTHONPATH": str(installed_folder)}
    program, module = [sys.executable, "-m", "bat_audio_tools.cli"], [sys.executable, "-m"]
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", TASKS, re.DOTALL):
        if language == "python":
            code = code.replace("steps=200", 'steps=2, batch_size=4, num_frames=112, report_to="none"')
            printed = run_python(code, cwd=folder, **environment).stdout.splitlines()
            expected = PRINTS.findall(code)
            assert expected
            assert [line for line in printed if line in expected] == expected, printed
            continue
        command = code.split()
        if "finetune" in command:
            short = {"--steps": "2", "--batch-size": "4", "--num-frames": "112"}
            command = [word for i, word in enumerate(command) if not {word, command[i - 1]} & short.keys()]
            command += [word for option in short.items() for word in option]
        is_launched = command[:2] == ["accelerate", "launch"]
        launch = [*module, "accelerate.commands.launch", "--num_processes", "1"]
        run([*launch, *command[2:]] if is_launched else [*program, *command[1:]], cwd=folder, **environment)
    for trained in ("my-probe", "my-model", "my-model-2", "my-linear", "my-events"):
        assert json.loads((folder / trained / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog"}
    converted = load_file(folder / "bat-base" / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)
    check = "import sys; from huggingface_hub import hf_hub_download; print(hf_hub_download(*sys.argv[1:]))"
    published = run_python(check, "me/my-model", "model.safetensors", **environment).stdout.strip()
    assert Path(published).read_bytes() == (folder / "my-model" / "model.safetensors").read_bytes()


def test_looking_at_it(clone, installed_folder):
    folder, environment = clone
    environment = {**environment, "PYTHONPATH": str(installed_folder)}
    run([sys.executable, "-m", "bat_audio_tools.cli", "embed", "sounds/", "-o", "my-table"], cwd=folder, **environment)
    for code in re.findall(r"```bash\n(.*?)```", LOOKING, re.DOTALL):
        command = [sys.executable, "-m", "bat_audio_tools.cli", *code.split()[1:]]
        printed = run(command, cwd=folder, **environment).stdout
    assert (folder / "guitar.png").exists()
    assert (folder / "tabla.png").exists()
    assert len(printed.splitlines()) == 1 + 5  # of the search, the last of the commands


def test_pretraining(shallow_clone, installed_folder):
    """Every command of the section, with two steps."""
    folder, environment = shallow_clone
    environment = {**environment, "PYTHONPATH": str(installed_folder)}
    tiny_config().save_pretrained(folder / "small")
    short = {"--steps": "2", "--batch-size": "1", "--views": "2", "--num-workers": "0"}
    commands = re.findall(r"^(bat-audio|accelerate launch -m bat_audio_tools.cli) (.*)$", PRETRAINING, re.MULTILINE)
    assert len(commands) == 4
    for program, arguments in commands:
        words = arguments.replace("checkpoint-400000", "checkpoint-2").split()
        if words[0] == "pretrain":
            words = [word for i, word in enumerate(words) if not {word, words[i - 1]} & short.keys()]
            words += [word for option in short.items() for word in option]
        launch = ["accelerate.commands.launch", "--num_processes", "1", "-m"] if "accelerate" in program else []
        run([sys.executable, "-m", *launch, "bat_audio_tools.cli", *words], cwd=folder, **environment)
    teacher = load_file(folder / "my-teacher" / "model.safetensors")
    assert teacher.keys() == load_file(folder / "my-small-encoder" / "model.safetensors").keys()
    assert "pre-trained from [lrauch/BAT" in (folder / "my-encoder" / "README.md").read_text()


def test_load_model_transcript(clone):
    folder, environment = clone
    command = re.search(r"^\.venv/bin/python (load_model\.py .*)$", README, re.MULTILINE)[1].split()
    transcript = re.search(r"prints a line per file.*?```text\n(.*?)```", README, re.DOTALL)[1]
    printed = run([sys.executable, *command], cwd=folder, **environment).stdout
    for line, expected in zip(printed.splitlines(), transcript.splitlines(), strict=True):
        assert line.startswith(expected.removesuffix("...")), (line, expected)


def test_demo_transcript(tmp_path):
    transcript = re.search(r"and prints\n\n```text\n(.*?)```", README, re.DOTALL)[1]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": None}
    printed = run([sys.executable, "-m", "bat_tiny.demo"], **nowhere).stdout
    printed, transcript = (text[text.index("***") :].split() for text in (printed, transcript))
    for word, expected in zip(printed, transcript, strict=True):
        if re.fullmatch(r"-?\d\.\d\d", expected):
            assert float(word) == pytest.approx(float(expected), abs=0.021)
        else:
            assert word == expected


def test_hf_download_command(clone, tmp_path):
    folder, environment = clone
    command = re.search(r"^hf (download .*)$", README, re.MULTILINE)[1].split()
    run([str(Path(sys.executable).parent / "hf"), *command], cwd=tmp_path, **environment)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_memory_benchmark_runs():
    """With one clip; the README's figures are for 32."""
    printed = run([sys.executable, str(ROOT / "benchmarks" / "head_memory.py"), "--batch", "1", "--case", "streamed"])
    assert int(printed.stdout) >= 0


def test_make_targets_and_extras_of_the_readme_exist():
    for target in set(re.findall(r"(?:`|^)make (\w+)", README, re.MULTILINE)):
        result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r'pip install -e "\.\[([\w,]+)\]"', README):
        assert all(f"\n{extra} = [" in project for extra in extras.split(","))


def test_files_that_the_readme_names_exist():
    for file in set(re.findall(r"examples/[\w./-]*\w", README)):
        assert (ROOT / file).exists(), file
