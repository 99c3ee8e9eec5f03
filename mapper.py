"""Step 1 of LDFS: mappers from features of source images to a domain known only by words.

    python mapper.py pacs photo --methods lads ldfs ldfs:sigma=0      # see core/methods.py

No image of a target domain is read here. Mappers are stored in runs/…/mappers/.
"""

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import anchors
import data
from core.artifacts import artifact, artifact_path, digest, stamps
from core.config import describe, parse
from core.distributed import leave, main_print, main_process_first, progress_bar
from core.methods import parse_recipe, recipes_of
from core.results import record
from core.utils import fail
from features import cached_features, encode_texts, load_clip, zero_shot_head
from losses import class_consistency, local_adaptation, pairwise_relation, stochastic_text
from sets.load import load_run


class Mapper(nn.Module):
    """M_k: ẑ = norm( W₂ ReLU( W₁ z ) ), (B, d) -> (B, d), of unit norm unless unit=False.

    CHOICE: LADS's network, two linear layers of width 384 without a residual connection, so that
    the comparison is of losses alone; alternative: z + M(z), which starts at ẑ = z.
    CHOICE: a mapper for each target domain; alternative: one that is told the domain.
    """

    def __init__(self, dim, width=384):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, z, unit=True):
        output = self.net(z)
        return F.normalize(output, dim=-1) if unit else output


def ldfs_loss(mapper, z, labels, text_source, text_target, class_text, recipe, generator):
    """Return the terms of L_1 = L_ld + λ_pair L_pair + λ_cls L_cls on one batch, by name.

    z: (B, d). labels: (B,). text_source, text_target: t_i^s, t_i^k, (B, d), of each image's caption
    or class. class_text: T, (C, d). All unit norm.
    Source: LDFS, figure 2; the class term: LADS.
    """
    output = mapper(z, unit=False)                                                         # (B, d)
    z_hat = F.normalize(output, dim=-1)                                                    # (B, d)
    # ε is drawn for source and target apart: a shared one would cancel in their difference
    t_s = stochastic_text(text_source, recipe.sigma, generator)                            # (B, d)
    t_k = stochastic_text(text_target, recipe.sigma, generator)                            # (B, d)
    losses = {"L_ld": local_adaptation(z, z_hat if recipe.unit else output, t_s, t_k)}
    if recipe.pair:
        losses["L_pair"] = recipe.pair * pairwise_relation(z, z_hat, recipe.form)
    if recipe.cls:  # LADS's class loss has no logit scale
        losses["L_cls"] = recipe.cls * class_consistency(z_hat, class_text, labels, logit_scale=1)
    return losses


def lads_loss(mapper, z, labels, text_source, text_target, class_text, class_weight):
    """Return the terms of L = ½ [ 1 − cos( M(z) − z, Δt ) ] + ½ CE( norm(M(z)) · Tᵀ, y ), by name.

    This is LADS's mapper as published: the direction is that of the network's unnormalised output.
    class_weight: (C,), inverse frequencies of the classes.
    Source: LADS (Dunlap et al., ICLR 2023) and its public code.
    """
    output = mapper(z, unit=False)                                                         # (B, d)
    logits = F.normalize(output, dim=-1) @ class_text.T                                    # (B, C)
    return {
        "L_direction": local_adaptation(z, output, text_source, text_target) / 2,
        "L_class": F.cross_entropy(logits, labels, class_weight) / 2,
    }


@dataclass(frozen=True)
class MapperSchedule:
    """How a mapper is trained: `rounds` of a few batches by AdamW."""

    rounds: int
    batch_size: int
    lr: float
    weight_decay: float
    batches: int | None  # of a round; None: all images once, an epoch
    cosine: bool         # the learning rate falls to 0 in a cosine; False: constant
    best: bool           # keep the round with the lowest loss on validation images; False: the last
    eps: float = 1e-8


# CHOICE: LDFS's mapper takes 300 random batches of 128, a cosine schedule, lr 3e-3 and weight decay
# 0.05 (both in the ranges LADS searches): L_1 on emoji's validation images is lowest there (600 and
# 1,500 steps, or lr 1e-2, are higher), on PACS's it falls by another 1 % up to 1,500; alternative:
# LADS's 50 epochs of 256 at a constant rate.
# CHOICE: LADS's lr and weight decay are its base configuration's, because LADS searches them for
# each data set; its AdamW is torch's; alternative: transformers', which LADS uses (ẑ agrees to a
# cosine of 0.98, the validation loss to 0.1 %).
SCHEDULES = {
    "ldfs": MapperSchedule(300, 128, 3e-3, 0.05, batches=1, cosine=True, best=False),
    "lads": MapperSchedule(50, 256, 5e-3, 0.05, batches=None, cosine=False, best=True, eps=1e-6),
}


