"""Data sets: image folders {domain}/{class}/*, their splits, words and captions.

    python data.py pacs        # fetches what the Hugging Face hub has of a data set, or makes it

A data set is described by sets/NAME.json, or by a dataset.json in its folder: see Meta, DATA.md.
"""

import hashlib
import io
import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from utils import fail, undamaged, warn, write_atomically

from PIL import Image, ImageOps

from methods import TRAINED

# CHOICE: DomainBed's 80/20, the 80 cut into training and validation; alternative: PACS's own 90/10.
FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # by Location.open


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """Where an image lies: a file, or a member of a tar archive."""

    folder: str      # of the data set, or of the pool
    path: str        # of the file or the tar, relative to it: "photo/dog/1.jpg"
    offset: int = 0  # of a member, in bytes
    size: int = -1   # of a member; -1: it is a file of its own
    border: int = 0  # pixels that are cut off at each side

    @property
    def file(self):
        return os.path.join(self.folder, self.path)

    def read(self):
        """The image as it is encoded, in bytes."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self):
        """RGB image; raises one of UNREADABLE."""
        with Image.open(io.BytesIO(self.read())) as image:
            if image.mode.startswith("I"):  # 16 bits, of which convert would make white
                image = image.convert("I").point(lambda value: value / 257).convert("L")
            image = image.convert("RGB")
        return ImageOps.crop(image, self.border) if self.border else image

    def __str__(self):
        return self.file if self.size < 0 else f"{self.file}, byte {self.offset}"


@dataclass(frozen=True)
class Meta:
    """What a description says of a data set; ValueError where it cannot be so.

    CHOICE: the phrases of all sets but PACS, by which mappers go, and which domain is the first,
    the source unless one is named; alternative: a dataset.json.
    """

    phrases: dict = field(default_factory=dict)  # {domain folder: "a photo"}, what its images are
    fractions: dict = field(default_factory=FRACTIONS.copy)  # how the source domain is split
    same_stem_same_thing: bool = False  # files of one name show one thing, in any domain
    templates: dict = field(default_factory=dict)  # {source: ["a photo of a {}."]}, class prompts
    model: str | None = None      # the CLIP to use, as --model names it
    captioner: str | None = None  # likewise
    pool: str | None = None       # folder beside the set's, of image-text pairs to retrieve from
    k: int = 1                    # how many of them for each query
    unseen: str | None = None     # data set beside this, of other classes in the same domains
    schedules: dict = field(default_factory=dict)  # {"full": {"lr": 3e-4}}, unlike config.SCHEDULES
    counts: dict = field(default_factory=dict)     # {domain: published number of images}
    official_split: bool = False  # {domain}_test.txt lists the test part of a domain
    by_hand: str = ""             # how to come by the set
    hub: dict = field(default_factory=dict)  # its repository, columns of domain and class there
    made_by: str | None = None       # the command that makes it, to which --data is added
    pool_made_by: str | None = None  # likewise its pool
    shifted: dict = field(default_factory=dict)    # ImageNet's other domains, and sets of other
    zero_shot: dict = field(default_factory=dict)  # classes: see sets/webdataset.py

    def __post_init__(self):
        for f in fields(self):
            if not isinstance(value := getattr(self, f.name), f.type):
                raise ValueError(f"{f.name} cannot be {value!r}")
        phrases, shares = self.phrases.values(), self.fractions.values()
        if len(phrases) < 2 or not all(isinstance(text, str) and text.strip() for text in phrases):
            raise ValueError("it needs phrases of two domains or more")
        whole = self.fractions.keys() == FRACTIONS.keys() and abs(sum(shares) - 1) < 1e-6
        if not whole or min(shares) < 0:
            raise ValueError("its fractions are not of train, val and test, or do not make 1")
        texts = [text for texts in self.templates.values() for text in texts]
        if not all(re.findall("[{}]+", text) == ["{}"] for text in texts):
            raise ValueError("its templates are not lists of texts with one {} in each")
        if self.k < 1 or not self.schedules.keys() <= TRAINED.keys():
            raise ValueError(f"its k is below 1, or its schedules not of {', '.join(TRAINED)}")


@dataclass(frozen=True)
class Dataset:
    """A data set on this disk. Its items are (Location, class index)."""

    name: str
    folder: Path
    meta: Meta = field(repr=False)
    classes: list                     # folder names, sorted
    classnames: list                  # what they are called in English, in the same order
    images: dict = field(repr=False)  # {domain: items}, class by class, sorted
    captions: Path | None = None
    official: dict = field(default_factory=dict, repr=False)  # {domain: paths of its test part}
    heads: dict = field(default_factory=dict, repr=False)  # {domain: own (classnames, templates)}
    absent: dict = field(default_factory=dict)  # {domain that is not on this disk: how to get it}
    shots: int | None = None          # at most so many training images of a class; None: all

    def styles(self, source):
        """The domains called otherwise than `source`: where mappers can go, without any image."""
        phrases = self.meta.phrases
        return [domain for domain, phrase in phrases.items() if phrase != phrases[source]]

    def trainable(self, domain):
        """All items of `domain` but those of an official test part."""
        test = self.official.get(domain, ())
        return [(at, y) for at, y in self.images[domain] if at.path not in test]

    def split(self, source, domain, part, seed):
        """Items of one part ("train", "val", "test") of `domain` when `source` is finetuned on.

        The source is split class by class, by a hash of (data set, seed, file name), the same with
        fewer `shots`; of a target there is only "test": all of it. An official test part is tested,
        and the rest split. Where files of one name show one thing, what is trained or validated on
        in the source is in no target's test part either.
        """
        same_stem, official = self.meta.same_stem_same_thing, self.official.get(domain)
        if domain != source and part != "test":
            return []
        if official is not None and part == "test":
            return [(at, y) for at, y in self.images[domain] if at.path in official]
        if domain != source and not same_stem:
            return self.images[domain]

        def thing(at):
            return os.path.splitext(os.path.basename(at.path))[0] if same_stem else at.path

        def rank(name):
            return hashlib.sha256(f"{self.name} {seed} {name}".encode()).hexdigest()

        share, listed = self.meta.fractions, self.official.get(source)
        whole = share["train"] + share["val"] if listed else 1  # things lack an official test part
        things_of, part_of = {}, {}  # {class: the source's things}; {(class, thing): its part}
        for at, y in self.trainable(source):
            things_of.setdefault(y, set()).add(thing(at))
        for y, things in things_of.items():
            train = max(1, round(share["train"] / whole * len(things)))
            val = len(things) if listed else train + round(share["val"] * len(things))
            for i, name in enumerate(sorted(things, key=rank)):
                part_of[y, name] = "train" if i < train else "val" if i < val else "test"
                if self.shots and self.shots <= i < train:
                    part_of[y, name] = "unused"
        items = self.trainable(domain)
        return [(at, y) for at, y in items if part_of.get((y, thing(at)), "test") == part]


def load(name, root="data", captions=None):
    """The data set `name`, found under `root`, fetched or made, and checked.

    Exits with status 2 when it cannot be had, domains have different classes, or a class is empty.
    """
    from sets import folders

    folder, meta = folders.read_meta(name, root)
    folders.get(name, folder, meta)
    if not captions:
        usual = folder / "captions.jsonl", Path(root, f"{name}_captions.jsonl")
        captions = next((file for file in usual if file.exists()), None)
    read = folders.read_imagenet if meta.shifted else folders.read_domains
    dataset = Dataset(name, folder, captions=captions and Path(captions), **read(folder, meta))
    for domain, items in dataset.images.items():
        if (expected := meta.counts.get(domain, len(items))) != len(items):
            warn(f"{name}, {domain}: {len(items)} images in {folder}, {expected} are published")
    if meta.official_split and len(dataset.official) < len(dataset.images):
        warn(f"{folder} lacks lists {{domain}}_test.txt: domains without are split at random")
    for domain, how_to in dataset.absent.items():
        warn(f"{name}, {domain} will not be run: {how_to}")
    return dataset


def load_unseen(dataset):
    """The Dataset of other classes that tells zero-shot ability; None where there is none.

    ImageNet's are the `zero_shot` sets, each a domain; another's what it names as "unseen".
    """
    root, meta = dataset.folder.parent, dataset.meta
    if meta.zero_shot:
        from sets.webdataset import read_webdatasets

        images, heads, absent = read_webdatasets(root, meta.zero_shot)
        meta = Meta(phrases=dict.fromkeys(meta.zero_shot, "a photo"))
        return Dataset("zero-shot", root, meta, [], [], images, heads=heads, absent=absent)
    if meta.unseen == dataset.folder.name:
        fail(f"{dataset.name}: its unseen classes cannot be its own. Name another data set.")
    return load(meta.unseen, root) if meta.unseen else None


def article(noun):
    """The noun phrase with "a" or "an"; as it is when plural or a name. A rule of thumb."""
    if noun[0].isupper() or re.search(r"[^su]s$", noun.split(" with ")[0].split(":")[0]):
        return noun
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def class_texts(dataset, domain):
    """One prompt a class in the words of `domain`: "a sketch of a dog". C strings."""
    return [f"{dataset.meta.phrases[domain]} of {article(name)}" for name in dataset.classnames]


def prompt_templates(dataset, source, domain=None):
    """(classnames, [classname -> prompt]), as open_clip.build_zero_shot_classifier takes them.

    In the words of `source`, of the data set's classes or of those that `domain` has of its own.
    Source: FLYP, which draws one of them for each image; CLIP's 80 templates for ImageNet.
    CHOICE: elsewhere one, the source's phrase with the right article, whatever domain is measured,
    since a model in use does not know what domain it will meet; alternative: `templates`.
    """
    own = dataset.classnames, dataset.meta.templates.get(source)
    classnames, templates = dataset.heads.get(domain, own)
    if templates:
        return classnames, [text.format for text in templates]
    return classnames, [lambda name: f"{dataset.meta.phrases[source]} of {article(name)}"]


def read_captions(path):
    """{image path: row} of a captions.jsonl; exits with status 2 at a line that is none."""
    try:
        text, rows = path.read_text(encoding="utf-8-sig").rstrip("\n"), {}
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read ({error}). Mend it, or name another with --captions.")
    for number, line in enumerate(text.split("\n") if text else (), 1):
        try:
            row = json.loads(line)
            rows[row["path"]] = {**row, "caption": row["caption"].strip()}
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f'{path}, line {number}: not {{"path": …, "caption": …}}. Mend or remove it.')
    return rows


def read_rows(path):
    """{image path: row} of a captions.jsonl and of what processes wrote beside it; these files."""
    rows = read_captions(path) if path.exists() else {}
    parts = sorted(path.parent.glob(f".{path.name}.part*"))  # the earliest first
    for part in parts:
        with undamaged(part, "Remove it: what it says will be said again."):
            whole = part.read_text().rpartition("\n")[0]  # a kill may have left half a line
            for row in map(json.loads, whole.splitlines()):
                rows[row["path"]] = {**row, "caption": row["caption"].strip()}
    return rows, parts


def write_rows(path, rows):
    """Write dicts as JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda new: new.write_text(text))


