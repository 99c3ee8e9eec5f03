"""Data sets of images: where an image is, splits, class prompts and captions.

`sets.load.load_dataset` reads a data set from disk. It is described by sets/NAME.json, or by a
dataset.json in its folder: see Meta and docs/DATA.md.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import unicodedata
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor

from core.artifacts import file_stamp
from core.methods import TRAINED
from core.utils import fail, one_line

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated in torchvision 0.29; without it PIL decodes everything
    decode_jpeg = None

# CHOICE: DomainBed's 80/20, the 80 divided into training and validation; alternative: PACS's own
# 90/10.
FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_ASPECT = 1000  # resizing a longer strip to CLIP's height would take gigabytes


# -------------------------------------------------------------------------------------------------
# Images


class UnreadableImage(Exception):
    """Raised by Location.decode and .open. str(error) is the reason: "image file is truncated"."""


def is_hidden(name):
    """Return whether a file or folder is a program's and no data: ".ipynb_checkpoints", "._1.jpg".
    """
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def is_image(name):
    """Return whether a file is an image by its name."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def image_key(path):
    """Return the last three parts of an image's path, "photo/dog/1.jpg", in Unicode's NFC form.

    Captions files and official lists name images by paths that are absolute, start with "./" or a
    folder, have Windows's separators or decomposed letters: all of them have the same key.
    """
    path = unicodedata.normalize("NFC", path).replace("\\", "/")
    return "/".join([part for part in path.split("/") if part not in ("", ".")][-3:])


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """Where an image is stored: in a file, or in a member of a tar archive."""

    folder: str      # of the data set, or of the pool
    path: str        # of the file or the tar, relative to the folder: "photo/dog/1.jpg"
    offset: int = 0  # of a member, in bytes
    size: int = -1   # of a member, in bytes; -1: the image is a file
    border: int = 0  # pixels that are cut off at each side

    @property
    def file(self):
        return os.path.join(self.folder, self.path)

    def read(self):
        """Return the encoded image as bytes; raise OSError."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def decode(self):
        """Return the RGB image as a uint8 tensor (3, H, W); raise UnreadableImage as `open` does.

        torchvision decodes JPEGs to the same bits as PIL in half the time. PIL decodes the rest,
        and names the reason if a file is damaged.
        """
        with self.opened() as (image, content):
            if decode_jpeg and not self.border and is_upright_jpeg(image):
                encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                with contextlib.suppress(RuntimeError):
                    return decode_jpeg(encoded, ImageReadMode.RGB)
            return pil_to_tensor(self.to_rgb(image))

    def open(self):
        """Return the RGB image as PIL's; raise UnreadableImage, whatever the decoder raises.

        CHOICE: EXIF's orientation is applied, and transparent parts are white, as viewers show
        them; alternative: open_clip's loaders, which ignore both: photographs may lie on their
        side, and what is stored under transparent parts appears.
        """
        with self.opened() as (image, _):
            return self.to_rgb(image)

    @contextlib.contextmanager
    def opened(self):
        """Yield PIL's image, of which only the header is read, and the encoded bytes.

        Whatever is raised within the context becomes UnreadableImage.
        """
        try:
            content = self.read()
            with Image.open(io.BytesIO(content)) as image:
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels")
                yield image, content
            return
        except UnidentifiedImageError:
            reason = "of no known format"
        except Exception as error:  # decoders raise many types, among them MemoryError
            reason = getattr(error, "strerror", None) or one_line(error)
        raise UnreadableImage(reason)

    def to_rgb(self, image):
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data; the pixels are decoded already
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to white
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
        return ImageOps.crop(image, self.border) if self.border else image

    def __str__(self):
        return self.file if self.size < 0 else f"{self.file}, byte {self.offset}"


def is_upright_jpeg(image):
    """Return whether PIL's image is a JPEG in grey or RGB that EXIF does not turn."""
    with contextlib.suppress(Exception):  # damaged EXIF data
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return image.format == "JPEG" and image.mode in ("L", "RGB") and orientation == 1
    return False


# -------------------------------------------------------------------------------------------------
# Data sets


