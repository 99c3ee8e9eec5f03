"""CLIP, and what it makes of images and texts: load a model (a captioner, too), encode, cache a
data set's features.
"""

import contextlib
import functools
import gc
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from utils import cached, damaged_copy, fail, from_root, load_whole, one_line, short_hash

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from batches import image_batches, in_order
from distributed import the_device


@dataclass
class Clip:
    """A CLIP model with what belongs to it: `preprocess` for evaluation, `augment` for training."""

    model: torch.nn.Module
    preprocess: object
    augment: object
    tokenizer: object
    device: torch.device
    name: str
    base: tuple = ()       # (name, tag of its weights) in open_clip's terms, also of a checkpoint
    fingerprint: str = ""  # a hash of all that makes its features
    weights: str = ""      # a hash of the weights of `base`
    micro_batch: int | None = None  # rows that are encoded at a time in training; None: all

    @property
    def logit_scale(self):
        """s = exp(logit_scale), the factor on cosines (about 100 in OpenAI's models), as a
        float.
        """
        return self.model.logit_scale.exp().item()

    def encode_image(self, images):
        """z: (B, d) unit-norm float32 features of images (B, 3, H, W), with their gradient."""
        return self.encode(self.model.encode_image, images.to(self.device))

    def encode_text(self, tokens):
        """t: (B, d), likewise, of tokens (B, L); texts that occur several times are encoded
        once.
        """
        unique, back = tokens.unique(dim=0, return_inverse=True)

        def tower(some):  # also where micro-batches are computed again
            with cropped(self.model, unique):
                return self.model.encode_text(some)

        return self.encode(tower, unique.to(self.device))[back.to(self.device)]

    def encode(self, tower, x):
        """tower(x), unit norm; in training `micro_batch` rows at a time, whose activations are not
        kept but computed again in the backward pass, while losses see the whole batch.

        Source: GradCache (arXiv 2101.06983), here by PyTorch's checkpoints.
        """

        def features(x):
            with autocast(self.device):
                out = tower(x)
            return F.normalize(out.float(), dim=-1)  # bfloat16 logits of 100 are steps of a half

        n = self.micro_batch or len(x)
        if len(x) <= n or not torch.is_grad_enabled():
            return features(x)
        return torch.cat([checkpoint(features, part, use_reentrant=False) for part in x.split(n)])


