"""Step 1 of LDFS: mapper networks from features of source images to a domain known only by words.

    python mapper.py pacs photo --methods lads ldfs ldfs:sigma=0      # see methods.py

No image of a target domain is read here. Each mapper is written to runs/…/mappers/, and left alone
once it is there.
"""

from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from config import parse, refuse_other
from features import cached_features, encode_texts, load_clip, stamps, zero_shot_head
from losses import class_consistency, local_adaptation, pairwise_relation, stochastic_text
from methods import parse_recipe, recipes_of
from report import results
from utils import fail, only_one_process, short_hash, undamaged, write_atomically


class Mapper(nn.Module):
    """M_k: ẑ = norm( W₂ ReLU( W₁ z ) ), (B, d) -> (B, d), unit norm.

    CHOICE: LADS's network, two linear layers of width 384 without a residual connection, so that
    the comparison is of losses alone; alternative: z + M(z), which starts at ẑ = z.
    CHOICE: a mapper for each target domain; alternative: one, which is told the domain.
    """

    def __init__(self, dim, width=384):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, z):
        return F.normalize(self.net(z), dim=-1)


def ldfs_loss(mapper, z, labels, text_source, text_target, class_text, recipe, generator):
    """L_1 = L_ld + λ_pair L_pair + λ_cls L_cls, the loss of step 1 on one batch.

    z: (B, d). labels: (B,). text_source, text_target: t_i^s, t_i^k, (B, d), of each image's caption
    or class. class_text: T, (C, d). All unit norm.
    Source: LDFS, figure 2; the class term: LADS.
    """
    z_hat = mapper(z)                                                                      # (B, d)
    # ε is drawn for source and target on their own: a shared one would cancel in the difference
    t_s = stochastic_text(text_source, recipe.sigma, generator)                            # (B, d)
    t_k = stochastic_text(text_target, recipe.sigma, generator)                            # (B, d)
    loss = local_adaptation(z, z_hat, t_s, t_k)
    if recipe.pair:
        loss = loss + recipe.pair * pairwise_relation(z, z_hat, recipe.form)
    if recipe.cls:  # LADS's class loss has no logit scale
        loss = loss + recipe.cls * class_consistency(z_hat, class_text, labels, logit_scale=1)
    return loss


def lads_loss(mapper, z, labels, text_source, text_target, class_text, class_weight):
    """L = ½ [ 1 − cos( M(z) − z, Δt ) ] + ½ CE( norm(M(z)) · Tᵀ, y ), LADS's mapper as published.

    The direction is that of the network's unnormalised output; class_weight: (C,), of the classes.
    Source: LADS (Dunlap et al., ICLR 2023) and its public code.
    """
    output = mapper.net(z)                                                                 # (B, d)
    direction = local_adaptation(z, output, text_source, text_target)
    logits = F.normalize(output, dim=-1) @ class_text.T                                    # (B, C)
    return (direction + F.cross_entropy(logits, labels, class_weight)) / 2


