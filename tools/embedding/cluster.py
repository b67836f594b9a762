"""The engine of `bat-audio embed` for a cluster: Ray Data with actors that hold the encoder.

An actor does a unit at a time with the stages of the single machine, and writes the shard itself. When a node is lost,
its units are done again elsewhere; a shard appears whole or not at all, so that nothing is lost or there twice.
"""

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockAccessor

from bat_audio_tools.embedding.encoder import Encoder, compute_on, encoder_config
from bat_audio_tools.embedding.stages import Stages, explain
from bat_audio_tools.embedding.windows import BrokenRecordingError, DecodingProcesses
from bat_audio_tools.folders import file_digest
from bat_audio_tools.settings import EmbedSettings

CPUS_PER_ACTOR = 4  # An actor gets at most so many CPUs where the settings do not say.
# An actor that was killed, by the loss of its node or by a lack of memory, is started again so many times at most,
# because a lack of memory could come back for ever. Retries of a unit are not limited: Ray makes them at once, and
# would have used them up before it knows that a node is lost.
RESTARTS = 10


class UnitEmbedder:
    """An actor: holds the encoder and embeds one unit after the other.

    Args:
        folder: from which relative paths are meant, where this node has it.
        cpus: threads of the encoder on a CPU, and processes of decoding.
        weights_sha256: of the table; a node may hold other weights under the same name.
    """

    def __init__(self, settings: EmbedSettings, dataset: tuple | None, folder: str, cpus: int, weights_sha256: str):
        with contextlib.suppress(OSError):
            os.chdir(folder)
        torch.set_num_threads(cpus)
        self.workers = settings.workers or cpus
        # The processes start before torch uses threads or a GPU, because it is not safe to fork a process that does.
        self.executor = DecodingProcesses(self.workers)
        self.problem = None
        try:
            weights, _ = encoder_config(settings)
            if file_digest(weights) != weights_sha256:
                raise ValueError(f"{weights} holds other weights than the table was begun with.")
            self.stages = Stages(settings, dataset)
            self.encoder = Encoder(settings)
        except (OSError, ValueError) as error:
            self.problem = f"On the node {socket.gethostname()}: {error}"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """What was done of the unit in the batch: clips, seconds of sound, failed files, weight, or an error."""
        (unit,) = batch["unit"].tolist()
        done = {"clips": 0, "seconds": 0.0, "failed": 0, "weight": 0.0}

        def report(**more):
            done.update({name: done[name] + number for name, number in more.items()})

        error, is_broken = "", False
        try:
            if self.problem is not None:
                raise OSError(self.problem)
            windows = self.stages.windows([unit], self.executor, self.workers)
            self.stages.write(unit, (window for _, window in windows), self.encoder, report)
        except (OSError, RuntimeError, MemoryError) as failure:  # Ray would make a traceback of these.
            error, is_broken = explain(failure), isinstance(failure, BrokenRecordingError)
        return {name: [value] for name, value in {**done, "error": error, "is_broken": is_broken}.items()}


def room_for_actors(nodes: list[dict[str, float]], settings: EmbedSettings) -> tuple[int, float, int]:
    """CPUs and GPUs of an actor, and how many actors the nodes have room for.

    Args:
        nodes: the resources of each; one without CPUs, as heads often are, takes no actor.
    """
    hosts = [node for node in nodes if node.get("CPU", 0) >= 1]
    gpus = settings.gpus_per_actor
    if gpus is None:
        gpus = float(settings.device != "cpu" and any(node.get("GPU") for node in hosts))
    hosts = [node for node in hosts if node.get("GPU", 0) >= gpus]
    cpus = settings.cpus_per_actor or min([CPUS_PER_ACTOR, *(int(node["CPU"]) for node in hosts)])
    most = sum(int(min(node["CPU"] / cpus, node["GPU"] / gpus if gpus else np.inf)) for node in hosts)
    if not most:
        raise ValueError(
            f"No node of the Ray cluster has {cpus} CPUs and {gpus:g} GPUs for an actor; set cpus_per_actor and "
            "gpus_per_actor."
        )
    return cpus, gpus, most


@contextlib.contextmanager
def on_ray(settings: EmbedSettings) -> Iterator[tuple[EmbedSettings, Callable]]:
    """The engine for the cluster that is connected, or else for the one of `ray_address`; errors as of `embed`."""
    is_guest = ray.is_initialized()
    if not is_guest:
        try:
            ray.init(settings.ray_address, logging_level="warning", log_to_driver=False)
        except ConnectionError as error:
            raise OSError(f"No Ray cluster at {settings.ray_address or 'RAY_ADDRESS'}: {error}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus, most = room_for_actors(nodes, settings)
        sent = replace(settings, inputs=None)
        if gpus:  # Only a node with the GPU can tell what it is capable of.
            ask = ray.remote(compute_on).options(num_cpus=cpus, num_gpus=gpus)
            device, dtype = ray.get(ask.remote(sent))
        else:
            device, dtype = compute_on(replace(sent, device="cpu" if settings.device == "auto" else settings.device))
        run = partial(run_on_ray, cpus=cpus, gpus=gpus, most=most)
        yield replace(settings, device=device, bf16=dtype == "bfloat16"), run
    except ray.exceptions.RayError as error:
        raise OSError(f"Ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if not is_guest:
            ray.shutdown()


def run_on_ray(stages: Stages, units: list[int], report: Callable, *, cpus: int, gpus: float, most: int):
    """Embed the units with at most so many actors, which have so many CPUs and GPUs each."""
    DataContext.get_current().enable_progress_bars = False  # The run has a bar of its own.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    out = stages.table.files.unstrip_protocol(stages.table.folder)
    weights_sha256 = stages.table.read_metadata()["weights_sha256"]
    done = dataset.map_batches(
        UnitEmbedder,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(most, len(units))),
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=RESTARTS,
        fn_constructor_args=(
            replace(stages.settings, inputs=None, out=out),
            stages.dataset,
            os.getcwd(),
            cpus,
            weights_sha256,
        ),
    )
    # iter_rows would read ahead in threads. A thread that still reads after an error and ray.shutdown would end this
    # process without a word.
    for bundle in done.iter_internal_ref_bundles():
        blocks = map(BlockAccessor.for_block, ray.get(bundle.block_refs))
        for row in itertools.chain.from_iterable(block.iter_rows(public_row_format=True) for block in blocks):
            if row["error"]:
                raise (BrokenRecordingError if row["is_broken"] else OSError)(row["error"])
            report(**{name: row[name] for name in ("clips", "seconds", "failed", "weight")})
