"""finetune.py: what is trained and what is not, killing and resuming, baselines, and that it
learns.
"""

import copy
import json
import math
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes, square, write_shard

import batches
import config
import data
import distributed
import export
import features
import finetune
import strategies
import training
from config import SCHEDULES, Schedule
from distributed import leave
from finetune import ce_step, contrastive_step
from mapper import Mapper
from methods import Method, parse_method
from prompts import PROMPTS, CoOp, MaPLe

SHORT = {k: Schedule(3, 8, 1e-2 if k == "linear" else 1e-3) for k in SCHEDULES}
TEXT_TOWER = {"transformer", "token_embedding", "positional_embedding", "text_projection", "ln_final"}
TEXT_TOWER |= {"logit_scale"}


def settings(tiny_data, tiny_clip, run, *more, schedules=None):
    """(Config, Dataset) of the tiny world; `schedules` in place of SHORT's."""
    common = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", run, *more]
    parsed, dataset = config.parse("", [str(argument) for argument in common])
    return config.Config(**{**vars(parsed), "schedules": {**SHORT, **(schedules or {})}}), dataset


@pytest.fixture
def world(tiny_data, tiny_clip, tmp_path):
    """run(name, …): finetune by one method, from the original weights, and give the checkpoint's
    modules.
    """

    class World:
        cfg, dataset = settings(tiny_data, tiny_clip, tmp_path / "run")
        clip = features.load_clip(cfg)
        original = copy.deepcopy(clip.model.state_dict())

        def run(self, name="finetune", train="linear", seed=0, run=None, schedule=None, **changes):
            method = parse_method(name, train)
            schedules = {**self.cfg.schedules, **({method.train: schedule} if schedule else {})}
            changes = {"schedules": schedules, "run": run or self.cfg.run, **changes}
            cfg = config.Config(**{**vars(self.cfg), **changes})
            self.clip.model.load_state_dict(self.original)
            self.learner = finetune.finetune(self.clip, self.dataset, cfg, name, method, seed)
            self.path = finetune.checkpoint_path(cfg, name, seed)
            return torch.load(self.path)["modules"]

    return World()


def mapper_of(monkeypatch, nan=False):
    """One frozen mapper stands for all that load_synthesiser gives."""
    torch.manual_seed(0)
    frozen = Mapper(32).requires_grad_(False)
    if nan:
        frozen.net[0].weight.data.fill_(float("nan"))
    monkeypatch.setattr(finetune, "load_synthesiser", lambda *args: frozen)
    return frozen


def changed(before, after):
    return {k.split(".")[0] for k in after if not torch.equal(before[k], after[k])}


# --- what is trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize("train, trained, moves", [
    ("linear", {"head"}, set()), ("coop", {"vectors"}, set()), ("cocoop", {"vectors", "meta_net"}, set()),
    ("maple", {"vectors", "couplings"}, set()),
    ("full", {"head", "towers"}, {"visual"}), ("lpft", {"head", "towers"}, {"visual"}),
    ("clipood", {"towers"}, {"visual"}), ("towers", {"towers"}, {"visual"} | TEXT_TOWER),
])
def test_only_what_is_trained_moves(world, monkeypatch, train, trained, moves):
    frozen = mapper_of(monkeypatch)
    before = copy.deepcopy(frozen.state_dict())
    modules = world.run(f"{train}+ldfs", init="text")
    assert changed(world.original, world.clip.model.state_dict()) == moves
    assert not changed(before, frozen.state_dict()) and all(p.grad is None for p in frozen.parameters())
    named = world.learner.named_parameters()
    assert {name.split(".")[0] for name, p in named if p.requires_grad} == trained
    text = features.encode_texts(world.clip, data.class_texts(world.dataset, "photo"))
    heads = [F.normalize(v, dim=-1) for k, v in modules.items() if k == "head.weight"]
    assert [torch.allclose(head, text, atol=1e-6) for head in heads] == {
        "linear": [False], "full": [False], "lpft": [False], "clipood": [True],
    }.get(train, [])  # prompts and both towers have texts in its place


def test_of_a_tower_that_is_locked_the_last_groups_move(world):
    world.run("full", unlocked_groups=1)
    moved = {k for k, v in world.clip.model.state_dict().items() if not torch.equal(v, world.original[k])}
    assert moved == {"visual.proj"}
    world.run("flyp", unlocked_groups=0)
    assert changed(world.original, world.clip.model.state_dict()) == TEXT_TOWER
    world.run("flyp", lock_text=True)
    assert changed(world.original, world.clip.model.state_dict()) == {"visual"}


@pytest.mark.parametrize("train", SCHEDULES)
def test_a_killed_run_resumes_to_the_same_bits(world, tmp_path, train, monkeypatch):
    whole = world.run(train, run=tmp_path / "whole")
    calls, true_loss = [], finetune.ce_step
    deadly = 8 + 9 * (train == "lpft")  # within the third epoch of three steps, after the probe's

    def dies(*args):
        calls.append(1)
        if len(calls) == deadly:
            raise KeyboardInterrupt
        return true_loss(*args)

    monkeypatch.setattr(finetune, "ce_step", dies)
    with pytest.raises(KeyboardInterrupt):
        world.run(train)
    monkeypatch.setattr(finetune, "ce_step", true_loss)
    resumed = world.run(train)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_finished_run_is_left_alone_and_another_one_is_not(world, tiny_data):
    first = world.run()
    stamp = world.path.stat().st_mtime_ns
    world.run()
    assert world.path.stat().st_mtime_ns == stamp
    first_path = world.path
    world.run(schedule=Schedule(3, 8, 1e-3))  # another --lr is another checkpoint
    assert world.path != first_path and first_path.stat().st_mtime_ns == stamp

    cat, dog = (tiny_data / "tiny" / "photo" / c / "1.png" for c in ("cat", "dog"))
    pixels = cat.read_bytes(), dog.read_bytes()
    cat.write_bytes(pixels[1]), dog.write_bytes(pixels[0])  # other images under the same names
    assert not torch.equal(first["head.weight"], world.run()["head.weight"])


