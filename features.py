"""CLIP and its features: load a model or a captioner, encode images and texts, cache a data set."""

import contextlib
import copy
import json
import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision import transforms as transforms_v1
from torchvision.transforms import v2

from batches import image_batches, in_order
from core.artifacts import artifact, artifact_path, digest, load, stamps
from core.distributed import get_device, main_process_first, progress_bar, to_device
from core.utils import fail, from_root, is_out_of_memory, one_line
from data import rows_in


@dataclass
class Clip:
    """A CLIP model with its transforms and tokenizer.

    preprocess, augment: of evaluation and of training, from uint8 images (3, h, w) to (3, H, W).
    mean, std: (3, 1, 1) of the colours in [0, 1], by which `normalise` makes the towers' input.
    """

    model: torch.nn.Module
    preprocess: object
    augment: object
    tokenizer: object
    device: torch.device
    name: str
    mean: torch.Tensor = 0.0
    std: torch.Tensor = 1.0
    base: tuple = ()       # (name, tag of its weights) for open_clip, also of a checkpoint's model
    key: str = ""          # a hash of all that decides its features
    weights: str = ""      # a hash of the weights of `base`
    micro_batch: int | None = None           # rows encoded at a time in training; None: all
    original: dict = field(default_factory=dict, repr=False)  # weights before finetuning, on CPU
    cache: dict = field(default_factory=dict, repr=False)     # features of images and texts
    compiled: bool = False

    @property
    def logit_scale(self):
        """s = exp(logit_scale) as a float: the factor on cosines, about 100 in OpenAI's models."""
        return self.model.logit_scale.exp().item()

    def reset(self):
        """Load the weights from before finetuning, freeze them, and free their gradients.

        Frozen: PyTorch's attention rounds differently where gradients are wanted.
        """
        self.model.load_state_dict(self.original)
        self.model.requires_grad_(False)
        self.model.zero_grad()

    def copy(self):
        """Return a Clip with a model of its own, and no features that are stored in its name."""
        model = copy.deepcopy(self.model)
        if self.compiled:  # which a copy is not
            compile_towers(model)
        return replace(self, model=model, key="", cache={})

    def normalise(self, images):
        """Return the towers' input, float32, of images (B, 3, H, W): uint8, or floats in [0, 1]."""
        images = images if images.is_floating_point() else images / 255
        return (images - self.mean) / self.std

    def image_tower(self, images):
        """Return the image tower's output, (B, d), as it is."""
        return self.model.encode_image(self.normalise(images))

    def encode_image(self, images):
        """Return z: (B, d), unit norm, float32, with gradient; images as in `normalise`."""
        return self.encode(self.image_tower, images.to(self.device))

    def encode_text(self, tokens):
        """Return t: (B, d), unit norm, float32, of tokens (B, L), with gradient.

        A text that occurs several times is encoded once.
        """
        unique, inverse = tokens.unique(dim=0, return_inverse=True)
        length = used_length(unique)
        if self.device.type == "cuda":
            unique, length = in_few_shapes(unique, length, self.micro_batch)

        def tower(rows):  # cropped here, because micro-batches are computed again
            with cropped(self.model, length):
                return self.model.encode_text(rows)

        return self.encode(tower, to_device(unique, self.device))[to_device(inverse, self.device)]

    def encode(self, tower, x):
        """Return tower(x), unit norm. In training encode `micro_batch` rows at a time: their
        activations are computed again in the backward pass, while losses see the whole batch.

        Source: GradCache (arXiv 2101.06983), here by PyTorch's checkpoints.
        """

        def features(x):
            with autocast(self.device):
                out = tower(x)
            # normalised in float32: near 100, bfloat16 logits are half a unit apart
            return F.normalize(out.float(), dim=-1)

        if not self.micro_batch or not torch.is_grad_enabled():
            return features(x)
        # also of one part, because a loss such as DiVE's keeps the activations of several encodings
        parts = x.split(self.micro_batch)
        return torch.cat([checkpoint(features, part, use_reentrant=False) for part in parts])


def used_length(tokens):
    """Return the length of texts, (N, L), without the padding that all of them share."""
    differ = (tokens != tokens[:, -1:]).any(0).nonzero()    # from the last token, usually padding
    return differ.max().item() + 2 if len(differ) else 1    # one more: padding may be the end token


def in_few_shapes(tokens, length, micro_batch=None):
    """Return tokens (N, L) with N padded to a multiple of 64, and `length` of one of 8, at most L.

    A GPU's memory allocator, cuBLAS and torch.compile prepare for each shape that occurs. Of micro
    batches all have one shape if N is a multiple of their size.
    """
    n, context = tokens.shape
    multiple = min(64, micro_batch or 64)
    padding = tokens[:1].expand(-n % multiple, -1)
    return torch.cat([tokens, padding]), min(length + -length % 8, context)


