"""The scripts as their users run them, at tiny size, and their messages about bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from core.config import parse
from core.results import read_records


def test_run_ldfs_end_to_end(script, tiny_data, tiny_clip, tmp_path):
    run = tmp_path / "run"
    flags = ["--data", tiny_data, "--model", tiny_clip, "--seeds", 2, "--run", run, "--epochs", 2]
    flags += ["--mapper-steps", 3]
    done = script("run_ldfs.sh", "tiny", "photo", *flags)
    assert "on cpu" in done.stdout and "18 training, 3 validation, 9 test images" in done.stdout
    full = (run / "table.md").read_text()
    for method in ("zero-shot", "finetune", "lads", "global", "ldfs"):
        assert f"| {method} |" in full and f"\n{method} " in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith(("zero-shot ", "ldfs "))]
    assert len(rows) >= 2 and max(map(len, rows)) <= 100
    for picture in ("figure4-sketch.png", "losses.png"):
        assert (run / picture).stat().st_size > 1000

    accuracies = [r for r in read_records(run) if r["kind"] == "accuracy"]
    assert {(r["method"], r["seed"]) for r in accuracies} == {
        (method, seed) for method in ("zero-shot", "finetune", "lads", "global", "ldfs") for seed in (0, 1)
    }
    expected = {"photo", "sketch", "cartoon", "OOD mean", "extended"}
    assert all(r["values"].keys() == expected and r["validation"] is not None for r in accuracies)

    files = {p: p.stat().st_mtime_ns for p in run.glob("*/*.pt")}
    assert len(files) == 2 * (3 * 2 + 4)  # seeds x (recipes x targets + checkpoints)
    other = ["--train", "full", "--init", "scratch", "--methods", "finetune", "ldfs", "ldfs:sigma=0"]
    done = script("run_ldfs.sh", "tiny", "photo", *flags, *other)
    assert files == {p: p.stat().st_mtime_ns for p in files}  # nothing is trained again
    assert "lads" not in done.stdout  # the table is of this command
    assert "init=scratch" in (run / "table.md").read_text()


def test_run_arf_end_to_end(script, tiny_data, tiny_clip, tiny_blip2, tiny_pool, tmp_path):
    """Captions by BLIP-2, pairs from a pool, all methods, unseen classes, α, figures."""
    description = tiny_data / "tiny" / "dataset.json"
    (tiny_data / "tiny" / "captions.jsonl").unlink()
    shutil.copytree(tiny_data / "tiny", tiny_data / "others")
    description.write_text(json.dumps(json.loads(description.read_text()) | {"unseen": "others"}))
    run = tmp_path / "run"
    flags = ["--data", tiny_data, "--model", tiny_clip, "--captioner", tiny_blip2, "--pool", tiny_pool]
    flags += ["--run", run, "--seeds", 2, "--epochs", 2, "--mapper-steps", 3]
    methods = ["finetune", "flyp", "flyp+captions", "flyp+retrieved", "arf", "arf+ldfs"]
    flags += ["--same", 0.99999, "--methods", *methods]
    done = script("run_arf.sh", "tiny", "photo", *flags)
    full = (run / "table.md").read_text()
    for label in ["zero-shot", *methods]:
        assert f"| {label} |" in full and f"\n{label} " in done.stdout
    assert "| arf α=0.5 |" in full and "unseen mean" in full and "α=0.25" not in full
    for picture in ("curve.png", "figure5.png", "losses.png"):
        assert (run / picture).stat().st_size > 1000

    records = read_records(run)
    accuracies = {
        (r["method"], r["alpha"]): r for r in records if r["kind"] == "accuracy" and r["seed"] == 1
    }
    assert len(accuracies) == 1 + 6 * 4
    domains = {"photo", "sketch", "cartoon"}
    expected = domains | {"OOD mean", "extended", "unseen mean"} | {f"unseen {domain}" for domain in domains}
    assert all(r["values"].keys() == expected for r in accuracies.values())
    assert accuracies["finetune", 1.0]["trained"] == "image tower, head"
    assert accuracies["flyp", 1.0]["trained"] == "both towers"
    [pairs] = [r for r in records if r["kind"] == "pairs"]
    assert pairs["values"]["available"] == 40


def test_the_table_answers_the_command_whatever_else_is_in_the_folder(script, tiny_data, tiny_clip, tmp_path):
    flags = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--seeds", 1, "--epochs", 1]
    flags += ["--mapper-steps", 2, "--run", tmp_path / "run"]
    script("run_ldfs.sh", *flags)
    done = script("run_arf.sh", *flags, "--methods", "finetune", "flyp", "--alphas")
    assert "\nflyp " in done.stdout and "lads" not in done.stdout
    assert "| lads |" not in (tmp_path / "run" / "table.md").read_text()
    both = {r["method"] for r in read_records(tmp_path / "run")}
    assert {"lads", "ldfs", "flyp"} <= both


def test_a_target_known_by_words_only(script, tiny_data, tiny_clip, tmp_path):
    """Mappers are trained towards it, finetuning takes their features, its column says "not run"."""
    shutil.rmtree(tiny_data / "tiny" / "sketch")
    flags = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--seeds", 1, "--epochs", 1]
    flags += ["--mapper-steps", 2, "--run", tmp_path / "run", "--methods", "finetune", "ldfs"]
    done = script("run_ldfs.sh", *flags)
    assert "sketch" in done.stdout and "no images, because" in done.stderr
    assert len([*(tmp_path / "run/mappers").glob("ldfs-sketch-*")]) == 1
    [losses] = (tmp_path / "run/checkpoints").glob("ldfs-*.json")
    assert "L_con sketch" in json.loads(losses.read_text())[0]
    records = read_records(tmp_path / "run")
    [values] = [r["values"] for r in records if (r["kind"], r["method"]) == ("accuracy", "ldfs")]
    assert values["sketch"] is None and values["OOD mean"] == values["cartoon"] is not None
    assert {r["domain"] for r in records if r["kind"] == "synthesis"} == {"cartoon"}
    table = (tmp_path / "run/table.md").read_text()
    assert "| not run |" in table and (tmp_path / "run/figure4-cartoon.png").exists()


def test_a_data_set_of_one_domain(script, tiny_data, tiny_clip, tmp_path):
    """It can be finetuned where no method synthesises features; there is no OOD mean."""
    description = {"phrases": {"photo": "a photo"}, "fractions": {"train": 0.6, "val": 0.1, "test": 0.3}}
    (tiny_data / "tiny" / "dataset.json").write_text(json.dumps(description))
    flags = ["tiny", "--data", tiny_data, "--model", tiny_clip, "--seeds", 1, "--epochs", 1]
    flags += ["--run", tmp_path / "run", "--methods", "finetune", "flyp"]
    done = script("run_arf.sh", *flags)
    [values] = [r["values"] for r in read_records(tmp_path / "run") if r["method"] == "flyp" and r["alpha"] == 1]
    assert values["photo"] is not None and values["OOD mean"] is values["extended"] is None
    assert re.search(r"\nflyp +[\d.]+ +–", done.stdout) and "no curve" in done.stdout
    assert (tmp_path / "run/losses.png").exists() and "warning" not in done.stderr
    done = script("run_ldfs.sh", *flags[:-3], "--methods", "ldfs", code=2)
    assert "no text points from one to another" in done.stderr


def test_what_would_fail_after_the_training_fails_before(script, tiny_data, tiny_clip, tmp_path):
    """An image of a target that cannot be read, and an unseen data set that does not fit."""
    flags = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--seeds", 1, "--epochs", 1]
    flags += ["--mapper-steps", 2, "--run", tmp_path / "run"]
    image = tiny_data / "tiny" / "sketch" / "dog" / "3.png"
    image.write_bytes(b"broken")
    done = script("run_ldfs.sh", *flags, code=2)
    assert f"{image}: not a readable image (of no known format). Replace or remove it." in done.stderr
    description = tiny_data / "tiny" / "dataset.json"
    for unseen, message in (("nowhere", "unknown data set 'nowhere'"), ("others", "lacks photo")):
        content = json.loads(description.read_text()) | {"unseen": unseen}
        description.write_text(json.dumps(content))
        (tiny_data / "others").mkdir(exist_ok=True)
        (tiny_data / "others/dataset.json").write_text('{"phrases": {"cartoon": "a cartoon"}}')
        shutil.copytree(tiny_data / "tiny/cartoon", tiny_data / "others/cartoon", dirs_exist_ok=True)
        assert message in script("run_ldfs.sh", *flags, code=2).stderr
    assert not [*(tmp_path / "run").glob("*/*.pt")]


def test_a_figure_that_cannot_be_drawn_is_a_warning(script, tiny_data, tiny_clip, tmp_path, monkeypatch):
    """… behind the tables; the figures after it are drawn."""
    def broken(*arguments):
        raise ValueError("Expected end of text")

    flags = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--seeds", 1, "--epochs", 1]
    flags += ["--mapper-steps", 2, "--run", tmp_path / "run", "--methods", "ldfs"]
    monkeypatch.setattr("report.figures.draw_losses", broken)
    done = script("run_ldfs.sh", *flags)
    assert "warning: broken: no figure was drawn (ValueError: Expected end of text)" in done.stderr
    assert "\nldfs " in done.stdout and (tmp_path / "run/figure4-cartoon.png").exists()


def test_each_stage_runs_alone_and_makes_what_it_needs(script, tiny_data, tiny_clip, tmp_path):
    flags = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--seeds", 1, "--epochs", 1]
    flags += ["--mapper-steps", 2, "--methods", "ldfs", "--run"]
    alone = script("evaluate.py", *flags, tmp_path / "evaluate").stdout
    for stage in (["mapper.py"], ["finetune.py"], ["anchors.py", "caption"]):
        script(*stage, *flags, tmp_path / "stages")
    assert [*(tmp_path / "stages").glob("checkpoints/*.pt")] and not [*(tmp_path / "stages").glob("scores/*")]
    stages = script("evaluate.py", *flags, tmp_path / "stages").stdout
    table = [line for line in alone.splitlines() if line.startswith(("zero-shot", "ldfs"))]
    assert len(table) >= 2 and all(line in stages for line in table)


@pytest.mark.parametrize("arguments, message", [
    (["tiny", "photo", "--methods", "flip"], "unknown 'flip'. Did you mean flyp?"),
    (["tiny", "photo", "--methods", "flyp+retrieved"], "could not fetch pixparse/cc3m-wds"),
    (["tiny", "photo", "--pool", "nowhere", "--methods", "flyp+retrieved"], "nowhere has no webdataset shards"),
    (["tiny", "--kk", "1"], "unrecognized arguments: --kk 1"),
    (["tiny", "photo", "--train", "head"], "invalid choice: 'head'"),
    ([], "the following arguments are required: dataset"),
])
def test_bad_input_to_run_arf(script, tiny_data, tiny_clip, tmp_path, arguments, message):
    common = ["--data", tiny_data, "--model", tiny_clip, "--run", tmp_path / "run"] if arguments else []
    done = script("run_arf.sh", *arguments, *common, code=2)
    assert message in done.stderr, done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["emojy", "3d"], "unknown data set 'emojy'"),
    (["data/tiny", "photo"], "Pass tiny --data data"),
    (["tiny", "foto"], "no domain 'foto'"),
    (["tiny", "photo", "--model", "local-dir:/nowhere"], "--model local-dir:/nowhere: could not be loaded"),
    (["tiny", "photo", "--methods", "ldsf"], "unknown 'ldsf'. Did you mean ldfs?"),
    (["tiny", "photo", "--seed", "1"], "unrecognized arguments: --seed 1"),
    (["tiny", "photo", "--seeds", "0"], "--seeds: 0 is not a number above 0"),
])
def test_bad_input_is_one_line_and_status_2(script, tiny_data, tmp_path, arguments, message):
    # relative paths are relative to the folder where the user is
    done = script("run_ldfs.sh", *arguments, "--data", "data", "--run", "run", code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr


@pytest.mark.parametrize("name, arguments, code", [
    ("run_ldfs.sh", ["tiny", "foto", "--data", "data"], 2), ("run_arf.sh", ["tiny", "--help"], 0),
])
def test_as_their_users_start_them(name, arguments, code, tiny_data, tmp_path):
    """In a shell, from another folder: relative paths are relative to it, and a bad argument is one
    line.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / name), *arguments], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == code and len(done.stderr.splitlines()) == (code > 0), done.stderr
    assert "no domain 'foto'" in done.stderr if code else "--ablate" in done.stdout


