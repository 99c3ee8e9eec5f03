"""Evaluate: with quality.py, which it calls, all that measures on images of target domains.

    python evaluate.py emoji 3d --paper arf --alphas 0.5      # every checkpoint of these methods
    python -m report.tables runs/pacs-photo                   # the tables again, from results alone

It appends to the run's results.jsonl, draws what there is to draw (LDFS's figure 4, ARF's figures 4
and 5) and prints the tables. What has been measured on the same images is not measured again.

ID is accuracy on held-out images of the source, OOD on each unseen domain; OOD mean is their mean
over domains, and extended the mean of ID and OOD mean (LADS's measure). Unseen is accuracy on
images of classes that were kept apart, in a domain: zero-shot ability; unseen mean is its mean over
domains. Accuracy is top-1, over images, in per cent.
"""

import contextlib
import functools
import statistics
from utils import fail, load_whole, only_one_process, short_hash, undamaged, warn, write_atomically

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from config import parse
from features import cached_features, encode_images, load_clip, stamps, towers_of, zero_shot_head
from finetune import checkpoint_path
from methods import CACHED, TRAINED
from prompts import PROMPTS
from quality import figure4, figure5
from report import figures, results, tables

# -------------------------------------------------------------------------------------------------
# Accuracies


def accuracy(z, labels, head):
    """Top-1, per cent, of features (N, d) under a head: weight (C, d), bias (C,) or None, or what
    makes logits (N, C) of them.
    """
    logits = head(z) if callable(head) else F.linear(z, *head)
    return 100 * logits.argmax(1).eq(labels).float().mean().item()


def accuracies(dataset, source, seed, features_of, head_of):
    """Rows of accuracy: the source's val and test part, every target's test part, and their means.

    features_of(dataset, domain, items) gives (N, d) features of [(Location, label)],
    head_of(domain) the head, or None where there is none. A domain that is not on this disk, or has
    no head, has no value.
    CHOICE: means are over the domains that are here; of a method that has no head for one of these
    there is none, for it would be over other domains than its rivals'; alternative: no mean unless
    all are here.
    """
    rows, value_of, comparable = [], {}, True
    domains = [(d, "test") for d in dataset.meta.phrases if d != source]
    for domain, part in [(source, "val"), (source, "test"), *domains]:
        here = domain not in dataset.absent
        items = dataset.split(source, domain, part, seed) if here else []
        if not items and here and part == "test":
            fail(f"no image of {dataset.folder / domain} is left to test on; add some.")
        if not items and part == "val":  # a small data set may leave no image for validation
            continue
        head = head_of(domain) if here else None
        if head is None:
            comparable = comparable and not here
            rows.append({"domain": domain, "split": part, "value": None, "n": 0})
            continue
        labels = torch.tensor([label for _, label in items])
        value = accuracy(features_of(dataset, domain, items), labels, head)
        value_of[domain, part] = value
        rows.append({"domain": domain, "split": part, "value": value, "n": len(items)})
    targets = [value for (domain, _), value in value_of.items() if domain != source]
    n = sum(row["n"] for row in rows if row["domain"] != source)
    ood = statistics.mean(targets) if targets and comparable else None
    extended = None if ood is None else (value_of[source, "test"] + ood) / 2
    return rows + [
        {"domain": "OOD mean", "value": ood, "n": n},
        {"domain": "extended", "value": extended, "n": n},
    ]


def unseen_accuracies(dataset, features_of, head_of):
    """Rows of accuracy on a data set of kept-apart classes: in each domain, and their mean."""
    rows = [{"domain": f"unseen {domain}", "value": None, "n": 0} for domain in dataset.absent]
    for domain, items in dataset.images.items():
        labels = torch.tensor([label for _, label in items])
        value = accuracy(features_of(dataset, domain, items), labels, head_of(domain))
        rows.append({"domain": f"unseen {domain}", "value": value, "n": len(items)})
    measured = [row["value"] for row in rows if row["value"] is not None]
    mean = statistics.mean(measured) if measured else None
    return [*rows, {"domain": "unseen mean", "value": mean, "n": sum(row["n"] for row in rows)}]


