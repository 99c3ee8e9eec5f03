"""Tables of what was measured, from records alone:

    python -m report.tables runs/emoji-3d              # short, at most 100 columns wide
    python -m report.tables runs/emoji-3d --full       # markdown: every domain, every seed
"""

import json
import statistics
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from core.config import Parser
from core.methods import RECIPES, option_matters, parse_method
from core.results import read_records

WIDTH = 100
MEANS = ("ID", "OOD mean", "unseen mean")
SHORT = {"OOD mean": "OOD", "unseen mean": "unseen", "H mean": "H"}
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
MEASURES = {
    "synthesis": "Synthesised features and the real images nearest to them, in per cent",
    "captions": "Captions, in per cent",
    "pairs": "Retrieved pairs",
    "mapper": "Mappers, on training images",
}

# -------------------------------------------------------------------------------------------------
# Rows: what is compared


class Row(NamedTuple):
    """What a row of a table is about; its seeds are repetitions of the same."""

    method: str
    trained: str
    options: tuple  # of (name, value)
    alpha: float

    def label(self, common=()):
        """Return the method's name and what is not as usual: "arf λ_cap=0.5 α=0.5".

        common: options that the table's title names.
        """
        words = [option_text(*option) for option in self.options if option not in common]
        words += [f"α={self.alpha:g}"] * (self.alpha != 1)
        return " ".join([self.method, *words])


def option_text(name, value):
    """Return an option as "shots=4", "lock_text" or, of a path, "captions=mine.jsonl"."""
    name = name.replace("lambda_", "λ_")
    if isinstance(value, str):
        value = value.rsplit("/", 1)[-1]
    elif isinstance(value, float):
        value = f"{value:g}"
    return name if value is True else f"{name}={value}"


def common_options(rows):
    """Return the options that are the same in all rows to which they matter."""
    trained = [row for row in rows if row.trained]
    return [
        option for option in dict.fromkeys(option for row in trained for option in row.options)
        if all(option in row.options for row in trained if applies(option[0], row.method))
    ]


def labels_of(rows, with_trained=False):
    """Return the label of each row, without the options that all share.

    Without a column "trained", labels that are not unique name what is trained.
    """
    common = common_options(rows)
    labels = [row.label(common) for row in rows]
    if with_trained:
        return labels
    return [
        f"{label} ({row.trained})" if labels.count(label) > 1 else label
        for label, row in zip(labels, rows)
    ]


def row_of(record):
    """Return the Row that a record is a seed of."""
    options = tuple(sorted(record["options"].items()))
    return Row(record["method"], record["trained"], options, record["alpha"])


def rows_of(records):
    """Return {Row: {seed: values}} of records of accuracy. The source's value is also "ID", and the
    ECE of each is "ECE ID" and so on.
    """
    rows = {}
    for r in records:
        values, errors = ({"ID": v.get(r["source"]), **v} for v in (r["values"], r.get("ece", {})))
        values |= {f"ECE {key}": value for key, value in errors.items()}
        rows.setdefault(row_of(r), {})[r["seed"]] = values
    return rows


def groups(records):
    """Return [records] that can be compared: of one data set, source and model each."""
    parts = {}
    for r in records:
        parts.setdefault((r["dataset"], r["source"], r["model"]), []).append(r)
    return [*parts.values()]


def without_recipe(method):
    """Return "coop" for "coop+ldfs": the same without synthesised features; "" if there is none."""
    strategy, _, last = method.rpartition("+")
    return strategy if last.partition(":")[0] in RECIPES else ""


def applies(option, name):
    """Return whether an option matters to the method of this name."""
    return option_matters(option, parse_method(name))


def rival(row, method, rows):
    """Return the Row of `method` to compare `row` with; None if there is none, or no single one.

    It has the same α and the same options, except those that matter to one of the two only. If
    there are several, it is the one that trains the same, and then the one with the fewest options.
    """
    def common(r):
        return [o for o in r.options if applies(o[0], row.method) and applies(o[0], method)]

    def rank(r):
        return r.trained != row.trained, len({*r.options} - {*row.options})

    candidates = [
        r for r in rows if method != row.method and (r.method, r.alpha) == (method, row.alpha)
        and (not row.trained or common(r) == common(row))
    ]
    ranks = [rank(r) for r in candidates]
    if not ranks or ranks.count(min(ranks)) > 1:
        return None
    return candidates[ranks.index(min(ranks))]


def difference(rows, row, other, key):
    """Return the values of `row` minus those of `other`, a Row or None, of the seeds of both."""
    seeds = [seed for seed in rows[row] if seed in rows.get(other, {})]
    pairs = [(rows[row][seed].get(key), rows[other][seed].get(key)) for seed in seeds]
    return [a - b for a, b in pairs if a is not None and b is not None]


