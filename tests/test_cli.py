"""The program `bat-audio` as a whole: help and completion, which come at once, errors of usage, and what it prints."""

import json
import os
import shlex
import shutil
import sys
from dataclasses import fields

import pytest
import typer.main
from conftest import ROOT, run, run_python
from typer.testing import CliRunner

from bat_audio.configuration_bat import HEAD_CHOICES
from bat_audio_tools.cli import app
from bat_audio_tools.settings import HEAD_POOLINGS, HEADS, FinetuneSettings
from bat_audio_tools.training import card

COMMANDS = typer.main.get_command(app).commands
BAT_TINY = str(ROOT / "examples" / "bat-tiny")
MP3 = str(ROOT / "examples" / "tabla_loop_44k.mp3")
# What takes seconds to import, and more memory than an answer is worth.
HEAVY = ("torch", "transformers", "pyarrow", "matplotlib", "bat_audio", "torchao", "datasets", "pandas", "sklearn")
# Calls that only print, or are refused for what can be told without these, with their exit status.
ANSWERED_AT_ONCE = [
    ([], 2),
    (["--help"], 0),
    (["--version"], 0),
    (["embed"], 2),
    (["embed", "sounds", "--no-such-option", "-o", "out"], 2),
    (["embed", "nowhere.wav", "-o", "out"], 2),
    (["embed", "sounds/nowhere.wav", "-o", "out"], 2),
    (["embed", MP3, "-o", "out", "--pool", "max"], 2),
    *((["embed", MP3, "-o", "out", "--segment", value], 2) for value in ("inf", "nan", "-1")),
    *((["embed", MP3, "-o", "out", "--hop", value], 2) for value in ("inf", "nan", "-1")),
    (["embed", "-o", "out"], 2),
    (["embed", MP3, "-o", "out", "--stored-inputs"], 2),
    (["embed", MP3, "-o", "out", "--checkpoint", "./nowhere"], 2),
    (["pretrain", "-o", "out"], 2),
    (["pretrain", "--data", "nowhere", "-o", "out"], 2),
    (["pretrain", "nowhere", "-o", "out"], 2),
    (["finetune", "nowhere", "-o", "out"], 2),
    (["finetune", MP3, "-o", BAT_TINY], 2),
    (["finetune", MP3, "-o", "out", "--preset", "paper"], 2),
    (["show", "nowhere.wav", "-o", "a.png"], 2),
    (["show", MP3, "-o", "a.gif"], 2),
    (["show", MP3, "-o", "a.png", "--heads", "one"], 2),
    (["similar", "nowhere.wav", "."], 2),
    (["similar", MP3, "nowhere"], 2),
    (["convert", "nowhere.pt", "-o", "out"], 2),
    (["export", BAT_TINY, "-o", "out.onnx", "--format", "tflite"], 2),
    (["export", "./nowhere", "-o", "out.onnx", "--format", "onnx"], 2),
    (["publish", "nowhere", "me/model"], 2),
    (["publish", ".", "me/model"], 2),
    (["publish", BAT_TINY, "model"], 2),
    (["publish", BAT_TINY, "me/a model"], 2),
    (["finetune", MP3, "-o", "out", "--untrained", "--config", "nowhere.json"], 2),
    (["finetune", MP3, "-o", "out", "--head", "mlp"], 2),
    (["finetune", MP3, "-o", "out", "--head-pooling", "max"], 2),
    (["pretrain", MP3, "-o", "out", "--config", "nowhere.json"], 2),
    (["embed", MP3, "-o", MP3], 2),
    (["show", MP3, "-o", "a.png", "--start", "-1"], 2),
    (["similar", MP3, ".", "--duration", "0"], 2),
    (["show", MP3, "-o", "a.png", "--untrained", "--checkpoint", BAT_TINY], 2),
    (["convert", MP3, "-o", "out", "--head-pooling", "max"], 2),
    (["export", BAT_TINY, "-o", "a.onnx", "--format", "onnx", "--from-waveform", "--num-frames", "65"], 2),
    *(([name, "--help"], 0) for name in COMMANDS),
]


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
        (["similar", MP3, BAT_TINY], "interrupted"),
        (
            ["finetune", BAT_TINY, "-o", "model"],
            "interrupted; the same command goes on from the last checkpoint, if there is one",
        ),
    ],
)
def test_ctrl_c_is_one_line(arguments, message, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"bat_audio_tools.{arguments[0]}.{arguments[0]}", interrupt)
    result = CliRunner().invoke(app, arguments)
    doing, *said = result.output.splitlines()
    assert doing.endswith("...")
    assert (result.exit_code, said) == (130, [message])


