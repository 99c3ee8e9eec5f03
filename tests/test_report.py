"""report/: rows are kept once, tables say what was worked out by hand; figures and documents."""

import copy
import functools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from report import benchmark, documents, figures, parts, results, tables

SCHEDULES = {"linear": (2, 0.1), "full": (2, 0.1), "towers": (3, 1e-5)}
SETTINGS = {
    "dataset": "d", "source": "photo", "model": "m", "train": "full", "init": "text", "k": 1,
    "lambda_cap": 1.0, "lambda_ret": 1.0,
    "schedules": {k: {"epochs": e, "batch_size": 8, "lr": lr} for k, (e, lr) in SCHEDULES.items()},
}


def config(run, **settings):
    return SimpleNamespace(run=run, record=lambda: {**SETTINGS, **settings})


def cells(rows, heading):
    """{method: what stands under `heading`} of the one block of rows."""
    [(_, _, markdown)] = tables.blocks(rows)
    lines = markdown.replace("|  |", "| - |").splitlines()
    head, _, *lines = [line.strip("| ").split(" | ") for line in lines]
    return {line[0]: line[head.index(heading)].strip() for line in lines}


def scored(method, domains, **columns):
    """Rows of {domain: [value of seed 0, 1, …]}."""
    return [
        {"method": method, "domain": domain, "value": value, "n": 9, "seed": seed, **columns}
        for domain, values in domains.items() for seed, value in enumerate(values)
    ]


def lines_of(markdown):
    return [line for line in markdown.splitlines() if line.startswith("|")]


# -------------------------------------------------------------------------------------------------
# Rows


def test_rows_come_back_as_they_went_with_their_settings(tmp_path):
    weights = {"alpha": 0.5, "lambda_cap": 0.5, "trained": "both towers"}
    rows = scored("arf", {"photo": [1 / 3, 2], "sketch": [None]}, **weights)
    noted = {"method": "ldfs", "domain": "sketch", "measure": "|Δt|", "split": "train"}
    results.append(config(tmp_path, lambda_cap=0.5), [*rows, {**noted, "value": 7.0}])
    first, sketch, _, direction = results.read(tmp_path)  # seed 0, seed 1
    assert first["value"] == 0.333333 and first["n"] == 9
    assert (first["alpha"], first["lambda_cap"]) == (0.5, 0.5)
    assert sketch["value"] is None and sketch["split"] == "test" and sketch["measure"] == "accuracy"
    assert direction["measure"] == "|Δt|" and direction["trained"] == "" and direction["alpha"] == 1
    assert first["settings"]["commit"] == results.commit()
    assert first["settings"]["versions"].keys() == {"torch", "open_clip_torch"}
    assert first["block"] == results.block_of({**SETTINGS, "lambda_cap": 3})  # it is a column
    line = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert line.keys() == {"config", "method", *weights, "values"}  # and nothing that is as always
    assert line["values"] == {"photo": [0.333333, 9], "sketch": [None, 9]}
    [(name, settings)] = json.loads((tmp_path / "config.json").read_text()).items()
    assert name == line["config"] and settings["schedules"] == SETTINGS["schedules"]


def test_what_is_there_is_not_appended_again_but_what_changed_is(tmp_path, monkeypatch):
    path, rows = tmp_path / "results.jsonl", scored("ldfs", {"photo": [1, 2]})
    results.append(config(tmp_path), rows)
    before = path.read_text(), (tmp_path / "config.json").read_text()
    monkeypatch.setattr(results, "commit", lambda: "another")
    results.append(config(tmp_path), rows)
    assert before == (path.read_text(), (tmp_path / "config.json").read_text())
    for value in (3, 1):  # and back: the last counts, whatever stood there once
        rows[0]["value"] = value
        results.append(config(tmp_path), rows)
        assert [row["value"] for row in results.read(tmp_path)] == [value, 2]
    results.append(config(tmp_path), [{**row, "key": "other images"} for row in rows])
    assert {row["key"] for row in results.read(tmp_path)} == {"other images"}
    assert len(results.rows(tmp_path)) == 2 + 1 + 1 + 2
    assert results.read(tmp_path)[0]["settings"]["commit"] == "another"


