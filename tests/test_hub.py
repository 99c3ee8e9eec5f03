"""What comes from the Hugging Face hub, against a stand-in: data sets, models, pool; or why not."""

import importlib
import io
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, square, write_shard
from hub import Hub
from huggingface_hub import constants
from PIL import Image
from pyarrow.parquet import ParquetFile

import features
from core.config import parse
from sets.describe import read_meta
from sets.hub import table_features
from sets.load import load_dataset, load_run

CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]


@pytest.fixture
def hub(tmp_path):
    """The stand-in in place of the hub, an empty cache, and no local copy of anything."""
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("HF_HOME", str(tmp_path / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "0")
        importlib.reload(constants)  # they are read from the environment at import
        # a client that an earlier test may have made; older versions have none
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield server
    importlib.reload(constants)
    server.shutdown()


def parquet(path, rows, group=1000, **features):
    """Write [{"image": bytes, "file": name, …}] as the hub stores it, `group` rows in a row group:
    images as bytes, classes as named numbers.
    """
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    kinds = {
        name: ClassLabel(names=kind) if isinstance(kind, list) else Value(kind)
        for name, kind in features.items()
    }
    rows = [
        {**row, "image": row["image"] and {"bytes": row["image"], "path": row.get("file")}}
        for row in rows
    ]
    columns = {"image": ImageFeature(), **kinds}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: row[name] for name in columns} for row in rows]
    Dataset.from_list(rows, features=Features(columns)).to_parquet(str(path), batch_size=group)


PACS = ("art_painting", "cartoon", "photo", "sketch")


def pacs_rows(n):
    """Return rows of PACS: n images of each class and domain."""
    return [
        {"image": square(1000 * d + 10 * y + i), "file": f"pic_{i}.png", "domain": name, "label": y}
        for d, name in enumerate(PACS) for y in range(7) for i in range(n)
    ]


def serve_pacs(hub, rows, label=CLASSES, **options):
    path = hub.folder / "datasets/flwrlabs/pacs/data/train-00000-of-00001.parquet"
    parquet(path, rows, domain="string", label=label, **options)


def test_both_scripts_from_an_empty_disk(
    hub, script, tiny_clip, tiny_blip2, tmp_path, monkeypatch
):
    """Data, models and pool are fetched by their own names, once; then all works offline."""
    serve_pacs(hub, pacs_rows(10))
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
    assert "1670 are published" in done.stderr and "ldfs" in done.stdout
    assert len([*(tmp_path / "data/pacs").glob("*/*/*.png")]) == 280
    assert (tmp_path / "data/pacs/captions.jsonl").exists()
    # the source is photo by default
    done = script("run_arf.sh", "pacs", *options, "--same", 2, "--methods", "flyp", "arf+ldfs")
    assert f"fetching {cc3m}" in done.stdout and "arf+ldfs" in done.stdout
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
    dataset = load_dataset("domainnet", tmp_path)
    assert {len(items) for items in dataset.images.values()} == {10}
    assert dataset.classes == ["a", "b_c"]
    for seed in (0, 1):
        parts = ("train", "val", "test")
        train, val, test = (dataset.split("real", "real", part, seed) for part in parts)
        assert all("_test_" in location.path for location, _ in test) and len(test) == 4
        assert sorted(train + val) == dataset.trainable("real") and len(train + val) == 6
    assert len(dataset.split("real", "sketch", "test", 0)) == 4
    again = load_dataset("domainnet", tmp_path)
    assert again.images == dataset.images and again.official == dataset.official


def test_columns_without_names_are_refused(hub, tmp_path, capsys):
    _, meta = read_meta("domainnet", tmp_path)
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
            table_features(ParquetFile(path), meta)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1
        assert "its columns image, domain, label should hold images, names of domains" in lines[0]


def test_columns_are_checked_before_the_download(hub, script, tmp_path):
    serve_domainnet(hub, domain=DOMAINS, label="int64")
    done = script("sets/load.py", "domainnet", "--data", tmp_path / "data", code=2)
    assert len(done.stderr.strip().splitlines()) == 1 and "its columns image" in done.stderr
    assert not [*(tmp_path / "data").rglob("*.parquet")]


