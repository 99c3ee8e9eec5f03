"""core/results.py and report/: records, tables, figures and measures, against values known by hand."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
from core.artifacts import save
from core.methods import parse_method
from core.results import newest, read_records, record, write_records
from report import document, figures, quality, tables
from report.tables import markdown_table, terminal_table
from sets.load import load_dataset

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = SimpleNamespace(dataset="d", source="photo", model="m")
SCHEDULE = {"epochs": 5, "batch_size": 8, "lr": 1e-5, "weight_decay": 0.1, "warmup": 0.1, "max_norm": None}


def scores(method, values, trained="head", seeds=None, **fields):
    """Return records of accuracy. values: {domain: [value of seed 0, 1, …]}."""
    if method == "zero-shot":
        trained = ""
    count = max(map(len, values.values()))
    return [
        record(
            SETTINGS, "accuracy", method, seed,
            {domain: v[i] for domain, v in values.items() if i < len(v)}, {domain: 9 for domain in values},
            trained=trained, **{"schedule": SCHEDULE if trained else None, **fields},
        )
        for i, seed in enumerate(seeds or range(count))
    ]


def measured(kind, method, values, seed=0, **fields):
    return record(SETTINGS, kind, method, seed, values, 9, **fields)


def parsed(table):
    """Return [{heading: cell}] of a markdown table."""
    lines = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.splitlines() if line.startswith("|")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def column(records, heading):
    """Return {label: cell} of a column of the full table."""
    [(_, _, table), *_] = tables.full_tables(records)
    return {row["method"]: row[heading] for row in parsed(table)}


# -------------------------------------------------------------------------------------------------
# Records


def test_a_record_has_all_columns_and_six_digits():
    new = record(
        SETTINGS, "accuracy", "arf", 1, {"photo": 1 / 3, "sketch": None}, {"photo": 3, "sketch": 0},
        trained="both towers", alpha=0.5, schedule=SCHEDULE, options={"lambda_cap": 0.5}, validation=75.0,
    )
    assert new == {
        "kind": "accuracy", "dataset": "d", "source": "photo", "model": "m", "method": "arf",
        "trained": "both towers", "seed": 1, "alpha": 0.5, "schedule": SCHEDULE, "options": {"lambda_cap": 0.5},
        "values": {"photo": 0.333333, "sketch": None}, "n": {"photo": 3, "sketch": 0}, "validation": 75.0,
    }
    short = measured("pairs", "retrieved", {"available": 3})
    assert (short["trained"], short["alpha"], short["schedule"], short["options"]) == ("", 1.0, None, {})


def test_of_records_about_the_same_thing_the_newest_counts(tmp_path):
    old, new = scores("ldfs", {"photo": [1]}) + scores("ldfs", {"photo": [2]})
    for time, (name, content) in enumerate([("z", old), ("b", scores("lads", {"photo": [3]})[0]), ("a", new)]):
        path = tmp_path / "scores" / f"{name}.json"
        save(content, path)
        os.utime(path, (time, time))
    save([measured("mapper", "ldfs", {"spread": 0.5}, domain=d) for d in ("sketch", "cartoon")],
         tmp_path / "scores" / "measures.json")
    read = read_records(tmp_path)
    assert [(r["method"], r["values"].get("photo")) for r in read[:2]] == [("ldfs", 2), ("lads", 3)]
    assert [r["domain"] for r in read[2:]] == ["sketch", "cartoon"]


@pytest.mark.parametrize("change", [
    {"dataset": "e"}, {"source": "sketch"}, {"model": "n"}, {"method": "lads"}, {"trained": "prompt"},
    {"options": {"shots": 4}}, {"alpha": 0.5}, {"seed": 1}, {"domain": "sketch"}, {"kind": "mapper"},
])
def test_records_that_differ_in_one_column_are_about_different_things(change):
    [first] = scores("ldfs", {"photo": [1]})
    assert len(newest([first, {**first, **change}, {**first, "values": {}}])) == 2


def test_records_survive_a_file_of_lines(tmp_path):
    records = scores("arf", {"photo": [1, 2], "sketch": [3, None]}, "both towers", options={"shots": 4})
    records += scores("zero-shot", {"photo": [5, 5]}) + [measured("mapper", "ldfs", {"|Δt|": 1}, domain="é")]
    for subset in (records, records[:1], records[-2:-1]):
        write_records(subset, tmp_path / "a.jsonl")
        assert read_records(tmp_path / "a.jsonl") == subset
    write_records(records, tmp_path / "a.jsonl")
    shared, *lines = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert shared == {"dataset": "d", "source": "photo", "model": "m"}
    assert len(lines) == 5 and not any(shared.keys() & line.keys() for line in lines)


@pytest.mark.parametrize("make, message", [
    (lambda path: path.mkdir(), "no results here"), (lambda path: None, "no results here"),
    (lambda path: path.write_text(""), "no results here"), (lambda path: path.write_text("{"), "line 1"),
    (lambda path: [(path / "scores").mkdir(parents=True), (path / "scores/a.json").write_text("{")], "a.json"),
])
def test_missing_or_damaged_records_are_one_line_and_status_2(tmp_path, capsys, make, message):
    make(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        read_records(tmp_path / "run")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


# -------------------------------------------------------------------------------------------------
# Tables


def test_means_deviations_differences_and_raw_seeds():
    records = [
        *scores("ldfs", {"photo": [90, 92], "sketch": [40, 50], "OOD mean": [40, 50]}),
        *scores("lads", {"photo": [1.0], "sketch": [None]}), *scores("finetune", {"OOD mean": [35, 47]}),
    ]
    lines = [line for line in markdown_table(records).splitlines() if line.startswith("|")]
    heads = "ID (photo) | sketch | OOD mean | OOD less finetune | OOD less lads | OOD mean, seed by seed |"
    assert lines[0] == f"| method | {heads}"
    assert lines[2] == "| ldfs | 91.0 ± 1.4 | 45.0 ± 7.1 | 45.0 ± 7.1 | 4.0 ± 1.4 |  | 40.0 50.0 |"
    assert lines[3] == "| lads | 1.0 | not run | not run |  |  |  |"
    title = markdown_table(records).splitlines()[0]
    assert title == "d, source photo, m: accuracy in per cent, 1 to 2 seeds; head: 5 epochs of batch 8, lr 1e-05:"


def test_seeds_are_compared_with_the_same_seed():
    records = scores("ldfs", {"OOD mean": [10, 20, 30]})
    records += scores("finetune", {"OOD mean": [21, 1]}, seeds=[2, 0])
    assert column(records, "OOD less finetune") == {"ldfs": "9.0 ± 0.0", "finetune": ""}


def test_strategies_are_compared_with_themselves_without_synthesised_features():
    ood = {"coop": [1, 2], "coop+lads": [5, 8], "arf": [1, 1], "arf+ldfs:sigma=0": [2, 3]}
    records = []
    for method, values in {**ood, "flyp": [0, 0], "flyp+captions": [9, 9]}.items():
        records += scores(method, {"OOD mean": values})
    less = {"coop+lads": "5.0 ± 1.4", "arf+ldfs:sigma=0": "1.5 ± 0.7"}
    cells = column(records, "OOD with less without")
    assert {method: cell for method, cell in cells.items() if cell} == less
    one_strategy = [r for r in records if r["method"] not in ("coop", "coop+lads")]
    assert column(one_strategy, "OOD less flyp")["flyp+captions"] == "9.0 ± 0.0"


def test_arf_is_compared_with_flyp_at_the_same_alpha():
    records = []
    for method, alpha, ood, unseen in [
        ("flyp", 1.0, 50, 10), ("arf", 1.0, 53, 14), ("flyp", 0.5, 60, 20), ("arf", 0.5, 61, 22), ("arf", 0.3, 0, 0),
    ]:
        values = {"OOD mean": [ood], "unseen mean": [unseen], "sketch": [1], "unseen sketch": [1]}
        records += scores(method, values, alpha=alpha)
    heads, _, *lines = [line for line in markdown_table(records).splitlines() if line.startswith("|")]
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


def test_h_is_shown_beside_the_unseen_mean_and_not_compared():
    values = {"photo": [80], "OOD mean": [70], "unseen photo": [40], "unseen mean": [40], "H photo": [53], "H mean": [50]}
    records = scores("flyp", values) + scores("finetune", {"photo": [80], "OOD mean": [70]})
    heads, lines = tables.short_table(records)
    assert heads[:5] == ["method", "ID", "OOD", "unseen", "H"] and not any("H\n" in head for head in heads)
    assert [line[4] for line in lines] == ["50.0", "not run"]
    assert column(records, "H mean") == {"flyp": "50.0", "finetune": "not run"}
    assert "H photo" not in markdown_table(records) and "unseen photo" not in markdown_table(records)


def test_calibration_is_in_the_full_table_only_and_old_records_have_none(tmp_path):
    values = {"photo": [80], "sketch": [70], "OOD mean": [70], "unseen mean": [40]}
    [new] = scores("arf", values, ece={"photo": 4.25, "sketch": 9, "OOD mean": 9.04, "unseen mean": None})
    old = scores("flyp", values)
    heads, *_ = tables.short_table([new, *old])
    assert not any("ECE" in head for head in heads)
    assert column([new, *old], "ECE ID") == {"arf": "4.2", "flyp": "not run"}
    assert column([new, *old], "ECE OOD mean")["arf"] == "9.0"
    assert "ECE unseen" not in markdown_table([new]) and "ECE sketch" not in markdown_table([new])
    assert "ECE" not in markdown_table(old)
    write_records([new, *old], tmp_path / "a.jsonl")
    assert read_records(tmp_path / "a.jsonl") == [new, *old]


def test_zero_shot_records_of_two_runs_are_joined_whatever_they_measured():
    [old] = scores("zero-shot", {"photo": [1], "unseen mean": [2]})
    [new] = scores("zero-shot", {"photo": [1]}, ece={"photo": 3.0})
    for pair in ([old, new], [new, old]):
        [joined] = newest(pair)
        assert joined["values"] == {"photo": 1, "unseen mean": 2} and joined["ece"] == {"photo": 3.0}


def test_what_is_compared_has_the_same_options_where_they_matter():
    """λ_cap and captions do not matter to FLYP; a learning rate and the number of images do."""
    def ood(method, value, **options):
        return scores(method, {"OOD mean": [value]}, options=options)

    records = [
        *ood("flyp", 10), *ood("arf", 13, lambda_cap=0.5), *ood("arf", 14, captions="a/people.jsonl", k=3),
        *ood("flyp", 20, lr=1e-3), *ood("arf", 26, lr=1e-3), *ood("arf", 99, shots=4),
        *ood("arf", 1, lr=1e-3, lock_text=True),
    ]
    assert column(records, "OOD less flyp") == {
        "flyp": "", "arf λ_cap=0.5": "3.0", "arf captions=people.jsonl k=3": "4.0", "flyp lr=0.001": "",
        "arf lr=0.001": "6.0", "arf shots=4": "", "arf lock_text lr=0.001": "",
    }


@pytest.mark.parametrize("option, flyp, captions, retrieved, coop, ldfs", [
    ("captions", 0, 1, 0, 0, 1), ("lambda_cap", 0, 1, 0, 0, 0), ("lambda_ret", 0, 0, 1, 0, 0), ("k", 0, 0, 1, 0, 0),
    ("mapper_steps", 0, 0, 0, 0, 1), ("lock_text", 1, 1, 1, 0, 0), ("init", 0, 0, 0, 0, 1), ("lr", 1, 1, 1, 1, 1),
])
def test_which_options_matter_to_which_method(option, flyp, captions, retrieved, coop, ldfs):
    methods = ("flyp", "flyp+captions", "flyp+retrieved", "coop", "ldfs")
    expected = [flyp, captions, retrieved, coop, ldfs]
    assert [tables.applies(option, method) for method in methods] == [bool(x) for x in expected]


def test_zero_shot_has_no_options_and_is_compared_with_the_plainest():
    ood = {"OOD mean": [10.0]}
    records = scores("zero-shot", {"OOD mean": [12.0]})
    limited = scores("finetune", ood, options={"shots": 4}) + scores("ldfs", ood, options={"shots": 4})
    assert column(records + limited, "OOD less finetune")["zero-shot"] == "2.0"
    plain = scores("finetune", {"OOD mean": [5.0]})
    assert column(records + limited + plain, "OOD less finetune")["zero-shot"] == "7.0"
    two = limited + scores("finetune", ood, options={"shots": 2})
    assert column(records + two, "OOD less finetune")["zero-shot"] == ""


def test_ways_of_training_are_told_apart_and_compared_with_their_own():
    records = []
    for trained, plain, ldfs in (("head", 50, 60), ("prompt", 70, 71)):
        records += scores("finetune", {"OOD mean": [plain]}, trained) + scores("ldfs", {"OOD mean": [ldfs]}, trained)
    rows = parsed(tables.full_tables(records)[0][2])
    assert [(r["method"], r["trained"], r["OOD less finetune"]) for r in rows] == [
        ("finetune", "head", ""), ("ldfs", "head", "10.0"),
        ("finetune", "prompt", ""), ("ldfs", "prompt", "1.0"),
    ]
    assert "trained" not in parsed(tables.full_tables(records[:2])[0][2])[0]


def test_options_that_all_rows_share_are_in_the_title_once():
    def trained_with(method, **options):
        return scores(method, {"photo": [1.0]}, options=options)

    records = scores("zero-shot", {"photo": [1.0]})
    records += trained_with("finetune", shots=4) + trained_with("ldfs", shots=4, captions="x/mine.jsonl", lr=1e-3)
    [(_, title, table)] = tables.full_tables(records)
    assert "d, source photo, m, shots=4, captions=mine.jsonl: accuracy" in title
    assert [row["method"] for row in parsed(table)] == ["zero-shot", "finetune", "ldfs lr=0.001"]


def test_another_data_set_source_or_model_is_another_table():
    records = scores("ldfs", {"photo": [1.0]})
    for change in ({"dataset": "e"}, {"source": "sketch"}, {"model": "n"}):
        records.append({**records[0], **change})
    titles = [title.split(":")[0] for _, title, _ in tables.full_tables(records)]
    assert titles == ["d, source photo, m", "e, source photo, m", "d, source sketch, m", "d, source photo, n"]
    assert terminal_table(records).count("method") == 4


def test_unseen_sets_of_other_domains_have_their_columns():
    records = scores("arf", {"unseen cars": [1.0], "unseen mean": [2.0], "photo": [3.0]})
    [row] = parsed(tables.full_tables(records)[0][2])
    assert row["unseen cars"] == "1.0"


def test_the_terminal_shows_means_and_the_differences_that_matter():
    records = [
        *scores("zero-shot", {"photo": [60.0], "sketch": [1.0], "OOD mean": [61.0], "unseen mean": [62.0]}),
        *scores("flyp", {"photo": [70.0], "OOD mean": [60.0], "unseen mean": [50.0]}, "both towers"),
        *scores("arf", {"photo": [71.0], "OOD mean": [64.0], "unseen mean": [None]}, "both towers"),
    ]
    assert terminal_table(records).splitlines() == [
        "d, source photo, m: accuracy in per cent, 1 seed",
        "",
        "method       ID   OOD   unseen         ID        OOD     unseen",
        "                                less flyp  less flyp  less flyp",
        "zero-shot  60.0  61.0     62.0      -10.0        1.0       12.0",
        "flyp       70.0  60.0     50.0",
        "arf        71.0  64.0  not run        1.0        4.0",
    ]


def arf_run(suffix=""):
    """Return records of a run whose table has all that can make it wide."""
    wide = {"photo": [60.123, 72.2], "OOD mean": [-40.0, 88.0], "unseen mean": [50.0, 3.0]}
    records = scores("zero-shot", wide)
    for method, trained in [
        ("finetune", "image tower, head"), ("flyp", "both towers"), ("flyp+retrieved", "both towers"),
        ("arf" + suffix, "both towers"),
    ]:
        for alpha in (1.0, 0.5):
            options = {"lambda_ret": 0.5} if "retrieved" in method else {}
            records += scores(method, wide, trained, alpha=alpha, options=options)
    return records


@pytest.mark.parametrize("suffix", ["", "+ldfs:sigma=0.003,direction=class", "+ldfs:sigma=0.003" + "0" * 100])
def test_terminal_tables_are_at_most_100_columns_wide_whatever_is_in_them(suffix):
    records = arf_run(suffix)
    records = [{**r, "model": "local-dir:" + "/a long path" * 12} for r in records]
    text = terminal_table(records)
    assert max(map(len, text.splitlines())) <= 100
    assert "OOD" in text and "less flyp" in text and text.count("both towers") in (0, 6)
    names = "".join(line[:40].strip() for line in text.splitlines()[2:] if not line.startswith("zero"))
    assert f"arf{suffix}" in names.replace(" ", "") or suffix == ""


def test_what_does_not_fit_is_left_out_in_order():
    """Differences to others than FLYP first, then ID's; labels that are not unique name what is trained."""
    def heads(suffix, *more):
        values = {mean: [60.0, 72.0] for mean in ("photo", "OOD mean", "unseen mean")}
        records = [r for m in ("flyp", "finetune", f"arf{suffix}", *more) for r in scores(m, values)]
        first, second = terminal_table(records).splitlines()[2:4]
        return first.split()[4:], re.findall(r"less \w+", second)

    flyp = ["less flyp"] * 3
    assert heads("") == (["ID", "OOD", "unseen"], flyp)
    assert heads("", "ldfs") == (["ID", "OOD", "unseen", "OOD"], [*flyp, "less finetune"])
    assert heads("+ldfs:sigma=0.03", "ldfs") == (["ID", "OOD", "unseen"], flyp)
    assert heads("+ldfs:sigma=0.03,pair=0.3,cls=1", "ldfs") == (["OOD", "unseen"], flyp[1:])
    same = scores("full", {"photo": [1.0]}, "head") + scores("full", {"photo": [1.0]}, "prompt")
    assert "full (head)" in terminal_table(same) and "full (prompt)" in terminal_table(same)


