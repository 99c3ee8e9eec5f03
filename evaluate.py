"""Evaluate: the only file that reads images of target domains in order to measure.

    python evaluate.py run emoji 3d --train visual --methods finetune flyp arf --alphas 0.5
                                              # accuracies of these checkpoints, added to the run's results.jsonl
    python evaluate.py figure4 pacs photo     # LDFS's figure 4: nearest real images of synthesised features
    python evaluate.py curve emoji 3d         # ARF's figure 4: ID and OOD between the original and the finetuned weights
    python evaluate.py figure5 emoji 3d       # ARF's figure 5: captions and retrieved pairs; how good the captions are
    python evaluate.py run,curve pacs photo   # several at once
    python evaluate.py table runs/pacs-photo  # the tables, from the rows of results.jsonl alone; the others end with it

ID is accuracy on held-out images of the source, OOD on each unseen domain; OOD mean is their mean over domains, and
extended the mean of ID and OOD mean (LADS's measure). Unseen is accuracy on images of classes that were kept apart, in a
domain: zero-shot ability; unseen mean is its mean over domains. Accuracy is top-1, over images, in per cent.
"""

import functools
import json
import re
import statistics
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import data
from anchors import read_retrieved
from data import fail
from features import (
    cached_features,
    encode_batch,
    encode_head,
    encode_images,
    encode_texts,
    front_features,
    load_clip,
    open_image,
    towers,
)
from finetune import CACHED, INITS, checkpoint_path, cut_frozen, schedules
from mapper import load_mapper
from methods import chosen, recipes_of

# What others measured, printed below one's own table; each under the name of whose it is.
_LEAVE_ONE_OUT = (
    "A range to expect, from another paper than LDFS's: ViT-B/16 trained on all domains but the one it is tested on (not, as "
    "here, on one), the mean over these",
    "method               | PACS | VLCS | OfficeHome | TerraIncognita | DomainNet",
    "zero-shot CLIP       | 96.2 | 81.7 | 82.0       | 33.4           | 57.5     ",
    "CoOp                 | 96.8 | 81.2 | 84.2       | 44.9           | 59.9     ",
    "finetune (ERM)       | 96.1 | 83.0 | 83.3       | 60.9           | 59.9     ",
    "CLIPood              | 97.3 | 85.0 | 87.0       | 60.4           | 63.5     ",
)
PUBLISHED = {
    **dict.fromkeys(("pacs", "vlcs", "office_home", "terra_incognita", "domainnet"), [_LEAVE_ONE_OUT]),
    "imagenet": [
        (
            "ARF's numbers as three later papers re-print them (ViT-B/16, finetuned on ImageNet, no interpolation); "
            "* ObjectNet from an incomplete download",
            "method           | ID (imagenet) | v2   | r    | a    | sketch | objectnet | OOD mean",
            "zero-shot        | 68.3          | 61.9 | 77.7 | 50.0 | 48.3   | 55.4      | 58.7    ",
            "finetune         | 81.3          | 71.2 | 66.1 | 37.8 | 46.1   | 53.3      | 54.9    ",
            "LP-FT            | 81.7          | 72.1 | 73.5 | 47.6 | 50.3   | 58.2*     | 60.3    ",
            "flyp             | 82.6          | 72.8 | 71.6 | 48.9 | 49.6   | 55.5      | 59.7    ",
            "arf              | 82.7          | 72.8 | 75.6 | 50.3 | 51.8   | 55.8      | 61.3    ",
            "finetune α=0.5   | 81.7          | 72.8 | 78.7 | 52.2 | 53.9   | 57.3      | 63.0    ",
        ),
        (
            "Likewise, zero-shot after finetuning on ImageNet; the splits are CoOp's, those of clip-benchmark differ: its own "
            "zero-shot ViT-B/16 has Cars 64.46, SUN 64.35, DTD 44.57, EuroSAT 55.59, Aircraft 24.18, Flowers 71.36, Pets 88.93",
            "method | caltech | flowers | food | sun  | dtd  | aircraft | cars | pets | eurosat | ucf  | unseen mean",
            "CLIP   | 89.5    | 67.0    | 84.5 | 63.0 | 46.3 | 22.6     | 59.0 | 87.7 | 46.3    | 65.7 | 63.2       ",
            "flyp   | 87.6    | 39.7    | 63.3 | 52.6 | 36.8 | 8.0      | 32.3 | 77.2 | 38.2    | 59.0 | 49.5       ",
            "arf    | 88.6    | 46.4    | 74.5 | 63.8 | 40.4 | 13.9     | 44.7 | 83.1 | 35.8    | 64.6 | 55.6       ",
        ),
    ],
}
METRICS = ("caption quality", "domain consistency", "class consistency", "unique neighbours", "accuracy")


