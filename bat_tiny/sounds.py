"""The sounds that BAT-tiny is pre-trained on and judged by, made from Debian packages alone.

    python -m bat_tiny.sounds FOLDER

needs Debian 12 or newer and the extra `tiny`, fetches some 700 MB of packages without installing them, and fills FOLDER
with FLAC files, 16 kHz, mono, 16 bit:

- pretrain/SOURCE/*.flac: unlabelled sounds, and of them sequences of one source and mixtures of all, 10 s each.
- tasks/TASK/{train,test}/LABEL/*.flac: what a frozen encoder is judged by. Nothing of it is in pretrain, and train and
  test have nothing in common: voices and accents, General-MIDI programs, prompts and recordings are divided into three.
- index.csv: a line per file: path, part (pretrain, TASK/train or TASK/test), label, source, origin (package:file, voice
  or program; of a scene the paths of its pieces), seconds.
- sources.json: versions and licences of the packages and what was taken of each, files and seconds of each part.
- licences/PACKAGE: the packages' own copyright files.
"""

import argparse
import contextlib
import csv
import gettext
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mido
import numpy as np
import soundfile
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import fftconvolve

from bat_audio.processing_bat import SAMPLE_RATE, load_audio
from bat_audio_tools.folders import whole

PROGRAMS = {"apt-get": "apt", "dpkg-deb": "dpkg", "espeak-ng": "espeak-ng", "fluidsynth": "fluidsynth", "sox": "sox"}
LANGUAGES = ("en", "es", "fr", "it", "ru")
# The keys are Debian packages, the values what is taken of each.
PACKAGES = {
    **{f"asterisk-core-sounds-{language}-wav": "recorded telephone prompts" for language in LANGUAGES},
    "tuxpaint-stamps-default": "recorded descriptions of pictures in many languages, animals and other effects",
    "ktuberling-data": "recorded words in many languages",
    "iso-codes": "translated names of countries and currencies, to be spoken by espeak-ng",
    "fluid-soundfont-gm": "the sound font, played by fluidsynth",
    "sonic-pi-samples": "samples of instruments, drums and effects",
    "lmms-common": "samples of instruments, drums and effects",
    "wesnoth": "effects",
    "colobot-common-sounds": "effects and music",
    "minetest-data": "effects",
    "bucklespring-data": "keys of a keyboard",
    "sound-theme-freedesktop": "desktop sounds",
    "oxygen-sounds": "desktop sounds",
    "lomiri-sounds": "ring tones",
    "sound-icons": "desktop sounds",
}
# These packages have the game's version in their names, and the newest one is taken.
VERSIONED = {"wesnoth": r"wesnoth-1\.\d+-data"}
# The copyright files of these packages have the old free form, which no program can read.
LICENCES = {"fluid-soundfont-gm": ["MIT"], "wesnoth": ["GPL-2+"]}

# Each class of the task sound_source has a pattern for "package:path" of its files. The first match counts.
SOUND_SOURCES = {
    "animal": r"tuxpaint.*/animals/|wesnoth.*/(bat-|birds|drake-|gryphon|horse|wolf)",
    "beat": r"lmms.*/beats/|sonic-pi.*/loop_",
    "bass": r"lmms.*/bass(es|loops)/|sonic-pi.*/bass_",
    "cymbal": r"lmms.*/drums/(crash|hihat|ride)|sonic-pi.*/\w*(cymbal|splash)",
    "kick": r"lmms.*/drums/(bassdrum|kick)|sonic-pi.*/(bd_|drum_bass|drum_heavy_kick|elec_\w+_kick)",
    "snare": r"lmms.*/drums/snare|sonic-pi.*/(sn_|\w*snare)",
    "tabla": r"sonic-pi.*/tabla_",
    "desktop": r"oxygen-sounds|freedesktop.*/(?!audio-|phone-)",
    "footstep": r"minetest.*_footstep",
    "human": r"wesnoth.*/human-",
    "keyboard": r"bucklespring",
    "magic": r"wesnoth.*/magic",
    "monster": r"wesnoth.*/(goblin|naga|ogre|orc|skeleton|troll|zombie)-",
    "weapon": r"wesnoth.*/(axe|bow|club|crossbow|dagger|flail|hatchet|knife|mace|sling|spear|staff|sword|throw)",
}

