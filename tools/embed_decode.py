"""Recordings to windows of samples, in processes of their own; the first stage of `bat-audio embed`."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import torch

from bat_audio.configuration_bat import BatConfig
from bat_audio.pipeline_bat import UNKNOWN_FORMAT
from bat_audio.processing_bat import MAX_AMPLITUDE, load_audio
from bat_audio.tools.data import require
from bat_audio.tools.embed_inputs import Input, is_address
from bat_audio.tools.embed_settings import EmbedSettings

PART_SECONDS = 120  # of a long recording that are read at once; to find a place in an MP3 file takes long
KILLS = "Reading it kills the process, which a lack of memory may do too."
READ_AHEAD = 4  # times the number of processes


@dataclass
class Clip:
    """A window of a recording: mono float32 samples (samples,) at the encoder's rate, or why there are none.

    Args:
        start_s, end_s: in seconds from the start of the file; an `end_s` of None is unknown.
    """

    input: Input
    start_s: float
    end_s: float | None
    samples: np.ndarray | None = None
    error: str | None = None

    @property
    def place(self) -> dict:
        return {"id": self.input.id, "path": self.input.path, "start_s": self.start_s, "end_s": self.end_s}


@dataclass(frozen=True)
class Cut:
    """How recordings are cut: into windows of `segment` samples, `hop` samples apart, or not, with None.

    The last window ends with the recording. It is left out where it would have fewer than `shortest` samples, too few
    for one frame, unless it is the only one.
    """

    rate: int
    shortest: int
    segment: int | None
    hop: int

    @classmethod
    def of(cls, settings: EmbedSettings, config: BatConfig) -> "Cut":
        rate, shortest = config.sample_rate, config.n_fft // 2 + 1
        if settings.window is None:
            return cls(rate, shortest, None, 0)
        segment, hop = (round(seconds * rate) for seconds in settings.window)
        if segment < shortest or hop < 1:
            raise ValueError(
                f"segment={settings.segment} and hop={settings.hop}: windows must have at least {shortest / rate:.4f} "
                "s and begin at different samples."
            )
        return cls(rate, shortest, segment, hop)

    def num_windows(self, samples: int) -> int:
        if self.segment is None or samples <= self.segment:
            return 1
        last = math.ceil((samples - self.segment) / self.hop)
        return last + (samples - last * self.hop >= self.shortest)

    def place(self, item: Input, number: int) -> tuple[float, float | None]:
        """Start and duration of a window, in seconds; None reaches to the end of the file."""
        start = item.start + number * self.hop / self.rate
        if self.segment is None:
            return start, item.duration
        left = math.inf if item.duration is None else item.start + item.duration - start
        return start, min(self.segment / self.rate, left)

    def broken(self, item: Input, number: int, reason: str) -> Clip:
        start, duration = self.place(item, number)
        return Clip(item, start, None if duration is None else start + duration, error=reason)

    def parts(self, num_windows: int) -> list[range]:
        """The numbers of a recording's windows behind the first, in parts of about PART_SECONDS."""
        size = max(1, PART_SECONDS * self.rate // max(self.hop, 1))
        return [range(first, min(first + size, num_windows)) for first in range(1, num_windows, size)]


def decode_first(cut: Cut, item: Input, content: bytes | None) -> tuple[Clip, int]:
    """The first window of a recording, and how many it has; a broken one says why.

    Args:
        content: of the sound inside a dataset.
    """
    first, num_windows = _window(cut, item, content, 0), 1
    if cut.segment is not None and (first.error or len(first.samples) == cut.segment):
        with contextlib.suppress(Exception):  # nothing can be told of the file, and the first window's error says why
            with _opened(item.path, content) as source:
                seconds = _seconds_of(source) - item.start
            if item.duration is not None:
                seconds = min(seconds, item.duration)
            num_windows = cut.num_windows(round(seconds * cut.rate))
    return first, num_windows


def decode_part(cut: Cut, item: Input, content: bytes | None, numbers: range) -> list[Clip]:
    """The windows of these numbers; broken ones say why."""
    clips = {}
    if len(numbers) > 1 and cut.hop <= cut.segment:
        with contextlib.suppress(Exception):  # one of the windows is broken, and will say why
            clips = _windows_at_once(cut, item, content, numbers)
    return [clips.get(number) or _window(cut, item, content, number) for number in numbers]


def _windows_at_once(cut: Cut, item: Input, content: bytes | None, numbers: range) -> dict[int, Clip]:
    """Those windows that are long enough, cut from one stretch of the recording."""
    begin, _ = cut.place(item, numbers[0])
    duration = ((len(numbers) - 1) * cut.hop + cut.segment) / cut.rate
    if item.duration is not None:
        duration = min(duration, item.start + item.duration - begin)
    with _opened(item.path, content) as source:
        samples = _samples(cut, source, begin, duration)
    clips = {}
    for place, number in enumerate(numbers):
        window = samples[place * cut.hop :][: cut.segment]
        start, _ = cut.place(item, number)
        if len(window) >= cut.shortest:
            clips[number] = Clip(item, start, start + len(window) / cut.rate, window)
    return clips


def _window(cut: Cut, item: Input, content: bytes | None, number: int) -> Clip:
    start, duration = cut.place(item, number)
    try:
        with _opened(item.path, content) as source:
            samples = _samples(cut, source, start, duration)
    except Exception as error:  # whatever a decoder makes of a damaged file, the others go on
        # load_audio names the file, which the table's columns do, or the type of an object that has no name.
        reason = re.sub(rf"^({re.escape(item.path)}|<\w+>): ", "", str(error)) or type(error).__name__
        return cut.broken(item, number, reason)
    return Clip(item, start, start + len(samples) / cut.rate, samples)


def _samples(cut: Cut, source: str | io.IOBase, start: float, duration: float | None) -> np.ndarray:
    samples = _load(source, start, duration, cut.rate).numpy()
    if len(samples) < cut.shortest:
        seconds = cut.shortest / cut.rate
        raise ValueError(f"{len(samples)} samples are too few; at least {cut.shortest} ({seconds:.3f} s) are needed.")
    if np.abs(samples).max() > MAX_AMPLITUDE:
        raise ValueError(f"holds samples above {MAX_AMPLITUDE:g}; expected -1..1.")
    return samples


@contextlib.contextmanager
def _opened(path: str, content: bytes | None) -> Iterator[str | io.IOBase]:
    """What `load_audio` reads the recording from; an OSError says why it cannot, which libsndfile does not."""
    if content is not None:
        source = io.BytesIO(content)
        source.name = path
        yield source
    elif is_address(path):
        with fsspec.open(path, "rb") as file:
            yield file
    else:
        with open(path, "rb"):
            yield path


def _load(source: str | io.IOBase, start: float, duration: float | None, rate: int) -> torch.Tensor:
    """As `load_audio`; what libsndfile does not know (m4a, webm, ...) is read by the ffmpeg program."""
    try:
        return load_audio(source, start, duration, rate)
    except ValueError as error:
        if getattr(error.__cause__, "code", None) != UNKNOWN_FORMAT:  # a damaged file, which is not to be repaired
            raise
        part = ["-ss", f"{start:.6f}", *([] if duration is None else ["-t", f"{duration:.6f}"])]
        form = ["-map", "0:a:0", "-ac", "1", "-ar", str(rate), "-f", "f32le", "-"]
        try:
            content = _run_on_file(["ffmpeg", "-nostdin", "-xerror", *part, "-i"], source, form)
            if not content:
                raise ValueError(f"it holds nothing from {start} s on")
        except ValueError as ffmpeg_error:
            raise ValueError(f"{error} Nor could the ffmpeg program read it: {ffmpeg_error}.") from error
        samples = np.frombuffer(content, dtype="<f4")
        if not np.isfinite(samples).all():
            raise ValueError("holds NaN or infinite samples.") from error
        return torch.from_numpy(samples.copy())


def _seconds_of(source: str | io.IOBase) -> float:
    soundfile = require("soundfile")
    try:
        with soundfile.SoundFile(source) as file:
            return file.frames / file.samplerate
    except soundfile.LibsndfileError as error:
        if error.code != UNKNOWN_FORMAT:
            raise
        show = ["-show_entries", "format=duration", "-of", "json"]
        return float(json.loads(_run_on_file(["ffprobe", *show], source))["format"]["duration"])


def _run_on_file(command: list[str], source: str | io.IOBase, options: Iterable[str] = ()) -> bytes:
    """What a program of ffmpeg prints about a file, or a ValueError with the reason."""
    with contextlib.ExitStack() as stack:
        if not isinstance(source, str):  # ffmpeg has to seek in some formats
            copy = stack.enter_context(tempfile.NamedTemporaryFile())
            source.seek(0)
            shutil.copyfileobj(source, copy)
            copy.flush()
            source = copy.name
        quiet = ["-v", "error", "-protocol_whitelist", "file"]  # a playlist in the file must not reach for the network
        try:
            result = subprocess.run([command[0], *quiet, *command[1:], f"file:{source}", *options], capture_output=True)
        except FileNotFoundError as error:
            raise ValueError(f"{command[0]} is not installed") from error
        if result.returncode:
            lines = result.stderr.decode(errors="replace").strip().splitlines() or [f"status {result.returncode}"]
            reason = re.sub(r"\[[^]]* @ 0x\w+\] ", "", lines[0]).replace(f"file:{source}", "the file")
            raise ValueError(reason.rstrip(".").removeprefix("the file: "))
        return result.stdout


class DecodingProcesses(Executor):
    """A pool of processes, all of them started, which end with this one however it ends.

    Where a recording kills its process, the pool begins anew. What was under way is called again, each by itself.
    """

    def __init__(self, number: int):
        self.number = number
        self._begin()

    def _begin(self):
        self.pool = ProcessPoolExecutor(self.number, initializer=_begin_process)
        self.pool.submit(int).result()

    def submit(self, function: Callable, *arguments) -> Future:
        try:
            return self.pool.submit(function, *arguments)
        except BrokenExecutor:
            self._begin()
            return self.pool.submit(function, *arguments)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True):
        """End the processes; what is under way is waited for, what is not is given up."""
        self.pool.shutdown(wait, cancel_futures=cancel_futures)


