"""Where sounds are named: the rows of CSV and Parquet files and of `datasets`."""

import contextlib
import csv
import functools
import glob
import io
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bat_audio_tools.machine import require
from bat_audio_tools.names import hub_id, is_address, suffix_of
from bat_audio_tools.settings import check_channel

MANIFEST_SUFFIXES = (".csv", ".parquet")
LIST_SUFFIXES = (".txt", *MANIFEST_SUFFIXES)
# Containers with sound that PyAV reads, by the names that FFmpeg gives them when it reads, and when it writes.
CONTAINERS = """
    aa aac ac3 adts adx aiff amr ape asf au avi caf dsf dts dtshd dvd eac3 flac flv gsm iff ipod latm loas matroska mlp
    mov mp2 mp3 mpc mpc8 mpeg mpegts mxf nut oga ogg ogv oma opus rm shn spx tak truehd tta vob voc vqf w64 wav webm wv
    xwma
"""
# Neither PyAV nor libsndfile tells these suffixes of files that they read.
OTHER_SUFFIXES = """
    .3gpp .awb .bwf .dff .dsf .f4a .iff .loas .m4r .mp1 .ogm .ogx .qt .rmvb .sf .snd .sph .wave .weba .xwma
"""
# PyAV tells these too, but most such files hold pictures, subtitles or text.
NOT_SOUNDS = ".apl .avif .heic .heif .ism .mks .psp"
LONGEST = 1e12  # Seconds; with the rate of any file, so many still make a number of samples in 64 bits.


@dataclass(frozen=True, eq=False)
class EmbeddedAudio:
    """A sound file inside a `datasets` dataset; its bytes are read only when asked for."""

    dataset: "datasets.Dataset"  # noqa: F821
    row: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}, row {self.row}"

    def open(self) -> io.BytesIO:
        file = io.BytesIO(self.dataset[self.row]["audio"]["bytes"])
        file.name = str(self)  # The errors of load_audio begin with this name.
        return file


@functools.cache
def sound_suffixes() -> frozenset[str]:
    """The suffixes of files with sound that libsndfile or PyAV reads, in small letters."""
    container = require("av", "embed").format.ContainerFormat
    names = set(require("soundfile", "embed").available_formats())
    for name, mode in itertools.product(CONTAINERS.split(), "rw"):
        with contextlib.suppress(ValueError):  # Most containers have another name in the other mode, or none.
            names |= container(name, mode).extensions
    suffixes = {f".{name.lower()}" for name in names}.union(OTHER_SUFFIXES.split())
    return frozenset(suffixes.difference(NOT_SOUNDS.split(), [".raw"]))  # No header tells what is in a .raw file.


def known_suffixes() -> frozenset[str]:
    """The suffixes of `sound_suffixes`, and those of lists of sounds."""
    return sound_suffixes().union(LIST_SUFFIXES)


def check_source(source: str):
    """Raise a FileNotFoundError for sounds that cannot be there; a name that may be on the Hub is not looked up.

    Args:
        source: a file, folder or glob, an address, or the name of a dataset on the Hub.
    """
    # A link that leads nowhere is there, and is told of as a broken recording.
    if is_address(source) or os.path.lexists(source) or glob.has_magic(source):
        return
    # The path of a missing sound or list may look like a name on the Hub, but for its suffix.
    if not hub_id(source) or suffix_of(source) in known_suffixes():
        raise FileNotFoundError(f"{source}: no such file or folder, and nothing that matches.")


def manifest_columns(file: str) -> list[str]:
    """The columns of a CSV (commas, UTF-8) or Parquet file, which may be an address of fsspec.

    Raises:
        ValueError, OSError: as of `manifest_rows`.
    """
    with _open_manifest(file) as manifest:
        return list(manifest.fieldnames or []) if isinstance(manifest, csv.DictReader) else manifest.schema_arrow.names


def manifest_rows(file: str, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """The name and cells of each row of a CSV or Parquet file; of a Parquet file only the columns that are named.

    Raises:
        ValueError: it cannot be read, or a row has too many cells or no path; the message names the row.
        OSError: it is not there.
    """

    def named_rows():
        if isinstance(manifest, csv.DictReader):
            for cells in manifest:
                where = f"{file}, line {manifest.line_num}"
                if None in cells or None in cells.values():  # There are more or fewer cells than columns.
                    number = len(manifest.fieldnames)
                    raise ValueError(f"{where}: expected {number} cells as in line 1; quote cells that hold commas.")
                yield where, cells
        else:
            known = [column for column in manifest.schema_arrow.names if column in columns]
            batches = manifest.iter_batches(columns=known)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"{file}, row {number}", cells) for number, cells in enumerate(rows))

    with _open_manifest(file) as manifest:
        for where, cells in named_rows():
            if not isinstance(cells["path"], str) or not cells["path"]:
                raise ValueError(f"{where}: path={cells['path']!r} names no sound file.")
            yield where, cells


