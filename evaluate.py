"""Evaluate: accuracy on the source, unseen domains and unseen classes, and the papers' figures.

    python evaluate.py emoji 3d --paper arf --alphas 0.5      # every method, trained where needed
    python -m report.tables runs/pacs-photo                   # tables of all that a folder contains

Scores are stored in runs/…/scores/; what is stored is not measured again.

ID is accuracy on held-out images of the source, OOD on each unseen domain; OOD mean is their mean
over domains, and extended the mean of ID and OOD mean (LADS's measure). Unseen is accuracy among
classes that finetuning never saw, in a domain: zero-shot ability; unseen mean is its mean over
domains. With --base-to-new these are the second half of the data set's classes, and H is the
harmonic mean of both accuracies in a domain. Accuracy is top-1, over images, in per cent. ECE, the
expected calibration error, is of the same predictions, in per cent. A data set without classes is
measured by retrieval among its held-out pairs of image and caption.
"""

import contextlib
import functools
import statistics
from dataclasses import asdict

import torch
import torch.nn.functional as F

import anchors
import data
from core.artifacts import artifact_path, digest, load, save, stamps, write_atomically
from core.config import parse
from core.distributed import progress_bar, require_one_process
from core.methods import FROZEN_TOWERS, TRAINED, recipes_of
from core.results import record
from core.utils import one_line, warn
from features import (
    cached_features,
    encode_images_by_each,
    encode_texts,
    load_clip,
    towers_of,
    zero_shot_head,
)
from finetune import checkpoint_path, finetune, finetune_all, history_path
from mapper import describe_run, mapper_artifacts, mapper_records
from report import figures, quality, tables
from sets.load import load_run
from strategies.clipstyler import style_pictures, style_records
from strategies.prompts import PROMPTS

# -------------------------------------------------------------------------------------------------
# Accuracy and calibration


def accuracy(logits, labels):
    """Return top-1 accuracy, in per cent, of logits (N, C) and labels (N,)."""
    return 100 * logits.argmax(1).eq(labels).float().mean().item()


def ece(logits, labels, bins=15):
    """Return the expected calibration error, in per cent, of logits (N, C) and labels (N,).

    It is Σ_b |B_b| / N · |accuracy(B_b) − confidence(B_b)|, where B_b are the images whose
    confidence, the softmax of the predicted class, is in ((b − 1) / 15, b / 15].
    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3.
    """
    confidence, predicted = logits.double().softmax(1).max(1)                                # (N,)
    excess = predicted.eq(labels).double() - confidence
    rows = (bins * confidence).ceil().long() - 1
    sums = torch.zeros(bins, dtype=excess.dtype).index_add(0, rows, excess)   # |B_b| (acc − conf)
    return 100 * sums.abs().sum().item() / len(labels)


def measure_items(dataset, domain, items, features_of, head):
    """Return (accuracy, ECE, number of images), (None, None, 0) without images or a head.

    head: (weight (C, d), bias (C,) or None), or a function from features to logits (N, C). Logits
    are those of training, with their temperature.
    """
    if head is None or not items:
        return None, None, 0
    labels = torch.tensor([label for _, label in items])
    z = features_of(dataset, domain, items)
    logits = head(z) if callable(head) else F.linear(z, *head)
    return accuracy(logits, labels), ece(logits, labels), len(items)


def domain_accuracies(dataset, source, seed, features_of, head_of):
    """Return {"values": {domain: accuracy}, "ece": {domain: ECE}, "n": {domain: images},
    "validation": accuracy or None}.

    Domains are the source's test part and every target, and the means "OOD mean" and "extended".
    features_of(dataset, domain, items) gives features (N, d), head_of(domain) the head, or None if
    the method cannot score the domain's classes. The value of a domain that is not on this disk, or
    has no head, is None.
    CHOICE: means are over the domains that are on this disk. The mean is None if the method cannot
    score one of these, because its rivals' mean would be over other domains; alternative: no mean
    unless all domains are there.
    """
    values, errors, n, comparable = {}, {}, {}, True

    def measure_part(domain, part):
        items = dataset.split(source, domain, part, seed)
        return measure_items(dataset, domain, items, features_of, head_of(domain))

    validation = measure_part(source, "val")[0]  # None if a small data set leaves no image for it
    targets = [domain for domain in dataset.meta.phrases if domain != source]
    for domain in [source, *targets]:
        available = domain not in dataset.absent
        measured = measure_part(domain, "test") if available else (None, None, 0)
        values[domain], errors[domain], n[domain] = measured
        if available and values[domain] is None:
            comparable = False
    for scores in (values, errors):
        scores["OOD mean"] = mean_of(scores[domain] for domain in targets) if comparable else None
    ood = values["OOD mean"]
    values["extended"] = None if ood is None else (values[source] + ood) / 2
    n["OOD mean"] = n["extended"] = sum(n[domain] for domain in targets)
    return {"values": values, "ece": errors, "n": n, "validation": validation}


