"""What the names in --methods stand for: what is trained, with which losses, on which features.

    finetune              cross-entropy on the source's images; --train says of what (TRAINED)
    lads, ldfs            … and on features that mappers synthesise from them
    ldfs:sigma=0,cls=0.5  a variation
    clipstyler            … and on features of their images in the targets' styles
    lpft                  the image tower finetuned from a trained linear probe
    flyp                  CLIP's contrastive loss on class prompts instead; trains both towers
    flyp+captions, flyp+retrieved, arf (both)     … and on ARF's anchors
    coop, cocoop, maple   a prompt; one that each image shifts; prompts deep in both towers
    clipood               the image tower, by a margin softmax, its weights averaged
    coop+ldfs, clipood+lads, arf+ldfs             … and on LDFS's or LADS's features
"""

import math
from dataclasses import dataclass, fields, replace
from utils import fail

ABLATIONS = [  # what --ablate adds: LDFS without each of its parts, and with other weights
    "ldfs:direction=class", "ldfs:sigma=0", "ldfs:pair=0", "ldfs:cls=0", "ldfs:form=cosine",
    "ldfs:sigma=0.003", "ldfs:sigma=0.03", "ldfs:sigma=0.1", "ldfs:pair=0.3", "ldfs:pair=3",
    "ldfs:unit=0",
]


@dataclass(frozen=True)
class Recipe:
    """What steers a mapper. "lads" is LADS's mapper as published; "global" is its idea under LDFS's
    schedule: LDFS minus its three parts (caption-wise direction, noise, pairwise term).

    CHOICE: sigma, small enough to leave the direction (at d = 512, |Δt| = 0.7 a cosine of 0.91);
    alternative: the sweep that --ablate makes.
    CHOICE: pair, λ_pair: both terms are of order one; alternative: more, for features closer to
    CLIP's.
    CHOICE: cls, λ_cls, kept from LADS so that LDFS is LADS and three parts; alternative: 0, as
    LDFS's figure 2 shows it.
    CHOICE: class_text of the source domain, the head that step 2 starts from; alternative: of the
    target's.
    """

    direction: str = "caption"  # whose text: each image's own caption's, its "class"'s (LADS), or
                                # one for the whole "domain" (StyleGAN-NADA)
    sigma: float = 0.01         # σ of the stochastic text features
    pair: float = 1.0           # λ_pair
    form: str = "angle"         # L_pair on angles, as the paper says; or the difference of cosines
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

# What is trained, under the strategies' names.
TRAINED = {
    "linear": "head",             # on features of the frozen image tower
    "coop": "prompt",             # likewise
    "cocoop": "prompt, meta-net",  # likewise
    "maple": "prompts of both towers",  # which stay as they are
    "full": "image tower, head",  # WiSE-FT's standard finetuning
    "lpft": "image tower, head",  # likewise, from a trained probe
    "clipood": "image tower",     # the head is what the text tower made of the class prompts
    "towers": "both towers",      # … what it makes of them
}
CACHED = ("linear", "coop", "cocoop")  # what is trained on features of a frozen image tower


@dataclass(frozen=True)
class Method:
    """What is trained (a key of TRAINED), and with which losses and features."""

    train: str
    contrastive: bool = False  # CLIP's loss on class prompts (FLYP), else cross-entropy
    captions: bool = False     # ARF's text-compensated anchors
    retrieved: bool = False    # ARF's image-text anchors
    recipe: str | None = None  # LADS's or LDFS's synthesised features

    @property
    def needs_captions(self):
        by_caption = self.recipe and parse_recipe(self.recipe).direction == "caption"
        return self.captions or bool(by_caption)


def parse_recipe(text):
    """Recipe of "ldfs", "lads", "ldfs:sigma=0,direction=class"; exits with status 2 otherwise."""
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
    allowed = {"direction": ("caption", "class", "domain"), "form": ("angle", "cosine")}
    allowed["loss"] = ("ldfs", "lads", "clipstyler")
    if recipe.loss == "clipstyler" and text != "clipstyler":
        fail(f"recipe {text!r}: CLIPstyler does not vary; write clipstyler alone.")
    if recipe.loss == "lads" and recipe != replace(RECIPES["lads"], direction=recipe.direction):
        fail(f"recipe {text!r}: of LADS as published only direction varies; vary global instead.")
    for key, values in allowed.items():
        if getattr(recipe, key) not in values:
            fail(f"recipe {text!r}: {key} is {' or '.join(values)}.")
    return recipe


def parse_method(text, train="linear"):
    """Method of "finetune" (of what `train` says), "ldfs:sigma=0", "lpft", "flyp+captions",
    "arf+ldfs" …

    Exits with status 2 at any other.
    """
    first, *more = text.split("+")
    if first == "arf":
        first, more = "flyp", ["captions", "retrieved", *more]
    if first not in ("finetune", "flyp", *TRAINED):  # a recipe alone is "finetune" with it
        first, more = "finetune", [first, *more]
    recipes = [part for part in more if part not in ("captions", "retrieved")]
    if len(recipes) > 1 or (first != "flyp" and len(recipes) < len(more)):
        fail(
            f"--methods {text}: captions and retrieved go with flyp, and one recipe at most with "
            "anything: flyp+captions, arf+ldfs."
        )
    for recipe in recipes:
        parse_recipe(recipe)
    trained = {"finetune": train, "flyp": "towers"}.get(first, first)
    if "clipstyler" in recipes and trained not in CACHED:
        fail(
            f"--methods {text}: CLIPstyler's images are encoded once, and no mapper follows a "
            f"tower that is trained. It goes with --train {', '.join(CACHED)}."
        )
    return Method(trained, first == "flyp", "captions" in more, "retrieved" in more, *recipes)


def recipes_of(methods):
    """{name: Recipe}: the recipes among {name: Method}, each once."""
    return {m.recipe: parse_recipe(m.recipe) for m in methods.values() if m.recipe}
