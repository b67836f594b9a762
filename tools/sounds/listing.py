"""What to embed: files, folders, globs, lists of files and datasets, as one list that is cut into units of work.

`list_inputs` goes through them in an order that depends on their names alone. `write_plan` keeps the list in a Parquet
file, one row group for each unit, so that neither the list nor the table of embeddings is ever in memory as a whole. To
find inputs that are named twice, a digest of each is kept in memory: about 100 MB for a million.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow import parquet
from transformers.utils import logging

from bat_audio_tools.names import chain_of, is_address, local_path, suffix_of, unreadable_kind
from bat_audio_tools.sounds.manifests import (
    LIST_SUFFIXES,
    EmbeddedAudio,
    check_columns,
    choose_split,
    dataset_sounds,
    known_suffixes,
    load_named_dataset,
    manifest_columns,
    manifest_rows,
    open_list,
    read_channel,
    read_seconds,
    sound_suffixes,
)
from bat_audio_tools.sounds.reading import Input

# The bytes of a part of a recording are guessed from its length, as if it were FLAC of CD quality.
BYTES_PER_SECOND = 100_000
# A unit is full when it has this size times the files that it may have, so one of long recordings has fewer files.
UNIT_BYTES = 1 << 20
NOT_UTF8 = "Its name is not in UTF-8, as the column path has to be; rename it."
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "path": pa.string(),
        "start": pa.float64(),
        "duration": pa.float64(),
        "row": pa.int64(),
        "problem": pa.string(),
        "channel": pa.string(),
    }
)
PLAN = SCHEMA.append(pa.field("bytes", pa.int64()))
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
        is_other = is_address(str(source)) or suffix_of(str(source)) in known
        return None if is_other else load_named_dataset(source)

    found = list(map(find, sources))
    if any(dataset is not None for dataset in found):
        if len(found) > 1:
            raise ValueError(f"Got {len(found)} inputs with a dataset among them; embed a dataset by itself.")
        return choose_split(found[0], "the dataset" if found[0] is sources[0] else str(sources[0]), split)
    if split is not None:
        raise ValueError(f"split={split!r} chooses from a dataset, but none is among the inputs; leave it out.")
    return None


def list_inputs(
    sources: Sequence,
    dataset: tuple["datasets.Dataset", str] | None,  # noqa: F821
    channel: str = "mean",
) -> Iterator[tuple[Input, int]]:
    """Every recording with its size in bytes, where that costs nothing to know, and else 0.

    Args:
        sources: paths, globs and addresses; of folders the sounds in them, by their names, sorted folder by folder.
            Hidden files are left out, and files that are no sounds by name with a warning, in globs too. Lists are .txt
            files with a path per line, and .csv or .parquet files with the column `path` and optionally `id`, and
            `start` and `duration` in seconds; their paths are relative to the file itself.
        dataset: as of `read_dataset`; takes the place of the sources.
        channel: of the recordings for which a list or dataset names none, as in `Input`.

    Raises:
        ValueError: an input without sounds, or a list that cannot be read; the message names file and row.
        FileNotFoundError: no such input.
    """
    for item, size in _listed(sources, dataset):
        yield replace(item, channel=item.channel or channel), size


def _listed(sources: Sequence, dataset: tuple | None) -> Iterator[tuple[Input, int]]:
    if dataset is not None:
        if len(dataset[0]) == 0:
            raise ValueError(f"{dataset[1]}: there are no rows in it.")
        yield from _looked_at(_of_dataset(*dataset))
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
        return Input(path, path, problem=NOT_UTF8)
    return item


def _of_source(source: str) -> Iterator[tuple[Input, int]]:
    local = local_path(source)
    with _reaching(source):
        files, root = url_to_fs(source) if is_address(local) else (LocalFileSystem(), os.path.abspath(local))
        while isinstance(files, CachingFileSystem):  # A cache keeps files; the file system behind it knows the folders.
            files = files.fs
        is_there, is_folder = files.lexists(root), files.isdir(root)
    is_glob = not is_there and has_magic(chain_of(source)[1])
    if is_glob or is_folder:
        found = _matches(local, files, root) if is_glob else _files_in(local, files, root)
        begin = source.removesuffix(local)
        yield from _sounds_among(source, ((begin + path, size) for path, size in found))
    elif not is_there:
        raise FileNotFoundError(f"{source}: no such file or folder, and nothing that matches.")
    elif suffix_of(source) in LIST_SUFFIXES:
        if problem := unreadable_kind(source):
            raise ValueError(f"{source}: no list of sounds. {problem}")
        yield from _looked_at(_of_list(source))
    elif suffix_of(source) == ".tsv":
        raise ValueError(f"{source}: lists are .txt, .csv with commas, or .parquet; convert it.")
    else:
        yield Input(source, source, problem=unreadable_kind(source)), _size(source)


@contextlib.contextmanager
def _reaching(source: str) -> Iterator[None]:
    """Name the source in the errors of file systems, which may be of any type."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}: no such file or folder ({error}).") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise OSError(f"{source}: cannot be listed ({reason}). Expected what fsspec opens.") from error


