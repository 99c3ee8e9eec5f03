"""anchors.py: the BLIP-2 path with random weights, resuming, several processes, damaged shards,
exact search, leaks.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes, square, write_shard
from PIL import Image

import anchors
import batches
import data
from report import results
from sets import folders
from sets.webdataset import read_shard

ROOT = Path(__file__).resolve().parent.parent
RED, BLUE = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # run folders that are not named come to lie here


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["anchors.py", *map(str, arguments)])
    anchors.main()


def refusal(capsys, *call_arguments):
    with pytest.raises(SystemExit) as stop:
        call(*call_arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


# -------------------------------------------------------------------------------------------------
# Captions


@pytest.fixture(scope="module")
def blip2(tiny_blip2):
    return anchors.load_captioner(tiny_blip2, torch.device("cpu"))


def test_the_prompt_is_sliced_off(blip2):
    """Against generate itself: OPT returns image tokens, start and prompt, then what it says."""
    model, processor = blip2
    inputs = processor(images=[RED, BLUE], text=["a photo of"] * 2, return_tensors="pt")
    out = model.generate(**inputs, num_beams=5, max_new_tokens=6, do_sample=False)
    assert torch.equal(out[:, :8], inputs["input_ids"]) and out.shape[1] > 8
    expected = [c.strip() for c in processor.batch_decode(out[:, 8:], skip_special_tokens=True)]
    got = anchors.caption_images(model, processor, [RED, BLUE], "a photo of", beams=5, max_tokens=6)
    assert got == expected and got[0] != got[1] and not any(c.startswith("a photo of") for c in got)


def test_a_batch_says_what_each_image_alone_says(blip2):
    model, processor = blip2
    alone = [anchors.caption_images(model, processor, [x], max_tokens=6)[0] for x in (RED, BLUE)]
    assert anchors.caption_images(model, processor, [RED, BLUE], max_tokens=6) == alone
    assert processor.tokenizer.padding_side == "left"


def test_a_blip2_from_before_its_image_token_says_the_same(blip2, tiny_blip2, tmp_path):
    shutil.copytree(tiny_blip2, tmp_path / "old")
    for name, key in (("processor_config", "num_query_tokens"), ("config", "image_token_index")):
        file = tmp_path / "old" / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: None}))
    old = anchors.load_captioner(str(tmp_path / "old"), torch.device("cpu"))
    said = anchors.caption_images(*blip2, [RED, BLUE], max_tokens=6)
    assert anchors.caption_images(*old, [RED, BLUE], max_tokens=6) == said


def test_prompts_of_unequal_length_are_padded_on_the_left(blip2):
    _, processor = blip2
    texts = ["a photo of", "a"]
    inputs = processor(images=[RED, BLUE], text=texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"]
    assert mask[1, -2:].tolist() == [1, 1] and mask[1].sum() == mask[0].sum() - 2


def test_the_committed_captioner_goes_through_the_same_code():
    meta = folders.read_meta("emoji", "data")[1]
    # a path of a description's is the repository's, wherever one stands
    model, processor = anchors.load_captioner(meta.captioner, torch.device("cpu"))
    [text] = anchors.caption_images(model, processor, [RED])
    assert text and "<image>" not in text and "[" not in text


@pytest.mark.parametrize("text, does", [
    ("a cat a cat a cat", True), ("red, red, red", True), ("a cat and a cat", False),
    ("a b c", False), ("ha ha house", False),
])
def test_repeats_itself(text, does):
    assert anchors.repeats_itself(text) == does


def captions_of(tiny_data):
    rows = data.read_captions(tiny_data / "tiny" / "captions.jsonl")
    return {path: row["caption"] for path, row in rows.items()}


def test_captions_of_the_source_resume_after_a_kill(tiny_data, tiny_blip2, monkeypatch, capsys):
    """A killed run left whole lines and half a line; what is there is not said again, and the
    outcome is the same.
    """
    path = tiny_data / "tiny" / "captions.jsonl"
    common = ["caption", "tiny", "photo", "--data", tiny_data, "--captioner", tiny_blip2]
    common += ["--caption-batch", 4, "--max-tokens", 5]
    path.unlink()
    call(monkeypatch, *common)
    whole = captions_of(tiny_data)
    photos = data.load("tiny", tiny_data).images["photo"]
    assert sorted(whole) == [location.path for location, _ in photos]  # no target image was read

    path.unlink()
    said, true_call = [], anchors.caption_images

    def dies(model, processor, images, *rest):
        if len(said) == 3:
            raise KeyboardInterrupt
        said.append(len(images))
        return true_call(model, processor, images, *rest)

    monkeypatch.setattr(anchors, "caption_images", dies)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, *common)
    assert not path.exists()
    [part] = path.parent.glob(".captions.jsonl.part*")
    part.write_text(part.read_text() + '{"path": "photo/d')
    monkeypatch.setattr(
        anchors, "caption_images", lambda *a: said.append(len(a[2])) or true_call(*a)
    )
    call(monkeypatch, *common)
    assert captions_of(tiny_data) == whole and sum(said) == 30 and not part.exists()
    # a run script goes on for hours: others may caption
    assert path.with_name(".captions.jsonl.lock") not in anchors.utils.LOCKS
    stamp = path.stat().st_mtime_ns
    call(monkeypatch, *common)
    assert path.stat().st_mtime_ns == stamp and sum(said) == 30


def test_captions_of_other_origin_stay_and_another_captioners_are_made_again(
    tiny_data, tiny_blip2, monkeypatch, capsys
):
    path = tiny_data / "tiny" / "captions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["by"], rows[1]["caption"] = "another captioner", " "
    data.write_rows(path, [row for row in rows if row["path"] != "photo/dog/3.png"])
    monkeypatch.setattr(anchors, "caption_images", lambda m, p, images, *_: ["new"] * len(images))
    call(monkeypatch, "caption", "tiny", "photo", "--data", tiny_data, "--captioner", tiny_blip2)
    new = {path for path, caption in captions_of(tiny_data).items() if caption == "new"}
    assert new == {rows[0]["path"], rows[1]["path"], "photo/dog/3.png"}
    assert "27 not by a captioner" in capsys.readouterr().out


def test_an_image_that_changes_is_captioned_anew(tiny_data, tiny_blip2, monkeypatch):
    """… but for a caption that people wrote."""
    path, images = tiny_data / "tiny" / "captions.jsonl", tiny_data / "tiny" / "photo" / "dog"
    people = captions_of(tiny_data)["photo/dog/1.png"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    data.write_rows(path, [row for row in rows if row["path"] == "photo/dog/1.png"])
    for word in ("first", "second"):
        monkeypatch.setattr(anchors, "caption_images", lambda m, p, images, *_, w=word: [w] * len(images))
        call(monkeypatch, "caption", "tiny", "photo", "--data", tiny_data, "--captioner", tiny_blip2)
        for name in ("1.png", "2.png"):
            (images / name).write_bytes(square(200, 40))
    new = {path for path, caption in captions_of(tiny_data).items() if caption == "second"}
    assert new == {"photo/dog/2.png"} and captions_of(tiny_data)["photo/dog/1.png"] == people


def test_without_a_captioner_asked_for_all_captions_stay(tiny_data, monkeypatch, capsys):
    path = tiny_data / "tiny" / "captions.jsonl"
    before = path.read_text().replace('"}', '", "by": "a better captioner, beam 9"}')
    path.write_text(before)
    common = ["caption", "tiny", "photo", "--data", tiny_data]
    call(monkeypatch, *common)  # BLIP-2 is not even loaded
    assert path.read_text() == before and "warning" not in capsys.readouterr().err
    call(monkeypatch, *common, "--beams", 2)
    [said] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "--beams" in said and "30 captions" in said and path.read_text() == before


def test_captions_go_into_the_file_that_is_named(tiny_data, tiny_blip2, monkeypatch):
    before, path = captions_of(tiny_data), tiny_data / "mine.jsonl"
    monkeypatch.setattr(anchors, "caption_images", lambda m, p, images, *_: ["new"] * len(images))
    common = ["caption", "tiny", "photo", "--data", tiny_data, "--captioner", tiny_blip2]
    call(monkeypatch, *common, "--captions", path)
    assert {row["caption"] for row in data.read_captions(path).values()} == {"new"}
    assert captions_of(tiny_data) == before


def test_nothing_is_done_for_methods_that_need_nothing(tiny_data, monkeypatch):
    (tiny_data / "tiny" / "captions.jsonl").unlink()
    common = ["tiny", "photo", "--data", tiny_data, "--methods"]
    call(monkeypatch, "caption", *common, "finetune", "lads")
    call(monkeypatch, "retrieve", *common, "flyp+captions", "--pool", "/nowhere")
    assert not (tiny_data / "tiny" / "captions.jsonl").exists()


def test_empty_and_repeated_captions_are_the_class_prompt_and_counted(
    tiny_data, tiny_blip2, monkeypatch, capsys
):
    (tiny_data / "tiny" / "captions.jsonl").unlink()
    said = iter(["", "a dog a dog a dog", *["fine"] * 28])
    monkeypatch.setattr(
        anchors, "caption_images", lambda m, p, images, *rest: [next(said) for _ in images]
    )
    call(monkeypatch, "caption", "tiny", "photo", "--data", tiny_data, "--captioner", tiny_blip2)
    got = [captions_of(tiny_data)[f"photo/cat/{i}.png"] for i in range(3)]
    assert got == ["a photo of a cat", "a photo of a cat", "fine"]
    counts = "the class prompt instead of 2 that were empty or repeated themselves"
    assert counts in capsys.readouterr().out


def as_script(*arguments):
    sys.argv = ["anchors.py", *map(str, arguments)]
    anchors.main()


def test_two_processes_write_what_one_writes(
    tiny_data, tiny_pool, tiny_clip, tiny_blip2, tmp_path, monkeypatch
):
    """The same captions.jsonl, the same retrieved pairs; and torchrun finds all as it is."""
    path = tiny_data / "tiny" / "captions.jsonl"
    path.unlink()
    common = ["tiny", "photo", "--data", tiny_data]
    write = ["caption", *common, "--captioner", tiny_blip2]
    write += ["--caption-batch", 4, "--max-tokens", 5]
    find = ["retrieve", *common, "--model", tiny_clip, "--pool", tiny_pool]
    find += ["--same", 0.99999, "--k", 2, "--run"]
    call(monkeypatch, *write)
    call(monkeypatch, *find, tmp_path / "one" / "run")
    one = path.read_text()
    path.unlink()
    anchors.utils.LOCKS.clear()  # as if this process had ended
    in_processes(2, as_script, *write)
    in_processes(2, as_script, *find, tmp_path / "two" / "run")
    assert path.read_text() == one
    pairs = Path("run", "retrieved.jsonl")
    assert (tmp_path / "one" / pairs).read_text() == (tmp_path / "two" / pairs).read_text()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--", ROOT / "anchors.py", *write]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("30 captions") == 1, done.stderr


def test_a_captioner_that_is_not_there_is_one_line(tiny_data, monkeypatch, capsys):
    (tiny_data / "tiny" / "captions.jsonl").unlink()
    common = ["caption", "tiny", "photo", "--data", tiny_data]
    said = refusal(capsys, monkeypatch, *common, "--captioner", "/nowhere")
    assert "--captioner /nowhere: could not be loaded" in said.splitlines()[-1]


# -------------------------------------------------------------------------------------------------
# Retrieval


def test_faiss_finds_what_a_matrix_product_finds_and_shards_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    pool, many = (F.normalize(torch.randn(n, 24, generator=generator), dim=1) for n in (1000, 600))
    expected = (many @ pool.T).topk(7)
    for queries in (many, many[:50]):  # by FAISS, and by a product
        scores, ids = anchors.search(queries, [pool], 7)
        assert torch.equal(ids, expected.indices[:len(queries)])
        assert torch.allclose(scores, expected.values[:len(queries)], atol=1e-6)
        for parts in (pool.split(90), [pool[:3], pool[3:3], pool[3:]]):
            assert torch.equal(anchors.search(queries, parts, 7)[1], ids)
        assert anchors.search(queries, [pool[:3], pool[3:5]], 7)[1].shape == (len(queries), 5)


def test_what_is_damaged_is_skipped_and_named(tmp_path):
    path = tmp_path / "00000.tar"
    members = {"a.png": square(0), "a.txt": b"a", "b.jpg": b"broken", "b.txt": b"b"}
    members |= {"c.png": square(1), "d.txt": b"no image", "e.png": square(2), "e.txt": b"e"}
    write_shard(path, {**members, "e.json": b"{", "f.png": square(3), "f.txt": b"f"})
    pairs, bad = read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "b", "e", "f"]
    assert len(bad) == 2 and "e.json" in bad[0] and "00000.tar: c (no text)" in bad[1]
    with tarfile.open(path) as tar:
        header, offset = tar.getmember("b.jpg").offset, tar.getmember("f.png").offset_data
    whole = path.read_bytes()
    # tarfile would take this for the end
    path.write_bytes(whole[:header] + b"?" * 512 + whole[header + 512:])
    pairs, bad = read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "e", "f"]
    assert any(f"byte {header} (damaged header)" in name for name in bad)
    path.write_bytes(whole[:offset + 20])  # a download that broke off
    pairs, bad = read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "b", "e"]
    assert any("00000.tar after" in name for name in bad)


def retrieved(run):
    """{text: row} of a run's retrieved pairs."""
    _, *rows = map(json.loads, (run / "retrieved.jsonl").read_text().splitlines())
    return {row["text"]: row for row in rows}