def heads(clip, dataset, source, trained=None):
    """head_of(domain), by `trained`: of a head (weight, bias), its rows of the classes there; of a
    prompt's `classifier`, what it makes of their names; of None, the text tower's zero-shot head at
    the time of the call.

    CHOICE: unseen classes, too, are named in the source's words, whatever the domain, since a model
    in use does not know what domain it meets; alternative: in each domain's own.
    """

    @functools.cache
    def head_of(domain):
        classnames, templates = data.prompt_templates(dataset, source, domain)
        if trained is None:
            return zero_shot_head(clip, classnames, templates), None
        if callable(trained):
            return trained(classnames)
        return restricted(trained, dataset.classnames, classnames) if domain else trained

    return lambda domain: head_of(domain if domain in dataset.heads else None)


def restricted(head, classnames, own_names):
    """The part of a head of `classnames` that classifies among `own_names`; None where one is not
    there.

    ImageNet-A and -R have 200 of ImageNet's 1000 classes: so one chooses among these alone. Two
    classes of one name (ImageNet has two "missile") are told apart by the order, the same in both
    lists.
    """
    rows = []
    for name in own_names:
        alike = [i for i, other in enumerate(classnames) if other == name]
        if not alike:
            return None
        rows.append(next((i for i in alike if not rows or i > rows[-1]), alike[0]))
    weight, bias = head
    return weight[rows], None if bias is None else bias[rows]


def interpolate(original, tuned, alpha):
    """θ = (1 − α) θ_original + α θ_tuned, entry by entry. Source: WiSE-FT (2109.01903)."""
    def mixed(k, v):
        return (1 - alpha) * original[k] + alpha * v if v.is_floating_point() else v

    return {k: mixed(k, v) for k, v in tuned.items() if k in original}


def original_features(clip, run):
    """features_of(dataset, domain, items) -> (N, d), of `clip` as it is; each domain read once."""
    caches = {}

    def features_of(dataset, domain, items):
        if (dataset.name, domain) not in caches:
            caches[dataset.name, domain] = cached_features(clip, dataset, domain, run)
        return caches[dataset.name, domain](items)

    return features_of


