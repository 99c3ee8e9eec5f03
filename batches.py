"""Images in batches; and what goes into a training step, in an order that a resumed run repeats."""

import functools
import hashlib
import json
import math
import os
from dataclasses import dataclass
from utils import fail, short_hash, undamaged

import torch

import data
from config import refuse_other
from data import UNREADABLE
from distributed import share


class Images(torch.utils.data.Dataset):
    """(image tensor or None where it cannot be read, index) of items [(Location, label)].

    What `transform` draws depends on `draw` and the index, not on order, worker or process.
    """

    def __init__(self, items, transform, draw=()):
        self.items, self.transform, self.draw = items, transform, draw

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.default_generator.manual_seed(int(short_hash(self.draw, i)[:8], 16))
                return self.transform(self.items[i][0].open()), i
        except UNREADABLE:
            return None, i  # a worker process cannot stop the program with a clear line


def collate(batch):
    """(images (B, C, H, W) or None, their indices, indices of unreadable images)."""
    good = [(image, i) for image, i in batch if image is not None]
    images, rows = torch.utils.data.default_collate(good) if good else (None, None)
    return images, rows, [i for image, i in batch if image is None]


def image_batches(items, transform, batches, device, unreadable=None, draw=()):
    """Yield images (B, 3, H, W) on `device` and labels (B,) for `batches` of indices into `items`.

    draw: what, beside its index, an image's augmentation depends on, as seed and epoch. At an
    unreadable image it exits with status 2, naming it; or, given a list, adds its label.
    """
    gpu = device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        Images(items, transform, draw), batch_sampler=batches, collate_fn=collate, pin_memory=gpu,
        num_workers=min(8, os.cpu_count()) if gpu else 0,
    )
    for images, rows, bad in loader:
        if bad and unreadable is None:
            fail(f"{items[bad[0]][0]}: not a readable image. Replace or remove it.")
        if bad:
            unreadable += [items[i][1] for i in bad]
        if images is not None:
            labels = torch.tensor([items[i][1] for i in rows.tolist()])
            yield images.to(device, non_blocking=True), labels


def in_order(n, batch_size):
    """Batches of the indices 0 … n-1, in their order."""
    return [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]


# -------------------------------------------------------------------------------------------------
# Training


@dataclass
class Batch:
    """B training images and what goes with them; None: the method at hand does not use it.

    Of all but the labels a process of several has its `share` alone, b = ⌈B / world⌉ rows.
    """

    labels: torch.Tensor                    # (B,)
    z: torch.Tensor | None = None           # (K + 1, b, d), where the image tower is frozen
    images: torch.Tensor | None = None      # (b, 3, H, W)
    prompts: torch.Tensor | None = None     # (b, L) tokens of each image's class
    captions: torch.Tensor | None = None    # (b, L) tokens of each image's caption
    retrieved: tuple | None = None          # images (r, 3, H, W), tokens (r, L) of their texts, and
                                            # R, the pairs of all processes