def test_finetuning_learns_the_source(world):
    items = world.dataset.split("photo", "photo", "train", 0)
    z, labels = features.encode_images(world.clip, items), torch.tensor([y for _, y in items])
    head = world.run(schedule=Schedule(100, 18, 1e-2))["head.weight"]
    assert (z @ head.T).argmax(1).eq(labels).all()


def test_both_starts_of_the_head_differ_and_are_seeded(world, tmp_path):
    still = Schedule(1, 18, 0.0)
    text = world.run(schedule=still, init="text")["head.weight"]
    assert torch.allclose(text, features.encode_texts(world.clip, data.class_texts(world.dataset, "photo")), atol=1e-6)
    scratch = [
        world.run(schedule=still, seed=seed, run=tmp_path / str(n))["head.weight"]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(scratch[0], scratch[1]) and not torch.equal(scratch[0], scratch[2])


def test_full_finetuning_takes_wise_fts_first_steps(world, monkeypatch):
    """Against the published formula: W starts as s · T inside of the parameter, b as 0, both
    trained by AdamW on CE(W z + b), all gradients together cut to a length of 1.
    """
    schedule = Schedule(3, 18, 1e-3, warmup=1e-9, max_norm=1.0)
    monkeypatch.setattr(training, "lr_at", lambda step, steps, schedule: schedule.lr)
    world.clip.augment = world.clip.preprocess
    got = world.run("finetune", train="full", schedule=schedule, init="text")

    items = world.dataset.split("photo", "photo", "train", 0)
    world.clip.model.load_state_dict(world.original)
    model, y = world.clip.model, torch.tensor([label for _, label in items])
    x = torch.stack([world.clip.preprocess(location.open()) for location, _ in items])
    text = features.encode_texts(world.clip, data.class_texts(world.dataset, "photo"))
    w = (model.logit_scale.exp() * text).detach().clone().requires_grad_()
    b = torch.zeros(3, requires_grad=True)
    parameters = [w, b, *model.visual.requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    for _ in range(3):  # a batch is the whole part, so that its order does not matter
        z = F.normalize(model.encode_image(x), dim=-1)
        optimizer.zero_grad()
        F.cross_entropy(z @ w.T + b, y).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert torch.allclose(got["head.weight"], w, atol=1e-5) and torch.allclose(got["head.bias"], b, atol=1e-5)
    assert b.abs().max() > 1e-3
    assert torch.allclose(got["towers.visual.proj"], model.visual.proj, atol=1e-4)


def test_lpft_starts_from_the_trained_probe(world):
    still = Schedule(1, 18, 0.0)
    modules = world.run("lpft", schedule=still)
    [probe] = [path for path in world.path.parent.iterdir() if "probe" in path.name]
    probe = torch.load(probe)["modules"]["head.weight"]
    assert torch.allclose(modules["head.weight"], world.clip.logit_scale * probe)
    assert not changed(world.original, world.clip.model.state_dict())


def test_ce_step_is_the_sum_over_original_and_synthesised():
    z, w = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(3, 8), dim=-1)
    y, mappers = torch.tensor([0, 1, 2, 0]), [Mapper(8), Mapper(8)]
    z_all = [z, mappers[0](z), mappers[1](z)]
    parts = [F.cross_entropy(9 * x @ w.T, y) for x in z_all]
    assert torch.allclose(ce_step(z_all, y, lambda x: 9 * x @ w.T), sum(parts))


def test_a_seed_takes_its_own_mappers_of_all_targets(world, monkeypatch):
    frozen, asked = mapper_of(monkeypatch), []
    monkeypatch.setattr(finetune, "load_synthesiser", lambda *args: asked.append(args[3:6]) or frozen)
    world.run("ldfs", seed=1)
    assert asked == [("ldfs", "sketch", 1), ("ldfs", "cartoon", 1)]


def test_the_encoder_learns_through_the_frozen_mapper():
    z = F.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
    m = Mapper(8).requires_grad_(False)
    ce_step([m(z)], torch.tensor([0, 1, 2, 0]), lambda x: 9 * x @ torch.eye(8)[:3].T).backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in m.parameters())


