"""Step 1 of LDFS: mapper networks that turn features of source images into features of a domain known only by words.

    python mapper.py pacs photo --methods lads ldfs ldfs:sigma=0      # methods.py says what steers each

No image of a target domain is read here. Each mapper is written to runs/…/mappers/ and left alone once it is there.
"""

from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import fail
from features import cached_features, encode_head, encode_texts, load_clip
from losses import class_consistency, local_adaptation, pairwise_relation, stochastic_text
from methods import chosen, recipes_of


class Mapper(nn.Module):
    """M_k: ẑ = norm( W₂ ReLU( W₁ z ) ), (B, d) -> (B, d), unit norm.

    CHOICE: LADS's network, two linear layers of width 384 without a residual connection, so that the comparison is of
    losses alone; alternative: z + M(z), which starts at ẑ = z.
    """

    def __init__(self, dim, width=384):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, z):
        return F.normalize(self.net(z), dim=-1)


def train_mapper(z, labels, text_source, text_target, class_text, recipe, seed=0, steps=300, batch_size=128):
    """Train one mapper; L_1 = L_ld + λ_pair L_pair + λ_cls L_cls.

    z: (N, d) features of the source's training images. labels: (N,). text_source, text_target: t_i^s and t_i^k, (N, d),
    of each image's caption or class. class_text: (C, d) prompts of the classes. All unit norm, on one device.
    Returns the Mapper, frozen, and a dict of what to look at (see `statistics`).
    CHOICE: AdamW, cosine schedule, 300 steps of 128, lr 3e-3, weight decay 0.05 (both in the ranges LADS searches): enough
    for L_1 on held-out source images to level off; alternative: LADS's 50 epochs, which on few images are too few.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mapper = Mapper(z.shape[1]).to(z.device)
    generator = torch.Generator(z.device).manual_seed(seed)
    optimizer = torch.optim.AdamW(mapper.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        i = torch.randperm(len(z), generator=generator, device=z.device)[:batch_size]
        z_hat = mapper(z[i])
        # ε is drawn for source and target on their own: a shared one would cancel in the difference
        t_s, t_k = (stochastic_text(t[i], recipe.sigma, generator) for t in (text_source, text_target))
        loss = local_adaptation(z[i], z_hat, t_s, t_k)
        if recipe.pair:
            loss = loss + recipe.pair * pairwise_relation(z[i], z_hat, recipe.form)
        if recipe.cls:  # LADS's class loss has no logit scale
            loss = loss + recipe.cls * class_consistency(z_hat, class_text, labels[i], logit_scale=1)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    mapper.requires_grad_(False)
    return mapper, statistics(mapper, z, text_source, text_target, recipe, generator)


@torch.no_grad()
def statistics(mapper, z, text_source, text_target, recipe, generator):
    """What LDFS rests on, as plain numbers (cosines in [-1, 1], lengths in units of the unit sphere, angles in radians).

    |Δt|: mean length of the text directions. spread: mean cosine between two images' directions (1: all the same).
    noise: cosine of noisy and clean direction, which tells whether σ has drowned the direction.
    follows: cosine of image shift and clean text direction. |Δz|: mean length of the image shift.
    angles: mean change of the angle between two images' features, L_pair.
    """
    delta_t, z_hat = text_target - text_source, mapper(z)
    noisy = stochastic_text(text_target, recipe.sigma, generator) - stochastic_text(text_source, recipe.sigma, generator)
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


def load_mapper(run, recipe_name, domain, seed, model, device="cpu"):
    """A trained Mapper, frozen. Exits with status 2 where it has not been trained on the CLIP of the fingerprint `model`."""
    path = mapper_path(run, recipe_name, domain, seed)
    if not path.exists():
        fail(f"{path} is not there. Train it: python mapper.py DATASET SOURCE --methods {recipe_name}")
    state = torch.load(path)
    if state["made_of"]["model"] != model:
        fail(f"{path} was trained on another model. Train it again with mapper.py, or name another folder with --run.")
    state = state["mapper"]
    mapper = Mapper(state["net.0.weight"].shape[1], state["net.0.weight"].shape[0])
    mapper.load_state_dict(state)
    return mapper.requires_grad_(False).to(device)


def main():
    args = data.arguments(__doc__).parse_args()
    recipes = recipes_of(chosen(args))
    if not recipes:
        return  # finetune, flyp and arf need no mapper
    dataset, run = data.prepare(args)
    targets = dataset.styles(args.source)
    clip = load_clip(args, dataset)
    row, z_all = cached_features(clip, dataset, args.source, run)
    everything = dataset.trainable(args.source)
    z_all = z_all[[row[p] for p, _ in everything]]
    row = {p: i for i, (p, _) in enumerate(everything)}
    labels_all = torch.tensor([y for _, y in everything])
    texts = {}  # (direction, domain): t^k of every source image
    for domain in (args.source, *targets):
        texts["class", domain] = encode_texts(clip, data.class_texts(dataset, domain))[labels_all]
        if any(r.direction == "caption" for r in recipes.values()):
            own = data.caption_texts(dataset, domain, [p for p, _ in everything])
            texts["caption", domain] = encode_texts(clip, own)
    class_text = encode_head(clip, data.prompts(dataset, args.source))

    jobs = [(seed, domain, name) for seed in range(args.seeds) for domain in targets for name in recipes]
    seen = {}  # (recipe, target): statistics of every seed
    for seed, domain, name in (bar := tqdm(jobs, desc="mappers", unit="mapper")):
        bar.set_postfix_str(f"{name} -> {domain}, seed {seed}")
        i = torch.tensor([row[p] for p, _ in data.split(dataset, args.source, args.source, "train", seed)])
        text_source, text_target = (texts[recipes[name].direction, d][i] for d in (args.source, domain))
        tensors = [x.to(clip.device) for x in (z_all[i], labels_all[i], text_source, text_target, class_text)]
        made_of = {"recipe": asdict(recipes[name]), "steps": args.mapper_steps, "data": data.digest(tensors)}
        made_of["model"] = clip.fingerprint
        path = mapper_path(run, name, domain, seed)
        state = torch.load(path) if path.exists() else None
        if state is None or state["made_of"] != made_of:
            try:
                mapper, numbers = train_mapper(*tensors, recipes[name], seed, args.mapper_steps)
            except FloatingPointError as error:
                fail(f"{name}: {error}. Look at the features, or weigh the terms otherwise.")
            state = {"mapper": mapper.cpu().state_dict(), "made_of": made_of, "statistics": numbers}
            data.write_atomically(path, lambda part: torch.save(state, part))
            rows = [(name, domain, "train", metric, value, len(i), seed) for metric, value in numbers.items()]
            data.append_results(run, args, rows)
        seen.setdefault((name, domain), []).append(state["statistics"])

    print(f"{'recipe':28}{'target':16}" + "".join(f"{metric:>9}" for metric in state["statistics"]) + "   (seeds' mean)")
    for (name, domain), runs in seen.items():
        means = [sum(numbers[metric] for numbers in runs) / len(runs) for metric in runs[0]]
        print(f"{name:28}{domain:16}" + "".join(f"{mean:9.3f}" for mean in means))


if __name__ == "__main__":
    main()