@contextlib.contextmanager
def cropped(model, length):
    """Within the context, open_clip's text tower computes the first `length` tokens only.

    This holds for causal towers (recognised by their mask) that take the feature at the end token:
    no token that counts sees the padding, so only rounding changes.
    """
    text = getattr(model, "text", model)
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))

    def crop(module, args, kwargs):
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.ndim == 2 and pool in ("argmax", "eos"):
            return (args[0][:, :length],), {**kwargs, "attn_mask": mask[:length, :length]}

    hook = text.transformer.register_forward_pre_hook(crop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def precision(device):
    """Return the dtype of the towers' computation: bfloat16 on a GPU that has it, else float32.

    Weights stay in float32: fp16 weights give NaN after an Adam step, bfloat16 has fp32's range.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def autocast(device):
    """Return the context in which towers compute."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


# -------------------------------------------------------------------------------------------------
# Load


def load_clip(settings):
    """Return the Clip of --model and --pretrained, in eval mode, on the GPU if there is one.

    --model is an open_clip name with a tag of weights, hf-hub:…, local-dir:PATH, or a checkpoint of
    finetune.py. Exit with status 2 if it cannot be loaded, or if OpenAI's weights would run with
    another activation than theirs.
    CHOICE: eval mode throughout, finetuning included: CLIP has no dropout, and in a tower with
    batch normalisation a few hundred images of one domain would overwrite the statistics;
    alternative: train mode.
    """
    import open_clip  # here because it takes seconds, and --help does not need it

    base, pretrained, tuned, expected = settings.model, settings.pretrained, None, None
    if base.endswith(".pt"):
        base, pretrained, tuned, expected = read_checkpoint(base)
    if base.startswith(("local-dir:", "hf-hub:")):
        pretrained = None  # these bring their own weights
    device = get_device()
    model, augment, preprocess, tokenizer, config = create(base, pretrained, device)
    augment, _, _ = split_transforms(augment)
    preprocess, mean, std = split_transforms(preprocess)
    quick = any(isinstance(m, open_clip.transformer.QuickGELU) for m in model.modules())
    if is_openai(pretrained) and not quick:
        fail(f"--model {base}: OpenAI's weights need QuickGELU. Pass --model {base}-quickgelu.")
    weights = weights_hash(model)
    if tuned is not None:
        if weights != expected:
            fail(f"--model {settings.model}: {base} has other weights than it was finetuned from.")
        own = model.state_dict()
        if not tuned or any(k not in own or own[k].shape != v.shape for k, v in tuned.items()):
            fail(f"--model {settings.model}: it does not contain {base}'s towers. Name another.")
        model.load_state_dict(tuned, strict=False)
    model.to(memory_format=torch.channels_last)  # halves the time of depthwise convolutions
    model.eval().requires_grad_(False)
    if settings.compile:
        compile_towers(model)
    clip = Clip(
        model, preprocess, augment, tokenizer, device, settings.model, mean.to(device),
        std.to(device), (base, pretrained), weights=weights, micro_batch=settings.micro_batch,
        original={k: v.cpu().clone() for k, v in model.state_dict().items()},
        compiled=settings.compile,
    )
    clip.key = digest(
        str(model), json.dumps(config, sort_keys=True), weights_hash(model), str(preprocess),
        mean, std, tokenizer_state(tokenizer),
    )
    return clip


def compile_towers(model):
    """Let PyTorch compile the image tower, and the blocks of the text tower, in place.

    Blocks, because a new hook on the text tower crops each batch of texts, and it would be compiled
    anew for each.
    """
    text = getattr(model, "text", model)
    blocks = getattr(getattr(text, "transformer", None), "resblocks", ())
    for module in (model.visual, *blocks):
        module.compile()


def create(name, pretrained, device):
    """Return (model, augment, preprocess, tokenizer, config) of open_clip; exit if it cannot."""
    import open_clip

    place = resolve_local(name)
    with collected_logs() as messages:
        try:
            refuse_code(name, place)
            model, augment, preprocess = open_clip.create_model_and_transforms(
                place, pretrained, device=device, require_pretrained=True,
                aug_cfg={"scale": (0.9, 1.0)},  # FLYP's mild random crop, no flip
            )
            return model, augment, preprocess, open_clip.get_tokenizer(place), (
                open_clip.get_model_config(place)
            )
        except Exception as error:  # whatever the hub, a damaged file or a bad config raises
            fail(
                f"--model {name}: could not be loaded ({reason(error, messages)}). Name another; "
                "or, if the Hugging Face hub has it, run once with a network. A damaged copy in "
                "the hub's cache has to be deleted."
            )


def split_transforms(composed):
    """Return open_clip's transforms as (geometry on uint8 images (3, h, w), mean, std).

    Sizes are the same as open_clip's, which takes PIL images; pixels differ by rounding. The input
    of the tower is (pixels / 255 − mean) / std, with mean and std (3, 1, 1).
    """
    from open_clip.transform import MaybeConvertMode, MaybeToTensor, ResizeKeepRatio

    *transforms, normalise = composed.transforms
    geometry = []
    for step in transforms:
        if isinstance(step, transforms_v1.Resize):
            step = v2.Resize(step.size, step.interpolation, antialias=True)
        elif isinstance(step, ResizeKeepRatio):
            step = ResizeToRatio(step)
        elif isinstance(step, transforms_v1.CenterCrop):
            step = v2.CenterCrop(step.size)
        elif isinstance(step, transforms_v1.RandomResizedCrop):
            step = v2.RandomResizedCrop(
                step.size, step.scale, step.ratio, step.interpolation, antialias=True
            )
        if not isinstance(step, (MaybeConvertMode, MaybeToTensor)):
            geometry.append(step)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (normalise.mean, normalise.std))
    return v2.Compose(geometry), mean, std