# Each class of the task instrument_family has General-MIDI programs for train and others for test. The other
# programs are for pretrain, but for those that share samples of the sound font with these: its bright piano is its
# grand piano, filtered. The synthesisers' families are no classes for the same reason. Nor are families whose
# instruments do not sound alike.
FAMILIES = {
    "piano": ((0, 4), (2, 5)),
    "chromatic_percussion": ((8, 12), (9, 13)),
    "organ": ((16, 20), (17, 21)),
    "guitar": ((24, 28), (26, 29)),
    "bass": ((32, 36), (33, 37)),
    "strings": ((40, 43), (41, 42)),
    "ensemble": ((48, 52), (51, 53)),
    "brass": ((56, 60), (57, 61)),
    "reed": ((64, 68), (65, 69)),
    "pipe": ((72, 76), (73, 77)),
}
NO_PROGRAMS = (1, 3, 23, 25, 44, 49, 50, 85, 88, 96, 98, 99, 102, 110)
LOW_PROGRAMS = (*range(32, 40), 43)  # These are the basses and the contrabass, which has no high notes.
DRUM_KITS = (0, 8, 16, 24, 25, 32, 40, 48)

WORDS = (
    *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)
ACCENTS = {
    "pretrain": ("en-gb", "en-us"),
    "train": ("en-029", "en-gb-x-gbclan", "en-gb-x-rp"),
    "test": ("en-gb-scotland", "en-gb-x-gbcwmd", "en-us-nyc"),
}
# These are the variants of espeak-ng 1.51. Close relatives such as klatt2 and klatt3 are in the same part.
VARIANTS = {
    "pretrain": (
        *("adam", "Alex", "Alicia", "anika", "benjamin", "boris", "caleb", "david", "Denis", "edward", "f1", "f3"),
        *("Gene", "Hugo", "iven", "Jacky", "john", "klatt2", "klatt3", "klatt4", "Lee", "linda", "m1", "m2", "m5"),
        *("m6", "max", "michel", "paul", "rob", "robosoft", "steph", "travis", "Tweaky", "whisper"),
    ),
    "train": (
        *("Andy", "Annie", "antonio", "belinda", "croak", "Diogo", "ed", "f4", "gustave", "m4", "m8", "Marco"),
        *("miguel", "norbert", "Storm", "zac"),
    ),
    "test": (
        *("aunty", "f2", "f5", "grandpa", "kaukovalta", "m3", "m7", "marcelo", "Mario", "Mike", "pablo", "quincy"),
        *("shelby", "victor"),
    ),
}
# Speech is synthesised in English and in these languages, by iso-codes' names for them. VOICES has espeak-ng's name
# where that is another.
SPOKEN = (
    *("af", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "eo", "es", "et", "eu", "fa", "fi", "fr", "ga", "hi", "hr"),
    *("hu", "id", "is", "it", "kn", "lt", "lv", "mk", "nb", "nl", "pl", "pt", "ro", "ru", "sk", "sl", "sq", "sr", "sv"),
    *("sw", "ta", "tr", "uk", "vi"),
)
VOICES = {"fr": "fr-fr"}

SHORTEST = 0.5  # A sound that lasts fewer seconds gets silence after it.
# Long recordings are cut into pieces of so many seconds, and no more than so many pieces are taken of one.
PIECE, PIECES = 10.0, 6
SCENE = 10.24  # A scene has so many seconds, like a chunk of the published encoder.
COUNTS = {"recorded_speech": 3500, "synthesised_speech": 1700, "noises": 330, "sequences": 9000, "mixtures": 7000}
SCENES = ("sequences", "mixtures")  # These parts of pretrain are made of the others.
GAP = 0.4  # At most so many seconds are between the sounds of a sequence.
CLIPS_PER_PROGRAM = 28  # Every program of pretrain plays so many clips.
# Words and instruments have so many clips; they can be made as often as one likes.
CLIPS_PER_LABEL = {"train": 40, "test": 100}
RECORDINGS_PER_LABEL = {"train": 40, "test": 20}
EFFECT = 5.0  # The task sound_source takes at most so many seconds of a recording.
ALIKE = 0.45  # From this correlation on, two recordings are taken for takes, or edits, of one.


@dataclass(frozen=True)
class Clip:
    """A file to make: folder/path. `sound` is a module's function with arguments, so that a process can be sent it."""

    path: str
    source: str
    origin: str
    sound: Callable[[np.random.Generator], np.ndarray]  # (samples,)

    @property
    def place(self) -> tuple[str, str]:
        """(part, label) of the index, as the path says."""
        _, *names, _ = self.path.split("/")
        return ("pretrain", "") if len(names) == 1 else (f"{names[0]}/{names[1]}", names[2])


