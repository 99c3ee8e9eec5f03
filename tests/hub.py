"""A stand-in for the Hugging Face hub: serves FOLDER/models/OWNER/NAME, FOLDER/datasets/OWNER/NAME.

    python tests/hub.py FOLDER 8000 &
    HF_ENDPOINT=http://127.0.0.1:8000 HF_HOME=/tmp/hf bash run_ldfs.sh pacs photo

It answers the requests by which huggingface_hub lists a repository or downloads a file, as the hub
does: lists come in pages, large files from another host, and an unknown repository is a 401.
"""

import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

COMMIT = "0" * 40
PAGE = 3  # entries of a page of a list
REPOSITORY = "/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self, body=True):
        if any(word in self.path for word in self.server.failing):
            return self.answer(b"", body, {}, 503)
        path, _, query = self.path.partition("?")
        path, query = unquote(path), parse_qs(query)
        if request := re.fullmatch(f"/other-host{REPOSITORY}/(?P<file>.+)", path):
            return self.answer(self.find(request).read_bytes(), body, {"ETag": '"of no use"'})
        if request := re.fullmatch(f"/api{REPOSITORY}(/revision/[^/]+)?", path):
            if folder := self.find(request):
                files = [f for f in folder.rglob("*") if f.is_file()]
                siblings = [{"rfilename": f.relative_to(folder).as_posix()} for f in sorted(files)]
                about = {"id": request["name"], "sha": COMMIT, "siblings": siblings, "private": False}
                return self.answer_json({**about, "tags": []}, body)
        elif request := re.fullmatch(f"/api{REPOSITORY}/tree/[^/]+(/(?P<file>.+))?", path):
            if folder := self.find(request):
                deep = query.get("recursive", [""])[0].lower() == "true"
                entries = sorted(folder.rglob("*") if deep else folder.glob("*"))
                start = int(query.get("cursor", ["0"])[0])
                url = f"http://{self.headers['Host']}{self.path.partition('?')[0]}"
                following = f'<{url}?recursive={deep}&cursor={start + PAGE}>; rel="next"'
                headers = {"Link": following} if len(entries) > start + PAGE else {}
                page = [self.entry(request, entry) for entry in entries[start:start + PAGE]]
                return self.answer_json(page, body, headers)
        else:
            path = path if path.startswith("/datasets/") else f"/models{path}"
            request = re.fullmatch(f"{REPOSITORY}/resolve/[^/]+/(?P<file>.+)", path)
            file = request and self.find(request)
            if file and file.is_file():
                self.server.served.append(f"{request['name']}/{request['file']}")
                headers = {"ETag": f'"{sha256(file)}"', "X-Repo-Commit": COMMIT}
                if is_small(file):
                    return self.answer(file.read_bytes(), body, headers)
                linked = {"X-Linked-Size": file.stat().st_size, "X-Linked-ETag": headers["ETag"]}
                place = f"http://localhost:{self.server.server_port}/other-host{path}"
                place = re.sub("/resolve/[^/]+/", "/", place)
                return self.answer(b"", body, {**headers, **linked, "Location": place}, 302)
        if request and self.find(request, within=False):  # the repository exists, the file does not
            return self.answer(b"{}", body, {"X-Error-Code": "EntryNotFound"}, 404)
        headers = {"X-Error-Code": "RepoNotFound"}
        self.answer(b'{"error": "Invalid username or password."}', body, headers, 401)

    def find(self, request, within=True):
        """Return the path of the repository, or of the file or folder within it; None if missing."""
        file = request.groupdict().get("file") if within else None
        path = self.server.folder / request["kind"] / request["name"] / (file or "")
        return path if path.exists() else None

    def entry(self, request, path):
        repository = self.server.folder / request["kind"] / request["name"]
        name = path.relative_to(repository).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "size": 0, "oid": name}
        size = path.stat().st_size
        lfs = {"lfs": {"oid": sha256(path), "size": size, "pointerSize": 130}}
        lfs = {} if is_small(path) else lfs
        return {"type": "file", "path": name, "size": size, "oid": sha256(path)[:40], **lfs}

    def do_HEAD(self):
        self.do_GET(body=False)

    def answer_json(self, content, body, headers=()):
        headers = {**dict(headers), "Content-Type": "application/json"}
        self.answer(json.dumps(content).encode(), body, headers)

    def answer(self, content, body, headers, status=200):
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and status == 200:  # of a part, or of a download that continues
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            status, size = 206, f"bytes {first}-{last}/{len(content)}"
            headers, content = {**headers, "Content-Range": size}, content[first:last + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_small(path):
    """Return whether the hub serves a file itself, from git, and not from another host."""
    return path.suffix in (".json", ".txt", ".md")


class Hub(ThreadingHTTPServer):
    """The server. `served` lists the files that were requested, as OWNER/NAME/file. Requests whose
    path contains one of the words in `failing` get a 503.
    """

    daemon_threads = True

    def __init__(self, folder, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.served, self.failing = Path(folder), [], []


if __name__ == "__main__":
    Hub(sys.argv[1], int(sys.argv[2])).serve_forever()
