"""What is reused between runs: whatever changes, a folder with earlier outcomes gives what a fresh
folder gives; what cannot matter trains nothing again; killed and concurrent runs disturb nothing.
"""

import functools
import json
import os
import random
import shutil
import signal
import time
import traceback

import open_clip
import pytest
import torch
from conftest import write_shard
from PIL import Image

import anchors
from core.artifacts import load
from report import figures
from sets.load import load_dataset

WORDS = ["red", "green", "blue", "grey", "dark", "bright", "small", "round", "soft", "old", "new", "flat"]
VOCABULARY = [
    "<pad>", "<s>", "</s>", "<unk>", *WORDS, "a", "an", "of", "photo", "sketch", "drawing", "picture",
    "cat", "dog", "house", "horse", "fox", "owl", "thing", "nice", "hand", "made", "by",
]
CLASSES = {"cat": (200, 80, 80), "dog": (80, 170, 80), "red_house": (90, 90, 190)}
UNSEEN = {"fox": (190, 150, 60), "owl": (120, 120, 120)}
DOMAINS = {"photo": "a photo", "sketch": "a sketch"}


# -------------------------------------------------------------------------------------------------
# A world in which every change shows


def draw(path, seed, colour=None, size=16):
    """Write a noisy square of roughly a colour. Files of one `size` have the same length."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.tensor(colour) if colour else torch.randint(256, (3,), generator=generator)
    base = base + torch.randint(-90, 90, (3,), generator=generator)
    pixels = base + torch.randint(-40, 40, (size, size, 3), generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(path)


def draw_domains(folder, classes, n, seed):
    for number, domain in enumerate(DOMAINS):
        for label, (name, colour) in enumerate(classes.items()):
            darker = [int(c * (1 - 0.3 * number)) for c in colour]
            for i in range(n):
                path = folder / domain / name / f"{i}.bmp"
                draw(path, seed + 1000 * number + 100 * label + i, darker)


def write_pool_shard(path, seed, n=6, texts="a {} thing"):
    members = {}
    for i in range(seed, seed + n):
        draw(path.with_suffix(".bmp"), i)
        members[f"{i}.bmp"] = path.with_suffix(".bmp").read_bytes()
        members[f"{i}.txt"] = texts.format(WORDS[i % len(WORDS)]).encode()
    path.with_suffix(".bmp").unlink()
    write_shard(path, members)


def edit(path, **fields):
    """Change fields of a JSON file, "model_cfg.text_cfg.width" by its path with "__" for dots."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for key, value in fields.items():
        *outer, last = key.split("__")
        functools.reduce(lambda part, name: part[name], outer, content)[last] = value
    path.write_text(json.dumps(content))