def make_sounds(folder: str | Path, seed: int = 0, scale: float = 1.0, downloads: str | Path | None = None):
    """Fill a new folder as the module says; it appears whole or not at all.

    The same seed, scale and package versions give the same files. All files take eight minutes on two cores and 3.1 GB.

    Args:
        scale: share of the files to make of each part and label, at least one each; 1.0 is about 54 h.
        downloads: folder of package files (*.deb) to use and add to; by default they are fetched and thrown away.

    Raises:
        FileExistsError: the folder is there already.
        FileNotFoundError: programs are not installed; the message names all, and the command that installs them.
        RuntimeError: a program failed, for example apt-get without package lists; with what the program said. Or it is
            an espeak-ng without the voices.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name a new folder.")
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        packages = " ".join(PROGRAMS[program] for program in missing)
        raise FileNotFoundError(
            f"Not installed: {', '.join(missing)}. Run: apt-get install --no-install-recommends {packages}"
        )
    known = re.findall(r"!v/(\S+)", _run(["espeak-ng", "--voices=variant"]).decode())
    if unknown := sorted(set(itertools.chain(*VARIANTS.values())) - set(known)):
        raise RuntimeError(f"espeak-ng has no variants {', '.join(unknown)}, which would all sound as its plain voice.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole(folder) as made,
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work,
        ProcessPoolExecutor(os.cpu_count()) as processes,
    ):
        debs = _fetch(Path(downloads or Path(work) / "debs"))
        roots = dict(zip(debs, processes.map(_unpack, debs.values(), itertools.repeat(Path(work))), strict=True))
        rng = np.random.default_rng(seed)
        clips = _thin(_plan(roots, rng), scale, rng)
        rows = [row for row in processes.map(partial(_make, made, seed), clips, chunksize=8) if row]
        rows = _without_takes(made, rows, processes)
        scenes = _plan_scenes(made, rows, scale, rng)
        rows += [row for row in processes.map(partial(_make, made, seed), scenes, chunksize=8) if row]
        _describe(made, roots, debs, rows, seed, scale)


def _run(command: list[str], **options) -> bytes:
    """What the program writes to its standard output; RuntimeError with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, **options)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-2000:]
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {said}")
    return done.stdout


def _fetch(downloads: Path) -> dict[str, Path]:
    """The file of each package, by its name without a version; fetches those that are missing."""
    downloads.mkdir(parents=True, exist_ok=True)
    known = _run(["apt-cache", "pkgnames"]).decode().split()
    names = {}
    for key in PACKAGES:
        pattern = VERSIONED.get(key, key)
        found = sorted((name for name in known if re.fullmatch(pattern, name)), key=_version)
        if not found:
            raise RuntimeError(f"apt knows no package {pattern}; run apt-get update.")
        names[key] = found[-1]
    missing = [name for name in names.values() if not any(downloads.glob(f"{name}_*.deb"))]
    if missing:
        # When root runs apt, it fetches by default as the user _apt, who cannot write to a folder of root's.
        _run(["apt-get", "download", "-o", "APT::Sandbox::User=root", *missing], cwd=downloads)
    return {key: max(downloads.glob(f"{name}_*.deb")) for key, name in names.items()}


def _version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _unpack(deb: Path, work: Path) -> Path:
    root = work / deb.name.split("_")[0]
    _run(["dpkg-deb", "-x", str(deb), str(root)])
    return root


def _plan(roots: dict[str, Path], rng: np.random.Generator) -> list[Clip]:
    """Every clip but the scenes."""
    recordings = _recordings(roots)
    return [
        *_plan_prompts(recordings, rng),
        *_plan_recordings(recordings, rng),
        *_plan_speech(roots["iso-codes"], rng),
        *_plan_instruments(next(roots["fluid-soundfont-gm"].rglob("*.sf2"))),
        *(Clip(f"pretrain/noises/{n:04d}", "noises", "sox", _sox_noise) for n in range(COUNTS["noises"])),
    ]


def _recordings(roots: dict[str, Path]) -> dict[str, tuple[Path, float]]:
    """(path, seconds) of every sound file by its origin "package:path"; of equal files only the first."""
    found = {}
    for package, root in roots.items():
        for path in sorted(root.rglob("*")):
            if path.suffix in (".flac", ".oga", ".ogg", ".wav") and path.is_file() and not path.is_symlink():
                # lmms-common has WAV files that are called .ogg and that libsndfile does not read.
                with contextlib.suppress(soundfile.LibsndfileError):
                    entry = f"{package}:{path.relative_to(root)}", (path, soundfile.info(path).duration)
                    found.setdefault(hashlib.sha256(path.read_bytes()).digest(), entry)
    return dict(found.values())


