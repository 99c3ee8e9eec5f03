"""The settings of a run: flags, the data set's own, defaults; resolved once, and never changed."""

import argparse
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from utils import fail, lock, short_hash

import data
from methods import ABLATIONS, parse_method, recipes_of

DEFAULT_MODEL = "ViT-B-16-quickgelu"  # both papers' backbone; OpenAI's weights want QuickGELU
PAPERS = {  # what the flags are unless they or the data set say otherwise
    "ldfs": {
        "methods": ["finetune", "lads", "global", "ldfs"],
        "train": "linear", "seeds": 5, "alphas": [],
    },
    "arf": {
        "methods": ["finetune", "flyp", "flyp+captions", "flyp+retrieved", "arf"],
        "train": "full", "seeds": 1, "alphas": [0.25, 0.5, 0.75],  # the paper's curve: all tenths
    },
}


@dataclass(frozen=True)
class Schedule:
    """AdamW, linear warm-up, cosine to 0; batches and epochs are of source images."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.1      # on all parameters, as in FLYP's public code
    warmup: float = 0.1            # share of all steps
    max_norm: float | None = None  # longest gradient; None: whatever it is


# CHOICE: LDFS's schedules could not be had. linear: 200 epochs, as LADS. coop: 50 epochs (of
# CoOp's 50 to 200, by shots) of 32 at the lr 2e-3 of its public code, with AdamW; cocoop: the 10
# epochs of CoCoOp's, at batch 8 in place of 1, since a step encodes a text for each image, class
# and domain. maple: coop's batch and lr, for its public code's 5 epochs of 4 at 3.5e-3 are SGD's,
# whose steps AdamW's are not, and as each step goes through both towers, 10 epochs. full, lpft,
# towers: the 10 epochs and lr 1e-5 that FLYP uses with OpenAI's ViT-B/16, at a smaller batch, and
# WiSE-FT's clipping at 1 for its baseline; clipood: the lr of its public code; alternative: a data
# set's own `schedules`; --epochs, --batch-size, --lr, chosen on the "val" part.
SCHEDULES = {
    "linear": Schedule(epochs=200, batch_size=256, lr=1e-3),
    "coop": Schedule(epochs=50, batch_size=32, lr=2e-3, weight_decay=0.0),
    "cocoop": Schedule(epochs=10, batch_size=8, lr=2e-3, weight_decay=0.0),
    "maple": Schedule(epochs=10, batch_size=32, lr=2e-3, weight_decay=0.0),
    "full": Schedule(epochs=10, batch_size=64, lr=1e-5, max_norm=1.0),
    "lpft": Schedule(epochs=10, batch_size=64, lr=1e-5, max_norm=1.0),
    "clipood": Schedule(epochs=10, batch_size=64, lr=5e-6),
    "towers": Schedule(epochs=10, batch_size=64, lr=1e-5),
}


def resolve_schedules(args, dataset):
    """{train: Schedule}: SCHEDULES, less what the data set and then flags say otherwise."""
    flags = {k: getattr(args, k) for k in ("epochs", "batch_size", "lr")}
    flags = {k: v for k, v in flags.items() if v is not None}
    own = dataset.meta.schedules

    def possible(s):
        rest = [s.lr, s.weight_decay, s.warmup, *([] if s.max_norm is None else [s.max_norm])]
        return (
            type(s.epochs) is type(s.batch_size) is int and min(s.epochs, s.batch_size) >= 1
            and all(type(x) in (int, float) and 0 <= x < math.inf for x in rest)
            and s.lr > 0 and s.warmup <= 1 and s.max_norm != 0
        )

    try:
        found = {k: replace(s, **{**own.get(k, {}), **flags}) for k, s in SCHEDULES.items()}
        if all(map(possible, found.values())):
            return found
    except TypeError:  # another name
        pass
    known = ", ".join(f.name for f in fields(Schedule))
    fail(
        f"{dataset.name}: a schedule of its description has numbers from 0 up, of {known}; whole "
        "ones of epochs and batch_size, a warmup up to 1."
    )


# -------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """argparse, with one line at bad arguments."""

    def error(self, message):
        fail(f"{message}. See --help.")


def number(kind, low, high=math.inf):
    """An argparse type: a number of `kind` (int, float) above `low` and up to `high`."""

    def read(text):
        value = kind(text)
        if not (low < value <= high and math.isfinite(value)):
            upto = f" up to {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number above {low:g}{upto}")
        return value

    read.__name__ = kind.__name__
    return read


def flags(doc):
    """The parser of all stages: each takes every flag, and heeds its own."""
    parser = Parser(description=(doc or "").split("\n")[0], allow_abbrev=False)
    add, count, amount = parser.add_argument, number(int, 0, 10**9), number(float, 0)
    add("dataset", help="a name in sets/, or a folder in --data that has a dataset.json")
    add("source", nargs="?", help="domain to finetune on; others are unseen (default: the first)")
    add("--data", default="data", help="folder that holds the data set's folder (default: data)")
    add("--captions", help="JSON lines of path, caption (default: the data set's captions.jsonl)")
    add("--model", help="open_clip name, hf-hub:…, local-dir:PATH, checkpoint (default: the set's)")
    add("--pretrained", default="openai", help="open_clip's tag of the weights (default: openai)")
    add("--run", help="folder of checkpoints and results (default: runs/DATASET-SOURCE)")
    add("--paper", choices=PAPERS, default="ldfs", help="whose defaults; the run scripts say it")
    add("--methods", nargs="+", metavar="M", help="finetune lads ldfs flyp arf …; see methods.py")
    add("--ablate", action="store_true", help="LDFS also without each of its parts, and with more")
    add("--train", choices=[name for name in SCHEDULES if name != "lpft"], help="what finetune, "
        "lads, ldfs train: TRAINED in methods.py (default: linear; arf: full); flyp, arf: towers")
    add("--seeds", type=count, help="seeds 0 … N-1: split, start, order (default: 5; arf: 1)")
    add("--shots", type=count, help="train on so many images of each class (default: all)")
    add = parser.add_argument_group("captions (anchors.py)").add_argument
    add("--captioner", help="on the hub, or a folder; if named, it replaces others' captions")
    add("--prompt", default="", help="words that the caption goes on from (default: none)")
    add("--beams", type=count, default=5, help="beams of the search (default: 5)")
    add("--max-tokens", type=count, default=30, help="longest caption (default: 30)")
    add("--caption-batch", type=count, default=32, help="images at a time (default: 32)")
    add = parser.add_argument_group("retrieved pairs (anchors.py)").add_argument
    add("--pool", help="folder of webdataset shards (default: the data set's, else cc3m in --data)")
    add("--k", type=count, help="pairs for each query (default: the data set's, else 1)")
    add("--query", choices=["image", "text"], default="image", help="images, or class prompts")
    add("--same", type=amount, default=0.99, help="cosine that makes a pair a test image (0.99)")
    add = parser.add_argument_group("mapper.py and finetune.py").add_argument
    add("--mapper-steps", type=count, help="steps for each mapper (default: its recipe's)")
    add("--init", choices=["text", "scratch"], help="the head starts as the class prompts (default "
        "with full, lpft), or at random (linear)")
    add("--unlocked-groups", type=number(int, -1), metavar="N",
        help="train only the image tower's last N groups of layers (default: all)")
    add("--lock-text", action="store_true", help="flyp, arf, towers: train only the image tower")
    add("--epochs", type=count, help="passes over the training images (default: SCHEDULES)")
    add("--batch-size", type=count, help="images a step (default: SCHEDULES)")
    add("--micro-batch", type=count, metavar="N", help="images and texts that a tower encodes at a "
        "time, computed again in the backward pass: less memory, a third slower (default: all)")
    add("--lr", type=amount, help="peak learning rate (default: SCHEDULES)")
    add("--lambda-cap", type=amount, default=1.0, help="weight of ARF's caption loss (default: 1)")
    add("--lambda-ret", type=amount, default=1.0, help="weight of its loss on pairs (default: 1)")
    add = parser.add_argument_group("evaluate.py").add_argument
    add("--alphas", nargs="*", type=number(float, 0, 1), help="also mix in the original weights")
    return parser


class Config:
    """All flags as attributes, frozen; `methods` {name: Method}, `schedules` {train: Schedule}."""

    # what changes no number of a row, and so is not in the record
    APART = (
        "data", "run", "paper", "methods", "seeds", "alphas", "caption_batch", "micro_batch",
    )

    def __init__(self, **settings):
        self.__dict__.update(settings)

    def __setattr__(self, name, value):
        raise AttributeError(f"settings are resolved once and never changed ({name})")

    def record(self):
        """What a result depends on, ready for JSON; stands once per run, in its config.json."""
        record = {k: v for k, v in vars(self).items() if k not in self.APART}
        return {**record, "schedules": {k: asdict(s) for k, s in self.schedules.items()}}

    @property
    def id(self):
        return short_hash(sorted(self.record().items()))[:8]


def refuse_other(path, config, made_with):
    """Exit with status 2 where the file `path` was made with other settings than are asked for."""

    def said(name, value):
        flag = "the source" if name == "source" else f"--{name.replace('_', '-')}"
        return f"no {flag}" if value is None else f"{flag} {value}"

    others = [said(k, v) for k, v in made_with.items() if getattr(config, k) != v]
    if others:
        made = ", ".join(others)
        fail(f"{path} was made with {made}. Say so, or make it again with what you ask for.")


def parse(doc, argv=None):
    """(Config, Dataset) of a command line; exits with status 2 at what cannot be."""
    args = flags(doc).parse_args(argv)
    defaults = PAPERS[args.paper]
    train = args.train or defaults["train"]
    names = [*(args.methods or defaults["methods"]), *(ABLATIONS if args.ablate else ())]
    methods = {name: parse_method(name, train) for name in names}
    dataset = replace(data.load(args.dataset, args.data, args.captions), shots=args.shots)
    source = args.source or next(iter(dataset.meta.phrases))
    if source not in dataset.meta.phrases:
        known = ", ".join(dataset.meta.phrases)
        fail(f"{dataset.name} has no domain {source!r}. Its domains: {known}.")
    if source in dataset.absent or dataset.images[source][0][0].size >= 0:  # in a tar: to test on
        first = next(iter(dataset.meta.phrases))
        fail(f"{dataset.name}'s {source} is to be tested on alone. Finetune on another: {first}.")
    if not dataset.trainable(source):
        fail(f"{dataset.folder}/{source}_test.txt leaves no image to train on. Shorten it.")
    if not dataset.split(source, source, "test", 0):  # said before all is trained
        where = dataset.folder / source
        fail(f"no image of {where} is left to test on. Add some, or mend the fractions (DATA.md).")
    if recipes_of(methods) and not dataset.styles(source):  # nothing to tell a mapper
        fail(
            f"{dataset.name}: its domains are all called {dataset.meta.phrases[source]!r}: no text "
            "points from one to another. Leave out lads and ldfs, or give them phrases in a "
            "dataset.json (see data.py)."
        )
    resolved = {
        "source": source, "data": Path(args.data), "methods": methods, "train": train,
        "run": Path(args.run or f"runs/{args.dataset}-{source.replace(' ', '_')}"),
        "model": args.model or dataset.meta.model or DEFAULT_MODEL,
        "k": args.k or dataset.meta.k,
        "seeds": args.seeds or defaults["seeds"],
        "alphas": tuple(defaults["alphas"] if args.alphas is None else args.alphas),
        "schedules": resolve_schedules(args, dataset),
    }
    apart = ("epochs", "batch_size", "lr", "ablate")  # are in schedules, and in methods
    config = Config(**{k: v for k, v in {**vars(args), **resolved}.items() if k not in apart})
    try:
        config.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--run {config.run}: cannot be made ({error.strerror}). Name another folder.")
    lock(config.run / ".lock", ".*.part", "checkpoints/.*.part", "mappers/.*.part")
    return config, dataset
