"""anchors.py: captions by a BLIP-2 of random weights, resumed and in several processes; exact search,
damaged shards, duplicates, and test images that must not be retrieved.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import faiss
import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes, square, write_shard
from PIL import Image

import anchors
import data
import features
from core.config import parse
from core.utils import ROOT
from sets.describe import read_meta
from sets.load import load_dataset, load_run
from sets.webdataset import read_shard

RED, BLUE = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))


# -------------------------------------------------------------------------------------------------
# The captioner


@pytest.fixture(scope="module")
def blip2(tiny_blip2):
    return features.load_captioner(tiny_blip2, torch.device("cpu"))


def test_the_prompt_is_not_part_of_a_caption(blip2):
    """Against generate itself: OPT returns image tokens, start and prompt, then its own words."""
    model, processor = blip2
    inputs = processor(images=[RED, BLUE], text=["a photo of"] * 2, return_tensors="pt")
    out = model.generate(**inputs, num_beams=5, max_new_tokens=6, do_sample=False)
    assert torch.equal(out[:, :8], inputs["input_ids"]) and out.shape[1] > 8
    expected = [c.strip() for c in processor.batch_decode(out[:, 8:], skip_special_tokens=True)]
    captions = anchors.caption_images(model, processor, [RED, BLUE], "a photo of", beams=5, max_tokens=6)
    assert captions == expected and captions[0] != captions[1]
    assert not any(caption.startswith("a photo of") for caption in captions)


def test_captions_of_a_batch_are_those_of_each_image(blip2):
    model, processor = blip2
    one_by_one = [anchors.caption_images(model, processor, [x], max_tokens=6)[0] for x in (RED, BLUE)]
    assert anchors.caption_images(model, processor, [RED, BLUE], max_tokens=6) == one_by_one
    assert processor.tokenizer.padding_side == "left"


def test_a_blip2_from_before_its_image_token_gives_the_same_captions(blip2, tiny_blip2, tmp_path):
    shutil.copytree(tiny_blip2, tmp_path / "old")
    for name, key in (("processor_config", "num_query_tokens"), ("config", "image_token_index")):
        file = tmp_path / "old" / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: None}))
    old = features.load_captioner(str(tmp_path / "old"), torch.device("cpu"))
    expected = anchors.caption_images(*blip2, [RED, BLUE], max_tokens=6)
    assert anchors.caption_images(*old, [RED, BLUE], max_tokens=6) == expected


def test_prompts_of_unequal_length_are_padded_on_the_left(blip2):
    _, processor = blip2
    texts = ["a photo of", "a"]
    inputs = processor(images=[RED, BLUE], text=texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"]
    assert mask[1, -2:].tolist() == [1, 1] and mask[1].sum() == mask[0].sum() - 2


def test_the_committed_captioner_goes_through_the_same_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path in a description is relative to the repository
    _, meta = read_meta("emoji", "data")
    model, processor = features.load_captioner(meta.captioner, torch.device("cpu"))
    [text] = anchors.caption_images(model, processor, [RED])
    assert text and "<image>" not in text and "[" not in text


# -------------------------------------------------------------------------------------------------
# captions.jsonl


@pytest.fixture
def path(tiny_data, tmp_path, monkeypatch):
    """Return the path of the captions file of the tiny data set, which has captions by people."""
    monkeypatch.chdir(tmp_path)
    return tiny_data / "tiny" / "captions.jsonl"


@pytest.fixture
def says(monkeypatch):
    """says("word") replaces the captioner by one that says "word"; says(f) by f(images).

    Returns a list to which the number of images of each batch is appended.
    """

    def replace(words):
        batches = []

        def caption(model, processor, images, *decoding):
            batches.append(len(images))
            return words(images) if callable(words) else [words] * len(images)

        monkeypatch.setattr(anchors, "caption_images", caption)
        return batches

    monkeypatch.setattr(anchors, "load_captioner", lambda *arguments: (None, None))
    return replace


@pytest.fixture
def caption(tiny_data):
    """caption(flag, …) runs `anchors.py caption tiny photo` in this process; it returns the Dataset."""

    def run(*flags, captioner=("--captioner", "a captioner")):
        arguments = ["tiny", "photo", "--data", tiny_data, *captioner, *flags]
        settings, dataset = load_run(parse("", [*map(str, arguments)]))
        anchors.caption_source(settings, dataset)
        print(anchors.caption_summary(settings, dataset))
        return dataset

    return run


def rows_of(path):
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts_of(dataset, domain="photo"):
    """Return {path: caption as methods see it}."""
    items = dataset.images[domain]
    return dict(zip([location.path for location, _ in items], data.captions(dataset, items)))


def test_a_line_is_appended_for_each_image_without_a_caption(path, tiny_data, caption, says, capsys):
    before = path.read_text()
    write_rows(path, [row for row in rows_of(path) if row["path"] != "photo/dog/3.png"])
    head = path.read_text()
    batches = says("new")
    dataset = caption("--beams", 3, "--prompt", "a photo of")
    assert batches == [1] and path.read_text().startswith(head) and path.read_text() != before
    status = os.stat(tiny_data / "tiny" / "photo" / "dog" / "3.png")
    assert rows_of(path)[-1] == {
        "path": "photo/dog/3.png", "caption": "new",
        "by": "a captioner, prompt 'a photo of', beam 3, 30 tokens",
        "size": status.st_size, "time": status.st_mtime_ns,
    }
    assert texts_of(dataset)["photo/dog/3.png"] == "new"
    assert "30 captions, 30 different, 29 not by a captioner" in capsys.readouterr().out


def test_only_the_sources_images_are_captioned(path, caption, says):
    path.unlink()
    batches = says("new")
    dataset = caption("--caption-batch", 8)
    assert batches == [8, 8, 8, 6]
    assert [row["path"] for row in rows_of(path)] == [at.path for at, _ in dataset.images["photo"]]


def test_images_of_an_official_test_part_are_not_captioned(path, tiny_data, caption, says):
    path.unlink()
    (tiny_data / "tiny" / "photo_test.txt").write_text("photo/dog/3.png\nphoto/cat/1.png\n")
    says("new")
    caption()
    written = {row["path"] for row in rows_of(path)}
    assert len(written) == 28 and not written & {"photo/dog/3.png", "photo/cat/1.png"}


def test_with_all_captions_the_file_stays_and_no_captioner_is_loaded(path, caption, monkeypatch, capsys):
    monkeypatch.setattr(anchors, "load_captioner", lambda *arguments: pytest.fail("loaded"))
    before = path.read_bytes(), path.stat().st_mtime_ns
    caption()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert "warning" not in capsys.readouterr().err


def test_a_given_captioner_replaces_what_another_wrote_and_not_what_people_wrote(path, caption, says):
    says("by the first")
    write_rows(path, [row for row in rows_of(path) if row["path"].startswith("photo/dog")])
    caption()
    batches = says("by the second")
    dataset = caption(captioner=[])  # none is asked for
    assert not batches and set(texts_of(dataset).values()) >= {"by the first", "a dog number 0"}
    dataset = caption(captioner=["--captioner", "another"])
    texts = texts_of(dataset)
    assert sum(batches) == 20 and sum(text == "by the second" for text in texts.values()) == 20
    assert all(texts[f"photo/dog/{i}.png"] == f"a dog number {i}" for i in range(10))
    caption(captioner=["--captioner", "another"])
    assert sum(batches) == 20
    caption("--beams", 2, captioner=["--captioner", "another"])
    assert sum(batches) == 40


def test_flags_that_change_no_caption_are_named(path, caption, says, capsys):
    path.unlink()
    says("words")
    caption()
    capsys.readouterr()
    caption(captioner=[])
    assert "warning" not in capsys.readouterr().err
    caption("--beams", 2, captioner=[])
    [line] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "30 captions existed before" in line and "--beams" in line


@pytest.mark.parametrize("change", ["size", "time"])
def test_an_image_that_changes_is_captioned_anew(path, tiny_data, caption, says, change):
    """… unless a person has written its caption."""
    rows = rows_of(path)
    write_rows(path, [row for row in rows if row["path"] == "photo/dog/1.png"])
    says("first")
    caption()
    for name in ("1.png", "2.png"):
        image = tiny_data / "tiny" / "photo" / "dog" / name
        status = image.stat()
        if change == "size":
            image.write_bytes(square(200, 40))
            os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
        else:
            os.utime(image, ns=(0, status.st_mtime_ns + 1))
    with pytest.raises(SystemExit):  # its caption is of another image
        texts_of(load_dataset("tiny", tiny_data))
    batches = says("second")
    texts = texts_of(caption())
    assert batches == [1] and texts["photo/dog/2.png"] == "second"
    assert texts["photo/dog/1.png"] == "a dog number 1"


def test_captions_go_into_the_file_that_is_named(path, tmp_path, caption, says):
    before, own = path.read_text(), tmp_path / "folder" / "own.jsonl"
    says("new")
    dataset = caption("--captions", own)
    assert {row["caption"] for row in rows_of(own)} == {"new"} and path.read_text() == before
    assert set(texts_of(dataset).values()) == {"new"}


def test_a_misspelt_captions_file_is_refused(path, tmp_path, caption, says, capsys):
    """… instead of being written by the captioner, unless --captioner is passed as well."""
    batches = says("new")
    with pytest.raises(SystemExit) as stop:
        caption("--captions", tmp_path / "typo.jsonl", captioner=[])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "typo.jsonl: no such file" in line and "--captioner" in line
    assert not batches and not (tmp_path / "typo.jsonl").exists()


def test_out_of_memory_names_a_smaller_batch(path, caption, says, capsys):
    path.unlink()

    def full(images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    says(full)
    with pytest.raises(SystemExit) as stop:
        caption("--caption-batch", 16)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "out of memory with --caption-batch 16. Pass 4" in line


def test_empty_and_repeated_captions_are_stored_and_replaced_when_read(
    path, tiny_data, caption, says, capsys
):
    """By the class prompt, which follows a new phrase. A person's caption is taken as it is."""
    rows = rows_of(path)
    rows[0]["caption"] = "a dog a dog a dog"  # of photo/cat/0.png, by a person
    write_rows(path, rows[:1])
    words = iter(["", "red, red, red", *(f"fine {i}" for i in range(27))])
    batches = says(lambda images: [next(words) for _ in images])
    texts = texts_of(caption())
    names = [f"photo/cat/{i}.png" for i in range(4)]
    prompt = "a photo of a cat"
    assert [texts[name] for name in names] == ["a dog a dog a dog", prompt, prompt, "fine 0"]
    assert "the class prompt replaces 2 that are empty or repeat themselves" in capsys.readouterr().out
    assert [row["caption"] for row in rows_of(path)[:4]] == ["a dog a dog a dog", "", "red, red, red", "fine 0"]

    description = tiny_data / "tiny" / "dataset.json"
    description.write_text(description.read_text().replace("a photo", "a picture"))
    texts = texts_of(caption())  # no image is captioned again
    assert texts["photo/cat/1.png"] == "a picture of a cat" and len(batches) == 1


