"""A small spoken-word data set made with the espeak-ng program, for tests that train.

The synthesiser's accents and voice variants stand for the speakers. The test speakers have accents and variants that
the training speakers lack, so that a test accuracy tells whether the words were learnt and not the voices.
"""

import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from bat_audio.processing_bat import load_audio

RATE = 16000  # Hz; also the samples of a clip
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
# The foreign readers pronounce every word so that it can be told from the others; most languages do not ("right").
ACCENTS = {
    "train": ("en-us", "en-gb", "en-gb-x-rp", "en-gb-x-gbclan", "en-029", "pl", "cs"),
    "test": ("en-us-nyc", "en-gb-scotland", "en-gb-x-gbcwmd", "pt"),
}
# espeak-ng takes an unknown variant for the plain voice, so only names that it has had for years.
VARIANTS = {
    "train": (
        *("m1", "m2", "m4", "m5", "m6", "m8", "f1", "f3", "f4", "adam", "Alex", "Alicia", "Annie", "belinda", "boris"),
        *("croak", "Denis", "ed", "edward", "Gene", "gustave", "Hugo", "iven", "Jacky", "john", "klatt2", "klatt4"),
        *("Lee", "Marco", "max", "michel", "norbert", "rob", "robosoft", "steph", "Storm", "Tweaky", "whisper", "zac"),
    ),
    "test": ("m3", "m7", "f2", "f5", "aunty", "grandpa", "Mario", "Mike", "pablo", "quincy", "shelby", "victor"),
}


def make_speech_commands(folder: str | Path, train_clips: int = 120, test_clips: int = 40, seed: int = 0):
    """Fill a new folder with folder/train/WORD/*.wav and folder/test/WORD/*.wav: 1 s clips, 16 kHz, mono, 16 bit.

    Every clip has its own speaker, speed, pitch, place within the second, level and noise. The same seed gives the
    same files. It takes about 10 ms per clip and core.

    Args:
        train_clips: training clips of each of the ten words.
        test_clips: test clips of each word.

    Raises:
        FileExistsError: the folder is there already.
        FileNotFoundError: the program espeak-ng is not installed.
        subprocess.CalledProcessError: espeak-ng lacks one of the accents.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    clips = [
        (split, word, number)
        for split, count in (("train", train_clips), ("test", test_clips))
        for word in WORDS
        for number in range(count)
    ]
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))

    def write(clip: tuple[str, str, int]):
        split, word, number = clip
        # A generator of its own for each clip: the order in which the threads take them does not matter.
        rng = np.random.default_rng([seed, split == "test", WORDS.index(word), number])
        voice = f"{rng.choice(ACCENTS[split])}+{rng.choice(VARIANTS[split])}"
        path = partial / split / word / f"{number:04d}_{voice}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, _clip(word, voice, rng), RATE, subtype="PCM_16")

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(write, clips):
                pass
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _clip(word: str, voice: str, rng: np.random.Generator) -> np.ndarray:
    """One second of the word at a random place in noise 10 to 40 dB below it: (16000,), at most 0.9."""
    speed, pitch = rng.integers(130, 220), rng.integers(25, 75)  # words per minute; 0..99
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    speech = load_audio(subprocess.run(command, check=True, capture_output=True).stdout).numpy()
    loud = np.flatnonzero(np.abs(speech) > 0.02 * np.abs(speech).max())
    speech = speech[loud[0] : loud[-1] + 1][:RATE]
    noise = _noise(rng)
    noise *= speech.std() / noise.std() * 10 ** (-rng.uniform(10, 40) / 20)
    start = rng.integers(0, RATE - len(speech) + 1)
    noise[start : start + len(speech)] += speech
    return noise * (10 ** (-rng.uniform(0, 20) / 20) * 0.9 / np.abs(noise).max())


def _noise(rng: np.random.Generator) -> np.ndarray:
    """One second of white noise, pink noise, or mains hum over some white noise: (16000,)."""
    kind = rng.choice(["white", "pink", "hum"])
    white = rng.standard_normal(RATE)
    if kind == "white":
        return white
    if kind == "pink":
        return np.fft.irfft(np.fft.rfft(white) / np.sqrt(np.arange(1, RATE // 2 + 2)), RATE)
    harmonics = rng.choice([50, 60]) * np.arange(1, 8)[:, None]  # Hz
    phases = 2 * np.pi * (harmonics * np.arange(RATE) / RATE + rng.random((7, 1)))
    return (rng.random((7, 1)) * np.sin(phases)).sum(axis=0) + 0.05 * white
