"""Rows of `bat-audio embed`: equal to the plain model, whatever the batches; other libraries read the table."""

import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import soundfile
import torch
from embed_tables import RATE, assert_same_table, read, run_embed, run_folder, vectors
from pyarrow import parquet

from bat_audio import BatAudioProcessor, load_audio, load_pretrained_encoder
from bat_audio.processing_bat import fit_frames
from bat_audio_tools.embedding import windows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_frames": 16},
        {"segment": 2.5, "hop": 1.0, "num_frames": 256},
        {"segment": 12.0, "batch_size": 3},
        {"whole": True},
        {"whole": True, "num_frames": 16, "batch_size": 2},
    ],
    ids=str,
)
def test_rows_are_those_of_the_plain_model(options, recordings, checkpoint, tmp_path):
    settings = {"pool": "cls+mean", "tokens": True, "layers": "1,2", **options}
    run_embed([str(recordings)], tmp_path / "out", checkpoint, **settings)
    model, processor = load_pretrained_encoder(checkpoint=checkpoint), BatAudioProcessor(num_frames=None)
    segment = None if "whole" in options else options.get("segment", 10.24)
    for row in read(tmp_path / "out").to_pylist():
        waveform = load_audio(row["path"], row["start_s"], segment)
        assert row["end_s"] == row["start_s"] + len(waveform) / RATE
        patches = -(-len(waveform) // 2560)
        features = fit_frames(processor.log_mel(waveform), max(16 * patches, options.get("num_frames", 1024)))
        with torch.inference_mode():
            output = model(features, output_hidden_states=True)
        tokens = output.patch_tokens[0, :, :patches].mean(dim=2).T
        embedding = torch.cat([output.pooler_output[0], tokens.mean(dim=0)])
        torch.testing.assert_close(torch.tensor(row["embedding"]), embedding, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(row["tokens"]), tokens, rtol=0, atol=1e-5)
        for layer in (1, 2):
            expected = output.hidden_states[layer][0, 0]
            torch.testing.assert_close(torch.tensor(row[f"cls_{layer}"]), expected, rtol=0, atol=1e-5)


def test_rows_are_those_of_the_pipeline(checkpoint, recordings, tmp_path):
    from transformers import pipeline

    run_embed([str(recordings)], tmp_path / "out", checkpoint, whole=True)
    embedder = pipeline("feature-extraction", model=checkpoint, trust_remote_code=True, device="cpu")
    table = read(tmp_path / "out")
    for path, embedding in zip(table["path"].to_pylist(), vectors(table, "embedding"), strict=True):
        torch.testing.assert_close(torch.tensor(embedder(path)), embedding, rtol=0, atol=1e-5)


def test_rows_cover_the_recordings(recordings, checkpoint, tmp_path):
    run_embed([str(recordings)], tmp_path / "out", checkpoint)
    windows = {}
    for row in read(tmp_path / "out").select(["id", "path", "start_s", "end_s"]).to_pylist():
        assert row["id"] == row["path"]
        windows.setdefault(os.path.relpath(row["path"], recordings), []).append((row["start_s"], row["end_s"]))
    mp3_end = len(load_audio(recordings / "mp3.mp3")) / RATE
    assert windows == {  # in the order of the rows too
        "mp3.mp3": [(0, 10.24), (10.24, mp3_end)],
        "ogg.ogg": [(0, 10.24), (10.24, 11.0)],
        **{f"second_{number}.wav": [(0, 1)] for number in range(5)},
        "two.wav": [(0, 10.24), (10.24, 20.48)],
        "a/exact.wav": [(0, 10.24)],
        "a/long.flac": [(0, 10.24), (10.24, 20.48), (20.48, 30.72), (30.72, 40.96), (40.96, 45.5)],
        "a/b/short.wav": [(0, 0.1)],
        "a/b/stereo.wav": [(0, 3.3)],
    }
    assert next(iter(windows)) == "mp3.mp3"
    assert list(windows)[-4:] == ["a/exact.wav", "a/long.flac", "a/b/short.wav", "a/b/stereo.wav"]


@pytest.mark.parametrize(
    ("samples", "segment", "hop", "expected"),
    [
        (50000, 16000, 16000, [0, 16000, 32000, 48000]),
        (48000, 16000, 16000, [0, 16000, 32000]),
        (48512, 16000, 16000, [0, 16000, 32000]),  # the rest is too short for one frame
        (48513, 16000, 16000, [0, 16000, 32000, 48000]),
        (48000, 16000, 8000, [0, 8000, 16000, 24000, 32000]),
        (48001, 16000, 8000, [0, 8000, 16000, 24000, 32000, 40000]),
        (40000, 16000, 20000, [0, 20000]),
        (100, 16000, 16000, [0]),
    ],
)
def test_last_window(samples, segment, hop, expected):
    cut = windows.Cut(rate=RATE, shortest=513, segment=segment, hop=hop)
    assert [number * hop for number in range(cut.num_windows(samples))] == expected


def test_long_recordings_are_read_in_parts(checkpoint, tmp_path):
    soundfile.write(tmp_path / "long.wav", 0.1 * np.random.default_rng(0).standard_normal(11025 * 150), 11025)
    soundfile.write(tmp_path / "next.wav", 0.1 * np.random.default_rng(1).standard_normal(8000), 8000)
    options = {"segment": 2.0, "hop": 1.5, "num_frames": 16}
    run_embed([str(tmp_path)], tmp_path / "parts", checkpoint, workers=2, **options)
    starts = read(tmp_path / "parts")["start_s"].to_pylist()
    assert starts[-2] > windows.PART_SECONDS
    whole = load_audio(tmp_path / "long.wav")
    model, processor = load_pretrained_encoder(checkpoint=checkpoint), BatAudioProcessor(num_frames=None)
    for row in (0, 1, 57, 80, 81, 99):
        part = whole[24000 * row : 24000 * row + 32000]
        with torch.inference_mode():
            expected = model(fit_frames(processor.log_mel(part), 16 * -(-len(part) // 2560))).pooler_output[0]
        embedding = vectors(read(tmp_path / "parts"), "embedding")[row]
        torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-5)
    assert starts == [1.5 * number for number in range(100)] + [0.0]


def test_rows_do_not_depend_on_batches_or_processes(recordings, checkpoint, tmp_path):
    options = {"pool": "cls+mean", "tokens": True, "num_frames": 16}
    run_embed([str(recordings)], tmp_path / "one", checkpoint, batch_size=1, **options)
    run_embed([str(recordings)], tmp_path / "many", checkpoint, batch_size=16, **options)
    run_embed([str(recordings)], tmp_path / "processes", checkpoint, batch_size=16, workers=3, **options)
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert one.drop(["embedding", "tokens"]).equals(many.drop(["embedding", "tokens"]))
    torch.testing.assert_close(vectors(one, "embedding"), vectors(many, "embedding"), rtol=0, atol=1e-5)
    assert_same_table(tmp_path / "many", tmp_path / "processes")


def test_pools_that_fill_up_keep_the_order(recordings, checkpoint, tmp_path, monkeypatch):
    run_embed([str(recordings)], tmp_path / "one", checkpoint, num_frames=16)
    monkeypatch.setattr("bat_audio_tools.embedding.encoder.BUCKET_WINDOWS", 3)
    run_embed([str(recordings)], tmp_path / "buckets", checkpoint, num_frames=16)
    one, buckets = read(tmp_path / "one"), read(tmp_path / "buckets")
    assert one.drop(["embedding"]).equals(buckets.drop(["embedding"]))
    torch.testing.assert_close(vectors(one, "embedding"), vectors(buckets, "embedding"), rtol=0, atol=1e-5)


def test_float16_is_rounded_float32(recordings, checkpoint, tmp_path):
    options = {"tokens": True, "layers": "2"}
    run_embed([str(recordings)], tmp_path / "32", checkpoint, **options)
    run_embed([str(recordings)], tmp_path / "16", checkpoint, float16=True, **options)
    half = read(tmp_path / "16")
    for column in ("embedding", "cls_2"):
        assert half.schema.field(column).type == pa.list_(pa.float16(), 32)
        assert torch.equal(vectors(half, column), vectors(read(tmp_path / "32"), column).half().float())


def test_bf16_is_near_float32(recordings, checkpoint, tmp_path):
    run_embed([str(recordings)], tmp_path / "32", checkpoint)
    run_embed([str(recordings)], tmp_path / "16", checkpoint, bf16=True)
    full, half = (vectors(read(tmp_path / name), "embedding") for name in ("32", "16"))
    assert torch.cosine_similarity(full, half).min() > 0.99
    assert not torch.equal(full, half)


@pytest.mark.slow
def test_compiled_equal_plain(recordings, checkpoint, tmp_path):
    run_embed([str(recordings)], tmp_path / "plain", checkpoint)
    run_embed([str(recordings)], tmp_path / "compiled", checkpoint, compile=True)
    plain, compiled = (vectors(read(tmp_path / name), "embedding") for name in ("plain", "compiled"))
    torch.testing.assert_close(plain, compiled, rtol=0, atol=1e-5)


# Reading back


@pytest.fixture(scope="module")
def table(recordings, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "out"
    run_embed([str(recordings)], out, checkpoint, shard_size=5, tokens=True, layers="1")
    (out.parent / "half").mkdir()
    run_embed([str(recordings)], out.parent / "half" / "out", checkpoint, shard_size=5, tokens=True, float16=True)
    return out


def test_pandas_and_pyarrow(table):
    frame, rows = pd.read_parquet(table / "embeddings"), parquet.read_table(table / "embeddings")
    assert len(frame) == len(rows) == 19
    assert list(frame) == rows.column_names == ["id", "path", "start_s", "end_s", "embedding", "cls_1", "tokens"]
    assert np.stack(frame["embedding"]).shape == (19, 32)
    assert np.array_equal(np.stack(frame["embedding"]), vectors(rows, "embedding").numpy())
    assert np.stack(frame["tokens"][0]).shape == (64, 32)
    half = pd.read_parquet(table.parent / "half" / "out" / "embeddings")
    assert np.stack(half["embedding"]).dtype == np.float16


def test_polars(table):
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(table / "embeddings")
    expected = vectors(parquet.read_table(table / "embeddings"), "embedding").numpy()
    assert np.array_equal(frame["embedding"].to_numpy(), expected)
    assert polars.read_parquet(table.parent / "half" / "out" / "embeddings")["embedding"].to_numpy().shape == (
        19,
        32,
    )


def test_datasets(table, tmp_path):
    datasets = pytest.importorskip("datasets")
    for out in (table, table.parent / "half" / "out"):
        rows = parquet.read_table(out / "embeddings")
        folder = str(out / "embeddings")
        dataset = datasets.load_dataset("parquet", data_dir=folder, split="train", cache_dir=str(tmp_path))
        assert dataset["path"][:] == rows["path"].to_pylist()
        assert torch.equal(torch.tensor(dataset["embedding"][:]), vectors(rows, "embedding"))


READERS = {
    "pandas": lambda folder, cache: pd.read_parquet(folder),
    "pyarrow": lambda folder, cache: parquet.read_table(folder).to_pandas(),
    "polars": lambda folder, cache: pytest.importorskip("polars").read_parquet(folder).to_pandas(),
    "polars, lazy": lambda folder, cache: pytest.importorskip("polars").scan_parquet(folder).collect().to_pandas(),
    "datasets": lambda folder, cache: (
        pytest.importorskip("datasets")
        .load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=cache)
        .to_pandas()
    ),
    "datasets, by the folder": lambda folder, cache: (
        pytest.importorskip("datasets").load_dataset(str(folder), split="train", cache_dir=cache).to_pandas()
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_folder_of_a_table_reads_as_its_rows(reader, table, tmp_path):
    """There is nothing in it that a reader would take for more rows."""
    found, rows = READERS[reader](table, str(tmp_path)), read(table)
    assert found["path"].tolist() == rows["path"].to_pylist()
    assert np.array_equal(np.stack(found["embedding"]), vectors(rows, "embedding").numpy())


def test_metadata_traces_the_table(table, checkpoint):
    metadata = json.loads((run_folder(table) / "metadata.json").read_text())
    assert metadata["checkpoint"] == f"{checkpoint}/model.safetensors"
    assert metadata["commit"] is None
    assert metadata["settings"]["segment"] == metadata["settings"]["hop"] == 10.24
    assert metadata["settings"]["layers"] == "1"
    assert metadata["inputs"]["files"] == 12
    assert metadata["versions"].keys() == {"bat_audio", "torch", "transformers"}