def test_an_empty_caption_by_a_person_is_filled_in(path, caption, says):
    rows = rows_of(path)
    rows[1]["caption"] = "  "
    write_rows(path, rows)
    says("new")
    assert texts_of(caption())[rows[1]["path"]] == "new"


@pytest.mark.parametrize("text, expected", [
    ("a cat a cat a cat", True), ("red, red, red", True), ("a cat and a cat", False),
    ("a b c", False), ("ha ha house", False),
])
def test_repeated_words(text, expected):
    assert data.repeats_itself(text) == expected


@pytest.mark.parametrize("half", ['{', '{"path": "photo/dog/9.png", "caption": "a d'])
def test_half_a_row_of_a_killed_run_is_removed(path, caption, says, half):
    rows = [row for row in rows_of(path) if row["path"] != "photo/dog/9.png"]
    write_rows(path, rows)
    path.write_text(path.read_text() + half)
    batches = says("new")
    dataset = caption()
    assert batches == [1] and texts_of(dataset)["photo/dog/9.png"] == "new"
    assert rows_of(path)[:-1] == rows and path.read_text().endswith("\n")


def test_a_row_without_a_line_end_stays(path, caption, says):
    rows = rows_of(path)
    write_rows(path, rows[:-1])
    path.write_text(path.read_text() + json.dumps(rows[4]))  # as an editor may leave it
    before = rows_of(path)
    says("new")
    (path.parent / "photo" / "dog" / "new.png").write_bytes(square(1))
    caption()
    assert rows_of(path)[:-1] == before and rows_of(path)[-1]["path"] == "photo/dog/new.png"


