"""The scripts as their users run them, at tiny size, and what they say to bad input."""

import json

import pytest


def test_run_ldfs_end_to_end(script, tiny_data, tiny_clip, tmp_path):
    options = ["--data", tiny_data, "--model", tiny_clip, "--seeds", 2, "--run", tmp_path / "run"]
    options += ["--epochs", 2, "--mapper-steps", 3]
    done = script("run_ldfs.sh", "tiny", "photo", *options)
    assert "device: cpu, float32" in done.stdout
    table = (tmp_path / "run" / "table.md").read_text()
    for method in ("zero-shot", "finetune", "lads", "ldfs"):
        assert f"| {method} |" in table and f"| {method} |" in done.stdout
    assert (tmp_path / "run" / "figure4.png").stat().st_size > 1000

    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    row = next(r for r in rows if r["metric"] == "accuracy" and r["method"] == "ldfs")
    columns = "method dataset source domain split metric value n seed args versions commit"
    assert row.keys() == set(columns.split())
    accuracy = {(r["method"], r["domain"], r["split"], r["seed"]) for r in rows if r["metric"] == "accuracy"}
    assert len(accuracy) == 4 * 6 * 2  # methods x (val, ID, 2 OOD, their mean, extended) x seeds

    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*/*.pt")}
    assert len(files) == 2 * (2 * 2 + 3)  # seeds x (recipes x targets + checkpoints)
    script("run_ldfs.sh", "tiny", "photo", *options)
    assert files == {p: p.stat().st_mtime_ns for p in files}  # nothing is trained twice

    other = ["--train", "visual", "--init", "scratch", "--methods", "finetune", "ldfs:sigma=0"]
    script("run_ldfs.sh", "tiny", "photo", *options, *other)
    assert "--train visual --init scratch" in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.parametrize("arguments, says", [
    (["emojy", "3d"], "unknown data set 'emojy'"),
    (["pacs", "photo"], "--data"),
    (["tiny", "foto"], "no domain 'foto'"),
    (["tiny", "photo", "--model", "local-dir:/nowhere"], "/nowhere/open_clip_config.json does not exist"),
    (["tiny", "photo", "--model", "ViT-Z"], "knows no such model"),
    (["tiny", "photo", "--methods", "ldsf"], "unknown recipe 'ldsf'"),
    (["tiny", "photo", "--sedes", "1"], "unknown option --sedes"),
    (["tiny", "photo", "--seeds", "0"], "--seeds: 0 is not above 0"),
    (["tiny", "photo", "--methods", "finetune", "--epochs", "x"], "--epochs"),
])
def test_bad_input_is_one_line_and_status_2(script, tiny_data, tmp_path, arguments, says):
    done = script("run_ldfs.sh", *arguments, "--data", tiny_data, "--run", tmp_path / "run", code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], done.stderr


def test_help(script):
    assert "--ablate" in script("run_ldfs.sh", "emoji", "3d", "--help").stdout
    for name in ("mapper.py", "finetune.py"):
        assert "--seeds" in script(name, "--help").stdout
    assert "figure4" in script("evaluate.py", code=2).stderr
