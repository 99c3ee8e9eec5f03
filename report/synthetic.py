"""Does L_ld help more than a global direction where it should? An experiment on made-up features,
whose direction to the target domain is known and depends on the image to a chosen degree:

    python -m report.synthetic
"""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from core.artifacts import artifact_path, save
from core.config import Parser
from core.methods import parse_recipe
from core.results import record
from losses import class_consistency
from mapper import measure_mapper, train_mapper
from report.tables import terminal_table

RECIPES = ["ldfs", "ldfs:direction=class"]
DEGREES = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = 5


def make_features(degree, seed, n=400, d=64, classes=8, kinds=8):
    """Return z, z_target (2n, d), labels (2n,), {direction: (text_source, text_target)} and the
    classes' texts (C, d), all of unit norm.

    An image has a class and a kind (furry, metal …), which its caption names and its class prompt
    does not. In the target domain it is moved along norm((1 − degree) g + degree v_kind): g is the
    same for all, v_kind points to a class, so that an image is taken for that class unless its kind
    is known.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    def near(x, noise):
        return F.normalize(x + noise * draw(*x.shape), dim=-1)

    of_class, of_kind, g = draw(classes, d), draw(kinds, d), draw(1, d)
    labels = torch.randint(classes, (2 * n,), generator=generator)
    kind = torch.arange(2 * n) % kinds
    move = 0.7 * F.normalize((1 - degree) * g + degree * of_class[:kinds], dim=-1)     # (kinds, d)
    caption = F.normalize(of_class[labels] + of_kind[kind], dim=-1)
    z = near(caption, 0.5)
    texts = {
        "caption": (caption, F.normalize(caption + move[kind], dim=-1)),
        "class": (of_class[labels], F.normalize(of_class[labels] + move.mean(0), dim=-1)),
    }
    return z, near(z + move[kind], 0.3), labels, texts, of_class


def measure(degree, seed):
    """Return (spread of the captions' directions, {method: accuracy in the target domain}).

    "finetune" is a linear probe of source features alone; with a recipe, the probe is also trained
    on the features that its mapper synthesises.
    """
    z, z_target, labels, texts, class_text = make_features(degree, seed)
    n, accuracies = len(z) // 2, {}
    for name in ["finetune", *RECIPES]:
        train = [z[:n]]
        if name in RECIPES:
            recipe = parse_recipe(name)
            directions = [text[:n] for text in texts[recipe.direction]]
            inputs = z[:n], labels[:n], *directions, class_text
            mapper, _ = train_mapper(*inputs, recipe, seed)
            train.append(mapper(z[:n]))
        head = torch.zeros_like(class_text).requires_grad_()
        optimizer = torch.optim.AdamW([head], lr=0.01)
        for _ in range(300):
            loss = sum(class_consistency(x, head, labels[:n], 10) for x in train)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = (z_target[n:] @ head.T).argmax(1).eq(labels[n:])
        accuracies[name] = 100 * right.float().mean().item()
    captions = [text[:n] for text in texts["caption"]]
    return measure_mapper(mapper, z[:n], *captions, 0.01)["spread"], accuracies


def main():
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--run", default="runs/made-up", type=Path,
                        help="folder of the scores (default: runs/made-up)")
    args, records = parser.parse_args(), []
    about = SimpleNamespace(dataset="made-up", source="source", model="no model")
    for degree in DEGREES:
        for seed in range(SEEDS):
            spread, accuracies = measure(degree, seed)
            fields = {"trained": "head", "options": {"degree": degree}}
            records += [
                record(about, "accuracy", name, seed, {"OOD mean": value}, {}, **fields)
                for name, value in accuracies.items()
            ]
            directions = f"degree {degree:g}"
            values = {"spread": spread}
            records.append(record(about, "mapper", "ldfs", seed, values, {}, domain=directions))
    save(records, artifact_path(args.run / "scores", "made-up", (records,), ".json"))
    for part in ("accuracy", "mapper"):
        print(terminal_table([r for r in records if r["kind"] == part]), end="\n\n")


if __name__ == "__main__":
    main()
