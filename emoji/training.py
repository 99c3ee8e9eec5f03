"""What the pretraining scripts share: flags, images as tensors, augmentation, the training loop."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from core.artifacts import artifact_path, load, save, write_atomically
from core.config import Parser, number
from core.utils import ROOT
from emoji.packages import SIZE

CLIP = ROOT / "emoji/clip"
BATCH_SIZE = 256


def make_parser(doc, epochs):
    """Return the parser of a pretraining script with its docstring and its default of --epochs."""
    parser = Parser(description=doc.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of all data sets")
    add("--epochs", type=number(int, 0), default=epochs, help="passes over the pool")
    return parser


def to_uint8(images):
    """Return RGB images of SIZE x SIZE as a uint8 tensor, (N, 3, SIZE, SIZE)."""
    raw = bytearray(b"".join(image.tobytes() for image in images))
    pixels = torch.frombuffer(raw, dtype=torch.uint8)
    return pixels.view(len(images), SIZE, SIZE, 3).permute(0, 3, 1, 2)


def augment(images, generator):
    """Return uint8 images (B, 3, SIZE, SIZE) as augmented and normalised float images.

    Each image gets its own zoom, shift, rotation, flip, brightness and saturation; 15 % lose all
    colour, and 30 % get a grey or white patch.
    """

    def uniform(low, high):
        return torch.empty(len(images), 1, 1, 1).uniform_(low, high, generator=generator)

    angle = uniform(-0.2, 0.2)
    zoom = uniform(0.85, 1.25)
    flip = (uniform(0, 1) < 0.5) * 2 - 1
    row_x = torch.cat([zoom * angle.cos() * flip, -zoom * angle.sin(), uniform(-0.15, 0.15)], 3)
    row_y = torch.cat([zoom * angle.sin() * flip, zoom * angle.cos(), uniform(-0.15, 0.15)], 3)
    theta = torch.cat([row_x, row_y], 2)[:, 0]                                    # (B, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    x = images.float() / 255 - 1  # White is 0 here, because grid_sample pads with 0.
    x = F.grid_sample(x, grid, align_corners=False) + 1
    x = x * uniform(0.8, 1.05)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(0.5, 1.5) * (uniform(0, 1) > 0.15)
    position = torch.arange(SIZE)
    rows = (position - uniform(0, SIZE)).abs() < uniform(4, 14)                   # (B, 1, 1, SIZE)
    columns = (position - uniform(0, SIZE)).abs() < uniform(4, 14)
    patch = rows.transpose(2, 3) & columns & (uniform(0, 1) < 0.3)
    shade = uniform(0.3, 0.9).where(uniform(0, 1) < 0.5, 1)
    x = shade.where(patch, x).clamp(0, 1)
    return ((x - 0.498) / 0.502).contiguous(memory_format=torch.channels_last)


def fit(name, model, groups, n, epochs, loss_of, folder, key, frozen=(), batch_size=BATCH_SIZE):
    """Train a model on n examples, of which 2 % are held out, by AdamW and a one-cycle schedule.

    groups: the optimizer's parameter groups, each with its learning rate. loss_of(indices,
    generator) -> loss of these examples. frozen: modules that are not trained. The state after each
    epoch is stored in `folder`, so that a killed run is resumed; `key` (a tuple) is everything else
    that the training depends on.
    """
    rates = [group["lr"] for group in groups]
    path = artifact_path(folder, name, (*key, epochs, rates))
    generator = torch.Generator().manual_seed(0)
    held_out, training = torch.randperm(n, generator=generator).split([n // 50, n - n // 50])
    n_batches = len(training) // batch_size
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=epochs * n_batches, pct_start=0.1
    )
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    start_epoch = 0
    if path.exists():
        state = load(path)
        start_epoch = state["epoch"]
        for name_of_part, part in parts.items():
            part.load_state_dict(state[name_of_part])

    for epoch in range(start_epoch, epochs):
        generator.manual_seed(epoch)
        model.train()
        for module in frozen:
            module.eval().requires_grad_(False)  # The statistics of its batch norms stay, too.
        order = training[torch.randperm(len(training), generator=generator)]
        batches = order[:n_batches * batch_size].view(n_batches, batch_size)
        for batch in (bar := tqdm(batches, desc=f"{name}, epoch {epoch + 1} of {epochs}")):
            loss = loss_of(batch, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        model.eval()
        with torch.no_grad():
            loss = loss_of(held_out, generator.manual_seed(0))
        print(f"{name}, epoch {epoch + 1}: loss {loss:.3f} on {len(held_out)} held out", flush=True)
        states = {name_of_part: part.state_dict() for name_of_part, part in parts.items()}
        save({"epoch": epoch + 1, **states}, path)


def save_weights(model, folder):
    """Write a model's weights, in half precision, in open_clip's format of a local-dir model."""
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    path = folder / "open_clip_model.safetensors"
    write_atomically(path, lambda part: save_file(state, part))
