"""The interface of all finetuning strategies, and the simplest of them, the linear probe.

A strategy defines what is trained and how it classifies. The losses are in finetune.py:
cross-entropy of features under `head_for`, or ARF's contrastive losses on the towers.
"""

import torch.nn as nn


class Strategy(nn.Module):
    """Trains those of its parameters that require a gradient; its state dict is the checkpoint.

    mappers: {target domain: frozen module z -> ẑ}. They and `clip` are not in the state dict.
    """

    slow = True  # a killed training goes on from a stored state

    def __init__(self, clip, mappers=None):
        super().__init__()
        self.clip = clip
        self.mappers = dict(mappers or {})
        self.scale = clip.logit_scale  # s

    def encode_image(self, images):
        """Return z: (b, d) unit-norm features of images (b, 3, H, W), with their gradient."""
        return self.clip.encode_image(images)

    def head_for(self, batch):
        """Return the head of this step, a function from features (b, d) to logits (b, C)."""
        raise NotImplementedError

    def after_step(self):
        """Do what follows each optimizer step."""

    def finish(self):
        """Do what follows the last step, before the final checkpoint is written."""


def linear_layer(clip, weight, bias=False):
    """Return a linear layer whose weight starts as `weight`, (C, d), and whose bias starts as 0."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias, device=clip.device)
    layer.weight.data.copy_(weight)
    if bias:
        layer.bias.data.zero_()
    return layer


class LinearProbe(Strategy):
    """A linear head W on features of the frozen tower, with logits s · W z.

    head_init: (C, d), what W starts as.
    CHOICE: the same probe for every rival, without bias or class weights, and its last epoch;
    alternative: LADS's own, with a bias, no scale, weighted classes and the best epoch by
    validation.
    """

    slow = False

    def __init__(self, clip, head_init, mappers=None):
        super().__init__(clip, mappers)
        self.head = linear_layer(clip, head_init)

    def head_for(self, batch):
        weight = self.head.weight                                                        # (C, d)
        return lambda x: self.scale * x @ weight.T
