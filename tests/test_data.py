"""data.py, features.py: splits, words, bad input, and a cache that serves no other's features."""

import json
import os
import shutil
import utils
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image

import config
import data
import features
from sets import folders


def load_clip(name, root, *more):
    argv = ["tiny", "photo", "--data", str(root), "--run", f"{root}/run", "--model", name, *more]
    return features.load_clip(config.parse("", argv)[0])


def paths(items):
    return [location.path for location, _ in items]


def test_splits_are_disjoint_whole_and_deterministic(tiny_data):
    dataset = data.load("tiny", tiny_data)
    parts = [dataset.split("photo", "photo", part, seed=0) for part in ("train", "val", "test")]
    assert [len(p) for p in parts] == [18, 3, 9]
    assert sorted(sum(parts, [])) == dataset.images["photo"]
    assert parts[0] == data.load("tiny", tiny_data).split("photo", "photo", "train", seed=0)
    assert parts[0] != dataset.split("photo", "photo", "train", seed=1)
    assert {y for _, y in parts[2]} == {0, 1, 2}  # stratified by class
    sketches = dataset.images["sketch"]
    assert dataset.split("photo", "sketch", "test", seed=0) == sketches  # a target is tested whole
    assert dataset.split("photo", "sketch", "train", seed=0) == []


def test_fewer_shots_leave_the_other_parts_as_they_are(tiny_data):
    argv = ["tiny", "photo", "--data", str(tiny_data), "--run", f"{tiny_data}/run"]
    (_, whole), (few, dataset) = config.parse("", argv), config.parse("", [*argv, "--shots", "2"])
    train = dataset.split("photo", "photo", "train", 0)
    assert sorted(y for _, y in train) == [0, 0, 1, 1, 2, 2] and few.record()["shots"] == 2
    assert {*train} < {*whole.split("photo", "photo", "train", 0)}
    for domain, part in (("photo", "val"), ("photo", "test"), ("sketch", "test")):
        assert dataset.split("photo", domain, part, 0) == whole.split("photo", domain, part, 0)


def test_a_split_is_what_it_was(tiny_data):
    """The order is that of a hash of data set, seed and path: results hang on it."""
    dataset = data.load("tiny", tiny_data)
    dogs = [p for p in paths(dataset.split("photo", "photo", "test", seed=3)) if "dog" in p]
    assert dogs == ["photo/dog/2.png", "photo/dog/4.png", "photo/dog/7.png"]


def change(tiny_data, **more):
    """Change what tiny's dataset.json says."""
    path = tiny_data / "tiny" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_what_is_trained_on_is_in_no_test_part_of_any_style(tiny_data):
    change(tiny_data, same_stem_same_thing=True)
    dataset = data.load("tiny", tiny_data)

    def things(domain, part):
        return {p.split("/", 1)[1] for p in paths(dataset.split("photo", domain, part, seed=0))}

    for domain in ("sketch", "cartoon"):
        assert things(domain, "test") == things("photo", "test")
        assert not things(domain, "test") & (things("photo", "train") | things("photo", "val"))

    dogs = tiny_data / "tiny" / "sketch" / "dog"
    for i in range(4):  # and so it stays where a target lacks some, and has others of its own
        (dogs / f"{i}.png").rename(dogs / f"{i + 20}.png")
    dataset = data.load("tiny", tiny_data)
    assert not things("sketch", "test") & (things("photo", "train") | things("photo", "val"))
    assert {f"dog/{i + 20}.png" for i in range(4)} <= things("sketch", "test")


