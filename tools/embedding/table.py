"""The table that `bat-audio embed` writes, in a folder of any file system of fsspec:

    metadata.json                   checkpoint, version, settings and inputs
    inputs.parquet                  the list of recordings, a row group for each unit of work
    embeddings/part-00000.parquet   the rows of unit 0, and in the file's footer what could not be embedded of it
    errors.parquet                  what could not be embedded of all units, written at the end
    lock                            keeps other runs out, in a local folder

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

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def shard(self, unit: int) -> str:
        return f"embeddings/part-{unit:05d}.parquet"

    def names(self, folder: str = "") -> list[str]:
        """What lies in the folder; nothing where it is not there, which file systems for objects cannot tell."""
        self.files.invalidate_cache()
        try:
            return sorted(map(os.path.basename, self.files.ls(self.path(folder), detail=False)))
        except FileNotFoundError:
            return []

    def lock(self) -> contextlib.AbstractContextManager:
        """Keep other runs out; file systems of fsspec other than the local one know no locks."""
        return lock(Path(self.folder)) if self.is_local else contextlib.nullcontext()

    def other_files(self) -> list[str]:
        """The files that are not left by a run that was killed before it wrote metadata.json."""
        own = ("inputs.parquet", "embeddings", "lock")
        shards = [f"embeddings/{name}" for name in self.names("embeddings")]
        return [name for name in self.names() if name not in own and not name.startswith(PARTIAL)] + shards

    def exists(self, name: str) -> bool:
        return self.files.exists(self.path(name))

    def open(self, name: str):
        return self.files.open(self.path(name), "rb")

    def prepare(self):
        """Make the folder, and remove what killed runs have left."""
        self.files.makedirs(self.path("embeddings"), exist_ok=True)
        for name in self.names():
            if name.startswith(PARTIAL):
                self.files.rm(self.path(name))

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator:
        """A file to write to, which gets its name when the block ends, and vanishes when it fails."""
        partial = self.path(f"{PARTIAL}{uuid.uuid4().hex}")
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

    def read_json(self, name: str) -> dict:
        return json.loads(self.files.cat_file(self.path(name)))

    def finished_units(self) -> set[int]:
        names = self.names("embeddings")
        return {int(match[1]) for match in (re.fullmatch(r"part-(\d+)\.parquet", name) for name in names) if match}

    def read_footer(self, unit: int) -> dict:
        """`rows` of a shard, `seconds` of sound in them, how many inputs `failed`, and the `errors`."""
        footer = parquet.read_metadata(self.path(self.shard(unit)), filesystem=self.files)
        return {"rows": footer.num_rows, **json.loads(footer.metadata[FOOTER.encode()])}

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
            `rows`, `failed` (inputs that lack some or all of their rows) and `audio_hours`.
        """
        rows, seconds, failed = 0, 0.0, 0
        with self.write("errors.parquet") as file, parquet.ParquetWriter(file, ERRORS) as writer:
            for unit in range(num_units):
                about = self.read_footer(unit)
                rows, seconds, failed = rows + about["rows"], seconds + about["seconds"], failed + about["failed"]
                if about["errors"]:
                    writer.write_table(pa.Table.from_pylist(about["errors"], ERRORS))
        return {"rows": rows, "failed": failed, "audio_hours": seconds / 3600}


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
