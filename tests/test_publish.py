"""Publishing: complete repositories that give the same outputs, nothing else in them, and no half uploads."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from programs import run_code
from safetensors.torch import load_file, save_file

from bat_audio import BatFeatureExtractor, BatForAudioClassification, BatForAudioFrameClassification, BatModel
from bat_audio_tools import publish as publish_module
from bat_audio_tools.publish import assemble, publish

CODE = {
    "audio_bat.py",
    "configuration_bat.py",
    "modeling_bat.py",
    "processing_bat.py",
    "pipeline_bat.py",
    "load_model.py",
}
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json"}
REPOSITORY = CODE | MODEL | {"README.md", "LICENSE"}


def head_model(model_class=BatForAudioClassification, **changes):
    labels = {0: "frog", 1: "rain"}
    torch.manual_seed(0)
    model = model_class(tiny_config(**{"id2label": labels, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def use_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch, home: Path):
    """Make the stand-in this process's Hub, with its user logged in."""
    environment = {**hub.env(home), "HF_TOKEN": hub.token}
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = {"ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    for name, value in {**settings, "HF_TOKEN_PATH": str(home / "token")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses before a retry


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer({}, repo_id="lrauch/old") as hub:
        use_hub(hub, monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def unchecked(monkeypatch):
    """Leaves out the fresh process, where a test is about something else."""
    monkeypatch.setattr(publish_module, "check", lambda *_: None)


@pytest.fixture
def folder(tmp_path):
    """A saved encoder."""
    tiny_model().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def changes(hub: HubServer) -> list[tuple[str, str]]:
    return [request for request in hub.requests if request[0] not in ("GET", "HEAD")]


def download(hub: HubServer, home: Path) -> str:
    """The folder with the files of lrauch/new, as a client of its own gets them."""
    code = "import huggingface_hub; print(huggingface_hub.snapshot_download('lrauch/new'))"
    return run_code(code, **{**hub.env(home), "HF_HUB_OFFLINE": None}).stdout.strip()


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# From folder to Hub and back

MODELS = {
    "lrauch/encoder": ("AutoModel", lambda: tiny_model(init_scale_values=0.5)),
    "lrauch/clips": ("AutoModelForAudioClassification", lambda: head_model(head_type="cgp", num_prototypes=5)),
}
# Prints the outputs of models by their Hub repositories and Auto classes, then pushes each to PUSHED and loads that.
LOAD_AND_PUSH = """
import copy, json, sys, torch, transformers
from transformers import AutoFeatureExtractor
result, *repositories = sys.argv[1:]
waveform = torch.rand(20000, generator=torch.Generator().manual_seed(3)) - 0.5

def outputs(model, extractor):
    features = extractor(waveform, sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():  # copied into memory of its own, on whose alignment the last bits depend
        return [features, copy.deepcopy(model)(features, return_dict=False)[0]]

answers = {}
for repo_id, name in zip(repositories[::2], repositories[1::2]):
    options = {"trust_remote_code": True, "revision": "trial" if repo_id == "lrauch/clips" else None}
    auto_class = getattr(transformers, name)
    model = auto_class.from_pretrained(repo_id, **options)
    extractor = AutoFeatureExtractor.from_pretrained(repo_id, **options)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    answers[repo_id] = outputs(model, extractor)
    model.push_to_hub(repo_id + "-pushed", private=True)
    pushed = auto_class.from_pretrained(repo_id + "-pushed", trust_remote_code=True)
    pushed_extractor = AutoFeatureExtractor.from_pretrained(repo_id + "-pushed", trust_remote_code=True)
    answers[repo_id + "-pushed"] = outputs(pushed, pushed_extractor)
assert "bat_audio" not in sys.modules
torch.save(answers, result)
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub with an encoder in a private repository and a classifier on a branch, and what `publish` returned."""
    folder = tmp_path_factory.mktemp("published")
    with HubServer({}, repo_id="lrauch/old") as hub, pytest.MonkeyPatch.context() as monkeypatch:
        use_hub(hub, monkeypatch, folder / "home")
        urls = {}
        for repo_id, (_, make) in MODELS.items():
            make().save_pretrained(folder / repo_id)
        urls["lrauch/encoder"] = publish(folder / "lrauch/encoder", "lrauch/encoder", private=True)
        urls["lrauch/clips"] = publish(folder / "lrauch/clips", "lrauch/clips", revision="trial", message="Frogs")
        yield hub, urls


def test_published_and_pushed_models_give_the_same_outputs_in_a_fresh_process(published, tmp_path):
    hub, _ = published
    environment = {**hub.env(tmp_path / "home"), "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": None}
    repositories = [part for repo_id, (auto_class, _) in MODELS.items() for part in (repo_id, auto_class)]
    run_code(LOAD_AND_PUSH, tmp_path / "answers.pt", *repositories, cwd=tmp_path, **environment)
    answers = torch.load(tmp_path / "answers.pt", weights_only=True)
    waveform = torch.rand(20000, generator=torch.Generator().manual_seed(3)) - 0.5
    features = BatFeatureExtractor()(waveform, sampling_rate=16000, return_tensors="pt")["input_features"]
    for repo_id, (_, make) in MODELS.items():
        with torch.no_grad():
            expected = make()(features, return_dict=False)[0]
        for name in (repo_id, f"{repo_id}-pushed"):
            assert torch.equal(answers[name][0], features), name
            assert torch.equal(answers[name][1], expected), name
        pushed = hub.repositories[f"{repo_id}-pushed"]
        assert pushed.private
        assert pushed.commits[pushed.branches["main"]].keys() >= CODE - {"load_model.py"} | MODEL


def test_repositories_are_complete_and_made_in_one_commit(published):
    hub, urls = published
    for repo_id, branch, more in (
        ("lrauch/encoder", "main", set()),
        ("lrauch/clips", "trial", {"plots/block_weights.png"}),
    ):
        repository = hub.repositories[repo_id]
        commit = repository.branches[branch]
        files = repository.commits[commit]
        assert files.keys() == REPOSITORY | more | {".gitattributes"}
        assert len(repository.commits) == 2  # with the empty one that the Hub makes
        assert urls[repo_id] == f"{hub.endpoint}/{repo_id}/commit/{commit}"
        for name in (*CODE, "LICENSE"):
            assert files[name] == (ROOT / name).read_bytes(), name
        config = json.loads(files["config.json"])
        modules = [*config["auto_map"].values(), *(task["impl"] for task in config["custom_pipelines"].values())]
        assert {f"{module.partition('.')[0]}.py" for module in modules} <= files.keys()
        assert not any(b"/tmp" in data or b"bat-publish" in data for data in files.values())
    encoder, clips = hub.repositories["lrauch/encoder"], hub.repositories["lrauch/clips"]
    assert encoder.private
    assert not clips.private
    assert clips.commits[clips.branches["main"]].keys() == {".gitattributes"}
    assert list(encoder.messages.values()) == ["Upload BatModel"]
    assert list(clips.messages.values()) == ["Frogs"]


# What goes into the repository


@pytest.mark.parametrize("model_class", [BatForAudioClassification, BatForAudioFrameClassification])
def test_checkpoint_folder_of_trainer_is_cleaned(tmp_path, model_class):
    """Sharded bfloat16 weights come out in one file, in bfloat16; what belongs to training stays out."""
    folder, model = tmp_path / "run/checkpoint-20", head_model(model_class).bfloat16()
    model.save_pretrained(folder, max_shard_size="50KB")
    for name in CODE | {"preprocessor_config.json"}:
        (folder / name).unlink(missing_ok=True)
    BatFeatureExtractor(num_frames=512).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    wanted = {"README.md", "plots/loss.png", "confusion.png"}
    unwanted = """optimizer.pt rng_state.pth scheduler.pt trainer_state.json training_args.bin events.out plots/loss.csv
        checkpoint-10/model.safetensors runs/now/events.out .git/config .gitignore __pycache__/x.pyc notes/secret.png
        plots/old.png private.png"""
    for name in {*wanted, *unwanted.split()}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "README.md").write_text('# Frogs\n![Loss](plots/loss.png)\n<img src="confusion.png">\n')
    assemble(folder, tmp_path / "out", "frogs")
    assert names(tmp_path / "out") == REPOSITORY | wanted
    weights = load_file(tmp_path / "out/model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/preprocessor_config.json").read_text())["num_frames"] == 512
    assert model_class.from_pretrained(tmp_path / "out").config.id2label == {0: "frog", 1: "rain"}