def new_mapper(dim, seed, device):
    """A Mapper whose start depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mapper(dim).to(device)


def train_lads(train, val, class_text, seed=0, epochs=50, batch_size=256):
    """Train LADS's mapper as its public code does: of 50 epochs at a constant rate the best stays.

    train, val: (z, labels, text_source, text_target), as in `train_mapper`; the best is by val, or
    by train where there is none. lr and weight decay: LADS searches; these are its base's.
    """
    mapper = new_mapper(train[0].shape[1], seed, train[0].device)
    generator = torch.Generator(train[0].device).manual_seed(seed)
    optimizer = torch.optim.AdamW(mapper.parameters(), lr=0.005, weight_decay=0.05, eps=1e-6)
    class_weight = 1 / train[1].bincount(minlength=len(class_text)).clamp(min=1)
    judged, best, state = val if len(val[0]) else train, float("inf"), None
    for _ in range(epochs):
        order = torch.randperm(len(train[0]), generator=generator, device=train[0].device)
        for i in order.split(batch_size):
            loss = lads_loss(mapper, *(x[i] for x in train), class_text, class_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            loss = lads_loss(mapper, *judged, class_text, class_weight).item()
        if loss < best:
            best, state = loss, {k: v.clone() for k, v in mapper.state_dict().items()}
    if state is None:
        raise FloatingPointError("the loss was never finite")
    mapper.load_state_dict(state)
    return mapper.requires_grad_(False)


def train_mapper(
    z, labels, text_source, text_target, class_text, recipe, seed=0, steps=300, batch_size=128
):
    """Train one mapper on (N, d) features of the source's training images; see `ldfs_loss`.

    Returns the Mapper, frozen.
    CHOICE: AdamW, cosine schedule, 300 steps of 128, lr 3e-3, weight decay 0.05 (both in the ranges
    LADS searches): L_1 on emoji's validation images is lowest there (600 and 1,500 steps, or lr
    1e-2, are higher), on PACS's it falls by another 1 % up to 1,500; alternative: LADS's 50 epochs
    of 256 at a constant rate.
    """
    mapper = new_mapper(z.shape[1], seed, z.device)
    generator = torch.Generator(z.device).manual_seed(seed)
    optimizer = torch.optim.AdamW(mapper.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        i = torch.randperm(len(z), generator=generator, device=z.device)[:batch_size]
        batch = z[i], labels[i], text_source[i], text_target[i]
        loss = ldfs_loss(mapper, *batch, class_text, recipe, generator)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return mapper.requires_grad_(False)


@torch.no_grad()
def statistics(mapper, z, text_source, text_target, sigma, seed=0):
    """What LDFS rests on: cosines, lengths on the unit sphere, angles in radians.

    |Δt|: mean length of the text directions. spread: mean cosine between two images' directions (1:
    all the same). noise: cosine of noisy and clean direction, which tells whether σ has drowned it.
    follows: cosine of image shift and clean text direction. |Δz|: mean length of the image shift.
    angles: mean change of the angle between two images' features, L_pair.
    """
    delta_t, z_hat = text_target - text_source, mapper(z)
    generator = torch.Generator(z.device).manual_seed(seed)
    noisy_target = stochastic_text(text_target, sigma, generator)
    noisy = noisy_target - stochastic_text(text_source, sigma, generator)
    unit = F.normalize(delta_t, dim=-1)
    n, some = len(z), slice(0, 2000)  # pairs are quadratic in number
    return {
        "|Δt|": delta_t.norm(dim=-1).mean().item(),
        "spread": ((unit.sum(0).square().sum() - n) / max(n * (n - 1), 1)).item(),
        "noise": F.cosine_similarity(noisy, delta_t, dim=-1).mean().item(),
        "follows": F.cosine_similarity(z_hat - z, delta_t, dim=-1).mean().item(),
        "|Δz|": (z_hat - z).norm(dim=-1).mean().item(),
        "angles": pairwise_relation(z[some], z_hat[some]).item(),
    }


def mapper_path(run, recipe_name, domain, seed):
    return run / "mappers" / f"{recipe_name}-{domain}-seed{seed}.pt"


def load_mapper(config, recipe_name, domain, seed, fingerprint, device="cpu", words=None):
    """A trained Mapper, frozen; exits with status 2 if none has this CLIP and --mapper-steps."""
    path = mapper_path(config.run, recipe_name, domain, seed)
    if not path.exists():
        fail(f"{path} is not there. Train it: mapper.py DATASET SOURCE --methods {recipe_name}")
    with undamaged(path, "Remove it, and run mapper.py again."):
        state = torch.load(path, map_location=device)
        if state["fingerprint"] != fingerprint:
            fail(f"{path} is for another model. Run mapper.py again, or name another --run.")
        refuse_other(path, config, state.get("made_with", {}))
        if words and words != state["words"]:
            fail(f"{path}: captions or phrases were others then. Run mapper.py again.")
        width, dim = state["mapper"]["net.0.weight"].shape
        mapper = Mapper(dim, width).to(device)
        mapper.load_state_dict(state["mapper"])
    return mapper.requires_grad_(False)


def steering_texts(dataset, direction, domain, items):
    """What is said of each item in the words of `domain`, for a recipe's direction: N strings."""
    if direction == "caption":
        return data.caption_texts(dataset, domain, items)
    if direction == "class":
        of_class = data.class_texts(dataset, domain)
        return [of_class[label] for _, label in items]
    return [dataset.meta.phrases[domain]] * len(items)