def test_a_location_opens_itself(tmp_path):
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "some.tar").write_bytes(b"x" * 512 + content + b"y" * 512)
    file = data.Location(str(tmp_path), "a.png")
    member = data.Location(str(tmp_path), "some.tar", 512, len(content))
    assert file.read() == member.read() == content
    assert file.open().tobytes() == member.open().tobytes() == image.tobytes()
    deep = torch.linspace(0, 65535, 256).view(16, 16).to(torch.uint16)  # 16 bits: not to turn white
    Image.fromarray(deep.numpy()).save(tmp_path / "deep.png")
    shades = torch.tensor(list(data.Location(str(tmp_path), "deep.png").open().tobytes()))
    assert shades.view(256, 3).float().sub(torch.arange(256).view(256, 1)).abs().max() <= 1
    cut = data.Location(str(tmp_path), "a.png", border=2).open()
    assert cut.size == (12, 12) and cut.getpixel((0, 0)) == image.getpixel((2, 2))
    assert str(file) == f"{tmp_path}/a.png" and str(member) == f"{tmp_path}/some.tar, byte 512"
    assert len({file, member, data.Location(str(tmp_path), "a.png")}) == 2 and file < member
    with pytest.raises(data.UNREADABLE):
        data.Location(str(tmp_path), "some.tar").open()


def test_words():
    nouns = ["dog", "elephant", "grapes", "glass of milk", "Santa Claus", "bus"]
    phrases = ["a dog", "an elephant", "grapes", "a glass of milk", "Santa Claus", "a bus"]
    assert [data.article(noun) for noun in nouns] == phrases


def test_prompts_carry_each_images_own_caption(tiny_data):
    dataset = data.load("tiny", tiny_data)
    texts = ["a sketch of a cat", "a sketch of a dog", "a sketch of a red house"]
    assert data.class_texts(dataset, "sketch") == texts
    items = dataset.images["photo"][13:2:-10]  # in whatever order
    assert data.captions(dataset, items) == ["a dog number 3", "a cat number 3"]
    items = items[:1]
    assert data.caption_texts(dataset, "sketch", items) == ["a sketch of a dog number 3"]
    line = '{"path": "photo/dog/3.png", "caption": "a photo of two dogs"}\n'
    (tiny_data / "tiny" / "captions.jsonl").write_text(line)
    assert data.caption_texts(dataset, "sketch", items) == ["a sketch of two dogs"]


