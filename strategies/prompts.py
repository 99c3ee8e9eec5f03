"""Prompt learners: learned vectors in place of words, while CLIP's own weights are frozen.

Their head encodes class prompts that contain the vectors. evaluate.py uses `classifier`, which can
name classes that were not trained on, and encodes images while they are `prompted`. The vectors
enter the towers by PyTorch's hooks, which are removed afterwards.
"""

import contextlib

import torch
import torch.nn as nn

from core.distributed import to_device
from core.utils import fail
from features import cropped, used_length
from strategies.base import Strategy


def text_tower(clip):
    """Return the text tower; exit with status 2 if it is not open_clip's own."""
    text = getattr(clip.model, "text", clip.model)
    if not hasattr(text, "token_embedding"):
        fail(f"{clip.name}: prompts need a text tower of open_clip's own. Name another --model.")
    return text


def word_tokens(clip, words):
    """Return (position of the first word: 1 if there is a start token, else 0; the words' tokens).

    Both follow from where the tokens change when another word precedes or follows.
    """
    alone, after_x, before_x = clip.tokenizer([words, f"X {words}", f"{words} X"])
    first, end = ((alone != other).nonzero()[0].item() for other in (after_x, before_x))
    return first, alone[first:end]


def replace_tokens(x, context, first):
    """Return x, (N, L, width), with `context`, (M, width) or (N, M, width), in place of its M
    tokens from `first` on. At first = L the context is appended.
    """
    context = context.expand(len(x), -1, -1).to(x.dtype)
    return torch.cat([x[:, :first], context, x[:, first + context.shape[1]:]], dim=1)