FULL = {"library_name": "transformers", "license": "mit", "pipeline_tag": "feature-extraction"}


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("", {**FULL, "tags": ["custom_code"]}),
        ("---\nlicense: cc0-1.0\nmodel_stage: draft\n---\n", {**FULL, "license": "cc0-1.0", "model_stage": "draft"}),
        ("---\npipeline_tag: other\ntags: [birds]\n---\n", {"pipeline_tag": "other", "tags": ["birds", "custom_code"]}),
        ("---\nlicense: mit\ntags: [custom_code, x]\n---\n", {**FULL, "tags": ["custom_code", "x"]}),
    ],
)
def test_metadata_of_the_folders_card_is_completed(tmp_path, folder, front, expected):
    (folder / "README.md").write_text(f"{front}\n# Mine\n\nText — unchanged.\n", encoding="utf-8")
    assemble(folder, tmp_path / "out", "mine")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.to_dict().items() >= expected.items()
    assert "custom_code" in card.data.tags
    assert card.text.strip() == "# Mine\n\nText — unchanged."


def test_metadata_that_cannot_be_read_is_an_error(tmp_path, folder):
    for front in ("---\nlicense: [mit\n---\n", "---\n- mit\n---\n"):
        (folder / "README.md").write_text(f"{front}# Mine\n")
        with pytest.raises(ValueError, match=r"metadata at the top of .*README.md is not valid"):
            assemble(folder, tmp_path / "out", "mine")


