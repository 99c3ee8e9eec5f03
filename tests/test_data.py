"""data.py, sets/, features.py: images, splits, prompts, captions, bad input, and cached features."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tarfile
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import square, write_shard
from PIL import Image

import core.utils
import data
import features
from core.artifacts import digest, file_stamp
from core.config import describe, parse
from sets import load
from sets.describe import read_meta
from sets.load import load_dataset, load_run, load_unseen, pool_shards
from sets.webdataset import read_shard


def load_clip(name, root, *flags):
    argv = ["tiny", "photo", "--data", str(root), "--run", f"{root}/run", "--model", name, *flags]
    return features.load_clip(load_run(parse("", argv))[0])


def paths(items):
    return [location.path for location, _ in items]


def change(tiny_data, **values):
    """Change keys of tiny's dataset.json."""
    path = tiny_data / "tiny" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(capsys, call):
    """Return the one line that `call` prints before it exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.strip() and "/s]" not in line]  # without progress bars
    assert len(lines) == 1, lines
    return lines[0]


# -------------------------------------------------------------------------------------------------
# Splits


def test_splits_are_disjoint_complete_and_deterministic(tiny_data):
    dataset = load_dataset("tiny", tiny_data)
    parts = [dataset.split("photo", "photo", part, seed=0) for part in ("train", "val", "test")]
    assert [len(p) for p in parts] == [18, 3, 9]
    assert sorted(sum(parts, [])) == dataset.images["photo"]
    assert parts[0] == load_dataset("tiny", tiny_data).split("photo", "photo", "train", seed=0)
    assert parts[0] != dataset.split("photo", "photo", "train", seed=1)
    assert {y for _, y in parts[2]} == {0, 1, 2}  # stratified by class
    sketches = dataset.images["sketch"]
    assert dataset.split("photo", "sketch", "test", seed=0) == sketches  # all of a target
    assert dataset.split("photo", "sketch", "train", seed=0) == []


def test_fewer_shots_leave_the_other_parts_as_they_are(tiny_data):
    argv = ["tiny", "photo", "--data", str(tiny_data), "--run", f"{tiny_data}/run"]
    _, full = load_run(parse("", argv))
    settings, few = load_run(parse("", [*argv, "--shots", "2"]))
    train = few.split("photo", "photo", "train", 0)
    assert sorted(y for _, y in train) == [0, 0, 1, 1, 2, 2] and settings.shots == 2
    assert {*train} < {*full.split("photo", "photo", "train", 0)}
    for domain, part in (("photo", "val"), ("photo", "test"), ("sketch", "test")):
        assert few.split("photo", domain, part, 0) == full.split("photo", domain, part, 0)


def test_a_split_is_the_published_one(tiny_data):
    """The order is that of a hash of data set, seed and path; results depend on it."""
    dataset = load_dataset("tiny", tiny_data)
    dogs = [p for p in paths(dataset.split("photo", "photo", "test", seed=3)) if "dog" in p]
    assert dogs == ["photo/dog/2.png", "photo/dog/4.png", "photo/dog/7.png"]


def test_nothing_trained_on_is_in_a_test_part_of_any_style(tiny_data):
    change(tiny_data, same_stem_same_thing=True)
    dataset = load_dataset("tiny", tiny_data)

    def things(domain, part):
        return {p.split("/", 1)[1] for p in paths(dataset.split("photo", domain, part, seed=0))}

    for domain in ("sketch", "cartoon"):
        assert things(domain, "test") == things("photo", "test")
        assert not things(domain, "test") & (things("photo", "train") | things("photo", "val"))

    dogs = tiny_data / "tiny" / "sketch" / "dog"
    for i in range(4):  # also if a target lacks images, and has its own
        (dogs / f"{i}.png").rename(dogs / f"{i + 20}.png")
    dataset = load_dataset("tiny", tiny_data)
    assert not things("sketch", "test") & (things("photo", "train") | things("photo", "val"))
    assert {f"dog/{i + 20}.png" for i in range(4)} <= things("sketch", "test")


@pytest.mark.parametrize("same_stem", [False, True])
def test_base_and_new_classes_share_the_split_of_the_data_set(five_classes, same_stem):
    """Oracle: the class folders in the paths of the undivided data set's parts."""
    change(five_classes, same_stem_same_thing=same_stem)
    undivided = load_dataset("tiny", five_classes)
    base = data.base_to_new(undivided)
    assert base.classes == ["cat", "cow", "dog"] and base.new.classes == ["owl", "red_house"]
    assert base.classnames == ["cat", "cow", "dog"] and base.new.classnames == ["owl", "red house"]
    for part in ("train", "val", "test"):
        for domain in ("photo", "sketch"):
            expected = paths(undivided.split("photo", domain, part, 3))
            for half in (base, base.new):
                items = half.split("photo", domain, part, 3)
                assert paths(items) == [p for p in expected if p.split("/")[1] in half.classes]
                assert [half.classes[y] for _, y in items] == [p.split("/")[1] for p in paths(items)]
    assert data.class_texts(base.new, "sketch") == ["a sketch of an owl", "a sketch of a red house"]
    assert load_unseen(base) is base.new and undivided.new is None


def test_base_to_new_takes_four_classes_and_leaves_out_domains_with_their_own(five_classes, capsys):
    dataset = load_dataset("tiny", five_classes)
    own = dataclasses.replace(dataset, heads={"cartoon": (["fox"], [])})
    for part in (data.base_to_new(own), data.base_to_new(own).new):
        assert part.images.keys() == {"photo", "sketch"} and not part.heads
        assert "classes of its own" in part.absent["cartoon"]
    few = dataclasses.replace(dataset, classes=dataset.classes[:3])
    assert "tiny has 3 classes" in refusal(capsys, lambda: data.base_to_new(few))


def test_a_run_from_base_to_new_is_apart_from_others(five_classes, tmp_path, monkeypatch):
    """Its folder, its tables, and its unseen classes, whatever the description names."""
    change(five_classes, unseen="nothing")
    monkeypatch.chdir(tmp_path)
    settings, dataset = load_run(parse("", ["tiny", "--data", str(five_classes), "--base-to-new"]))
    assert str(settings.run) == "runs/tiny-photo-base-to-new" and settings.dataset == "tiny base-to-new"
    assert load_unseen(dataset).classes == ["owl", "red_house"]
    assert "classes     3: cat, cow, dog; new: owl, red house\n" in describe(settings, dataset, "cpu")


def test_a_data_set_of_captions_has_no_classes(classless, tmp_path, capsys):
    """Its images are in the domain's folder; what learns from classes is refused by name."""
    dataset = load_dataset("tiny", classless)
    assert dataset.classes == [] and {y for _, y in dataset.images["photo"]} == {0}
    assert paths(dataset.images["photo"])[:2] == ["photo/cat0.png", "photo/cat1.png"]
    parts = [dataset.split("photo", "photo", part, 0) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [18, 3, 9] and sorted(sum(parts, [])) == dataset.images["photo"]
    assert data.captions(dataset, dataset.images["photo"])[:2] == ["a cat number 0", "a cat number 1"]
    argv = ["tiny", "--data", str(classless), "--run", str(tmp_path / "run")]
    for method in ("finetune", "flyp", "arf", "ldfs", "coop", "dive"):
        line = refusal(capsys, lambda: load_run(parse("", [*argv, "--methods", "captions", method])))
        assert f"tiny has no classes (folders in its domains), which {method} learns from" in line
        assert "captions+retrieved" in line
    load_run(parse("", [*argv, "--methods", "captions", "captions+retrieved"]))
    (classless / "tiny" / "sketch" / "cat").mkdir()
    shutil.copy(classless / "tiny" / "sketch" / "cat0.png", classless / "tiny" / "sketch" / "cat")
    assert "sketch has other classes than photo" in refusal(capsys, lambda: load_dataset("tiny", classless))


SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "pacs").exists(), reason=f"PACS is not at {SHARED / 'pacs'}")
def test_the_real_pacs(capsys):
    dataset = load_dataset("pacs", SHARED)
    assert capsys.readouterr().err == ""  # no warning: the counts are the published ones
    classes = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    assert dataset.classes == classes
    texts = data.caption_texts(dataset, "sketch", dataset.images["photo"])
    assert len(texts) == 1670 and all(t.startswith("a sketch of ") and len(t) > 14 for t in texts)
    parts = [paths(dataset.split("photo", "photo", part, 0)) for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set(sum(parts, []))) == 1670
    assert digest(parts) == "d7fad4a087a91bbe90a4"  # the tables' split