def accuracy(z, labels, class_weight):
    """Top-1 accuracy in per cent of features (N, d) under a head (C, d)."""
    return 100 * (z @ class_weight.T).argmax(1).eq(labels).float().mean().item()


def accuracies(dataset, source, seed, features_of, head_of, method):
    """Rows of accuracy: the source's val and test part, every target domain's test part, and their means.

    features_of(domain, items) gives the (N, d) features of a list of (where, label), head_of(domain) the (C, d) classifier,
    or None where there is none. A domain that is not on this disk, or has no classifier, has no value.
    CHOICE: means are over the domains that are here; of a method that has no classifier for one of these there is none, for it
    would be over other domains than its rivals'; alternative: no mean unless all are here.
    """
    rows, by_domain, comparable = [], {}, True
    for domain, part in [(source, "val"), (source, "test"), *((d, "test") for d in dataset.phrases if d != source)]:
        if domain in dataset.absent:
            rows.append((method, domain, part, "accuracy", None, 0, seed))
            continue
        items = data.split(dataset, source, domain, part, seed)
        if not items and part == "val":  # a small data set may leave no image for validation
            continue
        if not items:
            fail(f"no image of {dataset.folder / domain} is left to test on; add images, or change the fractions.")
        if (class_weight := head_of(domain)) is None:
            rows.append((method, domain, part, "accuracy", None, 0, seed))
            comparable = False
            continue
        value = accuracy(features_of(domain, items), torch.tensor([y for _, y in items]), class_weight)
        rows.append((method, domain, part, "accuracy", value, len(items), seed))
        by_domain[domain, part] = value
    ood = [value for (domain, _), value in by_domain.items() if domain != source]
    n = sum(count for _, domain, _, _, _, count, _ in rows if domain != source)
    ood = statistics.mean(ood) if ood and comparable else None
    extended = None if ood is None else (by_domain[source, "test"] + ood) / 2
    rows.append((method, "OOD mean", "test", "accuracy", ood, n, seed))
    rows.append((method, "extended", "test", "accuracy", extended, n, seed))
    return rows


def unseen_accuracies(dataset, seed, features_of, head_of, method):
    """Rows of zero-shot accuracy on a data set of kept-apart classes: in each domain, and their mean; see `accuracies`."""
    rows = [(method, f"unseen {domain}", "test", "accuracy", None, 0, seed) for domain in dataset.absent]
    for domain, items in dataset.images.items():
        value = accuracy(features_of(domain, items), torch.tensor([y for _, y in items]), head_of(domain))
        rows.append((method, f"unseen {domain}", "test", "accuracy", value, len(items), seed))
    there = [row[4] for row in rows if row[4] is not None]
    mean = statistics.mean(there) if there else None
    return [*rows, (method, "unseen mean", "test", "accuracy", mean, sum(row[5] for row in rows), seed)]


def restricted(class_weight, names, own_names):
    """The rows of a head (C, d) of classes `names` that classify among `own_names`, or None where one of these is not there.

    ImageNet-A and -R have 200 of ImageNet's 1000 classes: so one chooses among these alone. Two classes of one name (ImageNet
    has two "missile") are told apart by the order, which is the same in both lists.
    """
    rows = []
    for name in own_names:
        alike = [i for i, other in enumerate(names) if other == name]
        if not alike:
            return None
        rows.append(next((i for i in alike if not rows or i > rows[-1]), alike[0]))
    return class_weight[rows]


def interpolate(original, tuned, alpha):
    """θ = (1 − α) θ_original + α θ_tuned, entry by entry of two state dicts. Source: WiSE-FT (arXiv 2109.01903)."""
    if alpha == 1:
        return tuned
    return {k: (1 - alpha) * original[k] + alpha * v if v.is_floating_point() else v for k, v in tuned.items() if k in original}


