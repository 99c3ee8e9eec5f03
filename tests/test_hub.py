"""What comes from the Hugging Face hub, against a stand-in on loopback: data sets, models, the pool; what is said without."""

import io
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import square, write_shard
from hub import Hub
from PIL import Image

import data

CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, which scripts see as the hub; an empty cache; only default names on it."""
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield server
    server.shutdown()


def parquet(path, rows, **features):
    """Write [{"image": bytes, …}] as a parquet of the hub's kind: images as bytes, classes as numbers with names."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    kinds = {k: ClassLabel(names=v) if isinstance(v, list) else Value(v) for k, v in features.items()}
    rows = [{**row, "image": {"bytes": row["image"], "path": row.get("file")}} for row in rows]
    columns = {"image": ImageFeature(), **kinds}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list([{k: row[k] for k in columns} for row in rows], features=Features(columns))
    table.to_parquet(str(path))


def serve_pacs(hub, each):
    domains = ("art_painting", "cartoon", "photo", "sketch")
    rows = [
        {"image": square(1000 * d + 10 * c + i), "file": f"pic_{i}.png", "domain": domain, "label": c}
        for d, domain in enumerate(domains) for c in range(7) for i in range(each)
    ]
    parquet(hub.folder / "datasets/flwrlabs/pacs/data/train-00000-of-00001.parquet", rows, domain="string", label=CLASSES)


def test_both_scripts_from_an_empty_disk(hub, script, tiny_clip, tiny_blip2, tmp_path):
    """Data, model, captioner and pool come from the hub by their own names, once; then all works offline."""
    serve_pacs(hub, each=10)
    shutil.copytree(tiny_clip.removeprefix("local-dir:"), hub.folder / "models/stand-in/clip")
    shutil.copytree(tiny_blip2, hub.folder / "models/Salesforce/blip2-opt-2.7b")
    pairs = {f"{i:09d}.{end}": what for i in range(20) for end, what in (("jpg", square(i)), ("txt", f"a thing {i}".encode()))}
    write_shard(hub.folder / "datasets/pixparse/cc3m-wds/cc3m-train-0000.tar", pairs)
    write_shard(hub.folder / "datasets/pixparse/cc3m-wds/cc3m-validation-0000.tar", pairs)
    options = ["--data", tmp_path / "data", "--run", tmp_path / "run", "--model", "hf-hub:stand-in/clip"]
    options += ["--seeds", 1, "--epochs", 1, "--mapper-steps", 2, "--max-tokens", 3]

    done = script("run_ldfs.sh", "pacs", "photo", *options)
    assert "fetching flwrlabs/pacs" in done.stdout and "photo: 70 images" in done.stderr and "1670 are published" in done.stderr
    assert "| ldfs |" in done.stdout and "CLIPood" in done.stdout and "from another paper" in done.stdout
    assert len([*(tmp_path / "data/pacs").glob("*/*/*.png")]) == 280 and (tmp_path / "data/pacs/captions.jsonl").exists()
    done = script("run_arf.sh", "pacs", *options, "--same", 2, "--methods", "flyp", "arf+ldfs")  # the source is photo by itself
    assert "fetching pixparse/cc3m-wds" in done.stdout and "| arf+ldfs |" in done.stdout
    assert [f.name for f in (tmp_path / "data/cc3m").glob("*.tar")] == ["cc3m-train-0000.tar"]
    assert {"flwrlabs/pacs/data/train-00000-of-00001.parquet", "stand-in/clip/open_clip_model.safetensors"} <= {*hub.served}

    hub.shutdown()
    os.environ["HF_HUB_OFFLINE"] = "1"
    shutil.rmtree(tmp_path / "run")
    script("finetune.py", "pacs", "photo", *options, "--methods", "finetune")


def test_domainnet_keeps_its_official_split(hub, tmp_path):
    for part, n in (("train", 3), ("test", 2)):
        rows = [
            {"image": square(i), "file": f"{domain}_{cls}_{part}_{i}.png", "domain": d, "category": c, "y": c}
            for d, domain in enumerate(data.DATASETS["domainnet"]["phrases"]) for c, cls in enumerate("ab") for i in range(n)
        ]
        path = hub.folder / f"datasets/wltjr1007/DomainNet/data/{part}-00000-of-00001.parquet"
        parquet(path, rows, domain=[*data.DATASETS["domainnet"]["phrases"]], category=["a", "b"], y="int64")
    dataset = load("domainnet", tmp_path)
    assert {len(dataset.images[d]) for d in dataset.phrases} == {10}
    for seed in (0, 1):
        parts = {part: data.split(dataset, "real", "real", part, seed) for part in ("train", "val", "test")}
        assert all("_test_" in path for path, _ in parts["test"]) and len(parts["test"]) == 4
        assert sorted(parts["train"] + parts["val"]) == dataset.trainable("real") and len(dataset.trainable("real")) == 6
    assert len(data.split(dataset, "real", "sketch", "test", 0)) == 4
    again = load("domainnet", tmp_path)
    assert again.images == dataset.images and again.official == dataset.official


