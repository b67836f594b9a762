"""A stand-in for the Hugging Face Hub on 127.0.0.1: its download and upload protocols, with faults on request.

    with HubServer({"config.json": b"{}", "model.safetensors": weights}) as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.env(tmp_path), check=True)
    assert hub.fetched == ["config.json"]

It answers what `hf_hub_download`, `snapshot_download` and `from_pretrained(repo_id)` ask for. REV is the branch or the
commit; HEAD gets the headers of GET.

    /REPO/resolve/REV/FILE              a small file: 200, ETag = its git blob id
                                        a large file: 302 to the CDN, X-Linked-ETag = its sha256, X-Linked-Size
    /cdn/SHA256/FILE                    the large file; 206 for a Range request, by which a client resumes
    /api/models/REPO[/revision/REV]     the commit and the names of the files
    /api/models/REPO/tree/REV[/FOLDER]  the files with their sizes and hashes

Answers about an existing revision carry its commit in X-Repo-Commit. What does not exist is a 404 whose X-Error-Code
says RepoNotFound, RevisionNotFound or EntryNotFound; each becomes an exception of its own in the client.

The CDN is this same server under the name localhost: the client looks for the metadata behind a redirect that stays on
its host, but on the redirect itself when that leads to another host. The Xet protocol, by which the Hub also offers
large files, is not spoken here.

And it takes what `create_repo`, `create_branch`, `create_commit`, `upload_folder` and `push_to_hub` send, from the one
user `hub.user`, who is known by `hub.token` (HF_TOKEN={hub.token} in the client's environment):

    GET  /api/whoami-v2                         who the token belongs to
    POST /api/repos/create                      409 for an existing repository, 403 for somebody else's namespace
    POST /api/models/REPO/branch/NAME           a new branch; 409 for an existing one
    POST /api/validate-yaml                     content with the metadata of the model card; always accepted
    POST /api/models/REPO/preupload/REV         which files are large, and the hashes of those that exist
    POST /REPO.git/info/lfs/objects/batch       where to put the large files that are new (basic transfer)
    PUT  /lfs/SHA256                            a large file: 400 if that is not its hash
    POST /api/models/REPO/commit/BRANCH         the commit, as JSON lines: all of it becomes visible at once

A commit is what its branch shows from then on; the earlier ones stay where they are.
"""

import base64
import functools
import hashlib
import json
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

LARGE = ".safetensors"  # such files are stored by Git LFS and downloaded from the CDN
RESOLVE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<rev>[^/]+)/(?P<name>.+)")
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?(?P<name>)")
TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/(?P<name>.+))?")
CDN = re.compile(r"/cdn/(?P<sha256>[0-9a-f]{64})/(?P<name>.+)")
BRANCH = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)")
PREUPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)")
BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
OBJECT = re.compile(r"/lfs/(?P<sha256>[0-9a-f]{64})")
COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)")

# To put in front of a subprocess's code: shortens the client's pauses before a retry, which no setting of its own does.
SHORT_PAUSES = "import time; _sleep = time.sleep; time.sleep = lambda seconds: _sleep(min(seconds, 0.01))\n"


@dataclass
class Repository:
    repo_id: str
    commits: dict[str, dict[str, bytes]]  # the files of each
    branches: dict[str, str]  # the commit of each; the first branch is the default
    private: bool = False
    messages: dict[str, str] = field(default_factory=dict)  # of the commits that were uploaded


