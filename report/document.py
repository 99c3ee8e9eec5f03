"""Write tables of the rows in docs/results/ into the documents:

    python -m report.document                                  # after rows have changed
    python -m report.document --add runs/emoji-3d emoji-3d     # the rows of docs/results/emoji-3d

A document is written by hand, except for what is between a mark and its end:

    <!-- tables -->      all tables of the rows beside the document
    <!-- table … -->     a line for each method that is listed: "emoji-3d: finetune, ldfs; RUN: …"
    <!-- output … -->    the same as `report.tables` prints it: "seeds: 3; emoji-3d: finetune, ldfs"
    <!-- claims -->      a table whose cells "verdict" and "difference" follow from its cell "of"
    <!-- published -->   what others measured
    <!-- speed … -->     a table of `python -m benchmark --out docs/results/speed.json`
    <!-- end -->

The pictures that docs/results/NAME/README.md shows are drawn from the rows, or copied by --add.
"""

import re
import shutil
import statistics
import textwrap
from pathlib import Path

from core.artifacts import load, write_atomically
from core.config import Parser
from core.results import ROWS, read_records, write_records
from core.utils import ROOT, fail
from report import figures
from report.tables import (
    MEANS,
    PUBLISHED,
    full_tables,
    labels_of,
    markdown,
    mean_and_deviation,
    published,
    rows_of,
    terminal_table,
    values_of,
)

RESULTS = ROOT / "docs/results"
MARK = re.compile(
    r"(<!-- (tables|table|output|claims|published|speed)\b(.*?)-->\n)(.*?)<!-- end -->", re.S
)
PICTURE = re.compile(r"!\[.*?\]\(([^/)]+\.png)\)")
CLAIM = re.compile(r"\[(\S+)\]\(\S+\) (.+): (.+) less (.+)")
NEW = "# {name}\n\n<!-- tables -->\n<!-- end -->\n"


def documents():
    """Return the paths of all documents that can have marks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text, folder):
    """Return a document's text with the tables of today's rows between its marks.

    folder: of the document, for <!-- tables -->.
    """
    def written(match):
        mark, kind, listed, content = match.groups()
        if kind == "tables":
            content = run_tables(read_records(folder))
        elif kind == "table":
            content = listed_table(*parse_list(listed))
        elif kind == "output":
            return f"{mark}{output(*parse_list(listed))}\n<!-- end -->"
        elif kind == "claims":
            content = with_verdicts(content.strip())
        elif kind == "speed":
            content = speed_table(listed.strip())
        else:
            names = {name for entry in PUBLISHED for name in entry["datasets"]}
            content = titled(published(names))
        return f"{mark}\n{content}\n\n<!-- end -->"

    return MARK.sub(written, text)


def run_tables(records):
    """Return the markdown of all tables of a run, without published numbers."""
    return titled(table for table in full_tables(records) if table[0] != "published")


def titled(tables):
    """Return [(kind, title, table)] as one markdown text."""
    return "\n\n".join(f"{title}:\n\n{table}" for _, title, table in tables)


# -------------------------------------------------------------------------------------------------
# Short tables


def parse_list(text):
    """Return ([(run, labels)], {setting: value}) of a mark's "RUN: LABEL, LABEL; RUN: LABEL".

    Settings are "columns" (keys of the values, separated by commas) and "seeds" (a number).
    """
    parts = [part.strip().split(": ", 1) for part in re.split("[;\n]", text.strip())]
    settings = {name: value for name, value in parts if name in ("columns", "seeds")}
    return [(run, labels.split(", ")) for run, labels in parts if run not in settings], settings


def accuracies(run):
    """Return {label: (Row, {seed: values})} of a run in docs/results."""
    rows = rows_of(r for r in read_records(RESULTS / run) if r["kind"] == "accuracy")
    return dict(zip(labels_of(rows), rows.items()))


def find(rows, label, run):
    """Return the entry of a label; exit with status 2 if there is none."""
    return rows[label] if label in rows else fail(
        f"docs/results/{run} has no row {label!r}. It has: {', '.join(rows)}."
    )


def listed_table(runs, settings):
    """Return a markdown table: method, what is trained, and the mean and deviation of each column.
    """
    chosen = []
    for run, labels in runs:
        rows = accuracies(run)
        chosen += [(label, *find(rows, label, run)) for label in labels]
    columns = settings["columns"].split(", ") if "columns" in settings else [
        key for key in MEANS if any(values_of(seeds, key) for *_, seeds in chosen)
    ]
    lines = [
        [f"`{label}`", row.trained or "nothing"]
        + [mean_and_deviation(values_of(seeds, key)) or "–" for key in columns]
        for label, row, seeds in chosen
    ]
    return markdown(["method", "trained", *columns], lines)


def output(runs, settings):
    """Return the lines that `report.tables` prints of the listed rows, without the title."""
    [(run, labels)] = runs
    rows, records = accuracies(run), read_records(RESULTS / run)
    listed = [find(rows, label, run)[0] for label in labels]
    text = terminal_table([
        r for r in records if r["kind"] == "accuracy" and r["seed"] < int(settings["seeds"])
        and [*rows_of([r])][0] in listed
    ])
    return textwrap.indent(text.split("\n\n", 1)[1], "    ")


def speed_table(title):
    """Return the markdown of one table of docs/results/speed.json, and what it was measured on."""
    content = load(RESULTS / "speed.json")
    rows = content["tables"][title]
    columns = [*dict.fromkeys(column for row in rows for column in row)]
    values = [[row.get(column, "") for column in columns] for row in rows]
    about = ", ".join(f"{key} {value}" for key, value in content.items() if key != "tables")
    lines = [[number_text(value) for value in line] for line in values]
    return f"{markdown(columns, lines)}\n\nMeasured on: {about}."


def number_text(value):
    """Return a number with three digits, or more before the point; other values as they are."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------
