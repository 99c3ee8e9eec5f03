"""One training loop, which knows nothing of methods: schedule, checkpoint, resume, processes."""

import math
from utils import load_whole, undamaged, write_atomically

import torch
import torch.nn as nn

from distributed import average_gradients, progress, ranks


def fit(learner, batches, steps_per_epoch, schedule, checkpoint, config_hash, about):
    """Train `learner` (a Learner of strategies.py), or go on from a checkpoint of one config_hash.

    batches: epoch -> iterator of what learner(batch) makes a loss of. about: a dict, what else the
    checkpoint is to say.
    Raises FloatingPointError at a loss or a weight that is not finite, naming the step.
    """
    parameters = [p for p in learner.parameters() if p.requires_grad]
    weight_decay = schedule.weight_decay
    optimizer = torch.optim.AdamW(parameters, schedule.lr, weight_decay=weight_decay, fused=True)
    first, last = 0, schedule.epochs * steps_per_epoch
    if checkpoint.exists():
        with undamaged(checkpoint, "Remove it, to train anew."):
            state = load_whole(checkpoint, learner.clip.device)
            if state["config_hash"] == config_hash:
                learner.load_state_dict(state["modules"])
                first = state["epoch"]
                if first < schedule.epochs:
                    optimizer.load_state_dict(state["optimizer"])
            del state
    epochs = range(first, schedule.epochs)
    for epoch in progress(epochs, checkpoint.stem, unit="epoch", leave=False):
        for step, batch in enumerate(batches(epoch), epoch * steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, last, schedule)
            loss = learner(batch)
            if not loss.isfinite():
                name = checkpoint.stem
                raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            average_gradients(parameters)
            if schedule.max_norm:
                nn.utils.clip_grad_norm_(parameters, schedule.max_norm)
            optimizer.step()
            learner.after_step()
        done = epoch + 1 == schedule.epochs
        if not all(p.isfinite().all() for p in parameters):
            raise FloatingPointError(f"{checkpoint.stem}: not finite after step {step}")
        if done:
            learner.finish()
        if ranks()[0] == 0 and (done or learner.slow):
            state = {
                **about, "modules": learner.state_dict(), "epoch": epoch + 1,
                "config_hash": config_hash, "optimizer": None if done else optimizer.state_dict(),
            }
            write_atomically(checkpoint, lambda part: torch.save(state, part))


def lr_at(step, steps, schedule):
    """Learning rate at `step` of `steps`: up in a line, down in a cosine to 0."""
    warm = max(1, round(schedule.warmup * steps))
    if step < warm:
        return schedule.lr * (step + 1) / warm
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
