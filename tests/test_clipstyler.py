"""strategies/clipstyler.py: its losses against formulas by hand, its artifacts, and with which
strategies it can be combined.
"""

import os

import pytest
import torch
import torch.nn.functional as F

import features
import finetune
from core.artifacts import load
from core.config import parse
from core.methods import Method, parse_method, parse_recipe
from losses import local_adaptation
from mapper import measure_mapper
from sets.load import load_run
from strategies import clipstyler
from strategies.clipstyler import StyleNet, clipstyler_losses, direction_losses, total_variation

# --- the network and its losses ----------------------------------------------------------------------


def test_the_direction_is_the_published_one():
    generator = torch.Generator().manual_seed(0)
    z, z_hat = torch.randn(2, 5, 8, generator=generator)
    delta_t = torch.randn(8, generator=generator)
    shift = z_hat - z
    by_hand = [1 - s @ delta_t / (s.norm() * delta_t.norm()) for s in shift]
    assert torch.allclose(direction_losses(z, z_hat, delta_t), torch.stack(by_hand), atol=1e-6)
    mean = local_adaptation(z, z_hat, torch.zeros(5, 8), delta_t.expand(5, 8))
    assert torch.allclose(direction_losses(z, z_hat, delta_t).mean(), mean)
    assert direction_losses(z, z, delta_t).isfinite().all()  # as at the start, where f is the identity


def test_patches_below_the_threshold_are_rejected():
    z, delta_t = torch.zeros(3, 2), torch.tensor([1.0, 0.0])
    z_hat = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])  # losses 0, 0.29, 2
    assert direction_losses(z, z_hat, delta_t, 0.7).tolist() == [0, 0, 2]
    assert direction_losses(z, z_hat, delta_t, 0.2).tolist() == pytest.approx([0, 1 - 0.5 ** 0.5, 2])


def test_total_variation_of_nothing_and_of_a_step():
    flat, step = torch.full((2, 3, 4, 4), 0.3), torch.zeros(1, 3, 4, 4)
    assert total_variation(flat) == 0
    step[..., 2:] = 1  # across: 3 · 4 differences of 1; down: none; diagonal: twice 3 · 3
    assert total_variation(step).item() == pytest.approx(12 ** 0.5 + 2 * 3)
    assert total_variation(step.repeat(5, 1, 1, 1)).item() == pytest.approx(12 ** 0.5 + 6)


def test_the_network_starts_as_the_identity_at_any_size():
    images = torch.rand(2, 3, 18, 21)
    network = StyleNet()
    assert torch.allclose(network(images), images, atol=0.0101)
    network.last.weight.data.normal_()
    painted = network(images)
    assert painted.shape == images.shape and painted.min() >= 0 and painted.max() <= 1
    assert not torch.allclose(painted, images, atol=0.0101)


def test_each_term_is_its_weighted_formula(monkeypatch):
    torch.manual_seed(0)
    images, delta_t = torch.rand(2, 3, 16, 16), torch.randn(12)
    network, matrix = StyleNet().requires_grad_(False), torch.randn(3 * 16 * 16, 12)
    network.last.weight.normal_()
    painted = network(images)
    encoded, sizes, random_crop = [], [], clipstyler.RandomCrop
    monkeypatch.setattr(clipstyler, "RandomCrop", lambda n: sizes.append(n) or random_crop(n))

    def encode(x):
        encoded.append(x)
        return F.normalize(x.flatten(1) @ matrix, dim=1), x ** 2

    def terms():
        torch.manual_seed(0)
        encoded.clear()
        return clipstyler_losses(network, images, delta_t, encode)

    losses = terms()
    assert losses.keys() == {"L_dir", "L_tv", "L_c", "L_patch"}
    z, z_hat = encode(images)[0], encode(painted)[0]
    assert torch.allclose(losses["L_dir"], 500 * direction_losses(z, z_hat, delta_t).mean())
    change = (painted ** 2 - images ** 2).square().sum() / (images ** 2).square().sum()
    assert torch.allclose(losses["L_c"], 500 * change)
    assert torch.allclose(losses["L_tv"], 2e-3 * total_variation(painted))
    patches = encoded[2]  # four of each image, a quarter of its side, enlarged to its size
    assert patches.shape == (8, 3, 16, 16) and sizes == [4]
    single = direction_losses(z.repeat(4, 1), encode(patches)[0], delta_t)
    assert 0 < (single > 0.7).sum() and torch.allclose(losses["L_patch"], 9000 * single[single > 0.7].sum() / 8)
    monkeypatch.setattr(clipstyler, "TAU", 2.1)  # more than any loss can be
    assert terms()["L_patch"] == 0