def test_folder_without_a_card_gets_one(tmp_path, folder):
    assemble(folder, tmp_path / "encoder-out", "mine")
    card = ModelCard.load(tmp_path / "encoder-out/README.md")
    assert "# mine" in card.text
    assert "2 blocks and width 32" in card.text
    assert 'pipeline("feature-extraction"' in card.text
    assert card.data.to_dict().items() >= FULL.items()
    frames = BatForAudioFrameClassification(tiny_config())
    frames.save_pretrained(tmp_path / "frames")
    assemble(tmp_path / "frames", tmp_path / "frames-out", "mine")
    assert ModelCard.load(tmp_path / "frames-out/README.md").data.pipeline_tag is None
    head_model().save_pretrained(tmp_path / "head")
    assemble(tmp_path / "head", tmp_path / "head-out", "mine")
    card = ModelCard.load(tmp_path / "head-out/README.md")
    assert "# mine" in card.text
    assert card.data.to_dict().items() >= {**FULL, "pipeline_tag": "audio-classification"}.items()
    assert "custom_code" in card.data.tags


def test_folder_without_a_whole_model_is_refused(tmp_path, folder):
    def attempt(error, match, spoil):
        shutil.rmtree(tmp_path / "spoilt", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "spoilt")
        spoil(tmp_path / "spoilt")
        with pytest.raises(error, match=match):
            assemble(tmp_path / "spoilt", tmp_path / "out", "mine")

    def change_config(**values):
        def change(folder):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **values}))

        return change

    def drop_weight(folder):
        weights = load_file(folder / "model.safetensors")
        del weights["cls_token"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    attempt(OSError, "holds no model: no config.json", lambda folder: (folder / "config.json").unlink())
    attempt(OSError, "damaged weights", lambda folder: (folder / "model.safetensors").write_bytes(b"cut"))
    attempt(OSError, "spoilt", lambda folder: (folder / "model.safetensors").unlink())
    attempt(ValueError, "missing: cls_token", drop_weight)
    attempt(ValueError, "'vit' with architectures 'BatModel'", change_config(model_type="vit"))
    attempt(ValueError, "architectures 'MyBat'", change_config(architectures=["MyBat"]))
    # from_pretrained makes a new head where there is none.
    head = change_config(architectures=["BatForAudioClassification"])
    attempt(ValueError, "missing: head.fc.bias, head.fc.weight", head)
    attempt(ValueError, "PEFT adapter", lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"))


# What is refused, and what is left behind


def spoil_gate(repository: Path):
    path = repository / "modeling_bat.py"
    path.write_text(path.read_text().replace("self.gate(hidden_states).sigmoid()", "self.gate(hidden_states).tanh()"))


def drop_front_end(repository: Path):
    (repository / "processing_bat.py").unlink()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (spoil_gate, r"computes something else .*not the same: last_hidden_state, pooler_output"),
        (drop_front_end, r"does not load and run in a fresh process: .*processing_bat.py"),
    ],
)
def test_repository_that_differs_is_not_uploaded(hub, folder, monkeypatch, spoil, match):
    def spoilt(source, repository, name):
        answer = assemble(source, repository, name)
        spoil(repository)
        return answer

    monkeypatch.setattr(publish_module, "assemble", spoilt)
    with pytest.raises(ValueError, match=match):
        publish(folder, "lrauch/new")
    assert not changes(hub)