def test_ldfs_is_compared_with_lads_in_the_terminal_too():
    values = {"photo": [1.0], "OOD mean": [5.0]}
    text = terminal_table(scores("finetune", values) + scores("lads", values) + scores("ldfs", values))
    assert "less finetune" in text and "less lads" in text and "less flyp" not in text


def test_measures_are_a_table_of_their_own():
    records = scores("ldfs", {"photo": [1.0]})
    for seed in (0, 1):
        for domain, value in (("sketch", 10 + 4 * seed), ("cartoon", 20)):
            values = {"domain consistency": value, "class consistency": 50}
            records.append(measured("synthesis", "ldfs", values, seed, domain=domain))
            values = {"|Δt|": 0.5 + seed / 10, "spread": 0.25}
            records.append(measured("mapper", "ldfs", values, seed, domain=domain))
    records.append(measured("mapper", "clipstyler", {"|Δt|": 0.125}, domain="sketch"))
    records.append(measured("captions", "captions, shuffled", {"CLIP score": 31.25}))
    records.append(measured("pairs", "retrieved", {"available": 1600, "retrieved": 187}))
    kinds = [kind for kind, _, _ in tables.full_tables(records)]
    assert kinds == ["accuracy", "measures", "measures", "measures", "measures"]
    synthesis, captions, pairs, mappers = (parsed(table) for _, _, table in tables.full_tables(records)[1:])
    assert synthesis[0] == {
        "method": "ldfs", "domain": "sketch", "domain consistency": "12.0 ± 2.8", "class consistency": "50.0 ± 0.0",
    }
    assert captions == [{"method": "captions, shuffled", "CLIP score": "31.2"}]
    assert pairs == [{"method": "retrieved", "available": "1600", "retrieved": "187"}]
    assert mappers[0] == {"method": "ldfs", "domain": "sketch", "|Δt|": "0.550", "spread": "0.250"}
    assert mappers[1] == {"method": "clipstyler", "domain": "sketch", "|Δt|": "0.125", "spread": ""}
    lines = [re.split(r"  +", line) for line in terminal_table(records).splitlines()]
    assert ["ldfs", "16.0 ± 1.4", "50.0 ± 0.0"] in lines  # the mean over targets, over seeds
    assert ["ldfs", "0.550", "0.250"] in lines and ["retrieved", "1600", "187"] in lines


