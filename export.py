"""Write a finetuned CLIP, or one between the original and the finetuned weights, for open_clip.

    python export.py runs/emoji-3d/checkpoints/arf-seed0-….pt my_clip --alpha 0.5
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:my_clip")

The format has both towers. That is all of what flyp, arf and towers train; it has no place for the
head that finetune and lpft train with the image tower.
"""

import os
import shutil
from pathlib import Path

from core.config import Parser, number
from core.utils import fail, one_line
from evaluate import interpolate
from features import create, read_checkpoint, weights_hash


def export(checkpoint, folder, alpha=1.0):
    """Write θ = (1 − α) θ_original + α θ_tuned of a checkpoint of finetune.py into a new folder.

    Source: WiSE-FT (arXiv 2109.01903). Exits with status 2 if the checkpoint has no tower, if its
    original weights have changed, or if `folder` has files.
    """
    if folder.is_dir() and any(folder.iterdir()):
        fail(f"{folder} has files already. Name a new folder.")
    base, pretrained, tuned, expected = read_checkpoint(checkpoint)
    if not tuned:
        fail(f"{checkpoint}: it trained no tower, only a head or prompts. Export another.")
    model, _, _, tokenizer, config = create(base, pretrained, "cpu")
    if weights_hash(model) != expected:
        fail(f"{checkpoint}: {base} has other weights than it was finetuned from. Restore them.")
    weights = interpolate(model.state_dict(), tuned, alpha)
    write_model(folder.absolute(), model, weights, tokenizer, config)


def write_model(folder, model, weights, tokenizer, config):
    """Write open_clip's format. The folder gets its name last, so it is never incomplete."""
    from open_clip.push_to_hf_hub import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, save_config_for_hf
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a killed export
        part.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, part / HF_SAFE_WEIGHTS_NAME)
        if hasattr(tokenizer, "save_pretrained"):  # CLIP's own tokenizer is part of open_clip
            tokenizer.save_pretrained(part)
        save_config_for_hf(model, part / HF_CONFIG_NAME, config)
        os.replace(part, folder)
    except (OSError, SafetensorError) as error:  # safetensors raises its own on a full disk
        reason = getattr(error, "strerror", None) or one_line(error)
        fail(f"{folder}: could not be written ({reason}). Make room, or name another folder.")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="a file of finetune.py: runs/…/checkpoints/….pt")
    parser.add_argument("folder", type=Path, help="a new folder for the model")
    alpha = number(float, 0, 1, inclusive=True)
    parser.add_argument("--alpha", type=alpha, default=1.0,
                        help="from 0, the original weights, to 1, the finetuned ones (default: 1)")
    args = parser.parse_args()
    export(args.checkpoint, args.folder, args.alpha)
    print(f'wrote {args.folder}: open_clip.create_model("local-dir:{args.folder}")')


if __name__ == "__main__":
    main()
