"""What to embed: files, folders, globs, lists of files and datasets, as one list that is cut into units of work.

`list_inputs` goes through them in an order that depends on their names alone. `write_plan` keeps the list in a Parquet
file, one row group for each unit, so that neither the list nor the table of embeddings is ever in memory as a whole. To
find inputs that are named twice, a digest of each is kept in memory: about 100 MB for a million.
"""

import glob
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import fsspec
import pyarrow as pa
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pyarrow import parquet
from transformers.utils import logging

from bat_audio_tools.names import is_address
from bat_audio_tools.sounds.manifests import (
    LIST_SUFFIXES,
    EmbeddedAudio,
    all_sound_suffixes,
    check_columns,
    choose_split,
    dataset_sounds,
    known_suffixes,
    load_named_dataset,
    manifest_columns,
    manifest_rows,
    read_seconds,
)
from bat_audio_tools.sounds.reading import Input

# The bytes of a part of a recording are guessed from its length, as if it were FLAC of CD quality.
BYTES_PER_SECOND = 100_000
# A unit is full when it has this size times the files that it may have, so one of long recordings has fewer files.
UNIT_BYTES = 1 << 20
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "path": pa.string(),
        "start": pa.float64(),
        "duration": pa.float64(),
        "row": pa.int64(),
        "problem": pa.string(),
        "bytes": pa.int64(),
    }
)
logger = logging.get_logger(__name__)


def read_dataset(sources: Sequence, split: str | None) -> tuple["datasets.Dataset", str] | None:  # noqa: F821
    """The dataset, and its name, if the source is one.

    Raises:
        ValueError: a dataset among other sources, or the split cannot be told.
        OSError: it looks like a name on the Hub, but there is no such dataset.
    """
    known = known_suffixes()

    def find(source):
        if not isinstance(source, str | Path):
            return source
        # A sound that is not there would otherwise be looked for on the Hub.
        is_other = is_address(str(source)) or Path(source).suffix.lower() in known
        return None if is_other else load_named_dataset(source)

    found = list(map(find, sources))
    if any(dataset is not None for dataset in found):
        if len(found) > 1:
            raise ValueError(f"Got {len(found)} inputs with a dataset among them; embed a dataset by itself.")
        return choose_split(found[0], "the dataset" if found[0] is sources[0] else str(sources[0]), split)
    if split is not None:
        raise ValueError(f"split={split!r} chooses from a dataset, but none is among the inputs; leave it out.")
    return None


def list_inputs(sources: Sequence, dataset: tuple["datasets.Dataset", str] | None) -> Iterator[tuple[Input, int]]:  # noqa: F821
    """Every recording with its size in bytes, where that costs nothing to know, and else 0.

    Args:
        sources: paths, globs and addresses; of folders the sounds in them, by their names, sorted folder by folder.
            Hidden files are left out, and files that are no sounds by name with a warning, in globs too. Lists are .txt
            files with a path per line, and .csv or .parquet files with the column `path` and optionally `id`, and
            `start` and `duration` in seconds; their paths are relative to the file itself.
        dataset: as of `read_dataset`; takes the place of the sources.

    Raises:
        ValueError: an input without sounds, or a list that cannot be read; the message names file and row.
        FileNotFoundError: no such input.
    """
    if dataset is not None:
        if len(dataset[0]) == 0:
            raise ValueError(f"{dataset[1]}: there are no rows in it.")
        yield from ((item, 0) for item in _of_dataset(*dataset))
        return
    for source in map(str, sources):
        listed = _of_source(source)
        first = next(listed, None)
        if first is None:
            raise ValueError(f"{source}: no sounds in it. Name sound files, folders of them, or lists of them.")
        for item, size in itertools.chain([first], listed):
            yield _in_utf8(item), size


def _in_utf8(item: Input) -> Input:
    """Escape a path that is not UTF-8, which Parquet cannot hold: the recording is listed, but cannot be opened."""
    try:
        item.path.encode()
    except UnicodeEncodeError:
        path = item.path.encode(errors="surrogateescape").decode(errors="backslashreplace")
        return Input(path, path, problem="Its name is not in UTF-8, as the column path has to be; rename it.")
    return item


