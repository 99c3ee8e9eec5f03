"""Train the mini captioner, emoji/captioner, on the pool. That folder has its architecture and
tokenizer.

    python -m emoji.pretrain_captioner

The captioner is a FastVLM, because that is the image-text-to-text model of transformers whose image
tower is convolutional. The tower starts as the mini CLIP's, which knows such drawings, and is
trained except for its first stages. A ViT, as in BLIP-2, cannot learn to see from 15,000 drawings.
"""

import open_clip
import torch
from transformers import AutoConfig, AutoProcessor, FastVlmForConditionalGeneration

from core.artifacts import digest
from core.utils import ROOT
from data import article
from emoji import draw
from emoji.packages import SOURCES, read_words
from emoji.training import CLIP, augment, fit, make_parser, to_uint8

CAPTIONER = ROOT / "emoji/captioner"


def describe(word, class_of):
    """Return the kind of thing that a drawing shows, and the thing: "a dessert, a doughnut".

    The kind comes first, because more drawings show it, and beam search commits to the first words.
    """
    kinds = draw.KINDS.get(word["subgroup"], [])[:1]
    if word["key"] in class_of:
        kinds = [class_of[word["key"]]]
    return ", ".join(map(article, [*kinds, draw.plain_label(word)]))


def main():
    args = make_parser(__doc__, epochs=20).parse_args()
    torch.manual_seed(0)
    # Only emoji by other artists than the benchmark's: what its five artists drew for the pool is
    # in no class, and the captioner would learn that (whatever looks 3d is no bird). Without game
    # icons, which have names of another kind.
    sources = SOURCES.keys() - draw.DOMAINS.values() - {"game-icons"}
    pairs = [pair for pair in draw.read_pool(args.data) if pair[0]["set"] in sources]
    class_of = draw.class_names(read_words(args.data / ".downloads"))
    images = to_uint8([image for _, image in pairs])
    texts = [describe(word, class_of) for word, _ in pairs]

    captioner = FastVlmForConditionalGeneration(AutoConfig.from_pretrained(CAPTIONER)).float()
    tower = captioner.model.vision_tower
    trunk = tower.timm_model
    clip = open_clip.create_model(f"local-dir:{CLIP}")
    trunk.load_state_dict(clip.visual.trunk.state_dict())
    captioner.to(memory_format=torch.channels_last)
    processor = AutoProcessor.from_pretrained(CAPTIONER)
    prompts = ["<image>" * 4 + text + "[END]" for text in texts]
    tokens = processor.tokenizer(prompts, padding=True, return_tensors="pt")
    ids = tokens["input_ids"]                                                          # (N, L)
    mask = tokens["attention_mask"]
    # The loss is that of the words and of the end (2), not of the other special tokens.
    targets = ids.where((ids > 4) | (ids == 2), -100)

    def loss_of(batch, generator):
        length = mask[batch].sum(1).max()
        return captioner(
            pixel_values=augment(images[batch], generator),
            input_ids=ids[batch, :length],
            attention_mask=mask[batch, :length],
            labels=targets[batch, :length],
        ).loss

    tower_parameters = set(tower.parameters())
    groups = [
        {"params": [p for p in captioner.parameters() if p not in tower_parameters], "lr": 2e-3},
        {"params": list(tower.parameters()), "lr": 1e-3},
    ]
    frozen = [trunk.conv_stem, trunk.bn1, *trunk.blocks[:2]]
    folder = args.data / ".pretrain"
    key = (texts, digest(*tower.state_dict().values()))
    fit("captioner", captioner, groups, len(texts), args.epochs, loss_of, folder, key, frozen)
    captioner.half().save_pretrained(CAPTIONER)


if __name__ == "__main__":
    main()