def test_a_killed_captioner_goes_on_after_its_last_batch(path, caption, says):
    path.unlink()

    def dies(images):
        if len(batches) == 3:
            raise KeyboardInterrupt
        return ["first"] * len(images)

    batches = says(dies)
    with pytest.raises(KeyboardInterrupt):
        caption("--caption-batch", 4)
    assert len(rows_of(path)) == 8
    batches = says("second")
    caption("--caption-batch", 4)
    assert sum(batches) == 22
    assert [row["caption"] for row in rows_of(path)] == ["first"] * 8 + ["second"] * 22


def test_class_folders_with_decomposed_letters_are_captioned_once(path, tiny_data, caption, says):
    """macOS stores "é" as two characters; captions name images in any form."""
    for domain in ("photo", "sketch", "cartoon"):
        folder = tiny_data / "tiny" / domain
        (folder / "dog").rename(folder / unicodedata.normalize("NFD", "chién"))
    batches = says("new")
    caption()
    texts = texts_of(caption())
    assert sum(batches) == 10 and sum(text == "new" for text in texts.values()) == 10


@pytest.mark.parametrize("batch", [2, 32])
def test_captions_on_a_full_disk_are_stored_up_to_the_last_line(path, tiny_data, caption, says, capsys, batch):
    """… also if the last batch is the one that does not fit."""
    path.unlink()
    says("w")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            caption("--caption-batch", batch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"{path}: could not be written (" in line
    stored = data.read_captions(path)
    assert 3 < len(stored) < 7
    assert all({"path", "caption", "by", "size", "time"} <= row.keys() for row in stored.values())
    batches = says("w")
    caption()
    assert sum(batches) == 30 - len(stored)


def test_an_image_that_cannot_be_read_is_named(path, tiny_data, caption, says, capsys):
    path.unlink()
    (tiny_data / "tiny" / "photo" / "dog" / "3.png").write_bytes(b"broken")
    says("new")
    with pytest.raises(SystemExit) as stop:
        caption()
    assert stop.value.code == 2
    assert "photo/dog/3.png: not a readable image" in capsys.readouterr().err


def test_a_captioner_that_does_not_exist_is_one_line(path, script, tiny_data):
    path.unlink()
    done = script("anchors.py", "caption", "tiny", "photo", "--data", tiny_data, "--captioner", "/nowhere", code=2)
    assert "--captioner /nowhere: could not be loaded" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [[], ["captions", "tiny"], ["tiny", "photo"]])