# --- with which strategies ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["clipstyler", "coop+clipstyler", "cocoop+clipstyler"])
def test_it_is_combined_with_frozen_towers(text):
    train = text.partition("+")[0] if "+" in text else "linear"
    assert parse_method(text) == Method(train, recipe="clipstyler")
    assert not parse_method(text).needs_captions


@pytest.mark.parametrize("call, message", [
    (lambda: parse_method("clipstyler", "full"), "--methods clipstyler: "),
    (lambda: parse_method("flyp+clipstyler"), "--train linear, coop, cocoop"),
    (lambda: parse_method("lpft+clipstyler"), "--methods lpft+clipstyler: "),
    (lambda: parse_method("clipood+clipstyler"), "no mapper follows a tower"),
    (lambda: parse_recipe("clipstyler:sigma=1"), "no variations"),
    (lambda: parse_recipe("ldfs:loss=clipstyler"), "no variations"),
])
def test_any_other_combination_is_refused_in_one_line(call, message, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line


# --- artifacts ---------------------------------------------------------------------------------------


@pytest.fixture
def world(tiny_data, tiny_clip, tmp_path):
    """Return a function (*flags) -> (settings, dataset, Clip), with two steps a network."""

    def make(*flags):
        argv = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", tmp_path / "run"]
        argv += ["--methods", "clipstyler", "--mapper-steps", 2, "--seeds", 1, *flags]
        settings, dataset = load_run(parse("", [str(argument) for argument in argv]))
        return settings, dataset, features.load_clip(settings)

    return make


def files(settings):
    return {path: path.stat().st_mtime_ns for path in settings.run.glob("mappers/*.pt")}


def test_features_are_those_of_the_repainted_images_in_the_order_asked_for(world):
    settings, dataset, clip = world()
    items = dataset.images["photo"][::-3]
    modules = clipstyler.load_styled_features(settings, dataset, clip, 0, items)
    assert [*modules] == ["sketch", "cartoon"]
    images = torch.stack([clip.preprocess(location.decode()) for location, _ in items]) / 255
    for domain, module in modules.items():
        network = StyleNet().requires_grad_(False)
        content = load(clipstyler.style_path(settings, dataset, clip, domain, 0))
        network.load_state_dict(content["network"])
        z_hat = module(torch.zeros(len(items), 32))
        expected, _ = clipstyler.encode_with_maps(clip, network(images))
        assert torch.allclose(z_hat, expected, atol=1e-5)
        assert not any(p.requires_grad for p in module.parameters())
        # at first the network is the identity but for 0.01, so z is near
        z = features.encode_images(clip, items)
        assert F.cosine_similarity(z, z_hat).min() > 0.9 and not torch.allclose(z, z_hat, atol=1e-3)


def test_a_stored_network_is_trained_on_its_seeds_images_towards_its_target(world):
    settings, dataset, clip = world()
    text = features.encode_texts(clip, [*dataset.meta.phrases.values()])  # photo, sketch, cartoon
    for seed, target, domain in ((0, 1, "sketch"), (1, 2, "cartoon")):
        train = dataset.split("photo", "photo", "train", seed)
        expected, history = clipstyler.train_style(clip, train, text[target] - text[0], seed, 2)
        content = clipstyler.style_artifact(settings, dataset, clip, domain, seed)
        assert all(torch.equal(v, content["network"][k]) for k, v in expected.state_dict().items())
        assert content["history"] == history


def test_images_in_0_to_1_have_clips_own_features_and_maps(world):
    _, dataset, clip = world()
    items = dataset.images["photo"][:4]
    images = torch.stack([clip.preprocess(location.decode()) for location, _ in items]) / 255
    z, maps = clipstyler.encode_with_maps(clip, images)
    assert torch.allclose(F.normalize(z, dim=1), features.encode_images(clip, items), atol=1e-5)
    assert len(maps) == 4 and maps.ndim == 4


def test_the_network_depends_on_the_seed_and_leaves_clip_alone(world):
    _, dataset, clip = world()
    items = dataset.split("photo", "photo", "train", 0)
    delta_t = torch.randn(32, generator=torch.Generator().manual_seed(0))
    (one, history), (two, _), (other, _) = (
        clipstyler.train_style(clip, items, delta_t, seed, 2) for seed in (0, 0, 1)
    )
    one, two, other = (network.state_dict() for network in (one, two, other))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["first.0.weight"], other["first.0.weight"])
    assert one["last.weight"].abs().max() > 0  # it has learned
    assert len(history) == 2 and history[0].keys() == {"L_dir", "L_tv", "L_c", "L_patch"}
    assert history[0]["L_dir"] > 0 and history[0] != history[1]
    assert all(torch.equal(v, clip.original[k]) for k, v in clip.model.state_dict().items())
    assert all(p.grad is None for p in clip.model.parameters())


