"""A run that was stopped, in whatever way, goes on to the table of one that was not; a begun table is kept as it is."""

import errno
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import THREADS, tiny_model
from embed_tables import (
    assert_same_table,
    descendants,
    make_many,
    read,
    read_errors,
    run_embed,
    run_folder,
    unfinished,
)
from programs import Program
from pyarrow import parquet

from bat_audio_tools import folders
from bat_audio_tools.embedding import encoder
from bat_audio_tools.embedding.table import Table
from bat_audio_tools.settings import StartError
from bat_audio_tools.sounds.listing import write_plan
from bat_audio_tools.sounds.reading import Input

SMALL = ("--shard-size", 4, "--num-frames", 16, "--segment", 0.5)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """60 recordings of three lengths, six of them broken."""
    folder = tmp_path_factory.mktemp("many")
    make_many(folder, 60, broken_every=10)
    return folder


def command(inputs, out, checkpoint, *options) -> list[str]:
    options = ("--workers", 2, "--device", "cpu", *options)
    return ["embed", *map(str, (inputs, "-o", out, "--checkpoint", checkpoint, *options))]


def start_fresh(command: list[str], preexec_fn: Callable) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    program = [sys.executable, "-m", "bat_audio_tools.cli", *command]
    return subprocess.Popen(program, env=environment, preexec_fn=preexec_fn, **pipes)


def hear_ctrl_c():
    """As at a terminal: a group of processes of its own, which hears Ctrl-C.

    Tests that a shell runs in the background ignore it, and so would their processes.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_shards(out: Path, number: int, pid: int, seconds: float = math.inf):
    deadline = time.monotonic() + seconds
    while len(list(out.glob("embeddings/part-*"))) < number and is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def uninterrupted(many, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    status, printed, errors = Program(*command(many, out, checkpoint, *SMALL)).end()
    assert status == 1, errors
    summary = json.loads(printed)
    assert summary["files"] == 60
    assert summary["failed"] == len(read_errors(out))
    return out


@pytest.mark.slow
def test_resuming_after_kill_9(many, checkpoint, uninterrupted, tmp_path):
    out, shards = tmp_path / "out", {}
    for number in (0, 1, 4, 7):
        program = Program(*command(many, out, checkpoint, *SMALL))
        wait_for_shards(out, number, program.pid)
        time.sleep(0.05 * random.random())
        os.kill(program.pid, signal.SIGSTOP)  # a fast machine would finish before the kill
        processes = descendants(program.pid)
        program.kill()
        # A shard that was there stays as it was.
        assert all((out / "embeddings" / name).stat().st_ino == inode for name, inode in shards.items())
        shards = {path.name: path.stat().st_ino for path in out.glob("embeddings/part-*")}
        deadline = time.monotonic() + 20
        while any(map(is_running, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_running, processes))
    assert not (run_folder(out) / "errors.parquet").exists()
    assert Program(*command(many, out, checkpoint, *SMALL)).end()[0] == 1
    assert_same_table(out, uninterrupted)
    assert all((out / "embeddings" / name).stat().st_ino == inode for name, inode in shards.items())
    assert unfinished(out) == []


@pytest.mark.slow
def test_resuming_after_20_kills_over_2000_files(checkpoint, tmp_path):
    (tmp_path / "many").mkdir()
    make_many(tmp_path / "many", 1999, broken_every=100)
    os.mkfifo(tmp_path / "many" / "000" / "pipe.wav")  # Whoever opens it waits for ever.
    if os.getuid():  # root may read everything
        (tmp_path / "many" / "000" / "00001.wav").chmod(0)
    options = ("--shard-size", 25, "--num-frames", 16, "--segment", 1)
    begun = time.monotonic()
    program = Program(*command(tmp_path / "many", tmp_path / "whole", checkpoint, *options))
    wait_for_shards(tmp_path / "whole", 1, program.pid)
    loaded = time.monotonic() - begun
    program.end()
    rest = time.monotonic() - begun - loaded
    order, out = random.Random(0), tmp_path / "out"
    for _ in range(20):
        done = len(list(out.glob("embeddings/part-*")))
        program = Program(*command(tmp_path / "many", out, checkpoint, *options))
        # From before the folder is there to behind the next shard. None lasts longer than two shards take, however
        # fast the machine has become since it was timed, so that the 80 shards suffice for 20 kills.
        if order.random() < 0.5:
            wait_for_shards(out, done + 1, program.pid, loaded * order.uniform(0.3, 1))
        else:
            wait_for_shards(out, done + 1, program.pid)
            wait_for_shards(out, done + 2, program.pid, rest / 80 * order.random())
        assert is_running(program.pid), program.end()
        program.kill()
    summary = json.loads(Program(*command(tmp_path / "many", out, checkpoint, *options)).end()[1])
    assert summary["files"] == 2000
    reasons = [row["error"] for row in read_errors(out)]
    assert any("Permission denied" in reason for reason in reasons) == bool(os.getuid())
    assert any("It is a pipe (FIFO), which is never opened" in reason for reason in reasons)
    assert_same_table(out, tmp_path / "whole")
    assert unfinished(out) == []


@pytest.mark.slow
def test_resuming_after_ctrl_c(many, checkpoint, uninterrupted, tmp_path):
    for attempt in range(3):  # Python loses a Ctrl-C that comes inside a destructor, and goes on
        out = tmp_path / f"out_{attempt}"
        process = start_fresh(command(many, out, checkpoint, *SMALL), hear_ctrl_c)
        wait_for_shards(out, 1, process.pid)
        os.kill(process.pid, signal.SIGSTOP)  # a fast machine would finish before the Ctrl-C
        processes = descendants(process.pid)
        assert len(list(out.glob("embeddings/part-*"))) < 15
        os.killpg(process.pid, signal.SIGINT)  # to the whole group of processes, as a terminal sends it
        os.kill(process.pid, signal.SIGCONT)
        printed, errors = process.communicate()
        if "Exception ignored" not in errors:
            break
    assert process.returncode == 130, errors
    assert printed == ""
    assert errors.splitlines()[-1] == "interrupted; the same command goes on from there"
    assert "Traceback" not in errors
    assert unfinished(out) == []
    assert not any(map(is_running, processes))
    Program(*command(many, out, checkpoint, *SMALL)).end()
    assert_same_table(out, uninterrupted)


STUCK = """
import os, signal, time
import fsspec
from bat_audio_tools import main

