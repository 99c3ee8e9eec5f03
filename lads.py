"""LADS's mappers as published (Dunlap et al., ICLR 2023), the baseline of LDFS.

mapper.py trains them where --methods has lads; global, LADS's idea under LDFS's schedule, is a
recipe of methods.py.
"""

import torch
import torch.nn.functional as F

from losses import local_adaptation
from mapper import frozen, new_mappers, target_losses


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

    train, val: (z, labels, text_source, text_targets), and what it returns: see `train_mappers`.
    The best is each target's own, by val, or by train where there is none. lr and weight decay:
    LADS searches; these are its base's. Raises FloatingPointError if no epoch's loss is finite.
    """
    z, labels, text_source, text_targets = train
    (n, dim), device = z.shape, z.device
    mapper, weights = new_mappers(len(text_targets), dim, seed, device)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(weights.values(), lr=0.005, weight_decay=0.05, eps=1e-6)
    class_weight = 1 / labels.bincount(minlength=len(class_text)).clamp(min=1)
    best = [(float("inf"), None) for _ in text_targets]  # loss and mapper
    *judged, judged_targets = val if len(val[0]) else train
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator, device=device)
        for i in order.split(batch_size):
            some = torch.stack([t[i] for t in text_targets])
            loss = target_losses(mapper, weights, some, lambda m, t_k: lads_loss(
                m, z[i], labels[i], text_source[i], t_k, class_text, class_weight
            )).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # one by one: all images of all targets at once may be too many
        for k, (m, t_k) in enumerate(zip(frozen(weights), judged_targets)):
            loss = lads_loss(m, *judged, t_k, class_text, class_weight).item()
            if loss < best[k][0]:
                best[k] = loss, m
    if any(m is None for _, m in best):
        raise FloatingPointError("the loss was never finite")
    return [m for _, m in best]