@dataclass(frozen=True)
class Meta:
    """The description of a data set. Raises ValueError, naming the key, if it is not valid.

    CHOICE: the phrases of all sets but PACS, which direct the mappers, and which domain is the
    first, the default source; alternative: a dataset.json.
    """

    phrases: dict = field(default_factory=dict)  # {domain folder: "a photo"}, what its images are
    fractions: dict = field(default_factory=FRACTIONS.copy)  # how the source domain is split
    same_stem_same_thing: bool = False  # files of one name show one thing, in any domain
    classnames: dict = field(default_factory=dict)  # {class folder: "dog"} if it is no English
    templates: dict = field(default_factory=dict)  # {source: ["a photo of a {}."]}, class prompts
    model: str | None = None      # the default of --model
    captioner: str | None = None  # the default of --captioner
    pool: str | None = None       # folder of image-text pairs to retrieve from, beside the set's
    k: int = 1                    # number of pairs to retrieve for each query
    lambda_dive: int | float = 1000  # weight of DiVE's losses
    unseen: str | None = None     # data set of other classes in the same domains, beside this one
    schedules: dict = field(default_factory=dict)  # {"full": {"lr": 3e-4}}, overrides of SCHEDULES
    counts: dict = field(default_factory=dict)     # {domain: published number of images}
    official_split: bool = False  # {domain}_test.txt lists the test part of a domain
    by_hand: str = ""             # how a user gets the set, if no program can
    hub: dict = field(default_factory=dict)  # its repository, and the columns of domain and class
    made_by: str | None = None       # the command that makes it, to which --data is added
    pool_made_by: str | None = None  # the command that makes its pool
    shifted: dict = field(default_factory=dict)    # ImageNet's other domains, and
    zero_shot: dict = field(default_factory=dict)  # sets of other classes: see sets/webdataset.py

    def __post_init__(self):
        def require(condition, message):
            if not condition:
                raise ValueError(message)

        def is_text(value):
            return isinstance(value, str) and value.strip() != ""

        for f in fields(self):
            value = getattr(self, f.name)
            require(isinstance(value, f.type), f"{f.name} cannot be {value!r}")
        phrases = self.phrases.values()
        require(
            phrases and all(is_text(text) and not {*"{}"} & {*text} for text in phrases),
            'phrases of one domain or more have to be texts such as "a photo"',
        )
        fractions = self.fractions.values()
        require(
            self.fractions.keys() == FRACTIONS.keys()
            and all(isinstance(value, (int, float)) and value >= 0 for value in fractions)
            and abs(sum(fractions) - 1) < 1e-6,
            "fractions of train, val and test have to be numbers from 0 up that sum to 1",
        )
        require(all(map(is_text, self.classnames.values())), "classnames have to be texts")
        lists = self.templates.values()
        require(
            all(isinstance(texts, list) and all(map(is_text, texts)) for texts in lists)
            and all(re.findall("[{}]+", text) == ["{}"] for texts in lists for text in texts),
            "templates have to be lists of texts, each with one {}",
        )
        require(self.k >= 1, "k is below 1")
        require(0 <= self.lambda_dive < math.inf, "lambda_dive is not a number from 0 up")
        names = ", ".join(TRAINED)
        require(self.schedules.keys() <= TRAINED.keys(), f"schedules are of {names}")


@dataclass(frozen=True)
class Dataset:
    """A data set on this disk. Its items are pairs (Location, class index)."""

    name: str
    folder: Path
    meta: Meta = field(repr=False)
    classes: list                     # folder names, sorted; none if it has captions only
    classnames: list                  # their English names, in the same order; "thing" for no class
    images: dict = field(repr=False)  # {domain: items}, class by class, sorted by file name
    captions: Path | None = None      # captions.jsonl, which may not exist yet
    official: dict = field(default_factory=dict, repr=False)  # {domain: paths of its test part}
    heads: dict = field(default_factory=dict, repr=False)  # {domain: own (classnames, templates)}
    absent: dict = field(default_factory=dict)  # {domain that is not on this disk: how to get it}
    shots: int | None = None          # limit on the training images of a class; None: all
    new: "Dataset | None" = field(default=None, repr=False)  # its other classes: see base_to_new
    unseen: "Dataset | None" = field(default=None, repr=False)  # what measures zero-shot ability

    def styles(self, source):
        """Return the domains whose phrase differs from the source's: the targets of mappers."""
        phrases = self.meta.phrases
        return [domain for domain, phrase in phrases.items() if phrase != phrases[source]]

    def trainable(self, domain):
        """Return the items of `domain` that are not in its official test part."""
        test_paths = self.official.get(domain, ())
        return [(at, y) for at, y in self.images[domain] if at.path not in test_paths]

    def split(self, source, domain, part, seed):
        """Return the items of `domain` in one part ("train", "val", "test"), given the source.

        Of a target there is only a "test" part, the whole domain. An official test part is the
        "test" part of its domain. If files of one name show one thing, no target's test part has a
        thing that the source trains or validates on.
        """
        if domain != source and part != "test":
            return []
        if part == "test" and domain in self.official:
            return [(at, y) for at, y in self.images[domain] if at.path in self.official[domain]]
        if domain != source and not self.meta.same_stem_same_thing:
            return self.images[domain]
        part_of = self.split_source(source, seed)
        items = self.trainable(domain)
        return [(at, y) for at, y in items if part_of.get((y, self.thing(at)), "test") == part]

    def split_source(self, source, seed):
        """Return {(class index, thing): part} of the source.

        Each class is split in the order of a hash of (data set, seed, file name), so that the same
        files have the same split on any machine. `shots` takes images out of "train" only. Beside
        an official test part there are only "train" and "val".
        """
        fractions, has_test_part = self.meta.fractions, source in self.official
        total = fractions["train"] + fractions["val"] if has_test_part else 1
        things_of = {}  # {class index: its things}
        for at, y in self.trainable(source):
            things_of.setdefault(y, set()).add(self.thing(at))

        def order(thing):
            return hashlib.sha256(f"{self.name} {seed} {thing}".encode()).hexdigest()

        part_of = {}
        for y, things in things_of.items():
            n_train = max(1, round(fractions["train"] / total * len(things)))
            n_val = len(things) if has_test_part else round(fractions["val"] * len(things))
            for i, thing in enumerate(sorted(things, key=order)):
                part_of[y, thing] = (
                    "unused" if self.shots and self.shots <= i < n_train
                    else "train" if i < n_train
                    else "val" if i < n_train + n_val
                    else "test"
                )
        return part_of

    def thing(self, location):
        """Return what an image shows, as far as its name tells: its own path, or its stem."""
        if not self.meta.same_stem_same_thing:
            return location.path
        return os.path.splitext(os.path.basename(image_key(location.path)))[0]