def encoder(clip):
    """encode(dataset, domain, items) -> z (N, d) by the weights that clip.model has at the time of the call.

    What frozen stages make of a domain's images is computed at the first call and kept.
    """
    kept = {}

    def encode(dataset, domain, items):
        if clip.front is None:
            return encode_images(clip, dataset.folder, items, label=domain)
        if (dataset.name, domain) not in kept:
            everything = dataset.images[domain]
            features = front_features(clip, dataset.folder, everything, clip.preprocess)
            kept[dataset.name, domain] = {path: i for i, (path, _) in enumerate(everything)}, features
        row, features = kept[dataset.name, domain]
        chunks = torch.tensor([row[path] for path, _ in items]).split(512)
        return torch.cat([encode_batch(clip, features[i]).cpu() for i in chunks])

    return encode


def evaluate_run(args, dataset, run, clip, cached):
    """Append the accuracies of zero-shot CLIP and of every checkpoint that --train, --init and --methods name.

    cached(domain, items) gives the original model's features of a list of (where, label). Each checkpoint is measured as it
    is, and mixed with the original weights at each of --alphas; unseen classes where a tower was trained. A checkpoint that
    has been measured on the same images is not measured again.
    """
    methods, schedule_of = chosen(args), schedules(dataset, args)
    tuned = args.train not in CACHED  # the towers are, and every checkpoint has its own features
    cut_frozen(clip, dataset, args)
    encode, text = encoder(clip), encode_head(clip, data.prompts(dataset, args.source))
    original = {"head.weight": text, **{f"clip.{k}": v.cpu().clone() for k, v in clip.model.state_dict().items()}}
    unseen = data.load_unseen(dataset) if tuned else None
    for domain, how_to in {**dataset.absent, **(unseen.absent if unseen else {})}.items():
        print(f"not run: {domain} ({how_to})")
    images = data.sha(repr([(one.images, one.own) for one in (dataset, unseen) if one]))
    args.contrastive = asdict(schedule_of["all"]) if any(m.contrastive for m in methods.values()) else None

    def measure(method, seed, class_weight, retold):
        """Rows of clip.model as it is. retold: whether the head is what the text tower says of the class prompts."""
        told = {}  # domains of one wording share a head

        def head_of(domain, of=dataset, given=class_weight):
            if domain not in of.own and given is not None:
                return given
            if not retold and of is dataset:
                return restricted(given, dataset.names, dataset.own[domain][0])
            key = data.sha(repr(wording := data.prompts(of, args.source, domain)))
            if key not in told:
                told[key] = encode_head(clip, wording)
            return told[key]

        def features_of(domain, items):
            return encode(dataset, domain, items) if tuned else cached(domain, items)

        rows = accuracies(dataset, args.source, seed, features_of, head_of, method)
        if unseen:
            # CHOICE: named in the source's words, as all heads are, since a model in use does not know what domain it meets;
            # alternative: in each domain's own
            rows += unseen_accuracies(
                unseen, seed, lambda domain, items: encode(unseen, domain, items),
                lambda domain: head_of(domain, unseen, None), method,
            )
        return rows

    done = {(r["of"], r["seed"]) for r in map(json.loads, results_lines(run)) if "of" in r}
    for seed in tqdm(range(args.seeds), desc=f"evaluating ({args.train})", unit="seed"):
        rows = None
        for method in methods:
            path = checkpoint_path(run, args.train, args.init, method, seed)
            if not path.exists():
                fail(f"{path} is not there. Train it: python finetune.py, with the same arguments.")
            state = torch.load(path, map_location="cpu")
            made_of = state["made_of"]
            of = data.sha(repr((made_of, args.train, args.init, method, args.alphas, args.contrastive, images)))
            if made_of["schedule"] != asdict(schedule_of["all" if methods[method].contrastive else args.train]):
                fail(f"{path} was trained with another --epochs, --batch-size or --lr. Say the same here, or train it anew.")
            if made_of["model"] != clip.fingerprint or state["epoch"] < made_of["schedule"]["epochs"]:
                fail(f"{path} is unfinished, or of another model. Finish it with finetune.py, or name another --run.")
            if tuned and original.keys() != state["modules"].keys():
                fail(f"{path} was trained with another --frozen-stages. Say the same here, or name another --run.")
            if (of, seed) in done:
                continue
            if rows is None:  # zero-shot, written with the first method's rows, whose block of the table it then is in
                clip.model.load_state_dict(towers(original))
                rows = measure("zero-shot", seed, text, retold=True)
            args.schedule, args.frozen_stages = asdict(schedule_of[args.train]), made_of["frozen stages"]
            weights = {"λ_cap": made_of["anchors"]["lambda_cap"], "λ_ret": made_of["anchors"]["lambda_ret"]}
            label = method + "".join(f" {name}={value:g}" for name, value in weights.items() if value != 1)
            for alpha in (1, *args.alphas):
                mix = interpolate(original, state["modules"], alpha)
                if tuned:
                    clip.model.load_state_dict(towers(mix))
                retold = methods[method].contrastive or args.train == "all"
                class_weight = encode_head(clip, data.prompts(dataset, args.source)) if retold else mix["head.weight"]
                found = measure(label if alpha == 1 else f"{label} α={alpha:g}", seed, class_weight, retold)
                means = (args.source, "OOD mean", "unseen mean")
                rows += [r for r in found if alpha in (0.5, 1) or (r[1] in means and r[2] == "test")]  # the rest is a curve
            data.append_results(run, args, rows, of=of)
            rows = []
    clip.model.load_state_dict(towers(original))


