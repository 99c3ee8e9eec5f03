"""mapper.py: it learns what the losses ask for, from text alone, and changes nothing else."""

import math
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import mapper
from distributed import side_by_side
from lads import lads_loss, train_lads
from mapper import Mapper, ldfs_loss, statistics, train_mappers
from methods import RECIPES, Recipe, parse_recipe
from report import synthetic


def world(n=64, d=16, classes=4, seed=0):
    """z, labels, text_source, text_target, class_text of a made-up CLIP whose target domain lies
    along one direction.
    """
    generator = torch.Generator().manual_seed(seed)
    class_text = F.normalize(torch.randn(classes, d, generator=generator), dim=-1)
    labels = torch.arange(n) % classes
    z = F.normalize(class_text[labels] + 0.3 * torch.randn(n, d, generator=generator), dim=-1)
    style = 0.5 * F.normalize(torch.randn(d, generator=generator), dim=-1)
    text_source = F.normalize(class_text[labels] + 0.1 * torch.randn(n, d, generator=generator), dim=-1)
    return z, labels, text_source, F.normalize(text_source + style, dim=-1), class_text


def train_mapper(z, labels, text_source, text_target, *rest, **more):
    """The mapper of one target."""
    return train_mappers(z, labels, text_source, text_target[None], *rest, **more)[0]


def test_a_mapper_overfits_its_directions_and_keeps_the_class():
    z, labels, text_source, text_target, class_text = world()
    m = train_mapper(z, labels, text_source, text_target, class_text, Recipe(sigma=0.0), steps=300)
    assert statistics(m, z, text_source, text_target, 0.0)["follows"] > 0.85
    assert (m(z) @ class_text.T).argmax(1).eq(labels).float().mean() > 0.95
    assert torch.allclose(m(z).norm(dim=-1), torch.ones(len(z)), atol=1e-6)


def test_instance_wise_directions_win_where_the_way_hangs_on_the_image():
    spread, found = synthetic.measure(part=1.0, seed=0)
    assert spread < 0.2
    assert found["ldfs"] > found["ldfs:direction=class"] + 20
    assert found["ldfs"] > found["finetune"] + 20


def test_the_pairwise_term_keeps_angles():
    z, labels, text_source, text_target, class_text = world()
    angles = []
    for pair in (0.0, 1.0):
        m = train_mapper(*world(), Recipe(sigma=0.0, pair=pair), steps=200)
        angles.append(statistics(m, z, text_source, text_target, 0.0)["angles"])
    assert angles[1] < 0.5 * angles[0]


@pytest.mark.parametrize("change", [{"pair": 0.0}, {"cls": 0.0}, {"sigma": 0.0}, {"form": "cosine"}])
def test_each_part_of_the_loss_changes_what_is_learned(change):
    one, other = (train_mapper(*world(), Recipe(**c), steps=3) for c in ({}, change))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


@pytest.mark.parametrize("unit", [1, 0])
def test_a_mapper_takes_the_first_steps_of_l_1(unit):
    """Against the loss as it is written, each term by its own weight, AdamW, and a cosine."""
    z, labels, text_source, text_target, class_text = world(n=6)
    recipe, steps = Recipe(sigma=0.0, pair=0.3, cls=0.7, unit=unit), 20
    others = ~torch.eye(6, dtype=torch.bool)
    got = train_mapper(z, labels, text_source, text_target, class_text, recipe, steps=steps)
    m, _ = mapper.new_mappers(1, 16, 0, "cpu")
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.05)
    for step in range(steps):  # a batch is all images, so that their order does not matter
        z_hat = m(z)
        shift = (z_hat if unit else m.net(z)) - z
        direction = 1 - F.cosine_similarity(shift, text_target - text_source).mean()
        angles = [(x @ x.T)[others].arccos() for x in (z, z_hat)]
        pair, cls = (angles[1] - angles[0]).abs().mean(), F.cross_entropy(z_hat @ class_text.T, labels)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        (direction + 0.3 * pair + 0.7 * cls).backward()
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got.parameters(), m.parameters()))


