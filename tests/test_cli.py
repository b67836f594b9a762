"""The program `bat-audio` as a whole: its help, whose examples are right, and its completion in the shell."""

import shlex

import pytest
import typer.main
from typer.testing import CliRunner

from bat_audio.tools.cli import app

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
