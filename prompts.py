"""Prompt learners: learned vectors in place of words; CLIP's own weights stay as they are.

Their forward is a step's loss, as that of all Learners of strategies.py. evaluate.py takes their
`classifier`, which names classes that were never seen, too, and encodes images while they are
`prompted`. Prompts go in by PyTorch's hooks, which are gone afterwards.
"""

import contextlib
from utils import fail

import torch
import torch.nn as nn

from features import cropped
from strategies import Learner


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


def put(x, context, first):
    """x, (N, L, width), with `context`, (M, width) or (N, M, width), in place of M tokens from
    `first` on; at first = L it is appended.
    """
    context = context.expand(len(x), -1, -1).to(x.dtype)
    return torch.cat([x[:, :first], context, x[:, first + context.shape[1]:]], dim=1)


class CoOp(Learner):
    """A learned prompt "V₁ … V_M dog.", of M vectors in place of words.

    Source: CoOp (arXiv 2109.01134), equation 2.
    CHOICE: M = 16, as CoOp's default, or what a short text tower leaves beside eight tokens, the
    same vectors for all classes; alternative: vectors of each class.
    """

    def __init__(self, step, clip, classnames, vectors, mappers=()):
        super().__init__(step, clip, mappers)
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
        places = "X " * self.vectors.shape[-2]
        return self.clip.tokenizer([f"{places}{name}." for name in classnames])

    def encode(self, vectors, tokens):
        """t: (N, d), unit norm, of prompts (N, L), with vectors (M, width) or (N, M, width)."""
        text = text_tower(self.clip)

        def tower(rows):  # with its hooks, for micro-batches are computed again
            each = vectors[rows] if vectors.ndim == 3 else vectors

            def learned(module, args, embedded):  # (N, L, width): start, V₁ … V_M, class, end
                return put(embedded, each, self.first)

            with (
                text.token_embedding.register_forward_hook(learned),
                cropped(self.clip.model, tokens),
                self.deeper(text),
            ):
                return self.clip.model.encode_text(tokens[rows].to(self.clip.device))

        return self.clip.encode(tower, torch.arange(len(tokens)))

    def deeper(self, text):
        """A context within which the text tower has prompts in deeper layers, too: here, none."""
        return contextlib.nullcontext()

    def prompted(self):
        """A context within which clip.encode_image has the image tower's prompts: here, none."""
        return contextlib.nullcontext()

    def head(self, tokens):
        """(b, d) -> logits (b, C), among classes of these prompts."""
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

    def __init__(self, step, clip, classnames, vectors, mappers=()):
        super().__init__(step, clip, classnames, vectors, mappers)
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


@contextlib.contextmanager
def deep(modules, vectors, first):
    """Within it each of `modules` takes its x with its own of `vectors`, (M, width), at `first`."""
    with contextlib.ExitStack() as hooks:
        for module, context in zip(modules, vectors):
            hooks.enter_context(module.register_forward_pre_hook(
                lambda module, args, context=context: put(*args, context, first)
            ))
        yield


def image_transformer(clip):
    """The image tower if it is a transformer of open_clip's own that outputs its class token
    (what pools all tokens would pool prompts); exits with status 2 at another.
    """
    from open_clip.transformer import VisionTransformer  # here, for it takes seconds

    visual = clip.model.visual
    own = isinstance(visual, VisionTransformer)
    if not own or visual.pool_type != "tok" or visual.attn_pool is not None:
        fail(
            f"maple: the image tower of {clip.name} is no transformer of open_clip's own that "
            "outputs its class token. Name a ViT in --model, or take coop."
        )
    return visual


class MaPLe(CoOp):
    """Prompts in both towers, V_l in place of words before block l of the text tower, l < D, and
    F_l(V_l) behind the patches before block l of the image tower. F_l, the couplings, are linear.

    What a block makes of its prompts is dropped, the next one has its own; from block D − 1 on they
    pass as other tokens do. As images change, too, ẑ^k is synthesised from what they are now.
    Source: MaPLe (arXiv 2210.03117), section 3.2, and its public code: M = 2, D = 9, V_0 starts as
    the first M words of "a photo of a", F_0(V_0) goes through the image tower's first norm.
    CHOICE: V_0 starts as the words of the source, as CoCoOp here; D is what the shallower tower
    has, where that is less; alternative: "a photo" whatever the source.
    """

    def __init__(self, step, clip, classnames, vectors, mappers=()):
        super().__init__(step, clip, classnames, vectors, mappers)        # vectors: (D, M, width)
        widths = vectors.shape[-1], image_transformer(clip).transformer.width
        couplings = (nn.Linear(*widths) for _ in vectors)
        self.couplings = nn.ModuleList(couplings).to(clip.device)                 # F_0 … F_(D − 1)

    @staticmethod
    def start(clip, phrase, generator):
        words = CoCoOp.start(clip, phrase, generator)[:2]                              # (M, width)
        towers = text_tower(clip), image_transformer(clip)
        depth = min(9, *(len(tower.transformer.resblocks) for tower in towers))
        deeper = 0.02 * torch.randn(depth - 1, *words.shape, generator=generator)
        return torch.cat([words[None], deeper.to(clip.device)])

    def encode(self, vectors, tokens):
        return super().encode(vectors[0], tokens)

    def deeper(self, text):
        return deep(text.transformer.resblocks[1:], self.vectors[1:], self.first)

    def prompted(self):
        visual = self.clip.model.visual
        modules = [visual.ln_pre, *visual.transformer.resblocks[1:]]
        vectors = [couple(context) for couple, context in zip(self.couplings, self.vectors)]
        return deep(modules, vectors, len(visual.positional_embedding))  # class token and patches

    def forward(self, batch):
        def tower(images):  # also where micro-batches are computed again
            with self.prompted():
                return self.clip.model.encode_image(images)

        z = self.clip.encode(tower, batch.images.to(self.clip.device))                     # (b, d)
        return self.step(self.synthesise(z), batch.labels, self.head(self.tokens))


PROMPTS = {"coop": CoOp, "cocoop": CoCoOp, "maple": MaPLe}
