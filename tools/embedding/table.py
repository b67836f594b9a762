"""The table that `bat-audio embed` writes to TABLE, in any file system of fsspec:

    TABLE/embeddings/part-00000.parquet   the rows of unit 0, and in the file's footer what could not be embedded of it
    TABLE.run/metadata.json               checkpoint, version, settings and inputs
    TABLE.run/inputs.parquet              the list of recordings, a row group for each unit of work
    TABLE.run/errors.parquet              what could not be embedded of all units, written at the end
    TABLE.run/lock                        keeps other runs out, in a local folder

TABLE holds nothing but rows, because polars reads every file in a folder, whatever its name, and others do nearly the
same. Version 0.6.0 had the files of TABLE.run in TABLE itself, where they are still found.

A unit is done when its shard is there. Every file appears at once and whole, under its name; until then it is a hidden
file in the folder. So the shards are the journal: whenever a run is killed, those that are there tell what is done.
"""

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from fsspec.core import url_to_fs
from pyarrow import parquet

from bat_audio_tools.folders import lock

PLACE = {"id": pa.string(), "path": pa.string(), "start_s": pa.float64(), "end_s": pa.float64()}
ERRORS = pa.schema({**PLACE, "error": pa.string()})
PARTIAL = ".partial-"  # The names of unfinished files begin with this.
FIRST_ERRORS = 3  # So many errors are told at the end of a run.
FOOTER = "bat_audio"  # A shard's footer has under this key what the shard says about itself.


def row_schema(width: int, pool: str, layers: list[int], tokens: bool, float16: bool) -> pa.Schema:
    """The columns of the table for an encoder of this width; see docs/embed.md."""
    value = pa.float16() if float16 else pa.float32()
    vector = pa.list_(value, width)
    return pa.schema(
        {
            **PLACE,
            "embedding": pa.list_(value, width * len(pool.split("+"))),
            **{f"cls_{number}": vector for number in layers},
            **({"tokens": pa.list_(vector)} if tokens else {}),
        }
    )


def vectors_array(values: np.ndarray, kind: pa.FixedSizeListType) -> pa.Array:
    """The rows of an array (N, D) as a column."""
    with np.errstate(over="ignore"):  # Values beyond the range of float16 become infinite.
        values = np.ascontiguousarray(values, dtype=kind.value_type.to_pandas_dtype())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), kind.list_size)