def test_outputs_do_not_depend_on_where_the_weights_lie_in_memory(tmp_path):
    """Loaded weights are mapped from their file, behind a header whose length differs from file to file."""
    model = head_model(id2label={i: str(i) for i in range(7)})
    model.save_pretrained(tmp_path)
    extractor, weights = BatFeatureExtractor(), load_file(tmp_path / "model.safetensors")
    expected = publish_module.outputs(model, extractor)
    assert {"input_features", "logits", "hidden_states[2]"} <= expected.keys()
    for length in range(0, 64, 8):
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt", "more": "x" * length})
        found = publish_module.outputs(BatForAudioClassification.from_pretrained(tmp_path), extractor)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), length


def test_dry_run_needs_no_hub_and_lists_the_files(hub, folder, unchecked, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert publish(folder, "lrauch/new", dry_run=True) is None
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = {name: int(size.replace(",", "")) for size, name in lines}
    assert sizes.keys() == REPOSITORY
    assert sizes["LICENSE"] == (ROOT / "LICENSE").stat().st_size
    assert not hub.requests


@pytest.mark.parametrize("place", ["/lfs/", "/commit/"])
def test_upload_that_is_cut_leaves_the_previous_commit(hub, folder, unchecked, tmp_path, place):
    publish(folder, "lrauch/new")
    repository = hub.repositories["lrauch/new"]
    commits, branches = dict(repository.commits), dict(repository.branches)
    tiny_model(use_gate=False).save_pretrained(folder)
    hub.hang_up = place
    with pytest.raises(OSError, match="lrauch/new was not published to"):
        publish(folder, "lrauch/new")
    assert any(place in path for _, path in hub.requests)
    assert repository.commits == commits
    assert repository.branches == branches
    loaded = BatModel.from_pretrained(download(hub, tmp_path))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tiny_model().state_dict().items())
    hub.hang_up = None
    publish(folder, "lrauch/new")
    assert not BatModel.from_pretrained(download(hub, tmp_path)).config.use_gate


def test_other_files_stay_but_for_weights_that_would_be_loaded(hub, folder, unchecked):
    kept = {"notes.txt": b"x", "BAT_base.pt": b"x", "old/model-00001-of-00002.safetensors": b"x"}
    stale = "model-00001-of-00002.safetensors model.safetensors.index.json pytorch_model.bin adapter_config.json"
    stale += " adapter_model.safetensors processor_config.json pytorch_model-00001-of-00002.bin"
    hub.files.update({**kept, **dict.fromkeys(stale.split(), b"x"), "config.json": b"{}"})
    publish(folder, "lrauch/old")
    repository = hub.repositories["lrauch/old"]
    assert repository.commits[repository.branches["main"]].keys() == REPOSITORY | kept.keys()
    assert len(repository.commits) == 2
    assert repository.commits[hub.commit] is hub.files


def test_public_repository_is_not_taken_for_a_private_one(hub, folder, unchecked):
    with pytest.raises(ValueError, match="lrauch/old exists and is public"):
        publish(folder, "lrauch/old", private=True, revision="trial")
    assert hub.repositories["lrauch/old"].branches == {"main": hub.commit}


@pytest.mark.parametrize("repo_id", ["new", "a/b/c", "lrauch/", "lrauch/--", "lrauch/a b"])
def test_malformed_repository_is_refused_at_once(hub, folder, repo_id):
    with pytest.raises(OSError, match='not of the form "namespace/name"'):
        publish(folder, repo_id)
    assert not hub.requests


def test_hub_that_refuses_or_is_away_is_one_clear_error(hub, folder, unchecked, monkeypatch):
    def attempt(match, repo_id="lrauch/new"):
        with pytest.raises(OSError, match=match) as error:
            publish(folder, repo_id)
        assert str(error.value).startswith(f"{repo_id} was not published to {constants.ENDPOINT}: ")
        assert "hf auth login" in str(error.value)
        assert "\n" not in str(error.value)

    attempt("403", repo_id="somebody/new")
    monkeypatch.setattr(publish_module, "assemble", None)  # the rest is known before anything is done
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    attempt("Invalid user token")
    monkeypatch.delenv("HF_TOKEN")
    attempt("no token")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.status = 503
    attempt("503")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    attempt("refused")
    assert not [path for _, path in changes(hub) if "commit" in path]
    assert hub.repositories.keys() == {"lrauch/old"}