def mean_of(scores):
    """Return the mean of the scores that are not None; None if there is none."""
    measured = [score for score in scores if score is not None]
    return statistics.mean(measured) if measured else None


def unseen_accuracies(dataset, images, features_of, head_of):
    """Return {"values": {name: accuracy}, "ece": {name: ECE}, "n": {name: images}} on a data set of
    unseen classes.

    images: {domain: items of the data set}, which are tested. Names are "unseen DOMAIN" and "unseen
    mean", the mean over the domains that are on this disk.
    """
    measured = dict.fromkeys(dataset.absent, (None, None, 0))
    for domain, items in images.items():
        measured[domain] = measure_items(dataset, domain, items, features_of, head_of(domain))
    values, errors, n = ([*column] for column in zip(*measured.values()))
    names = [f"unseen {name}" for name in (*measured, "mean")]
    return {
        "values": dict(zip(names, [*values, mean_of(values)])),
        "ece": dict(zip(names, [*errors, mean_of(errors)])),
        "n": dict(zip(names, [*n, sum(n)])),
    }


def retrieval_recalls(z, t):
    """Return {"image→text R@k": per cent of images whose own text is among the k nearest of all N
    texts, "text→image R@k": the same for texts}, for k = 1, 5, 10.

    z, t: (N, d), unit norm, of N pairs.
    CHOICE: of several captions of an image the first; alternative: all five of COCO's, any of which
    is right.
    """
    values = {}
    for direction, queries, others in (("image→text", z, t), ("text→image", t, z)):
        own = (queries * others).sum(1, keepdim=True)                                    # (N, 1)
        parts = zip(queries.split(1000), own.split(1000))  # N² cosines may not fit into memory
        # own cosines are summed in another order: what is equal but for rounding is not nearer
        nearer = torch.cat([(q @ others.T > c + 1e-6).sum(1) for q, c in parts])          # (N,)
        for k in (1, 5, 10):
            values[f"{direction} R@{k}"] = 100 * (nearer < k).float().mean().item()
    return values


def harmonic_means(values):
    """Return {"H DOMAIN": harmonic mean of the accuracies on base and new classes, "H mean": its
    mean over domains}; None where one of them was not measured.

    values: of `domain_accuracies` and `unseen_accuracies` together.
    """
    pairs = {d: (values[d], values[f"unseen {d}"]) for d in values if f"unseen {d}" in values}
    mean = statistics.harmonic_mean
    means = {d: None if None in pair else mean(pair) for d, pair in pairs.items()}
    means["mean"] = mean_of(means.values())
    return {f"H {domain}": value for domain, value in means.items()}


def head_function(clip, dataset, source, trained=None):
    """Return head_of(domain), depending on `trained`. Its logits have the temperature of training.

    Of a head (weight, bias) it gives the rows of the classes in that domain; of a prompt learner's
    `classifier` its head of their names; of None the zero-shot head of `clip`.
    CHOICE: unseen classes, too, are named in the source's words, whatever the domain, because a
    model in use does not know which domain it meets; alternative: in each domain's own.
    """

    @functools.cache
    def head_of(domain):
        classnames, templates = data.prompt_templates(dataset, source, domain)
        if trained is None:
            return clip.logit_scale * zero_shot_head(clip, classnames, templates), None
        if callable(trained):
            return trained(classnames)
        return restrict_head(trained, dataset.classnames, classnames) if domain else trained

    return lambda domain: head_of(domain if domain in dataset.heads else None)


