"""From a pile of recordings to a table of embeddings: `bat-audio embed`.

The stages: list the recordings and cut the list into units (`sounds.listing`), decode them into windows
(`embedding.windows`), encode these in batches of one length (`embedding.encoder`), and write a shard for each unit
(`embedding.table`). An engine says where they run.

What the table holds depends on settings, inputs and the kind of device, but not on the engine, on the number of
processes, or on where an earlier run was stopped: units are fixed beforehand, and batches are formed in each by itself.

Shapes: B clips, T frames, M mel bands, D width, L blocks, t time patches of 160 ms.
"""

import contextlib
import errno
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from bat_audio.configuration_bat import BatConfig
from bat_audio_tools.embedding.encoder import compute_on, encoder_config
from bat_audio_tools.embedding.stages import Stages, explain, on_this_machine, read_plan
from bat_audio_tools.embedding.table import Table
from bat_audio_tools.embedding.windows import BrokenRecordingError, Cut
from bat_audio_tools.folders import file_digest
from bat_audio_tools.machine import require
from bat_audio_tools.names import is_address
from bat_audio_tools.settings import EmbedSettings, StartError
from bat_audio_tools.sounds.listing import list_inputs, read_dataset, write_plan

ALMOST = 99.9  # The bar shows no more percent before all is written.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def describe(settings: EmbedSettings, weights: Path, config: BatConfig, inputs: dict) -> dict:
    """What metadata.json says, so that a table can be traced and continued."""
    # In the Hub's cache, a path ends in models--namespace--name/snapshots/commit/model.safetensors.
    repository = re.fullmatch(r"models--(.+)--(.+)", weights.parent.parent.parent.name)
    device, dtype = compute_on(settings)
    packages = {"bat_audio": "bat-audio", "torch": "torch", "transformers": "transformers"}
    return {
        "checkpoint": "/".join(repository.groups()) if repository else str(weights.absolute()),
        "commit": weights.parent.name if repository else None,
        "weights_sha256": file_digest(weights),
        "config": {name: getattr(config, name) for name in _config_names()},
        "device": device,
        "versions": {name: importlib.metadata.version(package) for name, package in packages.items()},
        "settings": {**settings.that_decide(), "bf16": dtype == "bfloat16"},
        "inputs": inputs,
    }


def _config_names() -> list[str]:
    """The names of BAT's own settings, without those that Transformers adds, which differ between its versions."""
    parameters = inspect.signature(BatConfig.__init__).parameters.values()
    return [item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD and item.name != "self"]


# These fields of metadata.json may change when a run goes on. That the checkpoint is the same is told by the digest of
# its weights.
MAY_CHANGE = {"checkpoint", "commit", "device", "versions.torch", "versions.transformers"}


@contextlib.contextmanager
def begun(settings: EmbedSettings, table: Table, sources: list, dataset: tuple | None) -> Iterator[None]:
    """Write a table's plan and metadata, or see that it was begun in the same way, and keep other runs out of it.

    Nothing is written, and no folder made, before all that could be wrong has been looked at.

    Raises:
        ValueError: the folder holds a table that was begun in another way, or is damaged; or an input has no sounds.
        FileNotFoundError: an input is not there.
        OSError: there are no weights, or the folder cannot be written.
    """
    weights, config = encoder_config(settings)
    Cut.of(settings, config)  # This raises a ValueError for windows that are too short.
    if settings.stored_inputs and not goes_on(table):
        raise ValueError(
            f"{table.address}: holds no shards of a table whose list of inputs could be taken; leave out "
            "stored_inputs (--stored-inputs), and name the inputs."
        )
    with tempfile.TemporaryFile() as plan:
        if not settings.stored_inputs:
            inputs = write_plan(list_inputs(sources, dataset, settings.channel), plan, settings.shard_size)
            inputs["folder"] = os.getcwd() if dataset is None and any(map(_is_relative, sources)) else None
            inputs["fingerprint"] = None if dataset is None else dataset[0]._fingerprint
        with table.lock():
            # The first plan stays, because a file may have another size by now, which could change the limits of units.
            stored = table.read_metadata() if goes_on(table) else None
            if settings.stored_inputs:
                inputs = stored["inputs"]
                if inputs.get("fingerprint") is not None:
                    raise ValueError(
                        f"{table.address}: the table was begun with a dataset, which has to be named as it was then; "
                        "leave out stored_inputs (--stored-inputs)."
                    )
            # Writing it as JSON and reading it makes it comparable with what is stored.
            metadata = json.loads(json.dumps(describe(settings, weights, config, inputs)))
            table.prepare()
            if stored is None:
                plan.seek(0)
                with table.write("inputs.parquet") as file:
                    shutil.copyfileobj(plan, file)
                table.write_json("metadata.json", metadata)
            else:
                check_same(table, stored, metadata)
            plan.close()
            yield


