"""All that test_reference.py knows of the program: how to run it, and where to read its results.

This module is the only one to rewrite when the program's modules, functions or files change. A new
version needs what the docstrings below say, and nothing else. Paths of images are relative to the
data set's folder ("photo/cat/003.png"); an image of the pool is named by the SHA-256 of its file,
in hex digits; tensors are on the CPU.
"""

import contextlib
import functools
import hashlib
import math
import sys
from dataclasses import dataclass, field
from unittest import mock

import open_clip
import torch
from torchvision.transforms import v2

import anchors
import batches
import evaluate
import features
import finetune
import mapper
import run as run_script
import sets.load
from report import figures, quality

get_tokenizer = functools.cache(open_clip.get_tokenizer)
RUNS = {}  # {folder: (settings, dataset, clip, records) of its last run}


@dataclass
class TrainingBatch:
    """One batch, as the training loop was given it.

    `method` is the name in --methods; the linear probe that lpft starts from is "lpft-probe".
    `step` counts from 0 in each epoch. A field is None where the method does not use it.
    """

    method: str
    seed: int
    epoch: int
    step: int
    paths: list                             # of the B images
    labels: torch.Tensor                    # (B,) indices of the sorted class folders
    pixels: torch.Tensor | None = None      # (B, 3, H, W) augmented; None: trained on features
    prompts: torch.Tensor | None = None     # (B, L) tokens of a prompt of each image's class
    captions: torch.Tensor | None = None    # (B, L) tokens of each image's caption
    pool: list | None = None                # of the R retrieved pairs: the images' names,
    pool_pixels: torch.Tensor | None = None  # (R, 3, H, W) the augmented images,
    pool_texts: torch.Tensor | None = None   # (R, L) the tokens of the texts


@dataclass
class Record:
    """What a run did that its results do not say.

    batches: every TrainingBatch, in the order of training. Empty: all checkpoints were reused.
    figure4: what LDFS's figure 4 shows, {(recipe, domain): paths}, where paths are, column by
    column, of the nearest real image; {("source", None): paths} are the source images above them.
    figure5: what ARF's figure 5 shows, [(image path, caption, pair)] column by column, where pair is
    (cosine, the pool image's name, its text), or None if nothing was retrieved for the image.
    A figure is None if it was not drawn.
    """

    batches: list = field(default_factory=list)
    figure4: dict | None = None
    figure5: list | None = None


def run(paper, folder, *flags):
    """Run all stages of run_ldfs.sh ("ldfs") or run_arf.sh ("arf") in this process.

    folder: of the run, as --run names it; other caches may be put in its parent. flags: the rest of
    the command line, data set and source first. Returns the Record.
    """
    record, job, last = Record(), [], {}
    loaded = []  # Locations of the last step's images and pairs
    true_finetune, true_batches = finetune.finetune, finetune.training_batches
    true_image_batches, true_split = batches.image_batches, features.split_transforms

    def split_on_pil_images(composed):
        """The program's transforms as open_clip computes them, which is how the oracle does.

        Otherwise pixels differ by rounding: test_data.py says by how much.
        """
        _, mean, std = true_split(composed)
        *steps, _, _ = composed.transforms
        return v2.Compose([v2.ToPILImage(), *steps, v2.PILToTensor()]), mean, std

    def kept(name, function):
        """Return the function, which also stores what it returned last."""
        def call(*args):
            last[name] = function(*args)
            return last[name]
        return call

    def finetune_named(settings, dataset, clip, name, seed, *rest):
        job.append((name, seed))
        try:
            return true_finetune(settings, dataset, clip, name, seed, *rest)
        finally:
            job.pop()

    def image_batches(keys, *args):
        for images, places in true_image_batches(keys, *args):
            loaded[:] = places
            yield images, places

    def training_batches(clip, dataset, source, items, schedule, seed, method, z_all, *rest):
        make = true_batches(clip, dataset, source, items, schedule, seed, method, z_all, *rest)
        [*_, current] = job

        def recorded(start_epoch):
            steps = math.ceil(len(items) / schedule.batch_size)
            for number, batch in enumerate(make(start_epoch), start_epoch * steps):
                about = [*current, *divmod(number, steps)]
                if batch.z is not None:  # the rows of the features tell which images these are
                    same = (batch.z[0][:, None] == z_all[0][None]).all(-1)
                    rows = same.float().argmax(1).tolist()
                    new = TrainingBatch(*about, [items[i][0].path for i in rows], batch.labels)
                else:
                    paths = [at.path for at in loaded[:len(batch.labels)]]
                    pixels = clip.normalise(batch.images)
                    new = TrainingBatch(*about, paths, batch.labels, pixels)
                    new.prompts, new.captions = batch.prompts, batch.captions
                if batch.pool_images is not None:
                    new.pool = [*map(name_of, loaded[len(batch.labels):])]
                    new.pool_pixels = clip.normalise(batch.pool_images)
                    new.pool_texts = batch.pool_texts
                record.batches.append(new)
                yield batch

        return recorded

    def draw_figure4(path, targets):
        record.figure4 = {
            (label, domain if i else None): [location.path for location, _ in images]
            for domain, rows in targets.items() for i, (label, images) in enumerate(rows)
        }

    def draw_figure5(path, columns):
        record.figure5 = [
            (location.path, caption, pair and (pair[0], name_of(pair[1]), pair[2]))
            for location, caption, pair in columns
        ]

    flags = ["--paper", paper, *map(str, flags), "--run", str(folder)]
    with contextlib.ExitStack() as stack:
        for module, name, new in [
            (sys, "argv", [f"run_{paper}.sh", *flags]),
            (finetune, "finetune", finetune_named),
            (finetune, "training_batches", training_batches),
            (batches, "image_batches", image_batches),
            (features, "split_transforms", split_on_pil_images),
            (sets.load, "load_run", kept("run", sets.load.load_run)),
            (features, "load_clip", kept("clip", features.load_clip)),
            (evaluate, "evaluate", kept("records", evaluate.evaluate)),
            (figures, "draw_figure4", draw_figure4),
            (figures, "draw_figure5", draw_figure5),
            # what takes time and changes nothing
            (figures, "draw_curve", lambda *args: None),
            (figures, "draw_losses", lambda *args: None),
            (open_clip, "get_tokenizer", get_tokenizer),
        ]:
            stack.enter_context(mock.patch.object(module, name, new))
        run_script.main()
    RUNS[str(folder)] = *last["run"], last["clip"], last["records"]
    return record