def test_the_class_term_reads_the_synthesised_feature():
    """With that term alone, features that do not name their class come to name it."""
    z, labels, text_source, _, class_text = world()
    wrong = z[torch.arange(len(z)).roll(1)]  # the image of another class
    m = train_mapper(wrong, labels, text_source, text_source, class_text, Recipe(pair=0.0), steps=300)
    assert (wrong @ class_text.T).argmax(1).eq(labels).float().mean() < 0.1
    assert (m(wrong) @ class_text.T).argmax(1).eq(labels).float().mean() > 0.9


def test_the_two_texts_get_noise_of_their_own(monkeypatch):
    """One ε for both would cancel in their difference."""
    z, labels, text_source, _, class_text = world()
    drawn, true_call = [], mapper.stochastic_text

    def watched(text, sigma, generator):
        noisy = true_call(text, sigma, generator)
        drawn.append(noisy - text)
        return noisy

    monkeypatch.setattr(mapper, "stochastic_text", watched)
    rest = class_text, Recipe(sigma=0.1), torch.Generator().manual_seed(0)
    ldfs_loss(Mapper(16), z, labels, text_source, text_source, *rest)
    assert len(drawn) == 2 and all(noise.norm(dim=-1).mean() > 0.1 for noise in drawn)
    assert abs(F.cosine_similarity(*drawn, dim=-1).mean()) < 0.3


@pytest.mark.parametrize("change", [{}, {"form": "cosine", "cls": 0.3}])
def test_mappers_trained_at_once_are_those_trained_alone(change):
    """Each with its own target's texts, the same start, batches and ε; none sees another's loss."""
    z, labels, text_source, text_target, class_text = world(n=40)
    targets = torch.stack([text_target, text_target.flip(0), text_source.roll(1, 0)])
    rest = class_text, Recipe(sigma=0.05, **change)
    more = {"seed": 3, "steps": 6, "batch_size": 16}
    together = train_mappers(z, labels, text_source, targets, *rest, **more)
    alone = [train_mapper(z, labels, text_source, t, *rest, **more) for t in targets]
    for one, other in zip(together, alone):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.parameters(), other.parameters()))
    assert not torch.allclose(alone[0](z), alone[1](z), atol=1e-3)


def test_ladss_loss_is_the_published_formula():
    """On the unnormalised output, classes weighed by inverse frequency, halves of both."""
    z, _, text_source, text_target, class_text = world(n=6)
    labels = torch.tensor([0, 0, 0, 1, 2, 3])
    m, weight = Mapper(16), 1 / torch.tensor([3.0, 1, 1, 1])
    total = 0
    for i in range(6):
        output = m.net(z[i])
        shift, delta_t = output - z[i], text_target[i] - text_source[i]
        direction = 1 - shift @ delta_t / (shift.norm() * delta_t.norm())
        logits = torch.stack([output @ t / output.norm() for t in class_text])
        ce = logits.logsumexp(0) - logits[labels[i]]
        total += direction / 6 / 2 + weight[labels[i]] / weight[labels].sum() * ce / 2
    got = lads_loss(m, z, labels, text_source, text_target, class_text, weight)
    assert torch.allclose(got, total, atol=1e-6)


def test_lads_keeps_the_best_epoch_of_each_target_by_validation():
    train, val, class_text = world()[:4], world(n=16, seed=1)[:4], world()[4]

    def losses(shifts, epochs):
        """Of the mappers of these targets, whose texts are shifted, on the validation images."""
        parts = [(*x[:3], torch.stack([x[3].roll(n, 0) for n in shifts])) for x in (train, val)]
        mappers = train_lads(*parts, class_text, epochs=epochs)
        return torch.tensor([
            lads_loss(m, *val[:3], t_k, class_text, torch.ones(4)).item()
            for m, t_k in zip(mappers, parts[1][3])
        ])

    alone = torch.stack([torch.cat([losses([n], epochs) for n in (0, 1)]) for epochs in (5, 15, 30)])
    assert torch.equal(alone, alone.cummin(0).values)  # none gets worse again
    assert torch.allclose(losses([0, 1], 30), alone[2], atol=1e-4)


