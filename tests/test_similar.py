"""Search by cosine: the rows of a dense search, however the table is cut into shards, in the memory of a batch."""

import json
import math
import os
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from conftest import ROOT, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run_program
from pyarrow import parquet
from typer.testing import CliRunner

import bat_audio_tools.similar as similar_module
from bat_audio import BatFeatureExtractor, BatModel
from bat_audio.pipeline_bat import BatFeatureExtractionPipeline
from bat_audio_tools.cli import app
from bat_audio_tools.folders import file_digest
from bat_audio_tools.settings import POOLS
from bat_audio_tools.similar import cosines_of, nearest_rows, similar
from bat_audio_tools.sounds.listing import write_plan
from bat_audio_tools.sounds.reading import Input

RATE = 16000
PATCH = 16 * 160  # samples
SOUNDS = sorted(str(file) for file in (ROOT / "examples").iterdir() if file.suffix in (".flac", ".mp3", ".ogg", ".wav"))


def write_table(folder, vectors: np.ndarray, shards=None, row_group: int = 100, metadata: dict | None = None):
    """A table of vectors (N, D) with the shards' numbers of rows, whose ids count the rows."""
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    first = 0
    for number, rows in enumerate(shards or [len(vectors)]):
        part = vectors[first : first + rows]
        values = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), vectors.shape[1])
        places = range(first, first + rows)
        columns = {
            "id": pa.array(map(str, places), pa.string()),
            "path": pa.array([f"{i}.wav" for i in places], pa.string()),
            "start_s": pa.array([i / 2 for i in places], pa.float64()),
            "end_s": pa.array([i / 2 + 10.24 for i in places], pa.float64()),
            "embedding": values,
        }
        parquet.write_table(
            pa.table(columns), folder / "embeddings" / f"part-{number:05}.parquet", row_group_size=row_group
        )
        first += rows
    if metadata is not None:
        (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def dense(query: torch.Tensor, vectors: np.ndarray, k: int) -> list[dict]:
    cosines = cosines_of(torch.from_numpy(vectors).double(), query.double()).tolist()
    order = sorted(range(len(vectors)), key=lambda row: (-cosines[row], row))[:k]
    return [
        {
            "rank": rank,
            "cosine": cosines[row],
            "id": str(row),
            "path": f"{row}.wav",
            "start_s": row / 2,
            "end_s": row / 2 + 10.24,
        }
        for rank, row in enumerate(order, start=1)
    ]


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    k=st.integers(1, 30),
    row_group=st.integers(1, 7),
    batch_rows=st.integers(1, 7),
    dtype=st.sampled_from([np.float32, np.float16]),
    few_values=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_a_dense_search(tmp_path_factory, shards, k, row_group, batch_rows, dtype, few_values, seed):
    rng = np.random.default_rng(seed)
    shape = sum(shards), 5
    # Few values make many ties, and rows of zeros.
    vectors = (rng.integers(-1, 2, shape) if few_values else rng.standard_normal(shape)).astype(dtype)
    query = torch.from_numpy(rng.standard_normal(5).astype(np.float32))
    table = write_table(tmp_path_factory.mktemp("table"), vectors, shards, row_group)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(similar_module, "BATCH_ROWS", batch_rows)
        assert nearest_rows(query, table, k) == dense(query, vectors, k)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([np.float32, np.float16]),
    size=st.sampled_from([1e-44, 1e-30, 1e-7, 1.0, 1e4, 1e30]),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_cosines_of_vectors_of_any_length(dtype, size, width, seed):
    """In -1..1, and those of exact arithmetic; vectors that are parallel have 1 or -1, but those of zeros have 0."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        rows = (size * rng.standard_normal((6, width))).astype(dtype)
    rows = rows[np.isfinite(rows).all(axis=1)]
    query = rng.standard_normal(width).astype(np.float32)
    wide = query.astype(np.float64)
    rows = np.concatenate([rows.astype(np.float64), [3 * size * wide, -3 * size * wide, 0 * wide]])
    found = cosines_of(torch.from_numpy(rows), torch.from_numpy(query).double()).numpy()
    assert (np.abs(found) <= 1).all()
    for row, cosine in zip(rows, found, strict=True):
        exact = [[Fraction(value) for value in vector.tolist()] for vector in (row, query)]
        product, *squares = (
            sum(x * y for x, y in zip(*pair, strict=True)) for pair in (exact, exact[:1] * 2, exact[1:] * 2)
        )
        square = product**2 / (squares[0] * squares[1]) if squares[0] else Fraction(0)
        assert cosine == pytest.approx(math.copysign(math.sqrt(square), product), abs=1e-7)
    assert found[-3:].tolist() == pytest.approx([1, -1, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_equal_rows_keep_their_order_at_full_width(tmp_path, dtype):
    """A row's cosine does not depend on where it stands: the same vectors over and over, in uneven shards."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((7, 1536)).astype(dtype)[np.arange(9000) % 7]
    query = torch.from_numpy(rng.standard_normal(1536).astype(np.float32))
    table = write_table(tmp_path / "table", vectors, [1, 4999, 3, 3997], row_group=1000)
    found = nearest_rows(query, table, 2000)
    assert found == dense(query, vectors, 2000)
    assert len({row["cosine"] for row in found}) == 2


def test_memory_is_that_of_a_batch(tmp_path, monkeypatch):
    """Of ten times as many rows no more are held at once."""
    held = []

    def watch(vectors, query):
        held.append((len(vectors), pa.total_allocated_bytes() - before))
        return cosines_of(vectors, query)

    monkeypatch.setattr(similar_module, "cosines_of", watch)
    monkeypatch.setattr(similar_module, "BATCH_ROWS", 100)
    peaks = []
    for shards in (2, 20):
        vectors = np.random.default_rng(0).standard_normal((500 * shards, 256)).astype(np.float32)
        table = write_table(tmp_path / str(shards), vectors, [500] * shards, row_group=250)
        del vectors
        before = pa.total_allocated_bytes()
        held.clear()
        nearest_rows(torch.ones(256), table, 5)
        assert sum(rows for rows, _ in held) == 500 * shards
        assert max(rows for rows, _ in held) <= 100
        peaks.append(max(size for _, size in held))
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 500 * 20 * 256 * 4 / 4  # a quarter of the table


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


def metadata_of(folder, pool: str = "cls", num_frames: int = 1024) -> dict:
    return {
        "checkpoint": str(folder),
        "commit": None,
        "weights_sha256": file_digest(folder / "model.safetensors"),
        "settings": {"pool": pool, "num_frames": num_frames},
    }


def reference_embedding(model, waveform: torch.Tensor, pool: str, num_frames: int = 1024) -> torch.Tensor:
    """The pipeline's CLS token, and the mean over the pipeline's patch tokens that hold sound."""
    extractor = BatFeatureExtractor(num_frames=num_frames)
    pipe = BatFeatureExtractionPipeline(model=model, feature_extractor=extractor, device="cpu")
    patches = -(-len(waveform) // PATCH) * 8
    parts = {
        "cls": pipe(waveform, return_tensors=True),
        "mean": pipe(waveform, pool=None, return_tensors=True)[1 : 1 + patches].mean(dim=0),
    }
    return torch.cat([parts[part] for part in pool.split("+")])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("num_frames", [1024, 112])
@pytest.mark.parametrize("samples", [600, PATCH, 50000, 170000])
def test_embedding_is_the_pipelines(pool, samples, num_frames, model_folder, tmp_path, monkeypatch):
    waveform = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    soundfile.write(tmp_path / "query.wav", waveform.numpy(), RATE, subtype="FLOAT")
    expected = reference_embedding(tiny_model(), waveform, pool, num_frames)
    table = write_table(tmp_path / "table", np.ones((1, 3)), metadata=metadata_of(model_folder, pool, num_frames))
    monkeypatch.setattr(similar_module, "nearest_rows", lambda embedding, table, k: embedding)
    found = similar(tmp_path / "query.wav", table, device="cpu")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=POOLS)
def sounds_table(request, model_folder, tmp_path):
    """A table of the example sounds, one row each."""
    model, load = tiny_model(), BatFeatureExtractor().load_audio
    vectors = torch.stack([reference_embedding(model, load(sound), request.param) for sound in SOUNDS])
    metadata = metadata_of(model_folder, request.param)
    return write_table(tmp_path / "table", vectors.numpy(), [2, len(SOUNDS) - 2], metadata=metadata)


def test_a_sound_of_the_table_finds_itself(sounds_table):
    for number in (0, 3, len(SOUNDS) - 1):
        found = similar(SOUNDS[number], sounds_table)
        assert found[0]["id"] == str(number)
        assert found[0]["cosine"] == pytest.approx(1, abs=1e-6)
        assert len(found) == len(SOUNDS)


def test_part_of_a_recording_and_another_checkpoint(sounds_table, model_folder, tmp_path):
    """A part found by its times is the same as the part in a file, and the checkpoint may have moved."""
    part, metadata_file = tmp_path / "part.wav", sounds_table / "metadata.json"
    soundfile.write(part, BatFeatureExtractor().load_audio(SOUNDS[0], 0.5, 1.25).numpy(), RATE, subtype="FLOAT")
    expected = similar(part, sounds_table, 3)
    assert expected != similar(SOUNDS[0], sounds_table, 3)
    metadata = json.loads(metadata_file.read_text())
    metadata_file.write_text(json.dumps({**metadata, "checkpoint": "/gone", "commit": "0" * 40}))
    assert similar(SOUNDS[0], sounds_table, 3, start=0.5, duration=1.25, checkpoint=model_folder) == expected


@pytest.mark.parametrize("sounds_table", ["cls"], indirect=True)
def test_an_unfinished_table_gives_a_warning(sounds_table, caplog):
    with (sounds_table / "inputs.parquet").open("wb") as file:
        write_plan(((Input(str(number), str(number)), 0) for number in range(6)), file, 2)
    found = similar(SOUNDS[0], sounds_table, 1)
    assert "2 of 3 shards are there, and only these are searched" in caplog.text
    caplog.clear()
    with (sounds_table / "inputs.parquet").open("wb") as file:
        write_plan(((Input(str(number), str(number)), 0) for number in range(6)), file, 3)
    assert similar(SOUNDS[0], sounds_table, 1) == found
    assert not caplog.records


@pytest.mark.parametrize("sounds_table", ["cls"], indirect=True)
def test_a_table_with_its_notes_beside_it(sounds_table):
    """As bat-audio embed writes it since version 0.7.0."""
    expected, notes = similar(SOUNDS[0], sounds_table), sounds_table.with_name("table.run")
    notes.mkdir()
    (sounds_table / "metadata.json").rename(notes / "metadata.json")
    assert similar(SOUNDS[0], sounds_table) == expected
    (notes / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"table\.run/metadata\.json does not tell"):
        similar(SOUNDS[0], sounds_table)


@pytest.mark.parametrize("sounds_table", ["cls"], indirect=True)
@pytest.mark.parametrize("is_beside", [False, True])
def test_a_damaged_list_of_inputs(is_beside, sounds_table):
    notes = sounds_table.with_name("table.run") if is_beside else sounds_table
    notes.mkdir(exist_ok=True)
    (sounds_table / "metadata.json").rename(notes / "metadata.json")
    with (notes / "inputs.parquet").open("wb") as file:
        write_plan(((Input(str(number), str(number)), 0) for number in range(2)), file, 2)
    with pytest.raises(ValueError, match=r"part-00001\.parquet is a shard too many: .*inputs\.parquet lists"):
        similar(SOUNDS[0], sounds_table)
    for size in (300, 0):
        os.truncate(notes / "inputs.parquet", size)
        with pytest.raises(ValueError, match=rf"{notes}/inputs\.parquet cannot be read as a file of a table"):
            similar(SOUNDS[0], sounds_table)


@pytest.mark.parametrize("sounds_table", ["cls"], indirect=True)
@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_wrong_usage(device, sounds_table):
    result = CliRunner().invoke(app, ["similar", SOUNDS[0], str(sounds_table), "--device", device])
    assert result.exit_code == 2
    assert f"error: device='{device}' is not there" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("sounds_table", ["cls"], indirect=True)
def test_command(sounds_table):
    arguments = ["similar", SOUNDS[1], sounds_table, "-k", 2]
    expected = similar(SOUNDS[1], sounds_table, 2)
    assert json.loads(run_program(*arguments, "--json")) == expected
    arguments[1] = f"file://{SOUNDS[1]}"
    assert json.loads(run_program(*arguments, "--json")) == expected
    header, *lines = run_program(*arguments).splitlines()
    assert header.split() == ["rank", "cosine", "start_s", "end_s", "path"]
    for line, row in zip(lines, expected, strict=True):
        rank, cosine, start, end, path = line.split()
        assert (int(rank), float(cosine), path) == (row["rank"], round(row["cosine"], 4), row["path"])
        assert (float(start), float(end)) == (round(row["start_s"], 2), round(row["end_s"], 2))


GOOD = {
    "checkpoint": "/nowhere",
    "commit": None,
    "weights_sha256": "0" * 64,
    "settings": {"pool": "cls", "num_frames": 1024},
}


def change(table, column: str, values):
    file = table / "embeddings" / "part-00001.parquet"
    rows = parquet.read_table(file)
    parquet.write_table(rows.set_column(rows.schema.get_field_index(column), column, values), file)


def spoil_width(table):
    vectors = pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2))
    change(table, "embedding", vectors)