def train_mapper(
    z, labels, text_source, text_target, class_text, recipe, seed=0, rounds=None, val=None
):
    """Train M_k on features of the source's training images; return (Mapper, history).

    z, text_source, text_target: (N, d), labels: (N,), class_text: (C, d), as in `ldfs_loss`.
    rounds: instead of the schedule's. val: (z, labels, text_source, text_target) of validation
    images, which decide the best round where the schedule keeps it (without them the training
    images do).
    history: each loss term's mean in each round, [{"L_ld": …}]. Raises FloatingPointError if the
    loss is not finite.
    """
    schedule = SCHEDULES[recipe.loss]
    rounds = rounds or schedule.rounds
    mapper = new_mapper(z.shape[1], seed).to(z.device)
    generator = torch.Generator(z.device).manual_seed(seed)  # of batches and ε
    if recipe.loss == "lads":
        class_weight = 1 / labels.bincount(minlength=len(class_text)).clamp(min=1)
        loss_fn = partial(lads_loss, class_text=class_text, class_weight=class_weight)
    else:
        loss_fn = partial(ldfs_loss, class_text=class_text, recipe=recipe, generator=generator)
    optimizer = torch.optim.AdamW(
        mapper.parameters(), schedule.lr, weight_decay=schedule.weight_decay, eps=schedule.eps,
        fused=True,
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    history, best_loss, best = [], float("inf"), None

    for number in (bar := progress_bar(range(rounds), desc="mapper", leave=False)):
        order = torch.randperm(len(z), generator=generator, device=z.device)
        batches, terms = order.split(schedule.batch_size)[:schedule.batches], []
        for i in batches:
            losses = loss_fn(mapper, z[i], labels[i], text_source[i], text_target[i])
            loss = sum(losses.values())
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} in round {number}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            terms.append(torch.stack([*losses.values()]).detach())
        if schedule.cosine:
            cosine.step()
        history.append(dict(zip(losses, torch.stack(terms).mean(0).tolist())))
        bar.set_postfix(loss=f"{sum(history[-1].values()):.3f}", refresh=False)
        if schedule.best:
            held_out = val if val and len(val[0]) else (z, labels, text_source, text_target)
            with torch.no_grad():
                val_loss = sum(loss_fn(mapper, *held_out).values()).item()
            if val_loss < best_loss:
                best_loss, best = val_loss, copy.deepcopy(mapper.state_dict())

    if schedule.best:
        mapper.load_state_dict(best)
    return mapper.requires_grad_(False), history


def new_mapper(dim, seed):
    """Return a Mapper whose start depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mapper(dim)


@torch.no_grad()
def measure_mapper(mapper, z, text_source, text_target, sigma, seed=0):
    """Return what LDFS depends on: {name: cosine, length on the unit sphere, or angle in radians}.

    |Δt|: mean length of the text directions. spread: mean cosine between two images' directions (1:
    all are the same). noise: cosine of noisy and clean direction, which shows whether σ drowns it.
    follows: cosine of image shift and clean text direction. |Δz|: mean length of the image shift.
    angles: mean change of the angle between two images' features, L_pair.
    """
    delta_t, z_hat = text_target - text_source, mapper(z)
    generator = torch.Generator(z.device).manual_seed(seed)
    noisy_target = stochastic_text(text_target, sigma, generator)
    noisy = noisy_target - stochastic_text(text_source, sigma, generator)
    unit = F.normalize(delta_t, dim=-1)
    n, first = len(z), slice(0, 2000)  # pairs are quadratic in number
    return {
        "|Δt|": delta_t.norm(dim=-1).mean().item(),
        "spread": ((unit.sum(0).square().sum() - n) / max(n * (n - 1), 1)).item(),
        "noise": F.cosine_similarity(noisy, delta_t, dim=-1).mean().item(),
        "follows": F.cosine_similarity(z_hat - z, delta_t, dim=-1).mean().item(),
        "|Δz|": (z_hat - z).norm(dim=-1).mean().item(),
        "angles": pairwise_relation(z[first], z_hat[first]).item(),
    }


# -------------------------------------------------------------------------------------------------
# Load or train


def steering_texts(dataset, direction, domain, items):
    """Return the text of each item in the words of `domain`, by a recipe's direction: N strings."""
    if direction == "caption":
        return data.caption_texts(dataset, domain, items)
    if direction == "class":
        class_texts = data.class_texts(dataset, domain)
        return [class_texts[label] for _, label in items]
    return [dataset.meta.phrases[domain]] * len(items)


def neutral_prompts(dataset):
    """Return LADS's class prompts, "a photo of a C" whatever the source: C strings."""
    return [f"a photo of {data.article(name)}" for name in dataset.classnames]


def mapper_path(settings, dataset, clip, recipe_name, domain, seed):
    """Return where the mapper to `domain` is stored; the hash in its name covers all its inputs."""
    recipe, source = parse_recipe(recipe_name), settings.source
    schedule = SCHEDULES[recipe.loss]
    schedule = replace(schedule, rounds=settings.mapper_steps or schedule.rounds)
    used = ("train", "val") if schedule.best else ("train",)
    parts = [dataset.split(source, source, part, seed) for part in used]
    classnames, templates = data.prompt_templates(dataset, source)
    inputs = (
        asdict(recipe), seed, asdict(schedule), clip.key,
        [stamps(items) for items in parts],
        [steering_texts(dataset, recipe.direction, d, sum(parts, [])) for d in (source, domain)],
        [template(name) for template in templates for name in classnames],
        neutral_prompts(dataset) if recipe.loss == "lads" else (),
    )
    name = f"{recipe_name}-{domain}-seed{seed}".replace(" ", "_")
    return artifact_path(settings.run / "mappers", name, inputs)