def refusal(capsys, call):
    """The one line that `call` prints before it exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.strip() and "/s]" not in line]  # but progress bars
    assert len(lines) == 1, lines
    return lines[0]


def test_bad_data_is_refused_by_name(tiny_data, tiny_clip, capsys):
    tiny = tiny_data / "tiny"

    def refused(name="tiny", **more):
        return refusal(capsys, lambda: data.load(name, tiny_data, **more))

    known = "emoji, emoji_unseen, imagenet, office_home, pacs, terra_incognita, tiny, vlcs."
    assert f"Known: domainnet, {known}" in refused("pcas")
    said = refused("pacs")
    assert "could not fetch flwrlabs/pacs" in said and f"{tiny_data}/pacs by hand" in said
    said = refused("vlcs")
    assert "VOC2007, LabelMe, SUN09, Caltech101" in said and "domainbed.scripts.download" in said
    folder = tiny_data / "vlcs"
    assert f"vlcs is not in {folder}" in said and f"ln -s /their/folder {folder}" in said
    argv = ["tiny", "foto", "--data", str(tiny_data)]
    assert "'foto'" in refusal(capsys, lambda: config.parse("", argv))

    (tiny / "photo" / "dog" / "3.png").write_bytes(b"not an image")
    clip, items = load_clip(tiny_clip, tiny_data), data.load("tiny", tiny_data).images["photo"]
    assert "photo/dog/3.png" in refusal(capsys, lambda: features.encode_images(clip, items))

    for image in (tiny / "photo" / "dog").iterdir():
        image.unlink()
    (tiny / "photo" / "dog" / ".thumbnails").mkdir()
    Image.new("RGB", (4, 4)).save(tiny / "photo" / "dog" / ".thumbnails" / "1.png")
    assert "photo/dog holds no images" in refused()
    shutil.rmtree(tiny / "sketch" / "cat")
    (tiny / "photo" / "dog" / "1.PNG").touch()
    assert "sketch has other classes than photo: not in both: ['cat']" in refused()
    shutil.rmtree(tiny / "photo")
    assert "photo holds no class folders" in refused()


def test_what_is_no_file_is_named(tiny_data, tmp_path, capsys):
    """… and nothing waits for a FIFO."""
    image, shard = tiny_data / "tiny" / "photo" / "dog" / "3.png", tmp_path / "pool" / "0.tar"
    shard.parent.mkdir()
    pool = SimpleNamespace(pool=shard.parent)
    calls = (image, lambda: data.load("tiny", tiny_data)), (shard, lambda: folders.shards_of(pool, None))
    for path, call in calls:
        for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path)):
            path.unlink(missing_ok=True)
            make(path)
            assert f"{path} is no file, nor a link to one" in refusal(capsys, call)
            path.rmdir() if path.is_dir() else path.unlink()
        path.symlink_to("/nowhere")
        assert f"{path} is no file, nor a link to one" in refusal(capsys, call)
    (tiny_data / "pacs").symlink_to("/nowhere")
    said = refusal(capsys, lambda: data.load("pacs", tiny_data))
    assert f"{tiny_data}/pacs is a link to what is not there" in said


def test_bad_captions_are_refused(tiny_data, capsys):
    file, dataset = tiny_data / "tiny" / "captions.jsonl", data.load("tiny", tiny_data)
    photos = dataset.images["photo"]

    def refused():
        return refusal(capsys, lambda: data.caption_texts(dataset, "photo", photos))

    def named(path):
        other = data.load("tiny", tiny_data, captions=path)
        return refusal(capsys, lambda: data.captions(other, photos))

    assert "nowhere.jsonl cannot be read" in named("nowhere.jsonl")
    assert "cannot be read" in named(tiny_data)
    file.write_text('{"path": "photo/cat/0.png", "caption": "a dog"}\n')
    assert "no caption for 29 of 30 images, photo/cat/1.png the first" in refused()
    for line in ('{"path": "photo/dog/3.png"}', "[]", "3", "{", '{"path": [], "caption": "a"}'):
        file.write_text('{"path": "photo/cat/0.png", "caption": "a cat"}\n' + line + "\n")
        assert "line 2" in refused()
    whole = "".join(json.dumps({"path": at.path, "caption": "a\u2028b"}, ensure_ascii=False) + "\r\n" for at, _ in photos)
    file.write_bytes(whole.encode("utf-8-sig"))  # as some editors write it
    assert data.captions(dataset, photos) == ["a\u2028b"] * 30
    assert data.load("tiny", tiny_data, captions="").captions == file  # an unset shell variable
    file.write_bytes('{"path": "photo/cat/0.png", "caption": "café"}'.encode("latin-1"))
    assert "cannot be read ('utf-8' codec" in refused()
    file.unlink()
    assert "cannot be read ([Errno 2]" in refused()
    file.mkdir()
    assert "cannot be read ([Errno 21] Is a directory" in refused()
    file.rmdir()
    dataset = data.load("tiny", tiny_data)
    assert "no captions for tiny" in refused() and dataset.captions is None


def test_a_relative_path_is_from_here_or_else_from_the_repository(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_clip("local-dir:emoji/clip", tiny_data).base[0] == "local-dir:emoji/clip"
    for name in ("data/tiny", "Salesforce/blip2-opt-2.7b", "/nowhere"):
        assert utils.from_root(name) == name


@pytest.mark.parametrize("name", ["ViT-B-61", "local-dir:nowhere"])
def test_a_bad_model_is_refused_by_name(tiny_data, capsys, name):
    assert f"--model {name}: " in refusal(capsys, lambda: load_clip(name, tiny_data))


def test_a_source_without_test_images_is_refused_before_it_is_trained_on(tiny_data, tmp_path, capsys):
    change(tiny_data, fractions={"train": 0.9, "val": 0.1, "test": 0})
    argv = ["tiny", "photo", "--data", str(tiny_data), "--run", str(tmp_path / "run")]
    said = refusal(capsys, lambda: config.parse("", argv))
    assert f"no image of {tiny_data / 'tiny' / 'photo'} is left to test on" in said


def test_a_path_is_not_taken_for_a_name(tiny_data, capsys):
    """Splits are drawn by the name: "tiny/" would have others than "tiny"."""
    for name in ("tiny/", str(tiny_data / "tiny"), "../data/tiny"):
        said = refusal(capsys, lambda: data.load(name, tiny_data))
        assert f"{name} is a path" in said and "Say: tiny --data " in said


@pytest.mark.parametrize("content, says", [
    ("{", "Expecting property name"), ("[]", "not a mapping"), ("3", "not iterable"),
    ('{"fractions": {}}', "phrases of two domains"),
])
def test_what_is_no_description_is_refused(tiny_data, capsys, content, says):
    file = tiny_data / "tiny" / "dataset.json"
    file.write_text(content)
    said = refusal(capsys, lambda: data.load("tiny", tiny_data))
    assert f"{file} does not describe a data set: " in said and says in said


@pytest.mark.parametrize("key, value, says", [
    ("phrases", {"photo": "a photo"}, "it needs phrases of two domains"),
    ("phrases", {"photo": "a photo", "sketch": ""}, "it needs phrases of two domains"),
    ("phrases", {"photo": "a photo", "sketch": ["a sketch"]}, "it needs phrases of two domains"),
    ("phrases", ["photo", "sketch"], "phrases cannot be ['photo', 'sketch']"),
    ("fractions", {"train": 0.5, "test": 0.5}, "its fractions"),
    ("fractions", {"train": 1.5, "val": 0, "test": -0.5}, "its fractions"),
    ("fractions", {"train": float("nan"), "val": 0, "test": 0}, "its fractions"),
    ("fractions", {"train": "1", "val": 0, "test": 0}, "unsupported operand"),
    ("templates", {"photo": ["a photo."]}, "its templates"),
    ("templates", {"photo": ["a {c}."]}, "its templates"),
    ("templates", {"photo": "a {}."}, "its templates"),
    ("templates", {"photo": [3]}, "expected string"),
    ("templates", {"foto": ["a {}."]}, "'foto' is no domain"), ("counts", {"foto": 3}, "'foto' is no domain"),
    ("phrases", {"photo": "a photo", "extended": "a sketch"}, "'extended' is no domain"),  # but a mean
    ("phrases", {"photo": "a photo", "sketch": " "}, "it needs phrases of two domains"),
    ("schedules", {"head": {"lr": 1}}, "its schedules"), ("k", 0, "its k is below 1"),
    ("frozen_stages", 6, "'frozen_stages' is none of"),
    ("made_by", "python -c 1", "'made_by' is none of"),  # nobody's code but ours is run
    ("model", 3, "model cannot be 3"),
    ("same_stem_same_thing", "no", "same_stem_same_thing cannot be 'no'"),
])
def test_a_bad_description_is_refused(tiny_data, capsys, key, value, says):
    change(tiny_data, **{key: value})
    said = refusal(capsys, lambda: data.load("tiny", tiny_data))
    assert "tiny/dataset.json does not describe a data set: " in said and says in said


def test_the_descriptions_here_are_right_and_a_dataset_json_changes_them(tmp_path):
    names = sorted(f.stem for f in (Path(data.__file__).parent / "sets").glob("*.json"))
    for name in names:
        folder, meta = folders.read_meta(name, tmp_path)
        assert folder == tmp_path / name and list(meta.phrases)
        assert sum(bool(way) for way in (meta.hub, meta.by_hand, meta.made_by)) == 1, name
    (tmp_path / "pacs").mkdir()
    description = {"fractions": {"train": 0.9, "val": 0.1, "test": 0}}
    (tmp_path / "pacs/dataset.json").write_text(json.dumps(description))
    _, meta = folders.read_meta("pacs", tmp_path)
    assert meta.fractions["train"] == 0.9 and meta.phrases["sketch"] == "a sketch"


def test_published_counts_are_checked(tiny_data, capsys):
    change(tiny_data, counts={"photo": 31, "sketch": 30})
    data.load("tiny", tiny_data)
    said = capsys.readouterr().err
    assert "tiny, photo: 30 images" in said and "31 are published" in said and "sketch" not in said


def test_a_data_set_that_is_not_there_is_made(tmp_path, monkeypatch):
    """… by the command that its description names."""
    def make(command):
        assert command == f"python -m emoji.draw --data '{tmp_path}/my data'"
        layout(tmp_path / "my data/emoji", folders.read_meta("emoji", tmp_path)[1].phrases)

    monkeypatch.setattr(folders, "run_command", make)
    assert data.load("emoji", tmp_path / "my data").classnames == ["alarm clock"]
    monkeypatch.setattr(folders, "run_command", lambda command: pytest.fail("made twice"))
    data.load("emoji", tmp_path / "my data")


def test_unseen_classes_are_another_data_sets(tiny_data, capsys):
    assert data.load_unseen(data.load("tiny", tiny_data)) is None
    shutil.copytree(tiny_data / "tiny", tiny_data / "others")
    change(tiny_data, unseen="others")
    assert data.load_unseen(data.load("tiny", tiny_data)).name == "others"
    change(tiny_data, unseen="tiny")
    dataset = data.load("tiny", tiny_data)
    assert "cannot be its own" in refusal(capsys, lambda: data.load_unseen(dataset))
    change(tiny_data, unseen="nothing")
    dataset = data.load("tiny", tiny_data)
    assert "unknown data set 'nothing'" in refusal(capsys, lambda: data.load_unseen(dataset))


def test_features_are_unit_norm_in_order_and_of_each_text_its_own(tiny_data, tiny_clip):
    clip, items = load_clip(tiny_clip, tiny_data), data.load("tiny", tiny_data).images["photo"]
    z = features.encode_images(clip, items, batch_size=7)
    assert torch.allclose(z.norm(dim=1), torch.ones(len(items)), atol=1e-6)
    assert torch.allclose(z[[4]], features.encode_images(clip, items[4:5]), atol=1e-5)
    t = features.encode_texts(clip, ["a dog", "a cat", "a dog"])
    assert torch.equal(t[0], t[2]) and not torch.allclose(t[0], t[1])
    image = items[0][0].open()
    for transform, same in ((clip.preprocess, True), (clip.augment, False)):
        assert (len({transform(image).numpy().tobytes() for _ in range(20)}) == 1) == same


@pytest.mark.parametrize("kind, text, length", [
    ("CLIP", {}, 6), ("CLIP", {"pool_type": "eos", "eos_id": 49407}, 6),
    ("CustomTextCLIP", {}, 6), ("CustomTextCLIP", {"pool_type": "last"}, 12),
    ("CustomTextCLIP", {"no_causal_mask": True, "pool_type": "last"}, 12),
    ("CustomTextCLIP", {"embed_cls": True}, 13),
])
def test_shared_padding_is_left_out_where_that_changes_nothing(tiny_clip, kind, text, length):
    """In causal towers whose feature is the end token's; end: "a red dog" and two more, and one."""
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 2, **text}
    torch.manual_seed(0)
    model = getattr(open_clip, kind)(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()
    tokens = open_clip.get_tokenizer(tiny_clip)(["a dog", "a red dog", "a dog"])
    clip = features.Clip(model, None, None, None, torch.device("cpu"), "tiny")
    tower, seen = getattr(model, "text", model).transformer, []
    tower.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    assert torch.allclose(clip.encode_text(tokens), model.encode_text(tokens, True), atol=1e-6)
    assert seen == [length, max(12, length)] and not tower._forward_pre_hooks
    same = torch.full((2, 12), 7)  # nothing but padding
    assert torch.allclose(clip.encode_text(same), model.encode_text(same, True), atol=1e-6)


@pytest.mark.parametrize("caption, content", [
    ("a photo of two dogs", "two dogs"), ("a black and white sketch of a dog", "a dog"),
    ("A 3D render of an ox", "an ox"), ("a photo", "a photo"), ("a dog", "a dog"),
    ("a man taking a photo of a dog", "a man taking a photo of a dog"),
])
def test_a_captions_own_medium_is_cut_off(caption, content):
    assert data.MEDIUM.sub("", caption) == content


def test_flyps_prompts_come_from_the_templates(tiny_data):
    def prompts(dataset):
        classnames, templates = data.prompt_templates(dataset, "photo")
        return [[template(name) for name in classnames] for template in templates]

    dataset = data.load("tiny", tiny_data)
    assert prompts(dataset) == [data.class_texts(dataset, "photo")]
    change(tiny_data, templates={"photo": ["{} in a photo", "{}."]})
    texts = prompts(data.load("tiny", tiny_data))
    assert [t[2] for t in texts] == ["red house in a photo", "red house."]


def test_the_cache_is_keyed_by_weights_preprocessing_and_images(tiny_data, tiny_clip, tmp_path):
    dataset, clip = data.load("tiny", tiny_data), load_clip(tiny_clip, tiny_data)
    items = dataset.images["photo"]

    def files():
        clip.fingerprint = features.fingerprint(clip)
        z = features.cached_features(clip, dataset, "photo", tmp_path / "run")(items)
        assert torch.equal(z, features.encode_images(clip, items))
        return len(list((tmp_path / ".features").glob("*.pt")))

    assert files() == 1
    assert files() == 1  # served from the cache
    with torch.no_grad():
        clip.model.visual.proj[0, 0] += 1
    assert files() == 2
    clip.preprocess.transforms.pop()
    assert files() == 3
    clip.model.visual.transformer.resblocks[0].mlp.gelu = open_clip.transformer.QuickGELU()
    assert files() == 4  # the same weights
    cats = tiny_data / "tiny" / "photo" / "cat"
    shutil.copy(cats / "1.png", cats / "2.png")
    assert files() == 5
    os.utime(cats / "1.png", (0, 0))  # another image of the same size
    assert files() == 6


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def dies(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_atomically(path, dies)
    assert path.read_text() == "old"


SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "pacs").exists(), reason=f"PACS is not at {SHARED / 'pacs'}")
def test_the_real_pacs(capsys):
    dataset = data.load("pacs", SHARED)
    assert capsys.readouterr().err == ""  # no warning: the counts are the published ones
    classes = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    assert dataset.classes == classes
    texts = data.caption_texts(dataset, "sketch", dataset.images["photo"])
    assert len(texts) == 1670 and all(t.startswith("a sketch of ") and len(t) > 14 for t in texts)
    parts = [paths(dataset.split("photo", "photo", part, 0)) for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set(sum(parts, []))) == 1670
    assert utils.short_hash(parts) == "d7fad4a087a91bbe90a4"  # the tables' split


