"""Data sets: image folders {domain}/{class}/*, their words, splits and captions.

A data set is known by name: one of DATASETS below, or any folder that brings its own description, `dataset.json`:

    {"phrases": {"3d": "a 3d render", "sketch": "a sketch"},   what the pictures of each domain folder are called
     "fractions": {"train": 0.5, "val": 0.1, "test": 0.4},     optional: how the source domain is split
     "same_stem_same_thing": true,                             optional: files of one name show one thing, in any domain
     "templates": {"3d": ["a 3d {}.", "a render of the {}."]}, optional: FLYP's prompts (default: the phrase alone)
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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

# The domains of a data set are its folders; a phrase says what the pictures of each are called ("PHRASE of a dog").
# `counts` are the published numbers of images, checked when the set is read.
DATASETS = {
    "pacs": {
        "phrases": {"photo": "a photo", "art_painting": "an art painting", "cartoon": "a cartoon", "sketch": "a sketch"},
        "counts": {"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929},
    },
}
# CHOICE: DomainBed's 80/20, the 80 cut into training and validation; alternative: PACS's own 90/10 lists.
FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def fail(message):
    """Print one line that says what is wrong and how to mend it, and stop with exit status 2 (a usage error)."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # a line of its own, also under a progress bar
    sys.exit(2)


@dataclass(frozen=True)
class Dataset:
    """One data set on disk. `images[domain]` lists (path relative to `folder`, class index), sorted by path."""

    name: str
    folder: Path
    phrases: dict
    classes: list  # folder names, sorted; words() makes English of them
    images: dict = field(repr=False)
    fractions: dict
    same_stem_same_thing: bool
    about: dict = field(repr=False)  # its description, for what only some data sets have
    captions: Path | None

    def targets(self, source):
        """The domains other than `source`, in the order of `phrases`."""
        return [domain for domain in self.phrases if domain != source]


def load(name, root="data", captions=None):
    """Find the data set `name` under the folder `root` (or at `root` itself) and check it.

    Exits with status 2 when it is unknown or missing, its domains hold different classes, or a class is empty.
    """
    root = Path(root)
    folder = next((f for f in (root / name, root) if (f / "dataset.json").exists() or _is(f, name)), None)
    if folder is None:
        known = sorted({*DATASETS, *(f.parent.name for f in root.glob("*/dataset.json"))})
        if name in DATASETS:
            wanted = ", ".join(DATASETS[name]["phrases"])
            fail(
                f"the data set {name} is not in {root / name}. Put its folders ({wanted}; each with a folder per class) "
                "there, or name the folder above it with --data."
            )
        if Path(f"{name}.py").exists():
            fail(f"the data set {name} is not in {root / name} yet. Make it: python {name}.py")
        fail(
            f"unknown data set {name!r}. Known: {', '.join(known)}. "
            f"Your own: a folder {root / name} with a dataset.json (see data.py)."
        )
    about = DATASETS.get(name, {})
    if (folder / "dataset.json").exists():
        about = read_description(folder / "dataset.json")

    domains, classes, images = list(about["phrases"]), None, {}
    for domain in domains:
        found = sorted(c.name for c in (folder / domain).glob("*") if c.is_dir())
        if not found:
            fail(f"{folder / domain} holds no class folders. {name} needs the domains {', '.join(domains)}; get it whole.")
        classes = classes or found
        if found != classes:
            odd = ", ".join(sorted({*found} ^ {*classes})[:5])
            fail(
                f"{folder / domain} has other classes than {folder / domains[0]}: not in both: {odd}. "
                "Give every domain the same class folders."
            )
        images[domain] = []
        for label, cls in enumerate(classes):
            files = sorted(f for f in (folder / domain / cls).iterdir() if f.suffix.lower() in IMAGE_ENDINGS)
            if not files:
                endings = ", ".join(sorted(IMAGE_ENDINGS))
                fail(f"{folder / domain / cls} holds no images ({endings}). Fill it, or remove the class everywhere.")
            images[domain] += [(f.relative_to(folder).as_posix(), label) for f in files]
        expected = about.get("counts", {}).get(domain, len(images[domain]))
        if expected != len(images[domain]):
            tqdm.write(f"warning: {folder / domain} holds {len(images[domain])} images, {expected} are published")

    if captions is None:
        captions = next((f for f in (folder / "captions.jsonl", root / f"{name}_captions.jsonl") if f.exists()), None)
    elif not Path(captions).is_file():
        fail(f'--captions {captions}: no such file. Each line of it is {{"path": "photo/dog/1.jpg", "caption": "…"}}.')
    return Dataset(
        name, folder, about["phrases"], classes, images, about.get("fractions", FRACTIONS),
        about.get("same_stem_same_thing", False), about, captions and Path(captions),
    )


def read_description(path):
    """The contents of a dataset.json; exits with status 2 where it is not as the top of this file shows it."""
    try:
        about = json.loads(path.read_text())
        phrases, fractions = about["phrases"], about.get("fractions", FRACTIONS)
        whole = set(fractions) == set(FRACTIONS) and abs(sum(fractions.values()) - 1) < 1e-6
        filled = [t.format("x") for templates in about.get("templates", {}).values() for t in templates]
        if len(phrases) >= 2 and whole and set(about.get("schedules", {})) <= {"head", "visual", "all"} and all(filled):
            return about
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        pass
    fail(
        f"{path} does not describe a data set: it needs phrases of two domains or more; fractions of train, val and test "
        "that make 1; schedules of head, visual, all; templates with {} for the class. The top of data.py shows one."
    )