def test_accuracies_on_other_images_than_the_last_are_left_out(tmp_path, capsys):
    row = {"domain": "photo", "value": 1}
    for method, tested, more in (("old", "a", {}), ("ldfs", "a", {}), ("ldfs", "b", {}), ("old", "a", {"k": 10})):
        results.append(config(tmp_path, **more), [{**row, "method": method, "tested": tested, "key": tested}])
    results.append(config(tmp_path), [{**row, "method": "old", "measure": "spread"}])
    kept = [(r["method"], r["tested"], r["measure"]) for r in results.read(tmp_path)]
    assert kept == [("ldfs", "b", "accuracy"), ("old", "a", "accuracy"), ("old", "", "spread")]
    assert "1 accuracies on other images" in capsys.readouterr().err


def test_rows_without_their_settings_are_named(tmp_path, capsys):
    results.append(config(tmp_path), [{"method": "ldfs", "domain": "photo", "value": 1}])
    (tmp_path / "config.json").unlink()
    with pytest.raises(SystemExit) as stop:
        results.read(tmp_path)
    assert stop.value.code == 2 and "config.json lacks" in capsys.readouterr().err


def test_figures_of_no_accuracies_are_refused(tmp_path, capsys):
    results.append(config(tmp_path), [{"method": "ldfs", "domain": "photo", "value": 1, "measure": "spread"}])
    with pytest.raises(SystemExit):
        figures.draw_against("lr", results.read(tmp_path), tmp_path / "a.png")
    assert "no accuracies are there yet" in capsys.readouterr().err


def test_of_a_stage_run_twice_the_last_result_counts(tmp_path):
    row = {"method": "ldfs", "domain": "photo", "value": 1}
    for value, more in ((1, {}), (2, {}), (3, {"train": "towers"}), (4, {"k": 10})):
        results.append(config(tmp_path, **more), [{**row, "value": value}])
    results.append(config(tmp_path, k=10), [{**row, "value": 5, "measure": "unique neighbours"}])
    results.append(config(tmp_path), [{**row, "value": 6, "measure": "unique neighbours"}])
    # other measures are of the model, whatever was trained
    assert [r["value"] for r in results.read(tmp_path)] == [2, 3, 4, 6]


def test_table_of_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        results.read(tmp_path)
    assert stop.value.code == 2 and "results.jsonl is not there" in capsys.readouterr().err
    assert results.rows(tmp_path) == []


# -------------------------------------------------------------------------------------------------
# Tables


def test_table_means_deviations_and_raw_seeds(tmp_path):
    results.append(config(tmp_path), [
        *scored("ldfs", {"photo": [90, 92], "sketch": [40, 50], "OOD mean": [40, 50]}),
        *scored("lads", {"photo": [1.0]}), *scored("finetune", {"OOD mean": [35, 47]}),
    ])
    lines = lines_of(tables.table(results.read(tmp_path)))
    heads = "ID (photo) | sketch | OOD mean | less finetune | less lads | OOD mean, seed by seed |"
    assert lines[0] == f"| method | {heads}"
    assert lines[2] == "| ldfs | 91.0 ± 1.4 | 45.0 ± 7.1 | 45.0 ± 7.1 | 4.0 ± 1.4 |  | 40.0 50.0 |"
    assert lines[3] == "| lads | 1.0 | not run | not run |  |  |  |"


def test_seeds_are_compared_with_the_same_seed(tmp_path):
    rows = scored("ldfs", {"OOD mean": [10, 20, 30]})
    rows += scored("finetune", {"OOD mean": [1, 12, 21]})[::-1]  # in another order
    rows = [row for row in rows if (row["method"], row["seed"]) != ("finetune", 1)]
    results.append(config(tmp_path), rows)
    assert cells(results.read(tmp_path), "less finetune") == {"ldfs": "9.0 ± 0.0", "finetune": "-"}


