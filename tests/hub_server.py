"""A stand-in for the Hugging Face Hub on 127.0.0.1: its download protocol, with faults on request.

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
"""

import hashlib
import json
import os
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

LARGE = ".safetensors"  # such files are stored by Git LFS and downloaded from the CDN
RESOLVE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<rev>[^/]+)/(?P<name>.+)")
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?(?P<name>)")
TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/(?P<name>.+))?")
CDN = re.compile(r"/cdn/[0-9a-f]{64}/(?P<name>.+)")

# To put in front of a subprocess's code: shortens the client's pauses before a retry, which no setting of its own does.
SHORT_PAUSES = "import time; _sleep = time.sleep; time.sleep = lambda seconds: _sleep(min(seconds, 0.01))\n"


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
        self.entries = {name: _tree_entry(name, data) for name, data in files.items()}
        self.endpoint = f"http://127.0.0.1:{self.server_port}"  # the client's HF_ENDPOINT
        self.requests: list[tuple[str, str]] = []  # (method, path without the query), in order
        self.ranges: list[str] = []  # the Range headers among them

        # Faults, to be set at any time.
        self.status: int | None = None  # the answer to every request
        self.gated = False  # files are refused: 401, GatedRepo
        self.renamed_from: str | None = None  # an old repository id, answered by a relative redirect
        self.corrupt = False  # the CDN flips a bit of the last byte; size and advertised hash stay right
        self.cut_after: int | None = None  # the CDN hangs up at this offset of the file, short of Content-Length ...
        self.cuts: int | None = None  # ... so many times; None: always, so that resuming gets no further

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

    def do_GET(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.requests.append((self.command, path))
        if hub.status is not None:
            return self.answer(hub.status)
        if match := CDN.fullmatch(path):
            return self.cdn(unquote(match["name"]))
        for route, found in ((RESOLVE, self.resolve), (INFO, self.info), (TREE, self.tree)):
            if match := route.fullmatch(path):
                repo, rev, name = (unquote(match[part] or "") for part in ("repo", "rev", "name"))
                if repo == hub.renamed_from:
                    return self.answer(307, Location=self.path.replace(repo, hub.repo_id, 1))
                if repo != hub.repo_id:
                    return self.answer(404, X_Error_Code="RepoNotFound")
                if rev not in ("", hub.branch, hub.commit):
                    return self.answer(404, X_Error_Code="RevisionNotFound")
                return found(name)
        self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def resolve(self, name: str) -> None:
        hub = self.server
        if hub.gated:
            return self.answer(401, X_Error_Code="GatedRepo")
        if name not in hub.files:
            return self.no_entry()
        data, entry = hub.files[name], hub.entries[name]
        if "lfs" not in entry:
            return self.answer(200, data, ETag=f'"{entry["oid"]}"', X_Repo_Commit=hub.commit)
        sha256 = entry["lfs"]["oid"]
        linked = {"X_Linked_ETag": f'"{sha256}"', "X_Linked_Size": str(len(data))}
        location = f"http://localhost:{hub.server_port}/cdn/{sha256}/{quote(name)}"
        self.answer(302, Location=location, X_Repo_Commit=hub.commit, **linked)

    def cdn(self, name: str) -> None:
        hub = self.server
        data = hub.files[name]
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
        siblings = [{"rfilename": name} for name in self.server.files]
        self.json({"id": self.server.repo_id, "sha": self.server.commit, "siblings": siblings})

    def tree(self, folder: str) -> None:
        entries = [entry for name, entry in self.server.entries.items() if name.startswith(folder and folder + "/")]
        self.json(entries) if entries else self.no_entry()

    def no_entry(self) -> None:
        self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.server.commit)

    def json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), X_Repo_Commit=self.server.commit)

    def answer(self, status: int, body: bytes = b"", sent: int | None = None, **headers: str) -> None:
        """Status, headers (underscores for dashes), the first `sent` bytes of the body; then the connection closes."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # the client hung up first
                self.wfile.write(body[:sent])

    def log_message(self, *_: object) -> None:
        """Silence: `requests` is the log."""
