"""Prompt learners: learned vectors in place of words; CLIP itself stays as it is.

Their forward is a step's loss, as that of all Learners of strategies.py. evaluate.py takes their
`classifier`, which names classes that were never seen, too.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from features import autocast
from strategies import Learner
from utils import fail


def text_tower(clip):
    """The text tower if it is open_clip's own; exits with status 2 at another's."""
    text = getattr(clip.model, "text", clip.model)
    if not hasattr(text, "token_embedding"):
        fail(f"{clip.name}: its text tower is not open_clip's own, which prompts need.")
    return text


def tokens_of(clip, words):
    """(where words begin: 1 behind a start token, if there is one, else 0; the words' tokens)."""
    alone, behind, before = clip.tokenizer([words, f"X {words}", f"{words} X"])
    first, last = ((alone != other).nonzero()[0].item() for other in (behind, before))
    return first, alone[first:last]


class CoOp(Learner):
    """A learned prompt "V₁ … V_M dog.", of M vectors in place of words.

    Source: CoOp (arXiv 2109.01134), equation 2.
    CHOICE: M = 16, as CoOp's default, or what a short text tower leaves beside eight tokens, the
    same vectors for all classes; alternative: vectors of each class.
    """

    def __init__(self, step, clip, classnames, vectors):
        super().__init__(step, clip)
        self.vectors = nn.Parameter(vectors.to(clip.device))                           # (M, width)
        self.first, self.tokens = tokens_of(clip, "a")[0], self.prompts(classnames)

    @staticmethod
    def start(clip, phrase, generator):
        """What the vectors start as, (M, width)."""
        text = text_tower(clip)
        m = min(16, max(1, text.context_length - 8))
        return 0.02 * torch.randn(m, text.token_embedding.embedding_dim, generator=generator)

    def prompts(self, classnames):
        """(C, L) tokens, of which those of X give way to V."""
        return self.clip.tokenizer([f"{'X ' * len(self.vectors)}{name}." for name in classnames])

    def encode(self, vectors, tokens):
        """t: (N, d), unit norm, of prompts (N, L), with vectors (M, width) or (N, M, width)."""
        first, last = self.first, self.first + vectors.shape[-2]
        # a causal tower does not look behind the end of a text: what is padding in all is left out
        end = (tokens != tokens[:, -1:]).any(0).nonzero().max().item() + 2

        def put(module, args, embedded):  # (N, L, width): start, V₁ … V_M, class, end
            words = vectors.expand(len(embedded), -1, -1).to(embedded.dtype)
            return torch.cat([embedded[:, :first], words, embedded[:, last:]], dim=1)

        def crop(module, args, kwargs):
            mask = kwargs.get("attn_mask")
            if mask is not None and mask.ndim == 2:
                return (args[0][:, :end],), {**kwargs, "attn_mask": mask[:end, :end]}

        text = text_tower(self.clip)
        hooks = text.token_embedding.register_forward_hook(put), \
            text.transformer.register_forward_pre_hook(crop, with_kwargs=True)
        try:
            with autocast(self.clip.device):
                t = self.clip.model.encode_text(tokens.to(self.clip.device))
        finally:
            for hook in hooks:
                hook.remove()
        return F.normalize(t.float(), dim=-1)

    def head(self, tokens):
        """(B, d) -> logits (B, C), among classes of these prompts."""
        class_text = self.encode(self.vectors, tokens)                                     # (C, d)
        return lambda x: self.scale * x @ class_text.T

    def forward(self, batch):
        return self.step(batch.z, batch.labels, self.head(self.tokens))

    @torch.no_grad()
    def classifier(self, classnames):
        """(N, d) -> logits (N, C), both on the CPU, among classes of any names."""
        head, rows = self.head(self.prompts(classnames)), max(1, 1000 // len(classnames))

        @torch.no_grad()
        def logits(z):
            return torch.cat([head(x.to(self.clip.device)).cpu() for x in z.split(rows)])

        return logits


class CoCoOp(CoOp):
    """A prompt "V₁ + π(z) … V_M + π(z) dog." of each image; π is a small network, the meta-net.

    Source: CoCoOp (arXiv 2203.05557), section 3.2. A synthesised feature has a prompt of its own.
    CHOICE: V starts as the words of the source, "a photo of a" in the paper, and π as 0, so that
    training starts from zero-shot; alternative: π as PyTorch starts it, as in its public code.
    """

    def __init__(self, step, clip, classnames, vectors):
        super().__init__(step, clip, classnames, vectors)
        dim, width = self.encode(self.vectors, self.tokens[:1]).shape[1], vectors.shape[1]
        layers = nn.Linear(dim, dim // 16), nn.ReLU(), nn.Linear(dim // 16, width)
        self.meta_net = nn.Sequential(*layers).to(clip.device)
        for parameter in self.meta_net[2].parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def start(clip, phrase, generator):
        text = text_tower(clip)
        words = tokens_of(clip, f"{phrase} of a")[1][:max(1, text.context_length - 8)]
        return text.token_embedding(words.to(clip.device)).detach()

    def head(self, tokens):
        def logits(x):  # B · C texts
            vectors = self.vectors + self.meta_net(x)[:, None]                     # (B, M, width)
            each = vectors.repeat_interleave(len(tokens), dim=0)                # (B · C, M, width)
            class_text = self.encode(each, tokens.repeat(len(x), 1)).view(len(x), len(tokens), -1)
            return self.scale * torch.einsum("bd,bcd->bc", x, class_text)

        return logits


PROMPTS = {"coop": CoOp, "cocoop": CoCoOp}