def test_training_is_deterministic_and_touches_only_the_mapper():
    tensors = world()
    before = [t.clone() for t in tensors]
    state = torch.random.get_rng_state()
    one, two, other = (train_mapper(*tensors, RECIPES["ldfs"], seed=s, steps=5) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(p.requires_grad for p in one.parameters())


def test_jobs_go_side_by_side_a_core_each():
    threads, meet = torch.get_num_threads(), threading.Barrier(2, timeout=30)

    def work(job):
        meet.wait()  # none gets on alone
        if job == 3:
            sys.exit(2)
        time.sleep(0.2 * (job == 0))  # the first is the last to be done
        return job, torch.get_num_threads()

    torch.set_num_threads(2)
    try:
        assert [*side_by_side(work, [0, 1], torch.device("cpu"))] == [(0, 1), (1, 1)]
        with pytest.raises(SystemExit):
            list(side_by_side(work, [2, 3], torch.device("cpu")))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_one_image_is_enough_not_to_fail():
    z, labels, s, k, class_text = world(n=1)
    m = train_mapper(z, labels, s, k, class_text, RECIPES["ldfs"], steps=3)
    seen = statistics(m, z, s, k, 0.01)
    assert m(z).isfinite().all() and all(torch.tensor(list(seen.values())).isfinite())


def test_statistics_of_known_directions():
    z, labels, s, _, class_text = world()
    step = torch.zeros(16)
    step[0] = 0.5
    m = Mapper(16)
    seen = statistics(m, z, s, s + step, 0.0)
    assert seen["|Δt|"] == pytest.approx(0.5) and seen["spread"] == pytest.approx(1.0, abs=1e-4)
    crossed = s + torch.eye(16)[torch.arange(64) % 16]  # 16 directions at right angles, 4 images each
    seen = statistics(m, z, s, crossed, 0.0)
    assert seen["spread"] == pytest.approx(3 / 63, abs=1e-4)


def test_ldfs_minus_its_three_parts_is_the_controlled_baseline():
    assert parse_recipe("ldfs:direction=class,sigma=0,pair=0") == RECIPES["global"]
    assert parse_recipe("global:loss=lads") == RECIPES["lads"]


@pytest.mark.parametrize("text", [
    "lasd", "ldfs:sigma", "ldfs:sigma=x", "ldfs:alpha=1", "ldfs:direction=k",
    "ldfs:form=cos", "ldfs:pair=-1",
])
def test_bad_recipes_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_recipe(text)
    assert stop.value.code == 2 and repr(text) in capsys.readouterr().err


def test_a_missing_mapper_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        mapper.load_mapper(SimpleNamespace(run=tmp_path), "ldfs", "sketch", 3, "a model")
    assert "ldfs-sketch-seed3.pt" in capsys.readouterr().err


def test_a_mapper_of_another_length_is_refused(tmp_path, capsys):
    """mapper.py notices by itself; finetune.py alone, with another --mapper-steps, says so."""
    path = mapper.mapper_path(tmp_path, "ldfs", "sketch", 0)
    path.parent.mkdir()
    for made, asked, says in ((7, None, "--mapper-steps 7"), (None, 7, "no --mapper-steps"), (7, 7, "")):
        state = {"mapper": Mapper(4).state_dict(), "fingerprint": "CLIP's", "words": "a caption"}
        torch.save({**state, "made_with": {"mapper_steps": made, "source": "photo"}}, path)
        config = SimpleNamespace(run=tmp_path, mapper_steps=asked, source="photo")
        if says:
            with pytest.raises(SystemExit):
                mapper.load_mapper(config, "ldfs", "sketch", 0, "CLIP's")
            assert f"{path} was made with {says}. Say so" in capsys.readouterr().err
    config.source = "cartoon"
    with pytest.raises(SystemExit):
        mapper.load_mapper(config, "ldfs", "sketch", 0, "CLIP's")
    assert f"{path} was made with the source photo." in capsys.readouterr().err
    config.source = "photo"
    torch.save({**state, "made_with": {"shots": None}}, path)
    config.shots = 1
    with pytest.raises(SystemExit):
        mapper.load_mapper(config, "ldfs", "sketch", 0, "CLIP's")
    assert f"{path} was made with no --shots." in capsys.readouterr().err
    config.shots = None
    with pytest.raises(SystemExit):
        mapper.load_mapper(config, "ldfs", "sketch", 0, "CLIP's", words="another caption")
    assert f"{path}: captions or phrases were others then" in capsys.readouterr().err
    assert mapper.load_mapper(config, "ldfs", "sketch", 0, "CLIP's").net[0].in_features == 4


def test_the_networks_shape_is_lads():
    assert [tuple(p.shape) for p in Mapper(512).parameters()] == [(384, 512), (384,), (512, 384), (512,)]