def _of_source(source: str) -> Iterator[tuple[Input, int]]:
    files, root = url_to_fs(source) if is_address(source) else (LocalFileSystem(), os.path.abspath(source))
    if has_magic(source) and not files.exists(root):
        if is_address(source):
            matches = [files.unstrip_protocol(match) for match in files.glob(root)]
        else:
            matches = glob.glob(source, recursive=True)
        suffixes, skipped, first_skipped = all_sound_suffixes(), 0, None
        for match in sorted(matches):
            if _suffix(match) in suffixes or files.isdir(match):
                yield from _of_source(match)
            else:
                skipped, first_skipped = skipped + 1, first_skipped or match
        _warn_of_skipped(source, skipped, first_skipped)
    elif files.isdir(root):
        for path, size in _of_folder(source):
            yield Input(path, path), size
    elif not files.exists(root):
        raise FileNotFoundError(f"{source}: no such file or folder, and nothing that matches.")
    elif source.lower().endswith(LIST_SUFFIXES):
        last = None
        for item in _of_list(source):
            if item.duration is not None:
                size = round(item.duration * BYTES_PER_SECOND)
            else:
                size = 0 if item.path == last else _size(item.path)
            yield item, size
            last = item.path
    elif _suffix(source) == ".tsv":
        raise ValueError(f"{source}: lists are .txt, .csv with commas, or .parquet; convert it.")
    else:
        yield Input(source, source), _size(source)


def _of_folder(folder: str) -> Iterator[tuple[str, int]]:
    suffixes, skipped, first_skipped = all_sound_suffixes(), 0, None
    for parent, names in _walk(folder):
        for name in sorted(name for name in names if name[0] != "."):
            path = os.path.join(parent, name)
            if _suffix(name) in suffixes:
                yield path, _size(path) if names[name] is None else names[name]
            else:
                skipped, first_skipped = skipped + 1, first_skipped or path
    _warn_of_skipped(folder, skipped, first_skipped)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _warn_of_skipped(source: str, skipped: int, first: str | None):
    if skipped:
        logger.warning(f"{source}: {skipped} files are left out that are no sounds by name (first: {first}).")


def _walk(folder: str) -> Iterator[tuple[str, dict[str, int | None]]]:
    """Each folder, in order, and the sizes of its files, where the listing tells them."""
    if not is_address(folder):
        above = {folder: frozenset()}  # Each folder that is still to come has the folders around it.
        for parent, folders, names in os.walk(folder, followlinks=True):
            around = above.pop(parent) | {_identity(parent)}
            visible = sorted(name for name in folders if name[0] != ".")
            folders[:] = [name for name in visible if _identity(os.path.join(parent, name)) not in around]
            for name in set(visible).difference(folders):
                logger.warning(f"{os.path.join(parent, name)}: left out, a link to a folder around it.")
            above.update((os.path.join(parent, name), around) for name in folders)
            yield parent, dict.fromkeys(names)
        return
    files, root = url_to_fs(folder)
    for parent, folders, entries in files.walk(root, detail=True):
        visible = {name: folders[name] for name in sorted(folders) if name[0] != "."}
        folders.clear()
        folders.update(visible)
        yield files.unstrip_protocol(parent), {name: entry["size"] for name, entry in entries.items()}


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _size(path: str) -> int:
    """The bytes of a local file, and 0 for a remote one: asking for each would take longer than it is worth."""
    return os.path.getsize(path) if not is_address(path) and os.path.isfile(path) else 0