def restrict_head(head, classnames, own_names):
    """Return the rows of a head of `classnames` that classify among `own_names`; None if one of
    these has no row.

    ImageNet-A and -R have 200 of ImageNet's 1000 classes, and are classified among these alone. Two
    classes of one name (ImageNet has two "missile") are told apart by the order, which is the same
    in both lists.
    """
    rows = []
    for name in own_names:
        candidates = [i for i, other in enumerate(classnames) if other == name]
        if not candidates:
            return None
        later = [i for i in candidates if not rows or i > rows[-1]]
        rows.append((later or candidates)[0])
    weight, bias = head
    return weight[rows], None if bias is None else bias[rows]


def interpolate(original, tuned, alpha):
    """Return θ = (1 − α) θ_original + α θ_tuned, entry by entry. Source: WiSE-FT (2109.01903)."""

    def mix(name, value):
        if not value.is_floating_point():
            return value
        return (1 - alpha) * original[name] + alpha * value

    return {name: mix(name, value) for name, value in tuned.items() if name in original}


# -------------------------------------------------------------------------------------------------
# Scores of a run


def evaluate(settings, dataset, clip):
    """Return records of accuracy: of zero-shot CLIP, and of every method, seed and α.

    Checkpoints that are not stored are trained first.
    """
    unseen = dataset.unseen
    for domain, remedy in {**dataset.absent, **(unseen.absent if unseen else {})}.items():
        print(f"not run: {domain} ({remedy})")
    test_key = test_inputs(settings, dataset)
    records = []
    jobs = [(seed, name) for seed in range(settings.seeds)
            for name in ("zero-shot", *settings.methods)]
    for seed, name in progress_bar(jobs, desc="evaluating", unit="run", leave=False):
        if name == "zero-shot":
            records.append(zero_shot_record(settings, dataset, clip, seed, test_key))
        else:
            records += method_records(settings, dataset, clip, name, seed, test_key)
    return records


def encode_test_images(settings, dataset, clip):
    """Encode all test images by the original weights: an unreadable one is named before the long
    training, and nothing is computed twice, because zero-shot accuracy needs these features anyway.
    """
    unseen = dataset.unseen if names_unseen_classes(settings) else None
    for tested in (dataset, unseen):
        for domain, items in (tested.images.items() if tested else ()):
            cached_features(clip, tested, domain, items, settings.cache)


def test_inputs(settings, dataset):
    """Return all of the test sets that decides a score: images, prompts, how they are split, and
    what is measured on them.
    """
    test_sets = [tested for tested in (dataset, dataset.unseen) if tested]
    prompts = [
        template(name)
        for tested in test_sets for domain in tested.images
        for names, templates in [data.prompt_templates(tested, settings.source, domain)]
        for template in templates for name in names
    ]
    images = [stamps(items) for tested in test_sets for items in tested.images.values()]
    official = sorted(path for paths in dataset.official.values() for path in paths)
    meta = dataset.meta
    if not dataset.classes:
        anchors.caption_source(settings, dataset)
        prompts += data.captions(dataset, dataset.images[settings.source])
    return digest("ECE", images, prompts, meta.fractions, meta.same_stem_same_thing, official)


def names_unseen_classes(settings):
    """Return whether a method of the run can name them: a linear head knows its own classes only.
    """
    return any(method.train != "linear" for method in settings.methods.values())


def zero_shot_record(settings, dataset, clip, seed, test_key):
    """Return the record of the original weights, on unseen classes too if a method names them."""
    open_set = names_unseen_classes(settings)
    inputs = clip.key, test_key, seed, open_set, names_of(settings)
    path = artifact_path(settings.run / "scores", f"zero-shot-seed{seed}", inputs, ".json")
    if not path.exists():
        unseen = dataset.unseen if open_set else None
        features_of = original_features(settings, clip)
        scores = measure(settings, dataset, unseen, clip, seed, features_of, trained=None)
        save(record(settings, "accuracy", "zero-shot", seed, **scores), path)
    return score(path)


def names_of(settings):
    """Return the names in every record, which are part of what decides a stored one."""
    return settings.dataset, settings.source, settings.model


