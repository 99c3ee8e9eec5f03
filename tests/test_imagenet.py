"""ImageNet and its evaluation sets at tiny size: layouts, heads of fewer classes, official test parts, what is not there."""

import json

import pytest
import torch
from conftest import square, write_shard

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
    """Folder with ImageNet (a training and a test image a class), V2, R (3 classes), ObjectNet; of the zero-shot sets Pets."""
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
    write_set(root / "wds_vtab-pets", ["Abyssinian", "Bengal"], [0, 1, 1], ["a photo of a {c}, a type of pet."])
    return root


def test_imagenet_is_read(imagenet, capsys):
    dataset = data.load("imagenet", imagenet)
    said = capsys.readouterr().err
    assert "imagenet: 2000 images" in said and "1331167 are published" in said and "wds_imagenetv2 holds 4 test images" in said
    assert dataset.names[:2] == ["tench", "goldfish"] and dataset.targets("imagenet") == ["v2", "r", "objectnet"]
    assert {*dataset.absent} == {"a", "sketch"} and "wds_imagenet-a" in dataset.absent["a"]
    parts = {part: data.split(dataset, "imagenet", "imagenet", part, 3) for part in ("train", "val", "test")}
    assert [len(p) for p in parts.values()] == [1000, 0, 1000]
    assert all(path.startswith("val/") for path, _ in parts["test"]) and parts["train"] == dataset.trainable("imagenet")
    assert dataset.own["r"][0] == ["goldfish", "electric ray", "ostrich"]
    prompts = data.prompts(dataset, "imagenet", "objectnet")
    assert prompts == [["a photo of a air freshener.", "a photo of a alarm clock."],
                       ["a picture of a air freshener.", "a picture of a alarm clock."]]
    assert dataset.styles("imagenet") == ["r", "sketch"]  # known by name alone: sketch's images are not here
    unseen = data.load_unseen(dataset)
    assert [*unseen.images] == ["pets"] and len(unseen.absent) == 9 and "by hand" in unseen.absent["ucf"]


def test_objectnets_frame_is_cut_off(imagenet):
    dataset = data.load("imagenet", imagenet)
    whole, cut = (features.open_image(dataset.folder, dataset.images[d][0][0]) for d in ("v2", "objectnet"))
    assert whole.size == (16, 16) and cut.size == (12, 12) and cut.getpixel((0, 0)) == whole.getpixel((2, 2))


@pytest.mark.parametrize("breaks, says", [
    (lambda root: (root / "wds_imagenet-r/test/1.tar").unlink(), "1.tar is not there"),
    (lambda root: (root / "wds_imagenet-r/classnames.txt").write_text("goldfish\n"), "labels without a name"),
    (lambda root: (root / "wds_imagenet-r/test/nshards.txt").unlink(), "is not a webdataset of clip-benchmark"),
    (lambda root: (root / "imagenet/train/n00000000").rename(root / "imagenet/train/m0"), "in train and in val"),
])
def test_damage_is_named(imagenet, capsys, breaks, says):
    breaks(imagenet)
    with pytest.raises(SystemExit) as stop:
        data.load("imagenet", imagenet)
    assert stop.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_a_head_of_fewer_classes_is_a_masked_head():
    """ImageNet-A and -R: the argmax among their own names is that of the whole head with all others masked."""
    generator = torch.Generator().manual_seed(0)
    head, z = torch.randn(10, 4, generator=generator), torch.randn(50, 4, generator=generator)
    names, own = [f"c{i}" for i in range(10)], ["c7", "c2", "c5"]
    masked = (z @ head.T).index_fill(1, torch.tensor([i for i in range(10) if f"c{i}" not in own]), -torch.inf).argmax(1)
    found = (z @ evaluate.restricted(head, names, own).T).argmax(1)
    assert [own[i] for i in found] == [names[i] for i in masked]
    assert evaluate.restricted(head, names, ["c1", "alarm clock"]) is None
    twice = ["crane", "missile", "tank", "missile"]  # as ImageNet's 657 and 744: told apart by what stands before
    assert torch.equal(evaluate.restricted(head[:4], twice, twice), head[:4])
    assert torch.equal(evaluate.restricted(head[:4], twice, ["missile", "tank"]), head[1:3])
    assert torch.equal(evaluate.restricted(head[:4], twice, ["tank", "missile"]), head[2:4])


def test_zero_shot_head_is_open_clips(tiny_data, tiny_clip):
    import open_clip

    dataset = data.load("tiny", tiny_data)
    clip = features.load_clip(data.arguments("").parse_args(["tiny", "photo", "--model", tiny_clip]), dataset)
    templates, names = ["a photo of a {}.", "a sketch of the {}.", "{} in a game."], ["cat", "dog", "red house"]
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, names, [t.format for t in templates])
    ours = features.encode_head(clip, [[t.format(n) for n in names] for t in templates])
    assert torch.allclose(ours, theirs.T, atol=1e-6)


def test_finetuning_and_its_table(imagenet, tiny_clip, tmp_path, monkeypatch, capsys):
    """FT and FLYP from end to end: sets that are not there say "not run", published numbers stand below, nothing runs twice."""
    import finetune

    common = ["imagenet", "--data", str(imagenet), "--model", tiny_clip, "--seeds", "1", "--run", str(tmp_path / "run")]
    common += ["--train", "visual", "--methods", "finetune", "flyp", "--epochs", "1"]
    monkeypatch.setattr("sys.argv", ["finetune.py", *common])
    finetune.main()
    states = {f.name: torch.load(f) for f in (tmp_path / "run/checkpoints").iterdir()}
    schedules = {name.split("-")[2]: state["made_of"]["schedule"] for name, state in states.items()}
    assert (schedules["flyp"]["lr"], schedules["finetune"]["lr"], schedules["finetune"]["max_norm"]) == (1e-5, 3e-5, 1.0)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "run", *common])
    evaluate.main()
    out = capsys.readouterr().out
    assert "not run: sketch" in out and "not run: ucf" in out
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    heads, _, zero_shot, ft, flyp = lines[:5]
    cell = dict(zip(heads, flyp)), dict(zip(heads, ft))
    assert cell[0]["sketch"] == cell[0]["unseen ucf"] == cell[1]["objectnet"] == "not run"
    run = ("ID (imagenet)", "v2", "r", "objectnet", "unseen pets", "unseen mean", "OOD mean")
    assert all(cell[0][d] != "not run" for d in run) and cell[1]["r"] != "not run"
    assert cell[1]["OOD mean"] == "not run"  # ObjectNet is here, but not for it: the mean would be over other sets than flyp's
    assert "three later papers" in out and "| 82.7 " in out

    rows = (tmp_path / "run/results.jsonl").read_text()
    n = {r["domain"]: r["n"] for r in map(json.loads, rows.splitlines()) if r["method"] == "flyp"}
    assert (n["imagenet"], n["v2"], n["r"], n["a"], n["OOD mean"], n["unseen mean"]) == (1000, 4, 4, 0, 10, 3)
    evaluate.main()
    assert (tmp_path / "run/results.jsonl").read_text() == rows


def test_sets_to_be_tested_on_are_not_finetuned_on(imagenet, tmp_path, capsys):
    for source in ("v2", "sketch"):
        args = data.arguments("").parse_args(["imagenet", source, "--data", str(imagenet), "--run", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as stop:
            data.prepare(args)
        assert stop.value.code == 2 and "Finetune on another: imagenet" in capsys.readouterr().err
