"""Write the tables of docs/results/ into docs/RESULTS.md, between the comments that mark them:

    python -m report.document

The text of the page is written by hand. A typed table would not follow its records.
"""

import re

from core.artifacts import write_atomically
from core.config import Parser
from core.results import read_records
from core.utils import ROOT
from report.tables import PUBLISHED, full_tables, published

PAGE = ROOT / "docs/RESULTS.md"
MARKED = re.compile(r"<!-- tables: (\S+) -->\n.*?<!-- end of tables -->", re.S)


def with_tables(text):
    """Return the page's text with the tables of today's records between its marks."""
    def marked(match):
        tables = "\n\n".join(tables_of(match[1]))
        return f"<!-- tables: {match[1]} -->\n\n{tables}\n\n<!-- end of tables -->"

    return MARKED.sub(marked, text)


def tables_of(name):
    """Return the markdown of each table of a file of records; measures are folded."""
    if name == "published":
        names = {name for entry in PUBLISHED for name in entry["datasets"]}
        return [f"{title}:\n\n{table}" for _, title, table in published(names)]
    parts = []
    for kind, title, table in full_tables(read_records(ROOT / name)):
        if kind == "accuracy":
            parts.append(f"{title}:\n\n{table}")
        elif kind == "measures":
            parts.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    return parts


if __name__ == "__main__":
    Parser(description=__doc__.split("\n")[0]).parse_args()
    text = with_tables(PAGE.read_text(encoding="utf-8"))
    write_atomically(PAGE, lambda part: part.write_text(text, encoding="utf-8"))
