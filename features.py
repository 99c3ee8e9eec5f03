"""CLIP, and what it makes of images and texts: load a model, encode, and cache the features of a data set."""

import datetime
import difflib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data import digest, fail, sha, write_atomically

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
    base: tuple = ()  # (model name, tag of its weights) in open_clip's terms, also where `name` is a checkpoint
    fingerprint: str = ""  # a hash of all that makes its features; see load_clip
    front: torch.nn.Module | None = None  # the frozen stages that freeze_stages cut off, if any

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

    A name of open_clip's with a tag of weights, hf-hub:…, local-dir:PATH, or a checkpoint that finetune.py wrote.
    Exits with status 2 when the name, the tag or the file does not exist, the weights cannot be had, or OpenAI's would run
    with another activation than theirs.
    """
    import open_clip  # here, for it takes seconds, and what needs no CLIP need not wait

    name, pretrained = args.model or dataset.about.get("model") or DEFAULT_MODEL, args.pretrained
    base, tuned = name, None
    if name.endswith(".pt"):
        base, pretrained, tuned = read_checkpoint(name)
    if base.startswith("local-dir:"):
        folder = Path(base.removeprefix("local-dir:"))
        absent = [f for f in ("open_clip_config.json", "open_clip_model.safetensors") if not (folder / f).is_file()]
        if absent:
            fail(f"--model {base}: {folder / absent[0]} does not exist. A local-dir: model is a folder in open_clip's format.")
    elif not base.startswith("hf-hub:"):
        if base not in open_clip.list_models():
            alike = difflib.get_close_matches(base, open_clip.list_models(), cutoff=0)
            fail(f"--model {base}: open_clip knows no such model. Nearest names: {', '.join(alike)}.")
        tags = open_clip.list_pretrained_tags_by_model(base)
        if pretrained not in tags and not Path(pretrained).is_file():
            fail(f"--pretrained {pretrained}: no such weights of {base}. There are: {', '.join(tags) or 'none'}.")
    if base.startswith(("local-dir:", "hf-hub:")):
        pretrained = None  # they bring their own
    device = the_device()
    try:
        model, augment, preprocess = open_clip.create_model_and_transforms(
            base, pretrained, device=device, require_pretrained=True,
            aug_cfg={"scale": (0.9, 1.0)},  # FLYP's mild random crop, no flip
        )
        tokenizer = open_clip.get_tokenizer(base)
    except Exception as error:  # whatever the hub, a damaged file or a bad config raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if base.startswith("local-dir:"):
            fail(f"could not load {base} ({reason}). Check its open_clip_config.json and weights, or copy it again.")
        fail(
            f"could not load {base} ({reason}). It comes from the Hugging Face hub{whence(base, pretrained)} and is cached "
            "after the first time: run once with a network, or name a folder with --model local-dir:PATH."
        )
    # a tag, a file or, in the hub's cache, a folder above it tells whose weights they are
    if pretrained and "openai" in "/".join(Path(pretrained).parts[-4:]).lower() and not quick_gelu(model):
        fail(f"--model {base}: OpenAI's weights were trained with QuickGELU, and are wrong without. Say {base}-quickgelu.")
    if tuned:
        state = towers(tuned)
        odd = model.load_state_dict(state, strict=False).unexpected_keys  # what was frozen is not in it
        if odd or not state:
            fail(f"--model {name}: {f'{odd[0]} is not of {base}' if odd else 'holds a head alone, no tower'}. Name another.")
    if device.type == "cuda":
        reason = "autocast; weights float32" if precision(device) == torch.bfloat16 else "it has no bfloat16"
        print(f"device: {torch.cuda.get_device_name()}, {str(precision(device)).removeprefix('torch.')} ({reason})")
    else:
        print("device: cpu, float32 (no CUDA GPU here)")
    # Frozen until finetune.py says otherwise: PyTorch's attention rounds differently where a weight wants a gradient.
    # CHOICE: eval mode throughout, finetuning included: CLIP has no dropout, and where a tower has batch normalisation a
    # few hundred images of one domain would overwrite its statistics; alternative: train mode.
    model.to(memory_format=torch.channels_last)  # depthwise convolutions are twice as fast so on a CPU
    clip = Clip(model.eval().requires_grad_(False), preprocess, augment, tokenizer, device, name, (base, pretrained))
    clip.fingerprint = fingerprint(clip)
    return clip


def read_checkpoint(path):
    """(model name, tag of its weights, state dict) of a checkpoint of finetune.py; exits with status 2 at any other file."""
    try:
        state = torch.load(path, map_location="cpu")
        return *state["base"], state["modules"]
    except FileNotFoundError:
        fail(f"--model {path}: no such file. Checkpoints lie in runs/…/checkpoints/.")
    except Exception:  # torch.load raises what it likes at a file that is not its own
        fail(f"--model {path}: not a checkpoint of finetune.py. Name another file, or a model of open_clip.")


def towers(state):
    """The state dict of clip.model in that of a checkpoint, which calls it "clip" beside the "head"."""
    return {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}


def quick_gelu(model):
    """Whether a model's towers compute with QuickGELU, OpenAI's approximation x · sigmoid(1.702 x)."""
    from open_clip.transformer import QuickGELU

    return any(isinstance(module, QuickGELU) for module in model.modules())


def whence(name, pretrained):
    """", timm/vit_base_patch16_clip_224.openai," or the like: the repository that open_clip gets a model from; or ""."""
    from open_clip import get_pretrained_cfg

    repository = get_pretrained_cfg(name, pretrained).get("hf_hub", "").rstrip("/") if pretrained else name.split(":")[-1]
    return repository and f", {repository},"


def ranks():
    """(rank, number of processes) under torchrun, whose process group is joined at the first call; (0, 1) without it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        the_device()  # each process its own, before they meet
        # they meet after work of uneven length (captions of a whole data set): wait for each other for a week
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=7))
    return int(os.environ.get("RANK", 0)), world


