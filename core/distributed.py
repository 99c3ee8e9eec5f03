"""The device, and the processes of torchrun: each encodes its share of a batch, then all gather the
features of the whole batch and compute the loss that one process would.
"""

import functools
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from core.utils import fail

STEP_TIMEOUT = timedelta(minutes=10)  # a process that takes longer for a step has stalled
STAGE_TIMEOUT = timedelta(days=7)     # captions or a search take ranks unequal times


def rank_and_world():
    """Return (rank, number of processes), and join the process group at the first call."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        get_device()  # each process selects its GPU before the processes meet
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=STEP_TIMEOUT)
        stage_group()  # every process has to take part in creating it
    return int(os.environ.get("RANK", 0)), world


@functools.cache
def stage_group():
    """Return a second process group with a long timeout, for stages of uneven length."""
    return dist.new_group(timeout=STAGE_TIMEOUT, backend="gloo")


def barrier():
    """Wait for all processes, without the timeout of a training step."""
    if rank_and_world()[1] > 1:
        dist.barrier(stage_group())


inside_main_process_first = False


def main_process_first(make):
    """Return make(), called by rank 0 first and by the others once rank 0 has stored its artifact.

    If make() itself calls this function, that inner call has no barrier: ranks that find the outer
    artifact never get to it.
    """
    global inside_main_process_first
    rank, world = rank_and_world()
    if world == 1 or inside_main_process_first:
        return make()
    inside_main_process_first = True
    try:
        if rank > 0:
            barrier()
        content = make()
        if rank == 0:
            barrier()
        return content
    finally:
        inside_main_process_first = False


def agree(value):
    """Return rank 0's value on every rank, e.g. whether a file exists on a network file system."""
    if rank_and_world()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=stage_group())
    return values[0]


def gather_to_main(values):
    """Return the lists of all ranks, one after another, on rank 0, and [] on the others."""
    rank, world = rank_and_world()
    if world == 1:
        return values
    lists = [None] * world if rank == 0 else None
    dist.gather_object(values, lists, group=stage_group())
    return sum(lists, []) if rank == 0 else []


def main_print(text):
    """Print a text on rank 0."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


def leave():
    """Leave the process group once no process needs another."""
    if rank_and_world()[1] > 1:
        barrier()
        dist.destroy_process_group()


def require_one_process(what):
    """Exit with status 2 under torchrun if `what` is to be done by one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail(f"{what} takes one process: run it without torchrun first.")


def progress_bar(iterable=None, **options):
    """Return tqdm's progress bar, shown by rank 0 only. TQDM_DISABLE=1 hides it."""
    return tqdm(iterable, **options, **({"disable": True} if rank_and_world()[0] > 0 else {}))


def rows_of_rank(n):
    """Return the positions of this rank's rows in a batch of n: rank, rank + world, …

    Pad so that every rank gets the same number of rows, ⌈n / world⌉: the padding repeats rows from
    the start, and `all_gather_with_grad` drops it.
    """
    rank, world = rank_and_world()
    return [position % n for position in range(rank, -(-n // world) * world, world)]


class AllGather(torch.autograd.Function):
    """All ranks' tensors, stacked. The gradient of this rank's is summed over all ranks."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)  # (world, …)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def all_gather_with_grad(x, n):
    """Return the whole batch (n, d) in its order from each rank's rows x, (⌈n / world⌉, d).

    The gradient of each rank's rows is the sum over the ranks' losses, which are all the loss of
    the whole batch. This is world times the gradient of one process; `average_gradients` divides.
    """
    if rank_and_world()[1] == 1:
        return x
    return AllGather.apply(x).transpose(0, 1).flatten(0, 1)[:n]


def average_gradients(parameters):
    """Replace each gradient by its mean over the ranks, in one all-reduce of a flat buffer."""
    world = rank_and_world()[1]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / world).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def get_device():
    """Return this process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpu = int(os.environ.get("LOCAL_RANK", 0))
    if gpu >= torch.cuda.device_count():
        fail(f"torchrun needs {gpu + 1} GPUs or more; {torch.cuda.device_count()} are available.")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def to_device(tensor, device):
    """Return a tensor of the CPU on `device`. A GPU gets it from pinned memory, because a copy from
    other memory waits for all that the GPU still computes.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