def score(path):
    """Return a stored record. It becomes the newest, so that `report.tables RUN` shows the settings
    that were asked for last.
    """
    content = load(path)
    with contextlib.suppress(OSError):  # a folder that is only read
        path.touch()
    return content


def method_records(settings, dataset, clip, name, seed, test_key):
    """Return the records of a method and a seed: of α = 1, and of --alphas."""
    method, paths, fields = settings.methods[name], {}, {}
    checkpoint = checkpoint_path(settings, dataset, clip, name, seed)
    alphas = () if method.train in PROMPTS else settings.alphas  # prompts are not interpolated
    for alpha in dict.fromkeys((1.0, *alphas)):
        fields[alpha] = {
            "trained": TRAINED[method.train], "alpha": alpha,
            "schedule": asdict(settings.schedules[method.train]),
            "options": settings.options(method),
        }
        inputs = checkpoint.name, test_key, fields[alpha], names_of(settings)
        file_name = f"{name}-seed{seed}-alpha{alpha:g}"
        paths[alpha] = artifact_path(settings.run / "scores", file_name, inputs, ".json")
    if missing := [alpha for alpha in paths if not paths[alpha].exists()]:
        modules = load(finetune(settings, dataset, clip, name, seed), "cpu")["modules"]
        scores_of = measure_alphas(settings, dataset, clip, seed, method, modules, missing)
        for alpha, scores in zip(missing, scores_of):
            save(record(settings, "accuracy", name, seed, **scores, **fields[alpha]), paths[alpha])
    return [score(path) for path in paths.values()]


def measure_alphas(settings, dataset, clip, seed, method, modules, alphas):
    """Return what `measure` returns of a checkpoint's modules at each α. An image is decoded once.
    """
    if method.train in PROMPTS:
        phrase = dataset.meta.phrases[settings.source]
        learner = PROMPTS[method.train](clip, dataset.classnames, phrase)
        learner.load_state_dict(modules)
        tuned, prompted = [(clip, learner.classifier)], learner.prompted()
    else:
        between = min(alphas) < 1
        original = original_modules(settings, dataset, clip, modules) if between else None
        tuned = [at_alpha(clip, original, modules, alpha) for alpha in alphas]
        prompted = contextlib.nullcontext()
    clips, features = [clip for clip, _ in tuned], {}

    def features_by(i):
        def features_of(dataset, domain, items):
            key = dataset.name, domain, tuple(location for location, _ in items)
            if key not in features:
                features[key] = encode_images_by_each(clips, items, label=domain)
            return features[key][i]

        frozen = method.train in FROZEN_TOWERS
        return original_features(settings, clip) if frozen else features_of

    unseen = None if method.train == "linear" else dataset.unseen
    with prompted:
        return [
            measure(settings, dataset, unseen, own, seed, features_by(i), head)
            for i, (own, head) in enumerate(tuned)
        ]


def measure(settings, dataset, unseen, clip, seed, features_of, trained):
    """Return {"values", "ece", "n", "validation"} of the data set, and of unseen classes if any.

    trained: as in `head_function`.
    """
    if dataset.classes:
        head_of = head_function(clip, dataset, settings.source, trained)
        scores = domain_accuracies(dataset, settings.source, seed, features_of, head_of)
    else:
        pairs = dataset.split(settings.source, settings.source, "test", seed)
        z = features_of(dataset, settings.source, pairs)
        values = retrieval_recalls(z, encode_texts(clip, data.captions(dataset, pairs)))
        scores = {"values": values, "n": dict.fromkeys(values, len(pairs)), "ece": {}}
    if unseen:
        open_head = trained if callable(trained) else None
        head_of = head_function(clip, unseen, settings.source, open_head)
        images = unseen.images
        if unseen is dataset.new:  # the images that are comparable with those of the base classes
            images = {d: unseen.split(settings.source, d, "test", seed) for d in images}
        for name, values in unseen_accuracies(unseen, images, features_of, head_of).items():
            scores[name] |= values
        if unseen is dataset.new:
            scores["values"] |= harmonic_means(scores["values"])
    return scores