def test_heads_are_those_of_the_config():
    """The settings name them again, because importing the config takes seconds."""
    assert (HEAD_CHOICES["head_type"], HEAD_CHOICES["head_pooling"]) == (HEADS, HEAD_POOLINGS)
    assert tuple(card.HEADS) == HEADS  # each is described on the model card
    help_of_head = next(item.metadata["help"] for item in fields(FinetuneSettings) if item.name == "head")
    assert all(name in help_of_head for name in HEADS)


def test_checkpoint_that_is_not_there_is_wrong_usage(tmp_path):
    sound = str(ROOT / "examples" / "cash_register_48k.flac")
    options = ["--checkpoint", str(tmp_path / "nowhere")]
    result = CliRunner().invoke(app, ["show", sound, "-o", str(tmp_path / "a.png"), *options])
    assert result.exit_code == 2
    assert "No weights at" in result.output


@pytest.mark.slow
def test_help_and_refusals_import_nothing_that_takes_long(tmp_path):
    """In one fresh process: what one of the calls imports, the later ones would show too."""
    code = f"""
import contextlib, io, json, sys
from bat_audio_tools import main
for arguments, status in json.loads(sys.argv[1]):
    sys.argv = ["bat-audio", *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main()
        except SystemExit as end:
            found = end.code
    assert found == status, (arguments, found, printed.getvalue())
    assert "Traceback" not in printed.getvalue()
    heavy = [name for name in {HEAVY!r} if sys.modules.get(name)]
    assert not heavy, (arguments, heavy)
    print(" ".join(arguments), printed.getvalue().strip().splitlines()[-1])
"""
    printed = run_python(code, json.dumps(ANSWERED_AT_ONCE), cwd=tmp_path).stdout
    assert len(printed.splitlines()) == len(ANSWERED_AT_ONCE)
    assert "nowhere.wav: no such file or folder, and nothing that matches." in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_completion_imports_nothing_that_takes_long(tmp_path):
    code = f"""
import sys
from bat_audio_tools import main
try:
    main()
finally:
    print([name for name in {HEAVY!r} if sys.modules.get(name)], file=sys.stderr)
"""
    for words, number in (("bat-audio ", 1), ("bat-audio embed --po", 2)):
        environment = {"_BAT_AUDIO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        completed = run_python(code, cwd=tmp_path, **environment)
        assert completed.stderr.strip() == "[]"
        assert completed.stdout.split() == (["--pool"] if number == 2 else list(COMMANDS))


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.split()[0] == "bat-audio"
    assert result.output.split()[1][0].isdigit()


@pytest.mark.slow
def test_commands_say_at_once_what_they_do_and_print_nothing_else(tmp_path):
    """No warnings of other libraries on stderr, not even for MP3, and JSON at the end of stdout."""
    code = f"""
import sys
import typer
from bat_audio_tools import main
echo = typer.echo
def note(message, err=False, **options):
    if err and message.endswith("..."):
        message += f" with {{[name for name in {HEAVY!r} if sys.modules.get(name)]}}"
    echo(message, err=err, **options)
typer.echo = note
try:
    main()
finally:
    assert not sys.modules.get("torchao")
"""
    (tmp_path / "sounds").mkdir()
    shutil.copy(MP3, tmp_path / "sounds")
    embed = ["embed", "sounds", "-o", "table", "--checkpoint", BAT_TINY]
    for arguments, result in (
        (embed, {"table": "table", "files": 1}),
        (["show", MP3, "-o", "a.png", "--checkpoint", BAT_TINY], {"picture": "a.png"}),
        (["similar", MP3, "table", "--json"], {}),
    ):
        done = run_python(code, *arguments, cwd=tmp_path)
        first, *others = done.stderr.strip().splitlines()
        assert first.endswith("... with []")
        assert [line for line in others if line and "%|" not in line] == [], done.stderr  # but the bar
        if result:
            assert json.loads(done.stdout.splitlines()[-1]).items() >= result.items()
        else:
            assert [row["path"] for row in json.loads(done.stdout)] == ["sounds/tabla_loop_44k.mp3"] * 2


@pytest.mark.slow
def test_the_installed_program(tmp_path):
    program = os.path.join(os.path.dirname(sys.executable), "bat-audio")
    assert run([program, "--version"], cwd=tmp_path).stdout.startswith("bat-audio ")