def _plan_prompts(recordings: dict[str, tuple[Path, float]], rng: np.random.Generator) -> Iterable[Clip]:
    """The telephone prompts for pretrain and the task recorded_language; divided by their names in all languages."""
    prompts = defaultdict(list)
    for origin in recordings:
        if match := re.fullmatch(r"asterisk-core-sounds-(..)-wav:.*/sounds/[^/]+/(.*)\.wav", origin):
            language, name = match.groups()
            if not re.search(r"silence|beep|tone|monkeys$", name):
                prompts[name].append((language, name.replace("/", "_"), origin))
    for split, chosen in _divide(prompts, rng, {"pretrain": 2, "train": 1, "test": 1}).items():
        for language, name, origin in chosen:
            path, seconds = recordings[origin]
            if split == "pretrain":
                yield Clip(f"pretrain/prompts/{language}_{name}", "prompts", origin, partial(_recording, path=path))
            elif seconds >= 1:  # Single letters and digits tell little of a language.
                place = f"tasks/recorded_language/{split}/{language}/{name}"
                yield Clip(place, "prompts", origin, partial(_recording, path=path, duration=4.0))


def _plan_recordings(recordings: dict[str, tuple[Path, float]], rng: np.random.Generator) -> Iterable[Clip]:
    """Recorded words for pretrain, effects for pretrain and the task sound_source."""
    words, others, labelled = [], [], {label: defaultdict(list) for label in SOUND_SOURCES}
    for origin in recordings:
        if re.match(r"ktuberling|tuxpaint.*(_desc|/symbols/)", origin):
            words.append(origin)
        elif label := next((label for label, files in SOUND_SOURCES.items() if re.match(files, origin)), None):
            labelled[label][_group(origin)].append(origin)
        elif not re.match(r"asterisk|lmms.*/(shapes|waveforms)/", origin):  # The shapes of lmms last milliseconds.
            others.append(origin)

    for origin in rng.permutation(words)[: COUNTS["recorded_speech"]]:
        place = f"pretrain/recorded_speech/{_file_name(origin)}"
        yield Clip(place, "recorded_speech", origin, partial(_recording, path=recordings[origin][0]))
    for label, groups in labelled.items():
        splits = _divide(groups, rng, {"pretrain": 1, "train": 2, "test": 1}, RECORDINGS_PER_LABEL)
        others += splits.pop("pretrain")
        for split, chosen in splits.items():
            for origin in chosen:
                place = f"tasks/sound_source/{split}/{label}/{_file_name(origin)}"
                yield Clip(place, "effects", origin, partial(_recording, path=recordings[origin][0], duration=EFFECT))
    for origin in others:
        path, seconds = recordings[origin]
        for piece in range(min(PIECES, max(1, round(seconds / PIECE)))):
            sound = partial(_recording, path=path, start=piece * PIECE, duration=PIECE)
            yield Clip(f"pretrain/effects/{_file_name(origin)}_{piece}", "effects", origin, sound)


def _file_name(origin: str) -> str:
    """A name that tells package and file, and that only this origin has."""
    package, path = origin.split(":", 1)
    stem = re.sub(r"[^\w.-]+", "_", Path(path).stem)
    return f"{package.split('-')[0]}_{stem}_{zlib.crc32(origin.encode()):08x}"


def _group(origin: str) -> str:
    """What takes of one event share: "wesnoth:axe" of axe.ogg and axe-miss.ogg, "wesnoth:orc-hit" of orc-hit-1.ogg."""
    package, path = origin.split(":", 1)
    event = re.sub(r"-miss\b", "", Path(path).stem)
    return f"{package}:{re.sub(r'[-_.]?[0-9]+$', '', event)}"


def _event(origin: str) -> str:
    """What `_group` gives, without what tells variants of one event apart: crossbow of crossbow-fire-miss.ogg."""
    return re.sub(
        r"[-_](fire|full|hard|long|short|soft|very)\b", "", _group(origin).replace("_", "-"), flags=re.IGNORECASE
    )


def _divide(
    groups: dict[str, list], rng: np.random.Generator, shares: dict[str, int], limits: dict[str, int] | None = None
) -> dict[str, list]:
    """The groups' members in splits of about these shares, no group in two; a split at its limit gets no more."""
    splits = {split: [] for split in shares}
    # Large groups come first, so that the small ones even the shares out.
    for name in sorted(rng.permutation(sorted(groups)), key=lambda name: -len(groups[name])):
        free = [split for split in splits if len(splits[split]) < (limits or {}).get(split, math.inf)]
        splits[min(free, key=lambda split: len(splits[split]) / shares[split])] += groups[name]
    return splits


