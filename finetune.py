"""Finetune CLIP on the source domain: LDFS's step 2, FLYP, ARF, DiVE. Their losses, and the loop.

    python finetune.py pacs photo --methods finetune lads ldfs                        # linear heads
    python finetune.py pacs photo --paper arf --methods finetune flyp arf arf+ldfs    # towers
    python finetune.py … --micro-batch 16              # the same in less memory
    torchrun --nproc-per-node 8 -- finetune.py …       # … and with a batch split over eight GPUs

No image of a target domain is read here, and no result chooses anything: the last step counts.
Checkpoints are stored in runs/…/checkpoints/. A killed run goes on after the last epoch whose state
is stored; one is stored at the end of an epoch, once a minute at most. A linear head starts again.
"""

import math
import time
from dataclasses import asdict, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import anchors
import data
from batches import training_batches
from core.artifacts import artifact_path, load, save, stamps
from core.config import parse
from core.distributed import (
    agree,
    all_gather_with_grad,
    average_gradients,
    barrier,
    leave,
    main_print,
    progress_bar,
    rank_and_world,
)
from core.memory import bytes_per_row, fitting_micro_batch, free_bytes
from core.methods import FROZEN_TOWERS, option_matters
from core.utils import fail, is_out_of_memory, one_line, warn
from features import cached_features, load_clip, zero_shot_head
from losses import average_vector, clip_contrastive, pairwise_vector
from mapper import describe_run, load_mappers, mapper_path
from sets.load import load_run
from strategies.base import LinearProbe
from strategies.clipstyler import load_styled_features, style_path
from strategies.prompts import PROMPTS
from strategies.towers import BothTowers, CLIPood, FullFinetuning

LAMBDAS = ("lambda_cap", "lambda_ret", "lambda_dive")  # settings that weigh terms of a loss

# On an H100 the state of ViT-B/16 takes longer to write than an epoch of PACS to train.
SECONDS_BETWEEN_STATES = 60

# -------------------------------------------------------------------------------------------------
# The papers' losses


def ldfs_losses(strategy, batch):
    """Return the terms of L_2 = L_con(z, y) + Σ_k L_con(ẑ^k, y), LDFS's step 2, by name.

    LDFS's L_con is cross-entropy of the logits that the strategy's head makes: s · W z of a linear
    probe. Without ẑ^k this is plain finetuning.
    Source: LDFS, figure 2, step 2.
    CHOICE: every domain weighs as much as the original, as in LADS's union of features;
    alternative: the mean over domains.
    """
    y = batch.labels                                                                         # (B,)
    z, z_hats = original_and_synthesised(strategy, batch)      # (b, d), {"sketch": ẑ^sketch (b, d)}
    head = strategy.head_for(batch)                                  # (b, d) -> logits (b, C)

    def l_con(x):
        return F.cross_entropy(all_gather_with_grad(head(x), len(y)), y)

    return {"L_con": l_con(z), **{f"L_con {k}": l_con(z_hat) for k, z_hat in z_hats.items()}}


def original_and_synthesised(strategy, batch):
    """Return z, (b, d), and {target domain: ẑ^k, (b, d)}.

    CHOICE: where the tower is trained, M_k takes the current z and passes its gradient on, so that
    ẑ stays a synthesis of this z; alternative: ẑ of the original z, from which the tower moves
    away.
    """
    if batch.z is not None:  # of a frozen tower: computed once, in `prepare`
        z, *z_hats = batch.z
        return z, dict(zip(strategy.mappers, z_hats, strict=True))
    z = strategy.encode_image(batch.images)
    return z, {domain: mapper(z) for domain, mapper in strategy.mappers.items()}