def result_of(future: Future, function: Callable, arguments: tuple) -> Any:
    """The result of a call, which is made again in a process of its own if the first one was killed.

    Raises:
        BrokenExecutor: the second one was killed too.
    """
    try:
        return future.result()
    except BrokenExecutor:
        with ProcessPoolExecutor(1, initializer=_begin_process) as alone:
            return alone.submit(function, *arguments).result()


def _begin_process():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears Ctrl-C too, and ends this one
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def read_ahead(
    executor: Executor | None, function: Callable, tasks: Iterable[tuple[int, tuple]], ahead: int
) -> Iterator[tuple[int, tuple, Any]]:
    """Key, arguments and result of each task, in order; `ahead` of them are computed before they are asked for.

    The result is None where the recording kills the process that decodes it.
    """
    if executor is None:
        yield from ((key, arguments, function(*arguments)) for key, arguments in tasks)
        return
    running = deque()

    def first() -> tuple[int, tuple, Any]:
        key, arguments, future = running.popleft()
        try:
            return key, arguments, result_of(future, function, arguments)
        except BrokenExecutor:
            return key, arguments, None

    for key, arguments in tasks:
        running.append((key, arguments, executor.submit(function, *arguments)))
        if len(running) > ahead:
            yield first()
    while running:
        yield first()


def read_clips(
    executor: Executor | None, cut: Cut, inputs: Iterable[tuple[int, Input, bytes | None]], ahead: int
) -> Iterator[tuple[int, Clip]]:
    """The windows of all recordings in order, which is the same for any number of processes.

    Args:
        inputs: unit, recording, and its content where it lies in a dataset; the result has the unit again.
    """
    tasks = ((unit, (cut, item, content)) for unit, item, content in inputs)
    for unit, task, found in read_ahead(executor, decode_first, tasks, ahead):
        _, item, _ = task
        first, num_windows = found or (cut.broken(item, 0, KILLS), 1)
        yield unit, first
        parts = ((unit, (*task, numbers)) for numbers in cut.parts(num_windows))
        for _, (*_, numbers), clips in read_ahead(executor, decode_part, parts, ahead):
            yield from ((unit, clip) for clip in clips or [cut.broken(item, number, KILLS) for number in numbers])
