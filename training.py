"""One training loop, which knows nothing of methods: schedule, checkpoint, resume, processes."""

import math

import torch
import torch.nn as nn
from tqdm import tqdm

from utils import ranks, write_atomically


def fit(learner, batches, steps_per_epoch, schedule, checkpoint, config_hash):
    """Train `learner` (see Learner in finetune.py), or go on from `checkpoint` where its
    `config_hash` is the same.

    batches: epoch -> iterator of what learner(batch) makes a loss of.
    Raises FloatingPointError at
    a loss, or at the end a weight, that is not finite, naming the step.
    """
    parameters = [p for p in learner.parameters() if p.requires_grad]
    weight_decay = schedule.weight_decay
    optimizer = torch.optim.AdamW(parameters, schedule.lr, weight_decay=weight_decay, fused=True)
    step, last = 0, schedule.epochs * steps_per_epoch
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=learner.encoder.device)
        if state["config_hash"] == config_hash:
            learner.load_state_dict(state["modules"])
            step = state["epoch"] * steps_per_epoch
            if step < last:
                optimizer.load_state_dict(state["optimizer"])
    epochs = range(step // steps_per_epoch, schedule.epochs)
    for epoch in tqdm(epochs, checkpoint.stem, unit="epoch", leave=False, disable=ranks()[0] > 0):
        for batch in batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, last, schedule)
            loss = learner(batch)
            if not loss.isfinite():
                loss = loss.item()
                raise FloatingPointError(f"{checkpoint.stem}: the loss is {loss} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            average_gradients(parameters)
            if schedule.max_norm:
                nn.utils.clip_grad_norm_(parameters, schedule.max_norm)
            optimizer.step()
            learner.after_step()
            step += 1
        done = epoch + 1 == schedule.epochs
        if not all(p.isfinite().all() for p in parameters):
            raise FloatingPointError(f"{checkpoint.stem}: not finite after step {step - 1}")
        if done:
            learner.finish()
        if ranks()[0] == 0 and (done or learner.slow):
            state = {"modules": learner.state_dict(), "epoch": epoch + 1}
            state["config_hash"] = config_hash
            clip = learner.encoder
            state |= {"base": clip.base, "fingerprint": clip.fingerprint}
            state["optimizer"] = None if done else optimizer.state_dict()
            write_atomically(checkpoint, lambda part: torch.save(state, part))


def lr_at(step, steps, schedule):
    """Learning rate at `step` of `steps`: up in a line, down in a cosine to 0."""
    warm = max(1, round(schedule.warmup * steps))
    if step < warm:
        return schedule.lr * (step + 1) / warm
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# -------------------------------------------------------------------------------------------------
# Several processes (torchrun), in the open


def gathered(x):
    """The rows (B, d) of all processes, (world · B, d), with gradients to each one's own."""
    return torch.cat(torch.distributed.nn.functional.all_gather(x)) if ranks()[1] > 1 else x


def average_gradients(parameters):
    """What DistributedDataParallel does: the mean over processes of each gradient."""
    if ranks()[1] > 1:
        for p in parameters:
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
                p.grad /= ranks()[1]
