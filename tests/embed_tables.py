"""What the tests of embedding share: a run in this process, what its table holds, and recordings that are broken."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import torch
from pyarrow import parquet

from bat_audio_tools.embed import embed
from bat_audio_tools.settings import EmbedSettings

RATE = 16000  # Hz


def run_embed(inputs, out, checkpoint, **options) -> dict:
    options = {"workers": 0, "device": "cpu", **options}
    return embed(EmbedSettings(inputs=inputs, out=str(out), checkpoint=checkpoint, **options))


def read(out) -> pa.Table:
    return parquet.read_table(Path(out) / "embeddings")


def read_errors(out) -> list[dict]:
    return parquet.read_table(run_folder(out) / "errors.parquet").to_pylist()


def run_folder(out) -> Path:
    """The folder beside a table that holds all but its rows."""
    return Path(f"{out}.run")


def assert_same_table(out, other):
    assert read(out).equals(read(other))
    assert read_errors(out) == read_errors(other)
    assert [p.name for p in sorted(Path(out, "embeddings").iterdir())] == [
        p.name for p in sorted(Path(other, "embeddings").iterdir())
    ]


def vectors(table: pa.Table, column: str) -> torch.Tensor:
    return torch.tensor(np.stack(table[column].to_numpy(zero_copy_only=False)).astype(np.float32))


def broken_files(folder: Path) -> dict[str, str | None]:
    """Files that are broken in many ways, and the reason for each, None where it is only unusual."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal(16000)

    def wav(samples, rate=16000, form="WAV", **options) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format=form, **options)
        return file.getvalue()

    whole, header_rate = wav(noise), 24  # the offset of the rate in a WAV header
    contents = {
        "empty.wav": (b"", "the file is empty"),
        "truncated.wav": (whole[:9000], "truncated"),
        "truncated.flac": (wav(noise, form="FLAC")[:9000], "truncated|lost sync|flac"),
        "text.wav": (b"These are words, and no sound at all.\n" * 50, "it holds text, no sound"),
        "nan.wav": (wav(np.full(16000, np.nan), subtype="FLOAT"), "NaN"),
        "zero_rate.wav": (whole[:header_rate] + bytes(4) + whole[header_rate + 4 :], "rate|sound|audio"),
        "one_sample.wav": (wav(noise[:1]), "1 samples are too few"),
        "huge.wav": (wav(noise * 1e20, subtype="FLOAT"), "above 1e"),
        "eight_bit.wav": (wav(noise, subtype="PCM_U8"), None),
        "float.wav": (wav(noise, subtype="FLOAT"), None),
        "seven_one.wav": (wav(noise[:, None].repeat(8, axis=1)), None),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: reason for name, (_, reason) in contents.items()}


def make_many(folder: Path, number: int, broken_every: int):
    broken_files(folder.parent / "broken")
    ways = sorted((folder.parent / "broken").iterdir())
    rng = np.random.default_rng(0)
    for place in range(number):
        file = folder / f"{place // 50:03d}" / f"{place:05d}.wav"
        file.parent.mkdir(exist_ok=True)
        if place % broken_every == 0:
            shutil.copy(ways[place // broken_every % len(ways)], file)
        else:
            soundfile.write(file, 0.1 * rng.standard_normal(16000 + 4000 * (place % 3)), 16000)


def unfinished(out: Path) -> list[str]:
    files = [*out.rglob("*"), *run_folder(out).rglob("*")]
    return [path.name for path in files if path.name.startswith(".")]


def descendants(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
