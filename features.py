"""CLIP, and what it makes of images and texts: load a model, encode, and cache the features of a data set."""

import difflib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from PIL import Image
from tqdm import tqdm

from data import digest, fail, write_atomically

DEFAULT_MODEL = "ViT-B-16-quickgelu"  # both papers' backbone; OpenAI's weights were trained with QuickGELU


@dataclass
class Clip:
    """A CLIP model with what belongs to it. `preprocess` is for evaluation, `augment` for training images."""

    model: torch.nn.Module
    preprocess: object
    augment: object
    tokenizer: object
    device: torch.device
    name: str

    @property
    def logit_scale(self):
        """s = exp(logit_scale), the factor on cosines (about 100 in OpenAI's models), as a float."""
        return self.model.logit_scale.exp().item()


def precision(device):
    """The dtype that towers compute in: bfloat16 on a GPU that has it, float32 elsewhere.

    Weights stay in float32: fp16 weights give NaN after an Adam step, and bfloat16 has the range that fp16 lacks.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def autocast(device):
    """The context that forward passes of towers run in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


def load_clip(args, dataset):
    """The Clip that --model and --pretrained name, in eval mode, on the GPU if there is one.

    Exits with status 2 when the name, the tag or the folder does not exist or the weights cannot be had.
    """
    name = args.model or dataset.model or DEFAULT_MODEL
    pretrained = None
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        absent = [f for f in ("open_clip_config.json", "open_clip_model.safetensors") if not (folder / f).is_file()]
        if absent:
            fail(f"--model {name}: {folder / absent[0]} does not exist. A local-dir: model is a folder in open_clip's format.")
    elif not name.startswith("hf-hub:"):
        if name not in open_clip.list_models():
            alike = difflib.get_close_matches(name, open_clip.list_models(), cutoff=0)
            fail(f"--model {name}: open_clip knows no such model. Nearest names: {', '.join(alike)}.")
        pretrained = args.pretrained
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags and not Path(pretrained).is_file():
            fail(f"--pretrained {pretrained}: no such weights of {name}. There are: {', '.join(tags) or 'none'}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, augment, preprocess = open_clip.create_model_and_transforms(
            name, pretrained, device=device, aug_cfg={"scale": (0.9, 1.0)}  # FLYP's mild random crop, no flip
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # whatever the hub, a damaged file or a bad config raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if name.startswith("local-dir:"):
            fail(f"could not load {name} ({reason}). Check its open_clip_config.json and weights, or copy it again.")
        fail(
            f"could not load {name} ({reason}). It comes from the Hugging Face hub and is cached after the first time: "
            "run once with a network, or name a folder with --model local-dir:PATH."
        )
    if device.type == "cuda":
        reason = "autocast; weights float32" if precision(device) == torch.bfloat16 else "it has no bfloat16"
        print(f"device: {torch.cuda.get_device_name()}, {str(precision(device)).removeprefix('torch.')} ({reason})")
    else:
        print("device: cpu, float32 (no CUDA GPU here)")
    # Frozen until finetune.py says otherwise: PyTorch's attention rounds differently where a weight wants a gradient.
    # CHOICE: eval mode throughout, finetuning included: CLIP has no dropout, and where a tower has batch normalisation a
    # few hundred images of one domain would overwrite its statistics; alternative: train mode.
    return Clip(model.eval().requires_grad_(False), preprocess, augment, tokenizer, device, name)


# ---------------------------------------------------------------------------------------------------------------------
# Encode


class Images(torch.utils.data.Dataset):
    """(image tensor, label) for each of `items`, a list of (path relative to `folder`, label)."""

    def __init__(self, folder, items, transform):
        self.folder, self.items, self.transform = folder, items, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, label = self.items[i]
        try:
            with Image.open(self.folder / path) as image:
                return self.transform(image.convert("RGB")), label
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what PIL raises at broken files
            # a worker process cannot stop the program with a clear line, so the name travels to the main one
            return None, str(self.folder / path)


def collate(batch):
    """A batch of tensors; or, where an image could not be read, its name."""
    bad = [name for image, name in batch if image is None]
    return bad[0] if bad else torch.utils.data.default_collate(batch)


def image_batches(folder, items, transform, batch_size, device, generator=None):
    """Yield (images (B, 3, H, W), labels (B,)) on `device`; shuffled by `generator` if one is given.

    Exits with status 2 at an unreadable image, naming it.
    """
    gpu = device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        Images(folder, items, transform), batch_size, shuffle=generator is not None, generator=generator,
        collate_fn=collate, num_workers=min(8, os.cpu_count()) if gpu else 0, pin_memory=gpu,
    )
    for batch in loader:
        if isinstance(batch, str):
            fail(f"{batch}: not a readable image. Replace or remove it.")
        yield [part.to(device, non_blocking=True) for part in batch]


@torch.no_grad()
def encode_images(clip, folder, items, batch_size=256, label="images"):
    """z: (N, d) L2-normalised float32 features of `items` on the CPU, in their order."""
    features = []
    with tqdm(total=len(items), desc=f"encoding {label}", unit="img") as bar:
        for images, _ in image_batches(folder, items, clip.preprocess, batch_size, clip.device):
            with autocast(clip.device):
                z = clip.model.encode_image(images)
            features.append(torch.nn.functional.normalize(z.float(), dim=-1).cpu())
            bar.update(len(images))
    return torch.cat(features)


@torch.no_grad()
def encode_texts(clip, texts, batch_size=1024):
    """t: (N, d) L2-normalised float32 features of a list of strings on the CPU; each different string is encoded once."""
    unique = sorted(set(texts))
    features = []
    for i in range(0, len(unique), batch_size):
        with autocast(clip.device):
            t = clip.model.encode_text(clip.tokenizer(unique[i:i + batch_size]).to(clip.device))
        features.append(torch.nn.functional.normalize(t.float(), dim=-1).cpu())
    row = {text: i for i, text in enumerate(unique)}
    return torch.cat(features)[[row[t] for t in texts]]


# ---------------------------------------------------------------------------------------------------------------------
# Cache


def fingerprint(clip):
    """A hash of the model: its name, architecture, weights, preprocessing and precision."""
    weights = digest(clip.model.state_dict().values())
    what = (clip.name, str(clip.model), weights, str(clip.preprocess), str(precision(clip.device)))
    return hashlib.sha256(repr(what).encode()).hexdigest()[:20]


def cached_features(clip, dataset, domain, run):
    """{path: row}, z (N, d): features of all images of one domain, kept beside the folder `run` for all runs.

    The key: the model's fingerprint, and the path, size and time of change of every image.
    """
    items = dataset.images[domain]
    stats = [(path, (s := (dataset.folder / path).stat()).st_size, s.st_mtime_ns) for path, _ in items]
    made_of = (fingerprint(clip), str(dataset.folder.resolve()), stats)
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]
    path = run.parent / ".features" / f"{dataset.name}-{domain}-{key}.pt"
    if path.exists():
        z = torch.load(path)
    else:
        z = encode_images(clip, dataset.folder, items, label=f"{dataset.name} {domain}")
        write_atomically(path, lambda part: torch.save(z, part))
    return {p: row for row, (p, _) in enumerate(items)}, z
