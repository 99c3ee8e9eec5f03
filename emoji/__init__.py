"""The emoji benchmark: the same things drawn by several artists, and small models for it.

    python -m emoji.draw                  # data/emoji, data/emoji_unseen: the benchmark
    python -m emoji.draw pool             # data/emoji_pool: image-text pairs of everything else
    python -m emoji.pretrain_clip         # emoji/clip, trained on that pool
    python -m emoji.pretrain_captioner    # emoji/captioner, trained on that pool
    python -m emoji.pretrain_vit          # data/emoji_vit, a mini CLIP with a ViT, for MaPLe

tables.json lists the packages, classes, styles and kinds of things; README.md describes them.
"""