def make_clip(folder, images):
    """Write an open_clip model whose tokenizer knows VOCABULARY, trained a little on {name: paths}."""
    import tokenizers
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 16}
    text = {
        "context_length": 12, "vocab_size": len(VOCABULARY), "hf_tokenizer_name": "words",
        "width": 32, "heads": 2, "layers": 1, "pool_type": "eos", "eos_id": 2,
    }
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    preprocess = {
        "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest",
    }
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = torch.stack([transform(Image.open(path)) for paths in images.values() for path in paths])
    labels = torch.tensor([y for y, paths in enumerate(images.values()) for _ in paths])
    tokens = tokenizer([f"a photo of a {name}" for name in images])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        z, t, scale = model(pixels, tokens)
        loss = torch.nn.functional.cross_entropy(scale * z @ t.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


class World:
    """A folder with a data set, its unseen classes, a pool and a CLIP; runs are stored in `run`.

    Paths on the command line are relative to this folder, so that copies of it are alike.
    """

    def __init__(self, root, run="runs/run", data="data"):
        self.root, self.run, self.data = root, root / run, root / data
        self.tiny, self.pool, self.clip = self.data / "tiny", root / "pool", root / "clip"
        self.captions = self.tiny / "captions.jsonl"
        self.common = ["--data", data, "--run", run]

    def make(self):
        draw_domains(self.tiny, CLASSES, n=6, seed=0)
        draw_domains(self.data / "unseen", UNSEEN, n=4, seed=5000)
        fractions = {"train": 0.5, "val": 0.17, "test": 0.33}
        edit(self.tiny / "dataset.json", phrases=DOMAINS, fractions=fractions, unseen="unseen")
        edit(self.data / "unseen" / "dataset.json", phrases=DOMAINS)
        for number in range(2):
            write_pool_shard(self.pool / f"{number:05d}.tar", 100 * number)
        classes = {**CLASSES, **UNSEEN}
        images = {c.replace("_", " "): [*self.data.glob(f"*/photo/{c}/*")] for c in classes}
        make_clip(self.clip, images)

    def images(self, part, domain="photo"):
        """Return the paths of the images in a part of the split of seed 0."""
        items = load_dataset("tiny", self.data).split("photo", domain, part, 0)
        return [self.tiny / location.path for location, _ in items]

    def flags(self, *flags):
        """Return the command line of a short run of LDFS and ARF; `flags` may name the source."""
        usual = ["--methods", "ldfs", "arf", "--seeds", 1, "--mapper-steps", 2, "--epochs", 2]
        usual += ["--lr", 0.01, "--same", 0.99999, "--alphas", 0.5, "--captioner", "captioner"]
        usual += ["--model", "local-dir:clip", "--pool", "pool"]
        source = "sketch" if "sketch" in flags else "photo"
        return ["tiny", source, *self.common, *usual, *(flag for flag in flags if flag != source)]

    def files(self, *folders):
        """Return {"checkpoints/ldfs-seed0-HASH.pt": time of change} of the stored outcomes."""
        folders = folders or ("mappers", "checkpoints", "pairs", "scores")
        paths = [path for folder in folders for path in (self.run / folder).glob("[!.]*")]
        return {str(path.relative_to(self.run)): path.stat().st_mtime_ns for path in paths}


def fake_caption(captioner, prompt, image, beams):
    """Return a captioner's words, which depend on the pixels; for some images none, or too many."""
    r, g, b = image.resize((1, 1)).getpixel((0, 0))
    if r % 8 == 0:
        return ["", "red red red red"][g % 2]
    words = [WORDS[(x // 8 + beams + len(captioner)) % len(WORDS)] for x in (r, g, b)]
    return " ".join(["a", *words, "thing"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Replace the captioner, and draw no picture."""
    monkeypatch.setattr(anchors, "load_captioner", lambda name, device: (name, None))
    monkeypatch.setattr(
        anchors, "caption_images",
        lambda name, _, images, prompt, beams, n: [fake_caption(name, prompt, x, beams) for x in images],
    )
    for name in dir(figures):
        if name.startswith("draw_"):
            monkeypatch.setattr(figures, name, lambda *arguments: None)
    uncached = getattr(open_clip.get_tokenizer, "__wrapped__", open_clip.get_tokenizer)
    monkeypatch.setattr(open_clip, "get_tokenizer", uncached)  # of conftest's tiny_clip


@pytest.fixture(scope="module")
def template_folder(tmp_path_factory):
    """Return the folder of a World in which nothing was run, and of one with a finished run."""
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture
def new(template_folder, tmp_path):
    """Return a World in which nothing was run."""
    if not (template_folder / "new").exists():
        World(template_folder / "new").make()
    shutil.copytree(template_folder / "new", tmp_path, dirs_exist_ok=True)
    return World(tmp_path)


@pytest.fixture
def world(template_folder, new, script):
    """Return a World with a finished run of new.flags()."""
    if not (template_folder / "run").exists():
        script("run.py", *new.flags())
        shutil.copytree(new.root, template_folder / "run")
    shutil.copytree(template_folder / "run", new.root, dirs_exist_ok=True)
    return new


def fresh_copy(world):
    """Return a World of the same images and of people's captions, in which nothing was run."""
    shutil.copytree(world.data, world.root / "fresh" / "data")
    copy = World(world.root, "fresh/run", "fresh/data")
    rows = [line for line in copy.captions.read_text().splitlines() if '"by"' not in line]
    copy.captions.write_text("".join(row + "\n" for row in rows))
    return copy


def equal(one, other):
    """Return whether two stored contents are equal, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def assert_same_outcomes(world, fresh, *folders):
    """Assert that `world` has all stored outcomes of `fresh`, with the same content."""
    for name in fresh.files(*folders):
        if "measures" not in name:  # hashed by content; the table shows them
            assert (world.run / name).exists(), f"{name} is not there"
            assert equal(load(world.run / name, "cpu"), load(fresh.run / name, "cpu")), name


# -------------------------------------------------------------------------------------------------
# Changes


def change_pixels(part, domain="photo"):
    """Another image of the same size."""
    return lambda world: draw(world.images(part, domain)[0], seed=77)


def change_size_alone(world):
    path = world.images("train")[0]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    draw(path, seed=77, size=17)
    os.utime(path, ns=times)


def change_time_alone(world):
    os.utime(world.images("train")[0], ns=(0, 10**18))


def change_time_of_shards(world):
    for path in world.pool.iterdir():
        os.utime(path, ns=(0, 10**18))


def change_unseen_image(world):
    draw(world.data / "unseen" / "sketch" / "owl" / "0.bmp", seed=77)


def caption_by_hand(world, caption="a nice hand"):
    path = world.images("train")[0].relative_to(world.tiny)
    with open(world.captions, "a") as file:
        file.write(json.dumps({"path": str(path), "caption": caption}) + "\n")


def other_captions_file(world):
    rows = [json.loads(line) for line in world.captions.read_text().splitlines()]
    rows = [{"path": row["path"], "caption": f"nice {row['caption']}"} for row in rows]
    (world.root / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--captions", "own.jsonl"]


def describe(**fields):
    return lambda world: edit(world.tiny / "dataset.json", **fields)


def rename_class(world):
    for domain in DOMAINS:
        (world.tiny / domain / "dog").rename(world.tiny / domain / "horse")


def add_training_image(world):
    for number in range(100, 200):
        path = world.tiny / "photo" / "dog" / f"{number}.bmp"
        draw(path, seed=78)
        if path in world.images("train"):
            return
        path.unlink()


def add_target_image(world):
    draw(world.tiny / "sketch" / "dog" / "new.bmp", seed=78)


def remove_image(part, domain="photo"):
    return lambda world: world.images(part, domain)[0].unlink()


def official_test_list(world):
    (world.tiny / "photo_test.txt").write_text("photo/cat/0.bmp 0\nphoto/dog/1.bmp 1\nphoto/red_house/2.bmp 2\n")


def change_shard(world):
    """Other images of the same number and sizes."""
    write_pool_shard(world.pool / "00001.tar", 300)


def change_texts_of_shard(world):
    write_pool_shard(world.pool / "00001.tar", 100, texts="a {} horse")


def remove_shard(world):
    (world.pool / "00000.tar").unlink()


def add_shard(world):
    write_pool_shard(world.pool / "00002.tar", 200)


def add_leak(world):
    """A shard with a test image, and with a target's and an unseen one."""
    unseen = world.data / "unseen" / "photo" / "fox" / "0.bmp"
    images = world.images("test")[0], world.images("test", "sketch")[0], unseen
    members = {f"{i}.bmp": path.read_bytes() for i, path in enumerate(images)}
    write_shard(world.pool / "00002.tar", {**members, **{f"{i}.txt": b"a leak" for i in range(3)}})


def change_weights(world):
    from safetensors.torch import load_file, save_file

    path = world.clip / "open_clip_model.safetensors"
    save_file({name: 1.1 * weight for name, weight in load_file(path).items()}, path)


def change_tokenizer(world):
    """Two words change places, and nothing else of the model changes."""
    path = world.clip / "tokenizer.json"
    ids = json.loads(path.read_text())["model"]["vocab"]
    swapped = {**ids, "cat": ids["dog"], "dog": ids["cat"], "red": ids["nice"], "nice": ids["red"]}
    edit(path, model__vocab=swapped)


def change_config(**fields):
    return lambda world: edit(world.clip / "open_clip_config.json", **fields)


def flags(*extra):
    return lambda world: extra


LDFS, ARF, BOTH, NONE = {"ldfs-seed0"}, {"arf-seed0"}, {"ldfs-seed0", "arf-seed0"}, set()
CHANGES = {  # name: (change, the checkpoints that it trains)
    "training image, same size": (change_pixels("train"), BOTH),
    "training image, same time": (change_size_alone, BOTH),
    "time of a training image": (change_time_alone, BOTH),
    "validation image": (change_pixels("val"), NONE),
    "test image": (change_pixels("test"), NONE),
    "target image": (change_pixels("test", "sketch"), NONE),
    "unseen image": (change_unseen_image, NONE),
    "added training image": (add_training_image, BOTH),
    "added target image": (add_target_image, NONE),
    "removed image": (remove_image("train"), BOTH),
    "removed target image": (remove_image("test", "sketch"), NONE),
    "caption by hand": (caption_by_hand, BOTH),
    "captions file": (other_captions_file, BOTH),
    "captioner": (flags("--captioner", "another"), BOTH),
    "beams": (flags("--beams", 3), BOTH),
    "source's phrase": (describe(phrases={"photo": "a picture", "sketch": "a sketch"}), BOTH),
    "target's phrase": (describe(phrases={"photo": "a photo", "sketch": "a drawing"}), LDFS),
    "class folder": (rename_class, BOTH),
    "class name": (describe(classnames={"dog": "horse"}), BOTH),
    "templates": (describe(templates={"photo": ["nice {}", "a {} by hand"]}), BOTH),
    "fractions": (describe(fractions={"train": 0.75, "val": 0.0, "test": 0.25}), BOTH),
    "official test part": (official_test_list, BOTH),
    "schedule of the probe": (describe(schedules={"linear": {"batch_size": 4}}), LDFS),
    "schedule of the towers": (describe(schedules={"towers": {"batch_size": 4}}), ARF),
    "no unseen classes": (describe(unseen=None), NONE),
    "shard": (change_shard, ARF),
    "time of the shards": (change_time_of_shards, ARF),
    "texts of a shard": (change_texts_of_shard, ARF),
    "removed shard": (remove_shard, ARF),
    "added shard": (add_shard, ARF),
    "shard of test images": (add_leak, ARF),
    "weights": (change_weights, BOTH),
    "tokenizer": (change_tokenizer, BOTH),
    "text config": (change_config(model_cfg__text_cfg__no_causal_mask=True), BOTH),
    "preprocessing": (change_config(preprocess_cfg__mean=[0.4, 0.5, 0.6]), BOTH),
    "source": (lambda world: ["sketch"], BOTH),
    "seeds": (flags("--seeds", 2), {"ldfs-seed1", "arf-seed1"}),
    "recipe": (flags("--methods", "ldfs:sigma=0.5", "arf"), {"ldfs:sigma=0.5-seed0"}),
    "mapper steps": (flags("--mapper-steps", 3), LDFS),
    "learning rate": (flags("--lr", 0.02), BOTH),
    "epochs": (flags("--epochs", 3), BOTH),
    "batch size": (flags("--batch-size", 5), BOTH),
    "shots": (flags("--shots", 2), BOTH),
    "init": (flags("--init", "text"), LDFS),
    "lambda cap": (flags("--lambda-cap", 0.3), ARF),
    "lambda ret": (flags("--lambda-ret", 0.3), ARF),
    "k": (flags("--k", 3), ARF),
    "same": (flags("--same", 0.995), ARF),
    "query": (flags("--query", "text"), ARF),
    "unlocked groups": (flags("--unlocked-groups", 1), ARF),
    "locked text tower": (flags("--lock-text"), ARF),
    "alphas": (flags("--alphas", 0.25), NONE),
}


def trained(world, before):
    """Return {"ldfs-seed0"} of the checkpoints that were not stored `before`."""
    names = world.files("checkpoints").keys() - before.keys()
    return {name.removeprefix("checkpoints/").rpartition("-")[0] for name in names}


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change_evaluation_alone_gives_what_a_fresh_folder_gives(world, script, name):
    """… the same tables and weights, bit by bit, and only what depends on the change is trained."""
    change, expected = CHANGES[name]
    before, table = world.files(), (world.run / "table.md").read_text()
    extra = change(world) or []
    fresh = fresh_copy(world)
    printed = script("evaluate.py", *world.flags(*extra)).stdout
    assert trained(world, before) == expected
    fresh_printed = script("run.py", *fresh.flags(*extra)).stdout
    assert_same_outcomes(world, fresh)
    assert (world.run / "table.md").read_text() == (fresh.run / "table.md").read_text()
    title = "tiny, source "
    assert printed[printed.index(title):] == fresh_printed[fresh_printed.index(title):]
    assert ((fresh.run / "table.md").read_text() == table) == ("time of" in name)  # the change shows


@pytest.mark.parametrize("name", [
    "training image, same size", "caption by hand", "target's phrase", "class folder", "shard", "added shard",
    "tokenizer", "k", "shots",
])
def test_after_a_change_finetuning_alone_trains_as_in_a_fresh_folder(world, script, name):
    """… on mappers, captions and pairs of the new inputs."""
    change, expected = CHANGES[name]
    before = world.files()
    extra = change(world) or []
    fresh = fresh_copy(world)
    script("finetune.py", *world.flags(*extra))
    script("finetune.py", *fresh.flags(*extra))
    assert trained(world, before) == expected
    assert_same_outcomes(world, fresh, "mappers", "pairs", "checkpoints")


@pytest.mark.parametrize("method, change, extra", [
    ("coop", change_tokenizer, []), ("coop", describe(phrases={"photo": "a picture", "sketch": "a sketch"}), []),
    ("maple", change_config(model_cfg__text_cfg__no_causal_mask=True), []),
    ("lpft", describe(schedules={"linear": {"batch_size": 4}}), []), ("lpft", flags(), ["--init", "scratch"]),
    ("full", flags(), ["--unlocked-groups", 1]), ("lads", change_pixels("train"), []),
    ("clipood+lads", change_pixels("val"), []),
    ("clipstyler", describe(phrases={"photo": "a photo", "sketch": "a drawing"}), []),
    ("clipstyler", flags(), ["--mapper-steps", 2]),
    ("cocoop+ldfs", caption_by_hand, []),
])
def test_after_a_change_other_strategies_give_what_a_fresh_folder_gives(new, script, method, change, extra):
    usual = ["--methods", method, "--alphas", "--mapper-steps", 1]
    script("finetune.py", *new.flags(*usual))
    before = new.files("checkpoints")
    extra = [*usual, *extra, *(change(new) or [])]
    new.captions.touch()
    fresh = fresh_copy(new)
    script("evaluate.py", *new.flags(*extra))
    script("run.py", *fresh.flags(*extra))
    assert f"{method}-seed0" in trained(new, before)
    assert_same_outcomes(new, fresh)
    assert (new.run / "table.md").read_text() == (fresh.run / "table.md").read_text()


def test_a_second_caption_by_a_person_trains_arf_anew(new, script):
    """It draws one of an image's captions in each epoch; a mapper takes the first."""
    caption_by_hand(new)
    script("finetune.py", *new.flags())
    before = new.files("checkpoints")
    caption_by_hand(new, "by a hand")
    fresh = fresh_copy(new)
    for world in (new, fresh):
        script("finetune.py", *world.flags())
    assert trained(new, before) == ARF
    assert_same_outcomes(new, fresh, "mappers", "checkpoints")


def test_two_sources_of_one_phrase_can_share_a_run_folder(new, script):
    """The prompts, the images and the model are the same for both; only the split differs."""
    edit(new.tiny / "dataset.json", phrases=dict.fromkeys(DOMAINS, "a photo"), unseen=None)
    new.captions.touch()
    fresh = fresh_copy(new)
    flags = ["--methods", "finetune", "--epochs", 1]
    script("evaluate.py", *new.flags("photo", *flags))
    for world in (new, fresh):
        script("evaluate.py", *world.flags("sketch", *flags))
    assert (new.run / "table.md").read_text() == (fresh.run / "table.md").read_text()


def test_going_back_trains_nothing(world, script):
    before, table = world.files(), (world.run / "table.md").read_text()
    image = world.images("train")[0]
    image.rename(world.root / "kept.bmp")
    draw(image, seed=77)
    script("run.py", *world.flags("--lr", 0.02))
    assert len(world.files()) > len(before) and (world.run / "table.md").read_text() != table
    (world.root / "kept.bmp").rename(image)
    changed = world.files()
    script("run.py", *world.flags())
    assert world.files("checkpoints", "mappers", "pairs").items() <= changed.items()
    assert (world.run / "table.md").read_text() == table


def test_the_same_command_again_makes_nothing(world, script):
    features = {path: path.stat().st_mtime_ns for path in (world.run.parent / ".features").iterdir()}
    before, captions, table = world.files(), world.captions.read_text(), (world.run / "table.md").read_text()
    script("run.py", *world.flags())
    after = world.files()
    assert after.keys() == before.keys()  # scores are touched: the newest are those last asked for
    assert {name for name in after if after[name] != before[name] and "scores" not in name} == set()
    assert features == {path: path.stat().st_mtime_ns for path in features}
    assert captions == world.captions.read_text() and table == (world.run / "table.md").read_text()


# -------------------------------------------------------------------------------------------------
# What cannot matter

CANNOT_MATTER = {  # what: (methods, flags)
    "beams for a probe": (["finetune", "lads"], ["--beams", 3]),
    "captioner for a probe": (["finetune", "lads"], ["--captioner", "another", "--captions", "nowhere.jsonl"]),
    "captions' batch": (["ldfs", "arf"], ["--caption-batch", 2]),
    "micro-batches": (["ldfs", "arf"], ["--micro-batch", 4]),
    "retrieval for flyp": (["flyp"], ["--k", 3, "--same", 0.9, "--query", "text", "--pool", "nowhere"]),
    "alphas": (["ldfs", "arf"], ["--alphas", 0.1, 0.2]),
    "lambdas for cross-entropy": (["finetune", "ldfs"], ["--lambda-cap", 0.3, "--lambda-ret", 0.3]),
    "lambda of captions for flyp+retrieved": (["flyp+retrieved"], ["--lambda-cap", 0.3]),
    "lambda of pairs for flyp+captions": (["flyp+captions"], ["--lambda-ret", 0.3]),
    "mapper steps without a mapper": (["finetune", "arf"], ["--mapper-steps", 9]),
    "locks of towers for a probe": (["ldfs", "coop"], ["--lock-text", "--unlocked-groups", 1]),
    "start of the head for towers": (["flyp"], ["--init", "scratch"]),
    "what cross-entropy trains, for arf": (["arf"], ["--train", "full"]),
    "the paper": (["ldfs", "arf"], ["--paper", "arf", "--train", "linear"]),
    "fewer methods": (["ldfs", "arf"], ["--methods", "arf"]),
}


@pytest.mark.parametrize("name", CANNOT_MATTER)
def test_what_cannot_matter_trains_nothing(world, script, name):
    methods, extra = CANNOT_MATTER[name]
    script("finetune.py", *world.flags("--methods", *methods))
    before = world.files()
    script("finetune.py", *world.flags("--methods", *methods, *extra))
    assert world.files() == before


def test_data_and_pool_may_move(world, script):
    """If the times of files are kept. Captions, features, weights and scores stay what they are."""
    before, table = world.files(), (world.run / "table.md").read_text()
    shutil.copytree(world.data, world.root / "elsewhere" / "images")
    shutil.copytree(world.pool, world.root / "elsewhere" / "pairs")
    shutil.rmtree(world.data)
    shutil.rmtree(world.pool)
    moved = World(world.root, data="elsewhere/images")
    script("run.py", *moved.flags("--pool", world.root / "elsewhere" / "pairs"))
    assert world.files().keys() == before.keys()
    assert (world.run / "table.md").read_text() == table
    folders = "checkpoints", "mappers", "pairs"
    assert world.files(*folders) == {name: t for name, t in before.items() if name.startswith(folders)}


def test_a_model_may_move(world, script):
    """Nothing is trained again, and the table is that of a fresh folder: of one model."""
    before = world.files("checkpoints", "mappers", "pairs")
    shutil.copytree(world.clip, world.root / "moved")
    fresh = fresh_copy(world)
    for each in (world, fresh):
        script("run.py", *each.flags("--model", "local-dir:moved"))
    assert world.files("checkpoints", "mappers", "pairs") == before
    assert (world.run / "table.md").read_text() == (fresh.run / "table.md").read_text()


# -------------------------------------------------------------------------------------------------
# Damaged files, killed runs, and two runs at once


@pytest.mark.parametrize("pattern", [
    "../.features/tiny-photo-*.pt", "pairs/*.json", "mappers/*.pt", "checkpoints/arf-*.pt", "checkpoints/arf-*.json",
    "scores/zero-shot-*.json", "scores/arf-*-alpha1-*.json",
])
def test_a_damaged_file_is_named_and_made_again_once_it_is_deleted(world, script, pattern):
    [path] = world.run.glob(pattern)
    table = (world.run / "table.md").read_text()
    for score in world.run.glob("scores/arf-*-alpha0.5-*"):  # the checkpoint has to be read for it
        score.unlink()
    path.write_bytes(path.read_bytes()[:20])
    error = script("run.py", *world.flags(), code=2).stderr
    assert path.name in error and "Delete it and run again" in error
    path.unlink()
    script("run.py", *world.flags())
    assert path.exists() and (world.run / "table.md").read_text() == table


def fork(call, output):
    """Return the id of a process that calls call() and writes what it returns into a file."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)  # the threads of this process do not exist in a fork
        signal.alarm(120)
        output.write_text(call())
        status = 0
    except BaseException:
        output.write_text(traceback.format_exc())
    finally:
        os._exit(status)


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_before_the_second_new_file():
    """Let this process end, as kill -9 would end it, with its second new file half made."""
    replace, new_files = os.replace, []

    def counted(part, path):
        if not path.exists():
            new_files.append(path)
        if len(new_files) == 2:
            os._exit(9)
        replace(part, path)

    os.replace = counted


def table_of(printed):
    return printed[printed.index("tiny, source "):]


def assert_undisturbed(world, script, *extra):
    """Assert that `world` has the outcomes of an undisturbed run, and no half-finished training."""
    world.captions.touch()
    fresh = fresh_copy(world)
    printed = script("run.py", *fresh.flags(*extra)).stdout
    assert_same_outcomes(world, fresh)
    assert {*world.files("mappers", "checkpoints", "pairs")} == {*fresh.files("mappers", "checkpoints", "pairs")}
    return table_of(printed)


def test_a_run_that_is_killed_at_every_write_ends_with_the_same_outcome(new, script):
    flags, output, deaths = ["--epochs", 3], new.root / "output", 0

    def killed():
        die_before_the_second_new_file()
        return script("run.py", *new.flags(*flags)).stdout

    while (status := status_of(fork(killed, output))) != 0:
        assert status == 9, output.read_text()
        deaths += 1
        assert deaths < 60
    assert deaths > 15  # features, captions, mappers, pairs, epochs, checkpoints, scores
    assert table_of(output.read_text()) == assert_undisturbed(new, script, *flags)


def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_outcome(new, script):
    flags = ["--epochs", 3, "--caption-batch", 2]

    def run():
        return script("run.py", *new.flags(*flags)).stdout

    for _ in range(5):
        pid = fork(run, new.root / "output")
        time.sleep(random.uniform(0.05, 0.6))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert table_of(run()) == assert_undisturbed(new, script, *flags)


@pytest.mark.parametrize("second", [[], ["--methods", "arf", "flyp", "--lr", "0.02"]])
def test_two_runs_at_once_in_one_folder_both_print_their_table(new, script, second):
    outputs = [new.root / "first", new.root / "second"]
    commands = [new.flags("--epochs", 3, *extra) for extra in ([], second)]
    pids = [
        fork(lambda command=command: script("run.py", *command).stdout, output)
        for command, output in zip(commands, outputs)
    ]
    assert [status_of(pid) for pid in pids] == [0, 0], [output.read_text() for output in outputs]
    new.captions.touch()
    for extra, output in zip(([], second), outputs):
        fresh = fresh_copy(new)
        printed = script("run.py", *fresh.flags("--epochs", 3, *extra)).stdout
        assert table_of(output.read_text()) == table_of(printed)
        assert_same_outcomes(new, fresh)
        shutil.rmtree(new.root / "fresh")
    assert not [*new.run.rglob("*.part*")]
