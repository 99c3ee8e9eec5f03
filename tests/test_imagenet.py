"""ImageNet and its test sets at tiny size: layouts, heads of fewer classes, the official test part."""

import pytest
import torch
from conftest import square, write_shard

import data
import evaluate
import features
from core.config import parse
from core.results import read_records
from sets.load import load_dataset, load_run, load_unseen


def write_set(folder, names, labels, templates=("a photo of a {c}.", "a picture of a {c}.")):
    """Write a webdataset in clip-benchmark's layout: one image for each label, two shards."""
    for shard in range(2):
        members = {}
        for i, label in list(enumerate(labels))[shard::2]:
            members |= {f"s{i:07d}.png": square(i), f"s{i:07d}.cls": str(label).encode()}
        write_shard(folder / "test" / f"{shard}.tar", members)
    (folder / "test/nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Folder of ImageNet (a training and a test image of each class), V2, R, ObjectNet, and Pets."""
    from open_clip import zero_shot_metadata

    templates = [lambda c: f"a photo of a {c}.", lambda c: f"a picture of a {c}."]  # 80 are slow
    monkeypatch.setattr(zero_shot_metadata, "OPENAI_IMAGENET_TEMPLATES", templates)
    names = zero_shot_metadata.IMAGENET_CLASSNAMES
    root, image = tmp_path / "data", square(0)
    for part in ("train", "val"):
        for i in range(1000):
            folder = root / "imagenet" / part / f"n{i:08d}"
            folder.mkdir(parents=True)
            (folder / f"{part}_{i}.png").write_bytes(image)
    write_set(root / "wds_imagenetv2", names, range(4))
    write_set(root / "wds_imagenet-r", [names[i] for i in (1, 5, 9)], [0, 1, 2, 2])
    write_set(root / "wds_objectnet", ["air freshener", "alarm clock"], [0, 1])
    pets = ["a photo of a {c}, a type of pet."]
    write_set(root / "wds_vtab-pets", ["Abyssinian", "Bengal"], [0, 1, 1], pets)
    return root


def test_imagenet_is_read(imagenet, capsys):
    dataset = load_dataset("imagenet", imagenet)
    warnings = capsys.readouterr().err
    assert "imagenet: 2000 images" in warnings and "1331167 are published" in warnings
    assert "wds_imagenetv2 has 4 test images" in warnings
    assert dataset.classnames[:2] == ["tench", "goldfish"]
    assert [*dataset.images] == ["imagenet", "v2", "r", "objectnet"]
    assert {*dataset.absent} == {"a", "sketch"} and "wds_imagenet-a" in dataset.absent["a"]
    parts = [dataset.split("imagenet", "imagenet", p, 3) for p in ("train", "val", "test")]
    assert [len(p) for p in parts] == [1000, 0, 1000] and parts[0] == dataset.trainable("imagenet")
    assert all(location.path.startswith("val/") for location, _ in parts[2])
    assert {*dataset.heads} == {"r", "objectnet"}  # V2's classes are ImageNet's own
    assert dataset.heads["r"][0] == ["goldfish", "electric ray", "ostrich"]
    names, templates = data.prompt_templates(dataset, "imagenet", "objectnet")
    assert [[template(name) for name in names] for template in templates] == [
        ["a photo of a air freshener.", "a photo of a alarm clock."],
        ["a picture of a air freshener.", "a picture of a alarm clock."],
    ]
    names, templates = data.prompt_templates(dataset, "imagenet", "v2")
    assert (len(names), templates[1](names[0])) == (1000, "a picture of a tench.")
    assert dataset.styles("imagenet") == ["r", "sketch"]  # a name is enough: sketch is absent
    unseen = load_unseen(dataset)
    assert [*unseen.images] == ["pets"] and len(unseen.absent) == 9
    assert "by hand" in unseen.absent["ucf"]
    names, templates = data.prompt_templates(unseen, "imagenet", "pets")
    assert templates[0](names[1]) == "a photo of a Bengal, a type of pet."


def test_objectnets_frame_is_cut_off(imagenet):
    images = load_dataset("imagenet", imagenet).images
    full, cut = images["v2"][0][0].open(), images["objectnet"][0][0].open()
    assert full.size == (16, 16) and cut.size == (12, 12)
    assert cut.getpixel((0, 0)) == full.getpixel((2, 2))


@pytest.mark.parametrize("damage, message", [
    (lambda root: (root / "wds_imagenet-r/test/1.tar").unlink(), "1.tar cannot be read (No such file or directory). Put it back"),
    (lambda root: (root / "wds_imagenet-r/classnames.txt").write_text("goldfish\n"),
     "wds_imagenet-r is damaged: labels without a name"),
    (lambda root: (root / "wds_imagenet-r/test/nshards.txt").write_text("0"), "no images"),
    (lambda root: (root / "wds_imagenet-r/test/nshards.txt").unlink(),
     "wds_imagenet-r is not a webdataset of clip-benchmark"),
    (lambda root: (root / "imagenet/train/n00000000").rename(root / "imagenet/train/m0"),
     "the same 1000 class folders"),
])
def test_damage_is_named(imagenet, capsys, damage, message):
    damage(imagenet)
    with pytest.raises(SystemExit) as stop:
        load_dataset("imagenet", imagenet)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_head_of_fewer_classes_is_a_masked_head():
    """ImageNet-A and -R: the argmax among their own names is the full head's with others masked."""
    generator = torch.Generator().manual_seed(0)
    weight, z = torch.randn(10, 4, generator=generator), torch.randn(50, 4, generator=generator)
    head, names, own = (weight, None), [f"c{i}" for i in range(10)], ["c7", "c2", "c5"]
    others = torch.tensor([i for i in range(10) if f"c{i}" not in own])
    masked = (z @ weight.T).index_fill(1, others, -torch.inf).argmax(1)
    restricted = (z @ evaluate.restrict_head(head, names, own)[0].T).argmax(1)
    assert [own[i] for i in restricted] == [names[i] for i in masked]
    assert evaluate.restrict_head(head, names, ["c1", "alarm clock"]) is None
    # as ImageNet's 657 and 744, told apart by what precedes
    twice, four = ["crane", "missile", "tank", "missile"], (weight[:4], torch.arange(4))
    few = {("missile", "tank"): [1, 2], ("tank", "missile"): [2, 3], (*twice,): [0, 1, 2, 3]}
    for own, rows in few.items():
        part = evaluate.restrict_head(four, twice, own)
        assert part[1].tolist() == rows and torch.equal(part[0], weight[rows])


def test_zero_shot_head_is_open_clips(tiny_data, tiny_clip):
    import open_clip

    argv = ["tiny", "photo", "--data", str(tiny_data), "--run", str(tiny_data / "run")]
    clip = features.load_clip(load_run(parse("", [*argv, "--model", tiny_clip]))[0])
    templates = ["a photo of a {}.".format, "a sketch of the {}.".format, "{} in a game.".format]
    names = ["cat", "dog", "red house"]
    expected = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, names, templates)
    head = features.zero_shot_head(clip, names, templates)
    assert torch.allclose(head, expected.T, atol=1e-6)
    prompts = [[template(name) for name in names] for template in templates]
    means = torch.stack([features.encode_texts(clip, texts) for texts in prompts]).mean(0)
    assert torch.allclose(head, torch.nn.functional.normalize(means, dim=-1), atol=1e-6)


