"""The scripts as their users run them, at tiny size, and what they say to bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from report import results


def test_run_ldfs_end_to_end(script, tiny_data, tiny_clip, tmp_path):
    options = ["--data", tiny_data, "--model", tiny_clip, "--seeds", 2, "--run", tmp_path / "run"]
    options += ["--epochs", 2, "--mapper-steps", 3]
    done = script("run_ldfs.sh", "tiny", "photo", *options)
    assert "device: cpu, float32" in done.stdout
    table = (tmp_path / "run" / "table.md").read_text()
    for method in ("zero-shot", "finetune", "lads", "global", "ldfs"):
        assert f"| {method} |" in table and f"| {method} |" in done.stdout
    assert (tmp_path / "run" / "figure4.png").stat().st_size > 1000

    rows = results.read(tmp_path / "run")
    measured = [r for r in rows if r["measure"] == "accuracy"]
    accuracy = {(r["method"], r["domain"], r["split"], r["seed"]) for r in measured}
    assert len(accuracy) == 5 * 6 * 2  # methods x (val, ID, 2 OOD, their mean, extended) x seeds

    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*/*.pt")}
    assert len(files) == 2 * (3 * 2 + 4)  # seeds x (recipes x targets + checkpoints)
    other = ["--train", "full", "--init", "scratch", "--methods", "finetune", "ldfs", "ldfs:sigma=0"]
    script("run_ldfs.sh", "tiny", "photo", *options, *other)
    assert files == {p: p.stat().st_mtime_ns for p in files}  # nothing is trained twice
    assert "--train full" in (tmp_path / "run" / "table.md").read_text()


def test_run_arf_end_to_end(script, tiny_data, tiny_clip, tiny_blip2, tiny_pool, tmp_path):
    """Captions by BLIP-2, pairs from a pool, all methods, unseen classes, α, pictures."""
    about = json.loads((tiny_data / "tiny" / "dataset.json").read_text())
    (tiny_data / "tiny" / "captions.jsonl").unlink()
    shutil.copytree(tiny_data / "tiny", tiny_data / "others")
    (tiny_data / "tiny" / "dataset.json").write_text(json.dumps(about | {"unseen": "others"}))
    options = ["--data", tiny_data, "--model", tiny_clip, "--captioner", tiny_blip2, "--pool", tiny_pool]
    options += ["--run", tmp_path / "run", "--seeds", 2, "--epochs", 2, "--mapper-steps", 3]
    methods = ["finetune", "flyp", "flyp+captions", "flyp+retrieved", "arf", "arf+ldfs"]
    options += ["--same", 0.99999, "--methods", *methods]
    done = script("run_arf.sh", "tiny", "photo", *options)
    table = (tmp_path / "run" / "table.md").read_text()
    for method in ["zero-shot", *methods, "arf α=0.5"]:
        assert f"| {method} |" in table and f"| {method} |" in done.stdout
    assert "unseen mean" in table and "α=0.25" not in table
    for picture in ("curve.png", "figure5.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 1000

    rows = results.read(tmp_path / "run")
    measured = [r for r in rows if r["measure"] == "accuracy" and r["split"] == "test" and r["seed"] == 1]
    means = {"photo", "OOD mean", "unseen mean"}
    everything = means | {"sketch", "cartoon", "extended"}
    everything |= {f"unseen {domain}" for domain in ("photo", "sketch", "cartoon")}

    def domains(alpha):
        return {r["domain"] for r in measured if (r["method"], r["alpha"]) == ("arf", alpha)}

    assert domains(1) == domains(0.5) == everything and domains(0.75) == means
    assert len({(r["method"], r["alpha"]) for r in measured}) == 1 + 6 * 4
    trained = {r["method"]: r["trained"] for r in measured if r["method"] != "zero-shot"}
    assert trained["finetune"] == "image tower, head" and trained["flyp"] == "both towers"
    available = {r["value"] for r in rows if r["measure"] == "available"}
    assert available == {40}


@pytest.mark.parametrize("arguments, says", [
    (["tiny", "photo", "--methods", "flip"], "unknown recipe 'flip'"),
    (["tiny", "photo", "--methods", "flyp+retrieved"], "could not fetch pixparse/cc3m-wds"),
    (["tiny", "photo", "--pool", "nowhere", "--methods", "flyp+retrieved"], "nowhere: no webdataset shards there"),
    (["tiny", "--kk", "1"], "unrecognized arguments: --kk 1"),
    (["tiny", "photo", "--train", "head"], "invalid choice: 'head'"),
    ([], "the following arguments are required: dataset"),
])
def test_bad_input_to_run_arf(script, tiny_data, tmp_path, arguments, says):
    common = ["--data", tiny_data, "--run", tmp_path / "run"] if arguments else []
    done = script("run_arf.sh", *arguments, *common, code=2)
    assert says in done.stderr, done.stderr


@pytest.mark.parametrize("arguments, says", [
    (["emojy", "3d"], "unknown data set 'emojy'"),
    (["tiny", "foto"], "no domain 'foto'"),
    (["tiny", "photo", "--model", "local-dir:/nowhere"], "--model local-dir:/nowhere: could not load it"),
    (["tiny", "photo", "--methods", "ldsf"], "unknown recipe 'ldsf'"),
    (["tiny", "photo", "--seed", "1"], "unrecognized arguments: --seed 1"),
    (["tiny", "photo", "--seeds", "0"], "--seeds: 0 is not a number above 0"),
])
def test_bad_input_is_one_line_and_status_2(script, tiny_data, tmp_path, arguments, says):
    # relative paths are as told from where one stands
    done = script("run_ldfs.sh", *arguments, "--data", "data", "--run", "run", code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], done.stderr


@pytest.mark.parametrize("name, arguments, code", [
    ("run_ldfs.sh", ["tiny", "foto", "--data", "data"], 2), ("run_arf.sh", ["tiny", "--help"], 0),
])
def test_as_their_users_start_them(name, arguments, code, tiny_data, tmp_path):
    """In a shell, not at the root: relative paths are from there, the first stage that fails is
    the last, and --help is of all flags, once.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / name), *arguments], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == code and len(done.stderr.splitlines()) == (code > 0), done.stderr
    assert "no domain 'foto'" in done.stderr if code else done.stdout.count("--ablate ") == 1
