"""The program `bat-audio` as a whole: its help, whose examples are right, and its completion in the shell."""

import shlex

import pytest
import typer.main
from conftest import ROOT
from typer.testing import CliRunner

from bat_audio_tools.cli import app

COMMANDS = typer.main.get_command(app).commands


def complete(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    line = " ".join(words)
    environment = {"_BAT_AUDIO_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return CliRunner().invoke(app, [], prog_name="bat-audio", env=environment).output.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_are_valid(name):
    printed = CliRunner().invoke(app, [name, "--help"], prog_name="bat-audio").output
    examples = [line.split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith("  bat-audio ")]
    assert examples
    for example in examples:
        command, *arguments = shlex.split(example)
        assert command == name
        COMMANDS[name].make_context(name, arguments)  # raises for what the command does not take
    assert all(option.help for option in COMMANDS[name].params)


def test_completion():
    assert complete("bat-audio", "si") == ["similar"]
    assert set(complete("bat-audio", "")) == set(COMMANDS)
    assert complete("bat-audio", "show", "--hea") == ["--heads"]
    script = CliRunner().invoke(app, [], prog_name="bat-audio", env={"_BAT_AUDIO_COMPLETE": "source_bash"}).output
    assert "complete -o default -F" in script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["similar", "a.wav", "table"], "interrupted"),
        (
            ["finetune", "sounds", "-o", "model"],
            "interrupted; the same command goes on from the last checkpoint, if there is one",
        ),
    ],
)
def test_ctrl_c_is_one_line(arguments, message, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"bat_audio_tools.{arguments[0]}.{arguments[0]}", interrupt)
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output.splitlines()) == (130, [message])


def test_checkpoint_that_is_not_there_is_wrong_usage(tmp_path):
    sound = str(ROOT / "examples" / "cash_register_48k.flac")
    options = ["--checkpoint", str(tmp_path / "nowhere")]
    result = CliRunner().invoke(app, ["show", sound, "-o", str(tmp_path / "a.png"), *options])
    assert result.exit_code == 2
    assert "No weights at" in result.output
