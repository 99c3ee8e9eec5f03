"""data.py and features.py: splits, words, bad input, and a feature cache that never serves another model's features."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch

import data
import features


def load_clip(name, dataset):
    return features.load_clip(data.arguments("").parse_args(["tiny", "photo", "--model", name]), dataset)


def test_splits_are_disjoint_whole_and_deterministic(tiny_data):
    dataset = data.load("tiny", tiny_data)
    parts = [data.split(dataset, "photo", "photo", part, seed=0) for part in ("train", "val", "test")]
    assert [len(p) for p in parts] == [18, 3, 9]
    assert sorted(sum(parts, [])) == dataset.images["photo"]
    assert parts[0] == data.split(data.load("tiny", tiny_data), "photo", "photo", "train", seed=0)
    assert parts[0] != data.split(dataset, "photo", "photo", "train", seed=1)
    assert {y for _, y in parts[2]} == {0, 1, 2}  # stratified by class
    assert data.split(dataset, "photo", "sketch", "test", seed=0) == dataset.images["sketch"]  # a target is tested whole
    assert data.split(dataset, "photo", "sketch", "train", seed=0) == []


def test_what_is_trained_on_is_in_no_test_part_of_any_style(tiny_data):
    about = tiny_data / "tiny" / "dataset.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"same_stem_same_thing": True}))
    dataset = data.load("tiny", tiny_data)

    def things(domain, part):
        return {path.split("/", 1)[1] for path, _ in data.split(dataset, "photo", domain, part, seed=0)}

    for domain in dataset.targets("photo"):
        assert things(domain, "test") == things("photo", "test")
        assert not things(domain, "test") & (things("photo", "train") | things("photo", "val"))

    for i in range(4):  # and so it stays where a target lacks some, and has others of its own
        (tiny_data / "tiny" / "sketch" / "dog" / f"{i}.png").rename(tiny_data / "tiny" / "sketch" / "dog" / f"{i + 20}.png")
    dataset = data.load("tiny", tiny_data)
    assert not things("sketch", "test") & (things("photo", "train") | things("photo", "val"))
    assert {f"dog/{i + 20}.png" for i in range(4)} <= things("sketch", "test")


def test_words():
    assert data.words("Alarm_Clock") == "alarm clock"
    nouns = ["dog", "elephant", "grapes", "glass of milk", "Santa Claus", "bus"]
    assert [data.article(n) for n in nouns] == ["a dog", "an elephant", "grapes", "a glass of milk", "Santa Claus", "a bus"]


def test_prompts_carry_each_images_own_caption(tiny_data):
    dataset = data.load("tiny", tiny_data)
    assert data.class_texts(dataset, "sketch") == ["a sketch of a cat", "a sketch of a dog", "a sketch of a red house"]
    assert data.caption_texts(dataset, "sketch", ["photo/dog/3.png"]) == ["a sketch of a dog number 3"]
    (tiny_data / "tiny" / "captions.jsonl").write_text('{"path": "photo/dog/3.png", "caption": "a photo of two dogs"}\n')
    assert data.caption_texts(dataset, "sketch", ["photo/dog/3.png"]) == ["a sketch of two dogs"]


def refusal(capsys, call):
    """The one line that `call` prints before it exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    lines = [s for s in capsys.readouterr().err.splitlines() if s.strip() and "img/s" not in s]  # but for progress bars
    assert len(lines) == 1, lines
    return lines[0]


def test_bad_data_is_refused_by_name(tiny_data, tiny_clip, capsys):
    tiny = tiny_data / "tiny"
    known = "Known: domainnet, emoji, imagenet, office_home, pacs, terra_incognita, tiny, vlcs."
    assert known in refusal(capsys, lambda: data.load("pcas", tiny_data))
    said = refusal(capsys, lambda: data.load("pacs", tiny_data))
    assert "could not fetch flwrlabs/pacs" in said and f"{tiny_data}/pacs by hand" in said
    said = refusal(capsys, lambda: data.load("vlcs", tiny_data))
    assert "VOC2007, LabelMe, SUN09, Caltech101" in said and "domainbed.scripts.download" in said
    args = data.arguments("").parse_args(["tiny", "foto", "--data", str(tiny_data)])
    assert "'foto'" in refusal(capsys, lambda: data.prepare(args))
    assert "no such file" in refusal(capsys, lambda: data.load("tiny", tiny_data, captions="nowhere.jsonl"))
    dataset = data.load("tiny", tiny_data)

    (tiny / "captions.jsonl").write_text('{"path": "photo/dog/3.png", "caption": "a dog"}\n')
    paths = ["photo/dog/3.png", "photo/cat/1.png", "photo/cat/2.png"]
    assert "2 of 3 images, photo/cat/1.png" in refusal(capsys, lambda: data.caption_texts(dataset, "photo", paths))
    (tiny / "captions.jsonl").write_text('{"path": "photo/dog/3.png"}\n')
    assert "line 1" in refusal(capsys, lambda: data.caption_texts(dataset, "photo", ["photo/dog/3.png"]))

    (tiny / "photo" / "dog" / "3.png").write_bytes(b"not an image")
    clip = load_clip(tiny_clip, dataset)
    capsys.readouterr()
    assert "photo/dog/3.png" in refusal(capsys, lambda: features.encode_images(clip, tiny, dataset.images["photo"]))

    for image in (tiny / "photo" / "dog").iterdir():
        image.unlink()
    assert "photo/dog holds no images" in refusal(capsys, lambda: data.load("tiny", tiny_data))
    shutil.rmtree(tiny / "sketch" / "cat")
    (tiny / "photo" / "dog" / "1.png").touch()
    assert "sketch has other classes" in refusal(capsys, lambda: data.load("tiny", tiny_data))
    shutil.rmtree(tiny / "photo")
    assert "photo holds no class folders" in refusal(capsys, lambda: data.load("tiny", tiny_data))