def test_finetuning_and_its_scores(imagenet, tiny_clip, tmp_path, script):
    """FT and FLYP from end to end: sets that are absent are "not run", nothing is measured twice."""
    run, common = tmp_path / "run", ["imagenet", "--data", imagenet, "--model", tiny_clip]
    common += ["--run", run, "--train", "full", "--epochs", 1, "--seeds", 1]
    common += ["--methods", "finetune", "flyp"]
    schedules = load_run(parse("", [*map(str, common)]))[0].schedules
    assert (schedules["towers"].lr, schedules["full"].lr) == (1e-5, 3e-5)
    assert (schedules["towers"].max_norm, schedules["full"].max_norm) == (None, 1.0)
    script("finetune.py", *common)
    done = script("evaluate.py", *common)
    assert "not run: sketch" in done.stdout and "not run: ucf" in done.stdout

    records = {r["method"]: r for r in read_records(run) if r["kind"] == "accuracy"}
    flyp, full = records["flyp"]["values"], records["finetune"]["values"]
    assert flyp["sketch"] is flyp["unseen ucf"] is full["objectnet"] is None
    measured = ("v2", "r", "objectnet", "unseen pets", "unseen mean", "OOD mean", "imagenet")
    assert None not in [flyp[name] for name in measured] and full["r"] is not None
    # ObjectNet is here, but finetune cannot score it: its mean would be over other sets than flyp's
    assert full["OOD mean"] is None
    n = records["flyp"]["n"]
    assert [n[d] for d in ("imagenet", "v2", "r", "a")] == [1000, 4, 4, 0]
    assert (n["OOD mean"], n["unseen mean"]) == (10, 3)

    assert "82.7" in (run / "table.md").read_text(encoding="utf-8")  # what others published

    def inodes():  # another if a file is written anew
        return {file: file.stat().st_ino for file in (run / "scores").glob("*-seed*")}

    before = inodes()
    again = script("evaluate.py", *common)
    assert len(before) == 3 and inodes() == before
    assert [line for line in again.stdout.splitlines() if "flyp" in line] == [
        line for line in done.stdout.splitlines() if "flyp" in line
    ]


def test_test_sets_are_not_finetuned_on(imagenet, tmp_path, capsys):
    for source in ("v2", "sketch"):
        argv = ["imagenet", source, "--data", str(imagenet), "--run", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as stop:
            load_run(parse("", argv))
        assert stop.value.code == 2
        assert "Finetune on another domain: imagenet" in capsys.readouterr().err
