"""The stages of `bat-audio embed` joined into a run: decode, encode, write; and the engine for one machine."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from operator import attrgetter, itemgetter

from bat_audio_tools.embedding.encoder import Bucket, Encoder, buckets, compute_on, encoder_config
from bat_audio_tools.embedding.table import Table, row_schema
from bat_audio_tools.embedding.windows import (
    READ_AHEAD,
    BrokenRecordingError,
    Cut,
    DecodingProcesses,
    Window,
    read_windows,
)
from bat_audio_tools.settings import EmbedSettings
from bat_audio_tools.sounds.listing import BYTES_PER_SECOND, Plan
from bat_audio_tools.sounds.manifests import without_decoding


def read_plan(table: Table) -> Plan:
    """The list of inputs of a table that was begun; a ValueError says that its file is damaged."""
    with table.reading("inputs.parquet"):
        return Plan(table.open("inputs.parquet"))


class Stages:
    """The stages of a run that has begun, for an engine to join: `windows` decodes units, `write` makes one's shard."""

    def __init__(self, settings: EmbedSettings, dataset: tuple | None):
        self.settings, self.dataset = settings, dataset
        self.sounds = None if dataset is None else without_decoding(*dataset)
        self.table = Table(settings.out)
        self.plan = read_plan(self.table)
        _, config = encoder_config(settings)
        self.cut = Cut.of(settings, config)
        self.schema = row_schema(
            config.hidden_size, settings.pool, settings.layer_numbers, settings.tokens, settings.float16
        )

    def windows(self, units: Iterable[int], executor: Executor | None, workers: int) -> Iterator[tuple[int, Window]]:
        """The windows of the units' recordings, each with its unit."""
        inputs = ((unit, item, item.content(self.sounds)) for unit in units for item in self.plan.unit(unit))
        return read_windows(executor, self.cut, inputs, READ_AHEAD * workers)

    def write(self, unit: int, windows: Iterable[Window], encoder: Encoder, report: Callable):
        """Encode a unit's windows and write its shard, with the broken ones in its list of errors.

        Args:
            report: gets the numbers of clips, seconds of sound and failed files, and how much of the plan's weights is
                done, as the encoder gets on.

        Raises:
            BrokenRecordingError: there is a broken one, and the settings are strict.
            OSError: the shard cannot be written.
        """

        weights = dict(zip(self.plan.unit(unit), self.plan.weights(unit), strict=True))

        def embedded(clips: list[Window]):
            seconds = sum(clip.end_s - clip.start_s for clip in clips)
            report(clips=len(clips), seconds=seconds, weight=sum(clip.share * weights[clip.input] for clip in clips))

        def with_shares() -> Iterator[Window]:
            """The windows, also those of recordings whose length nothing tells with a share.

            Such a recording slows down on its way to its whole weight, and has the rest of it when it ends.
            """
            for recording, found in itertools.groupby(windows, key=attrgetter("input")):
                weight, left = weights[recording], 1.0
                for window in found:
                    if window.share is None:
                        seconds = 0.0 if window.end_s is None else window.end_s - window.start_s
                        window.share = min(seconds * BYTES_PER_SECOND / weight * left**2, left / 2)
                    window.share = min(window.share, left)
                    left -= window.share
                    yield window
                report(weight=left * weight)

        def unbroken() -> Iterator[Window]:
            for window in with_shares():
                if window.error is not None and self.settings.strict:
                    raise BrokenRecordingError(
                        f"{window.input.path}: {window.error} Mend it, leave it out, or run without strict."
                    )
                if window.error is not None:
                    failed = shard.failed
                    shard.add_error(window.input, window.place, window.error)
                    report(failed=shard.failed - failed, weight=window.share * weights[window.input])
                else:
                    yield window

        def write_rows(bucket: Bucket):
            shard.add(bucket.table(self.schema), bucket.seconds)

        # A thread fetches the rows from the device and writes them, while the encoder computes the next ones.
        with self.table.write_shard(unit, self.schema) as shard, ThreadPoolExecutor(1) as thread:
            written = thread.submit(int)
            for bucket in buckets(unbroken(), encoder, embedded):
                written.result()
                written = thread.submit(write_rows, bucket)
            written.result()


@contextlib.contextmanager
def on_this_machine(settings: EmbedSettings) -> Iterator[tuple[EmbedSettings, Callable]]:
    """The engine for one machine: decoding in processes of their own, the encoder in this one."""
    device, dtype = compute_on(settings)
    yield replace(settings, device=device, bf16=dtype == "bfloat16"), run_locally


def run_locally(stages: Stages, units: list[int], report: Callable):
    workers = stages.settings.workers
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # The processes start before torch uses threads or a GPU, because it is not safe to fork a process that does.
    with DecodingProcesses(workers) if workers else contextlib.nullcontext() as executor:
        encoder = Encoder(stages.settings)
        for unit, windows in itertools.groupby(stages.windows(units, executor, workers), key=itemgetter(0)):
            stages.write(unit, (window for _, window in windows), encoder, report)


def explain(error: Exception) -> str:
    """One line about what stopped a run."""
    if isinstance(error, OSError):
        return str(error)
    reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    if isinstance(error, MemoryError) or "memory" in reason:
        reason += (
            " A smaller batch_size (--batch-size) takes less memory; where there are shards already, begin another "
            "table with it."
        )
    return reason
