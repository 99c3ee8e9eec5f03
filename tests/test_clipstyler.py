"""clipstyler.py: its losses against formulas by hand, its files, and where it is of no use."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import clipstyler
import config
import mapper
from clipstyler import StyleNet, clipstyler_loss, directional, total_variation
from losses import local_adaptation
from methods import Method, parse_method, parse_recipe
from report import results


def test_the_direction_is_the_published_one():
    generator = torch.Generator().manual_seed(0)
    z, z_hat = torch.randn(2, 5, 8, generator=generator)
    delta_t = torch.randn(8, generator=generator)
    shift = z_hat - z
    by_hand = [1 - s @ delta_t / (s.norm() * delta_t.norm()) for s in shift]
    assert torch.allclose(directional(z, z_hat, delta_t), torch.stack(by_hand), atol=1e-6)
    mean = local_adaptation(z, z_hat, torch.zeros(5, 8), delta_t.expand(5, 8))
    assert torch.allclose(directional(z, z_hat, delta_t).mean(), mean)
    assert directional(z, z, delta_t).isfinite().all()  # as at the start, where f is the identity


def test_patches_below_the_threshold_are_rejected():
    z, delta_t = torch.zeros(3, 2), torch.tensor([1.0, 0.0])
    z_hat = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])  # losses 0, 0.29, 2
    assert directional(z, z_hat, delta_t, 0.7).tolist() == [0, 0, 2]
    assert directional(z, z_hat, delta_t, 0.2).tolist() == pytest.approx([0, 1 - 0.5 ** 0.5, 2])


def test_total_variation_of_nothing_and_of_a_step():
    flat, step = torch.full((2, 3, 4, 4), 0.3), torch.zeros(1, 3, 4, 4)
    assert total_variation(flat) == 0
    step[..., 2:] = 1  # across: 3 · 4 differences of 1; down: none; slantwise: twice 3 · 3
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


def test_the_loss_is_the_weighed_sum_of_its_four_parts(monkeypatch):
    torch.manual_seed(0)
    images, delta_t = torch.rand(2, 3, 16, 16), torch.randn(12)
    network, matrix = StyleNet().requires_grad_(False), torch.randn(3 * 16 * 16, 12)
    network.last.weight.normal_()
    painted = network(images)

    def encode(x):
        return F.normalize(x.flatten(1) @ matrix, dim=1), x ** 2

    def part(**weights):
        for name in ("DIR", "PATCH", "CONTENT", "TV"):
            monkeypatch.setattr(clipstyler, f"LAMBDA_{name}", weights.get(name, 0))
        torch.manual_seed(0)
        return clipstyler_loss(network, images, delta_t, encode)

    z, z_hat = encode(images)[0], encode(painted)[0]
    assert torch.allclose(part(DIR=2), 2 * directional(z, z_hat, delta_t).mean())
    change = (painted ** 2 - images ** 2).square().sum() / (images ** 2).square().sum()
    assert torch.allclose(part(CONTENT=3), 3 * change)
    assert torch.allclose(part(TV=4), 4 * total_variation(painted))
    patches = part(PATCH=1)
    assert 0 < patches < 2 and torch.allclose(part(DIR=2, PATCH=3), part(DIR=2) + 3 * patches)
    monkeypatch.setattr(clipstyler, "TAU", 2.1)  # more than any loss can be
    assert part(PATCH=1) == 0


@pytest.mark.parametrize("text", ["clipstyler", "coop+clipstyler", "cocoop+clipstyler"])
def test_it_goes_with_cached_features(text):
    train = text.partition("+")[0] if "+" in text else "linear"
    assert parse_method(text) == Method(train, recipe="clipstyler")
    assert not parse_method(text).needs_captions


@pytest.mark.parametrize("call, says", [
    (lambda: parse_method("clipstyler", "full"), "--methods clipstyler: "),
    (lambda: parse_method("flyp+clipstyler"), "--train linear, coop, cocoop"),
    (lambda: parse_method("lpft+clipstyler"), "--methods lpft+clipstyler: "),
    (lambda: parse_method("clipood+clipstyler"), "no mapper follows a tower"),
    (lambda: parse_recipe("clipstyler:sigma=1"), "does not vary"),
    (lambda: parse_recipe("ldfs:loss=clipstyler"), "does not vary"),
])
def test_elsewhere_it_is_refused_in_one_line(call, says, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and says in line


def test_features_come_in_the_order_asked_for(tiny_data, tmp_path, capsys):
    cfg, dataset = config.parse("", ["tiny", "photo", "--data", str(tiny_data), "--run", str(tmp_path)])
    clip, items = SimpleNamespace(fingerprint="CLIP's", device="cpu"), dataset.images["photo"]
    load = lambda items: clipstyler.load_styled(cfg, dataset, clip, "sketch", 0, items)  # noqa: E731
    with pytest.raises(SystemExit):
        load(items)
    assert "Make it: python clipstyler.py" in capsys.readouterr().err
    path = clipstyler.style_path(cfg, dataset, clip, "sketch", 0)
    path.parent.mkdir()
    torch.save({"z": torch.arange(30)}, path)
    assert load(items[::-3]).tolist() == list(range(29, -1, -3))
    as_a_mapper = mapper.load_synthesiser(cfg, dataset, clip, "clipstyler", "sketch", 0, items)
    assert as_a_mapper(torch.zeros(30)).tolist() == list(range(30))
    path.write_bytes(b"half")
    with pytest.raises(SystemExit):
        load(items)
    assert f"{path} is damaged" in capsys.readouterr().err


def test_end_to_end(script, tiny_data, tiny_clip, tmp_path):
    """Files, their use in step 2, and that they are made anew for another image of the source, but
    for none of a target.
    """
    run, touched = tmp_path / "run", tiny_data / "tiny"
    options = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", run]
    options += ["--seeds", 1, "--mapper-steps", 2, "--epochs", 2, "--batch-size", 8]
    methods = ["--methods", "finetune", "clipstyler", "coop+clipstyler"]
    script("run_ldfs.sh", *options, *methods)
    files = {path: path.stat().st_mtime_ns for path in run.glob("mappers/*.pt")}
    names = sorted(path.name.rpartition("-")[0] for path in files)
    assert names == ["clipstyler-cartoon-seed0", "clipstyler-sketch-seed0"]
    assert (run / "clipstyler.png").stat().st_size > 1000
    rows = results.read(run)
    measured = {(r["method"], r["domain"], r["measure"]): r for r in rows}
    assert {"|Δt|", "follows", "|Δz|", "angles"} == {r["measure"] for r in rows if r["split"] == "train"}
    assert measured["clipstyler", "sketch", "follows"]["n"] == 18
    assert measured["clipstyler", "sketch", "class consistency"]["n"] == 9  # figure 4's
    assert {"clipstyler", "coop+clipstyler"} < {r["method"] for r in rows if r["measure"] == "accuracy"}
    heads = [torch.load(next(run.glob(f"checkpoints/{name}-seed0-*.pt")))["modules"]["head.weight"]
             for name in ("finetune", "clipstyler")]
    assert not torch.equal(*heads)

    os.utime(touched / "sketch" / "cat" / "0.png", (1, 1))
    script("clipstyler.py", *options, *methods)
    assert files == {path: path.stat().st_mtime_ns for path in run.glob("mappers/*.pt")}
    os.utime(touched / "photo" / "cat" / "0.png", (1, 1))
    script("clipstyler.py", *options, *methods)
    assert len({*run.glob("mappers/*.pt")}) == 4


def test_the_network_hangs_on_the_seed_and_leaves_clip_alone(tiny_data, tiny_clip, tmp_path):
    from features import load_clip

    arguments = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", tmp_path]
    cfg, dataset = config.parse("", [*map(str, arguments)])
    clip, items = load_clip(cfg), dataset.split("photo", "photo", "train", 0)
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    delta_t = torch.randn(32, generator=torch.Generator().manual_seed(0))
    one, two, other = (
        clipstyler.paint(clip, items, items, delta_t, seed, 2)["network"] for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["first.0.weight"], other["first.0.weight"])
    assert one["last.weight"].abs().max() > 0  # it has learned
    assert all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items())
    assert all(p.grad is None for p in clip.model.parameters())


@pytest.mark.parametrize("stage, methods", [("clipstyler.py", ["ldfs", "coop"]), ("mapper.py", ["clipstyler"])])
def test_a_stage_that_is_not_asked_for_loads_no_clip(script, tiny_data, stage, methods):
    arguments = ["tiny", "photo", "--data", tiny_data, "--model", "local-dir:/nowhere", "--methods"]
    done = script(stage, *arguments, *methods)
    assert done.stdout == done.stderr == ""
