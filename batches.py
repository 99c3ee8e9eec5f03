"""Batches: one loader for all images, and what a training step gets, in a reproducible order."""

import functools
import itertools
import os
import shutil
from dataclasses import dataclass

import torch

import data
from core.artifacts import digest
from core.distributed import rank_and_world, rows_of_rank, to_device
from core.utils import fail, warn


class Images(torch.utils.data.Dataset):
    """Images by key (Location, draw): a uint8 tensor (3, H, W), or the reason if unreadable (str).

    The random choices of `transform` are a function of `draw`, e.g. ("images", seed, epoch, row),
    and do not depend on order, worker or rank. Without random choices `draw` is None.
    transform: from a uint8 tensor (3, H, W) to another. If None, images are PIL's as they are.
    """

    def __init__(self, transform):
        self.transform = transform

    def __getitem__(self, key):
        location, draw = key
        try:
            if self.transform is None:
                return location.open()
            image = location.decode()
        except data.UnreadableImage as error:
            return str(error)  # a worker process cannot end the program
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(int(digest(draw)[:8], 16))
            return self.transform(image)


def collate(images):
    """Return (images (B, 3, H, W), or a list of PIL's; {position: reason} of unreadable ones)."""
    unreadable = {i: image for i, image in enumerate(images) if isinstance(image, str)}
    images = [image for image in images if not isinstance(image, str)]
    if images and isinstance(images[0], torch.Tensor):
        images = torch.utils.data.default_collate(images)
    return images, unreadable


def image_batches(batches, transform, device, unreadable=None):
    """Yield images (B, 3, H, W), uint8, on `device`, and their Locations.

    batches: an iterable of lists of keys (Location, draw), see `Images`. Workers get the keys
    batch by batch, so that they hold no list of all images. With transform=None yield lists of
    PIL images. For an unreadable image exit with status 2 and name it, or, given a dict, add
    {Location: reason} to it.
    """
    gpu, dataset, batches = device.type == "cuda", Images(transform), iter(batches)
    first = next(batches, None)
    if first is None:
        return
    workers = worker_count(batch_bytes(transform, len(first))) if gpu else 0
    batches, queue = itertools.tee(itertools.chain([first], batches))
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=queue, collate_fn=collate, pin_memory=gpu, num_workers=workers
    )
    for keys, (images, reasons) in zip(batches, loader):
        for i, reason in reasons.items():
            location, _ = keys[i]
            if unreadable is None:
                fail(f"{location}: not a readable image ({reason}). Replace or remove it.")
            unreadable[location] = reason
        if isinstance(images, torch.Tensor):
            images = images.to(device, non_blocking=True)
        if len(images):
            yield images, [location for i, (location, _) in enumerate(keys) if i not in reasons]


def in_order(locations, batch_size):
    """Yield batches of keys of the Locations, in order, without random choices."""
    for i in range(0, len(locations), batch_size):
        yield [(location, None) for location in locations[i:i + batch_size]]


def batch_bytes(transform, n):
    """Return the size of a batch of n images in bytes; 0 for PIL's, which go through pipes."""
    if transform is None:
        return 0
    with torch.random.fork_rng(devices=[]):
        return n * transform(torch.zeros(3, 8, 8, dtype=torch.uint8)).nbytes


