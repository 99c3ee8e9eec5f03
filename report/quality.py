"""Measures of synthesised features and anchors, and what the papers' pictures of them show."""

import re
import statistics

import torch

import anchors
import data
from core.methods import recipes_of
from core.results import record
from features import cached_features, encode_texts
from finetune import load_synthesisers

N_SHOWN = 10  # images in a picture

# -------------------------------------------------------------------------------------------------
# LDFS's figure 4: the real images nearest to synthesised features


def neighbours(z_hat, real):
    """Return the index into `real` (N, d) of the nearest feature to each row of z_hat (B, d)."""
    return (z_hat @ real.T).argmax(1)


def consistency(z_hat, labels, target, source):
    """Return domain consistency, class consistency and unique neighbours, in per cent.

    z_hat: (B, d) synthesised features, labels: (B,). target, source: (z (N, d), labels (N,)) of
    real images of the two domains. Domain: how many have their nearest real image in the target.
    Class: how many have a nearest image in the target that is of their class. Unique: how many
    different images those are.
    Source: LADS.
    CHOICE: held-out source images, and real test images of these two domains alone, so that nothing
    a mapper was trained on is judged; alternative: training images, all domains' images.
    """
    nearest = neighbours(z_hat, target[0])
    in_both = neighbours(z_hat, torch.cat([target[0], source[0]]))
    return {
        "domain consistency": 100 * (in_both < len(target[0])).float().mean().item(),
        "class consistency": 100 * target[1][nearest].eq(labels).float().mean().item(),
        "unique neighbours": 100 * len(nearest.unique()) / len(z_hat),
    }


def synthesis_records(settings, dataset, clip):
    """Return (records of `consistency`, {target: rows of its picture} by the mappers of seed 0).

    There are none if no method synthesises features of a domain that is on this disk. "not mapped"
    is the source's own features.
    """
    recipes, source = recipes_of(settings.methods), settings.source
    styles = [d for d in dataset.styles(source) if d in dataset.images and d not in dataset.heads]
    records, pictures = [], {}
    if not recipes or not styles:
        return records, pictures
    for seed in range(settings.seeds):
        items = {d: dataset.split(source, d, "test", seed) for d in (source, *styles)}
        real = {}
        for domain, pairs in items.items():
            z = cached_features(clip, dataset, domain, pairs, settings.cache)
            real[domain] = z, torch.tensor([label for _, label in pairs])
        z, labels = real[source]
        z_hats = {"not mapped": dict.fromkeys(styles, z)}
        for name in recipes:
            synthesisers = load_synthesisers(settings, dataset, clip, name, seed, items[source])
            z_hats[name] = {d: synthesisers[d](z.to(clip.device)).cpu() for d in styles}
        for domain in styles:
            for name, z_hat in z_hats.items():
                values = consistency(z_hat[domain], labels, real[domain], real[source])
                records.append(
                    record(settings, "synthesis", name, seed, values, len(z), domain=domain)
                )
        if seed == 0:
            del z_hats["not mapped"]
            pictures = picture_rows(items, source, styles, z_hats, real)
    return records, pictures


def picture_rows(items, source, styles, z_hats, real):
    """Return {target: [(label, [(Location, whether the nearest image is of another class)])]}."""
    shown = random_order(len(items[source]))[:N_SHOWN]
    labels = [items[source][i][1] for i in shown]
    originals = [(items[source][i][0], False) for i in shown]
    pictures = {domain: [(source, originals)] for domain in styles}
    for domain, rows in pictures.items():
        for name, z_hat in z_hats.items():
            nearest = neighbours(z_hat[domain][shown], real[domain][0]).tolist()
            images = []
            for label, j in zip(labels, nearest):
                location, nearest_label = items[domain][j]
                images.append((location, nearest_label != label))
            rows.append((name, images))
    return pictures


def random_order(n):
    """Return 0 … n-1 in an order that is always the same."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()


# -------------------------------------------------------------------------------------------------
# ARF's figure 5: the anchors


def read_descriptions(dataset):
    """Return {image_key: row} of what people wrote about the images; {} if nobody did."""
    path = dataset.folder / "descriptions.jsonl"
    return data.read_captions(path) if path.exists() else {}


def caption_quality(dataset, items, captions, z, clip):
    """Return measures of one caption for each of N items, in per cent.

    "names the class": the class's name occurs, word for word. "names class or thing": or what
    people call the thing, the words before the first comma of their description. "CLIP score": mean
    cosine of the image's feature (z is (N, d)) and the caption's, times 100.
    """
    score = {"CLIP score": 100 * (z * encode_texts(clip, captions)).sum(1).mean().item()}
    if not dataset.classes:
        return score
    descriptions, named = read_descriptions(dataset), []
    for (location, label), caption in zip(items, captions):
        nouns = [dataset.classnames[label]]
        if row := descriptions.get(data.image_key(location.path)):
            nouns.append(row["caption"].split(", ")[0])
        named.append([bool(re.search(rf"\b{re.escape(n)}\b", caption, re.I)) for n in nouns])
    return {
        "names the class": 100 * statistics.mean(names[0] for names in named),
        "names class or thing": 100 * statistics.mean(map(any, named)),
        **score,
    }


def caption_records(settings, dataset, clip):
    """Return records of `caption_quality`, if a method trains with captions.

    Of the source's captions as they were written, of the same shuffled, and of descriptions by
    people if all images have one.
    """
    if not any(method.captions for method in settings.methods.values()):
        return []
    items = dataset.trainable(settings.source)
    keys = [data.image_key(location.path) for location, _ in items]
    rows, descriptions = data.read_captions(dataset.captions), read_descriptions(dataset)
    written = [rows[key]["caption"] for key in keys]
    shuffled = [written[i] for i in random_order(len(written))]
    sets = {"captions": written, "captions, shuffled": shuffled}
    if all(key in descriptions for key in keys):
        sets["descriptions by people"] = [descriptions[key]["caption"] for key in keys]
    z = cached_features(clip, dataset, settings.source, items, settings.cache)
    records = []
    for name, texts in sets.items():
        values = caption_quality(dataset, items, texts, z, clip)
        records.append(record(settings, "captions", name, 0, values, len(items)))
    return records


def figure5_columns(settings, dataset, clip):
    """Return [(Location, caption, (score, Location, text) of its nearest retrieved pair or None)].

    The images are training images of seed 0, with a retrieved pair if there are such.
    """
    nearest = {}  # {image's path: (score, pair)}
    for pair in anchors.retrieve_pairs(settings, dataset, clip)["pairs"]:
        for query, score in pair["queries"].items():
            if query not in nearest or score > nearest[query][0]:
                nearest[query] = score, pair
    train = dataset.split(settings.source, settings.source, "train", 0)
    shown = [item for item in train if item[0].path in nearest] or train
    shown = [shown[i] for i in random_order(len(shown))[:N_SHOWN]]
    columns = []
    for (location, _), caption in zip(shown, data.captions(dataset, shown)):
        pair = None
        if location.path in nearest:
            score, best = nearest[location.path]
            pair = score, anchors.pair_location(settings, dataset, best), best["text"]
        columns.append((location, caption, pair))
    return columns
