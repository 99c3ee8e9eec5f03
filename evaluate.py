"""Evaluate: the only file that reads images of target domains, and only to measure.

    python evaluate.py run pacs photo         # accuracies of every checkpoint of the run, added to its results.jsonl
    python evaluate.py figure4 pacs photo     # nearest real images of synthesised features: measures and a picture
    python evaluate.py all pacs photo         # both
    python evaluate.py table runs/pacs-photo  # the tables, from the rows of results.jsonl alone; the others end with it

ID is accuracy on held-out images of the source, OOD on each unseen domain; OOD mean is their mean over domains, and
extended the mean of ID and OOD mean (LADS's measure). Accuracy is top-1, over images, in per cent.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import data
from data import fail
from features import cached_features, encode_images, encode_texts, fingerprint, load_clip
from finetune import INITS, add_what, checkpoint_path
from mapper import load_mapper

METRICS = ("domain consistency", "class consistency", "unique neighbours", "accuracy")


def accuracy(z, labels, class_weight):
    """Top-1 accuracy in per cent of features (N, d) under a head (C, d)."""
    return 100 * (z @ class_weight.T).argmax(1).eq(labels).float().mean().item()


def accuracies(dataset, source, seed, features_of, class_weight, method):
    """Rows of accuracy: the source's val and test part, every target domain's test part, and their means.

    features_of(domain, items) gives the (N, d) features of a list of (path, label).
    """
    rows, by_domain = [], {}
    for domain, part in [(source, "val"), (source, "test"), *((d, "test") for d in dataset.targets(source))]:
        items = data.split(dataset, source, domain, part, seed)
        if not items and part == "val":  # a small data set may leave no image for validation
            continue
        if not items:
            fail(f"no image of {dataset.folder / domain} is left to test on; add images, or change the fractions.")
        value = accuracy(features_of(domain, items), torch.tensor([y for _, y in items]), class_weight)
        rows.append((method, domain, part, "accuracy", value, len(items), seed))
        by_domain[domain, part] = value
    ood = statistics.mean(by_domain[d, "test"] for d in dataset.targets(source))
    n = sum(count for _, domain, _, _, _, count, _ in rows if domain != source)
    rows.append((method, "OOD mean", "test", "accuracy", ood, n, seed))
    rows.append((method, "extended", "test", "accuracy", (by_domain[source, "test"] + ood) / 2, n, seed))
    return rows


def evaluate_run(args, dataset, run, clip, cached):
    """Append the accuracies of zero-shot CLIP and of every checkpoint that --train, --init and --features name.

    cached(domain, items) gives the original model's features of a list of (path, label).
    """
    original = {k: v.clone() for k, v in clip.model.state_dict().items()}
    model = fingerprint(clip)

    def encoded(domain, items):
        return encode_images(clip, dataset.folder, items, label=domain)

    text = encode_texts(clip, data.class_texts(dataset, args.source))
    for seed in tqdm(range(args.seeds), desc=f"evaluating ({args.train})", unit="seed"):
        rows = accuracies(dataset, args.source, seed, cached, text, "zero-shot")
        for features in args.features:
            path = checkpoint_path(run, args.train, args.init, features, seed)
            if not path.exists():
                fail(f"{path} is not there. Train it: python finetune.py, with the same arguments.")
            state = torch.load(path, map_location="cpu")
            args.schedule = state["made_of"]["schedule"]
            if state["made_of"]["model"] != model or state["epoch"] < args.schedule["epochs"]:
                fail(f"{path} is unfinished, or of another model. Finish it with finetune.py, or name another --run.")
            features_of = cached
            if args.train != "head":
                tuned = {k.removeprefix("clip."): v for k, v in state["modules"].items() if k.startswith("clip.")}
                clip.model.load_state_dict(tuned)
                features_of = encoded
            method = "finetune" if features == "original" else features
            rows += accuracies(dataset, args.source, seed, features_of, state["modules"]["head.weight"], method)
        data.append_results(run, args, rows)
        clip.model.load_state_dict(original)


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
    recipes = [f for f in args.features if f != "original"]
    picture, model = {}, fingerprint(clip)
    for seed in range(args.seeds):
        real = {}
        for domain in dataset.phrases:
            items = data.split(dataset, args.source, domain, "test", seed)
            real[domain] = cached(domain, items), torch.tensor([y for _, y in items]), [p for p, _ in items]
        z, labels, paths = real[args.source]
        rows = []
        for domain in dataset.targets(args.source):
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
    from PIL import Image

    pick = torch.randperm(len(sources), generator=torch.Generator().manual_seed(0))[:columns].tolist()
    rows = [("source", [sources[i] for i in pick])]
    rows += [(f"{name}\n{domain}", [found[i] for i in pick]) for (domain, name), found in picture.items()]
    figure, axes = pyplot.subplots(len(rows), len(pick), figsize=(len(pick), 1.08 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows):
        for column, (axis, (file, label)) in enumerate(zip(line, images)):
            with Image.open(dataset.folder / file) as image:
                axis.imshow(image.convert("RGB").resize((96, 96)))
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
# Tables


def read_results(run):
    """The rows of run/results.jsonl; of rows about the same thing (a stage was run again) only the last."""
    path = Path(run) / "results.jsonl"
    if not path.exists():
        fail(f"{path} is not there. Run something first: bash run_ldfs.sh --help")
    last = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        last[(how(row), *(row[k] for k in ("method", "domain", "split", "metric", "seed")))] = row
    return list(last.values())


def how(row):
    """What the rows of one block of a table have in common, in words: the model, and for accuracies how it was trained."""
    args = row["args"]
    words = [f"{row['dataset']}, source {row['source']}, {args['model']}"]
    if row["metric"] == "accuracy":
        words += [f"--train {args['train']} --init {args['init']}"]
        words += [f"{args['schedule']['epochs']} epochs of batch {args['schedule']['batch_size']}, lr {args['schedule']['lr']}"]
    return ", ".join(words)


def table(rows, metrics=METRICS):
    """Markdown: a block for each way of training, a line for each method, mean ± standard deviation over the seeds.

    "less finetune" is the OOD mean less that of plain finetuning, seed by seed: the split is the same, so this is the
    comparison to look at, and its deviation is the noise of the comparison.
    """
    lines = []
    for metric in metrics:
        of_metric = [r for r in rows if r["metric"] == metric and r["split"] == "test"]
        for title in dict.fromkeys(map(how, of_metric)):
            block = [r for r in of_metric if how(r) == title]
            source, seeds = block[0]["source"], len({r["seed"] for r in block})
            of = {}  # (method, domain): {seed: value}
            for r in block:
                of.setdefault((r["method"], r["domain"]), {})[r["seed"]] = r["value"]
            methods, domains = (list(dict.fromkeys(names)) for names in zip(*of))
            rivals = [m for m in ("finetune", "lads") if m in methods] if metric == "accuracy" else []
            heads = ["method"] + [f"ID ({d})" if d == source else d for d in domains] + [f"less {m}" for m in rivals]
            if metric == "accuracy":
                heads += ["OOD mean, seed by seed"]
            lines += [f"{title}: {metric} in per cent, {seeds} seed{'s'[:seeds - 1]}", ""]
            lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
            for method in methods:
                cells = [method] + [mean_and_deviation([*of.get((method, d), {}).values()]) or "not run" for d in domains]
                ood = of.get((method, "OOD mean"), {})
                for rival in rivals:
                    other = of.get((rival, "OOD mean"), {}) if rival != method else {}
                    cells += [mean_and_deviation([ood[s] - other[s] for s in ood.keys() & other.keys()])]
                if metric == "accuracy":
                    cells += [" ".join(f"{value:.1f}" for _, value in sorted(ood.items()))]
                lines += ["| " + " | ".join(cells) + " |"]
            lines += [""]
    return "\n".join(lines)


def mean_and_deviation(values):
    """"91.0 ± 1.4" (sample standard deviation), without the deviation of a single value; "" of none."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main():
    if len(sys.argv) > 2 and sys.argv[1] == "table":
        return print("\n".join(table(read_results(run)) for run in sys.argv[2:]))
    if len(sys.argv) < 2 or sys.argv[1] not in ("run", "figure4", "all"):
        fail("say what to do: python evaluate.py run|figure4|all DATASET SOURCE, or python evaluate.py table runs/…")
    parser = data.arguments(__doc__)
    parser.prog = f"evaluate.py {sys.argv[1]}"
    add_what(parser)
    args = parser.parse_args(sys.argv[2:])
    args.init = args.init or INITS[args.train]
    dataset, run = data.prepare(args)
    clip = load_clip(args, dataset)
    args.model = clip.name
    cache = {domain: cached_features(clip, dataset, domain, run) for domain in dataset.phrases}

    def cached(domain, items):
        row, z = cache[domain]
        return z[[row[p] for p, _ in items]]

    if sys.argv[1] != "figure4":
        evaluate_run(args, dataset, run, clip, cached)
    if sys.argv[1] != "run":
        figure4(args, dataset, run, clip, cached)
    tables = table(read_results(run))
    data.write_atomically(run / "table.md", lambda part: part.write_text(tables))
    print(tables)


if __name__ == "__main__":
    main()
