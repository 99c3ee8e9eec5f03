"""LADS's mappers as published (Dunlap et al., ICLR 2023), the baseline of LDFS.

mapper.py trains them where --methods has lads; global, LADS's idea under LDFS's schedule, is a
recipe of methods.py.
"""

import torch
import torch.nn.functional as F

from losses import local_adaptation
from mapper import each, frozen, new_mappers


def lads_loss(mapper, z, labels, text_source, text_target, class_text, class_weight):
    """L = ½ [ 1 − cos( M(z) − z, Δt ) ] + ½ CE( norm(M(z)) · Tᵀ, y ), LADS's mapper as published.

    The direction is that of the network's unnormalised output; class_weight: (C,), of the classes.
    Source: LADS (Dunlap et al., ICLR 2023) and its public code.
    """
    output = mapper(z, unit=False)                                                         # (B, d)
    direction = local_adaptation(z, output, text_source, text_target)
    logits = F.normalize(output, dim=-1) @ class_text.T                                    # (B, C)
    return (direction + F.cross_entropy(logits, labels, class_weight)) / 2


def train_lads(train, val, class_text, seed=0, epochs=50, batch_size=256):
    """Train LADS's mappers as its public code does: of 50 epochs at a constant rate the best stays.

    train, val: (z, labels, text_source, text_targets), as in `train_mappers`, as is what it
    returns; the best is by val, or by train where there is none. lr and weight decay: LADS
    searches; these are its base's.
    """
    (n, dim), device = train[0].shape, train[0].device
    mapper, weights = new_mappers(len(train[-1]), dim, seed, device)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(weights.values(), lr=0.005, weight_decay=0.05, eps=1e-6)
    class_weight = 1 / train[1].bincount(minlength=len(class_text)).clamp(min=1)
    kept, best = {name: w.detach().clone() for name, w in weights.items()}, float("inf")

    def losses(z, labels, text_source, text_targets):                                      # -> (K,)
        return each(mapper, weights, text_targets, lambda m, t_k: lads_loss(
            m, z, labels, text_source, t_k, class_text, class_weight
        ))

    for _ in range(epochs):
        order = torch.randperm(n, generator=generator, device=device)
        for i in order.split(batch_size):
            loss = losses(*(x[i] for x in train[:3]), train[-1][:, i]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            loss = losses(*(val if len(val[0]) else train))
        better = loss < best
        best = loss.where(better, best)
        for name, w in weights.items():
            kept[name][better] = w.detach()[better]
    if not best.isfinite().all():
        raise FloatingPointError("the loss was never finite")
    return frozen(kept)