# ---------------------------------------------------------------------------------------------------------------------
# LDFS's figure 4: which real images are synthesised features near to?


def neighbours(z_hat, real):
    """Index into `real` (N, d) of the nearest feature to each row of z_hat (B, d), by cosine."""
    return (z_hat @ real.T).argmax(1)


def consistency(z_hat, labels, target, source):
    """Domain consistency, class consistency and number of unique neighbours of synthesised features.

    z_hat: (B, d), labels: (B,). target, source: (z (N, d), labels (N,)) of real images of the two domains.
    Domain: per cent whose nearest real image of either domain is of the target's. Class: per cent whose nearest image of
    the target domain has their class. Unique: how many different images those are, in per cent of B.
    Source: LADS. CHOICE: held-out source images, and real test images of these two domains alone, so that nothing a mapper
    was trained on is judged; alternative: training images, and the real images of all domains.
    """
    nearest = neighbours(z_hat, target[0])
    both = neighbours(z_hat, torch.cat([target[0], source[0]]))
    return {
        "domain consistency": 100 * (both < len(target[0])).float().mean().item(),
        "class consistency": 100 * target[1][nearest].eq(labels).float().mean().item(),
        "unique neighbours": 100 * len(nearest.unique()) / len(z_hat),
    }


def figure4(args, dataset, run, clip, cached):
    """Append the measures above for each recipe, and draw the picture for seed 0."""
    recipes, picture, model = recipes_of(chosen(args)), {}, clip.fingerprint
    targets = [d for d in dataset.styles(args.source) if d in dataset.images and d not in dataset.own] if recipes else []
    if not targets:
        print("no figure 4: no method synthesises features of a domain that is here")
        return
    for seed in range(args.seeds):
        real = {}
        for domain in (args.source, *targets):
            items = data.split(dataset, args.source, domain, "test", seed)
            real[domain] = cached(domain, items), torch.tensor([y for _, y in items]), [p for p, _ in items]
        z, labels, paths = real[args.source]
        rows = []
        for domain in targets:
            for name in ["not mapped", *recipes]:
                z_hat = z if name == "not mapped" else load_mapper(run, name, domain, seed, model)(z)
                for metric, value in consistency(z_hat, labels, real[domain], real[args.source]).items():
                    rows.append((name, domain, "test", metric, value, len(z), seed))
                if seed == 0 and name != "not mapped":
                    z_real, labels_real, paths_real = real[domain]
                    picture[domain, name] = [(paths_real[i], labels_real[i].item()) for i in neighbours(z_hat, z_real)]
        data.append_results(run, args, rows)
        if seed == 0:
            draw_figure4(dataset, run / "figure4.png", list(zip(paths, labels.tolist())), picture)


