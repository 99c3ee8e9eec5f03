"""The names that --methods takes: what is trained, with which losses, on which features.

    finetune              cross-entropy on the source's images; --train names what is trained
    lads, ldfs            … and on features that mappers synthesise from them
    ldfs:sigma=0,cls=0.5  a variation of a recipe
    clipstyler            … and on features of the images, repainted in the targets' styles
    lpft                  the image tower, finetuned from a trained linear probe
    flyp                  CLIP's contrastive loss on class prompts instead; trains both towers
    flyp+captions, flyp+retrieved, arf (both)     … and on ARF's anchors
    dive, snd             FLYP, and the retrieved pairs' features stay close to the pretrained ones
    dive+captions, arf+dive                       … and on ARF's anchors
    captions              ARF's loss on captions alone, without class prompts; trains both towers
    captions+retrieved    … and on retrieved pairs: both need no classes
    coop, cocoop, maple   a prompt; a prompt shifted by each image; deep prompts in both towers
    clipood               the image tower, by a margin softmax, its weights averaged
    coop+ldfs, clipood+lads, arf+ldfs             … and on LDFS's or LADS's features
"""

import difflib
import math
from dataclasses import dataclass, fields, replace

from core.utils import fail

ABLATIONS = [  # what --ablate adds: LDFS without each of its parts, and with other weights
    "ldfs:direction=class", "ldfs:sigma=0", "ldfs:pair=0", "ldfs:cls=0", "ldfs:form=cosine",
    "ldfs:sigma=0.003", "ldfs:sigma=0.03", "ldfs:sigma=0.1", "ldfs:pair=0.3", "ldfs:pair=3",
    "ldfs:unit=0",
]


@dataclass(frozen=True)
class Recipe:
    """What a mapper learns from. "lads" is LADS's mapper as published; "global" is its idea under
    LDFS's schedule: LDFS minus its three parts (caption-wise direction, noise, pairwise term).

    CHOICE: sigma is small enough to keep the direction (at d = 512 and |Δt| = 0.7 its cosine is
    0.91); alternative: the sweep of --ablate.
    CHOICE: pair, λ_pair, is 1 because both terms are of order one; alternative: more, for features
    closer to CLIP's.
    CHOICE: cls, λ_cls, is kept from LADS so that LDFS is LADS and three parts; alternative: 0, as
    LDFS's figure 2 shows it.
    CHOICE: class_text is in the words of the source domain, as the prompts of evaluation are;
    alternative: in the target's.
    """

    direction: str = "caption"  # texts of each image's own "caption", of its "class" (LADS), or
                                # one text for the whole "domain" (StyleGAN-NADA)
    sigma: float = 0.01         # σ of the stochastic text features
    pair: float = 1.0           # λ_pair
    form: str = "angle"         # L_pair on angles, as in the paper, or on cosines
    cls: float = 1.0            # λ_cls
    unit: int = 1               # L_ld on ẑ of unit norm; 0: on the mapper's output, as in LADS
    loss: str = "ldfs"          # or "lads": loss and schedule of its public code;
                                # or "clipstyler": no mapper but a network of images


RECIPES = {
    "ldfs": Recipe(),
    "global": Recipe(direction="class", sigma=0.0, pair=0.0),
    "lads": Recipe(direction="class", sigma=0.0, pair=0.0, loss="lads"),
    "clipstyler": Recipe(direction="domain", sigma=0.0, pair=0.0, cls=0.0, loss="clipstyler"),
}

# Losses that preserve the features of the retrieved pairs: DiVE's two, or SnD's, the special case
# in which images' features do not move at all.
PRESERVE = ("dive", "snd")

# What each strategy trains.
TRAINED = {
    "linear": "head",                   # on features of the frozen image tower
    "coop": "prompt",                   # on the same features
    "cocoop": "prompt, meta-net",       # on the same features
    "maple": "prompts of both towers",  # whose own weights stay as they are
    "full": "image tower, head",        # WiSE-FT's standard finetuning
    "lpft": "image tower, head",        # the same, from a trained probe
    "clipood": "image tower",           # the head is the text tower's class prompts, frozen
    "towers": "both towers",            # the head is what the text tower makes of class prompts
}
FROZEN_TOWERS = ("linear", "coop", "cocoop")  # strategies on features of a frozen image tower


@dataclass(frozen=True)
class Method:
    """What is trained (a key of TRAINED), with which losses, on which features."""

    train: str
    contrastive: bool = False  # CLIP's loss on class prompts (FLYP); False: cross-entropy
    captions: bool = False     # ARF's text-compensated anchors
    retrieved: bool = False    # ARF's image-text anchors
    recipe: str | None = None  # synthesised features: the name of a Recipe
    preserve: str | None = None  # of PRESERVE: losses on how the pairs' features move
    classes: bool = True       # a loss on the images' classes; False: anchors alone

    @property
    def needs_pairs(self):
        return self.retrieved or self.preserve is not None

    @property
    def needs_captions(self):
        by_caption = self.recipe and parse_recipe(self.recipe).direction == "caption"
        return self.captions or bool(by_caption)