def worker_count(n_bytes):
    """Return how many processes load this rank's batches of n_bytes, on a machine with a GPU.

    There is one for each core, but only as many as shared memory has room for: each has two
    batches ready, and one is in use. A batch that found no room would end the program.
    PIL images (n_bytes = 0) take two, which are faster than a captioner; they are of any size.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # those that a container or Slurm grants
    else:
        cores = os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(1, cores // ranks)
    if not n_bytes:
        return min(2, workers)
    try:
        free = shutil.disk_usage("/dev/shm").free / ranks
    except OSError:  # a system that has shared memory elsewhere
        return workers
    fitting = max(0, int((free / n_bytes - 1) / 2))
    if fitting < workers:
        warn_of_shared_memory(workers, fitting)
    return min(workers, fitting)


@functools.cache
def warn_of_shared_memory(workers, fitting):
    """Print a line, once."""
    warn(
        f"/dev/shm has room for {fitting} of {workers} workers that load images, so loading is "
        "slower. In Docker pass: docker run --shm-size=8g."
    )


# -------------------------------------------------------------------------------------------------
# Training


@dataclass
class Batch:
    """B training images and what belongs to them; None: the method does not use it.

    Labels are of the whole batch. Of the rest, a rank has its own rows only: b = ⌈B / world⌉.
    """

    labels: torch.Tensor                      # (B,)
    z: torch.Tensor | None = None             # (K + 1, b, d): z, ẑ^1 … ẑ^K of a frozen tower
    images: torch.Tensor | None = None        # (b, 3, H, W), uint8
    prompts: torch.Tensor | None = None       # (b, L) tokens of a prompt of each image's class
    captions: torch.Tensor | None = None      # (b, L) tokens of each image's caption
    pool_images: torch.Tensor | None = None   # (b, 3, H, W), uint8, of retrieved pairs
    pool_texts: torch.Tensor | None = None    # (b, L) tokens of the pairs' texts
    n_pairs: int = 0                          # retrieved pairs of all ranks together


def training_batches(clip, dataset, source, items, schedule, seed, method, z=None, captions=(),
                     pairs=()):
    """Return a function start_epoch -> iterator of the Batch of each step from there to the end,
    for `items` [(Location, label)] of the source.

    Order, augmentation and prompts depend on (seed, epoch) alone. So a resumed run equals an
    uninterrupted one (on a CPU to the bit), and several ranks draw what one process draws.
    z: (K + 1, N, d) features z, ẑ^1 … ẑ^K if the image tower is frozen, else None.
    captions: a list of texts of each item. pairs: [(Location, text)] retrieved from the pool.
    CHOICE: of several captions of an image, one is drawn in each epoch; alternative: all of them,
    as positives of one image.
    CHOICE: each step has as many retrieved pairs as images; alternative: a pass an epoch.
    """
    captions = [[texts] if isinstance(texts, str) else texts for texts in captions]
    labels = torch.tensor([label for _, label in items])
    classnames, templates = data.prompt_templates(dataset, source)
    tokens = torch.stack([clip.tokenizer([t(name) for name in classnames]) for t in templates])

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

    def feature_batches(start_epoch):
        for epoch in range(start_epoch, schedule.epochs):
            order, _ = epoch_order(epoch)
            for rows in order:
                own = to_device(rows[rows_of_rank(len(rows))], z.device)
                yield Batch(to_device(labels[rows], clip.device), z.index_select(1, own))

    def plan(start_epoch):
        """Yield of each step a Batch without images, and the keys of this rank's images: those of
        the batch, then those of the retrieved pairs.
        """
        for epoch in range(start_epoch, schedule.epochs):
            order, template = epoch_order(epoch)
            texts = draw_captions(epoch)
            for step, rows in enumerate(order):
                own = rows[rows_of_rank(len(rows))]
                batch = Batch(labels[rows])
                keys = [(items[row][0], ("images", seed, epoch, row)) for row in own.tolist()]
                if method.contrastive and method.classes:
                    batch.prompts = tokens[template[own], labels[own]]
                if method.captions:
                    batch.captions = clip.tokenizer([texts[row] for row in own.tolist()])
                if method.needs_pairs:
                    n = batch.n_pairs = schedule.batch_size
                    drawn = endless(len(pairs), n, seed, epoch * len(order) + step)
                    own_pairs = [(i, *pairs[drawn[i]]) for i in rows_of_rank(n)]
                    keys += [(at, ("pairs", seed, epoch, step, i)) for i, at, _ in own_pairs]
                    batch.pool_texts = clip.tokenizer([text for _, _, text in own_pairs])
                yield batch, keys

    def image_and_text_batches(start_epoch):
        steps, steps_of_loader = itertools.tee(plan(start_epoch))  # the loader is ahead
        loader = image_batches((keys for _, keys in steps_of_loader), clip.augment, clip.device)
        for (batch, _), (images, _) in zip(steps, loader):
            n = -(-len(batch.labels) // rank_and_world()[1])
            batch.labels, batch.images = to_device(batch.labels, clip.device), images[:n]
            if method.needs_pairs:
                batch.pool_images = images[n:]
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