def comparisons(rows):
    """Return [(key of the values, heading, method to compare with or None)].

    None: the same strategy without synthesised features. Differences are taken seed by seed: the
    split is the same, so their deviation is the comparison's noise.
    """
    methods = {row.method for row in rows}
    keys = [key for key in MEANS if any(values_of(seeds, key) for seeds in rows.values())]
    if len({without_recipe(method) for method in methods} & methods) > 1:
        return [(key, "with less\nwithout", None) for key in keys]
    compared = [(key, "less flyp", "flyp") for key in keys if "flyp" in methods]
    if not compared or any(method.partition(":")[0] in RECIPES for method in methods):
        rivals = [method for method in ("finetune", "lads") if method in methods]
        compared += [("OOD mean", f"less {m}", m) for m in rivals if "OOD mean" in keys]
    return compared


def mean_and_deviation(values):
    """Return "91.0 ± 1.4" (sample standard deviation); "91.0" of one value, "" of none."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def values_of(seeds, key):
    """Return the values under `key` of {seed: values}, without those that were not run."""
    return [values[key] for values in seeds.values() if values.get(key) is not None]


def cells_of(rows, shown, compared, with_trained=False, raw=()):
    """Return a line of cells for each row: label, means, differences; of keys in `raw` each seed.
    """
    lines = []
    means = {*MEANS[1:], "extended", "H mean"}  # without a domain there is no mean in any row
    empty = {key for key in means if not any(values_of(seeds, key) for seeds in rows.values())}
    for label, (row, seeds) in zip(labels_of(rows, with_trained), rows.items()):
        cells = [label, *[row.trained] * with_trained]
        for key in shown:
            missing = "–" if key in empty else "not run"
            cells.append(mean_and_deviation(values_of(seeds, key)) or missing)
        for key, _, method in compared:
            other = rival(row, method or without_recipe(row.method), rows)
            cells.append(mean_and_deviation(difference(rows, row, other, key)))
        cells += [" ".join(f"{value:.1f}" for value in values_of(seeds, key)) for key in raw]
        lines.append(cells)
    return lines


def title_of(records):
    """Return "emoji, source 3d, local-dir:emoji/clip, shots=4: accuracy in per cent, 5 seeds"."""
    rows = {row_of(r): None for r in records}
    words = ["{dataset}, source {source}, {model}".format(**records[0])]
    words += [option_text(*option) for option in common_options(rows)]
    return f"{', '.join(words)}: accuracy in per cent, {count_seeds(records)}"


def count_seeds(records):
    """Return "5 seeds", or "3 to 5 seeds" if rows have unequal numbers."""
    seeds = {}
    for r in records:
        seeds.setdefault((r["kind"], row_of(r)), set()).add(r["seed"])
    low, high = min(map(len, seeds.values())), max(map(len, seeds.values()))
    return f"{low} to {high} seeds" if low < high else f"{high} seed{'s' * (high > 1)}"


# -------------------------------------------------------------------------------------------------
# For the terminal, and in full as markdown


def terminal_table(records):
    """Return tables at most WIDTH columns wide: means, and the differences that matter."""
    return "\n\n".join(
        f"{textwrap.fill(title, WIDTH)}\n\n{aligned(heads, lines)}"
        for _, title, heads, lines in all_tables(records, full=False)
    )


def markdown_table(records):
    """Return all tables in markdown, and what others published on these data sets."""
    return "\n\n".join(f"{title}:\n\n{table}" for _, title, table in full_tables(records))


def full_tables(records):
    """Return [(kind, title, markdown)]: accuracies, then measures, then published numbers."""
    tables = [(kind, title, markdown(*table)) for kind, title, *table in all_tables(records, True)]
    return tables + published({r["dataset"] for r in records})


def all_tables(records, full):
    """Return [("accuracy" or "measures", title, headings, lines of cells)].

    full: with every domain and seed, for markdown; else for the terminal.
    """
    tables = []
    for group in groups(records):
        # other α are points of a curve
        accurate = [r for r in group if r["kind"] == "accuracy" and r["alpha"] in (0.5, 1)]
        if accurate:
            title = "; ".join([title_of(accurate), *schedules_of(accurate) * full])
            table = full_table(accurate) if full else short_table(accurate)
            tables.append(("accuracy", title, *table))
        tables += measure_tables(group, by_domain=full)
    return tables


def short_table(records):
    """Return (headings, lines) of accuracies. If they are wider than WIDTH, differences are left
    out: to other methods than FLYP where it is compared, then of ID.
    """
    rows = rows_of(records)
    compared = comparisons(rows)
    means = (*MEANS[1:], "H mean")  # H is of ID and unseen, so it is not compared in its own right
    recalls = [key for key in records[0]["values"] if key.endswith("R@1")]  # without classes
    shown = recalls or ["ID"]
    shown += [key for key in means if any(key in r["values"] for r in records)]
    with_flyp = any(method == "flyp" for *_, method in compared)
    optional = [c for c in compared if with_flyp and c[2] != "flyp"]
    optional += [c for c in compared if c[0] == "ID"]
    while True:
        heads = ["method", *(SHORT.get(key, key) for key in shown)]
        heads += [f"{SHORT.get(key, key)}\n{heading}" for key, heading, _ in compared]
        lines = cells_of(rows, shown, compared)
        if not optional or sum(w + 2 for w in column_widths(heads, lines)) <= WIDTH + 2:
            return heads, lines
        compared.remove(optional.pop(0))


def full_table(records):
    """Return (headings, lines) of accuracies: all domains, differences, the means of each seed."""
    rows, source = rows_of(records), records[0]["source"]
    several = len({row.trained for row in rows if row.trained}) > 1
    compared = comparisons(rows)
    keys = [*dict.fromkeys(key for r in records for key in r["values"])]
    means = [key for key in MEANS[1:] if key in keys]
    # Of unseen classes in this data set's own domains, and of H, the mean is enough.
    by_domain = {f"{prefix} {key}" for prefix in ("unseen", "H") for key in keys}
    shown = [key for key in keys if key not in by_domain]
    errors = [f"ECE {key}" for key in MEANS]
    shown += [key for key in errors if any(values_of(seeds, key) for seeds in rows.values())]
    heads = ["method", *["trained"] * several]
    heads += [f"ID ({key})" if key == source else key for key in shown]
    headings = [f"{SHORT.get(key, key)} {heading}" for key, heading, _ in compared]
    heads += [heading.replace("\n", " ") for heading in headings]
    heads += [f"{key}, seed by seed" for key in means]
    return heads, cells_of(rows, shown, compared, several, means)


def schedules_of(records):
    """Return ["head: 200 epochs of batch 256, lr 0.001", …] of rows whose label does not say it."""
    texts = {}
    for r in records:
        if r["schedule"] and not {"epochs", "batch_size", "lr"} & {*r["options"]}:
            text = "{epochs} epochs of batch {batch_size}, lr {lr:g}".format(**r["schedule"])
            texts[f"{r['trained']}: {text}"] = None
    return [*texts]


def published(names):
    """Return [("published", title, markdown)]: what others measured on the data sets `names`."""
    return [
        ("published", entry["title"], markdown(entry["columns"], entry["rows"]))
        for entry in PUBLISHED if names & {*entry["datasets"]}
    ]


def column_widths(heads, lines):
    """Return the width of each column. A cell can have several lines."""
    columns = zip(heads, *lines)
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]


def aligned(heads, lines):
    """Return aligned columns, two spaces apart; if they are wider than WIDTH, the first is wrapped.
    """
    first, *widths = column_widths(heads, lines)
    first = min(first, max(10, WIDTH - sum(width + 2 for width in widths)))
    text = []
    for label, *cells in [heads, *lines]:
        blocks = [textwrap.wrap(label, first), *(cell.split("\n") for cell in cells)]
        for start, *parts in zip_longest(*blocks, fillvalue=""):
            text.append("  ".join([start.ljust(first), *map(str.rjust, parts, widths)]).rstrip())
    return "\n".join(text)


def markdown(heads, lines):
    """Return a markdown table of headings and lines of cells."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [heads, *lines]]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -------------------------------------------------------------------------------------------------
