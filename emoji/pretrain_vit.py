"""Train a mini CLIP whose image tower is a small ViT, for what wants one, as MaPLe does: it learns
to see what emoji/clip sees on the pool, and keeps its text tower.

    python -m emoji.pretrain_vit                        # data/emoji_vit, in open_clip's format
    bash run_ldfs.sh emoji 3d --model local-dir:data/emoji_vit --methods maple maple+ldfs

15,000 drawings do not teach a ViT to see from words alone; another tower's features of them, each
augmented anew, say more: distillation (arXiv 1503.02531), here of features as they are compared.
"""

import json
import shutil
from pathlib import Path
from utils import short_hash, write_atomically

import open_clip
import torch

from config import Parser, number
from emoji import draw
from emoji.pretrain_clip import CLIP, augment, fit, pixels, save_weights

VIT = {"image_size": draw.SIZE, "patch_size": 8, "width": 192, "layers": 4, "head_width": 64}


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all data sets")
    parser.add_argument("--epochs", type=number(int, 0), default=15, help="passes over the pool")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = pixels(draw.read_pool(args.data))
    config = json.loads((CLIP / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = VIT
    teacher = open_clip.create_model(f"local-dir:{CLIP}").eval().requires_grad_(False)
    teacher.visual.to(memory_format=torch.channels_last)
    model = open_clip.CLIP(**config["model_cfg"])
    of_text = {k: v for k, v in teacher.state_dict().items() if not k.startswith("visual.")}
    model.load_state_dict(of_text, strict=False)

    def loss_of(batch, generator):
        x = augment(images[batch], generator)
        with torch.no_grad():
            seen = teacher.encode_image(x, normalize=True)                                 # (B, d)
        return 1 - (model.encode_image(x, normalize=True) * seen).sum(1).mean()

    tower, key = model.visual, [args.epochs, VIT, short_hash(images, [*of_text.values()])]
    groups = [{"params": [*tower.parameters()], "lr": 1e-3}]
    fit(
        "vit", tower, groups, len(images), args.epochs, loss_of, args.data / ".pretrain", key,
        batch_size=64,
    )

    folder = args.data / "emoji_vit"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CLIP / name, folder / name)
    save_weights(model, folder)
    text = json.dumps(config, indent=1) + "\n"
    write_atomically(folder / "open_clip_config.json", lambda part: part.write_text(text))


if __name__ == "__main__":
    main()
