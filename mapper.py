"""Step 1 of LDFS: mapper networks from features of source images to a domain known only by words.

    python mapper.py pacs photo --methods lads ldfs ldfs:sigma=0      # see methods.py

No image of a target domain is read here. Each mapper is written to runs/…/mappers/, and kept
while it is what the same inputs would make.
"""

import contextlib
from dataclasses import asdict
from utils import fail, load_whole, only_one_process, short_hash, undamaged, write_atomically

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

import data
from config import parse, refuse_other
from distributed import side_by_side
from features import cached_features, encode_texts, load_clip, stamps, zero_shot_head
from losses import class_consistency, local_adaptation, pairwise_relation, stochastic_text
from methods import parse_recipe, recipes_of
from report import results


class Mapper(nn.Module):
    """M_k: ẑ = norm( W₂ ReLU( W₁ z ) ), (B, d) -> (B, d), of unit norm unless unit=False.

    CHOICE: LADS's network, two linear layers of width 384 without a residual connection, so that
    the comparison is of losses alone; alternative: z + M(z), which starts at ẑ = z.
    CHOICE: a mapper for each target domain; alternative: one, which is told the domain.
    """

    def __init__(self, dim, width=384):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, z, unit=True):
        output = self.net(z)
        return F.normalize(output, dim=-1) if unit else output


def ldfs_loss(mapper, z, labels, text_source, text_target, class_text, recipe, generator):
    """L_1 = L_ld + λ_pair L_pair + λ_cls L_cls, the loss of step 1 on one batch.

    z: (B, d). labels: (B,). text_source, text_target: t_i^s, t_i^k, (B, d), of each image's caption
    or class. class_text: T, (C, d). All unit norm.
    Source: LDFS, figure 2; the class term: LADS.
    """
    output = mapper(z, unit=False)                                                         # (B, d)
    z_hat = F.normalize(output, dim=-1)                                                    # (B, d)
    # ε is drawn for source and target on their own: a shared one would cancel in the difference
    t_s = stochastic_text(text_source, recipe.sigma, generator)                            # (B, d)
    t_k = stochastic_text(text_target, recipe.sigma, generator)                            # (B, d)
    loss = local_adaptation(z, z_hat if recipe.unit else output, t_s, t_k)
    if recipe.pair:
        loss = loss + recipe.pair * pairwise_relation(z, z_hat, recipe.form)
    if recipe.cls:  # LADS's class loss has no logit scale
        loss = loss + recipe.cls * class_consistency(z_hat, class_text, labels, logit_scale=1)
    return loss


def new_mappers(count, dim, seed, device):
    """A Mapper to call, and the weights of K = `count` mappers to call it with, {name: (K, …)}: all
    start the same, as the seed says.
    """
    with torch.device("meta"):  # nn.Linear draws from the generator that all threads share
        mapper = Mapper(dim)
    mapper.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for layer in mapper.net[0], mapper.net[2]:
        bound = layer.in_features**-0.5  # as nn.Linear starts
        for p in layer.parameters():
            nn.init.uniform_(p, -bound, bound, generator)
    mapper.to(device)
    start = {name: p.detach().expand(count, *p.shape) for name, p in mapper.named_parameters()}
    return mapper, {name: p.clone().requires_grad_() for name, p in start.items()}


def target_losses(mapper, weights, text_targets, loss):
    """(K,): loss(M_k, t^k) of every target, all at once by torch.vmap. text_targets: (K, B, d).

    z, labels and what else `loss` takes from where it stands are the same for all, as is what it
    draws (ε): each mapper learns what it would learn alone.
    """

    def one(weights, text_target):
        def m(z, **options):
            return functional_call(mapper, weights, (z,), options)

        return loss(m, text_target)

    return torch.vmap(one, randomness="same")(weights, text_targets)


def frozen(weights):
    """[M_1 … M_K] of their weights, {name: (K, …)}."""
    width, dim = weights["net.0.weight"].shape[1:]
    mappers = []
    for values in zip(*weights.values()):
        with torch.device("meta"):
            mapper = Mapper(dim, width)
        state = dict(zip(weights, (value.detach().clone() for value in values)))
        mapper.load_state_dict(state, assign=True)
        mappers.append(mapper.requires_grad_(False))
    return mappers


