"""Recordings to windows of samples, in processes of their own; the first stage of `bat-audio embed`."""

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from bat_audio.audio_bat import Sound, load_audio
from bat_audio.configuration_bat import BatConfig
from bat_audio.processing_bat import MAX_AMPLITUDE
from bat_audio_tools.settings import EmbedSettings
from bat_audio_tools.sounds.reading import Input, opened


class BrokenRecordingError(OSError):
    """A recording cannot be embedded, and is not to be left out: the settings are strict, or the vectors not finite."""


# A long recording is read in parts of so many seconds, because finding a place in an MP3 file takes long.
PART_SECONDS = 120
# After so many parts in a row that cannot be read, a recording is given up: a damaged header may tell any length.
FAILED_PARTS = 3
KILLS = "Reading it kills the process, which a lack of memory may do too."
READ_AHEAD = 4  # For each process, so many recordings or parts are decoded before they are asked for.
READ_AHEAD_BYTES = 1 << 29  # What is decoded before it is asked for should take no more bytes than this.


@dataclass
class Window:
    """A window of a recording: mono float32 samples (samples,) at the encoder's rate, or why there are none.

    Args:
        start_s, end_s: in seconds from the start of the file; an `end_s` of None is unknown.
        share: about which part of its recording it is; None where nothing tells the recording's length.
    """

    input: Input
    start_s: float
    end_s: float | None
    samples: np.ndarray | None = None
    error: str | None = None
    share: float | None = None

    @property
    def place(self) -> dict:
        return {"id": self.input.id, "path": self.input.path, "start_s": self.start_s, "end_s": self.end_s}