def test_the_script_needs_the_name_of_a_stage(script, arguments):
    assert "anchors.py caption|retrieve" in script("anchors.py", *arguments, code=2).stderr
    assert "--captioner" in script("anchors.py", "caption", "--help").stdout


# -------------------------------------------------------------------------------------------------
# Retrieval


@pytest.mark.parametrize("n_queries", [7, 399, 400])
def test_few_queries_and_many_find_the_same(n_queries):
    """… by matrix products and by FAISS; of equal cosines, also below 0, the lower id is first."""
    generator = torch.Generator().manual_seed(0)
    queries, pool = (F.normalize(torch.randn(n, 16, generator=generator)) for n in (n_queries, 900))
    scores, ids = anchors.search(queries, [pool[:500], pool[500:]], 5)
    index = faiss.IndexFlatIP(16)
    index.add(pool.numpy())
    expected_scores, expected_ids = index.search(queries.numpy(), 5)
    assert ids.eq(torch.from_numpy(expected_ids)).float().mean() > 0.999  # rounding may swap two
    assert torch.allclose(scores, torch.from_numpy(expected_scores), atol=1e-6)
    twins = torch.full((9, 16), 0.25)  # cosines without rounding
    for query in (twins[:1], -twins[:1]):
        assert anchors.top_k(query, twins, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_the_search_is_exact_and_shards_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    pool, queries = (F.normalize(torch.randn(n, 24, generator=generator), dim=1) for n in (1000, 600))
    expected = (queries @ pool.T).topk(7)
    for few in (queries, queries[:50]):
        scores, ids = anchors.search(few, [pool], 7)
        assert torch.equal(ids, expected.indices[:len(few)])
        assert torch.allclose(scores, expected.values[:len(few)], atol=1e-6)
        for parts in (pool.split(90), [pool[:3], pool[3:3], pool[3:]]):
            assert torch.equal(anchors.search(few, parts, 7)[1], ids)
        assert anchors.search(few, [pool[:3], pool[3:5]], 7)[1].shape == (len(few), 5)


def test_what_is_damaged_in_a_shard_is_left_out_and_named(tmp_path):
    path = tmp_path / "00000.tar"
    members = {"a.png": square(0), "a.txt": b"a", "b.jpg": b"broken", "b.txt": b"b"}
    members |= {"c.png": square(1), "d.txt": b"no image", "e.png": square(2), "e.txt": b"e"}
    write_shard(path, {**members, "e.json": b"{", "f.png": square(3), "f.txt": b"f"})
    pairs, damages = read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "b", "e", "f"]
    assert any("e.json" in line for line in damages)
    assert any("00000.tar: c (no text)" in line for line in damages)
    with tarfile.open(path) as tar:
        header, offset = tar.getmember("b.jpg").offset, tar.getmember("f.png").offset_data
    content = path.read_bytes()
    # tarfile would take this for the end
    path.write_bytes(content[:header] + b"?" * 512 + content[header + 512:])
    pairs, damages = read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "e", "f"]
    assert any(f"byte {header} (damaged header)" in line for line in damages)
    path.write_bytes(content[:offset + 20])  # a download that broke off
    pairs, damages = read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "b", "e"]
    assert any("00000.tar" in line and "what follows" in line for line in damages)