def arf_losses(clip, batch, mappers=None, lambda_cap=1.0, lambda_ret=1.0, retrieved=True):
    """Return the terms of L = L_cl + λ_cap L_cap + λ_ret L_ret, ARF, by name; L_cl alone is FLYP.

    retrieved: False if the batch's pairs are for `dive_losses` alone.
    Source: ARF, figure 2; FLYP (arXiv 2212.00638).
    CHOICE: λ_cap = λ_ret = 1; alternative: --lambda-cap, --lambda-ret.
    CHOICE: a synthesised feature is contrasted with the prompts in the source's words, as in LDFS's
    L_2; alternative: in the words of its domain.
    """
    s, n = clip.model.logit_scale.exp(), len(batch.labels)

    def l_con(image, text, n):  # of the n pairs of all ranks
        return clip_contrastive(all_gather_with_grad(image, n), all_gather_with_grad(text, n), s)

    pool = (batch.pool_images, batch.pool_texts) if retrieved else (None, None)
    z, z_ret = encode_concat(clip.encode_image, batch.images, pool[0])                      # (b, d)
    t, t_cap, t_ret = encode_concat(clip.encode_text, batch.prompts, batch.captions, pool[1])
    losses = {} if t is None else {"L_cl": l_con(z, t, n)}                                    # FLYP
    if t_cap is not None:                                                                     # TCAG
        losses["L_cap"] = lambda_cap * l_con(z, t_cap, n)
    if t_ret is not None:                                                                     # ITAR
        losses["L_ret"] = lambda_ret * l_con(z_ret, t_ret, batch.n_pairs)
    for domain, mapper in (mappers or {}).items():                        # LDFS's ẑ^k, of arf+ldfs
        losses[f"L_cl {domain}"] = l_con(mapper(z), t, n)
    return losses


def dive_losses(strategy, batch, preserve="dive", lambda_dive=1000.0):
    """Return the terms λ L_avl and λ L_pvl that DiVE adds to L_cl, by name; of SnD, λ mean ‖u‖².

    They take the retrieved pairs of ARF. Source: DiVE (arXiv 2511.09973), see `average_vector`.
    CHOICE: m ← 0.99 m + 0.01 · mean of u and v, with equal weights, and without a gradient through
    m; alternative: weights by modality.
    CHOICE: pairs like the source's images; alternative: random pairs of the pool.
    CHOICE: λ = 1000, as published for all its data sets, unless a data set's description has one
    chosen on the source's validation part; alternative: --lambda-dive.
    """
    clip, pretrained, n = strategy.clip, strategy.pretrained, batch.n_pairs
    with torch.no_grad():
        z_0 = pretrained.encode_image(batch.pool_images)                                    # (b, d)
        t_0 = pretrained.encode_text(batch.pool_texts)
    u = all_gather_with_grad(clip.encode_image(batch.pool_images) - z_0, n)                 # (B, d)
    if preserve == "snd":
        return {"L_snd": lambda_dive * u.square().sum(-1).mean()}
    v = all_gather_with_grad(clip.encode_text(batch.pool_texts) - t_0, n)
    m = strategy.mean_vector.lerp_(torch.cat([u, v]).detach().mean(0), 0.01)                  # (d,)
    return {
        "L_avl": lambda_dive * average_vector(u, v, m),
        "L_pvl": lambda_dive * pairwise_vector(u, v),
    }


def encode_concat(encode, *parts):
    """Return encode(x), (b, d), of each part (b, …) or None, in one forward pass of a tower."""
    given = [x for x in parts if x is not None]
    features = iter(encode(torch.cat(given)).split([len(x) for x in given]))
    return [None if x is None else next(features) for x in parts]


# -------------------------------------------------------------------------------------------------
# The loop


def train(strategy, method, batches, steps_per_epoch, schedule, partial, lambda_cap=1.0,
          lambda_ret=1.0, lambda_dive=1000.0):
    """Train a Strategy and return its history: [{each loss term's mean, "lr": …} of an epoch].

    batches: function start_epoch -> iterator of the Batch of each step from there on. partial: path
    of the state after an epoch, from which a killed run goes on. Raises FloatingPointError if a
    loss or a weight is not finite.
    """
    parameters = [p for p in strategy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, schedule.lr, weight_decay=schedule.weight_decay, fused=True
    )
    start_epoch, history = load_partial(partial, strategy, optimizer)
    total = schedule.epochs * steps_per_epoch
    bar = progress_bar(
        total=total, initial=start_epoch * steps_per_epoch, leave=False,
        desc=partial.name.removesuffix(".partial.pt"),
    )

    stream, stored = batches(start_epoch), time.monotonic()
    for epoch in range(start_epoch, schedule.epochs):
        sums = 0
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            batch = next(stream)
            if method.contrastive:
                losses = arf_losses(
                    strategy.clip, batch, strategy.mappers, lambda_cap, lambda_ret, method.retrieved
                )
                if method.preserve:
                    losses |= dive_losses(strategy, batch, method.preserve, lambda_dive)
            else:
                losses = ldfs_losses(strategy, batch)
            loss = sum(losses.values())

            optimizer.zero_grad()
            loss.backward()
            average_gradients(parameters)
            if schedule.max_norm:
                nn.utils.clip_grad_norm_(parameters, schedule.max_norm)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total, schedule)
            optimizer.step()
            strategy.after_step()

            sums = sums + torch.stack([*losses.values()]).detach()
            if step % 10 == 0:  # not each step, because reading a value waits for the device
                show_losses(bar, losses, step)
            bar.update()
        show_losses(bar, losses, step)
        if not torch.stack([p.isfinite().all() for p in parameters]).all():
            raise FloatingPointError(f"a weight is not finite after step {step}")
        means = (sums / steps_per_epoch).tolist()
        history.append({**dict(zip(losses, means)), "lr": lr_at(step, total, schedule)})
        due = time.monotonic() - stored >= SECONDS_BETWEEN_STATES
        if strategy.slow and due and epoch + 1 < schedule.epochs:
            save_partial(partial, strategy, optimizer, epoch + 1, history)
            stored = time.monotonic()

    bar.close()
    strategy.finish()
    return history


