"""walkthrough.ipynb: committed as it should be, and running from its first cell to its last."""

import json
import re

import matplotlib
import pytest
from conftest import ROOT

from config import flags
from methods import parse_method

FILE = ROOT / "walkthrough.ipynb"
CELLS = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}
TEXT = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def test_it_is_a_notebook_without_outputs():
    """Of format 4.5, in which each cell has an id; Jupyter keeps what was printed, git should not."""
    notebook = json.loads(FILE.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert FILE.stat().st_size < 200_000
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
    """Its flags exist, and no method needs a pool, which there is no room for."""
    settings = {}
    exec(CODE["settings"] + "\n" + CODE["pacs"].replace("PACS = False", "PACS = True"), settings)
    assert (settings["DATASET"], settings["SOURCE"]) == ("pacs", "photo")
    argv = [settings["DATASET"], settings["SOURCE"], *settings["FLAGS"].split()]
    methods = [parse_method(name) for name in flags("").parse_args(argv).methods]
    assert methods and not any(method.retrieved for method in methods)


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Run all code cells in one namespace, as a kernel would: walk(settings) -> (what they name,
    what they display), on "tiny" beside a clone of the repository.
    """
    matplotlib.use("Agg")

    def call(data, *more):
        shown, settings = [], [*map(str, more), "--data", str(data), "--run", str(tmp_path / "run")]

        def display(thing):
            thing._repr_html_() if hasattr(thing, "_repr_html_") else thing._repr_png_()
            shown.append(thing)

        (tmp_path / "clone").symlink_to(ROOT)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["kernel"])
        monkeypatch.setenv("TQDM_DISABLE", "")  # and after the test it is as it was
        monkeypatch.syspath_prepend(ROOT)  # likewise
        tiny = f'DATASET, SOURCE, FLAGS = "tiny", "photo", {" ".join(settings)!r}'
        names = {"display": display}
        for name, code in {**CODE, "settings": tiny}.items():
            exec(compile(code, f"walkthrough.ipynb, {name}", "exec"), names)
        return names, shown

    yield call
    matplotlib.pyplot.close("all")


def test_it_runs(walk, tiny_data, tiny_clip, tiny_pool, tmp_path):
    methods = ["finetune", "lads", "ldfs", "flyp", "arf"]
    names, shown = walk(
        tiny_data, "--model", tiny_clip, "--pool", tiny_pool, "--seeds", 1, "--epochs", 1, "--alphas",
        0.5, "--mapper-steps", 2, "--same", 0.99999, "--methods", *methods,
    )
    untrained = shown[0].loc["ẑ = z"]  # shifts nowhere, and keeps all angles
    assert untrained["L_ld"] == 1 and untrained["L_pair"] == 0
    table = names["means"].xs(1, level="alpha")
    assert [*table.index] == ["zero-shot", *methods] and {"ID", "OOD mean"} <= {*table.columns}
    assert ("arf", 0.5) in names["means"].index
    for picture in ("neighbours", "figure4", "figure5", "curve"):
        assert (tmp_path / "run" / f"{picture}.png").stat().st_size > 1000, picture
    assert len(shown) == 3 + 4  # tables and pictures


def test_it_runs_without_a_pool_or_pictures_of_it(walk, tiny_data, tiny_clip, tmp_path):
    """As it does on PACS."""
    names, shown = walk(
        tiny_data, "--model", tiny_clip, "--seeds", 1, "--epochs", 1, "--alphas", 0.5,
        "--mapper-steps", 2, "--methods", "ldfs", "flyp+captions",
    )
    assert "flyp+captions" in names["means"].index.unique("method")
    assert not (tmp_path / "run" / "figure5.png").exists() and len(shown) == 3 + 3