def test_strategies_are_compared_with_themselves_without_synthesised_features(tmp_path):
    ood = {"coop": [1, 2], "coop+lads": [5, 8], "arf": [1, 1], "arf+ldfs:sigma=0": [2, 3]}
    for method, values in {**ood, "flyp": [0, 0], "flyp+captions": [9, 9]}.items():
        results.append(config(tmp_path), scored(method, {"OOD mean": values}))
    rows, heading = results.read(tmp_path), "OOD, with less without"
    less = {"coop+lads": "5.0 ± 1.4", "arf+ldfs:sigma=0": "1.5 ± 0.7"}
    assert {m: v for m, v in cells(rows, heading).items() if v != "-"} == less
    few = [row for row in rows if row["method"] not in ("coop", "coop+lads")]
    assert cells(few, "OOD less flyp")["flyp+captions"] == "9.0 ± 0.0"  # one strategy: as ever


def test_table_compares_with_flyp_at_the_same_alpha(tmp_path):
    values = [
        ("flyp", 1, 50, 10), ("arf", 1, 53, 14), ("flyp", 0.5, 60, 20), ("arf", 0.5, 61, 22),
        ("arf", 0.3, 0, 0),
    ]
    for method, alpha, ood, unseen in values:
        domains = {"OOD mean": [ood], "unseen mean": [unseen], "sketch": [1], "unseen sketch": [1]}
        results.append(config(tmp_path), scored(method, domains, alpha=alpha))
    heads, _, *lines = lines_of(tables.table(results.read(tmp_path)))
    assert heads == (
        "| method | OOD mean | unseen mean | sketch | OOD less flyp | unseen less flyp "
        "| OOD mean, seed by seed | unseen mean, seed by seed |"
    )
    assert lines == [
        "| flyp | 50.0 | 10.0 | 1.0 |  |  | 50.0 | 10.0 |",
        "| arf | 53.0 | 14.0 | 1.0 | 3.0 | 4.0 | 53.0 | 14.0 |",
        "| flyp α=0.5 | 60.0 | 20.0 | 1.0 |  |  | 60.0 | 20.0 |",
        "| arf α=0.5 | 61.0 | 22.0 | 1.0 | 1.0 | 2.0 | 61.0 | 22.0 |",
    ]


def test_weights_and_what_is_trained_are_told(tmp_path):
    results.append(config(tmp_path, lambda_cap=0.5), [
        *scored("zero-shot", {"photo": [1]}),
        *scored("finetune", {"photo": [1]}, trained="image tower, head", lambda_cap=None),
        *scored("arf", {"photo": [1]}, trained="both towers", lambda_cap=0.5, alpha=0.5),
    ])
    assert cells(results.read(tmp_path), "trained") == {
        "zero-shot": "-", "finetune": "image tower, head", "arf λ_cap=0.5 α=0.5": "both towers",
    }
    [(_, title, _)] = tables.blocks(results.read(tmp_path))
    assert title == (
        "d, source photo, m --train full --init text, "
        "image tower, head (2 epochs of batch 8, lr 0.1), "
        "both towers (3 epochs of batch 8, lr 1e-05): accuracy in per cent, 1 seed"
    )


def test_other_settings_are_another_block_and_other_measures_come_last(tmp_path):
    row = {"method": "ldfs", "domain": "photo", "value": 1.0, "trained": "head"}
    other = {**row, "measure": "class consistency"}
    results.append(config(tmp_path, captions="my.jsonl"), [other, row])
    results.append(config(tmp_path, k=10), [row])
    results.append(config(tmp_path, lambda_ret=0.5), [{**row, "lambda_ret": 0.5}])
    results.append(config(tmp_path), [row])
    titles = [title for _, title, _ in tables.blocks(results.read(tmp_path))]
    assert "--captions my.jsonl" in titles[0] and "--k 10" in titles[1] and "--k" not in titles[2]
    assert titles[3] == "d, source photo, m: class consistency in per cent, 1 seed"
    assert len(titles) == 4  # with other λ and without in one


def test_sets_of_renown_have_their_columns(tmp_path):
    domains = {"unseen cars": [1], "unseen mean": [1], "photo": [1]}
    results.append(config(tmp_path), scored("arf", domains))
    assert cells(results.read(tmp_path), "unseen cars") == {"arf": "1.0"}