def name_of(location):
    return hashlib.sha256(location.read()).hexdigest()


def weights(folder, method, seed):
    """All that a method trained in the last run, by name: the state dict of its checkpoint.

    "head.weight" (C, d) and "head.bias" (C,) where it has a head, and "towers." + the names of
    open_clip's state dict where it trains a tower.
    """
    settings, dataset, clip, _ = RUNS[str(folder)]
    path = finetune.checkpoint_path(settings, dataset, clip, method, seed)
    return torch.load(path, map_location="cpu")["modules"]


def mapper_weights(folder, recipe, domain, seed):
    """W₁ (384, d), b₁, W₂ (d, 384), b₂ of the mapper to `domain`, as the last run left it."""
    settings, dataset, clip, _ = RUNS[str(folder)]
    path = mapper.mapper_path(settings, dataset, clip, recipe, domain, seed)
    state = torch.load(path, map_location="cpu")["mapper"]
    return [state[f"net.{i}.{name}"] for i in (0, 2) for name in ("weight", "bias")]


def accuracies(folder, method, seed, alpha=1):
    """{column: per cent} of the test parts in the last run, as its table shows them.

    Columns: the source, each target, "OOD mean", and where the method can name other classes
    "unseen DOMAIN" for each domain of the unseen data set, and "unseen mean". `method` may be
    "zero-shot". alpha: the share of the finetuned weights.
    """
    [values] = [
        record["values"] for record in RUNS[str(folder)][3]
        if (record["method"], record["seed"], record["alpha"]) == (method, seed, alpha)
    ]
    return {name: value for name, value in values.items() if name != "extended"}


def feature_measures(folder, recipe, domain, seed):
    """{"domain consistency", "class consistency", "unique neighbours"}, per cent, of the features
    that the mapper synthesises from held-out images.
    """
    settings, dataset, clip, _ = RUNS[str(folder)]
    records, _ = quality.synthesis_records(settings, dataset, clip)
    [values] = [
        record["values"] for record in records
        if (record["method"], record["domain"], record["seed"]) == (recipe, domain, seed)
    ]
    return values


def retrieved(folder):
    """The pairs that the last run took from the pool, in the pool's order.

    [(the image's name, text, {path of the source image that found it: cosine})].
    """
    settings, dataset, clip, _ = RUNS[str(folder)]
    pairs = anchors.retrieve_pairs(settings, dataset, clip)["pairs"]
    return [
        (name_of(anchors.pair_location(settings, dataset, pair)), pair["text"], pair["queries"])
        for pair in pairs
    ]
