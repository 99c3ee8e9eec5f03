"""Tables of what was measured, from records alone:

    python -m report.tables runs/emoji-3d              # short, at most 100 columns wide
    python -m report.tables runs/emoji-3d --full       # markdown: every domain, every seed
    python -m report.tables runs/emoji-3d --collect docs/results/emoji-3d.jsonl
"""

import json
import statistics
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from core.config import Parser
from core.methods import RECIPES, option_matters, parse_method
from core.results import read_records, write_records

WIDTH = 100
MEANS = ("ID", "OOD mean", "unseen mean")
SHORT = {"OOD mean": "OOD", "unseen mean": "unseen"}
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


def row_of(record):
    """Return the Row that a record is a seed of."""
    options = tuple(sorted(record["options"].items()))
    return Row(record["method"], record["trained"], options, record["alpha"])


def rows_of(records):
    """Return {Row: {seed: values}} of records of accuracy. The source's value is also "ID"."""
    rows = {}
    for r in records:
        values = {"ID": r["values"].get(r["source"]), **r["values"]}
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
    def agrees(other):
        options, expected = dict(other.options), dict(row.options)
        common = [k for k in {**options, **expected} if row.trained and applies(k, row.method)]
        return all(options.get(k) == expected.get(k) for k in common if applies(k, method))

    ranked = {}
    for other in rows:
        if (other.method, other.alpha) == (method, row.alpha) and other != row and agrees(other):
            rank = other.trained != row.trained, len({*other.options} - {*row.options})
            ranked.setdefault(rank, []).append(other)
    best = ranked[min(ranked)] if ranked and method != row.method else []
    return best[0] if len(best) == 1 else None


def difference(rows, row, other, key):
    """Return the values of `row` minus those of `other`, of the seeds that both have."""
    if other is None:
        return []
    pairs = [
        (rows[row][seed].get(key), rows[other][seed].get(key))
        for seed in rows[row] if seed in rows[other]
    ]
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


def cells_of(rows, shown, compared, with_trained, raw=()):
    """Return a line of cells for each row: label, means, differences; of keys in `raw` each seed.

    Without the column "trained", labels that are not unique name it.
    """
    common, lines = common_options(rows), []
    means = {*MEANS[1:], "extended"}  # without a domain there is no mean in any row
    empty = {key for key in means if not any(values_of(seeds, key) for seeds in rows.values())}
    labels = [row.label(common) for row in rows]
    for label, (row, seeds) in zip(labels, rows.items()):
        if labels.count(label) > 1 and not with_trained:
            label += f" ({row.trained})"
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


def accuracies(records):
    """Return the records of accuracy at α = 0.5 and 1; others are points of a curve."""
    return [r for r in records if r["kind"] == "accuracy" and r["alpha"] in (0.5, 1)]


# -------------------------------------------------------------------------------------------------
# For the terminal


def terminal_table(records):
    """Return tables at most WIDTH columns wide: means, and the differences that matter."""
    parts = []
    for group in groups(records):
        if accurate := accuracies(group):
            parts += [title_of(accurate), short_table(accurate)]
        for title, heads, lines in measure_tables(group, by_domain=False):
            parts += [title, aligned(heads, lines)]
    parts[::2] = [textwrap.fill(title, WIDTH) for title in parts[::2]]
    return "\n\n".join(parts)


def short_table(records):
    """Return one aligned table of accuracies: as much of it as fits into WIDTH."""
    rows = rows_of(records)
    several = len({row.trained for row in rows if row.trained}) > 1
    shown = ["ID", *(k for k in MEANS[1:] if any(k in r["values"] for r in records))]
    compared = comparisons(rows)
    main = [c for c in compared if c[2] == "flyp"] or compared
    without_id = [c for c in main if c[0] != "ID"]
    layouts = [(several, compared), (several, main), (several, without_id), (False, without_id)]
    for with_trained, columns in layouts:
        heads = ["method", *["trained"] * with_trained, *(SHORT.get(key, key) for key in shown)]
        heads += [f"{SHORT.get(key, key)}\n{heading}" for key, heading, _ in columns]
        lines = cells_of(rows, shown, columns, with_trained)
        if table_width(heads, lines) <= WIDTH:
            break
    return aligned(heads, lines)