@pytest.fixture
def retrieve(tiny_data, tiny_pool, tiny_clip, tmp_path, monkeypatch):
    """retrieve(flag, …) retrieves pairs for tiny's photos; it returns (content, settings, dataset, clip).

    To random weights all images are much alike, so that test images are told by a cosine near 1.
    """
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        common = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--pool", tiny_pool]
        common += ["--run", tmp_path / "runs" / "run", "--same", 0.99999]
        settings, dataset = load_run(parse("", [*map(str, [*common, *flags])]))
        clip = features.load_clip(settings)
        return anchors.retrieve_pairs(settings, dataset, clip), settings, dataset, clip

    return run


def pool_features(clip, pool):
    """Return (texts, features) of all pairs of a pool, in the order of its shards."""
    pairs = [pair for shard in sorted(pool.glob("*.tar")) for pair in read_shard(shard)[0]]
    z = features.encode_images(clip, [(location, 0) for _, location, _, _ in pairs])
    return [text for _, _, text, _ in pairs], z


@pytest.mark.parametrize("k", [1, 3])
def test_each_image_of_the_source_gets_its_k_nearest_pairs(retrieve, tiny_pool, k):
    content, _, dataset, clip = retrieve("--k", k)
    texts, z_pool = pool_features(clip, tiny_pool)
    z = features.encode_images(clip, dataset.images["photo"])
    scores, ids = (z @ z_pool.T).topk(k)
    expected = {}
    for (location, _), row_scores, row in zip(dataset.images["photo"], scores, ids):
        for score, i in zip(row_scores.tolist(), row.tolist()):
            expected.setdefault(texts[i], {})[location.path] = pytest.approx(score, abs=2e-3)
    assert {pair["text"]: pair["queries"] for pair in content["pairs"]} == expected
    assert content["counts"] == {"available": 40, "damaged": 0, "retrieved": len(expected)}


def test_class_prompts_can_be_the_queries(retrieve, tiny_pool):
    content, settings, dataset, clip = retrieve("--query", "text", "--k", 2)
    texts, z_pool = pool_features(clip, tiny_pool)
    names = ["a photo of a cat", "a photo of a dog", "a photo of a red house"]
    ids = (features.encode_texts(clip, names) @ z_pool.T).topk(2).indices
    expected = {}
    for folder, row in zip(["cat", "dog", "red_house"], ids.tolist()):
        for i in row:
            expected.setdefault(texts[i], set()).add(folder)
    assert {pair["text"]: {*pair["queries"]} for pair in content["pairs"]} == expected
    few = anchors.pairs_of(settings, dataset, clip, dataset.images["photo"][:1])
    assert len(few) == len(content["pairs"])  # a class's pairs belong to every seed


