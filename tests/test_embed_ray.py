"""The Ray engine writes the table of the single machine, on one node, on two, and when one of two is killed."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from embed_tables import assert_same_table, descendants, make_many, read, read_errors, run_embed, unfinished

from bat_audio_tools import embed as embed_module
from bat_audio_tools.embedding import windows
from bat_audio_tools.embedding.windows import BrokenRecordingError
from bat_audio_tools.settings import EmbedSettings

ray = pytest.importorskip("ray")
embed_ray = pytest.importorskip("bat_audio_tools.embedding.cluster")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

OPTIONS = {"shard_size": 5, "segment": 0.5, "num_frames": 16, "pool": "cls+mean", "tokens": True}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    make_many(folder, 100, broken_every=10)
    return folder


@pytest.fixture(scope="module")
def local(many, checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    run_embed([str(many)], out, checkpoint, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def cluster():
    """A cluster of a head without cores, and a node with room for one actor; this process is connected to it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=torch.get_num_threads())
        cluster.wait_for_nodes()
        ray.init(cluster.address, logging_level="error", log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_same_table_on_a_cluster_of_its_own(many, local, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(many.parent)
    options = {"engine": "ray", "cpus_per_actor": torch.get_num_threads(), **OPTIONS}
    summary = run_embed([str(many)], "out", checkpoint, **options)
    assert summary["failed"] == len({row["path"] for row in read_errors(local)})
    assert_same_table(many.parent / "out", local)
    assert not ray.is_initialized()


@pytest.mark.usefixtures("cluster")
def test_a_recording_that_kills_its_process_is_listed(many, local, checkpoint, tmp_path, monkeypatch):
    """As on the single machine; it is not tried for ever."""
    victim = next(row["path"] for row in read(local).select(["path"]).to_pylist())

    class Killing(embed_ray.UnitEmbedder):
        def __init__(self, *arguments):
            def load(source, *arguments):
                if source == victim:
                    os.kill(os.getpid(), signal.SIGKILL)
                return load_audio(source, *arguments)

            load_audio, windows.load_audio = windows.load_audio, load
            super().__init__(*arguments)

    monkeypatch.setattr(embed_ray, "UnitEmbedder", Killing)
    options = {"engine": "ray", "cpus_per_actor": torch.get_num_threads(), **OPTIONS}
    run_embed([str(Path(victim).parent)], tmp_path / "out", checkpoint, **options)
    assert windows.KILLS in [row["error"] for row in read_errors(tmp_path / "out") if row["path"] == victim]


@pytest.mark.usefixtures("cluster")
def test_other_weights_on_a_node_are_refused(many, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "file_digest", lambda file: "0" * 64)  # in the driver, not in the actors
    with pytest.raises(OSError, match=r"On the node .* holds other weights than the table was begun with"):
        run_embed([str(many)], tmp_path / "out", checkpoint, engine="ray", **OPTIONS)


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([{"CPU": 0}, {"CPU": 8}, {"CPU": 2}], {}, (2, 0.0, 5)),
        ([{"CPU": 0, "GPU": 1}, {"CPU": 8}], {}, (4, 0.0, 2)),  # the GPU's node takes no actor
        ([{"CPU": 1}, {"CPU": 8, "GPU": 4}], {}, (4, 1.0, 2)),
        ([{"CPU": 1}, {"CPU": 8, "GPU": 4}], {"device": "cpu"}, (1, 0.0, 9)),
        ([{"CPU": 8, "GPU": 1}], {"gpus_per_actor": 0.25, "cpus_per_actor": 1}, (1, 0.25, 4)),
    ],
)
def test_room_for_actors(nodes, options, expected):
    settings = EmbedSettings(inputs="x", out="out", engine="ray", **options)
    assert embed_ray.room_for_actors(nodes, settings) == expected
    with pytest.raises(ValueError, match="No node of the Ray cluster has"):
        embed_ray.room_for_actors([{"CPU": 0}], settings)


@pytest.mark.usefixtures("cluster")
def test_a_broken_recording_stops_a_strict_run(many, checkpoint, tmp_path):
    with pytest.raises(BrokenRecordingError, match="without strict"):
        run_embed([str(many)], tmp_path / "out", checkpoint, engine="ray", strict=True, **OPTIONS)


@pytest.mark.usefixtures("cluster")
def test_goes_on_where_the_other_engine_stopped(many, local, checkpoint, tmp_path):
    options = {"engine": "ray", "cpus_per_actor": torch.get_num_threads(), **OPTIONS}
    shutil.copytree(local, tmp_path / "out")
    shutil.copytree(f"{local}.run", tmp_path / "out.run")
    for unit in (0, 3, 7):
        (tmp_path / "out" / "embeddings" / f"part-{unit:05d}.parquet").unlink()
    with pytest.raises(ValueError, match=r"settings\.pool was 'cls\+mean' and is 'cls'"):
        run_embed([str(many)], tmp_path / "out", checkpoint, **{**options, "pool": "cls"})
    run_embed([str(many)], tmp_path / "out", checkpoint, **options)
    assert_same_table(tmp_path / "out", local)


def test_same_table_when_a_node_is_killed(many, local, checkpoint, tmp_path, cluster):
    """The last test of this file, because it leaves the cluster without its first node."""
    nodes = [*cluster.worker_nodes, cluster.add_node(num_cpus=torch.get_num_threads())]
    cluster.wait_for_nodes()
    out, failure = tmp_path / "out", []

    def run():
        try:
            run_embed([str(many)], out, checkpoint, engine="ray", cpus_per_actor=torch.get_num_threads(), **OPTIONS)
        except BaseException as error:
            failure.append(error)

    def has_actor(node) -> bool:
        """Ray names its processes after what they run; they are children of their node's raylet."""
        children = descendants(node.all_processes["raylet"][0].process.pid)
        return any(b"UnitEmbedder" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive() and not (all(map(has_actor, nodes)) and len(list(out.glob("embeddings/part-*"))) >= 2):
        time.sleep(0.02)
    done = len(list(out.glob("embeddings/part-*")))
    cluster.remove_node(nodes[0], allow_graceful=False)
    thread.join(300)
    assert not thread.is_alive()
    assert not failure, failure
    assert 2 <= done < 15
    assert_same_table(out, local)
    assert len(unfinished(out)) <= 1  # of the node that was killed