@dataclass(frozen=True)
class Cut:
    """How recordings are cut: into windows of `segment` samples, `hop` samples apart; None leaves them whole.

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

    def place(self, item: Input, number: int, windows: int = 1) -> tuple[float, float | None]:
        """Start and duration of so many windows, in seconds; None reaches to the end of the file."""
        start = item.start + number * self.hop / self.rate
        if self.segment is None:
            return start, item.duration
        left = math.inf if item.duration is None else item.start + item.duration - start
        return start, min(self.samples_of(windows) / self.rate, left)

    def samples_of(self, windows: int) -> int:
        """The number of samples from the start of the first of so many windows to the end of the last."""
        return (windows - 1) * self.hop + self.segment

    def broken(self, item: Input, number: int, reason: str, windows: int = 1) -> Window:
        start, duration = self.place(item, number, windows)
        return Window(item, start, None if duration is None else start + duration, error=reason)

    @property
    def part_windows(self) -> int:
        """The number of windows in a part of about PART_SECONDS."""
        return max(1, PART_SECONDS * self.rate // max(self.hop, 1))

    def parts(self, numbers: range) -> Iterator[range]:
        """The numbers of windows, part by part; a damaged header may tell of billions."""
        size = self.part_windows
        return (numbers[first : first + size] for first in range(0, len(numbers), size))

    def windows(self, item: Input, stretch: "Stretch") -> Iterator[Window]:
        """The windows of a stretch; those that are broken are one Window."""
        if stretch.error is not None:
            yield self.broken(item, stretch.numbers[0], stretch.error, len(stretch.numbers))
            return
        for place, number in enumerate(stretch.numbers):
            samples = stretch.samples[place * self.hop :][: self.segment]
            start, _ = self.place(item, number)
            yield Window(item, start, start + len(samples) / self.rate, samples)

    def problem(self, samples: np.ndarray, windows: int = 1) -> str | None:
        """Why these windows cannot be embedded; the last one is the shortest."""
        last = len(samples) - (windows - 1) * self.hop
        if last < self.shortest:
            seconds = self.shortest / self.rate
            return f"{max(0, last)} samples are too few; at least {self.shortest} ({seconds:.3f} s) are needed."
        if not np.isfinite(samples).all():
            return "holds NaN or infinite samples."
        too_loud = np.abs(samples).max() > MAX_AMPLITUDE
        return f"holds samples above {MAX_AMPLITUDE:g}; expected -1..1." if too_loud else None


@dataclass
class Stretch:
    """Windows of a recording, as a process sends them: the samples from the first to the last, or why there are none.

    Overlapping windows are cut from them by the receiver, so that no sample is sent twice.
    """

    numbers: range
    samples: np.ndarray | None = None
    error: str | None = None


@dataclass
class Found:
    """What was decoded of a recording, and the numbers of the windows that are left to read.

    Args:
        rest: None where nothing tells how many there are, and the recording is to be read on from its start.
        missing: the windows behind the rest that a truncated file lacks.
        expected: about how many windows there are, where that is only estimated.
    """

    stretches: list[Stretch]
    rest: range | None = range(0)
    missing: Stretch | None = None
    expected: int | None = None

    @property
    def num_bytes(self) -> int:
        return sum(stretch.samples.nbytes for stretch in self.stretches if stretch.samples is not None)


def decode_first(cut: Cut, item: Input, content: bytes | None) -> Found:
    """The first window of a recording, or its first part where nothing tells the length; a broken one says why.

    Args:
        content: of the sound inside a dataset.
    """
    first = range(1)
    if item.problem is not None:
        return Found([Stretch(first, error=item.problem)])
    try:
        with opened(item.path, content) as source, Sound(source) as sound:
            seconds, present, problem = sound.seconds, sound.present_seconds, sound.problem
            estimate = sound.estimated_seconds
    except Exception as error:  # A decoder may raise anything for a damaged file; the others go on.
        return Found([Stretch(first, error=_reason(item, error))])
    if seconds is None:
        found = next(stream(cut, item, content))
        if estimate is not None:
            left = estimate - item.start if item.duration is None else min(estimate - item.start, item.duration)
            found = replace(found, expected=cut.num_windows(round(max(0.0, left) * cut.rate)))
        return found
    found = decode_part(cut, item, content, first)
    seconds -= item.start
    if item.duration is not None:
        seconds = min(seconds, item.duration)
    count = there = cut.num_windows(round(seconds * cut.rate))
    if problem and cut.segment is not None:  # The windows that begin behind what is there need not be read.
        there = min(count, max(1, math.ceil((present - item.start) * cut.rate / cut.hop)))
    missing = Stretch(range(there, count), error=f"cannot be read as audio: {problem}.") if there < count else None
    return replace(found, rest=range(1, there), missing=missing)


def decode_part(cut: Cut, item: Input, content: bytes | None, numbers: range) -> Found:
    """The windows of these numbers; broken ones say why."""
    if len(numbers) > 1 and cut.hop <= cut.segment:
        with contextlib.suppress(Exception):  # If one of the windows is broken, the loop below finds which.
            return Found([_read(cut, item, content, numbers)])
    stretches = []
    for number in numbers:
        window = range(number, number + 1)
        try:
            stretches.append(_read(cut, item, content, window))
        except Exception as error:  # A decoder may raise anything for a damaged file.
            stretches.append(Stretch(window, error=_reason(item, error)))
    return Found(stretches)


def _read(cut: Cut, item: Input, content: bytes | None, numbers: range) -> Stretch:
    start, duration = cut.place(item, numbers[0], len(numbers))
    with opened(item.path, content) as source:
        samples = load_audio(source, start, duration, cut.rate, item.channel_to_read).numpy()
    if problem := cut.problem(samples, len(numbers)):
        raise ValueError(problem)
    return Stretch(numbers, samples)


def _reason(item: Input, error: Exception) -> str:
    # load_audio's messages begin with the file, or with the type of an object that has no name. The file is in the
    # table's columns already.
    return re.sub(rf"^({re.escape(item.path)}|<\w+>): ", "", str(error)) or type(error).__name__


def stream(cut: Cut, item: Input, content: bytes | None) -> Iterator[Found]:
    """The windows of a recording whose length nothing tells, decoded once from its start to its end, part by part.

    Where it cannot be read any further, the last window says why.
    """
    size = cut.part_windows
    enough = math.inf if cut.segment is None else max(cut.samples_of(size), size * cut.hop)
    pieces, held, number, error = [], 0, 0, None

    def windows(count: int) -> Found:
        """The first windows of the samples that are held; a broken window does not spoil the others."""
        samples = np.concatenate([np.zeros(0, np.float32), *pieces])
        if cut.segment is not None:
            samples = samples[: cut.samples_of(count)]
        if cut.problem(samples, count) is None:
            return Found([Stretch(range(number, number + count), samples)])
        stretches = []
        for place in range(count):
            window = samples[place * cut.hop :][: cut.segment]
            problem = cut.problem(window)
            numbers = range(number + place, number + place + 1)
            stretches.append(Stretch(numbers, None if problem else window, problem))
        return Found(stretches)

    try:
        with opened(item.path, content) as source, Sound(source) as sound:
            for block in sound.waveform(item.start, item.duration, cut.rate, item.channel_to_read):
                pieces.append(block)
                held += len(block)
                while held >= enough:
                    yield replace(windows(size), rest=None)
                    pieces = [np.concatenate(pieces)[size * cut.hop :]]
                    number, held = number + size, len(pieces[0])
            if sound.problem:
                raise ValueError(f"cannot be read as audio: {sound.problem}.")
    except Exception as failure:  # A decoder may raise anything for a damaged file.
        error = _reason(item, failure)
    if error is None:
        count = cut.num_windows(number * cut.hop + held) - number
    else:  # The recording broke off, so only whole windows count.
        count = 0 if cut.segment is None or held < cut.segment else (held - cut.segment) // cut.hop + 1
    found = windows(count) if count > 0 else Found([])
    if error is not None:
        number += count
        behind = " Nothing behind it was read." if number else ""
        found.stretches.append(Stretch(range(number, number + 1), error=error + behind))
    if found.stretches:
        yield found


class DecodingProcesses(Executor):
    """Processes for decoding, all of them started, which end with this one however it ends.

    Where a recording kills its process, all of them are started anew. `result_of` makes each call that was under way
    again, in a process of its own.
    """

    def __init__(self, number: int):
        self.number = number
        self._begin()

    def _begin(self):
        self.executor = ProcessPoolExecutor(self.number, initializer=_begin_process)
        self.executor.submit(int).result()

    def submit(self, function: Callable, *arguments) -> Future:
        try:
            return self.executor.submit(function, *arguments)
        except BrokenExecutor:
            self._begin()
            return self.executor.submit(function, *arguments)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True):
        """End the processes at once, even where a decoder is stuck, and give up what is under way."""
        # No public name of Python before 3.14 tells the processes of an executor.
        for process in self.executor._processes.values():
            process.kill()
        # Where one was killed while it sent a result, the rest of that would be waited for as long as it can come.
        self.executor._result_queue._writer.close()
        self.executor.shutdown(wait, cancel_futures=cancel_futures)


def result_of(future: Future, function: Callable, arguments: tuple) -> Any:
    """The result of a call, which is made again in a process of its own if the first one was killed.

    Raises:
        BrokenExecutor: the second one was killed too.
    """
    try:
        return future.result()
    except BrokenExecutor:
        with DecodingProcesses(1) as alone:
            return alone.submit(function, *arguments).result()


def _begin_process():
    # Ctrl-C reaches the main process too, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def in_own_process(function: Callable[..., Iterator], arguments: tuple) -> Iterator[Any]:
    """The items of a generator that runs in a process of its own, one item ahead.

    Raises:
        BrokenExecutor: the process was killed.
    """
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send, args=(sending, function, arguments), daemon=True)
    process.start()
    sending.close()
    try:
        while (item := receiving.recv()) is not None:
            yield item
    except EOFError as error:
        raise BrokenExecutor(KILLS) from error
    finally:
        process.kill()
        process.join()
        receiving.close()


def _send(sending: Connection, function: Callable[..., Iterator], arguments: tuple):
    _begin_process()
    for item in function(*arguments):
        sending.send(item)
    sending.send(None)


def read_ahead(
    executor: Executor | None, function: Callable[..., Found], tasks: Iterable[tuple[int, tuple]], ahead: int
) -> Iterator[tuple[int, tuple, Found | None]]:
    """Key, arguments and result of each task, in order.

    Up to `ahead` results are computed before they are asked for, but no more than fit in READ_AHEAD_BYTES if all are as
    large as the largest of the latest ones. The result is None where the recording kills its process.
    """
    if executor is None:
        yield from ((key, arguments, function(*arguments)) for key, arguments in tasks)
        return
    running, sizes = deque(), deque(maxlen=ahead)

    def first() -> tuple[int, tuple, Found | None]:
        key, arguments, future = running.popleft()
        try:
            found = result_of(future, function, arguments)
        except BrokenExecutor:
            return key, arguments, None
        sizes.append(found.num_bytes)
        return key, arguments, found

    def is_full() -> bool:
        # Before the first results show how large they are, one task for each process is enough.
        at_once = READ_AHEAD_BYTES // max(1, *sizes) if sizes else ahead // READ_AHEAD
        return len(running) >= max(1, min(ahead, at_once))

    try:
        for key, arguments in tasks:
            running.append((key, arguments, executor.submit(function, *arguments)))
            while is_full():
                yield first()
        while running:
            yield first()
    finally:
        for _, _, future in running:
            future.cancel()


def read_windows(
    executor: Executor | None, cut: Cut, inputs: Iterable[tuple[int, Input, bytes | None]], ahead: int
) -> Iterator[tuple[int, Window]]:
    """The windows of all recordings in order, which is the same for any number of processes.

    Args:
        inputs: unit, recording, and its content where it lies in a dataset; the result has the unit again.
    """
    tasks = ((unit, (cut, item, content)) for unit, item, content in inputs)
    for unit, task, found in read_ahead(executor, decode_first, tasks, ahead):
        _, item, _ = task
        found = found or Found([Stretch(range(1), error=KILLS)])
        rest = streamed_rest(executor, task) if found.rest is None else read_rest(executor, task, found.rest, ahead)
        number = found.expected if found.rest is None else max(1, found.rest.stop)
        for stretch in itertools.chain(found.stretches, rest, filter(None, [found.missing])):
            for window in cut.windows(item, stretch):
                if number is not None:
                    window.share = (1 if window.error is None else len(stretch.numbers)) / number
                yield unit, window


def read_rest(executor: Executor | None, task: tuple, numbers: range, ahead: int) -> Iterator[Stretch]:
    """The windows of these numbers, of a recording whose first one has been read."""
    cut, *_ = task
    failed = 0
    parts = ((part.stop, (*task, part)) for part in cut.parts(numbers))
    for stop, (*_, part), found in read_ahead(executor, decode_part, parts, ahead):
        stretches = [Stretch(part, error=KILLS)] if found is None else found.stretches
        yield from stretches
        failed = failed + 1 if all(stretch.error for stretch in stretches) else 0
        if failed == FAILED_PARTS and stop < numbers.stop:
            # The last reason holds for the rest too, so that one row tells of all of it.
            yield Stretch(range(stop, numbers.stop), error=stretches[-1].error)
            return


def streamed_rest(executor: Executor | None, task: tuple) -> Iterator[Stretch]:
    """The windows behind the first part, of a recording whose length nothing tells."""
    cut, *_ = task
    number = cut.part_windows
    parts = stream(*task) if executor is None else in_own_process(stream, task)
    try:
        for found in itertools.islice(parts, 1, None):
            yield from found.stretches
            number = found.stretches[-1].numbers.stop
    except BrokenExecutor:
        yield Stretch(range(number, number + 1), error=KILLS)