def goes_on(table: Table) -> bool:
    """Whether there is a table to go on with; one without shards is begun anew, because nothing is lost by that."""
    return table.exists("metadata.json") and bool(table.finished_units())


def check_same(table: Table, stored: dict, metadata: dict):
    """Raise a ValueError if a table was begun in another way, or if its plan is not the one that it was begun with."""
    then, now = _flatten(stored), _flatten(metadata)
    changes = {name: value for name, value in now.items() if value != then.get(name) and name not in MAY_CHANGE}
    if changes:
        said = ", ".join(f"{name} was {then.get(name)!r} and is {value!r}" for name, value in changes.items())
        cure = "Repeat the first command to go on with it, or choose another folder."
        if all(name in ("inputs.files", "inputs.sha256", "inputs.folder") for name in changes):
            cure += (
                " With stored_inputs (--stored-inputs) it goes on with the inputs that it was begun with; name none "
                "then. Relative paths among them are meant from the current folder."
            )
        raise ValueError(f"{table.address}: the table in it was begun in another way: {said}. {cure}")
    plan = read_plan(table)
    with table.reading("inputs.parquet"):
        if plan.sha256() != stored["inputs"]["sha256"]:
            raise ValueError(f"it is not the list with the digest that {table.shown('metadata.json')} names")
    if extra := sorted(table.finished_units().difference(range(plan.num_units))):
        raise ValueError(
            f"{table.shown(table.shard(extra[0]))} is a shard too many: {table.shown('inputs.parquet')} lists "
            f"recordings for {plan.num_units} shards. Remove it, if it came from elsewhere."
        )


def _is_relative(source: str | Path) -> bool:
    return not is_address(str(source)) and not os.path.isabs(source)


def _flatten(metadata: dict) -> dict:
    parts = (
        {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        for name, value in metadata.items()
    )
    return {name: value for part in parts for name, value in part.items()}


class Progress:
    """The bar of a run: how much is embedded, the time left, clips/s, audio-hours/s and failed files.

    Args:
        weight: of all recordings, as the plan weighs them.
        done: the part of it that an earlier run has done.
    """

    def __init__(self, weight: float, done: float):
        self.clips, self.seconds, self.failed, self.weight = 0, 0.0, 0, weight
        # The bar is drawn again after so many seconds, and seldom in a log, which it would fill.
        every = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=100.0,
            initial=100 * done / weight,
            bar_format="{percentage:5.1f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
            mininterval=every,
            miniters=0,
            smoothing=0,  # The time left is told by the mean speed, because a batch comes at once.
        )
        self.began = time.perf_counter()

    def add(self, clips: int = 0, seconds: float = 0.0, failed: int = 0, weight: float = 0.0):
        self.clips, self.seconds, self.failed = self.clips + clips, self.seconds + seconds, self.failed + failed
        rates = self.rates()
        self.bar.set_postfix_str(
            f"{rates['clips_per_second']:.1f} clips/s, {rates['audio_hours_per_second']:.3g} audio-hours/s, "
            f"{self.failed} failed",
            refresh=False,
        )
        self.bar.update(min(100 * weight / self.weight, max(0.0, ALMOST - self.bar.n)))

    def finish(self):
        self.bar.update(100 - self.bar.n)

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {
            "seconds": seconds,
            "clips_per_second": self.clips / seconds,
            "audio_hours_per_second": self.seconds / 3600 / seconds,
        }


