"""Data sets: image folders {domain}/{class}/*, their words, splits and captions.

    python data.py pacs            # fetches what the Hugging Face hub has of a data set, ImageNet's evaluation sets too

A data set is known by name: one of DATASETS below, or any folder that brings its own description, `dataset.json`:

    {"phrases": {"3d": "a 3d render", "sketch": "a sketch"},   what the pictures of each domain folder are called
     "fractions": {"train": 0.5, "val": 0.1, "test": 0.4},     optional: how the source domain is split
     "same_stem_same_thing": true,                             optional: files of one name show one thing, in any domain
     "templates": {"3d": ["a 3d {}.", "a render of the {}."]}, optional: class prompts (default: the phrase alone)
     "model": "local-dir:emoji_clip",                          optional: the CLIP to use unless --model says otherwise
     "captioner": "emoji_captioner",                           optional: the captioner, likewise
     "pool": "emoji_pool",                                     optional: folder of image-text pairs to retrieve from
     "unseen": "emoji_unseen",                                 optional: data set of other classes in the same domains
     "schedules": {"visual": {"lr": 0.0003}},                  optional: what differs from finetune.py's SCHEDULES
     "frozen_stages": 6}                                       optional: what --frozen-stages is unless it says otherwise
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

# What dataset.json says of other data sets, and more. The domains are the folders, in any capitalisation, the first of them
# the source unless one is named; a phrase says what the pictures of each are called ("PHRASE of a dog"). `counts` are the
# published numbers of images, checked when the set is read. `hub`: its repository, and its columns of domain and class.
# `by_hand`: how to come by a set that no repository here has.
# CHOICE: the phrases of all sets but PACS, which mappers go by, and which domain is the source; alternative: a dataset.json.
DATASETS = {
    "pacs": {
        "phrases": {"photo": "a photo", "art_painting": "an art painting", "cartoon": "a cartoon", "sketch": "a sketch"},
        "counts": {"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929},
        "hub": ("flwrlabs/pacs", "domain", "label"),
    },
    "office_home": {
        "phrases": {
            "real_world": "a photo", "art": "an artwork", "clipart": "a clipart image", "product": "a product image",
        },
        "counts": {"real_world": 4357, "art": 2427, "clipart": 4365, "product": 4439},
        "hub": ("flwrlabs/office-home", "domain", "label"),
    },
    "domainnet": {
        "phrases": {
            "real": "a photo", "clipart": "a clipart image", "infograph": "an infographic", "painting": "a painting",
            "quickdraw": "a quick doodle", "sketch": "a sketch",
        },
        "counts": {
            "real": 172947, "clipart": 48129, "infograph": 51605, "painting": 72266, "quickdraw": 172500, "sketch": 69128,
        },
        "hub": ("wltjr1007/DomainNet", "domain", "category"),
        "official": True,  # its split is that of the files {domain}_test.txt
        "schedules": {"visual": {"batch_size": 512}, "all": {"batch_size": 512}},
    },
    # photographs from four collections, and from four places: their domains have no word for a style
    "vlcs": {
        "phrases": {"VOC2007": "a photo", "LabelMe": "a photo", "SUN09": "a photo", "Caltech101": "a photo"},
        "counts": {"VOC2007": 3376, "LabelMe": 2656, "SUN09": 3282, "Caltech101": 1415},
        "by_hand": "DomainBed's download script (python -m domainbed.scripts.download) fetches them",
    },
    "terra_incognita": {
        "phrases": {f"location_{n}": "a camera trap photo" for n in (38, 43, 46, 100)},
        "counts": {"location_38": 9736, "location_43": 3970, "location_46": 5883, "location_100": 4741},
        "by_hand": "DomainBed's download script (python -m domainbed.scripts.download) fetches them",
    },
    # The folders train and val (the test part) of the ILSVRC 2012 challenge make up the domain "imagenet". All others are
    # webdatasets, of the hub's clip-benchmark: (folder, published number of test images); those of `zero_shot` have other
    # classes. Schedules: FLYP's for flyp and arf ("all"), WiSE-FT's for finetune ("visual"); both warm up for 500 steps.
    "imagenet": {
        "phrases": {
            "imagenet": "a photo", "v2": "a photo", "r": "a rendition", "a": "a photo", "sketch": "a sketch",
            "objectnet": "a photo",
        },
        "counts": {"imagenet": 1281167 + 50000},
        "fractions": {"train": 1, "val": 0, "test": 0},
        "by_hand": "image-net.org gives ILSVRC 2012 to who registers; val has to be sorted into class folders as train is",
        "shifted": {
            "v2": ("wds_imagenetv2", 10000), "r": ("wds_imagenet-r", 30000), "a": ("wds_imagenet-a", 7500),
            "sketch": ("wds_imagenet_sketch", 50889), "objectnet": ("wds_objectnet", 18574),
        },
        "zero_shot": {
            "caltech": ("wds_vtab-caltech101", 6085), "flowers": ("wds_vtab-flowers", 6149), "food": ("wds_food101", 25250),
            "sun": ("wds_sun397", 108754), "dtd": ("wds_vtab-dtd", 1880), "aircraft": ("wds_fgvc_aircraft", 3333),
            "cars": ("wds_cars", 8041), "pets": ("wds_vtab-pets", 3669), "eurosat": ("wds_vtab-eurosat", 5400),
            "ucf": ("wds_ucf101", 3783),
        },
        "schedules": {
            "visual": {"batch_size": 512, "lr": 3e-5, "warmup": 0.02, "max_norm": 1.0},
            "all": {"batch_size": 512, "lr": 1e-5, "warmup": 0.02},
        },
    },
}
BY_HAND = {"wds_ucf101"}  # clip-benchmark has no UCF101: middle frames of its videos, in the same layout, are to be made
# CHOICE: DomainBed's 80/20, the 80 cut into training and validation; alternative: PACS's own 90/10 lists.
FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def fail(message):
    """Print one line that says what is wrong and how to mend it, and stop with exit status 2 (a usage error)."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # a line of its own, also under a progress bar
    sys.exit(2)


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