def show_losses(bar, losses, step):
    """Show the loss terms beside the bar; raise FloatingPointError if one is not finite."""
    values = {name: loss.item() for name, loss in losses.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} at step {step}")
    bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)


def lr_at(step, steps, schedule):
    """Return the learning rate at `step` of `steps`: linear warm-up, then a cosine to 0."""
    warmup_steps = max(1, round(schedule.warmup * steps))
    if step < warmup_steps:
        return schedule.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * progress))


def save_partial(path, strategy, optimizer, epoch, history):
    """Store the state after an epoch, on rank 0."""
    if rank_and_world()[0] == 0:
        state = {"modules": strategy.state_dict(), "optimizer": optimizer.state_dict()}
        save({**state, "epoch": epoch, "history": history}, path)


def load_partial(path, strategy, optimizer):
    """Return (first epoch, history), and load the stored state if there is one."""
    if not agree(path.exists()):
        return 0, []
    state = load(path, strategy.clip.device)
    strategy.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"], state["history"]


# -------------------------------------------------------------------------------------------------
# Load or train


def head_start(settings, method):
    """Return how the head starts: "text" or "scratch".

    CHOICE: a linear probe starts at random, as probes do; a tower's head, and the probe of LP-FT,
    start as the class prompts, as in WiSE-FT, because the gradients of a random head would damage
    the tower; alternative: --init.
    """
    return settings.init or ("scratch" if method.train in FROZEN_TOWERS else "text")


def checkpoint_path(settings, dataset, clip, name, seed, method=None, init=None):
    """Return where a method's checkpoint is stored; the hash in its name covers all its inputs.

    method, init: of the probe of LP-FT; otherwise those of `name`.
    """
    source, method = settings.source, method or settings.methods[name]
    items = dataset.split(source, source, "train", seed)
    classnames, templates = data.prompt_templates(dataset, source)
    inputs = [
        asdict(method), seed, asdict(settings.schedules[method.train]), clip.key, stamps(items),
        [template(name) for template in templates for name in classnames],
        data.class_texts(dataset, source), dataset.meta.phrases[source],
    ]
    for option in ("unlocked_groups", "lock_text", *LAMBDAS):
        if option_matters(option, method):
            inputs.append((option, getattr(settings, option)))
    if option_matters("init", method):
        inputs.append(init or head_start(settings, method))
    if method.needs_captions:
        anchors.caption_source(settings, dataset)
    if method.captions:
        inputs.append(data.all_captions(dataset, items))
    if method.needs_pairs:
        pairs = anchors.pairs_of(settings, dataset, clip, items)
        texts = [text for _, text in pairs]
        inputs += [stamps([(at, 0) for at, _ in pairs]), texts]
    if method.recipe:
        inputs += synthesiser_keys(settings, dataset, clip, method.recipe, seed)
    if method.train == "lpft":
        probe, init = probe_of(settings, method)
        path = checkpoint_path(settings, dataset, clip, f"{name}-probe", seed, probe, init)
        inputs.append(path.name)
    return artifact_path(settings.run / "checkpoints", f"{name}-seed{seed}", inputs)


def history_path(checkpoint):
    """Return where the history of a checkpoint's losses is stored, for `report.figures`."""
    return checkpoint.with_suffix(".json")


def probe_of(settings, method):
    """Return (Method, init) of the probe that LP-FT trains first (arXiv 2202.10054)."""
    return replace(method, train="linear"), head_start(settings, method)


