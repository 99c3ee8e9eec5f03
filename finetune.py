"""Finetune CLIP on the source domain: LDFS's step 2, FLYP, ARF. Their steps, and one run.

    python finetune.py pacs photo --methods finetune lads ldfs                  # linear heads
    python finetune.py pacs photo --paper arf --methods finetune flyp arf arf+ldfs    # towers
    python finetune.py … --micro-batch 16              # the same in less memory
    torchrun --nproc-per-node 8 -- finetune.py …       # … and with a batch split over eight GPUs

No image of a target domain is read here, and no result chooses anything: the last step is what is
kept. Checkpoints go to runs/…/checkpoints/; a killed run goes on after its last finished epoch (a
linear head's, which takes seconds, from its start).
"""

import math
import re
from dataclasses import asdict, replace
from utils import fail, short_hash

import torch
import torch.nn.functional as F

import data
from batches import batches_of, load_retrieved
from config import parse
from distributed import first_alone, gathered, leave, progress, ranks
from features import cached_features, load_clip, stamps, zero_shot_head
from losses import clip_contrastive
from mapper import load_synthesiser
from methods import CACHED
from prompts import PROMPTS
from strategies import CLIPood, Contrastive, Full, Linear, Towers
from training import fit

# -------------------------------------------------------------------------------------------------
# The papers' steps


def ce_step(features, labels, head):
    """L_2 = L_con(z, y) + Σ_k L_con(ẑ^k, y), LDFS's step 2; of [z] alone it is plain finetuning.

    features: [z, ẑ^1 … ẑ^K], each (b, d) unit norm, of this process's share of the batch (one
    process: b = B). labels: (B,). head: (b, d) -> logits (b, C), as s · W z. LDFS's L_con is
    cross-entropy, ARF's (below) is CLIP's contrastive loss.
    Source: LDFS, figure 2, step 2.
    CHOICE: every domain weighs as much as the original, as in LADS's union of features;
    alternative: the mean over domains.
    """
    return sum(F.cross_entropy(gathered(head(x), len(labels)), labels) for x in features)


def together(encode, *parts):
    """encode(x), (b, d), of each x (b, …) or None among `parts`, all in one forward of a tower."""
    there = [x for x in parts if x is not None]
    features = iter(encode(torch.cat(there)).split([len(x) for x in there]))
    return [None if x is None else next(features) for x in parts]


def contrastive_step(clip, batch, mappers=(), lambda_cap=1.0, lambda_ret=1.0):
    """L = L_cl + λ_cap L_cap + λ_ret L_ret, ARF; L_cl alone is FLYP.

    Source: ARF, figure 2; FLYP (arXiv 2212.00638).
    CHOICE: λ_cap = λ_ret = 1; alternative: --lambda-cap, --lambda-ret.
    CHOICE: a synthesised feature is contrasted with the prompts in the source's words, as in
    LDFS's L_2; alternative: in the words of its domain.
    """

    def l_con(image, text, n):  # (b, d) each, over the n pairs of all processes
        image, text = gathered(image, n), gathered(text, n)
        return clip_contrastive(image, text, clip.model.logit_scale.exp())

    n, (images, texts, pairs) = len(batch.labels), batch.retrieved or (None, None, 0)
    z, z_ret = together(clip.encode_image, batch.images, images)           # each image once, (b, d)
    t, t_cap, t_ret = together(clip.encode_text, batch.prompts, batch.captions, texts)
    loss = l_con(z, t, n)                                                           # L_cl, FLYP's
    if t_cap is not None:                                                                    # TCAG
        loss = loss + lambda_cap * l_con(z, t_cap, n)
    if t_ret is not None:                                                                    # ITAR
        loss = loss + lambda_ret * l_con(z_ret, t_ret, pairs)
    for mapper in mappers:                                               # LDFS's ẑ^k, if asked for
        loss = loss + l_con(mapper(z), t, n)
    return loss


# -------------------------------------------------------------------------------------------------
# One run: a method and a seed


def checkpoint_path(config, name, seed):
    return config.run / "checkpoints" / f"{name}-seed{seed}-{config.id}.pt"


