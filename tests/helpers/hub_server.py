"""A Hugging Face Hub on loopback: as much of its API as publishing and loading repositories takes.

    python hub_server.py PORT_FILE LOG [--drop-uploads COUNT]

Repositories live in memory, for as long as the server. The token `hf_write` may write in any namespace, `hf_read` may
not, any other is refused; one that begins with `echo-` in a message that repeats it, as some proxies do. With
`--drop-uploads 2` the first two uploads of large files break in the middle.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".parquet", ".safetensors", ".png", ".onnx", ".wasm")
DATE = "2026-01-01T00:00:00.000Z"
TOKENS = {"hf_write": "write", "hf_read": "read"}


class File:
    """One version of one file."""

    def __init__(self, content, large):
        self.content, self.large = content, large
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path):
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.large else {}
        return {"type": "file", "oid": self.git, "size": len(self.content), "path": path} | lfs


class Repository:
    """All commits of a repository, the newest last."""

    def __init__(self, kind, name, private):
        self.kind, self.name, self.private = kind, name, private
        self.commits = []
        self.commit({}, "initial commit")

    def commit(self, files, title):
        sha = hashlib.sha1(f"{self.kind}{self.name}{len(self.commits)}".encode()).hexdigest()
        self.commits.append({"id": sha, "title": title, "files": files})
        return sha

    def at(self, revision):
        """The commit of a branch or hash, or None."""
        if revision in ("main", "refs/heads/main"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit["id"] == revision), None)

    def info(self, commit):
        card = commit["files"].get("README.md")
        head = card and re.match(r"---\n(.*?)\n---\n", card.content.decode(), re.DOTALL)
        data = yaml.safe_load(head[1]) if head else {}
        siblings = [{"rfilename": path} for path in sorted(commit["files"])]
        return {
            "_id": "0" * 24,
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": commit["id"],
            "lastModified": DATE,
            "createdAt": DATE,
            "private": self.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": data.get("tags") or [],
            "cardData": data,
            "siblings": siblings,
        }


class Hub:
    """The repositories, the blobs that are uploaded and not committed yet, and the log."""

    def __init__(self, log, drop_uploads):
        self.repositories, self.blobs = {}, {}
        self.log, self.drops = log, drop_uploads
        self.lock = threading.Lock()


class RefusedError(Exception):
    """An answer that is no success: status, error code, message."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *_):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        self.query, self.raw = parse_qs(url.query), self.body()
        path = unquote(url.path)
        matches = ((re.fullmatch(pattern, path), method) for pattern, method in self.routes)
        found = next(((match, method) for match, method in matches if match), None)
        try:
            with self.hub.lock:
                if found is None:
                    raise RefusedError(404, "", "no such endpoint in the test hub")
                found[1](self, *found[0].groups())
        except RefusedError as refusal:
            status, code, message = refusal.args
            self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status, body=None, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | dict(headers)
        self.hub.log.write(json.dumps({"method": self.command, "path": self.path, "status": status}) + "\n")
        self.hub.log.flush()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def base(self):
        return f"http://{self.headers['Host']}"

    def role(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token.startswith("echo-"):
            raise RefusedError(400, "", f"cannot forward Authorization: Bearer {token}")
        if token and token not in TOKENS:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def needs_write(self):
        role = self.role()
        if role is None:
            raise RefusedError(401, "", "Invalid username or password.")
        if role != "write":
            raise RefusedError(403, "", "You don't have the rights to do that")

    def repository(self, kind, name):
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and self.role() is None):
            raise RefusedError(404, "RepoNotFound", "Repository not found")
        return found

    def commit_of(self, repository, revision):
        commit = repository.at(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def whoami(self):
        if self.role() is None:
            raise RefusedError(401, "", "Invalid username or password.")
        token = {"accessToken": {"role": self.role(), "displayName": "test"}}
        self.send(
            200, {"type": "user", "name": "tester", "fullname": "tester", "orgs": [{"name": "org"}], "auth": token}
        )

    def create(self):
        self.needs_write()
        request = json.loads(self.raw)
        kind = (request.get("type") or "model") + "s"
        name = f"{request.get('organization') or 'tester'}/{request['name']}"
        url = f"{self.base}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repositories:
            return self.send(409, {"error": "You already created this repo", "url": url})
        self.hub.repositories[kind, name] = Repository(kind, name, bool(request.get("private")))
        return self.send(200, {"url": url, "name": name, "id": name})

    def validate(self):
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, kind, name, _revision):
        self.needs_write()
        self.repository(kind, name)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.raw)["files"]
        ]
        self.send(200, {"files": [file | {"oid": None} for file in files]})

    def lfs_batch(self, _kind, _name):
        self.needs_write()
        objects = []
        for wanted in json.loads(self.raw)["objects"]:
            there = wanted["oid"] in self.hub.blobs
            upload = {} if there else {"actions": {"upload": {"href": f"{self.base}/blob/{wanted['oid']}"}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | upload)
        self.send(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, oid):
        if self.hub.drops > 0:
            self.hub.drops -= 1
            self.close_connection = True
            self.connection.close()
            return
        assert hashlib.sha256(self.raw).hexdigest() == oid
        self.hub.blobs[oid] = self.raw
        self.send(200, {})

    def commit(self, kind, name, revision):
        self.needs_write()
        repository = self.repository(kind, name)
        files, title = dict(self.commit_of(repository, revision)["files"]), ""
        for line in self.raw.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value.get("summary", "")
            elif entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif entry["key"] == "lfsFile":
                files[value["path"]] = File(self.hub.blobs[value["oid"]], large=True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repository.commit(files, title)
        self.send(
            200, {"success": True, "commitOid": sha, "commitUrl": f"{self.base}/{name}/commit/{sha}", "hookOutput": ""}
        )

    def info(self, kind, name, revision=None):
        repository = self.repository(kind, name)
        self.send(200, repository.info(self.commit_of(repository, revision or "main")))

    def refs(self, kind, name):
        repository = self.repository(kind, name)
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commits[-1]["id"]}
        self.send(200, {"branches": [branch], "tags": [], "converts": [], "pullRequests": []})

    def tree(self, kind, name, revision, folder):
        files = self.commit_of(self.repository(kind, name), revision)["files"]
        prefix = folder.strip("/") + "/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path in sorted(files):
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                depth = len(parts) if recursive else min(2, len(parts))
                folders.update(prefix + "/".join(parts[:size]) for size in range(1, depth))
                if recursive or len(parts) == 1:
                    entries.append(files[path].entry(path))
        if folder and not entries and not folders:
            raise RefusedError(404, "EntryNotFound", f"{folder} does not exist")
        self.send(
            200, [{"type": "directory", "oid": "0" * 40, "size": 0, "path": one} for one in sorted(folders)] + entries
        )

    def paths_info(self, kind, name, revision):
        files = self.commit_of(self.repository(kind, name), revision)["files"]
        request = json.loads(self.raw) if self.raw[:1] == b"{" else parse_qs(self.raw.decode())
        paths = request.get("paths", [])
        entries = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in files:
                entries.append(files[path].entry(path))
            elif any(one.startswith(path.strip("/") + "/") for one in files):
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        self.send(200, entries)

    def resolve(self, kind, name, revision, path):
        commit = self.commit_of(self.repository((kind or "models/").rstrip("/"), name), revision)
        file = commit["files"].get(path)
        if file is None:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        headers = {
            "X-Repo-Commit": commit["id"],
            "ETag": f'"{file.sha256 if file.large else file.git}"',
            "X-Linked-Size": str(len(file.content)),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if file.large:
            headers["X-Linked-Etag"] = f'"{file.sha256}"'
        content, size = file.content, len(file.content)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or self.command == "HEAD":
            return self.send(200, content, headers)
        first = int(wanted[1]) if wanted[1] else size - int(wanted[2])
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        return self.send(206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"})

    repo = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
    routes = (
        (r"/api/whoami-v2", whoami),
        (r"/api/repos/create", create),
        (r"/api/validate-yaml", validate),
        (repo, info),
        (repo + r"/revision/([^/]+)", info),
        (repo + r"/refs", refs),
        (repo + r"/preupload/([^/]+)", preupload),
        (repo + r"/commit/([^/]+)", commit),
        (repo + r"/tree/([^/]+)(?:/(.*))?", tree),
        (repo + r"/paths-info/([^/]+)", paths_info),
        (r"/(datasets/|spaces/)?([^/]+/[^/]+?)\.git/info/lfs/objects/batch", lfs_batch),
        (r"/blob/([0-9a-f]{64})", put_blob),
        (r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port_file", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--drop-uploads", type=int, default=0)
    arguments = parser.parse_args()
    Handler.hub = Hub(arguments.log.open("a"), arguments.drop_uploads)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    aside = arguments.port_file.with_suffix(".partial")
    aside.write_text(str(server.server_address[1]))
    aside.rename(arguments.port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