def test_counts_of_mappers_and_pairs_are_tables_of_their_own(tmp_path):
    rows = scored("lads", {"sketch": [0.5, 0.7]}, measure="|Δt|", split="train")
    rows += scored("retrieved", {"photo": [449]}, measure="found", split="train")
    results.append(config(tmp_path), rows)
    rows = results.read(tmp_path)
    assert tables.blocks(rows) == []
    assert [title for _, title, _ in tables.counts(rows)] == ["|Δt|", "found"]
    texts = [markdown.splitlines()[-1] for _, _, markdown in tables.counts(rows)]
    assert texts == ["| lads | sketch | 0.600 |", "| retrieved | photo | 449 |"]
    assert r"| \|Δt\| |" in tables.counts(rows)[0][2]


def test_what_others_published_stands_below(tmp_path):
    results.append(config(tmp_path, dataset="imagenet"), scored("arf", {"photo": [1]}))
    text = tables.table(results.read(tmp_path))
    assert "| arf | 82.7 | 72.8 | 75.6 | 50.3 | 51.8 | 55.8 | 61.3 |" in text
    assert "TerraIncognita" not in text
    assert all(len(row) == len(one["columns"]) for one in tables.PUBLISHED for row in one["rows"])


# -------------------------------------------------------------------------------------------------
# Figures


def between_the_weights(run, **settings):
    domains = {"photo": [60, 62], "OOD mean": [50, 52], "sketch": [50, 52]}
    for method, alpha in (("zero-shot", 1), ("flyp", 1), ("flyp", 0.5), ("arf", 1)):
        results.append(config(run, **settings), scored(method, domains, alpha=alpha))


def test_the_curve_is_of_the_weights_in_between_whatever_was_measured_since(tmp_path, monkeypatch):
    between_the_weights(tmp_path)
    results.append(config(tmp_path), scored("finetune", {"photo": [50]}))  # has no OOD mean
    probe = scored("ldfs", {"photo": [1], "OOD mean": [1]})
    results.append(config(tmp_path, train="linear"), probe)
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path, *_: drawn.append(figure))
    figures.draw_curve(results.read(tmp_path), tmp_path / "curve.png")
    [axis] = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines["flyp"] == [[51, 61]] * 3 and lines["arf"] == [[51, 61]] * 2  # α: 0, 0.5, 1
    assert lines["zero-shot (α = 0)"] == [[51, 61]] and "ldfs" not in lines


def test_no_curve_without_weights_in_between_or_another_domain(tmp_path, capsys):
    results.append(config(tmp_path), scored("flyp", {"photo": [1]}))
    figures.draw_curve(results.read(tmp_path), tmp_path / "curve.png")
    results.append(config(tmp_path), scored("flyp", {"photo": [1]}, alpha=0.5))
    results.append(config(tmp_path), scored("zero-shot", {"photo": [1]}))
    figures.draw_curve(results.read(tmp_path), tmp_path / "curve.png")
    said = capsys.readouterr().out
    assert "no weights in between" in said and "no other domain" in said
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("setting, values", [("lr", (1e-3, 1e-4)), ("epochs", (10, 2))])
def test_accuracy_against_a_setting_of_the_towers(tmp_path, monkeypatch, setting, values):
    for value in values:
        towers = {"epochs": 1, "batch_size": 8, "lr": 1, setting: value}
        schedules = {**SETTINGS["schedules"], "towers": towers}
        between_the_weights(tmp_path / f"{value}", schedules=schedules)
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path, *_: drawn.append(figure))
    rows = [row for value in values for row in results.read(tmp_path / f"{value}")]
    figures.draw_against(setting, rows, tmp_path / "rates.png")
    of_id, of_ood = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in of_ood.lines}
    assert lines["flyp"] == lines["flyp α=0.5"] == lines["arf"] == [[0, 51], [1, 51]]
    assert [tick.get_text() for tick in of_ood.get_xticklabels()] == [f"{v:g}" for v in sorted(values)]
    assert of_id.get_ylabel().startswith("ID") and "arf α=0.5" not in lines


