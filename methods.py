"""What the names in --methods stand for: which features a model is finetuned on, and with which losses.

    finetune              cross-entropy on the source's images
    lads, ldfs            … and on features that mappers synthesise from them
    ldfs:sigma=0,cls=0.5  a variation
    flyp                  CLIP's contrastive loss on class prompts instead
    flyp+captions, flyp+retrieved, arf (both)     … and on ARF's anchors
    arf+ldfs              … and on LDFS's features
"""

from dataclasses import dataclass, fields, replace

from data import fail

DEFAULT = ["finetune", "lads", "ldfs"]
ABLATIONS = [  # what --ablate adds: LDFS without each of its parts, and with other weights
    "ldfs:direction=class", "ldfs:sigma=0", "ldfs:pair=0", "ldfs:cls=0", "ldfs:form=cosine",
    "ldfs:sigma=0.003", "ldfs:sigma=0.03", "ldfs:sigma=0.1", "ldfs:pair=0.3", "ldfs:pair=3",
]


@dataclass(frozen=True)
class Recipe:
    """What steers a mapper. LDFS minus its three parts (caption-wise direction, noise, pairwise term) is LADS.

    CHOICE: sigma, small enough to leave the direction (at d = 512, |Δt| = 0.7 a cosine of 0.91); alternative: the sweep that
    --ablate makes.
    CHOICE: pair, λ_pair: both terms are of order one; alternative: more, for features that stay closer to CLIP's.
    CHOICE: cls, λ_cls, kept from LADS so that LDFS is LADS and three parts; alternative: 0, as LDFS's figure 2 shows it.
    CHOICE: class_text of the source domain, the head that step 2 starts from; alternative: of the target's.
    """

    direction: str = "caption"  # whose text: each image's own caption, or "class", its class: LADS's global Δt
    sigma: float = 0.01         # σ of the stochastic text features
    pair: float = 1.0           # λ_pair
    form: str = "angle"         # L_pair on angles, as the paper says; "cosine" for the difference of cosines
    cls: float = 1.0            # λ_cls


RECIPES = {"ldfs": Recipe(), "lads": Recipe(direction="class", sigma=0.0, pair=0.0)}


@dataclass(frozen=True)
class Method:
    """Which losses: cross-entropy or, if `contrastive`, CLIP's own on class prompts (FLYP), and what is added to them."""

    contrastive: bool = False
    captions: bool = False    # ARF's text-compensated anchors
    retrieved: bool = False   # ARF's image-text anchors
    recipe: str | None = None  # LADS's or LDFS's synthesised features

    @property
    def needs_captions(self):
        return self.captions or (self.recipe is not None and parse_recipe(self.recipe).direction == "caption")


def parse_recipe(text):
    """Recipe of "ldfs", "lads", or a variation such as "ldfs:sigma=0,direction=class"; exits with status 2 otherwise."""
    name, _, changes = text.partition(":")
    kinds = {f.name: type(f.default) for f in fields(Recipe)}
    if name not in RECIPES:
        fail(f"unknown recipe {text!r}. Known: {', '.join(RECIPES)}; variations: ldfs:sigma=0 ({', '.join(kinds)}).")
    try:
        pairs = dict(change.split("=") for change in changes.split(",")) if changes else {}
        recipe = replace(RECIPES[name], **{key: kinds[key](value) for key, value in pairs.items()})
    except (KeyError, ValueError):
        fail(f"recipe {text!r}: write name=value, with commas between; the names are {', '.join(kinds)}.")
    if not all(0 <= x < float("inf") for x in (recipe.sigma, recipe.pair, recipe.cls)):
        fail(f"recipe {text!r}: sigma, pair and cls are numbers from 0 up.")
    if recipe.direction not in ("caption", "class") or recipe.form not in ("angle", "cosine"):
        fail(f"recipe {text!r}: direction is caption or class, form is angle or cosine.")
    return recipe


def parse_method(text):
    """Method of "finetune", "lads", "ldfs:sigma=0", "flyp", "flyp+captions", "flyp+retrieved", "arf" (both), "arf+ldfs".

    Exits with status 2 at any other.
    """
    first, *more = text.split("+")
    if first == "arf":
        first, more = "flyp", ["captions", "retrieved", *more]
    if first not in ("finetune", "flyp"):
        more = [first, *more]
    recipes = [part for part in more if part not in ("captions", "retrieved")]
    if len(recipes) > 1 or (first != "flyp" and len(recipes) < len(more)):
        fail(f"--methods {text}: anchors go with flyp, and one recipe at most with anything: flyp+captions, arf+ldfs.")
    for recipe in recipes:
        parse_recipe(recipe)
    return Method(first == "flyp", "captions" in more, "retrieved" in more, *recipes)


def chosen(args):
    """{name: Method} of --methods and --ablate; sets args.train where --train does not.

    Exits with status 2 at an unknown method, or one that --train cannot train.
    """
    names = [*(args.methods or DEFAULT), *(ABLATIONS if args.ablate else ())]
    methods = {name: parse_method(name) for name in names}
    towers = any(m.contrastive for m in methods.values())
    if args.train in ("head", "prompt") and towers:
        fail("flyp and arf train the towers. Say --train visual, or --train all.")
    args.train = args.train or ("visual" if towers else "head")
    return methods


def recipes_of(methods):
    """{name: Recipe}: the recipes among {name: Method}, each once."""
    return {m.recipe: parse_recipe(m.recipe) for m in methods.values() if m.recipe}
