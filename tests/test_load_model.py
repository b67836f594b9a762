"""load_pretrained_encoder, load_audio_processor and the command line: where weights come from, and clear errors."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run, tiny_model
from hub_server import SHORT_PAUSES, HubServer
from huggingface_hub import constants
from programs import run_code
from safetensors.torch import load_file, save_file

from bat_audio import BatAudioProcessor, BatModel, load_audio_processor, load_model, load_pretrained_encoder
from bat_tiny.demo import demo

POISON = b"raise SystemExit('code of the Hub repository was run')"
# Loads what each line of standard input asks for; one interpreter serves many tests.
CLIENT = """
import json, sys
from bat_audio import load_pretrained_encoder
from huggingface_hub import constants
for line in sys.stdin:
    cache, arguments = json.loads(line)
    constants.HF_HUB_CACHE = cache
    try:
        model = load_pretrained_encoder(**arguments)
        answer = {"sum": sum(t.double().sum().item() for t in model.state_dict().values())}
    except (OSError, ValueError) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print("ANSWER" + json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory) -> dict[str, bytes]:
    """A Hub repository of a tiny model, whose config.json points to code that must never run."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_bat.BatConfig", "AutoModel": "modeling_bat.BatModel"}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": (folder / "model.safetensors").read_bytes(),
        "configuration_bat.py": POISON,
        "modeling_bat.py": POISON,
    }


@pytest.fixture(scope="module")
def hub_and_client(tiny_files, tmp_path_factory):
    with HubServer(tiny_files) as hub:
        environment = {**hub.env(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SHORT_PAUSES + CLIENT]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        client = subprocess.Popen(command, env=environment, text=True, **pipes)
        yield hub, client
        client.stdin.close()
        client.wait()


@pytest.fixture
def hub(hub_and_client):
    hub, _ = hub_and_client
    hub.requests.clear()
    hub.corrupt, hub.gated, hub.status, hub.cut_after, hub.cuts = False, False, None, None, None
    return hub


@pytest.fixture
def load(hub_and_client, tmp_path):
    """Loads from the stand-in Hub into a cache of the test's own."""

    def load(**arguments) -> dict:
        _, client = hub_and_client
        client.stdin.write(json.dumps([str(tmp_path / "cache"), arguments]) + "\n")
        client.stdin.flush()
        for line in client.stdout:
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        raise AssertionError("the client ended")

    return load


def checksum(model: BatModel) -> float:
    return sum(tensor.double().sum().item() for tensor in model.state_dict().values())


# The Hub


def test_hub_gives_data_and_never_code(hub, load):
    assert load() == {"sum": checksum(tiny_model())}
    assert hub.fetched == ["config.json", "model.safetensors"]
    assert all(f"/resolve/{hub.commit}/" in path for _, path in hub.requests if "/resolve/" in path)
    hub.requests.clear()
    hub.status = 503
    assert load() == {"sum": checksum(tiny_model())}
    assert hub.requests == []  # the pinned commit comes from the cache without a question


def test_revision_and_other_repositories(hub, load):
    expected = {"sum": checksum(tiny_model())}
    assert load(revision="main") == expected
    assert load(checkpoint=hub.repo_id) == expected
    missing = load(revision="0" * 40)
    assert missing["error"] == "OSError"
    assert "0" * 40 in missing["message"]
    for name in ("nobody/nothing", "someone/bat-v1.5"):
        unknown = load(checkpoint=name)
        assert unknown["error"] == "OSError"
        assert f"{hub.endpoint}/{name} at revision main" in unknown["message"]


@pytest.mark.parametrize("fault", [{"gated": True}, {"status": 503}])
def test_refusal_says_where_it_looked_and_what_to_do(hub, load, tmp_path, fault):
    for name, value in fault.items():
        setattr(hub, name, value)
    answer = load()
    assert answer["error"] == "OSError"
    for hint in (str(ROOT / "model.safetensors"), str(tmp_path / "cache"), hub.endpoint, hub.repo_id, hub.commit):
        assert hint in answer["message"]
    for cure in ("Connect to the Hub", "checkpoint='examples/bat-tiny'", "--checkpoint examples/bat-tiny"):
        assert cure in answer["message"]
    assert "--untrained" not in answer["message"]  # Most commands have no such option.


def test_cut_download_leaves_nothing_that_loads(hub, load, tmp_path):
    hub.cut_after = 1000
    assert load()["error"] == "OSError"
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    hub.cut_after = None
    assert load() == {"sum": checksum(tiny_model())}


def test_damaged_download_is_deleted(hub, load, tmp_path):
    hub.corrupt = True
    answer = load()
    assert answer["error"] == "OSError"
    assert "damaged" in answer["message"]
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    hub.corrupt = False
    assert load() == {"sum": checksum(tiny_model())}