def load_mappers(settings, dataset, clip, recipe_name, seed):
    """Return {target domain: Mapper}, frozen; those that are not stored are trained first."""
    mappers = {}
    for domain, content in mapper_artifacts(settings, dataset, clip, recipe_name, seed).items():
        width, dim = content["mapper"]["net.0.weight"].shape
        mappers[domain] = Mapper(dim, width).to(clip.device).requires_grad_(False)
        mappers[domain].load_state_dict(content["mapper"])
    return mappers


def mapper_artifacts(settings, dataset, clip, recipe_name, seed):
    """Return {target domain: {"mapper": weights, "history", "measures"}}, from disk or trained."""
    recipe, source = parse_recipe(recipe_name), settings.source
    if recipe.direction == "caption":
        anchors.caption_source(settings, dataset)
    parts = [dataset.split(source, source, part, seed) for part in ("train", "val")]
    # by every rank, because the ranks that only load mappers do not encode images below
    features = [cached_features(clip, dataset, source, items, settings.cache) for items in parts]

    def text_features(domain, items):
        """Return the features of items' texts; those of all the source's images are kept."""
        all_items = dataset.trainable(source)
        texts = steering_texts(dataset, recipe.direction, domain, all_items)
        key = digest(texts)
        if key not in clip.cache:
            clip.cache[key] = encode_texts(clip, texts)
        return clip.cache[key][data.rows_in(all_items, items)].to(clip.device)

    def tensors(z, items, domain):
        """Return z, labels, text_source and text_target of items, for `train_mapper`."""
        labels = torch.tensor([label for _, label in items], device=clip.device)
        return z.to(clip.device), labels, text_features(source, items), text_features(domain, items)

    def train(domain):
        train_part, val_part = (tensors(z, items, domain) for z, items in zip(features, parts))
        if recipe.loss == "lads":
            class_text = encode_texts(clip, neutral_prompts(dataset))
        else:
            class_text = zero_shot_head(clip, *data.prompt_templates(dataset, source))
        try:
            mapper, history = train_mapper(
                *train_part, class_text.to(clip.device), recipe, seed, settings.mapper_steps,
                val_part,
            )
        except FloatingPointError as error:
            fail(f"{recipe_name}, {domain}: {error}. Check the images, or change the weights.")
        z, _, *texts = train_part
        measures = measure_mapper(mapper, z, *texts, recipe.sigma, seed)
        return {
            "mapper": mapper.cpu().state_dict(), "history": history, "measures": measures,
            "n": len(z),
        }

    def load_or_train(domain):
        path = mapper_path(settings, dataset, clip, recipe_name, domain, seed)
        return artifact(path, lambda: train(domain))

    targets = dataset.styles(source)
    return main_process_first(lambda: {domain: load_or_train(domain) for domain in targets})


def describe_run(settings, dataset, device):
    """Return the resolved settings as a block of text, with the schedules of mappers."""
    lines = []
    for kind in dict.fromkeys(recipe.loss for recipe in recipes_of(settings.methods).values()):
        if kind in SCHEDULES:
            values = asdict(SCHEDULES[kind])
            values["rounds"] = settings.mapper_steps or values["rounds"]
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append((f"mappers of {kind}", text))
    return describe(settings, dataset, device, lines)


def train_all(settings, dataset, clip):
    """Train the mappers of every recipe, seed and target that are not stored."""
    names = [n for n, recipe in recipes_of(settings.methods).items() if recipe.loss != "clipstyler"]
    jobs = [(name, seed) for seed in range(settings.seeds) for name in names]
    for name, seed in (bar := progress_bar(jobs, desc="mappers", unit="recipe", leave=False)):
        bar.set_postfix_str(f"{name}, seed {seed}")
        mapper_artifacts(settings, dataset, clip, name, seed)


def mapper_records(settings, dataset, clip):
    """Return records of `measure_mapper`, for the tables."""
    names = [n for n, recipe in recipes_of(settings.methods).items() if recipe.loss != "clipstyler"]
    return [
        record(settings, "mapper", name, seed, content["measures"], content["n"], domain=domain)
        for name in names for seed in range(settings.seeds)
        for domain, content in mapper_artifacts(settings, dataset, clip, name, seed).items()
    ]


def main():
    settings, dataset = load_run(parse(__doc__, stage="mapper"))
    clip = load_clip(settings)
    main_print(describe_run(settings, dataset, clip.device))
    train_all(settings, dataset, clip)
    for row in mapper_records(settings, dataset, clip):
        measures = ", ".join(f"{name} {value:.3f}" for name, value in row["values"].items())
        main_print(f"{row['method']} → {row['domain']}, seed {row['seed']}: {measures}")
    leave()


if __name__ == "__main__":
    main()