def _plan_speech(iso_codes: Path, rng: np.random.Generator) -> Iterable[Clip]:
    """Synthesised speech: many languages for pretrain, a third of it English, and the task spoken_word."""
    texts = {language: _names(iso_codes, language) for language in ("en", *SPOKEN)}
    for number in range(COUNTS["synthesised_speech"]):
        language = "en" if number % 3 == 0 else rng.choice(SPOKEN)
        accent = rng.choice(ACCENTS["pretrain"]) if language == "en" else VOICES.get(language, language)
        voice = f"{accent}+{rng.choice(VARIANTS['pretrain'])}"
        words = [
            str(rng.integers(10 ** rng.integers(1, 5))) if rng.random() < 0.3 else str(rng.choice(texts[language]))
            for _ in range(rng.integers(1, 5))
        ]
        sound = partial(_speak, voice=voice, text=", ".join(words))
        yield Clip(f"pretrain/synthesised_speech/{language}_{number:04d}", "synthesised_speech", voice, sound)
    for split, count in CLIPS_PER_LABEL.items():
        for word, number in itertools.product(WORDS, range(count)):
            voice = f"{rng.choice(ACCENTS[split])}+{rng.choice(VARIANTS[split])}"
            place = f"tasks/spoken_word/{split}/{word}/{number:02d}"
            yield Clip(place, "synthesised_speech", voice, partial(_spoken_word, voice=voice, word=word))


def _names(iso_codes: Path, language: str) -> list[str]:
    """Names of countries and currencies in the language, without those that were not translated."""
    names = set()
    for standard in ("3166-1", "4217"):
        share = iso_codes / "usr/share"
        entries = json.loads((share / f"iso-codes/json/iso_{standard}.json").read_text())[standard]
        english = {entry["name"] for entry in entries}
        if language == "en":
            names |= english
        else:
            translation = gettext.translation(f"iso_{standard}", share / "locale", [language], fallback=True)
            names |= {translation.gettext(name) for name in english} - english
    return sorted(names)


