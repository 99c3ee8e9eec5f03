"""What benchmark.py measures ours against: steps of the papers' public code, written out afresh.

Order and kind of operations are theirs, also where one would do otherwise; names are ours. Each
takes a model of open_clip's, and returns its loss as a number.
"""

import torch
import torch.nn.functional as F
from open_clip import ClipLoss

clip_loss = ClipLoss()


def adamw(parameters, lr=1e-5, weight_decay=0.1):
    """FLYP, WiSE-FT: torch.optim.AdamW as it comes, of what wants a gradient."""
    wanted = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(wanted, lr=lr, weight_decay=weight_decay)


def flyp_step(model, optimizer, images, texts):
    """FLYP (src/models/flyp_loss.py): each image with its text, also where texts are the same."""
    optimizer.zero_grad()
    image_features, text_features, logit_scale = model(images, texts)
    loss = clip_loss(image_features, text_features, logit_scale)
    loss.backward()
    optimizer.step()
    return loss.item()


def arf_step(model, optimizer, batch):
    """ARF without a thought, for it has no public code: FLYP's forward for each of its terms, so
    that the training images are encoded twice.

    batch: a Batch of batches.py.
    """
    optimizer.zero_grad()
    class_loss = clip_loss(*model(batch.images, batch.prompts))
    caption_loss = clip_loss(*model(batch.images, batch.captions))
    retrieved_loss = clip_loss(*model(*batch.retrieved[:2]))
    loss = class_loss + caption_loss + retrieved_loss
    loss.backward()
    optimizer.step()
    return loss.item()


def wise_ft_step(model, head, optimizer, images, labels):
    """WiSE-FT (src/models/finetune.py): image tower and head, clipped at 1."""
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
    """LADS (methods/augmentations.py): the direction of the output, the class of its unit vector;
    halves of both. Tensors are those of lads.lads_loss.
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


def search(queries, pool, k):
    """clip-retrieval's way: one exact index over all of the pool. Scores, ids: (Q, k)."""
    import faiss

    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(pool.numpy())
    scores, ids = index.search(queries.numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(ids)


@torch.no_grad()
def raw_features(model, batches):
    """The model alone, on batches of images (B, 3, H, W) that are in memory."""
    return torch.cat([model.encode_image(images) for images in batches])
