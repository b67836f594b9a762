"""Sound files of any format as mono waveforms at one rate.

`load_audio` reads a file or a part of it at once, and `Sound` decodes block by block, so that a recording of any length
takes little memory.

Formats that tell their exact length (WAV, FLAC, AIFF, OGG, ...) are decoded by libsndfile, of the package soundfile.
All others (MP3, M4A, WebM, WMA, ...), and what libsndfile refuses, are decoded by FFmpeg's libraries, which the package
av (PyAV) brings along; no program has to be installed. soxr resamples all of them.

A file is read as data: FFmpeg gets an open file and no means to open another one, so that a playlist or script leads
nowhere, and memory is taken for samples that were decoded, never for those that a header announces.

Shapes: C channels.
"""

import contextlib
import functools
import importlib
import io
import itertools
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

SAMPLE_RATE = 16000  # Hz
MOST_SAMPLES = 2**62  # times behind this are cut to it; libsndfile tells a longer length where a header tells none
MOST_RATE = 10**7  # Hz; more could only exhaust the memory
MIN_FILE_RATE = 1000  # Hz; a damaged header can give any rate, and upsampling from 1 Hz exhausts the memory
BLOCK_SAMPLES = 1 << 18  # so many samples of all channels together are decoded at once
FILTER_SECONDS = 0.1  # the resampler's filter reaches less far to each side
MISSING_SECONDS = 0.1  # a decoder may give so much less than the header tells
OPPOSITE_POWER = 1e-3  # channels cancel each other out where their mean has less than this share of their power
LARGEST_RIFF = 2**32 + 7  # bytes that the size fields of a WAV file can tell
# Recorders that cannot know the length beforehand write one of these sizes.
OPEN_SIZES = {0, 0x70000000, 0x7FFF0000, *range(0x7FFFF000, 0x80000001), *range(0xFFFFF000, 0x100000000)}
# Files that begin with these tell their exact length, and are for libsndfile.
EXACT_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"FORM", b".snd", b"caff", b"OggS")
# What FFmpeg may take a file for: containers of sound, no playlists, scripts, pictures or subtitles.
CONTAINERS = (
    "aa,aac,ac3,adx,aiff,amr,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,gsm,iff,loas,matroska,webm,mlp,"
    "mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,mxf,nut,ogg,oma,rm,shn,tak,truehd,tta,voc,vqf,w64,wav,wv,xwma"
)
# In these, FFmpeg's decoders find the next whole frame behind tags, other songs and damage.
RAW_STREAMS = {"aac", "ac3", "dts", "eac3", "loas", "mp3", "mpeg", "mpegts"}
# The lengths that these tell are exact, so that a file which holds less is truncated.
EXACT_LENGTHS = {"ape", "caf", "flac", "mov,mp4,m4a,3gp,3g2,mj2", "tak", "tta", "wv"}
# In these, FFmpeg goes to any place at once; in EXACT_TIMES it knows which sample a packet begins with.
SEEKABLE = {"caf", "flac", "mov,mp4,m4a,3gp,3g2,mj2", "tta", "wv"}
EXACT_TIMES = {*SEEKABLE, "aac", "mp3"}
# From SETTLING_SECONDS behind any packet on, these decode the same samples as from the file's start.
SETTLING = {"aac", "alac", "flac", "mp3", "mp3float", "opus", "tta", "vorbis", "wavpack"}
SETTLING_SECONDS = 1.0
# In these, times that run ahead of the samples tell that some are missing.
TIMED = {"matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "ogg"}
MOST_CHUNKS = 1000  # a file has fewer tags and chunks before its samples; zeros could pass for millions of empty ones
MP3_PADDING = 0.2  # seconds, more than encoders of MP3 add
MOST_DAMAGED = 16  # a raw stream may have so many pieces that cannot be decoded more than it has others


def load_audio(
    source: str | os.PathLike | bytes | bytearray | BinaryIO,
    start: float = 0.0,
    duration: float | None = None,
    sampling_rate: int = SAMPLE_RATE,
    channel: str | int = "mean",
) -> torch.Tensor:
    """Read a sound file of any format as mono float32 samples, in -1..1 for most files: (samples,).

    Resampled by soxr HQ as in BAT's training. Files that miss more than 0.1 s of what their header tells are refused,
    except for parts that are there; a truncated MP3 file gives a warning instead.

    Args:
        source: path, the bytes of a file, or a binary file object, which is read from its start.
        start: where to begin, in seconds; only the asked-for part of the file is decoded where the format allows it.
        duration: seconds to read; None, or more than there is, reads to the end.
        sampling_rate: rate of the result, in Hz.
        channel: "mean" averages the channels, with a warning where they cancel each other out; a number from 0 on
            takes one of them.

    Raises:
        FileNotFoundError: no file at this path.
        ValueError: not a readable sound file, no samples, samples that are not finite, no such channel, or a start or
            duration outside the file; the message names the file and the reason.
        ImportError: soundfile, soxr or av is missing.
    """
    with Sound(source) as sound:
        waveform = np.concatenate(list(sound.waveform(start, duration, sampling_rate, channel)))
        if sound.problem and duration is None:
            logger.warning(f"{sound.name}: {sound.problem}.")
    if not np.isfinite(waveform).all():
        raise ValueError(f"{sound.name}: holds NaN or infinite samples.")
    return torch.from_numpy(waveform)


class Sound:
    """An open sound file, which is decoded block by block; a context manager, as `open` is.

        with Sound("clip.m4a") as sound:
            for block in sound.waveform(): ...

    Args:
        source: as of `load_audio`.

    Attributes:
        name: of the file, for messages.
        rate, channels: of the file, in Hz and as a number.
        seconds: its length by its header; None where only decoding tells it, as in all that FFmpeg decodes.
        estimated_seconds: the same, or what the header or the bit rate tell about it; None where nothing does.
        present_seconds: how much of that can be there, by the size of the file; less in a truncated one.
        problem: why more than 0.1 s of it are not there; else None. FFmpeg's formats tell it after they are decoded.

    Raises:
        FileNotFoundError, ValueError, ImportError: as of `load_audio`.
    """

    def __init__(self, source: str | os.PathLike | bytes | bytearray | BinaryIO):
        is_path = isinstance(source, str | os.PathLike)
        self.name = os.fspath(source) if is_path else str(getattr(source, "name", None) or f"<{type(source).__name__}>")
        with contextlib.ExitStack() as stack:
            file = _open_file(source, self.name, stack)
            with self._named_errors():
                self._decoder = _find_decoder(file, self.name if is_path else None)
                stack.callback(self._decoder.close)
                if self._decoder.rate < MIN_FILE_RATE:
                    raise ValueError(f"its rate of {self._decoder.rate} Hz is too low for sound")
            self._stack = stack.pop_all()
        self._is_read = False
        self.rate, self.channels, self.problem = self._decoder.rate, self._decoder.channels, self._decoder.problem
        frames, present = self._decoder.frames, self._decoder.present
        self.seconds = None if frames is None else frames / self.rate
        self.estimated_seconds = self._decoder.estimated_seconds if frames is None else self.seconds
        self.present_seconds = None if frames is None else present / self.rate

    def __enter__(self) -> "Sound":
        return self

    def __exit__(self, *_):
        self._stack.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name}: cannot be read as audio: {str(error).rstrip('.')}.") from error

    def measure(self) -> float:
        """The length in seconds. Where the header does not tell it, the file is read, but not decoded; ask once.

        Raises:
            ValueError: it cannot be read, or is truncated.
        """
        with self._named_errors():
            if self.problem:
                raise ValueError(self.problem)
            return self._decoder.measure()

    def waveform(
        self,
        start: float = 0.0,
        duration: float | None = None,
        sampling_rate: int = SAMPLE_RATE,
        channel: str | int = "mean",
    ) -> Iterator[np.ndarray]:
        """The samples of `load_audio` in blocks (samples,) as they are decoded. To be asked for once.

        Raises:
            ValueError: as of `load_audio`, as soon as the sound cannot be read on, or where there is none.
        """
        if not (0 <= start < math.inf and (duration is None or 0 < duration < math.inf)):
            raise ValueError(
                f"{self.name}: start={start} must be at least 0 s and duration={duration} above 0 s, both finite."
            )
        if not isinstance(sampling_rate, int) or not 0 < sampling_rate <= MOST_RATE:
            raise ValueError(
                f"{self.name}: sampling_rate={sampling_rate!r} is no rate in Hz; expected 1 to {MOST_RATE}."
            )
        if self._is_read:
            raise ValueError(f"{self.name}: its samples have been asked for already; open it again.")
        self._is_read = True
        mix = _Mixer(channel, self.channels)
        # The part is decoded with a margin for the resampler's filter, from a sample that lies on both rates' grids, so
        # that it equals the same part of the whole file.
        common = math.gcd(self.rate, sampling_rate)
        grid, target_grid = self.rate // common, sampling_rate // common
        first = max(0, _samples(start - FILTER_SECONDS, self.rate)) // grid * grid
        stop = MOST_SAMPLES if duration is None else _samples(start + duration + FILTER_SECONDS, self.rate)
        skip = _samples(start, sampling_rate) - first // grid * target_grid
        left = MOST_SAMPLES if duration is None else _samples(duration, sampling_rate)
        resampler = _library("soxr").ResampleStream(self.rate, sampling_rate, 1, dtype="float32", quality="HQ")
        is_empty = True
        try:
            with self._named_errors():
                if self.seconds is not None and start >= self.seconds:
                    raise ValueError(f"{self._decoder.frames} samples at {self.rate} Hz hold nothing from {start} s on")
                for block in itertools.chain(self._decoder.blocks(first, stop), [None]):
                    mono = np.zeros(0, np.float32) if block is None else mix(block)
                    samples = resampler.resample_chunk(mono, last=block is None)
                    part = samples[skip:][:left]
                    skip, left = max(0, skip - len(samples)), left - len(part)
                    if len(part):
                        is_empty = False
                        yield part
                self.problem = self._decoder.problem
                if remark := self._decoder.remark:
                    logger.warning_once(f"{self.name}: {remark}.")
                if is_empty:
                    raise ValueError(
                        f"it holds nothing from {start} s on" + ("" if duration is None else f" for {duration} s")
                    )
        finally:
            del resampler  # A traceback would keep it, and nanobind would complain of that when the process ends.
        if mix.cancels:
            logger.warning_once(
                f"{self.name}: its channels cancel each other out, so that their mean is next to silence. Take one of "
                "them: channel=0 (--channel 0)."
            )