def train_mappers(
    z, labels, text_source, text_targets, class_text, recipe, seed=0, steps=300, batch_size=128
):
    """Train the mappers of K targets on (N, d) features of the source's training images.

    text_targets: K tensors t^k, (N, d); the rest, and the loss, as in `ldfs_loss`. Returns [M_1 …
    M_K], frozen: at once they share batches, ε and the angles of z, and are what each would be if
    trained alone, but for rounding, which training may amplify. Raises FloatingPointError at a loss
    that is not finite.
    CHOICE: AdamW, cosine schedule, 300 steps of 128, lr 3e-3, weight decay 0.05 (both in the ranges
    LADS searches): L_1 on emoji's validation images is lowest there (600 and 1,500 steps, or lr
    1e-2, are higher), on PACS's it falls by another 1 % up to 1,500; alternative: LADS's 50 epochs
    of 256 at a constant rate.
    """
    mapper, weights = new_mappers(len(text_targets), z.shape[1], seed, z.device)
    generator = torch.Generator(z.device).manual_seed(seed)
    optimizer = torch.optim.AdamW(weights.values(), lr=3e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        i = torch.randperm(len(z), generator=generator, device=z.device)[:batch_size]
        some = torch.stack([t[i] for t in text_targets])                                # (K, B, d)
        loss = target_losses(mapper, weights, some, lambda m, t_k: ldfs_loss(
            m, z[i], labels[i], text_source[i], t_k, class_text, recipe, generator
        )).sum()  # of which M_k's gradient is that of its own loss
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return frozen(weights)


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
        state = load_whole(path, device)
        if state["fingerprint"] != fingerprint:
            fail(f"{path} is for another model. Run mapper.py again, or name another --run.")
        refuse_other(path, config, state.get("made_with", {}))
        if words and words != state["words"]:
            fail(f"{path}: captions or phrases were others then. Run mapper.py again.")
        return frozen({name: w[None] for name, w in state["mapper"].items()})[0]


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
    from lads import train_lads  # here, for it imports from this file

    config, dataset = parse(__doc__)
    only_one_process("mapper.py", "takes one process: run it without torchrun")
    recipes = {k: v for k, v in recipes_of(config.methods).items() if k != "clipstyler"}
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
    directions = {recipe.direction for recipe in recipes.values()}
    words = {  # of every source image, in the domain's words
        (direction, domain): steering_texts(dataset, direction, domain, everything)
        for direction in directions for domain in (source, *targets)
    }
    texts = {key: encode_texts(clip, said).to(clip.device) for key, said in words.items()}  # t
    neutral = [f"a photo of {data.article(name)}" for name in dataset.classnames]
    lads_text = encode_texts(clip, neutral).to(clip.device)
    z = features_of(everything).to(clip.device)
    labels = torch.tensor([label for _, label in everything], device=clip.device)

    states = {}  # (seed, recipe, target): what the mapper's file holds, or is to hold
    splits, jobs = [], []  # jobs: (seed, recipe, targets whose mappers are missing)
    for seed in range(config.seeds):
        splits.append([dataset.split(source, source, part, seed) for part in ("train", "val")])
        stamped = [*map(stamps, splits[seed])]
        for name, recipe in recipes.items():
            for domain in targets:
                said = [words[recipe.direction, d] for d in (source, domain)]
                state = {
                    "config_hash": short_hash(
                        asdict(recipe), seed, config.mapper_steps, clip.fingerprint,
                        *stamped, *said, neutral, class_prompts,
                    ),
                    "fingerprint": clip.fingerprint, "words": short_hash(*said),
                    "made_with": {
                        k: getattr(config, k) for k in ("mapper_steps", "source", "shots")
                    },
                }
                path = mapper_path(config.run, name, domain, seed)
                with undamaged(path, "Remove it, and run mapper.py again."):
                    there = load_whole(path) if path.exists() else state
                    same = there["config_hash"] == state["config_hash"]
                states[seed, name, domain] = there if same else state
            missing = [domain for domain in targets if "mapper" not in states[seed, name, domain]]
            jobs += [(seed, name, missing)] if missing else []

    def train(job):
        """[(M_k, its statistics)] of one job."""
        seed, name, missing = job
        recipe = recipes[name]
        t_s, *t_k = (texts[recipe.direction, domain] for domain in (source, *missing))
        rows = ([row[location] for location, _ in items] for items in splits[seed])
        train, val = ((z[i], labels[i], t_s[i], [t[i] for t in t_k]) for i in rows)
        length = "epochs" if recipe.loss == "lads" else "steps"
        more = {length: config.mapper_steps} if config.mapper_steps else {}
        if recipe.loss == "lads":
            mappers = train_lads(train, val, lads_text, seed, **more)
        else:
            mappers = train_mappers(*train, class_text, recipe, seed, **more)
        how = recipe.sigma, seed
        return [(m, statistics(m, train[0], train[2], t, *how)) for m, t in zip(mappers, train[3])]

    bar = tqdm(jobs, "mappers", unit="recipe", leave=False)  # of all its targets
    with contextlib.closing(side_by_side(train, jobs, clip.device)) as done:
        for seed, name, missing in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            try:
                made = next(done)
            except FloatingPointError as error:
                fail(f"{name}: {error}. Look at the features, or weigh the terms otherwise.")
            for domain, (mapper, numbers) in zip(missing, made):
                state = states[seed, name, domain]
                state |= {"statistics": numbers, "mapper": mapper.cpu().state_dict()}
                path = mapper_path(config.run, name, domain, seed)
                write_atomically(path, lambda new: torch.save(state, new))
    table = {
        (name, domain): [states[seed, name, domain]["statistics"] for seed in range(config.seeds)]
        for domain in targets for name in recipes
    }
    results.append_statistics(config, table, len(splits[-1][0]))


if __name__ == "__main__":
    main()