def rows_in(items, subset):
    """Return the position in `items` of each of `subset`, both [(Location, label)]."""
    row = {location: i for i, (location, _) in enumerate(items)}
    return [row[location] for location, _ in subset]


def base_to_new(dataset):
    """Return the Dataset of the base classes, the first ⌈C/2⌉; its `new` has the other classes.

    All is trained and tested among the base classes, and `new` shows what that does to others. The
    images are split as in the whole data set. Exits with status 2 if it has less than four classes.
    Source: CoCoOp (arXiv 2203.05557), section 4.1.
    CHOICE: a domain with classes of its own, such as ImageNet-A, is left out; alternative: divide
    them by their names, which ObjectNet's do not allow.
    """
    count = len(dataset.classes)
    if count < 4:
        fail(f"--base-to-new: {dataset.name} has {count} classes. It takes four, two in each half.")
    reason = "it has classes of its own, which --base-to-new does not divide"

    def part(first, end):
        images = {
            domain: [(at, y - first) for at, y in items if first <= y < end]
            for domain, items in dataset.images.items() if domain not in dataset.heads
        }
        return replace(
            dataset, images=images, heads={}, classes=dataset.classes[first:end],
            classnames=dataset.classnames[first:end],
            absent={**dataset.absent, **dict.fromkeys(dataset.heads, reason)},
        )

    half = (count + 1) // 2
    return replace(part(0, half), new=part(half, count))


# -------------------------------------------------------------------------------------------------
# Prompts


def article(noun):
    """Return the noun phrase with "a" or "an", or unchanged if it is plural or a proper name.

    It is a rule of thumb.
    """
    if noun[0].isupper() or re.search(r"[^su]s$", noun.split(" with ")[0].split(":")[0]):
        return noun
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def class_texts(dataset, domain):
    """Return C prompts in the words of `domain`, one for each class: "a sketch of a dog"."""
    return [f"{dataset.meta.phrases[domain]} of {article(name)}" for name in dataset.classnames]


def prompt_templates(dataset, source, domain=None):
    """Return (classnames, [function: classname -> prompt]), as open_clip's zero-shot classifier
    takes them, in the words of `source`.

    The classes are the data set's, or those that `domain` has of its own. Source: FLYP, which draws
    one of the templates for each image; CLIP's 80 templates for ImageNet.
    CHOICE: other data sets have one template, the source's phrase with the right article, for all
    domains, because a model in use does not know the domain of an image; alternative: `templates`.
    """
    default = dataset.classnames, dataset.meta.templates.get(source)
    classnames, templates = dataset.heads.get(domain, default)
    if templates:
        return classnames, [text.format for text in templates]
    return classnames, [lambda name: f"{dataset.meta.phrases[source]} of {article(name)}"]


# -------------------------------------------------------------------------------------------------
# Captions


