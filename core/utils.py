"""Messages, exit codes and paths."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent

for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows "?" for ẑ
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def fail(message):
    """Print one line that names the problem and the remedy, and exit with status 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # beside a progress bar
    sys.exit(2)


def warn(message):
    """Print a warning that does not disturb a progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def one_line(error):
    """Return the message of an exception as one line of at most 500 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


def on_exception(kind, error, trace):
    """Print one line, and the traceback with --debug. At Ctrl-C end as that signal does (130 in a
    shell). A program that only imports this one keeps its tracebacks.
    """
    main = getattr(sys.modules["__main__"], "__file__", None) or "/"
    own = Path(main).resolve().is_relative_to(ROOT)
    if issubclass(kind, KeyboardInterrupt):
        name = Path(sys.argv[0]).name
        tqdm.write(f"{name}: interrupted. Run it again, and it goes on.", file=sys.stderr)
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    elif not own or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    else:
        remedy = "This is a fault of the program; run again with --debug for the traceback."
        if issubclass(kind, ModuleNotFoundError):
            remedy = "Install the packages: pip install -r requirements.txt"
        name = Path(sys.argv[0]).name
        tqdm.write(f"{name}: {kind.__name__}: {one_line(error)}. {remedy}", file=sys.stderr)


sys.excepthook = on_exception


def is_out_of_memory(error):
    """Return whether an exception says that memory is full: of a GPU, or of a CPU, whose
    RuntimeError has no class of its own.
    """
    full = "out of memory|allocate memory|not enough memory"
    return isinstance(error, RuntimeError) and re.search(full, str(error)) is not None


def from_root(path):
    """Return `path`, or the same path below the repository if it exists only there.

    Descriptions of data sets name files of this repository relative to its root.
    """
    exists = os.path.exists
    return str(ROOT / path) if exists(ROOT / path) and not exists(path) else path


def run_command(command):
    """Run "python -m emoji.draw …" with this Python in the repository's root; exit if it fails."""
    words = shlex.split(command)
    print(f"running: {command}", flush=True)
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # the command has printed the reason
