"""Every snippet and command of the README runs and prints what it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, run_python
from hub_server import HubServer

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SIZES = re.compile(r"torch\.Size\(\[[\d, ]+\]\)")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, plain_folder):
    """The repository's files with the weights and the examples, and a Hub that has the weights."""
    folder = tmp_path_factory.mktemp("clone") / "bat"
    shutil.copytree(plain_folder, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    files = {name: (plain_folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with HubServer(files) as hub:
        environment = {**hub.env(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": None}
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


def test_load_model_transcript(clone):
    folder, environment = clone
    command = re.search(r"^\.venv/bin/python (load_model\.py .*)$", README, re.MULTILINE)[1].split()
    transcript = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    printed = run([sys.executable, *command], cwd=folder, **environment).stdout
    for line, expected in zip(printed.splitlines(), transcript.splitlines(), strict=True):
        assert line.startswith(expected.removesuffix("...")), (line, expected)


def test_hf_download_command(clone, tmp_path):
    folder, environment = clone
    command = re.search(r"^hf (download .*)$", README, re.MULTILINE)[1].split()
    run([str(Path(sys.executable).parent / "hf"), *command], cwd=tmp_path, **environment)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_make_targets_and_extras_of_the_readme_exist():
    for target in set(re.findall(r"`?make (\w+)", README)):
        result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r'pip install -e "\.\[(\w+)\]"', README):
        assert f"\n{extra} = [" in project


def test_files_that_the_readme_names_exist():
    for file in set(re.findall(r"(?:examples/)[\w.]+", README)):
        assert (ROOT / file).exists(), file