def synthesiser_keys(settings, dataset, clip, recipe_name, seed):
    """Return the file names of a recipe's mappers: their hashes cover all that decides them."""
    targets = dataset.styles(settings.source)
    if recipe_name == "clipstyler":
        paths = [style_path(settings, dataset, clip, domain, seed) for domain in targets]
    else:
        paths = [
            mapper_path(settings, dataset, clip, recipe_name, domain, seed) for domain in targets
        ]
    return [path.name for path in paths]


def load_synthesisers(settings, dataset, clip, recipe_name, seed, items):
    """Return {target: module from z to ẑ, both (N, d), of the source's `items`}, frozen."""
    if recipe_name == "clipstyler":
        return load_styled_features(settings, dataset, clip, seed, items)
    return load_mappers(settings, dataset, clip, recipe_name, seed)


def finetune(settings, dataset, clip, name, seed, method=None, init=None):
    """Train a method with a seed unless that is done, and return the path of its checkpoint.

    It contains {"modules": weights, "base", "weights", "model", "classes"}; the history of the
    losses is beside it. `clip` has its original weights again afterwards. method, init: as in
    `checkpoint_path`.
    """
    path = checkpoint_path(settings, dataset, clip, name, seed, method, init)
    partial = path.with_suffix(".partial.pt")
    if not agree(path.exists() and history_path(path).exists()):
        clip.reset()
        method = method or settings.methods[name]
        init = init or head_start(settings, method)
        items = dataset.split(settings.source, settings.source, "train", seed)
        strategy, batches = prepare(settings, dataset, clip, name, seed, method, init, items)
        # after `prepare`, which trains LP-FT's probe
        clip.micro_batch = settings.micro_batches.get(name, settings.micro_batch)
        if not any(p.requires_grad for p in strategy.parameters()):
            fail(f"{name}: --unlocked-groups and --lock-text leave nothing of it to train.")
        schedule = settings.schedules[method.train]
        steps_per_epoch = math.ceil(len(items) / schedule.batch_size)
        lambdas = {name: getattr(settings, name) for name in LAMBDAS}
        try:
            history = train(
                strategy, method, batches, steps_per_epoch, schedule, partial, **lambdas
            )
        except FloatingPointError as error:
            fail(f"{name}, seed {seed}: {error}. Try a lower --lr; finished runs are kept.")
        if rank_and_world()[0] == 0:
            origin = {"base": clip.base, "weights": clip.weights, "model": clip.name}
            save(history, history_path(path))
            save({"modules": strategy.state_dict(), **origin, "classes": dataset.classes}, path)
        barrier()
        clip.reset()
    if rank_and_world()[0] == 0:
        partial.unlink(missing_ok=True)
    return path


def prepare(settings, dataset, clip, name, seed, method, init, items):
    """Return (Strategy, function start_epoch -> batches) of a method, with all that they need."""
    source, schedule = settings.source, settings.schedules[method.train]
    mappers = {}
    if method.recipe:
        mappers = load_synthesisers(settings, dataset, clip, method.recipe, seed, items)
    captions = data.all_captions(dataset, items) if method.captions else ()
    pairs = anchors.pairs_of(settings, dataset, clip, items) if method.needs_pairs else ()
    z_all = None
    if method.train in FROZEN_TOWERS:  # z, ẑ^1 … ẑ^K stay the same, so they are computed once
        z = cached_features(clip, dataset, source, items, settings.cache).to(clip.device)
        z_all = torch.stack([z, *(mapper(z) for mapper in mappers.values())])       # (K + 1, N, d)

    classnames, templates = data.prompt_templates(dataset, source)
    class_text = zero_shot_head(clip, classnames, templates)                                # (C, d)
    generator = torch.Generator().manual_seed(seed)
    scratch = torch.randn(class_text.shape, generator=generator) / class_text.shape[1] ** 0.5
    head_init = class_text if init == "text" else scratch                # rows of about unit norm
    if method.train == "linear":
        strategy = LinearProbe(clip, head_init, mappers)
    elif method.train in PROMPTS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of CoCoOp's meta-net and MaPLe's couplings
            phrase = dataset.meta.phrases[source]
            strategy = PROMPTS[method.train](clip, classnames, phrase, mappers, generator)
    elif method.train == "full":
        strategy = FullFinetuning(clip, head_init, mappers, settings.unlocked_groups)
    elif method.train == "lpft":
        probe, start = probe_of(settings, method)
        path = finetune(settings, dataset, clip, f"{name}-probe", seed, probe, start)
        head_init = load(path, "cpu")["modules"]["head.weight"]
        strategy = FullFinetuning(clip, head_init, mappers, settings.unlocked_groups)
    elif method.train == "clipood":
        steps = schedule.epochs * math.ceil(len(items) / schedule.batch_size)
        strategy = CLIPood(clip, class_text, steps, mappers, settings.unlocked_groups)
    else:
        tokens = clip.tokenizer(data.class_texts(dataset, source))                          # (C, L)
        locks = settings.unlocked_groups, settings.lock_text
        d = class_text.shape[1] if method.preserve else None
        strategy = BothTowers(clip, tokens, mappers, *locks, d=d)
    batches = training_batches(
        clip, dataset, source, items, schedule, seed, method, z_all, captions, pairs
    )
    return strategy, batches


