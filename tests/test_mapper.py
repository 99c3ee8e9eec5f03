"""mapper.py: a mapper learns what its losses demand, from text alone, and nothing else changes."""

import math

import pytest
import torch
import torch.nn.functional as F

import data
import features
import mapper
from core.config import parse
from core.methods import RECIPES, Recipe, parse_recipe
from mapper import Mapper, lads_loss, ldfs_loss, load_mappers, measure_mapper, train_mapper
from report import synthetic
from sets.load import load_run


def world(n=64, d=16, classes=4, seed=0):
    """Return z, labels, text_source, text_target, class_text of a made-up CLIP whose target domain
    is shifted in one direction.
    """
    generator = torch.Generator().manual_seed(seed)
    class_text = F.normalize(torch.randn(classes, d, generator=generator), dim=-1)
    labels = torch.arange(n) % classes
    z = F.normalize(class_text[labels] + 0.3 * torch.randn(n, d, generator=generator), dim=-1)
    style = 0.5 * F.normalize(torch.randn(d, generator=generator), dim=-1)
    text_source = F.normalize(class_text[labels] + 0.1 * torch.randn(n, d, generator=generator), dim=-1)
    return z, labels, text_source, F.normalize(text_source + style, dim=-1), class_text


def same_weights(one, other, **tolerance):
    """Return whether two mappers have the same weights: exactly, or within `tolerance`."""
    equal = (lambda a, b: torch.allclose(a, b, **tolerance)) if tolerance else torch.equal
    return all(map(equal, one.parameters(), other.parameters()))