class ResizeToRatio:
    """open_clip's ResizeKeepRatio, which reads the sizes of PIL images only, for tensors."""

    def __init__(self, original):
        self.original = original

    def __call__(self, image):
        original, (height, width) = self.original, image.shape[-2:]
        like_pil = SimpleNamespace(size=(width, height))
        size = original.get_params(like_pil, original.size, original.longest)
        return v2.functional.resize(image, size, original.interpolation, antialias=True)

    def __repr__(self):
        return f"{type(self).__name__}({self.original})"


@contextlib.contextmanager
def collected_logs():
    """Within the context, add what libraries log to the list that is yielded, instead of printing
    it: open_clip also raises what it logs. huggingface_hub's is printed, too.
    """
    messages, handler = [], logging.Handler()
    handler.emit = lambda log_record: messages.append(log_record.getMessage())
    loggers = logging.getLogger(), logging.getLogger("huggingface_hub")
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def reason(error, messages):
    """Return why a model could not be loaded. Where a request to the hub failed, this is the cause:
    transformers goes on without the file, and misses a package in the end.
    """
    failed = [message for message in messages if "thrown while requesting" in message]
    if failed:
        return f"the Hugging Face hub did not answer: {failed[-1]}; then: {one_line(error)}"
    return one_line(error)


def refuse_code(name, place):
    """Exit with status 2 if a model's open_clip_config.json asks to run code from its repository.

    transformers would run it without a question when the tokenizer is made.
    """
    import open_clip

    def asks(content):
        if isinstance(content, dict):
            return any(map(asks, content.values())) or bool(content.get("trust_remote_code"))
        return isinstance(content, list) and any(map(asks, content))

    if asks(open_clip.get_model_config(place)):
        fail(f"--model {name}: its config asks to run code (trust_remote_code). Name another.")


def is_openai(pretrained):
    """Return whether a tag or a file of weights is OpenAI's, by the file's name.

    In the hub's cache a folder above the file, models--OWNER--NAME, names the repository.
    """
    path = Path(pretrained or "")
    names = [path.name, *(part for part in path.parts if part.startswith("models--"))]
    return any("openai" in name.lower() for name in names)


def tokenizer_state(tokenizer):
    """Return a text that decides a tokenizer's output: its vocabulary, rules and settings."""
    inner = getattr(tokenizer, "tokenizer", None)  # of transformers, within open_clip's
    rules = inner.backend_tokenizer.to_str() if hasattr(inner, "backend_tokenizer") else ""
    settings = {
        name: value if isinstance(value, (int, str, dict, list, type(None))) else str(type(value))
        for name, value in vars(tokenizer).items() if name != "cache"
    }
    return f"{type(tokenizer).__name__} {settings} {rules}"


def resolve_local(model):
    """Return a model's name, with a local-dir: path that may be relative to the repository."""
    _, schema, path = model.rpartition("local-dir:")
    return schema + from_root(path)


def weights_hash(model):
    """Return a hash of a model's weights."""
    return digest([*model.state_dict().values()])


