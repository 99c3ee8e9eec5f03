"""Write RESULTS.md, from results/ and the notes that lie there, and CHOICES.md, from the code:

    python -m report.documents

results/order.txt names folders, and notes without any, in their order; what is indented there is
folded.
"""

import ast
import re
from utils import ROOT, write_atomically

from report import tables
from report.results import read

FIRST = ["losses.py", "mapper.py", "anchors.py", "finetune.py", "evaluate.py"]  # as one reads them
# a docstring, comments in lines of their own, or one behind code
BLOCK = re.compile(r'(?s:""".+?""")|(?m:^ *#.*\n)+|#.*')
# up to the end of the sentence, or of the comment
CHOICE = re.compile(r"CHOICE[:] (.+?); alternative: (.+?)\.?(?= CHOICE[:]|\.\s+[A-Z]|$)")


def results_document():
    """RESULTS.md: of each folder its notes, and the tables, folded if not of accuracy."""
    folder = ROOT / "results"
    text = notes(folder / "notes.md")
    for name in (folder / "order.txt").read_text().splitlines():
        if name.endswith(".md"):
            text += notes(folder / name)
            continue
        run = folder / name.strip()
        title, _, section = notes(run / "notes.md").partition("\n")
        rows = read(run)
        for measure, heading, table in tables.blocks(rows) + tables.counts(rows):
            accuracy = measure == "accuracy"
            section += f"{heading}:\n\n{table}\n\n" if accuracy else fold(heading, table)
        title = title.removeprefix("# ")
        text += fold(title, section) if name.startswith(" ") else f"## {title}\n{section}"
    text += notes(folder / "published.md")
    names = {name for entry in tables.PUBLISHED for name in entry["datasets"]}
    for _, heading, table in tables.published(names):
        text += f"{heading}:\n\n{table}\n\n"
    return text.rstrip() + "\n"


def notes(path):
    """Prose, its links as seen from the repository's root."""
    return re.sub(r"\]\((\.\./)+", "](", path.read_text(encoding="utf-8").strip()) + "\n\n"


def fold(summary, text):
    return f"<details><summary>{summary}</summary>\n\n{text.strip()}\n\n</details>\n\n"


def choices_document():
    """CHOICES.md: what stands marked in the comments and docstrings of all files but the tests."""
    paths, lines = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]), []
    paths = [path for path in paths if path.parent.name != "tests"]
    for path in dict.fromkeys([*(ROOT / name for name in FIRST), *paths]):
        file = path.relative_to(ROOT)
        for place, *choice in choices(path.read_text(encoding="utf-8")):
            lines.append([f"[{file}]({file}) `{place}`", *choice])
    intro = "What the papers leave open, and how it is settled here; marked in the code."
    return f"# Choices\n\n{intro}\n\n{tables.markdown(['where', 'choice', 'alternative'], lines)}\n"


def choices(code):
    """[(function or constant, choice, alternative)] in a file's text."""
    tree, found = ast.parse(code), []
    for block in BLOCK.finditer(code):
        line = code.count("\n", 0, block.start()) + 1
        text = re.sub(r"^ *# ?", "", block[0].strip('"'), flags=re.MULTILINE)
        for paragraph in text.split("\n\n"):
            for choice in CHOICE.findall(" ".join(paragraph.split())):
                found.append((place_of(tree, line), *choice))
    return found


def place_of(tree, line):
    """The function or class around a line, or what is defined next after it."""
    named = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    names = [node.name for node in named if node.lineno <= line <= node.end_lineno]
    following = next(node for node in tree.body if node.end_lineno >= line)
    return ".".join(names) or getattr(following, "name", "") or ast.unparse(following.targets[0])


if __name__ == "__main__":
    for file, text in (("RESULTS.md", results_document()), ("CHOICES.md", choices_document())):
        write_atomically(ROOT / file, lambda part: part.write_text(text, encoding="utf-8"))