def test_missing_file_is_an_error(tiny_files, hub, load):
    weights = hub.files.pop("model.safetensors")
    try:
        answer = load()
    finally:
        hub.files["model.safetensors"] = weights
    assert answer["error"] == "OSError"
    assert "model.safetensors" in answer["message"]


def test_offline_without_cache_is_an_error_that_helps(tmp_path):
    code = "import bat_audio\ntry: bat_audio.load_pretrained_encoder()\nexcept OSError as error: print(error)"
    message = run_code(code, HF_HOME=tmp_path).stdout
    assert "offline" in message
    assert str(tmp_path) in message
    assert "examples/bat-tiny" in message


# Local checkpoints


@pytest.fixture
def folder(tmp_path, tiny_files):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(tiny_files[name])
    return tmp_path


def test_local_folder_and_file(folder):
    expected = checksum(tiny_model())
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for checkpoint in (folder, str(folder), folder / "model.safetensors", folder / "other.safetensors"):
        model = load_pretrained_encoder(checkpoint=checkpoint)
        assert checksum(model) == expected
        assert isinstance(model, BatModel)
        assert not model.training
        assert model.dtype == torch.float32


def test_weights_beside_the_loader_are_used_without_network(folder, monkeypatch):
    for name in ("config.json", "preprocessor_config.json", "configuration_bat.py", "modeling_bat.py"):
        if name != "config.json":
            shutil.copy(ROOT / name, folder)
    monkeypatch.setattr(load_model, "HERE", folder)
    monkeypatch.setattr(load_model, "hf_hub_download", None)
    assert checksum(load_pretrained_encoder()) == checksum(tiny_model())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype(folder, dtype):
    model = load_pretrained_encoder(checkpoint=folder, dtype=dtype)
    assert str(model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", ["float31", "float8_e4m3fn", torch.int8])
def test_unknown_dtype_is_refused(folder, dtype):
    with pytest.raises(ValueError, match="is not one in which encoders run; expected one of torch"):
        load_pretrained_encoder(checkpoint=folder, dtype=dtype)


def test_options_reach_from_pretrained(folder):
    model = load_pretrained_encoder(checkpoint=folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    weights = load_file(folder / "model.safetensors")
    del weights["cls_token"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, folder / "part.safetensors")
    for checkpoint in (folder, folder / "part.safetensors"):
        with pytest.raises(ValueError, match="1 missing: cls_token"):
            load_pretrained_encoder(checkpoint=checkpoint)
        assert load_pretrained_encoder(checkpoint=checkpoint, strict=False).cls_token.std() > 0


@pytest.mark.parametrize("checkpoint", ["nowhere.safetensors", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_checkpoint_is_an_error(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no such file"):
        load_pretrained_encoder(checkpoint=checkpoint)
    with pytest.raises(OSError, match="No weights at"):
        load_pretrained_encoder(checkpoint=tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", "cut"])
@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_damaged_checkpoint_is_an_error_that_names_the_file(folder, name, content):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / name).write_bytes(weights[: len(weights) // 2] if content == "cut" else content)
    with pytest.raises(OSError, match=f"{name} is not a whole safetensors file"):
        load_pretrained_encoder(checkpoint=folder / name)


def test_contradictory_options_are_refused(folder):
    for options in ({"checkpoint": folder}, {"revision": "main"}):
        with pytest.raises(ValueError, match="untrained=True takes no checkpoint"):
            load_pretrained_encoder(untrained=True, **options)
    with pytest.raises(ValueError, match="revision='main' belongs to a Hub repository"):
        load_pretrained_encoder(checkpoint=folder, revision="main")


def test_foreign_config_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="model_type is 'vit', not 'bat'"):
        load_pretrained_encoder(checkpoint=folder)


def test_untrained_only_by_name(folder, capfd):
    os.remove(folder / "model.safetensors")
    with pytest.raises(OSError, match="No weights at"):
        load_pretrained_encoder(checkpoint=folder)
    model = load_pretrained_encoder(untrained=True, dtype="bfloat16")
    assert model.config.num_hidden_layers == 12
    assert model.dtype == torch.bfloat16
    assert not model.training


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_device_is_refused(folder):
    for load in (lambda: load_pretrained_encoder("cuda", checkpoint=folder), lambda: load_audio_processor("cuda:1")):
        with pytest.raises(ValueError, match=r"device='cuda.*is not there"):
            load()


def test_audio_processor():
    waveform = torch.rand(2, 16000) - 0.5
    assert torch.equal(load_audio_processor()(waveform), BatAudioProcessor()(waveform))
    assert torch.equal(load_audio_processor(num_frames=None)(waveform), BatAudioProcessor(None)(waveform))
    with pytest.raises(ValueError, match="num_frames=100"):
        load_audio_processor(num_frames=100)


@pytest.mark.parametrize("error", ["OSError", "RuntimeError"])
def test_everything_but_gpu_resampling_works_beside_a_broken_torchaudio(tmp_path, folder, error):
    (tmp_path / "broken" / "torchaudio").mkdir(parents=True)
    (tmp_path / "broken" / "torchaudio" / "__init__.py").write_text(f"raise {error}('built for another torch')")
    code = """
import sys, torch, bat_audio
from transformers import AutoFeatureExtractor, AutoModel
model, extractor = AutoModel.from_pretrained(sys.argv[1]), AutoFeatureExtractor.from_pretrained(sys.argv[2])
features = extractor(torch.rand(16000) - 0.5, sampling_rate=16000, return_tensors="pt")
assert model(**features).pooler_output.isfinite().all()
assert bat_audio.load_pretrained_encoder(checkpoint=sys.argv[1])(**features).pooler_output.isfinite().all()
assert bat_audio.load_audio_processor()(torch.rand(2, 16000)).shape == (2, 1, 1024, 128)
"""
    run_code(code, folder, ROOT, PYTHONPATH=tmp_path / "broken")


# The command line


def test_command_line_prints_and_saves(folder, capsys):
    sounds = [str(ROOT / "examples" / name) for name in ("speech_fr_16k.flac", "cash_register_48k.flac")]
    saved = folder / "out.safetensors"
    assert load_model.main([*sounds, "--checkpoint", str(folder), "--device", "cpu", "--save", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    processor, model = load_audio_processor(num_frames=None), load_pretrained_encoder(checkpoint=folder)
    tensors = load_file(saved)
    assert len(tensors) == 4
    for line, sound in zip(lines[:2], sounds, strict=True):
        waveform = processor.load_audio(sound)
        features = processor(waveform)
        with torch.inference_mode():
            output = model(features)
        assert line.startswith(f"{sound}: {len(waveform) / 16000:.2f} s, features {tuple(features.shape)}")
        assert f"tokens {tuple(output.last_hidden_state.shape)}" in line
        assert f"{output.pooler_output[0, 0]:+.4f}" in line
        assert torch.equal(tensors[f"{sound}:last_hidden_state"], output.last_hidden_state[0])
        assert torch.equal(tensors[f"{sound}:pooler_output"], output.pooler_output[0])
    assert [file.name for file in folder.iterdir() if "partial" in file.name] == []


def test_command_line_reports_bad_files_and_goes_on(folder, capsys):
    bad, good = ROOT / "README.md", ROOT / "examples" / "speech_fr_16k.flac"
    assert load_model.main([str(bad), str(good), "--checkpoint", str(folder), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert str(good) in captured.out
    assert f"error: {bad}: cannot be read as audio" in captured.err


def test_command_line_without_weights_fails_with_one_line(tmp_path, capsys):
    assert load_model.main(["x.wav", "--checkpoint", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: No weights at")


def test_command_line_checks_the_place_to_save_first(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load_model.main(["x.wav", "--untrained", "--save", str(tmp_path / "nowhere" / "out.safetensors")])
    assert stop.value.code == 2
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load_model.main(["--untrained", "x.wav", "--checkpoint", "y", "z.wav"])
    assert "--untrained and --checkpoint exclude each other" in capsys.readouterr().err


def test_command_line_untrained_says_so_before_and_after(capsys):
    assert load_model.main([str(ROOT / "examples" / "speech_fr_16k.flac"), "--untrained", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in (lines[0], lines[-1]):
        assert "UNTRAINED" in line
        assert "mean nothing" in line


def test_demo_without_weights_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    demo()
    printed = capsys.readouterr().out
    assert "NO PRETRAINED WEIGHTS" in printed
    assert "small demonstration model" in printed
    sounds = [file.name for file in (ROOT / "examples").iterdir() if file.suffix in (".flac", ".mp3", ".ogg", ".wav")]
    rows = [line.split() for line in printed.splitlines()[-len(sounds) :]]
    assert [row[1] for row in rows] == sorted(sounds)
    assert all(row[-1] in sounds and row[-1] != row[1] for row in rows)


def test_demo_with_weights_takes_them(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "published"
    tiny_model().save_pretrained(folder)
    monkeypatch.setattr("bat_tiny.demo.find_weights", lambda: folder / "model.safetensors")
    demo()
    printed = capsys.readouterr().out
    assert "demonstration model" not in printed
    assert "1.00" in printed


@pytest.mark.slow
def test_the_program_prints_nothing_but_its_result(tmp_path):
    """No warnings of torch and torchao, and no bar of loading the weights."""
    command = [sys.executable, ROOT / "load_model.py", ROOT / "examples" / "speech_en_8k.wav"]
    printed = run([*map(str, command), "--checkpoint", str(ROOT / "examples" / "bat-tiny")], cwd=tmp_path)
    assert printed.stderr == ""
    assert len(printed.stdout.splitlines()) == 1