class Stuck(fsspec.AbstractFileSystem):
    protocol = "stuck"

    def info(self, path, **options):
        return {"name": path, "size": 1, "type": "file"}

    def open(self, path, *arguments, **options):
        if "{end}" == "killed" and not os.path.exists("first"):
            open("first", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        open("opened", "w").close()
        while True:
            time.sleep(3600)

fsspec.register_implementation("stuck", Stuck)
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="other processes do not know the file system")
@pytest.mark.parametrize("end", ["stuck", "killed"])
def test_ctrl_c_does_not_wait_for_a_stuck_decoder(end, checkpoint, tmp_path):
    """Nor for the process in which a recording that killed its own is tried again."""
    words = command("stuck://x.wav", "out", checkpoint)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
    program = [sys.executable, "-c", STUCK.replace("{end}", end), *words]
    process = subprocess.Popen(program, cwd=tmp_path, env=environment, preexec_fn=hear_ctrl_c, **pipes)
    while not (tmp_path / "opened").exists() and is_running(process.pid):
        time.sleep(0.01)
    processes, begun = descendants(process.pid), time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - begun < 2
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted; the same command goes on from there"
    assert not any(map(is_running, processes))
    assert unfinished(tmp_path) == []


@pytest.mark.slow
def test_resuming_on_a_full_disk(many, checkpoint, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000))  # bytes of a file; as if the disk was full then

    options = ("--shard-size", 20, "--tokens", "--segment", 0.5, "--num-frames", 16)
    process = start_fresh(command(many, tmp_path / "out", checkpoint, *options), limit)
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    reason = f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}"
    done = "(0 of 3 shards are done; the same command goes on from there)"
    assert errors.splitlines()[-1] == f"error: {tmp_path / 'out'}: {reason} {done}"
    assert unfinished(tmp_path / "out") == []
    for out in ("out", "whole"):
        Program(*command(many, tmp_path / out, checkpoint, *options)).end()
    assert_same_table(tmp_path / "out", tmp_path / "whole")