def test_arrows_go_from_a_strategy_without_to_the_same_with_synthesised_features(
    tmp_path, monkeypatch
):
    at = {"zero-shot": (1, 2), "coop": (3, 4), "coop+lads": (5, 6), "coop+ldfs": (7, 8)}
    for method, (of_id, ood) in {**at, "full+ldfs": (0, 0), "flyp": (0, 0)}.items():
        domains = {"photo": [of_id - 1, of_id + 1], "OOD mean": [ood, ood]}
        results.append(config(tmp_path), scored(method, domains))
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path, *_: drawn.append(figure.axes[0]))
    figures.draw_strategies(results.read(tmp_path), tmp_path / "arrows.png")
    arrows = [(text.xyann, text.xy) for text in drawn[0].texts]
    assert arrows == [((3, 4), (5, 6)), ((3, 4), (7, 8))]
    names = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert names == ["zero-shot", "coop", "with lads's features", "with ldfs's features"]


def test_pictures_are_written(tmp_path):
    class Location:
        def open(self):
            return Image.new("RGB", (16, 24), "green")

    image = Location()
    rows = [("source", [(image, False)] * 2), ("ldfs\nsketch", [(image, True), (image, False)])]
    figures.draw_figure4(tmp_path / "figure4.png", rows)
    columns = [(image, "a long " * 30, None), (image, "a cat", (0.5, image, "a drawing of a cat"))]
    figures.draw_figure5(tmp_path / "figure5.png", columns)
    between_the_weights(tmp_path)
    figures.draw_curve(results.read(tmp_path), tmp_path / "curve.png")
    for name in ("figure4", "figure5", "curve"):
        picture = Image.open(tmp_path / f"{name}.png")
        assert picture.format == "PNG" and picture.width > 200


# -------------------------------------------------------------------------------------------------
# Documents


CODE = '''
"""A file."""

# CHOICE: a number,
# not a word; alternative: 2
NUMBER = 1  # one

class A:
    """What. CHOICE: first; alternative: `x`. More text.
    CHOICE: second, of
    two lines; alternative: 0.5 of it.

    Other."""

    def b(self):
        x = 1  # CHOICE: trailing |x|; alternative: none
        y = 2  # no part of it
'''


def test_choices_are_found_in_comments_and_docstrings():
    assert documents.choices(CODE) == [
        ("NUMBER", "a number, not a word", "2"), ("A", "first", "`x`"),
        ("A", "second, of two lines", "0.5 of it"), ("A.b", "trailing |x|", "none"),
    ]


def test_every_choice_of_the_code_is_listed():
    listed = documents.choices_document()
    for file in (*documents.ROOT.glob("*.py"), *documents.ROOT.glob("*/*.py")):
        if file.parent.name == "tests":
            continue
        name = str(file.relative_to(documents.ROOT))
        assert listed.count(f"| [{name}]({name}) ") == file.read_text().count("CHOICE:"), name