@pytest.fixture
def find(tiny_data, tiny_pool, tiny_clip, tmp_path):
    """The command that retrieves for tiny's photos, into tmp_path / "run"."""
    command = ["retrieve", "tiny", "photo", "--data", tiny_data, "--model", tiny_clip]
    # to random weights all images are much alike
    return [*command, "--pool", tiny_pool, "--run", tmp_path / "run", "--same", 0.99999]


def test_retrieval_keeps_benchmark_images_and_duplicates_out(
    tiny_data, tiny_pool, find, tmp_path, monkeypatch, capsys
):
    """The pool holds a photo and a sketch of the benchmark, one image twice, and no image."""
    dogs = [tiny_data / "tiny" / domain / "dog" / "3.png" for domain in ("photo", "sketch")]
    photo, sketch = (path.read_bytes() for path in dogs)
    extra = {"leak.png": photo, "leak.txt": b"a leak", "other.png": sketch, "other.txt": b"a leak"}
    extra |= {"bad.png": b"?", "bad.txt": b"bad", "twice.png": square(0), "twice.txt": b"again"}
    write_shard(tiny_pool / "00002.tar", extra)
    call(monkeypatch, *find, "--k", 43)
    out, err = capsys.readouterr()
    assert "damaged: 00002.tar: bad (not a readable image)" in err
    assert "43 available, 1 damaged" in out
    found = retrieved(tmp_path / "run")
    assert "a leak" not in found and "again" not in found and "a thing 0000" in found
    rows = {row["measure"]: row["value"] for row in results.read(tmp_path / "run")}
    assert rows["available"] == 43 and rows["damaged"] == 1
    assert rows["retrieved"] == len(found) == 40
    assert rows["also a benchmark image"] == 2 and rows["found twice"] == 1

    first, photos = found["a thing 0000"], data.load("tiny", tiny_data).images["photo"]
    assert first["queries"].keys() == {location.path for location, _ in photos}  # k is all
    assert first["json"] == {"key": "0000"}  # what the pool knew of it
    image = data.Location("", first["path"], first["offset"], first["size"])
    assert Path(first["path"]).is_absolute() and image.read() == square(0)  # nothing was copied


