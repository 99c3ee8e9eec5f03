"""Train the mini captioner, emoji/captioner, on the pool. Its architecture and its tokenizer are
what lies there.

    python -m emoji.pretrain_captioner

It is a FastVLM: of the image-text-to-text models in transformers, one that sees through a
convolutional tower. Here that starts as the mini CLIP's, which knows these pictures, and is trained
along but for its first stages; a ViT, as BLIP-2 wants it, would have to learn to see from 15,000
drawings.
"""

from pathlib import Path
from utils import ROOT, short_hash

import open_clip
import torch
from transformers import AutoConfig, AutoProcessor, FastVlmForConditionalGeneration

from config import Parser, number
from data import article
from emoji import draw
from emoji.pretrain_clip import CLIP, augment, fit, pixels

CAPTIONER = ROOT / "emoji/captioner"


def describe(word, class_of):
    """What to say of a drawing: what kind of thing it is, and which: "a dessert, a doughnut".

    The kind first: more drawings tell of it, and what is said first is what a beam commits to.
    """
    label, kinds = draw.plain(word["label"]), draw.KINDS.get(word["subgroup"], [])[:1]
    kinds = [class_of[word["key"]]] if word["key"] in class_of else kinds
    return ", ".join(map(article, [*kinds, label]))


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all data sets")
    parser.add_argument("--epochs", type=number(int, 0), default=20, help="passes over the pool")
    args = parser.parse_args()
    torch.manual_seed(0)
    # The other artists' emoji alone: what the benchmark's five drew for the pool is of other things
    # than the benchmark, and a captioner would learn that, too (whatever looks 3d is no bird); and
    # game icons have names of their own kind.
    others = draw.SOURCES.keys() - draw.DOMAINS.values() - {"game-icons"}
    pairs = [pair for pair in draw.read_pool(args.data) if pair[0]["set"] in others]
    class_of = draw.class_names(draw.read_words(args.data / ".downloads"))
    images, texts = pixels(pairs), [describe(word, class_of) for word, _ in pairs]

    captioner = FastVlmForConditionalGeneration(AutoConfig.from_pretrained(CAPTIONER)).float()
    tower = captioner.model.vision_tower
    clip = open_clip.create_model(f"local-dir:{CLIP}")
    tower.timm_model.load_state_dict(clip.visual.trunk.state_dict())
    captioner.to(memory_format=torch.channels_last)
    processor = AutoProcessor.from_pretrained(CAPTIONER)
    whole = ["<image>" * 4 + text + "[END]" for text in texts]
    read = processor.tokenizer(whole, padding=True, return_tensors="pt")
    ids, mask = read["input_ids"], read["attention_mask"]
    targets = ids.where((ids > 4) | (ids == 2), -100)  # words and the end

    def loss_of(batch, generator):
        n, x = mask[batch].sum(1).max(), augment(images[batch], generator)
        row = {"input_ids": ids, "attention_mask": mask, "labels": targets}
        return captioner(pixel_values=x, **{k: v[batch, :n] for k, v in row.items()}).loss

    trunk = tower.timm_model
    frozen = [trunk.conv_stem, trunk.bn1, *trunk.blocks[:2]]
    seeing = {*tower.parameters()}
    groups = [
        {"params": [p for p in captioner.parameters() if p not in seeing], "lr": 2e-3},
        {"params": [*seeing], "lr": 1e-3},
    ]
    key = [args.epochs, texts, short_hash([*tower.state_dict().values()])]
    folder = args.data / ".pretrain"
    fit("captioner", captioner, groups, len(texts), args.epochs, loss_of, folder, key, frozen)
    captioner.half().save_pretrained(CAPTIONER)


if __name__ == "__main__":
    main()
