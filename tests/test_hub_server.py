"""The stand-in Hub against the real client: what other tests may build on. Every client is a subprocess."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError

import pytest
from hub_server import SHORT_PAUSES, HubServer

CONFIG = b'{"model_type": "vit"}'
WEIGHTS = bytes(range(256)) * 1000
CHUNK = 10 * 1024 * 1024  # bytes the client writes at once; of a cut download it keeps whole chunks

CLIENT = """
import json, sys
import huggingface_hub
for function, arguments in json.loads(sys.argv[1]):
    try:
        answer = {"result": getattr(huggingface_hub, function)(**arguments)}
    except Exception as error:
        answer = {"errors": [base.__name__ for base in type(error).__mro__]}
    print(json.dumps(answer))
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({"config.json": CONFIG, "tools/a b.txt": b"", "model.safetensors": WEIGHTS}) as server:
        yield server


def call(hub: HubServer, home: Path, function: str = "hf_hub_download", **arguments: object) -> dict:
    """{"result": where the client put it, as a rule} or {"errors": names of the exception's class and its bases}."""
    return calls(hub, home, [(function, {"repo_id": hub.repo_id, **arguments})])[0]


def calls(hub: HubServer, home: Path, requests: list[tuple[str, dict]]) -> list[dict]:
    """The same for several functions of the client and their arguments, one after the other."""
    command = [sys.executable, "-c", SHORT_PAUSES + CLIENT, json.dumps(requests)]
    done = subprocess.run(command, env=hub.env(home), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def snapshot(hub: HubServer, home: Path, repo_id: str | None = None) -> Path:
    return home / "hub" / f"models--{(repo_id or hub.repo_id).replace('/', '--')}" / "snapshots" / hub.commit


def test_small_file_arrives_under_the_commit(hub: HubServer, tmp_path: Path) -> None:
    path = Path(call(hub, tmp_path, filename="config.json")["result"])
    assert path == snapshot(hub, tmp_path) / "config.json"
    assert path.read_bytes() == CONFIG
    assert Path(os.readlink(path)).name == hashlib.sha1(b"blob 21\0" + CONFIG).hexdigest()
    assert (path.parents[2] / "refs/main").read_text() == hub.commit
    assert hub.requests == [(method, f"/{hub.repo_id}/resolve/main/config.json") for method in ("HEAD", "GET")]
    assert hub.fetched == ["config.json"]


def test_large_file_comes_from_the_cdn(hub: HubServer, tmp_path: Path) -> None:
    path = Path(call(hub, tmp_path, filename="model.safetensors", revision=hub.commit)["result"])
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert path == snapshot(hub, tmp_path) / "model.safetensors"
    assert path.read_bytes() == WEIGHTS
    assert Path(os.readlink(path)).name == sha256
    assert hub.requests == [
        ("HEAD", f"/{hub.repo_id}/resolve/{hub.commit}/model.safetensors"),
        ("GET", f"/cdn/{sha256}/model.safetensors"),
    ]
    assert hub.fetched == ["model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"filename": "absent.json"}, "EntryNotFoundError"),
        ({"filename": "config.json", "revision": "absent"}, "RevisionNotFoundError"),
        ({"filename": "config.json", "repo_id": "lrauch/absent"}, "RepositoryNotFoundError"),
        ({"function": "snapshot_download", "revision": "absent"}, "RevisionNotFoundError"),
        ({"function": "snapshot_download", "repo_id": "lrauch/absent"}, "RepositoryNotFoundError"),
    ],
)
def test_what_does_not_exist(hub: HubServer, tmp_path: Path, arguments: dict[str, str], error: str) -> None:
    assert call(hub, tmp_path, **arguments)["errors"][0] in (error, f"Remote{error}")  # Remote: huggingface_hub 1 and 2
    assert not hub.fetched


def test_snapshot_holds_every_file_that_matches(hub: HubServer, tmp_path: Path) -> None:
    path = Path(call(hub, tmp_path, "snapshot_download")["result"])
    assert path == snapshot(hub, tmp_path)
    assert {name: (path / name).read_bytes() for name in hub.files} == hub.files
    hub.requests.clear()
    call(hub, tmp_path / "second", "snapshot_download", allow_patterns="*.json")
    assert hub.fetched == ["config.json"]


def test_tree_lists_a_folder_and_its_hashes(hub: HubServer, tmp_path: Path) -> None:
    def tree(folder: str) -> dict[str, dict]:
        with urllib.request.urlopen(f"{hub.endpoint}/api/models/{hub.repo_id}/tree/main{folder}") as answer:
            return {entry["path"]: entry for entry in json.load(answer)}

    assert tree("").keys() == hub.files.keys()
    assert tree("/tools").keys() == {"tools/a b.txt"}
    assert tree("/tools")["tools/a b.txt"]["oid"] == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's empty blob
    assert tree("")["model.safetensors"]["lfs"]["oid"] == hashlib.sha256(WEIGHTS).hexdigest()


