"""Recordings to windows of samples, in processes of their own; the first stage of `bat-audio embed`."""

import contextlib
import io
import itertools
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
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import fsspec
import numpy as np
import torch

from bat_audio.configuration_bat import BatConfig
from bat_audio.processing_bat import (
    MAX_AMPLITUDE,
    MIN_FILE_RATE,
    UNKNOWN_FORMAT,
    UNKNOWN_FRAMES,
    announced_frames,
    load_audio,
)
from bat_audio.tools.data import require
from bat_audio.tools.embed_inputs import Input, is_address
from bat_audio.tools.embed_settings import EmbedSettings

PART_SECONDS = 120  # of a long recording that are read at once; to find a place in an MP3 file takes long
BLOCK_SECONDS = 0.5  # that are decoded at once where the length is not known; a broken end costs one such block
MISSING_SECONDS = 0.1  # that a decoder may give less than the header tells
FAILED_PARTS = 3  # in a row after which a recording is given up; a damaged header may tell any length
KILLS = "Reading it kills the process, which a lack of memory may do too."
READ_AHEAD = 4  # times the number of processes
READ_AHEAD_BYTES = 1 << 29  # of samples that are decoded before they are asked for


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

    def place(self, item: Input, number: int, windows: int = 1) -> tuple[float, float | None]:
        """Start and duration of so many windows, in seconds; None reaches to the end of the file."""
        start = item.start + number * self.hop / self.rate
        if self.segment is None:
            return start, item.duration
        left = math.inf if item.duration is None else item.start + item.duration - start
        return start, min(self.samples_of(windows) / self.rate, left)

    def samples_of(self, windows: int) -> int:
        """From the start of the first to the end of the last."""
        return (windows - 1) * self.hop + self.segment

    def broken(self, item: Input, number: int, reason: str, windows: int = 1) -> Clip:
        start, duration = self.place(item, number, windows)
        return Clip(item, start, None if duration is None else start + duration, error=reason)

    @property
    def part_windows(self) -> int:
        """Windows of a part of about PART_SECONDS."""
        return max(1, PART_SECONDS * self.rate // max(self.hop, 1))

    def parts(self, numbers: range) -> Iterator[range]:
        """The numbers of windows, part by part; a damaged header may tell of billions."""
        size = self.part_windows
        return (numbers[first : first + size] for first in range(0, len(numbers), size))

    def clips(self, item: Input, stretch: "Stretch") -> Iterator[Clip]:
        """The windows of a stretch; broken ones are one clip."""
        if stretch.error is not None:
            yield self.broken(item, stretch.numbers[0], stretch.error, len(stretch.numbers))
            return
        for place, number in enumerate(stretch.numbers):
            samples = stretch.samples[place * self.hop :][: self.segment]
            start, _ = self.place(item, number)
            yield Clip(item, start, start + len(samples) / self.rate, samples)

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
    """

    stretches: list[Stretch]
    rest: range | None = range(0)

    @property
    def num_bytes(self) -> int:
        return sum(stretch.samples.nbytes for stretch in self.stretches if stretch.samples is not None)


def decode_first(cut: Cut, item: Input, content: bytes | None) -> Found:
    """The first window of a recording, or where nothing tells the length its first part; a broken one says why.

    Args:
        content: of the sound inside a dataset.
    """
    first = range(1)
    if item.problem is not None:
        return Found([Stretch(first, error=item.problem)])
    try:
        with opened(item.path, content) as source:
            seconds = known_seconds(source)
    except Exception as error:  # whatever a decoder makes of a damaged file, the others go on
        reason = decode_part(cut, item, content, first).stretches[0].error  # load_audio says more
        return Found([Stretch(first, error=reason or _reason(item, error))])
    if seconds is None:
        return next(stream(cut, item, content))
    found = decode_part(cut, item, content, first)
    seconds -= item.start
    if item.duration is not None:
        seconds = min(seconds, item.duration)
    samples = found.stretches[0].samples
    if cut.segment is None and samples is not None and len(samples) < (seconds - MISSING_SECONDS) * cut.rate:
        reason = f"truncated: it holds {len(samples) / cut.rate:.2f} of {seconds:.2f} s."
        return Found([Stretch(first, error=reason)])
    return replace(found, rest=range(1, cut.num_windows(round(seconds * cut.rate))))


def decode_part(cut: Cut, item: Input, content: bytes | None, numbers: range) -> Found:
    """The windows of these numbers; broken ones say why."""
    if len(numbers) > 1 and cut.hop <= cut.segment:
        with contextlib.suppress(Exception):  # one of the windows is broken, and will say why
            return Found([_read(cut, item, content, numbers)])
    stretches = []
    for number in numbers:
        window = range(number, number + 1)
        try:
            stretches.append(_read(cut, item, content, window))
        except Exception as error:  # as above
            stretches.append(Stretch(window, error=_reason(item, error)))
    return Found(stretches)


def _read(cut: Cut, item: Input, content: bytes | None, numbers: range) -> Stretch:
    start, duration = cut.place(item, numbers[0], len(numbers))
    with opened(item.path, content) as source:
        samples = load_any(source, start, duration, cut.rate).numpy()
    if problem := cut.problem(samples, len(numbers)):
        raise ValueError(problem)
    return Stretch(numbers, samples)


def _reason(item: Input, error: Exception) -> str:
    # load_audio names the file, which the table's columns do, or the type of an object that has no name.
    return re.sub(rf"^({re.escape(item.path)}|<\w+>): ", "", str(error)) or type(error).__name__


def stream(cut: Cut, item: Input, content: bytes | None) -> Iterator[Found]:
    """The windows of a recording whose length nothing tells, decoded once from its start to its end, part by part.

    What cannot be read ends it, and says why.
    """
    size = cut.part_windows
    enough = math.inf if cut.segment is None else max(cut.samples_of(size), size * cut.hop)
    pieces, held, number, error = [], 0, 0, None

    def windows(count: int) -> Found:
        """Of the samples that are held; a broken window does not spoil the others."""
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
        with opened(item.path, content) as source:
            for block in sound_blocks(source, item.start, item.duration, cut.rate):
                pieces.append(block)
                held += len(block)
                while held >= enough:
                    yield replace(windows(size), rest=None)
                    pieces = [np.concatenate(pieces)[size * cut.hop :]]
                    number, held = number + size, len(pieces[0])
    except Exception as failure:  # as above
        error = _reason(item, failure)
    if error is None:
        count = cut.num_windows(number * cut.hop + held) - number
    else:  # the last window is not whole
        count = 0 if cut.segment is None or held < cut.segment else (held - cut.segment) // cut.hop + 1
    found = windows(count) if count > 0 else Found([])
    if error is not None:
        number += count
        behind = " Nothing behind it was read." if number else ""
        found.stretches.append(Stretch(range(number, number + 1), error=error + behind))
    if found.stretches:
        yield found


@contextlib.contextmanager
def opened(path: str, content: bytes | None) -> Iterator[str | io.IOBase]:
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


def load_any(source: str | io.IOBase, start: float, duration: float | None, rate: int) -> torch.Tensor:
    """As `load_audio`; what libsndfile does not know (m4a, webm, ...) is read by the ffmpeg program."""
    try:
        return load_audio(source, start, duration, rate)
    except ValueError as error:
        if getattr(error.__cause__, "code", None) != UNKNOWN_FORMAT:  # a damaged file, which is not to be repaired
            raise
        try:
            samples = np.concatenate(list(_ffmpeg_blocks(source, start, duration, rate)))
        except ValueError as ffmpeg_error:
            raise ValueError(f"{error} Nor could the ffmpeg program read it: {ffmpeg_error}.") from error
        if not np.isfinite(samples).all():
            raise ValueError("holds NaN or infinite samples.") from error
        return torch.from_numpy(samples)


def sound_blocks(source: str | io.IOBase, start: float, duration: float | None, rate: int) -> Iterator[np.ndarray]:
    """The samples of `load_any` as they are decoded, from the file's start to where no more come.

    Raises:
        ValueError, soundfile.LibsndfileError: it cannot be read, or not on from here.
    """
    soundfile, soxr = require("soundfile", "embed"), require("soxr", "embed")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(soundfile.SoundFile(source))
        except soundfile.LibsndfileError as error:
            if error.code != UNKNOWN_FORMAT:
                raise
            try:
                yield from _ffmpeg_blocks(source, start, duration, rate)
            except ValueError as ffmpeg_error:
                raise ValueError(
                    f"cannot be read as audio: {error.error_string.rstrip('.')}. Nor could the ffmpeg program read it: "
                    f"{ffmpeg_error}."
                ) from error
            return
        if is_mp3 := file.format == "MP3":
            endless = EndlessFile(stack.enter_context(open(source, "rb")) if isinstance(source, str) else source)
            file = stack.enter_context(soundfile.SoundFile(endless))
        if file.samplerate < MIN_FILE_RATE:
            raise ValueError(f"its rate of {file.samplerate} Hz is too low for sound.")
        file.seekable = lambda: False  # soundfile seeks after every read, which fails at an end that no header tells
        resampler = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32", quality="HQ")
        skip, left, is_last = round(start * rate), math.inf if duration is None else round(duration * rate), False
        while left > 0 and not is_last:
            try:
                block = file.read(round(BLOCK_SECONDS * file.samplerate), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError:
                if not (is_mp3 and endless.is_at_end):  # an MP3 stream may break off inside a frame
                    raise
                block = np.zeros((0, 1), np.float32)
            is_last = len(block) == 0
            samples = resampler.resample_chunk(block.mean(axis=1), last=is_last)
            part = samples[skip:][: min(left, len(samples))]
            skip, left = max(0, skip - len(samples)), left - len(part)
            yield part


class EndlessFile(io.RawIOBase):
    """An MP3 file that seems to be 64 times as long.

    Where the header does not tell an MP3's length, libsndfile estimates it from the size of the file and the first
    frame's bit rate, 320 kbit/s at most, and reads no further. From this file it reads to where no more comes.
    """

    def __init__(self, file: io.IOBase):
        self.file = file
        self.real_size = file.seek(0, os.SEEK_END)
        self.place = 0

    @property
    def is_at_end(self) -> bool:
        return self.place >= self.real_size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: 64 * self.real_size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer) -> int:
        left = max(0, 64 * self.real_size - self.place)
        if left <= 128:  # where there may be a tag, which libsndfile looks for
            content = bytes(min(left, len(buffer)))
        else:
            self.file.seek(self.place)
            content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def known_seconds(source: str | io.IOBase) -> float | None:
    """The length that the header tells; None where there is none, or only an estimate.

    Raises:
        soundfile.LibsndfileError: a damaged file.
    """
    soundfile = require("soundfile", "embed")
    try:
        with soundfile.SoundFile(source) as file:
            frames, rate, is_mp3 = announced_frames(file), file.samplerate, file.format == "MP3"
    except soundfile.LibsndfileError as error:
        if error.code != UNKNOWN_FORMAT:
            raise
        return None
    if frames > UNKNOWN_FRAMES:
        return None
    if is_mp3:
        with (
            open(source, "rb") if isinstance(source, str) else contextlib.nullcontext(source) as content,
            soundfile.SoundFile(EndlessFile(content)) as file,
        ):
            if file.frames != frames:  # so it was estimated
                return None
    return frames / rate


def seconds_of(source: str | io.IOBase) -> float:
    """The length, where need be as libsndfile or ffmpeg estimates it."""
    soundfile = require("soundfile", "embed")
    try:
        with soundfile.SoundFile(source) as file:
            if file.frames > UNKNOWN_FRAMES:
                raise ValueError("its header tells no length; convert it.")
            return file.frames / file.samplerate
    except soundfile.LibsndfileError as error:
        if error.code != UNKNOWN_FORMAT:
            raise
        show = ["-show_entries", "format=duration", "-of", "json"]
        about = json.loads(b"".join(_run_on_file(["ffprobe", *show], source)))["format"]
        if "duration" not in about:
            raise ValueError("its header tells no length; convert it.") from error
        return float(about["duration"])


def _ffmpeg_blocks(source: str | io.IOBase, start: float, duration: float | None, rate: int) -> Iterator[np.ndarray]:
    part = ["-ss", f"{start:.6f}", *([] if duration is None else ["-t", f"{duration:.6f}"])]
    form = ["-map", "0:a:0", "-ac", "1", "-ar", str(rate), "-f", "f32le", "-"]
    is_empty = True
    for content in _run_on_file(["ffmpeg", "-nostdin", "-xerror", *part, "-i"], source, form):
        is_empty = False
        yield np.frombuffer(content, dtype="<f4").copy()
    if is_empty:
        raise ValueError(f"it holds nothing from {start} s on")


def _run_on_file(command: list[str], source: str | io.IOBase, options: Iterable[str] = ()) -> Iterator[bytes]:
    """What a program of ffmpeg prints about a file, in blocks, or a ValueError with the reason."""
    with contextlib.ExitStack() as stack:
        if not isinstance(source, str):  # ffmpeg has to seek in some formats
            copy = stack.enter_context(tempfile.NamedTemporaryFile())
            source.seek(0)
            shutil.copyfileobj(source, copy)
            copy.flush()
            source = copy.name
        quiet = ["-v", "error", "-protocol_whitelist", "file"]  # a playlist in the file must not reach for the network
        said = stack.enter_context(tempfile.TemporaryFile())
        try:
            process = subprocess.Popen(
                [command[0], *quiet, *command[1:], f"file:{source}", *options], stdout=subprocess.PIPE, stderr=said
            )
        except FileNotFoundError as error:
            raise ValueError(f"{command[0]} is not installed") from error
        with process:
            try:
                while content := process.stdout.read(1 << 20):
                    yield content
            except BaseException:  # above all a GeneratorExit, when no more is wanted
                process.kill()
                raise
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or [f"status {process.returncode}"]
            reason = re.sub(r"\[[^]]* @ 0x\w+\] ", "", lines[0]).replace(f"file:{source}", "the file")
            raise ValueError(reason.rstrip(".").removeprefix("the file: "))


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


def in_own_process(function: Callable[..., Iterator], arguments: tuple) -> Iterator[Any]:
    """What a generator yields, which runs in a process of its own and is one item ahead.

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

    As many as `ahead` are computed before they are asked for, but not more than READ_AHEAD_BYTES of samples, if they
    are as large as the largest of the latest ones. The result is None where the recording kills its process.
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
        # Before the first results are there, one for each process.
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
        found = found or Found([Stretch(range(1), error=KILLS)])
        rest = streamed_rest(executor, task) if found.rest is None else read_rest(executor, task, found.rest, ahead)
        for stretch in itertools.chain(found.stretches, rest):
            yield from ((unit, clip) for clip in cut.clips(item, stretch))


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
            seconds = failed * PART_SECONDS
            reason = f"Not read any further, after {seconds} s that cannot be read."
            yield Stretch(range(stop, numbers.stop), error=reason)
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