def the_device():
    """This process's GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def freeze_stages(clip, stages):
    """Cut the first `stages` stages off the image tower: they become clip.front, and clip.model takes their output.

    They are never trained, so what they make of an image need be computed once (`front_features`): on a CPU they are most
    of the work. For towers of timm's EfficientNet family; exits with status 2 at any other, or at too many stages.
    """
    if not stages:
        return
    trunk = getattr(clip.model.visual, "trunk", None)
    if clip.name.endswith(".pt"):  # the next checkpoint would not tell these stages, and its base has others
        fail(f"--model {clip.name}: stages of a checkpoint cannot be frozen. Say --frozen-stages 0, or another --model.")
    if not all(hasattr(trunk, part) for part in ("conv_stem", "bn1", "blocks")):
        fail(f"{clip.name}: only towers of timm's EfficientNet family can be frozen by stages. Say --frozen-stages 0.")
    if not 0 < stages <= len(trunk.blocks):
        fail(f"{clip.name}: cannot freeze {stages} stages of {len(trunk.blocks)}. Say another --frozen-stages.")
    clip.front = torch.nn.Sequential(trunk.conv_stem, trunk.bn1, *trunk.blocks[:stages])
    trunk.conv_stem = trunk.bn1 = torch.nn.Identity()
    for i in range(stages):
        trunk.blocks[i] = torch.nn.Identity()


# ---------------------------------------------------------------------------------------------------------------------
# Encode


BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises at broken files


def open_image(folder, where):
    """RGB image of `where`: a path relative to `folder`, or (path of a tar, offset, size) of a member of an archive.

    (path of a tar, offset, size, border): without that many pixels at each side.
    """
    file = folder / where if isinstance(where, str) else io.BytesIO(read_member(where))
    with Image.open(file) as image:
        image = image.convert("RGB")
    return ImageOps.crop(image, where[3]) if len(where) == 4 and not isinstance(where, str) else image


def read_member(where):
    """The bytes of one member of an archive, `where` = (path of a tar, offset, size, …)."""
    tar, offset, size = where[:3]
    with open(tar, "rb") as archive:
        archive.seek(offset)
        return archive.read(size)


class Images(torch.utils.data.Dataset):
    """(image tensor, label) for each of `items`, a list of (where, label); see open_image for `where`."""

    def __init__(self, folder, items, transform):
        self.folder, self.items, self.transform = folder, items, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        where, label = self.items[i]
        try:
            return self.transform(open_image(self.folder, where)), label
        except BROKEN:
            return None, label  # a worker process cannot stop the program with a clear line: the main one will


def collate(batch):
    """Images (B, C, H, W) or None, their labels (B,), and the labels of images that could not be read."""
    good = [(image, label) for image, label in batch if image is not None]
    images, labels = torch.utils.data.default_collate(good) if good else (None, None)
    return images, labels, [label for image, label in batch if image is None]


def image_batches(folder, items, transform, batches, device, unreadable=None):
    """Yield (images (B, 3, H, W), labels (B,)) on `device` for each of `batches`, lists of indices into `items`.

    At an unreadable image it exits with status 2, naming it; or, given a list `unreadable`, adds its label to that and goes on.
    """
    gpu = device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        Images(folder, [(where, i) for i, (where, _) in enumerate(items)], transform), batch_sampler=batches,
        collate_fn=collate, num_workers=min(8, os.cpu_count()) if gpu else 0, pin_memory=gpu,
    )
    for images, rows, bad in loader:
        if bad and unreadable is None:
            where = items[bad[0]][0]
            name = folder / where if isinstance(where, str) else f"{where[0]}, byte {where[1]}"
            fail(f"{name}: not a readable image. Replace or remove it.")
        if bad:
            unreadable += [items[i][1] for i in bad]
        if images is not None:
            labels = torch.tensor([items[i][1] for i in rows.tolist()])
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def in_order(n, batch_size):
    """Batches of the indices 0 … n-1, in their order."""
    return [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]


@torch.no_grad()
def encode_images(clip, folder, items, batch_size=256, label="images"):
    """z: (N, d) L2-normalised float32 features of `items` on the CPU, in their order."""
    features = []
    with tqdm(total=len(items), desc=f"encoding {label}", unit="img") as bar:
        for images, _ in image_batches(folder, items, clip.preprocess, in_order(len(items), batch_size), clip.device):
            if clip.front:
                with autocast(clip.device):
                    images = clip.front(images)
            features.append(encode_batch(clip, images).cpu())
            bar.update(len(images))
    return torch.cat(features)


@torch.no_grad()
def encode_batch(clip, images):
    """z: (B, d) L2-normalised float32 features of what clip.model takes: image tensors, or what clip.front makes of them."""
    with autocast(clip.device):
        z = clip.model.encode_image(images)
    return torch.nn.functional.normalize(z.float(), dim=-1)


@torch.no_grad()
def front_features(clip, folder, items, transform, batch_size=128):
    """What clip.front makes of `items`, in their order: (N, c, h, w) on the model's device."""
    batches = image_batches(folder, items, transform, in_order(len(items), batch_size), clip.device)
    with autocast(clip.device):
        return torch.cat([clip.front(images) for images, _ in batches])


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


