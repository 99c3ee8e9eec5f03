"""The settings of a run: the command line's flags, completed by the data set's and by defaults."""

import argparse
import math
import textwrap
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from core.methods import ABLATIONS, TRAINED, option_matters, parse_method, recipes_of
from core.utils import fail

DEFAULT_MODEL = "ViT-B-16-quickgelu"  # both papers' backbone; OpenAI's weights need QuickGELU
PAPERS = {  # defaults of each paper
    "ldfs": {
        "methods": ["finetune", "lads", "global", "ldfs"],
        "train": "linear", "seeds": 3, "alphas": [],
    },
    "arf": {
        "methods": ["finetune", "flyp", "flyp+captions", "flyp+retrieved", "arf"],
        "train": "full", "seeds": 1, "alphas": [0.25, 0.5, 0.75],  # the paper's curve: all tenths
    },
}


@dataclass(frozen=True)
class Schedule:
    """AdamW, linear warm-up, cosine to 0. Batches and epochs are of source images."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.1      # on all parameters, as in FLYP's public code
    warmup: float = 0.1            # share of all steps
    max_norm: float | None = None  # clip gradients to this norm; None: do not clip

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is a whole number from 1 up")
        for name in ("lr", "weight_decay", "warmup", "max_norm"):
            value = getattr(self, name)
            if name == "max_norm" and value is None:
                continue
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is a number from 0 up")
        if self.warmup > 1 or self.max_norm == 0:
            raise ValueError("warmup is at most 1, and max_norm is above 0")


# CHOICE: LDFS's schedules could not be had. linear: 200 epochs, as LADS. coop: 50 epochs (CoOp has
# 50 to 200, by shots) of 32 at the lr 2e-3 of its public code, with AdamW. cocoop: the 10 epochs of
# CoCoOp, at batch 8 instead of 1, since a step encodes a text for each image, class and domain.
# maple: coop's batch and lr, because the 5 epochs of 4 at 3.5e-3 of its public code are for SGD;
# 10 epochs, as each step goes through both towers. full, lpft, towers: the 10 epochs and lr 1e-5
# that FLYP uses with OpenAI's ViT-B/16, at a smaller batch, and WiSE-FT's clipping at 1 for its
# baseline. clipood: the lr of its public code, and no warm-up: its average weighs the first steps
# most. Warm-up of the others is a share of the steps; FLYP and WiSE-FT
# take 500 steps. Alternative: a data set's own "schedules"; --epochs, --batch-size, --lr, chosen
# on the validation part.
SCHEDULES = {
    "linear": Schedule(epochs=200, batch_size=256, lr=1e-3),
    "coop": Schedule(epochs=50, batch_size=32, lr=2e-3, weight_decay=0.0),
    "cocoop": Schedule(epochs=10, batch_size=8, lr=2e-3, weight_decay=0.0),
    "maple": Schedule(epochs=10, batch_size=32, lr=2e-3, weight_decay=0.0),
    "full": Schedule(epochs=10, batch_size=64, lr=1e-5, max_norm=1.0),
    "lpft": Schedule(epochs=10, batch_size=64, lr=1e-5, max_norm=1.0),
    "clipood": Schedule(epochs=10, batch_size=64, lr=5e-6, warmup=0.0),
    "towers": Schedule(epochs=10, batch_size=64, lr=1e-5),
}

# -------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """argparse, with one line and status 2 for bad arguments, and --debug, which core.utils reads.
    """

    def __init__(self, **options):
        super().__init__(**options)
        help = "show tracebacks of errors (default: off)"
        self.add_argument("--debug", action="store_true", help=help)

    def error(self, message):
        fail(f"{message}. See --help.")


def number(kind, low, high=math.inf, inclusive=False):
    """Return an argparse type: a `kind` (int, float) above `low` (or equal) and at most `high`."""

    def read(text):
        value = kind(text)
        above = value >= low if inclusive else value > low
        if not (above and value <= high and math.isfinite(value)):
            lower = f"from {low:g}" if inclusive else f"above {low:g}"
            upper = f" up to {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number {lower}{upper}")
        return value

    read.__name__ = kind.__name__
    return read


def text(value):
    """An argparse type: a text that is not empty, as an unset shell variable would be."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty; is a variable unset?")
    return value


