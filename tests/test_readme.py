"""The documents agree with the code: snippets, commands, flags, links, numbers, choices, files."""

import ast
import contextlib
import io
import json
import re
import statistics
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from batches import Batch
from core.config import make_parser
from core.methods import RECIPES, TRAINED, parse_method, parse_recipe
from core.results import read_records
from finetune import arf_losses, ldfs_losses
from mapper import ldfs_loss
from sets.describe import OWN_KEYS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("emoji/*.md")]
SNIPPETS = [
    snippet for path in DOCUMENTS for snippet in re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
]
SNIPPET = SNIPPETS[0]  # of the README
STAGES = "run_ldfs.sh", "run_arf.sh", "run.py", "anchors.py", "mapper.py", "finetune.py", "evaluate.py"
STAGE_FLAGS = {flag for action in make_parser()._actions for flag in action.option_strings}


def relative(path):
    return str(path.relative_to(ROOT))


def section(text, heading):
    """Return what a document says below a heading, up to the next one."""
    return re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def table(text):
    """Return the rows of the first table in a text, without its head, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def files():
    """Return the paths that belong to the repository, tracked or not, but not ignored."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.splitlines() if (ROOT / path).exists()]


@pytest.mark.parametrize("path", [ROOT / "README.md", *ROOT.glob("docs/*.md")], ids=relative)
def test_documents_are_short(path):
    limit = {"README.md": 150, "RESULTS.md": 250}.get(path.name, 120)
    assert len(path.read_text().splitlines()) <= limit


def test_the_first_paragraph_names_the_two_files_to_read():
    first = README.split("\n\n")[1]
    assert "[mapper.py](mapper.py)" in first and "[finetune.py](finetune.py)" in first


# -------------------------------------------------------------------------------------------------
# Snippets