def test_resuming_after_a_failed_write(recordings, checkpoint, tmp_path, monkeypatch):
    run_embed([str(recordings)], tmp_path / "whole", checkpoint, shard_size=3)

    def fail(self, rows, seconds):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("bat_audio_tools.embedding.table.ShardWriter.add", fail)
        with pytest.raises(OSError, match=r"No space left on device \(0 of 4 shards"):
            run_embed([str(recordings)], tmp_path / "out", checkpoint, shard_size=3)
    assert unfinished(tmp_path / "out") == []
    run_embed([str(recordings)], tmp_path / "out", checkpoint, shard_size=3)
    assert_same_table(tmp_path / "out", tmp_path / "whole")


def test_resuming_of_a_finished_run_computes_nothing(recordings, checkpoint, tmp_path, monkeypatch):
    first = run_embed([str(recordings)], tmp_path / "out", checkpoint)
    monkeypatch.delattr("bat_audio_tools.embedding.stages.Encoder")
    second = run_embed([str(recordings)], tmp_path / "out", checkpoint)
    assert all(first[name] == second[name] for name in ("files", "rows", "failed", "audio_hours"))


def test_resuming_of_what_was_mended(recordings, checkpoint, tmp_path):
    shutil.copytree(recordings / "a", tmp_path / "a")
    (tmp_path / "a" / "exact.wav").write_text("no sound")
    run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1)
    shards = {path.name: path.stat().st_ino for path in (tmp_path / "out" / "embeddings").iterdir()}
    shutil.copy(recordings / "a" / "exact.wav", tmp_path / "a")
    assert run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1)["failed"] == 1
    assert run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1, retry=True)["failed"] == 0
    run_embed([str(tmp_path / "a")], tmp_path / "whole", checkpoint, shard_size=1)
    assert_same_table(tmp_path / "out", tmp_path / "whole")
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out" / "embeddings").iterdir()}
    assert [name for name in shards if after[name] != shards[name]] == ["part-00000.parquet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": "mean"}, "settings.pool was 'cls' and is 'mean'"),
        ({"segment": 5.0}, "settings.segment was 10.24 and is 5.0, settings.hop was 10.24 and is 5.0"),
        ({"float16": True}, "settings.float16 was False and is True"),
        ({"bf16": True}, "settings.bf16 was False and is True"),
        ({"shard_size": 3}, "settings.shard_size was 512 and is 3"),
    ],
)
def test_resuming_with_other_settings_is_refused(change, message, recordings, checkpoint, tmp_path):
    run_embed([str(recordings)], tmp_path / "out", checkpoint)
    before = read(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run_embed([str(recordings)], tmp_path / "out", checkpoint, **change)
    assert read(tmp_path / "out").equals(before)
    run_embed([str(recordings)], tmp_path / "out", checkpoint, workers=1, segment=10.24)  # decides nothing


def test_resuming_with_other_inputs_or_weights_is_refused(recordings, checkpoint, tmp_path):
    shutil.copytree(recordings / "a", tmp_path / "a")
    run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint)
    tiny_model(hidden_size=64, chunk_time_patches=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="weights_sha256 was"):
        run_embed([str(tmp_path / "a")], tmp_path / "out", str(tmp_path / "other"))
    shutil.move(checkpoint, f"{checkpoint}-moved")
    try:
        run_embed([str(tmp_path / "a")], tmp_path / "out", f"{checkpoint}-moved")
    finally:
        shutil.move(f"{checkpoint}-moved", checkpoint)
    shutil.copy(recordings / "two.wav", tmp_path / "a")
    with pytest.raises(ValueError, match=r"inputs\.files was 4 and is 5"):
        run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint)


def test_resuming_with_the_stored_inputs(recordings, checkpoint, tmp_path):
    shutil.copytree(recordings / "a", tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds no shards .* leave out stored_inputs"):
        run_embed(None, tmp_path / "out", checkpoint, shard_size=1, stored_inputs=True)
    run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1)
    run_embed([str(tmp_path / "a")], tmp_path / "whole", checkpoint, shard_size=1)
    (tmp_path / "out" / "embeddings" / "part-00001.parquet").unlink()
    shutil.copy(recordings / "two.wav", tmp_path / "a")
    with pytest.raises(ValueError, match=r"inputs\.files was 4 and is 5, .* \(--stored-inputs\) it goes on"):
        run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1)
    with pytest.raises(ValueError, match="name no others"):
        run_embed([str(tmp_path / "a")], tmp_path / "out", checkpoint, shard_size=1, stored_inputs=True)
    run_embed(None, tmp_path / "out", checkpoint, shard_size=1, stored_inputs=True)
    assert_same_table(tmp_path / "out", tmp_path / "whole")
    with pytest.raises(ValueError, match="Name the inputs"):
        run_embed(None, tmp_path / "out", checkpoint)