def read_captions(path):
    """Return {image_key: row} of a captions.jsonl file.

    A row has "path" and "caption". A captioner's row also has "by", and "size" and "time" of the
    image's file. The last row of an image counts; of rows by people, such as COCO's five, all do:
    "captions" lists them if there are several, and "caption" is the first. Exits with status 2 if
    the file or a line of it cannot be read. Text behind the last line's end that is no row is
    ignored: a killed run was writing it.
    """
    return parse_captions(path, file_stamp(path) if os.path.exists(path) else None)


@functools.lru_cache(maxsize=4)
def parse_captions(path, stamp):
    """Return what `read_captions` does, parsed once as long as the file's stamp stays the same."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read ({error}). Correct it, or pass --captions with another file.")
    rows = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key, caption = image_key(row["path"]), row["caption"].strip()
            row = {**row, "caption": caption}
            row.pop("captions", None)
            if "by" not in row and "by" not in rows.get(key, row):
                row |= joined([*texts_of(rows.get(key, {"caption": ""})), caption])
            rows[key] = row
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number < len(lines):
                fail(f'{path}, line {number}: not {{"path": …, "caption": …}}. Correct it.')
    return rows


def joined(texts):
    """Return the fields of a row of people's texts; "captions" only if there are several."""
    texts = [text for text in texts if text]
    several = {"captions": texts} if len(texts) > 1 else {}
    return {"caption": texts[0] if texts else "", **several}


def texts_of(row):
    """Return all texts of a row of `read_captions`."""
    return row.get("captions", [row["caption"]])


def valid_caption(row, location):
    """Return whether a row of `read_captions` (None: there is none) belongs to this image.

    A captioner's row does if the image's file has the size and the time that the row records; a
    row that a person has written does unless it is empty.
    """
    if row is None or "by" not in row:
        return row is not None and row["caption"] != ""
    return (row.get("size"), row.get("time")) == file_stamp(location.file)


@functools.cache  # it is asked for each caption several times in a run
def repeats_itself(caption):
    """Return whether words occur three times in a row, "a cat a cat a cat": beam search failed."""
    return re.search(r"\b(\w[\w ]*?)\b(?:,? \1\b){2}", caption) is not None


def captions(dataset, items):
    """Return c_i: one text for each of N items, the first of `all_captions`."""
    return [texts[0] for texts in all_captions(dataset, items)]


def all_captions(dataset, items):
    """Return a list of texts for each of N items: of its row in the captions file, or its rows.

    CHOICE: a captioner's text that is empty or repeats itself is replaced by the class prompt in
    the words of the image's domain; alternative: leave the image out.
    Exits with status 2 if the file or the row of an image is missing.
    """
    remedy = (
        f"Make them with `python anchors.py caption {dataset.name} SOURCE`, or pass --captions FILE"
    )
    if dataset.captions is None or not dataset.captions.exists():
        fail(f"{dataset.name} has no captions ({dataset.captions} does not exist). {remedy}.")
    all_rows = read_captions(dataset.captions)
    rows = [all_rows.get(image_key(location.path)) for location, _ in items]
    missing = [at.path for (at, _), row in zip(items, rows) if not valid_caption(row, at)]
    if missing:
        images = {image_key(at.path) for pairs in dataset.images.values() for at, _ in pairs}
        unmatched = len(all_rows.keys() - images)
        fail(
            f"{dataset.captions} has no caption for {len(missing)} of {len(items)} images, "
            f"{missing[0]} first; {unmatched} of its rows match no image. {remedy}."
        )
    texts = [texts_of(row) for row in rows]
    useless = [
        i for i, row in enumerate(rows)
        if "by" in row and (not row["caption"] or repeats_itself(row["caption"]))
    ]
    if useless:
        domain_of = {at: d for d, pairs in dataset.images.items() for at, _ in pairs}
        prompts = {domain: class_texts(dataset, domain) for domain in dataset.images}
    for i in useless:
        location, label = items[i]
        texts[i] = [prompts[domain_of[location]][label]]
    return texts


# "a photo of", "a black and white sketch of": up to three words before a word for pictures
MEDIUM = re.compile(
    r"^(an? )?((?!an?\b|the\b)[\w-]+ ){0,3}"
    r"(photo|photograph|picture|image|painting|drawing|sketch|cartoon|render) of ", re.I
)


def caption_texts(dataset, domain, items):
    """Return P_k(c_i): each item's caption in the words of `domain`: "a sketch of a Weimaraner".

    CHOICE: a caption that itself starts with "a photo of" loses these words, because otherwise the
    prompt would name two media; alternative: keep them.
    CHOICE: of several captions of an image the first, because features of the texts are computed
    once; alternative: the mean of their features.
    """
    phrase = dataset.meta.phrases[domain]
    return [f"{phrase} of {MEDIUM.sub('', caption)}" for caption in captions(dataset, items)]