def test_renamed_repository_is_followed(hub: HubServer, tmp_path: Path) -> None:
    hub.renamed_from = "lrauch/old"
    for name, content in (("config.json", CONFIG), ("model.safetensors", WEIGHTS)):
        path = Path(call(hub, tmp_path, repo_id="lrauch/old", filename=name)["result"])
        assert path == snapshot(hub, tmp_path, "lrauch/old") / name
        assert path.read_bytes() == content


def test_gated_repository(hub: HubServer, tmp_path: Path) -> None:
    hub.gated = True
    assert call(hub, tmp_path, filename="config.json")["errors"][0] == "GatedRepoError"


def test_hub_that_is_down(hub: HubServer, tmp_path: Path) -> None:
    """A file known by its commit needs no Hub; another one is not found, after some retries."""
    cached = call(hub, tmp_path, filename="config.json")
    hub.requests.clear()
    hub.status = 503
    assert call(hub, tmp_path, filename="config.json", revision=hub.commit) == cached
    assert not hub.requests
    assert call(hub, tmp_path, filename="model.safetensors")["errors"][0] == "LocalEntryNotFoundError"
    assert {method for method, _ in hub.requests} == {"HEAD"}
    assert len(hub.requests) > 5


def test_download_that_is_always_cut(hub: HubServer, tmp_path: Path) -> None:
    """It fails by an error of the HTTP library, an OSError in huggingface_hub 0 alone; the cache gets no such file."""
    hub.cut_after = 1000
    for _ in range(2):
        errors = call(hub, tmp_path, filename="model.safetensors")["errors"]
        assert errors[0] in ("ChunkedEncodingError", "RemoteProtocolError")
        assert ("OSError" in errors) == (errors[0] == "ChunkedEncodingError")
        assert not os.path.lexists(snapshot(hub, tmp_path) / "model.safetensors")
        assert all(blob.suffix == ".incomplete" for blob in tmp_path.rglob("blobs/*"))


def test_download_that_is_cut_once_resumes(tmp_path: Path) -> None:
    """By itself in huggingface_hub 1 and 2; huggingface_hub 0 gives up and resumes when it is asked again."""
    weights = os.urandom(CHUNK + 2000)
    with HubServer({"model.safetensors": weights}) as hub:
        hub.cut_after, hub.cuts = CHUNK + 1000, 1
        answer = call(hub, tmp_path, filename="model.safetensors")
        if answer.get("errors", [""])[0] == "ChunkedEncodingError":
            answer = call(hub, tmp_path, filename="model.safetensors")
        assert Path(answer["result"]).read_bytes() == weights
        assert hub.fetched == ["model.safetensors"] * 2
        assert hub.ranges == [f"bytes={CHUNK}-"]