def draw_figure4(dataset, path, sources, picture, columns=10):
    """Sampled source images, and below them the real target images nearest to their synthesised features."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pick = torch.randperm(len(sources), generator=torch.Generator().manual_seed(0))[:columns].tolist()
    rows = [("source", [sources[i] for i in pick])]
    rows += [(f"{name}\n{domain}", [found[i] for i in pick]) for (domain, name), found in picture.items()]
    figure, axes = pyplot.subplots(len(rows), len(pick), figsize=(len(pick), 1.08 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows):
        for column, (axis, (file, label)) in enumerate(zip(line, images)):
            axis.imshow(open_image(dataset.folder, file).resize((96, 96)))
            axis.set(xticks=[], yticks=[])
            lost = label != sources[pick[column]][1]
            for spine in axis.spines.values():
                spine.set(color="red" if lost else "lightgrey", linewidth=2.5 if lost else 0.8)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("Nearest real image of each synthesised feature (red: of another class)", fontsize=10)
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 0.985))  # the title above the images
    data.write_atomically(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    pyplot.close(figure)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------
# ARF's figure 4: between the original weights and the finetuned


def curve(run):
    """Draw ID against OOD mean, and against unseen mean, of every method along α, mean over seeds, into run/curve.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = {}  # method: {α: {domain: [value of each seed]}}
    of_run = [r for r in read_results(run) if r["metric"] == "accuracy" and r["split"] == "test" and r["value"] is not None]
    latest = max((r for r in of_run if " α=" in r["method"]), key=lambda r: r["line"], default=None)
    if not latest:
        print("no curve: no weights in between were measured (--alphas 0.2 0.5 0.8)")
        return
    of_run = [r for r in of_run if how(r) == how(latest)]  # of several ways of training, the one measured last
    for row in of_run:
        method, _, alpha = row["method"].partition(" α=")
        at = points.setdefault(method, {}).setdefault(float(alpha or method != "zero-shot"), {})
        domain = "ID" if row["domain"] == row["source"] else row["domain"]
        at.setdefault(domain, []).append(row["value"])
    start = points.pop("zero-shot", {}).get(0)
    others = [d for d in ("OOD mean", "unseen mean") if d in start]
    if not others:
        print("no curve: there is no other domain, nor a set of other classes, to measure on")
        return
    figure, axes = pyplot.subplots(1, len(others), figsize=(5.2 * len(others), 4.4), squeeze=False)
    for axis, other in zip(axes[0], others):
        for method, at in points.items():
            at = {a: values for a, values in {0: start, **at}.items() if other in values}
            line = {a: [statistics.mean(v[d]) for d in (other, "ID")] for a, v in sorted(at.items())}
            [drawn] = axis.plot(*zip(*line.values()), ".-", linewidth=1.2, markersize=4, label=method)
            for a, marker in ((0.5, "D"), (1, "o")):
                if a in line:
                    axis.plot(*line[a], marker, color=drawn.get_color(), markersize=7)
        axis.plot(*(statistics.mean(start[d]) for d in (other, "ID")), "k*", markersize=14, label="zero-shot (α = 0)")
        axis.set(xlabel=f"{other}, accuracy in per cent", ylabel="ID, accuracy in per cent")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    seeds = len({row["seed"] for row in of_run})
    about = f"diamond: α = 0.5, dot: α = 1; mean of {seeds} seed{'s'[:seeds - 1]}"
    figure.suptitle(f"From zero-shot to finetuned weights\n({about})", fontsize=10)
    figure.tight_layout()
    data.write_atomically(run / "curve.png", lambda part: figure.savefig(part, dpi=110, format="png"))
    pyplot.close(figure)
    print(f"wrote {run / 'curve.png'}")


# ---------------------------------------------------------------------------------------------------------------------
# ARF's figure 5: the anchors


def caption_quality(dataset, source, captions, z, clip):
    """{"names the class", "names class or thing", "CLIP score"} of a caption for each of the source's images, in per cent.

    Names: the class, or what people call the thing (descriptions.jsonl, where the data set has one), word for word.
    CLIP score: mean cosine of image and caption, times 100.
    """

    def names(caption, what):
        return re.search(rf"\b{re.escape(what)}\b", caption, re.I) is not None

    items, path = dataset.trainable(source), dataset.folder / "descriptions.jsonl"
    things = {p: row["caption"].split(", ")[0] for p, row in data.read_captions(path).items()} if path.exists() else {}
    of_class = [names(c, dataset.names[y]) for (_, y), c in zip(items, captions)]
    of_either = [a or (p in things and names(c, things[p])) for a, (p, _), c in zip(of_class, items, captions)]
    score = (z * encode_texts(clip, captions)).sum(1).mean().item()
    return {
        "names the class": 100 * statistics.mean(of_class),
        "names class or thing": 100 * statistics.mean(of_either),
        "CLIP score": 100 * score,
    }


