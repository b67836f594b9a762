"""Sound files of many formats, made by PyAV, so that the tests need no program."""

import io
from pathlib import Path

import av
import numpy as np

# Name of a file: container, codec, rate in Hz, and the seconds by which the codec may lengthen the sound.
FORMATS = {
    "alac.m4a": ("mp4", "alac", 44100, 0.0),
    "aac.m4a": ("mp4", "aac", 44100, 0.05),
    "aac.mp4": ("mp4", "aac", 44100, 0.05),
    "aac.3gp": ("3gp", "aac", 44100, 0.05),
    "aac.mov": ("mov", "aac", 44100, 0.05),
    "aac.aac": ("adts", "aac", 44100, 0.05),
    "aac.mka": ("matroska", "aac", 44100, 0.05),
    "aac.flv": ("flv", "aac", 44100, 0.05),
    "aac.ts": ("mpegts", "aac", 44100, 0.05),
    "opus.webm": ("webm", "libopus", 48000, 0.03),
    "opus.opus": ("ogg", "libopus", 48000, 0.03),
    "flac.ogg": ("ogg", "flac", 44100, 0.0),
    "flac.flac": ("flac", "flac", 44100, 0.0),
    "alac.caf": ("caf", "alac", 44100, 0.1),
    "ima4.caf": ("caf", "adpcm_ima_qt", 44100, 0.01),
    "ac3.ac3": ("ac3", "ac3", 44100, 0.06),
    "ac3.wav": ("wav", "ac3", 44100, 0.06),
    "g722.wav": ("wav", "g722", 16000, 0.01),
    "g726.wav": ("wav", "g726", 8000, 0.01),
    "yamaha.wav": ("wav", "adpcm_yamaha", 44100, 0.03),
    "swf.wav": ("wav", "adpcm_swf", 44100, 0.15),
    "wma.wma": ("asf", "wmav2", 44100, 0.1),
    "wma.wav": ("wav", "wmav2", 44100, 0.1),
    "mp3.mp3": ("mp3", "libmp3lame", 44100, 0.0),
    "mp3.wav": ("wav", "libmp3lame", 44100, 0.06),
    "mp3.avi": ("avi", "libmp3lame", 44100, 0.06),
    "mp2.mp2": ("mp2", "mp2", 44100, 0.06),
    "mp2.mpg": ("mpeg", "mp2", 44100, 0.06),
    "tta.tta": ("tta", "tta", 44100, 0.0),
    "wavpack.wv": ("wv", "wavpack", 44100, 0.0),
    "pcm.wav": ("wav", "pcm_s16le", 44100, 0.0),
    "pcm.aiff": ("aiff", "pcm_s16be", 44100, 0.0),
    "pcm.au": ("au", "pcm_s16be", 44100, 0.0),
    "pcm.w64": ("w64", "pcm_s16le", 44100, 0.0),
}


def chirp(seconds: float, rate: int) -> np.ndarray:
    """A tone (samples,) that rises from 300 to 3,000 Hz, so that every place sounds different."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (300 + 1350 * time / seconds) * time)).astype(np.float32)


def encode(samples: np.ndarray, container: str, codec: str, rate: int, *, seekable: bool = True) -> bytes:
    """The content of a file with the mono samples.

    Args:
        seekable: False writes it as into a pipe, so that no length can be put into the header.
    """
    content = io.BytesIO()

    class Pipe(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            return content.write(data)

    with av.open(content if seekable else Pipe(), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = {"g726": 32000}.get(codec, 96000)
        for place in range(0, len(samples), 4096):
            frame = av.AudioFrame.from_ndarray(samples[None, place : place + 4096], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, place
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)
    return content.getvalue()


def encoded(name: str, seconds: float = 5.37) -> bytes:
    """A chirp in one of `FORMATS`."""
    container, codec, rate, _ = FORMATS[name]
    return encode(chirp(seconds, rate), container, codec, rate)


def write_encoded(folder: Path, name: str, seconds: float = 5.37) -> Path:
    (folder / name).write_bytes(encoded(name, seconds))
    return folder / name
