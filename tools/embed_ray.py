"""The engine of `bat-audio embed` for a cluster: Ray Data with actors that hold the encoder.

An actor does a unit at a time with the stages of the single machine, and writes the shard itself. When a node is lost,
its units are done again elsewhere; a shard appears whole or not at all, so that nothing is lost or there twice.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

from bat_audio.tools.embed import BrokenRecordingError, Encoder, Stages, compute_on
from bat_audio.tools.embed_settings import EmbedSettings

CPUS_PER_ACTOR = 4  # at most, where nothing else is asked for


class UnitEmbedder:
    """An actor: holds the encoder and embeds one unit after the other.

    Args:
        folder: from which relative paths are meant, where this node has it.
        cpus: threads of the encoder on a CPU, and of decoding.
    """

    def __init__(self, settings: EmbedSettings, dataset: tuple | None, folder: str, cpus: int):
        with contextlib.suppress(OSError):
            os.chdir(folder)
        torch.set_num_threads(cpus)
        self.workers = settings.workers or cpus
        self.executor = ThreadPoolExecutor(self.workers)
        self.stages = Stages(settings, dataset)
        self.encoder = Encoder(settings)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """What was done of the unit in the batch: files, clips, seconds of sound, failed files, or an error."""
        (unit,) = batch["unit"].tolist()
        done = {"files": 0, "clips": 0, "seconds": 0.0, "failed": 0}

        def report(**more):
            done.update({name: done[name] + number for name, number in more.items()})

        error, is_broken = "", False
        try:
            clips = self.stages.clips([unit], self.executor, self.workers)
            self.stages.write(unit, (clip for _, clip in clips), self.encoder, report)
        except OSError as failure:  # which Ray would try for ever
            error, is_broken = str(failure), isinstance(failure, BrokenRecordingError)
        return {name: [value] for name, value in {**done, "error": error, "is_broken": is_broken}.items()}


def run_on_ray(stages: Stages, units: list[int], report: Callable):
    """Embed the units on the cluster that is connected, or else on the one of `ray_address`; errors as of `embed`."""
    settings = stages.settings
    is_guest = ray.is_initialized()
    if not is_guest:
        try:
            ray.init(settings.ray_address, logging_level="warning", log_to_driver=False)
        except ConnectionError as error:
            raise OSError(f"No Ray cluster at {settings.ray_address or 'RAY_ADDRESS'}: {error}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = settings.cpus_per_actor or min(CPUS_PER_ACTOR, *(int(node.get("CPU", 0)) or 1 for node in nodes))
        gpus = settings.gpus_per_actor
        if gpus is None:
            gpus = float(settings.device != "cpu" and any(node.get("GPU") for node in nodes))
        most = sum(int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else np.inf)) for node in nodes)
        if not most:
            raise ValueError(
                f"No node of the Ray cluster has {cpus} CPUs and {gpus:g} GPUs for an actor; set cpus_per_actor and "
                "gpus_per_actor."
            )
        DataContext.get_current().enable_progress_bars = False  # the run has one
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        dataset = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
        out = stages.table.files.unstrip_protocol(stages.table.folder)
        done = dataset.map_batches(
            UnitEmbedder,
            batch_size=1,
            compute=ActorPoolStrategy(size=min(most, len(units))),
            num_cpus=cpus,
            num_gpus=gpus,
            fn_constructor_args=(
                replace(settings, inputs=None, out=out, bf16=compute_on(settings)[1] == "bfloat16"),
                stages.dataset,
                os.getcwd(),
                cpus,
            ),
        )
        for row in done.iter_rows():
            if row["error"]:
                raise (BrokenRecordingError if row["is_broken"] else OSError)(row["error"])
            report(**{name: row[name] for name in ("files", "clips", "seconds", "failed")})
    except ray.exceptions.RayError as error:
        raise OSError(f"Ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if not is_guest:
            ray.shutdown()