def test_the_schedule_warms_up_and_ends_at_zero():
    schedule = Schedule(epochs=1, batch_size=1, lr=2.0, warmup=0.1)
    rates = [training.lr_at(step, 100, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_long_gradient_is_cut_and_weights_decay(world, tmp_path, monkeypatch):
    lengths, decays, step = [], set(), torch.optim.AdamW.step

    def look(self, *args, **kwargs):
        gradients = [p.grad.flatten() for g in self.param_groups for p in g["params"]]
        lengths.append(torch.cat(gradients).norm().item())
        decays.update(group["weight_decay"] for group in self.param_groups)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    world.run(schedule=Schedule(2, 8, 1e-3))
    free = max(lengths)
    lengths.clear()
    world.run(schedule=Schedule(2, 8, 1e-3, max_norm=free / 2), run=tmp_path / "cut")
    assert max(lengths) == pytest.approx(free / 2, rel=1e-4) and decays == {0.1}


def test_what_is_not_finite_stops_the_run(world, tmp_path, monkeypatch):
    mapper_of(monkeypatch, nan=True)
    with pytest.raises(FloatingPointError, match="step 0"):
        world.run("ldfs")
    with pytest.raises(FloatingPointError, match="not finite after step"):  # the last step's, too
        world.run("full", schedule=Schedule(1, 18, 1e38), run=tmp_path / "big")
    assert not list((tmp_path / "big").glob("checkpoints/*.pt"))


# --- settings ----------------------------------------------------------------------------------------


def test_a_data_set_may_bring_its_schedule_and_flags_come_first(tiny_data, tiny_clip, tmp_path):
    about = tiny_data / "tiny" / "dataset.json"
    own = {"schedules": {"linear": {"lr": 0.5, "epochs": 2}}}
    about.write_text(json.dumps(json.loads(about.read_text()) | own))
    common = ["tiny", "photo", "--data", str(tiny_data), "--run", str(tmp_path / "run")]
    schedule = config.parse("", [*common, "--lr", "0.25"])[0].schedules["linear"]
    assert (schedule.lr, schedule.epochs, schedule.batch_size) == (0.25, 2, 256)
    for bad in (
        {"rate": 1}, {"epochs": 1.5}, {"batch_size": True}, {"lr": "1"}, {"weight_decay": -1}, {"warmup": 2},
        {"weight_decay": None}, {"max_norm": -1}, {"lr": float("nan")},
    ):
        about.write_text(json.dumps(json.loads(about.read_text()) | {"schedules": {"linear": bad}}))
        with pytest.raises(SystemExit):
            config.parse("", common)


def test_that_nothing_is_left_to_train_is_one_line(world, capsys):
    with pytest.raises(SystemExit):
        world.run("clipood", unlocked_groups=0)
    assert "clipood: --unlocked-groups and --lock-text leave nothing" in capsys.readouterr().err


def test_settings_are_frozen_and_their_id_is_what_a_result_hangs_on(tiny_data, tiny_clip, tmp_path):
    cfg, _ = settings(tiny_data, tiny_clip, tmp_path)
    with pytest.raises(AttributeError):
        cfg.lr = 1
    json.dumps(cfg.record())
    more = ["--methods", "lads", "--seeds", "1", "--alphas", "0.5"]
    assert settings(tiny_data, tiny_clip, tmp_path / "other", *more)[0].id == cfg.id
    assert settings(tiny_data, tiny_clip, tmp_path, "--k", "2")[0].id != cfg.id


@pytest.mark.parametrize("text, method", [
    ("finetune", Method("full")), ("ldfs:sigma=0", Method("full", recipe="ldfs:sigma=0")),
    ("flyp", Method("towers", True)), ("flyp+captions", Method("towers", True, captions=True)),
    ("arf", Method("towers", True, True, True)), ("arf+ldfs", Method("towers", True, True, True, "ldfs")),
    ("coop+lads", Method("coop", recipe="lads")), ("lpft", Method("lpft")),
    ("cocoop+ldfs", Method("cocoop", recipe="ldfs")), ("clipood", Method("clipood")),
    ("maple+ldfs", Method("maple", recipe="ldfs")),
])
def test_methods_are_named_by_what_they_are_made_of(text, method):
    assert parse_method(text, "full") == method


@pytest.mark.parametrize("text", ["finetune+captions", "ldfs+retrieved", "flyp+lads+ldfs", "arff", ""])
def test_methods_that_are_none_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_method(text)
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("flag, value", [("--alphas", "nan"), ("--alphas", "1.5"), ("--lr", "-1")])
def test_numbers_that_cannot_be_are_refused(tiny_data, flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        config.flags("").parse_args(["tiny", flag, value])
    assert stop.value.code == 2 and flag in capsys.readouterr().err


# --- FLYP and ARF ------------------------------------------------------------------------------------


def test_the_contrastive_step_is_the_weighted_sum_of_open_clips_losses():
    import open_clip

    def unit(n):
        return F.normalize(torch.randn(n, 16), dim=-1)

    class Encoder:  # what is handed in are features already
        model = torch.nn.Module()
        model.logit_scale = torch.tensor(math.log(14.0))
        encode_image = encode_text = staticmethod(lambda x: x)

    z, prompts, captions, images, texts, m = unit(6), unit(6), unit(6), unit(4), unit(4), Mapper(16)
    loss, labels = open_clip.ClipLoss(), torch.zeros(6)
    batch = batches.Batch(labels, images=z, prompts=prompts)
    assert torch.allclose(contrastive_step(Encoder, batch), loss(z, prompts, 14.0), atol=1e-6)
    batch = batches.Batch(labels, None, z, prompts, captions, (images, texts, 4))
    expected = loss(z, prompts, 14.0) + loss(m(z), prompts, 14.0)
    expected = expected + 0.5 * loss(z, captions, 14.0) + 2 * loss(images, texts, 14.0)
    assert torch.allclose(contrastive_step(Encoder, batch, [m], 0.5, 2.0), expected, atol=1e-6)


@pytest.fixture
def anchored(world, tmp_path, monkeypatch):
    """… with seven retrieved pairs."""
    members = {f"{i}.{e}": c for i in range(7) for e, c in (("png", square(i)), ("txt", b"w%d" % i))}
    write_shard(tmp_path / "0.tar", members)
    from sets.webdataset import read_shard

    pairs = [(location, text) for _, location, text, _ in read_shard(tmp_path / "0.tar")[0]]
    monkeypatch.setattr(finetune, "load_retrieved", lambda *args: pairs)
    return world


def arf_batch(clip, n=7):
    torch.manual_seed(0)
    images, labels = torch.randn(2, n, 3, 16, 16), torch.arange(n) % 3
    prompts, captions, texts = (
        clip.tokenizer([f"{word} {i % m}" for i in range(n)]) for word, m in (("a", 3), ("b", 5), ("c", 9))
    )
    return batches.Batch(labels, None, images[0], prompts, captions, (images[1], texts, n))


def gradients_of(world, loss, micro_batch=None):
    """The loss, and its gradient by all weights."""
    world.clip.micro_batch, model = micro_batch, world.clip.model.requires_grad_()
    model.zero_grad()
    value = loss()
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_arfs_joint_forward_and_micro_batches_are_exact(world):
    """… in loss and gradients: those of each loss with forwards of its own, whatever is computed
    again, in chunks of whatever size.
    """
    import open_clip

    clip, batch, clip_loss = world.clip, arf_batch(world.clip), open_clip.ClipLoss()

    def apart():
        pairs = [(batch.images, batch.prompts), (batch.images, batch.captions), batch.retrieved[:2]]
        return sum(
            clip_loss(*(F.normalize(x, dim=-1) for x in clip.model(*pair)[:2]), clip.model.logit_scale.exp())
            for pair in pairs
        )

    expected = gradients_of(world, apart)
    assert len(expected) > 20 and expected[0] > 1
    for micro in (None, 3, 100):
        got = gradients_of(world, lambda: contrastive_step(clip, batch), micro)
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("train, share", [("towers", 0.1), ("coop", 0.2), ("cocoop", 0.2), ("maple", 0.2)])
def test_with_micro_batches_cross_entropy_is_the_same_and_less_is_kept(world, train, share):
    """Kept: what autograd saves, where of chunks it saves nothing but the pixels."""
    kept = []

    def keep(x):
        kept[-1] += x.numel() if x.grad_fn else 0  # activations, not weights
        return x

    def loss():
        batch = arf_batch(world.clip, 9)
        batch.z = world.clip.encode_image(batch.images).detach()[None]
        of = {"towers": lambda: strategies.Towers(ce_step, world.clip, (), world.cfg, world.dataset)}
        learner = of.get(train, lambda: prompt(world, train))()
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            return learner(batch)

    whole, chunks = gradients_of(world, loss), gradients_of(world, loss, 2)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(whole, chunks, strict=True))
    assert 0 < kept[1] < share * kept[0]


@pytest.mark.parametrize("train, says", [("towers", "--micro-batch 2;"), ("cocoop", "--micro-batch 2;"), ("linear", "a smaller --batch-size;")])
def test_out_of_memory_is_one_line_with_a_remedy(world, monkeypatch, capsys, train, says):
    def run(*args):
        torch.empty(10**15)

    monkeypatch.setattr(finetune, "finetune", run)
    cfg = config.Config(**{**vars(world.cfg), "methods": {"it": parse_method("finetune", train)}})
    monkeypatch.setattr(finetune, "parse", lambda doc: (cfg, world.dataset))
    monkeypatch.setattr(finetune, "load_clip", lambda config: world.clip)
    with pytest.raises(SystemExit) as stop:
        finetune.main()
    [said] = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert stop.value.code == 2 and "it: out of memory at batch size 8" in said and says in said


@pytest.mark.parametrize("method", ["flyp", "flyp+captions", "flyp+retrieved", "arf"])
def test_a_step_is_one_forward_of_each_tower(anchored, monkeypatch, method):
    calls = {"encode_image": 0, "encode_text": 0}

    def counted(name, true_call):
        def call(*args, **more):
            calls[name] += torch.is_grad_enabled()
            return true_call(*args, **more)
        return call

    for name in calls:
        monkeypatch.setattr(anchored.clip.model, name, counted(name, getattr(anchored.clip.model, name)))
    anchored.run(method, schedule=Schedule(1, 18, 1e-3))
    assert calls == {"encode_image": 1, "encode_text": 1}
    assert changed(anchored.original, anchored.clip.model.state_dict()) == {"visual"} | TEXT_TOWER


def test_each_anchor_changes_what_is_learned(anchored, monkeypatch):
    mapper_of(monkeypatch)
    methods = ["flyp", "flyp+captions", "flyp+retrieved", "arf", "arf+ldfs"]
    states = [anchored.run(method)["towers.text_projection"] for method in methods]
    states += [anchored.run("arf", lambda_cap=0.1)["towers.text_projection"]]
    states += [anchored.run("arf", lambda_ret=0.1)["towers.text_projection"]]
    assert all(not torch.allclose(a, b) for i, a in enumerate(states) for b in states[:i])


def test_other_pixels_under_the_same_place_and_text_are_trained_on_anew(anchored, tmp_path):
    def config_hash():
        anchored.run("flyp+retrieved", schedule=Schedule(1, 18, 1e-3))
        return torch.load(anchored.path)["config_hash"]

    first, pool = config_hash(), tmp_path / "0.tar"
    assert config_hash() == first
    pool.write_bytes(pool.read_bytes())
    assert config_hash() != first


def test_each_image_goes_with_its_own_caption_and_a_prompt_of_its_class(anchored):
    """Whatever the order: the rows of a batch belong together, and each template is drawn."""
    clip, dataset, templates = anchored.clip, anchored.dataset, ["a photo of a {}.", "look, {}!"]
    dataset = replace(dataset, meta=replace(dataset.meta, templates={"photo": templates}))
    items = dataset.split("photo", "photo", "train", 0)
    captions, method = [f"number {i}" for i in range(18)], parse_method("flyp+captions")
    cfg = config.Config(**{**vars(anchored.cfg), "schedules": {"towers": Schedule(1, 5, 1e-3)}})
    clip.augment = lambda image: -clip.preprocess(image)  # to be told from what is not augmented
    of = batches.batches_of(clip, dataset, cfg, method, 0, items, None, captions, ())
    prompts, seen, drawn = [clip.tokenizer([t.format(c) for c in dataset.classnames]) for t in templates], 0, []
    pixels = torch.stack([clip.preprocess(location.open()) for location, _ in items])
    for batch in of(epoch=3):
        rows = [(pixels == -image).flatten(1).all(1).nonzero().item() for image in batch.images]
        assert torch.equal(batch.captions, clip.tokenizer([captions[row] for row in rows]))
        assert batch.labels.tolist() == [items[row][1] for row in rows]
        for prompt, y in zip(batch.prompts, batch.labels):
            drawn.append([torch.equal(prompt, p[y]) for p in prompts].index(True))
        seen += len(rows)
    assert seen == 18 and rows != sorted(rows) and {*drawn} == {0, 1}


def test_the_logit_scale_stays_below_a_hundred(world):
    world.original["logit_scale"] += 10
    world.clip.fingerprint = "another"
    assert world.run("flyp")["towers.logit_scale"].exp() <= 100 + 1e-3


def test_a_killed_arf_run_resumes_to_the_same_bits(anchored, tmp_path, monkeypatch):
    """Retrieved pairs, too, go on where they were in their endless passes."""
    whole = anchored.run("arf", run=tmp_path / "whole")
    calls, true_loss = [], finetune.contrastive_step

    def dies(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return true_loss(*args)

    monkeypatch.setattr(finetune, "contrastive_step", dies)
    with pytest.raises(KeyboardInterrupt):
        anchored.run("arf")
    monkeypatch.setattr(finetune, "contrastive_step", true_loss)
    resumed = anchored.run("arf")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_passes_are_whole_and_without_end():
    stream = [i for step in range(10) for i in batches.endless(5, 7, 0, step)]
    assert len(stream) == 70
    assert all(sorted(stream[i:i + 5]) == list(range(5)) for i in range(0, 70, 5))
    assert stream[:5] != stream[5:10] or stream[5:10] != stream[10:15]


def test_passes_over_the_pairs_go_on_from_epoch_to_epoch(anchored):
    dataset, pairs = anchored.dataset, finetune.load_retrieved()
    items, method = dataset.split("photo", "photo", "train", 0), parse_method("flyp+retrieved")
    of = batches.batches_of(anchored.clip, dataset, anchored.cfg, method, 0, items, None, (), pairs)
    texts = [tuple(text) for epoch in (0, 1) for batch in of(epoch) for text in batch.retrieved[1].tolist()]
    assert len(texts) == 48 and all(len({*texts[i:i + 7]}) == 7 for i in range(0, 42, 7))


def test_augmentation_hangs_on_image_and_epoch_alone(anchored):
    """Each image of each epoch, and each retrieved one whenever it comes, has a draw of its own."""
    clip, dataset, pairs = anchored.clip, anchored.dataset, finetune.load_retrieved()
    items, method = dataset.split("photo", "photo", "train", 0), parse_method("flyp+retrieved")
    clip.augment = lambda image: torch.rand(1)

    def draws(epoch):
        of = batches.batches_of(clip, dataset, anchored.cfg, method, 0, items, None, (), pairs)
        both = [(batch.images, batch.retrieved[0]) for batch in of(epoch)]
        return {x for pair in both for images in pair for x in images.flatten().tolist()}

    first = draws(0)
    torch.rand(1)
    assert len(first) == 18 + 24 and draws(0) == first and not draws(1) & first
    views = [(location, i) for i, (location, _) in enumerate(items)]
    for order in ([[0, 1, 2, 3]], [[3, 0], [2], [1]]):
        loads = batches.image_batches(views, clip.augment, order, clip.device, draw=("images", 0, 0))
        assert {x for images, _ in loads for x in images.flatten().tolist()} < first


def train_in_process(tiny_data, tiny_clip, run, pairs):
    """What each of several processes does: six steps of several methods, with batches of 17 and 1
    images, so that some have none of their own.
    """
    def sgd(parameters, lr, **more):  # AdamW would not notice gradients of another length
        return torch.optim.SGD(parameters, lr)

    lr = {"linear": 0.1, "full": 0.1, "clipood": 0.01, "maple": 0.01, "towers": 0.01}
    schedules = {k: Schedule(3, 17, lr[k], max_norm=1.0 if k == "full" else None) for k in lr}
    cfg, dataset = settings(tiny_data, tiny_clip, run, schedules=schedules)
    clip = features.load_clip(cfg)
    original = copy.deepcopy(clip.model.state_dict())
    with mock.patch.object(torch.optim, "AdamW", sgd), \
            mock.patch.object(finetune, "load_retrieved", lambda *args: pairs):
        methods = [("linear", "linear"), ("full", "full"), ("clipood", "clipood"), ("maple", "maple"), ("arf", "full")]
        for name, train in methods:
            clip.model.load_state_dict(original)
            finetune.finetune(clip, dataset, cfg, name, parse_method(name, train), 0)
    leave()


def test_several_processes_train_as_one(anchored, tiny_data, tiny_clip, tmp_path):
    """… whatever their number: no image is left out, each is augmented as one process would, and
    losses and gradients are the whole batch's.
    """
    about = tiny_data / "tiny" / "dataset.json"  # two templates: which is drawn must not hang on the process
    templates = {"templates": {"photo": ["a photo of {}", "look, a {}!"]}}
    about.write_text(json.dumps(json.loads(about.read_text()) | templates))
    pairs = finetune.load_retrieved()
    train_in_process(tiny_data, tiny_clip, tmp_path / "1", pairs)
    for n in (2, 3):
        in_processes(n, train_in_process, tiny_data, tiny_clip, tmp_path / str(n), pairs)
    for path in (tmp_path / "1" / "checkpoints").iterdir():
        one = torch.load(path)["modules"]
        before = {f"towers.{k}": v for k, v in anchored.original.items()}
        moved = [(v - before[k]).abs().max() for k, v in one.items() if k in before]
        assert not moved or max(moved) > 1e-3
        for n in (2, 3):
            several = torch.load(tmp_path / str(n) / "checkpoints" / path.name)["modules"]
            for name, weight in one.items():
                assert torch.allclose(weight, several[name], atol=1e-5, rtol=0), (path.name, n, name)


def test_the_first_process_alone_shows_a_bar_unless_the_environment_says_otherwise(monkeypatch):
    """… which it does to a bar that is not told `disable`."""
    monkeypatch.setattr(distributed, "tqdm", lambda *args, **more: more)
    assert distributed.progress([1], "bar", leave=False) == {"leave": False}
    monkeypatch.setattr(distributed, "ranks", lambda: (1, 2))
    assert distributed.progress([1], "bar", leave=False) == {"leave": False, "disable": True}


def test_a_stalled_process_is_noticed_in_minutes_and_a_barrier_waits(monkeypatch):
    calls = []
    for name in ("init_process_group", "new_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, n=name, **how: calls.append((n, args, how)) or n)
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.patient.cache_clear()
    distributed.barrier()
    distributed.patient.cache_clear()
    (first, _, train), (second, _, wait), *_, (last, [group], _) = calls
    assert (first, second, last, group) == ("init_process_group", "new_group", "barrier", "new_group")
    assert train["timeout"] <= timedelta(minutes=30) and wait["timeout"] >= timedelta(days=1)


# --- prompts, CLIPood, checkpoints -------------------------------------------------------------------


def test_an_exported_model_is_what_open_clip_loads(world, tmp_path, capsys):
    tuned = features.towers_of(world.run("flyp"))
    export.export(str(world.path), tmp_path / "out", alpha=0.25)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    mixed = {k: 0.75 * v + 0.25 * tuned[k] for k, v in world.original.items()}
    world.clip.model.load_state_dict(mixed)
    images, tokens = torch.randn(2, 3, 16, 16), world.clip.tokenizer(["a cat", "a dog"])
    for ours, theirs in zip(world.clip.model(images, tokens), model.eval()(images, tokens)):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert str(preprocess) == str(world.clip.preprocess)
    for name, folder in (("flyp", "out"), ("finetune", "new")):  # there already; trained no tower
        world.run(name)
        with pytest.raises(SystemExit):
            export.export(str(world.path), tmp_path / folder)
    assert "has files already" in (said := capsys.readouterr().err) and "no tower" in said
    world.run("flyp")
    whole = torch.load(world.path)
    for change, says in (
        ({"optimizer": {}}, "its training is not finished"), ({"weights": "others"}, "has other weights than"),
        ({"base": ("local-dir:/nowhere", None)}, "not there (Directory specified"),
    ):
        torch.save(whole | change, world.path)
        with pytest.raises(SystemExit):
            export.export(str(world.path), tmp_path / "new")
        assert says in capsys.readouterr().err and not (tmp_path / "new").exists()
    torch.save(whole, world.path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        export.export(str(world.path), tmp_path / "file")
    assert "file: could not be written (Not a directory)" in capsys.readouterr().err


def prompt(world, train="cocoop", step=ce_step):
    """An untrained CoOp or CoCoOp."""
    kind, phrase = PROMPTS[train], world.dataset.meta.phrases["photo"]
    vectors = kind.start(world.clip, phrase, torch.Generator().manual_seed(0))
    return kind(step, world.clip, world.dataset.classnames, vectors)


@pytest.mark.parametrize("start_token", [True, False])
def test_coops_prompt_with_the_embeddings_of_words_is_these_words(world, start_token):
    """… whether the tokenizer sets a start token or, like the emoji's, does not; only they learn."""
    clip, names, whole = world.clip, world.dataset.classnames, world.clip.tokenizer

    def without(texts):
        return F.pad(whole(texts)[:, 1:], (0, 1))

    clip.tokenizer = whole if start_token else without
    learner = prompt(world, "coop")
    assert learner.vectors.shape == (4, 32)
    for words in ("X X X X", "X to be X"):
        texts = [f"{words} {name}." for name in names]
        tokens = clip.tokenizer(texts)[0, start_token:start_token + 4]
        learner.vectors.data[:] = clip.model.token_embedding.weight[tokens]
        got = learner.encode(learner.vectors, learner.tokens)
        assert torch.allclose(got, features.encode_texts(clip, texts), atol=1e-6)
    got[:, 0].sum().backward()
    assert (learner.vectors.grad.abs().sum(1) > 0).all()
    assert clip.model.token_embedding.weight.grad is None


def test_what_is_padding_in_all_prompts_is_left_out(world):
    learner, lengths = prompt(world, "coop"), []
    block = world.clip.model.transformer.resblocks[0]
    block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    learner.encode(learner.vectors, learner.tokens)
    assert lengths == [1 + 4 + 2 + 1 + 1 + 1]  # start, vectors, "red house", full stop, end, one more


def test_cocoop_starts_as_the_sources_words(world):
    """… zero-shot, and with a meta-net that is 0 it is CoOp."""
    names, z = world.dataset.classnames, F.normalize(torch.randn(5, 32), dim=-1)
    logits = prompt(world).classifier(names)(z)
    text = features.encode_texts(world.clip, [f"a photo of a {name}." for name in names])
    assert torch.allclose(logits, world.clip.logit_scale * z @ text.T, atol=1e-4)
    coop = CoOp(ce_step, world.clip, names, prompt(world).vectors.data)
    assert torch.allclose(logits, coop.classifier(names)(z), atol=1e-4)


def test_cocoop_gives_each_image_its_own_prompt(world):
    """Against CoOp with V + π(z), image by image; classes it never saw can be named."""
    learner, z = prompt(world), F.normalize(torch.randn(5, 32), dim=-1)
    torch.nn.init.normal_(learner.meta_net[2].weight)
    names = ["tiger", "red house"]
    got = learner.classifier(names)(z)
    for image, logits in zip(z, got):
        coop = CoOp(ce_step, world.clip, names, learner.vectors.data + learner.meta_net(image))
        assert torch.allclose(logits, coop.classifier(names)(image[None])[0], atol=1e-4)
    assert (got[0] - got[1]).abs().max() > 1e-3


@pytest.mark.parametrize("train", PROMPTS)
def test_a_prompt_learns_the_classes(world, train):
    """On images of three colours, the trained prompt classifies."""
    epochs, lr = {"coop": (40, 3e-2), "cocoop": (40, 1e-2), "maple": (80, 1e-2)}[train]
    world.clip.augment = world.clip.preprocess
    world.run(train, schedule=Schedule(epochs, 8, lr, weight_decay=0))
    items = world.dataset.split("photo", "photo", "train", 0)
    with world.learner.prompted():
        z = features.encode_images(world.clip, items)
    logits = world.learner.classifier(world.dataset.classnames)(z)
    assert logits.argmax(1).eq(torch.tensor([y for _, y in items])).float().mean() > 0.9


def three_layers(world, **vision):
    """A Clip whose towers have three layers; `vision`: what else its image tower is."""
    vision = {"image_size": 16, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16, **vision}
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 3}
    torch.manual_seed(0)
    return replace(world.clip, model=open_clip.CLIP(32, vision, text).eval().requires_grad_(False))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_maples_towers_take_its_prompts_layer_by_layer(world, depth):
    """Against both towers gone through by hand; afterwards they are the original ones."""
    clip, images, vectors = three_layers(world), torch.randn(5, 3, 16, 16), torch.randn(depth, 2, 32)
    model, before = clip.model, clip.encode_image(images)
    learner, m = MaPLe(ce_step, clip, world.dataset.classnames, vectors, [Mapper(32)]), 2
    x = model.token_embedding(learner.tokens)
    x[:, 1:1 + m] = learner.vectors[0]  # behind the start token
    x = x + model.positional_embedding
    for layer, block in enumerate(model.transformer.resblocks):
        if 0 < layer < depth:
            x = torch.cat([x[:, :1], learner.vectors[layer].expand(3, m, 32), x[:, 1 + m:]], 1)
        x = block(x, attn_mask=model.attn_mask)
    t = model.ln_final(x)[range(3), learner.tokens.argmax(1)] @ model.text_projection
    t = F.normalize(t, dim=-1)
    assert torch.allclose(learner.encode(learner.vectors, learner.tokens), t, atol=1e-6)

    visual, own = model.visual, [f(v).expand(5, m, 48) for f, v in zip(learner.couplings, learner.vectors)]
    patches = visual.conv1(images).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(5, 1, 48), patches], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, own[0]], 1))
    for layer, block in enumerate(visual.transformer.resblocks):
        x = block(torch.cat([x[:, :5], own[layer]], 1) if 0 < layer < depth else x)
    z = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
    with learner.prompted():
        assert torch.allclose(clip.encode_image(images), z, atol=1e-6)
    assert not torch.allclose(before, z, atol=1e-2)

    y = torch.tensor([0, 1, 2, 0, 1])  # ẑ is made of what z is with prompts
    loss = learner(batches.Batch(y, images=images))
    expected = ce_step([z, learner.mappers[0](z)], y, lambda x: clip.logit_scale * x @ t.T)
    assert torch.allclose(loss, expected, atol=1e-4)
    loss.backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad.flatten(1).ne(0).any(1).all() if parameter.ndim > 1 else parameter.grad.any(), name
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(clip.encode_image(images), before)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_maple_starts_as_the_sources_first_words(world):
    clip, generator = three_layers(world), torch.Generator().manual_seed(0)
    vectors = MaPLe.start(clip, "a photo", generator)
    words = clip.tokenizer(["a photo"])[0, 1:3]
    assert vectors.shape == (3, 2, 32)  # as deep as the towers
    assert torch.equal(vectors[0], clip.model.token_embedding.weight[words])
    assert vectors[1:].std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("vision", [
    {"layers": [1, 1, 1, 1], "head_width": 64, "width": 8}, {"pool_type": "avg"},
    {"attentional_pool": True, "attn_pooler_heads": 2},
])
def test_maple_is_refused_where_prompts_cannot_stand(world, vision, capsys):
    """… in a network of convolutions, or a transformer that would pool them."""
    with pytest.raises(SystemExit) as stop:
        MaPLe.start(three_layers(world, **vision), "a photo", torch.Generator())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Name a ViT" in said and len(said.strip().splitlines()) == 1


