"""What goes into a training step, in an order that a resumed run repeats."""

import functools
import math
from dataclasses import dataclass

import torch

import data
from distributed import ranks
from features import image_batches


@dataclass
class Batch:
    """B training images and what goes with them; None: the method at hand does not use it."""

    labels: torch.Tensor                    # (B,)
    z: torch.Tensor | None = None           # (K + 1, B, d), where the image tower is frozen
    images: torch.Tensor | None = None      # (B, 3, H, W)
    prompts: torch.Tensor | None = None     # (B, L) tokens of each image's class
    captions: torch.Tensor | None = None    # (B, L) tokens of each image's caption
    retrieved: tuple | None = None          # images (B, 3, H, W) and tokens (B, L) of their texts


def batches_of(clip, dataset, config, method, seed, items, z_all, captions, retrieved):
    """epoch -> iterator of Batch.

    Order, augmentation and prompts hang on (seed, epoch) alone: a resumed run is the uninterrupted
    one (on a CPU to the bit). z_all: z, ẑ^1 … ẑ^K of `items`, (K + 1, N, d), where the image tower
    is frozen, else None.
    """
    labels = torch.tensor([label for _, label in items])
    classnames, templates = data.prompt_templates(dataset, config.source)
    tokens = torch.stack([clip.tokenizer([t(name) for name in classnames]) for t in templates])
    batch_size = config.schedules[method.train].batch_size
    steps = math.ceil(len(items) / batch_size)

    def views(pairs, order):  # augmented images, and which of `pairs` they are
        numbered = [(location, i) for i, (location, _) in enumerate(pairs)]
        return image_batches(numbered, clip.augment, order, clip.device)

    def batches(epoch):
        # each process augments by itself
        torch.manual_seed(1000 * seed + epoch + 10**6 * ranks()[0])
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(items), generator=generator).split(batch_size)
        template = torch.randint(len(tokens), (len(items),), generator=generator)
        mine = shares([rows.tolist() for rows in order])
        if z_all is not None:
            yield from (Batch(labels[rows].to(clip.device), z_all[:, rows]) for rows in mine)
            return
        if method.retrieved:
            numbers = range(epoch * steps, (epoch + 1) * steps)
            # CHOICE: each step has as many retrieved pairs as images; alternative: a pass an epoch
            pool_order = shares([endless(len(retrieved), batch_size, seed, n) for n in numbers])
            pool_views = views(retrieved, pool_order)
        for images, rows in views(items, mine):
            batch = Batch(labels[rows].to(clip.device), images=images)
            if method.contrastive:
                batch.prompts = tokens[template[rows], labels[rows]]
            if method.captions:
                batch.captions = clip.tokenizer([captions[row] for row in rows.tolist()])
            if method.retrieved:
                pool_images, pool_rows = next(pool_views)
                texts = clip.tokenizer([retrieved[row][1] for row in pool_rows.tolist()])
                batch.retrieved = pool_images, texts
            yield batch

    return batches


def endless(n, batch_size, seed, step):
    """Batch `step` of an endless run through the indices below n, pass after shuffled pass."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [shuffled(n, seed, position // n)[position % n] for position in positions]


@functools.lru_cache(maxsize=4)
def shuffled(n, seed, number):
    """A permutation of n that hangs on (seed, number) alone."""
    generator = torch.Generator().manual_seed(10**6 * seed + number)
    return torch.randperm(n, generator=generator).tolist()


def shares(batches):
    """This process's part of each batch; up to (processes - 1) images of it are left out."""
    rank, world = ranks()
    whole = [batch[:len(batch) // world * world] for batch in batches]
    return [batch[rank::world] for batch in whole if batch]
