"""finetune.py: the losses, the loop, what is trained, killing and resuming, and that it learns."""

import copy
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes, square, write_shard

import anchors
import batches
import data
import features
import finetune
from core.config import SCHEDULES, Schedule, parse
from core.distributed import leave
from core.memory import fitting_micro_batch
from core.methods import Method, parse_method
from finetune import arf_losses, dive_losses, ldfs_losses, lr_at
from mapper import Mapper
from sets.load import load_run
from sets.webdataset import read_shard
from strategies.base import LinearProbe
from strategies.towers import BothTowers, unlock_image_tower

SHORT = {k: Schedule(3, 8, 1e-2 if k == "linear" else 1e-3) for k in SCHEDULES}
TEXT_TOWER = {
    "transformer", "token_embedding", "positional_embedding", "text_projection", "ln_final", "logit_scale",
}


def make_settings(tiny_data, tiny_clip, run, *flags, schedules=None):
    """Return (Settings, Dataset) of the tiny world, with short schedules."""
    flags = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", run, *flags]
    settings, dataset = load_run(parse("", [str(flag) for flag in flags]))
    settings.schedules = {**SHORT, **(schedules or {})}
    return settings, dataset


@pytest.fixture
def world(tiny_data, tiny_clip, tmp_path):
    """run(name, …) finetunes by one method and returns the checkpoint's modules."""

    class World:
        settings, dataset = make_settings(tiny_data, tiny_clip, tmp_path / "run")
        clip = features.load_clip(settings)

        def run(self, name="finetune", train="linear", seed=0, schedule=None, **changes):
            settings = copy.copy(self.settings)
            vars(settings).update(changes)
            settings.methods = {name: parse_method(name, train)}
            if schedule:
                settings.schedules = {**settings.schedules, settings.methods[name].train: schedule}
            self.path = finetune.checkpoint_path(settings, self.dataset, self.clip, name, seed)
            path = finetune.finetune(settings, self.dataset, self.clip, name, seed)
            return torch.load(path, map_location="cpu")["modules"]

        def tuned(self, modules):
            """Return the state of clip.model that a checkpoint describes."""
            return {**self.clip.original, **features.towers_of(modules)}

    return World()


@pytest.fixture
def fixed_mapper(monkeypatch):
    """One frozen mapper replaces all mappers."""
    torch.manual_seed(0)
    mapper = Mapper(32).requires_grad_(False)
    targets = {"sketch": mapper, "cartoon": mapper}
    monkeypatch.setattr(finetune, "load_synthesisers", lambda *args: targets)
    monkeypatch.setattr(finetune, "synthesiser_keys", lambda *args: ["one mapper"])
    return mapper


def changed(before, after):
    return {k.split(".")[0] for k in after if not torch.equal(before[k], after[k])}


# --- losses --------------------------------------------------------------------------------------


class FixedStrategy:
    """A head and mappers that are given, on features of a frozen tower."""

    def __init__(self, head, mappers):
        self.head, self.mappers = head, mappers

    def head_for(self, batch):
        return self.head


def test_ldfs_losses_are_cross_entropy_of_original_and_synthesised_features():
    z, w = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(3, 8), dim=-1)
    y, m = torch.tensor([0, 1, 2, 0]), Mapper(8)
    strategy = FixedStrategy(lambda x: 9 * x @ w.T, {"sketch": m})
    losses = ldfs_losses(strategy, batches.Batch(y, torch.stack([z, m(z)])))
    assert losses.keys() == {"L_con", "L_con sketch"}
    for name, x in (("L_con", z), ("L_con sketch", m(z))):
        expected = (9 * x @ w.T).logsumexp(1).mean() - (9 * x @ w.T)[range(4), y].mean()
        assert torch.allclose(losses[name], expected, atol=1e-6)


def test_dives_losses_compare_pairs_with_the_pretrained_towers_and_follow_their_mean():
    class Encoder:  # the batch contains features already, which move by `shift`
        def __init__(self, shift):
            self.shift = shift

        def encode_image(self, x):
            return x + self.shift[0]

        encode_text = encode_image

    def losses(preserve, n=1):
        strategy.mean_vector = torch.zeros(16)
        for _ in range(n):
            got = dive_losses(strategy, batch, preserve, 2.0)
        return {name: loss.item() for name, loss in got.items()}

    z, t, shift = torch.randn(4, 16), torch.randn(4, 16), F.normalize(torch.randn(1, 16), dim=-1)
    batch = batches.Batch(torch.zeros(4), pool_images=z, pool_texts=t, n_pairs=4)
    strategy = SimpleNamespace(clip=Encoder(shift), pretrained=Encoder(torch.zeros(1, 16)))
    assert losses("snd") == pytest.approx({"L_snd": 2})
    first = losses("dive")  # m is a hundredth of the shift
    assert first == pytest.approx({"L_avl": 2 * 2 * 0.99 ** 2, "L_pvl": 0}, abs=1e-5)
    assert losses("dive", 2)["L_avl"] == pytest.approx(2 * 2 * 0.99 ** 4, abs=1e-5)
    assert losses("dive", 2000) == pytest.approx({"L_avl": 0, "L_pvl": 0}, abs=1e-5)