def load(name, root):
    """data.load in a process of its own: huggingface_hub reads its address when it is imported."""
    import pickle
    import subprocess
    import sys

    code = "import data, pickle, sys; pickle.dump(data.load(*sys.argv[1:]), open('dataset.pickle', 'wb'))"
    env = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, name, root], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(root / "dataset.pickle", "rb") as file:
        return pickle.load(file)


def test_a_killed_download_is_no_data_set(hub, script, tmp_path):
    """What a kill left is neither taken for the data set nor in the way of it."""
    serve_pacs(hub, each=1)
    (tmp_path / "data/.pacs.part/photo/dog").mkdir(parents=True)
    (tmp_path / "data/.pacs.parquet.part").mkdir()
    (tmp_path / "data/pacs").mkdir()
    (tmp_path / "data/pacs/captions.jsonl").write_text('{"path": "photo/dog/pic_0.png", "caption": "a dog"}\n')
    done = script("data.py", "pacs", "--data", tmp_path / "data")
    assert "photo 7 images" in done.stdout and {f.name for f in (tmp_path / "data").iterdir()} == {"pacs"}
    assert "a dog" in (tmp_path / "data/pacs/captions.jsonl").read_text()  # what was there before stays


def test_what_the_hub_lacks_is_said_in_one_line(hub, script, tmp_path):
    (hub.folder / "datasets").mkdir(parents=True)
    done = script("data.py", "office_home", "--data", tmp_path / "data", code=2)
    assert len(done.stderr.strip().splitlines()) == 1 and "could not fetch flwrlabs/office-home" in done.stderr
    assert f"{tmp_path}/data/office_home by hand" in done.stderr


def test_imagenets_evaluation_sets_are_fetched_by_name(hub, script, tmp_path):
    about = data.DATASETS["imagenet"]
    names = {name for name, _ in [*about["shifted"].values(), *about["zero_shot"].values()]} - data.BY_HAND
    for name in names:
        folder = hub.folder / "datasets/clip-benchmark" / name
        write_shard(folder / "test/0.tar", {"s0000000.png": square(0), "s0000000.cls": b"0"})
        (folder / "test/nshards.txt").write_text("1\n")
        (folder / "classnames.txt").write_text("tench\n")
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    done = script("data.py", "imagenet", "--data", tmp_path / "data", code=2)
    assert {f.name for f in (tmp_path / "data").iterdir()} == names
    assert "the data set imagenet is not in" in done.stderr and "image-net.org" in done.stderr


def test_default_names(tiny_data, monkeypatch, capsys):
    """What is asked of the hub by default is OpenAI's ViT-B/16 with QuickGELU, and the message without a network names it."""
    import features

    with pytest.raises(SystemExit):
        features.load_clip(data.arguments("").parse_args(["tiny"]), data.load("tiny", tiny_data))
    said = capsys.readouterr().err
    assert "could not load ViT-B-16-quickgelu" in said and "timm/vit_base_patch16_clip_224.openai" in said


def test_openais_weights_want_quickgelu(tiny_data, tmp_path, capsys):
    import open_clip

    import features

    config = {
        "embed_dim": 32, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
    }
    for name, more in (("Tiny", {}), ("Tiny-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(config | more))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.save(open_clip.create_model("Tiny-quickgelu").state_dict(), tmp_path / "openai-tiny.pt")

    def load_clip(name):
        args = ["tiny", "photo", "--model", name, "--pretrained", str(tmp_path / "openai-tiny.pt")]
        return features.load_clip(data.arguments("").parse_args(args), data.load("tiny", tiny_data))

    assert features.quick_gelu(load_clip("Tiny-quickgelu").model)
    with pytest.raises(SystemExit) as stop:
        load_clip("Tiny")
    assert stop.value.code == 2 and "Say Tiny-quickgelu" in capsys.readouterr().err


def test_images_of_the_hub_arrive_as_they_are(hub, script, tmp_path):
    """No pixel is encoded anew on the way."""
    serve_pacs(hub, each=1)
    script("data.py", "pacs", "--data", tmp_path / "data")
    assert (tmp_path / "data/pacs/cartoon/giraffe/pic_0.png").read_bytes() == square(1020)
    assert Image.open(io.BytesIO(square(1020))).size == (16, 16)