def test_test_images_and_duplicates_are_left_out(retrieve, tiny_data, tiny_pool, capsys):
    """The pool has a photo, a sketch and an unseen image, an image twice, and a file that is none."""
    unseen = tiny_data / "unseen"
    for domain in ("photo", "sketch", "cartoon"):
        (unseen / domain / "fox").mkdir(parents=True)
        (unseen / domain / "fox" / "0.png").write_bytes(square(500 + len(domain)))
    phrases = {"photo": "a photo", "sketch": "a sketch", "cartoon": "a cartoon"}
    (unseen / "dataset.json").write_text(json.dumps({"phrases": phrases}))
    description = tiny_data / "tiny" / "dataset.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), "unseen": "unseen"}))
    leaks = {
        "photo": tiny_data / "tiny" / "photo" / "dog" / "3.png",
        "sketch": tiny_data / "tiny" / "sketch" / "dog" / "3.png",
        "fox": unseen / "cartoon" / "fox" / "0.png",
    }
    members = {"bad.png": b"?", "bad.txt": b"bad", "twice.png": square(0), "twice.txt": b"again"}
    for name, path in leaks.items():
        members |= {f"{name}.png": path.read_bytes(), f"{name}.txt": b"a leak"}
    write_shard(tiny_pool / "00002.tar", members)
    content, settings, dataset, clip = retrieve("--k", 44)
    texts = [pair["text"] for pair in content["pairs"]]
    assert "a leak" not in texts and "again" not in texts and len({*texts}) == len(texts) == 40
    assert content["counts"] == {
        "available": 44, "damaged": 1, "retrieved": 40, "also a test image": 3, "found twice": 1,
    }
    assert "damaged: 00002.tar: bad (of no known format)" in capsys.readouterr().err
    first = next(pair for pair in content["pairs"] if pair["text"] == "a thing 0000")
    assert first["queries"].keys() == {at.path for at, _ in dataset.images["photo"]}  # k is all
    location = anchors.pair_location(settings, dataset, first)
    assert location.read() == square(0)  # nothing was copied
    [record] = anchors.pair_records(settings, dataset, clip)
    assert record["kind"] == "pairs" and record["values"] == content["counts"] and record["n"] == 44


def test_new_classes_are_test_images_of_the_pool_too(five_classes, retrieve, tiny_pool):
    """With --base-to-new their images are left out, and retrieve nothing."""
    photo = (five_classes / "tiny" / "photo" / "owl" / "3.png").read_bytes()
    write_shard(tiny_pool / "00002.tar", {"owl.png": photo, "owl.txt": b"a leak"})
    content, *_ = retrieve("--k", 41, "--base-to-new")
    assert "a leak" not in [pair["text"] for pair in content["pairs"]]
    assert content["counts"]["also a test image"] == 1
    queries = {query for pair in content["pairs"] for query in pair["queries"]}
    assert {query.split("/")[1] for query in queries} == {"cat", "cow", "dog"}


def test_a_pool_of_test_images_is_refused(retrieve, tiny_data, tmp_path, capsys):
    photo = (tiny_data / "tiny" / "photo" / "dog" / "3.png").read_bytes()
    write_shard(tmp_path / "leaks" / "00000.tar", {"a.png": photo, "a.txt": b"a leak"})
    with pytest.raises(SystemExit) as stop:
        retrieve("--pool", tmp_path / "leaks")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "no pair to train on (1 available" in line and "1 also a test image" in line
    assert not [*(tmp_path / "runs" / "run").rglob("*.json")]


def test_a_shard_is_embedded_once(retrieve, tiny_data, tiny_pool, monkeypatch):
    """… whatever k, the test images and the pool's folder are; and again if it changes itself."""
    shards, image_batches = [], anchors.image_batches

    def recorded(keys, *arguments):
        keys = [*keys]
        shards.append(Path(keys[0][0][0].path).name)
        return image_batches(keys, *arguments)

    monkeypatch.setattr(anchors, "image_batches", recorded)
    first, *_ = retrieve()
    retrieve("--k", 3)
    retrieve("--query", "text")
    (tiny_data / "tiny" / "sketch" / "cat" / "0.png").write_bytes(square(7))
    retrieve()
    shutil.copytree(tiny_pool, tiny_pool.parent / "moved")
    moved, settings, dataset, _ = retrieve("--pool", "moved")  # relative to this folder
    assert sorted(shards) == ["00000.tar", "00001.tar"] and moved == first
    assert anchors.pair_location(settings, dataset, moved["pairs"][0]).folder.endswith("moved")
    write_shard(tiny_pool / "00001.tar", {"new.png": square(300), "new.txt": b"new"})
    assert retrieve("--k", 50)[0]["counts"]["available"] == 21
    assert sorted(shards) == ["00000.tar", "00001.tar", "00001.tar"]


