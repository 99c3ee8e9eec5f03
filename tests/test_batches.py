"""batches.py: how many workers load images, in how much shared memory, and what they return."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import square

import batches
from data import Location


@pytest.fixture
def machine(monkeypatch):
    """machine(cores, free=bytes of /dev/shm, ranks=1) pretends to be one."""

    def pretend(cores, free=10**12, ranks=1):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        batches.warn_of_shared_memory.cache_clear()

    return pretend


def test_there_is_a_worker_for_each_core_of_a_rank(machine, monkeypatch, capsys):
    for cores, ranks, workers in ((16, 1, 16), (16, 4, 4), (2, 4, 1), (1, 1, 1)):
        machine(cores, ranks=ranks)
        assert batches.worker_count(1000) == workers
        assert batches.worker_count(0) == min(2, workers)  # of a captioner's images
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert batches.worker_count(1000) == 7
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (_ for _ in ()).throw(FileNotFoundError()))
    assert batches.worker_count(1000) == 7 and not capsys.readouterr().err


@pytest.mark.parametrize("free, ranks, workers", [
    (64e6, 1, 0), (120e6, 1, 1), (500e6, 1, 5), (500e6, 2, 2), (1300e6, 1, 16), (1200e6, 1, 15),
])
def test_workers_are_no_more_than_shared_memory_has_room_for(machine, capsys, free, ranks, workers):
    """A batch of 256 images of 224 px is 38.5 MB; two of each worker are in flight, and one more."""
    machine(16 * ranks, free, ranks)
    n_bytes = 256 * 3 * 224 * 224
    assert [batches.worker_count(n_bytes) for _ in range(3)] == [workers] * 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (workers < 16)
    assert workers == 16 or f"{workers} of 16 workers" in lines[0] and "--shm-size=8g" in lines[0]
    assert ranks * (2 * workers + 1) * n_bytes <= free or workers == 0


def crop(image):
    return image[:, :8, :8]


def test_the_size_of_a_batch_is_that_of_its_images():
    before = torch.get_rng_state()
    assert batches.batch_bytes(crop, 5) == 5 * 3 * 8 * 8 and batches.batch_bytes(None, 5) == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def places(tmp_path):
    """Locations of seven images, of which 2.png is damaged."""
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"damaged" if i == 2 else square(i))
    return [Location(str(tmp_path), f"{i}.png") for i in range(7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_return_uint8_batches_in_order_and_say_what_is_unreadable(places, monkeypatch, workers):
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(
        torch.utils.data, "DataLoader", lambda *args, **options: loader(*args, **{**options, "num_workers": workers})
    )
    keys, unreadable = batches.in_order(places, 3), {}
    loaded = [*batches.image_batches(keys, crop, torch.device("cpu"), unreadable)]
    assert [locations for _, locations in loaded] == [[places[0], places[1]], places[3:6], places[6:]]
    assert unreadable == {places[2]: "of no known format"}
    for images, locations in loaded:
        assert images.dtype == torch.uint8
        assert torch.equal(images, torch.stack([crop(location.decode()) for location in locations]))
    pictures = batches.image_batches(batches.in_order(places[3:], 3), None, torch.device("cpu"))
    assert [[image.size for image in images] for images, _ in pictures] == [[(16, 16)] * 3, [(16, 16)]]
    assert [*batches.image_batches(batches.in_order([], 3), crop, torch.device("cpu"))] == []
    draw = [[(location, (location.path, 7)) for location in places[3:]]]

    def noise(image):
        return torch.rand(4)

    one, two = ([*batches.image_batches(order, noise, torch.device("cpu"))] for order in (draw, [draw[0][:2], draw[0][2:]]))
    assert torch.equal(one[0][0], torch.cat([images for images, _ in two])) and len(one[0][0].unique()) == 16


def test_an_unreadable_image_ends_the_program_with_its_name(places, capsys):
    with pytest.raises(SystemExit) as stop:
        [*batches.image_batches(batches.in_order(places, 3), crop, torch.device("cpu"))]
    assert stop.value.code == 2
    assert f"{places[2]}: not a readable image (of no known format)" in capsys.readouterr().err