@pytest.mark.parametrize("name, remedy", [
    ("ViT-B-61", "Nearest names: ViT-B-16"), ("local-dir:nowhere", "nowhere/open_clip_config.json does not exist"),
])
def test_a_bad_model_is_refused_by_name(tiny_data, capsys, name, remedy):
    assert remedy in refusal(capsys, lambda: load_clip(name, data.load("tiny", tiny_data)))


@pytest.mark.parametrize("about", [
    "{", '{"phrases": {"photo": "a photo"}}', '{"fractions": {}}',
    '{"phrases": {"photo": "a photo", "sketch": "a sketch"}, "fractions": {"train": 0.5, "test": 0.5}}',
])
def test_a_bad_description_is_refused(tiny_data, capsys, about):
    (tiny_data / "tiny" / "dataset.json").write_text(about)
    assert "does not describe a data set" in refusal(capsys, lambda: data.load("tiny", tiny_data))


def test_published_counts_are_checked(tiny_data, capsys, monkeypatch):
    squares = {"phrases": {"photo": "a photo", "sketch": "a sketch"}, "counts": {"photo": 31, "sketch": 30}}
    monkeypatch.setitem(data.DATASETS, "squares", squares)
    (tiny_data / "tiny" / "dataset.json").unlink()
    (tiny_data / "tiny").rename(tiny_data / "squares")
    data.load("squares", tiny_data)
    assert "squares, photo: 30 images" in (said := capsys.readouterr().err) and "31 are published" in said


def test_features_are_unit_norm_in_order_and_of_each_text_its_own(tiny_data, tiny_clip):
    dataset = data.load("tiny", tiny_data)
    clip = load_clip(tiny_clip, dataset)
    items = dataset.images["photo"]
    z = features.encode_images(clip, dataset.folder, items, batch_size=7)
    assert torch.allclose(z.norm(dim=1), torch.ones(len(items)), atol=1e-6)
    assert torch.allclose(z[[4]], features.encode_images(clip, dataset.folder, items[4:5]), atol=1e-5)
    t = features.encode_texts(clip, ["a dog", "a cat", "a dog"])
    assert torch.equal(t[0], t[2]) and not torch.allclose(t[0], t[1])


@pytest.mark.parametrize("caption, content", [
    ("a photo of two dogs", "two dogs"), ("a black and white sketch of a dog", "a dog"), ("A 3D render of an ox", "an ox"),
    ("a man taking a photo of a dog", "a man taking a photo of a dog"), ("a photo", "a photo"), ("a dog", "a dog"),
])
def test_a_captions_own_medium_is_cut_off(caption, content):
    assert data.MEDIUM.sub("", caption) == content


def test_flyps_prompts_come_from_the_templates(tiny_data):
    assert data.prompts(data.load("tiny", tiny_data), "photo") == [data.class_texts(data.load("tiny", tiny_data), "photo")]
    about = tiny_data / "tiny" / "dataset.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"templates": {"photo": ["{} in a photo", "{}."]}}))
    texts = data.prompts(data.load("tiny", tiny_data), "photo")
    assert [t[2] for t in texts] == ["red house in a photo", "red house."]


def test_the_cache_is_keyed_by_weights_preprocessing_and_images(tiny_data, tiny_clip, tmp_path):
    dataset = data.load("tiny", tiny_data)
    clip = load_clip(tiny_clip, dataset)

    def files():
        clip.fingerprint = features.fingerprint(clip)
        features.cached_features(clip, dataset, "photo", tmp_path / "run")
        return len(list((tmp_path / ".features").iterdir()))

    assert files() == 1
    assert files() == 1  # served from the cache
    with torch.no_grad():
        clip.model.visual.proj[0, 0] += 1
    assert files() == 2
    clip.preprocess.transforms.pop()
    assert files() == 3
    clip.model.visual.transformer.resblocks[0].mlp.gelu = open_clip.transformer.QuickGELU()  # the same weights
    assert files() == 4
    shutil.copy(tiny_data / "tiny" / "photo" / "cat" / "1.png", tiny_data / "tiny" / "photo" / "cat" / "2.png")
    assert files() == 5


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def dies(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, dies)
    assert path.read_text() == "old"


SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "pacs").exists(), reason=f"the real PACS images are not at {SHARED / 'pacs'}")
def test_the_real_pacs(capsys):
    dataset = data.load("pacs", SHARED)
    assert capsys.readouterr().out == ""  # no warning: the counts are the published ones
    assert dataset.classes == ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    photos = [path for path, _ in dataset.images["photo"]]
    texts = data.caption_texts(dataset, "sketch", photos)
    assert len(texts) == 1670 and all(t.startswith("a sketch of ") and len(t) > 14 for t in texts)
    parts = [{p for p, _ in data.split(dataset, "photo", "photo", part, 0)} for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1670


def layout(root, about, rename=lambda name: name):
    """An empty-handed copy of a known data set: one class, ten files a domain."""
    for domain in about["phrases"]:
        folder = root / rename(domain) / "Alarm_Clock"
        folder.mkdir(parents=True)
        for i in range(10):
            (folder / f"{i}.jpg").touch()


@pytest.mark.parametrize("name, folder, domain, source", [
    ("pacs", "PACS", str.title, "photo"),
    ("office_home", "OfficeHomeDataset_10072016", lambda d: d.replace("_", " ").title(), "real_world"),
    ("domainnet", "domain_net", str, "real"),
    ("terra_incognita", "TerraIncognita", str, "location_38"),
    ("vlcs", "VLCS", str, "VOC2007"),
])
def test_known_sets_are_found_in_their_usual_capitalisations(tmp_path, capsys, name, folder, domain, source):
    """… with the same splits as in ours, whatever the folders are called; the source is the first domain."""
    layout(tmp_path / "a" / folder, data.DATASETS[name], domain)
    layout(tmp_path / "b" / name, data.DATASETS[name])
    found, ours = data.load(name, tmp_path / "a"), data.load(name, tmp_path / "b")
    assert found.folder == tmp_path / "a" / folder and [*found.images] == [*data.DATASETS[name]["phrases"]]
    assert found.names == ["alarm clock"] and "are published" in capsys.readouterr().err

    def files(dataset):
        return [path.split("/")[-1] for path, _ in data.split(dataset, source, source, "train", 0)]

    assert files(found) == files(ours) and len(files(ours)) == 7
    assert data.load(name, tmp_path / "a" / folder).images == found.images  # --data may name the folder itself
    args = data.arguments("").parse_args([name, "--data", str(tmp_path / "a"), "--run", str(tmp_path / "run")])
    assert data.prepare(args)[0].folder == found.folder and args.source == source


def test_of_folders_of_like_names_the_right_one_is_taken(tmp_path):
    for folder in ("PACS_old", "pacs", "a/pacs_captions", "."):
        (tmp_path / folder / "sketch").mkdir(parents=True)
    assert data.locate("pacs", tmp_path) == tmp_path / "pacs"
    assert data.locate("pacs", tmp_path / "a") == tmp_path / "a/pacs_captions"
    assert data.locate("domainnet", tmp_path) is None  # for one folder called sketch


def test_an_official_list_must_be_of_these_files(tmp_path, capsys):
    layout(tmp_path / "domainnet", data.DATASETS["domainnet"])
    (tmp_path / "domainnet/real_test.txt").write_text("real/Alarm_Clock/3.jpg 0\nreal/Alarm_Clock/4.jpg 0\n")
    test = data.split(data.load("domainnet", tmp_path), "real", "real", "test", 0)
    assert test == [("real/Alarm_Clock/3.jpg", 0), ("real/Alarm_Clock/4.jpg", 0)]
    capsys.readouterr()
    (tmp_path / "domainnet/real_test.txt").write_text("real/x/real_1.jpg 0\n")
    with pytest.raises(SystemExit):
        data.load("domainnet", tmp_path)
    assert "names no image" in capsys.readouterr().err


def test_domains_without_a_style_have_no_mapper(tmp_path, tiny_clip, monkeypatch, capsys):
    """… which is said before they are captioned, too; plain finetuning does without."""
    import anchors
    import evaluate
    import mapper

    layout(tmp_path / "vlcs", data.DATASETS["vlcs"])
    common = ["vlcs", "--data", str(tmp_path), "--run", str(tmp_path / "r"), "--model", tiny_clip, "--methods"]
    for main, argv in ((mapper.main, [*common, "lads"]), (anchors.main, ["caption", *common, "ldfs"])):
        monkeypatch.setattr("sys.argv", ["python", *argv])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 and "all called 'a photo'" in capsys.readouterr().err
    evaluate.figure4(data.arguments("").parse_args([*common, "finetune"]), data.load("vlcs", tmp_path), None,
                     load_clip(tiny_clip, data.load("vlcs", tmp_path)), None)
    assert "no figure 4" in capsys.readouterr().out