def spoil_nan(table):
    change(
        table, "embedding", pa.array([[1.0, 2.0, 3.0], [1.0, 2.0, np.nan], [1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3))
    )


def spoil_null(table):
    try:
        change(table, "embedding", pa.array([[1.0, 2.0, 3.0], None, [1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3)))
    except pa.ArrowNotImplementedError:
        pytest.skip("This pyarrow writes no such table.")


def spoil_list(table):
    change(table, "embedding", pa.array([[1.0, 2.0, 3.0]] * 3, pa.list_(pa.float32())))


def spoil_columns(table):
    file = table / "embeddings" / "part-00001.parquet"
    parquet.write_table(parquet.read_table(file).drop_columns(["path", "end_s"]), file)


def spoil_bytes(table):
    file = table / "embeddings" / "part-00001.parquet"
    os.truncate(file, 500)


def remove_shards(table):
    for file in table.rglob("part-*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_shards, r"table holds no part-\*\.parquet; name a folder that bat-audio embed has written"),
        (spoil_width, r"part-00001.parquet: the embeddings are .*\[2\], but the query's has 3 values"),
        (spoil_list, r"part-00001.parquet: the embeddings are list<.*, but the query's has 3 values"),
        (spoil_nan, r"part-00001.parquet holds NaN or infinite values in the row .*'id': '4'"),
        (spoil_null, r"part-00001.parquet holds rows without an embedding"),
        (spoil_columns, r"part-00001.parquet lacks the columns path, end_s"),
        (spoil_bytes, r"part-00001.parquet cannot be read"),
    ],
)
def test_damaged_tables(tmp_path, spoil, message):
    table = write_table(tmp_path / "table", np.ones((6, 3), np.float32), [3, 3])
    spoil(table)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        nearest_rows(torch.ones(3), table)


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [(torch.ones(3), 0, "k=0 must be at least 1"), (torch.full((3,), torch.nan), 1, "query's embedding holds NaN")],
)
def test_wrong_queries(tmp_path, query, k, message):
    with pytest.raises(ValueError, match=message):
        nearest_rows(query, write_table(tmp_path / "table", np.ones((6, 3), np.float32)), k)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "metadata.json does not tell checkpoint, commit, digest and settings"),
        ([], "metadata.json does not tell"),
        ({"checkpoint": "/nowhere"}, r"metadata.json does not tell .*'commit'"),
        ({**GOOD, "settings": []}, "metadata.json does not tell"),
        ({**GOOD, "settings": {"pool": "cls", "num_frames": "many"}}, "metadata.json does not tell"),
        ({**GOOD, "settings": {"pool": "cls", "num_frames": 1024, "segment": "long"}}, "metadata.json does not tell"),
        (
            {**GOOD, "settings": {"pool": "max", "num_frames": 1024}},
            "pool='max' is not known; expected cls, mean, cls.mean",
        ),
        (GOOD, "No weights at /nowhere"),
    ],
)
def test_wrong_metadata(tmp_path, metadata, message):
    table = write_table(tmp_path / "table", np.ones((6, 32), np.float32), metadata=metadata)
    with pytest.raises((ValueError, OSError), match=message):
        similar(SOUNDS[0], table)


