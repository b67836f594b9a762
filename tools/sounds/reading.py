"""Recordings of any format, from a file, an address or the bytes inside a dataset, to mono samples at one rate."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import fsspec
import numpy as np
import torch

from bat_audio.processing_bat import MIN_FILE_RATE, UNKNOWN_FORMAT, UNKNOWN_FRAMES, announced_frames, load_audio
from bat_audio_tools.machine import require
from bat_audio_tools.names import is_address


@dataclass(frozen=True)
class Input:
    """A recording, or the part of it that begins at `start` and lasts `duration`.

    Args:
        id: as in the list of files, else the path.
        path: as it was given, or an address of fsspec; of a sound inside a dataset the dataset's name and the row.
        start, duration: the part, in seconds; a duration of None reaches to the end of the file.
        row: of the sound inside a dataset.
        problem: why it cannot be embedded, where that is known before it is read.
    """

    id: str
    path: str
    start: float = 0.0
    duration: float | None = None
    row: int | None = None
    problem: str | None = None

    def content(self, sounds: "datasets.Dataset | None") -> bytes | None:  # noqa: F821
        """The bytes of a sound inside the dataset `sounds` of `without_decoding`; None for any other recording."""
        return None if self.row is None else sounds[self.row]["audio"]["bytes"]


# Where the length is not known, so many seconds are decoded at once, and a broken end costs one such block.
BLOCK_SECONDS = 0.5


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
    """Read as `load_audio` does, and with the ffmpeg program what libsndfile does not know (m4a, webm, ...)."""
    try:
        return load_audio(source, start, duration, rate)
    except ValueError as error:
        if getattr(error.__cause__, "code", None) != UNKNOWN_FORMAT:  # A damaged file is not for ffmpeg to repair.
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
            with _quiet_decoder():
                file = stack.enter_context(soundfile.SoundFile(endless))
        if file.samplerate < MIN_FILE_RATE:
            raise ValueError(f"its rate of {file.samplerate} Hz is too low for sound.")
        # Otherwise soundfile would seek after every read, which fails at an end that no header tells.
        file.seekable = lambda: False
        resampler = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32", quality="HQ")
        skip, left, is_last = round(start * rate), math.inf if duration is None else round(duration * rate), False
        while left > 0 and not is_last:
            try:
                block = file.read(round(BLOCK_SECONDS * file.samplerate), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError:
                if not (is_mp3 and endless.is_at_end):  # An MP3 stream may break off inside a frame.
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
        if left <= 128:  # libsndfile looks for a tag at the end, and zeros are none.
            content = bytes(min(left, len(buffer)))
        else:
            self.file.seek(self.place)
            content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


@contextlib.contextmanager
def _quiet_decoder() -> Iterator[None]:
    """Keep back what libmpg123 says to stderr about an `EndlessFile`: that its size differs from the header's."""
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


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
            _quiet_decoder(),
            soundfile.SoundFile(EndlessFile(content)) as file,
        ):
            if file.frames != frames:  # The length was only estimated.
                return None
    return frames / rate


def seconds_of(source: str | io.IOBase) -> float:
    """The length in seconds, which libsndfile or ffmpeg estimates where the header does not tell it."""
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
        if not isinstance(source, str):  # ffmpeg gets a copy, because it has to seek in some formats.
            copy = stack.enter_context(tempfile.NamedTemporaryFile())
            source.seek(0)
            shutil.copyfileobj(source, copy)
            copy.flush()
            source = copy.name
        # A playlist in the file must not reach for the network.
        quiet = ["-v", "error", "-protocol_whitelist", "file"]
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
            except BaseException:  # This is most often a GeneratorExit, when no more is wanted.
                process.kill()
                raise
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or [f"status {process.returncode}"]
            reason = re.sub(r"\[[^]]* @ 0x\w+\] ", "", lines[0]).replace(f"file:{source}", "the file")
            raise ValueError(reason.rstrip(".").removeprefix("the file: "))