def test_notes_stand_above_their_tables_and_what_is_indented_is_folded(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    folder = tmp_path / "results"
    for run in ("one", "two"):
        results.append(config(folder / run), [
            {"method": "ldfs", "domain": "photo", "value": 1, "measure": measure}
            for measure in ("class consistency", "accuracy")
        ])
        text = f"# Of {run}\n\nSee ![it](../../assets/{run}.png).\n"
        (folder / run / "notes.md").write_text(text)
    (folder / "notes.md").write_text("# Results\n\n[a test](../tests/x.py)\n")
    (folder / "published.md").write_text("## The papers' numbers\n")
    (folder / "order.txt").write_text("two\n  one\n")
    text = documents.results_document()
    assert text.startswith("# Results\n\n[a test](tests/x.py)\n")
    assert "![it](assets/one.png)" in text
    places = [text.index(mark) for mark in (
        "## Of two", "accuracy in", "<details>", "class consistency in", "</details>",
        "<summary>Of one", "## The papers",
    )]
    assert places == sorted(places)
    assert text.count("<details>") == text.count("</details>") == 3 and "TerraIncognita" in text
    assert len(re.findall(r"^\| ldfs \| 1.0 \|$", text, re.M)) == 4


# -------------------------------------------------------------------------------------------------
# Benchmark


@pytest.fixture
def bench(tiny_clip):
    """A Clip, a head and a Batch as the benchmark has them, tiny."""
    torch.manual_seed(0)
    clip = benchmark.new_clip(tiny_clip, torch.device("cpu"))
    return clip, torch.nn.Linear(32, 3), benchmark.new_batch(clip, 6, 3)


@pytest.mark.parametrize("method", benchmark.PEERS)
def test_peers_take_the_steps_that_we_take(method, bench):
    """Of the same losses, and from the same weights: they differ in speed alone."""
    clip, head, batch = bench
    losses = []
    for new in (benchmark.our_step, benchmark.peer_step):
        own = replace(clip, model=copy.deepcopy(clip.model)), copy.deepcopy(head)
        step = new(method, *own, benchmark.only(method, batch))
        losses.append([step() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] > losses[0][2]


def test_what_a_gpu_would_show(bench, monkeypatch):
    """On a CPU that is said to be one: FLOPs over the time and the peak that NVIDIA names."""
    clip, head, batch = bench
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9)
    monkeypatch.setattr(torch, "compile", lambda module: module)
    monkeypatch.setattr(benchmark, "captioning", lambda *of: lambda: None)
    monkeypatch.setattr(benchmark, "timer", iter(range(100)).__next__)  # a second for each step
    monkeypatch.setitem(benchmark.PEAK, "H100", 1e6)
    rows = benchmark.on_a_gpu("NVIDIA H100 80GB", clip, head, batch, 4, 1)
    assert [row["what"] for row in rows][:2] == ["finetune", "finetune, compiled"] and len(rows) == 7
    assert all(row["images/s"] == 6 and row["peak memory, GB"] == 5 for row in rows[:-1])
    finetune, flyp, arf, captions = (row["MFU"] for row in (*rows[:6:2], rows[-1]))
    assert captions is None and 0 < finetune < flyp
    assert 1.9 < arf / flyp < 3  # images twice, texts three times


def test_the_benchmark_prints_tables_and_writes_them(tiny_clip, tmp_path, script, monkeypatch):
    monkeypatch.setattr(parts, "mappers", functools.partial(parts.mappers, n=20, d=16, classes=4))
    small = functools.partial(parts.searching, queries=5, pool=40, d=16, k=2)
    monkeypatch.setattr(parts, "searching", small)
    first = {"images": 300, "classes": 10, "targets": 1, "pool": 100}
    monkeypatch.setattr(parts, "growth", functools.partial(parts.growth, first=first))
    out = tmp_path / "new" / "benchmark.json"
    flags = ["--batch-size", 4, "--classes", 3, "--rounds", 1, "--growth", "--out", out]
    done = script("report/benchmark.py", "--model", tiny_clip, *flags)
    record = json.loads(out.read_text())
    assert (record["device"], record["clock"], record["batch"]) == ("CPU", "CPU time", 4)
    found = record["tables"]
    assert len(found) == 7 and all(f"{title}:" in done.stdout for title in found)
    differences = [row["difference of the loss"] for title in [*found][:4:2] for row in found[title]]
    assert len(differences) == 3 + 7 and sum(d is not None for d in differences) == 3 + 2
    assert max(d for d in differences if d is not None) < 1e-5
    assert {row["images/s"] for row in found["on a GPU"]} == {"not run"}
    assert all(0 < row["share of loading"] < 1 for row in found["loading of images"])
    grows = {row["what"]: row["point 3"] for row in found["how costs grow, size: ms (CPU)"]}
    assert all(text.startswith(f"{8 * first[what]}: ") for what, text in grows.items())


def test_the_median_of_calls_that_take_turns():
    order, ticks = [], iter([0, 5, 5, 6, 6, 7, 7, 10, 10, 12, 12, 13])
    calls = {name: lambda name=name: order.append(name) or name for name in "ab"}
    found = parts.medians(calls, 3, lambda: next(ticks))
    assert "".join(order) == "ab" + "ababab"  # once to warm up
    assert found == {"a": (2, "a"), "b": (1, "b")}