@pytest.mark.parametrize("bad, problem", [
    ({"domain": "../../../x"}, "'domain': '../../../x'"), ({"domain": None}, "'domain': None"),
    ({"domain": "watercolour"}, "'domain': 'watercolour'"), ({"label": ".."}, "'label': '..'"),
    ({"label": "."}, "'label': '.'"), ({"label": ""}, "'label': ''"), ({"label": None}, "'label': None"),
    ({"label": ".hidden"}, "'label': '.hidden'"), ({"label": "a\0b"}, "'label': 'a\\x00b'"),
    ({"image": None}, "'image': 0"), ({"image": b""}, "'image': 0"),
])
def test_each_row_is_checked(hub, script, tmp_path, bad, problem):
    """… not only the first row group: nothing is written outside of the data set's folder."""
    rows = [{**row, "label": CLASSES[row["label"]]} for row in pacs_rows(1)]
    rows[20] = {**rows[0], **bad}
    serve_pacs(hub, rows, label="string", group=10)
    root = tmp_path / "a" / "b" / "data"
    done = script("sets/load.py", "pacs", "--data", root, code=2)
    assert "flwrlabs/pacs: row train_000020 has no image, domain or class to use" in done.stderr
    assert problem in done.stderr and "Traceback" not in done.stderr
    assert not (root / "pacs").exists() and not [*tmp_path.rglob("x")]


def test_a_number_without_a_name_is_refused(hub, script, tmp_path):
    rows = pacs_rows(1)
    rows[20]["label"] = None
    serve_pacs(hub, rows)
    done = script("sets/load.py", "pacs", "--data", tmp_path / "data", code=2)
    assert "row train_000020 has no image, domain or class to use" in done.stderr


def test_file_names_that_would_not_be_found_again_are_replaced(hub, script, tmp_path):
    """Of the same row: above the folder, hidden, no image's, none; and one name twice."""
    rows = pacs_rows(4)
    names = ["../../evil.png", "..", ".hidden.png", "pic", None, "a\0.png", "pic_0.png", "pic_0.png"]
    for i, name in enumerate(names):
        rows[i] = {**rows[i], "file": name}
    serve_pacs(hub, rows)
    script("sets/load.py", "pacs", "--data", tmp_path / "data")
    images = load_dataset("pacs", tmp_path / "data").images["art_painting"]
    contents = {location.path.rsplit("/")[-1]: location.read() for location, y in images if y < 2}
    assert contents == {
        "evil.png": rows[0]["image"], "train_000001.jpg": rows[1]["image"],
        "train_000002.jpg": rows[2]["image"], "train_000003.jpg": rows[3]["image"],
        "train_000004.jpg": rows[4]["image"], "train_000005.jpg": rows[5]["image"],
        "pic_0.png": rows[6]["image"], "train_000007_pic_0.png": rows[7]["image"],
    }
    assert not [*tmp_path.glob("*.png"), *tmp_path.glob("data/*.png")]


def test_a_killed_download_is_no_data_set(hub, script, tmp_path):
    """What a kill left is not taken for the data set, and does not prevent it."""
    serve_pacs(hub, pacs_rows(1))
    root, line = tmp_path / "data", '{"path": "photo/dog/pic_0.png", "caption": "a dog"}\n'
    (root / ".pacs.images/photo/dog").mkdir(parents=True)
    (root / ".pacs.images/photo/dog/half.png").touch()
    # a file of an older revision, which had another number of files
    stale = root / ".pacs.part/data/train-00001-of-00002.parquet"
    parquet(stale, pacs_rows(1), domain="string", label=CLASSES)
    (root / "pacs").mkdir()
    (root / "pacs/captions.jsonl").write_text(line)
    done = script("sets/load.py", "pacs", "--data", root)
    assert "photo 7 images" in done.stdout and {f.name for f in root.iterdir()} == {"pacs"}
    assert (root / "pacs/captions.jsonl").read_text() == line  # the user's files stay


