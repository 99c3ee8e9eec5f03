"""For benchmark.py: mappers, search, evaluation, each beside another's; and how costs grow."""

import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from anchors import search
from batches import image_batches, in_order
from data import Location
from evaluate import accuracy
from features import autocast, encode_images
from finetune import ce_step
from lads import lads_loss
from mapper import ldfs_loss, new_mappers, target_losses
from methods import parse_recipe
from report import peers


def medians(calls, rounds, clock):
    """{name: (median seconds, what the first call returned)} of calls that take turns."""
    first, times = {name: call() for name, call in calls.items()}, {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: (statistics.median(times[name]), first[name]) for name in calls}


def against(what, ours, peer, same_equation=True):
    """A row of what `medians` gives for two; the first losses are compared where they can be."""
    (seconds, loss), (theirs, their_loss) = ours, peer
    return {
        "what": what, "ours, ms": 1e3 * seconds, "another's, ms": 1e3 * theirs,
        "another's / ours": theirs / seconds,
        "difference of the loss": abs(loss - their_loss) if same_equation else None,
    }


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def mappers(rounds, n=412, d=384, classes=37, targets=4):
    """Rows: a step of the mappers of all targets, at once as mapper.py takes it, beside LADS's, one
    after another; n, d, classes, targets: emoji's.
    """
    class_text, generator = unit(classes, d), torch.Generator()
    everything = unit(n, d), torch.arange(n) % classes, unit(n, d)  # z, y, t^s
    text_targets = unit(targets, n, d)  # t^k
    weight = 1 / everything[1].bincount()

    def theirs(size):
        nets = [new_mappers(1, d, 0, "cpu")[0].net for _ in text_targets]
        kind = {"lr": 0.005, "weight_decay": 0.05, "eps": 1e-6}
        pairs = [(net, torch.optim.AdamW(net.parameters(), **kind)) for net in nets]
        batch = [x[:size] for x in everything]
        return lambda: sum(
            peers.lads_step(*pair, *batch, t_k[:size], class_text, weight)
            for pair, t_k in zip(pairs, text_targets)
        )

    def ours(kind, size):
        mapper, weights = new_mappers(targets, d, 0, "cpu")
        if kind == "lads":
            optimizer = torch.optim.AdamW(weights.values(), 0.005, weight_decay=0.05, eps=1e-6)
            loss_of, rest = lads_loss, (class_text, weight)
        else:
            optimizer = torch.optim.AdamW(weights.values(), 3e-3, weight_decay=0.05, fused=True)
            loss_of, rest = ldfs_loss, (class_text, parse_recipe(kind), generator)
        batch = [x[:size] for x in everything]

        def step():
            loss = target_losses(mapper, weights, text_targets[:, :size],
                                 lambda m, t_k: loss_of(m, *batch, t_k, *rest)).sum()
            value = loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return value

        return step

    kinds = [("lads", 128), ("lads", 256)]
    kinds += [(kind, 128) for kind in ("ldfs", "ldfs:form=cosine", "ldfs:pair=0", "global")]
    calls = {("LADS's", size): theirs(size) for size in (128, 256)}
    calls |= {(kind, size): ours(kind, size) for kind, size in kinds}
    found = medians(calls, 3 * rounds, time.process_time)
    rows = [
        against(f"a step of {targets} mappers: {name}, batch {size}", found[name, size],
                found["LADS's", size], name == "lads")
        for name, size in kinds
    ]
    ldfs, other = found["ldfs", 128][0], found["LADS's", 256][0]
    whole = (300 * ldfs, 0), (50 * math.ceil(n / 256) * other, 0)
    return [*rows, against(f"{targets} mappers: ldfs, 300 steps / 50 epochs", *whole, False)]