def test_resuming_from_another_folder_is_refused(recordings, checkpoint, tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        shutil.copy(recordings / "second_0.wav", tmp_path / name)
    monkeypatch.chdir(tmp_path / "here")
    run_embed(["second_0.wav"], tmp_path / "out", checkpoint)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(ValueError, match=r"inputs\.folder was '.*here' and is '.*there'\. .*--stored-inputs"):
        run_embed(["second_0.wav"], tmp_path / "out", checkpoint)


def test_resuming_with_another_config_is_refused(recordings, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    run_embed([str(recordings / "second_0.wav")], tmp_path / "out", str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "top_db": 40.0}))
    with pytest.raises(ValueError, match=r"config\.top_db was 80(\.0)? and is 40\.0\. Repeat"):
        run_embed([str(recordings / "second_0.wav")], tmp_path / "out", str(tmp_path / "model"))


def test_resuming_with_another_dataset_is_refused(recordings, checkpoint, tmp_path):
    datasets = pytest.importorskip("datasets")

    def dataset(*files):
        audio = [{"path": None, "bytes": (recordings / file).read_bytes()} for file in files]
        return datasets.Dataset.from_dict({"audio": audio}).cast_column("audio", datasets.Audio())

    run_embed(dataset("second_0.wav", "second_1.wav"), tmp_path / "out", checkpoint)
    run_embed(dataset("second_0.wav", "second_1.wav"), tmp_path / "out", checkpoint)
    with pytest.raises(ValueError, match="begun with a dataset, which has to be named"):
        run_embed(None, tmp_path / "out", checkpoint, stored_inputs=True)
    with pytest.raises(ValueError, match=r"inputs\.fingerprint was '\w+' and is"):
        run_embed(dataset("second_2.wav", "second_3.wav"), tmp_path / "out", checkpoint)


