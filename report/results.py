"""Results as rows: what was measured stands in results.jsonl, with which settings in config.json.

A row is a dict: method, domain, value (None: not run) and the columns of DEFAULTS. On disk a line
is what one method with one seed scored, {domain: [value, n]}, with the columns that are not as by
default and the id of its settings: nothing is written twice.
"""

import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from utils import ROOT, fail, short_hash, undamaged, warn, write_atomically

DEFAULTS = {
    "measure": "accuracy", "split": "test", "seed": 0, "n": 0, "value": None,
    "trained": "",  # zero-shot, and measures that are no accuracies: nothing
    "alpha": 1, "lambda_cap": 1, "lambda_ret": 1,
    "key": "",      # whatever changes when the value is to be measured anew
    "tested": "",   # whatever changes when images, prompts or parts do
}


def block_of(settings, measure="accuracy"):
    """A string that rows of one table share: all settings of accuracies, the model of the rest."""
    apart = ("lambda_cap", "lambda_ret", "versions", "commit")  # columns of a row, and no settings
    if measure != "accuracy":
        return json.dumps([settings[k] for k in ("dataset", "source", "model")])
    return json.dumps({k: v for k, v in settings.items() if k not in apart})


def commit():
    """This repository's commit, "-dirty" where files differ from it; None where git cannot tell."""
    if not shutil.which("git"):
        return None
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None


def append(config, new):
    """Append rows to config.run's results, each with what made it; not what is there already.

    new: dicts; columns that are as in DEFAULTS need not be there.
    """
    versions = {package: version(package) for package in ("torch", "open_clip_torch")}
    settings = {**config.record(), "versions": versions, "commit": commit()}
    settings = json.loads(json.dumps(settings, default=str))  # as they will be read
    name, lines = short_hash(json.dumps(settings, sort_keys=True))[:8], {}
    known = latest(config.run)
    cell = ("domain", "value", "n")
    for row in new:
        row = {**DEFAULTS, **{k: v for k, v in row.items() if v is not None}}
        if row["value"] is not None:
            row["value"] = round(row["value"], 6)  # float32 has no more
        old = known.get(thing({**row, "block": block_of(settings, row["measure"])}))
        if old is None or any(old[k] != row[k] for k in ("value", "n", "key")):
            shared = {k: v for k, v in row.items() if k not in cell and v != DEFAULTS.get(k)}
            line = lines.setdefault(json.dumps(shared), {"config": name, **shared, "values": {}})
            line["values"][row["domain"]] = [row["value"], row["n"]]
    if lines:
        configs, path = config.run / "config.json", config.run / "results.jsonl"
        record = {**settings_of(config.run), name: settings}
        text = path.read_text() if path.exists() else ""
        text += "".join(json.dumps(line) + "\n" for line in lines.values())
        write_atomically(configs, lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))
        write_atomically(path, lambda part: part.write_text(text))


def append_statistics(config, table, n):
    """Append and print {(recipe, target): mapper.py's statistics of each seed}, of n images."""
    append(config, [
        {"method": name, "domain": domain, "measure": measure, "value": value, "n": n,
         "seed": seed, "split": "train"}
        for (name, domain), runs in table.items() for seed, numbers in enumerate(runs)
        for measure, value in numbers.items()
    ])
    measures = next(iter(table.values()))[0]
    print(f"{'recipe':28}{'target':16}" + "".join(f"{measure:>9}" for measure in measures))
    for (name, domain), runs in table.items():
        means = [sum(numbers[m] for numbers in runs) / len(runs) for m in measures]
        print(f"{name:28}{domain:16}" + "".join(f"{mean:9.3f}" for mean in means))


def settings_of(run):
    """{id: settings} of the folder `run`."""
    path = Path(run) / "config.json"
    with undamaged(path, "Remove it and results.jsonl, and run all again."):
        return json.loads(path.read_text()) if path.exists() else {}


def rows(run):
    """All rows in the folder `run`, with all columns, "settings", "block", "line" (number)."""
    path, found = Path(run) / "results.jsonl", []
    if path.exists():
        configs = settings_of(run)
        with undamaged(path, "Check its permissions, or remove it, to measure all again."):
            lines = path.read_text(errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            with undamaged(f"{path}, line {number}", "Remove the line: it is measured again."):
                shared = {**DEFAULTS, **json.loads(line), "line": number}
                if shared["config"] not in configs:
                    fail(f"{path.with_name('config.json')} lacks {shared['config']}, the settings "
                         f"of line {number} of {path.name}. Put it back, or remove both files.")
                shared["settings"] = configs[shared["config"]]
                shared["block"] = block_of(shared["settings"], shared["measure"])
                for domain, (value, n) in shared.pop("values").items():
                    found.append({**shared, "domain": domain, "value": value, "n": n})
    return found


def latest(run):
    """{thing: the last row about it}, of all that were ever appended."""
    return {thing(row): row for row in rows(run)}


def read(run):
    """Of rows about the same thing the last, in the order in which things came first.

    Accuracies on other images than the last of a block are left out: no table compares the two.
    Exits with status 2 where there is none.
    """
    every = rows(run)
    last = {row["block"]: row["tested"] for row in every if row["measure"] == "accuracy"}
    found = {thing(row): row for row in every if row["measure"] != "accuracy"
             or last[row["block"]] in ("", row["tested"])}
    if outdated := {thing(row) for row in every} - found.keys():
        warn(f"{run}: {len(outdated)} accuracies on other images, prompts or parts are left out")
    if not found:
        path = Path(run) / "results.jsonl"
        fail(f"{path} is not there. Run something first: bash run_ldfs.sh pacs photo")
    return [*found.values()]


def thing(row):
    """What a row is about."""
    weights = ("alpha", "lambda_cap", "lambda_ret")
    columns = ("block", "method", *weights, "domain", "split", "measure", "seed")
    return tuple(row[column] for column in columns)