def test_a_whole_recording_beside_parts_gives_a_hint(model_folder, tmp_path, caplog):
    metadata = metadata_of(model_folder)
    metadata["settings"]["segment"] = 0.5
    table = write_table(tmp_path / "table", np.ones((6, 32), np.float32), metadata=metadata)
    similar(SOUNDS[0], table)
    assert "one embedding, which is compared with parts of 0.5 s" in caplog.text
    caplog.clear()
    similar(SOUNDS[0], table, duration=0.5)
    assert not caplog.records


def test_other_weights_than_the_tables_are_refused(sounds_table, tmp_path):
    torch.manual_seed(1)
    BatModel(tiny_config()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other weights than those that .*metadata\.json names"):
        similar(SOUNDS[0], sounds_table, checkpoint=tmp_path / "other")


def test_wrong_recording_and_width(tmp_path, model_folder):
    table = write_table(tmp_path / "table", np.ones((6, 31), np.float32), metadata=metadata_of(model_folder))
    with pytest.raises(ValueError, match=r"fixed_size_list<.*\[31\], but the query's has 32 values"):
        similar(SOUNDS[0], table)
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(ValueError, match=r"text\.wav: cannot be read as audio"):
        similar(tmp_path / "text.wav", table)
    result = CliRunner().invoke(app, ["similar", str(tmp_path / "none.wav"), str(table)])
    assert result.exit_code == 2
    assert "none.wav: no such file." in result.output
    assert CliRunner().invoke(app, ["similar", SOUNDS[0], str(table), "-k", "0"]).exit_code == 2