def _samples(seconds: float, rate: int) -> int:
    return round(min(seconds * rate, MOST_SAMPLES))


class _Mixer:
    """Blocks (n, C) of a file to mono blocks (n,)."""

    def __init__(self, channel: str | int, channels: int):
        is_number = isinstance(channel, int | np.integer) and not isinstance(channel, bool)
        if channel != "mean" and not (is_number and channel >= 0):
            raise ValueError(f"channel={channel!r} is unknown; expected 'mean' or the number of a channel from 0 on.")
        self.channel = channel
        self.mean_power = self.power = 0.0

    def __call__(self, block: np.ndarray) -> np.ndarray:
        channels = block.shape[1]
        if self.channel != "mean":
            if self.channel >= channels:
                raise ValueError(f"channel={self.channel} is none of its {channels}, which are counted from 0 on")
            return np.ascontiguousarray(block[:, self.channel])
        mean = block.mean(axis=1)
        if channels > 1:
            self.mean_power += float(np.vdot(mean, mean))
            self.power += float(np.vdot(block, block)) / channels
        return mean

    @property
    def cancels(self) -> bool:
        return self.mean_power < OPPOSITE_POWER * self.power


is_forked = False  # true in processes that were forked after the import of this file


def _note_fork():
    global is_forked
    is_forked = True


