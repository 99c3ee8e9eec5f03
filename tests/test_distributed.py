"""core/distributed.py: several processes compute what one computes, and none waits in vain."""

import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import in_processes

from core import distributed
from core.artifacts import artifact
from core.distributed import (
    agree,
    all_gather_with_grad,
    average_gradients,
    gather_to_main,
    leave,
    main_process_first,
    rank_and_world,
    rows_of_rank,
)


def batch_loss(z):
    """A loss in which every row of the batch meets every other, as in a contrastive loss."""
    return (z @ z.T).logsumexp(1).sum()


def check_rows(rank, world):
    for n in (1, 2, 3, 5, 6, 7):
        all_rows = [None] * world
        dist.all_gather_object(all_rows, rows_of_rank(n))
        assert {len(rows) for rows in all_rows} == {-(-n // world)}
        in_turn = [rows[i] for i in range(len(all_rows[0])) for rows in all_rows]
        assert in_turn[:n] == [*range(n)] and in_turn[n:] == [i % n for i in range(n, len(in_turn))]


def check_gradients(rank, world):
    """Features and gradients are those of one process, also where a rank has padding only."""
    for n in (1, 2, 5, 7):
        torch.manual_seed(n)
        x, weight = torch.randn(n, 6), torch.randn(6, 4, requires_grad=True)
        frozen, unused = torch.zeros(2), torch.zeros(2, requires_grad=True)
        z_one = x @ weight
        [expected] = torch.autograd.grad(batch_loss(z_one), weight)

        own = (x[rows_of_rank(n)] @ weight).requires_grad_()
        own.retain_grad()
        z = all_gather_with_grad(own, n)
        assert torch.allclose(z, z_one, atol=1e-6) and z.shape == (n, 4)
        batch_loss(z).backward()
        average_gradients([weight, frozen, unused])
        assert torch.allclose(weight.grad, expected, atol=1e-4) and unused.grad is None
        padding = [i for i in range(len(own)) if rank + i * world >= n]
        assert not own.grad[padding].any() and own.grad[:len(own) - len(padding)].any(1).all()


def check_mean(rank, world):
    one, two = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    one.grad, two.grad = torch.full((2, 3), 3.0 * rank), torch.arange(4.0) * rank
    average_gradients([one, two])
    mean = (world - 1) / 2
    assert torch.equal(one.grad, torch.full((2, 3), 3 * mean))
    assert torch.allclose(two.grad, torch.arange(4.0) * mean)


def check_agreement(rank, world):
    assert agree({"epoch": rank}) == {"epoch": 0} and agree(rank == 0) is True
    parts = gather_to_main([rank, "x"] if rank != 1 else [])  # ranks may have nothing to give
    expected = [x for other in range(world) if other != 1 for x in (other, "x")]
    assert parts == (expected if rank == 0 else [])


def check_order(rank, world, folder):
    """The main process makes an artifact; the others load it, and make nothing."""

    def make():
        assert rank == 0
        time.sleep(0.2)
        return "by the main process"

    for number in range(2):
        path = folder / f"{number}.json"
        content = main_process_first(lambda path=path: artifact(path, make))
        assert content == "by the main process"


def check_nested_order(rank, world, folder):
    """An artifact within another's make() does not leave a barrier that one rank waits at alone."""

    def outer():
        if rank > 0:
            time.sleep(0.3)  # until the main process has stored it
        return artifact(folder / "outer.json", lambda: main_process_first(inner) + 1)

    def inner():
        return artifact(folder / "inner.json", lambda: 1)

    assert main_process_first(outer) == 2
    distributed.barrier()
    started = time.time()
    if rank == 0:
        time.sleep(0.3)
    distributed.barrier()  # returns at once if the main process is a barrier behind
    waited = [None] * world
    dist.all_gather_object(waited, time.time() - started)
    assert min(waited) > 0.2


def check_all(folder):
    signal.alarm(120)  # a process that waits in vain ends, and the test fails
    rank, world = rank_and_world()
    check_rows(rank, world)
    check_gradients(rank, world)
    check_mean(rank, world)
    check_agreement(rank, world)
    check_order(rank, world, folder)
    check_nested_order(rank, world, folder)
    leave()
    assert not dist.is_initialized()


@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_compute_what_one_computes(n, tmp_path):
    in_processes(n, check_all, tmp_path)


def test_one_process_needs_no_group():
    x, weight = torch.randn(3, 2), torch.zeros(2, requires_grad=True)
    weight.grad = torch.ones(2)
    average_gradients([weight])
    assert all_gather_with_grad(x, 3) is x and torch.equal(weight.grad, torch.ones(2))
    assert rows_of_rank(4) == [0, 1, 2, 3] and agree(x) is x and main_process_first(lambda: 7) == 7
    assert gather_to_main([1, 2]) == [1, 2]
    leave()
    assert not dist.is_initialized()


def test_an_exception_in_the_main_process_does_not_disturb_later_calls():
    with pytest.raises(ZeroDivisionError):
        main_process_first(lambda: 1 / 0)
    assert main_process_first(lambda: main_process_first(lambda: 1)) == 1


def test_a_stalled_process_is_noticed_in_minutes_and_a_barrier_waits_for_days(monkeypatch):
    calls = []
    for name in ("init_process_group", "new_group", "barrier"):
        def call(*arguments, name=name, **options):
            calls.append((name, arguments, options))
            return name

        monkeypatch.setattr(dist, name, call)
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.stage_group.cache_clear()
    distributed.barrier()
    distributed.stage_group.cache_clear()
    (first, _, training), (second, _, waiting), *_, (last, [group], _) = calls
    assert (first, second, last, group) == ("init_process_group", "new_group", "barrier", "new_group")
    assert training["timeout"] <= timedelta(minutes=30) and waiting["timeout"] >= timedelta(days=1)


def test_only_the_first_process_shows_a_bar(monkeypatch):
    """There TQDM_DISABLE decides, which is read by a bar that is not given `disable`."""
    monkeypatch.setattr(distributed, "tqdm", lambda *arguments, **options: options)
    assert distributed.progress_bar([1], leave=False) == {"leave": False}
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (1, 2))
    assert distributed.progress_bar([1], leave=False) == {"leave": False, "disable": True}


def test_only_the_first_process_prints(monkeypatch, capsys):
    distributed.main_print("a table")
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (1, 2))
    distributed.main_print("the same table")
    assert capsys.readouterr().out == "a table\n"


def test_what_takes_one_process_is_refused_under_torchrun(monkeypatch, capsys):
    distributed.require_one_process("Fetching")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        distributed.require_one_process("Fetching")
    assert stop.value.code == 2 and "Fetching takes one process" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    assert distributed.get_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit) as stop:
        distributed.get_device()
    assert stop.value.code == 2 and "needs 4 GPUs" in capsys.readouterr().err
