"""core/artifacts.py and core/utils.py: keys, files that are whole or absent, disks that are full,
Ctrl-C.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from core.artifacts import artifact, artifact_path, digest, load, save, stamps, write_atomically
from core.utils import ROOT, warn
from data import Location


def refusal(capsys, call, *arguments):
    """Return the one line that `call` prints before it exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


# -------------------------------------------------------------------------------------------------
# Keys


def test_a_digest_depends_on_every_input_and_on_their_order():
    big = torch.arange(10_000.0)
    changed = big.clone()
    changed[5_000] += 0.5
    inputs = [
        ("a", "b"), ("b", "a"), ("ab",), ("a", ["b"]), (["a", "b"],), ("a", ("b",)), ("a", {"b": 1}), ("a", {"b": 2}),
        (1,), ("1",), (1.0,), (True,), (None,), ("",), (), ([],),
        (big,), (changed,), ([big, changed],), ([changed, big],), ([big],), ([big, big],),
    ]
    assert len({digest(*x) for x in inputs}) == len(inputs)


def test_a_digest_is_that_of_values():
    x = torch.arange(12.0).view(3, 4)
    assert digest(x) == digest(x.clone()) == digest(x.t().contiguous().t()) == digest(x.requires_grad_())
    assert digest([x, x]) == digest((x.clone(), x.clone())) and digest("a", [1, 2]) == digest("a", [1, 2])


def test_digests_stay_what_they_were():
    """Augmentation is drawn by them, so that another digest gives other results; and it is the
    same in every process.
    """
    assert digest(("images", 0, 3), 7) == "ae9155df4e95509eeec7"
    assert digest(torch.arange(3), [torch.ones(2)], {"a": 1.5}) == "ab80eeb291aa8e6fb7d0"


def test_names_of_artifacts_tell_what_they_are(tmp_path):
    path = artifact_path(tmp_path, "ldfs-sketch-seed0", (1, "a"))
    assert path.parent == tmp_path and path.suffix == ".pt" and path.name.startswith("ldfs-sketch-seed0-")
    assert path == artifact_path(tmp_path, "ldfs-sketch-seed0", (1, "a"))
    assert path != artifact_path(tmp_path, "ldfs-sketch-seed0", (2, "a"))
    assert artifact_path(tmp_path, "a", (), ".json").suffix == ".json"


def test_stamps_depend_on_images_and_not_on_their_folder(tmp_path):
    def world(name, size=3, time=10**18):
        path = tmp_path / name / "photo" / "1.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * size)
        os.utime(path, ns=(0, time))
        return [(Location(str(tmp_path / name), "photo/1.jpg"), 0)]

    first = world("first")
    assert stamps(first) == stamps(world("copy"))
    other = [world("larger", size=4), world("later", time=10**18 + 1), [(first[0][0], 1)]]
    member = [(Location(str(tmp_path / "first"), "photo/1.jpg", offset=512, size=2), 0)]
    keys = [digest(stamps(items)) for items in (first, *other, member, first + first, [])]
    assert len({*keys}) == len(keys)


# -------------------------------------------------------------------------------------------------
# Load or make


@pytest.mark.parametrize("suffix, content", [
    (".pt", {"z": torch.arange(3.0), "rows": [1, 2], "pair": (1, "a")}), (".json", {"é": [1, None, 0.1]}),
])
def test_an_artifact_is_made_once(tmp_path, suffix, content):
    path, calls = tmp_path / "folder" / f"z{suffix}", []
    for _ in range(2):
        loaded = artifact(path, lambda: calls.append(1) or content)
        assert loaded.keys() == content.keys() and str(loaded) == str(content)
    assert len(calls) == 1 and [*path.parent.iterdir()] == [path]


def test_what_cannot_be_made_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        artifact(tmp_path / "z.pt", lambda: 1 / 0)
    assert artifact(tmp_path / "z.pt", lambda: 7) == 7


@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b'{"a": ', b"\xff\x00\n"])
def test_a_file_that_does_not_load_is_named_with_a_remedy_that_works(tmp_path, capsys, suffix, content):
    path = tmp_path / f"z{suffix}"
    path.write_bytes(content)
    line = refusal(capsys, artifact, path, lambda: pytest.fail("made over a file"))
    assert str(path) in line and "Delete it and run again" in line
    assert path.read_bytes() == content
    path.unlink()
    assert artifact(path, lambda: 7) == 7


def test_a_truncated_file_is_named(tmp_path, capsys):
    path = tmp_path / "z.pt"
    save({"z": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:300])
    assert str(path) in refusal(capsys, load, path)


# -------------------------------------------------------------------------------------------------
# Writing


