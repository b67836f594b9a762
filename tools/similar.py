"""Search in a table of embeddings: the rows that sound most like a recording, by cosine, exactly.

The table is a folder that `bat-audio embed` writes: in it or below it part-*.parquet with the columns `id`, `path`,
`start_s`, `end_s` and `embedding`, a list of fixed size; and metadata.json in the folder beside it, see
`embedding.table`.

Shapes: D width of the embeddings.
"""

import json
import math
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from pyarrow import parquet
from transformers.utils import logging

from bat_audio.audio_bat import load_audio
from bat_audio_tools.embedding.encoder import Encoder, compute_on, encoder_config
from bat_audio_tools.embedding.table import Table
from bat_audio_tools.embedding.windows import Window
from bat_audio_tools.folders import file_digest
from bat_audio_tools.names import check_file
from bat_audio_tools.settings import RowSettings
from bat_audio_tools.sounds.listing import Plan
from bat_audio_tools.sounds.reading import Input, opened

PLACE = ["id", "path", "start_s", "end_s"]  # These columns tell which part of which recording a row is.
# A recording that is longer than so many segments of the table can hardly be compared with them.
LONG_QUERY = 1.5
BATCH_ROWS = 4096  # So many rows are read and compared at once.

logger = logging.get_logger(__name__)


def similar(
    query: str | Path,
    table: str | Path,
    k: int = 10,
    *,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    start: float = 0.0,
    duration: float | None = None,
    channel: str | int = "mean",
) -> list[dict]:
    """The rows of a table that are nearest to a recording, see `nearest_rows`.

    The recording gets one embedding, however long it is, with the checkpoint, the pooling and the padding of the table,
    which metadata.json names. With `start` and `duration` it can be a part as long as the table's segments.

    Args:
        query: sound file of any rate and format that `bat-audio embed` reads.
        table: folder of `bat-audio embed`, or its address, such as s3://bucket/folder.
        k: most rows to give.
        checkpoint: where the table's checkpoint lies now, if not where metadata.json says.
        device: to encode on, such as cuda:1; "auto" for a GPU where there is one, and else the CPU.
        start, duration: the part of the recording, in seconds; a duration of None reaches to its end.
        channel: as of `load_audio`.

    Raises:
        ValueError: an unreadable recording, another checkpoint than the table's, or as in `nearest_rows`.
        OSError: no recording, table or weights.
        ImportError: soundfile or soxr is missing.
    """
    check_file(query)
    begun = Table(str(table))
    _check_finished(begun, _find_shards(begun.files, begun.folder))  # Problems show before the work begins.
    metadata_file = begun.shown("metadata.json")
    try:
        metadata = json.loads(begun.files.cat_file(begun.path("metadata.json")))
        named, commit = (
            None if value is None else str(value) for value in (metadata["checkpoint"], metadata["commit"])
        )
        digest = metadata["weights_sha256"]
        if checkpoint is not None:
            named, commit = str(checkpoint), None
        pool, num_frames = (metadata["settings"][name] for name in ("pool", "num_frames"))
        settings = RowSettings(
            checkpoint=named, revision=commit, pool=pool, num_frames=num_frames, device=device, bf16=False
        )
        # A table of whole recordings has no segment.
        segment = float(metadata["settings"].get("segment") or math.inf)
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{metadata_file} does not tell checkpoint, commit, digest and settings ({type(error).__name__}: {error}), "
            "so the recording cannot be embedded alike. Name a folder of bat-audio embed."
        ) from error
    compute_on(settings)  # This raises a ValueError for a device that is not there.
    weights, config = encoder_config(settings)
    if file_digest(weights) != digest:
        raise ValueError(
            f"{weights} holds other weights than those that {metadata_file} names by their SHA-256, {digest}, so its "
            "embeddings cannot be compared. Name the table's own checkpoint (--checkpoint)."
        )
    with opened(str(query), None) as source:
        samples = load_audio(source, start, duration, config.sample_rate, channel).numpy()
    seconds = len(samples) / config.sample_rate
    if seconds > LONG_QUERY * segment:
        logger.warning(
            f"{query}: {seconds:.1f} s get one embedding, which is compared with parts of {segment:g} s; for a part of "
            "the recording say start and duration (--start, --duration)."
        )
    window = Window(Input(str(query), str(query)), start, None, samples)
    return nearest_rows(Encoder(settings)([window])[0]["embedding"].cpu(), table, k)