def encode_head(clip, templates):
    """T: (C, d), a zero-shot classifier: the mean over T templates of unit-norm text features, made unit norm again.

    templates: T lists of C strings, data.prompts. Source: CLIP (arXiv 2103.00020), 3.1.4.
    """
    t = encode_texts(clip, [text for texts in templates for text in texts]).view(len(templates), len(templates[0]), -1)
    return torch.nn.functional.normalize(t.mean(0), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Cache


def fingerprint(clip):
    """A hash of the model: its name, architecture, weights, preprocessing and precision."""
    weights = digest(clip.model.state_dict().values())
    what = (clip.name, str(clip.model), weights, str(clip.preprocess), str(precision(clip.device)))
    return sha(repr(what))


def cached_features(clip, dataset, domain, run):
    """{where: row}, z (N, d): features of all images of one domain, kept beside the folder `run` for all runs.

    The key: the model's fingerprint, and the path, size and time of change of every image, or of the archive it is in.
    """
    items, stats = dataset.images[domain], {}
    for where, _ in items:
        file = str(dataset.folder / where) if isinstance(where, str) else where[0]
        if file not in stats:
            stats[file] = (s := os.stat(file)).st_size, s.st_mtime_ns
    key = sha(repr((clip.fingerprint, str(dataset.folder.resolve()), [where for where, _ in items], [*stats.values()])))
    path = run.parent / ".features" / f"{dataset.name}-{domain}-{key}.pt"
    if path.exists():
        z = torch.load(path)
    else:
        z = encode_images(clip, dataset.folder, items, label=f"{dataset.name} {domain}")
        write_atomically(path, lambda part: torch.save(z, part))
    return {where: row for row, (where, _) in enumerate(items)}, z
