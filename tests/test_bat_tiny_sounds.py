"""The sounds for BAT-tiny: their format, splits that share nothing, the same files every time, whole or not at all."""

import csv
import hashlib
import json
import shutil
from collections import defaultdict
from itertools import chain

import numpy as np
import pytest
import soundfile

from bat_tiny.sounds import (
    ACCENTS,
    FAMILIES,
    LANGUAGES,
    PROGRAMS,
    SCENES,
    SOUND_SOURCES,
    VARIANTS,
    WORDS,
    _divide,
    _event,
    _group,
    _takes,
    make_sounds,
)

MISSING = [program for program in PROGRAMS if not shutil.which(program)]
LABELS = {
    "instrument_family": set(FAMILIES),
    "recorded_language": set(LANGUAGES),
    "sound_source": set(SOUND_SOURCES),
    "spoken_word": set(WORDS),
}
SOURCES = {"effects", "instruments", "noises", "prompts", "recorded_speech", "synthesised_speech", *SCENES}


needs_programs = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def builds(test):
    """A test of what is made of some 700 MB of packages, which one worker fetches for all."""
    return pytest.mark.slow(pytest.mark.xdist_group("bat_tiny_sounds")(needs_programs(test)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of two small builds from the same packages, and their index."""
    work = tmp_path_factory.mktemp("sounds")
    for name in ("first", "second"):
        make_sounds(work / name, seed=3, scale=0.05, downloads=work / "debs")
    with open(work / "first" / "index.csv", newline="") as file:
        return work, list(csv.DictReader(file))


def shared_between(rows, key) -> dict[str, set[str]]:
    """What `key` gives for rows of more than one split, by task."""
    shared = {}
    for task in LABELS:
        splits = defaultdict(set)
        for row in rows:
            if row["part"] in ("pretrain", f"{task}/train", f"{task}/test") and row["source"] not in SCENES:
                splits[row["part"]].add(key(row))
        pretrain, train, test = splits["pretrain"], splits[f"{task}/train"], splits[f"{task}/test"]
        shared[task] = (pretrain & (train | test)) | (train & test)
    return shared


@builds
def test_every_file_is_indexed_and_sounds_at_16_khz_mono(made):
    work, rows = made
    folder = work / "first"
    assert sorted(row["path"] for row in rows) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.flac")
    )
    for row in rows:
        sound, rate = soundfile.read(folder / row["path"])
        assert (rate, sound.ndim, soundfile.info(folder / row["path"]).subtype) == (16000, 1, "PCM_16")
        assert np.isfinite(sound).all()
        assert 0.2 < np.abs(sound).max() < 0.96, row
        assert len(sound) / rate == pytest.approx(float(row["seconds"]), abs=1e-3)
        assert len(sound) / rate >= 0.5


@builds
def test_every_source_and_class_is_there(made):
    _, rows = made
    assert {row["source"] for row in rows if row["part"] == "pretrain"} == SOURCES
    for task, labels in LABELS.items():
        for split in ("train", "test"):
            of_split = [row for row in rows if row["part"] == f"{task}/{split}"]
            assert {row["label"] for row in of_split} == labels
            assert all(row["path"].startswith(f"tasks/{task}/{split}/{row['label']}/") for row in of_split)
    lengths = {
        task: {float(row["seconds"]) for row in rows if row["part"].startswith(task)}
        for task in ("spoken_word", "instrument_family")
    }
    assert lengths == {"spoken_word": {1.0}, "instrument_family": {2.0}}


@builds
def test_pretrain_train_and_test_share_nothing(made):
    """Nor a group of recordings, a prompt in another language, a variant with another accent, or an accent."""
    _, rows = made
    nothing = {task: set() for task in LABELS}
    assert shared_between(rows, lambda row: row["origin"]) == nothing

    def of(source, key):
        return shared_between([row for row in rows if row["source"] == source], key)

    assert of("effects", lambda row: _event(row["origin"])) == nothing
    assert of("prompts", lambda row: row["origin"].split("/sounds/")[1].split("/", 1)[1]) == nothing
    assert of("synthesised_speech", lambda row: row["origin"].split("+")[0]) == nothing
    assert of("synthesised_speech", lambda row: row["origin"].split("+")[1]) == nothing
    assert {row["source"] for row in rows} == SOURCES


def test_takes_of_a_recording_before_are_found(tmp_path):
    """Shifted, filtered, at another level and in noise; or by their names alone. Other recordings are none."""
    rng = np.random.default_rng(0)
    sound, other, third = rng.standard_normal((3, 16000)) * np.exp(-np.arange(16000) / 4000)
    take = np.convolve(np.pad(sound[500:], (3000, 0)), [0.2, 0.1, 0.05])
    files = {
        ("pretrain", "door"): sound,
        ("sound_source/train", "gate"): take + 0.01 * rng.standard_normal(len(take)),
        ("sound_source/train", "bell"): other,
        ("sound_source/test", "bell_soft"): third,
        ("sound_source/test", "horn"): rng.standard_normal(20000),
        ("sound_source/test", "bell2"): -0.5 * other[:9000],
    }
    rows = []
    for (part, name), samples in files.items():
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * samples, 16000)
        rows.append({"path": f"{name}.wav", "part": part, "origin": f"package:{name}.wav"})
    assert _takes(tmp_path, rows) == {"gate.wav", "bell_soft.wav", "bell2.wav"}


@builds
def test_scenes_are_made_of_pretrain_only(made):
    _, rows = made
    scenes = [row for row in rows if row["source"] in SCENES]
    pieces = {piece for scene in scenes for piece in scene["origin"].split(";")}
    assert pieces <= {row["path"] for row in rows if row["part"] == "pretrain" and row["source"] not in SCENES}
    assert {scene["part"] for scene in scenes} == {"pretrain"}
    for scene in scenes:
        sources = {piece.split("/")[1] for piece in scene["origin"].split(";")}
        assert len(sources) == 1 or scene["source"] == "mixtures"


@builds
def test_the_same_seed_gives_the_same_files(made):
    work, _ = made
    digests = [
        {
            str(path.relative_to(work / name)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (work / name).rglob("*")
            if path.is_file()
        }
        for name in ("first", "second")
    ]
    assert digests[0] == digests[1]
    sounds = [digest for path, digest in digests[0].items() if path.endswith(".flac")]
    assert len(set(sounds)) == len(sounds)


@builds
def test_the_packages_and_their_licences_are_noted(made):
    work, rows = made
    sources = json.loads((work / "first" / "sources.json").read_text())
    assert len(sources["packages"]) == len(list((work / "debs").glob("*.deb")))
    for name, package in sources["packages"].items():
        assert package["version"]
        assert package["licences"]
        assert package["taken"]
        assert "opyright" in (work / "first" / "licences" / name).read_text()
    parts = sources["parts"]
    assert sum(part["files"] for part in parts.values()) == len(rows)
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(sum(float(row["seconds"]) for row in rows))


@needs_programs
def test_nothing_is_left_of_a_build_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("bat_tiny.sounds.PACKAGES", {"iso-codes": "names"})
    (tmp_path / "debs").mkdir()
    (tmp_path / "debs" / "iso-codes_0_all.deb").write_text("no package")
    with pytest.raises(RuntimeError, match=r"dpkg-deb .*iso-codes_0_all\.deb .* failed"):
        make_sounds(tmp_path / "new" / "sounds", downloads=tmp_path / "debs")
    assert not list((tmp_path / "new").iterdir())


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(FileExistsError, match="there already"):
        make_sounds(tmp_path)


def test_all_missing_programs_are_named_in_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "which", lambda program: None if program in ("apt-get", "fluidsynth", "sox") else "/bin/a"
    )
    with pytest.raises(FileNotFoundError, match=r"apt-get, fluidsynth, sox\..*apt-get install .*apt fluidsynth sox"):
        make_sounds(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_voices_are_in_one_split():
    for of_splits in (ACCENTS, VARIANTS):
        names = [name for split in of_splits.values() for name in split]
        assert len(set(names)) == len(names)


def test_groups_of_recordings_are_divided_whole_and_by_share():
    rng = np.random.default_rng(0)
    groups = {f"event {n}": [f"take {take} of {n}" for take in range(rng.integers(1, 5))] for n in range(200)}
    splits = _divide(groups, rng, {"pretrain": 2, "train": 2, "test": 1}, {"train": 60, "test": 20})
    assert sorted(chain(*splits.values())) == sorted(chain(*groups.values()))
    events = {split: {take.split(" of ")[1] for take in takes} for split, takes in splits.items()}
    assert not events["pretrain"] & events["train"]
    assert not events["test"] & (events["train"] | events["pretrain"])
    assert 60 <= len(splits["train"]) < 64
    assert 20 <= len(splits["test"]) < 24
    sizes = {split: len(takes) for split, takes in _divide(groups, rng, {"pretrain": 2, "train": 1, "test": 1}).items()}
    assert sizes["pretrain"] / sizes["train"] == pytest.approx(2, abs=0.1)
    assert sizes["train"] / sizes["test"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("file", "group"),
    [
        ("sounds/wolf-hit-2.ogg", "game:wolf-hit"),
        ("axe-miss.ogg", "game:axe"),
        ("magic-missile-1-miss.ogg", "game:magic-missile"),
        ("magic-missile-1.ogg", "game:magic-missile"),
        ("1e-0.wav", "game:1e"),
        ("snare07.ogg", "game:snare"),
        ("footstep.3.ogg", "game:footstep"),
    ],
)
def test_takes_of_one_event_are_a_group(file, group):
    assert _group(f"game:{file}") == group
