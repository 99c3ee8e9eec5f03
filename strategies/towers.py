"""Strategies that train the image tower, or both towers."""

import copy
import math

import torch

from core.distributed import rows_of_rank, to_device
from core.utils import fail, one_line
from strategies.base import Strategy, linear_layer


def unlock_image_tower(model, unlocked_groups=None):
    """Let the image tower be trained; with unlocked_groups only its last groups of layers."""
    model.visual.requires_grad_()
    if unlocked_groups is None:
        return
    try:
        model.lock_image_tower(unlocked_groups=unlocked_groups)
    except Exception as error:  # towers of open_clip differ: some cannot, some have no such method
        reason = f"{type(model.visual).__name__}: {one_line(error)}"
        fail(f"--unlocked-groups {unlocked_groups}: not possible ({reason}). Leave the flag out.")


class FullFinetuning(Strategy):
    """Image tower and head, WiSE-FT's standard finetuning: logits W z + b, where W starts as s · T.

    head_init: T, (C, d), the class prompts, or a trained probe for LP-FT.
    Source: WiSE-FT (arXiv 2109.01903) and its public code, which keeps the scale inside of W;
    LP-FT (arXiv 2202.10054).
    """

    def __init__(self, clip, head_init, mappers=None, unlocked_groups=None):
        super().__init__(clip, mappers)
        self.head = linear_layer(clip, self.scale * head_init, bias=True)
        self.towers = clip.model
        unlock_image_tower(self.towers, unlocked_groups)

    def head_for(self, batch):
        return self.head


def beta_weights(steps, beta=0.5):
    """Return α_t / Σ α, (T + 1,), the weights of θ_0 … θ_T: α_t ∝ Beta(β, β) at (t + ½) / (T + 1).

    With β = ½ the first and the last parameters have the largest weights.
    Source: CLIPood (arXiv 2302.00864).
    """
    position = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / (steps + 1)
    alpha = (position * (1 - position)) ** (beta - 1)
    return alpha / alpha.sum()


class CLIPood(Strategy):
    """The image tower, by a margin metric softmax over fixed class prompts; the final weights are
    their Beta moving average along training.

    L = CE( s · (S(z, T_c) + λ (1 − S(T_y, T_c)))_c, y ) with the cosine S: the less similar a class
    is to y, the larger its margin. 1 cancels in the softmax, so that the logits here are
    s · (z − λ T_y) · T_c.
    class_text: T, (C, d). steps: T of `beta_weights`, the number of optimizer steps.
    Source: CLIPood (arXiv 2302.00864) and its public code.
    CHOICE: λ = 0.3 and β = 0.5 for every data set, as it has them under a shift of domain;
    alternative: its β = 0.1 for unseen classes, and λ = 0.1 for both at once.
    CHOICE: the augmentation of all our strategies, a crop of 0.9 to 1 of the area; alternative: its
    crop of 0.7 to 1, and a flip.
    """

    def __init__(self, clip, class_text, steps, mappers=None, unlocked_groups=None):
        super().__init__(clip, mappers)
        self.head = linear_layer(clip, class_text).requires_grad_(False)
        self.towers = clip.model
        unlock_image_tower(self.towers, unlocked_groups)
        alpha = beta_weights(steps)
        # the mean of θ_0 … θ_t is updated with θ_t's part of their total weight
        self.weight_of_last = (alpha / alpha.cumsum(0)).tolist()                          # (T + 1,)
        self.average = copy.deepcopy(self.towers.visual).requires_grad_(False)                # θ_0
        self.register_buffer("t", torch.tensor(0))  # on the CPU, so that no step waits for the GPU

    def head_for(self, batch):
        class_text = self.head.weight                                                     # (C, d)
        rows = torch.tensor(rows_of_rank(len(batch.labels)))
        labels = batch.labels[to_device(rows, batch.labels.device)]                         # (b,)
        margin = 0.3 * class_text[labels]                                                 # (b, d)
        return lambda x: self.scale * (x - margin) @ class_text.T

    @torch.no_grad()
    def after_step(self):
        self.t += 1
        means, thetas = self.average.parameters(), self.towers.visual.parameters()
        torch._foreach_lerp_([*means], [*thetas], self.weight_of_last[int(self.t)])

    def finish(self):
        self.towers.visual.load_state_dict(self.average.state_dict())
        self.average = self.t = None  # a checkpoint does not need them


class BothTowers(Strategy):
    """Both towers and the logit scale; the head is what the text tower makes of the class prompts.

    FLYP and ARF train the same parameters by contrastive losses, which do not use the head.
    class_tokens: (C, L), one prompt of each class. lock_text: only the image tower is trained.
    d: width of the features if DiVE's or SnD's losses compare them with those of frozen towers.
    """

    def __init__(self, clip, class_tokens, mappers=None, unlocked_groups=None, lock_text=False,
                 d=None):
        super().__init__(clip, mappers)
        if d is not None:
            self.pretrained = clip.copy()
            self.pretrained.model.requires_grad_(False)
            self.register_buffer("mean_vector", torch.zeros(d, device=clip.device))  # DiVE's m
        self.towers, self.class_tokens = clip.model, class_tokens
        self.towers.requires_grad_(not lock_text)  # the logit scale counts as the text tower's
        unlock_image_tower(self.towers, unlocked_groups)

    def head_for(self, batch):
        scale = self.towers.logit_scale.exp()
        class_text = self.clip.encode_text(self.class_tokens)                             # (C, d)
        return lambda x: scale * x @ class_text.T

    def after_step(self):
        # CHOICE: at most 100, as CLIP was trained; alternative: no limit, as FLYP's public code
        self.towers.logit_scale.data.clamp_(max=math.log(100))