if hasattr(os, "register_at_fork"):  # Windows has no forks.
    os.register_at_fork(after_in_child=_note_fork)


def fork_safe(compute: Callable) -> Callable:
    """Let a function run in one thread where it is called in a forked process, and leave all else as it is.

    A fork copies no threads. If the parent has computed with several, torch would wait for them for ever.
    """

    @functools.wraps(compute)
    def compute_safely(*args, **kwargs):
        if not is_forked:
            return compute(*args, **kwargs)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return compute(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return compute_safely


@fork_safe
def resample(waveform: torch.Tensor, orig_rate: int, new_rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Resample (..., samples) on the waveform's own device.

    CPU tensors go through soxr HQ, the resampler of BAT's training. Other devices use torchaudio's kaiser-best filter,
    whose features differ from soxr's by at most 0.1 of their 0..1 range near half the sampling rate.
    """
    if not isinstance(waveform, torch.Tensor) or not waveform.is_floating_point() or waveform.numel() == 0:
        got = f"{tuple(waveform.shape)} and {waveform.dtype}" if isinstance(waveform, torch.Tensor) else type(waveform)
        raise ValueError(f"resample got {got}; expected a floating-point tensor (..., samples) that is not empty.")
    if orig_rate == new_rate:
        return waveform
    if waveform.device.type != "cpu":
        return _resample_kaiser_best(waveform, orig_rate, new_rate)
    soxr = _library("soxr")
    rows = waveform.to(torch.promote_types(waveform.dtype, torch.float32)).reshape(-1, waveform.shape[-1])
    resampled = [torch.from_numpy(soxr.resample(row.numpy(), orig_rate, new_rate, quality="HQ")) for row in rows]
    return torch.stack(resampled).reshape(*waveform.shape[:-1], -1).to(waveform.dtype)


def _resample_kaiser_best(waveform: torch.Tensor, orig_rate: int, new_rate: int) -> torch.Tensor:
    try:
        import torchaudio.functional
    except (ImportError, OSError, RuntimeError) as error:  # A build for another torch raises any of them.
        raise ImportError(
            f"Resampling a tensor on {waveform.device} needs a working torchaudio ({error}). Install a torch and "
            "torchaudio that belong together (torchaudio 2.11 works with torch 2.11 to 2.14), or resample on the CPU."
        ) from error
    # By default cuDNN's convolutions round to TF32, which would move samples by 0.001.
    cudnn = torch.backends.cudnn
    with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
        return torchaudio.functional.resample(
            waveform,
            orig_rate,
            new_rate,
            lowpass_filter_width=64,
            rolloff=0.9475937167399596,
            resampling_method="sinc_interp_kaiser",
            beta=14.769656459379492,
        )


def _library(name: str):
    """The module soundfile, soxr or av, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise ImportError(f"Reading and resampling this audio needs {name} ({error}): pip install {name}") from error


def _open_file(source, name: str, stack: contextlib.ExitStack) -> BinaryIO:
    """The source as a binary file that can be sought in, closed by the stack if it is opened here."""
    if isinstance(source, str | os.PathLike):
        try:
            mode = os.stat(source).st_mode
        except PermissionError:
            raise
        except (OSError, ValueError) as error:  # A name may be too long, or hold a zero byte.
            raise FileNotFoundError(f"{name}: no such file.") from error
        if stat.S_ISDIR(mode):
            raise FileNotFoundError(f"{name}: a folder; name the files in it.")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{name}: a pipe, socket or device; name a file, or pass an open binary file.")
        return stack.enter_context(open(source, "rb"))
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    content = None
    if callable(getattr(source, "read", None)):
        try:
            if source.seekable():
                source.seek(0)
                if isinstance(source.read(0), bytes):
                    return source
        except (AttributeError, OSError, TypeError):  # It is read into memory instead.
            pass
        content = source.read()
    if not isinstance(content, bytes | bytearray):
        got = f"{type(source).__name__}" + ("" if content is None else f", whose read() gives {type(content).__name__}")
        if hasattr(content, "close"):  # The coroutine of an asynchronous file would warn that nobody awaits it.
            content.close()
        raise ValueError(
            f"{name}: got a sound file as {got}; expected a path, the bytes of a file, or a file opened in binary mode."
        )
    return io.BytesIO(content)


def _behind_tag(file: BinaryIO) -> int:
    """Where the file begins behind ID3 tags, which some programs write before any format."""
    begin = 0
    for _ in range(MOST_CHUNKS):
        file.seek(begin)
        head = file.read(10)
        if not head.startswith(b"ID3") or len(head) < 10:
            break
        has_footer = bool(head[5] & 0x10)
        begin += 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)) + 10 * has_footer
    return begin


