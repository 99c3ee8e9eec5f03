"""The peers of the benchmark: steps of the papers' public code, written afresh.

The operations and their order are those of that code, also where another way would be faster; the
names are ours. Each step takes a model of open_clip's and returns its loss as a number.
"""

import torch
import torch.nn.functional as F
from open_clip import ClipLoss

clip_loss = ClipLoss()


def adamw(parameters, lr=1e-5, weight_decay=0.1):
    """Return the optimizer of FLYP and WiSE-FT: torch.optim.AdamW with its defaults."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)


def flyp_step(model, optimizer, images, texts):
    """Take a step of FLYP (src/models/flyp_loss.py); equal texts are encoded several times."""
    optimizer.zero_grad()
    image_features, text_features, logit_scale = model(images, texts)
    loss = clip_loss(image_features, text_features, logit_scale)
    loss.backward()
    optimizer.step()
    return loss.item()


def arf_step(model, optimizer, batch):
    """Take a naive step of ARF, which has no public code: a forward pass of FLYP for each term, so
    that the training images are encoded twice.

    batch: a Batch of batches.py.
    """
    optimizer.zero_grad()
    class_loss = clip_loss(*model(batch.images, batch.prompts))
    caption_loss = clip_loss(*model(batch.images, batch.captions))
    retrieved_loss = clip_loss(*model(batch.pool_images, batch.pool_texts))
    loss = class_loss + caption_loss + retrieved_loss
    loss.backward()
    optimizer.step()
    return loss.item()


def wise_ft_step(model, head, optimizer, images, labels):
    """Take a step of WiSE-FT (src/models/finetune.py): image tower and head, clipped at 1."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    features = model.encode_image(images)
    features = features / features.norm(dim=-1, keepdim=True)
    loss = torch.nn.CrossEntropyLoss()(head(features.float()), labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


def lads_step(net, optimizer, z, labels, text_source, text_target, class_text, class_weight):
    """Take a step of LADS (methods/augmentations.py): half the direction of the output, half the
    class of its unit vector. Tensors are those of mapper.lads_loss.

    This transcription is kind. LADS's real step loops over the images in Python and uses
    transformers' AdamW, which makes it about half as fast.
    """
    optimizer.zero_grad()
    output = net(z)
    image_difference = output - z
    image_difference = image_difference / image_difference.norm(dim=-1, keepdim=True)
    text_difference = text_target - text_source
    text_difference = text_difference / text_difference.norm(dim=-1, keepdim=True)
    direction = (1 - (image_difference * text_difference).sum(dim=-1)).mean()
    unit = output / output.norm(dim=-1, keepdim=True)
    class_loss = F.cross_entropy(unit @ class_text.T, labels, class_weight)
    loss = 0.5 * direction + 0.5 * class_loss
    loss.backward()
    optimizer.step()
    return loss.item()


def train_lads(net, z, labels, text_source, text_target, class_text):
    """Train a network as LADS does: 50 epochs of batches of 256. Return the first epoch's loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.005, weight_decay=0.05, eps=1e-6)
    generator = torch.Generator(z.device).manual_seed(0)
    class_weight, losses = 1 / labels.bincount(), []
    for _ in range(50):
        batches = torch.randperm(len(z), generator=generator, device=z.device).split(256)
        for i in batches:
            batch = z[i], labels[i], text_source[i], text_target[i]
            losses.append(lads_step(net, optimizer, *batch, class_text, class_weight))
    return sum(losses[:len(batches)]) / len(batches)


def search(queries, pool, k):
    """Return scores and ids, both (Q, k), by clip-retrieval's way: one exact index of the pool."""
    import faiss

    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(pool.numpy())
    scores, ids = index.search(queries.numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(ids)


@torch.no_grad()
def raw_features(model, batches):
    """Return the model's features, without anything else, of images in memory: (N, d)."""
    return torch.cat([model.encode_image(images) for images in batches])