# Claims


def with_verdicts(table):
    """Return a markdown table of claims with today's verdicts and differences.

    The cell "of" names a run, a measure and two methods: "[RUN](…) OOD mean: `ldfs` less `lads`".
    """
    heads, rule, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    for cells in lines:
        row = dict(zip(heads, cells))
        run, measure, *labels = CLAIM.fullmatch(row["of"].replace("`", "")).groups()
        verdict, difference = judge(run, measure, *labels)
        cells[heads.index("verdict")], cells[heads.index("difference")] = verdict, difference
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def judge(run, measure, label, rival):
    """Return (verdict, "+2.5 ± 0.9, in 5 of 5 seeds") of the claim that one method is ahead."""
    values, rival_values = (seed_values(run, measure, name) for name in (label, rival))
    differences = [values[seed] - rival_values[seed] for seed in values if seed in rival_values]
    ahead = sum(x > 0 for x in differences)
    verdict = "reproduced" if ahead == len(differences) else "not reproduced"
    if all(x < 0 for x in differences):
        verdict = "the opposite"
    deviation = statistics.stdev(differences)
    number = f"{statistics.mean(differences):+.1f} ± {deviation:.1f}"
    return verdict, f"{number}, {ahead} of {len(differences)} seeds"


def seed_values(run, measure, label):
    """Return {seed: value} of a method's measure; of synthesised features, the mean over domains.
    """
    rows = accuracies(run)
    if any(measure in values for _, seeds in rows.values() for values in seeds.values()):
        _, seeds = find(rows, label, run)
        return {seed: values[measure] for seed, values in seeds.items()}
    measured = {}
    for r in read_records(RESULTS / run):
        if r["method"] == label and measure in r["values"]:
            measured.setdefault(r["seed"], []).append(r["values"][measure])
    if not measured:
        fail(f"docs/results/{run} has no {measure!r} of {label!r}.")
    return {seed: statistics.mean(values) for seed, values in measured.items()}


# -------------------------------------------------------------------------------------------------
# Rows and pictures of a run


def add(folders, name):
    """Store the records of run folders as the rows of docs/results/NAME, and copy the pictures that
    its README.md shows.
    """
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    write_records([r for run in folders for r in read_records(run)], folder / ROWS)
    page = folder / "README.md"
    if not page.exists():
        page.write_text(NEW.format(name=name), encoding="utf-8")
    for picture in pictures(page):
        for run in folders:
            if (source := Path(run, picture.name)).exists():
                shutil.copyfile(source, picture)


def pictures(page):
    """Return the paths of the pictures beside a document that it shows."""
    return [page.parent / name for name in PICTURE.findall(page.read_text("utf-8"))]


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--add", nargs="+", metavar=("RUN", "NAME"),
                        help="first replace the rows of docs/results/NAME by those of these run "
                        "folders (default: no rows are replaced)")
    args = parser.parse_args()
    if args.add:
        *folders, name = args.add
        if not folders or "/" in name:
            parser.error("--add takes run folders and a name: --add runs/emoji-3d emoji-3d")
        add(folders, name)
    for page in documents():
        text = with_tables(page.read_text(encoding="utf-8"), page.parent)
        write_atomically(page, lambda part: part.write_text(text, encoding="utf-8"))
        for picture in pictures(page):
            if picture.stem in figures.OF_RECORDS:
                figures.OF_RECORDS[picture.stem](read_records(page.parent), picture)


if __name__ == "__main__":
    main()