def test_arf_losses_are_open_clips_losses_weighted():
    def unit(n):
        return F.normalize(torch.randn(n, 16), dim=-1)

    class Encoder:  # the batch contains features already
        model = torch.nn.Module()
        model.logit_scale = torch.tensor(math.log(14.0))
        encode_image = encode_text = staticmethod(lambda x: x)

    z, prompts, captions, pool_z, pool_t, m = unit(6), unit(6), unit(6), unit(4), unit(4), Mapper(16)
    loss, labels = open_clip.ClipLoss(), torch.zeros(6)
    batch = batches.Batch(labels, images=z, prompts=prompts)
    assert arf_losses(Encoder, batch).keys() == {"L_cl"}  # FLYP
    batch = batches.Batch(labels, images=z, captions=captions)
    assert arf_losses(Encoder, batch) == {"L_cap": pytest.approx(loss(z, captions, 14.0))}  # without classes
    batch = batches.Batch(labels, None, z, prompts, captions, pool_z, pool_t, 4)
    got = arf_losses(Encoder, batch, {"sketch": m}, 0.5, 2.0)
    expected = {
        "L_cl": loss(z, prompts, 14.0), "L_cap": 0.5 * loss(z, captions, 14.0),
        "L_ret": 2 * loss(pool_z, pool_t, 14.0), "L_cl sketch": loss(m(z), prompts, 14.0),
    }
    assert got.keys() == expected.keys()
    assert all(torch.allclose(got[name], expected[name], atol=1e-6) for name in expected)
    assert arf_losses(Encoder, batch, retrieved=False).keys() == {"L_cl", "L_cap"}  # dive+captions


def test_the_encoder_learns_through_the_frozen_mapper():
    z = F.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
    m = Mapper(8).requires_grad_(False)
    strategy = FixedStrategy(lambda x: 9 * x @ torch.eye(8)[:3].T, {"sketch": m})
    strategy.encode_image = lambda images: images  # the "images" are z
    batch = batches.Batch(torch.tensor([0, 1, 2, 0]), images=z)
    ldfs_losses(strategy, batch)["L_con sketch"].backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in m.parameters())


def arf_batch(clip, n=7):
    torch.manual_seed(0)
    images, labels = torch.randn(2, n, 3, 16, 16), torch.arange(n) % 3
    prompts, captions, texts = (
        clip.tokenizer([f"{word} {i % m}" for i in range(n)]) for word, m in (("a", 3), ("b", 5), ("c", 9))
    )
    return batches.Batch(labels, None, images[0], prompts, captions, images[1], texts, n)


def gradients_of(clip, loss, micro_batch=None):
    """Return the loss, and its gradients by all weights."""
    clip.micro_batch, model = micro_batch, clip.model.requires_grad_()
    model.zero_grad()
    value = loss()
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_arfs_joint_forward_and_micro_batches_are_exact(world):
    """Loss and gradients equal those of each loss with its own forward pass."""
    clip, batch, clip_loss = world.clip, arf_batch(world.clip), open_clip.ClipLoss()

    def apart():
        pairs = [
            (batch.images, batch.prompts), (batch.images, batch.captions), (batch.pool_images, batch.pool_texts),
        ]
        outputs = [clip.model(clip.normalise(images), texts)[:2] for images, texts in pairs]
        s = clip.model.logit_scale.exp()
        return sum(clip_loss(*(F.normalize(x, dim=-1) for x in output), s) for output in outputs)

    expected = gradients_of(clip, apart)
    assert len(expected) > 20 and expected[0] > 1
    for micro in (None, 3, 100):
        got = gradients_of(clip, lambda: sum(arf_losses(clip, batch).values()), micro)
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(got, expected, strict=True))


def test_micro_batches_keep_less_for_the_backward_pass(world):
    kept = []

    def keep(x):
        kept[-1] += x.numel() if x.grad_fn else 0  # activations, not weights
        return x

    def loss():
        strategy = BothTowers(world.clip, world.clip.tokenizer(["a", "b", "c"]))
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            return sum(ldfs_losses(strategy, arf_batch(world.clip, 9)).values())

    whole = gradients_of(world.clip, loss)
    for rows in (2, 9):  # 9: DiVE encodes several whole batches, one after another
        chunks = gradients_of(world.clip, loss, rows)
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(whole, chunks, strict=True))
        assert 0 < kept[-1] < 0.1 * kept[0]


