"""Processes of their own that start at once, because they are forked from one that has the libraries.

`Program` is `bat-audio`. The process that it is forked from has imported torch, Transformers and their like, which
takes several seconds each time, but nothing of BAT: what a test starts here reads its options, imports BAT and ends as
in a fresh interpreter. `run_code` runs any code, forked from a process that has only libraries that read no variables
of Hugging Face. Where the imports or the launcher are what is tested, `conftest.run` starts a fresh interpreter.
"""

import functools
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from conftest import environment_with

LIBRARIES = (
    *("accelerate", "datasets", "fsspec", "matplotlib.figure", "pandas", "peft", "pyarrow.parquet", "sklearn.metrics"),
    *("soundfile", "torch.utils.tensorboard", "tqdm", "transformers.pipelines", "transformers.trainer", "typer"),
)
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(list(LIBRARIES))  # those that are not installed are left out


class Program:
    """`bat-audio` with these words, offline, in a process that has begun; `environment` holds more variables."""

    def __init__(self, *words, **environment: str):
        self.folder = tempfile.TemporaryDirectory()
        arguments = (list(map(str, words)), environment, self.folder.name)
        self.process = FORKING.Process(target=_run, args=arguments)
        with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}):
            self.process.start()
        self.pid = self.process.pid

    def is_running(self) -> bool:
        return self.process.is_alive()

    def kill(self):
        self.process.kill()
        self.process.join()

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; returns the exit status and what was written to stdout and stderr."""
        self.process.join()
        out, errors = (Path(self.folder.name, name).read_text() for name in ("out", "errors"))
        return self.process.exitcode, out, errors


def run_program(*words, **environment: str) -> str:
    """What `bat-audio` with these words, which must succeed, writes to stdout."""
    status, printed, errors = Program(*words, **environment).end()
    assert status == 0, f"{printed}\n{errors}"
    return printed


def run_two_processes(*words) -> str:
    """What `bat-audio` writes to stdout in two processes that share the work, as launchers start them without GPUs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    programs = [Program(*words, RANK=rank, LOCAL_RANK=rank, **group) for rank in ("0", "1")]
    ends = [program.end() for program in programs]
    assert [status for status, *_ in ends] == [0, 0], ends
    return "".join(printed for _, printed, _ in ends)


def _run(words: list[str], environment: dict[str, str], folder: str):
    multiprocessing.set_start_method(None, force=True)  # as in any process, however this one was started
    os.environ.update(environment)
    for stream, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["bat-audio", *words]
    runpy.run_module("bat_audio_tools.cli", run_name="__main__", alter_sys=True)


# Of a line on standard input this runs "code" with the rest as its text, or the rest as a module or a script, with
# arguments, in a forked process with the folder and environment that the line names. It writes what that prints to one
# file and its errors to another, and answers with the exit status.
FORKS = """
import contextlib, gc, importlib, json, os, runpy, sys
for library in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(library)
gc.freeze()  # or each would look through all that it has of this process, and so copy it
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
printed, errors, folder, environment, (kind, program, *arguments) = json.loads(line)
for place, file, way in ((0, os.devnull, os.O_RDONLY), (1, printed, os.O_WRONLY), (2, errors, os.O_WRONLY)):
    os.dup2(os.open(file, way), place)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
sys.argv = ["-c" if kind == "code" else program, *arguments]
if kind == "code":
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
elif kind == "module":
    runpy.run_module(program, run_name="__main__", alter_sys=True)
else:
    runpy.run_path(program, run_name="__main__")
"""
# What takes the most time to import. Transformers and its like read variables such as HF_HOME as they are imported.
READ_NO_VARIABLES = (
    *("pandas", "scipy.optimize", "sklearn.metrics", "soundfile", "torch._dynamo", "torch.distributed.tensor"),
    *("torchao.quantization", "torchvision"),
)


class Forks:
    """A process that has imported these libraries, with this environment, and forks for every program."""

    def __init__(self, libraries: tuple[str, ...], environment: dict[str, str]):
        command = [sys.executable, "-c", FORKS, *libraries]
        environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def run(self, kind: str, *words: str, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
        """Run "code", a "module" or a "script" with arguments, in this folder and with this environment.

        Variables that one of the libraries, torch or libc reads when it begins must be those of this object.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("out", "errors")]
            for file in files:
                file.touch()
            line = json.dumps([*map(str, files), str(cwd), environment, [kind, *words]])
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(words, status, *(file.read_text() for file in files))

    def end(self):
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def _forks() -> Forks:
    return Forks(READ_NO_VARIABLES, environment_with({}))


def run_code(code: str, *arguments, cwd: Path | None = None, check: bool = True, **environment):
    """As `conftest.run_python`, but at once; variables that torch or libc read when they begin have no effect."""
    environment = environment_with(environment)
    result = _forks().run("code", code, *map(str, arguments), cwd=cwd or Path.cwd(), environment=environment)
    assert not check or result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result
