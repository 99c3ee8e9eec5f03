"""The device, and the processes of torchrun, in the open."""

import datetime
import os

import torch

from utils import fail


def ranks():
    """(rank, number of processes) under torchrun, joined at the first call; else (0, 1)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        the_device()  # each process its own, before they meet
        # they meet after work of uneven length (captions of a whole data set): wait a week
        timeout = datetime.timedelta(days=7)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timeout)
    return int(os.environ.get("RANK", 0)), world


def barrier():
    """Under torchrun, wait until all processes are here."""
    if ranks()[1] > 1:
        torch.distributed.barrier()


def leave():
    """Under torchrun, leave the process group once no process needs another."""
    if ranks()[1] > 1:
        barrier()
        torch.distributed.destroy_process_group()


def the_device():
    """This process's GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpu = int(os.environ.get("LOCAL_RANK", 0))
    if gpu >= torch.cuda.device_count():
        fail(f"torchrun wants {gpu + 1} GPUs or more, here are {torch.cuda.device_count()}.")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)