def test_a_pool_of_benchmark_images_fails_where_it_is_searched(
    tiny_data, find, tmp_path, monkeypatch, capsys
):
    photo = (tiny_data / "tiny" / "photo" / "dog" / "3.png").read_bytes()
    write_shard(tmp_path / "leaks" / "00000.tar", {"a.png": photo, "a.txt": b"a leak"})
    said = refusal(capsys, monkeypatch, *find, "--pool", tmp_path / "leaks")
    assert "no pair to train on (1 available" in said and "1 also a benchmark image" in said
    assert not (tmp_path / "run" / "retrieved.jsonl").exists()


def test_retrieval_embeds_once_and_searches_again_for_another_k(
    tiny_data, find, tmp_path, monkeypatch, capsys
):
    run, read, true_read = tmp_path / "run", [], anchors.image_batches
    monkeypatch.setattr(anchors, "image_batches", lambda *a: read.append(a[0]) or true_read(*a))
    call(monkeypatch, *find)
    stamp, few = (run / "retrieved.jsonl").stat().st_mtime_ns, len(retrieved(run))
    capsys.readouterr()
    call(monkeypatch, *find)
    assert (run / "retrieved.jsonl").stat().st_mtime_ns == stamp
    assert "is there already" in capsys.readouterr().out
    call(monkeypatch, *find, "--k", 3)
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, *find, "--k", 3, "--pool", "pool")  # the same, which finetune.py compares by name
    assert batches.read_retrieved(run)[0]["pool"] == "pool"
    # another benchmark: to be checked anew
    (tiny_data / "tiny" / "sketch" / "cat" / "0.png").write_bytes(square(7))
    call(monkeypatch, *find, "--k", 3)
    assert "already" not in capsys.readouterr().out
    shards = [items for items in read if items[0][0].file.endswith(".tar")]
    assert len(shards) == 2 and len(retrieved(run)) > few  # two shards, each once
    call(monkeypatch, *find, "--query", "text")
    queries = {query for row in retrieved(run).values() for query in row["queries"]}
    assert queries <= {"cat", "dog", "red_house"}


