"""What comes from the Hugging Face hub, against a stand-in: data sets, models, pool; or why not."""

import hashlib
import importlib
import io
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import square, write_shard
from hub import Hub
from huggingface_hub import constants
from PIL import Image
from pyarrow.parquet import ParquetFile

import config
import data
import features
from sets import folders
from sets.hub import read_names

CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]


@pytest.fixture
def hub(tmp_path):
    """The stand-in, which is seen as the hub; an empty cache; only default names on it."""
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("HF_HOME", str(tmp_path / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "0")
        importlib.reload(constants)  # which else are those of when it was imported
        # likewise, where a test before made it; older versions have none
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield server
    importlib.reload(constants)
    server.shutdown()


def parquet(path, rows, **features):
    """Write [{"image": bytes, …}] as the hub has it: images as bytes, classes as named numbers."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    kinds = {
        name: ClassLabel(names=kind) if isinstance(kind, list) else Value(kind)
        for name, kind in features.items()
    }
    rows = [{**row, "image": {"bytes": row["image"], "path": row.get("file")}} for row in rows]
    columns = {"image": ImageFeature(), **kinds}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: row[name] for name in columns} for row in rows]
    Dataset.from_list(rows, features=Features(columns)).to_parquet(str(path))


def serve_pacs(hub, each):
    domains = ("art_painting", "cartoon", "photo", "sketch")
    rows = [
        {"image": square(1000 * d + 10 * y + i), "file": f"pic_{i}.png", "domain": name, "label": y}
        for d, name in enumerate(domains) for y in range(7) for i in range(each)
    ]
    path = hub.folder / "datasets/flwrlabs/pacs/data/train-00000-of-00001.parquet"
    parquet(path, rows, domain="string", label=CLASSES)


def test_both_scripts_from_an_empty_disk(
    hub, script, tiny_clip, tiny_blip2, tmp_path, monkeypatch
):
    """Data, models and pool come from the hub by their own names, once; then all works offline."""
    serve_pacs(hub, each=10)
    shutil.copytree(tiny_clip.removeprefix("local-dir:"), hub.folder / "models/stand-in/clip")
    shutil.copytree(tiny_blip2, hub.folder / "models/Salesforce/blip2-opt-2.7b")
    pairs = {}
    for i in range(20):
        pairs |= {f"{i:09d}.jpg": square(i), f"{i:09d}.txt": f"a thing {i}".encode()}
    cc3m = "pixparse/cc3m-wds"
    write_shard(hub.folder / "datasets" / cc3m / "cc3m-train-0000.tar", pairs)
    write_shard(hub.folder / "datasets" / cc3m / "cc3m-validation-0000.tar", pairs)
    options = ["--data", tmp_path / "data", "--run", tmp_path / "run", "--seeds", 1, "--epochs", 1]
    options += ["--model", "hf-hub:stand-in/clip", "--mapper-steps", 2, "--max-tokens", 3]

    done = script("run_ldfs.sh", "pacs", "photo", *options)
    assert "fetching flwrlabs/pacs" in done.stdout and "photo: 70 images" in done.stderr
    assert "1670 are published" in done.stderr and "from another paper" in done.stdout
    assert "| ldfs |" in done.stdout and "CLIPood" in done.stdout
    assert len([*(tmp_path / "data/pacs").glob("*/*/*.png")]) == 280
    assert (tmp_path / "data/pacs/captions.jsonl").exists()
    # the source is photo by itself
    done = script("run_arf.sh", "pacs", *options, "--same", 2, "--methods", "flyp", "arf+ldfs")
    assert f"fetching {cc3m}" in done.stdout and "| arf+ldfs |" in done.stdout
    assert [f.name for f in (tmp_path / "data/cc3m").glob("*.tar")] == ["cc3m-train-0000.tar"]
    assert "flwrlabs/pacs/data/train-00000-of-00001.parquet" in hub.served
    assert "stand-in/clip/open_clip_model.safetensors" in hub.served

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(tmp_path / "run")
    script("finetune.py", "pacs", "photo", *options, "--methods", "finetune")


DOMAINS = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]


def serve_domainnet(hub, **features):
    for part, n in (("train", 3), ("test", 2)):
        rows = [
            {"image": square(i), "file": f"{domain}_{y}_{part}_{i}.png", "domain": d, "label": y}
            for d, domain in enumerate(DOMAINS) for y in range(2) for i in range(n)
        ]
        name = f"datasets/wltjr1007/DomainNet/data/{part}-00000-of-00001.parquet"
        parquet(hub.folder / name, rows, **features)


def test_domainnet_keeps_its_official_split(hub, tmp_path):
    serve_domainnet(hub, domain=DOMAINS, label=["a", "b/c"])
    dataset = data.load("domainnet", tmp_path)
    assert {len(items) for items in dataset.images.values()} == {10}
    assert dataset.classes == ["a", "b_c"]
    for seed in (0, 1):
        parts = ("train", "val", "test")
        train, val, test = (dataset.split("real", "real", part, seed) for part in parts)
        assert all("_test_" in location.path for location, _ in test) and len(test) == 4
        assert sorted(train + val) == dataset.trainable("real") and len(train + val) == 6
    assert len(dataset.split("real", "sketch", "test", 0)) == 4
    again = data.load("domainnet", tmp_path)
    assert again.images == dataset.images and again.official == dataset.official


def test_columns_without_names_are_refused(hub, tmp_path, capsys):
    _, meta = folders.read_meta("domainnet", tmp_path)
    path = hub.folder / "datasets/wltjr1007/DomainNet/data/test-00000-of-00001.parquet"
    for columns in (
        {"domain": DOMAINS, "label": "int64"},  # numbers, which are no class's name
        {"domain": DOMAINS, "label": ["0", "1"]},
        {"domain": "int64", "label": ["a", "b"]},
        {"domain": ["clp", "inf", "pnt", "qdr", "rel", "skt"], "label": ["a", "b"]},
        {"domain": DOMAINS},
    ):
        serve_domainnet(hub, **columns)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            read_names(ParquetFile(path), meta)
        said = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(said) == 1
        assert "its columns image, domain, label should hold images, names of domains" in said[0]


def test_columns_are_looked_at_before_all_is_fetched(hub, script, tmp_path):
    serve_domainnet(hub, domain=DOMAINS, label="int64")
    done = script("data.py", "domainnet", "--data", tmp_path / "data", code=2)
    assert len(done.stderr.strip().splitlines()) == 1 and "its columns image" in done.stderr
    assert not [*(tmp_path / "data").rglob("*.parquet")]


def test_a_killed_download_is_no_data_set(hub, script, tmp_path):
    """What a kill left is neither taken for the data set nor in the way of it."""
    serve_pacs(hub, each=1)
    root, line = tmp_path / "data", '{"path": "photo/dog/pic_0.png", "caption": "a dog"}\n'
    (root / ".pacs.images/photo/dog").mkdir(parents=True)
    (root / ".pacs.images/photo/dog/half.png").touch()
    (root / ".pacs.part").mkdir()
    (root / "pacs").mkdir()
    (root / "pacs/captions.jsonl").write_text(line)
    done = script("data.py", "pacs", "--data", root)
    assert "photo 7 images" in done.stdout and {f.name for f in root.iterdir()} == {"pacs"}
    assert (root / "pacs/captions.jsonl").read_text() == line  # what was there before stays


def test_what_the_hub_lacks_is_said_in_one_line(hub, script, tmp_path):
    (hub.folder / "datasets").mkdir(parents=True)
    done = script("data.py", "office_home", "--data", tmp_path / "data", code=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "could not fetch flwrlabs/office-home" in done.stderr and "401" in done.stderr
    assert "Repository Not Found" in done.stderr and "authenticated" in done.stderr  # all it says
    assert f"{tmp_path}/data/office_home by hand" in done.stderr


def test_a_disk_without_room_is_said_before_all_is_fetched(hub, script, monkeypatch, tmp_path):
    serve_pacs(hub, each=1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    done = script("data.py", "pacs", "--data", tmp_path / "data", code=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "flwrlabs/pacs takes 0.0 GB" in done.stderr and "0.0 are free" in done.stderr
    assert not [*(tmp_path / "data").rglob("*.parquet")]


def test_imagenets_evaluation_sets_are_fetched_by_name(hub, script, tmp_path):
    _, meta = folders.read_meta("imagenet", tmp_path)
    entries = [*meta.shifted.values(), *meta.zero_shot.values()]
    names = {entry["folder"] for entry in entries if "by_hand" not in entry}
    assert len(entries) == 15 and len(names) == 14
    for name in names:
        folder = hub.folder / "datasets/clip-benchmark" / name
        write_shard(folder / "test/0.tar", {"s0000000.png": square(0), "s0000000.cls": b"0"})
        (folder / "test/nshards.txt").write_text("1\n")
        (folder / "classnames.txt").write_text("tench\n")
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    done = script("data.py", "imagenet", "--data", tmp_path / "data", code=2)
    assert {f.name for f in (tmp_path / "data").iterdir()} == names
    assert "the data set imagenet is not in" in done.stderr and "image-net.org" in done.stderr


def test_default_names(tiny_data, capsys):
    """By default the hub is asked for OpenAI's ViT-B/16 with QuickGELU: the message says so."""
    argv = ["tiny", "--data", str(tiny_data), "--run", str(tiny_data / "run")]
    with pytest.raises(SystemExit):
        features.load_clip(config.parse("", argv)[0])
    said = capsys.readouterr().err
    assert "--model ViT-B-16-quickgelu: " in said and "'openai'" in said


def test_a_damaged_copy_of_the_hubs_is_named(tiny_data, tiny_clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    blobs, argv = tmp_path / "models--stand-in--clip/blobs", ["tiny", "--data", str(tiny_data)]
    weights = (Path(tiny_clip.removeprefix("local-dir:")) / "open_clip_model.safetensors").read_bytes()
    blobs.mkdir(parents=True)
    (blobs / hashlib.sha256(weights).hexdigest()).write_bytes(weights)
    (blobs / hashlib.sha1(b"{}").hexdigest()).write_bytes(b"{}")  # as git names a small file
    assert features.damaged_copy("stand-in/clip") == features.damaged_copy("") == ""
    damaged = blobs / hashlib.sha256(b"whole").hexdigest()
    damaged.write_bytes(b"half")
    for load in (
        lambda: features.load_clip(config.parse("", [*argv, "--model", "hf-hub:stand-in/clip"])[0]),
        lambda: features.load_captioner("stand-in/clip", torch.device("cpu")),
    ):
        with pytest.raises(SystemExit):
            load()
        assert f"Delete {damaged}, which is damaged" in capsys.readouterr().err


def test_openais_weights_want_quickgelu(tiny_data, tmp_path, capsys):
    import open_clip

    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 16}
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
    shape = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    for name, more in (("Tiny", {}), ("Tiny-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(shape | more))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    weights = tmp_path / "openai-tiny.pt"
    torch.save(open_clip.create_model("Tiny-quickgelu").state_dict(), weights)

    def load_clip(name):
        argv = ["tiny", "photo", "--data", str(tiny_data), "--run", str(tmp_path / "run")]
        argv += ["--model", name, "--pretrained", str(weights)]
        return features.load_clip(config.parse("", argv)[0])

    assert "QuickGELU" in str(load_clip("Tiny-quickgelu").model)
    with pytest.raises(SystemExit) as stop:
        load_clip("Tiny")
    assert stop.value.code == 2 and "Say Tiny-quickgelu" in capsys.readouterr().err


def test_images_of_the_hub_arrive_as_they_are(hub, script, tmp_path):
    """No pixel is encoded anew on the way."""
    serve_pacs(hub, each=1)
    script("data.py", "pacs", "--data", tmp_path / "data")
    assert (tmp_path / "data/pacs/cartoon/giraffe/pic_0.png").read_bytes() == square(1020)
    assert Image.open(io.BytesIO(square(1020))).size == (16, 16)