def _plan_instruments(soundfont: Path) -> Iterable[Clip]:
    """Music for pretrain, there with drum kits and programs of no class, and the task instrument_family."""

    def clips(path: str, count: int, seconds: float, program: int, drums: bool = False) -> Iterable[Clip]:
        origin = f"fluid-soundfont-gm:{'kit' if drums else 'program'} {program}"
        sound = partial(_play, soundfont=soundfont, program=program, seconds=seconds, drums=drums)
        return (Clip(f"{path}{program:03d}_{n:02d}", "instruments", origin, sound) for n in range(count))

    others = set(range(128)) - set(NO_PROGRAMS)
    for family, splits in FAMILIES.items():
        for (split, count), programs in zip(CLIPS_PER_LABEL.items(), splits, strict=True):
            others -= set(programs)
            for program in programs:
                place = f"tasks/instrument_family/{split}/{family}/"
                yield from clips(place, count // len(programs), 2.0, program)
    for program in sorted(others):
        yield from clips("pretrain/instruments/", CLIPS_PER_PROGRAM, 4.0, program)
    for kit in DRUM_KITS:
        yield from clips("pretrain/instruments/kit", CLIPS_PER_PROGRAM, 4.0, kit, drums=True)


def _thin(clips: list[Clip], scale: float, rng: np.random.Generator) -> list[Clip]:
    """Keep this share of the clips of each folder, and at least one."""
    folders = defaultdict(list)
    for clip in clips:
        folders[os.path.dirname(clip.path)].append(clip)
    kept = []
    for of_folder in folders.values():
        chosen = sorted(rng.permutation(len(of_folder))[: max(1, round(len(of_folder) * scale))])
        kept += [of_folder[number] for number in chosen]
    return kept


def _plan_scenes(made: Path, rows: list[dict], scale: float, rng: np.random.Generator) -> Iterable[Clip]:
    """Sequences and mixtures of two of pretrain's files, or more where they are short; sources come equally often."""
    sources = defaultdict(list)
    for row in rows:
        if row["part"] == "pretrain":
            sources[row["source"]].append(row)
    names = sorted(sources)
    for kind, least, most in (("sequences", 1, 1.5), ("mixtures", 0.8, 2)):
        for number in range(max(1, round(COUNTS[kind] * scale))):
            pieces, wanted, source = [], rng.uniform(least, most) * SCENE, rng.choice(names)
            while len(pieces) < 2 or sum(piece["seconds"] for piece in pieces) < wanted:
                pieces.append(rng.choice(sources[source if kind == "sequences" else rng.choice(names)]))
            paths = [piece["path"] for piece in pieces]
            sound = partial(_sequence if kind == "sequences" else _mixture, files=[made / path for path in paths])
            yield Clip(f"pretrain/{kind}/{number:04d}", kind, ";".join(paths), sound)


def _without_takes(made: Path, rows: list[dict], processes: ProcessPoolExecutor) -> list[dict]:
    """Remove the effects of a task that are takes or edits of one that comes before, in pretrain or in its train part.

    Only files of one package are compared: what two packages share is the same file, which is taken only once.
    """
    packages = defaultdict(list)
    for part in ("pretrain", "sound_source/train", "sound_source/test"):
        for row in rows:
            if (row["part"], row["source"]) == (part, "effects"):
                packages[row["origin"].split(":")[0]].append(row)
    takes = set(itertools.chain.from_iterable(processes.map(partial(_takes, made), packages.values())))
    for path in takes:
        (made / path).unlink()
    return [row for row in rows if row["path"] not in takes]


def _takes(made: Path, rows: list[dict]) -> set[str]:
    """Paths of the rows that are like a row of a part before their own; the rows are in the order of their parts."""
    size = next_fast_len(round(2 * EFFECT * SAMPLE_RATE), real=True)
    spectra, takes = [_half_whitened(made / row["path"], size) for row in rows], set()
    for row, spectrum in zip(rows, spectra, strict=True):
        for before, other in zip(rows, spectra, strict=True):
            if before["part"] == row["part"]:
                break
            is_event = _event(before["origin"]) == _event(row["origin"])
            if is_event or irfft(spectrum * other.conj(), size).max() > ALIKE:
                takes.add(row["path"])
                break
    return takes


def _half_whitened(path: Path, size: int) -> np.ndarray:
    """The spectrum of a recording, in whose correlations with others its loudest frequencies count less; of norm 1."""
    spectrum = rfft(np.diff(load_audio(path, duration=EFFECT).numpy()), size)
    magnitude = np.abs(spectrum)
    spectrum /= np.sqrt(np.maximum(magnitude, 1e-3 * magnitude.max()))
    return spectrum / np.linalg.norm(irfft(spectrum, size))


def _make(made: Path, seed: int, clip: Clip) -> dict | None:
    """Write the clip with a peak between -12 and -0.5 dB; returns its row of the index, or None for silence."""
    # Each clip has a random generator of its own, so that it does not matter which process makes it, and when.
    rng = np.random.default_rng([seed, zlib.crc32(clip.path.encode())])
    samples = clip.sound(rng)
    peak = np.abs(samples).max(initial=0)
    if peak < 1e-3:
        return None
    samples = np.pad(samples, (0, max(0, round(SHORTEST * SAMPLE_RATE) - len(samples))))
    path = made / f"{clip.path}.flac"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples * (10 ** (-rng.uniform(0.5, 12) / 20) / peak), SAMPLE_RATE, subtype="PCM_16")
    part, label = clip.place
    row = {"path": f"{clip.path}.flac", "part": part, "label": label, "source": clip.source, "origin": clip.origin}
    return row | {"seconds": round(len(samples) / SAMPLE_RATE, 3)}


# These functions make the sounds: from a random generator, samples (samples,) at SAMPLE_RATE and any level.


def _recording(rng: np.random.Generator, path: Path, start: float = 0.0, duration: float | None = None) -> np.ndarray:
    return _trim(load_audio(path, start, duration).numpy())


