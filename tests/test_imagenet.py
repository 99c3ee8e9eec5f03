"""ImageNet and its evaluation sets at tiny size: layouts, heads of fewer classes, official test."""

import pytest
import torch
from conftest import square, write_shard

import config
import data
import evaluate
import features


def write_set(folder, names, labels, templates=("a photo of a {c}.", "a picture of a {c}.")):
    """A webdataset of clip-benchmark's layout: one image a label, two shards."""
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
    """Folder with ImageNet (one training, one test image a class), V2, R, ObjectNet, and Pets."""
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
    dataset = data.load("imagenet", imagenet)
    said = capsys.readouterr().err
    assert "imagenet: 2000 images" in said and "1331167 are published" in said
    assert "wds_imagenetv2 holds 4 test images" in said
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
    assert dataset.styles("imagenet") == ["r", "sketch"]  # known by name alone: sketch is not here
    unseen = data.load_unseen(dataset)
    assert [*unseen.images] == ["pets"] and len(unseen.absent) == 9
    assert "by hand" in unseen.absent["ucf"]
    names, templates = data.prompt_templates(unseen, "imagenet", "pets")
    assert templates[0](names[1]) == "a photo of a Bengal, a type of pet."


def test_objectnets_frame_is_cut_off(imagenet):
    images = data.load("imagenet", imagenet).images
    whole, cut = images["v2"][0][0].open(), images["objectnet"][0][0].open()
    assert whole.size == (16, 16) and cut.size == (12, 12)
    assert cut.getpixel((0, 0)) == whole.getpixel((2, 2))


@pytest.mark.parametrize("breaks, says", [
    (lambda root: (root / "wds_imagenet-r/test/1.tar").unlink(), "1.tar cannot be read (No such file or directory). Put it back"),
    (lambda root: (root / "wds_imagenet-r/classnames.txt").write_text("goldfish\n"),
     "wds_imagenet-r is damaged: labels without a name"),
    (lambda root: (root / "wds_imagenet-r/test/nshards.txt").write_text("0"), "no images"),
    (lambda root: (root / "wds_imagenet-r/test/nshards.txt").unlink(),
     "wds_imagenet-r is not a webdataset of clip-benchmark"),
    (lambda root: (root / "imagenet/train/n00000000").rename(root / "imagenet/train/m0"),
     "the same 1000 class folders"),
])
def test_damage_is_named(imagenet, capsys, breaks, says):
    breaks(imagenet)
    with pytest.raises(SystemExit) as stop:
        data.load("imagenet", imagenet)
    assert stop.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_a_head_of_fewer_classes_is_a_masked_head():
    """ImageNet-A and -R: the argmax among their own names is that of the head, others masked."""
    generator = torch.Generator().manual_seed(0)
    weight, z = torch.randn(10, 4, generator=generator), torch.randn(50, 4, generator=generator)
    head, names, own = (weight, None), [f"c{i}" for i in range(10)], ["c7", "c2", "c5"]
    others = torch.tensor([i for i in range(10) if f"c{i}" not in own])
    masked = (z @ weight.T).index_fill(1, others, -torch.inf).argmax(1)
    found = (z @ evaluate.restricted(head, names, own)[0].T).argmax(1)
    assert [own[i] for i in found] == [names[i] for i in masked]
    assert evaluate.restricted(head, names, ["c1", "alarm clock"]) is None
    # as ImageNet's 657 and 744: told apart by what stands before
    twice, four = ["crane", "missile", "tank", "missile"], (weight[:4], torch.arange(4))
    few = {("missile", "tank"): [1, 2], ("tank", "missile"): [2, 3], (*twice,): [0, 1, 2, 3]}
    for own, rows in few.items():
        part = evaluate.restricted(four, twice, own)
        assert part[1].tolist() == rows and torch.equal(part[0], weight[rows])


def test_zero_shot_head_is_open_clips(tiny_data, tiny_clip):
    import open_clip

    argv = ["tiny", "photo", "--data", str(tiny_data), "--run", str(tiny_data / "run")]
    clip = features.load_clip(config.parse("", [*argv, "--model", tiny_clip])[0])
    templates = ["a photo of a {}.".format, "a sketch of the {}.".format, "{} in a game.".format]
    names = ["cat", "dog", "red house"]
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, names, templates)
    ours = features.zero_shot_head(clip, names, templates)
    assert torch.allclose(ours, theirs.T, atol=1e-6)
    prompts = [[template(name) for name in names] for template in templates]
    means = torch.stack([features.encode_texts(clip, texts) for texts in prompts]).mean(0)
    assert torch.allclose(ours, torch.nn.functional.normalize(means, dim=-1), atol=1e-6)


def test_finetuning_and_its_table(imagenet, tiny_clip, tmp_path, monkeypatch, capsys):
    """FT and FLYP from end to end: sets that are not there say "not run", nothing runs twice.

    Published numbers stand below.
    """
    import finetune
    from report import results

    common = ["imagenet", "--data", str(imagenet), "--model", tiny_clip, "--seeds", "1"]
    common += ["--run", str(tmp_path / "run"), "--train", "full", "--epochs", "1"]
    common += ["--methods", "finetune", "flyp"]
    monkeypatch.setattr("sys.argv", ["finetune.py", *common])
    finetune.main()
    schedules = config.parse("", common)[0].schedules
    assert (schedules["towers"].lr, schedules["full"].lr) == (1e-5, 3e-5)
    assert (schedules["towers"].max_norm, schedules["full"].max_norm) == (None, 1.0)
    monkeypatch.setattr("sys.argv", ["evaluate.py", *common])
    evaluate.main()
    out = capsys.readouterr().out
    assert "not run: sketch" in out and "not run: ucf" in out
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    columns, rows = lines[0], {line[0]: line for line in lines if len(line) == len(lines[0])}
    flyp, full = dict(zip(columns, rows["flyp"])), dict(zip(columns, rows["finetune"]))
    assert flyp["sketch"] == flyp["unseen ucf"] == full["objectnet"] == "not run"
    run = ("v2", "r", "objectnet", "unseen pets", "unseen mean", "OOD mean", "ID (imagenet)")
    assert all(flyp[column] != "not run" for column in run) and full["r"] != "not run"
    # ObjectNet is here, but not for it: the mean would be over other sets than flyp's
    assert full["OOD mean"] == "not run"
    assert "three later papers" in out and "| 82.7 " in out

    file = tmp_path / "run/results.jsonl"
    lines = file.read_text()
    n = {row["domain"]: row["n"] for row in results.rows(file.parent) if row["method"] == "flyp"}
    assert [n[d] for d in ("imagenet", "v2", "r", "a")] == [1000, 4, 4, 0]
    assert (n["OOD mean"], n["unseen mean"]) == (10, 3)
    evaluate.main()
    assert file.read_text() == lines


def test_sets_to_be_tested_on_are_not_finetuned_on(imagenet, tmp_path, capsys):
    for source in ("v2", "sketch"):
        argv = ["imagenet", source, "--data", str(imagenet), "--run", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as stop:
            config.parse("", argv)
        assert stop.value.code == 2
        assert "Finetune on another: imagenet" in capsys.readouterr().err