def original_features(settings, clip):
    """Return features_of(dataset, domain, items) of the original weights, which are cached."""
    return lambda dataset, domain, items: cached_features(
        clip, dataset, domain, items, settings.cache
    )


def at_alpha(clip, original, modules, alpha):
    """Return (Clip with a checkpoint's towers at α, its head as in `head_function`).

    original: of `original_modules`.
    """
    if alpha < 1:
        modules = interpolate(original, modules, alpha)
    if towers := towers_of(modules):
        clip = clip.copy()
        clip.model.load_state_dict(towers)
    if "head.weight" not in modules:
        return clip, None
    scale = 1 if "head.bias" in modules else clip.logit_scale  # see original_modules
    return clip, (scale * modules["head.weight"], modules.get("head.bias"))


def original_modules(settings, dataset, clip, modules):
    """Return what a checkpoint's modules were before finetuning: towers, and the zero-shot head."""
    original = {f"towers.{name}": value for name, value in clip.original.items()}
    if "head.weight" in modules:
        templates = data.prompt_templates(dataset, settings.source)
        original["head.weight"] = zero_shot_head(clip, *templates)                          # (C, d)
    if "head.bias" in modules:  # WiSE-FT's head: the scale is part of its weight
        original["head.weight"] = clip.logit_scale * original["head.weight"]
        original["head.bias"] = torch.zeros(len(original["head.weight"]))
    return original


# -------------------------------------------------------------------------------------------------
# The report of a run


def report(settings, dataset, clip, records):
    """Print tables of accuracy records and of measures, write table.md, and draw the figures."""
    run = settings.run
    synthesis, neighbours = quality.synthesis_records(settings, dataset, clip)
    measures = [
        *mapper_records(settings, dataset, clip), *style_records(settings, dataset, clip),
        *synthesis, *quality.caption_records(settings, dataset, clip),
    ]
    methods = settings.methods.values()
    if any(method.needs_pairs for method in methods):
        measures += anchors.pair_records(settings, dataset, clip)
    save(measures, artifact_path(run / "scores", "measures", (measures,), ".json"))
    print(tables.terminal_table([*records, *measures]))
    markdown = tables.markdown_table([*records, *measures])
    write_atomically(run / "table.md", lambda part: part.write_text(markdown, "utf-8"), warn)

    draw(figures.draw_losses, loss_histories(settings, dataset, clip), run / "losses.png")
    if neighbours:
        draw(figures.draw_figure4, run / "figure4.png", neighbours)
    if pictures := style_pictures(settings, dataset, clip):
        draw(figures.draw_styles, run / "clipstyler.png", pictures)
    if any(method.captions for method in methods) and any(method.retrieved for method in methods):
        columns = quality.figure5_columns(settings, dataset, clip)
        draw(figures.draw_figure5, run / "figure5.png", columns)
    if settings.alphas:
        draw(figures.draw_curve, records, run / "curve.png")


def draw(draw_figure, *arguments):
    """Draw a figure. If that fails, it is a warning: the tables are printed already."""
    try:
        draw_figure(*arguments)
    except Exception as error:  # of matplotlib, of an image, of a font
        kind = type(error).__name__
        warn(f"{draw_figure.__name__}: no figure was drawn ({kind}: {one_line(error)})")


def loss_histories(settings, dataset, clip):
    """Return {label: history of the losses} of seed 0: of every mapper and every method."""
    histories = {}
    for recipe_name, recipe in recipes_of(settings.methods).items():
        if recipe.loss != "clipstyler":
            contents = mapper_artifacts(settings, dataset, clip, recipe_name, 0)
            for domain, content in contents.items():
                histories[f"mapper {recipe_name} → {domain}"] = content["history"]
    for name in settings.methods:
        histories[name] = load(history_path(checkpoint_path(settings, dataset, clip, name, 0)))
    return histories


def main():
    settings, dataset = load_run(parse(__doc__, stage="evaluate"))
    require_one_process("evaluate.py")
    clip = load_clip(settings)
    print(describe_run(settings, dataset, clip.device))
    finetune_all(settings, dataset, clip)
    report(settings, dataset, clip, evaluate(settings, dataset, clip))


if __name__ == "__main__":
    main()