def parse_recipe(text):
    """Return the Recipe of "ldfs", "lads" or "ldfs:sigma=0,direction=class"; exit with status 2 for
    any other text.
    """
    name, _, changes = text.partition(":")
    kinds = {f.name: type(f.default) for f in fields(Recipe)}
    if name not in RECIPES:
        fail(
            f"unknown recipe {text!r}. Known: {', '.join(RECIPES)}; "
            f"variations: ldfs:sigma=0 ({', '.join(kinds)})."
        )
    try:
        pairs = dict(change.split("=") for change in changes.split(",")) if changes else {}
        changed = {key: kinds[key](value) for key, value in pairs.items()}
        recipe = replace(RECIPES[name], **changed)
    except (KeyError, ValueError):
        fail(f"recipe {text!r}: write name=value, with commas between; names: {', '.join(kinds)}.")
    if not all(0 <= x < math.inf for x in (recipe.sigma, recipe.pair, recipe.cls)):
        fail(f"recipe {text!r}: sigma, pair and cls are numbers from 0 up.")
    allowed = {
        "direction": ("caption", "class", "domain"), "form": ("angle", "cosine"), "unit": (0, 1),
        "loss": ("ldfs", "lads", "clipstyler"),
    }
    for key, values in allowed.items():
        if getattr(recipe, key) not in values:
            fail(f"recipe {text!r}: {key} is {' or '.join(map(str, values))}.")
    if recipe.loss == "clipstyler" and text != "clipstyler":
        fail(f"recipe {text!r}: CLIPstyler has no variations; write clipstyler alone.")
    if recipe.loss == "lads" and recipe != replace(RECIPES["lads"], direction=recipe.direction):
        fail(f"recipe {text!r}: of LADS as published only direction varies; vary global instead.")
    return recipe


def parse_method(text, train="linear"):
    """Return the Method of a name in --methods; exit with status 2 for an unknown one.

    train: what "finetune" and a recipe alone ("ldfs") train, a key of TRAINED.
    """
    first, *rest = text.split("+")
    anchors = ("captions", "retrieved", *PRESERVE)
    names = ["finetune", "flyp", "arf", *anchors, *TRAINED, *RECIPES]
    for name in (part.partition(":")[0] for part in (first, *rest)):
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            fail(f"--methods {text}: unknown {name!r}.{hint} Known: {', '.join(names)}.")
    if first == "arf":
        first, rest = "flyp", ["captions", "retrieved", *rest]
    classes = first != "captions"
    if first in PRESERVE or not classes:
        first, rest = "flyp", [first, *rest]
    if first not in ("finetune", "flyp", *TRAINED):  # a recipe alone means "finetune" with it
        first, rest = "finetune", [first, *rest]
    recipes = [part for part in rest if part not in anchors]
    preserve = [part for part in PRESERVE if part in rest]
    most = 1 if classes else 0  # a recipe's features are classified
    several = len(recipes) > most or len(preserve) > 1
    if several or (first != "flyp" and len(recipes) < len(rest)):
        fail(
            f"--methods {text}: {', '.join(anchors)} go with flyp, and one recipe at most with "
            "anything: flyp+captions, arf+ldfs. dive and snd exclude each other."
        )
    for recipe in recipes:
        parse_recipe(recipe)
    strategy = {"finetune": train, "flyp": "towers"}.get(first, first)
    if "clipstyler" in recipes and strategy not in FROZEN_TOWERS:
        fail(
            f"--methods {text}: CLIPstyler's images are encoded once, and no mapper follows a "
            f"tower that is trained. Combine it with --train {', '.join(FROZEN_TOWERS)}."
        )
    return Method(
        strategy, contrastive=first == "flyp", captions="captions" in rest,
        retrieved="retrieved" in rest, recipe=next(iter(recipes), None),
        preserve=next(iter(preserve), None), classes=classes,
    )


def option_matters(option, method):
    """Return whether a setting, by its name, matters to a Method. Others than these always do."""
    conditions = {
        "captions": method.needs_captions,
        "lambda_cap": method.captions,
        "lambda_ret": method.retrieved,
        "lambda_dive": method.preserve is not None,
        "k": method.needs_pairs,
        "query": method.needs_pairs,
        "same": method.needs_pairs,
        "mapper_steps": method.recipe is not None,
        "init": method.train in ("linear", "full", "lpft"),
        "unlocked_groups": method.train in ("full", "lpft", "clipood", "towers"),
        "lock_text": method.train == "towers",
    }
    return conditions.get(option, True)


def recipes_of(methods):
    """Return {name: Recipe}: the recipes among {name: Method}, each once."""
    return {m.recipe: parse_recipe(m.recipe) for m in methods.values() if m.recipe}
