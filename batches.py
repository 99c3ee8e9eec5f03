"""Batches: one loader for all images, and what a training step gets, in a reproducible order."""

import functools
import math
import os
from dataclasses import dataclass

import torch

import data
from core.artifacts import digest
from core.distributed import rows_of_rank
from core.utils import fail


class Images(torch.utils.data.Dataset):
    """Items [(Location, label)] as (image tensor, index), or (None, index, reason) if unreadable.

    The random draws of `transform` depend on `draw` and the index, not on order, worker or rank.
    """

    def __init__(self, items, transform, draw=()):
        self.items, self.transform, self.draw = items, transform, draw

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(int(digest(self.draw, i)[:8], 16))
            try:
                return self.transform(self.items[i][0].open()), i, None
            except data.UnreadableImage as error:
                return None, i, str(error)  # a worker process cannot end the program


def collate(batch):
    """Return (images (B, C, H, W) or None, their indices, {index: reason} of unreadable ones)."""
    readable = [(image, i) for image, i, _ in batch if image is not None]
    images, rows = torch.utils.data.default_collate(readable) if readable else (None, None)
    return images, rows, {i: reason for image, i, reason in batch if image is None}


def image_batches(items, transform, batches, device, unreadable=None, draw=()):
    """Yield images (B, 3, H, W) on `device` and labels (B,) for `batches` of indices into `items`.

    draw: what an image's augmentation depends on besides its index, e.g. seed and epoch. For an
    unreadable image exit with status 2 and name it, or, given a dict, add {label: reason} to it.
    """
    gpu = device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        Images(items, transform, draw), batch_sampler=batches, collate_fn=collate, pin_memory=gpu,
        num_workers=min(8, os.cpu_count()) if gpu else 0,
    )
    for images, rows, bad in loader:
        for i, reason in bad.items():
            location, label = items[i]
            if unreadable is None:
                fail(f"{location}: not a readable image ({reason}). Replace or remove it.")
            unreadable[label] = reason
        if images is not None:
            labels = torch.tensor([items[i][1] for i in rows.tolist()])
            yield images.to(device, non_blocking=True), labels


def in_order(n, batch_size):
    """Return batches of the indices 0 … n-1, in order."""
    return [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]


# -------------------------------------------------------------------------------------------------
# Training


@dataclass
class Batch:
    """B training images and what belongs to them; None: the method does not use it.

    Labels are of the whole batch. Of the rest, a rank has its own rows only: b = ⌈B / world⌉.
    """

    labels: torch.Tensor                      # (B,)
    z: torch.Tensor | None = None             # (K + 1, b, d): z, ẑ^1 … ẑ^K of a frozen tower
    images: torch.Tensor | None = None        # (b, 3, H, W)
    prompts: torch.Tensor | None = None       # (b, L) tokens of a prompt of each image's class
    captions: torch.Tensor | None = None      # (b, L) tokens of each image's caption
    pool_images: torch.Tensor | None = None   # (b, 3, H, W) of retrieved pairs
    pool_texts: torch.Tensor | None = None    # (b, L) tokens of the pairs' texts
    n_pairs: int = 0                          # retrieved pairs of all ranks together


def training_batches(clip, dataset, source, items, schedule, seed, method, z=None, captions=(),
                     pairs=()):
    """Return a function epoch -> iterator of Batch, for `items` [(Location, label)] of the source.

    Order, augmentation and prompts depend on (seed, epoch) alone. So a resumed run equals an
    uninterrupted one (on a CPU to the bit), and several ranks draw what one process draws.
    z: (K + 1, N, d) features z, ẑ^1 … ẑ^K if the image tower is frozen, else None.
    captions: a list of texts of each item. pairs: [(Location, text)] retrieved from the pool.
    CHOICE: of several captions of an image, one is drawn in each epoch; alternative: all of them,
    as positives of one image.
    """
    captions = [[texts] if isinstance(texts, str) else texts for texts in captions]
    labels = torch.tensor([label for _, label in items])
    classnames, templates = data.prompt_templates(dataset, source)
    tokens = torch.stack([clip.tokenizer([t(name) for name in classnames]) for t in templates])
    steps = math.ceil(len(items) / schedule.batch_size)

    def epoch_order(epoch):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(items), generator=generator).split(schedule.batch_size)
        template = torch.randint(len(tokens), (len(items),), generator=generator)  # of each image
        return order, template

    def draw_captions(epoch):
        """Return a text of each item, drawn by a generator of its own."""
        generator = torch.Generator().manual_seed(int(digest("captions", seed, epoch)[:8], 16))
        draws = torch.rand(len(captions), generator=generator).tolist()
        return [texts[int(draw * len(texts))] for draw, texts in zip(draws, captions)]

    def feature_batches(epoch):
        order, _ = epoch_order(epoch)
        for rows in order:
            own = rows[rows_of_rank(len(rows))].to(z.device)
            yield Batch(labels[rows].to(clip.device), z.index_select(1, own))

    def augmented(locations, order, *draw):
        """Yield this rank's images of each batch, and their rows."""
        numbered = [(location, row) for row, location in enumerate(locations)]
        own = [[rows[i] for i in rows_of_rank(len(rows))] for rows in order]
        return image_batches(numbered, clip.augment, own, clip.device, draw=draw)

    def pair_batches(epoch):
        """Yield a batch of retrieved pairs for each step of the epoch.

        CHOICE: each step has as many retrieved pairs as images; alternative: a pass an epoch.
        """
        numbers = range(epoch * steps, (epoch + 1) * steps)
        drawn = [endless(len(pairs), schedule.batch_size, seed, step) for step in numbers]
        chosen = [pairs[i] for rows in drawn for i in rows]
        order = in_order(len(chosen), schedule.batch_size)
        locations = [location for location, _ in chosen]
        for images, rows in augmented(locations, order, "pairs", seed, epoch):
            yield images, clip.tokenizer([chosen[row][1] for row in rows.tolist()])

    def image_and_text_batches(epoch):
        order, template = epoch_order(epoch)
        texts = draw_captions(epoch)
        locations = [location for location, _ in items]
        order = [rows.tolist() for rows in order]
        pool = pair_batches(epoch) if method.needs_pairs else None
        images_of = augmented(locations, order, "images", seed, epoch)
        for whole_batch, (images, rows) in zip(order, images_of):
            batch = Batch(labels[whole_batch].to(clip.device), images=images)
            if method.contrastive:
                batch.prompts = tokens[template[rows], labels[rows]]
            if method.captions:
                batch.captions = clip.tokenizer([texts[row] for row in rows.tolist()])
            if method.needs_pairs:
                batch.pool_images, batch.pool_texts = next(pool)
                batch.n_pairs = schedule.batch_size
            yield batch

    return image_and_text_batches if z is None else feature_batches


def endless(n, batch_size, seed, step):
    """Return batch `step` of an endless sequence of shuffled passes through the indices below n."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [shuffled(n, seed, position // n)[position % n] for position in positions]


@functools.lru_cache(maxsize=4)
def shuffled(n, seed, number):
    """Return a permutation of n, as a list, that depends on (seed, number) alone."""
    generator = torch.Generator().manual_seed(10**6 * seed + number)
    return torch.randperm(n, generator=generator).tolist()