def layout(root, domains):
    """An empty-handed copy of a data set: one class, ten files a domain."""
    for domain in domains:
        (root / domain / "Alarm_Clock").mkdir(parents=True)
        for i in range(10):
            (root / domain / "Alarm_Clock" / f"{i}.jpg").touch()


@pytest.mark.parametrize("name, source", [
    ("pacs", "photo"), ("office_home", "Real World"), ("domainnet", "real"),
    ("terra_incognita", "location_38"), ("vlcs", "VOC2007"),
])
def test_known_sets_are_found_under_data_or_at_it(tmp_path, capsys, name, source):
    """The source is the first domain; elsewhere they are linked, and keep their split."""
    domains = folders.read_meta(name, tmp_path)[1].phrases
    layout(tmp_path / "here" / name, domains)
    found = data.load(name, tmp_path / "here")
    assert found.folder == tmp_path / "here" / name and [*found.images] == [*domains]
    assert found.classnames == ["alarm clock"] and "are published" in capsys.readouterr().err
    train = paths(found.split(source, source, "train", 0))
    assert len(train) == 7

    itself = data.load(name, tmp_path / "here" / name)  # --data may name the folder itself
    assert itself.images == found.images
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / name).symlink_to(tmp_path / "here" / name)
    linked = data.load(name, tmp_path / "there")
    assert paths(linked.split(source, source, "train", 0)) == train
    argv = [name, "--data", str(tmp_path / "here"), "--run", str(tmp_path / "run")]
    settings, dataset = config.parse("", [*argv, "--methods", "finetune"])
    assert dataset.folder == found.folder and settings.source == source


