"""How good are synthesised features and anchors? LDFS's figure 4, ARF's figure 5, measures."""

import re
import statistics

import torch

import data
from batches import read_retrieved
from features import encode_texts
from mapper import load_synthesiser
from methods import recipes_of
from report import figures, results

# -------------------------------------------------------------------------------------------------
# LDFS's figure 4: which real images are synthesised features near to?


def neighbours(z_hat, real):
    """Index into `real` (N, d) of the nearest feature to each row of z_hat (B, d), by cosine."""
    return (z_hat @ real.T).argmax(1)


def consistency(z_hat, labels, target, source):
    """Domain consistency, class consistency and unique neighbours of synthesised features, in per
    cent.

    z_hat: (B, d), labels: (B,). target, source: (z (N, d), labels (N,)) of real images of the
    domains. Domain: per cent whose nearest real image of either domain is of the target's. Class:
    per cent whose nearest image of the target domain has their class. Unique: how many different
    images those are, in per cent of B.
    Source: LADS.
    CHOICE: held-out source images, and real test images of these two domains alone, so that nothing
    a mapper was trained on is judged; alternative: training images, all domains' images.
    """
    nearest = neighbours(z_hat, target[0])
    both = neighbours(z_hat, torch.cat([target[0], source[0]]))
    return {
        "domain consistency": 100 * (both < len(target[0])).float().mean().item(),
        "class consistency": 100 * target[1][nearest].eq(labels).float().mean().item(),
        "unique neighbours": 100 * len(nearest.unique()) / len(z_hat),
    }


def figure4(config, dataset, clip, cached):
    """Append the measures above for each recipe, and draw the picture for seed 0."""
    recipes, source, rows = recipes_of(config.methods), config.source, []
    styles = [d for d in dataset.styles(source) if d in dataset.images and d not in dataset.heads]
    if not recipes or not styles:
        return print("no figure 4: no method synthesises features of a domain that is here")
    for seed in range(config.seeds):
        items = {d: dataset.split(source, d, "test", seed) for d in (source, *styles)}
        real = {
            d: (cached(dataset, d, pairs), torch.tensor([label for _, label in pairs]))
            for d, pairs in items.items()
        }
        z, labels = real[source]
        pick = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:10].tolist()
        picture = [("source", [(items[source][i][0], False) for i in pick])]
        for domain in styles:
            for name in ["not mapped", *recipes]:
                z_hat = z
                if name in recipes:
                    of = config, dataset, clip, name, domain, seed, items[source]
                    z_hat = load_synthesiser(*of)(z.to(clip.device)).cpu()
                    nearest = neighbours(z_hat[pick], real[domain][0]).tolist()
                    found = [items[domain][j] for j in nearest]
                    lost = [(place, y != labels[i].item()) for i, (place, y) in zip(pick, found)]
                    picture.append((f"{name}\n{domain}", lost))
                measures = consistency(z_hat, labels, real[domain], real[source])
                for measure, value in measures.items():
                    rows.append({
                        "method": name, "domain": domain, "measure": measure, "value": value,
                        "n": len(z), "seed": seed,
                    })
        if seed == 0:
            figures.draw_figure4(config.run / "figure4.png", picture)
    results.append(config, rows)


# -------------------------------------------------------------------------------------------------
# ARF's figure 5: the anchors


def caption_quality(dataset, items, captions, z, clip):
    """{"names the class", "names class or thing", "CLIP score"} of a caption for each of `items`,
    in per cent.

    Names: the class, or what people call the thing (descriptions.jsonl, where the data set has
    one), word for word. CLIP score: mean cosine of image and caption, times 100.
    """

    def names(caption, noun):
        return re.search(rf"\b{re.escape(noun)}\b", caption, re.I) is not None

    path = dataset.folder / "descriptions.jsonl"
    things = data.read_captions(path) if path.exists() else {}
    things = {p: row["caption"].split(", ")[0] for p, row in things.items()}
    of_class = [names(c, dataset.classnames[label]) for (_, label), c in zip(items, captions)]
    of_thing = [
        location.path in things and names(c, things[location.path])
        for (location, _), c in zip(items, captions)
    ]
    either = [a or b for a, b in zip(of_class, of_thing)]
    return {
        "names the class": 100 * statistics.mean(of_class),
        "names class or thing": 100 * statistics.mean(either),
        "CLIP score": 100 * (z * encode_texts(clip, captions)).sum(1).mean().item(),
    }


def figure5(config, dataset, clip, cached):
    """Append how good captions are, beside shuffled ones and people's; draw the anchors."""
    methods = config.methods.values()
    if not (any(m.captions for m in methods) and any(m.retrieved for m in methods)):
        return print("no figure 5: it needs methods that take captions and retrieved pairs")
    items = dataset.trainable(config.source)
    captions, file = data.captions(dataset, items), data.read_captions(dataset.captions)
    # what the captioner said, also where it is not used
    said = [file[location.path].get("instead of", c) for (location, _), c in zip(items, captions)]
    order = torch.randperm(len(said), generator=torch.Generator().manual_seed(0)).tolist()
    sets = {"captions": said, "captions, shuffled": [said[i] for i in order]}
    people = dataset.folder / "descriptions.jsonl"
    described = data.read_captions(people) if people.exists() else {}
    if all(location.path in described for location, _ in items):
        sets["descriptions by people"] = [described[at.path]["caption"] for at, _ in items]
    z, rows = cached(dataset, config.source, items), []
    for name, texts in sets.items():
        for measure, value in caption_quality(dataset, items, texts, z, clip).items():
            rows.append({
                "method": name, "domain": measure, "measure": "caption quality", "value": value,
                "n": len(items), "seed": 0,
            })
    results.append(config, rows)

    nearest = {}  # image: (score, Location, text) of the best pair retrieved for it
    for location, text, queries, _ in read_retrieved(config.run)[1]:
        for query, score in queries.items():
            found = score, location, text
            nearest[query] = max(nearest.get(query, found), found, key=lambda pair: pair[0])
    train = [location for location, _ in dataset.split(config.source, config.source, "train", 0)]
    shown = [location for location in train if location.path in nearest] or train
    pick = torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))[:10].tolist()
    caption_of = dict(zip((location for location, _ in items), captions))
    columns = [(shown[i], caption_of[shown[i]], nearest.get(shown[i].path)) for i in pick]
    figures.draw_figure5(config.run / "figure5.png", columns)