def nearest_rows(query: torch.Tensor, table: str | Path, k: int = 10) -> list[dict]:
    """The k rows of a table with the largest cosines to an embedding (D,), the largest first.

    Every row is compared, in float64, with a few thousand in memory at a time. Rows with equal cosines keep their order
    in the table.

    Returns:
        A dict for each row, with `rank` from 1, `cosine` in -1..1, `id`, `path`, `start_s` and `end_s`; fewer than k
        where the table has no more rows.

    Raises:
        ValueError: k below 1, an embedding with NaN or of another width than the table's, or shards that are damaged,
            lack a column or hold NaN; the message names the file.
        FileNotFoundError: no shards in the folder.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    if not query.isfinite().all():
        raise ValueError("The query's embedding holds NaN or infinite values; use another checkpoint.")
    query = query.double()
    files, folder = url_to_fs(str(table))
    best, cosines = [], query.new_empty(0)
    for shard in _find_shards(files, folder):
        try:
            with parquet.ParquetFile(shard, filesystem=files) as file:
                _check_columns(shard, file.schema_arrow, len(query))
                for batch in file.iter_batches(BATCH_ROWS, columns=[*PLACE, "embedding"]):
                    vectors = _vectors(shard, batch)
                    cosines = torch.cat([cosines, cosines_of(vectors, query)])
                    order = cosines.argsort(descending=True, stable=True)[:k]
                    cosines = cosines[order]
                    best = [pa.concat_tables([*best, pa.Table.from_batches([batch.select(PLACE)])]).take(order.numpy())]
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{shard} cannot be read ({error}). If it is damaged, make the table again.") from error
    rows = best[0].to_pylist() if best else []
    return [
        {"rank": rank, "cosine": cosine, **row}
        for rank, (cosine, row) in enumerate(zip(cosines.tolist(), rows, strict=True), start=1)
    ]


def cosines_of(vectors: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The cosines (N,) of float64 vectors (N, D) with one (D,), in -1..1 however short they are; 0 for those of zeros.

    Each depends on its own vector alone, unlike in a product of matrices, so that equal vectors have equal cosines.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=1) * torch.linalg.vector_norm(query)
    cosines = (vectors * query).sum(dim=1) / lengths
    return cosines.where(lengths > 0, 0).clamp(-1, 1)


def _find_shards(files: AbstractFileSystem, folder: str) -> list[str]:
    shards = sorted(file for file in files.find(folder) if PurePosixPath(file).match("part-*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{folder} holds no part-*.parquet; name a folder that bat-audio embed has written.")
    return shards


def _check_finished(table: Table, shards: list[str]):
    """Warn of a table that lacks shards of its plan, and raise a ValueError for one that has more."""
    if not table.exists("inputs.parquet"):  # The folder has only shards.
        return
    with table.reading("inputs.parquet"), table.open("inputs.parquet") as content:
        units = Plan(content).num_units
    if len(shards) > units:
        raise ValueError(
            f"{shards[-1]} is a shard too many: {table.shown('inputs.parquet')} lists recordings for {units} shards. "
            "Remove what came from elsewhere."
        )
    if len(shards) < units:
        logger.warning(
            f"{table.folder}: {len(shards)} of {units} shards are there, and only these are searched. Repeat the "
            "command of bat-audio embed to finish the table."
        )


def _check_columns(shard: str, schema: pa.Schema, width: int):
    missing = [column for column in (*PLACE, "embedding") if column not in schema.names]
    if missing:
        raise ValueError(f"{shard} lacks the columns {', '.join(missing)}; name a folder of bat-audio embed.")
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != width:
        raise ValueError(
            f"{shard}: the embeddings are {kind}, but the query's has {width} values. Use the checkpoint that "
            "metadata.json of the table names."
        )


def _vectors(shard: str, batch: pa.RecordBatch) -> torch.Tensor:
    """The embeddings of a batch of rows as (rows, D), in float64."""
    column = batch["embedding"]
    if column.null_count:
        raise ValueError(f"{shard} holds rows without an embedding. Make the table again.")
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    vectors = torch.from_numpy(values).unflatten(0, (len(column), -1))
    bad = (~vectors.isfinite().all(dim=1)).nonzero()
    if len(bad):
        row = batch.select(PLACE).slice(bad[0].item(), 1).to_pylist()[0]
        raise ValueError(f"{shard} holds NaN or infinite values in the row {row}. Make the table again.")
    return vectors