# --- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("train, parameters, moved", [
    ("linear", {"head"}, set()), ("coop", {"vectors"}, set()), ("cocoop", {"vectors", "meta_net"}, set()),
    ("maple", {"vectors", "couplings"}, set()),
    ("full", {"head", "towers"}, {"visual"}), ("lpft", {"head", "towers"}, {"visual"}),
    ("clipood", {"towers"}, {"visual"}), ("towers", {"towers"}, {"visual"} | TEXT_TOWER),
])
def test_only_what_is_trained_moves(world, monkeypatch, fixed_mapper, train, parameters, moved):
    before, trained = copy.deepcopy(fixed_mapper.state_dict()), {}
    true_train = finetune.train

    def look(strategy, *args, **lambdas):
        trained["last"] = {name.split(".")[0] for name, p in strategy.named_parameters() if p.requires_grad}
        return true_train(strategy, *args, **lambdas)

    monkeypatch.setattr(finetune, "train", look)
    modules = world.run(f"{train}+ldfs", init="text")
    assert trained["last"] == parameters
    assert changed(world.clip.original, world.tuned(modules)) == moved
    assert not changed(before, fixed_mapper.state_dict())
    # afterwards the model is the original one again
    assert not changed(world.clip.original, world.clip.model.state_dict())
    assert not any(p.requires_grad for p in world.clip.model.parameters())
    text = features.encode_texts(world.clip, data.class_texts(world.dataset, "photo"))
    heads = [F.normalize(v, dim=-1) for k, v in modules.items() if k == "head.weight"]
    assert [torch.allclose(head, text, atol=1e-6) for head in heads] == {
        "linear": [False], "full": [False], "lpft": [False], "clipood": [True],
    }.get(train, [])  # prompts and both towers classify by texts


def test_of_a_locked_tower_the_last_groups_move(world):
    modules = world.run("full", unlocked_groups=1)
    tuned = world.tuned(modules)
    assert {k for k, v in tuned.items() if not torch.equal(v, world.clip.original[k])} == {"visual.proj"}
    assert changed(world.clip.original, world.tuned(world.run("flyp", unlocked_groups=0))) == TEXT_TOWER
    assert changed(world.clip.original, world.tuned(world.run("flyp", lock_text=True))) == {"visual"}


def test_a_tower_that_cannot_be_locked_in_parts_is_one_line(capsys):
    """open_clip's ResNet is locked as a whole or not at all, and its CoCa has no such method."""
    text = {"context_length": 8, "vocab_size": 10, "width": 8, "heads": 1, "layers": 1}
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 8}
    resnet = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    unlock_image_tower(resnet, 0)
    assert not any(p.requires_grad for p in resnet.visual.parameters())
    assert not hasattr(open_clip.CoCa, "lock_image_tower")
    for model in (resnet, SimpleNamespace(visual=torch.nn.Linear(1, 1))):
        with pytest.raises(SystemExit) as stop:
            unlock_image_tower(model, 1)
        line = capsys.readouterr().err
        assert stop.value.code == 2 and "--unlocked-groups 1: not possible (" in line


def test_that_nothing_is_left_to_train_is_one_line(world, capsys):
    with pytest.raises(SystemExit):
        world.run("clipood", unlocked_groups=0)
    assert "clipood: --unlocked-groups and --lock-text leave nothing" in capsys.readouterr().err


def test_finetuning_learns_the_source(world):
    items = world.dataset.split("photo", "photo", "train", 0)
    z, labels = features.encode_images(world.clip, items), torch.tensor([y for _, y in items])
    head = world.run(schedule=Schedule(100, 18, 1e-2))["head.weight"]
    assert (z @ head.T).argmax(1).eq(labels).all()


