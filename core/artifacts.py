"""Artifacts: outcomes of stages, stored in files whose names contain a hash of all inputs.

A stage is a function of its inputs: images, texts, weights, settings. Its outcome is stored as
NAME-HASH.pt or NAME-HASH.json, where HASH covers exactly the inputs that matter. Another input is
another file, so nothing can be stale. A killed run is resumed by running it again. Two runs can
share a folder, because what they write under one name is made from the same inputs.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import torch

from core.utils import fail, one_line


def digest(*inputs):
    """Return 20 hex digits that depend on the inputs: tensors by value, anything else by repr."""
    sha = hashlib.sha256()
    for item in inputs:
        if isinstance(item, (list, tuple)) and item and isinstance(item[0], torch.Tensor):
            sha.update(digest(*item).encode())
        elif isinstance(item, torch.Tensor):
            sha.update(item.detach().cpu().contiguous().numpy().tobytes())
        else:
            sha.update(repr(item).encode())
    return sha.hexdigest()[:20]


def artifact_path(folder, name, inputs, suffix=".pt"):
    """Return the path of the artifact that these inputs make. inputs: a tuple for `digest`."""
    separated = [part for item in inputs for part in (item, "|")]  # (1, 10) is not (11, 0)
    return Path(folder) / f"{name}-{digest(*separated)[:10]}{suffix}"


def artifact(path, make):
    """Return the content of `path`. If the file does not exist, write what make() returns."""
    if not path.exists():
        save(make(), path)
    return load(path)


def load(path, device=None):
    """Return the content of a .pt or .json file; exit with status 2 if it cannot be read."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        return torch.load(path, map_location=device)
    except Exception as error:  # torch.load raises many types for a damaged file
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        fail(f"{path} cannot be read ({reason}). Delete it and run again: it is made anew.")


def save(content, path):
    """Write `content` atomically: by torch.save to a .pt file, as JSON to a .json file."""
    if path.suffix == ".json":
        write_atomically(path, lambda part: part.write_text(json.dumps(content) + "\n", "utf-8"))
    else:
        write_atomically(path, lambda part: torch.save(content, part))


def write_atomically(path, write, on_error=fail):
    """Call write(temporary path) and move the file to `path`, so that readers see all or nothing.

    If the file cannot be written, call on_error (`fail` or `warn`) with one line.
    """
    # The name is random because processes of two containers or machines can have the same id.
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or one_line(error)
        on_error(f"{path}: could not be written ({reason}). Make room, or name another folder.")
    finally:
        with contextlib.suppress(OSError):  # the reason is printed already
            part.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Remove the temporary files of killed runs. A file that is still written is minutes old."""
    for leftover in folder.glob(".*.????????.part"):
        with contextlib.suppress(OSError):  # another process has moved or removed it
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()


def file_stamp(path):
    """Return (size, time of change) of a file: what changes when its content does."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def stamps(items):
    """Return what decides the content of items [(Location, label)], for artifact keys: place and
    label, and the size and time of the file.

    Paths are relative to the data set's folder, so that a data set can be moved.
    """
    stat = {file: file_stamp(file) for file in {location.file for location, _ in items}}
    return [(at.path, at.offset, at.size, at.border, label, *stat[at.file]) for at, label in items]
