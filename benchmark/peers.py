"""The peers of the benchmark: steps of the papers' public code, written afresh.

The operations and their order are those of that code, also where another way would be faster; the
names are ours. `model` is one of open_clip's, `batch` a Batch of batches.py.
"""

import torch
import torch.nn.functional as F
from open_clip import ClipLoss

clip_loss = ClipLoss()


def step(optimizer, loss_fn, *inputs, max_norm=None):
    """Take a step by the loss loss_fn(*inputs) and return it as a number."""
    optimizer.zero_grad()
    loss = loss_fn(*inputs)
    loss.backward()
    if max_norm:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()
    return loss.item()


def flyp_loss(model, batch):
    """Return the loss of FLYP (src/models/flyp_loss.py); equal texts are encoded several times."""
    return clip_loss(*model(batch.images, batch.prompts))


def arf_loss(model, batch):
    """Return the loss of a naive ARF, which has no public code: a forward pass of FLYP for each
    term, so that the training images are encoded twice.
    """
    class_loss = clip_loss(*model(batch.images, batch.prompts))
    caption_loss = clip_loss(*model(batch.images, batch.captions))
    return class_loss + caption_loss + clip_loss(*model(batch.pool_images, batch.pool_texts))


def wise_ft_loss(model, head, batch):
    """Return the loss of WiSE-FT (src/models/finetune.py), whose gradient is clipped at norm 1."""
    features = model.encode_image(batch.images)
    features = features / features.norm(dim=-1, keepdim=True)
    return F.cross_entropy(head(features.float()), batch.labels)


def lads_loss(net, z, labels, text_source, text_target, class_text, class_weight):
    """Return the loss of LADS (methods/augmentations.py): half the direction of the output, half
    the class of its unit vector. Tensors are those of mapper.lads_loss.

    This transcription is kind. LADS's real step loops over the images in Python and uses
    transformers' AdamW, which makes it about half as fast.
    """
    output = net(z)
    image_difference = output - z
    image_difference = image_difference / image_difference.norm(dim=-1, keepdim=True)
    text_difference = text_target - text_source
    text_difference = text_difference / text_difference.norm(dim=-1, keepdim=True)
    direction = (1 - (image_difference * text_difference).sum(dim=-1)).mean()
    unit = output / output.norm(dim=-1, keepdim=True)
    return 0.5 * direction + 0.5 * F.cross_entropy(unit @ class_text.T, labels, class_weight)


def train_lads(net, z, labels, text_source, text_target, class_text):
    """Train a network as LADS does: 50 epochs of batches of 256. Return the first epoch's loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.005, weight_decay=0.05, eps=1e-6)
    generator = torch.Generator(z.device).manual_seed(0)
    class_weight, losses = 1 / labels.bincount(), []
    for _ in range(50):
        batches = torch.randperm(len(z), generator=generator, device=z.device).split(256)
        for i in batches:
            batch = z[i], labels[i], text_source[i], text_target[i]
            losses.append(step(optimizer, lads_loss, net, *batch, class_text, class_weight))
    return sum(losses[:len(batches)]) / len(batches)


def search(queries, pool, k):
    """Return scores and ids, both (Q, k), by clip-retrieval's way: one exact index of the pool."""
    import faiss

    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(pool.numpy())
    scores, ids = index.search(queries.numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(ids)