def load_synthesiser(config, dataset, clip, recipe_name, domain, seed, items):
    """What makes ẑ^k of z, both (N, d), of the source's `items`, frozen: M_k, or CLIPstyler's."""
    if recipe_name == "clipstyler":
        from clipstyler import Repainted  # here, for it imports from this file

        return Repainted(config, dataset, clip, domain, seed, items)
    recipe, items = parse_recipe(recipe_name), dataset.trainable(config.source)
    said = [steering_texts(dataset, recipe.direction, d, items) for d in (config.source, domain)]
    which = config, recipe_name, domain, seed, clip.fingerprint, clip.device
    return load_mapper(*which, words=short_hash(*said))


def main():
    config, dataset = parse(__doc__)
    only_one_process("mapper.py", "takes one process: run it without torchrun")
    recipes = recipes_of(config.methods)
    recipes.pop("clipstyler", None)
    if not recipes:
        return  # finetune, flyp and arf need no mapper, and clipstyler has networks of its own
    source, targets = config.source, dataset.styles(config.source)
    clip = load_clip(config)
    features_of = cached_features(clip, dataset, source, config.run)
    classnames, templates = data.prompt_templates(dataset, source)
    class_text = zero_shot_head(clip, classnames, templates).to(clip.device)
    class_prompts = [template(name) for template in templates for name in classnames]
    everything = dataset.trainable(source)
    row = {location: i for i, (location, _) in enumerate(everything)}
    texts, words = {}, {}  # (direction, domain): t of every source image in the domain's words
    for direction in {recipe.direction for recipe in recipes.values()}:
        for domain in (source, *targets):
            prompts = steering_texts(dataset, direction, domain, everything)
            words[direction, domain] = prompts
            texts[direction, domain] = encode_texts(clip, prompts).to(clip.device)
    neutral = [f"a photo of {data.article(name)}" for name in dataset.classnames]
    lads_text = encode_texts(clip, neutral).to(clip.device)
    z_all = features_of(everything).to(clip.device)
    labels_all = torch.tensor([label for _, label in everything], device=clip.device)

    seeds = range(config.seeds)
    splits = [
        {part: dataset.split(source, source, part, seed) for part in ("train", "val")}
        for seed in seeds
    ]
    jobs = [(seed, domain, name) for seed in seeds for domain in targets for name in recipes]
    table = {}  # (recipe, target): statistics of every seed
    for seed, domain, name in (bar := tqdm(jobs, desc="mappers", unit="mapper", leave=False)):
        bar.set_postfix_str(f"{name} -> {domain}, seed {seed}")
        recipe = recipes[name]
        source_texts, target_texts = ((recipe.direction, d) for d in (source, domain))
        every = z_all, labels_all, texts[source_texts], texts[target_texts]
        config_hash = short_hash(
            asdict(recipe), seed, config.mapper_steps, clip.fingerprint,
            *map(stamps, splits[seed].values()),
            words[source_texts], words[target_texts], neutral, class_prompts,
        )
        path = mapper_path(config.run, name, domain, seed)
        with undamaged(path, "Remove it, and run mapper.py again."):
            state = torch.load(path) if path.exists() else {"config_hash": None}
            there = state["config_hash"] == config_hash and state.get("words")
        if not there:
            parts = {}  # "train", "val": their rows of `every`
            for part, items in splits[seed].items():
                i = torch.tensor([row[location] for location, _ in items], dtype=torch.long)
                parts[part] = [x[i.to(clip.device)] for x in every]
            length = "epochs" if recipe.loss == "lads" else "steps"
            more = {length: config.mapper_steps} if config.mapper_steps else {}
            try:
                if recipe.loss == "lads":
                    mapper = train_lads(parts["train"], parts["val"], lads_text, seed, **more)
                else:
                    mapper = train_mapper(*parts["train"], class_text, recipe, seed, **more)
            except FloatingPointError as error:
                fail(f"{name}: {error}. Look at the features, or weigh the terms otherwise.")
            z, _, t_s, t_k = parts["train"]
            state = {
                "statistics": statistics(mapper, z, t_s, t_k, recipe.sigma, seed),
                "mapper": mapper.cpu().state_dict(), "config_hash": config_hash,
                "fingerprint": clip.fingerprint,
                "made_with": {"mapper_steps": config.mapper_steps, "source": source},
                "words": short_hash(words[source_texts], words[target_texts]),
            }
            write_atomically(path, lambda new: torch.save(state, new))
        table.setdefault((name, domain), []).append(state["statistics"])

    results.append_statistics(config, table, len(splits[-1]["train"]))


if __name__ == "__main__":
    main()
