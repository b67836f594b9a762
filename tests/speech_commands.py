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
# Of the Speech Commands data set, words of which no two are alike in any of the accents.
WORDS = ("forward", "happy", "house", "left", "marvin", "seven", "sheila", "stop", "yes", "zero")
ACCENTS = {
    "train": ("en-029", "en-gb", "en-gb-x-gbclan", "en-gb-x-rp", "en-us"),
    "test": ("en-gb-scotland", "en-gb-x-gbcwmd", "en-us-nyc"),
}
# Ones that espeak-ng has had for years: it takes an unknown variant for the plain voice, without a word.
VARIANTS = {
    "train": (
        *("m1", "m2", "m4", "m5", "m6", "m8", "f1", "f3", "f4", "adam", "Alex", "Alicia", "Annie", "belinda", "boris"),
        *("croak", "Denis", "ed", "edward", "Gene", "gustave", "Hugo", "iven", "Jacky", "john", "klatt2", "klatt4"),
        *("Lee", "Marco", "max", "michel", "norbert", "rob", "robosoft", "steph", "Storm", "Tweaky", "whisper", "zac"),
    ),
    "test": ("m3", "m7", "f2", "f5", "aunty", "grandpa", "Mario", "Mike", "pablo", "quincy", "shelby", "victor"),
}
CLIPS_PER_UTTERANCE = 3  # in training; speaking takes ten times as long as placing a word in noise


def make_speech_commands(folder: str | Path, train_utterances: int = 150, test_utterances: int = 40, seed: int = 0):
    """Fill a new folder with folder/train/WORD/*.wav and folder/test/WORD/*.wav: 1 s clips, 16 kHz, mono, 16 bit.

    Every utterance has its own speaker, speed and pitch, and every clip its own level, noise and place of the word. The
    same seed gives the same files. It takes about 30 ms per utterance and core.

    Args:
        train_utterances: of each of the ten words; `CLIPS_PER_UTTERANCE` training clips are made of each.
        test_utterances: of each word, one test clip each.

    Raises:
        FileExistsError: the folder is there already.
        FileNotFoundError: the program espeak-ng is not installed.
        subprocess.CalledProcessError: espeak-ng lacks one of the accents.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name a new folder.")
    utterances = [
        (split, word, number)
        for split, count in (("train", train_utterances), ("test", test_utterances))
        for word in WORDS
        for number in range(count)
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))

    def write_clips(utterance: tuple[str, str, int]):
        split, word, number = utterance
        # A generator of its own for each utterance: the order in which the threads take them does not matter.
        rng = np.random.default_rng([seed, split == "test", WORDS.index(word), number])
        voice = f"{rng.choice(ACCENTS[split])}+{rng.choice(VARIANTS[split])}"
        speech = _speak(word, voice, speed=rng.integers(100, 165), pitch=rng.integers(25, 75))
        (partial / split / word).mkdir(parents=True, exist_ok=True)
        for take in range(CLIPS_PER_UTTERANCE if split == "train" else 1):
            path = partial / split / word / f"{number:04d}_{take}_{voice}.wav"
            soundfile.write(path, _in_noise(speech, rng), RATE, subtype="PCM_16")

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(write_clips, utterances):
                pass
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _speak(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """The word without the silence around it, (samples,); speed in words per minute, pitch 0..99."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    speech = load_audio(subprocess.run(command, check=True, capture_output=True).stdout).numpy()
    loud = np.flatnonzero(np.abs(speech) > 0.02 * np.abs(speech).max())
    return speech[loud[0] : loud[-1] + 1][:RATE]


def _in_noise(speech: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One second with the word in its first half, in noise 15 to 40 dB below it: (16000,), at most 0.9.

    A word at any place would take a small encoder, trained from scratch on so few clips, many times as long to learn.
    """
    noise = _noise(rng)
    noise *= speech.std() / noise.std() * 10 ** (-rng.uniform(15, 40) / 20)
    start = min(int(rng.uniform(0, 0.25) * RATE), RATE - len(speech))
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