def test_captions_survive_a_kill_at_each_move(hub, script, tmp_path, monkeypatch):
    """The folder that has captions alone is moved away, and the complete one gets its name."""
    serve_pacs(hub, pacs_rows(1))
    root, line = tmp_path / "data", '{"path": "photo/dog/pic_0.png", "caption": "a dog"}\n'
    (root / "pacs").mkdir(parents=True)
    (root / "pacs/captions.jsonl").write_text(line)
    rename = Path.rename
    for target in ("replaced", "pacs"):  # where a killed move would have led

        def killed(path, new, target=target):
            if Path(new).name.startswith(target):
                raise KeyboardInterrupt
            return rename(path, new)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", killed)
            script("sets/load.py", "pacs", "--data", root)
    script("sets/load.py", "pacs", "--data", root)
    assert (root / "pacs/captions.jsonl").read_text() == line
    assert len([*root.glob("pacs/*/*/*.png")]) == 28 and {f.name for f in root.iterdir()} == {"pacs"}


def test_two_processes_fetch_one_data_set_once(hub, tmp_path):
    serve_pacs(hub, pacs_rows(2))
    command = [sys.executable, "-m", "sets.load", "pacs", "--data", tmp_path / "data"]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("fetching" in out for out, _ in outputs) == [False, True]
    assert all("photo 14 images, art_painting 14" in out for out, _ in outputs), outputs
    assert len([*(tmp_path / "data").glob("pacs/*/*/*")]) == 56
    assert {f.name for f in (tmp_path / "data").iterdir()} == {"pacs"}


