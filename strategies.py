"""What is trained, under the names of methods.TRAINED: modules whose state is the checkpoint, and
whose forward is a step's loss.

Where the image tower stays (linear, coop), synthesised features are made once and stand behind the
original ones: batch.z is [z, ẑ^1 … ẑ^K]. Where it moves (full, lpft, towers), `synthesise` makes
them of the current z, through the frozen mappers. Either way the step takes [z, ẑ^1 … ẑ^K].
"""

import math

import torch
import torch.nn as nn

import data
from utils import fail


class Learner(nn.Module):
    """Trains what wants a gradient, by `step`: `ce_step` of finetune.py, or `contrastive_step`.

    With a `head`, (C, d), evaluate.py classifies; where there is none, with the class prompts.
    """

    slow = True  # worth a checkpoint after each epoch

    def __init__(self, step, clip, mappers=()):
        super().__init__()
        self.step, self.clip, self.mappers = step, clip, tuple(mappers)
        self.scale = clip.logit_scale

    def synthesise(self, z):
        """[z, ẑ^1 … ẑ^K], each (B, d).

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
    """A linear probe W: logits s · W z."""

    slow = False

    def __init__(self, step, clip, start):
        super().__init__(step, clip)
        self.head = new_head(clip, start)

    def forward(self, batch):
        weight = self.head.weight
        return self.step(batch.z, batch.labels, lambda x: self.scale * x @ weight.T)


class CoOp(Learner):
    """A learned prompt "V₁ … V_M dog.".

    Source: CoOp (arXiv 2109.01134), equation 2.
    CHOICE: M = 16, as CoOp's default, or what a short text tower leaves beside eight tokens, the
    same vectors for all classes; alternative: vectors of each class.
    """

    def __init__(self, step, clip, start, classnames, generator):
        super().__init__(step, clip)
        self.head = new_head(clip, start).requires_grad_(False)
        text = getattr(clip.model, "text", clip.model)
        if not hasattr(text, "token_embedding"):
            fail(f"{clip.name}: its text tower is not open_clip's own, which coop needs.")
        m, width = min(16, max(1, text.context_length - 8)), text.token_embedding.embedding_dim
        vectors = 0.02 * torch.randn(m, width, generator=generator)
        self.vectors = nn.Parameter(vectors.to(clip.device))
        # the tokens of X give way to V
        self.tokens = clip.tokenizer([f"{'X ' * m}{name}." for name in classnames])
        self.embedding = (text.token_embedding,)  # in a tuple: it is not this module's to train

    def class_text(self):
        """T: (C, d) text features of the classes, unit norm."""

        def put(module, tokens, embedded):  # (C, L, width): start, V₁ … V_M, class, end
            vectors = self.vectors.expand(len(embedded), -1, -1).to(embedded.dtype)
            return torch.cat([embedded[:, :1], vectors, embedded[:, 1 + vectors.shape[1]:]], dim=1)

        hook = self.embedding[0].register_forward_hook(put)
        try:
            return self.clip.encode_text(self.tokens)
        finally:
            hook.remove()

    def forward(self, batch):
        class_text = self.class_text()
        return self.step(batch.z, batch.labels, lambda x: self.scale * x @ class_text.T)

    def finish(self):
        self.head.weight.data = self.class_text().detach()


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
        z = self.clip.encode_image(batch.images)                                           # (B, d)
        return self.step(self.synthesise(z), batch.labels, self.head)


class Towers(Learner):
    """Both towers and the logit scale, by cross-entropy: the head is what the text tower says."""

    def __init__(self, step, clip, mappers, config, dataset):
        super().__init__(step, clip, mappers)
        self.towers, self.config = clip.model, config
        self.class_tokens = clip.tokenizer(data.class_texts(dataset, config.source))       # (C, L)
        unlock(self.towers, self.towers, config.unlocked_groups)

    def forward(self, batch):
        z, scale = self.clip.encode_image(batch.images), self.towers.logit_scale.exp()     # (B, d)
        class_text = self.clip.encode_text(self.class_tokens)                              # (C, d)
        features = self.synthesise(z)
        return self.step(features, batch.labels, lambda x: scale * x @ class_text.T)

    def after_step(self):
        self.towers.logit_scale.data.clamp_(max=math.log(100))  # as CLIP was trained


class Contrastive(Towers):
    """Likewise, by CLIP's own loss: FLYP, ARF."""

    def forward(self, batch):
        weights = self.config.lambda_cap, self.config.lambda_ret
        return self.step(self.clip, batch, self.mappers, *weights)
