"""Does L_ld beat a global direction where it should? Made-up features whose way to the target
domain is known, and hangs on the image more and more:

    python -m report.synthetic
"""

import torch
import torch.nn.functional as F

from losses import class_consistency
from mapper import statistics, train_mappers
from methods import parse_recipe
from report.tables import markdown, mean_and_deviation

RECIPES = ["ldfs", "ldfs:direction=class"]


def world(part, seed, n=400, d=64, classes=8, kinds=8):
    """z, z_target (2n, d), labels, and {direction: (text_source, text_target)}; all unit norm.

    An image has a class and a kind (furry, metal …), which its caption names and its class prompt
    does not. In the target domain it is moved along norm( (1 − part) g + part v_kind ): g is one
    for all, v_kind points to a class, so that it is taken for that unless its kind is seen.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    def near(x, noise):
        return F.normalize(x + noise * draw(*x.shape), dim=-1)

    of_class, of_kind, g = draw(classes, d), draw(kinds, d), draw(1, d)
    labels = torch.randint(classes, (2 * n,), generator=generator)
    kind = torch.arange(2 * n) % kinds
    move = 0.7 * F.normalize((1 - part) * g + part * of_class[:kinds], dim=-1)  # (kinds, d)
    caption = F.normalize(of_class[labels] + of_kind[kind], dim=-1)
    z = near(caption, 0.5)
    texts = {
        "caption": (caption, F.normalize(caption + move[kind], dim=-1)),
        "class": (of_class[labels], F.normalize(of_class[labels] + move.mean(0), dim=-1)),
    }
    return z, near(z + move[kind], 0.3), labels, texts, of_class


def measure(part, seed):
    """(spread of the captions' directions, {recipe: accuracy in the target domain}).

    "finetune" is a linear probe of the source alone, a recipe's one also of what its mapper makes.
    """
    z, z_target, labels, texts, class_text = world(part, seed)
    n, found = len(z) // 2, {}
    for name in ["finetune", *RECIPES]:
        train = [z[:n]]
        if name in RECIPES:
            recipe = parse_recipe(name)
            t_s, t_k = (text[:n] for text in texts[recipe.direction])
            [mapper] = train_mappers(z[:n], labels[:n], t_s, t_k[None], class_text, recipe, seed)
            train.append(mapper(z[:n]))
        head = torch.zeros_like(class_text).requires_grad_()
        optimizer = torch.optim.AdamW([head], lr=0.01)
        for _ in range(300):
            loss = sum(class_consistency(x, head, labels[:n], 10) for x in train)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = (z_target[n:] @ head.T).argmax(1).eq(labels[n:])
        found[name] = 100 * right.float().mean().item()
    own = [text[:n] for text in texts["caption"]]
    return statistics(mapper, z[:n], *own, 0.01)["spread"], found


def main():
    lines = []
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        spreads, found = zip(*(measure(part, seed) for seed in range(5)))
        cells = [mean_and_deviation([one[name] for one in found]) for name in found[0]]
        less = [one["ldfs"] - one["ldfs:direction=class"] for one in found]
        lines.append([f"{sum(spreads) / 5:.2f}", *cells, mean_and_deviation(less)])
    heads = ["spread", *found[0], "ldfs less direction=class"]
    print(markdown(heads, lines))


if __name__ == "__main__":
    main()