def _of_list(source: str) -> Iterator[Input]:
    def beside(path: str) -> str:
        return path if is_address(path) else os.path.join(os.path.dirname(source), path)

    if source.lower().endswith(".txt"):
        try:
            with fsspec.open(source, "rb") as content:
                for line in io.TextIOWrapper(content, "utf-8-sig"):
                    if line.strip():
                        path = beside(line.rstrip("\r\n"))
                        yield Input(path, path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: cannot be read as text in UTF-8: {error}.") from error
    else:
        check_columns(manifest_columns(source), source, ["path"])
        for where, cells in manifest_rows(source, ["path", "id", "start", "duration"]):
            yield _of_row(cells, where, beside(cells["path"]))


def _of_dataset(dataset: "datasets.Dataset", name: str) -> Iterator[Input]:  # noqa: F821
    check_columns(dataset.column_names, name, ["audio"])
    others = [column for column in ("id", "start", "duration") if column in dataset.column_names]
    rows = dataset.select_columns(others).with_format(None) if others else [{}] * len(dataset)
    for number, (cells, sound) in enumerate(zip(rows, dataset_sounds(dataset, name), strict=True)):
        row = number if isinstance(sound, EmbeddedAudio) else None
        yield _of_row(cells, f"{name}, row {number}", str(sound), row)


def _of_row(cells: dict, where: str, path: str, row: int | None = None) -> Input:
    duration = read_seconds(cells, "duration", where)
    if duration == 0:
        raise ValueError(f"{where}: duration=0 holds no sound; leave it empty to reach to the end of the file.")
    name = cells.get("id")
    return Input(
        path if name in (None, "") else str(name), path, read_seconds(cells, "start", where) or 0.0, duration, row
    )


def _plain(item: Input) -> Input:
    """The input with its path in a plain form, so that ./x and x are the same input."""
    if is_address(item.path) or "./" not in item.path:
        return item
    path = re.sub(r"(?<![^/])(\./+)+", "", item.path)
    return replace(item, path=path, id=path if item.id == item.path else item.id)


def _key(item: Input) -> bytes:
    return hashlib.blake2b(repr(astuple(item)).encode(errors="surrogateescape"), digest_size=16).digest()


def write_plan(inputs: Iterable[tuple[Input, int]], file, unit_size: int) -> dict:
    """Write the inputs to an open Parquet file, each once, cut into units of at most `unit_size` inputs.

    Returns:
        `files`, how many there are, and `sha256` of the list.
    """
    digest, seen, unit, unit_bytes, count = hashlib.sha256(), set(), [], 0, 0
    with parquet.ParquetWriter(file, SCHEMA, compression="zstd") as writer:

        def write_unit():
            writer.write_table(pa.Table.from_pylist([{**vars(item), "bytes": size} for item, size in unit], SCHEMA))

        for item, size in inputs:
            key = _key(_plain(item))
            count += 1
            if key in seen:
                continue
            seen.add(key)
            digest.update(_key(item))
            if len(unit) == unit_size or unit_bytes >= unit_size * UNIT_BYTES:
                write_unit()
                unit, unit_bytes = [], 0
            unit.append((item, size))
            unit_bytes += size
        write_unit()
    if count > len(seen):
        logger.warning(f"{count - len(seen)} of {count} inputs are named more than once, and count once.")
    return {"files": len(seen), "sha256": digest.hexdigest()}


class Plan:
    """The list of inputs in a Parquet file of `write_plan`, unit by unit."""

    def __init__(self, file):
        self.file = parquet.ParquetFile(file)
        self.num_inputs = self.file.metadata.num_rows
        self.num_units = self.file.num_row_groups

    def size(self, unit: int) -> int:
        return self.file.metadata.row_group(unit).num_rows

    def unit(self, number: int) -> list[Input]:
        columns = [name for name in SCHEMA.names if name != "bytes"]
        return [Input(**row) for row in self.file.read_row_group(number, columns=columns).to_pylist()]

    def weights(self, unit: int) -> list[int]:
        """How much of the work each input of a unit is, by its bytes; those of unknown size count as UNIT_BYTES."""
        if "bytes" not in self.file.schema_arrow.names:  # The list of a table of version 0.6.0 tells no sizes.
            return [UNIT_BYTES] * self.size(unit)
        sizes = self.file.read_row_group(unit, columns=["bytes"])["bytes"].to_pylist()
        return [size or UNIT_BYTES for size in sizes]

    def sha256(self) -> str:
        """The digest of the list, as of `write_plan`."""
        digest = hashlib.sha256()
        for number in range(self.num_units):
            for item in self.unit(number):
                digest.update(_key(item))
        return digest.hexdigest()