def test_resuming_of_a_table_without_shards_begins_anew(recordings, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual.")

    with monkeypatch.context() as patch:
        patch.setattr(encoder.Encoder, "__call__", fail)
        with pytest.raises(OSError, match=r"OutOfMemoryError: CUDA out of memory\. .*GiB\. A smaller .*--batch-size"):
            run_embed([str(recordings)], tmp_path / "out", checkpoint)
    run_embed([str(recordings)], tmp_path / "out", checkpoint, batch_size=4, shard_size=5)
    run_embed([str(recordings)], tmp_path / "whole", checkpoint, batch_size=4, shard_size=5)
    assert_same_table(tmp_path / "out", tmp_path / "whole")


def test_resuming_beside_another_run_is_refused(recordings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_WAIT", 0.2)
    with folders.lock(run_folder(tmp_path / "out")), pytest.raises(StartError, match="in use by another run"):
        run_embed([str(recordings / "a")], tmp_path / "out", checkpoint)
    run_embed([str(recordings / "a")], tmp_path / "out", checkpoint)


def test_resuming_of_shards_without_metadata_is_refused(recordings, checkpoint, tmp_path):
    run_embed([str(recordings / "a")], tmp_path / "out", checkpoint)
    shutil.rmtree(run_folder(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"such as embeddings/part-00000\.parquet, .* no .*\.run/metadata\.json"):
        run_embed([str(recordings / "a")], tmp_path / "out", checkpoint, pool="mean")


@pytest.mark.parametrize("name", ["write_json", "finish"])
def test_resuming_after_a_full_disk_before_or_behind_the_shards(name, recordings, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"bat_audio_tools.embedding.table.Table.{name}", fail)
        with pytest.raises(OSError, match=r"No space left on device \(.*the same command goes on") as failure:
            run_embed([str(recordings / "a")], tmp_path / "out", checkpoint)
    assert not isinstance(failure.value, StartError)  # whose exit status would be 2
    assert run_embed([str(recordings / "a")], tmp_path / "out", checkpoint)["rows"] == 8


def test_resuming_into_a_folder_with_other_files_is_refused(recordings, checkpoint, tmp_path):
    (tmp_path / "letter.txt").write_text("no table")
    with pytest.raises(ValueError, match=r"holds other files, such as letter\.txt, but there is no table"):
        run_embed([str(recordings)], tmp_path, checkpoint)


def test_resuming_of_a_table_with_all_its_files_in_one_folder(recordings, checkpoint, tmp_path):
    """As version 0.6.0 has begun it: its list of inputs tells no sizes."""
    inputs, out = [str(recordings)], tmp_path / "out"
    run_embed(inputs, tmp_path / "whole", checkpoint, shard_size=3)
    run_embed(inputs, out, checkpoint, shard_size=3)
    for file in run_folder(out).iterdir():
        file.rename(out / file.name)
    run_folder(out).rmdir()
    plan = parquet.ParquetFile(out / "inputs.parquet")
    units = [plan.read_row_group(unit).drop(["bytes"]) for unit in range(plan.num_row_groups)]
    with parquet.ParquetWriter(out / "inputs.parquet", units[0].schema) as writer:
        for unit in units:
            writer.write_table(unit)
    for number in (1, 3):
        (out / "embeddings" / f"part-0000{number}.parquet").unlink()
    (out / "errors.parquet").unlink()
    names = {path.name for path in out.iterdir()}
    assert run_embed(inputs, out, checkpoint, shard_size=3)["errors"] == str(out / "errors.parquet")
    assert {path.name for path in out.iterdir()} == names | {"errors.parquet"}
    assert not run_folder(out).exists()
    assert read(out).equals(read(tmp_path / "whole"))


def cut(file: Path):
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path):
    os.truncate(file, 0)


def list_of_nothing(file: Path):
    file.write_text("[]")


def half_json(file: Path):
    file.write_text('{"settings": {}, "inputs": 5}')


def one_too_many(file: Path):
    shutil.copy(file, file.with_name("part-00009.parquet"))


def plan_of_others(file: Path):
    with file.open("wb") as plan:
        write_plan(((Input(str(number), str(number)), 0) for number in range(12)), plan, 3)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        *((name, damage, "Put a copy") for name in ("metadata.json", "inputs.parquet") for damage in (cut, empty)),
        ("metadata.json", list_of_nothing, "Put a copy"),
        ("metadata.json", half_json, "Put a copy"),
        ("inputs.parquet", list_of_nothing, "Put a copy"),
        ("inputs.parquet", Path.unlink, "Put a copy"),
        ("inputs.parquet", plan_of_others, "not the list with the digest"),
        *(("part-00001.parquet", damage, "Remove it") for damage in (cut, empty, list_of_nothing)),
        ("part-00001.parquet", one_too_many, "is a shard too many"),
    ],
)
def test_resuming_of_a_damaged_table(is_old, name, damage, message, finished, checkpoint, recordings, tmp_path):
    """The message names the file, and what to do; nothing is mended in silence."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.copytree(run_folder(finished), out if is_old else run_folder(out), dirs_exist_ok=True)
    file = next(path for path in tmp_path.rglob(name))
    damage(file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    named = file.with_name("part-00009.parquet") if damage is one_too_many else file
    with pytest.raises(ValueError, match=rf"{re.escape(str(named))} .*{message}"):
        run_embed([str(recordings)], out, checkpoint, shard_size=3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
    if "Remove it" in message:
        file.unlink()
        run_embed([str(recordings)], out, checkpoint, shard_size=3)
        assert read(out).equals(read(finished))


@pytest.fixture(scope="module")
def finished(recordings, checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    run_embed([str(recordings)], out, checkpoint, shard_size=3)
    return out


def test_unfinished_files_of_killed_processes_are_removed(recordings, checkpoint, tmp_path, monkeypatch):
    """Those of an earlier run, and those that an actor leaves while the run goes on."""
    run_embed([str(recordings)], tmp_path / "out", checkpoint, shard_size=3)
    (tmp_path / "out" / "embeddings" / "part-00001.parquet").unlink()
    left = [folder / ".partial-0123" for folder in (tmp_path / "out" / "embeddings", run_folder(tmp_path / "out"))]
    for file in left:
        file.write_text("half")
    finish = Table.finish

    def leave_more(*arguments):
        assert unfinished(tmp_path / "out") == []
        left[0].write_text("half")
        return finish(*arguments)

    monkeypatch.setattr(Table, "finish", leave_more)
    run_embed([str(recordings)], tmp_path / "out", checkpoint, shard_size=3)
    assert unfinished(tmp_path / "out") == []
