"""The documents tell the truth: what is generated, what snippets print, where links lead."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from report import documents

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = [
    *ROOT.glob("*.md"), *ROOT.glob("results/**/*.md"), *ROOT.glob("emoji/*.md"),
]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("name", ["results", "choices"])
def test_generated_documents_are_what_the_command_writes(name):
    written = (ROOT / f"{name.upper()}.md").read_text()
    hint = "run: python -m report.documents"
    assert written == getattr(documents, f"{name}_document")(), hint


def test_all_results_are_shown():
    order = (ROOT / "results" / "order.txt").read_text().split()
    folders = [name for name in order if not name.endswith(".md")]
    assert sorted(folders) == sorted(p.parent.name for p in ROOT.glob("results/*/results.jsonl"))


def test_results_are_small():
    files = [path for path in ROOT.glob("results/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run_and_print_what_they_say(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "README.md", "exec"), {})
    assert out.getvalue().splitlines() == re.findall(r"^ *print\(.*\)  # (.+)$", snippet, re.M)


def test_there_are_snippets():
    assert SNIPPETS


@pytest.mark.parametrize("file", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    text = file.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    anchors += re.findall(r'name="(.+?)"', text)
    for link, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text):
        assert (file.parent / link).exists(), link
        assert link or anchor[1:] in anchors, anchor


def test_every_source_of_the_drawings_is_credited():
    """By its package, or the last part of its name, and its version, in emoji/README.md."""
    credits = (ROOT / "emoji" / "README.md").read_text()
    found = json.loads((ROOT / "emoji" / "tables.json").read_text())
    sources = {key.lower(): value for key, value in found.items()}["sources"]
    for source in sources.values() if isinstance(sources, dict) else sources:
        package, version, *_ = source.values() if isinstance(source, dict) else source
        short = package.split("/")[-1].removeprefix("fluent-emoji-")
        assert (package in credits or short in credits) and version in credits, package