def engine(settings: EmbedSettings) -> contextlib.AbstractContextManager[tuple[EmbedSettings, Callable]]:
    """Where to run: the settings with the device and dtype there, and what runs units of `Stages` on it."""
    if settings.engine == "local":
        return on_this_machine(settings)
    require("ray.data", "ray")
    from bat_audio_tools.embedding.cluster import on_ray

    return on_ray(settings)


def embed(settings: EmbedSettings) -> dict[str, float]:
    """Embed recordings into a table, see `embedding.table`. A run that was stopped goes on when it is repeated.

    Returns:
        `files`, `failed` of them, `rows` and `audio_hours` of the table, the file with the `errors`, and the
        `first_errors` in words; `seconds`, `clips_per_second` and
        `audio_hours_per_second` of this run.

    Raises:
        ValueError: inputs, settings, and what the folder holds do not go together; nothing has been computed.
        FileNotFoundError: an input or the checkpoint's file or folder is not there.
        StartError: weights cannot be had, or the folder cannot be written or is in use by another run.
        BrokenRecordingError: a recording is broken and the settings are strict, or embeddings are not finite.
        OSError: the table cannot be written further, memory is lacking, or a process was killed.
        ImportError: av, soundfile, soxr, pyarrow or Ray is missing.
    """
    for library in ("av", "soundfile", "soxr"):
        require(library, "embed")
    table, sources = Table(settings.out), _sources(settings)
    if table.is_local and os.path.isfile(table.folder):
        raise ValueError(f"{table.address}: a file; name a folder to write (--out).")
    with contextlib.ExitStack() as stack:
        settings, run = stack.enter_context(engine(settings))
        try:
            dataset = read_dataset(sources, settings.split)
            if not table.exists("metadata.json") and (others := table.other_files()):
                raise ValueError(
                    f"{table.address}: holds other files, such as {others[0]}, but there is no table to go on with: no "
                    f"{table.shown('metadata.json')}."
                )
            stack.enter_context(begun(settings, table, sources, dataset))
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in FULL_DISK:
                raise OSError(f"{table.address}: {error} (nothing is lost; the same command goes on)") from error
            raise StartError(str(error)) from error
        stages = Stages(settings, dataset)
        plan, failed = stages.plan, {unit: table.read_footer(unit)["failed"] for unit in table.finished_units()}
        finished = {unit for unit, number in failed.items() if not (settings.retry and number)}
        weights = [sum(plan.weights(unit)) for unit in range(plan.num_units)]
        progress = Progress(sum(weights), sum(weights[unit] for unit in finished))
        with progress.bar:
            try:
                if units := [unit for unit in range(plan.num_units) if unit not in finished]:
                    run(stages, units, progress.add)
                counts = table.finish(plan.num_units)
                progress.finish()
            except BrokenRecordingError:
                raise
            except (OSError, RuntimeError, MemoryError) as error:  # torch raises RuntimeError for a lack of memory.
                done = f"{len(table.finished_units())} of {plan.num_units} shards are done"
                raise OSError(
                    f"{table.address}: {explain(error)} ({done}; the same command goes on from there)"
                ) from error
    if settings.strict and counts["failed"]:
        raise BrokenRecordingError(
            f"{counts['failed']} recordings are broken; {counts['errors']} lists them: "
            f"{'; '.join(counts['first_errors'])}"
        )
    return {"files": plan.num_inputs, **counts, **progress.rates()}


def _sources(settings: EmbedSettings) -> list:
    """The inputs as a list, which is empty with stored inputs, and else is not."""
    inputs = settings.inputs
    sources = [] if inputs is None else list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    if settings.stored_inputs and sources:
        raise ValueError(
            "With stored_inputs (--stored-inputs) the inputs are those that the table was begun with; name no others."
        )
    if not settings.stored_inputs and not sources:
        raise ValueError("Name the inputs: files, folders, globs, lists of files, or a dataset.")
    return sources