def _sounds_among(source: str, found: Iterable[tuple[str, int | None]]) -> Iterator[tuple[Input, int]]:
    """The sounds, by their names, among the files of a folder or glob; a warning tells of the others."""
    suffixes, skipped, first_skipped = sound_suffixes(), 0, None
    for path, size in found:
        if suffix_of(path) in suffixes:
            yield Input(path, path, problem=unreadable_kind(path)), _size(path) if size is None else size
        else:
            skipped, first_skipped = skipped + 1, first_skipped or path
    if skipped:
        logger.warning(f"{source}: {skipped} files are left out that are no sounds by name (first: {first_skipped}).")


def _matches(source: str, files: AbstractFileSystem, root: str) -> Iterator[tuple[str, int | None]]:
    """The files that match a glob, and those in the folders that do, with their sizes, where they are known."""
    if not is_address(source):
        for match in sorted(glob.glob(source, recursive=True)):
            if os.path.isdir(match):
                yield from _files_in(match, files, match)
            else:
                yield match, None
        return
    with _reaching(source):
        matches = sorted(files.glob(root, detail=True).items())
    for name, entry in matches:
        if "/." in f"/{name}" and "/." not in f"/{root}":  # Hidden files are left out, as in globs of local ones.
            continue
        path = _address_of(name, source, files, root)
        if entry["type"] == "directory":
            yield from _files_in(path, files, name)
        else:
            yield path, entry["size"] or 0


def _files_in(folder: str, files: AbstractFileSystem, root: str) -> Iterator[tuple[str, int | None]]:
    """The files in a folder and the folders in it, in order, with their sizes, where they are known."""
    if not is_address(folder):
        above = {folder: frozenset()}  # Each folder that is still to come has the folders around it.
        for parent, folders, names in os.walk(folder, followlinks=True):
            around = above.pop(parent) | {_identity(parent)}
            visible = sorted(name for name in folders if name[0] != ".")
            folders[:] = [name for name in visible if _identity(os.path.join(parent, name)) not in around]
            for name in set(visible).difference(folders):
                logger.warning(f"{os.path.join(parent, name)}: left out, a link to a folder around it.")
            above.update((os.path.join(parent, name), around) for name in folders)
            yield from ((os.path.join(parent, name), None) for name in sorted(names) if name[0] != ".")
        return
    with _reaching(folder):
        for _, folders, entries in files.walk(root, detail=True):
            visible = {name: folders[name] for name in sorted(folders) if name[0] != "."}
            folders.clear()
            folders.update(visible)
            for name in sorted(name for name in entries if name[0] != "."):
                entry = entries[name]
                yield _address_of(entry["name"], folder, files, root), entry["size"] or 0