def test_other_folder_names_are_one_clear_line(tmp_path, capsys):
    layout(tmp_path / "office_home", ["real_world", "art", "clipart", "product"])
    said = refusal(capsys, lambda: data.load("office_home", tmp_path))
    assert "which holds art, clipart, product, real_world" in said  # and nothing is fetched
    assert "Put Real World, Art, Clipart, Product there" in said
    os.rename(tmp_path / "office_home", tmp_path / "OfficeHome")
    said = refusal(capsys, lambda: data.load("office_home", tmp_path))
    assert f"put the data into {tmp_path}/office_home by hand" in said


def test_data_itself_is_a_set_only_when_whole(tmp_path):
    for folder in ("PACS_old", "pacs", "."):
        (tmp_path / folder / "sketch").mkdir(parents=True)
    assert folders.read_meta("pacs", tmp_path)[0] == tmp_path / "pacs"
    assert folders.read_meta("domainnet", tmp_path)[0] == tmp_path / "domainnet"


def test_an_official_list_must_be_of_these_files(tmp_path, capsys):
    layout(tmp_path / "domainnet", folders.read_meta("domainnet", tmp_path)[1].phrases)
    file = tmp_path / "domainnet/real_test.txt"
    file.write_text("real/Alarm_Clock/3.jpg 0\nreal/Alarm_Clock/4.jpg 0\n")
    dataset = data.load("domainnet", tmp_path)
    assert "lacks lists" in capsys.readouterr().err  # those of the other domains
    test = dataset.split("real", "real", "test", 0)
    assert paths(test) == ["real/Alarm_Clock/3.jpg", "real/Alarm_Clock/4.jpg"]
    assert len(dataset.trainable("real")) == 8
    file.write_bytes(b"real/Caf\xe9/3.jpg 0\n")
    assert f"{file} cannot be read" in refusal(capsys, lambda: data.load("domainnet", tmp_path))
    file.write_text("".join(f"{path}\n" for path in paths(dataset.images["real"])))
    argv = ["domainnet", "real", "--data", str(tmp_path), "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        config.parse("", argv)
    assert "real_test.txt leaves no image to train on" in capsys.readouterr().err
    file.write_text("real/x/real_1.jpg 0\n")
    said = refusal(capsys, lambda: data.load("domainnet", tmp_path))
    assert f"{file} names no image" in said


def test_domains_without_a_style_have_no_mapper(tmp_path, tiny_clip, monkeypatch, capsys):
    """… which is said before they are captioned, too; plain finetuning does without."""
    import anchors
    import mapper
    import quality

    layout(tmp_path / "vlcs", folders.read_meta("vlcs", tmp_path)[1].phrases)
    common = ["vlcs", "--data", str(tmp_path), "--run", str(tmp_path / "r"), "--model", tiny_clip]
    assert data.load("vlcs", tmp_path).styles("VOC2007") == []
    calls = ((mapper.main, ["--methods", "lads"]), (anchors.main, ["caption", "--methods", "ldfs"]))
    for main, argv in calls:
        first = [argv.pop(0)] if argv[0] == "caption" else []
        monkeypatch.setattr("sys.argv", ["python", *first, *common, *argv])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 and "all called 'a photo'" in capsys.readouterr().err
    settings, dataset = config.parse("", [*common, "--methods", "finetune"])
    quality.figure4(settings, dataset, None, None)
    assert "no figure 4" in capsys.readouterr().out