def clipood(world, step=ce_step, steps=9):
    text = features.encode_texts(world.clip, data.class_texts(world.dataset, "photo"))
    return strategies.CLIPood(step, world.clip, text, (), None, steps)


def test_both_forms_of_clipoods_margin_agree(world):
    """λ times the distance of the texts, on the wrong classes' cosines: the loss is the same."""
    images, y = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 1, 0])
    loss = clipood(world)(batches.Batch(y, images=images))
    text, z = clipood(world).head.weight, world.clip.encode_image(images)
    cosines = z @ text.T + 0.3 * (1 - text @ text.T)[y]
    assert torch.allclose(loss, F.cross_entropy(world.clip.logit_scale * cosines, y), atol=1e-5)
    assert not torch.allclose(loss, F.cross_entropy(world.clip.logit_scale * z @ text.T, y), atol=1e-3)


def test_clipoods_average_has_the_weights_of_a_beta_distribution(world):
    alpha = strategies.beta_weights(9)
    density = torch.distributions.Beta(0.5, 0.5).log_prob((torch.arange(10) + 0.5) / 10).exp()
    assert torch.allclose(alpha, (density / density.sum()).double(), atol=1e-6)
    assert alpha.sum() == pytest.approx(1) and torch.allclose(alpha, alpha.flip(0))
    learner, proj = clipood(world), world.clip.model.visual.proj.data
    expected = alpha[0] * proj
    for t in range(1, 10):
        proj.normal_()
        learner.after_step()
        expected = expected + alpha[t] * proj
    learner.finish()
    assert torch.allclose(world.clip.model.visual.proj, expected, atol=1e-5)