def figure5(args, dataset, run, clip, cached):
    """Append how good the captions are, beside shuffled ones and people's own; draw captions and retrieved pairs."""
    methods = chosen(args).values() if args.methods else ()
    if methods and not (any(m.captions for m in methods) and any(m.retrieved for m in methods)):
        print("no figure 5: no method takes both captions and retrieved pairs")
        return
    items = dataset.trainable(args.source)
    z, captions = cached(args.source, items), data.captions(dataset, [path for path, _ in items])
    said = data.read_captions(dataset.captions)  # what the captioner said, also where it is not used
    said = [said[path].get("instead of", caption) for (path, _), caption in zip(items, captions)]
    order = torch.randperm(len(said), generator=torch.Generator().manual_seed(0)).tolist()
    sets = {"captions": said, "captions, shuffled": [said[i] for i in order]}
    people = dataset.folder / "descriptions.jsonl"
    if people.exists():
        own = data.read_captions(people)
        sets["descriptions by people"] = [own[path]["caption"] for path, _ in items]
    rows = []
    for name, texts in sets.items():
        for measure, value in caption_quality(dataset, args.source, texts, z, clip).items():
            rows.append((name, measure, "test", "caption quality", value, len(items), 0))
    data.append_results(run, args, rows)

    nearest = {}  # image: (score, where, text) of the best pair retrieved for it
    for where, text, queries in read_retrieved(run):
        for query, score in queries.items():
            nearest[query] = max(nearest.get(query, (-1,)), (score, where, text), key=lambda found: found[0])
    train = data.split(dataset, args.source, args.source, "train", 0)
    mine = [path for path, _ in train if path in nearest] or [path for path, _ in train]
    pick = torch.randperm(len(mine), generator=torch.Generator().manual_seed(0))[:10].tolist()
    own = dict(zip((path for path, _ in items), captions))
    draw_figure5(dataset, run / "figure5.png", [(mine[i], own[mine[i]], nearest.get(mine[i])) for i in pick])