def test_both_starts_of_the_head_differ_and_are_seeded(world, tmp_path):
    still = Schedule(1, 18, 0.0)
    text = world.run(schedule=still, init="text")["head.weight"]
    prompts = data.class_texts(world.dataset, "photo")
    assert torch.allclose(text, features.encode_texts(world.clip, prompts), atol=1e-6)
    scratch = [
        world.run(schedule=still, seed=seed, run=tmp_path / str(n))["head.weight"]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(scratch[0], scratch[1]) and not torch.equal(scratch[0], scratch[2])


def test_full_finetuning_takes_wise_fts_first_steps(world, monkeypatch):
    """Against the published formula: W starts as s · T, b as 0, and both are parameters of
    CE(W z + b) with AdamW, all gradients together clipped to a norm of 1.
    """
    schedule = Schedule(3, 18, 1e-3, warmup=1e-9, max_norm=1.0)
    monkeypatch.setattr(finetune, "lr_at", lambda step, steps, schedule: schedule.lr)
    world.clip.augment = world.clip.preprocess
    got = world.run("finetune", train="full", schedule=schedule, init="text")

    items = world.dataset.split("photo", "photo", "train", 0)
    model, y = world.clip.model, torch.tensor([label for _, label in items])
    x = torch.stack([world.clip.preprocess(location.decode()) for location, _ in items])
    text = features.encode_texts(world.clip, data.class_texts(world.dataset, "photo"))
    w = (model.logit_scale.exp() * text).detach().clone().requires_grad_()
    b = torch.zeros(3, requires_grad=True)
    parameters = [w, b, *model.visual.requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    for _ in range(3):  # a batch is all of the training part, so its order does not matter
        z = F.normalize(world.clip.image_tower(x), dim=-1)
        optimizer.zero_grad()
        F.cross_entropy(z @ w.T + b, y).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert torch.allclose(got["head.weight"], w, atol=1e-5) and torch.allclose(got["head.bias"], b, atol=1e-5)
    assert b.abs().max() > 1e-3
    assert torch.allclose(got["towers.visual.proj"], model.visual.proj, atol=1e-4)


def test_lpft_starts_from_the_trained_probe(world, tmp_path):
    modules = world.run("lpft", schedule=Schedule(1, 18, 0.0))
    probe = world.run("lpft", train="linear", init="text", run=tmp_path / "probe")
    [path] = (tmp_path / "run" / "checkpoints").glob("lpft-probe-*.pt")
    probe = torch.load(path)["modules"]["head.weight"]
    text = features.encode_texts(world.clip, data.class_texts(world.dataset, "photo"))
    assert torch.allclose(modules["head.weight"], world.clip.logit_scale * probe)
    assert not torch.allclose(probe, text, atol=1e-3)
    assert not changed(world.clip.original, world.tuned(modules))


def test_a_seed_takes_its_own_mappers_of_all_targets(world, monkeypatch):
    asked = []

    def load(settings, dataset, clip, recipe, seed, items):
        asked.append((recipe, seed))
        return {domain: Mapper(32).requires_grad_(False) for domain in ("sketch", "cartoon")}

    monkeypatch.setattr(finetune, "load_synthesisers", load)
    world.run("ldfs", seed=1, schedule=Schedule(1, 8, 1e-2))
    assert asked == [("ldfs", 1)]


def test_the_logit_scale_stays_below_a_hundred(world):
    world.clip.original["logit_scale"] += 10
    assert world.run("flyp")["towers.logit_scale"].exp() <= 100 + 1e-3


# --- the loop ------------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_ends_at_zero():
    schedule = Schedule(epochs=1, batch_size=1, lr=2.0, warmup=0.1)
    rates = [lr_at(step, 100, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_learning_rate_changes_at_every_step(world, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def look(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    schedule = Schedule(2, 8, 1.0)  # 18 images: six steps
    world.run(schedule=schedule)
    assert rates == [lr_at(n, 6, schedule) for n in range(6)]


def test_a_long_gradient_is_clipped_and_weights_decay(world, monkeypatch):
    norms, decays, step = [], set(), torch.optim.AdamW.step

    def look(self, *args, **kwargs):
        gradients = [p.grad.flatten() for g in self.param_groups for p in g["params"]]
        norms.append(torch.cat(gradients).norm().item())
        decays.update(group["weight_decay"] for group in self.param_groups)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    world.run(schedule=Schedule(2, 8, 1e-3))
    longest = max(norms)
    norms.clear()
    world.run(schedule=Schedule(2, 8, 1e-3, max_norm=longest / 2))
    assert max(norms) == pytest.approx(longest / 2, rel=1e-4) and decays == {0.1}


def test_a_loss_or_weight_that_is_not_finite_is_one_line(world, monkeypatch, capsys, fixed_mapper):
    fixed_mapper.net[0].weight.data.fill_(float("nan"))
    with pytest.raises(SystemExit) as stop:
        world.run("ldfs")
    assert stop.value.code == 2 and "L_con sketch is nan at step 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # of the last step, too
        world.run("full", schedule=Schedule(1, 18, 1e38))
    assert "not finite after step 0. Try a lower --lr" in capsys.readouterr().err
    assert not world.path.exists()


def test_the_history_has_the_means_of_each_loss_and_the_rate(world, monkeypatch):
    seen, true_losses = [], finetune.ldfs_losses
    monkeypatch.setattr(finetune, "ldfs_losses", lambda *args: seen.append(true_losses(*args)) or seen[-1])
    world.run(schedule=Schedule(2, 8, 1e-2))
    history = json.loads(finetune.history_path(world.path).read_text())
    assert len(seen) == 6 and len(history) == 2
    for epoch, row in enumerate(history):
        losses = [step["L_con"].item() for step in seen[3 * epoch:3 * epoch + 3]]
        assert row["L_con"] == pytest.approx(sum(losses) / 3, rel=1e-5)
        assert row["lr"] == lr_at(3 * epoch + 2, 6, Schedule(2, 8, 1e-2))


class Killed(BaseException):
    pass


def killed_at(monkeypatch, name, deadly):
    """Make the call number `deadly` of a loss function of finetune.py die."""
    monkeypatch.setattr(finetune, "SECONDS_BETWEEN_STATES", 0)
    calls, true_losses = [], getattr(finetune, name)

    def dies(*args):
        calls.append(1)
        if len(calls) == deadly:
            raise Killed
        return true_losses(*args)

    monkeypatch.setattr(finetune, name, dies)
    return calls


@pytest.mark.parametrize("train", SCHEDULES)
def test_a_killed_run_resumes_to_the_same_bits(world, tmp_path, train, monkeypatch):
    whole = world.run(train, run=tmp_path / "whole")
    deadly = 8 + 9 * (train == "lpft")  # within the third epoch of three steps, after the probe's
    calls = killed_at(monkeypatch, "ldfs_losses", deadly)
    with pytest.raises(Killed):
        world.run(train)
    before = len(calls)
    resumed = world.run(train)
    assert len(calls) - before == (9 if train == "linear" else 3)  # a probe starts again
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    history = [finetune.history_path(path).read_text() for path in tmp_path.glob("*/checkpoints/" + world.path.name)]
    assert len(history) == 2 and history[0] == history[1]
    assert not [*tmp_path.glob("*/checkpoints/*.partial.pt")]


def test_a_finished_run_is_loaded_and_another_input_is_another_file(world, tiny_data):
    first = world.run()
    first_path, stamp = world.path, world.path.stat().st_mtime_ns
    world.run()
    assert world.path == first_path and first_path.stat().st_mtime_ns == stamp
    world.run(schedule=Schedule(3, 8, 1e-3))
    assert world.path != first_path
    cat, dog = (tiny_data / "tiny" / "photo" / name / "1.png" for name in ("cat", "dog"))
    pixels = cat.read_bytes(), dog.read_bytes()
    cat.write_bytes(pixels[1])
    dog.write_bytes(pixels[0])
    world.clip.cache.clear()  # as in a new process
    assert not torch.equal(first["head.weight"], world.run()["head.weight"]) and world.path != first_path


@pytest.mark.parametrize("train, remedy", [("towers", "--micro-batch 2;"), ("linear", "a smaller --batch-size;")])
def test_out_of_memory_is_one_line_with_a_remedy(world, monkeypatch, capsys, train, remedy):
    def run(*args):
        torch.empty(10**15)

    monkeypatch.setattr(finetune, "finetune", run)
    world.settings.methods = {"it": parse_method("finetune", train)}
    with pytest.raises(SystemExit) as stop:
        finetune.finetune_all(world.settings, world.dataset, world.clip)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert stop.value.code == 2 and "it: out of memory at batch size 8" in line and remedy in line


# --- FLYP and ARF --------------------------------------------------------------------------------


@pytest.fixture
def anchored(world, tmp_path, monkeypatch):
    """The world with seven retrieved pairs."""
    members = {f"{i}.{e}": c for i in range(7) for e, c in (("png", square(i)), ("txt", b"w%d" % i))}
    write_shard(tmp_path / "0.tar", members)
    world.pairs = [(location, text) for _, location, text, _ in read_shard(tmp_path / "0.tar")[0]]
    monkeypatch.setattr(anchors, "pairs_of", lambda *args: world.pairs)
    return world


@pytest.mark.parametrize("method", ["flyp", "flyp+captions", "flyp+retrieved", "arf"])
def test_a_step_is_one_forward_of_each_tower(anchored, monkeypatch, method):
    calls = {"encode_image": 0, "encode_text": 0}

    def counted(name, true_call):
        def call(*args, **options):
            calls[name] += torch.is_grad_enabled()
            return true_call(*args, **options)
        return call

    for name in calls:
        monkeypatch.setattr(anchored.clip.model, name, counted(name, getattr(anchored.clip.model, name)))
    modules = anchored.run(method, schedule=Schedule(1, 18, 1e-3))
    assert calls == {"encode_image": 1, "encode_text": 1}
    assert changed(anchored.clip.original, anchored.tuned(modules)) == {"visual"} | TEXT_TOWER


def test_each_anchor_changes_what_is_learned(anchored, fixed_mapper):
    methods = ["flyp", "flyp+captions", "flyp+retrieved", "arf", "arf+ldfs"]
    methods += ["dive", "snd", "dive+captions", "arf+dive"]
    states = [anchored.run(method)["towers.text_projection"] for method in methods]
    states += [anchored.run("arf", lambda_cap=0.1)["towers.text_projection"]]
    states += [anchored.run("arf", lambda_ret=0.1)["towers.text_projection"]]
    assert all(not torch.allclose(a, b) for i, a in enumerate(states) for b in states[:i])


def test_captions_alone_are_the_caption_loss_of_arf(anchored):
    """That is, FLYP whose prompts are the images' captions."""
    alone = anchored.run("captions")["towers.text_projection"]
    for method in ("flyp+captions", "captions+retrieved"):
        assert not torch.allclose(alone, anchored.run(method)["towers.text_projection"])
    texts = data.captions(anchored.dataset, anchored.dataset.split("photo", "photo", "train", 0))
    true_batches = finetune.training_batches

    def captions_as_prompts(clip, dataset, source, items, schedule, seed, method, z, *rest):
        make = true_batches(clip, dataset, source, items, schedule, seed, parse_method("captions"), z, texts)

        def epoch(number):
            for batch in make(number):
                yield replace(batch, prompts=batch.captions, captions=None)

        return epoch

    with mock.patch.object(finetune, "training_batches", captions_as_prompts):
        assert torch.equal(alone, anchored.run("flyp")["towers.text_projection"])


def test_a_weight_of_zero_is_the_method_without_that_loss(anchored):
    flyp = anchored.run("flyp")["towers.text_projection"]
    arf = anchored.run("arf", lambda_cap=0.0, lambda_ret=0.0)["towers.text_projection"]
    assert torch.allclose(flyp, arf, atol=1e-5)


def test_dive_at_a_weight_of_zero_is_flyp_to_the_bit(anchored):
    flyp, dive = anchored.run("flyp"), anchored.run("dive", lambda_dive=0.0)
    assert all(torch.equal(flyp[name], dive[name]) for name in flyp)


def test_a_large_weight_of_dive_or_snd_keeps_the_features_of_the_pairs(anchored):
    clip = anchored.clip
    images = torch.stack([clip.preprocess(location.decode()) for location, _ in anchored.pairs])

    def movement(modules):
        before = clip.encode_image(images)
        clip.model.load_state_dict(anchored.tuned(modules))
        shifts = clip.encode_image(images) - before
        clip.reset()
        return shifts.norm(dim=1).mean().item(), (shifts - shifts.mean(0)).norm(dim=1).mean().item()

    flyp, snd, dive = (
        movement(anchored.run(name, lambda_dive=100.0)) for name in ("flyp", "snd", "dive")
    )
    assert snd[0] < 0.5 * flyp[0] and dive[1] < 0.5 * flyp[1]


def test_each_image_goes_with_its_own_caption_and_a_prompt_of_its_class(anchored):
    """Whatever the order: the rows of a batch belong together, and each template is drawn."""
    clip, dataset, templates = anchored.clip, anchored.dataset, ["a photo of a {}.", "look, {}!"]
    dataset = replace(dataset, meta=replace(dataset.meta, templates={"photo": templates}))
    items = dataset.split("photo", "photo", "train", 0)
    captions, method = [f"number {i}" for i in range(18)], parse_method("flyp+captions")
    clip.augment = lambda image: 255 - clip.preprocess(image)  # to tell it from an image not augmented
    batches_of = batches.training_batches(
        clip, dataset, "photo", items, Schedule(4, 5, 1e-3), 0, method, captions=captions
    )
    prompts = [clip.tokenizer([t.format(c) for c in dataset.classnames]) for t in templates]
    pixels = torch.stack([clip.preprocess(location.decode()) for location, _ in items])
    order, drawn = [], set()
    for batch in batches_of(start_epoch=3):
        rows = [(pixels == 255 - image).flatten(1).all(1).nonzero().item() for image in batch.images]
        assert torch.equal(batch.captions, clip.tokenizer([captions[row] for row in rows]))
        assert batch.labels.tolist() == [items[row][1] for row in rows]
        for prompt, y in zip(batch.prompts, batch.labels):
            drawn.add([torch.equal(prompt, p[y]) for p in prompts].index(True))
        order += rows
    assert sorted(order) == list(range(18)) and order != sorted(order) and drawn == {0, 1}


def test_of_several_captions_one_is_drawn_in_each_epoch(anchored):
    """It depends on seed and epoch alone, and each is drawn; an image with one keeps it."""
    clip, dataset = anchored.clip, anchored.dataset
    items = dataset.split("photo", "photo", "train", 0)
    captions = [[f"number {10 * i + j}" for j in range(1 if i == 0 else 5)] for i in range(18)]
    clip.tokenizer = lambda texts: torch.tensor([int(text.split()[-1]) if "number" in text else -1 for text in texts])
    batches_of = batches.training_batches(
        clip, dataset, "photo", items, Schedule(60, 5, 1e-3), 0, parse_method("flyp+captions"), captions=captions
    )

    def drawn(start_epoch):
        drawn = [n for batch in batches_of(start_epoch) for n in batch.captions.tolist()]
        return [sorted(drawn[i:i + 18]) for i in range(0, len(drawn), 18)]

    epochs = drawn(0)
    assert len(epochs) == 60 and drawn(57) == epochs[57:]
    assert all([n // 10 for n in epoch] == [*range(18)] for epoch in epochs)
    assert {n for epoch in epochs for n in epoch} == {0, *(10 * i + j for i in range(1, 18) for j in range(5))}


@pytest.mark.parametrize("name", ["arf", "dive"])
def test_a_killed_run_on_pairs_resumes_to_the_same_bits(anchored, tmp_path, monkeypatch, name):
    """Retrieved pairs go on where they were in their endless passes, and so does DiVE's m."""
    whole = anchored.run(name, run=tmp_path / "whole")
    killed_at(monkeypatch, "arf_losses", 8)
    with pytest.raises(Killed):
        anchored.run(name)
    resumed = anchored.run(name)
    assert whole.keys() == resumed.keys() and ("mean_vector" in whole) == (name == "dive")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_passes_over_the_pairs_are_complete_and_endless():
    stream = [i for step in range(10) for i in batches.endless(5, 7, 0, step)]
    assert len(stream) == 70
    assert all(sorted(stream[i:i + 5]) == list(range(5)) for i in range(0, 70, 5))
    assert stream[:5] != stream[5:10] or stream[5:10] != stream[10:15]


def test_passes_over_the_pairs_go_on_from_epoch_to_epoch(anchored):
    items, method = anchored.dataset.split("photo", "photo", "train", 0), parse_method("flyp+retrieved")
    batches_of = batches.training_batches(
        anchored.clip, anchored.dataset, "photo", items, SHORT["towers"], 0, method, pairs=anchored.pairs
    )
    texts = [tuple(t) for batch in batches_of(0) for t in batch.pool_texts.tolist()]
    assert len(texts) == 24 * SHORT["towers"].epochs and texts[24:] == [
        tuple(t) for batch in batches_of(1) for t in batch.pool_texts.tolist()
    ]
    assert all(len({*texts[i:i + 7]}) == 7 for i in range(0, 42, 7))


def test_augmentation_depends_on_seed_epoch_and_image_alone(anchored):
    """Each image of each epoch, and each retrieved one whenever it comes, has its own draw."""
    clip, dataset = anchored.clip, anchored.dataset
    items, method = dataset.split("photo", "photo", "train", 0), parse_method("flyp+retrieved")
    clip.augment = lambda image: torch.rand(1)

    def draws(epoch, seed=0):
        batches_of = batches.training_batches(
            clip, dataset, "photo", items, SHORT["towers"], seed, method, pairs=anchored.pairs
        )
        epoch = itertools.islice(batches_of(epoch), 3)
        both = [(batch.images, batch.pool_images) for batch in epoch]
        return {x for pair in both for images in pair for x in images.flatten().tolist()}

    first = draws(0)
    torch.rand(1)
    assert len(first) == 18 + 24 and draws(0) == first and not draws(1) & first and not draws(0, 1) & first
    keys = [(location, ("images", 0, 0, row)) for row, (location, _) in enumerate(items)]
    for order in ([[0, 1, 2, 3]], [[3, 0], [2], [1]]):
        order = [[keys[row] for row in rows] for rows in order]
        loads = batches.image_batches(order, clip.augment, clip.device)
        assert {x for images, _ in loads for x in images.flatten().tolist()} < first


def test_the_micro_batch_is_the_largest_power_of_two_that_fits():
    def fitting(free, images=512, texts=1000, image_bytes=10, text_bytes=4):
        return fitting_micro_batch(images, texts, image_bytes, text_bytes, free)

    assert fitting(9120 / 0.9 + 1) is None and fitting(9120 / 0.9 - 1) == 512
    assert fitting(1000) == 64 and fitting(15) == 1 and fitting(-5) == 1
    assert fitting(1000, images=0, image_bytes=1, text_bytes=100, texts=10) == 8


@pytest.mark.parametrize("flags, rows, expected", [([], 10**4, None), ([], 3, 2), (["--micro-batch", 4], 1, None)])
def test_on_a_gpu_the_micro_batch_is_chosen_before_training(
    anchored, tiny_data, tiny_clip, tmp_path, monkeypatch, flags, rows, expected
):
    """The memory of a row, and the free one beside gradients and AdamW's states, are stand-ins."""
    settings, dataset = make_settings(tiny_data, tiny_clip, tmp_path / "run", *flags)
    settings.methods = {"arf": parse_method("arf"), "ldfs": parse_method("ldfs")}
    clip = replace(features.load_clip(settings), device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(finetune, "measure_rows", lambda *args: (5 * 10**5, 5 * 10**5))
    states = 12 * sum(p.numel() for p in clip.model.parameters())
    monkeypatch.setattr(finetune, "free_bytes", lambda: states + (rows + 0.5) * 5 * 10**5 / 0.9)
    assert finetune.choose_micro_batches(settings, dataset, clip).get("arf") == expected


def test_a_chosen_micro_batch_is_the_methods_own(world, monkeypatch):
    """LP-FT trains a probe first, which has none."""
    used, true_train = [], finetune.train

    def train(strategy, *args, **kwargs):
        used.append(strategy.clip.micro_batch)
        return true_train(strategy, *args, **kwargs)

    monkeypatch.setattr(finetune, "train", train)
    world.run("lpft", "lpft", micro_batches={"lpft": 2})
    world.run("full", "full", micro_batches={"lpft": 2})
    assert used == [None, 2, None]


# --- several processes ---------------------------------------------------------------------------


def train_in_process(tiny_data, tiny_clip, run, pairs):
    """Train three epochs of several methods, with batches of 17 images and of 1, so that some
    ranks have no image of their own.
    """
    def sgd(parameters, lr, **options):  # AdamW would hide gradients of another length
        return torch.optim.SGD(parameters, lr)

    rates = {"linear": 0.1, "full": 0.1, "clipood": 0.01, "maple": 0.01, "towers": 0.01}
    schedules = {k: Schedule(3, 17, rates[k], max_norm=1.0 if k == "full" else None) for k in rates}
    settings, dataset = make_settings(tiny_data, tiny_clip, run, "--seeds", 1, "--lambda-dive", 1, schedules=schedules)
    settings.methods = {
        name: parse_method(name, "full") for name in ("linear", "full", "clipood", "maple", "arf", "dive")
    }
    clip = features.load_clip(settings)
    with mock.patch.object(torch.optim, "AdamW", sgd), \
            mock.patch.object(anchors, "pairs_of", lambda *args: pairs):
        finetune.finetune_all(settings, dataset, clip)
    leave()


def test_several_processes_train_as_one(anchored, tiny_data, tiny_clip, tmp_path):
    """No image is left out, each is augmented as in one process, and losses and gradients are those
    of the whole batch.
    """
    description = tiny_data / "tiny" / "dataset.json"
    templates = {"templates": {"photo": ["a photo of {}", "look, a {}!"]}}
    description.write_text(json.dumps(json.loads(description.read_text()) | templates))
    train_in_process(tiny_data, tiny_clip, tmp_path / "1", anchored.pairs)
    for n in (2, 3):
        in_processes(n, train_in_process, tiny_data, tiny_clip, tmp_path / str(n), anchored.pairs)
    paths = [*(tmp_path / "1" / "checkpoints").glob("*.pt")]
    assert len(paths) == 6
    for path in paths:
        one = torch.load(path)["modules"]
        before = {f"towers.{k}": v for k, v in anchored.clip.original.items()}
        moves = [(v - before[k]).abs().max() for k, v in one.items() if k in before]
        assert not moves or max(moves) > 1e-3
        for n in (2, 3):
            several = torch.load(tmp_path / str(n) / "checkpoints" / path.name)["modules"]
            for name, weight in one.items():
                assert torch.allclose(weight, several[name], atol=1e-5, rtol=0), (path.name, n, name)


# --- methods and models --------------------------------------------------------------------------


@pytest.mark.parametrize("text, method", [
    ("finetune", Method("full")), ("ldfs:sigma=0", Method("full", recipe="ldfs:sigma=0")),
    ("flyp", Method("towers", True)), ("flyp+captions", Method("towers", True, captions=True)),
    ("arf", Method("towers", True, True, True)), ("arf+ldfs", Method("towers", True, True, True, "ldfs")),
    ("coop+lads", Method("coop", recipe="lads")), ("lpft", Method("lpft")),
    ("cocoop+ldfs", Method("cocoop", recipe="ldfs")), ("clipood", Method("clipood")),
    ("maple+ldfs", Method("maple", recipe="ldfs")),
    ("dive", Method("towers", True, preserve="dive")), ("snd", Method("towers", True, preserve="snd")),
    ("dive+captions", Method("towers", True, captions=True, preserve="dive")),
    ("arf+dive", Method("towers", True, True, True, preserve="dive")),
    ("captions", Method("towers", True, captions=True, classes=False)),
    ("captions+retrieved", Method("towers", True, True, True, classes=False)),
])
def test_methods_are_named_by_their_parts(text, method):
    assert parse_method(text, "full") == method


@pytest.mark.parametrize("text", ["finetune+captions", "ldfs+retrieved", "flyp+lads+ldfs", "arff", "dive+snd", "full+dive", "captions+ldfs", "captions+flyp", ""])
def test_unknown_methods_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_method(text)
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("train", ["full", "linear"])
def test_a_checkpoint_is_a_model(world, tiny_data, tmp_path, capsys, train):
    """--model takes a checkpoint: its towers' features, under its name; a head alone is refused."""
    modules = world.run(train)
    settings, _ = make_settings(tiny_data, world.path, tmp_path / "other")
    if train == "linear":
        with pytest.raises(SystemExit) as stop:
            features.load_clip(settings)
        assert stop.value.code == 2 and "does not contain" in capsys.readouterr().err
        return
    tuned = features.load_clip(settings)
    assert all(torch.equal(v, modules[f"towers.{k}"]) for k, v in tuned.model.state_dict().items())
    assert tuned.name == str(world.path) and tuned.key != world.clip.key
    (tmp_path / "other.pt").write_bytes(b"not a checkpoint")
    torch.save({"modules": {}}, tmp_path / "foreign.pt")
    state = torch.load(world.path)
    odd = {k: v[:1] if v.ndim else v for k, v in state["modules"].items()}
    torch.save({**state, "modules": odd}, tmp_path / "odd.pt")
    torch.save({**state, "weights": "of another model"}, tmp_path / "base.pt")
    for name, reason in (
        ("nowhere.pt", "no such file"), ("other.pt", "cannot be read"), ("foreign.pt", "not a checkpoint"),
        ("odd.pt", "does not contain"), ("base.pt", "has other weights than"),
    ):
        with pytest.raises(SystemExit):
            features.load_clip(make_settings(tiny_data, tmp_path / name, tmp_path / "other")[0])
        assert reason in capsys.readouterr().err


def test_a_linear_probe_is_trained_with_the_logit_scale(world):
    z, weight = F.normalize(torch.randn(2, 32), dim=-1), torch.randn(3, 32)
    probe = LinearProbe(world.clip, weight)
    logits = probe.head_for(batches.Batch(torch.tensor([0, 1]), z[None]))(z)
    assert torch.allclose(logits, world.clip.model.logit_scale.exp() * z @ weight.T, atol=1e-4)
