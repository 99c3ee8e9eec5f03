"""What is trained, under the names of methods.TRAINED: modules whose state is the checkpoint, and
whose forward is a step's loss.

Synthesised features enter in one of two ways. Where the image tower is frozen (linear, coop,
cocoop), they are made once and appended to the originals: batch.z is [z, ẑ^1 … ẑ^K]. Where it moves
(full, lpft, clipood, maple, towers), `synthesise` sends the current z through the frozen mappers.
Either way a step takes [z, ẑ^1 … ẑ^K]. coop, cocoop and maple are in prompts.py.
"""

import math

import torch
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel

import data
from distributed import share


class Learner(nn.Module):
    """Trains what wants a gradient, by `step`: `ce_step` of finetune.py, or `contrastive_step`.

    evaluate.py classifies with its `head`, (C, d), if there is one, else, and among classes that a
    head does not have, by class prompts.
    """

    slow = True  # worth a checkpoint after each epoch

    def __init__(self, step, clip, mappers=()):
        super().__init__()
        self.step, self.clip, self.mappers = step, clip, tuple(mappers)
        self.scale = clip.logit_scale

    def synthesise(self, z):
        """[z, ẑ^1 … ẑ^K], each (b, d).

        CHOICE: where the tower is trained, M_k takes the current z, and passes its gradient on, so
        that ẑ stays a synthesis of this z; alternative: ẑ of the original z, which the tower
        leaves.
        """
        return [z, *(mapper(z) for mapper in self.mappers)]

    def after_step(self):
        pass

    def finish(self):
        """What is left to do after the last step."""


def new_head(clip, start, bias=False):
    """A linear layer whose weight starts as `start`, (C, d)."""
    head = nn.Linear(start.shape[1], len(start), bias=bias, device=clip.device)
    head.weight.data.copy_(start)
    return head


def unlock(module, model, groups):
    """Let `module` be trained; of the image tower only the last `groups` of layers, if given."""
    module.requires_grad_()
    if groups is not None:
        model.lock_image_tower(unlocked_groups=groups)


# -------------------------------------------------------------------------------------------------
# On features that stay


class Linear(Learner):
    """A linear probe W: logits s · W z.

    CHOICE: one probe for all rivals, without bias or class weights, the last epoch; alternative:
    LADS's own, with a bias, no scale, weighted classes and the best epoch by validation.
    """

    slow = False

    def __init__(self, step, clip, start):
        super().__init__(step, clip)
        self.head = new_head(clip, start)

    def forward(self, batch):
        weight = self.head.weight
        return self.step(batch.z, batch.labels, lambda x: self.scale * x @ weight.T)


# -------------------------------------------------------------------------------------------------
# The image tower, or both


class Full(Learner):
    """Image tower and head, WiSE-FT's standard finetuning: logits W z + b, where W starts as s · T.

    Source: WiSE-FT (arXiv 2109.01903) and its public code: the scale is inside of the parameter.
    """

    def __init__(self, step, clip, start, mappers, unlocked_groups):
        super().__init__(step, clip, mappers)
        self.head = new_head(clip, clip.logit_scale * start, bias=True)
        self.head.bias.data.zero_()
        self.towers = clip.model
        unlock(self.towers.visual, self.towers, unlocked_groups)

    def forward(self, batch):
        z = self.clip.encode_image(batch.images)                                           # (b, d)
        return self.step(self.synthesise(z), batch.labels, self.head)


def beta_weights(steps, beta=0.5):
    """α_t / Σ α of the weights θ_0 … θ_T, (T + 1,): α_t ∝ Beta(β, β) at (t + ½) / (T + 1).

    Source: CLIPood (arXiv 2302.00864); with its β = ½ the first and the last weigh most.
    """
    at = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / (steps + 1)
    alpha = (at * (1 - at)) ** (beta - 1)
    return alpha / alpha.sum()


class CLIPood(Learner):
    """The image tower, by a margin metric softmax over class prompts that stay; what is kept is a
    Beta moving average of its weights.

    L = CE( s · (S(z, T_c) + λ (1 − S(T_y, T_c)))_c, y ), S the cosine, λ = 0.3: the less a class is
    like y, the farther from it. 1 cancels in the softmax, so that this is s · (z − λ T_y) · T_c.
    Source: CLIPood (arXiv 2302.00864) and its public code.
    """

    def __init__(self, step, clip, class_text, mappers, unlocked_groups, steps):
        super().__init__(step, clip, mappers)
        self.head = new_head(clip, class_text).requires_grad_(False)                    # T, (C, d)
        self.towers = clip.model
        unlock(self.towers.visual, self.towers, unlocked_groups)
        alpha = beta_weights(steps)
        weight_of = (alpha / alpha.cumsum(0)).float().to(clip.device)   # of θ_t among θ_0 … θ_t
        self.average = AveragedModel(
            self.towers.visual, avg_fn=lambda mean, theta, t: mean.lerp(theta, weight_of[t])
        ).requires_grad_(False)
        self.after_step()                                                                  # θ_0

    def forward(self, batch):
        z, class_text = self.clip.encode_image(batch.images), self.head.weight     # (b, d), (C, d)
        margin = 0.3 * class_text[batch.labels[share(len(batch.labels))]]                  # (b, d)
        features = self.synthesise(z)
        return self.step(features, batch.labels, lambda x: self.scale * (x - margin) @ class_text.T)

    def after_step(self):
        self.average.update_parameters(self.towers.visual)

    def finish(self):
        self.towers.visual.load_state_dict(self.average.module.state_dict())


class Towers(Learner):
    """Both towers and the logit scale, by cross-entropy: the head is what the text tower says."""

    def __init__(self, step, clip, mappers, config, dataset):
        super().__init__(step, clip, mappers)
        self.towers, self.config = clip.model, config
        self.class_tokens = clip.tokenizer(data.class_texts(dataset, config.source))       # (C, L)
        unlock(self.towers, self.towers, config.unlocked_groups)
        for name, parameter in self.towers.named_parameters():
            if config.lock_text and not name.startswith("visual."):
                parameter.requires_grad_(False)

    def forward(self, batch):
        z, scale = self.clip.encode_image(batch.images), self.towers.logit_scale.exp()     # (b, d)
        class_text = self.clip.encode_text(self.class_tokens)                              # (C, d)
        features = self.synthesise(z)
        return self.step(features, batch.labels, lambda x: scale * x @ class_text.T)

    def after_step(self):
        # CHOICE: at most 100, as CLIP was trained; alternative: free, as in FLYP's public code
        self.towers.logit_scale.data.clamp_(max=math.log(100))


class Contrastive(Towers):
    """Likewise, by CLIP's own loss: FLYP, ARF."""

    def forward(self, batch):
        weights = self.config.lambda_cap, self.config.lambda_ret
        return self.step(self.clip, batch, self.mappers, *weights)