class _Rest(io.RawIOBase):
    """A file from the byte `start` on."""

    def __init__(self, file: BinaryIO, start: int):
        self.file, self.start = file, start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset + (self.start if whence == os.SEEK_SET else 0), whence) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start

    def seekable(self) -> bool:
        return True


class _UnreadableError(ValueError):
    """A decoder cannot read the file at all, though another one may."""


def _find_decoder(file: BinaryIO, path: str | None) -> "_LibsndfileDecoder | _FFmpegDecoder":
    file.seek(begin := _behind_tag(file))
    magic = file.read(4)
    if magic in EXACT_MAGIC:
        rest = _Rest(file, begin) if begin else file
        path = None if begin else path
        ways = [lambda: _LibsndfileDecoder(rest, path), lambda: _FFmpegDecoder(rest)]
    else:
        # By a path, libsndfile would guess from the name what it cannot tell, and libmpg123 speaks to stderr.
        ways = [
            lambda: _FFmpegDecoder(file),
            *([] if magic.startswith(b"\xff") else [lambda: _LibsndfileDecoder(file)]),
        ]
    reasons = []
    for open_it in ways:
        try:
            return open_it()
        except _UnreadableError as error:
            reasons.append(str(error).rstrip("."))
    file.seek(0)
    head = file.read(512)
    if not head:
        raise ValueError("the file is empty")
    raise ValueError("it holds text, no sound" if _is_text(head) else "; ".join(reasons))


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a file look like text in any encoding, as of a playlist or the page of an error."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16 begins with one of these.
        return True
    return not head.startswith(EXACT_MAGIC) and not re.search(rb"[\x00-\x08\x0b\x0e-\x1f\x7f]", head)


