"""anchors.py: the BLIP-2 path with random weights, resuming, several processes, damaged shards, exact search, leaks."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import square, write_shard
from PIL import Image

import anchors
import data

ROOT = Path(__file__).resolve().parent.parent
RED, BLUE = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["anchors.py", *map(str, arguments)])
    anchors.main()


def refusal(capsys, *call_arguments):
    with pytest.raises(SystemExit) as stop:
        call(*call_arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Captions


@pytest.fixture(scope="module")
def blip2(tiny_blip2):
    return anchors.load_captioner(tiny_blip2, torch.device("cpu"))


def test_the_prompt_is_sliced_off(blip2):
    """Against generate itself: OPT returns image tokens, start and prompt, and then what it says."""
    model, processor = blip2
    inputs = processor(images=[RED, BLUE], text=["a photo of"] * 2, return_tensors="pt")
    out = model.generate(**inputs, num_beams=5, max_new_tokens=6, do_sample=False)
    assert torch.equal(out[:, :8], inputs["input_ids"]) and out.shape[1] > 8
    expected = [c.strip() for c in processor.batch_decode(out[:, 8:], skip_special_tokens=True)]
    got = anchors.caption_images(model, processor, [RED, BLUE], "a photo of", beams=5, max_tokens=6)
    assert got == expected and got[0] != got[1] and not any(c.startswith("a photo of") for c in got)


def test_a_batch_says_what_each_image_alone_says(blip2):
    model, processor = blip2
    alone = [anchors.caption_images(model, processor, [image], max_tokens=6)[0] for image in (RED, BLUE)]
    assert anchors.caption_images(model, processor, [RED, BLUE], max_tokens=6) == alone
    assert processor.tokenizer.padding_side == "left"


def test_prompts_of_unequal_length_are_padded_on_the_left(blip2):
    _, processor = blip2
    mask = processor(images=[RED, BLUE], text=["a photo of", "a"], padding=True, return_tensors="pt")["attention_mask"]
    assert mask[1, -2:].tolist() == [1, 1] and mask[1].sum() == mask[0].sum() - 2


def test_the_committed_captioner_goes_through_the_same_code():
    model, processor = anchors.load_captioner(str(ROOT / "emoji_captioner"), torch.device("cpu"))
    [text] = anchors.caption_images(model, processor, [RED])
    assert text and "<image>" not in text and "[" not in text


@pytest.mark.parametrize("text, does", [
    ("a cat a cat a cat", True), ("red, red, red", True), ("a cat and a cat", False), ("a b c", False), ("ha ha house", False),
])
def test_repeats_itself(text, does):
    assert anchors.repeats_itself(text) == does


def captions_of(tiny_data):
    return {p: r["caption"] for p, r in data.read_captions(tiny_data / "tiny" / "captions.jsonl").items()}


def test_captions_of_the_source_resume_after_a_kill(tiny_data, tiny_blip2, monkeypatch, capsys):
    """A killed run left whole lines and half a line; what is there is not said again, and the outcome is the same."""
    path = tiny_data / "tiny" / "captions.jsonl"
    common = ["caption", "tiny", "photo", "--data", tiny_data, "--captioner", tiny_blip2]
    common += ["--caption-batch", 4, "--max-tokens", 5]
    path.unlink()
    call(monkeypatch, *common)
    whole = captions_of(tiny_data)
    assert sorted(whole) == [p for p, _ in data.load("tiny", tiny_data).images["photo"]]  # no target image was read

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
    monkeypatch.setattr(anchors, "caption_images", lambda *a: said.append(len(a[2])) or true_call(*a))
    call(monkeypatch, *common)
    assert captions_of(tiny_data) == whole and sum(said) == 30 and not part.exists()
    stamp = path.stat().st_mtime_ns
    call(monkeypatch, *common)
    assert path.stat().st_mtime_ns == stamp and sum(said) == 30


def test_captions_of_other_origin_stay_and_another_captioners_are_made_again(tiny_data, tiny_blip2, monkeypatch, capsys):
    path = tiny_data / "tiny" / "captions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["by"], rows[1]["caption"] = "another captioner", " "
    path.write_text(anchors.lines(row for row in rows if row["path"] != "photo/dog/3.png"))
    monkeypatch.setattr(anchors, "caption_images", lambda model, processor, images, *rest: ["new"] * len(images))
    call(monkeypatch, "caption", "tiny", "photo", "--data", tiny_data, "--captioner", tiny_blip2)
    assert {p for p, c in captions_of(tiny_data).items() if c == "new"} == {rows[0]["path"], rows[1]["path"], "photo/dog/3.png"}
    assert "27 not by a captioner" in capsys.readouterr().out


def test_without_a_captioner_asked_for_all_captions_stay(tiny_data, monkeypatch, capsys):
    path = tiny_data / "tiny" / "captions.jsonl"
    before = path.read_text().replace('"}', '", "by": "a better captioner, beam 9"}')
    path.write_text(before)
    call(monkeypatch, "caption", "tiny", "photo", "--data", tiny_data)  # BLIP-2 is not even loaded
    assert path.read_text() == before


def test_empty_and_repeated_captions_are_the_class_prompt_and_counted(tiny_data, tiny_blip2, monkeypatch, capsys):
    (tiny_data / "tiny" / "captions.jsonl").unlink()
    said = iter(["", "a dog a dog a dog", *["fine"] * 28])
    monkeypatch.setattr(anchors, "caption_images", lambda m, p, images, *rest: [next(said) for _ in images])
    call(monkeypatch, "caption", "tiny", "photo", "--data", tiny_data, "--captioner", tiny_blip2)
    got = captions_of(tiny_data)
    assert [got[f"photo/cat/{i}.png"] for i in range(3)] == ["a photo of a cat", "a photo of a cat", "fine"]
    assert "the class prompt instead of 1 that were empty and 1 that repeated themselves" in capsys.readouterr().out


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_write_what_one_writes(tiny_data, tiny_pool, tiny_clip, tiny_blip2, tmp_path, monkeypatch):
    """Both stages under torchrun: the same captions.jsonl, the same retrieved pairs."""
    path = tiny_data / "tiny" / "captions.jsonl"
    path.unlink()
    common = ["tiny", "photo", "--data", tiny_data]
    write = ["caption", *common, "--captioner", tiny_blip2, "--caption-batch", 4, "--max-tokens", 5]
    find = ["retrieve", *common, "--model", tiny_clip, "--pool", tiny_pool, "--same", 0.99999, "--k", 2, "--run"]
    call(monkeypatch, *write)
    call(monkeypatch, *find, tmp_path / "one" / "run")
    one = path.read_text()
    path.unlink()
    torchrun(ROOT / "anchors.py", *write)
    torchrun(ROOT / "anchors.py", *find, tmp_path / "two" / "run")
    assert path.read_text() == one
    shard = Path("run", "retrieved", "00000.tar")
    assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()


def test_a_captioner_that_is_not_there_is_one_line(tiny_data, monkeypatch, capsys):
    (tiny_data / "tiny" / "captions.jsonl").unlink()
    said = refusal(capsys, monkeypatch, "caption", "tiny", "photo", "--data", tiny_data, "--captioner", "/nowhere")
    assert "--captioner /nowhere: could not be loaded" in said.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval


def test_faiss_finds_what_a_matrix_product_finds_and_shards_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    pool, queries = (F.normalize(torch.randn(n, 24, generator=generator), dim=1) for n in (1000, 50))
    scores, ids = anchors.search(queries, [pool], 7)
    expected = (queries @ pool.T).topk(7)
    assert torch.equal(ids, expected.indices) and torch.allclose(scores, expected.values, atol=1e-6)
    for parts in (pool.split(90), [pool[:3], pool[3:3], pool[3:]]):
        assert torch.equal(anchors.search(queries, parts, 7)[1], ids)
    assert anchors.search(queries, [pool[:3], pool[3:5]], 7)[1].shape == (50, 5)


def test_what_is_damaged_is_skipped_and_named(tmp_path):
    path = tmp_path / "00000.tar"
    members = {"a.png": square(0), "a.txt": b"a", "b.jpg": b"broken", "b.txt": b"b", "c.png": square(1), "d.txt": b"no image"}
    write_shard(path, {**members, "e.png": square(2), "e.txt": b"e", "e.json": b"{", "f.png": square(3), "f.txt": b"f"})
    pairs, bad = data.read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "b", "e", "f"]
    assert len(bad) == 2 and "e.json" in bad[0] and "00000.tar: c (no text)" in bad[1]
    with tarfile.open(path) as tar:
        header, offset = tar.getmember("b.jpg").offset, tar.getmember("f.png").offset_data
    whole = path.read_bytes()
    path.write_bytes(whole[:header] + b"?" * 512 + whole[header + 512:])  # tarfile would take this for the end
    pairs, bad = data.read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "e", "f"] and any(f"byte {header} (damaged header)" in name for name in bad)
    path.write_bytes(whole[:offset + 20])  # a download that broke off
    pairs, bad = data.read_shard(path)
    assert [key for key, *_ in pairs] == ["a", "b", "e"] and any("00000.tar after" in name for name in bad)


def retrieved(run):
    shards = sorted((run / "retrieved").glob("*.tar"))
    return {key: (text, about) for shard in shards for key, _, text, about in data.read_shard(shard)[0]}


def test_retrieval_keeps_benchmark_images_and_duplicates_out(tiny_data, tiny_pool, tiny_clip, tmp_path, monkeypatch, capsys):
    """The pool holds a photo and a sketch of the benchmark, one image twice, and one that is none."""
    photo, sketch = ((tiny_data / "tiny" / d / "dog" / "3.png").read_bytes() for d in ("photo", "sketch"))
    extra = {"leak.png": photo, "leak.txt": b"a leak", "other.png": sketch, "other.txt": b"a leak"}
    extra |= {"bad.png": b"?", "bad.txt": b"bad", "twice.png": square(0), "twice.txt": b"a thing"}
    write_shard(tiny_pool / "00002.tar", extra)
    run = tmp_path / "run"
    find = ["retrieve", "tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--pool", tiny_pool, "--run", run]
    call(monkeypatch, *find, "--k", 43, "--same", 0.99999)
    out, err = capsys.readouterr()
    assert "damaged: 00002.tar: bad (not a readable image)" in err and "43 available, 1 damaged" in out
    found = retrieved(run)
    assert not any(text == "a leak" for text, _ in found.values()) and "00002-twice" not in found and "00000-0000" in found
    rows = {r["metric"]: r["value"] for line in (run / "results.jsonl").read_text().splitlines() for r in [json.loads(line)]}
    assert rows["available"] == 43 and rows["also a benchmark image"] == 2 and rows["found twice"] == 1
    assert rows["retrieved"] == len(found) == 40

    queries = found["00000-0000"][1]["retrieved"]["queries"]
    assert queries.keys() == {p for p, _ in data.load("tiny", tiny_data).images["photo"]}  # k is all: each found each
    assert found["00000-0000"][1]["key"] == "0000"  # what the pool knew of it is still there


def test_retrieval_embeds_once_and_searches_again_for_another_k(tiny_data, tiny_pool, tiny_clip, tmp_path, monkeypatch, capsys):
    run, embedded, true_embed = tmp_path / "run", [], anchors.encode_batch
    monkeypatch.setattr(anchors, "encode_batch", lambda *a: embedded.append(1) or true_embed(*a))
    find = ["retrieve", "tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--pool", tiny_pool, "--run", run]
    find += ["--same", 0.99999]  # to random weights all images are much alike
    call(monkeypatch, *find)
    stamp, few = (run / "retrieved" / "00000.tar").stat().st_mtime_ns, len(retrieved(run))
    call(monkeypatch, *find)
    assert (run / "retrieved" / "00000.tar").stat().st_mtime_ns == stamp and "is there already" in capsys.readouterr().out
    call(monkeypatch, *find, "--k", 3)
    (tiny_data / "tiny" / "sketch" / "cat" / "0.png").write_bytes(square(7))  # another benchmark: to be checked anew
    call(monkeypatch, *find, "--k", 3)
    assert "already" not in capsys.readouterr().out
    assert len(embedded) == 2 and len(retrieved(run)) > few  # two shards, each once
    call(monkeypatch, *find, "--query", "text")
    assert {q for _, about in retrieved(run).values() for q in about["retrieved"]["queries"]} <= {"cat", "dog", "red_house"}


def test_a_seed_trains_on_what_its_own_training_images_found(tiny_data, tmp_path):
    zero, one = "photo/cat/0.png", "photo/cat/1.png"
    queries = [{zero: 0.9}, {one: 0.8}, {zero: 0.7, one: 0.9}, {"dog": 0.5}]
    members = {f"{i}.{e}": c for i in range(4) for e, c in (("png", square(i)), ("txt", b"text %d" % i))}
    write_shard(tmp_path / "pool.tar", members)
    shard = data.read_shard(tmp_path / "pool.tar")[0]
    pairs = [(key, where, text, {"retrieved": {"queries": q}}) for (key, where, text, _), q in zip(shard, queries)]
    anchors.write_retrieved(tmp_path / "retrieved", pairs, {})
    dataset = data.load("tiny", tiny_data)
    got = anchors.load_retrieved(tmp_path, dataset, [(one, 0)])
    assert [text for _, text in got] == ["text 1", "text 2", "text 3"]
    from features import open_image

    assert open_image(None, got[0][0]).size == (16, 16)
    with pytest.raises(SystemExit):
        anchors.write_retrieved(tmp_path / "other" / "retrieved", pairs[:2], {})
        anchors.load_retrieved(tmp_path / "other", dataset, [("photo/cat/2.png", 0)])


def test_no_pool_is_one_line(tiny_data, tiny_clip, tmp_path, monkeypatch, capsys):
    said = refusal(capsys, monkeypatch, "retrieve", "tiny", "photo", "--data", tiny_data, "--run", tmp_path / "run")
    assert "could not fetch pixparse/cc3m-wds" in said and "data/cc3m by hand" in said
