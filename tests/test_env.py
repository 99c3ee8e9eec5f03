"""env.sh: which Python the scripts use; one line and status 2 if none can be used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENV = Path(__file__).resolve().parent.parent / "env.sh"
# A program in place of python3: it knows the commands of env.sh, and takes its answers from the
# files beside it (packages, old, no_venv, no_network).
PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
  -) test -e "$here/packages" ;;
  --version) echo "Python 3.9.1" ;;
  *version_info*) test ! -e "$here/old" ;;
  *purelib*) test ! -e "$here/other_version" ;;
  "-m venv"*)
    test ! -e "$here/no_venv" || exit 1
    mkdir -p "$3/bin" && cp "$here"/* "$3/bin" && touch "$3/bin/activate" ;;
  "-m pip"*)
    test ! -e "$here/no_network" || exit 1
    echo "pip of $0" && touch "$here/packages" ;;
esac
"""


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "the repository"
    folder.mkdir()
    shutil.copy(ENV, folder)
    return folder


def fake_python(folder, *answers):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "python3").write_text(PYTHON)
    (folder / "python3").chmod(0o755)
    for answer in answers:
        (folder / answer).touch()


def source(repository, *answers):
    """Source env.sh as the run scripts do; return (status, the python3 in use, error lines)."""
    system = repository.parent / "system"
    fake_python(system, *answers)
    script = 'set -euo pipefail; . "$0/env.sh"; command -v python3'
    done = subprocess.run(
        ["bash", "-c", script, str(repository)], cwd=repository.parent, text=True,
        env={"PATH": f"{system}:{os.environ['PATH']}"}, capture_output=True,
    )
    python = done.stdout.split("\n")[-2] if done.returncode == 0 else None
    return done.returncode, python, done.stderr.splitlines()


def test_a_python_with_the_packages_is_used_as_it_is(repository):
    status, python, errors = source(repository, "packages")
    assert (status, python, errors) == (0, f"{repository.parent}/system/python3", [])
    assert not (repository / ".venv").exists()


def test_missing_packages_are_installed_into_venv(repository):
    expected = 0, f"{repository}/.venv/bin/python3", []
    assert source(repository) == expected
    assert not (repository.parent / "system" / "packages").exists()
    assert source(repository) == expected  # The second time, nothing is installed.


def test_a_moved_repository_still_uses_its_venv(repository):
    source(repository)
    moved = repository.rename(repository.with_name("moved"))
    assert source(moved) == (0, f"{moved}/.venv/bin/python3", [])


def test_an_old_python_is_refused_before_anything_is_made(repository):
    status, _, [line] = source(repository, "old")
    assert status == 2 and line == "env.sh: Python 3.10 or later is required. Here is: Python 3.9.1"
    assert not (repository / ".venv").exists()


def test_an_old_python_does_not_matter_beside_a_complete_venv(repository):
    fake_python(repository / ".venv/bin", "activate", "packages")
    assert source(repository, "old")[0] == 0


@pytest.mark.parametrize("kind", ["gone", "replaced"])
def test_a_stale_venv_is_named_and_the_system_is_left_alone(repository, kind):
    fake_python(repository / ".venv/bin", "activate", "packages", "other_version")
    if kind == "gone":
        (repository / ".venv/bin/python3").unlink()
        (repository / ".venv/bin/python3").symlink_to("/no/such/python3")
    status, _, [line] = source(repository)
    assert status == 2 and f"{repository}/.venv is gone or replaced. Remove it" in line
    assert not (repository.parent / "system/packages").exists()


def test_the_check_of_a_venv_passes_for_a_real_one():
    """The command in env.sh, run by this Python, which has a folder of packages."""
    [command] = [line.split("'")[1] for line in ENV.read_text().splitlines() if "purelib" in line]
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0


@pytest.mark.parametrize("answer, reason", [
    ("no_venv", "cannot make .venv, see above. On Debian: apt install python3-venv"),
    ("no_network", "pip failed, see above. Check network and disk; a second run continues."),
])
def test_a_failure_names_its_remedy(repository, answer, reason):
    status, _, [line] = source(repository, answer)
    assert status == 2 and reason in line


@pytest.mark.skipif(os.getuid() == 0, reason="root can write everywhere")
def test_a_repository_that_cannot_be_written_is_named(repository):
    repository.chmod(0o555)
    status, _, [line] = source(repository)
    assert status == 2 and f"{repository} cannot be written" in line


def test_malloc_settings_of_the_user_stay(repository):
    fake_python(repository.parent / "system", "packages")
    script = 'export MALLOC_MMAP_MAX_=7; . "$0/env.sh"; echo $MALLOC_MMAP_MAX_ $MALLOC_TOP_PAD_'
    env = {"PATH": f"{repository.parent}/system:{os.environ['PATH']}"}
    printed = subprocess.check_output(["bash", "-c", script, str(repository)], env=env, text=True)
    assert printed == "7 200000000\n"