@contextlib.contextmanager
def cropped(model, tokens):
    """Within it open_clip's text tower leaves out the padding that all texts, tokens (N, L), share,
    if it is causal (its mask says so) and takes the feature at the end token: then no token that
    counts sees those left out, and nothing changes but rounding.
    """
    text = getattr(model, "text", model)
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    differ = (tokens != tokens[:, -1:]).any(0).nonzero()  # from the last token, as a rule padding
    end = differ.max().item() + 2 if len(differ) else 1   # that may be the end token, too: keep one

    def crop(module, args, kwargs):
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.ndim == 2 and pool in ("argmax", "eos"):
            return (args[0][:, :end],), {**kwargs, "attn_mask": mask[:end, :end]}

    hook = text.transformer.register_forward_pre_hook(crop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def precision(device):
    """The dtype that towers compute in: bfloat16 on a GPU that has it, float32 elsewhere.

    Weights stay in float32: fp16 weights give NaN after an Adam step, and bfloat16 has fp32's
    range.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def autocast(device):
    """The context that forward passes of towers run in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


def load_clip(config):
    """The Clip of --model and --pretrained, in eval mode, on the GPU if there is one.

    A name of open_clip's with a tag of weights, hf-hub:…, local-dir:PATH, or finetune.py's
    checkpoint. Exits with status 2 when it cannot be had, or when OpenAI's weights would run with
    another activation than theirs.
    """
    import open_clip  # here, for it takes seconds, and what needs no CLIP need not wait

    base, pretrained, tuned, known = config.model, config.pretrained, None, None
    if base.endswith(".pt"):
        base, pretrained, tuned, known = read_checkpoint(base)
    if base.startswith(("local-dir:", "hf-hub:")):
        pretrained = None  # they bring their own
    place, device = place_of(base), the_device()
    gc.collect()  # the captioner of an earlier stage, which holds itself and a GPU's memory
    logging.disable(logging.ERROR)  # what open_clip logs, it raises as well
    try:
        model, augment, preprocess = open_clip.create_model_and_transforms(
            place, pretrained, device=device, require_pretrained=True,
            aug_cfg={"scale": (0.9, 1.0)},  # FLYP's mild random crop, no flip
        )
        tokenizer = open_clip.get_tokenizer(place)
    except Exception as error:  # whatever the hub, a damaged file or a bad config raises
        logging.disable(logging.NOTSET)
        known = open_clip.pretrained.get_pretrained_cfg(base, pretrained or "").get("hf_hub", "")
        remedy = damaged_copy(base.removeprefix("hf-hub:")) or damaged_copy(os.path.dirname(known))
        remedy = remedy or (
            "Name another; or, if the Hugging Face hub has it, run once with a network: then it is "
            "cached."
        )
        fail(f"--model {base}: could not load it ({one_line(error)}). {remedy}")
    logging.disable(logging.NOTSET)
    # a tag, a file or, in the hub's cache, a folder above it tells whose weights they are
    openai = pretrained and "openai" in "/".join(Path(pretrained).parts[-4:]).lower()
    if openai and not any(isinstance(m, open_clip.transformer.QuickGELU) for m in model.modules()):
        fail(f"--model {base}: OpenAI's weights want QuickGELU. Say {base}-quickgelu.")
    weights = hash_of(model)
    if tuned is not None:
        if weights != known:
            fail(f"--model {config.model}: {base} has other weights than it was finetuned from.")
        own = model.state_dict()
        if not tuned or any(k not in own or own[k].shape != v.shape for k, v in tuned.items()):
            fail(f"--model {config.model}: it does not hold {base}'s towers. Name another.")
        model.load_state_dict(tuned, strict=False)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"device: {name}, {str(precision(device)).removeprefix('torch.')}, weights float32")
    # CHOICE: eval mode throughout, finetuning included: CLIP has no dropout, and where a tower has
    # batch normalisation a few hundred images of one domain would overwrite its statistics;
    # alternative: train mode.
    model.to(memory_format=torch.channels_last)  # depthwise convolutions take half the time so
    # frozen until finetune.py says otherwise: PyTorch's attention rounds differently with gradients
    model.eval().requires_grad_(False)
    parts = model, preprocess, augment, tokenizer, device, config.model, (base, pretrained)
    clip = Clip(*parts, weights=weights, micro_batch=config.micro_batch)
    clip.fingerprint = fingerprint(clip, weights if tuned is None else None)
    return clip


def place_of(model):
    """A model's name, of a local-dir: what a description names from the root, too."""
    _, schema, path = model.rpartition("local-dir:")
    return schema + from_root(path)


def load_captioner(name, device):
    """(model, processor) of an image-to-text model on the hub or in a folder; exits where none."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        place, dtype = from_root(name), precision(device)
        model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype)
        processor = AutoProcessor.from_pretrained(place)
        processor.tokenizer.padding_side = "left"  # what is generated goes on from the last token
        if getattr(processor, "num_query_tokens", 0) is None:  # BLIP-2 from before its image token
            processor.num_query_tokens = model.config.num_query_tokens
        if getattr(model.config, "image_token_index", 0) is None:
            token = processor.tokenizer.convert_tokens_to_ids("<image>")
            model.config.image_token_index = token
    except Exception as error:  # whatever the hub, a damaged file or a bad config raises
        remedy = damaged_copy(name) or "Name another, or a folder."
        fail(f"--captioner {name}: could not be loaded ({one_line(error)}). {remedy}")
    return model.to(device).eval(), processor


def hash_of(model):
    """A hash of a model's weights."""
    return short_hash([*model.state_dict().values()])