# -------------------------------------------------------------------------------------------------
# Images


def saved(path, image, **options):
    """Save an image and return its Location."""
    image.save(path, **options)
    return data.Location(str(path.parent), path.name)


def test_a_location_opens_a_file_or_a_tars_member(tmp_path):
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    file = saved(tmp_path / "a.png", image)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.tar").write_bytes(b"x" * 512 + content + b"y" * 512)
    member = data.Location(str(tmp_path), "b.tar", 512, len(content))
    assert file.read() == member.read() == content
    assert file.open().tobytes() == member.open().tobytes() == image.tobytes()
    cut = data.Location(str(tmp_path), "a.png", border=2).open()
    assert cut.size == (12, 12) and cut.getpixel((0, 0)) == image.getpixel((2, 2))
    assert str(file) == f"{tmp_path}/a.png" and str(member) == f"{tmp_path}/b.tar, byte 512"
    assert len({file, member, data.Location(str(tmp_path), "a.png")}) == 2 and file < member


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_do_not_turn_white(tmp_path, suffix):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = saved(tmp_path / f"deep.{suffix}", Image.fromarray(levels)).open()
    shades = np.asarray(image).reshape(256, 3).astype(int)
    assert image.mode == "RGB" and abs(shades - np.arange(256)[:, None]).max() <= 1


def test_transparent_parts_are_white(tmp_path):
    """Whatever lies under them, in all the ways that files store transparency."""
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    drawing.putpixel((1, 1), (200, 0, 0, 255))
    drawing.putpixel((2, 2), (0, 0, 0, 128))
    rgb = Image.new("RGB", (4, 4))
    rgb.putpixel((1, 1), (200, 0, 0))
    grey = Image.new("L", (4, 4), 7)
    grey.putpixel((1, 1), 90)
    cases = [
        (saved(tmp_path / "a.png", drawing), (200, 0, 0)),
        (saved(tmp_path / "b.webp", drawing, lossless=True, exact=True), (200, 0, 0)),
        (saved(tmp_path / "c.png", drawing.quantize()), (200, 0, 0)),
        (saved(tmp_path / "d.png", drawing.convert("LA")), (60, 60, 60)),
        (saved(tmp_path / "e.png", rgb, transparency=(0, 0, 0)), (200, 0, 0)),
        (saved(tmp_path / "f.png", grey, transparency=7), (90, 90, 90)),
    ]
    for location, colour in cases:
        image = location.open()
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255), location
        assert image.getpixel((1, 1)) == colour, location
    assert cases[0][0].open().getpixel((2, 2)) == (127, 127, 127)  # half transparent black
    opaque = Image.effect_noise((8, 8), 50).convert("RGBA")
    assert saved(tmp_path / "g.png", opaque).open().tobytes() == opaque.convert("RGB").tobytes()


def test_photographs_are_upright(tmp_path):
    """Orientation 6: the camera was turned, and the pixels are stored on their side."""
    upright = Image.linear_gradient("L").resize((8, 16)).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    for name, options in (("a.png", {}), ("b.jpg", {"quality": 100}), ("c.webp", {"lossless": True})):
        image = saved(tmp_path / name, sideways, exif=exif, **options).open()
        assert image.size == (8, 16), name
        assert abs(np.asarray(image).astype(int) - np.asarray(upright)).max() <= 3, name
    damaged = exif.tobytes()[:-3] + b"\xff\xff\xff"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert saved(tmp_path / "d.jpg", sideways, exif=damaged).open().mode == "RGB"