def by_one_process(what):
    """Exit with status 2 under torchrun, whose processes would all do what one is to do."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail(f"{what} is not there, and one process is to make it. First run, without torchrun: python data.py NAME.")


@dataclass(frozen=True)
class Dataset:
    """One data set on disk. `images[domain]` lists (where, class index), sorted.

    where: a path relative to `folder`, or (path of a tar, offset, size) of a member of an archive.
    """

    name: str
    folder: Path
    phrases: dict
    classes: list  # folder names, sorted
    names: list    # what they are called in English, in the same order
    images: dict = field(repr=False)
    about: dict = field(repr=False)  # its description, for what only some data sets have
    captions: Path | None
    official: dict = field(default_factory=dict, repr=False)  # {domain: set of the paths of its official test part}
    own: dict = field(default_factory=dict, repr=False)       # {domain: (names, templates)} where they are not the data set's
    absent: dict = field(default_factory=dict)                # {domain that is not on this disk: how to get it}

    def targets(self, source):
        """The domains other than `source` that are on this disk, in the order of `phrases`."""
        return [domain for domain in self.phrases if domain != source and domain in self.images]

    def styles(self, source):
        """The domains that a mapper can be told to go to: those called otherwise than `source`. No image of them is needed.

        Exits with status 2 where there is none.
        """
        styles = [domain for domain, phrase in self.phrases.items() if phrase != self.phrases[source]]
        if not styles:
            fail(
                f"{self.name}: its domains are all called {self.phrases[source]!r}, so no text points from one to another. "
                f"Leave out lads and ldfs, or give them phrases in {self.folder / 'dataset.json'} (see data.py)."
            )
        return styles

    def trainable(self, domain):
        """All images of `domain` but those of an official test part."""
        return [(where, label) for where, label in self.images[domain] if where not in self.official.get(domain, ())]


def folded(name, between=""):
    """A name without capitals, spaces and punctuation: "Real World" and real_world are one domain."""
    return re.sub("[^a-z0-9]+", between, name.lower())


def find(folder, name):
    """The folder in `folder` that is called `name`, in whatever capitalisation; folder / name where there is none."""
    alike = [f for f in folder.glob("*") if f.is_dir() and folded(f.name) == folded(name)]
    return alike[0] if alike else folder / name


def load(name, root="data", captions=None):
    """Find the data set `name` under the folder `root` (or at `root` itself), or fetch or make it, and check it.

    Exits with status 2 when it is unknown, missing or cannot be had, its domains hold different classes, or a class is empty.
    """
    root = Path(root)
    folder = locate(name, root)
    if folder is None and "hub" in DATASETS.get(name, {}):
        fetch_data_set(name, root)
        folder = locate(name, root)
    if folder is None and name == "emoji":
        make_emoji("benchmark", root)
        folder = locate(name, root)
    if folder is None:
        known = sorted({*DATASETS, "emoji", *(f.parent.name for f in root.glob("*/dataset.json"))})
        if name in DATASETS:
            wanted = ", ".join(("train", "val") if name == "imagenet" else DATASETS[name]["phrases"])
            fail(
                f"the data set {name} is not in {root / name}. Put its folders ({wanted}; each with a folder per class) there, "
                f"or name the folder above it with --data. {DATASETS[name]['by_hand']}."
            )
        fail(
            f"unknown data set {name!r}. Known: {', '.join(known)}. "
            f"Your own: a folder {root / name} with a dataset.json (see data.py)."
        )
    about = DATASETS.get(name, {})
    if (folder / "dataset.json").exists():
        about = {**about, **read_description(folder / "dataset.json")}
    if captions is None:
        captions = next((f for f in (folder / "captions.jsonl", root / f"{name}_captions.jsonl") if f.exists()), None)
    elif not Path(captions).is_file():
        fail(f'--captions {captions}: no such file. Each line of it is {{"path": "photo/dog/1.jpg", "caption": "…"}}.')
    if "shifted" in about:
        classes, names, images, about, more = read_imagenet(folder, about)
    else:
        classes, images, official = read_domains(name, folder, list(about["phrases"]))
        names, more = [words(c) for c in classes], {"official": official}
    for domain, items in images.items():
        expected = about.get("counts", {}).get(domain, len(items))
        if expected != len(items):
            warn(f"{name}, {domain}: {len(items)} images in {folder}, {expected} are published")
    if about.get("official") and len(more["official"]) < len(images):
        warn(f"{folder} has not the official lists {{domain}}_test.txt of all domains: those without are split at random")
    for domain, how_to in more.get("absent", {}).items():
        warn(f"{name}, {domain} will not be run: {how_to}")
    return Dataset(name, folder, about["phrases"], classes, names, images, about, captions and Path(captions), **more)


def make_emoji(stage, root):
    """Have emoji.py draw its "benchmark" or its "pool" into `root`."""
    by_one_process(f"the emoji {stage}")
    print(f"drawing the emoji {stage} into {root}: python emoji.py {stage}")
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("emoji.py")), stage, "--data", str(root)], check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def locate(name, root):
    """The folder of the data set `name`: root/NAME in whatever capitalisation, or `root` itself; None where there is none."""
    for folder in (root / name, root):
        if (folder / "dataset.json").exists():
            return folder
    about = DATASETS.get(name, {})
    wanted = ("train", "val") if name == "imagenet" else about.get("phrases", ())
    alike = [f for f in root.glob("[!.]*") if f.is_dir() and folded(f.name).startswith(folded(name))]
    alike.sort(key=lambda f: (folded(f.name) != folded(name), f.name))  # PACS before PACS_old
    found = [f for f in alike if any(find(f, domain).is_dir() for domain in wanted)]
    if name != "imagenet" and wanted and all(find(root, domain).is_dir() for domain in wanted):
        found.append(root)
    return found[0] if found else None


def read_folders(folder):
    """Class folders of `folder` and [(their file's path, class index)], sorted; exits with status 2 where one is empty."""
    classes, items = sorted(c.name for c in folder.glob("*") if c.is_dir()), []
    for label, cls in enumerate(classes):
        files = sorted(f for f in (folder / cls).iterdir() if f.suffix.lower() in IMAGE_ENDINGS)
        if not files:
            endings = ", ".join(sorted(IMAGE_ENDINGS))
            fail(f"{folder / cls} holds no images ({endings}). Fill it, or remove the class everywhere.")
        items += [(f, label) for f in files]
    return classes, items


def read_domains(name, folder, domains):
    """Classes, images and official test parts of a data set in DomainBed's layout, {domain}/{class}/*."""
    classes, images, official = None, {}, {}
    for domain in domains:
        at = find(folder, domain)
        found, items = read_folders(at)
        if not found:
            fail(f"{at} holds no class folders. {name} needs the domains {', '.join(domains)}; get it whole.")
        classes = classes or found
        if list(map(folded, found)) != list(map(folded, classes)):
            odd = ", ".join(sorted({*found} ^ {*classes})[:5])
            fail(
                f"{at} has other classes than {find(folder, domains[0])}: not in both: {odd}. "
                "Give every domain the same class folders."
            )
        images[domain] = [(f.relative_to(folder).as_posix(), label) for f, label in items]
        if (listed := folder / f"{domain}_test.txt").exists():  # DomainNet's: a path on each line, and its class's number
            official[domain] = {re.sub(r" \d+$", "", line) for line in listed.read_text().splitlines()}
            if not official[domain] & {path for path, _ in images[domain]}:
                fail(f"{listed} names no image of {at}. Put the list there that belongs to these files, or remove it.")
    return classes, images, official


def read_imagenet(folder, about):
    """(wnids, names, images, description, fields) of ImageNet with the evaluation sets that lie beside its folder."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    parts = {part: read_folders(folder / part) for part in ("train", "val")}
    for part, (classes, _) in parts.items():
        if len(classes) != 1000 or classes != parts["train"][0]:
            fail(f"{folder / part} has {len(classes)} class folders. ImageNet has 1000 (n01440764 …), in train and in val.")
    images = {part: [(f.relative_to(folder).as_posix(), label) for f, label in items] for part, (_, items) in parts.items()}
    official = {"imagenet": {path for path, _ in images["val"]}}
    names = list(IMAGENET_CLASSNAMES)  # in the order of the sorted wnids
    templates = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    shifted, own, absent = read_webdatasets(folder.parent, about["shifted"])
    own = {domain: told for domain, told in own.items() if told[0] != names}  # V2, Sketch: the same classes, the same head
    about = {**about, "templates": {"imagenet": templates}}
    images = {"imagenet": images["train"] + images["val"], **shifted}
    return parts["train"][0], names, images, about, {"official": official, "own": own, "absent": absent}


def read_webdatasets(root, sets):
    """Evaluation sets in the layout of the hub's clip-benchmark: {domain: items}, {domain: (names, templates)}, {absent: how}.

    sets: {domain: (folder in `root`, published number of test images)}. A folder holds test/0.tar … (KEY.webp, .jpg or .png
    with KEY.cls, a number), test/nshards.txt, classnames.txt and zeroshot_classification_templates.txt.
    Exits with status 2 where one is there, but not whole.
    """
    images, own, absent = {}, {}, {}
    for domain, (name, count) in sets.items():
        folder = root / name
        if not folder.is_dir():
            how_to = "made by hand" if name in BY_HAND else f"fetched from clip-benchmark/{name} by: python data.py imagenet"
            absent[domain] = f"{folder} is not there; it is {how_to}"
            continue
        try:
            names = (folder / "classnames.txt").read_text().splitlines()
            templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
            shards = [folder / "test" / f"{n}.tar" for n in range(int((folder / "test" / "nshards.txt").read_text()))]
        except (OSError, ValueError) as error:
            fail(f"{folder} is not a webdataset of clip-benchmark ({error}). Fetch it again, or remove it.")
        border = (2,) if domain == "objectnet" else ()  # CHOICE: ObjectNet's red frame is cut off; alternative: leave it
        pairs, bad = [], [f"{shard} is not there" for shard in shards if not shard.exists()]
        for shard in (() if bad else shards):
            found, broken = read_shard(shard, "cls")
            pairs += found
            bad += broken
        items = [((*where, *border), int(label)) for _, where, label, _ in pairs if label.isdigit() and int(label) < len(names)]
        if bad or not items or len(items) < len(pairs):
            fail(f"{folder} is damaged: {[*bad, 'labels without a name'][0]}. Fetch it again, or remove it.")
        if len(items) != count:
            warn(f"{folder} holds {len(items)} test images, {count} are published")
        # CHOICE: the templates that clip-benchmark gives to each set; alternative: one prompt of ours for all
        images[domain], own[domain] = items, (names, [t.replace("{c}", "{}") for t in templates])
    return images, own, absent


def read_shard(path, text_ending="txt"):
    """[(key, where, text, about)] of a webdataset shard, and [name] of what cannot be used, from tar headers and texts alone.

    An image is KEY.jpg, .png or .webp, its text KEY.txt (or another ending), what else is known of it KEY.json (optional);
    `where` is for features.open_image.
    """
    images, texts, abouts, bad = {}, {}, {}, []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) or (member := behind_damage(tar, path, bad)):
                key, _, ending = member.name.rpartition(".")
                if f".{ending}" in IMAGE_ENDINGS:
                    images[key] = (str(path), member.offset_data, member.size)
                elif ending == text_ending:
                    texts[key] = tar.extractfile(member).read().decode(errors="replace").strip()
                elif ending == "json":
                    try:
                        abouts[key] = json.loads(tar.extractfile(member).read())
                    except ValueError:
                        bad.append(f"{path.name}: {member.name} (not JSON)")
    except (tarfile.TarError, OSError, EOFError) as error:
        bad.append(f"{path.name} after {len(images)} images ({error})")
    bad += [f"{path.name}: {key} (no text)" for key in images if not texts.get(key)]
    return [(key, where, texts[key], abouts.get(key, {})) for key, where in images.items() if texts.get(key)], bad


def behind_damage(tar, path, bad):
    """The first member behind a damaged header, which is named in `bad`; None at the end of the archive.

    tarfile takes a damaged header for the end: but there the rest is zeros.
    """
    tar.fileobj.seek(tar.offset)
    if not tar.fileobj.read(512).strip(b"\0"):
        return None
    bad.append(f"{path.name}: what begins at byte {tar.offset} (damaged header)")
    while block := tar.fileobj.read(512):
        if block[257:262] == b"ustar":
            tar.offset = tar.fileobj.tell() - 512
            return tar.next() or behind_damage(tar, path, bad)
    return None


def read_description(path):
    """The contents of a dataset.json; exits with status 2 where it is not as the top of this file shows it."""
    try:
        about = json.loads(path.read_text())
        phrases, fractions = about["phrases"], about.get("fractions", FRACTIONS)
        whole = set(fractions) == set(FRACTIONS) and abs(sum(fractions.values()) - 1) < 1e-6
        filled = [t.format("x") for templates in about.get("templates", {}).values() for t in templates]
        known = set(about.get("schedules", {})) <= {"head", "prompt", "visual", "all"}
        if len(phrases) >= 2 and whole and known and all(filled):
            return about
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        pass
    fail(
        f"{path} does not describe a data set: it needs phrases of two domains or more; fractions of train, val and test "
        "that make 1; schedules of head, prompt, visual, all; templates with {} for the class. The top of data.py shows one."
    )


def load_unseen(dataset):
    """The Dataset of other classes that tells zero-shot ability; None where there is none.

    ImageNet's are the ten `zero_shot` sets, each a domain; another data set's what it names as "unseen", beside its own folder.
    """
    if "zero_shot" in dataset.about:
        sets = dataset.about["zero_shot"]
        images, own, absent = read_webdatasets(dataset.folder.parent, sets)
        phrases = dict.fromkeys(sets, "a photo")
        return Dataset("zero-shot", dataset.folder.parent, phrases, [], [], images, {}, None, own=own, absent=absent)
    if "unseen" not in dataset.about:
        return None
    folder = dataset.folder.parent / dataset.about["unseen"]
    if not (folder / "dataset.json").exists() or folder.resolve() == dataset.folder.resolve():
        fail(f"{dataset.folder / 'dataset.json'}: unseen is {folder.name!r}, but {folder} is no other data set. Mend either.")
    return load(folder.name, folder.parent)


def split(dataset, source, domain, part, seed):
    """[(where, label)] of one part ("train", "val", "test") of `domain` when `source` is what is finetuned on.

    The source domain is split class by class; of a target domain only "test" is there, and is all of it. A domain that has
    an official test part is tested on that, and what else it has is split into "train" and "val". Where files of one name
    show one thing, what is trained or validated on in the source is in no target's test part either.
    A pure function of (data set, file names, seed): things are put in the order of a hash.
    """
    official, same_stem = dataset.official.get(domain), dataset.about.get("same_stem_same_thing")
    if domain != source and part != "test":
        return []
    if official is not None and part == "test":
        return [(path, y) for path, y in dataset.images[domain] if path in official]
    if domain != source and not same_stem:
        return dataset.images[domain]

    def thing(path):
        *folders, file = path.split("/")
        return Path(path).stem if same_stem else "/".join([*(folded(f, "_") for f in folders), file])

    def rank(name):
        return hashlib.sha256(f"{dataset.name} {seed} {name}".encode()).hexdigest()

    fractions = dict(dataset.about.get("fractions", FRACTIONS))
    if dataset.official.get(source):  # its test part is not among the things
        rest = fractions["train"] + fractions["val"]
        fractions = {"train": fractions["train"] / rest, "val": fractions["val"] / rest}
    things_of, part_of = {}, {}  # {class: things of the source}; {(class, thing): the part it belongs to}
    for path, label in dataset.trainable(source):
        things_of.setdefault(label, set()).add(thing(path))
    for label, things in things_of.items():
        things = sorted(things, key=rank)
        train = max(1, round(fractions["train"] * len(things)))
        val = train + round(fractions["val"] * len(things))
        val = len(things) if dataset.official.get(source) else val
        part_of |= {(label, t): "train" if i < train else "val" if i < val else "test" for i, t in enumerate(things)}
    return [(path, y) for path, y in dataset.trainable(domain) if part_of.get((y, thing(path)), "test") == part]


# ---------------------------------------------------------------------------------------------------------------------
# From the Hugging Face hub


def fetch(repository, folder, patterns, into=None, room=1):
    """Download a dataset repository's files of these patterns into `folder`, which is there when it is whole.

    Says first how large they are, and goes on where it was stopped. `into`: where to put the data by hand, if not `folder`;
    room: how many times their size they will take.
    Exits with status 2 where the hub or the repository cannot be reached, or the disk has no room.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

    by_one_process(into or folder)
    if folder.is_dir() and any(folder.iterdir()):
        fail(f"{folder} is there, but holds nothing of {repository}'s that can be used. Move it away, or name another --data.")
    part = folder.with_name(f".{folder.name.lstrip('.')}.part")
    try:
        about = HfApi().dataset_info(repository, files_metadata=True)
        files = list(filter_repo_objects(about.siblings, allow_patterns=patterns, key=lambda f: f.rfilename))
        size = sum(f.size or 0 for f in files)
        part.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(part).free + sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
        if size * room > free:
            wanted = f"{size * room / 1e9:.1f} GB, and there are {free / 1e9:.1f}"
            fail(f"{repository} wants {wanted} in {folder.parent}. Make room, or name another --data.")
        print(f"fetching {repository} from the Hugging Face hub into {folder}: {len(files)} files, {size / 1e9:.2f} GB")
        if not sys.stderr.isatty():
            disable_progress_bars()
        snapshot_download(repository, repo_type="dataset", revision=about.sha, local_dir=part, allow_patterns=patterns)
        if lacking := [f.rfilename for f in files if (part / f.rfilename).stat().st_size != f.size]:
            raise OSError(f"{lacking[0]} did not arrive whole")
    except Exception as error:  # no network, no such repository, HF_HUB_OFFLINE, a full disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fail(
            f"could not fetch {repository} from the Hugging Face hub ({reason}). With a network run again, it goes on where it "
            f"stopped; or put the data into {into or folder} by hand (README, Data sets)."
        )
    part.rename(folder)


def fetch_cc3m(folder):
    """Conceptual Captions as webdataset shards: what was left of it when the hub's copy was made."""
    fetch("pixparse/cc3m-wds", folder, ["cc3m-train-*.tar"])


def fetch_data_set(name, root):
    """Write a data set of the hub (parquet; columns image, domain, class) as {domain}/{class}/* into root/NAME, once."""
    from datasets import ClassLabel, Image, load_dataset

    by_one_process(root / name)
    repository, domain_column, class_column = DATASETS[name]["hub"]
    parquet, part = root / f".{name}.parquet", root / f".{name}.part"
    if not parquet.exists():
        fetch(repository, parquet, ["*.parquet", "README.md"], into=root / name, room=2)
    shutil.rmtree(part, ignore_errors=True)
    lists = {}  # {split: lines}: the official split, where there is one
    for of, rows in load_dataset(str(parquet), streaming=True).items():
        rows = rows.cast_column("image", Image(decode=False))

        def name_of(row, column, features=rows.features):
            return features[column].int2str(row[column]) if isinstance(features[column], ClassLabel) else str(row[column])

        for i, row in enumerate(tqdm(rows, desc=f"writing {name}, {of}", unit="img")):
            domain, cls = name_of(row, domain_column), name_of(row, class_column).replace("/", "_")
            file = Path(row["image"]["path"] or "").name or f"{of}_{i:06d}.jpg"
            path = part / domain / cls / file
            if path.exists():
                path = path.with_name(f"{of}_{i:06d}_{file}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(row["image"]["bytes"])
            except OSError as error:
                fail(f"{path}: could not be written ({error.strerror}). Make room, and run again: the download is kept.")
            lists.setdefault(f"{domain}_{of}.txt", []).append(f"{path.relative_to(part).as_posix()}\n")
    if any(file.endswith("_test.txt") for file in lists):
        for file, lines in lists.items():
            (part / file).write_text("".join(lines))
    old = root / f".{name}.old"
    if (root / name).exists():  # with captions in it, say, but none of its domains
        shutil.copytree(root / name, part, dirs_exist_ok=True)
        (root / name).rename(old)
    part.rename(root / name)
    shutil.rmtree(parquet)
    shutil.rmtree(old, ignore_errors=True)
    print(f"wrote {root / name}")


# ---------------------------------------------------------------------------------------------------------------------
# Words


def words(folder_name):
    """A class in English: "Alarm_Clock" -> "alarm clock"."""
    return folder_name.replace("_", " ").lower()


def article(noun):
    """The noun phrase with "a" or "an" before it; as it is when plural or a proper name. A rule of thumb, by spelling."""
    if noun[0].isupper() or re.search(r"[^su]s$", noun.split(" with ")[0].split(":")[0]):
        return noun
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def class_texts(dataset, domain):
    """One prompt a class in the words of `domain`: "a sketch of a dog". C strings, in the order of `classes`."""
    return [f"{dataset.phrases[domain]} of {article(name)}" for name in dataset.names]


def prompts(dataset, source, domain=None):
    """Class prompts: T templates, each a list of C strings. FLYP draws one of them for each image; a head is their mean.

    They are in the words of `source`, of the data set's classes, or of those that `domain` has of its own.
    Source: FLYP; CLIP's 80 templates for ImageNet. CHOICE: elsewhere one prompt, the source's phrase with the right article,
    whatever domain is measured, since a model in use does not know what domain it will meet; alternative: `templates`.
    """
    names, templates = dataset.own.get(domain, (dataset.names, dataset.about.get("templates", {}).get(source, ())))
    return [[template.format(name) for name in names] for template in templates] or [class_texts(dataset, source)]


def read_captions(path):
    """{image path: row} of a captions.jsonl; exits with status 2 at a line that is not {"path": …, "caption": …}."""
    rows = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["path"]] = {**row, "caption": row["caption"].strip()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            fail(f'{path}, line {number}: not {{"path": "photo/dog/1.jpg", "caption": "…"}}. Mend or remove it.')
    return rows


def captions(dataset, paths):
    """c_i: each image's own caption, one string a path. Exits with status 2 when there is no file, or an image has none."""
    if dataset.captions is None:
        fail(
            f"no captions for {dataset.name}: every image of the source needs one. Make them: python anchors.py caption "
            f"{dataset.name} SOURCE; or put yours into {dataset.folder / 'captions.jsonl'}, or name a file with --captions."
        )
    rows = read_captions(dataset.captions)
    missing = [p for p in paths if p not in rows or not rows[p]["caption"]]
    if missing:
        fail(
            f"{dataset.captions} has no caption for {len(missing)} of {len(paths)} images, {missing[0]} the first. "
            f"Caption them: python anchors.py caption {dataset.name} SOURCE; or name another file with --captions."
        )
    return [rows[p]["caption"] for p in paths]


# "a photo of", "a black and white sketch of": up to three words and a word for pictures, at the start
MEDIUM = re.compile(
    r"^(an? )?((?!an?\b|the\b)[\w-]+ ){0,3}(photo|photograph|picture|image|painting|drawing|sketch|cartoon|render) of ", re.I
)


def caption_texts(dataset, domain, paths):
    """P_k(c_i): each image's own caption in the words of `domain`: "a sketch of a Weimaraner". One string a path.

    CHOICE: a caption that itself starts "a photo of" loses those words, or the prompt would say both; alternative: keep.
    Exits with status 2 as `captions` does.
    """
    return [f"{dataset.phrases[domain]} of {MEDIUM.sub('', caption)}" for caption in captions(dataset, paths)]


# ---------------------------------------------------------------------------------------------------------------------
# What every script is told


class Parser(argparse.ArgumentParser):
    """argparse, with one line at bad arguments."""

    def error(self, message):
        fail(f"{message}. See --help.")


def positive(kind):
    """An argparse type: a number of `kind` (int, float) above 0."""

    def read(text):
        number = kind(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return number

    read.__name__ = f"positive {kind.__name__}"
    return read


def arguments(description):
    """The parser of all stages: each takes every flag, and heeds its own, so that the scripts hand on what they are told."""
    parser = Parser(description=description.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("dataset", help=f"{', '.join(DATASETS)}, emoji, or a folder in --data that has a dataset.json")
    add("source", nargs="?", help="domain to finetune on, all others are unseen until evaluation (default: the set's first)")
    add("--data", default="data", help="folder that holds the data set's folder (default: data)")
    add("--captions", help="JSON lines of path and caption (default: the data set's captions.jsonl, made if it is not there)")
    add("--model", help="open_clip name, hf-hub:…, local-dir:PATH, own checkpoint.pt (default: set's, else ViT-B-16-quickgelu)")
    add("--pretrained", default="openai", help="open_clip's tag of the weights, of a model known by name (default: openai)")
    add("--seeds", type=positive(int), default=5, help="seeds 0 … N-1: each its split, initialisation and order (default: 5)")
    add("--run", help="folder of the results (default: runs/DATASET-SOURCE)")
    add("--methods", nargs="+", metavar="M", help="finetune lads ldfs flyp arf arf+ldfs …; see methods.py")
    add("--ablate", action="store_true", help="LDFS also without each of its parts, and with other sigmas and lambdas")
    add = parser.add_argument_group("captions (anchors.py)").add_argument
    add("--captioner", help="model on the Hugging Face hub, or a folder; if named, others' captions give way (default: the "
        "data set's, else Salesforce/blip2-opt-2.7b)")
    add("--prompt", default="", help="words that the caption goes on from (default: none)")
    add("--beams", type=positive(int), default=5, help="beams of the search (default: 5)")
    add("--max-tokens", type=positive(int), default=30, help="longest caption (default: 30)")
    add("--caption-batch", type=positive(int), default=32, help="images at a time (default: 32)")
    add = parser.add_argument_group("retrieved pairs (anchors.py)").add_argument
    add("--pool", help="folder of webdataset shards (default: the data set's, else cc3m, in --data, fetched if not there)")
    add("--k", type=positive(int), default=1, help="pairs for each query (default: 1)")
    add("--query", choices=["image", "text"], default="image", help="the source's images (default), or class prompts")
    add("--same", type=positive(float), default=0.99, help="cosine at which a pair is left out as a test image (default: 0.99)")
    add = parser.add_argument_group("mapper.py").add_argument
    add("--mapper-steps", type=positive(int), default=300, help="steps for each mapper (default: 300)")
    add = parser.add_argument_group("finetune.py, where a default is not said: see SCHEDULES there").add_argument
    add("--train", choices=["head", "prompt", "visual", "all"],
        help="linear head (default), CoOp's prompt, image tower and head (default with flyp, arf: these train both), all")
    add("--init", choices=["text", "scratch"], help="the head starts as the class prompts, or random (default: see INITS)")
    add("--frozen-stages", type=int, metavar="N", help="first stages of the image tower that stay as they are (default: 0)")
    add("--epochs", type=positive(int), help="passes over the training images")
    add("--batch-size", type=positive(int), help="images a step")
    add("--lr", type=positive(float), help="peak learning rate")
    add("--lambda-cap", type=positive(float), default=1.0, help="weight of ARF's caption loss (default: 1)")
    add("--lambda-ret", type=positive(float), default=1.0, help="weight of ARF's loss on retrieved pairs (default: 1)")
    add = parser.add_argument_group("evaluate.py").add_argument
    add("--alphas", nargs="*", type=float, default=[], help="also mix in the original weights: 0.1 0.2 …")
    return parser


def prepare(args, dataset=None):
    """Dataset (unless given) and run folder of parsed `arguments`; exits with status 2 for an unknown domain.

    Sets args.source to the data set's first domain where none was named.
    """
    dataset = dataset or load(args.dataset, args.data, args.captions)
    args.source = args.source or next(iter(dataset.phrases))
    if args.source not in dataset.phrases:
        fail(f"{dataset.name} has no domain {args.source!r}. Its domains: {', '.join(dataset.phrases)}.")
    if args.source in dataset.absent or not isinstance(dataset.images[args.source][0][0], str):
        fail(f"{dataset.name}'s {args.source} is to be tested on alone. Finetune on another: {next(iter(dataset.phrases))}.")
    run = Path(args.run or f"runs/{args.dataset}-{args.source}")
    run.mkdir(parents=True, exist_ok=True)
    return dataset, run


def write_atomically(path, save):
    """Call save(temporary path) and move the outcome to `path`: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    save(part)
    os.replace(part, path)


def digest(tensors):
    """A hash of the values of tensors: what was computed from them is good as long as it is the same."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:20]


def sha(text):
    """A short hash of a string."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def commit():
    """The commit of this repository, with "-dirty" where files differ from it; None where git cannot tell."""
    if not shutil.which("git"):
        return None
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None


def append_results(run, args, rows, **more):
    """Append rows (method, domain, split, metric, value, n, seed) to run/results.jsonl, each with what made it, and `more`.

    Of the flags it keeps those that are not as by default, and those that name a block of the table.
    """
    default = vars(arguments("").parse_args([args.dataset]))
    told = {k: v for k, v in vars(args).items() if v != default.get(k) or k in ("model", "train", "init")}
    shared = {
        **more,
        "dataset": args.dataset,
        "source": args.source,
        "args": {k: v for k, v in told.items() if k not in ("dataset", "source", "methods", "ablate", "alphas")},
        "versions": {package: version(package) for package in ("torch", "open_clip_torch")},
        "commit": commit(),
    }
    columns = ("method", "domain", "split", "metric", "value", "n", "seed")
    path = run / "results.jsonl"
    lines = path.read_text() if path.exists() else ""
    lines += "".join(json.dumps({**dict(zip(columns, row, strict=True)), **shared}) + "\n" for row in rows)
    write_atomically(path, lambda part: part.write_text(lines))


def main():
    parser = Parser(description="Fetch what the Hugging Face hub has of a data set.")
    known = [name for name in DATASETS if DATASETS[name].keys() & {"hub", "shifted"}]
    parser.add_argument("dataset", choices=[*known, "cc3m"], help="of imagenet its evaluation sets; cc3m is ARF's pool")
    parser.add_argument("--data", default="data", type=Path, help="folder to put it into (default: data)")
    args = parser.parse_args()
    if args.dataset == "cc3m":
        return fetch_cc3m(args.data / "cc3m")
    about = DATASETS[args.dataset]
    for name, _ in [*about.get("shifted", {}).values(), *about.get("zero_shot", {}).values()]:
        if name not in BY_HAND and not (args.data / name).is_dir():
            fetch(f"clip-benchmark/{name}", args.data / name, ["test/*", "*.txt"])
    dataset = load(args.dataset, args.data)
    print(f"{dataset.folder}: " + ", ".join(f"{domain} {len(items)} images" for domain, items in dataset.images.items()))


if __name__ == "__main__":
    main()