STAGES = ("caption", "retrieve", "mapper", "finetune", "evaluate")
# A stage uses the flags of earlier stages too, because it makes what it needs.
MAKES_CAPTIONS = ("caption", "mapper", "finetune", "evaluate")
MAKES_PAIRS = ("retrieve", "finetune", "evaluate")
MAKES_MAPPERS = ("mapper", "finetune", "evaluate")
TRAINS = ("finetune", "evaluate")
ENCODES = ("retrieve", "mapper", "finetune", "evaluate")


def make_parser(doc="", stage=None):
    """Return the parser that all stages share: each takes every flag, and its --help shows those
    that it uses.

    stage: one of STAGES; None (run.py) uses all flags.
    """
    prog = f"anchors.py {stage}" if stage in ("caption", "retrieve") else None
    parser = Parser(prog=prog, description=doc.split("\n")[0], allow_abbrev=False)
    count, positive = number(int, 0, 10**9), number(float, 0)
    weight = number(float, 0, inclusive=True)
    share = number(float, 0, 1, inclusive=True)

    def group(title, stages):
        """Return add(flag, …, help, stages) of a group; stages: those that use its flags."""
        arguments = parser.add_argument_group(title)

        def add(*names, help, stages=stages, **options):
            used = stage is None or stage in stages
            arguments.add_argument(*names, help=help if used else argparse.SUPPRESS, **options)

        return add

    add = group("data and run", STAGES)
    add("dataset", type=text, help="a name in sets/, or a folder in --data with a dataset.json")
    add("source", nargs="?", type=text,
        help="domain to finetune on; the others are unseen (default: the first)")
    add("--data", default="data", type=text,
        help="folder that contains the data set's folder (default: data)")
    add("--run", type=text,
        help="folder of checkpoints and scores (default: runs/DATASET-SOURCE[-base-to-new])",
        stages=ENCODES)
    add("--captions", type=text, stages=MAKES_CAPTIONS,
        help="JSON lines of path, caption (default: the data set's captions.jsonl)")
    add("--model", type=text, stages=ENCODES,
        help="open_clip name, hf-hub:…, local-dir:PATH, checkpoint (default: the data set's)")
    add("--pretrained", default="openai", stages=ENCODES,
        help="open_clip's tag of the weights (default: openai)")

    add = group("methods", MAKES_MAPPERS)
    add("--paper", choices=PAPERS, default="ldfs",
        help="whose methods, seeds and alphas are the defaults (default: ldfs)")
    add("--methods", nargs="+", metavar="M",
        help="finetune lads ldfs flyp arf …; core/methods.py lists all (default: the paper's)")
    add("--ablate", action="store_true",
        help="also LDFS without each of its parts, and variations (default: off)")
    add("--train", choices=[name for name in SCHEDULES if name != "lpft"], stages=TRAINS,
        help="what finetune, lads, ldfs train: TRAINED in core/methods.py (default: linear; "
        "arf: full); flyp and arf train both towers")
    add("--seeds", type=count, help="seeds 0 … N-1: split, start, order (default: 3; arf: 1)")
    add("--shots", type=count, help="training images of each class (default: all)")
    add("--base-to-new", action="store_true", stages=STAGES,
        help="train on the first half of the classes; the others are the unseen ones, as CoOp's "
        "protocol has it (default: off)")

    add = group("captions (anchors.py caption)", MAKES_CAPTIONS)
    add("--captioner", type=text,
        help="model on the hub, or a folder; if given, it replaces other captioners' captions "
        "(default: the data set's, else BLIP-2)")
    add("--prompt", default="", help="words that the caption continues (default: none)")
    add("--beams", type=count, default=5, help="beams of the search (default: 5)")
    add("--max-tokens", type=count, default=30, help="longest caption (default: 30)")
    add("--caption-batch", type=count, default=32, help="images at a time (default: 32)")

    add = group("retrieved pairs (anchors.py retrieve)", MAKES_PAIRS)
    add("--pool", type=text,
        help="folder of webdataset shards (default: the data set's, else cc3m in --data)")
    add("--k", type=count, help="pairs of each query (default: the data set's, else 1)")
    add("--query", choices=["image", "text"], default="image",
        help="images, or class prompts (default: image)")
    add("--same", type=positive, default=0.99,
        help="cosine from which a pair counts as a test image and is dropped (default: 0.99)")

    add = group("mapper.py", MAKES_MAPPERS)
    add("--mapper-steps", type=count, help="steps of each mapper (default: its recipe's)")

    add = group("finetune.py", TRAINS)
    add("--init", choices=["text", "scratch"],
        help="start of the head: class prompts (default of full, lpft) or random (of linear)")
    add("--unlocked-groups", type=number(int, 0, inclusive=True), metavar="N",
        help="train only the image tower's last N groups of layers (default: all)")
    add("--lock-text", action="store_true",
        help="flyp, arf, towers: train only the image tower (default: off)")
    add("--epochs", type=count, help="passes over the training images (default: SCHEDULES)")
    add("--batch-size", type=count, help="images of a step (default: SCHEDULES)")
    add("--micro-batch", type=count, metavar="N",
        help="images and texts that a tower encodes at a time, computed again in the backward "
        "pass: less memory, a third slower (default: all)")
    add("--compile", action="store_true",
        help="let PyTorch compile both towers (default: off)")
    add("--lr", type=positive, help="peak learning rate (default: SCHEDULES)")
    add("--lambda-cap", type=weight, default=1.0, help="weight of ARF's caption loss (default: 1)")
    add("--lambda-ret", type=weight, default=1.0, help="weight of its loss on pairs (default: 1)")
    add("--lambda-dive", type=weight,
        help="weight of dive's and snd's losses (default: the data set's, else 1000)")

    add = group("evaluate.py", ("evaluate",))
    add("--alphas", nargs="*", type=share,
        help="weights of the finetuned model to interpolate with, besides 1, WiSE-FT's α "
        "(default: none; arf: 0.25 0.5 0.75)")
    return parser


