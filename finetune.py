"""Finetune CLIP on the source domain: LDFS's step 2, FLYP, ARF. Their steps, and one run.

    python finetune.py pacs photo --methods finetune lads ldfs                  # linear heads
    python finetune.py pacs photo --paper arf --methods finetune flyp arf arf+ldfs    # towers
    torchrun --nproc-per-node 8 -- finetune.py …       # the batch is split over eight GPUs

No image of a target domain is read here, and no result chooses anything: the last step is what is
kept. Checkpoints go to runs/…/checkpoints/; a killed run goes on after its last finished epoch.
"""

import math
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from anchors import load_retrieved
from batches import batches_of
from config import parse
from distributed import leave, ranks
from features import cached_features, load_clip, stamps, zero_shot_head
from losses import clip_contrastive
from mapper import load_mapper, load_styled
from methods import CACHED
from prompts import PROMPTS
from strategies import CLIPood, Contrastive, Full, Linear, Towers
from training import fit, gathered
from utils import fail, short_hash

# -------------------------------------------------------------------------------------------------
# The papers' steps


def ce_step(features, labels, head):
    """L_2 = L_con(z, y) + Σ_k L_con(ẑ^k, y), LDFS's step 2; of [z] alone it is plain finetuning.

    features: [z, ẑ^1 … ẑ^K], each (B, d) unit norm. labels: (B,). head: (B, d) -> logits (B, C),
    s · W z. LDFS's L_con is cross-entropy, ARF's (below) is CLIP's contrastive loss.
    Source: LDFS, figure 2, step 2.
    CHOICE: every domain weighs as much as the original, as in LADS's union of features;
    alternative: the mean over domains.
    """
    return sum(F.cross_entropy(head(x), labels) for x in features)


def contrastive_step(clip, batch, mappers=(), lambda_cap=1.0, lambda_ret=1.0):
    """L = L_cl + λ_cap L_cap + λ_ret L_ret, ARF; L_cl alone is FLYP.

    Source: ARF, figure 2; FLYP (arXiv 2212.00638).
    CHOICE: λ_cap = λ_ret = 1; alternative: --lambda-cap, --lambda-ret.
    CHOICE: a synthesised feature is contrasted with the prompts in the source's words, as in
    LDFS's L_2; alternative: in the words of its domain.
    """

    def l_con(image, text):  # over the pairs (B, d) of all processes
        return clip_contrastive(gathered(image), gathered(text), clip.model.logit_scale.exp())

    z, t = clip.encode_image(batch.images), clip.encode_text(batch.prompts)                # (B, d)
    loss = l_con(z, t)                                                              # L_cl, FLYP's
    if batch.captions is not None:                               # TCAG: the image is encoded once
        loss = loss + lambda_cap * l_con(z, clip.encode_text(batch.captions))
    if batch.retrieved is not None:                                                          # ITAR
        images, texts = batch.retrieved                                            # B pairs as well
        loss = loss + lambda_ret * l_con(clip.encode_image(images), clip.encode_text(texts))
    for mapper in mappers:                                               # LDFS's ẑ^k, if asked for
        loss = loss + l_con(mapper(z), t)
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
    mappers, styled = [], []  # of each target: M_k; or, of CLIPstyler's images, the features
    for domain in dataset.styles(config.source) if method.recipe else ():
        if method.recipe == "clipstyler":
            styled.append(load_styled(config, dataset, clip, domain, seed, items))
        else:
            mappers.append(load_mapper(
                config, method.recipe, domain, seed, clip.fingerprint, clip.device
            ))
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
        z = cached_features(clip, dataset, config.source, config.run)(items).to(clip.device)
        z_all = torch.stack([z, *(mapper(z) for mapper in mappers), *styled])
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
    # what goes in, not what is computed from it, which differs in the last bits between machines
    config_hash = short_hash(
        config.id, asdict(method), seed, init, clip.fingerprint, stamps(items), captions,
        [stamp[1:] for stamp in stamps(retrieved)],  # wherever the pool lies
        [p for mapper in mappers for p in mapper.parameters()] + styled, classnames,
        [template(classnames[0]) for template in templates],
        data.class_texts(dataset, config.source),
    )
    path = checkpoint_path(config, name, seed)
    batches = batches_of(clip, dataset, config, method, seed, items, z_all, captions, retrieved)
    fit(learner, batches, steps_per_epoch, schedule, path, config_hash)
    return learner


def main():
    config, dataset = parse(__doc__)
    rank, world = ranks()
    small = min(config.schedules[m.train].batch_size for m in config.methods.values())
    if small < world:
        fail(f"--batch-size {small} is less than the {world} processes. Say a larger one.")
    clip = load_clip(config)
    original = {k: v.clone() for k, v in clip.model.state_dict().items()}
    jobs = [(seed, name) for seed in range(config.seeds) for name in config.methods]
    for seed, name in (bar := tqdm(jobs, desc="finetuning", unit="run", disable=rank > 0)):
        bar.set_postfix_str(f"{name}, seed {seed}")
        clip.model.load_state_dict(original)
        try:
            finetune(clip, dataset, config, name, config.methods[name], seed)
        except FloatingPointError as error:
            fail(f"{error}. Try a lower --lr; what is finished is kept.")
    leave()


if __name__ == "__main__":
    main()