def searching(rounds, queries=800, pool=20_000, d=384, k=10):
    """A row: a pool in four parts, one after another, against one index; of scores the largest."""
    q, z = unit(queries, d), unit(pool, d)
    found = medians({
        "ours": lambda: search(q, z.split(pool // 4), k)[0].max().item(),
        "one index": lambda: peers.search(q, z, k)[0].max().item(),
    }, rounds, time.process_time)
    return [against(f"{queries} queries in {pool:,}, k = {k}", *found.values())]


def files(clip, n, folder):
    """[(Location, label)] of n JPEGs of noise, half as large again as the model takes them."""
    size = int(1.5 * torch.tensor(clip.model.visual.image_size).max())
    for i in range(n):
        noise = Image.effect_noise((size, size), 64).convert("RGB")
        noise.save(Path(folder, f"{i}.jpg"))
    return [(Location(folder, f"{i}.jpg"), 0) for i in range(n)]


def load(clip, items, transform, n):
    """[images (n, 3, H, W)]: all of them, in memory."""
    batches = image_batches(items, transform, in_order(len(items), n), clip.device)
    return [images for images, _ in batches]


def evaluation(clip, head, n, rounds, clock):
    """A row: to evaluate 2n images, less to load their files, against the model alone. On a CPU:
    workers that load for a GPU do so meanwhile.
    """
    def alone():
        with autocast(clip.device):
            return peers.raw_features(clip.model, batches)

    labels, weights = torch.zeros(2 * n), (head.weight.detach().cpu(), None)
    with tempfile.TemporaryDirectory() as folder:
        items = files(clip, 2 * n, folder)
        batches = load(clip, items, clip.preprocess, n)
        found = medians({
            "whole": lambda: accuracy(encode_images(clip, items, n), labels, weights),
            "loading": lambda: load(clip, items, clip.preprocess, n),
            "alone": alone,
        }, rounds, clock)
    whole, files_alone, model_alone = (seconds for seconds, _ in found.values())
    ours, raw = (whole - files_alone, 0), (model_alone, 0)
    row = against(f"{2 * n} images, loaded / model alone", ours, raw, False)
    return [{**row, "share of loading": files_alone / whole}]


def loading(clip, steps, n, rounds, clock):
    """Rows: the share of step time that loading takes, of `steps`, rows of benchmark.training."""
    with tempfile.TemporaryDirectory() as folder:
        items = files(clip, n, folder)
        call = {"": lambda: load(clip, items, clip.augment, n)}
        seconds = medians(call, rounds, clock)[""][0]
    rows = []
    for row in steps:
        step, images = row["ours, ms"], n * (2 if row["what"].startswith("arf") else 1)
        ms = 1e3 * seconds * images / n
        share = ms / (ms + step)
        rows.append({"what": row["what"].split(" / ")[0], "images": images, "loading, ms": ms,
                     "step, ms": step, "share of loading": share})
    return rows


FIRST = {"images": 2000, "classes": 250, "targets": 2, "pool": 10_000}


def growth(rounds, first=FIRST):
    """Rows: ms at sizes from `first` to 8 times as much, and the slope of log time on log size.

    images, classes, targets: an epoch of a linear probe (512 images, 37 classes, no target, unless
    that is what grows); pool: 256 queries searched in so many pairs.
    """
    d = 256

    def probe(n, classes=37, targets=0):
        z, labels = unit(targets + 1, n, d), torch.arange(n) % classes
        head = torch.nn.Linear(d, classes)
        optimizer = torch.optim.AdamW(head.parameters(), fused=True)

        def epoch():
            for i in torch.randperm(n).split(256):
                loss = ce_step(z[:, i], labels[i], head)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return epoch

    def pool(n):
        q, z = unit(256, d), unit(n, d)
        return lambda: search(q, z.split(10_000), 10)

    kinds = {
        "images": probe, "classes": lambda n: probe(512, classes=n),
        "targets": lambda n: probe(512, targets=n), "pool": pool,
    }
    rows = []
    for what, new in kinds.items():
        sizes = [first[what] * factor for factor in (1, 2, 4, 8)]
        found = medians({n: new(n) for n in sizes}, rounds, time.process_time)
        seconds = [found[n][0] for n in sizes]
        slope = statistics.linear_regression(*(list(map(math.log, x)) for x in (sizes, seconds)))[0]
        points = [f"{n}: {1e3 * t:.3g}" for n, t in zip(sizes, seconds)]
        cells = {f"point {i}": point for i, point in enumerate(points)}
        rows.append({"what": what, **cells, "exponent": slope})
    return rows
