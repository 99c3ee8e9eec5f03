"""mapper.py: it learns what the losses ask for, from text alone, and changes nothing else."""

import pytest
import torch
import torch.nn.functional as F

import mapper
from mapper import Mapper, train_mapper
from methods import RECIPES, Recipe, parse_recipe


def world(n=64, d=16, classes=4, seed=0):
    """z, labels, text_source, text_target, class_text of a made-up CLIP whose target domain lies along one direction."""
    generator = torch.Generator().manual_seed(seed)
    class_text = F.normalize(torch.randn(classes, d, generator=generator), dim=-1)
    labels = torch.arange(n) % classes
    z = F.normalize(class_text[labels] + 0.3 * torch.randn(n, d, generator=generator), dim=-1)
    style = 0.5 * F.normalize(torch.randn(d, generator=generator), dim=-1)
    text_source = F.normalize(class_text[labels] + 0.1 * torch.randn(n, d, generator=generator), dim=-1)
    return z, labels, text_source, F.normalize(text_source + style, dim=-1), class_text


def test_a_mapper_overfits_its_directions_and_keeps_the_class():
    z, labels, text_source, text_target, class_text = world()
    m, seen = train_mapper(z, labels, text_source, text_target, class_text, Recipe(sigma=0.0), steps=300)
    assert seen["follows"] > 0.85
    assert (m(z) @ class_text.T).argmax(1).eq(labels).float().mean() > 0.95
    assert torch.allclose(m(z).norm(dim=-1), torch.ones(len(z)), atol=1e-6)


def test_the_pairwise_term_keeps_angles():
    tensors = world()
    angles = [train_mapper(*tensors, Recipe(sigma=0.0, pair=pair), steps=200)[1]["angles"] for pair in (0.0, 1.0)]
    assert angles[1] < 0.5 * angles[0]


def test_training_is_deterministic_and_touches_only_the_mapper():
    tensors = world()
    before = [t.clone() for t in tensors]
    state = torch.random.get_rng_state()
    one, two, other = (train_mapper(*tensors, RECIPES["ldfs"], seed=s, steps=5)[0] for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(p.requires_grad for p in one.parameters())


def test_one_image_is_enough_not_to_fail():
    z, labels, s, k, class_text = world(n=1)
    m, seen = train_mapper(z, labels, s, k, class_text, RECIPES["ldfs"], steps=3)
    assert m(z).isfinite().all() and all(torch.tensor(list(seen.values())).isfinite())


def test_statistics_of_known_directions():
    z, labels, s, _, class_text = world()
    step = torch.zeros(16)
    step[0] = 0.5
    m, seen = train_mapper(z, labels, s, s + step, class_text, Recipe(sigma=0.0), steps=1)
    assert seen["|Δt|"] == pytest.approx(0.5) and seen["spread"] == pytest.approx(1.0, abs=1e-4)
    crossed = s + torch.eye(16)[torch.arange(64) % 16]  # 16 directions at right angles, 4 images each
    seen = train_mapper(z, labels, s, crossed, class_text, Recipe(sigma=0.0), steps=1)[1]
    assert seen["spread"] == pytest.approx(3 / 63, abs=1e-4)


def test_ldfs_minus_its_three_parts_is_lads():
    assert parse_recipe("ldfs:direction=class,sigma=0,pair=0") == RECIPES["lads"]


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
        mapper.load_mapper(tmp_path, "ldfs", "sketch", 3, "a model")
    assert "ldfs-sketch-seed3.pt" in capsys.readouterr().err


def test_the_networks_shape_is_lads():
    assert [tuple(p.shape) for p in Mapper(512).parameters()] == [(384, 512), (384,), (512, 384), (512,)]