def read_retrieved(run):
    """What retrieved.jsonl was made with, and its pairs, [(Location, text, {query: score}, SHA-256
    of the image)].
    """
    path = run / "retrieved.jsonl"
    if not path.exists():
        fail(f"{path} is not there. Retrieve pairs: python anchors.py retrieve DATASET SOURCE")
    return parse_retrieved(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def parse_retrieved(path, mtime):
    """What `read_retrieved` returns, once for all methods and seeds while the file is the same."""
    with undamaged(path, "Remove it, and retrieve again."):
        header, *rows = map(json.loads, path.read_text().splitlines())
        if len(rows) != header["retrieved"]:
            raise ValueError(f"{len(rows)} of {header['retrieved']} pairs")
        places = [data.Location("", row["path"], row["offset"], row["size"]) for row in rows]
        pairs = [(at, x["text"], x["queries"], x["sha256"]) for at, x in zip(places, rows)]
        return header.get("made_with", {}), pairs


def load_retrieved(config, dataset, items):
    """[(Location, text)] of the pairs that one of the training images `items` found, or a class.

    All the source's images are queries; a seed trains on what its own training images found.
    """
    mine = {location.path for location, _ in items} | {*dataset.classes}
    path, (made_with, pairs) = config.run / "retrieved.jsonl", read_retrieved(config.run)
    refuse_other(path, config, made_with)
    found = [pair for pair in pairs if mine & {*pair[2]}]
    if not found:
        fail(f"{path} has no pair for these images. Retrieve with a larger --k.")
    for image, _, _, sha in {pair[0].file: pair for pair in found}.values():  # one of each shard
        try:
            content = image.read()
        except OSError as error:
            fail(f"{image.file}, a shard of the pool: {error.strerror}. Put it back.")
        if hashlib.sha256(content).hexdigest() != sha:
            fail(f"{image.file} is not what {path} was made from. Put it back, or retrieve again.")
    return [(image, text) for image, text, *_ in found]


def batches_of(clip, dataset, config, method, seed, items, z_all, captions, retrieved):
    """epoch -> iterator of Batch.

    Order, augmentation and prompts depend on (seed, epoch) alone: a resumed run is the
    uninterrupted one (on a CPU to the bit), and several processes draw what one draws. z_all: z,
    ẑ^1 … ẑ^K of `items`, (K + 1, N, d), where the image tower is frozen, else None.
    """
    labels = torch.tensor([label for _, label in items])
    classnames, templates = data.prompt_templates(dataset, config.source)
    tokens = torch.stack([clip.tokenizer([t(name) for name in classnames]) for t in templates])
    batch_size = config.schedules[method.train].batch_size
    steps = math.ceil(len(items) / batch_size)

    def views(pairs, order, *draw):  # this process's images, augmented, and which of `pairs`
        numbered = [(location, i) for i, (location, _) in enumerate(pairs)]
        mine = [[rows[i] for i in share(len(rows))] for rows in order]
        return image_batches(numbered, clip.augment, mine, clip.device, draw=draw)

    def batches(epoch):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(items), generator=generator).split(batch_size)
        template = torch.randint(len(tokens), (len(items),), generator=generator)
        whole = [labels[rows].to(clip.device) for rows in order]                       # (B,) each
        if z_all is not None:
            for y, rows in zip(whole, order):
                yield Batch(y, z_all.index_select(1, rows[share(len(rows))].to(z_all.device)))
            return
        if method.retrieved:
            numbers = range(epoch * steps, (epoch + 1) * steps)
            # CHOICE: each step has as many retrieved pairs as images; alternative: a pass an epoch
            drawn = [endless(len(retrieved), batch_size, seed, n) for n in numbers]
            pairs = [retrieved[i] for rows in drawn for i in rows]
            pool_views = views(pairs, in_order(len(pairs), batch_size), "pairs", seed, epoch)
        order = [rows.tolist() for rows in order]
        for y, (images, rows) in zip(whole, views(items, order, "images", seed, epoch)):
            batch = Batch(y, images=images)
            if method.contrastive:
                batch.prompts = tokens[template[rows], labels[rows]]
            if method.captions:
                batch.captions = clip.tokenizer([captions[row] for row in rows.tolist()])
            if method.retrieved:
                pool_images, pool_rows = next(pool_views)
                texts = clip.tokenizer([pairs[row][1] for row in pool_rows.tolist()])
                batch.retrieved = pool_images, texts, batch_size
            yield batch

    return batches


def endless(n, batch_size, seed, step):
    """Batch `step` of an endless run through the indices below n, pass after shuffled pass."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [shuffled(n, seed, position // n)[position % n] for position in positions]


@functools.lru_cache(maxsize=4)
def shuffled(n, seed, number):
    """A permutation of n that depends on (seed, number) alone."""
    generator = torch.Generator().manual_seed(10**6 * seed + number)
    return torch.randperm(n, generator=generator).tolist()
