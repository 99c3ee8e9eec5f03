"""core/config.py: flags, settings, schedules."""

import json

import pytest

from core.config import describe, parse
from core.methods import parse_method
from sets.load import load_run


@pytest.fixture
def settings(tiny_data, tmp_path):
    """settings(*flags) -> (Settings, Dataset) of the tiny data set."""
    common = ["tiny", "photo", "--data", str(tiny_data), "--run", str(tmp_path / "run")]
    return lambda *flags: load_run(parse("", [*common, *flags]))


def test_a_data_set_may_bring_its_schedule_and_flags_come_first(tiny_data, settings, capsys):
    description = tiny_data / "tiny" / "dataset.json"
    own = {"schedules": {"linear": {"lr": 0.5, "epochs": 2}}}
    description.write_text(json.dumps(json.loads(description.read_text()) | own))
    schedule = settings("--lr", "0.25")[0].schedules["linear"]
    assert (schedule.lr, schedule.epochs, schedule.batch_size) == (0.25, 2, 256)
    for bad in (
        {"rate": 1}, {"epochs": 1.5}, {"batch_size": True}, {"lr": "1"}, {"weight_decay": -1}, {"warmup": 2},
        {"weight_decay": None}, {"max_norm": -1}, {"lr": float("nan")},
    ):
        description.write_text(json.dumps(json.loads(description.read_text()) | {"schedules": {"linear": bad}}))
        with pytest.raises(SystemExit):
            settings()
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("flag, value", [
    ("--alphas", "nan"), ("--alphas", "1.5"), ("--lr", "-1"), ("--lr", "0"), ("--seeds", "0"), ("--model", ""),
    ("--run", " "), ("--captions", ""), ("--pool", ""), ("--lambda-cap", "-1"), ("--unlocked-groups", "-1"),
])
def test_impossible_values_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("", ["tiny", flag, value])
    assert stop.value.code == 2 and flag in capsys.readouterr().err


def test_zero_is_an_end_point():
    args = parse("", ["tiny", "--alphas", "0", "1", "--lambda-cap", "0", "--lambda-ret", "0"])
    assert args.alphas == [0, 1] and args.lambda_cap == args.lambda_ret == 0


def test_options_are_the_changed_settings_that_matter_to_a_method(settings):
    flags = ["--lambda-cap", "0.5", "--lr", "0.25", "--k", "3", "--shots", "4", "--mapper-steps", "7", "--beams", "2", "--lambda-dive", "5"]
    changed, _ = settings(*flags)
    always = {"lr": 0.25, "shots": 4}
    for name, options in {
        "finetune": {}, "ldfs": {"mapper_steps": 7}, "flyp": {}, "flyp+captions": {"lambda_cap": 0.5},
        "flyp+retrieved": {"k": 3}, "arf": {"lambda_cap": 0.5, "k": 3}, "coop": {},
        "dive": {"k": 3, "lambda_dive": 5}, "snd+captions": {"lambda_cap": 0.5, "k": 3, "lambda_dive": 5},
    }.items():
        assert changed.options(parse_method(name)) == always | options
    usual, _ = settings()
    assert usual.options(parse_method("arf")) == {}


def test_the_resolved_settings_name_what_was_changed_and_by_what(tiny_data, settings):
    description = tiny_data / "tiny" / "dataset.json"
    own = {"schedules": {"linear": {"epochs": 2}}}
    description.write_text(json.dumps(json.loads(description.read_text()) | own))
    text = describe(*settings("--lr", "0.25", "--shots", "4", "--methods", "finetune", "flyp"), "cpu")
    assert "epochs 2 (data set)" in text and "lr 0.25 (flag)" in text and "--shots 4" in text
    assert "12 training, 3 validation, 9 test images" in text and "sketch 30, cartoon 30" in text
    assert "train head" in text and "train both towers" in text


@pytest.mark.parametrize("flags, reason", [
    (["foto"], "has no domain 'foto'"), (["photo", "--methods", "ldfs:unit=7"], "unit is 0 or 1"),
])
def test_settings_that_do_not_fit_the_data_are_one_line(tiny_data, tmp_path, flags, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        load_run(parse("", ["tiny", *flags, "--data", str(tiny_data), "--run", str(tmp_path / "run")]))
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_domains_of_one_name_cannot_be_synthesised(tiny_data, tmp_path, settings, capsys):
    description = tiny_data / "tiny" / "dataset.json"
    own = {"phrases": dict.fromkeys(("photo", "sketch", "cartoon"), "a photo")}
    description.write_text(json.dumps(json.loads(description.read_text()) | own))
    settings("--methods", "finetune")
    with pytest.raises(SystemExit):
        settings("--methods", "ldfs")
    assert "no text points from one to another" in capsys.readouterr().err