def parse(doc, argv=None, stage=None):
    """Return the parsed command line. Nothing is loaded; `resolve` completes it.

    stage: as in `make_parser`.
    """
    return make_parser(doc or "", stage).parse_args(argv)


# -------------------------------------------------------------------------------------------------
# Settings

OPTIONS = (  # flags that tables show where they are not as usual
    "shots", "init", "unlocked_groups", "lock_text", "mapper_steps", "captions", "lambda_cap",
    "lambda_ret", "lambda_dive", "query", "same", "k",
)


class Settings(argparse.Namespace):
    """All flags as attributes, with `methods` {name: Method} and `schedules` {train: Schedule}.

    Flags that are not resolved here (beams, k, same …) keep the names of the command line.
    """

    @property
    def cache(self):
        """The folder of features, which runs on the same data share."""
        return self.run.parent / ".features"

    def options(self, method):
        """Return {name: value} of the settings that matter to a Method and differ from the default.

        Tables show them beside the method's name.
        """
        schedule, usual = self.schedules[method.train], self.usual_schedules[method.train]
        options = {
            f.name: getattr(schedule, f.name) for f in fields(Schedule)
            if getattr(schedule, f.name) != getattr(usual, f.name)
        }
        defaults = {**vars(make_parser().parse_args(["any"])), **self.usual}
        for name in OPTIONS:
            value = getattr(self, name)
            if value != defaults[name] and option_matters(name, method):
                options[name] = value
        return options


def resolve(args, dataset):
    """Return the Settings of a command line and a Dataset; exit if they do not fit."""
    defaults, meta = PAPERS[args.paper], dataset.meta
    source = args.source or next(iter(meta.phrases))
    check_source(dataset, source)
    train = args.train or defaults["train"]
    names = [*(args.methods or defaults["methods"]), *(ABLATIONS if args.ablate else ())]
    methods = {name: parse_method(name, train) for name in names}
    if by_class := [name for name in methods if methods[name].classes and not dataset.classes]:
        fail(
            f"{dataset.name} has no classes (folders in its domains), which {by_class[0]} learns "
            "from. Pass --methods captions, or captions+retrieved."
        )
    if recipes_of(methods) and not dataset.styles(source):
        fail(
            f"{dataset.name}: all its domains are called {meta.phrases[source]!r}, so no text "
            "points from one to another. Leave out lads and ldfs (--methods), or name phrases of "
            "other domains in a dataset.json (docs/DATA.md)."
        )
    usual = usual_schedules(dataset)
    flags = {k: getattr(args, k) for k in ("epochs", "batch_size", "lr") if getattr(args, k)}
    half = "base-to-new" if args.base_to_new else ""  # its accuracies are in tables of their own
    folder = "-".join(filter(None, (args.dataset, source.replace(" ", "_"), half)))
    resolved = {
        "dataset": f"{args.dataset} {half}".strip(),
        "source": source, "data": Path(args.data), "methods": methods, "train": train,
        "run": Path(args.run or f"runs/{folder}"),
        "model": args.model or meta.model or DEFAULT_MODEL,
        "captioner": args.captioner or meta.captioner or "Salesforce/blip2-opt-2.7b",
        "replace_captions": args.captioner is not None,
        "k": args.k or meta.k,
        "lambda_dive": meta.lambda_dive if args.lambda_dive is None else args.lambda_dive,
        "usual": {"k": meta.k, "lambda_dive": meta.lambda_dive},
        "seeds": args.seeds or defaults["seeds"],
        "alphas": tuple(defaults["alphas"] if args.alphas is None else args.alphas),
        "schedules": {name: replace(schedule, **flags) for name, schedule in usual.items()},
        "usual_schedules": usual,
        "micro_batches": {},  # {method: rows}, which finetune.py chooses on a GPU
    }
    settings = Settings(**{**vars(args), **resolved})
    try:
        settings.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--run {settings.run}: cannot be made ({error.strerror}). Name another folder.")
    return settings