def run(snippet):
    """Execute a snippet; return its variables and what it prints."""
    variables, out = {}, io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "snippet", "exec"), variables)
    return SimpleNamespace(**variables), out.getvalue().splitlines()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run_and_print_what_their_comments_say(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, printed = run(snippet)
    assert printed == re.findall(r"^ *print\(.*\)  # (.+)$", snippet, re.M)


def test_the_snippet_of_ldfs_is_what_the_code_computes(monkeypatch):
    def reproducible_noise(text, sigma, generator=None):
        return F.normalize(text + sigma * 5 * text.roll(1, 0), dim=-1)

    for module in ("losses", "mapper"):
        monkeypatch.setattr(f"{module}.stochastic_text", reproducible_noise)
    v, _ = run(SNIPPET)
    recipe = parse_recipe("ldfs")
    inputs = v.mapper, v.z, v.labels, v.photo, v.sketch, v.class_text
    terms = ldfs_loss(*inputs, recipe, generator=None)
    torch.testing.assert_close(v.loss_1, sum(terms.values()))
    strategy = SimpleNamespace(mappers={"sketch": v.mapper}, head_for=lambda batch: v.head)
    terms = ldfs_losses(strategy, Batch(v.labels, torch.stack([v.z, v.mapper(v.z)])))
    torch.testing.assert_close(v.loss_2, sum(terms.values()))
    v.loss_1.backward()
    v.loss_2.backward()


def test_the_snippet_of_arf_is_what_the_code_computes():
    v, _ = run(SNIPPET)
    clip = SimpleNamespace(
        model=SimpleNamespace(logit_scale=torch.tensor(100.0).log()),
        encode_image=lambda x: F.normalize(v.image_tower(x), dim=-1),
        encode_text=lambda x: F.normalize(v.text_tower(x), dim=-1),
    )
    n = len(v.images)
    batch = Batch(
        torch.zeros(n), images=v.images, prompts=v.prompts, captions=v.captions,
        pool_images=v.pool_images, pool_texts=v.pool_texts, n_pairs=n,
    )
    torch.testing.assert_close(v.loss, sum(arf_losses(clip, batch).values()))
    v.loss.backward()


# -------------------------------------------------------------------------------------------------
# Commands, flags and names


def commands(text):
    """Return the words of each command of ours in a document's code."""
    code = [line for line in text.splitlines() if line.startswith("    ")]
    code += re.findall(r"`([^`\n]+)`", text)
    pattern = r"(?:bash|torchrun|python3?|launch|srun)\b.*"
    lines = [match[0] for line in code if (match := re.search(pattern, line.split("#")[0]))]
    return [line.replace("…", "").split() for line in lines if "scontrol" not in line]


COMMANDS = [
    pytest.param(words, id=f"{relative(path)}-{' '.join(words)}"[:100])
    for path in DOCUMENTS for words in commands(path.read_text())
]


def parsed(words):
    """Return (source file, arguments) of a command, (None, []) if it runs no file of ours."""
    for i, word in enumerate(words):
        if word == "-m":
            module = ROOT / words[i + 1].replace(".", "/")
            file = module.with_suffix(".py") if module.with_suffix(".py").exists() else (
                module / "__main__.py"
            )
            return file, words[i + 2:]
        if re.search(r"\.(py|sh)$", word):
            return ROOT / word, words[i + 1:]
    return None, []


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_name_files_and_flags_that_exist(words):
    file, arguments = parsed(words)
    if file is None:
        pytest.skip("runs no file of this repository")
    assert file.exists()
    flags = {word for word in arguments if word.startswith("--")}
    if file.name not in STAGES:
        sources = "".join(path.read_text() for path in file.parent.glob("*.py"))
        assert all(f'"{flag}"' in sources for flag in flags)
        return
    assert flags <= STAGE_FLAGS
    positional = arguments[1:] if file.name == "anchors.py" else arguments
    for name in positional[:1]:
        described = (ROOT / "sets" / f"{name}.json").exists()
        assert described or name.startswith("-") or name.isupper()
    if "--methods" in arguments:
        names = " ".join(arguments[arguments.index("--methods") + 1:]).split(" --")[0].split()
        assert all(parse_method(name) for name in names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_flags_in_the_text_exist(path):
    sources = "".join(
        (ROOT / file).read_text() for file in files()
        if file.endswith(".py") and not file.startswith("tests/")
    )
    code = [words for part in re.findall(r"`([^`\n]+)`", path.read_text()) for words in part.split()]
    for flag in (word for word in code if re.fullmatch(r"--[a-z-]+", word)):
        assert flag in STAGE_FLAGS or f'"{flag}"' in sources, flag


def test_methods_and_strategies_in_the_questions_exist():
    text = section((ROOT / "docs/FAQ.md").read_text(), "Methods and flags")
    names = [name for row in table(text) for name in re.findall("`([^`]+)`", row[0])]
    assert all(parse_method(name) for name in names) and {*RECIPES, "arf", "flyp"} <= {*names}
    trained = re.findall(r"`(\w+)` \(", text)
    assert {*trained} == {*TRAINED} - {"lpft"}


def test_the_table_of_methods_names_functions_that_exist():
    rows = table(section(README, "The methods as code"))
    assert len(rows) >= 7
    for _, place, _ in rows:
        file, function = re.fullmatch(r"(\S+\.py) `(\w+)`", place).groups()
        tree = ast.parse((ROOT / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_tree_of_files_is_complete():
    lines = re.findall(r"^    (\S+)  +\S", section(README, "Files"), re.M)
    assert all((ROOT / name).exists() for name in lines)
    assert all(name.endswith("/") == (ROOT / name).is_dir() for name in lines)
    tracked = files()
    at_root = {path for path in tracked if "/" not in path and path.endswith((".py", ".ipynb"))}
    folders = {path.split("/")[0] + "/" for path in tracked if "/" in path}
    folders -= {".ci/", ".github/"}
    assert {*lines} == at_root | folders


def test_the_keys_of_a_description_are_documented():
    text = section((ROOT / "docs/DATA.md").read_text(), "Your own data")
    assert {row[0].strip("`") for row in table(text)} == OWN_KEYS


def test_the_published_counts_are_those_of_the_descriptions():
    rows = table(section((ROOT / "docs/DATA.md").read_text(), "Data sets"))
    for name, domains, _, counts in rows:
        file = ROOT / "sets" / f"{name.strip('`')}.json"
        if not file.exists():
            continue
        meta = json.loads(file.read_text())
        assert set(meta["phrases"]) == set(re.split("[,;] ", domains)) or domains == "the same"
        numbers = [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", counts)]
        published = [*meta.get("counts", {}).values()]
        assert not published or numbers == published or sum(published) in (numbers[0], sum(numbers))


# -------------------------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("file", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(file):
    def anchors(text):
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        return slugs + re.findall(r'name="(.+?)"', text)

    for link, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", file.read_text()):
        target = file.parent / link if link else file
        assert target.exists(), link
        assert not anchor or anchor[1:] in anchors(target.read_text()), anchor


def test_every_source_of_the_drawings_is_credited():
    """By its package, or the last part of its name, and its version, in emoji/README.md."""
    credits = (ROOT / "emoji" / "README.md").read_text()
    tables = json.loads((ROOT / "emoji" / "tables.json").read_text())
    sources = {key.lower(): value for key, value in tables.items()}["sources"]
    for source in sources.values() if isinstance(sources, dict) else sources:
        package, version, *_ = source.values() if isinstance(source, dict) else source
        short = package.split("/")[-1].removeprefix("fluent-emoji-")
        assert (package in credits or short in credits) and version in credits, package


# -------------------------------------------------------------------------------------------------
# Numbers


def mean_of(run, method, key, seeds=5, trained=None):
    """Return the mean ± deviation over seeds of a method's value in docs/results, at α = 1; "–" if it has none, None
    if the run has no such method, or trains something else.
    """
    records = [
        r for r in read_records(ROOT / "docs/results" / run)
        if r["kind"] == "accuracy" and r["method"] == method and r["alpha"] == 1
        and not r["options"] and r["seed"] < seeds and trained in (None, r["trained"] or "nothing")
    ]
    if not records:
        return None
    values = [r["values"][key] for r in records if key in r["values"]]
    if not values:
        return "–"
    assert len(values) == seeds
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if seeds > 1 else mean


@pytest.mark.parametrize("row", table(section(README, "Results")), ids=lambda row: row[0])
def test_the_results_are_those_of_the_rows(row):
    method, trained, *numbers = (cell.strip("`") for cell in row)
    [listed] = re.findall("<!-- table (.*?) -->", section(README, "Results"))
    parts = [part.split(": ") for part in listed.split("; ")]
    runs = [run for run, methods in parts if method in methods.split(", ")]
    assert runs and 2 <= len(numbers) <= 5
    for key, number in zip(("3d", "OOD mean", "unseen mean"), numbers):
        [expected] = filter(None, (mean_of(run, method, key, trained=trained) for run in runs))
        assert number == expected


def test_what_the_laptop_should_give_is_what_the_rows_say():
    part = section(README, "Quick start")
    for method, run, seeds in (("ldfs", "emoji-3d", 3), ("lads", "emoji-3d", 3), ("arf", "emoji-3d-arf", 1)):
        [line] = re.findall(rf"^    {method}  +(.*)", part, re.M)
        expected = [mean_of(run, method, key, seeds) for key in ("3d", "OOD mean")]
        assert re.split("  +", line)[:2] == expected


def test_the_summary_of_results_is_short():
    text = (ROOT / "docs/RESULTS.md").read_text()
    assert text.count("![") <= 5
    for part in re.findall(r"<!-- table .*?<!-- end -->", text, re.S):
        assert len(table(part)) <= 10


def test_every_run_is_listed_with_its_commands_and_tables():
    folders = {path.parent for path in ROOT.glob("docs/results/*/rows.jsonl")}
    listed = re.findall(r"^\| \[(\S+)\]\(\1/README.md\)", (ROOT / "docs/results/README.md").read_text(), re.M)
    assert {folder.name for folder in folders} == {*listed} and len(listed) == len(folders)
    for folder in folders:
        page = (folder / "README.md").read_text()
        assert commands(page) and "<!-- tables -->" in page, folder.name


def test_rows_are_small():
    assert sum(path.stat().st_size for path in ROOT.glob("docs/results/*/rows.jsonl")) < 2e6


# -------------------------------------------------------------------------------------------------
# Choices


def test_every_choice_is_listed():
    """Each file has as many rows in docs/CHOICES.md as CHOICE marks."""
    marks = {}
    for file in files():
        if file.endswith(".py") and not file.startswith("tests/"):
            count = len(re.findall(r"^[ #]*CHOICE:", (ROOT / file).read_text(), re.M))
            if count:
                marks[file] = count
    rows = re.findall(r"^\| \[(\S+\.py)\]", (ROOT / "docs/CHOICES.md").read_text(), re.M)
    assert {file: rows.count(file) for file in {*rows, *marks}} == marks


@pytest.mark.parametrize("row", re.findall(
    r"^\| \[(\S+\.py)\]\(\.\./(\S+)\) `([\w.]+)` \|", (ROOT / "docs/CHOICES.md").read_text(), re.M
), ids=lambda row: f"{row[0]} {row[2]}")
def test_choices_name_what_is_in_the_file(row):
    file, link, name = row
    assert file == link
    pattern = rf"(?:def|class) {name.split('.')[-1]}\b|^\w*,?.*\b{name}\b.*="
    assert re.search(pattern, (ROOT / file).read_text(), re.M)