def start(seed=0, d=16):
    """Return the mapper that training starts from: PyTorch's own start under this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mapper(d)


# -------------------------------------------------------------------------------------------------
# What it learns


def test_a_mapper_overfits_its_directions_and_keeps_the_class():
    z, labels, text_source, text_target, class_text = world()
    m, _ = train_mapper(z, labels, text_source, text_target, class_text, Recipe(sigma=0.0))
    assert measure_mapper(m, z, text_source, text_target, 0.0)["follows"] > 0.85
    assert (m(z) @ class_text.T).argmax(1).eq(labels).float().mean() > 0.95
    assert torch.allclose(m(z).norm(dim=-1), torch.ones(len(z)), atol=1e-6)


def test_caption_wise_directions_win_where_the_direction_depends_on_the_image():
    spread, accuracies = synthetic.measure(degree=1.0, seed=0)
    assert spread < 0.2
    assert accuracies["ldfs"] > accuracies["ldfs:direction=class"] + 20
    assert accuracies["ldfs"] > accuracies["finetune"] + 20


def test_the_pairwise_term_keeps_angles():
    z, _, text_source, text_target, _ = world()
    angles = []
    for pair in (0.0, 1.0):
        m, _ = train_mapper(*world(), Recipe(sigma=0.0, pair=pair), rounds=200)
        angles.append(measure_mapper(m, z, text_source, text_target, 0.0)["angles"])
    assert angles[1] < 0.5 * angles[0]


def test_the_class_term_reads_the_synthesised_feature():
    """With that term alone, features that do not name their class come to name it."""
    z, labels, text_source, _, class_text = world()
    wrong = z[torch.arange(len(z)).roll(1)]  # the image of another class
    m, _ = train_mapper(wrong, labels, text_source, text_source, class_text, Recipe(pair=0.0))
    assert (wrong @ class_text.T).argmax(1).eq(labels).float().mean() < 0.1
    assert (m(wrong) @ class_text.T).argmax(1).eq(labels).float().mean() > 0.9


@pytest.mark.parametrize("change", [{"pair": 0.0}, {"cls": 0.0}, {"sigma": 0.0}, {"form": "cosine"}])
def test_each_part_of_the_loss_changes_what_is_learned(change):
    one, other = (train_mapper(*world(), Recipe(**c), rounds=3)[0] for c in ({}, change))
    assert not same_weights(one, other)


def test_the_two_texts_get_noise_of_their_own(monkeypatch):
    """One ε for both would cancel in their difference."""
    z, labels, text_source, _, class_text = world()
    noises, stochastic_text = [], mapper.stochastic_text

    def recorded(text, sigma, generator):
        noisy = stochastic_text(text, sigma, generator)
        noises.append(noisy - text)
        return noisy

    monkeypatch.setattr(mapper, "stochastic_text", recorded)
    rest = class_text, Recipe(sigma=0.1), torch.Generator().manual_seed(0)
    ldfs_loss(Mapper(16), z, labels, text_source, text_source, *rest)
    assert len(noises) == 2 and all(noise.norm(dim=-1).mean() > 0.1 for noise in noises)
    assert abs(F.cosine_similarity(*noises, dim=-1).mean()) < 0.3


# -------------------------------------------------------------------------------------------------
# Against the formulas


@pytest.mark.parametrize("unit", [1, 0])
def test_a_mapper_takes_the_first_steps_of_l_1(unit):
    """Against the loss as it is written, each term by its own weight, AdamW, and a cosine."""
    z, labels, text_source, text_target, class_text = world(n=6)
    recipe, steps = Recipe(sigma=0.0, pair=0.3, cls=0.7, unit=unit), 20
    off_diagonal = ~torch.eye(6, dtype=torch.bool)
    trained, history = train_mapper(
        z, labels, text_source, text_target, class_text, recipe, seed=5, rounds=steps
    )
    m, expected = start(seed=5), []
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.05)
    for step in range(steps):  # a batch is all images, so that their order does not matter
        z_hat = m(z)
        shift = (z_hat if unit else m.net(z)) - z
        direction = 1 - F.cosine_similarity(shift, text_target - text_source).mean()
        angles = [(x @ x.T)[off_diagonal].arccos() for x in (z, z_hat)]
        pair = 0.3 * (angles[1] - angles[0]).abs().mean()
        cls = 0.7 * F.cross_entropy(z_hat @ class_text.T, labels)
        expected.append({"L_ld": direction.item(), "L_pair": pair.item(), "L_cls": cls.item()})
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        (direction + pair + cls).backward()
        optimizer.step()
    assert same_weights(trained, m, atol=1e-5)
    assert len(history) == steps
    assert all(terms == pytest.approx(e, abs=1e-4) for terms, e in zip(history, expected))


def test_ladss_loss_is_the_published_formula():
    """On the unnormalised output, classes weighed by inverse frequency, halves of both."""
    z, _, text_source, text_target, class_text = world(n=6)
    labels = torch.tensor([0, 0, 0, 1, 2, 3])
    m, weight = Mapper(16), 1 / torch.tensor([3.0, 1, 1, 1])
    direction = cls = 0
    for i in range(6):
        output = m.net(z[i])
        shift, delta_t = output - z[i], text_target[i] - text_source[i]
        direction += (1 - shift @ delta_t / (shift.norm() * delta_t.norm())) / 6 / 2
        logits = torch.stack([output @ t / output.norm() for t in class_text])
        ce = logits.logsumexp(0) - logits[labels[i]]
        cls += weight[labels[i]] / weight[labels].sum() * ce / 2
    losses = lads_loss(m, z, labels, text_source, text_target, class_text, weight)
    assert losses.keys() == {"L_direction", "L_class"}
    assert torch.allclose(losses["L_direction"], direction, atol=1e-6)
    assert torch.allclose(losses["L_class"], cls, atol=1e-6)


@pytest.mark.parametrize("judge", ["validation", "training"])
def test_lads_takes_its_published_steps_and_keeps_the_best_epoch(judge):
    """By validation images if there are any: here they name other classes, so that an early epoch
    is the best.
    """
    z, labels, text_source, text_target, class_text = world(n=8)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    val = *world(n=4, seed=1)[:1], torch.tensor([3, 2, 1, 0]), *world(n=4, seed=1)[2:4]
    judged = val if judge == "validation" else (z, labels, text_source, text_target)
    weight = 1 / torch.tensor([4.0, 2, 1, 1])
    trained, history = train_mapper(
        z, labels, text_source, text_target, class_text, RECIPES["lads"], seed=2, rounds=30,
        val=val if judge == "validation" else [x[:0] for x in val],
    )
    m, val_losses, states = start(seed=2), [], []
    optimizer = torch.optim.AdamW(m.parameters(), lr=5e-3, weight_decay=0.05, eps=1e-6)
    for _ in range(30):  # a batch is all images: 256 are more than the 8 here
        loss = sum(lads_loss(m, z, labels, text_source, text_target, class_text, weight).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        val_losses.append(sum(lads_loss(m, *judged, class_text, weight).values()).item())
        states.append([p.detach().clone() for p in m.parameters()])
    best = val_losses.index(min(val_losses))
    assert best < 15 if judge == "validation" else best > 20
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(trained.parameters(), states[best]))
    assert len(history) == 30  # all epochs, though another one's weights are kept


# -------------------------------------------------------------------------------------------------
# Batches, history, seeds


def batches_of(monkeypatch, name, recipe, n, rounds, seed=0):
    """Return ([rows of each batch], history, [terms of each batch]) of a training of n images."""
    z, labels, text_source, text_target, class_text = world(n=n)
    rows, terms, loss_fn = [], [], getattr(mapper, name)
    numbers = {tuple(x.tolist()): i for i, x in enumerate(z)}

    def recorded(m, z, *rest, **options):
        losses = loss_fn(m, z, *rest, **options)
        if torch.is_grad_enabled():
            rows.append([numbers[tuple(x.tolist())] for x in z])
            terms.append({name: term.item() for name, term in losses.items()})
        return losses

    monkeypatch.setattr(mapper, name, recorded)
    arguments = z, labels, text_source, text_target, class_text, recipe, seed, rounds
    _, history = train_mapper(*arguments)
    monkeypatch.setattr(mapper, name, loss_fn)
    return rows, history, terms


def test_ldfs_draws_a_random_batch_of_128_in_each_step(monkeypatch):
    rows, history, terms = batches_of(monkeypatch, "ldfs_loss", Recipe(), n=300, rounds=3)
    assert [len({*batch}) for batch in rows] == [128] * 3
    assert len({tuple(sorted(batch)) for batch in rows}) == 3
    assert history == [pytest.approx(t) for t in terms] and history[0].keys() == {"L_ld", "L_pair", "L_cls"}
    other_seed, _, _ = batches_of(monkeypatch, "ldfs_loss", Recipe(), n=300, rounds=1, seed=1)
    assert sorted(other_seed[0]) != sorted(rows[0])


def test_a_term_of_weight_0_is_not_computed(monkeypatch):
    _, [losses], _ = batches_of(monkeypatch, "ldfs_loss", Recipe(pair=0.0, cls=0.0), n=8, rounds=1)
    assert losses.keys() == {"L_ld"}


def test_an_epoch_of_lads_takes_every_image_once_and_its_history_is_the_mean(monkeypatch):
    rows, history, terms = batches_of(monkeypatch, "lads_loss", RECIPES["lads"], n=300, rounds=2)
    assert [len(batch) for batch in rows] == [256, 44, 256, 44]
    first, second = rows[0] + rows[1], rows[2] + rows[3]
    assert sorted(first) == sorted(second) == [*range(300)] and first != second
    for epoch, means in enumerate(history):
        for name, mean in means.items():
            assert mean == pytest.approx((terms[2 * epoch][name] + terms[2 * epoch + 1][name]) / 2)


def test_the_bar_shows_the_loss(monkeypatch):
    class Bar(list):
        shown = []

        def set_postfix(self, loss, **options):
            self.shown.append(float(loss))

    monkeypatch.setattr(mapper, "progress_bar", lambda steps, **options: Bar(steps))
    _, history = train_mapper(*world(), RECIPES["ldfs"], rounds=4)
    assert Bar.shown == pytest.approx([sum(losses.values()) for losses in history], abs=1e-3)


def test_training_is_deterministic_and_touches_only_the_mapper():
    tensors = world()
    before = [t.clone() for t in tensors]
    state = torch.random.get_rng_state()
    (one, history), (two, again), (other, _) = (
        train_mapper(*tensors, RECIPES["ldfs"], seed=seed, rounds=5) for seed in (0, 0, 1)
    )
    assert same_weights(one, two) and history == again and not same_weights(one, other)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(p.requires_grad for p in one.parameters())


@pytest.mark.parametrize("name", ["ldfs", "lads", "global"])
def test_one_image_is_enough_not_to_fail(name):
    z, labels, text_source, text_target, class_text = world(n=1)
    m, _ = train_mapper(z, labels, text_source, text_target, class_text, RECIPES[name], rounds=3)
    measures = measure_mapper(m, z, text_source, text_target, 0.01)
    assert m(z).isfinite().all() and all(map(math.isfinite, measures.values()))


@pytest.mark.parametrize("name", ["ldfs", "lads"])
def test_a_loss_that_is_not_finite_stops_the_training(name):
    z, *rest = world()
    with pytest.raises(FloatingPointError, match="nan in round 0"):
        train_mapper(z * math.nan, *rest, RECIPES[name])


# -------------------------------------------------------------------------------------------------
# Measures and names


def test_measures_of_known_directions():
    z, _, text, _, _ = world()
    step = torch.zeros(16)
    step[0] = 0.5
    m = Mapper(16)
    measures = measure_mapper(m, z, text, text + step, 0.0)
    assert measures["|Δt|"] == pytest.approx(0.5)
    assert measures["spread"] == pytest.approx(1.0, abs=1e-4)
    assert measures["|Δz|"] == pytest.approx((m(z) - z).norm(dim=-1).mean().item())
    assert measures["follows"] == pytest.approx(F.cosine_similarity(m(z) - z, step[None]).mean().item())
    right_angles = text + torch.eye(16)[torch.arange(64) % 16]  # 16 directions, 4 images each
    assert measure_mapper(m, z, text, right_angles, 0.0)["spread"] == pytest.approx(3 / 63, abs=1e-4)


def test_measures_of_noise_and_angles():
    z, _, text_source, text_target, _ = world()
    little, much = (measure_mapper(Mapper(16), z, text_source, text_target, s)["noise"] for s in (0.01, 1.0))
    assert 0.99 < little <= 1 and much < 0.5
    reflected = measure_mapper(lambda z: -z, z, text_source, text_target, 0.0)  # a reflection
    assert reflected["angles"] == pytest.approx(0, abs=1e-3) and reflected["|Δz|"] == pytest.approx(2)


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


def test_the_networks_shape_is_lads():
    assert [tuple(p.shape) for p in Mapper(512).parameters()] == [(384, 512), (384,), (512, 384), (512,)]


# -------------------------------------------------------------------------------------------------
# The stage


@pytest.fixture
def stage(tiny_data, tiny_clip, tmp_path):
    """Return (Settings, Dataset, Clip) of a run with mappers of 3 steps; flags are added."""

    def resolved(*flags):
        flags = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, *flags]
        flags += ["--run", tmp_path / "run", "--mapper-steps", 3]
        settings, dataset = load_run(parse("", [*map(str, flags)]))
        return settings, dataset, features.load_clip(settings)

    return resolved


@pytest.mark.parametrize("name", ["ldfs", "lads", "ldfs:direction=domain"])
def test_a_seed_trains_on_its_own_images_and_on_the_words_of_each_target(stage, name):
    settings, dataset, clip = stage("--methods", name)
    recipe = parse_recipe(name)
    mappers = load_mappers(settings, dataset, clip, name, 1)
    assert [*mappers] == ["sketch", "cartoon"]

    train, val = (dataset.split("photo", "photo", part, 1) for part in ("train", "val"))
    names, phrases = ["cat", "dog", "red house"], {"photo": "a photo", "sketch": "a sketch"}

    def inputs(items, target="sketch"):
        words = {
            "caption": [f"a {at.path.split('/')[1]} number {at.path.split('/')[2][0]}" for at, _ in items],
            "class": [f"a {names[y]}" for _, y in items],
        }.get(recipe.direction)
        texts = (
            [f"{phrases[d]} of {w}" for w in words] if words else [phrases[d]] * len(items)
            for d in ("photo", target)
        )
        labels = torch.tensor([y for _, y in items])
        return features.encode_images(clip, items), labels, *(features.encode_texts(clip, t) for t in texts)

    class_text = features.encode_texts(clip, [f"a photo of a {name}" for name in names])
    expected, _ = train_mapper(
        *inputs(train), class_text, recipe, seed=1, rounds=3, val=inputs(val)
    )
    assert same_weights(mappers["sketch"], expected, atol=1e-5)
    assert not same_weights(mappers["sketch"], mappers["cartoon"])
    assert not same_weights(mappers["sketch"], load_mappers(settings, dataset, clip, name, 0)["sketch"])
    assert not any(p.requires_grad for p in mappers["sketch"].parameters())


def test_stored_mappers_are_loaded(stage, monkeypatch):
    settings, dataset, clip = stage("--methods", "ldfs")
    first = load_mappers(settings, dataset, clip, "ldfs", 0)
    monkeypatch.setattr(mapper, "train_mapper", lambda *arguments: pytest.fail("trained again"))
    again = load_mappers(settings, dataset, clip, "ldfs", 0)
    assert all(same_weights(first[domain], again[domain]) for domain in first)


def test_lads_needs_no_captions_and_no_target_image(stage, tiny_data):
    (tiny_data / "tiny" / "captions.jsonl").unlink()
    for domain in ("sketch", "cartoon"):
        for path in (tiny_data / "tiny" / domain).rglob("*.png"):
            path.write_bytes(b"")
    mappers = load_mappers(*stage("--methods", "lads"), "lads", 0)
    assert [*mappers] == ["sketch", "cartoon"]


def test_domains_of_the_sources_phrase_have_no_mapper(stage, tiny_data):
    description = tiny_data / "tiny" / "dataset.json"
    description.write_text(description.read_text().replace("a cartoon", "a photo"))
    assert [*load_mappers(*stage("--methods", "lads"), "lads", 0)] == ["sketch"]


def test_the_script_prints_a_measure_of_each_mapper(script, tiny_data, tiny_clip, tmp_path):
    flags = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", tmp_path / "run"]
    flags += ["--methods", "finetune", "lads", "arf+ldfs", "--seeds", 2, "--mapper-steps", 3]
    lines = [line for line in script("mapper.py", *flags).stdout.splitlines() if "→" in line]
    expected = [f"{name} → {domain}, seed {seed}" for name in ("lads", "ldfs") for seed in (0, 1)
                for domain in ("sketch", "cartoon")]
    assert [line.split(":")[0] for line in lines] == expected
    assert all("follows" in line and "|Δt|" in line for line in lines)
    assert len([*(tmp_path / "run" / "mappers").glob("*.pt")]) == 8


def test_records_contain_the_measures(stage):
    settings, dataset, clip = stage("--methods", "ldfs", "--seeds", "1")
    records = mapper.mapper_records(settings, dataset, clip)
    assert [(r["kind"], r["method"], r["domain"]) for r in records] == [
        ("mapper", "ldfs", "sketch"), ("mapper", "ldfs", "cartoon"),
    ]
    items = dataset.split("photo", "photo", "train", 0)
    m = load_mappers(settings, dataset, clip, "ldfs", 0)["sketch"]
    z = features.encode_images(clip, items)
    texts = [features.encode_texts(clip, data.caption_texts(dataset, d, items)) for d in ("photo", "sketch")]
    expected = measure_mapper(m, z, *texts, 0.01, seed=0)
    assert records[0]["values"] == pytest.approx(expected, abs=1e-4) and records[0]["n"] == len(items)


def test_an_image_that_makes_the_loss_infinite_is_one_line(stage, tiny_data, monkeypatch, capsys):
    settings, dataset, clip = stage("--methods", "lads")
    monkeypatch.setattr(
        features, "encode_images", lambda clip, items, **options: torch.full((len(items), 32), math.nan)
    )
    with pytest.raises(SystemExit) as stop:
        load_mappers(settings, dataset, clip, "lads", 0)
    assert stop.value.code == 2
    assert "lads, sketch: the loss is nan in round 0." in capsys.readouterr().err
    assert not [*settings.run.glob("mappers/*")]