def open_list(file: str) -> contextlib.AbstractContextManager[io.IOBase]:
    """The bytes of a list, which may be an address of fsspec."""
    if not is_address(file):
        return open(file, "rb")
    import fsspec

    return fsspec.open(file, "rb")


@contextlib.contextmanager
def _open_manifest(file: str) -> Iterator["csv.DictReader | pyarrow.parquet.ParquetFile"]:  # noqa: F821
    with open_list(file) as content:
        if suffix_of(file) == ".csv":
            try:
                yield csv.DictReader(io.TextIOWrapper(content, "utf-8-sig", newline=""), strict=True)
            except (UnicodeDecodeError, csv.Error) as error:
                raise ValueError(f"{file}: cannot be read as CSV in UTF-8: {error}.") from error
        else:
            arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
            try:
                yield parquet.ParquetFile(content)
            except (arrow.ArrowException, OSError) as error:
                raise ValueError(f"{file}: cannot be read as Parquet: {error}") from error


def load_named_dataset(source: str | Path) -> "datasets.Dataset | datasets.DatasetDict | None":  # noqa: F821
    """The dataset in a folder of save_to_disk, or of this name on the Hub; None where the source can be neither.

    Raises:
        OSError: it looks like a name on the Hub, but there is no such dataset.
    """
    from huggingface_hub.errors import HTTPError

    path = Path(source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return require("datasets").load_from_disk(str(path))
    if not hub_id(source) or path.suffix.lower() in MANIFEST_SUFFIXES:
        return None
    try:
        return require("datasets").load_dataset(source)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # The Hub client's HTTPError is no OSError.
        raise OSError(
            f"{source}: no such file or folder here, and no dataset of that name could be had from the Hub "
            f"({type(error).__name__}: {error})."
        ) from error


def choose_split(dataset, name: str, split: str | None) -> tuple["datasets.Dataset", str]:  # noqa: F821
    """The dataset of this split, and its name; raises a ValueError where it cannot be told."""
    datasets = require("datasets")
    if isinstance(dataset, datasets.DatasetDict):
        if split is None and len(dataset) == 1:
            split = next(iter(dataset))
        if split not in dataset:
            raise ValueError(f"{name}: split={split!r} is none of its splits; choose from {', '.join(dataset)}.")
        dataset, name = dataset[split], f"{name}, split {split}"
    elif split is not None:
        raise ValueError(f"split={split!r} chooses from a DatasetDict, but {name} is none; leave it out.")
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"Got a data source of type {type(dataset).__name__}; expected a folder, a .csv or .parquet file, or a "
            "datasets.Dataset or DatasetDict."
        )
    return dataset, name


def dataset_sounds(dataset: "datasets.Dataset", name: str) -> Iterator[str | EmbeddedAudio]:  # noqa: F821
    """The sound of each row in the column `audio`; raises a ValueError where there is none."""
    audio = without_decoding(dataset, name)
    all_embedded = audio.flatten().data.column("audio.bytes").null_count == 0  # This reads no sounds.
    for number in range(len(audio)):
        sound = {} if all_embedded else audio[number]["audio"] or {}
        is_embedded = all_embedded or sound.get("bytes") is not None
        if not is_embedded and not sound.get("path"):
            raise ValueError(f"{name}, row {number}: the column audio is empty.")
        yield EmbeddedAudio(audio, number, name) if is_embedded else sound["path"]


def without_decoding(dataset: "datasets.Dataset", name: str) -> "datasets.Dataset":  # noqa: F821
    """The column `audio` as dicts with `bytes` and `path`; raises a ValueError where it is none of audio."""
    datasets = require("datasets")
    try:
        return dataset.select_columns("audio").cast_column("audio", datasets.Audio(decode=False)).with_format(None)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: the column audio holds no sound files, neither paths nor bytes ({error})."
        ) from error


def check_columns(columns: Sequence[str], name: str, required: Sequence[str]):
    missing = [column for column in required if column not in columns]
    if missing:
        raise ValueError(
            f"{name}: no column {' and no '.join(map(repr, missing))} among {', '.join(map(repr, columns)) or 'none'}; "
            "add it, or rename a column (commas separate those of a CSV file)."
        )


def read_channel(cells: dict, where: str) -> str | None:
    """The cell `channel`, None where it is empty or there is no such column."""
    value = cells.get("channel")
    if value in (None, "") or value != value:  # An empty cell of a column of numbers is NaN.
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return check_channel(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_seconds(cells: dict, column: str, where: str) -> float | None:
    value = cells.get(column)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds <= LONGEST:
        raise ValueError(f"{where}: {column}={value!r} is no time; expected seconds from 0 to {LONGEST:g}, or nothing.")
    return seconds