class CoOp(Strategy):
    """A learned prompt "V₁ … V_M dog.", whose M vectors take the place of words.

    phrase: words for images of the source, "a photo". generator: draws what is random in V.
    Source: CoOp (arXiv 2109.01134), equation 2.
    CHOICE: M = 16 random vectors, the default of its public code, or as many as a short text tower
    has room for beside eight tokens, the same for all classes; alternative: M = 4 that start as
    "a photo of a", as in its base-to-new experiments, or vectors of each class.
    CHOICE: features of unaugmented images, made once, here and for CoCoOp; alternative: a random
    crop (0.08 to 1 of the area) and flip in every epoch, as in their public code.
    """

    def __init__(self, clip, classnames, phrase, mappers=None, generator=None):
        super().__init__(clip, mappers)
        self.phrase = phrase
        self.vectors = nn.Parameter(self.initial_vectors(generator).to(clip.device))  # (M, width)
        self.first, _ = word_tokens(clip, "a")
        self.tokens = self.prompts(classnames)

    def initial_vectors(self, generator):
        """Return what the vectors start as, (M, width)."""
        text = text_tower(self.clip)
        m = min(16, max(1, text.context_length - 8))
        return 0.02 * torch.randn(m, text.token_embedding.embedding_dim, generator=generator)

    def prompts(self, classnames):
        """Return tokens (C, L) of class prompts, whose first M words V is to replace."""
        placeholders = "X " * len(self.vectors)
        return self.clip.tokenizer([f"{placeholders}{name}." for name in classnames])

    def encode(self, vectors, tokens):
        """Return t: (N, d), unit norm, of prompts (N, L).

        vectors: (M, width), or (N, M, width) for a prompt each.
        """
        text, length = text_tower(self.clip), used_length(tokens)

        def tower(rows):  # sets the hooks itself, because micro-batches are computed twice
            context = vectors[rows] if vectors.ndim == 3 else vectors

            def learned(module, args, embedded):  # (N, L, width): start, V₁ … V_M, class, end
                return replace_tokens(embedded, context, self.first)

            with (
                text.token_embedding.register_forward_hook(learned),
                cropped(self.clip.model, length),
                self.deep_prompts(text),
            ):
                return self.clip.model.encode_text(to_device(tokens[rows], self.clip.device))

        return self.clip.encode(tower, torch.arange(len(tokens)))

    def deep_prompts(self, text):
        """Return a context in which deeper layers of the text tower get prompts: here, none."""
        return contextlib.nullcontext()

    def prompted(self):
        """Return a context in which clip.encode_image inserts prompts: here, none."""
        return contextlib.nullcontext()

    def class_head(self, tokens):
        """Return the head of class prompts (C, L): features (b, d) -> logits (b, C)."""
        class_text = self.encode(self.vectors, tokens)                                    # (C, d)
        return lambda x: self.scale * x @ class_text.T

    def head_for(self, batch):
        return self.class_head(self.tokens)

    @torch.no_grad()
    def classifier(self, classnames):
        """Return a head of any class names: features (N, d) -> logits (N, C), both on the CPU."""
        head = self.class_head(self.prompts(classnames))
        rows = max(1, 1000 // len(classnames))  # CoCoOp encodes a text for each image and class

        @torch.no_grad()
        def logits(z):
            return torch.cat([head(x.to(self.clip.device)).cpu() for x in z.split(rows)])

        return logits


class CoCoOp(CoOp):
    """A prompt "V₁ + π(z) … V_M + π(z) dog." of each image; π is a small network, the meta-net.

    Source: CoCoOp (arXiv 2203.05557), section 3.2. A synthesised feature has a prompt of its own.
    CHOICE: V starts as words of the source ("a photo of a" in the paper) and π as 0, so that
    training starts from zero-shot; alternative: π as PyTorch initialises it, as in its public code.
    """

    def __init__(self, clip, classnames, phrase, mappers=None, generator=None):
        super().__init__(clip, classnames, phrase, mappers, generator)
        d, width = self.encode(self.vectors, self.tokens[:1]).shape[1], self.vectors.shape[1]
        layers = nn.Linear(d, d // 16), nn.ReLU(), nn.Linear(d // 16, width)
        self.meta_net = nn.Sequential(*layers).to(clip.device)
        for parameter in self.meta_net[2].parameters():
            nn.init.zeros_(parameter)

    def initial_vectors(self, generator):
        text = text_tower(self.clip)
        _, words = word_tokens(self.clip, f"{self.phrase} of a")
        words = words[:max(1, text.context_length - 8)]                                    # (M,)
        return text.token_embedding(words.to(self.clip.device)).detach()

    def class_head(self, tokens):
        def logits(x):
            vectors = self.vectors + self.meta_net(x)[:, None]                     # (b, M, width)
            vectors = vectors.repeat_interleave(len(tokens), dim=0)             # (b · C, M, width)
            class_text = self.encode(vectors, tokens.repeat(len(x), 1))                # (b · C, d)
            class_text = class_text.view(len(x), len(tokens), -1)                      # (b, C, d)
            return self.scale * torch.einsum("bd,bcd->bc", x, class_text)

        return logits


@contextlib.contextmanager
def prompts_before(modules, vectors, first):
    """Within it, each module takes its input with its own of `vectors`, (M, width), at `first`.

    Modules beyond the number of vectors take their input as it is.
    """
    with contextlib.ExitStack() as hooks:
        for module, context in zip(modules, vectors):
            def prompted_input(module, args, context=context):
                return replace_tokens(*args, context, first)

            hooks.enter_context(module.register_forward_pre_hook(prompted_input))
        yield


def image_transformer(clip):
    """Return the image tower if it can take prompts; exit with status 2 if not.

    It has to be a transformer of open_clip's own that outputs its class token: one that pools all
    tokens would pool the prompts too.
    """
    from open_clip.transformer import VisionTransformer  # here, because the import takes seconds

    visual = clip.model.visual
    is_transformer = isinstance(visual, VisionTransformer)
    if not is_transformer or visual.pool_type != "tok" or visual.attn_pool is not None:
        fail(
            f"maple: the image tower of {clip.name} is no transformer of open_clip's own that "
            "outputs its class token. Name a ViT in --model, or take coop."
        )
    return visual


class MaPLe(CoOp):
    """Prompts in both towers: "V₁ V₂ of a dog.", and vectors in deeper layers.

    Before block l < D of the text tower V_l, (M, width), takes the place of the first M words; in
    the image tower F_l(V_l) does so behind the patches, where F_l, the couplings, are linear. What
    a block makes of its prompts is thus dropped, and the next block gets its own; from block D − 1
    on the prompts pass through as other tokens do.
    Source: MaPLe (arXiv 2210.03117), section 3.2, and its public code: M = 2, D = 9, V_0 starts as
    the first M tokens of "a photo of a dog.", whose remaining words stay, and F_0(V_0) passes the
    image tower's first normalisation.
    CHOICE: the sentence is in the words of the source, "a sketch of a dog."; alternative: "a photo"
    for every source.
    CHOICE: D is the depth of the shallower tower if that is less than 9; alternative: to refuse it.
    """

    length, depth = 2, 9  # M, D

    def __init__(self, clip, classnames, phrase, mappers=None, generator=None):
        super().__init__(clip, classnames, phrase, mappers, generator)
        widths = self.vectors.shape[-1], image_transformer(clip).transformer.width
        couplings = (nn.Linear(*widths) for _ in self.vectors)
        self.couplings = nn.ModuleList(couplings).to(clip.device)                 # F_0 … F_(D − 1)

    def initial_vectors(self, generator):
        """Return what the vectors start as, (D, M, width)."""
        text, visual = text_tower(self.clip), image_transformer(self.clip)
        _, words = word_tokens(self.clip, f"{self.phrase} of a")
        words = words[:self.length].to(self.clip.device)                                     # (M,)
        first = text.token_embedding(words).detach()                                   # (M, width)
        blocks = (len(tower.transformer.resblocks) for tower in (text, visual))
        depth = min(self.depth, *blocks)
        deeper = 0.02 * torch.randn(depth - 1, *first.shape, generator=generator)
        return torch.cat([first[None], deeper.to(self.clip.device)])

    def prompts(self, classnames):
        return self.clip.tokenizer([f"{self.phrase} of a {name}." for name in classnames])

    def encode(self, vectors, tokens):
        return super().encode(vectors[0], tokens)

    def deep_prompts(self, text):
        return prompts_before(text.transformer.resblocks[1:], self.vectors[1:], self.first)

    def prompted(self):
        visual = self.clip.model.visual
        modules = [visual.ln_pre, *visual.transformer.resblocks[1:]]
        vectors = [couple(context) for couple, context in zip(self.couplings, self.vectors)]
        behind_patches = len(visual.positional_embedding)  # class token and patches precede it
        return prompts_before(modules, vectors, behind_patches)

    def encode_image(self, images):
        def tower(images):  # sets the hooks itself, because micro-batches are computed twice
            with self.prompted():
                return self.clip.image_tower(images)

        return self.clip.encode(tower, images.to(self.clip.device))


PROMPTS = {"coop": CoOp, "cocoop": CoCoOp, "maple": MaPLe}