class _LibsndfileDecoder:
    """Formats that tell their exact length.

    `frames` is the length that the header tells, `present` how much of that can be there, and `problem` why it is less.
    """

    remark = None

    def __init__(self, file: BinaryIO, path: str | None = None):
        soundfile = _library("soundfile")
        self.error = soundfile.LibsndfileError
        if _is_chained(file):
            raise _UnreadableError("it holds several streams")
        sizes = _data_sizes(file)
        file.seek(0)
        try:
            # libsndfile reads a file faster by its path.
            self.file = soundfile.SoundFile(file if path is None else path)
        except (self.error, TypeError) as error:  # A file named .raw is a TypeError.
            raise _UnreadableError(getattr(error, "error_string", str(error))) from error
        self.rate, self.channels = self.file.samplerate, self.file.channels
        self.problem, self.present = None, self.file.frames
        self.frames = self._announced(sizes)
        if self.frames is None:
            self.close()
            raise _UnreadableError("its header tells no length")

    def close(self):
        self.file.close()

    def _announced(self, sizes: tuple[int, int] | None) -> int | None:
        """The length that the header tells, None where it is open or only an estimate; `sizes` as of `_data_sizes`."""
        frames = self.file.frames
        if frames == 0 or frames > MOST_SAMPLES or "MPEG" in self.file.subtype:
            return None
        log = self.file.extra_info
        if self.file.format in ("WAV", "WAVEX") and sizes is None:
            return None
        # libsndfile shortens a truncated file to what is there, and tells so in its log alone.
        if cut := re.search(r"(?:data|SSND|BODY|Data Size)\s*: (\d+) \(should be (\d+)\)", log):
            told, there = int(cut[1]), int(cut[2])
            frames = frames * told // there
        elif self.file.format == "RF64" and (told := re.search(r"Frames\s*: (\d+)", log)):
            frames = max(frames, int(told[1]))
        elif self.file.format == "W64" and (cut := re.search(r"riff : (\d+) \(should be (\d+)\)", log)):
            frames = frames * int(cut[1]) // int(cut[2])
        if frames > self.present + MISSING_SECONDS * self.rate:
            self.problem = _truncated(frames / self.rate)
        if sizes and self.file.format in ("WAV", "WAVEX") and sizes[1] > LARGEST_RIFF:
            told, there = sizes  # The size field has wrapped round.
            self.problem = (
                f"its header tells {frames / self.rate:.2f} s, but {there - told} bytes follow, as in a WAV file above "
                "4 GiB; convert it to RF64 or W64"
            )
            frames = frames * there // told
        return frames

    def measure(self) -> float:
        return self.frames / self.rate

    def blocks(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """Float32 samples (n, C) from `first` on, until `stop` or the end."""
        stop = min(stop, self.frames)
        tolerance = MISSING_SECONDS * self.rate
        if stop > self.present + tolerance:
            raise ValueError(self.problem)
        try:
            # Some codecs, such as GSM, can only be decoded from the start.
            place = self.file.seek(first) if self.file.seekable() else 0
            size = max(1, BLOCK_SAMPLES // self.channels)
            while place < stop and len(block := self.file.read(min(size, stop - place), "float32", always_2d=True)):
                begin, place = place, place + len(block)
                yield block[max(0, first - begin) :]
        except self.error as error:  # The reason differs from place to place of one damage.
            told = f"the {self.frames / self.rate:.2f} s that its header tells"
            raise ValueError(f"truncated or damaged: not all of {told} can be decoded") from error
        if place < stop - tolerance:
            raise ValueError(_truncated(self.frames / self.rate))


def _truncated(seconds: float) -> str:
    return f"truncated: its header tells {seconds:.2f} s, which are not all there"


def _is_chained(file: BinaryIO) -> bool:
    """Whether an OGG file ends with another stream than it begins with: libsndfile reads the first one alone."""
    file.seek(0)
    first = file.read(18)
    if not first.startswith(b"OggS"):
        return False
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 17)))  # A page has at most 65307 bytes.
    end = file.read()
    return end[end.rfind(b"OggS") :][14:18] != first[14:18]  # This is the number of the stream.