def test_whatever_a_decoder_raises_is_an_unreadable_image_with_the_reason(tmp_path, monkeypatch):
    def reason(path):
        with pytest.raises(data.UnreadableImage) as error:
            data.Location(str(tmp_path), path).open()
        assert "\n" not in str(error.value)
        return str(error.value)

    Image.effect_noise((64, 64), 50).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[:len(content) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    Image.new("L", (65000, 1)).save(tmp_path / "strip.png")  # resized, it would take 10 GB
    assert "truncated" in reason("half.jpg")
    assert reason("text.jpg") == reason("empty.jpg") == "of no known format"
    assert reason("nowhere.jpg") == "No such file or directory"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "4096 pixels" in reason("a.jpg")  # exceeds the limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert reason("strip.png") == "65000 x 1 pixels"
    for error in (RuntimeError("Failed to decode AVIF"), MemoryError()):
        monkeypatch.setattr(Image, "open", lambda file: (_ for _ in ()).throw(error))
        assert reason("a.jpg") in ("Failed to decode AVIF", "MemoryError")


def photograph(width=500, height=375):
    """An image with edges and smooth parts, as photographs have."""
    coarse = Image.effect_noise((width // 12, height // 12), 90).resize((width, height), Image.BICUBIC)
    bands = [coarse, coarse.rotate(90, expand=True).resize((width, height)), Image.linear_gradient("L").resize((width, height))]
    return Image.merge("RGB", bands)


def test_a_decoded_image_is_to_the_bit_the_one_that_pil_opens(tmp_path):
    """JPEGs, which torchvision decodes, in all variants; and what it does not take."""
    image, exif = photograph(), Image.Exif()
    cases = [
        saved(tmp_path / f"{i}.jpg", image, **options) for i, options in enumerate([
            {}, {"quality": 30}, {"quality": 100, "subsampling": 0}, {"subsampling": 1}, {"progressive": True},
            {"optimize": True}, {"restart_marker_blocks": 4},
        ])
    ]
    for orientation in range(10):  # 0 and 9 mean nothing
        exif[274] = orientation
        cases.append(saved(tmp_path / f"turned{orientation}.jpg", image, exif=exif))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    cases += [
        saved(tmp_path / "damaged exif.jpg", image, exif=exif.tobytes()[:-3] + b"\xff\xff\xff"),
        saved(tmp_path / "xmp.jpg", image, xmp=xmp),
        saved(tmp_path / "odd.jpg", photograph(101, 67)), saved(tmp_path / "dot.jpg", photograph(13, 13).resize((1, 1))),
        saved(tmp_path / "grey.jpg", image.convert("L")), saved(tmp_path / "cmyk.jpg", image.convert("CMYK")),
        saved(tmp_path / "a.png", image), saved(tmp_path / "palette.png", image.quantize(30)),
        saved(tmp_path / "alpha.png", Image.merge("RGBA", [*image.split(), image.getchannel(0)])),
        saved(tmp_path / "deep.png", Image.fromarray(np.arange(5000, dtype=np.uint16).reshape(50, 100) * 13)),
        saved(tmp_path / "a.webp", image), saved(tmp_path / "a.tif", image),
        data.Location(str(tmp_path), "0.jpg", border=2),
    ]
    sizes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF
        for location in cases:
            got, expected = location.decode(), torch.from_numpy(np.array(location.open())).permute(2, 0, 1)
            assert got.dtype == torch.uint8 and torch.equal(got, expected), location
            sizes.add(tuple(got.shape))
    assert {(3, 375, 500), (3, 500, 375), (3, 371, 496)} <= sizes


def test_what_torchvision_does_not_decode_is_pils(tmp_path, monkeypatch):
    location = saved(tmp_path / "a.jpg", photograph())
    expected = location.decode()
    for decoder in (None, lambda *arguments: (_ for _ in ()).throw(RuntimeError("not supported"))):
        monkeypatch.setattr(data, "decode_jpeg", decoder)
        assert torch.equal(location.decode(), expected)


def test_an_image_that_pil_finds_damaged_is_not_decoded_either(tmp_path):
    """Whichever byte a JPEG is cut off at, or a few wrong bytes: the same pixels or the same reason."""
    content = (saved(tmp_path / "a.jpg", photograph(100, 75)).folder, (tmp_path / "a.jpg").read_bytes())[1]
    generator = np.random.default_rng(0)
    variants = [content[:n] for n in (0, 1, 2, 10, 100, 300, len(content) // 2, len(content) - 100, len(content) - 2)]
    for _ in range(100):
        wrong = bytearray(content)
        for _ in range(3):
            wrong[generator.integers(2, len(wrong))] = generator.integers(256)
        variants.append(bytes(wrong))
    outcomes = []
    for variant in variants:
        (tmp_path / "b.jpg").write_bytes(variant)
        both, location = [], data.Location(str(tmp_path), "b.jpg")
        for read in (location.decode, lambda location=location: torch.from_numpy(np.array(location.open())).permute(2, 0, 1)):
            try:
                both.append(read().numpy().tobytes())
            except data.UnreadableImage as error:
                both.append(str(error))
        assert both[0] == both[1]
        outcomes.append(isinstance(both[0], str))
    assert all(outcomes[:9]) and 5 < sum(outcomes) < 100


def test_an_unreadable_image_of_a_data_set_is_one_line(tiny_data, tiny_clip, capsys):
    (tiny_data / "tiny" / "photo" / "dog" / "3.png").write_bytes(b"not an image")
    clip, items = load_clip(tiny_clip, tiny_data), load_dataset("tiny", tiny_data).images["photo"]
    line = refusal(capsys, lambda: features.encode_images(clip, items))
    assert "photo/dog/3.png: not a readable image (of no known format)" in line


# -------------------------------------------------------------------------------------------------
# Folders and class names


def layout(root, domains, classes=("Alarm_Clock",)):
    """Make a data set of empty files: ten of each class in each domain."""
    for domain in domains:
        for name in classes:
            (root / domain / name).mkdir(parents=True)
            for i in range(10):
                (root / domain / name / f"{i}.jpg").touch()


def own_set(root, classes, **description):
    """Make a data set "own" with domains photo and sketch of empty files."""
    layout(root / "own", ["photo", "sketch"], classes)
    phrases = {"photo": "a photo", "sketch": "a sketch"}
    (root / "own" / "dataset.json").write_text(json.dumps({"phrases": phrases, **description}))


def test_bad_data_is_refused_by_name(tiny_data, capsys):
    tiny = tiny_data / "tiny"

    def refused(name="tiny", **options):
        return refusal(capsys, lambda: load_dataset(name, tiny_data, **options))

    names = "emoji, emoji_unseen, imagenet, office_home, pacs, terra_incognita, tiny, vlcs."
    assert f"Known: domainnet, {names}" in refused("pcas")
    line = refused("pacs")
    assert "could not fetch flwrlabs/pacs" in line and f"{tiny_data}/pacs by hand" in line
    line = refused("vlcs")
    assert "VOC2007, LabelMe, SUN09, Caltech101" in line and "domainbed.scripts.download" in line
    folder = tiny_data / "vlcs"
    assert f"vlcs is not in {folder}" in line and f"ln -s /their/folder {folder}" in line
    argv = ["tiny", "foto", "--data", str(tiny_data)]
    assert "'foto'" in refusal(capsys, lambda: load_run(parse("", argv)))

    for image in (tiny / "photo" / "dog").iterdir():
        image.unlink()
    (tiny / "photo" / "dog" / "thumbnails").mkdir()
    Image.new("RGB", (4, 4)).save(tiny / "photo" / "dog" / "thumbnails" / "1.png")
    assert "photo/dog has no images" in refused()
    shutil.rmtree(tiny / "sketch" / "cat")
    (tiny / "photo" / "dog" / "1.PNG").touch()
    assert "sketch has other classes than photo: not in both: ['cat']" in refused()
    for cls in (tiny / "photo").iterdir():
        shutil.rmtree(cls)
    assert "photo has no class folders. Fill it, or remove it." in refused()


def test_under_torchrun_the_command_that_makes_a_pool_is_named(tiny_data, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = SimpleNamespace(pool=None, data=tiny_data)
    _, meta = read_meta("emoji", tiny_data)
    line = refusal(capsys, lambda: pool_shards(settings, meta))
    assert f"python -m emoji.draw pool --data {tiny_data}) takes one process" in line


def test_a_domain_without_a_folder_is_known_by_words_only(tiny_data, tmp_path, capsys):
    """It is a target of mappers; a misspelt folder is noticed; the source needs images."""
    (tiny_data / "tiny" / "sketch").rename(tiny_data / "tiny" / "skecth")
    flags = ["--data", str(tiny_data), "--run", str(tmp_path / "run")]
    settings, dataset = load_run(parse("", ["tiny", "photo", *flags]))
    assert "tiny, sketch will not be run: no images, because" in capsys.readouterr().err
    assert [*dataset.images] == ["photo", "cartoon"] and dataset.styles("photo") == ["sketch", "cartoon"]
    assert "sketch no images, cartoon 30" in describe(settings, dataset, "cpu")
    with pytest.raises(SystemExit):
        load_run(parse("", ["tiny", "sketch", *flags]))
    line = capsys.readouterr().err.splitlines()[-1]
    assert "tiny's sketch has no images here. Finetune on another domain: photo, cartoon." in line


def test_tiff_is_read_and_other_files_are_counted(tiny_data, capsys):
    dogs = tiny_data / "tiny" / "sketch" / "dog"
    for i in range(5):
        Image.open(dogs / f"{i}.png").save(dogs / f"{i}.{('tif', 'TIFF')[i % 2]}")
        (dogs / f"{i}.png").unlink()
    (dogs / "5.png").rename(dogs / "5.gif")
    (dogs / "notes.txt").touch()
    items = load_dataset("tiny", tiny_data).images["sketch"]
    assert len(items) == 29 and sum(path.lower().endswith(("tif", "tiff")) for path in paths(items)) == 5
    assert all(location.open().size == (16, 16) for location, _ in items)
    warning = capsys.readouterr().err
    assert f"{tiny_data}/tiny/sketch: 2 files are not images ({dogs}/5.gif …)" in warning


def test_hidden_folders_and_files_are_no_data(tiny_data, capsys):
    before = load_dataset("tiny", tiny_data)
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        shutil.copytree(tiny_data / "tiny/photo/cat", tiny_data / "tiny/photo" / folder)
        shutil.copytree(tiny_data / "tiny/photo/cat", tiny_data / "tiny/photo/dog" / folder)
    (tiny_data / "tiny/sketch/.empty").mkdir()
    (tiny_data / "tiny/sketch/cat/._1.png").touch()
    (tiny_data / "tiny/sketch/cat/.DS_Store").touch()
    after = load_dataset("tiny", tiny_data)
    assert after.classes == ["cat", "dog", "red_house"] and after.images == before.images
    assert capsys.readouterr().err == ""


def test_what_is_not_a_file_is_named(tiny_data, tmp_path, capsys):
    """… and nothing waits for a FIFO."""
    image, shard = tiny_data / "tiny" / "photo" / "dog" / "3.png", tmp_path / "pool" / "0.tar"
    shard.parent.mkdir()
    settings = SimpleNamespace(pool=shard.parent, data=tmp_path)
    meta = read_meta("tiny", tiny_data)[1]
    calls = (image, lambda: load_dataset("tiny", tiny_data)), (shard, lambda: pool_shards(settings, meta))
    for path, call in calls:
        for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path)):
            path.unlink(missing_ok=True)
            make(path)
            assert f"{path} is neither a file nor a link to one" in refusal(capsys, call)
            path.rmdir() if path.is_dir() else path.unlink()
        path.symlink_to("/nowhere")
        assert f"{path} is neither a file nor a link to one" in refusal(capsys, call)
    (tiny_data / "pacs").symlink_to("/nowhere")
    line = refusal(capsys, lambda: load_dataset("pacs", tiny_data))
    assert f"{tiny_data}/pacs is a link to a folder that does not exist" in line


def test_two_folders_of_one_english_name_are_refused(tmp_path, capsys):
    own_set(tmp_path, ["Dog_house", "cat", "dog house"])
    line = refusal(capsys, lambda: load_dataset("own", tmp_path))
    assert "Dog_house and dog house are both called 'dog house'" in line
    shutil.rmtree(tmp_path / "own")
    own_set(tmp_path, ["Dog_house", "dog house"], classnames={"Dog_house": "kennel"})
    assert load_dataset("own", tmp_path).classnames == ["kennel", "dog house"]


def test_class_folders_that_are_no_english(tmp_path, capsys):
    """WordNet's ids, numbers before names, names in dataset.json; a warning if none of these helps."""
    ids = ["n01440764", "n02012849", "n02084071"]  # tench, crane: ImageNet's; dog: WordNet's
    own_set(tmp_path, [*ids, "001.Black_footed_Albatross", "02_ox", "3d_printer", "k9"], classnames={"k9": "police dog"})
    dataset = load_dataset("own", tmp_path)
    assert dict(zip(dataset.classes, dataset.classnames)) == {
        "n01440764": "tench", "n02012849": "crane bird", "n02084071": "dog",
        "001.Black_footed_Albatross": "black footed albatross", "02_ox": "ox",
        "3d_printer": "3d printer", "k9": "police dog",
    }
    assert "a photo of an ox" in data.class_texts(dataset, "photo") and capsys.readouterr().err == ""
    shutil.rmtree(tmp_path / "own")
    own_set(tmp_path, ["0", "12"], classnames={"12": "twelve"})
    assert load_dataset("own", tmp_path).classnames == ["0", "twelve"]
    [warning] = capsys.readouterr().err.splitlines()
    assert "class 0 has no letters" in warning and "classnames" in warning
    own_set(tmp_path / "again", ["dog"], classnames={"dgo": "a dog"})
    assert "'dgo' is no class folder" in refusal(capsys, lambda: load_dataset("own", tmp_path / "again"))


def test_names_are_compared_in_one_unicode_form(tmp_path, capsys):
    """ "cané" is composed on Linux and Windows, decomposed in a folder from a Mac."""
    own_set(tmp_path, ["cane", "canz"])
    for domain, form in (("photo", "NFC"), ("sketch", "NFD")):
        (tmp_path / "own" / domain / "cane").rename(tmp_path / "own" / domain / unicodedata.normalize(form, "cané"))
    dataset = load_dataset("own", tmp_path)
    assert dataset.classes == ["canz", unicodedata.normalize("NFC", "cané")]
    for domain in ("photo", "sketch"):
        items = dataset.images[domain]
        assert len(items) == 20 and all(Path(location.file).exists() for location, _ in items)
        assert [y for location, y in items if "canz" in location.path] == [0] * 10
    shutil.copytree(tmp_path / "own/sketch/canz", tmp_path / "own/sketch" / unicodedata.normalize("NFC", "cané"))
    assert "have the same name. Rename one" in refusal(capsys, lambda: load_dataset("own", tmp_path))


def test_a_name_that_is_not_utf8_is_refused(tmp_path, capsys):
    own_set(tmp_path, ["dog"])
    Path(os.fsdecode(bytes(tmp_path / "own/photo/dog") + b"/caf\xe9.jpg")).touch()
    line = refusal(capsys, lambda: load_dataset("own", tmp_path))
    assert "own/photo/dog', or a file in it, has a name that is not UTF-8. Rename it" in line


def test_a_folder_is_found_without_regard_to_case(tmp_path):
    layout(tmp_path / "PACS", read_meta("pacs", tmp_path)[1].phrases)
    dataset = load_dataset("pacs", tmp_path)
    assert dataset.folder == tmp_path / "PACS" and dataset.name == "pacs"
    (tmp_path / "pacs").symlink_to(tmp_path / "PACS")
    assert load_dataset("pacs", tmp_path).folder == tmp_path / "pacs"


@pytest.mark.parametrize("name, source", [
    ("pacs", "photo"), ("office_home", "Real World"), ("domainnet", "real"),
    ("terra_incognita", "location_38"), ("vlcs", "VOC2007"),
])
def test_known_sets_are_found_under_data_or_at_it(tmp_path, capsys, name, source):
    """The source is the first domain; data in another place are linked, and keep their split."""
    domains = read_meta(name, tmp_path)[1].phrases
    layout(tmp_path / "here" / name, domains)
    dataset = load_dataset(name, tmp_path / "here")
    assert dataset.folder == tmp_path / "here" / name and [*dataset.images] == [*domains]
    assert dataset.classnames == ["alarm clock"] and "are published" in capsys.readouterr().err
    train = paths(dataset.split(source, source, "train", 0))
    assert len(train) == 7

    itself = load_dataset(name, tmp_path / "here" / name)  # --data may name the folder itself
    assert itself.images == dataset.images
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / name).symlink_to(tmp_path / "here" / name)
    linked = load_dataset(name, tmp_path / "there")
    assert paths(linked.split(source, source, "train", 0)) == train
    argv = [name, "--data", str(tmp_path / "here"), "--run", str(tmp_path / "run")]
    settings, resolved = load_run(parse("", [*argv, "--methods", "finetune"]))
    assert resolved.folder == dataset.folder and settings.source == source


def test_other_folder_names_are_one_clear_line(tmp_path, capsys):
    layout(tmp_path / "office_home", ["real_world", "art", "clipart", "product"])
    line = refusal(capsys, lambda: load_dataset("office_home", tmp_path))
    assert "which holds art, clipart, product, real_world" in line  # and nothing is fetched
    assert "Put Real World, Art, Clipart, Product there" in line
    os.rename(tmp_path / "office_home", tmp_path / "OfficeHome")
    line = refusal(capsys, lambda: load_dataset("office_home", tmp_path))
    assert f"put the data into {tmp_path}/office_home by hand" in line


def test_data_itself_is_a_set_only_if_complete(tmp_path):
    for folder in ("PACS_old", "pacs", "."):
        (tmp_path / folder / "sketch").mkdir(parents=True)
    assert read_meta("pacs", tmp_path)[0] == tmp_path / "pacs"
    assert read_meta("domainnet", tmp_path)[0] == tmp_path / "domainnet"


def test_an_official_list_must_be_of_these_files(tmp_path, capsys):
    layout(tmp_path / "domainnet", read_meta("domainnet", tmp_path)[1].phrases)
    file = tmp_path / "domainnet/real_test.txt"
    file.write_text("real/Alarm_Clock/3.jpg 0\nreal/Alarm_Clock/4.jpg 0\n")
    dataset = load_dataset("domainnet", tmp_path)
    assert "official list" in capsys.readouterr().err  # those of the other domains are missing
    test = dataset.split("real", "real", "test", 0)
    assert paths(test) == ["real/Alarm_Clock/3.jpg", "real/Alarm_Clock/4.jpg"]
    assert len(dataset.trainable("real")) == 8
    for fractions, sizes in (((0.7, 0.1, 0.2), (7, 1)), ((0.4, 0.2, 0.4), (5, 3))):  # the rest: 8
        description = {"fractions": dict(zip(("train", "val", "test"), fractions))}
        (tmp_path / "domainnet/dataset.json").write_text(json.dumps(description))
        dataset = load_dataset("domainnet", tmp_path)
        train, val = (dataset.split("real", "real", part, 0) for part in ("train", "val"))
        assert (len(train), len(val)) == sizes and {*train, *val} == {*dataset.trainable("real")}
    file.write_bytes(b"real/Caf\xe9/3.jpg 0\n")
    assert f"{file} cannot be read" in refusal(capsys, lambda: load_dataset("domainnet", tmp_path))
    file.write_text("".join(f"{path}\n" for path in paths(dataset.images["real"])))
    argv = ["domainnet", "real", "--data", str(tmp_path), "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        load_run(parse("", argv))
    assert "real_test.txt leaves no image to train on" in capsys.readouterr().err
    file.write_text("real/x/real_1.jpg 0\n")
    line = refusal(capsys, lambda: load_dataset("domainnet", tmp_path))
    assert f"{file} names no image" in line


def test_published_counts_are_checked(tiny_data, capsys):
    change(tiny_data, counts={"photo": 31, "sketch": 30})
    load_dataset("tiny", tiny_data)
    warning = capsys.readouterr().err
    assert "tiny, photo: 30 images" in warning and "31 are published" in warning and "sketch" not in warning


def test_a_missing_data_set_is_made_by_one_process(tmp_path, monkeypatch, capsys):
    """… with the command that its description names."""
    def make(command):
        assert command == f"python -m emoji.draw --data '{tmp_path}/my data'"
        layout(tmp_path / "my data/emoji", read_meta("emoji", tmp_path)[1].phrases)

    monkeypatch.setattr(load, "run_command", make)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("emoji", "pacs"):  # made, fetched
        line = refusal(capsys, lambda: load_dataset(name, tmp_path / "my data"))
        assert "takes one process" in line and name in line
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert load_dataset("emoji", tmp_path / "my data").classnames == ["alarm clock"]
    monkeypatch.setattr(load, "run_command", lambda command: pytest.fail("made twice"))
    load_dataset("emoji", tmp_path / "my data")


def test_unseen_classes_are_another_data_sets(tiny_data, capsys):
    assert load_unseen(load_dataset("tiny", tiny_data)) is None
    shutil.copytree(tiny_data / "tiny", tiny_data / "others")
    change(tiny_data, unseen="others")
    assert load_unseen(load_dataset("tiny", tiny_data)).name == "others"
    change(tiny_data, unseen="tiny")
    dataset = load_dataset("tiny", tiny_data)
    assert "cannot be its own" in refusal(capsys, lambda: load_unseen(dataset))
    change(tiny_data, unseen="nothing")
    dataset = load_dataset("tiny", tiny_data)
    assert "unknown data set 'nothing'" in refusal(capsys, lambda: load_unseen(dataset))


# -------------------------------------------------------------------------------------------------
# Descriptions


def test_a_source_without_test_images_is_refused_before_training(tiny_data, tmp_path, capsys):
    change(tiny_data, fractions={"train": 0.9, "val": 0.1, "test": 0})
    argv = ["tiny", "photo", "--data", str(tiny_data), "--run", str(tmp_path / "run")]
    line = refusal(capsys, lambda: load_run(parse("", argv)))
    assert f"{tiny_data / 'tiny' / 'photo'} leaves no image to test on" in line


def test_domains_without_a_style_have_no_mapper(tmp_path, capsys):
    """Plain finetuning works without."""
    layout(tmp_path / "vlcs", read_meta("vlcs", tmp_path)[1].phrases)
    common = ["vlcs", "--data", str(tmp_path), "--run", str(tmp_path / "r")]
    assert load_dataset("vlcs", tmp_path).styles("VOC2007") == []
    with pytest.raises(SystemExit) as stop:
        load_run(parse("", [*common, "--methods", "lads"]))
    assert stop.value.code == 2 and "all its domains are called 'a photo'" in capsys.readouterr().err
    load_run(parse("", [*common, "--methods", "finetune"]))


def test_a_path_is_not_taken_for_a_name(tiny_data, capsys):
    """Splits are drawn by the name: "tiny/" would have others than "tiny"."""
    for name in ("tiny/", str(tiny_data / "tiny"), "../data/tiny"):
        line = refusal(capsys, lambda: load_dataset(name, tiny_data))
        assert f"{name} is a path" in line and "Pass tiny --data " in line


@pytest.mark.parametrize("content, reason", [
    ("{", "Expecting property name"), ("[]", "not a mapping"), ("3", "not a mapping"),
    ("[" * 10**5, "recursion"), ('{"fractions": {}}', "phrases of one domain"),
])
def test_what_is_no_description_is_refused(tiny_data, capsys, content, reason):
    file = tiny_data / "tiny" / "dataset.json"
    file.write_text(content)
    line = refusal(capsys, lambda: load_dataset("tiny", tiny_data))
    assert f"{file} does not describe a data set: " in line and reason in line


@pytest.mark.parametrize("key, value, reason", [
    ("phrases", {}, "phrases of one domain"),
    ("phrases", {"photo": "a photo", "sketch": ""}, "phrases of one domain"),
    ("phrases", {"photo": "a photo", "sketch": " "}, "phrases of one domain"),
    ("phrases", {"photo": "a photo", "sketch": ["a sketch"]}, "phrases of one domain"),
    ("phrases", {"photo": "a photo", "sketch": "the {} as a sketch"}, "phrases of one domain"),
    ("phrases", ["photo", "sketch"], "phrases cannot be ['photo', 'sketch']"),
    ("phrases", {"photo": "a photo", "extended": "a sketch"}, "'extended' is the name of a mean"),
    ("fractions", {"train": 0.5, "test": 0.5}, "fractions of train, val and test"),
    ("fractions", {"train": 1.5, "val": 0, "test": -0.5}, "fractions of train, val and test"),
    ("fractions", {"train": float("nan"), "val": 0, "test": 0}, "fractions of train, val and test"),
    ("fractions", {"train": "1", "val": 0, "test": 0}, "fractions of train, val and test"),
    ("templates", {"photo": ["a photo."]}, "templates"),
    ("templates", {"photo": ["a {c}."]}, "templates"),
    ("templates", {"photo": "a {}."}, "templates"),
    ("templates", {"photo": [3]}, "templates"), ("templates", {"photo": 3}, "templates"),
    ("templates", {"foto": ["a {}."]}, "templates: 'foto' is no domain"),
    ("counts", {"foto": 3}, "counts: 'foto' is no domain"),
    ("classnames", {"dog": 3}, "classnames"), ("classnames", {"dog": ""}, "classnames"),
    ("schedules", {"head": {"lr": 1}}, "schedules are of"), ("k", 0, "k is below 1"),
    ("frozen_stages", 6, "'frozen_stages' is none of"),
    ("made_by", "python -c 1", "'made_by' is none of"),  # only this repository's commands are run
    ("model", 3, "model cannot be 3"),
    ("same_stem_same_thing", "no", "same_stem_same_thing cannot be 'no'"),
])
def test_a_bad_description_is_refused_by_its_key(tiny_data, capsys, key, value, reason):
    change(tiny_data, **{key: value})
    line = refusal(capsys, lambda: load_dataset("tiny", tiny_data))
    assert "tiny/dataset.json does not describe a data set: " in line and reason in line


def test_the_descriptions_here_are_valid_and_a_dataset_json_changes_them(tmp_path):
    names = sorted(f.stem for f in (Path(data.__file__).parent / "sets").glob("*.json"))
    assert len(names) == 8
    for name in names:
        folder, meta = read_meta(name, tmp_path)
        assert folder == tmp_path / name and list(meta.phrases)
        assert sum(bool(way) for way in (meta.hub, meta.by_hand, meta.made_by)) == 1, name
    (tmp_path / "pacs").mkdir()
    description = {"fractions": {"train": 0.9, "val": 0.1, "test": 0}}
    (tmp_path / "pacs/dataset.json").write_text(json.dumps(description))
    _, meta = read_meta("pacs", tmp_path)
    assert meta.fractions["train"] == 0.9 and meta.phrases["sketch"] == "a sketch"


def test_a_template_is_accepted_as_a_phrase(tiny_data):
    """As LADS's README writes domains."""
    for template in ("a sketch of a {}.", "a sketch of {}", "a sketch of an {}"):
        change(tiny_data, phrases={"photo": "a photo", "sketch": template})
        dataset = load_dataset("tiny", tiny_data)
        assert data.class_texts(dataset, "sketch")[1] == "a sketch of a dog"
        items = dataset.images["photo"][13:14]
        assert data.caption_texts(dataset, "sketch", items) == ["a sketch of a dog number 3"]


# -------------------------------------------------------------------------------------------------
# Prompts and captions


def test_articles():
    nouns = ["dog", "elephant", "grapes", "glass of milk", "Santa Claus", "bus"]
    phrases = ["a dog", "an elephant", "grapes", "a glass of milk", "Santa Claus", "a bus"]
    assert [data.article(noun) for noun in nouns] == phrases


def test_prompts_carry_each_images_own_caption(tiny_data):
    dataset = load_dataset("tiny", tiny_data)
    texts = ["a sketch of a cat", "a sketch of a dog", "a sketch of a red house"]
    assert data.class_texts(dataset, "sketch") == texts
    items = dataset.images["photo"][13:2:-10]  # in any order
    assert data.captions(dataset, items) == ["a dog number 3", "a cat number 3"]
    items = items[:1]
    assert data.caption_texts(dataset, "sketch", items) == ["a sketch of a dog number 3"]
    line = '{"path": "photo/dog/3.png", "caption": "a photo of two dogs"}\n'
    (tiny_data / "tiny" / "captions.jsonl").write_text(line)
    assert data.caption_texts(dataset, "sketch", items) == ["a sketch of two dogs"]


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

    dataset = load_dataset("tiny", tiny_data)
    assert prompts(dataset) == [data.class_texts(dataset, "photo")]
    change(tiny_data, templates={"photo": ["{} in a photo", "{}."]})
    texts = prompts(load_dataset("tiny", tiny_data))
    assert [t[2] for t in texts] == ["red house in a photo", "red house."]


def append(file, row):
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def captioned(location, caption):
    """Return the row that a captioner writes."""
    size, time = file_stamp(location.file)
    return {"path": location.path, "caption": caption, "by": "blip", "size": size, "time": time}


def test_the_last_row_of_an_image_counts(tiny_data):
    file, dataset = tiny_data / "tiny" / "captions.jsonl", load_dataset("tiny", tiny_data)
    items = dataset.images["photo"][12:14]
    append(file, captioned(items[1][0], "a captioner's dog"))
    assert data.captions(dataset, items) == ["a dog number 2", "a captioner's dog"]
    assert len(data.read_captions(file)) == 90
    append(file, captioned(items[1][0], "its other dog"))
    append(file, captioned(items[0][0], "a captioner's dog"))
    append(file, {"path": "photo/dog/2.png", "caption": " another dog "})
    assert data.all_captions(dataset, items) == [["another dog"], ["its other dog"]]


def test_all_captions_that_people_wrote_of_an_image_count(tiny_data):
    """As COCO has five; the first is the one of methods that take one."""
    file, dataset = tiny_data / "tiny" / "captions.jsonl", load_dataset("tiny", tiny_data)
    for text in ("", "a spaniel", "a pet"):
        append(file, {"path": "photo/dog/2.png", "caption": text})
    items = dataset.images["photo"][11:13]
    texts = ["a dog number 2", "a spaniel", "a pet"]
    assert data.all_captions(dataset, items) == [["a dog number 1"], texts]
    assert data.captions(dataset, items) == ["a dog number 1", "a dog number 2"]


def test_a_captioners_row_counts_while_the_image_is_the_same(tiny_data, capsys):
    file, dataset = tiny_data / "tiny" / "captions.jsonl", load_dataset("tiny", tiny_data)
    items = dataset.images["photo"][13:14]
    location = items[0][0]
    stamp = file_stamp(location.file)
    append(file, captioned(location, "a captioner's dog"))
    assert data.captions(dataset, items) == ["a captioner's dog"]
    os.utime(location.file, ns=(0, stamp[1] + 1))
    assert "no caption for 1 of 1 images, photo/dog/3.png" in refusal(capsys, lambda: data.captions(dataset, items))
    os.utime(location.file, ns=(0, stamp[1]))
    assert data.captions(dataset, items) == ["a captioner's dog"]
    with open(location.file, "ab") as image:
        image.write(b"more")
    os.utime(location.file, ns=(0, stamp[1]))
    assert "no caption for 1 of 1" in refusal(capsys, lambda: data.captions(dataset, items))
    append(file, {"path": location.path, "caption": "a person's dog"})
    assert data.captions(dataset, items) == ["a person's dog"]
    old_version = {"path": location.path, "caption": "a dog", "by": "blip", "bytes": stamp[0]}
    rows = {"none": None, "empty": {"caption": ""}, "old": old_version, "person": {"caption": "a dog"}}
    valid = {name: data.valid_caption(row, location) for name, row in rows.items()}
    assert valid == {"none": False, "empty": False, "old": False, "person": True}
    assert data.valid_caption(captioned(location, ""), location)  # the class prompt stands for it


def test_the_class_prompt_replaces_a_captioners_failures_only(tiny_data):
    """It is in today's words, not in those of the day when the image was captioned."""
    file, dataset = tiny_data / "tiny" / "captions.jsonl", load_dataset("tiny", tiny_data)
    photos, sketches = dataset.images["photo"], dataset.images["sketch"]
    items = [photos[0], sketches[10], photos[20], photos[21], photos[22]]
    repeated = "a dog a dog a dog"
    append(file, captioned(items[0][0], ""))
    append(file, captioned(items[1][0], repeated))
    append(file, captioned(items[2][0], "a dog and a dog"))
    rows = [*data.read_captions(file).values()]
    texts = {row["path"]: {**row, "caption": repeated} if row["path"] == items[3][0].path else row for row in rows}
    file.write_text("".join(json.dumps(row) + "\n" for row in texts.values()))
    prompts = ["a photo of a cat", "a sketch of a dog"]
    rest = ["a dog and a dog", repeated, "a red_house number 2"]
    assert data.captions(dataset, items) == [*prompts, *rest]
    change(tiny_data, phrases={"photo": "a snapshot", "sketch": "a drawing", "cartoon": "a cartoon"})
    prompts = ["a snapshot of a cat", "a drawing of a dog"]
    assert data.captions(load_dataset("tiny", tiny_data), items) == [*prompts, *rest]


@pytest.mark.parametrize("caption, expected", [
    ("a cat a cat a cat", True), ("a cat, a cat, a cat", True), ("dog dog dog", True),
    ("a cat a cat", False), ("a cat and a cat and a dog", False), ("", False),
])
def test_repetition_is_recognised(caption, expected):
    assert data.repeats_itself(caption) == expected


@pytest.mark.parametrize("written", [
    "{}", "./{}", "/elsewhere/tiny/{}", "data/tiny/{}", "../tiny/./{}", "C:\\data\\tiny\\{}",
])
def test_captions_are_found_by_any_path_of_an_image(tmp_path, written):
    own_set(tmp_path, ["cane"])
    folder = tmp_path / "own" / "photo"
    (folder / "cane").rename(folder / unicodedata.normalize("NFD", "cané"))
    shutil.rmtree(tmp_path / "own" / "sketch" / "cane")
    shutil.copytree(folder, tmp_path / "own" / "sketch", dirs_exist_ok=True)
    path = written.format(unicodedata.normalize("NFC", "photo/cané/3.jpg"))
    path = path.replace("/", "\\") if "\\" in written else path
    append(tmp_path / "own" / "captions.jsonl", {"path": path, "caption": "an old dog"})
    dataset = load_dataset("own", tmp_path)
    assert data.captions(dataset, dataset.images["photo"][3:4]) == ["an old dog"]


def test_bad_captions_are_refused(tiny_data, capsys):
    file, dataset = tiny_data / "tiny" / "captions.jsonl", load_dataset("tiny", tiny_data)
    photos = dataset.images["photo"]
    remedies = "`python anchors.py caption tiny SOURCE`", "--captions FILE"

    def refused():
        return refusal(capsys, lambda: data.caption_texts(dataset, "photo", photos))

    def refused_file(path):
        other = load_dataset("tiny", tiny_data, captions=path)
        return refusal(capsys, lambda: data.captions(other, photos))

    line = refused_file("nowhere.jsonl")
    assert "no captions (nowhere.jsonl does not exist)" in line and all(r in line for r in remedies)
    assert "cannot be read" in refused_file(tiny_data)
    rows = [{"path": "photo/cat/0.png", "caption": "a dog"}, {"path": "foto/cat/1.png", "caption": "a dog"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused()
    assert "no caption for 29 of 30 images, photo/cat/1.png first" in line
    assert "1 of its rows match no image" in line and all(remedy in line for remedy in remedies)
    file.write_text(json.dumps(rows[0]) + '\n{"path": "photo/cat/1.png", "caption": " "}\n')
    assert "no caption for 29 of 30 images, photo/cat/1.png first" in refused()
    for bad in ('{"path": "photo/dog/3.png"}', "[]", "3", "{", '{"path": [], "caption": "a"}', "[" * 10**5):
        file.write_text('{"path": "photo/cat/0.png", "caption": "a cat"}\n' + bad + "\n")
        assert "line 2" in refused()
    lines = [json.dumps({"path": at.path, "caption": "a\u2028b"}, ensure_ascii=False) for at, _ in photos]
    file.write_bytes("\r\n".join([*lines, ""]).encode("utf-8-sig"))  # as some editors write it
    assert data.captions(dataset, photos) == ["a\u2028b"] * 30
    assert load_dataset("tiny", tiny_data, captions="").captions == file  # an unset shell variable
    file.write_bytes('{"path": "photo/cat/0.png", "caption": "café"}'.encode("latin-1"))
    assert "cannot be read ('utf-8' codec" in refused()
    file.unlink()
    assert f"no captions ({file} does not exist)" in refused()
    file.mkdir()
    assert "cannot be read ([Errno 21] Is a directory" in refused()


def test_a_row_that_a_killed_run_cut_off_is_missing(tiny_data, capsys):
    file, dataset = tiny_data / "tiny" / "captions.jsonl", load_dataset("tiny", tiny_data)
    text = file.read_text()
    file.write_text(text[:-10])
    assert len(data.read_captions(file)) == 89
    file.write_text(text[:-1])  # complete; an editor left the line's end out
    assert len(data.read_captions(file)) == 90
    assert len(data.captions(dataset, dataset.images["cartoon"])) == 30


def test_captions_are_looked_for_beside_the_images_and_beside_the_folder(tiny_data):
    file, other = tiny_data / "tiny" / "captions.jsonl", tiny_data / "tiny_captions.jsonl"
    assert load_dataset("tiny", tiny_data).captions == file
    file.rename(other)
    assert load_dataset("tiny", tiny_data).captions == other
    other.unlink()
    assert load_dataset("tiny", tiny_data).captions == file  # to be written
    assert load_dataset("tiny", tiny_data, captions="my.jsonl").captions == Path("my.jsonl")


# -------------------------------------------------------------------------------------------------
# Shards


def test_shards_are_read_with_suffixes_in_any_case(tmp_path):
    members = {}
    for i, (image, text) in enumerate([("jpg", "txt"), ("JPG", "TXT"), ("PNG", "txt"), ("tiff", "Txt")]):
        members |= {f"{i}.{image}": square(i), f"{i}.{text}": b"text %d" % i}
    members |= {"0.JSON": b'{"a": 1}', "._0.jpg": b"?", "._0.txt": b"?", "__MACOSX/1.jpg": b"?"}
    members |= {"4.gif": square(4), "4.txt": b"text 4"}
    write_shard(tmp_path / "0.tar", members)
    pairs, unusable = read_shard(tmp_path / "0.tar")
    assert [text for _, _, text, _ in pairs] == ["text 0", "text 1", "text 2", "text 3"]
    assert [location.read() for _, location, _, _ in pairs] == [square(i) for i in range(4)]
    assert [extra for *_, extra in pairs] == [{"a": 1}, {}, {}, {}]
    assert unusable == ["0.tar: 4 (no image)"]


def test_members_that_are_no_files(tmp_path):
    """Links within the tar lead to an image or a text; others, and devices, are counted once each."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:

        def add(name, content=b"", **attributes):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in attributes.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))

        add(".", type=tarfile.DIRTYPE)
        add("./a/0.png", square(0))
        add("./a/0.txt", b"text 0")
        add("./a/1.png", type=tarfile.SYMTYPE, linkname="../b/1.png")  # to a later member
        add("./a/1.txt", type=tarfile.LNKTYPE, linkname="./a/0.txt")
        add("b/1.png", square(1))
        add("b/1.txt", b"text 1")
        add("2.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("2.txt", type=tarfile.SYMTYPE, linkname="nowhere")
        add("3.png", type=tarfile.FIFOTYPE)
        add("3.txt", b"text 3")
        add("4.png", type=tarfile.DIRTYPE)
        add("4.txt", b"text 4")
        add("5.png", square(5))
        add("5.txt", b"text 5")
        add("5.json", b"[" * 10**5)
    pairs, unusable = read_shard(tmp_path / "0.tar")
    texts = {key: (text, location.read()) for key, location, text, _ in pairs}
    assert texts == {
        "a/0": ("text 0", square(0)), "a/1": ("text 0", square(1)), "b/1": ("text 1", square(1)),
        "5": ("text 5", square(5)),
    }
    assert unusable == [
        "0.tar: 5.json (not JSON)", "0.tar: 3 (not a file)", "0.tar: 4 (no image)",
        "0.tar: 2 (not a file)",
    ]


def test_damaged_shards_give_what_is_intact(tmp_path):
    path = tmp_path / "00000.tar"
    members = {"a.png": square(0), "a.txt": b"a", "b.jpg": b"broken", "b.txt": b"b"}
    members |= {"c.png": square(1), "d.txt": b"no image", "e.png": square(2), "e.txt": b"e"}
    write_shard(path, {**members, "e.json": b"{", "f.png": square(3), "f.txt": b"f"})
    pairs, unusable = read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "b", "e", "f"]
    assert unusable == [f"00000.tar: {what}" for what in ("e.json (not JSON)", "c (no text)", "d (no image)")]
    with tarfile.open(path) as tar:
        header, offset = tar.getmember("b.jpg").offset, tar.getmember("f.png").offset_data
        last = tar.getmember("f.txt").offset_data
    content = path.read_bytes()
    path.write_bytes(content[:header] + b"?" * 512 + content[header + 512:])  # tarfile's end
    pairs, unusable = read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "e", "f"]
    assert any(f"byte {header} (damaged header)" in name for name in unusable)
    for end in (offset + 20, last):  # a download that broke off in an image, before a text
        path.write_bytes(content[:end])
        pairs, unusable = read_shard(path)
        assert [key for key, *_ in pairs] == ["a", "b", "e"]
        assert any("00000.tar: what follows" in name for name in unusable)


def test_the_default_pool_is_made_or_fetched(tmp_path, monkeypatch, capsys):
    meta = read_meta("emoji", tmp_path)[1]
    settings = SimpleNamespace(pool=None, data=tmp_path)
    monkeypatch.setattr(load, "run_command", lambda command: write_shard(tmp_path / "emoji_pool/0.tar", {}))
    assert pool_shards(settings, meta) == [tmp_path / "emoji_pool/0.tar"]
    assert "could not fetch pixparse/cc3m-wds" in refusal(
        capsys, lambda: pool_shards(settings, read_meta("pacs", tmp_path)[1])
    )
    settings.pool = str(tmp_path)
    assert f"{tmp_path} has no webdataset shards" in refusal(capsys, lambda: pool_shards(settings, meta))


# -------------------------------------------------------------------------------------------------
# Features


def test_a_relative_path_is_from_here_or_else_from_the_repository(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_clip("local-dir:emoji/clip", tiny_data).base[0] == "local-dir:emoji/clip"
    for name in ("data/tiny", "Salesforce/blip2-opt-2.7b", "/nowhere"):
        assert core.utils.from_root(name) == name


def test_images_are_encoded_in_parts_where_the_memory_is_too_small(tiny_data, tiny_clip, monkeypatch):
    clip, items = load_clip(tiny_clip, tiny_data), load_dataset("tiny", tiny_data).images["photo"]
    expected, sizes, true_encode = features.encode_images(clip, items), [], features.Clip.encode_image

    def encode(clip, images):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        sizes.append(len(images))
        return true_encode(clip, images)

    monkeypatch.setattr(features.Clip, "encode_image", encode)
    assert torch.allclose(features.encode_images(clip, items), expected, atol=1e-6)
    assert sum(sizes) == len(items) == 30 and max(sizes) <= 4


@pytest.mark.parametrize("name", ["ViT-B-61", "local-dir:nowhere"])
def test_a_bad_model_is_refused_by_name(tiny_data, capsys, name):
    assert f"--model {name}: " in refusal(capsys, lambda: load_clip(name, tiny_data))


def test_features_are_unit_norm_in_order_and_of_each_text_its_own(tiny_data, tiny_clip):
    clip, items = load_clip(tiny_clip, tiny_data), load_dataset("tiny", tiny_data).images["photo"]
    z = features.encode_images(clip, items, batch_size=7)
    assert torch.allclose(z.norm(dim=1), torch.ones(len(items)), atol=1e-6)
    assert torch.allclose(z[[4]], features.encode_images(clip, items[4:5]), atol=1e-5)
    t = features.encode_texts(clip, ["a dog", "a cat", "a dog"])
    assert torch.equal(t[0], t[2]) and not torch.allclose(t[0], t[1])
    image = items[0][0].decode()
    for transform, same in ((clip.preprocess, True), (clip.augment, False)):
        assert (len({transform(image).numpy().tobytes() for _ in range(20)}) == 1) == same


@pytest.mark.parametrize("size", [224, (224, 336)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_cropped_as_open_clip_crops_pils(size, mode, interpolation):
    """To the same size, and pixels are within 4/255; augmentation has the same random numbers."""
    config = {"resize_mode": mode, "interpolation": interpolation, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    scale = open_clip.transform.AugmentationCfg(scale=(0.9, 1.0))
    for is_train in (False, True):
        theirs = open_clip.transform.image_transform(size, is_train, **config, aug_cfg=scale if is_train else None)
        ours, mean, std = features.split_transforms(theirs)
        for image in (photograph(), photograph(375, 500), photograph(900, 400), photograph(160, 120), photograph(227, 227)):
            torch.manual_seed(0)
            expected = theirs(image)
            torch.manual_seed(0)
            got = ours(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            assert got.dtype == torch.uint8 and got.shape == expected.shape
            error = (got / 255 - (expected * std + mean)).abs()
            assert error.max() <= 4 / 255 and error.mean() < 0.5 / 255


@pytest.mark.parametrize("kind, text, length", [
    ("CLIP", {}, 6), ("CLIP", {"pool_type": "eos", "eos_id": 49407}, 6),
    ("CustomTextCLIP", {}, 6), ("CustomTextCLIP", {"pool_type": "last"}, 12),
    ("CustomTextCLIP", {"no_causal_mask": True, "pool_type": "last"}, 12),
    ("CustomTextCLIP", {"embed_cls": True}, 13),
])
def test_shared_padding_is_left_out_if_that_changes_nothing(tiny_clip, kind, text, length):
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


def test_the_texts_of_an_epoch_have_few_shapes(tiny_clip, tiny_data, monkeypatch):
    """… on a GPU: rows in 64s and lengths in 8s, up to the context; padding changes no feature."""
    generator, padding = torch.Generator().manual_seed(0), torch.zeros(1, 77, dtype=torch.long)
    shapes, before = set(), set()
    for _ in range(200):  # steps
        n = torch.randint(150, 190, (1,), generator=generator).item()
        length = torch.randint(9, 30, (1,), generator=generator).item()
        tokens = torch.cat([torch.ones(n, length, dtype=torch.long), padding.expand(n, -1)[:, length:]], 1)
        assert features.used_length(tokens) == length + 1
        padded, end = features.in_few_shapes(tokens, length + 1)
        assert torch.equal(padded[:n], tokens) and padded.shape == (192, 77) and length < end <= length + 8
        shapes.add((len(padded), end))
        before.add((n, length + 1))
    assert len(shapes) == 3 and len(before) > 150
    assert features.in_few_shapes(tokens[:70], 76)[1] == features.in_few_shapes(tokens, 74)[1] == 77
    assert [len(features.in_few_shapes(tokens[:n], 9, 4)[0]) for n in (1, 4, 7)] == [4, 4, 8]

    clip = load_clip(tiny_clip, tiny_data)
    tokens = clip.tokenizer(["a dog", "a red cat", "a dog", "an owl of a dog"])
    expected = clip.encode_text(tokens)
    seen, encode = [], clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda rows: seen.append(len(rows)) or encode(rows))
    clip.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(features, "to_device", lambda tensor, device: tensor)
    monkeypatch.setattr(features, "autocast", lambda device: contextlib.nullcontext())
    assert torch.allclose(clip.encode_text(tokens), expected, atol=1e-6) and seen == [64]


def test_cached_features_are_keyed_by_model_and_images(tiny_data, tiny_clip, tmp_path):
    """Weights, preprocessing, activation, and each image; `items` are rows of the domain."""
    def files(change_model=lambda clip: None):
        clip = load_clip(tiny_clip, tiny_data)
        change_model(clip)
        dataset = load_dataset("tiny", tiny_data)
        items = dataset.images["photo"][::-3]
        z = features.cached_features(clip, dataset, "photo", items, tmp_path / "cache")
        assert torch.allclose(z, features.encode_images(clip, items), atol=1e-6)
        return len(list((tmp_path / "cache").glob("*.pt")))

    def other_key(clip):
        clip.key = "another model"

    assert files() == 1
    assert files() == 1  # from the cache
    assert files(other_key) == 2
    cats = tiny_data / "tiny" / "photo" / "cat"
    shutil.copy(cats / "1.png", cats / "2.png")
    assert files() == 3
    os.utime(cats / "1.png", (0, 0))  # another image of the same size
    assert files() == 4
    (cats / "1.png").unlink()
    assert files() == 5


def test_a_models_key_depends_on_all_that_decides_its_features(tiny_clip, tiny_data, tmp_path):
    def key(change=lambda folder: None):
        folder = tmp_path / "clip"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_clip.removeprefix("local-dir:"), folder)
        change(folder)
        return load_clip(f"local-dir:{folder}", tiny_data).key

    def configure(part, **values):
        def change(folder):
            file = folder / "open_clip_config.json"
            config = json.loads(file.read_text())
            (config if part == "preprocess_cfg" else config["model_cfg"]).setdefault(part, {}).update(values)
            file.write_text(json.dumps(config))
        return change

    def reweigh(folder):
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "open_clip_model.safetensors")
        state["visual.proj"][0, 0] += 1
        save_file(state, folder / "open_clip_model.safetensors")

    changes = [
        reweigh, configure("preprocess_cfg", mean=[0.4] * 3),
        lambda folder: configure("text_cfg", tokenizer_kwargs={"clean": "canonicalize"})(folder),
    ]
    keys = [key(), *map(key, changes)]
    assert key() == keys[0] and len({*keys}) == 4
