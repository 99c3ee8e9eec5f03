"""What every script needs and no paper speaks of: failures, files, hashes, processes."""

import contextlib
import fcntl
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent


def from_root(path):
    """`path`, or where only the repository has it, as a description names it, the path there."""
    exists = os.path.exists
    return str(ROOT / path) if exists(ROOT / path) and not exists(path) else path


def fail(message):
    """Print one line that says what is wrong and how to mend it, and stop with exit status 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # also under a progress bar
    sys.exit(2)


def say_interrupted(kind, error, trace):
    """One line at Ctrl-C, and an end as by that signal, 130 in a shell, whatever threads are at."""
    if issubclass(kind, KeyboardInterrupt):
        name = Path(sys.argv[0]).name
        tqdm.write(f"{name}: interrupted. Run it again, and it goes on.", file=sys.stderr)
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say_interrupted


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


def one_line(error):
    """What an exception says, in one line of 500 characters at most."""
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


@contextlib.contextmanager
def writing(path, otherwise=fail):
    """Within it `path` is written; `otherwise`, fail or warn, says so where it cannot be."""
    try:
        yield
    except OSError as error:
        why = f"could not be written ({error.strerror})"
        otherwise(f"{path}: {why}. Make room, or name another folder.")


def write_atomically(path, save, otherwise=fail):
    """Call save(temporary path) and move the outcome to `path`: a reader sees the whole file or
    none.

    Exits with status 2 (`otherwise`: warn, goes on) where the file cannot be written; what it held
    before stays.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path, otherwise):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(part)
            os.replace(part, path)
        except RuntimeError as error:  # as torch.save calls a full disk
            raise OSError(0, one_line(error)) from error
        finally:
            part.unlink(missing_ok=True)


LOCKS = {}  # {path: the open file}, each until `unlock`, or this process ends, however it does


def lock(path, *partial, shared=False):
    """Hold the lock `path`, beside others where it is `shared`; else exit with status 2 where
    another process does.

    What partial files (patterns beside it) are there while none does, killed processes left: they
    go.
    """
    path = path.absolute()
    if path in LOCKS or int(os.environ.get("RANK", 0)) > 0 and not shared:  # torchrun's first does
        return
    try:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in (part for pattern in partial for part in path.parent.glob(pattern)):
                with contextlib.suppress(OSError):
                    part.unlink()
        except BlockingIOError:
            if not shared:
                fail(f"{path}: another run is at work here. Wait for it, or name another folder.")
        if shared:
            fcntl.flock(file, fcntl.LOCK_SH)
        LOCKS[path] = file
    except OSError:  # read-only, where nothing is written; or a file system that has no locks
        pass


def unlock(path):
    """Let go of the lock `path`, if this process holds it."""
    if file := LOCKS.pop(path.absolute(), None):
        file.close()


@contextlib.contextmanager
def undamaged(file, remedy):
    """Within it one of our own files is read; exits with status 2, naming both, where it cannot."""
    try:
        yield
    except Exception as error:  # readers raise what they like at a file that is not their own
        fail(f"{file} is damaged ({type(error).__name__}). {remedy}")


def damaged_copy(repository):
    """What to do about a file of a model in the hub's cache that is not what its name, a SHA-256,
    says; "" where there is none.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "blobs")
    for path in folder.glob("?" * 64):
        sha = hashlib.sha256()
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(2**20), b""):
                sha.update(chunk)
        if sha.hexdigest() != path.name:
            return f"Delete {path}, which is damaged, and it is fetched again."
    return ""


def load_whole(path, device=None):
    """What torch.save keeps in `path`; raises also where a byte has changed since, which torch.load
    lets pass.
    """
    import torch  # here, for it takes seconds, and not all scripts need it

    with zipfile.ZipFile(path) as file:
        if member := file.testzip():  # by its CRC
            raise zipfile.BadZipFile(member)
    return torch.load(path, map_location=device)


def cached(path, make):
    """What make() gives, as torch.save keeps it in `path`; made anew where that is damaged."""
    import torch

    try:
        return load_whole(path)
    except Exception:  # there is none, as a rule
        if path.exists():
            warn(f"{path} is damaged, and made anew")
    made = make()
    with contextlib.suppress(OSError):  # write_atomically says so
        path.parent.mkdir(parents=True, exist_ok=True)
    lock(path.with_name(".lock"), ".*.part", shared=True)  # runs write here side by side
    write_atomically(path, lambda part: torch.save(made, part))
    return made


def run_command(command):
    """Run "python -m emoji.draw …" with this Python, at the root; exits where it fails."""
    words = shlex.split(command)
    print(f"running: {command}", flush=True)
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def short_hash(*things):
    """20 hex digits that change with any of `things`: values of tensors, else the repr."""
    sha = hashlib.sha256()
    for thing in things:
        if isinstance(thing, (list, tuple)) and thing and hasattr(thing[0], "detach"):
            sha.update(short_hash(*thing).encode())
        elif hasattr(thing, "detach"):
            sha.update(thing.detach().cpu().contiguous().numpy().tobytes())
        else:
            sha.update(repr(thing).encode())
    return sha.hexdigest()[:20]


def only_one_process(what, why="is not there. One process is to make it: python data.py NAME"):
    """Exit with status 2 under torchrun, whose processes would all do what one is to do."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail(f"{what} {why}.")