def column_widths(heads, lines):
    """Return the width of each column. A cell can have several lines."""
    columns = zip(heads, *lines)
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]


def table_width(heads, lines):
    """Return the width of the aligned table, two spaces between columns."""
    return sum(width + 2 for width in column_widths(heads, lines)) - 2


def aligned(heads, lines):
    """Return aligned columns; if they are wider than WIDTH, the first is wrapped."""
    widths = column_widths(heads, lines)
    excess = max(0, table_width(heads, lines) - WIDTH)
    widths[0] = max(widths[0] - excess, min(widths[0], 10))
    text = []
    for cells in [heads, *lines]:
        blocks = [textwrap.wrap(cells[0], widths[0]), *(cell.split("\n") for cell in cells[1:])]
        for parts in zip_longest(*blocks, fillvalue=""):
            numbers = [part.rjust(width) for part, width in zip(parts[1:], widths[1:])]
            text.append("  ".join([parts[0].ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(text)


# -------------------------------------------------------------------------------------------------
# In full, as markdown


def markdown_table(records):
    """Return all tables in markdown, and what others published on these data sets."""
    return "\n\n".join(f"{title}:\n\n{table}" for _, title, table in full_tables(records))


def full_tables(records):
    """Return [(kind, title, markdown)]: accuracies, then measures, then published numbers."""
    tables = []
    for group in groups(records):
        if accurate := accuracies(group):
            title = [title_of(accurate), *schedules_of(accurate)]
            tables.append(("accuracy", "; ".join(title), full_table(accurate)))
        for title, heads, lines in measure_tables(group, by_domain=True):
            tables.append(("measures", title, markdown(heads, lines)))
    return tables + published({r["dataset"] for r in records})


def full_table(records):
    """Return markdown of accuracies: all domains, differences, and the means of each seed."""
    rows, source = rows_of(records), records[0]["source"]
    several = len({row.trained for row in rows if row.trained}) > 1
    compared = comparisons(rows)
    keys = [*dict.fromkeys(key for r in records for key in r["values"])]
    means = [key for key in MEANS[1:] if key in keys]
    # Of unseen classes in this data set's own domains, the mean is enough.
    shown = [key for key in keys if key.removeprefix("unseen ") not in {*keys} - {key}]
    heads = ["method", *["trained"] * several]
    heads += [f"ID ({key})" if key == source else key for key in shown]
    headings = [f"{SHORT.get(key, key)} {heading}" for key, heading, _ in compared]
    heads += [heading.replace("\n", " ") for heading in headings]
    heads += [f"{key}, seed by seed" for key in means]
    return markdown(heads, cells_of(rows, shown, compared, several, means))


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


def markdown(heads, lines):
    """Return a markdown table of headings and lines of cells."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [heads, *lines]]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -------------------------------------------------------------------------------------------------
# Measures of synthesised features, captions, pairs, mappers


def measure_tables(records, by_domain):
    """Return [(title, headings, lines)], a table of each kind in MEASURES.

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
        lines = []
        for domain in domains if split else [""]:
            own = [r for r in part if not split or r.get("domain", "") == domain]
            for method in dict.fromkeys(r["method"] for r in own):
                of_method = [r for r in own if r["method"] == method]
                cells = [measure_cell(kind, of_method, name) for name in names]
                lines.append([method, *[domain] * split, *cells])
        heads = ["method", *["domain"] * split, *names]
        tables.append((f"{title}, {count_seeds(part)}", heads, lines))
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
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or .jsonl files")
    parser.add_argument("--full", action="store_true", help="markdown: every domain, every seed")
    parser.add_argument("--collect", metavar="FILE", help="write all records into one .jsonl file")
    args = parser.parse_args()
    runs = [read_records(run) for run in args.runs]
    if args.collect:
        write_records([r for records in runs for r in records], args.collect)
        print(f"wrote {args.collect}")
        return
    for records in runs:
        print(markdown_table(records) if args.full else terminal_table(records), end="\n\n")


if __name__ == "__main__":
    main()
