"""The README tells the truth: its tables come from the result files, its snippet prints what it says, its lists are whole."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import evaluate

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("results", sorted(p.parent for p in (ROOT / "results").glob("*/results.jsonl")), ids=lambda p: p.name)
def test_tables_are_what_the_command_prints(results):
    printed = evaluate.table(evaluate.read_results(results))
    blocks = [b for b in printed.split("\n\n") if b.startswith("|")]
    assert blocks and all(block.strip() in README for block in blocks)


@pytest.mark.parametrize("name", evaluate.PUBLISHED)
def test_published_numbers_stand_as_they_are_printed(name):
    printed = evaluate.table([{"dataset": name, "metric": "", "split": ""}])
    assert printed.count("|---") and printed.strip() in README


def test_the_snippet_prints_what_it_says():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(snippet, {})
    assert out.getvalue().strip() == snippet.strip().rsplit("# ", 1)[1]


def test_every_choice_is_listed():
    """One row of the table a `CHOICE:` in the code, under the file's name."""
    listed = re.findall(r"^\| (\w+\.py)[^|]* \| ", README.split("## Choices")[1].split("\n## ")[0], re.M)
    for file in ROOT.glob("*.py"):
        assert listed.count(file.name) == file.read_text().count("CHOICE:"), file.name


def test_files_it_links_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_source_is_credited():
    import emoji

    for name, (package, version, _) in emoji.SOURCES.items():
        short = package.split("/")[1].replace("fluent-emoji-high-contrast", "high-contrast")
        assert short in README and version in README, name