def _data_sizes(file: BinaryIO) -> tuple[int, int] | None:
    """The bytes of samples that the header of a WAV, RF64, BW64 or CAF file tells, and those that are there.

    None for other files, and where the header leaves the end open.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    kind, large = file.read(4), None
    order, place, width = ("big", 8, 8) if kind == b"caff" else ("big" if kind == b"RIFX" else "little", 12, 4)
    if kind not in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"caff"):
        return None
    for _ in range(MOST_CHUNKS):
        if place >= size:
            break
        file.seek(place)
        name, told = file.read(4), int.from_bytes(file.read(width), order)
        place += 4 + width
        if name == b"ds64":  # The sizes of files above 4 GiB: of all, and of the samples.
            large = int.from_bytes(file.read(16)[8:], "little")
        elif name == b"data":
            if large is not None and told == 0xFFFFFFFF:
                told = large
            is_open = told == 2**64 - 1 if kind == b"caff" else told in OPEN_SIZES
            return None if is_open else (told, size - place)
        place += told + (told % 2 if width == 4 else 0)
    return None


class _FFmpegDecoder:
    """All formats that FFmpeg's libraries read, from the first track of sound; see `_LibsndfileDecoder`.

    What their containers tell of the length is off by the encoder's padding, so that only decoding tells the `frames`.
    """

    frames = present = None

    def __init__(self, file: BinaryIO):
        self.av = _library("av")
        self.errors = (self.av.FFmpegError, LookupError, ValueError)  # PyAV raises the others for damaged files.
        file.seek(0)
        # An open file with a list of formats and without protocols keeps FFmpeg from opening anything else.
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        try:
            self.container = self.av.open(file, mode="r", options=options, metadata_errors="replace")
        except self.av.FFmpegError as error:
            raise _UnreadableError(f"no format of sound that FFmpeg knows ({_reason(error)})") from error
        try:
            if not self.container.streams.audio:
                raise _UnreadableError("it has no track of sound")
            self.stream = self.container.streams.audio[0]
            if self.stream.codec_context is None:
                raise _UnreadableError("its codec is unknown to FFmpeg")
            self.format, self.codec = self.container.format.name, self.stream.codec_context.name
            place = file.tell()
            self.sizes, self.told_seconds = _data_sizes(file), self._told_seconds(file)
            file.seek(place)
            self.problem, self.damaged, self.gap = None, 0, 0.0
            self.decoded = self._decode()
            # The first frame tells the rate, which headers may tell wrongly, and where times are counted from.
            self.first_frame = next(self.decoded, None)
            if self.first_frame is None:
                raise _UnreadableError("no sound in it could be decoded")
        except self.errors as error:
            self.close()
            raise _UnreadableError(_reason(error)) from error
        self.rate, self.channels = self.first_frame.sample_rate, self.first_frame.layout.nb_channels

    def close(self):
        self.container.close()

    @property
    def remark(self) -> str | None:
        """What was noticed while it was decoded, and is no reason to refuse it."""
        if self.damaged:
            return f"{self.damaged} pieces of it could not be decoded, and were passed over"
        if self.gap:
            return f"it is damaged or was not recorded throughout: {self.gap:.2f} s are missing between its packets"
        return None

    @property
    def estimated_seconds(self) -> float | None:
        of_all = self.container.duration  # in microseconds
        return self.told_seconds or (of_all / 1e6 if of_all and of_all > 0 else None)

    def _told_seconds(self, file: BinaryIO) -> float | None:
        """The length that the container tells of the track, None where it tells none, or only an estimate."""
        if self.stream.duration is None:
            return None
        seconds = float(self.stream.duration * self.stream.time_base)
        if self.format != "mp3":
            return seconds if self.format in EXACT_LENGTHS else None
        # The first frame of an MP3 file may tell the number of the others, behind one of two words and four bytes.
        file.seek(_behind_tag(file))
        table = re.search(rb"(?:Xing|Info)...[\x01\x03\x05\x07\x09\x0b\x0d\x0f](....)", file.read(1 << 9), re.DOTALL)
        rate = self.stream.codec_context.sample_rate
        told = int.from_bytes(table[1], "big") * (1152 if rate >= 32000 else 576) / rate if table else math.inf
        # FFmpeg takes the encoder's padding off; of files that were joined it estimates the length.
        return seconds if told - MP3_PADDING < seconds <= told else None

    def measure(self) -> float:
        """The length in seconds, to be asked before anything else is decoded."""
        if self.told_seconds:
            return self.told_seconds
        seconds, end = [self.first_frame.samples / self.rate], 0.0
        try:
            for packet in self.container.demux(self.stream):
                if packet.duration:
                    seconds.append(float(packet.duration * packet.time_base))
                    if packet.pts is not None:
                        begin = packet.pts - (self.first_frame.pts or 0)
                        end = max(end, float((begin + packet.duration) * packet.time_base))
                else:
                    seconds += (frame.samples / self.rate for frame in packet.decode())
        except self.errors as error:
            raise ValueError(f"damaged: {_reason(error)}") from error
        # Durations may be rounded down, and times begin again in files that were joined.
        return max(math.fsum(seconds), end)

    def blocks(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """Float32 samples (n, C) from `first` on, until `stop` or the end. To be asked for once."""
        end, pieces, held, failure = first, [], 0, None
        frames = self._frames(first)
        while end < stop:
            try:
                place, frame = next(frames)
            except StopIteration:
                break
            except self.errors as error:  # What was decoded before comes first; tags behind the end do not matter.
                if not (self.told_seconds and end / self.rate >= self.told_seconds):
                    failure = ValueError(f"damaged: {_reason(error)}")
                break
            if frame.sample_rate != self.rate:
                failure = ValueError(
                    f"its rate changes from {self.rate} to {frame.sample_rate} Hz at {place / self.rate:.2f} s"
                )
                break
            end = place + frame.samples
            piece = _to_float(frame)[:, max(0, first - place) : max(0, stop - place)]
            if pieces and (held >= BLOCK_SAMPLES or len(piece) != len(pieces[0])):
                yield np.concatenate(pieces, axis=1).T
                pieces, held = [], 0
            pieces.append(piece)
            held += piece.size
        if pieces:
            yield np.concatenate(pieces, axis=1).T
        if failure is not None:
            raise failure
        if self.sizes and end < stop:
            told, there = self.sizes
            if end / self.rate * (told - there) > MISSING_SECONDS * there:
                raise ValueError(f"truncated: {told - there} of {told} bytes are missing")
        if self.told_seconds and end / self.rate < min(self.told_seconds, stop / self.rate) - MISSING_SECONDS:
            self.problem = _truncated(self.told_seconds)
            if self.format != "mp3":
                raise ValueError(self.problem)

    def _frames(self, first: int) -> Iterator[tuple[int, "av.AudioFrame"]]:  # noqa: F821
        """Frames and the numbers of their first samples, from the one that has the sample `first` or an earlier one."""
        frames, place = itertools.chain([self.first_frame], self.decoded), 0
        begin, origin = first / self.rate - SETTLING_SECONDS, self.first_frame.pts
        # MP3 files that were joined have more packets than times.
        is_exact = self.format in EXACT_TIMES and (self.format != "mp3" or self.told_seconds is not None)
        if begin > 0 and origin is not None and is_exact and self.codec in SETTLING:
            time = origin + int(begin / self.stream.time_base)
            if self.format in SEEKABLE:
                self.container.seek(time, stream=self.stream)
                frames = self._decode()
            else:
                frames = self._decode(time)
            frame = next(frames, None)
            if frame is None:
                return
            if frame.pts is None:
                raise ValueError("its packets tell no times, so that no part of it can be found")
            place = round((frame.pts - origin) * self.stream.time_base * self.rate)
            frames = itertools.chain([frame], frames)
        for frame in frames:
            if self.format in TIMED and origin is not None and frame.pts is not None:
                ahead = float((frame.pts - origin) * self.stream.time_base) - place / self.rate
                self.gap = max(self.gap, ahead) if ahead > MISSING_SECONDS else self.gap
            yield place, frame
            place += frame.samples

    def _decode(self, time: int | None = None) -> Iterator["av.AudioFrame"]:  # noqa: F821
        """The frames of the packets that follow, or of those from a time on, in units of the stream's time base."""
        number = 0
        for packet in self.container.demux(self.stream):
            if time is not None and packet.pts is not None and packet.pts < time:
                continue
            try:
                frames = packet.decode()
            except self.av.FFmpegError:
                self.damaged += 1
                if self.format not in RAW_STREAMS or self.damaged > MOST_DAMAGED + number:
                    raise
                continue
            number += len(frames)
            yield from frames


def _reason(error: Exception) -> str:
    """What an error of PyAV says, without its number and the file's name."""
    return getattr(error, "strerror", None) or str(error)


def _to_float(frame: "av.AudioFrame") -> np.ndarray:  # noqa: F821
    """The samples of a frame as float32 (C, n); integers become -1..1."""
    samples = frame.to_ndarray()  # (C, n), or (1, n * C) with the channels' samples side by side
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    return samples.astype(np.float32) * np.float32(2.0 ** (1 - 8 * samples.dtype.itemsize))
