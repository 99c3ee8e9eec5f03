"""The embedded benchmark: the same things drawn by several artists, and small models that know
such drawings.

    python -m emoji.draw                  # data/emoji, data/emoji_unseen: the benchmark
    python -m emoji.draw pool             # data/emoji_pool: image-text pairs of everything else
    python -m emoji.pretrain_clip         # emoji/clip, trained on that pool
    python -m emoji.pretrain_captioner    # emoji/captioner, likewise
    python -m emoji.pretrain_vit          # data/emoji_vit, a mini CLIP with a ViT, for MaPLe

What is drawn, and which words it gets, is in tables.json; README.md says the rest.
"""