def test_published_numbers_are_in_the_full_tables_of_their_data_sets():
    records = [{**r, "dataset": "imagenet"} for r in scores("arf", {"photo": [1.0]})]
    assert "| arf | 82.7 | 72.8 | 75.6 | 50.3 | 51.8 | 55.8 | 61.3 |" in markdown_table(records)
    assert "TerraIncognita" not in markdown_table(records) and "82.7" not in terminal_table(records)
    assert all(len(row) == len(entry["columns"]) for entry in tables.PUBLISHED for row in entry["rows"])


def test_published_means_are_those_of_their_columns():
    """To rounding; and a table of means alone agrees with the tables by set where it has the same paper's rows."""
    by_set = {}
    for entry in tables.PUBLISHED:
        columns = entry["columns"]
        if columns[-1] not in ("OOD mean", "unseen mean") or len(columns) < 6:
            continue
        first = columns.index("ID (imagenet)") + 1 if "ID (imagenet)" in columns else 1
        for label, *cells in entry["rows"]:
            numbers = [float(cell.strip("*")) for cell in cells]
            assert sum(numbers[first - 1:-1]) / (len(columns) - first - 1) == pytest.approx(numbers[-1], abs=0.051), label
            by_set[columns[-1], label] = cells[-1]
    assert len(by_set) == 11
    [rivals] = [entry for entry in tables.PUBLISHED if entry["columns"][-2:] == ["OOD mean", "unseen mean"]]
    means = {row[0]: row for row in rivals["rows"]}
    for label in ("arf", "dive"):
        assert means[label][-2:] == [by_set["OOD mean", label], by_set["unseen mean", label]]