@pytest.fixture
def full_disk():
    """full_disk(call, …): call with files that may not grow beyond 300 bytes."""

    def full(call, *arguments):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            call(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return full


@pytest.mark.parametrize("write", [
    lambda part: torch.save(torch.ones(1000), part), lambda part: part.write_text("x" * 1000),
])
def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, capsys, full_disk, write):
    path = tmp_path / "file"
    path.write_text("old")
    line = refusal(capsys, full_disk, write_atomically, path, write)
    assert f"{path}: could not be written" in line
    full_disk(write_atomically, path, write, warn)  # goes on
    assert "could not be written" in capsys.readouterr().err
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    line = refusal(capsys, save, {}, tmp_path / "file" / "z.json")
    assert f"{tmp_path}/file/z.json: could not be written (" in line and "name another folder" in line

    def read_only(*paths):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    line = refusal(capsys, save, {}, tmp_path / "z.pt")
    assert "could not be written (Read-only file system)" in line and not (tmp_path / "z.pt").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "z.json"
    save(1, path)

    def interrupted(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert load(path) == 1 and [*tmp_path.iterdir()] == [path]


def in_fork(call):
    """Call call() in a process of its own, and return that process's id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(60)
        call()
        status = 0
    finally:
        os._exit(status)


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_write_that_is_killed_leaves_nothing_that_a_reader_sees(tmp_path):
    path = tmp_path / "z.json"

    def killed(part):
        part.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    assert status_of(in_fork(lambda: write_atomically(path, killed))) == -signal.SIGKILL
    [leftover] = tmp_path.iterdir()
    assert leftover.name.startswith(".") and artifact(path, lambda: 7) == 7
    assert leftover.exists()  # it could be of a run that is writing now
    two_hours_ago = time.time() - 7200
    os.utime(leftover, (two_hours_ago, two_hours_ago))
    save(8, tmp_path / "another.json")
    assert {*tmp_path.iterdir()} == {path, tmp_path / "another.json"}


def test_a_leftover_that_another_process_removes_first_is_no_error(tmp_path, monkeypatch):
    gone = tmp_path / ".z.pt.01234567.part"
    monkeypatch.setattr(type(tmp_path), "glob", lambda folder, pattern: [gone])
    save(7, tmp_path / "z.json")
    assert load(tmp_path / "z.json") == 7


def test_writers_and_readers_at_once_see_whole_files(tmp_path):
    path, content = tmp_path / "z.json", ["x" * 100_000]

    def write():
        for _ in range(30):
            save(content, path)

    def read():
        for _ in range(200):
            assert not path.exists() or load(path) == content

    pids = [in_fork(call) for call in (write, write, read)]
    assert [status_of(pid) for pid in pids] == [0, 0, 0]
    assert load(path) == content and [*tmp_path.iterdir()] == [path]


def test_two_processes_that_make_one_artifact_both_get_it(tmp_path):
    path = tmp_path / "z.json"

    def make():
        time.sleep(0.1)
        return [1, 2]

    def both():
        assert artifact(path, make) == [1, 2]

    pids = [in_fork(both), in_fork(both)]
    assert [status_of(pid) for pid in pids] == [0, 0] and [*tmp_path.iterdir()] == [path]


def test_processes_with_one_id_write_different_temporary_files(tmp_path, monkeypatch):
    """… as those of two containers can have."""
    parts = []
    for _ in range(2):
        write_atomically(tmp_path / "z.json", lambda part: parts.append(part) or part.touch())
    assert parts[0] != parts[1] and all(part.parent == tmp_path for part in parts)


# -------------------------------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_is_one_line_and_status_130_in_a_shell():
    command = f'{sys.executable} -c "import core.utils; raise KeyboardInterrupt"; exit $?'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "-c: interrupted. Run it again, and it goes on.\n"


def test_another_programs_exception_keeps_its_traceback():
    command = [sys.executable, "-c", "import core.utils; 1 / 0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


def test_a_fault_of_the_program_is_one_line_and_a_traceback_with_debug():
    """Here of a script of the repository."""
    code = "import core.utils, sys; sys.modules['__main__'].__file__ = 'run.py'; int('x')"
    for flags, n in (([], 1), (["--debug"], 4)):
        command = [sys.executable, "-c", code, *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and ("Traceback" in done.stderr) == (n > 1)
        if n == 1:
            assert len(done.stderr.splitlines()) == 1 and "ValueError: invalid literal" in done.stderr
            assert "fault of the program; run again with --debug" in done.stderr


def test_a_latin_1_terminal_and_locale_show_what_they_can(tmp_path):
    """ẑ is "?", and files are UTF-8 whatever the locale."""
    code = (
        "from pathlib import Path; from core.artifacts import load, save; from core.utils import warn\n"
        f"path = Path({str(tmp_path)!r}, 'a.json'); save({{'z': '\\u1e91'}}, path)\n"
        "print(load(path)['z'], '\\u1e91\\xe9'); warn('\\u1e91')"
    )
    env = {**os.environ, "PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0"}
    env["PYTHONCOERCECLOCALE"] = "0"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "? ?é\n".encode("latin-1")), done.stderr
    assert done.stderr == b"warning: ?\n"
    files = [*ROOT.glob("*.py"), *(f for f in ROOT.glob("*/*.py") if f.parent.name not in ("tests", ".venv"))]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    assert not [line for line in lines if re.search(r"(read|write)_text\(", line) and "utf-8" not in line]