def test_a_seed_trains_on_what_its_own_training_images_found(tiny_data, tmp_path, capsys):
    dataset = data.load("tiny", tiny_data)
    photos = {location.path: (location, y) for location, y in dataset.images["photo"]}
    zero, one, two = (f"photo/cat/{i}.png" for i in range(3))
    queries = [{zero: 0.9}, {one: 0.8}, {zero: 0.7, one: 0.9}, {"dog": 0.5}]
    members = {}
    for i in range(4):
        members |= {f"{i}.png": square(i), f"{i}.txt": b"text %d" % i}
    write_shard(tmp_path / "pool.tar", members)
    rows = [
        {
            "path": at.file, "offset": at.offset, "size": at.size, "text": text, "queries": q,
            "sha256": hashlib.sha256(at.read()).hexdigest(),
        }
        for (_, at, text, _), q in zip(read_shard(tmp_path / "pool.tar")[0], queries)
    ]
    data.write_rows(tmp_path / "retrieved.jsonl", [{"config_hash": "", "retrieved": 4}, *rows])
    config = SimpleNamespace(run=tmp_path)
    got = batches.load_retrieved(config, dataset, [photos[one]])
    assert [text for _, text in got] == ["text 1", "text 2", "text 3"]
    assert got[0][0].open().size == (16, 16)
    other = SimpleNamespace(run=tmp_path / "other", k=3)
    for reason in ("is not there", "no pair for these"):
        with pytest.raises(SystemExit):
            batches.load_retrieved(other, dataset, [photos[two]])
        assert reason in capsys.readouterr().err
        data.write_rows(other.run / "retrieved.jsonl", [{"made_with": {"k": 3}, "retrieved": 2}, *rows[:2]])
    other.k = 5  # finetune.py alone, with another flag than anchors.py had
    with pytest.raises(SystemExit):
        batches.load_retrieved(other, dataset, [photos[zero]])
    assert "retrieved.jsonl was made with --k 3. Say so" in capsys.readouterr().err
    data.write_rows(other.run / "retrieved.jsonl", [{"made_with": {"k": 5}, "retrieved": 3}, *rows[:3]])
    assert len(batches.load_retrieved(other, dataset, [photos[zero]])) == 2  # of what is there now
    others = {f"{i}.png": members[f"{3 - i}.png"] for i in range(4)}
    write_shard(tmp_path / "pool.tar", {**members, **others})  # as long as before, with other pairs
    with pytest.raises(SystemExit):
        batches.load_retrieved(other, dataset, [photos[zero]])
    assert "pool.tar is not what" in capsys.readouterr().err
    (tmp_path / "pool.tar").unlink()
    with pytest.raises(SystemExit):
        batches.load_retrieved(other, dataset, [photos[zero]])
    assert "pool.tar, a shard of the pool: No such file or directory. Put it back" in capsys.readouterr().err
    lost = tmp_path / "lost" / "retrieved.jsonl"
    lost.parent.mkdir()
    data.write_rows(lost, [{"retrieved": 4}, *rows[:3]])
    with pytest.raises(SystemExit):
        batches.load_retrieved(SimpleNamespace(run=lost.parent), dataset, [photos[zero]])
    assert f"{lost} is damaged" in capsys.readouterr().err


def test_no_pool_is_one_line(tiny_data, tiny_clip, tmp_path, monkeypatch, capsys):
    common = ["retrieve", "tiny", "photo", "--data", tiny_data, "--run", tmp_path / "run"]
    said = refusal(capsys, monkeypatch, *common)
    assert "could not fetch pixparse/cc3m-wds" in said and "data/cc3m by hand" in said
    said = refusal(capsys, monkeypatch, *common, "--pool", tmp_path / "empty")
    assert "empty: no webdataset shards there" in said