# -------------------------------------------------------------------------------------------------
# --help

HELP = {  # {script: some flags that it uses, some that it does not use}
    ("anchors.py", "caption"): ("--captioner --beams", "--run --model --methods --k --lr --alphas"),
    ("anchors.py", "retrieve"): ("--pool --k --same --model --run", "--captioner --methods --lr --alphas"),
    ("mapper.py",): ("--mapper-steps --methods --captioner --shots", "--train --k --pool --lr --alphas"),
    ("finetune.py",): ("--lr --lock-text --k --captioner --mapper-steps --train", "--alphas"),
    ("evaluate.py",): ("--alphas --lr --k --captioner --mapper-steps", "--out"),
    ("run.py",): ("--alphas --lr --k --captioner --mapper-steps", "--out"),
    ("export.py",): ("--alpha", "--data --run --model"),
    ("benchmark/__main__.py",): ("--batch-size --threads --out", "--data --lr"),
    ("sets/load.py",): ("--data", "--run --model"),
    ("report/tables.py",): ("--full", "--data --run"),
    ("report/figures.py",): ("", "--data --run"),
    ("report/document.py",): ("--add", "--data --run"),
    ("report/synthetic.py",): ("--run", "--data"),
}


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_shows_the_flags_that_a_script_uses_each_with_its_default(script, words):
    used, unused = (set(flags.split()) for flags in HELP[words])
    text = script(*words, "--help").stdout
    shown = {flag for flag in re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.M)}
    assert used | {"--debug", "--help"} <= shown and not unused & shown
    for entry in re.split(r"^  (?=-)", text, flags=re.M)[1:]:
        entry = re.split(r"\n\n", entry)[0]  # the next group starts
        assert entry.startswith("-h") or re.search(r"\(default", " ".join(entry.split())), entry
    if "captions (anchors.py caption):" in text:
        assert "data and run:" in text  # flags are grouped


def test_every_stage_takes_the_flags_of_all(script):
    """The run scripts pass the same flags to each; those that a stage does not use are not refused."""
    hidden = parse("", ["tiny", "--alphas", "0.5", "--lr", "0.1"], "caption")
    assert hidden == parse("", ["tiny", "--alphas", "0.5", "--lr", "0.1"])
    assert "anchors.py caption --help" in script("anchors.py", "--help").stdout