def finetune(clip, dataset, config, name, method, seed, init=None):
    """Finetune `clip` in place by one method with one seed, or go on; returns the Learner.

    CHOICE: a linear probe starts at random, as probes do; a tower's head, and the probe of LP-FT,
    as the class prompts, as in WiSE-FT, for the gradients of a random head would spoil the tower;
    alternative: --init.
    """
    items = dataset.split(config.source, config.source, "train", seed)
    classnames, templates = data.prompt_templates(dataset, config.source)
    clip.model.requires_grad_(False)
    class_text = zero_shot_head(clip, classnames, templates)                               # (C, d)
    generator = torch.Generator().manual_seed(seed)
    scratch = torch.randn(class_text.shape, generator=generator) / class_text.shape[1] ** 0.5
    init = init or config.init or ("scratch" if method.train in CACHED else "text")
    start = class_text if init == "text" else scratch                  # rows of about unit norm
    mappers = [
        load_synthesiser(config, dataset, clip, method.recipe, domain, seed, items)
        for domain in (dataset.styles(config.source) if method.recipe else ())
    ]
    if method.train == "lpft":  # the probe is trained first: LP-FT (arXiv 2202.10054)
        linear = replace(method, train="linear")
        probe = finetune(clip, dataset, config, f"{name}-probe", linear, seed, init)
        start = probe.head.weight.data
    schedule = config.schedules[method.train]
    steps_per_epoch = math.ceil(len(items) / schedule.batch_size)
    captions = data.captions(dataset, items) if method.captions else ()
    retrieved = load_retrieved(config, dataset, items) if method.retrieved else ()

    z_all = None
    if method.train in CACHED:  # nothing moves: z, ẑ^1 … ẑ^K are made once, (K + 1, N, d)
        z = first_alone(lambda: cached_features(clip, dataset, config.source, config.run))(items)
        z = z.to(clip.device)
        z_all = torch.stack([z, *(mapper(z) for mapper in mappers)])
    if method.train == "linear":
        learner = Linear(ce_step, clip, start)
    elif method.train in PROMPTS:
        kind = PROMPTS[method.train]
        torch.manual_seed(seed)  # of the meta-net's start, the couplings'
        vectors = kind.start(clip, dataset.meta.phrases[config.source], generator)
        learner = kind(ce_step, clip, classnames, vectors, mappers)
    elif method.train in ("full", "lpft"):
        learner = Full(ce_step, clip, start, mappers, config.unlocked_groups)
    elif method.train == "clipood":
        steps = schedule.epochs * steps_per_epoch
        learner = CLIPood(ce_step, clip, class_text, mappers, config.unlocked_groups, steps)
    elif method.contrastive:
        learner = Contrastive(contrastive_step, clip, mappers, config, dataset)
    else:
        learner = Towers(ce_step, clip, mappers, config, dataset)
    if not any(parameter.requires_grad for parameter in learner.parameters()):
        fail(f"{name}: --unlocked-groups and --lock-text leave nothing of it to train.")
    # what goes in, not what is computed from it, which differs in the last bits between machines
    config_hash = short_hash(
        config.id, asdict(method), seed, init, clip.fingerprint, stamps(items), captions,
        [stamp[1:] for stamp in stamps(retrieved)],  # wherever the pool lies
        [p for mapper in mappers for p in mapper.parameters()], classnames,
        [template(classnames[0]) for template in templates],
        data.class_texts(dataset, config.source),
    )
    path = checkpoint_path(config, name, seed)
    batches = batches_of(clip, dataset, config, method, seed, items, z_all, captions, retrieved)
    about = {
        "base": clip.base, "weights": clip.weights, "fingerprint": clip.fingerprint,
        "classes": dataset.classes,
    }
    fit(learner, batches, steps_per_epoch, schedule, path, config_hash, about)
    return learner


def main():
    config, dataset = parse(__doc__)
    world = ranks()[1]
    clip = load_clip(config)
    original = {k: v.clone() for k, v in clip.model.state_dict().items()}
    jobs = [(seed, name) for seed in range(config.seeds) for name in config.methods]
    for seed, name in (bar := progress(jobs, desc="finetuning", unit="run")):
        bar.set_postfix_str(f"{name}, seed {seed}")
        clip.model.load_state_dict(original)
        try:
            finetune(clip, dataset, config, name, config.methods[name], seed)
        except FloatingPointError as error:
            fail(f"{error}. Try a lower --lr; what is finished is kept.")
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; a CPU has no class for it
            if not re.search("out of memory|allocate memory|not enough memory", str(error)):
                raise
            train = config.methods[name].train
            size = config.schedules[train].batch_size
            micro = min(config.micro_batch or size, -(-size // world)) // 4
            micro = 0 if train == "linear" else micro
            remedy = f"--micro-batch {micro}" if micro else "a smaller --batch-size"
            fail(f"{name}: out of memory at batch size {size}. Say {remedy}; the rest is kept.")
    leave()


if __name__ == "__main__":
    main()
