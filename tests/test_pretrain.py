"""Pre-training: clips, and resumed, accumulated, checkpointed and distributed runs that equal the plain one."""

import itertools
import json
import math
import os
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, assert_same_weights, tiny_config, tiny_model
from huggingface_hub import ModelCard
from programs import Program, run_program, run_two_processes
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoModel

from bat_audio import BatAudioProcessor, BatForAudioClassification, BatModel, load_pretrained_encoder
from bat_audio.modeling_bat import BatBlock
from bat_audio_tools.convert import convert
from bat_audio_tools.pretrain import LOGGED, MoveTeacher, build_encoder, pretrain
from bat_audio_tools.settings import PretrainSettings
from bat_audio_tools.sounds.listing import list_inputs
from bat_audio_tools.training.masked_clips import MaskedClips, Recordings
from bat_audio_tools.training.masked_regression import MaskedRegression
from bat_audio_tools.training.trainer import config_from_json

MASKS = {"count": 3, "grid": (4, 8), "keep": 0.3, "block": 3}
SECONDS = 0.64  # of the tiny encoder's input


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    """Twelve recordings of half a second at different rates, and one that is three clips long."""
    folder = tmp_path_factory.mktemp("pretrain") / "sounds"
    (folder / "deeper").mkdir(parents=True)
    for number in range(13):
        rng, rate = np.random.default_rng(number), (16000, 22050, 8000)[number % 3]
        n = np.arange(int(rate * (0.5 if number else 3 * SECONDS)))
        tone = np.sin(2 * np.pi * (200 + 150 * number) * n / rate) * (n % (rate // (3 + number)) < rate // 8)
        wave = 0.3 * tone + 0.01 * rng.standard_normal(len(n))
        soundfile.write(folder / ("deeper" * (number % 2)) / f"{number:02}.flac", wave, rate)
    return folder


@pytest.fixture(scope="session")
def tiny_json(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    tiny_config(input_shape=[64, 128], hidden_dropout_prob=0.1).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture
def options(sounds, tiny_json, tmp_path) -> dict:
    return {
        "data": str(sounds),
        "out": str(tmp_path / "encoder"),
        "config": str(tiny_json),
        "views": 3,
        "keep": 0.3,
        "mask_block": 3,
        "decoder_blocks": 1,
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "ema_final_decay": 0.99,
        "ema_steps": 8,
        "log_every": 1,
        "save_every": 4,
        "num_workers": 0,
        "report_to": "none",
        "bf16": False,
    }


def pretrained(options: dict, **changes) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The last line of the log, and student, decoder and teacher at the last step."""
    options = {**options, **changes}
    metrics = pretrain(PretrainSettings(**options))
    return metrics, load_file(last_checkpoint(options) / "model.safetensors")


def last_checkpoint(options: dict) -> Path:
    return Path(f"{options['out']}.training", f"checkpoint-{options['steps']}")


def log_of(options: dict) -> list[dict]:
    return json.loads((last_checkpoint(options) / "trainer_state.json").read_text())["log_history"]


def command_line(options: dict) -> list[str]:
    words = ["pretrain"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def assert_same_steps(options: dict, others: dict):
    one, other = ([entry for entry in log_of(run) if "loss" in entry] for run in (options, others))
    assert len(one) == len(other) == options["steps"]
    for mine, theirs in zip(one, other, strict=True):
        for name in ("local_loss", "global_loss", "grad_norm"):  # variances are those over a process's clips
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3), name


# Settings


def test_defaults_are_the_authors():
    settings = PretrainSettings(data="x", out="y")
    assert (settings.learning_rate, settings.beta2, settings.weight_decay) == (5e-4, 0.95, 0.05)
    assert (settings.steps, settings.warmup * settings.steps, settings.batch_size) == (400_000, 53_000, 24)
    assert (settings.views, settings.keep, settings.mask_block, settings.decoder_blocks) == (16, 0.2, 5, 6)
    schedule = MoveTeacher(None, settings)
    decays = [schedule.decay(step) for step in (0, 50_000, 100_000, 399_999)]
    assert decays == pytest.approx([0.9998, 0.999895, 0.99999, 0.99999], abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "x"}, "config belongs to a new encoder"),
        ({"mask_block": 4}, "mask_block=4 must be an odd number"),
        ({"keep": 1.0}, "keep=1.0 must be from 0 to below 1"),
        ({"views": 0}, "views=0 must be above 0"),
        ({"warmup": 5}, "warmup=5"),
        ({"seed": -1}, "seed=-1"),
        ({"clip_seconds": 10.0}, "clip_seconds=10.0 is longer than the encoder's input of 0.64 s"),
        ({"gradient_accumulation": 3}, "batch_size=4 must be a multiple of 3"),
        ({"report_to": "paper"}, "report_to='paper' is not installed"),
        ({"split": "train"}, "split='train' chooses from a dataset"),
    ],
)
def test_wrong_settings_are_refused_and_leave_nothing(options, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(PretrainSettings(**{**options, **changes}))
    assert list(tmp_path.iterdir()) == []


def test_missing_data_and_folder_in_the_way_are_refused(options, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pretrain(PretrainSettings(**{**options, "data": str(tmp_path / "nowhere")}))
    Path(options["out"]).mkdir()
    with pytest.raises(FileExistsError, match="exists already; name another"):
        pretrain(PretrainSettings(**options))


def test_masks_that_keep_nothing_are_refused_and_leave_nothing(options, tmp_path):
    with pytest.raises(ValueError, match=r"keep=0.01 of 32 patches are 0"):
        pretrained(options, keep=0.01)
    assert list(tmp_path.iterdir()) == []


# Clips


def clips_of(source, folder: Path, **changes) -> MaskedClips:
    folder.mkdir(exist_ok=True)
    recordings = Recordings(source, None)
    recordings.survey(folder, changes.get("skip_broken", False))
    settings = {"clip_seconds": SECONDS, "masks": MASKS, "num_items": 60, **changes}
    return MaskedClips(recordings, folder, BatAudioProcessor(num_frames=64), 64, **settings)


def test_every_epoch_has_every_stretch_once(sounds, tmp_path):
    clips = clips_of(sounds, tmp_path / "work")
    assert clips.ends[0] == 3  # the long recording
    assert clips.ends[-1] == 15
    for epoch in range(4):
        stretches = [clips.order[epoch * 15 + place] for place in range(15)]
        assert sorted(stretches) == [(epoch, stretch) for stretch in range(15)]


def test_items_depend_on_seed_and_place_alone(sounds, tmp_path):
    one, other = (clips_of(sounds, tmp_path / "work") for _ in range(2))
    backwards = [other[place] for place in reversed(range(60))][::-1]
    for place, expected in enumerate(backwards):
        item = one[place]
        assert item["input_features"].shape == (1, 64, 128)
        assert item["ids_keep"].shape == (3, 9)
        assert torch.equal(item["input_features"], expected["input_features"])
        assert torch.equal(item["ids_keep"], expected["ids_keep"])
    masks = torch.stack([one[place]["ids_keep"] for place in range(20)]).flatten(0, 1)
    assert len(masks.unique(dim=0)) > 50
    assert not torch.equal(one[0]["ids_keep"], clips_of(sounds, tmp_path / "work", seed=1)[0]["ids_keep"])


def test_clips_are_rotated_and_padded_before_the_features(tmp_path):
    """An impulse, whose place tells the rotation; behind the clip there is digital silence, 80 dB down."""
    rng = np.random.default_rng(0)
    wave = 1e-3 * rng.standard_normal(8000)
    wave[4000] = 0.9
    soundfile.write(tmp_path / "impulse.wav", wave, 16000, subtype="FLOAT")
    clips = clips_of(tmp_path / "impulse.wav", tmp_path / "work")
    places = set()
    for item in (clips[place]["input_features"][0] for place in range(30)):
        power = item.sum(1)
        places.add(int(power.argmax()))
        assert item[54:].max() == 0
        assert item[:50].min() > 0.05  # or else the recording's own minimum would be the zero
    assert len(places) > 15
    assert max(places) <= 50


def test_stretches_of_a_long_recording_lie_anywhere_in_it(tmp_path):
    """A slow rise of pitch, which tells the place."""
    n = np.arange(16000 * 10)
    soundfile.write(tmp_path / "rise.wav", 0.5 * np.sin(2 * np.pi * (300 + 15 * n / 16000 * 10) * n / 16000), 16000)
    (tmp_path / "list.csv").write_text("path,start,duration\nrise.wav,2.0,5.0\n")
    whole, part = (
        clips_of(tmp_path / name, tmp_path / f"work-{name}", num_items=200) for name in ("rise.wav", "list.csv")
    )
    assert (whole.ends[-1], part.ends[-1]) == (16, 8)

    def pitches(clips: MaskedClips) -> list[int]:
        return sorted(int(clips[place]["input_features"][0].mean(0).argmax()) for place in range(200))

    def pitch_at(start: float) -> int:
        features = BatAudioProcessor(num_frames=64).log_mel(
            torch.from_numpy(soundfile.read(tmp_path / "rise.wav", dtype="float32")[0])[int(start * 16000) :][:10240]
        )
        return int(features[0, 0].mean(0).argmax())

    found = pitches(whole)
    assert found[0] <= pitch_at(0.5)
    assert found[-1] >= pitch_at(8.9)
    found = pitches(part)
    assert pitch_at(2.0) - 1 <= found[0] <= pitch_at(2.5)
    assert pitch_at(5.9) <= found[-1] <= pitch_at(6.36) + 1


def test_datasets_hold_clips_too(sounds, tmp_path):
    files = [item.path for item, _ in list_inputs([sounds], None)]
    dataset = datasets.Dataset.from_dict(
        {"audio": [{"bytes": Path(file).read_bytes(), "path": None} for file in files]}
    ).cast_column("audio", datasets.Audio(decode=False))
    of_files, of_dataset = (
        clips_of(source, tmp_path / name) for name, source in (("files", files), ("dataset", dataset))
    )
    for place in range(20):
        assert torch.equal(of_files[place]["input_features"], of_dataset[place]["input_features"])


def break_some(folder: Path):
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("no sound")


def test_broken_recordings_are_refused_or_left_out(options, sounds, tmp_path):
    folder = shutil.copytree(sounds, tmp_path / "sounds")
    break_some(folder)
    with pytest.raises(ValueError, match=r"2 of 15 recordings cannot be read \(.*empty.wav.*--skip-broken"):
        pretrained(options, data=str(folder))
    work = Path(f"{options['out']}.training")
    assert [line.partition(": ")[0] for line in (work / "broken.txt").read_text().splitlines()] == [
        str(folder / name) for name in ("empty.wav", "text.wav")
    ]
    soundfile.write(folder / "text.wav", np.zeros(8000), 16000)  # what was mended counts at once
    with pytest.raises(ValueError, match=r"1 of 15 recordings cannot be read \(.*empty.wav"):
        pretrained(options, data=str(folder))
    (folder / "text.wav").write_text("no sound")
    _, weights = pretrained(options, data=str(folder), skip_broken=True)
    assert parquet.read_table(work / "recordings.parquet").num_rows == 13
    _, expected = pretrained(options, out=str(tmp_path / "other"))
    assert_same_weights(weights, expected)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
def test_what_is_no_file_is_named_as_broken(sounds, tmp_path):
    folder = shutil.copytree(sounds, tmp_path / "sounds")
    os.mkfifo(folder / "a.wav")
    (folder / "b.wav").symlink_to("/dev/zero")
    (folder / "c.wav").symlink_to("nowhere.wav")
    message = r"3 of 16 .*a.wav: It is a pipe .*b.wav: It is a device.*c.wav: It is a link"
    with pytest.raises(ValueError, match=message):
        Recordings(folder, None).survey(tmp_path, False)
    facts = Recordings(folder, None).survey(tmp_path, True)
    (folder / "c.wav").unlink()
    shutil.copy(sounds / "00.flac", folder / "c.wav")
    assert Recordings(folder, None).survey(tmp_path, True) == facts  # A run that has begun goes on without it.


def test_a_recording_that_breaks_in_the_middle_gives_way_to_the_next(sounds, tmp_path, caplog):
    folder = shutil.copytree(sounds, tmp_path / "sounds")
    whole = clips_of(folder, tmp_path / "work")
    places = [place for place in range(59) if whole.order[place][1] == 7]
    row = int(np.searchsorted(whole.ends, 7, side="right"))
    file = Path(whole.table["path"][row].as_py())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{file.name}.*--skip-broken"):
        whole[places[0]]
    skipping = clips_of(folder, tmp_path / "work", skip_broken=True)
    for place in places:
        assert torch.equal(skipping[place]["ids_keep"], skipping[place + 1]["ids_keep"])
    assert torch.equal(skipping[places[0] - 1]["ids_keep"], whole[places[0] - 1]["ids_keep"])


def test_survey_is_made_once(sounds, tmp_path, monkeypatch):
    recordings = Recordings(sounds, None)
    facts = recordings.survey(tmp_path, False)
    assert (facts["recordings"], facts["broken"]) == (13, 0)
    assert facts["hours"] == pytest.approx((12 * 0.5 + 3 * SECONDS) / 3600, abs=1e-3)
    monkeypatch.setattr(Recordings, "_seconds", None)
    assert Recordings(sounds, None).survey(tmp_path, False) == facts
    with pytest.raises(TypeError):  # other recordings, so it measures again
        Recordings(sounds / "deeper", None).survey(tmp_path, False)


# Runs


def test_run_writes_an_encoder_with_a_card_and_a_log(options):
    metrics, weights = pretrained(options, steps=40, save_every=20, log_every=5, save_total_limit=1)
    log = [entry for entry in log_of({**options, "steps": 40}) if "loss" in entry]
    assert [entry["step"] for entry in log] == list(range(5, 41, 5))
    assert log[-1]["local_loss"] < log[0]["local_loss"]
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["local_loss"] + entry["global_loss"], abs=1e-3)
        assert entry["target_variance"] > 0.01
        assert entry["mean_target_variance"] > 1e-5
        assert entry["cls_variance"] > 1e-4
    assert {name: log[-1][name] for name in metrics} == metrics

    encoder = AutoModel.from_pretrained(options["out"])
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[f"student.encoder.{name}"])
    assert (Path(options["out"]) / "preprocessor_config.json").exists()
    assert (Path(options["out"]) / "modeling_bat.py").exists()
    card = ModelCard.load(Path(options["out"]) / "README.md")
    assert "pre-trained from random weights on 13 recordings of 0.0 hours, without labels" in card.text
    assert "| mask\\_block | 3 |" in card.text
    assert (Path(options["out"]) / "plots" / "pretraining.png").stat().st_size > 10_000
    assert [folder.name for folder in Path(f"{options['out']}.training").glob("checkpoint-*")] == ["checkpoint-40"]


def test_means_in_the_log_are_those_of_the_steps(options, tmp_path):
    pretrained(options)
    each = [entry for entry in log_of(options) if "loss" in entry]
    options["out"] = str(tmp_path / "other")
    pretrained(options, log_every=4)
    for number, entry in enumerate(entry for entry in log_of(options) if "loss" in entry):
        for name in LOGGED:
            mean = np.mean([step[name] for step in each[4 * number : 4 * number + 4]])
            assert entry[name] == pytest.approx(mean, rel=1e-5)


def test_teacher_follows_the_student_in_a_run(options):
    pretrained(options, steps=4, save_every=1, save_total_limit=4)
    work = Path(f"{options['out']}.training")
    states = [load_file(work / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3, 4)]
    for step, (before, after) in enumerate(itertools.pairwise(states), start=1):
        decay = 0.9 + (0.99 - 0.9) * step / 8
        for name in (name for name in after if name.startswith("teacher.")):
            student = after[name.replace("teacher.", "student.encoder.")]
            torch.testing.assert_close(after[name], decay * before[name] + (1 - decay) * student)
    assert not torch.equal(states[0]["teacher.cls_token"], states[1]["teacher.cls_token"])


def test_checkpoints_are_read_by_convert_and_automodel(options, tmp_path):
    _, weights = pretrained(options)
    checkpoint = last_checkpoint(options)
    config = checkpoint / "encoder" / "config.json"
    for prefix, ema in (("student.encoder.", False), ("teacher.", True)):
        folder = convert(checkpoint / "model.safetensors", tmp_path / prefix, ema=ema, config=config)
        for name, tensor in BatModel.from_pretrained(folder).state_dict().items():
            assert torch.equal(tensor, weights[f"{prefix}{name}"])
    assert any(not torch.equal(weights[f"student.encoder.{n}"], weights[f"teacher.{n}"]) for n in ("cls_token",))
    for name, tensor in AutoModel.from_pretrained(checkpoint / "encoder").state_dict().items():
        assert torch.equal(tensor, weights[f"student.encoder.{name}"])
    with pytest.raises(
        FileExistsError, match="exists already, the result of a training that is finished; name another"
    ):
        pretrained(options)
    for named in (checkpoint, checkpoint / "model.safetensors"):
        with pytest.raises(ValueError, match=r"Name .*checkpoint-12/encoder, its encoder, or make one .*--ema"):
            load_pretrained_encoder(checkpoint=named)
    elsewhere = shutil.copy(checkpoint / "model.safetensors", tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"more than an encoder\. Make one with bat-audio convert"):
        load_pretrained_encoder(checkpoint=elsewhere)
    beside = shutil.copytree(options["out"], tmp_path / "beside")
    shutil.copytree(checkpoint / "encoder", beside / "encoder")
    load_pretrained_encoder(checkpoint=beside)
    shutil.rmtree(options["out"])
    Path(options["out"]).mkdir()
    with pytest.raises(FileExistsError, match="exists already; name another"):  # no result of that training
        pretrained(options)


def test_continued_pretraining_starts_from_the_checkpoint(options, tmp_path):
    start = tiny_model(input_shape=[64, 128])
    start.save_pretrained(tmp_path / "start")
    del options["config"]
    options["init"] = str(tmp_path / "start")
    encoder = build_encoder(PretrainSettings(**options))
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name])
    _, weights = pretrained(options, learning_rate=1e-9, weight_decay=0.0)
    for name, tensor in start.state_dict().items():
        for prefix in ("student.encoder.", "teacher."):
            torch.testing.assert_close(weights[f"{prefix}{name}"], tensor, rtol=0, atol=1e-6)
    assert "pre-trained from start on 13" in (Path(options["out"]) / "README.md").read_text()


def test_settings_reach_optimizer_and_schedule(options, tmp_path):
    options.update(steps=20, save_every=20, warmup=0.25, beta2=0.9, weight_decay=0.1)
    pretrained(options)
    log = [entry for entry in log_of(options) if "loss" in entry]
    ahead = int(log[0]["learning_rate"] > 0)  # Transformers 4 logs the rate of the next step
    for step, entry in enumerate(log, start=ahead):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 5) / 15))
        expected = 1e-3 * step / 5 if step < 5 else 1e-6 + (1e-3 - 1e-6) * cosine
        assert entry["learning_rate"] == pytest.approx(expected, rel=1e-6), step
    groups = torch.load(last_checkpoint(options) / "optimizer.pt")["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.9)}
    unclipped = max(entry["grad_norm"] for entry in log)
    options["out"] = str(tmp_path / "clipped")
    _, clipped = pretrained(options, max_grad_norm=unclipped / 100)
    _, plain = pretrained(options, out=str(tmp_path / "plain"))
    assert any(not torch.equal(clipped[name], plain[name]) for name in plain)


def test_settings_reach_model_and_clips(options, tmp_path, monkeypatch):
    """Those whose effect the equivalences do not show, with values of no other test."""
    seen = []

    class SeenModel(MaskedRegression):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append((self, self.student.encoder.patch_embed.proj.weight.clone()))

    class SeenClips(MaskedClips):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            seen.append(self[0])

    compiled = []
    monkeypatch.setattr("bat_audio_tools.pretrain.MaskedRegression", SeenModel)
    monkeypatch.setattr("bat_audio_tools.pretrain.MaskedClips", SeenClips)
    monkeypatch.setattr(BatBlock, "compile", lambda block: compiled.append(block))
    options.update(steps=1, views=2, keep=0.75, mask_block=1, decoder_blocks=3)
    for name, changes in {
        "one": {"seed": 7},
        "two": {"seed": 8, "compile": True, "gradient_checkpointing": True},
    }.items():
        pretrained(options, out=str(tmp_path / name), **changes)
    (model, weight), item, (other_model, other_weight), other_item = seen
    assert len(model.student.decoder.blocks) == 3
    assert item["ids_keep"].shape == (2, 24)
    assert not torch.equal(item["ids_keep"], other_item["ids_keep"])
    assert not torch.equal(item["input_features"], other_item["input_features"])
    assert not torch.equal(weight, other_weight)
    assert (model.gradient_checkpointing, other_model.gradient_checkpointing) == (False, True)
    blocks = [module for module in other_model.modules() if isinstance(module, BatBlock)]
    assert {id(block) for block in compiled} == {id(block) for block in blocks}


@pytest.mark.parametrize("change", [{"gradient_accumulation": 2}, {"gradient_checkpointing": True}, {"num_workers": 2}])
def test_other_ways_to_compute_the_same_run(options, tiny_json, tmp_path, change):
    config = tmp_path / "plain.json"  # without dropout, which every forward pass draws anew
    config.write_text(json.dumps({**json.loads(tiny_json.read_text()), "hidden_dropout_prob": 0.0}))
    options["config"] = str(config)
    _, expected = pretrained(options)
    others = {**options, "out": str(tmp_path / "other")}
    _, weights = pretrained(others, **change)
    assert_same_steps(options, others)
    assert_same_weights(weights, expected, rtol=0, atol=1e-4)


def test_begun_folder_refuses_other_settings_and_data(options, sounds, tmp_path):
    options["data"] = str(shutil.copytree(sounds, tmp_path / "sounds"))
    _, weights = pretrained(options)
    shutil.rmtree(options["out"])
    with pytest.raises(ValueError, match=r"other settings or data \(views=3, now 2\)"):
        pretrained(options, views=2)
    _, again = pretrained(options, num_workers=1)
    assert_same_weights(weights, again)
    shutil.rmtree(options["out"])
    (tmp_path / "sounds" / "00.flac").unlink()
    with pytest.raises(ValueError, match=r"other settings or data \(clips='13 of digest .*', now '12 of"):
        pretrained(options)


@pytest.mark.slow
def test_killed_and_resumed_run_equals_the_uninterrupted_one(options, tmp_path):
    options.update(steps=60, save_every=10, save_total_limit=6)
    expected, weights = pretrained(options, out=str(tmp_path / "whole"))
    options["num_workers"] = 1
    work = Path(f"{options['out']}.training")
    program = Program(*command_line(options))
    while not (work / "checkpoint-20" / "trainer_state.json").exists():
        assert program.is_running(), program.end()
        time.sleep(0.005)
    program.kill()
    assert not Path(options["out"]).exists()
    saved = (work / "checkpoint-20" / "trainer_state.json").stat().st_mtime_ns
    result = json.loads(run_program(*command_line(options)).splitlines()[-1])
    assert (work / "checkpoint-20" / "trainer_state.json").stat().st_mtime_ns == saved  # it did not begin anew
    assert {name: result[name] for name in expected} == expected
    assert_same_weights(load_file(last_checkpoint(options) / "model.safetensors"), weights)


@pytest.mark.slow
def test_two_processes_equal_one(options, tiny_json, tmp_path):
    config = tmp_path / "plain.json"
    config.write_text(json.dumps({**json.loads(tiny_json.read_text()), "hidden_dropout_prob": 0.0}))
    options["config"] = str(config)
    _, weights = pretrained(options)
    others = {**options, "out": str(tmp_path / "two")}
    printed = run_two_processes(*command_line(others))
    assert sum('{"model"' in line for line in printed.splitlines()) == 1
    assert_same_steps(options, others)
    assert_same_weights(load_file(last_checkpoint(others) / "model.safetensors"), weights, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_encoder_goes_on_to_the_other_tools(options, sounds):
    """As a user would: pre-train, go on from the result, embed with it."""
    run_program(*command_line(options))
    again = {name: value for name, value in options.items() if name != "config"}
    run_program(*command_line({**again, "init": options["out"], "out": f"{options['out']}-more"}))
    more = load_pretrained_encoder(checkpoint=f"{options['out']}-more")
    assert more.config.input_shape == [64, 128]


def test_run_shorter_than_a_line_of_the_log(options):
    metrics, _ = pretrained(options, steps=3, log_every=100)
    assert metrics["loss"] > 0
    assert (Path(options["out"]) / "plots" / "pretraining.png").exists()


def test_config_that_is_no_json_is_refused(options, tmp_path):
    (tmp_path / "config.json").write_text("{hidden_size: 3}")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        pretrained(options, config=str(tmp_path / "config.json"))


@pytest.mark.parametrize("written", [{"hiden_size": 64}, {**tiny_config().to_dict(), "hiden_size": 64}])
def test_unknown_fields_of_a_config_are_refused(options, tmp_path, written):
    (tmp_path / "typo.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"typo.json: unknown fields: hiden_size \(did you mean hidden_size\?\)\. "):
        pretrained(options, config=str(tmp_path / "typo.json"))
    for name in ("nope.json", ""):
        with pytest.raises(FileNotFoundError, match=r": no such file; config \(--config\)"):
            pretrained(options, config=str(tmp_path / name))


@pytest.mark.parametrize("written", [b"[1]", b"null"])
def test_config_that_is_no_object_is_refused(options, tmp_path, written):
    (tmp_path / "config.json").write_bytes(written)
    with pytest.raises(ValueError, match=r"config\.json holds .*; expected an object"):
        pretrained(options, config=str(tmp_path / "config.json"))


def test_fields_of_every_config_are_known(tmp_path):
    of_transformers_4 = {"architectures": ["BatModel"], "torch_dtype": "float32", "use_cache": True, "num_labels": 2}
    (tmp_path / "config.json").write_text(json.dumps(of_transformers_4))
    config_from_json(tmp_path / "config.json")
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}, "problem_type": "multi_label_classification"}
    BatForAudioClassification(tiny_config(**labels)).save_pretrained(tmp_path)
    for folder in (ROOT, tmp_path):
        config_from_json(folder / "config.json")