def test_a_seed_trains_on_the_pairs_of_its_own_images(retrieve, tiny_pool, capsys):
    content, settings, dataset, clip = retrieve("--k", 2)
    image = dataset.images["photo"][4]
    own = anchors.pairs_of(settings, dataset, clip, [image])
    expected = [pair["text"] for pair in content["pairs"] if image[0].path in pair["queries"]]
    assert [text for _, text in own] == expected and 1 <= len(own) <= 2 < len(content["pairs"])
    by_key = {text: location.read() for _, location, text, _ in
              [pair for shard in tiny_pool.glob("*.tar") for pair in read_shard(shard)[0]]}
    assert all(location.read() == by_key[text] and location.open().size == (16, 16) for location, text in own)
    with pytest.raises(SystemExit):
        anchors.pairs_of(settings, dataset, clip, [])
    assert "no retrieved pair belongs to these training images" in capsys.readouterr().err


def test_half_precision_does_not_hide_a_test_image(tmp_path, tiny_clip, tiny_pool, retrieve):
    """Stored features are half precision, rounded to unit norm again, so that 0.99999 is reached."""
    _, _, _, clip = retrieve()
    z = anchors.embed_shard(clip, tiny_pool / "00000.tar", tmp_path / "features")["z"]
    _, exact = pool_features(clip, tiny_pool)
    cosines = (z * exact[:20]).sum(1)
    assert z.dtype == torch.float32 and torch.allclose(z.norm(dim=1), torch.ones(20), atol=1e-6)
    assert cosines.min() > 0.99999


# -------------------------------------------------------------------------------------------------
# Several processes


def run_as_script(*arguments):
    sys.argv = ["anchors.py", *map(str, arguments)]
    anchors.main()


def test_two_processes_store_what_one_stores(path, tiny_data, tiny_pool, tiny_clip, tiny_blip2, tmp_path):
    """The same captions and the same pairs; and torchrun finds that all of them exist."""
    path.unlink()
    common = ["tiny", "photo", "--data", tiny_data]
    captioning = ["caption", *common, "--captioner", tiny_blip2, "--caption-batch", 4, "--max-tokens", 5]
    retrieval = ["retrieve", *common, "--model", tiny_clip, "--pool", tiny_pool]
    retrieval += ["--same", 0.99999, "--k", 2, "--run"]
    run_as_script(*captioning)
    run_as_script(*retrieval, tmp_path / "one" / "run")
    rows = rows_of(path)
    path.unlink()
    in_processes(2, run_as_script, *captioning)
    in_processes(2, run_as_script, *retrieval, tmp_path / "two" / "run")
    assert sorted(map(str, rows)) == sorted(map(str, rows_of(path))) and len(rows) == 30
    [one], [two] = ([*(tmp_path / name / "run" / "pairs").iterdir()] for name in ("one", "two"))
    assert one.name == two.name and one.read_bytes() == two.read_bytes()
    features = {file.name for file in (tmp_path / "one" / ".features").iterdir()}
    assert features == {file.name for file in (tmp_path / "two" / ".features").iterdir()}


def test_torchrun_captions_in_each_process(path, tiny_data, tiny_blip2):
    """… after half a row of a killed run, which one of them removes."""
    rows = rows_of(path)
    write_rows(path, rows[:5])
    path.write_text(path.read_text() + '{"path": "photo/d')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    command += [ROOT / "anchors.py", "caption", "tiny", "photo", "--data", tiny_data]
    command += ["--captioner", tiny_blip2, "--max-tokens", 5]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(path)) == 30 and done.stdout.count("25 of 30 captions are missing") == 1
