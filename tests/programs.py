"""`bat-audio` in processes of their own that start at once, because they are forked from one that has the libraries.

That process has imported torch, Transformers and their like, which takes several seconds each time, but nothing of BAT:
what a test starts here reads its options, imports BAT and ends as in a fresh interpreter. Where the imports or the
launcher are what is tested, `conftest.run` starts one.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

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
