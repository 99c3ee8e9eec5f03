"""Draw the emoji benchmark, or the pool of image-text pairs of everything else.

    python -m emoji.draw          # data/emoji, data/emoji_unseen: {domain}/{class}/{code point}.png
    python -m emoji.draw pool     # data/emoji_pool: webdataset shards

The drawings come from openly licensed packages of the npm registry, the words from emojibase.
"""

import io
import json
import os
import random
import re
import shutil
import statistics
import tarfile
from pathlib import Path

from filelock import FileLock
from PIL import Image, ImageChops, ImageStat
from tqdm import tqdm

from core.artifacts import digest
from core.config import Parser
from core.utils import fail, one_line
from data import article
from emoji.packages import SIZE, SOURCES, TABLES, read_drawings, read_words
from sets.webdataset import read_shard

DOMAINS = TABLES["domains"]  # {domain: its source}
STYLES = TABLES["styles"]    # {source: how captions of its drawings begin or end}
KINDS = TABLES["kinds"]      # {subgroup of emojibase: what people call such things}
# {everyday name of a class: its emoji, as "SUBGROUP" or "SUBGROUP:PATTERN of the label"}
# CHOICE: a class is a coherent group of things, because a class needs several images that are not
# one drawing; alternative: single emoji, of which each domain has one drawing.
SEEN = TABLES["seen"]
UNSEEN = TABLES["unseen"]
SHARD_SIZE = 2000   # image-text pairs
NEAR_COPY = 0.05    # difference in [0, 1] below which two drawings of a thing count as one

# -------------------------------------------------------------------------------------------------
# Classes and captions


def class_members(rules, words):
    """Return the keys of the emoji of a class, in emojibase's order."""
    rules = [rule.partition(":")[::2] for rule in rules]
    return [
        key for key, word in words.items()
        if any(word["subgroup"] == group and re.match(p, word["label"]) for group, p in rules)
    ]


def class_names(words):
    """Return {key of an emoji: name of its class, seen or unseen}."""
    classes = SEEN | UNSEEN
    return {key: name for name in classes for key in class_members(classes[name], words)}


def plain_label(word):
    """Return the label of an emoji without typographic quotes."""
    return word["label"].replace("’", "'").replace("“", "").replace("”", "")


def caption(word, rng):
    """Return an emoji's label and up to two of its tags that say what the label does not."""
    label = plain_label(word)
    low = label.lower()
    new = [tag for tag in word["tags"] if tag.lower() not in low and low not in tag.lower()]
    n = min(len(new), rng.randint(1, 2))
    return ", ".join([article(label), *rng.sample(new, n)])


def pool_caption(word, rng):
    """Return a caption of a pool drawing: its style, and what it shows.

    Half of the captions use the words of KINDS, as people do: "a cartoon of a doughnut, breakfast",
    "a cartoon of a dessert".
    """
    content = caption(word, rng)
    kinds = KINDS.get(word["subgroup"])
    chance = rng.random()
    if kinds and chance < 0.5:
        kind = article(rng.choice(kinds))
        content = kind if chance < 0.25 else f"{article(word['label'])}, {kind}"
    return rng.choice(STYLES[word["set"]]).format(content)


# -------------------------------------------------------------------------------------------------
# Folders


def draw_folder(folder, write):
    """Call write(temporary folder) and move the drawings to `folder`, unless it has today's.

    write returns a summary to print. A second process waits, and then uses what the first one has
    drawn. A captions.jsonl is kept, because people may have edited it. Exit with status 2 if a file
    cannot be read or written.
    """
    scratch = folder.with_name(f".{folder.name}.part")
    try:
        if is_drawn(folder):  # Look first without the lock, which a read-only disk cannot hold.
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(".drawing.lock")):
            if is_drawn(folder):
                return
            if folder.exists():
                print(f"{folder} was drawn from older tables: drawing it anew")
            shutil.rmtree(scratch, ignore_errors=True)  # of a killed run
            scratch.mkdir()
            try:
                summary = write(scratch)
                (scratch / ".drawn_from").write_text(digest(TABLES, SIZE), "utf-8")
                if (folder / "captions.jsonl").exists():
                    shutil.copy2(folder / "captions.jsonl", scratch)
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)  # An error may be that the disk is full.
            print(f"wrote {folder}: {summary}")
    except OSError as error:
        reason = error.strerror or one_line(error)
        fail(f"{error.filename or folder}: {reason}. Make room, or pass another folder as --data.")


def is_drawn(folder):
    """Return whether `folder` has the drawings of today's tables; exit if it has something else."""
    stamp = folder / ".drawn_from"
    if folder.exists() and not stamp.exists():
        fail(f"{folder} exists, but emoji.draw did not make it. Move it away.")
    return stamp.exists() and stamp.read_text("utf-8") == digest(TABLES, SIZE)


# -------------------------------------------------------------------------------------------------
# The benchmark