class Table:
    """The files of a table, by their names."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.files, self.folder = url_to_fs(self.address)
        self.is_local = "file" in np.atleast_1d(self.files.protocol)
        if self.is_local:
            self.folder = os.path.abspath(self.folder)
        of_old = (f"{self.folder}/{name}" for name in ("inputs.parquet", "metadata.json"))
        self.run_folder = self.folder if any(map(self.files.exists, of_old)) else f"{self.folder}.run"

    def path(self, name: str) -> str:
        """Where a file lies: embeddings/... in the table's folder, and all else in that of the run."""
        return f"{self.folder if name.startswith('embeddings/') else self.run_folder}/{name}"

    def shown(self, name: str) -> str:
        """What to call a file: by its path, or its address in other file systems."""
        return self.path(name) if self.is_local else self.files.unstrip_protocol(self.path(name))

    def shard(self, unit: int) -> str:
        return f"embeddings/part-{unit:05d}.parquet"

    def names(self, folder: str) -> list[str]:
        """What lies in a folder; nothing where it is not there, which file systems for objects cannot tell."""
        self.files.invalidate_cache()
        try:
            return sorted(map(os.path.basename, self.files.ls(folder, detail=False)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    @property
    def shard_names(self) -> list[str]:
        return [name for name in self.names(f"{self.folder}/embeddings") if not name.startswith(PARTIAL)]

    def lock(self) -> contextlib.AbstractContextManager:
        """Keep other runs out; file systems of fsspec other than the local one know no locks."""
        return lock(Path(self.run_folder)) if self.is_local else contextlib.nullcontext()

    def other_files(self) -> list[str]:
        """The files that are not left by a run that was killed before it wrote metadata.json."""
        own = ("inputs.parquet", "embeddings", "lock")
        shards = [f"embeddings/{name}" for name in self.shard_names]
        return [name for name in self.names(self.folder) if name not in own and not name.startswith(PARTIAL)] + shards

    def exists(self, name: str) -> bool:
        return self.files.exists(self.path(name))

    def open(self, name: str):
        return self.files.open(self.path(name), "rb")

    def prepare(self):
        """Make the folders, and remove what killed runs have left."""
        for folder in (f"{self.folder}/embeddings", self.run_folder):
            self.files.makedirs(folder, exist_ok=True)
        self.remove_partial()

    def remove_partial(self):
        """Remove unfinished files, while no other run is at work."""
        for folder in (f"{self.folder}/embeddings", self.run_folder):
            for name in self.names(folder):
                if name.startswith(PARTIAL):
                    self.files.rm(f"{folder}/{name}")

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator:
        """A file to write to, which gets its name when the block ends, and vanishes when it fails."""
        partial = f"{os.path.dirname(self.path(name))}/{PARTIAL}{uuid.uuid4().hex}"
        try:
            with self.files.open(partial, "wb") as file:
                yield file
                # The content is on the disk before the file has its name, even if the power fails.
                if self.is_local:
                    file.flush()
                    os.fsync(file.fileno())
            if self.is_local:
                os.replace(partial, self.path(name))
            else:
                self.files.mv(partial, self.path(name))
        except BaseException:
            with contextlib.suppress(OSError):
                self.files.rm(partial)
            raise

    def write_json(self, name: str, content: dict):
        with self.write(name) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())

    @contextlib.contextmanager
    def reading(self, name: str, cure: str = "") -> Iterator[None]:
        """Make a ValueError, which names the file and the cure, of the errors of reading a damaged one."""
        cure = cure or (
            "Put a copy of it back, or name another folder for a new table (--out); the rows that are there stay "
            "readable."
        )
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
            raise ValueError(f"{self.shown(name)} cannot be read as a file of a table ({reason}). {cure}") from error

    def read_metadata(self) -> dict:
        """metadata.json; a ValueError says that it is damaged."""
        with self.reading("metadata.json"):
            metadata = json.loads(self.files.cat_file(self.path("metadata.json")))
            for name in ("inputs", "settings"):
                if not isinstance(metadata[name], dict):
                    raise TypeError(f"{name!r} is no object")
            return metadata

    def finished_units(self) -> set[int]:
        matches = (re.fullmatch(r"part-(\d+)\.parquet", name) for name in self.shard_names)
        return {int(match[1]) for match in matches if match}

    def read_footer(self, unit: int) -> dict:
        """`rows` of a shard, `seconds` of sound in them, how many inputs `failed`, and the `errors`."""
        name = self.shard(unit)
        with self.reading(name, "Remove it, and the command that wrote it makes it anew."):
            footer = parquet.read_metadata(self.path(name), filesystem=self.files)
            about = json.loads(footer.metadata[FOOTER.encode()])
            return {"rows": footer.num_rows, **{key: about[key] for key in ("seconds", "failed", "errors")}}

    @contextlib.contextmanager
    def write_shard(self, unit: int, schema: pa.Schema) -> Iterator["ShardWriter"]:
        with (
            self.write(self.shard(unit)) as file,
            parquet.ParquetWriter(file, schema, use_dictionary=["path"]) as writer,
        ):
            shard = ShardWriter(writer)
            yield shard
            about = {"seconds": shard.seconds, "failed": shard.failed, "errors": shard.errors}
            writer.add_key_value_metadata({FOOTER: json.dumps(about)})

    def finish(self, num_units: int) -> dict:
        """Gather the errors of all shards in errors.parquet, and count.

        Returns:
            `rows`, `failed` (inputs that lack some or all of their rows), `audio_hours`, the file with the `errors`,
            and the `first_errors` in words.
        """
        rows, seconds, failed, first = 0, 0.0, 0, []
        self.remove_partial()  # They are of actors that were killed: every shard is there.
        with self.write("errors.parquet") as file, parquet.ParquetWriter(file, ERRORS) as writer:
            for unit in range(num_units):
                about = self.read_footer(unit)
                rows, seconds, failed = rows + about["rows"], seconds + about["seconds"], failed + about["failed"]
                if about["errors"]:
                    writer.write_table(pa.Table.from_pylist(about["errors"], ERRORS))
                    first += about["errors"][: FIRST_ERRORS - len(first)]
        first = [f"{row['path']} at {row['start_s']:.2f} s: {row['error']}" for row in first]
        counts = {"rows": rows, "failed": failed, "audio_hours": seconds / 3600}
        return {**counts, "errors": self.shown("errors.parquet"), "first_errors": first}


class ShardWriter:
    """A shard in the making: its rows, and what goes into its footer."""

    def __init__(self, writer: parquet.ParquetWriter):
        self.writer = writer
        self.seconds, self.failed, self.errors, self.last_failed = 0.0, 0, [], None

    def add(self, rows: pa.Table, seconds: float):
        self.writer.write_table(rows)
        self.seconds += seconds

    def add_error(self, recording, place: dict, error: str):
        """Note why a window is missing; errors that are alike and touch become one, as long as all of them.

        Args:
            recording: what the window is cut from; its windows come one after the other.
            place: the window's values of the columns PLACE.
        """
        last, is_same = self.errors[-1] if self.errors else {}, recording == self.last_failed
        touches = is_same and last["end_s"] is not None and place["start_s"] < last["end_s"] + 1e-6
        if touches and last["error"] == error:
            last["end_s"] = place["end_s"]
        else:
            self.errors.append({**place, "error": error})
        self.failed += not is_same
        self.last_failed = recording