def test_the_command_prints_short_and_full_tables(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["tables.py", *map(str, arguments)])
        tables.main()
        return capsys.readouterr().out

    records = scores("ldfs", {"photo": [1.0]}) + scores("lads", {"photo": [2.0]})
    save(records, tmp_path / "scores" / "a.json")
    assert run(tmp_path).strip() == terminal_table(records).strip()
    assert run(tmp_path, "--full").strip() == markdown_table(records).strip()
    write_records(records, tmp_path / "rows.jsonl")  # these come before scores/
    save(scores("arf", {"photo": [3.0]}), tmp_path / "scores" / "b.json")
    assert run(tmp_path).strip() == terminal_table(records).strip()
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2


# -------------------------------------------------------------------------------------------------
# Documents


@pytest.mark.parametrize("page", document.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_are_what_the_command_writes(page):
    text = page.read_text()
    assert document.with_tables(text, page.parent) == text, "run: python -m report.document"
    assert text.count("<!-- end -->") == len(document.MARK.findall(text))
    assert all(picture.exists() for picture in document.pictures(page))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results that the documents read, with one run "a"."""
    monkeypatch.setattr(document, "RESULTS", tmp_path)
    monkeypatch.setattr(document, "documents", lambda: [tmp_path / "a" / "README.md"])
    (tmp_path / "a").mkdir()
    return tmp_path


def test_a_page_follows_its_rows(results):
    page = "# A\n<!-- tables -->\nold\n<!-- end -->\ntext\n"
    records = scores("ldfs", {"photo": [12.5]}) + [measured("captions", "captions", {"CLIP score": 31.0})]
    write_records(records, results / "a/rows.jsonl")
    page = document.with_tables(page, results / "a")
    assert "| ldfs | 12.5 |" in page and "old" not in page and page.endswith("\ntext\n")
    assert "Captions, in per cent, 1 seed:\n\n| method | CLIP score |" in page
    write_records(scores("ldfs", {"photo": [37.5]}), results / "a/rows.jsonl")
    page = document.with_tables(page, results / "a")
    assert "| ldfs | 37.5 |" in page and "12.5" not in page


def test_a_short_table_has_the_listed_rows_and_columns(results, capsys):
    values = {"photo": [60.0, 62.0], "OOD mean": [50.0, 50.0], "photo ece": [5.0, 7.0]}
    records = scores("zero-shot", values) + scores("flyp", values, "both towers", options={"lr": 0.1})
    write_records([*records, *scores("arf", values, "both towers")], results / "a/rows.jsonl")
    page = document.with_tables("<!-- table a: zero-shot; a: flyp lr=0.1 -->\n<!-- end -->", results)
    assert parsed(page) == [
        {"method": "`zero-shot`", "trained": "nothing", "ID": "61.0 ± 1.4", "OOD mean": "50.0 ± 0.0"},
        {"method": "`flyp lr=0.1`", "trained": "both towers", "ID": "61.0 ± 1.4", "OOD mean": "50.0 ± 0.0"},
    ]
    page = document.with_tables("<!-- table\ncolumns: photo ece\na: arf\n-->\n<!-- end -->", results)
    assert parsed(page) == [{"method": "`arf`", "trained": "both towers", "photo ece": "6.0 ± 1.4"}]
    with pytest.raises(SystemExit):
        document.with_tables("<!-- table a: dive -->\n<!-- end -->", results)
    assert "docs/results/a has no row 'dive'. It has: zero-shot, flyp lr=0.1, arf." in capsys.readouterr().err


def test_output_is_what_the_terminal_shows_of_the_first_seeds(results):
    records = [r for m in ("finetune", "lads", "ldfs") for r in scores(m, {"photo": [1.0, 2.0, 9.0], "OOD mean": [5.0, 6.0, 9.0]})]
    write_records(records, results / "a/rows.jsonl")
    page = document.with_tables("<!-- output seeds: 2; a: finetune, ldfs -->\n<!-- end -->", results)
    shown = terminal_table([r for r in records if r["method"] != "lads" and r["seed"] < 2])
    assert [line[4:] for line in page.splitlines()[1:-1]] == shown.splitlines()[2:]


@pytest.mark.parametrize("ldfs, lads, verdict, difference", [
    ([6, 8, 7], [5.5, 7.5, 4.5], "reproduced", "+1.2 ± 1.2, 3 of 3 seeds"),
    ([6, 5, 7], [6, 5, 7], "not reproduced", "+0.0 ± 0.0, 0 of 3 seeds"),
    ([9, 5, 7], [6, 5, 7], "not reproduced", "+1.0 ± 1.7, 1 of 3 seeds"),
    ([4, 4, 4], [6, 5, 7], "the opposite", "-2.0 ± 1.0, 0 of 3 seeds"),
])
def test_the_verdict_of_a_claim_follows_from_its_rows(results, ldfs, lads, verdict, difference):
    head = "| claim | verdict | difference | of |\n| --- | --- | --- | --- |\n"
    for kind, values in (("OOD mean", None), ("unique neighbours", 1)):
        records = scores("lads", {"OOD mean": lads}) + scores("ldfs", {"OOD mean": ldfs})
        if values:
            records = scores("lads", {"photo": [1.0]})
            for method, of_seeds in (("lads", lads), ("ldfs", ldfs)):
                for seed, value in enumerate(of_seeds):
                    for domain, shift in (("sketch", 1), ("cartoon", -1)):
                        neighbours = {"unique neighbours": value + shift}
                        records.append(measured("synthesis", method, neighbours, seed, domain=domain))
        write_records(records, results / "a/rows.jsonl")
        row = f"| LDFS is better | old | | [a](a/README.md) {kind}: `ldfs` less `lads` |"
        page = document.with_tables(f"<!-- claims -->\n{head}{row}\n<!-- end -->", results)
        [cells] = parsed(page)
        assert (cells["verdict"], cells["difference"]) == (verdict, difference)
        assert document.with_tables(page, results) == page


def test_a_table_of_speed_follows_the_benchmark(results):
    rows = [{"what": "flyp / FLYP's", "ours, ms": 1234.5, "peer's / ours": 1.9439}, {"what": "arf", "ours, ms": 99.06}]
    save({"device": "CPU", "tables": {"training steps": rows, "search": []}}, results / "speed.json")
    page = document.with_tables("<!-- speed training steps -->\n<!-- end -->", results)
    assert parsed(page) == [
        {"what": "flyp / FLYP's", "ours, ms": "1234", "peer's / ours": "1.94"},
        {"what": "arf", "ours, ms": "99.1", "peer's / ours": ""},
    ] and "Measured on: device CPU." in page


def test_adding_a_run_replaces_its_rows_and_pictures(results, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["document.py", *map(str, arguments)])
        document.main()

    run_folder, page = tmp_path / "runs" / "a", results / "a" / "README.md"
    save(scores("ldfs", {"photo": [12.5]}), run_folder / "scores" / "a.json")
    (run_folder / "figure5.png").write_bytes(b"a picture")
    run("--add", run_folder, "a")
    assert page.read_text().startswith("# a\n\n<!-- tables -->\n\nd, source photo") and "| 12.5 |" in page.read_text()
    assert not (results / "a/figure5.png").exists()
    page.write_text("![Pairs](figure5.png) ![Between](curve.png)\n" + page.read_text())
    save(between_the_weights(), run_folder / "scores" / "b.json")
    run("--add", run_folder, "a")
    assert (results / "a/figure5.png").read_bytes() == b"a picture"
    with Image.open(results / "a/curve.png") as picture:
        assert picture.width > 200
    assert "| flyp α=0.5 |" in page.read_text()
    for arguments in (["--add", "a"], ["--add", run_folder, "docs/a"]):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert "--add takes run folders and a name" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# Figures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, which are not written."""
    drawings = []
    monkeypatch.setattr(figures, "save", lambda figure, path, *_, **__: drawings.append(figure))
    return drawings


def lines_of(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def test_a_method_has_the_same_style_everywhere():
    """The same in each run of the program, none twice in the table; options only change the marker."""
    assert len({*figures.STYLES.values()}) == len(figures.STYLES)
    assert {color for color, _ in figures.STYLES.values()} <= {*figures.COLOURS}
    assert figures.style("unheard of") == figures.style("unheard of")
    assert figures.style("new+ldfs")[0] in figures.COLOURS and figures.style("new+ldfs")[1] in figures.MARKERS
    for label in ("ldfs:sigma=0", "ldfs init=text"):
        color, marker = figures.style(label)
        assert color == figures.style("ldfs")[0] and marker in figures.MARKERS


def between_the_weights(**fields):
    records = []
    for method, alpha, shift in (("zero-shot", 1.0, 0), ("flyp", 1.0, 4), ("flyp", 0.5, 2), ("arf", 1.0, 8)):
        values = {"photo": [60 + shift, 62 + shift], "OOD mean": [50 - shift, 52 - shift], "sketch": [1, 2]}
        records += scores(method, values, "both towers", alpha=alpha, **(fields if method != "zero-shot" else {}))
    return records


def test_the_curve_runs_from_zero_shot_along_alpha(drawn):
    """… of the methods that were measured in between, also if they were recorded in another order."""
    records = between_the_weights()[::-1] + scores("finetune", {"photo": [1], "OOD mean": [1]})
    records += scores("arf", {"photo": [62], "OOD mean": [53]}, "both towers", alpha=0.25)
    figures.draw_curve(records, "curve.png")
    [axis] = drawn[0].axes
    lines = lines_of(axis)
    assert lines["flyp"] == [[47, 65]] and lines["arf"] == [[43, 69]]
    assert lines["zero-shot (α = 0)"] == [[51, 61]] and "finetune" not in lines
    curves = [line.get_xydata().tolist() for line in axis.lines if len(line.get_xydata()) > 1]
    assert curves == [[[51, 61], [53, 62], [43, 69]], [[51, 61], [49, 63], [47, 65]]]
    assert len(axis.containers) == 3  # error bars of flyp at α = 0.5 and 1, of arf at 1


def test_no_curve_without_weights_in_between_or_another_domain(drawn, capsys):
    figures.draw_curve(scores("flyp", {"photo": [1]}), "curve.png")
    records = scores("zero-shot", {"photo": [1]}) + scores("flyp", {"photo": [1]})
    figures.draw_curve(records + scores("flyp", {"photo": [1]}, alpha=0.5), "curve.png")
    out = capsys.readouterr().out
    assert "no weights in between" in out and "no other domain" in out and not drawn


@pytest.mark.parametrize("setting, values", [("lr", (1e-3, 1e-4)), ("epochs", (10, 2)), ("shots", (4, None))])
def test_accuracy_against_a_setting(drawn, setting, values):
    records = []
    for value in values:
        schedule = {**SCHEDULE, **({setting: value} if setting != "shots" else {})}
        options = {setting: value} if value else {}
        records += between_the_weights(schedule=schedule, options=options)
    figures.draw_against(setting, newest(records), "rates.png")
    of_id, of_ood = drawn[0].axes
    lines = {
        label: [[round(x), y] for x, y in points] for label, points in lines_of(of_ood).items()
    }
    assert lines["flyp"] == [[0, 47], [1, 47]] and lines["flyp α=0.5"] == [[0, 49], [1, 49]]
    assert lines["arf"] == [[0, 43], [1, 43]] and len(of_ood.containers) == 6  # error bars
    colours = {line.get_label(): (line.get_color(), line.get_marker()) for line in of_ood.lines}
    assert colours["flyp"] == colours["flyp α=0.5"] == figures.STYLES["flyp"]
    ticks = [tick.get_text() for tick in of_ood.get_xticklabels()]
    assert ticks == (["4", "all"] if setting == "shots" else [f"{v:g}" for v in sorted(values)])
    assert of_id.get_ylabel().startswith("ID") and "arf α=0.5" not in lines_of(of_id)


def test_arrows_go_from_a_strategy_to_the_same_with_synthesised_features(drawn):
    records = []
    at = {"zero-shot": (1, 2), "coop": (3, 4), "coop+lads": (5, 6), "coop+ldfs": (7, 8), "full+ldfs": (0, 0)}
    for method, (of_id, ood) in {**at, "flyp": (0, 0)}.items():
        records += scores(method, {"photo": [of_id - 1, of_id + 1], "OOD mean": [ood, ood]})
    figures.draw_strategies(records, "arrows.png")
    [axis] = drawn[0].axes
    assert [(text.xyann, text.xy) for text in axis.texts] == [((3, 4), (5, 6)), ((3, 4), (7, 8))]
    assert axis.lines[1].get_color() == figures.STYLES["coop"][0]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["zero-shot", "coop", "with lads's features", "with ldfs's features"]


@pytest.mark.parametrize("records, message", [
    ([measured("pairs", "retrieved", {"available": 1})], "no accuracies yet"),
    (scores("ldfs", {"photo": [1], "OOD mean": [1]}), "lack zero-shot"),
    ([*scores("zero-shot", {"photo": [1]}), {**scores("ldfs", {"photo": [1]})[0], "model": "n"}], "one data set"),
])
def test_figures_of_unsuitable_records_are_refused(records, message, capsys):
    for draw in (figures.draw_strategies, lambda *of: figures.draw_against("lr", *of)):
        with pytest.raises(SystemExit) as stop:
            draw(records, "a.png")
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_losses_have_a_panel_for_each_training_and_a_line_for_each_term(drawn):
    histories = {
        "flyp": [{"L_cl": 3.0, "lr": 1.0}, {"L_cl": 2.0, "lr": 0.5}],
        "arf": [{"L_cl": 4.0, "L_cap": 1.0, "lr": 1.0}],
        **{f"m{i}": [{"L_con": 1.0}] for i in range(3)},
    }
    figures.draw_losses(histories, "losses.png")
    panels = [axis for axis in drawn[0].axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == [*histories]
    assert lines_of(panels[0]) == {"L_cl": [[1, 3], [2, 2]]}
    assert lines_of(panels[1]) == {"L_cl": [[1, 4]], "L_cap": [[1, 1]]}
    assert panels[4].get_position().y1 < panels[0].get_position().y0  # four in a row


class Square:
    """In place of a Location."""

    def __init__(self, color):
        self.color = color

    def open(self):
        return Image.new("RGB", (16, 24), self.color)


def test_pictures_are_written_and_change_with_what_they_show(tmp_path):
    def draw(color, caption, lost, loss):
        image = Square(color)
        rows = [("photo", [(image, False)] * 2), ("ldfs", [(image, lost), (image, False)])]
        figures.draw_figure4(tmp_path / "figure4.png", {"sketch": rows, "Real World": rows})
        columns = [(image, "a long " * 30, None), (image, "a cat", (0.5, image, caption))]
        figures.draw_figure5(tmp_path / "figure5.png", columns)
        figures.draw_styles(tmp_path / "styles.png", {"photo": torch.rand(3, 3, 8, 8), "sketch": torch.ones(3, 3, 8, 8)})
        figures.draw_curve(between_the_weights(), tmp_path / "curve.png")
        figures.draw_losses({"flyp": [{"L_cl": loss, "lr": 1.0}] * 2}, tmp_path / "losses.png")
        for path in tmp_path.glob("*.png"):
            with Image.open(path) as picture:
                assert picture.format == "PNG" and picture.width > 200
        return {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}

    first = draw("green", "a drawing of a cat", True, 1.0)
    assert len(first) == 6 and {"figure4-sketch.png", "figure4-Real_World.png"} <= first.keys()
    second = draw("green", "a $drawing$ of a $5 cat", False, 2.0)
    changed = {name for name in first if first[name] != second[name]}
    assert changed >= {"figure4-sketch.png", "figure5.png", "losses.png"} and "curve.png" not in changed
    assert draw("red", "a $drawing$ of a $5 cat", False, 2.0)["figure4-sketch.png"] != second["figure4-sketch.png"]


@pytest.mark.parametrize("caption", ["costs $5 and $6", r"a $\bad{ $ one", "_^$"])
def test_a_caption_with_dollars_is_drawn_as_it_is(tmp_path, caption):
    figures.draw_figure5(tmp_path / "a.png", [(Square("red"), caption, (0.5, Square("red"), caption))])
    assert (tmp_path / "a.png").stat().st_size > 1000


# -------------------------------------------------------------------------------------------------
# Quality of synthesised features and anchors


def test_consistency_of_known_neighbours():
    target = torch.eye(4)[:2], torch.tensor([0, 1])  # real sketches of class 0 and 1
    source = torch.eye(4)[2:], torch.tensor([0, 1])  # real photos
    z_hat = torch.tensor([[1.0, 0, 0, 0], [0.9, 0, 0, 0], [0, 0.5, 0.6, 0], [0.1, 0, 0, 0.9]])
    values = quality.consistency(z_hat, torch.tensor([0, 1, 1, 1]), target, source)
    assert values == {"domain consistency": 50, "class consistency": 50, "unique neighbours": 50}
    values = quality.consistency(z_hat[:3], torch.tensor([0, 1, 1]), target, source)
    assert values["domain consistency"] == pytest.approx(100 * 2 / 3)  # the third is nearest to a photo


def settings_of(tmp_path, *methods, seeds=1):
    methods = {name: parse_method(name) for name in methods}
    return SimpleNamespace(
        dataset="tiny", source="photo", model="m", methods=methods, seeds=seeds, cache=tmp_path / ".features"
    )


@pytest.fixture
def known_features(monkeypatch, tiny_data):
    """The data set "tiny", whose features name domain and class."""
    dataset = load_dataset("tiny", tiny_data)
    domains = list(dataset.images)

    def features(clip, one, domain, items, folder):
        return torch.eye(9)[[3 * domains.index(domain) + label for _, label in items]]

    monkeypatch.setattr(quality, "cached_features", features)
    return dataset


def test_figure_4_measures_each_domain_by_its_own_images_and_mappers(known_features, tmp_path, monkeypatch):
    """A mapper that goes all the way to sketches, and to a wrong class for seed 1; to no cartoon."""
    def load_synthesisers(settings, dataset, clip, name, seed, items):
        assert items == known_features.split("photo", "photo", "test", seed)
        return {"sketch": lambda z: z.roll(3 + seed, 1), "cartoon": lambda z: z}

    monkeypatch.setattr(quality, "load_synthesisers", load_synthesisers)
    settings, clip = settings_of(tmp_path, "ldfs", "finetune", seeds=2), SimpleNamespace(device="cpu")
    records, picture = quality.synthesis_records(settings, known_features, clip)
    values = {(r["method"], r["domain"], r["seed"]): r["values"] for r in records}
    assert len(records) == 8 and all(r["n"] == 9 and r["kind"] == "synthesis" for r in records)
    assert values["ldfs", "sketch", 0]["domain consistency"] == 100
    assert values["ldfs", "sketch", 0]["class consistency"] == 100
    assert values["ldfs", "sketch", 1]["class consistency"] == 0
    assert values["ldfs", "cartoon", 0]["domain consistency"] == 0
    assert values["not mapped", "sketch", 0]["domain consistency"] == 0
    assert [*picture] == ["sketch", "cartoon"]
    assert all([label for label, _ in rows] == ["photo", "ldfs"] for rows in picture.values())
    source, sketches = (images for _, images in picture["sketch"])
    shown = known_features.split("photo", "photo", "test", 0)
    assert len(source) == 9 and {at for at, _ in source} == {at for at, _ in shown}
    label_of = dict(known_features.images["photo"] + known_features.images["sketch"])
    for (photo, _), (sketch, lost) in zip(source, sketches):  # of seed 0: no class is lost
        assert sketch.path.startswith("sketch/") and label_of[photo] == label_of[sketch] and not lost


def test_the_picture_frames_lost_classes(known_features, tmp_path, monkeypatch):
    synthesisers = {"sketch": lambda z: z.roll(4, 1), "cartoon": lambda z: z.roll(6, 1)}
    monkeypatch.setattr(quality, "load_synthesisers", lambda *of: synthesisers)
    _, picture = quality.synthesis_records(settings_of(tmp_path, "ldfs"), known_features, SimpleNamespace(device="cpu"))
    def frames(domain, row):
        return {lost for _, lost in picture[domain][row][1]}

    assert frames("cartoon", 1) == frames("cartoon", 0) == frames("sketch", 0) == {False}
    assert True in frames("sketch", 1)


def test_nothing_is_measured_without_synthesised_features_or_captions(known_features, tmp_path):
    settings = settings_of(tmp_path, "finetune", "flyp")
    assert quality.synthesis_records(settings, known_features, None) == ([], {})
    assert quality.caption_records(settings, known_features, None) == []


def describe_things(dataset):
    """Write descriptions.jsonl: "A thing7, some tag" of the eighth photo."""
    (dataset.folder / "descriptions.jsonl").write_text("".join(
        json.dumps({"path": location.path, "caption": f"A thing{i}, some tag"}) + "\n"
        for i, (location, _) in enumerate(dataset.images["photo"])
    ))


def test_caption_quality_of_known_captions(tiny_data, monkeypatch):
    dataset = load_dataset("tiny", tiny_data)
    describe_things(dataset)
    captions = ["a Red House"] * 25 + [f"a thing{i}" for i in range(25, 30)]  # 10 cats, dogs, houses
    features = {text: torch.eye(8)[i] for i, text in enumerate(dict.fromkeys(captions))}
    monkeypatch.setattr(quality, "encode_texts", lambda clip, texts: torch.stack([features[t] for t in texts]))
    values = quality.caption_quality(dataset, dataset.images["photo"], captions, torch.eye(8)[[0] * 30], None)
    assert values["names the class"] == pytest.approx(100 * 5 / 30)
    assert values["names class or thing"] == pytest.approx(100 * 10 / 30)
    assert values["CLIP score"] == pytest.approx(100 * 25 / 30)


def test_captions_are_measured_as_written_beside_shuffled_and_peoples(known_features, tmp_path, monkeypatch):
    describe_things(known_features)
    texts = {}
    monkeypatch.setattr(quality, "caption_quality", lambda *of: texts.setdefault(len(texts), of[2]) and {"x": 1.0})
    items = known_features.images["photo"]
    rows = {at.path: {"path": at.path, "caption": f"caption {i}"} for i, (at, _) in enumerate(items)}
    first = items[0][0]
    stamp = os.stat(first.file)
    rows[first.path] |= {"caption": "so so so so", "by": "x", "size": stamp.st_size, "time": stamp.st_mtime_ns}
    known_features.captions.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    records = quality.caption_records(settings_of(tmp_path, "arf"), known_features, None)
    assert [r["method"] for r in records] == ["captions", "captions, shuffled", "descriptions by people"]
    written = ["so so so so", *(f"caption {i}" for i in range(1, 30))]
    assert texts[0] == written  # also what a method would not train with
    assert data.captions(known_features, items)[0] != "so so so so"
    assert texts[1] != written and sorted(texts[1]) == sorted(written)
    assert texts[2] == [f"A thing{i}, some tag" for i in range(30)]


def test_figure_5_shows_the_best_pair_of_each_training_image(known_features, tmp_path, monkeypatch):
    train = known_features.split("photo", "photo", "train", 0)
    first, second = (location.path for location, _ in train[:2])
    pairs = [
        {"text": "worse", "queries": {first: 0.2}}, {"text": "best", "queries": {first: 0.8, second: 0.1}},
        {"text": "middle", "queries": {first: 0.5, "another.png": 0.9}},
    ]
    monkeypatch.setattr(quality.anchors, "retrieve_pairs", lambda *of: {"pairs": pairs})
    monkeypatch.setattr(quality.anchors, "pair_location", lambda settings, dataset, pair: f"at {pair['text']}")
    settings = settings_of(tmp_path, "arf")
    columns = {at.path: (caption, pair) for at, caption, pair in quality.figure5_columns(settings, known_features, None)}
    assert columns.keys() == {first, second}
    captions = data.captions(known_features, train[:2])
    assert columns[first] == (captions[0], (0.8, "at best", "best"))
    assert columns[second] == (captions[1], (0.1, "at best", "best"))
    monkeypatch.setattr(quality.anchors, "retrieve_pairs", lambda *of: {"pairs": []})
    columns = quality.figure5_columns(settings, known_features, None)
    assert len(columns) == 10 and all(pair is None for _, _, pair in columns)
    assert len({location.path for location, _, _ in columns} - {at.path for at, _ in train}) == 0