def test_corrupt_download_is_accepted_by_the_client(hub: HubServer, tmp_path: Path) -> None:
    """The client compares the size alone, and later trusts its cache: the hash is the caller's to check."""
    hub.corrupt = True
    path = Path(call(hub, tmp_path, filename="model.safetensors")["result"])
    assert path.stat().st_size == len(WEIGHTS)
    assert path.read_bytes()[:-1] == WEIGHTS[:-1]
    assert path.read_bytes() != WEIGHTS
    assert Path(os.readlink(path)).name == hashlib.sha256(WEIGHTS).hexdigest()

    hub.corrupt = False
    call(hub, tmp_path, filename="model.safetensors")
    assert path.read_bytes() != WEIGHTS
    call(hub, tmp_path, filename="model.safetensors", force_download=True)
    assert path.read_bytes() == WEIGHTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the tests upload."""
    folder = tmp_path / "folder"
    (folder / "plots").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    (folder / "plots/a b.png").write_bytes(b"\x89PNG")
    return folder


def contents(folder: str | Path) -> dict[str, bytes]:
    """The files below a folder, but for the one that the Hub adds."""
    files = (file for file in Path(folder).rglob("*") if file.is_file() and file.name != ".gitattributes")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_uploaded_folder_comes_back(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    new = {"repo_id": "lrauch/new", "token": hub.token}
    created, uploaded, arrived, hidden = calls(
        hub,
        tmp_path,
        [
            ("create_repo", {**new, "private": True}),
            ("upload_folder", {**new, "folder_path": str(folder), "commit_message": "First"}),
            ("snapshot_download", new),
            ("snapshot_download", {"repo_id": "lrauch/new", "cache_dir": str(tmp_path / "second")}),
        ],
    )
    repository = hub.repositories["lrauch/new"]
    assert created["result"] == f"{hub.endpoint}/lrauch/new"
    assert "result" in uploaded
    assert repository.private
    assert repository.messages == {repository.branches["main"]: "First"}
    assert Path(arrived["result"]).name == repository.branches["main"]
    assert contents(arrived["result"]) == contents(folder)
    assert hidden["errors"][0] == "RepositoryNotFoundError"


def test_commits_and_branches_keep_their_own_files(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    new = {"repo_id": "lrauch/new", "token": hub.token}
    upload = {**new, "folder_path": str(folder)}
    branch = {**new, "branch": "next/a b"}
    calls(hub, tmp_path, [("create_repo", new), ("upload_folder", upload), ("create_branch", branch)])
    before, repository = contents(folder), hub.repositories["lrauch/new"]
    first = repository.branches["main"]
    assert not repository.private
    assert repository.branches == {"main": first, "next/a b": first}
    assert [method for method, _ in hub.requests].count("PUT") == 1

    (folder / "config.json").write_text("{}")
    (folder / "plots/a b.png").unlink()
    hub.requests.clear()
    revisions = {"next/a b": contents(folder), "main": before, first: before}
    _, outdated, *arrived = calls(
        hub,
        tmp_path,
        [
            ("upload_folder", {**upload, "revision": "next/a b", "delete_patterns": "*.png"}),
            ("upload_folder", {**upload, "parent_commit": "0" * 40}),
            *[("snapshot_download", {**new, "revision": revision}) for revision in revisions],
        ],
    )
    assert "PUT" not in [method for method, _ in hub.requests]  # the weights are there already
    assert [contents(answer["result"]) for answer in arrived] == list(revisions.values())
    assert outdated["errors"][0] == "HfHubHTTPError"
    assert repository.branches["main"] == first


def test_who_may_upload(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    new = {"repo_id": "lrauch/new", "token": hub.token}
    upload = {**new, "folder_path": str(folder)}
    stranger = {"token": "hf_stranger"}
    me, created, again, *refused = calls(
        hub,
        tmp_path,
        [
            ("whoami", {"token": hub.token}),
            ("create_repo", new),
            ("create_repo", {**new, "exist_ok": True}),
            ("whoami", stranger),
            ("create_repo", {"repo_id": "lrauch/other", **stranger}),
            ("create_repo", {**new, "repo_id": "somebody/new"}),
            ("create_repo", new),
            ("upload_folder", {**upload, **stranger}),
            ("upload_folder", {**upload, "repo_id": "lrauch/absent"}),
            ("upload_folder", {**upload, "revision": "absent"}),
        ],
    )
    assert me["result"]["name"] == "lrauch"
    assert created == again == {"result": f"{hub.endpoint}/lrauch/new"}
    assert all("HTTPError" in answer["errors"] for answer in refused)
    assert hub.repositories.keys() == {hub.repo_id, "lrauch/new"}
    assert len(hub.repositories["lrauch/new"].commits) == 1


@pytest.mark.parametrize("place", ["/lfs/", "/commit/"])
def test_upload_that_is_cut_changes_nothing(hub: HubServer, tmp_path: Path, folder: Path, place: str) -> None:
    repository = hub.repositories[hub.repo_id]
    upload = {"folder_path": str(folder), "token": hub.token}
    hub.hang_up = place
    assert "errors" in call(hub, tmp_path, "upload_folder", **upload)
    assert any(place in path for _, path in hub.requests)
    assert repository.commits == {hub.commit: hub.files}
    assert repository.branches == {"main": hub.commit}
    hub.hang_up = None
    assert "result" in call(hub, tmp_path, "upload_folder", **upload)
    assert repository.branches["main"] != hub.commit


def test_damaged_object_is_refused(hub: HubServer) -> None:
    address = f"{hub.endpoint}/lfs/{hashlib.sha256(WEIGHTS).hexdigest()}"
    with pytest.raises(HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, WEIGHTS[1:], method="PUT"))
    assert not hub.objects


def test_environment_is_free_of_settings(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE", "http_proxy"):
        monkeypatch.setenv(name, "1")
        assert name not in hub.env(tmp_path)


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_transformers_load_by_repository_id(hub: HubServer, tmp_path: Path) -> None:
    code = """
import sys
from transformers import AutoConfig
from transformers.utils import cached_file
assert AutoConfig.from_pretrained(sys.argv[1]).model_type == "vit"
cached_file(sys.argv[1], "model.safetensors")
try:
    cached_file(sys.argv[1], "absent.json")
except OSError as error:
    assert "does not appear to have a file named absent.json" in str(error)
"""
    command = [sys.executable, "-c", code, hub.repo_id]
    env = {**hub.env(tmp_path), "USE_TORCH": "0"}  # Transformers 4 starts faster
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (snapshot(hub, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.fetched == ["config.json", "model.safetensors"]