def choose_micro_batches(settings, dataset, clip):
    """Return {method: rows that a tower encodes at a time}: on a GPU as many as fit, None if all.

    A method that is not in it takes --micro-batch.
    """
    methods = {k: m for k, m in settings.methods.items() if m.train not in FROZEN_TOWERS}
    if settings.micro_batch or clip.device.type != "cuda" or not methods:
        return {}
    try:
        image_bytes, text_bytes = measure_rows(settings, dataset, clip)
    except RuntimeError as error:  # of an allocator that keeps no statistics
        warn(f"the free memory is not known ({one_line(error)}); --micro-batch sets what to use")
        return {}
    n_parameters = sum(p.numel() for p in clip.model.parameters())
    sizes = {}
    for name, method in methods.items():
        rows = math.ceil(settings.schedules[method.train].batch_size / rank_and_world()[1])
        images = rows * (1 + method.needs_pairs)
        if method.contrastive:
            texts = rows * (1 + method.captions + method.needs_pairs)
        else:  # the prompts of all classes
            texts = len(dataset.classes) if method.train in ("maple", "towers") else 0
        has_copy = method.preserve is not None or method.train == "clipood"
        states = 4 * n_parameters * (3 + has_copy)  # gradients, AdamW
        free = free_bytes() - states
        size = fitting_micro_batch(images, texts, image_bytes, text_bytes, free)
        sizes[name] = agree(size and min(size, rows))
        if sizes[name]:
            main_print(f"{name}: micro-batch {sizes[name]}, because the whole batch does not fit")
    return sizes


def measure_rows(settings, dataset, clip):
    """Return the bytes that an image and a text take in training, on a GPU."""
    clip.micro_batch = None  # not that of a method that was trained before
    clip.model.requires_grad_()
    image = clip.augment(torch.zeros(3, 256, 256, dtype=torch.uint8))[None].to(clip.device)
    text = clip.tokenizer(data.class_texts(dataset, settings.source)[:1]).to(clip.device)
    try:
        image_bytes = bytes_per_row(clip.encode_image, image)
        # not Clip.encode_text, which encodes equal texts once
        text_bytes = bytes_per_row(lambda rows: clip.encode(clip.model.encode_text, rows), text)
        return image_bytes, text_bytes
    finally:
        clip.reset()


def finetune_all(settings, dataset, clip):
    """Train every method with every seed; what is stored is not trained again."""
    settings.micro_batches = choose_micro_batches(settings, dataset, clip)
    jobs = [(seed, name) for seed in range(settings.seeds) for name in settings.methods]
    for seed, name in (bar := progress_bar(jobs, desc="finetuning", unit="run")):
        bar.set_postfix_str(f"{name}, seed {seed}")
        try:
            finetune(settings, dataset, clip, name, seed)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fail(out_of_memory(settings, clip, name))


def out_of_memory(settings, clip, name):
    """Return one line that names a remedy."""
    train = settings.methods[name].train
    size = settings.schedules[train].batch_size
    rows = -(-size // rank_and_world()[1])  # of this rank
    micro = min(clip.micro_batch or rows, rows) // 4
    smaller = micro and train != "linear"
    remedy = f"--micro-batch {micro}" if smaller else "a smaller --batch-size"
    return f"{name}: out of memory at batch size {size}. Pass {remedy}; finished runs are kept."


def main():
    settings, dataset = load_run(parse(__doc__, stage="finetune"))
    clip = load_clip(settings)
    main_print(describe_run(settings, dataset, clip.device))
    finetune_all(settings, dataset, clip)
    leave()


if __name__ == "__main__":
    main()