def fingerprint(clip, weights=None):
    """A hash of the model: its name, architecture, weights, preprocessing and precision.

    weights: `hash_of` it, which takes a while of a large one, where that is known.
    """
    weights = weights or hash_of(clip.model)
    how = str(clip.model), weights, str(clip.preprocess), str(precision(clip.device))
    return short_hash(clip.name, *how)


def read_checkpoint(path):
    """(model name, tag of its weights, state dict of its towers, `hash_of` that model) of a
    checkpoint of finetune.py.
    """
    try:
        state = load_whole(path, "cpu")
        (base, pretrained), towers = state["base"], towers_of(state["modules"])
        whole, weights = state["optimizer"] is None, state["weights"]
    except FileNotFoundError:
        fail(f"--model {path}: no such file. Checkpoints lie in runs/…/checkpoints/.")
    except Exception:  # torch.load raises what it likes at a file that is not its own
        fail(f"--model {path}: not a checkpoint of finetune.py. Name another file, or a model.")
    if not whole:
        fail(f"{path}: its training is not finished. Run finetune.py again, and it goes on.")
    return base, pretrained, towers, weights


def towers_of(state):
    """The state of clip.model in a checkpoint's, which calls it "towers", beside the "head"."""
    return {k.removeprefix("towers."): v for k, v in state.items() if k.startswith("towers.")}


# -------------------------------------------------------------------------------------------------
# Encode


@torch.no_grad()
def encode_images(clip, items, batch_size=256, label="images"):
    """z: (N, d) unit-norm float32 features of items [(Location, label)], in order, on the CPU."""
    batches = in_order(len(items), batch_size)
    load = image_batches(items, clip.preprocess, batches, clip.device)
    bar = tqdm(load, f"encoding {label}", len(batches), unit="batch", leave=False)
    return torch.cat([clip.encode_image(images).cpu() for images, _ in bar])


@torch.no_grad()
def encode_texts(clip, texts, batch_size=1024):
    """t: (N, d) unit-norm float32 features of strings, in order, on the CPU."""
    batches = [texts[i:i + batch_size] for i in range(0, len(texts), batch_size)]
    return torch.cat([clip.encode_text(clip.tokenizer(batch)).cpu() for batch in batches])


def zero_shot_head(clip, classnames, templates):
    """T: (C, d), the zero-shot classifier: the mean over templates of text features, unit norm.

    templates: callables from a class name to a prompt. Source: CLIP (arXiv 2103.00020), 3.1.4.
    """
    from open_clip import build_zero_shot_classifier

    with autocast(clip.device):
        head = build_zero_shot_classifier(
            clip.model, clip.tokenizer, classnames, templates, num_classes_per_batch=100,
            device=clip.device,
        )
    return F.normalize(head.T.float(), dim=-1).cpu()


# -------------------------------------------------------------------------------------------------
# Cache


def stamps(items):
    """What changes when an item does: its place, label, the file's size and time of change."""
    stat = functools.cache(os.stat)
    return [
        (at.path, at.offset, label, stat(at.file).st_size, stat(at.file).st_mtime_ns)
        for at, label in items
    ]


def cached_features(clip, dataset, domain, run):
    """features_of(items) -> (N, d), for images of one domain; cached beside the folder `run`.

    The key: the model's fingerprint, and the place, size and time of change of every image's file.
    """
    items = dataset.images[domain]
    key = short_hash(clip.fingerprint, stamps(items))
    path = run.parent / ".features" / f"{dataset.name}-{domain}-{key}.pt"
    z = cached(path, lambda: encode_images(clip, items, label=f"{dataset.name} {domain}"))
    row = {location: i for i, (location, _) in enumerate(items)}
    return lambda items: z[[row[location] for location, _ in items]]