def test_what_the_hub_lacks_is_one_line(hub, script, tmp_path):
    (hub.folder / "datasets").mkdir(parents=True)
    done = script("sets/load.py", "office_home", "--data", tmp_path / "data", code=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "could not fetch flwrlabs/office-home" in done.stderr and "401" in done.stderr
    assert "Repository Not Found" in done.stderr and "authenticated" in done.stderr
    assert f"{tmp_path}/data/office_home by hand" in done.stderr


def test_a_disk_without_room_is_named_before_the_download(hub, script, monkeypatch, tmp_path):
    serve_pacs(hub, pacs_rows(1))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    done = script("sets/load.py", "pacs", "--data", tmp_path / "data", code=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "flwrlabs/pacs needs 0.0 GB" in done.stderr and "0.0 are free" in done.stderr
    assert not [*(tmp_path / "data").rglob("*.parquet")]


def test_imagenets_test_sets_are_fetched_by_name(hub, script, tmp_path):
    _, meta = read_meta("imagenet", tmp_path)
    entries = [*meta.shifted.values(), *meta.zero_shot.values()]
    names = {entry["folder"] for entry in entries if "by_hand" not in entry}
    assert len(entries) == 15 and len(names) == 14
    for name in names:
        folder = hub.folder / "datasets/clip-benchmark" / name
        write_shard(folder / "test/0.tar", {"s0000000.png": square(0), "s0000000.cls": b"0"})
        (folder / "test/nshards.txt").write_text("1\n")
        (folder / "classnames.txt").write_text("tench\n")
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    done = script("sets/load.py", "imagenet", "--data", tmp_path / "data", code=2)
    assert {f.name for f in (tmp_path / "data").iterdir()} == names
    assert "the data set imagenet is not in" in done.stderr and "image-net.org" in done.stderr


def test_cc3m_is_fetched_once(hub, script, tmp_path):
    shard = hub.folder / "datasets/pixparse/cc3m-wds/cc3m-train-0000.tar"
    write_shard(shard, {"0.jpg": square(0), "0.txt": b"a thing"})
    # of a revision that had more shards, when a fetch was killed
    write_shard(tmp_path / "data/.cc3m.part/cc3m-train-0001.tar", {"0.jpg": square(0)})
    for fetched in (True, False):
        done = script("sets/load.py", "cc3m", "--data", tmp_path / "data")
        assert ("fetching pixparse/cc3m-wds" in done.stdout) == fetched
        assert f"{tmp_path}/data/cc3m: 1 shards" in done.stdout
    (tmp_path / "data/cc3m/cc3m-train-0000.tar").rename(tmp_path / "data/cc3m/other")
    done = script("sets/load.py", "cc3m", "--data", tmp_path / "data", code=2)
    assert "cc3m exists, but has no files of pixparse/cc3m-wds to use. Move it away" in done.stderr


def test_images_of_the_hub_arrive_as_they_are(hub, script, tmp_path):
    """No pixel is encoded anew on the way."""
    serve_pacs(hub, pacs_rows(1))
    script("sets/load.py", "pacs", "--data", tmp_path / "data")
    assert (tmp_path / "data/pacs/cartoon/giraffe/pic_0.png").read_bytes() == square(1020)
    assert Image.open(io.BytesIO(square(1020))).size == (16, 16)


@pytest.mark.parametrize("failing", ["captioner", "tokenizer"])
def test_a_hub_that_does_not_answer_is_named(hub, failing, monkeypatch, capsys):
    """… and not a package that transformers misses when it has no tokenizer's file."""
    shutil.copytree(ROOT / "emoji/captioner", hub.folder / "models/stand-in/captioner")
    hub.failing.append(failing)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda s: None, time=time.time))
    with pytest.raises(SystemExit) as stop:
        features.load_captioner("stand-in/captioner", torch.device("cpu"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--captioner stand-in/captioner: could not be loaded" in line
    assert "the Hugging Face hub did not answer: HTTP Error 503" in line


@pytest.mark.parametrize("schema", ["local-dir", "hf-hub"])
def test_a_model_that_wants_to_run_code_is_refused(hub, tiny_data, tiny_clip, tmp_path, schema, capsys):
    folder, proof = hub.folder / "models/stand-in/clip", tmp_path / "executed"
    shutil.copytree(tiny_clip.removeprefix("local-dir:"), folder)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"trust_remote_code": True},
    }
    file.write_text(json.dumps(config))
    auto = {"auto_map": {"AutoTokenizer": ["code.Mine", None]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    (folder / "code.py").write_text(f"open({str(proof)!r}, 'w')\nclass Mine: pass\n")
    model = {"local-dir": f"local-dir:{folder}", "hf-hub": "hf-hub:stand-in/clip"}[schema]
    with pytest.raises(SystemExit) as stop:
        load_clip(tiny_data, "--model", model)
    assert stop.value.code == 2 and not proof.exists()
    assert "its config asks to run code (trust_remote_code)" in capsys.readouterr().err


def load_clip(tiny_data, *flags):
    argv = ["tiny", "photo", "--data", str(tiny_data), "--run", str(tiny_data / "run"), *flags]
    return features.load_clip(load_run(parse("", argv))[0])


def test_default_names(tiny_data, capsys):
    """By default the hub is asked for OpenAI's ViT-B/16 with QuickGELU, as the message says."""
    with pytest.raises(SystemExit):
        load_clip(tiny_data)
    line = capsys.readouterr().err
    assert "--model ViT-B-16-quickgelu: " in line and "'openai'" in line


def test_openais_weights_need_quickgelu(tiny_data, tmp_path, capsys):
    import open_clip

    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 16}
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
    shape = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    for name, changes in (("Tiny", {}), ("Tiny-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(shape | changes))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    weights = tmp_path / "openai-tiny.pt"
    torch.save(open_clip.create_model("Tiny-quickgelu").state_dict(), weights)
    model = load_clip(tiny_data, "--model", "Tiny-quickgelu", "--pretrained", str(weights)).model
    assert "QuickGELU" in str(model)
    with pytest.raises(SystemExit) as stop:
        load_clip(tiny_data, "--model", "Tiny", "--pretrained", str(weights))
    assert stop.value.code == 2 and "--model Tiny-quickgelu" in capsys.readouterr().err
    folder = tmp_path / "not-openai"  # no word about the weights, unlike a repository in the cache
    cached = tmp_path / "models--timm--vit.openai" / "snapshots" / "0" / "weights.pt"
    for path in (folder / "weights.pt", cached):
        path.parent.mkdir(parents=True)
        shutil.copy(weights, path)
    load_clip(tiny_data, "--model", "Tiny", "--pretrained", str(folder / "weights.pt"))
    with pytest.raises(SystemExit):
        load_clip(tiny_data, "--model", "Tiny", "--pretrained", str(cached))