def test_a_network_learns_the_direction(world):
    _, dataset, clip = world()
    items = dataset.split("photo", "photo", "train", 0)
    delta_t = torch.randn(32, generator=torch.Generator().manual_seed(0))
    _, history = clipstyler.train_style(clip, items, delta_t, 0, 30)
    assert history[-1]["L_dir"] < 0.8 * history[0]["L_dir"]


def test_a_loss_that_is_not_finite_is_one_line(world, monkeypatch, capsys):
    _, dataset, clip = world()
    items = dataset.split("photo", "photo", "train", 0)
    with pytest.raises(SystemExit) as stop:
        clipstyler.train_style(clip, items, torch.full((32,), float("nan")), 0, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "clipstyler: the loss" in line]
    assert stop.value.code == 2 and len(lines) == 1 and "step 0" in lines[0]


def test_another_input_is_another_artifact_and_a_target_image_is_none(world, tiny_data):
    settings, dataset, clip = world()

    def artifacts(*flags):
        settings, dataset, clip = world(*flags)
        clipstyler.style_records(settings, dataset, clip)
        return files(settings)

    first = artifacts()
    names = sorted(path.name.rpartition("-")[0] for path in first)
    assert names == ["clipstyler-cartoon-seed0", "clipstyler-sketch-seed0"]
    os.utime(tiny_data / "tiny" / "sketch" / "cat" / "0.png", (1, 1))
    assert artifacts() == first and artifacts("--beams", 2) == first
    total = 2
    for flags, new in ((("--mapper-steps", 3), 2), (("--shots", 3), 2), (("--seeds", 2), 2)):
        total += new
        assert len(artifacts(*flags)) == total
    os.utime(tiny_data / "tiny" / "photo" / "cat" / "0.png", (1, 1))
    assert len(artifacts()) == total + 2
    description = tiny_data / "tiny" / "dataset.json"
    description.write_text(description.read_text().replace('"a sketch"', '"a drawing"'))
    assert len(artifacts()) == total + 3  # that of the cartoon is the same


def test_records_measure_the_training_images(world):
    settings, dataset, clip = world("--seeds", 2)
    records = clipstyler.style_records(settings, dataset, clip)
    assert [(r["kind"], r["method"], r["domain"], r["seed"]) for r in records] == [
        ("mapper", "clipstyler", domain, seed) for seed in (0, 1) for domain in ("sketch", "cartoon")
    ]
    items = dataset.split("photo", "photo", "train", 1)
    text = features.encode_texts(clip, ["a photo", "a sketch"])
    z = features.encode_images(clip, items)
    module = clipstyler.load_styled_features(settings, dataset, clip, 1, items)["sketch"]
    expected = measure_mapper(module, z, *(t.expand_as(z) for t in text), sigma=0)
    assert records[2]["values"].keys() == {"|Δt|", "follows", "|Δz|", "angles"}
    assert records[2]["n"] == len(items)
    for name, value in records[2]["values"].items():
        assert value == pytest.approx(expected[name], abs=1e-5)


def test_pictures_are_of_the_source_and_of_each_target(world):
    settings, dataset, clip = world()
    pictures = clipstyler.style_pictures(settings, dataset, clip)
    assert [*pictures] == ["photo", "sketch", "cartoon"]
    shown = dataset.split("photo", "photo", "test", 0)[::30][:10]
    images = torch.stack([clip.preprocess(location.decode()) for location, _ in shown])
    assert torch.equal(pictures["photo"], images / 255)
    network = StyleNet().requires_grad_(False)
    for domain in ("sketch", "cartoon"):
        content = clipstyler.style_artifact(settings, dataset, clip, domain, 0)
        network.load_state_dict(content["network"])
        assert torch.equal(pictures[domain], network(pictures["photo"]))
    assert all(images.shape == pictures["photo"].shape for images in pictures.values())


def test_nothing_is_trained_for_other_methods(world):
    settings, dataset, clip = world("--methods", "finetune", "ldfs", "coop")
    assert clipstyler.style_pictures(settings, dataset, clip) == {}
    assert clipstyler.style_records(settings, dataset, clip) == [] and not files(settings)


def test_step_2_trains_on_its_features(world):
    flags = ["--epochs", 2, "--batch-size", 8, "--methods", "finetune", "clipstyler", "coop+clipstyler"]
    settings, dataset, clip = world(*flags)
    heads = []
    for name in settings.methods:
        path = finetune.finetune(settings, dataset, clip, name, 0)
        heads.append(torch.load(path)["modules"].get("head.weight"))
        path = finetune.checkpoint_path(settings, dataset, clip, name, 0)
        [epoch, _] = load(finetune.history_path(path))
        styled = {"L_con sketch", "L_con cartoon"} & epoch.keys()
        assert "L_con" in epoch and len(styled) == 2 * ("clipstyler" in name)
    assert not torch.equal(heads[0], heads[1])
    assert len(files(settings)) == 2