def write_benchmark(folder, classes, downloads):
    """Write {domain}/{class}/{code point}.png, and emojibase's words in descriptions.jsonl.

    Return a summary of them. An emoji that a domain lacks is left out, so that all domains show the
    same things.
    """
    words = read_words(downloads)
    drawings = {domain: read_drawings(source, downloads) for domain, source in DOMAINS.items()}
    common_keys = set.intersection(*map(set, drawings.values()))
    chosen = [
        (name.replace(" ", "_"), key)
        for name, rules in classes.items()
        for key in class_members(rules, words) if key in common_keys
    ]
    rows = []
    for name, key in tqdm(chosen, desc="drawing the benchmark", unit="emoji"):
        description = caption(words[key], random.Random(key))
        for domain in DOMAINS:
            path = Path(domain, name, f"{key}.png")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            drawings[domain][key]().save(folder / path, compress_level=1)
            rows.append({"path": path.as_posix(), "caption": description})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "descriptions.jsonl").write_text(lines, "utf-8")
    return f"{len(chosen)} emoji in {len(classes)} classes and {len(DOMAINS)} domains"


# -------------------------------------------------------------------------------------------------
# The pool


def pool_pairs(downloads):
    """Return [(word, RGB image)]: what the mini CLIP may be pretrained on.

    From the artists of the five domains: only emoji outside all classes of the benchmark. From the
    other artists: everything but near-copies, because some artists took over drawings of the five,
    as Noto did from its first version. A word has also its "set" (source) and "key".
    """
    words = read_words(downloads)
    drawings = {source: read_drawings(source, downloads) for source in SOURCES}
    classes = [*SEEN.values(), *UNSEEN.values(), *TABLES["left_out"].values()]
    class_keys = {key for rules in classes for key in class_members(rules, words)}
    thumbnails = {
        key: [thumbnail(drawings[s][key]()) for s in DOMAINS.values() if key in drawings[s]]
        for key in class_keys
    }
    pairs = []
    near_copies = 0
    for source in tqdm(SOURCES, desc="drawing the pool", unit="set"):
        for key, draw in drawings[source].items():
            if key in class_keys and source in DOMAINS.values():
                continue
            image = draw()
            small = thumbnail(image)
            if any(difference(small, other) < NEAR_COPY for other in thumbnails.get(key, [])):
                near_copies += 1
                continue
            name = {"label": key.replace("-", " "), "tags": [], "subgroup": ""}
            pairs.append(({**words.get(key, name), "set": source, "key": key}, image))
    print(f"left out {near_copies} drawings that are near-copies of a benchmark image")
    return pairs


def thumbnail(image):
    """Return an image of 16 x 16 pixels."""
    return image.resize((16, 16), Image.Resampling.BOX)


def difference(a, b):
    """Return the mean absolute difference of two images, in [0, 1]."""
    return statistics.mean(ImageStat.Stat(ImageChops.difference(a, b)).mean) / 255


def write_pool(folder, downloads):
    """Write image-text pairs as {00000…}.tar in CC3M's layout: KEY.png, KEY.txt, KEY.json.

    Return a summary of them.
    """
    pairs = pool_pairs(downloads)
    random.Random(0).shuffle(pairs)  # so that each shard has drawings of every artist
    for start in range(0, len(pairs), SHARD_SIZE):
        with tarfile.open(folder / f"{start // SHARD_SIZE:05d}.tar", "w") as tar:
            for word, image in pairs[start:start + SHARD_SIZE]:
                add_pair(tar, word, image)
    return f"{len(pairs)} image-text pairs"


def add_pair(tar, word, image):
    """Add an image, its caption and its word to a shard."""
    text = pool_caption(word, random.Random(f"{word['set']} {word['key']}"))
    png = io.BytesIO()
    image.save(png, "png")
    files = {"png": png.getvalue(), "txt": text.encode(), "json": json.dumps(word).encode()}
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{word['set']}-{word['key']}".lower() + f".{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def read_pool(data):
    """Return [(word, RGB image)] of all shards in data/emoji_pool, which is drawn if missing."""
    draw_pool(data)
    shards = [read_shard(path)[0] for path in sorted((data / "emoji_pool").glob("*.tar"))]
    return [(word, location.open()) for rows in shards for _, location, _, word in rows]


# -------------------------------------------------------------------------------------------------
# The command line


def draw_benchmark(data):
    """Draw data/emoji and data/emoji_unseen, unless they have today's drawings."""
    downloads = data / ".downloads"
    draw_folder(data / "emoji", lambda folder: write_benchmark(folder, SEEN, downloads))
    draw_folder(data / "emoji_unseen", lambda folder: write_benchmark(folder, UNSEEN, downloads))


def draw_pool(data):
    """Draw data/emoji_pool, unless it has today's drawings."""
    draw_folder(data / "emoji_pool", lambda folder: write_pool(folder, data / ".downloads"))


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", default="benchmark", choices=["benchmark", "pool"])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all data sets")
    args = parser.parse_args()
    if args.what == "pool":
        draw_pool(args.data)
    else:
        draw_benchmark(args.data)


if __name__ == "__main__":
    main()
