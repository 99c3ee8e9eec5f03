"""How many images and texts the towers can encode at a time in the free memory of a GPU."""

import math

import torch


def bytes_per_row(encode, row):
    """Return the GPU memory, in bytes, that one more row takes between forward and backward pass.

    encode: a function from rows (n, …) to features, with gradient. row: (1, …).
    """
    peaks = []
    for n in (2, 2, 4):  # the first pass allocates the gradients
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        encode(row.expand(n, *row.shape[1:])).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return (peaks[2] - peaks[1]) / 2


def free_bytes():
    """Return the GPU memory, in bytes, that this process can still allocate."""
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + cached


def fitting_micro_batch(images, texts, image_bytes, text_bytes, free):
    """Return the largest power of two of rows that fits, or None if all rows fit at once.

    images, texts: rows of a step, of image_bytes and text_bytes each. free: in bytes.
    CHOICE: a tenth of the memory stays free, for what the measurement does not see; alternative:
    --micro-batch.
    """
    budget = 0.9 * free
    if images * image_bytes + texts * text_bytes <= budget:
        return None
    rows = budget / max(image_bytes, text_bytes)
    return 2 ** math.floor(math.log2(rows)) if rows >= 1 else 1