def test_clipood_learns_the_source_and_without_a_step_is_zero_shot(world):
    items = world.dataset.split("photo", "photo", "train", 0)
    labels = torch.tensor([y for _, y in items])
    world.run("clipood", schedule=Schedule(1, 18, 0.0))
    assert not changed(world.original, world.clip.model.state_dict())
    head = world.run("clipood", schedule=Schedule(30, 18, 3e-3))["head.weight"]
    assert (features.encode_images(world.clip, items) @ head.T).argmax(1).eq(labels).float().mean() > 0.9


@pytest.mark.parametrize("train", ["full", "linear"])
def test_a_checkpoint_is_a_model(world, tiny_data, tmp_path, capsys, train):
    """--model takes what finetune.py wrote: its tower's features, under its name; a head alone is
    refused.
    """
    state = world.run(train)
    cfg = settings(tiny_data, world.path, tmp_path / "other")[0]
    if train == "linear":
        with pytest.raises(SystemExit) as stop:
            features.load_clip(cfg)
        assert stop.value.code == 2 and "does not hold" in capsys.readouterr().err
        return
    tuned = features.load_clip(cfg)
    assert all(torch.equal(v, state[f"towers.{k}"]) for k, v in tuned.model.state_dict().items())
    assert tuned.name == str(world.path) and tuned.fingerprint != world.clip.fingerprint
    (tmp_path / "other.pt").write_bytes(b"not a checkpoint")
    whole = torch.load(world.path)
    odd = {k: v[:1] if v.ndim else v for k, v in whole["modules"].items()}
    torch.save({**whole, "modules": odd}, tmp_path / "odd.pt")
    for name, says in (
        ("nowhere.pt", "no such file"), ("other.pt", "not a checkpoint of finetune.py"),
        ("odd.pt", "does not hold"),
    ):
        with pytest.raises(SystemExit):
            features.load_clip(settings(tiny_data, tmp_path / name, tmp_path / "other")[0])
        assert says in capsys.readouterr().err
