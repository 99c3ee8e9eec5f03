"""finetune.py: what is trained and what is not, schedules, killing and resuming, and that it learns."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import data
import features
import finetune
from finetune import SCHEDULES, Schedule, lr_at, step_loss, with_synthesised
from mapper import Mapper

SHORT = {"head": Schedule(3, 8, 1e-2), "visual": Schedule(3, 8, 1e-3), "all": Schedule(3, 8, 1e-3)}


@pytest.fixture
def clip(tiny_data, tiny_clip):
    dataset = data.load("tiny", tiny_data)
    args = data.arguments("").parse_args(["tiny", "photo", "--model", tiny_clip])
    return features.load_clip(args, dataset), dataset


def run(clip, dataset, path, train="head", mappers=(), schedule=None, seed=0, init="text"):
    schedule = schedule or SHORT[train]
    finetune.finetune(clip, dataset, "photo", seed, train, list(mappers), schedule, init, path.parent, path, made_of="test")
    return torch.load(path)["modules"]


def changed(before, after):
    return {k.split(".")[0] for k in after if not torch.equal(before[k], after[k])}


TEXT_TOWER = {"transformer", "token_embedding", "positional_embedding", "text_projection", "ln_final", "logit_scale"}


@pytest.mark.parametrize("train, moves", [("head", set()), ("visual", {"visual"}), ("all", {"visual"} | TEXT_TOWER)])
def test_only_what_is_trained_moves(clip, tmp_path, train, moves):
    clip, dataset = clip
    before = copy.deepcopy(clip.model.state_dict())
    frozen = Mapper(32).requires_grad_(False)
    mapper_before = copy.deepcopy(frozen.state_dict())
    modules = run(clip, dataset, tmp_path / "c.pt", train, [frozen])
    assert changed(before, clip.model.state_dict()) == moves
    assert not changed(mapper_before, frozen.state_dict()) and all(p.grad is None for p in frozen.parameters())
    head = F.normalize(modules["head.weight"], dim=-1)
    start = features.encode_texts(clip, data.class_texts(dataset, "photo"))
    assert torch.allclose(head, start, atol=1e-6) == (train == "all")  # there, the head is the text tower's


@pytest.mark.parametrize("train", SCHEDULES)
def test_a_killed_run_resumes_to_the_same_bits(clip, tmp_path, train, monkeypatch):
    clip, dataset = clip
    original = copy.deepcopy(clip.model.state_dict())
    whole = run(clip, dataset, tmp_path / "whole.pt", train)

    clip.model.load_state_dict(original)
    calls, true_loss = [], finetune.step_loss

    def dies(*args):
        calls.append(1)
        if len(calls) == 8:  # within the third epoch of three steps
            raise KeyboardInterrupt
        return true_loss(*args)

    monkeypatch.setattr(finetune, "step_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        run(clip, dataset, tmp_path / "killed.pt", train)
    monkeypatch.setattr(finetune, "step_loss", true_loss)
    clip.model.load_state_dict(original)
    resumed = run(clip, dataset, tmp_path / "killed.pt", train)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_finished_run_is_left_alone_and_another_one_is_not(clip, tmp_path, monkeypatch):
    clip, dataset = clip
    path = tmp_path / "c.pt"
    first = run(clip, dataset, path)
    stamp = path.stat().st_mtime_ns
    run(clip, dataset, path)
    assert path.stat().st_mtime_ns == stamp
    finetune.finetune(clip, dataset, "photo", 1, "head", [], SHORT["head"], "text", tmp_path, path, made_of="other")
    assert not torch.equal(first["head.weight"], torch.load(path)["modules"]["head.weight"])


def test_finetuning_learns_the_source(clip, tmp_path):
    clip, dataset = clip
    items = data.split(dataset, "photo", "photo", "train", 0)
    z, labels = features.encode_images(clip, dataset.folder, items), torch.tensor([y for _, y in items])
    head = run(clip, dataset, tmp_path / "c.pt", schedule=Schedule(100, 18, 1e-2))["head.weight"]
    assert (z @ head.T).argmax(1).eq(labels).all()


def test_both_starts_of_the_head_differ_and_are_seeded(clip, tmp_path):
    clip, dataset = clip
    still = Schedule(1, 18, 0.0)
    text = run(clip, dataset, tmp_path / "a.pt", schedule=still)["head.weight"]
    assert torch.allclose(text, features.encode_texts(clip, data.class_texts(dataset, "photo")))
    scratch = [
        run(clip, dataset, tmp_path / f"{n}.pt", schedule=still, seed=seed, init="scratch")["head.weight"]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(scratch[0], scratch[1]) and not torch.equal(scratch[0], scratch[2])


def test_step_loss_is_the_sum_over_original_and_synthesised():
    z, w = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(3, 8), dim=-1)
    y, mappers = torch.tensor([0, 1, 2, 0]), [Mapper(8), Mapper(8)]
    parts = [F.cross_entropy(9 * x @ w.T, y) for x in (z, mappers[0](z), mappers[1](z))]
    assert torch.allclose(step_loss(with_synthesised(z, mappers), y, w, 9.0), sum(parts))


def test_the_encoder_learns_through_the_frozen_mapper():
    z = F.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
    m = Mapper(8).requires_grad_(False)
    step_loss(with_synthesised(z, [m])[1:], torch.tensor([0, 1, 2, 0]), torch.eye(8)[:3], 9.0).backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in m.parameters())


def test_the_schedule_warms_up_and_ends_at_zero():
    schedule = Schedule(epochs=1, batch_size=1, lr=2.0, warmup=0.1)
    rates = [lr_at(step, 100, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_data_set_may_bring_its_schedule_and_flags_come_first(tiny_data, tiny_clip, tmp_path, script):
    about = tiny_data / "tiny" / "dataset.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"schedules": {"head": {"lr": 0.5, "epochs": 2}}}))
    common = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", tmp_path / "run", "--seeds", 1]
    script("finetune.py", *common, "--features", "original", "--lr", 0.25)
    made_of = torch.load(tmp_path / "run" / "checkpoints" / "head-scratch-original-seed0.pt")["made_of"]
    assert (made_of["schedule"]["lr"], made_of["schedule"]["epochs"], made_of["schedule"]["batch_size"]) == (0.25, 2, 256)


def test_a_loss_that_is_not_finite_stops_the_run(clip, tmp_path):
    clip, dataset = clip
    with pytest.raises(FloatingPointError, match="step 0"):
        broken = Mapper(32)
        broken.net[0].weight.data.fill_(float("nan"))
        run(clip, dataset, tmp_path / "c.pt", mappers=[broken])
