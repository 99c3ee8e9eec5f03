"""CLIPstyler (arXiv 2112.00374), the baseline of LDFS's figure 5: networks that repaint images of
the source in a style that is given by words. Step 2 takes the features of the repainted images in
place of a mapper's.

Each network and its features are stored in runs/…/mappers/.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import Compose, RandomCrop, RandomPerspective, Resize

from batches import image_batches, in_order
from core.artifacts import artifact, artifact_path
from core.distributed import main_process_first, progress_bar
from core.methods import recipes_of
from core.results import record
from core.utils import fail
from data import rows_in
from features import autocast, cached_features, encode_texts, features_key
from mapper import measure_mapper

# CHOICE: the public code's weights and τ, but λ_c = 500 because L_c is another one: in sketches of
# source images more objects fade away with 150, and colours hardly change with 1500; alternative:
# 150.
LAMBDA_DIR, LAMBDA_PATCH, LAMBDA_CONTENT, LAMBDA_TV, TAU = 500, 9000, 500, 2e-3, 0.7

# CHOICE: 100 steps of 4 images at a rate of 1e-2 (40 of them match 100 at 2e-3 on validation
# images); alternative: the public code's 200 at 5e-4, halved after 100, for one image.
STEPS, BATCH_SIZE, LR = 100, 4, 1e-2


class StyleNet(nn.Module):
    """f: (B, 3, H, W) in [0, 1] -> the same: a U-Net that corrects the logits of its input.

    CHOICE: small, and the identity (within 0.01) at first, because its few steps are for all
    images, not for one; alternative: the public code's U-Net of twice the depth, from a random
    start.
    """

    def __init__(self, width=16):
        super().__init__()
        self.first = conv_layer(3, width)
        self.down = conv_layer(width, 2 * width, stride=2)
        self.deep = nn.Sequential(
            conv_layer(2 * width, 4 * width, stride=2), conv_layer(4 * width, 4 * width)
        )
        self.up = conv_layer(6 * width, 2 * width)
        self.top = conv_layer(3 * width, width)
        self.last = nn.Conv2d(width, 3, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x):
        fine = self.first(x)                                              # (B, width, H, W)
        middle = self.down(fine)                                          # (B, 2 width, H/2, W/2)
        coarse = F.interpolate(self.deep(middle), middle.shape[-2:])      # (B, 4 width, H/2, W/2)
        middle = F.interpolate(self.up(torch.cat([coarse, middle], 1)), x.shape[-2:])
        correction = self.last(self.top(torch.cat([middle, fine], 1)))    # (B, 3, H, W)
        return torch.sigmoid(x.logit(eps=0.01) + correction)


def conv_layer(channels_in, channels_out, stride=1):
    """Return a 3 x 3 convolution with normalisation and ReLU."""
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, padding_mode="reflect")
    return nn.Sequential(conv, nn.InstanceNorm2d(channels_out, affine=True), nn.ReLU())


def direction_losses(z, z_hat, delta_t, tau=0.0):
    """Return R(l, τ), (B,), of l = 1 − cos( ẑ − z, Δt ): 0 up to τ, else l.

    z, z_hat: (B, d). delta_t: Δt, (d,).
    """
    losses = 1 - F.cosine_similarity(z_hat - z, delta_t[None], dim=-1, eps=1e-4)
    return torch.where(losses <= tau, 0, losses)  # NaN stays NaN


def total_variation(x):
    """Return L_tv: the length of all differences of neighbours, also diagonal ones, averaged over
    the images of x, (B, 3, H, W).
    """
    pairs = [
        (x[..., 1:], x[..., :-1]), (x[..., 1:, :], x[..., :-1, :]),
        (x[..., 1:, 1:], x[..., :-1, :-1]), (x[..., 1:, :-1], x[..., :-1, 1:]),
    ]
    return sum((a - b).flatten(1).norm(dim=1).mean() for a, b in pairs)


def clipstyler_losses(network, images, delta_t, encode, patches=4):
    """Return the terms of L = λ_d L_dir + λ_tv L_tv + λ_c L_c + λ_p L_patch, by name.

    images: (B, 3, H, W). delta_t: Δt, (d,). encode: images -> (z (B, d), feature maps (B, …)).
    L_patch counts patches whose loss is above τ.
    Source: CLIPstyler and its public code (train_CLIPstyler.py).
    CHOICE: 4 patches of each image in place of 64, of a quarter of its side as in the public code
    (half of it does no better by L_dir), at one place in all images of a batch, and enlarged first,
    because RandomPerspective gives NaN on 4 x 4 pixels; alternative: 16 views of whole images, as
    its train_fast.py.
    CHOICE: L_c on maps of CLIP's own tower, a third of the way through it, relative to their size,
    so that no other weights are needed; alternative: VGG-19's conv4_2 and conv5_2, as published.
    """
    size, painted = images.shape[-1], network(images)
    random_patch = Compose([RandomCrop(size // 4), Resize(size), RandomPerspective(p=1)])
    z, content = encode(images)
    z_hat, painted_content = encode(painted)
    z_patch, _ = encode(torch.cat([random_patch(painted) for _ in range(patches)]))
    patch_losses = direction_losses(z.repeat(patches, 1), z_patch, delta_t, TAU)   # (patches · B,)
    change = (painted_content - content).square().mean() / content.square().mean()
    return {
        "L_dir": LAMBDA_DIR * direction_losses(z, z_hat, delta_t).mean(),
        "L_tv": LAMBDA_TV * total_variation(painted),
        "L_c": LAMBDA_CONTENT * change,
        "L_patch": LAMBDA_PATCH * patch_losses.mean(),
    }


def encode_with_maps(clip, images):
    """Return (z (B, d), feature maps (B, …)) of images (B, 3, H, W) in [0, 1], with gradient."""
    with autocast(clip.device):
        output = clip.model.forward_intermediates(image=clip.normalise(images))
    maps = output["image_intermediates"]
    return output["image_features"].float(), maps[len(maps) // 3].float()


def train_style(clip, items, delta_t, seed=0, steps=STEPS):
    """Train a StyleNet on images of `items` for the direction Δt, (d,); return (network, history).

    history: the loss terms of each step, [{"L_dir": …}].
    CHOICE: Δt of the phrases alone (a cosine of 0.92 to 0.96, on emoji, with the mean over prompts
    of all classes); alternative: the public code's mean over 80 templates.
    """
    torch.manual_seed(seed)
    network = StyleNet().to(clip.device)
    encode = functools.partial(encode_with_maps, clip)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    order = [torch.randperm(len(items))[:BATCH_SIZE].tolist() for _ in range(steps)]
    keys = ([(items[i][0], None) for i in rows] for rows in order)
    batches, history = image_batches(keys, clip.preprocess, clip.device), []
    for images, _ in (bar := progress_bar(batches, desc="style", total=steps, leave=False)):
        losses = clipstyler_losses(network, images / 255, delta_t.to(clip.device), encode)
        loss = sum(losses.values())
        if not loss.isfinite():
            fail(f"clipstyler: the loss is {loss.item()} at step {len(history)}. Check the images.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: term.item() for name, term in losses.items()})
        bar.set_postfix(loss=f"{loss.item():.1f}", refresh=False)
    return network.requires_grad_(False), history


def repainted_features(clip, network, items):
    """Return ẑ: (N, d) features, on the CPU, of the images of `items` repainted by `network`."""
    keys = in_order([location for location, _ in items], 256)
    batches = image_batches(keys, clip.preprocess, clip.device)
    z = [encode_with_maps(clip, network(images / 255))[0].cpu() for images, _ in batches]
    return torch.cat(z)


# -------------------------------------------------------------------------------------------------
# Load or train


def style_path(settings, dataset, clip, domain, seed):
    """Return where network and features are stored; the hash in the name covers all inputs."""
    source, phrases = settings.source, dataset.meta.phrases
    train = dataset.split(source, source, "train", seed)
    inputs = (
        seed, settings.mapper_steps or STEPS, phrases[source], phrases[domain],
        features_key(clip, train), features_key(clip, dataset.images[source]),
    )
    name = f"clipstyler-{domain}-seed{seed}".replace(" ", "_")
    return artifact_path(settings.run / "mappers", name, inputs)


def style_artifact(settings, dataset, clip, domain, seed):
    """Return {"network": weights, "z": ẑ of all source images, "history", "measures", "n"}, from
    disk or trained now. Measures are of the n training images.
    """
    source, phrases = settings.source, dataset.meta.phrases
    train, items = dataset.split(source, source, "train", seed), dataset.images[source]
    # by every rank, because the ranks that only load the artifact do not run make()
    z = cached_features(clip, dataset, source, train, settings.cache)

    def make():
        text = dict(zip(phrases, encode_texts(clip, [*phrases.values()])))
        delta_t, steps = text[domain] - text[source], settings.mapper_steps or STEPS
        network, history = train_style(clip, train, delta_t, seed, steps)
        z_hat = repainted_features(clip, network, items)                                    # (N, d)
        train_z_hat = z_hat[rows_in(items, train)]
        texts = (text[d].expand_as(z) for d in (source, domain))
        measures = measure_mapper(lambda _: train_z_hat, z, *texts, sigma=0)
        del measures["spread"], measures["noise"]  # both are 1, because Δt is the same for all
        return {
            "network": network.cpu().state_dict(), "z": z_hat, "history": history,
            "measures": measures, "n": len(train),
        }

    path = style_path(settings, dataset, clip, domain, seed)
    return main_process_first(lambda: artifact(path, make))


class FixedFeatures(nn.Module):
    """ẑ, (N, d), of N items in place of a mapper, which would compute it from their z."""

    def __init__(self, z_hat):
        super().__init__()
        self.z_hat = nn.Parameter(z_hat, requires_grad=False)

    def forward(self, z):
        return self.z_hat


def load_styled_features(settings, dataset, clip, seed, items):
    """Return {target domain: FixedFeatures of the source's `items`, repainted}."""
    rows = rows_in(dataset.images[settings.source], items)
    return {
        domain: FixedFeatures(
            style_artifact(settings, dataset, clip, domain, seed)["z"][rows].to(clip.device)
        )
        for domain in dataset.styles(settings.source)
    }


def style_pictures(settings, dataset, clip):
    """Return {domain: images (B, 3, H, W) in [0, 1], on the CPU} of some test images: the source's
    own, and repainted by seed 0 for each target.

    Without clipstyler among the methods the dict is empty.
    """
    if "clipstyler" not in recipes_of(settings.methods):
        return {}
    source = settings.source
    places = [location for location, _ in dataset.split(source, source, "test", 0)[::30][:10]]
    [(images, _)] = image_batches(in_order(places, 10), clip.preprocess, torch.device("cpu"))
    images, network = images / 255, StyleNet().requires_grad_(False)
    pictures = {source: images}
    for domain in dataset.styles(source):
        content = style_artifact(settings, dataset, clip, domain, 0)
        network.load_state_dict(content["network"])
        pictures[domain] = network(images)
    return pictures


def style_records(settings, dataset, clip):
    """Return records of `measure_mapper`, for the tables.

    Without clipstyler among the methods the list is empty.
    """
    if "clipstyler" not in recipes_of(settings.methods):
        return []
    records = []
    for seed in range(settings.seeds):
        for domain in dataset.styles(settings.source):
            content = style_artifact(settings, dataset, clip, domain, seed)
            values, n = content["measures"], content["n"]
            records.append(record(settings, "mapper", "clipstyler", seed, values, n, domain=domain))
    return records