# Measures of synthesised features, captions, pairs, mappers


def measure_tables(records, by_domain):
    """Return [("measures", title, headings, lines)], a table of each kind in MEASURES.

    A line is about one method, in each domain or in the mean over domains.
    """
    tables = []
    for kind, title in MEASURES.items():
        part = [r for r in records if r["kind"] == kind]
        if not part:
            continue
        domains = [*dict.fromkeys(r.get("domain", "") for r in part)]
        split = by_domain and len(domains) > 1
        names = [*dict.fromkeys(name for r in part for name in r["values"])]
        heads = ["method", *["domain"] * split, *names]
        rows = {}  # {(method, domain if there are several): records}
        for r in sorted(part, key=lambda r: domains.index(r.get("domain", "")) if split else 0):
            key = (r["method"], r["domain"]) if split else (r["method"],)
            rows.setdefault(key, []).append(r)
        lines = [[*key, *(measure_cell(kind, of, n) for n in names)] for key, of in rows.items()]
        tables.append(("measures", f"{title}, {count_seeds(part)}", heads, lines))
    return tables


def measure_cell(kind, records, name):
    """Return the mean of one measure over domains and seeds, per cents with their deviation."""
    seeds = {}
    for r in records:
        if r["values"].get(name) is not None:
            seeds.setdefault(r["seed"], []).append(r["values"][name])
    means = [statistics.mean(values) for values in seeds.values()]
    if kind in ("synthesis", "captions") or not means:
        return mean_and_deviation(means)
    return f"{statistics.mean(means):.3f}".removesuffix(".000")


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="folders: runs/emoji-3d, docs/results/emoji-3d")
    parser.add_argument("--full", action="store_true",
                        help="markdown with every domain and every seed (default: only means)")
    args = parser.parse_args()
    for run in args.runs:
        records = read_records(run)
        print(markdown_table(records) if args.full else terminal_table(records), end="\n\n")


if __name__ == "__main__":
    main()