def check_source(dataset, source):
    """Exit with status 2 if the source is unknown, or has no image to train on or to test on."""
    domains = dataset.meta.phrases
    if source not in domains:
        fail(f"{dataset.name} has no domain {source!r}. Its domains: {', '.join(domains)}.")
    if source not in dataset.images or dataset.images[source][0][0].size >= 0:  # tars are for tests
        reason = "is a test set" if source in dataset.images else "has no images here"
        usable = ", ".join(domain for domain in dataset.images if domain != source)
        fail(f"{dataset.name}'s {source} {reason}. Finetune on another domain: {usable}.")
    if not dataset.trainable(source):
        fail(f"{dataset.folder}/{source}_test.txt leaves no image to train on. Shorten it.")
    if not dataset.split(source, source, "test", 0):
        folder = dataset.folder / source
        fail(f"{folder} leaves no image to test on. Add some, or change the fractions.")


def usual_schedules(dataset):
    """Return {train: Schedule}: SCHEDULES with what the data set's description changes."""
    changes = dataset.meta.schedules
    try:
        return {name: replace(s, **changes.get(name, {})) for name, s in SCHEDULES.items()}
    except (TypeError, ValueError) as error:
        names = ", ".join(f.name for f in fields(Schedule))
        fail(f"{dataset.name}: its description has a bad schedule ({error}). It takes {names}.")



def describe(settings, dataset, device, mapper_schedules=()):
    """Return the resolved settings as a block of text, printed before training.

    mapper_schedules: [(label, text)], from mapper.py.
    """
    source = settings.source
    n = {part: len(dataset.split(source, source, part, 0)) for part in ("train", "val", "test")}
    lines = [
        ("model", f"{settings.model} on {device}"),
        ("source", f"{dataset.name}, {source}: {n['train']} training, {n['val']} validation, "
                   f"{n['test']} test images"),
    ]
    targets = [d for d in dataset.meta.phrases if d != source]
    sizes = {d: len(dataset.split(source, d, "test", 0)) for d in targets if d in dataset.images}
    lines.append(("targets", ", ".join(f"{d} {sizes.get(d, 'no images')}" for d in targets)))
    if dataset.new:
        names = (", ".join(part.classnames) for part in (dataset, dataset.new))
        base, new = (textwrap.shorten(text, 60, placeholder=" …") for text in names)
        lines.append(("classes", f"{len(dataset.classes)}: {base}; new: {new}"))
    lines.append(("run", f"{settings.run}, seeds 0 … {settings.seeds - 1}"))
    lines += mapper_schedules
    names_of = {}  # {train: names of methods}
    for name, method in settings.methods.items():
        names_of.setdefault(method.train, []).append(name)
    if "lpft" in names_of:
        names_of.setdefault("linear", []).append("lpft's probe")
    for train, names in names_of.items():
        schedule, usual, default = (
            asdict(s[train]) for s in (settings.schedules, settings.usual_schedules, SCHEDULES)
        )
        origin = {
            k: " (flag)" if v != usual[k] else " (data set)" if v != default[k] else ""
            for k, v in schedule.items()
        }
        words = [f"{k} {v:g}{origin[k]}" for k, v in schedule.items() if v is not None]
        lines.append((f"train {TRAINED[train]}", f"{' '.join(names)}: {', '.join(words)}"))
    defaults = {**vars(make_parser().parse_args(["any"])), **settings.usual}
    flags = {
        name: getattr(settings, name) for name in (*OPTIONS, "micro_batch")
        if getattr(settings, name) != defaults[name]
    }
    if flags:
        words = [f"--{name.replace('_', '-')} {value}" for name, value in flags.items()]
        lines.append(("flags", ", ".join(words)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)

