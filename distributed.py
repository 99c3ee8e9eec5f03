"""The device, and the processes of torchrun, in the open: each encodes its share of a batch, then
all have the features, or logits, of the whole, and compute the loss that one process would. And
threads, for work of matrices so small that several cores cannot share one.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from utils import fail

import torch
from tqdm import tqdm

STALLED = timedelta(minutes=10)  # in a step of training: a process that takes longer has stalled


def ranks():
    """(rank, number of processes) under torchrun, joined at the first call; else (0, 1)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        the_device()  # each process its own, before they meet
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=STALLED)
        patient()  # while all are here
    return int(os.environ.get("RANK", 0)), world


@functools.cache
def patient():
    """The processes once more, as a group for waits that are no sign of a stall."""
    return torch.distributed.new_group(timeout=timedelta(days=7), backend="gloo")


def barrier():
    """Under torchrun, wait until all processes are here, for a week: behind work of uneven length
    (captions of a data set, a search of a pool), and for the first one, which does some alone.
    """
    if ranks()[1] > 1:
        torch.distributed.barrier(patient())


def first_alone(make):
    """make(), by the first process, and then by the others, which find its outcome cached."""
    made = make() if ranks()[0] == 0 else None
    barrier()
    return made if ranks()[0] == 0 else make()


def leave():
    """Under torchrun, leave the process group once no process needs another."""
    if ranks()[1] > 1:
        barrier()
        torch.distributed.destroy_process_group()


def progress(*arguments, **more):
    """tqdm's bar, which the first process alone shows; TQDM_DISABLE=1 hides it, too."""
    return tqdm(*arguments, **more, **({"disable": True} if ranks()[0] > 0 else {}))


def share(n):
    """Positions of this process's rows in a batch of n: every world-th, ⌈n / world⌉ of them.

    All processes have as many, for none may wait in vain for another; what is short, or has none,
    is filled up with a row of another's, which `gathered` leaves out.
    """
    rank, world = ranks()
    return [position % n for position in range(rank, -(-n // world) * world, world)]


def gathered(x, n):
    """(n, d), the whole batch in its order, of each process's rows x, (⌈n / world⌉, d).

    Its gradient reaches each process's own rows from the losses of all processes: world times what
    one process would get, of which `average_gradients` makes what one process gets.
    """
    if ranks()[1] == 1:
        return x
    from torch.distributed.nn.functional import all_gather  # here, for its import takes a while

    return torch.stack(all_gather(x), dim=1).flatten(0, 1)[:n]


def average_gradients(parameters):
    """What DistributedDataParallel does: the mean over processes of each gradient."""
    if ranks()[1] > 1:
        for p in parameters:
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
                p.grad /= ranks()[1]


def side_by_side(work, jobs, device):
    """Yield work(job) of each of the list `jobs`, in order: on a CPU by threads, which share its
    cores; on a GPU one after another.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(jobs))
    if device.type == "cuda" or workers < 2:
        yield from map(work, jobs)
        return
    torch.set_num_threads(threads // workers)
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(work, jobs)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who presses Ctrl-C does not want to wait
        torch.set_num_threads(threads)


def the_device():
    """This process's GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpu = int(os.environ.get("LOCAL_RANK", 0))
    if gpu >= torch.cuda.device_count():
        fail(f"torchrun wants {gpu + 1} GPUs or more, here are {torch.cuda.device_count()}.")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)
