"""Step 2: finetune CLIP on the source domain, on original and on synthesised features. One loop for everything.

    python finetune.py pacs photo --train head --features original lads ldfs
    python finetune.py pacs photo --train visual --features original ldfs

--train says what is trained, --features what it is fed. No image of a target domain is read here, and no result chooses
anything: the last step is what is kept. Each checkpoint goes to runs/…/checkpoints/; a killed run goes on after the last
finished epoch of a tower, or the last finished head.
"""

import math
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
from tqdm import tqdm

import data
from data import fail
from features import autocast, cached_features, encode_texts, fingerprint, image_batches, load_clip
from losses import class_consistency
from mapper import load_mapper, parse_recipe


@dataclass(frozen=True)
class Schedule:
    """AdamW, linear warm-up, cosine to 0. Batches are of source images; epochs are passes over them."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.1  # on all parameters, as in FLYP's public code
    warmup: float = 0.1        # share of all steps


# CHOICE: LDFS's schedules could not be had. head: 200 epochs, as LADS. visual, all: the 10 epochs and lr 1e-5 that FLYP
# uses with OpenAI's ViT-B/16, at a smaller batch; alternative: --epochs, --batch-size, --lr, chosen on the "val" part.
SCHEDULES = {
    "head": Schedule(epochs=200, batch_size=256, lr=1e-3),
    "visual": Schedule(epochs=10, batch_size=64, lr=1e-5),
    "all": Schedule(epochs=10, batch_size=64, lr=1e-5),
}


# CHOICE: a linear probe starts at random, as probes do; a whole tower with the text's head, as in WiSE-FT's baseline, for
# the gradients of a random head would spoil it; alternative: --init.
INITS = {"head": "scratch", "visual": "text", "all": "text"}


def lr_at(step, steps, schedule):
    """Learning rate at `step` of `steps`: up in a line, down in a cosine to 0."""
    warm = max(1, round(schedule.warmup * steps))
    if step < warm:
        return schedule.lr * (step + 1) / warm
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def with_synthesised(z, mappers):
    """[z, ẑ^1 … ẑ^K], each (B, d): features of original images, and what the frozen mappers make of them, ẑ^k = M_k(z)."""
    return [z, *(mapper(z) for mapper in mappers)]


def step_loss(features, labels, class_weight, logit_scale):
    """L_2 = L_con(z, y) + Σ_k L_con(ẑ^k, y), LDFS's cross-entropy on original and synthesised features.

    features: [z, ẑ^1 … ẑ^K], each (B, d) unit norm; [z] alone is plain finetuning. class_weight: (C, d).
    Source: LDFS, figure 2, step 2.
    CHOICE: every domain weighs as much as the original, as in LADS's union of features; alternative: the mean over domains.
    """
    return sum(class_consistency(x, class_weight, labels, logit_scale) for x in features)


def finetune(clip, dataset, source, seed, train, mappers, schedule, init, run, checkpoint, made_of):
    """Finetune `clip` in place; writes `checkpoint`, and goes on from it if it was `made_of` the same.

    train: "head" (linear head on cached features), "visual" (image tower and head) or "all" (both towers and the logit
    scale; the head is what the text tower makes of the class prompts). init: "text" or "scratch", the head's start.
    Raises FloatingPointError at a loss that is not finite, naming the step.
    """
    items = data.split(dataset, source, source, "train", seed)
    labels_all = torch.tensor([y for _, y in items], device=clip.device)
    prompts = data.class_texts(dataset, source)
    clip.model.requires_grad_(False)
    class_text = encode_texts(clip, prompts).to(clip.device)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(class_text.shape, generator=generator) / class_text.shape[1] ** 0.5  # rows of about unit norm
    head = nn.Linear(*reversed(class_text.shape), bias=False, device=clip.device)
    head.weight.data.copy_(class_text if init == "text" else random)
    model, scale = clip.model, torch.tensor(clip.logit_scale, device=clip.device)
    trained = {"head": [head], "visual": [head, model.visual], "all": [model]}[train]
    parameters = [p.requires_grad_() for module in trained for p in module.parameters()]
    if train == "head":
        row, z_all = cached_features(clip, dataset, source, run)
        z_all = z_all[[row[p] for p, _ in items]].to(clip.device)
        features_all = torch.stack(with_synthesised(z_all, mappers), dim=1)  # (N, 1 + K, d), made once: nothing moves
    else:
        tokens = clip.tokenizer(prompts).to(clip.device)

    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
    modules = nn.ModuleDict({"head": head} if train == "head" else {"head": head, "clip": model})
    steps_per_epoch = math.ceil(len(items) / schedule.batch_size)
    steps, first = schedule.epochs * steps_per_epoch, 0
    if checkpoint.exists() and (state := torch.load(checkpoint, map_location=clip.device))["made_of"] == made_of:
        modules.load_state_dict(state["modules"])
        first = state["epoch"]
        if first < schedule.epochs:
            optimizer.load_state_dict(state["optimizer"])

    epochs = range(first, schedule.epochs)
    bar = tqdm(epochs, checkpoint.stem, initial=first, total=schedule.epochs, unit="epoch", leave=False)
    for epoch in bar:
        # order and augmentation hang on (seed, epoch) alone: a resumed run is the uninterrupted one (on a CPU to the bit)
        torch.manual_seed(1000 * seed + epoch)
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        if train == "head":
            order = torch.randperm(len(items), generator=generator).split(schedule.batch_size)
            batches = ((features_all[i].unbind(1), labels_all[i]) for i in order)
        else:
            batches = image_batches(dataset.folder, items, clip.augment, schedule.batch_size, clip.device, generator)
        for i, (x, labels) in enumerate(batches):
            step = epoch * steps_per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, steps, schedule)
            features, weight = x, head.weight
            if train != "head":
                # CHOICE: where the tower is trained, M_k takes the current z, and passes its gradient on, so that ẑ stays
                # a synthesis of this z; alternative: ẑ of the original z, which the tower then leaves behind.
                with autocast(clip.device):
                    z = model.encode_image(x, normalize=True)
                features = with_synthesised(z.float(), mappers)
            if train == "all":
                with autocast(clip.device):
                    weight = model.encode_text(tokens, normalize=True)
                weight, scale = weight.float(), model.logit_scale.exp()
            loss = step_loss(features, labels, weight, scale)  # in float32: bfloat16 logits of 100 are steps of a half
            if not loss.isfinite():
                raise FloatingPointError(f"{checkpoint.stem}: the loss is {loss.item()} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if train == "all":
                model.logit_scale.data.clamp_(max=math.log(100))  # as CLIP was trained
        bar.set_postfix(loss=f"{loss.item():.3f}")
        done = epoch + 1 == schedule.epochs
        if done and train == "all":
            head.weight.data = encode_texts(clip, prompts).to(clip.device)
        if done or train != "head":  # a head is done in seconds: only its end is worth a file
            state = {"modules": modules.state_dict(), "epoch": epoch + 1, "made_of": made_of}
            if not done:
                state["optimizer"] = optimizer.state_dict()
            data.write_atomically(checkpoint, lambda part: torch.save(state, part))


def checkpoint_path(run, train, init, features, seed):
    return run / "checkpoints" / f"{train}-{init}-{features}-seed{seed}.pt"


def add_what(parser):
    """The arguments that name checkpoints, for finetune.py and evaluate.py."""
    add = parser.add_argument
    add("--train", choices=SCHEDULES, default="head", help="linear head, image tower and head, or both towers")
    add("--init", choices=["text", "scratch"], help="the head starts as the class prompts, or random (default: see INITS)")
    add("--features", nargs="+", default=["original", "lads", "ldfs"], help="recipes of mapper.py to add, or original")


def main():
    parser = data.arguments(__doc__)
    add_what(parser)
    parser.add_argument("--epochs", type=data.positive(int), help="passes over the training images (default: see SCHEDULES)")
    parser.add_argument("--batch-size", type=data.positive(int), help="images a step (default: see SCHEDULES)")
    parser.add_argument("--lr", type=data.positive(float), help="peak learning rate (default: see SCHEDULES)")
    args = parser.parse_args()
    for features in args.features:
        if features != "original":
            parse_recipe(features)
    dataset, run = data.prepare(args)
    init = args.init or INITS[args.train]
    flags = {k: v for k in ("epochs", "batch_size", "lr") if (v := getattr(args, k)) is not None}
    try:
        schedule = replace(SCHEDULES[args.train], **{**dataset.schedules.get(args.train, {}), **flags})
    except TypeError:
        fail(f"{dataset.folder / 'dataset.json'}: a schedule has only {', '.join(f.name for f in fields(Schedule))}.")
    clip = load_clip(args, dataset)
    original = {k: v.clone() for k, v in clip.model.state_dict().items()}
    model = fingerprint(clip)

    jobs = [(seed, features) for seed in range(args.seeds) for features in args.features]
    for seed, features in (bar := tqdm(jobs, desc=f"finetuning ({args.train})", unit="run")):
        bar.set_postfix_str(f"{features}, seed {seed}")
        targets = dataset.targets(args.source) if features != "original" else []
        mappers = [load_mapper(run, features, domain, seed, model, clip.device) for domain in targets]
        made_of = {
            "schedule": asdict(schedule),
            "model": model,
            "images": data.split(dataset, args.source, args.source, "train", seed),
            "prompts": data.class_texts(dataset, args.source),
            "mappers": data.digest(p for m in mappers for p in m.parameters()),
        }
        path = checkpoint_path(run, args.train, init, features, seed)
        clip.model.load_state_dict(original)
        try:
            finetune(clip, dataset, args.source, seed, args.train, mappers, schedule, init, run, path, made_of)
        except FloatingPointError as error:
            fail(f"{error}. Try a lower --lr; what is finished is kept.")


if __name__ == "__main__":
    main()