def captions(dataset, items):
    """c_i: each item's own caption; exits with status 2 where there is no file, or not for all."""
    make = f"Make them: python anchors.py caption {dataset.name} SOURCE; or name --captions FILE."
    if dataset.captions is None:
        fail(f"no captions for {dataset.name}: every image of the source needs one. {make}")
    rows, paths = read_captions(dataset.captions), [location.path for location, _ in items]
    missing = [path for path in paths if path not in rows or not rows[path]["caption"]]
    if missing:
        lacks = f"has no caption for {len(missing)} of {len(paths)} images, {missing[0]} the first"
        fail(f"{dataset.captions} {lacks}. {make}")
    return [rows[path]["caption"] for path in paths]


# "a photo of", "a black and white sketch of": up to three words, and one for pictures, at the start
MEDIUM = re.compile(
    r"^(an? )?((?!an?\b|the\b)[\w-]+ ){0,3}"
    r"(photo|photograph|picture|image|painting|drawing|sketch|cartoon|render) of ", re.I
)


def caption_texts(dataset, domain, items):
    """P_k(c_i): each item's caption in the words of `domain`: "a sketch of a Weimaraner".

    CHOICE: a caption that itself starts "a photo of" loses those words, or the prompt would say
    both; alternative: keep them.
    """
    phrase = dataset.meta.phrases[domain]
    return [f"{phrase} of {MEDIUM.sub('', caption)}" for caption in captions(dataset, items)]


if __name__ == "__main__":
    from sets.hub import main

    main()