def read_checkpoint(path):
    """Return (model name, tag of its weights, towers' state, hash of the original weights) of a
    finished checkpoint of finetune.py; exit with status 2 for another file.
    """
    if not Path(path).exists():
        fail(f"--model {path}: no such file. Checkpoints are in runs/…/checkpoints/.")
    state = load(Path(path), "cpu")
    if isinstance(state, dict) and "optimizer" in state:
        fail(f"{path}: its training is not finished. Run finetune.py again, and it goes on.")
    if not isinstance(state, dict) or not {"base", "modules", "weights"} <= state.keys():
        fail(f"--model {path}: not a checkpoint of finetune.py. Name another file, or a model.")
    return *state["base"], towers_of(state["modules"]), state["weights"]


def towers_of(state):
    """Return the state of clip.model within a checkpoint's, where it is called "towers"."""
    return {k.removeprefix("towers."): v for k, v in state.items() if k.startswith("towers.")}


def load_captioner(name, device):
    """Return (model, processor) of an image-to-text model on the hub or in a folder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place, dtype = from_root(name), precision(device)
    with collected_logs() as messages:
        try:
            model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype)
            processor = AutoProcessor.from_pretrained(place)
            processor.tokenizer.padding_side = "left"  # the caption continues from the last token
            if getattr(processor, "num_query_tokens", 0) is None:  # a BLIP-2 without image token
                processor.num_query_tokens = model.config.num_query_tokens
            if getattr(model.config, "image_token_index", 0) is None:
                token = processor.tokenizer.convert_tokens_to_ids("<image>")
                model.config.image_token_index = token
            return model.to(device).eval(), processor
        except Exception as error:  # whatever the hub, a damaged file or a bad config raises
            why = reason(error, messages)
            fail(f"--captioner {name}: could not be loaded ({why}). Name another, or run again.")


# -------------------------------------------------------------------------------------------------
# Encode


def encode_images(clip, items, batch_size=256, label="images"):
    """Return z: (N, d), unit norm, float32, on the CPU, of items [(Location, label)], in order."""
    return encode_images_by_each([clip], items, batch_size, label)[0]


@torch.no_grad()
def encode_images_by_each(clips, items, batch_size=256, label="images"):
    """Return what `encode_images` returns for each Clip, a list. Each image is decoded once: the
    Clips are those of one model with different weights.
    """
    keys = in_order([location for location, _ in items], batch_size)
    loader = image_batches(keys, clips[0].preprocess, clips[0].device)
    total = math.ceil(len(items) / batch_size)
    bar = progress_bar(loader, desc=f"encoding {label}", total=total, leave=False)
    batches = [[encode_in_halves(clip, images) for clip in clips] for images, _ in bar]
    return [torch.cat(parts) for parts in zip(*batches)]


def encode_in_halves(clip, images):
    """Return z on the CPU of images (B, 3, H, W); of each half if the memory is too small."""
    try:
        return clip.encode_image(images).cpu()
    except RuntimeError as error:
        if len(images) == 1 or not is_out_of_memory(error):
            raise
    return torch.cat([encode_in_halves(clip, half) for half in images.chunk(2)])


@torch.no_grad()
def encode_texts(clip, texts, batch_size=1024):
    """Return t: (N, d), unit norm, float32, on the CPU, of strings, in order."""
    batches = [texts[i:i + batch_size] for i in range(0, len(texts), batch_size)]
    return torch.cat([clip.encode_text(clip.tokenizer(batch)).cpu() for batch in batches])


def zero_shot_head(clip, classnames, templates):
    """Return T: (C, d), the zero-shot classifier: the mean text feature over templates, unit norm.

    templates: functions from a class name to a prompt. Source: CLIP (arXiv 2103.00020), 3.1.4.
    """
    from open_clip import build_zero_shot_classifier

    with autocast(clip.device):
        head = build_zero_shot_classifier(
            clip.model, clip.tokenizer, classnames, templates, num_classes_per_batch=100,
            device=clip.device,
        )
    return F.normalize(head.T.float(), dim=-1).cpu()


def features_key(clip, items):
    """Return what decides the features of items: the model, its precision, and the image files."""
    return clip.key, str(precision(clip.device)), stamps(items)


def cached_features(clip, dataset, domain, items, folder):
    """Return z: (N, d), on the CPU, of `items` of one domain, by the original weights of `clip`.

    The domain is encoded once and stored in `folder`; then its features stay in memory.
    """
    everything = dataset.images[domain]
    memory = dataset.name, domain, *dataset.classes[:1]  # base and new classes have the same name
    if memory not in clip.cache or clip.cache[memory][0] is not everything:
        name = f"{dataset.name}-{domain}".replace(" ", "_")
        path = artifact_path(folder, name, features_key(clip, everything))
        label = f"{dataset.name} {domain}"
        z = main_process_first(
            lambda: artifact(path, lambda: encode_images(clip, everything, label=label))
        )
        clip.cache[memory] = everything, z
    return clip.cache[memory][1][rows_in(everything, items)]