def _address_of(name: str, source: str, files: AbstractFileSystem, root: str) -> str:
    """The address of a file that its file system found in or for `source`, which the file system itself calls `root`.

    It opens by itself, so it names user, host, caches and the archive around the file as the source does.
    """
    caches, itself, around = chain_of(source)
    itself, root = itself.rstrip("/") if root else itself, root.rstrip("/")
    begin = itself.removesuffix(root)
    return caches + (begin + name if begin + root == itself else files.unstrip_protocol(name)) + around


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _size(path: str) -> int:
    """The bytes of a local file, and 0 for a remote one: asking for each would take longer than it is worth."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def _looked_at(items: Iterable[Input]) -> Iterator[tuple[Input, int]]:
    """The inputs that a list or dataset names, with what is wrong with their files, and the bytes of each to read."""
    last = None
    for item in items:
        size = 0  # Of a file that the input before is about too, most has been counted.
        if item.path != last:
            last, problem, size = item.path, unreadable_kind(item.path), _size(item.path)
        if item.duration is not None:
            size = round(item.duration * BYTES_PER_SECOND)
        yield replace(item, problem=problem), size


def _of_list(source: str) -> Iterator[Input]:
    caches, itself, around = chain_of(source)
    folder = itself.removesuffix(os.path.basename(itself))

    def beside(path: str) -> str:
        return path if is_address(path) or os.path.isabs(path) else f"{caches}{folder}{path}{around}"

    if suffix_of(source) == ".txt":
        try:
            with open_list(source) as content:
                for line in io.TextIOWrapper(content, "utf-8-sig"):
                    if line.strip():
                        path = beside(line.rstrip("\r\n"))
                        yield Input(path, path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: cannot be read as text in UTF-8: {error}.") from error
    else:
        check_columns(manifest_columns(source), source, ["path"])
        for where, cells in manifest_rows(source, ["path", "id", "start", "duration", "channel"]):
            yield _of_row(cells, where, beside(cells["path"]))


def _of_dataset(dataset: "datasets.Dataset", name: str) -> Iterator[Input]:  # noqa: F821
    check_columns(dataset.column_names, name, ["audio"])
    others = [column for column in ("id", "start", "duration", "channel") if column in dataset.column_names]
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
        id=path if name in (None, "") else str(name),
        path=path,
        start=read_seconds(cells, "start", where) or 0.0,
        duration=duration,
        row=row,
        channel=read_channel(cells, where),
    )


def _plain(item: Input) -> Input:
    """The input with its path in a plain form, so that ./x and x are the same input."""
    path = _plain_path(item.path)
    return replace(item, path=path, id=path if item.id == item.path else item.id)


def _plain_path(path: str) -> str:
    """The same text for all spellings of a path; a symbolic link is a name of its own."""
    local = local_path(path)
    if is_address(local):
        return path
    whole = re.sub("^//+", "/", local if os.path.isabs(local) else os.path.join(os.getcwd(), local))
    if ".." not in whole:
        return os.path.normpath(whole)
    plain, *parts = Path(whole).parts
    for part in parts:
        if part != "..":
            plain = os.path.join(plain, part)
        elif os.path.isdir(plain):  # The folder above a link is that above the folder to which it leads.
            plain = os.path.dirname(os.path.realpath(plain) if os.path.islink(plain) else plain)
        else:
            return whole  # There is nothing at this path.
    return plain


def name_of(item: Input) -> bytes:
    """What tells an input from others; a pipe or broken link is the same input as the file that takes its place."""
    problem = NOT_UTF8 if item.problem == NOT_UTF8 else None
    return repr(astuple(replace(item, problem=problem))).encode(errors="surrogateescape")


def _key(item: Input) -> bytes:
    return hashlib.blake2b(name_of(item), digest_size=16).digest()


def write_plan(inputs: Iterable[tuple[Input, int]], file, unit_size: int) -> dict:
    """Write the inputs to an open Parquet file, each once, cut into units of at most `unit_size` inputs.

    Returns:
        `files`, how many there are, and `sha256` of the list.
    """
    digest, seen, unit, unit_bytes, count = hashlib.sha256(), set(), [], 0, 0
    with parquet.ParquetWriter(file, PLAN, compression="zstd") as writer:

        def write_unit():
            writer.write_table(pa.Table.from_pylist([{**vars(item), "bytes": size} for item, size in unit], PLAN))

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
        """The inputs of a unit; a pipe or broken link may have been mended since they were listed."""
        items = [Input(**row) for row in self.file.read_row_group(number, columns=SCHEMA.names).to_pylist()]
        return [
            item if item.problem in (None, NOT_UTF8) else replace(item, problem=unreadable_kind(item.path))
            for item in items
        ]

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