def _trim(sound: np.ndarray) -> np.ndarray:
    """The sound without the silence around it, but for 50 ms."""
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max(initial=0))
    margin = SAMPLE_RATE // 20
    return sound[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else sound[:0]


def _speak(rng: np.random.Generator, voice: str, text: str) -> np.ndarray:
    speed, pitch = str(rng.integers(110, 190)), str(rng.integers(20, 80))  # words per minute; 0..99
    return _trim(load_audio(_run(["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "--stdout", text])).numpy())


def _spoken_word(rng: np.random.Generator, voice: str, word: str) -> np.ndarray:
    """One second with the word at any place, every second time in noise 15 to 40 dB below it."""
    speech = _speak(rng, voice, word)[:SAMPLE_RATE]
    clip = np.zeros(SAMPLE_RATE)
    start = rng.integers(SAMPLE_RATE - len(speech) + 1)
    clip[start : start + len(speech)] = speech
    return _add_noise(rng, clip) if rng.random() < 0.5 else clip


def _add_noise(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """White, pink or brown noise 15 to 40 dB below the sound."""
    spectrum = np.fft.rfft(rng.standard_normal(len(sound)))
    noise = np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** rng.choice([0, 0.5, 1]), len(sound))
    return sound + noise * (sound.std() / noise.std() * 10 ** (-rng.uniform(15, 40) / 20))


def _play(rng: np.random.Generator, soundfont: Path, program: int, seconds: float, drums: bool = False) -> np.ndarray:
    """A note, a chord, a melody or a rhythm, played by a General-MIDI program or drum kit."""
    lowest = 28 if program in LOW_PROGRAMS else 45
    notes = _rhythm(rng, seconds) if drums else _melody(rng, seconds, lowest + rng.integers(24))
    channel = 9 if drums else 0
    events = [(0.0, mido.Message("program_change", channel=channel, program=program))]
    for start, end, pitch in notes:
        note = mido.Message("note_on", channel=channel, note=int(pitch), velocity=int(rng.integers(70, 120)))
        events += [(start, note), (end, note.copy(velocity=0))]
    # At MIDI's usual 120 beats a minute and 500 ticks per beat, a tick is a millisecond.
    file, track, ticks = mido.MidiFile(ticks_per_beat=500), mido.MidiTrack(), 0
    for time, event in sorted([*events, (seconds, mido.MetaMessage("end_of_track"))], key=lambda event: event[0]):
        track.append(event.copy(time=round(1000 * time) - ticks))
        ticks = round(1000 * time)
    file.tracks.append(track)
    with tempfile.TemporaryDirectory() as work:
        midi, wave = f"{work}/notes.mid", f"{work}/sound.wav"
        file.save(midi)
        # fluidsynth adds no reverberation and chorus, and reads only what the program needs of the sound font's 140 MB.
        settings = ["-niq", "-R0", "-C0", "-g0.5", "-r32000", "-osynth.dynamic-sample-loading=1"]
        _run(["fluidsynth", *settings, "-F", wave, str(soundfont), midi])
        sound = load_audio(wave).numpy()[: round(seconds * SAMPLE_RATE)]
    return np.pad(sound, (0, round(seconds * SAMPLE_RATE) - len(sound)))


def _melody(rng: np.random.Generator, seconds: float, pitch: int) -> list[tuple[float, float, int]]:
    """(start, end, pitch) of notes; times in seconds, pitches around the one given."""
    kind = rng.choice(["note", "chord", "melody"])
    if kind != "melody":
        end = rng.uniform(0.4, 0.95) * seconds
        chord = [(0,), (0, 4, 7), (0, 3, 7), (0, 5, 7), (0, 4, 7, 11)][rng.integers(1, 5) if kind == "chord" else 0]
        return [(0.0, end, pitch + step) for step in chord]
    notes, time, place = [], 0.0, 0
    scale = (0, 2, 4, 5, 7, 9, 11) if rng.random() < 0.5 else (0, 2, 3, 5, 7, 8, 10)
    beat = rng.uniform(0.12, 0.4)
    while time < seconds - 0.1:
        length = min(beat * rng.choice([1, 1, 2]), seconds - time)
        notes.append((time, time + 0.9 * length, pitch + 12 * (place // 7) + scale[place % 7]))
        time += length
        place = int(np.clip(place + rng.integers(-3, 4), -5, 9))
    return notes


def _rhythm(rng: np.random.Generator, seconds: float) -> list[tuple[float, float, int]]:
    """(start, end, drum) of three to six drums, in seconds; each has a chance of its own at every step."""
    drums, step = rng.integers(35, 82, rng.integers(3, 7)), rng.uniform(0.1, 0.25)
    chances = rng.uniform(0.1, 0.6, len(drums))
    times = np.arange(0, seconds - step, step)
    return [
        (t, t + step, drum) for t in times for drum, chance in zip(drums, chances, strict=True) if rng.random() < chance
    ]


def _sox_noise(rng: np.random.Generator) -> np.ndarray:
    """Six seconds of noise, filtered or amplitude-modulated noise, a tone, a sweep, or clicks."""
    low, high = sorted(np.exp(rng.uniform(np.log(60), np.log(7000), 2)))  # Hz
    noise, wave = rng.choice(["white", "pink", "brown"]), rng.choice(["sine", "square", "triangle", "sawtooth"])
    effects = [
        f"synth 60 {noise}noise",
        f"synth 60 {noise}noise sinc {low:.0f}-{high + 50:.0f}",
        f"synth 60 {noise}noise tremolo {rng.uniform(0.5, 15):.2f} {rng.uniform(40, 95):.0f}",
        f"synth 60 {wave} {low:.0f} tremolo {rng.uniform(0.5, 10):.2f} {rng.uniform(0, 80):.0f}",
        f"synth {rng.uniform(1, 6):.2f} {wave} {low:.0f}{rng.choice([':', '/'])}{high + 50:.0f} repeat 59",
        f"synth 60 square {rng.uniform(1, 30):.2f} 0 0 1 sinc {low:.0f}",
    ][rng.integers(6)]
    # With -R, sox makes the same minute of noise every time, so each call takes six seconds from another place in it.
    command = f"sox -R -n -r {SAMPLE_RATE} -b 16 -t wav - {effects} trim {rng.uniform(0, 50):.2f} 6 gain -n -3"
    return load_audio(_run(command.split())).numpy()


def _sequence(rng: np.random.Generator, files: list[Path]) -> np.ndarray:
    """The files one after the other, at levels of -15 to 0 dB, a third of the sequences with noise."""
    parts = []
    for file in files:
        sound = load_audio(file).numpy()
        parts.append(sound / np.abs(sound).max() * 10 ** (-rng.uniform(0, 15) / 20))
        parts.append(np.zeros(rng.integers(round(GAP * SAMPLE_RATE))))
    sequence = np.concatenate(parts)[: round(SCENE * SAMPLE_RATE)]
    return _add_noise(rng, sequence) if rng.random() < 1 / 3 else sequence


def _mixture(rng: np.random.Generator, files: list[Path]) -> np.ndarray:
    """The files at random places and levels, -15 to 0 dB; a third of the mixtures in a room, a third with noise."""
    scene = np.zeros(round(SCENE * SAMPLE_RATE))
    for file in files:
        sound = load_audio(file).numpy()
        sound = sound / np.abs(sound).max() * 10 ** (-rng.uniform(0, 15) / 20)
        start = rng.integers(max(SAMPLE_RATE, len(scene) - len(sound)))
        sound = sound[: len(scene) - start]
        scene[start : start + len(sound)] += sound
    if rng.random() < 1 / 3:
        # The echoes of a room are noise that falls by 60 dB in its reverberation time.
        times = np.arange(round(rng.uniform(0.2, 1.0) * SAMPLE_RATE))
        echoes = rng.standard_normal(len(times)) * 10 ** (-3 * times / len(times))
        wet = fftconvolve(scene, echoes)[: len(scene)]
        scene += wet * (scene.std() / wet.std() * 10 ** (-rng.uniform(3, 15) / 20))
    return _add_noise(rng, scene) if rng.random() < 1 / 3 else scene


def _describe(made: Path, roots: dict[str, Path], debs: dict[str, Path], rows: list[dict], seed: int, scale: float):
    """Write index.csv, sources.json and licences/."""
    with open(made / "index.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "part", "label", "source", "origin", "seconds"])
        writer.writeheader()
        writer.writerows(rows)
    (made / "licences").mkdir()
    packages = {}
    for key, deb in debs.items():
        name, version = _run(["dpkg-deb", "-W", "--showformat=${Package} ${Version}", str(deb)]).decode().split()
        text = (roots[key] / "usr/share/doc" / name / "copyright").read_text()
        (made / "licences" / name).write_text(text)
        licences = sorted(set(re.findall(r"^License: *(\S.*)$", text, re.MULTILINE))) or LICENCES[key]
        packages[name] = {"version": version, "licences": licences, "taken": PACKAGES[key]}
    parts = defaultdict(lambda: {"files": 0, "seconds": 0.0})
    for row in rows:
        part = parts[f"pretrain/{row['source']}" if row["part"] == "pretrain" else row["part"]]
        part["files"] += 1
        part["seconds"] = round(part["seconds"] + row["seconds"], 3)
    programs = {name: _run([name, "--version"]).decode().splitlines()[0] for name in ("espeak-ng", "fluidsynth", "sox")}
    sources = {"seed": seed, "scale": scale, "packages": packages, "programs": programs, "parts": parts}
    (made / "sources.json").write_text(json.dumps(sources, indent=2, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="to be made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the files to make, 1.0 is about 54 h")
    parser.add_argument("--downloads", help="folder of package files, to be used and added to")
    arguments = parser.parse_args()
    make_sounds(**vars(arguments))
    parts = json.loads((Path(arguments.folder) / "sources.json").read_text())["parts"]
    for part, held in sorted(parts.items()):
        print(f"{part}: {held['files']} files, {held['seconds'] / 3600:.2f} h")


if __name__ == "__main__":
    main()