def load_unseen(dataset):
    """The Dataset of other classes that `dataset` names as its "unseen", beside its own folder; None where it names none."""
    if "unseen" not in dataset.about:
        return None
    folder = dataset.folder.parent / dataset.about["unseen"]
    if not (folder / "dataset.json").exists() or folder.resolve() == dataset.folder.resolve():
        fail(f"{dataset.folder / 'dataset.json'}: unseen is {folder.name!r}, but {folder} is no other data set. Mend either.")
    return load(folder.name, folder.parent)


def _is(folder, name):
    """Whether `folder` holds all domains of the known data set `name`."""
    return name in DATASETS and all((folder / d).is_dir() for d in DATASETS[name]["phrases"])


def split(dataset, source, domain, part, seed):
    """[(path, label)] of one part ("train", "val", "test") of `domain` when `source` is what is finetuned on.

    The source domain is split class by class; of a target domain only "test" is there, and is all of it. Where files of
    one name show one thing, what is trained or validated on in the source is in no target's test part either.
    A pure function of (data set name, file names, seed): things are put in the order of a hash.
    """

    def thing(path):
        return Path(path).stem if dataset.same_stem_same_thing else path

    def rank(name):
        return hashlib.sha256(f"{dataset.name} {seed} {name}".encode()).hexdigest()

    if domain != source and part != "test":
        return []
    things_of, part_of = {}, {}  # {class: things of the source}; {(class, thing): the part it belongs to}
    for path, label in dataset.images[source]:
        things_of.setdefault(label, set()).add(thing(path))
    for label, things in things_of.items():
        things = sorted(things, key=rank)
        train = max(1, round(dataset.fractions["train"] * len(things)))
        val = train + round(dataset.fractions["val"] * len(things))
        part_of |= {(label, t): "train" if i < train else "val" if i < val else "test" for i, t in enumerate(things)}
    return [(path, y) for path, y in dataset.images[domain] if part_of.get((y, thing(path)), "test") == part]


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
    """One prompt a class in the words of `domain`: "a sketch of a dog". C strings, in the order of `classes`.

    CHOICE: one prompt, with the right article, and the source's phrase wherever a head is made, since a model in use does
    not know what domain it will meet; alternative: an ensemble of templates such as OpenAI's 80 for ImageNet.
    """
    return [f"{dataset.phrases[domain]} of {article(words(c))}" for c in dataset.classes]


def prompts(dataset, domain):
    """FLYP's class prompts: a list of T templates, each a list of C strings in the order of `classes`.

    Source: FLYP draws one of 80 templates for each image. CHOICE: the domain's phrase alone unless the data set brings
    templates; alternative: OpenAI's 80, which are about photographs.
    """
    templates = dataset.about.get("templates", {}).get(domain, [])
    return [[template.format(words(c)) for c in dataset.classes] for template in templates] or [class_texts(dataset, domain)]


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
    """A parser with the arguments that all stages share."""
    parser = Parser(description=description.split("\n")[0])
    add = parser.add_argument
    add("dataset", help=f"{', '.join(DATASETS)}, or a folder in --data that has a dataset.json")
    add("source", help="domain to finetune on; all others are unseen until evaluation")
    add("--data", default="data", help="folder that holds the data set's folder (default: data)")
    add("--captions", help="JSON lines of path and caption (default: the data set's captions.jsonl)")
    add("--model", help="open_clip name, hf-hub:…, or local-dir:PATH (default: the data set's, else ViT-B-16-quickgelu)")
    add("--pretrained", default="openai", help="open_clip's tag of the weights, of a model known by name (default: openai)")
    add("--seeds", type=positive(int), default=5, help="seeds 0 … N-1: each its split, initialisation and order (default: 5)")
    add("--run", help="folder of the results (default: runs/DATASET-SOURCE)")
    return parser


def prepare(args, dataset=None):
    """Dataset (unless given) and run folder of parsed `arguments`; exits with status 2 for an unknown domain."""
    dataset = dataset or load(args.dataset, args.data, args.captions)
    if args.source not in dataset.phrases:
        fail(f"{dataset.name} has no domain {args.source!r}. Its domains: {', '.join(dataset.phrases)}.")
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


def append_results(run, args, rows):
    """Append rows (method, domain, split, metric, value, n, seed) to run/results.jsonl, each with what made it."""
    shared = {
        "dataset": args.dataset,
        "source": args.source,
        "args": {k: v for k, v in vars(args).items() if k not in ("dataset", "source", "methods", "recipes", "alphas")},
        "versions": {package: version(package) for package in ("torch", "open_clip_torch")},
        "commit": commit(),
    }
    columns = ("method", "domain", "split", "metric", "value", "n", "seed")
    with open(run / "results.jsonl", "a") as file:
        file.write("".join(json.dumps({**dict(zip(columns, row, strict=True)), **shared}) + "\n" for row in rows))
