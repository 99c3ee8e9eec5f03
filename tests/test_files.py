"""Our own files: damaged ones are named or made anew; disks that are full; two runs at once;
Ctrl-C.
"""

import resource
import signal
import subprocess
import sys
import utils
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import anchors
import batches
import data
import mapper
import training
from config import Schedule
from report import results

LEARNER = torch.nn.Linear(1, 1)
LEARNER.clip = SimpleNamespace(device="cpu")
READERS = {  # file: (what reads it, from a folder, what else its message says)
    "mappers/ldfs-sketch-seed0.pt": (
        lambda run: mapper.load_mapper(SimpleNamespace(run=run), "ldfs", "sketch", 0, "CLIP's"), "run mapper.py again",
    ),
    "checkpoint.pt": (
        lambda run: training.fit(LEARNER, None, 1, Schedule(1, 1, 1), run / "checkpoint.pt", "", {}),
        "train anew",
    ),
    "results.jsonl": (results.rows, "line 1"),
    "config.json": (results.settings_of, "and results.jsonl"),
    "retrieved.jsonl": (batches.read_retrieved, "retrieve again"),
    ".captions.jsonl.part1-0": (lambda run: data.read_rows(run / "captions.jsonl"), "said again"),
}


def refusal(capsys, call, *arguments):
    """The one line that `call` prints before it exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    lines = capsys.readouterr().err.splitlines()
    [said] = [line for line in lines if line.strip() and "captions:" not in line]  # progress
    assert stop.value.code == 2
    return said


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize("content", [b'{"a": 1\n', b"\xff\x00\n", b"3\n", b"[]\n"])
def test_damaged_files_are_named_with_a_remedy(tmp_path, capsys, file, content):
    if file == "config.json" and content in (b"3\n", b"[]\n"):
        return  # is JSON, and fails where one looks into it
    path, (read, says) = tmp_path / file, READERS[file]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    said = refusal(capsys, read, tmp_path)
    assert str(path) in said and "is damaged" in said and says in said


def test_a_byte_that_changed_is_noticed(tmp_path, capsys):
    """… also where torch.load gives what it then says."""
    path, x = tmp_path / "x.pt", torch.ones(1000)
    assert torch.equal(utils.cached(path, lambda: x), x) and torch.equal(utils.load_whole(path), x)
    content = bytearray(path.read_bytes())
    content[content.index(x.numpy().tobytes()) + 1002] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path), x)
    assert torch.equal(utils.cached(path, lambda: x), x)  # made anew
    assert f"{path} is damaged" in capsys.readouterr().err and torch.equal(utils.load_whole(path), x)


def test_half_a_line_of_results_is_named_by_its_number(tmp_path, capsys):
    config = SimpleNamespace(run=tmp_path, record=lambda: {
        "dataset": "d", "source": "photo", "model": "m", "schedules": {},
    })
    rows = [{"method": m, "domain": "photo", "value": 1} for m in ("finetune", "ldfs")]
    results.append(config, rows)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text()[:-20])
    assert f"{path}, line 2 is damaged" in refusal(capsys, results.append, config, rows)
    path.write_text(path.read_text().splitlines()[0] + "\n")  # as it says
    results.append(config, rows)
    assert [row["method"] for row in results.read(tmp_path)] == ["finetune", "ldfs"]


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


@pytest.mark.parametrize("save", [
    lambda part: torch.save(torch.ones(1000), part), lambda part: part.write_text("x" * 1000),
])
def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path, capsys, full_disk, save):
    path = tmp_path / "file"
    path.write_text("old")
    said = refusal(capsys, full_disk, utils.write_atomically, path, save)
    assert f"{path}: could not be written" in said
    full_disk(utils.write_atomically, path, save, utils.warn)  # goes on
    assert "could not be written" in capsys.readouterr().err
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_captions_on_a_full_disk_are_kept_up_to_the_last_line(
    tiny_data, tmp_path, monkeypatch, capsys, full_disk
):
    monkeypatch.setattr(anchors, "load_captioner", lambda *args: (None, None))
    monkeypatch.setattr(anchors, "caption_images", lambda m, p, images, *_: ["w"] * len(images))
    items, path = data.load("tiny", tiny_data).images["photo"], tmp_path / "captions.jsonl"
    part = tmp_path / ".captions.jsonl.part1-0"
    config = SimpleNamespace(prompt="", beams=1, max_tokens=1, caption_batch=2)
    captions = config, items, ["a thing"] * 3, "a captioner", "c", part
    said = refusal(capsys, full_disk, anchors.write_captions, *captions)
    assert f"{part}: could not be written" in said
    assert 3 < len(data.read_rows(path)[0]) < 6


def test_a_damaged_cache_is_made_anew(tmp_path, capsys):
    path = tmp_path / "folder" / "z.pt"
    for content, warned in ((None, False), (b"", True), (b"PK\x03\x04 half", True)):
        if content is not None:
            path.write_bytes(content)
        assert utils.cached(path, lambda: torch.ones(2)).tolist() == [1, 1]
        assert torch.load(path).tolist() == [1, 1]
        assert (str(path) in capsys.readouterr().err) == warned
    assert utils.cached(path, lambda: pytest.fail("made twice")).tolist() == [1, 1]


def holder(path, **how):
    """Another process, which holds the lock `path`."""
    code = f"import pathlib, utils; utils.lock(pathlib.Path({str(path)!r}), **{how}); "
    code += "print('locked', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(utils.__file__).parent, **pipes)
    assert process.stdout.readline() == b"locked\n"
    return process


def test_partial_caches_of_killed_runs_go_once_no_run_is_at_work_there(tmp_path):
    other, part = holder(tmp_path / ".lock", shared=True), tmp_path / ".y.pt.123.part"
    part.touch()
    for name in ("x.pt", "w.pt"):
        utils.LOCKS.clear()  # as another process would
        assert utils.cached(tmp_path / name, dict) == {} and part.exists() == (name == "x.pt")
        other.kill()
        other.wait()


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path, capsys):
    other, part = holder(tmp_path / ".lock"), tmp_path / "checkpoints" / ".arf-seed0.pt.123.part"
    part.parent.mkdir()
    part.touch()
    said = refusal(capsys, utils.lock, tmp_path / ".lock", "checkpoints/.*.part")
    assert f"{tmp_path}/.lock: another run is at work" in said and part.exists()
    other.send_signal(signal.SIGKILL)
    other.wait()
    for _ in range(2):  # in one process as often as it likes
        utils.lock(tmp_path / ".lock", "checkpoints/.*.part")
    assert not part.exists()
    utils.lock(tmp_path / "nowhere" / ".lock")  # nothing can be written there
    utils.unlock(tmp_path / ".lock")
    other = holder(tmp_path / ".lock")
    other.kill()
    other.wait()


def test_ctrl_c_is_one_line_and_status_130_in_a_shell():
    command = f'{sys.executable} -c "import utils; raise KeyboardInterrupt"; exit $?'
    done = subprocess.run(
        ["bash", "-c", command], cwd=Path(utils.__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 130 and done.stderr == "-c: interrupted. Run it again, and it goes on.\n"
