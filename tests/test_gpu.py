"""The CUDA path, on a GPU: bash run_tests.sh -m gpu. Without one these tests are not selected.

On the same tiny world as the other tests, beside the values of a CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from test_finetune import Killed, killed_at, make_settings

import anchors
import evaluate
import features
import finetune
from anchors import search
from core.methods import parse_method
from data import Location
from sets.webdataset import read_shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
METHODS = [
    "linear", "coop", "cocoop", "maple", "full", "lpft", "clipood", "flyp", "arf", "dive", "ldfs",
]


@pytest.fixture
def world(tiny_data, tiny_clip, tiny_pool, tmp_path, monkeypatch):
    """run(name, device) finetunes by one method and returns its checkpoint's path and history."""
    pairs = [
        (location, text)
        for shard in sorted(tiny_pool.glob("*.tar"))
        for _, location, text, _ in read_shard(shard)[0]
    ]
    monkeypatch.setattr(anchors, "pairs_of", lambda *args: pairs)

    class World:
        def settings(self, name, folder):
            flags = ["--pool", tiny_pool, "--lambda-dive", 10]
            settings, self.dataset = make_settings(tiny_data, tiny_clip, tmp_path / folder, *flags)
            settings.methods = {name: parse_method(name)}
            return settings

        def clip(self, device="cuda"):
            with pytest.MonkeyPatch.context() as patch:
                if device == "cpu":
                    patch.setattr(features, "get_device", lambda: torch.device("cpu"))
                return features.load_clip(self.settings("linear", "run"))

        def run(self, name, device="cuda", folder="run", micro_batch=None):
            settings = self.settings(name, f"{folder}-{device}")
            settings.micro_batch = micro_batch
            path = finetune.finetune(settings, self.dataset, self.clip(device), name, 0)
            return path, features.load(finetune.history_path(path))

    return World()


def test_features_in_bfloat16_are_those_of_a_cpu(world):
    world.settings("linear", "run")
    items = world.dataset.images["photo"]
    gpu, cpu = (features.encode_images(world.clip(device), items) for device in ("cuda", "cpu"))
    assert F.cosine_similarity(gpu, cpu).min() > 0.999


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_what_it_learns_on_a_cpu(world, name):
    (_, on_gpu), (_, on_cpu) = world.run(name), world.run(name, "cpu")
    assert len(on_gpu) == len(on_cpu) == 3
    for epoch, expected in zip(on_gpu, on_cpu):
        assert epoch == pytest.approx(expected, rel=0.05, abs=0.05)


@pytest.mark.parametrize("name", ["full", "arf", "dive"])
def test_a_killed_run_resumes(world, name, monkeypatch):
    whole = torch.load(world.run(name, folder="whole")[0], map_location="cpu")["modules"]
    killed_at(monkeypatch, "ldfs_losses" if name == "full" else "arf_losses", 8)
    with pytest.raises(Killed):
        world.run(name)
    resumed = torch.load(world.run(name)[0], map_location="cpu")["modules"]
    assert all(torch.allclose(whole[k].float(), resumed[k].float(), atol=1e-3) for k in whole)


def test_a_checkpoint_of_a_gpu_is_evaluated_on_a_cpu(world):
    path, _ = world.run("full")
    settings = world.settings("full", "run-cuda")
    clip = world.clip("cpu")
    assert finetune.checkpoint_path(settings, world.dataset, clip, "full", 0) == path
    settings.seeds, settings.alphas = 1, (0.5,)
    stamp = path.stat().st_mtime_ns
    records = evaluate.evaluate(settings, world.dataset, clip)
    assert len(records) == 3 and path.stat().st_mtime_ns == stamp


def test_micro_batches_give_the_same_losses(world):
    (_, whole), (_, in_parts) = world.run("arf"), world.run("arf", folder="parts", micro_batch=2)
    assert all(a == pytest.approx(b, rel=0.02, abs=0.02) for a, b in zip(whole, in_parts))


def test_what_a_row_takes_is_measured(world):
    settings, clip = world.settings("arf", "run"), world.clip()
    image_bytes, text_bytes = finetune.measure_rows(settings, world.dataset, clip)
    assert 1e3 < image_bytes < 1e8 and 1e3 < text_bytes < 1e8


def test_the_search_finds_the_same_on_both_devices():
    generator = torch.Generator().manual_seed(0)
    queries, pool = (F.normalize(torch.randn(n, 32, generator=generator)) for n in (50, 3000))
    pool[100] = pool[2000]
    on_cpu, on_gpu = search(queries, [pool], 7), search(queries.cuda(), [pool.cuda()], 7)
    assert torch.equal(on_cpu[1], on_gpu[1].cpu())


def test_a_captioner_writes(world, tiny_blip2):
    model, processor = features.load_captioner(tiny_blip2, torch.device("cuda"))
    world.settings("linear", "run")
    images = [location.open() for location, _ in world.dataset.images["photo"][:4]]
    captions = anchors.caption_images(model, processor, images)
    assert len(captions) == 4 and all(isinstance(caption, str) for caption in captions)
    assert isinstance(world.dataset.images["photo"][0][0], Location)
