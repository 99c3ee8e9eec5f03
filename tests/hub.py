"""A stand-in for the Hugging Face hub: serves the folders FOLDER/models/OWNER/NAME and FOLDER/datasets/OWNER/NAME.

    python tests/hub.py FOLDER 8000 &
    HF_ENDPOINT=http://127.0.0.1:8000 HF_HOME=/tmp/hf bash run_ldfs.sh pacs photo

It answers what huggingface_hub asks when it lists a repository or downloads a file, and no more.
"""

import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self, body=True):
        path = unquote(self.path.partition("?")[0])
        asked = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path)
        if asked and (repository := self.server.folder / asked[1] / asked[2]).is_dir():
            files = [(f.relative_to(repository).as_posix(), f) for f in sorted(repository.rglob("*")) if f.is_file()]
            if "/tree/" in path:
                answer = [{"type": "file", "path": name, "size": f.stat().st_size, "oid": name} for name, f in files]
            else:
                siblings = [{"rfilename": name, "size": f.stat().st_size} for name, f in files]
                answer = {"id": asked[2], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self.answer(json.dumps(answer).encode(), body, {"Content-Type": "application/json"})
        asked = re.fullmatch(r"/(?:api/)?(?:(datasets)/|models/)?([^/]+/[^/]+)/(?:resolve|tree)/[^/]+/(.+)", path)
        if asked:
            file = self.server.folder / (asked[1] or "models") / asked[2] / asked[3]
            if file.is_file():
                self.server.served.append(f"{asked[2]}/{asked[3]}")
                etag = hashlib.sha256(f"{file} {file.stat().st_size}".encode()).hexdigest()
                return self.answer(file.read_bytes(), body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        self.answer(b"{}", body, {"X-Error-Code": "EntryNotFound" if asked else "RepoNotFound"}, 404)

    def do_HEAD(self):
        self.do_GET(body=False)

    def answer(self, content, body, headers, status=200):
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and status == 200:  # a download that goes on
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            status, headers = 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content = content[first:last + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


class Hub(ThreadingHTTPServer):
    """`served` lists the files that were asked for, as OWNER/NAME/file."""

    daemon_threads = True

    def __init__(self, folder, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.served = Path(folder), []


if __name__ == "__main__":
    Hub(sys.argv[1], int(sys.argv[2])).serve_forever()