def measure_checkpoints(config, dataset, clip, cached):
    """Append accuracies of zero-shot CLIP and of every checkpoint, at every α.

    cached: of `original_features`.
    """
    unseen = data.load_unseen(dataset)
    if unseen and config.source not in unseen.meta.phrases and not dataset.meta.zero_shot:
        fail(f"{unseen.name}, the unseen classes of {dataset.name}, has no domain {config.source}.")
    for domain, how_to in {**dataset.absent, **(unseen.absent if unseen else {})}.items():
        print(f"not run: {domain} ({how_to})")
    sets = [one for one in (dataset, unseen) if one]
    tested = short_hash([stamps(items) for one in sets for items in one.images.values()], [
        [template(name) for template in templates for name in names]
        for one in sets for domain in one.images
        for names, templates in [data.prompt_templates(one, config.source, domain)]
    ], dataset.meta.fractions, dataset.meta.same_stem_same_thing, sorted(
        path for paths in dataset.official.values() for path in paths
    ))
    clip_0 = {k: v.cpu().clone() for k, v in clip.model.state_dict().items()}
    text = zero_shot_head(clip, *data.prompt_templates(dataset, config.source))
    rows = results.latest(config.run).values()
    # every job writes an OOD mean, if only that there is none
    measured = {row["key"] for row in rows if row["domain"] == "OOD mean"}

    def encode(dataset, domain, items):
        return encode_images(clip, items, label=domain)

    def measure(features_of, trained, open_set, seed):  # open_set: any classes can be named
        rows = accuracies(
            dataset, config.source, seed, features_of, heads(clip, dataset, config.source, trained)
        )
        if unseen and open_set:
            said = heads(clip, unseen, config.source, trained if callable(trained) else None)
            rows += unseen_accuracies(unseen, features_of, said)
        return rows

    jobs = [(seed, name) for seed in range(config.seeds) for name in ["zero-shot", *config.methods]]
    for seed, name in tqdm(jobs, desc="evaluating", unit="run", leave=False):
        shared = {"method": name, "seed": seed, "tested": tested[:8]}
        if name == "zero-shot":
            open_set = any(m.train != "linear" for m in config.methods.values())
            keys = [  # what was measured on unseen classes, too, holds without them
                short_hash(clip.fingerprint, tested, seed, config.id, unseen_too)[:12]
                for unseen_too in (open_set, True)
            ]
            if measured.isdisjoint(keys):
                rows = measure(cached, None, open_set, seed)
                results.append(config, [{**row, **shared, "key": keys[0]} for row in rows])
            continue
        path, method = checkpoint_path(config, name, seed), config.methods[name]
        if not path.exists():
            fail(f"{path} is not there. Train it: python finetune.py, with the same arguments.")
        with undamaged(path, "Remove it, and run finetune.py again."):
            state = load_whole(path, "cpu")
            tuned = state["modules"]
            whole = state["optimizer"] is None and state["fingerprint"] == clip.fingerprint
        if not whole:
            fail(f"{path} is unfinished, or of another model. Finish it: python finetune.py.")
        if state["classes"] != dataset.classes:
            fail(f"{path} was trained on other classes than there are now: python finetune.py.")
        features_of = cached if method.train in CACHED else encode
        original = {"head.weight": text, **{f"towers.{k}": v for k, v in clip_0.items()}}
        if "head.bias" in tuned:  # WiSE-FT's head, with the scale inside
            original["head.weight"] = clip.model.logit_scale.exp().cpu() * text
            original["head.bias"] = torch.zeros(len(text))
        shared["trained"] = TRAINED[method.train]
        shared |= {"lambda_cap": config.lambda_cap} if method.captions else {}
        shared |= {"lambda_ret": config.lambda_ret} if method.retrieved else {}
        for alpha in (1.0, *(config.alphas if method.train not in PROMPTS else ())):
            key = short_hash(state["config_hash"], tested, alpha)[:12]
            if key in measured:
                continue
            mix = tuned if alpha == 1 else interpolate(original, tuned, alpha)
            if towers := towers_of(mix):
                clip.model.load_state_dict(towers)
            trained = (mix["head.weight"], mix.get("head.bias")) if "head.weight" in mix else None
            prompted = contextlib.nullcontext()
            if method.train in PROMPTS:
                prompt = PROMPTS[method.train](None, clip, dataset.classnames, tuned["vectors"])
                prompt.load_state_dict(tuned)
                trained, prompted = prompt.classifier, prompt.prompted()
            with prompted:
                rows = measure(features_of, trained, method.train != "linear", seed)
            if alpha not in (0.5, 1):  # points of a curve
                means = (config.source, "OOD mean", "unseen mean")
                rows = [row for row in rows if row["domain"] in means and "val" != row.get("split")]
            results.append(
                config, [{**row, **shared, "alpha": alpha, "key": key} for row in rows]
            )
            clip.model.load_state_dict(clip_0)


def main():
    config, dataset = parse(__doc__)
    only_one_process("evaluate.py", "takes one process: run it without torchrun")
    clip = load_clip(config)
    cached = original_features(clip, config.run)
    measure_checkpoints(config, dataset, clip, cached)
    figure4(config, dataset, clip, cached)
    figure5(config, dataset, clip, cached)
    rows = results.read(config.run)
    figures.draw_curve(rows, config.run / "curve.png")
    markdown = tables.table(rows)
    write_atomically(config.run / "table.md", lambda part: part.write_text(markdown), warn)
    print(markdown)


if __name__ == "__main__":
    main()