def draw_figure5(dataset, path, columns):
    """Sampled training images with their captions and, below each, the retrieved pair nearest to it, with its own text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(columns), figsize=(1.5 * len(columns), 4.7), squeeze=False)
    for (above, below), (file, caption, pair) in zip(axes.T, columns):
        shown = [(above, file, caption, None)]
        shown += [(below, pair[1], pair[2], pair[0])] if pair else []
        for axis, where, text, score in shown:
            axis.imshow(open_image(dataset.folder, where).resize((96, 96)))
            axis.set_xlabel(textwrap.fill(text, 18, max_lines=5), fontsize=7)
            if score is not None:
                axis.set_title(f"cosine {score:.2f}", fontsize=7, pad=2)
        for axis in (above, below):
            axis.set(xticks=[], yticks=[])
    axes[0][0].set_ylabel("image, its caption")
    axes[1][0].set_ylabel("nearest pair, its text")
    figure.tight_layout(pad=0.4)
    data.write_atomically(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    pyplot.close(figure)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def read_results(run):
    """The rows of run/results.jsonl and their lines; of rows about the same thing (a stage was run again) only the last."""
    last = {}
    lines = results_lines(run)
    if not lines:
        fail(f"{Path(run) / 'results.jsonl'} is not there. Run something first: bash run_ldfs.sh pacs photo")
    for number, line in enumerate(lines):
        row = json.loads(line)
        last[(how(row), *(row[k] for k in ("method", "domain", "split", "metric", "seed")))] = {**row, "line": number}
    return list(last.values())


def results_lines(run):
    path = Path(run) / "results.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def how(row):
    """What the rows of one block of a table have in common, in words: the model, and for accuracies how it was trained."""
    args = row["args"]
    words = [f"{row['dataset']}, source {row['source']}, {args['model']}"]
    if row["metric"] == "accuracy":
        words += [f"--train {args['train']} --init {args['init']}"]
        told = [args["schedule"], args.get("contrastive") or args["schedule"]]
        told = [f"{s['epochs']} epochs of batch {s['batch_size']}, lr {s['lr']}" for s in told]
        words += [told[0], *([f"flyp and arf {told[1]}"] if told[1] != told[0] else [])]
        words += [f"{n} stages frozen"] if (n := args.get("frozen_stages")) else []
    return ", ".join(words)


def table(rows, metrics=METRICS):
    """Markdown: a block for each way of training, a line for each method, mean ± standard deviation over the seeds.

    "less finetune" is the OOD mean less that of plain finetuning, seed by seed: the split is the same, so this is the
    comparison to look at, and its deviation is the noise of the comparison. Where there is FLYP, ID, OOD mean and unseen
    mean are compared with it, at the same α.
    """
    lines = []
    for metric in metrics:
        of_metric = [r for r in rows if r["metric"] == metric and r["split"] == "test"]
        of_metric = [r for r in of_metric if " α=" not in r["method"] or r["method"].endswith(" α=0.5")]
        for title in dict.fromkeys(map(how, of_metric)):
            block = [r for r in of_metric if how(r) == title]
            source, seeds = block[0]["source"], len({r["seed"] for r in block})
            of = {}  # (method, domain): {seed: value}
            for r in block:
                if r["value"] is not None:
                    of.setdefault((r["method"], r["domain"]), {})[r["seed"]] = r["value"]
            methods, domains = (list(dict.fromkeys(r[k] for r in block)) for k in ("method", "domain"))
            compared = {}  # heading: (domain, method)
            if "flyp" in methods:
                with_flyp = [d for d in (source, "OOD mean", "unseen mean") if d in domains]
                compared = {f"{d.split()[0] if d != source else 'ID'} less flyp": (d, "flyp") for d in with_flyp}
            elif metric == "accuracy":
                compared = {f"less {m}": ("OOD mean", m) for m in ("finetune", "lads") if m in methods}
            raw = [d for d in ("OOD mean", "unseen mean") if d in domains]
            if "zero_shot" not in data.DATASETS.get(block[0]["dataset"], {}):  # ten sets of renown; else styles of one set
                domains = [d for d in domains if not d.startswith("unseen ") or d == "unseen mean"]
            heads = ["method"] + [f"ID ({d})" if d == source else d for d in domains] + [*compared]
            heads += [f"{d}, seed by seed" for d in raw]
            lines += [f"{title}: {metric} in per cent, {seeds} seed{'s'[:seeds - 1]}", ""]
            lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
            for method in methods:
                cells = [method] + [mean_and_deviation([*of.get((method, d), {}).values()]) or "not run" for d in domains]
                alpha = method[method.find(" α"):] if " α" in method else ""
                for domain, rival in compared.values():
                    mine, other = of.get((method, domain), {}), of.get((rival + alpha, domain), {})
                    both = mine.keys() & other.keys() if method != rival + alpha else ()
                    cells += [mean_and_deviation([mine[s] - other[s] for s in both])]
                for domain in raw:
                    cells += [" ".join(f"{value:.1f}" for _, value in sorted(of.get((method, domain), {}).items()))]
                lines += ["| " + " | ".join(cells) + " |"]
            lines += [""]
    for name in dict.fromkeys(row["dataset"] for row in rows):
        for title, head, *published in PUBLISHED.get(name, ()):
            lines += [f"{title}:", "", f"| {head} |", "|---" * len(head.split("|")) + "|"]
            lines += [*(f"| {row} |" for row in published), ""]
    return "\n".join(lines)


def mean_and_deviation(values):
    """"91.0 ± 1.4" (sample standard deviation), without the deviation of a single value; "" of none."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main():
    if len(sys.argv) > 2 and sys.argv[1] == "table":
        return print("\n".join(table(read_results(run)) for run in sys.argv[2:]))
    stages = {"run": evaluate_run, "figure4": figure4, "figure5": figure5, "curve": None}
    wanted = sys.argv[1].split(",") if len(sys.argv) > 1 else []
    if not wanted or not {*wanted} <= {*stages}:
        fail(f"say what to do: python evaluate.py {'|'.join(stages)} DATASET SOURCE, or python evaluate.py table runs/…")
    parser = data.arguments(__doc__)
    parser.prog = f"evaluate.py {sys.argv[1]}"
    args = parser.parse_args(sys.argv[2:])
    chosen(args)
    args.init = args.init or INITS[args.train]
    dataset, run = data.prepare(args)
    clip = load_clip(args, dataset)
    args.model = clip.name

    @functools.cache
    def cache(domain):
        return cached_features(clip, dataset, domain, run)

    def cached(domain, items):
        row, z = cache(domain)
        return z[[row[p] for p, _ in items]]

    for name in wanted:
        if name == "curve":
            curve(run)
        else:
            stages[name](args, dataset, run, clip, cached)
    tables = table(read_results(run))
    data.write_atomically(run / "table.md", lambda part: part.write_text(tables))
    print(tables)


if __name__ == "__main__":
    main()
