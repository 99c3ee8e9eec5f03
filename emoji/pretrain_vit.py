"""Train a mini CLIP whose image tower is a small ViT, for methods that require one, as MaPLe does.

    python -m emoji.pretrain_vit                        # data/emoji_vit, in open_clip's format
    bash run_ldfs.sh emoji 3d --model local-dir:data/emoji_vit --methods maple maple+ldfs

15,000 drawings with captions do not teach a ViT to see. So it learns to give the image features of
emoji/clip for the pool's drawings, augmented anew in each epoch, and takes over the text tower.
This is distillation (arXiv 1503.02531), here of normalised features.
"""

import json
import shutil

import open_clip
import torch

from core.artifacts import digest, write_atomically
from emoji import draw
from emoji.packages import SIZE
from emoji.training import CLIP, augment, fit, make_parser, save_weights, to_uint8

VIT = {"image_size": SIZE, "patch_size": 8, "width": 192, "layers": 4, "head_width": 64}


def main():
    args = make_parser(__doc__, epochs=15).parse_args()
    torch.manual_seed(0)
    images = to_uint8([image for _, image in draw.read_pool(args.data)])
    config = json.loads((CLIP / "open_clip_config.json").read_text("utf-8"))
    config["model_cfg"]["vision_cfg"] = VIT
    teacher = open_clip.create_model(f"local-dir:{CLIP}").eval().requires_grad_(False)
    teacher.visual.to(memory_format=torch.channels_last)
    student = open_clip.CLIP(**config["model_cfg"])
    state = teacher.state_dict()
    text_state = {name: state[name] for name in state if not name.startswith("visual.")}
    student.load_state_dict(text_state, strict=False)

    def loss_of(batch, generator):
        x = augment(images[batch], generator)
        with torch.no_grad():
            target = teacher.encode_image(x, normalize=True)                          # (B, d)
        return 1 - (student.encode_image(x, normalize=True) * target).sum(1).mean()

    groups = [{"params": list(student.visual.parameters()), "lr": 1e-3}]
    key = (VIT, digest(images, *text_state.values()))
    fit(
        "vit", student.visual, groups, len(images), args.epochs, loss_of,
        args.data / ".pretrain", key, batch_size=64,
    )

    folder = args.data / "emoji_vit"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CLIP / name, folder / name)
    save_weights(student, folder)
    text = json.dumps(config, indent=1) + "\n"
    write_atomically(folder / "open_clip_config.json", lambda part: part.write_text(text, "utf-8"))


if __name__ == "__main__":
    main()
