"""walkthrough.ipynb: committed as it should be, and running from its first cell to its last."""

import json
import re

import matplotlib
import pytest
from conftest import ROOT

from core.config import parse
from core.methods import parse_method

FILE = ROOT / "walkthrough.ipynb"
CELLS = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}
TEXT = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def test_it_is_a_notebook_without_outputs():
    """Its format is 4.5, in which each cell has an id, and it is written as Jupyter writes it."""
    notebook = json.loads(FILE.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert FILE.stat().st_size < 200_000
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert FILE.read_text(encoding="utf-8") == text
    ids = [cell["id"] for cell in CELLS]
    assert len({*ids}) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in CELLS:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
            keys |= {"outputs", "execution_count"}
        assert {*cell} == keys and cell["cell_type"] in ("code", "markdown"), cell["id"]


def test_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)


def test_its_reading_order_is_the_readme_s():
    files = ["losses.py", "mapper.py", "anchors.py", "finetune.py", "evaluate.py"]
    assert re.findall(r"^## (\w+\.py)", TEXT, re.M) == files


def test_the_setting_for_a_gpu_can_be_run():
    """Its flags exist, and no method needs a pool, for which a free machine has no room."""
    settings = {}
    exec(CODE["settings"] + "\n" + CODE["pacs"].replace("PACS = False", "PACS = True"), settings)
    assert (settings["DATASET"], settings["SOURCE"]) == ("pacs", "photo")
    argv = [settings["DATASET"], settings["SOURCE"], *settings["FLAGS"].split()]
    methods = [parse_method(name) for name in parse("", argv).methods]
    assert methods and not any(method.retrieved for method in methods)


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Run all code cells in one namespace, as a kernel would: walk(data, *flags) -> (the namespace,
    what the cells display), on "tiny" beside a clone of the repository.
    """
    matplotlib.use("Agg")

    def call(tiny_data, *flags):
        displayed, flags = [], [*flags, "--data", tiny_data, "--run", tmp_path / "run"]

        def display(content):
            content._repr_html_() if hasattr(content, "_repr_html_") else content._repr_png_()
            displayed.append(content)

        (tmp_path / "clone").symlink_to(ROOT)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["kernel"])
        monkeypatch.setenv("TQDM_DISABLE", "")  # monkeypatch restores it after the test
        monkeypatch.syspath_prepend(ROOT)  # likewise
        tiny = f'DATASET, SOURCE, FLAGS = "tiny", "photo", {" ".join(map(str, flags))!r}'
        names = {"display": display}
        for name, code in {**CODE, "settings": tiny}.items():
            exec(compile(code, f"walkthrough.ipynb, {name}", "exec"), names)
        return names, displayed

    yield call
    matplotlib.pyplot.close("all")


def test_it_runs(walk, tiny_data, tiny_clip, tiny_pool, tmp_path, capsys):
    methods = ["finetune", "lads", "ldfs", "flyp", "arf"]
    names, displayed = walk(
        tiny_data, "--model", tiny_clip, "--pool", tiny_pool, "--seeds", 1, "--epochs", 1, "--alphas",
        0.5, "--mapper-steps", 2, "--same", 0.99999, "--methods", *methods,
    )
    untrained = displayed[0].loc["ẑ = z"]  # moves nowhere, and keeps all angles
    assert untrained["L_ld"] == 1 and untrained["L_pair"] == 0
    measures = displayed[2]
    assert [*measures.columns] == ["ldfs", "ldfs:pair=0"]
    assert {"follows", "angles", "unique neighbours"} <= {*measures.index}
    assert [len(history) for history in names["histories"].values()] == [2, 2]
    measured = {(r["method"], r["alpha"]) for r in names["records"]}
    assert measured == {("zero-shot", 1), *((m, alpha) for m in methods for alpha in (1, 0.5))}
    assert all({"photo", "OOD mean"} <= r["values"].keys() for r in names["records"])
    printed = capsys.readouterr().out
    table = printed[printed.index("accuracy in per cent"):]
    assert all(f"\n{method} " in table for method in ("zero-shot", *methods, "arf α=0.5"))
    assert "def ldfs_losses(" in printed and "def arf_losses(" in printed
    pictures = {path.name for path in (tmp_path / "run").glob("*.png") if path.stat().st_size > 1000}
    assert pictures == {
        "mapper_losses.png", "neighbours.png", "figure5.png", "losses.png", "curve.png",
        "figure4-sketch.png", "figure4-cartoon.png",
    }
    assert len(displayed) == 2 + len(pictures) - 1  # two tables; of one target no figure 4


def test_it_runs_without_a_pool_or_pictures_of_it(walk, tiny_data, tiny_clip, tmp_path):
    """As it does on PACS."""
    names, displayed = walk(
        tiny_data, "--model", tiny_clip, "--seeds", 1, "--epochs", 1, "--alphas", 0.5,
        "--mapper-steps", 2, "--methods", "ldfs", "flyp+captions",
    )
    assert "flyp+captions" in {r["method"] for r in names["records"]}
    assert not (tmp_path / "run" / "figure5.png").exists() and len(displayed) == 2 + 5
