"""Tables of results, in markdown, from rows alone:  python -m report.tables runs/pacs-photo …"""

import json
import statistics
import sys
from pathlib import Path
from utils import fail

import pandas

from config import flags
from methods import RECIPES, TRAINED
from report.results import read

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def table(rows):
    """Markdown of all blocks of rows, and of what others published on their data sets."""
    names = {row["settings"]["dataset"] for row in rows}
    return "".join(f"{title}:\n\n{text}\n\n" for _, title, text in blocks(rows) + published(names))


def blocks(rows):
    """[(measure, title, markdown)]: a block for each measure and way of training."""
    groups = {}
    for row in sorted(rows, key=lambda row: row["measure"] != "accuracy"):
        if row["split"] == "test" and row["alpha"] in (0.5, 1):
            groups.setdefault((row["measure"], row["block"]), []).append(row)
    return [(key[0], title_of(group), compare(group)) for key, group in groups.items()]


def title_of(rows):
    """What the rows of a block have in common: the model; of accuracies flags and schedules."""
    measure, seeds = rows[0]["measure"], len({row["seed"] for row in rows})
    words = ["{dataset}, source {source}, {model}".format(**rows[0]["settings"])]
    if measure == "accuracy":
        settings, parser = json.loads(rows[0]["block"]), flags("")
        parser.set_defaults(k=1)  # a data set's own is told
        default = parser.get_default
        schedules, trained = settings.pop("schedules"), {row["trained"] for row in rows}
        for name, value in settings.items():
            if name not in ("dataset", "source", "model") and value not in (None, default(name)):
                flag = f" --{name.replace('_', '-')}"
                words[-1] += flag if value is True else f"{flag} {value}"
        words += dict.fromkeys(
            f"{TRAINED[kind]} ({s['epochs']} epochs of batch {s['batch_size']}, lr {s['lr']:g})"
            for kind, s in schedules.items() if TRAINED[kind] in trained
        )
    return f"{', '.join(words)}: {measure} in per cent, {seeds} seed{'s'[:seeds - 1]}"


def label(row):
    """What a row is called: its method, and the weights that are not 1: "arf λ_cap=0.5 α=0.5"."""
    weights = {"λ_cap": row["lambda_cap"], "λ_ret": row["lambda_ret"], "α": row["alpha"]}
    return " ".join([row["method"], *(f"{name}={v:g}" for name, v in weights.items() if v != 1)])


def without(method):
    """"coop" of "coop+ldfs": a method without the recipe of its features; "" of any other."""
    strategy, _, last = method.rpartition("+")
    return strategy if last.partition(":")[0] in RECIPES else ""


def compare(rows):
    """A line for each method, mean ± standard deviation over the seeds.

    "less finetune" is the OOD mean less that of plain finetuning, seed by seed: the split is the
    same, so this is the comparison to look at, and its deviation is the comparison's noise. Where
    there is FLYP, ID, OOD mean and unseen mean are compared with it, at the same α; where several
    strategies are there with synthesised features and without, each with itself without.
    """
    source, names = rows[0]["settings"]["source"], {row["method"] for row in rows}
    domains = [*dict.fromkeys(row["domain"] for row in rows)]
    means = [d for d in ("OOD mean", "unseen mean") if d in domains]
    compared = {}  # heading: (domain, method; None: the same without its recipe)
    short = {source: "ID", "OOD mean": "OOD", "unseen mean": "unseen"}
    short = {domain: name for domain, name in short.items() if domain in domains}
    if len({without(name) for name in names} & names) > 1:
        compared = {f"{name}, with less without": (d, None) for d, name in short.items()}
    elif "flyp" in names:
        compared = {f"{name} less flyp": (d, "flyp") for d, name in short.items()}
    elif rows[0]["measure"] == "accuracy" and "OOD mean" in means:
        compared = {f"less {m}": ("OOD mean", m) for m in ("finetune", "lads") if m in names}
    # of unseen classes in the styles of this very set their mean is enough
    shown = [d for d in domains if d.removeprefix("unseen ") not in {*domains} - {d}]
    several = len({row["trained"] for row in rows if row["trained"]}) > 1
    heads = [f"ID ({d})" if d == source else d for d in shown] + [*compared]
    heads = ["method", "trained"][:1 + several] + heads + [f"{d}, seed by seed" for d in means]

    frame = pandas.DataFrame(rows).assign(label=[*map(label, rows)]).astype({"value": float})
    frame, lines = frame.pivot(index=["label", "seed"], columns="domain", values="value"), []
    for name, row in {label(row): row for row in rows}.items():
        seeds, cells = frame.loc[name], [name, row["trained"]][:1 + several]
        cells += [mean_and_deviation(seeds[d].dropna()) or "not run" for d in shown]
        for domain, method in compared.values():
            method = method or without(row["method"])
            rival, less = label({**row, "method": method, "lambda_cap": 1, "lambda_ret": 1}), []
            if rival != name and rival in frame.index:
                less = (seeds[domain] - frame.loc[rival][domain]).dropna()
            cells.append(mean_and_deviation(less))
        cells += [" ".join(f"{v:.1f}" for v in seeds[d].dropna()) for d in means]
        lines.append(cells)
    return markdown(heads, lines)


def mean_and_deviation(values):
    """"91.0 ± 1.4" (sample standard deviation), of a single value without it; "" of none."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def counts(rows):
    """[("count", title, markdown)] of what mapper.py and anchors.py noted, over seeds."""
    rows = [row for row in rows if row["split"] == "train" and row["measure"] != "accuracy"]
    frame = pandas.DataFrame(rows, columns=["method", "domain", "measure", "value"])
    frame, found = frame.pivot_table("value", ["method", "domain"], "measure", sort=False), []
    there = frame.notna().apply(tuple, axis=1)  # which measures; a table for those alike
    for _, part in frame.groupby(there, sort=False):
        part = part.dropna(axis=1)
        lines = [[*k, *(f"{v:.3f}".removesuffix(".000") for v in part.loc[k])] for k in part.index]
        heads = ["method", "domain", *part.columns]
        found.append(("count", ", ".join(part.columns), markdown(heads, lines)))
    return found


def published(names):
    """[("published", title, markdown)]: what others measured on the data sets `names`."""
    return [
        ("published", entry["title"], markdown(entry["columns"], entry["rows"]))
        for entry in PUBLISHED if names & {*entry["datasets"]}
    ]


def markdown(heads, lines):
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [heads, *lines]]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        fail("say whose tables: python -m report.tables runs/pacs-photo …")
    print("".join(table(read(run)) for run in sys.argv[1:]))