class HubServer(ThreadingHTTPServer):
    def __init__(
        self,
        files: dict[str, bytes],
        repo_id: str = "lrauch/BAT-vit-b16-pretrainedAS2M",
        commit: str = "175109327540c72f4b678b149e7cfaf0ee45d3e9",
        branch: str = "main",
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.repo_id, self.commit, self.branch = files, repo_id, commit, branch
        self.repositories = {repo_id: Repository(repo_id, {commit: files}, {branch: commit})}
        self.user, self.token = repo_id.split("/")[0], "hf_loopback"
        self.endpoint = f"http://127.0.0.1:{self.server_port}"  # the client's HF_ENDPOINT
        self.objects: dict[str, bytes] = {}  # large files by their sha256: what was uploaded or looked for so far
        self.entry = functools.cache(_tree_entry)  # hashes each file once
        self.requests: list[tuple[str, str]] = []  # (method, path without the query), in order
        self.ranges: list[str] = []  # the Range headers among them

        # Faults, to be set at any time.
        self.status: int | None = None  # the answer to every request
        self.gated = False  # files are refused: 401, GatedRepo
        self.renamed_from: str | None = None  # an old repository id, answered by a relative redirect
        self.corrupt = False  # the CDN flips a bit of the last byte; size and advertised hash stay right
        self.cut_after: int | None = None  # the CDN hangs up at this offset of the file, short of Content-Length ...
        self.cuts: int | None = None  # ... so many times; None: always, so that resuming gets no further
        self.hang_up: str | None = None  # uploads whose path holds this are cut off in the middle of their body

    @property
    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order."""
        matches = (CDN.fullmatch(path) or RESOLVE.fullmatch(path) for method, path in self.requests if method == "GET")
        return [unquote(match["name"]) for match in matches if match]

    def env(self, home: Path) -> dict[str, str]:
        """The environment of a subprocess that has this server as its Hub and its caches under `home`."""
        foreign = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS)_.*|.*_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        switches = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS")
        return {**kept, "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), **dict.fromkeys(switches, "1")}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


def _tree_entry(name: str, data: bytes) -> dict:
    """A file as the tree lists it. In place of a large one, git holds a pointer written by Git LFS."""
    lfs = {}
    if name.endswith(LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        stored = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        lfs = {"lfs": {"oid": sha256, "size": len(data), "pointerSize": len(stored)}}
    else:
        stored = data
    blob_id = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": blob_id, **lfs}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    # What the request is about, once `find` has found it.
    repository: Repository
    commit: str | None = None
    files: dict[str, bytes]

    def do_GET(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.requests.append((self.command, path))
        if hub.status is not None:
            return self.answer(hub.status)
        if match := CDN.fullmatch(path):
            return self.cdn(match["sha256"])
        if path == "/api/whoami-v2":
            return self.json({"type": "user", "name": hub.user}) if self.is_authorized() else self.no_access()
        for route, found in ((RESOLVE, self.resolve), (INFO, self.info), (TREE, self.tree)):
            if match := route.fullmatch(path):
                repo, rev, name = (unquote(match[part] or "") for part in ("repo", "rev", "name"))
                if repo == hub.renamed_from:
                    return self.answer(307, Location=self.path.replace(repo, hub.repo_id, 1))
                return found(name) if self.find(repo, rev) else None
        self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length", 0))
        if hub.hang_up is not None and hub.hang_up in path:
            self.rfile.read(length // 2)
            return None
        body = self.rfile.read(length)
        if hub.status is not None:
            return self.answer(hub.status)
        if match := OBJECT.fullmatch(path):  # whoever knows the address may write there
            return self.store(match["sha256"], body)
        if not self.is_authorized():
            return self.no_access()
        if path == "/api/repos/create":
            return self.create_repository(json.loads(body))
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if match := BRANCH.fullmatch(path):
            repo, branch = map(unquote, match.groups())
            return self.create_branch(json.loads(body), branch) if self.find(repo) else None
        if match := BATCH.fullmatch(path):
            return self.batch(json.loads(body)) if self.find(unquote(match["repo"])) else None
        for route, found in ((PREUPLOAD, self.preupload), (COMMIT, self.create_commit)):
            if match := route.fullmatch(path):
                repo, rev = map(unquote, match.groups())
                return found(body, rev) if self.find(repo, rev) else None
        self.answer(404)

    do_PUT = do_POST  # noqa: N815

    def is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def find(self, repo: str, rev: str = "") -> bool:
        """Look for the repository and the revision, by default its default branch; a 404 where there is none."""
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and not self.is_authorized()):
            self.answer(404, X_Error_Code="RepoNotFound")
            return False
        rev = rev or next(iter(repository.branches))
        commit = repository.branches.get(rev, rev)
        if commit not in repository.commits:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return False
        self.repository, self.commit, self.files = repository, commit, repository.commits[commit]
        return True

    # Downloads

    def resolve(self, name: str) -> None:
        hub = self.server
        if hub.gated:
            return self.answer(401, X_Error_Code="GatedRepo")
        if name not in self.files:
            return self.no_entry()
        data = self.files[name]
        entry = hub.entry(name, data)
        if "lfs" not in entry:
            return self.answer(200, data, ETag=f'"{entry["oid"]}"', X_Repo_Commit=self.commit)
        sha256 = entry["lfs"]["oid"]
        hub.objects[sha256] = data
        linked = {"X_Linked_ETag": f'"{sha256}"', "X_Linked_Size": str(len(data))}
        location = f"http://localhost:{hub.server_port}/cdn/{sha256}/{quote(name)}"
        self.answer(302, Location=location, X_Repo_Commit=self.commit, **linked)

    def cdn(self, sha256: str) -> None:
        hub = self.server
        data = hub.objects[sha256]
        if hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, start, end, headers = 200, 0, len(data), {}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            hub.ranges.append(asked[0])
            status, start = 206, int(asked[1])
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{end}"
        if self.command == "GET" and hub.cut_after is not None and hub.cuts != 0:
            end = max(hub.cut_after, start)
            hub.cuts = hub.cuts and hub.cuts - 1
        self.answer(status, data[start:], sent=end - start, **headers)

    def info(self, _: str) -> None:
        repository, siblings = self.repository, [{"rfilename": name} for name in self.files]
        answer = {"id": repository.repo_id, "private": repository.private, "sha": self.commit, "siblings": siblings}
        self.json(answer)

    def tree(self, folder: str) -> None:
        inside = [name for name in self.files if name.startswith(folder and folder + "/")]
        self.json([self.server.entry(name, self.files[name]) for name in inside]) if inside else self.no_entry()

    # Uploads

    def create_repository(self, asked: dict) -> None:
        hub = self.server
        namespace = asked.get("organization") or hub.user
        repo_id = f"{namespace}/{asked['name']}"
        answer = {"name": repo_id, "url": f"{hub.endpoint}/{repo_id}"}
        if namespace != hub.user:
            return self.json({"error": f"You don't have the rights to create a model under {namespace}"}, status=403)
        if repo_id in hub.repositories:
            return self.json({**answer, "error": "You already created this model repo"}, status=409)
        private = asked.get("private", asked.get("visibility") == "private")  # huggingface_hub 0 and 2
        commit = hashlib.sha1(repo_id.encode()).hexdigest()
        files = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        hub.repositories[repo_id] = Repository(repo_id, {commit: files}, {"main": commit}, private)
        self.json(answer)

    def create_branch(self, asked: dict, branch: str) -> None:
        if branch in self.repository.branches:
            return self.json({"error": f"Reference refs/heads/{branch} already exists"}, status=409)
        start = asked.get("startingPoint", self.commit)
        self.repository.branches[branch] = self.repository.branches.get(start, start)
        self.json({})

    def preupload(self, body: bytes, _: str) -> None:
        answers = []
        for name in (file["path"] for file in json.loads(body)["files"]):
            answer = {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
            if name in self.files:  # the client leaves out what has not changed
                entry = self.server.entry(name, self.files[name])
                answer["oid"] = entry.get("lfs", entry)["oid"]
            answers.append(answer)
        self.json({"files": answers})

    def batch(self, asked: dict) -> None:
        hub, objects = self.server, []
        for file in asked["objects"]:
            if file["oid"] not in hub.objects:
                href = f"http://localhost:{hub.server_port}/lfs/{file['oid']}"
                file = {**file, "actions": {"upload": {"href": href}}}
            objects.append(file)
        self.json({"transfer": "basic", "objects": objects})

    def store(self, sha256: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != sha256:
            return self.answer(400)
        self.server.objects[sha256] = body
        self.answer(200)

    def create_commit(self, body: bytes, branch: str) -> None:
        hub, repository, files = self.server, self.repository, dict(self.files)
        (_, header), *operations = ((line["key"], line["value"]) for line in map(json.loads, body.splitlines()))
        if branch not in repository.branches:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if header.get("parentCommit", self.commit) != self.commit:
            return self.json({"error": "A commit has happened since. Please refresh and try again."}, status=412)
        for kind, file in operations:
            name = file["path"]
            if kind == "file":
                files[name] = base64.b64decode(file["content"])
            elif kind == "lfsFile" and file["oid"] in hub.objects:
                files[name] = hub.objects[file["oid"]]
            elif kind == "deletedFile" and name in files:
                del files[name]
            else:
                return self.json({"error": f"Impossible operation {kind} on {name}"}, status=400)
        commit = hashlib.sha1(self.commit.encode() + body).hexdigest()
        repository.commits[commit], repository.messages[commit] = files, header["summary"]
        repository.branches[branch] = commit
        url = f"{hub.endpoint}/{repository.repo_id}/commit/{commit}"
        self.json({"success": True, "commitOid": commit, "commitUrl": url})

    # Answers

    def no_access(self) -> None:
        self.json({"error": "Invalid username or password."}, status=401)

    def no_entry(self) -> None:
        self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)

    def json(self, content: object, status: int = 200) -> None:
        known = {"X_Repo_Commit": self.commit} if self.commit else {}
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json", **known)

    def answer(self, status: int, body: bytes = b"", sent: int | None = None, **headers: str) -> None:
        """Status, headers (underscores for dashes), the first `sent` bytes of the body; then the connection closes."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # the client hung up first
                self.wfile.write(body[:sent])

    def log_message(self, *_: object) -> None:
        """Silence: `requests` is the log."""
