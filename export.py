"""Write a finetuned CLIP, or one between the weights, in open_clip's own format:

    python export.py runs/emoji-3d/checkpoints/arf-seed0-….pt my_clip --alpha 0.5
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:my_clip")

That is both towers: the whole classifier of flyp, arf and towers; the head that finetune and lpft
train beside the image tower has no place in this format.
"""

from pathlib import Path
from utils import fail, one_line, writing

from config import Parser, number
from evaluate import interpolate
from features import hash_of, place_of, read_checkpoint


def export(checkpoint, folder, alpha=1.0):
    """Write θ = (1 − α) θ_original + α θ_tuned of a checkpoint of finetune.py into `folder`.

    Source: WiSE-FT (2109.01903). Exits with status 2 where the checkpoint holds no towers, or
    `folder` has files.
    """
    import open_clip
    from open_clip.push_to_hf_hub import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, save_config_for_hf
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    base, pretrained, tuned, known = read_checkpoint(checkpoint)
    if not tuned:
        fail(f"{checkpoint}: it trained no tower, only what stands on one. Export another.")
    place = place_of(base)
    try:
        model, tokenizer = open_clip.create_model(place, pretrained), open_clip.get_tokenizer(place)
    except Exception as error:  # whatever the hub, a damaged file or a bad config raises
        fail(f"{base}, which {checkpoint} was made from: not there ({one_line(error)}).")
    if hash_of(model) != known:
        fail(f"{base} has other weights than {checkpoint} was finetuned from. Put them back.")
    mixed = interpolate(model.state_dict(), tuned, alpha)
    with writing(folder):
        if folder.exists() and any(folder.iterdir()):
            fail(f"{folder} has files already. Name a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file({k: v.contiguous() for k, v in mixed.items()}, folder / HF_SAFE_WEIGHTS_NAME)
        except SafetensorError as error:  # as it calls a full disk
            raise OSError(0, one_line(error)) from error
        if hasattr(tokenizer, "save_pretrained"):  # CLIP's own comes with open_clip
            tokenizer.save_pretrained(folder)
        save_config_for_hf(model, folder / HF_CONFIG_NAME, open_clip.get_model_config(place))


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a file of finetune.py: runs/…/checkpoints/….pt")
    parser.add_argument("folder", type=Path, help="where to: a new folder")
    alpha = number(float, 0, 1)
    parser.add_argument("--alpha", type=alpha, default=1.0, help="between the weights (default: 1)")
    args = parser.parse_args()
    export(args.checkpoint, args.folder, args.alpha)
    print(f'wrote {args.folder}: open_clip.create_model("local-dir:{args.folder}")')


if __name__ == "__main__":
    main()
