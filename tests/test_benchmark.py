"""benchmark/: the peers take our steps, rows are stored as they come, and memory may run out."""

import functools
import json

import pytest
import torch

from benchmark import __main__ as benchmark
from benchmark import peers
from mapper import new_mapper


@pytest.fixture
def clip(tiny_clip):
    torch.manual_seed(0)
    return benchmark.new_clip(tiny_clip, torch.device("cpu"))


@pytest.fixture
def inputs(clip):
    """{method: what its steps take: a Clip, class texts of three classes, a Batch of six images}."""
    class_text = benchmark.unit(3, 32)
    return {m: (clip, class_text, benchmark.new_batch(m, clip, 6, 3)) for m in benchmark.PEERS}


@pytest.fixture
def tiny_sizes(monkeypatch):
    """Mappers and a pool small enough for a test."""
    small = {"compare_mappers": {"n": 300, "d": 16, "classes": 4}}
    small["compare_searches"] = {"queries": 5, "pool": 40, "d": 16, "k": 2}
    for name, sizes in small.items():
        monkeypatch.setattr(benchmark, name, functools.partial(getattr(benchmark, name), **sizes))
    quick = functools.partial(benchmark.train_mapper, rounds=2)
    monkeypatch.setattr(benchmark, "train_mapper", quick)


@pytest.fixture
def run(tiny_clip, tiny_sizes, tmp_path, monkeypatch, capsys):
    """run(*flags) -> (what the benchmark stored, what it printed)."""

    def call(*flags):
        path = tmp_path / "new" / "benchmark.json"
        flags = ["--model", tiny_clip, "--batch-size", "4", "--classes", "3", "--rounds", "1", *flags]
        monkeypatch.setattr("sys.argv", ["benchmark", *flags, "--out", str(path)])
        benchmark.main()
        return json.loads(path.read_text()), capsys.readouterr().out

    return call


def one_second_each(calls):
    return {name: 1.0 for name in calls}, {name: call() for name, call in calls.items()}


# -------------------------------------------------------------------------------------------------
# Peers


@pytest.mark.parametrize("method", benchmark.PEERS)
def test_peers_take_our_steps(method, inputs):
    """Their losses are ours, also after the weights have moved: they differ in speed alone."""
    clip, class_text, batch = inputs[method]
    losses = []
    for new_step in (benchmark.our_step, benchmark.peer_step):
        step = new_step(method, benchmark.new_strategy(method, clip, class_text), batch)
        losses.append([step() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] - losses[0][2] > 1e-4


@pytest.mark.parametrize("method", benchmark.PEERS)
def test_both_clip_gradients_at_1_for_plain_finetuning_only(method, inputs, monkeypatch):
    clip, class_text, batch = inputs[method]
    norms = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: norms.append(norm))
    for new_step in (benchmark.our_step, benchmark.peer_step):
        new_step(method, benchmark.new_strategy(method, clip, class_text), batch)()
    assert norms == ([1.0, 1.0] if method == "finetune" else [])


def test_a_step_leaves_the_benchmarks_own_model_as_it_is(inputs):
    clip, class_text, batch = inputs["arf"]
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    benchmark.our_step("arf", benchmark.new_strategy("arf", clip, class_text), batch)()
    assert all(value.equal(before[name]) for name, value in clip.model.state_dict().items())
    assert not any(p.requires_grad for p in clip.model.parameters())


def test_lads_takes_100_steps_on_412_images_and_learns():
    z, t_s, t_k, class_text = (benchmark.unit(n, 16) for n in (412, 412, 412, 4))
    net, labels = new_mapper(16, 0).net, torch.arange(412) % 4
    inputs = z, labels, t_s, t_k, class_text
    first = peers.train_lads(net, *inputs)
    steps, take_step = [], peers.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "step", lambda *of: steps.append(take_step(*of)) or steps[-1])
        assert peers.train_lads(net, *inputs) < first - 0.1
    assert len(steps) == 100


# -------------------------------------------------------------------------------------------------
# Measuring


def test_the_median_of_calls_that_take_turns():
    order, ticks = [], iter([0, 5, 5, 6, 6, 7, 7, 10, 10, 12, 12, 13])
    calls = {name: lambda name=name: order.append(name) or name for name in "ab"}
    seconds, results = benchmark.measure(calls, 3, lambda: next(ticks))
    assert "".join(order) == "ab" + "ababab"  # once to warm up
    assert seconds == {"a": 2, "b": 1} and results == {"a": "a", "b": "b"}


def test_a_row_is_stored_before_the_next_one_is_measured(tmp_path, capsys):
    path = tmp_path / "out.json"
    def second():
        stored = json.loads(path.read_text())
        assert stored == {"device": "CPU", "tables": {"times": [{"what": "a", "ms": 1.0}]}}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark.print_table({"device": "CPU", "tables": {}}, path, "times", {"a": lambda: {"ms": 1.0}, "b": second})
    assert [row["what"] for row in json.loads(path.read_text())["tables"]["times"]] == ["a"]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
])
def test_out_of_memory_is_a_row_and_the_next_ones_follow(tmp_path, capsys, error):
    def fail():
        raise error

    rows = {"large": fail, "small": lambda: {"ms": 2.0}}
    benchmark.print_table({"tables": {}}, tmp_path / "out.json", "steps", rows)
    rows = json.loads((tmp_path / "out.json").read_text())["tables"]["steps"]
    assert rows == [{"what": "large: out of memory"}, {"what": "small", "ms": 2.0}]
    assert "large: out of memory" in capsys.readouterr().out


def test_another_error_is_not_taken_for_it(tmp_path):
    def fail():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        benchmark.print_table({"tables": {}}, tmp_path / "out.json", "steps", {"a": fail})


# -------------------------------------------------------------------------------------------------
# The command


def test_the_benchmark_prints_tables_and_stores_them(run):
    stored, printed = run()
    assert (stored["device"], stored["clock"], stored["batch"]) == ("CPU", "CPU time", 4)
    tables = stored["tables"]
    steps, evaluation, mappers, search = tables.values()
    assert all(f"\n{title}:\n" in printed for title in tables)
    assert max(map(len, printed.splitlines()[1:])) <= 100
    assert [row["what"] for row in mappers] == ["lads / LADS's", "ldfs / LADS's", "global / LADS's"]
    for row in (*steps, mappers[0]):
        assert row["loss differs by"] < 1e-5
    for row in (*steps, *mappers, *search):
        assert row["peer's / ours"] == pytest.approx(row["peer's, ms"] / row["ours, ms"])
    assert evaluation[0].pop("what") == "16 images"  # four batches
    assert len(evaluation[0]) == 4 and min(evaluation[0].values()) > 0
    assert search[0]["same ids"] == 1
    assert "LADS's real step takes twice as long" in printed
    assert "no GPU: peak memory, MFU" in printed


def test_tables_are_measured_one_after_another_into_one_file(run):
    run("--tables", "search")
    tables = run("--tables", "mappers")[0]["tables"]
    assert [title.split()[0] for title in tables] == ["exact", "training"]
    assert run("--tables", "search", "--rounds", "2")[0]["tables"].keys() == {"exact search"}


def test_arf_loads_twice_as_many_images_as_it_trains_on(inputs):
    rates = {
        method: benchmark.compare_steps(method, *inputs[method], one_second_each)["images/s"]
        for method in benchmark.PEERS
    }
    assert rates == {"finetune": 6, "flyp": 6, "arf": 12}


def test_a_gpus_tables_of_all_batches_are_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PAGES", tmp_path / "docs")
    for batch, device in ((64, "NVIDIA H100 80GB"), (256, "NVIDIA H100 80GB"), (8, "CPU")):
        content = {"device": device, "batch": batch, "tables": {}}
        path = tmp_path / "runs" / f"{batch}.json"
        benchmark.print_table(content, path, "steps", {"arf": lambda: {"images/s": 10.0 * batch}})
    [page] = (tmp_path / "docs").iterdir()
    text = page.read_text()
    assert page.name == "gpu-nvidia-h100-80gb.md" and text.startswith("# NVIDIA H100 80GB\n")
    assert "## Batch 64" in text and " 640" in text and "## Batch 256" in text and "2560" in text
    assert "Batch 8" not in text


def test_what_runs_out_of_memory_does_not_stop_the_benchmark(run, monkeypatch):
    def fail(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peers, "arf_loss", fail)
    stored, _ = run()
    names = [row["what"] for row in stored["tables"]["training steps"]]
    assert names == ["finetune / WiSE-FT's", "flyp / FLYP's", "arf / three forwards: out of memory"]
    assert len(stored["tables"]) == 4


def test_the_default_batch_fits_one_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "images of a step (default: 64)" in capsys.readouterr().out


def test_a_model_that_does_not_exist_is_one_line(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--model", "local-dir:/nowhere")
    assert stop.value.code == 2 and "--model local-dir:/nowhere" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# On a GPU


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A CPU that calls itself an H100, with a peak of 1 MFLOP/s; compiled models are counted."""
    compiled = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9)
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    monkeypatch.setitem(benchmark.PEAK, "H100", 1e6)
    return compiled


def test_flops_and_memory_of_our_steps(inputs, pretend_gpu):
    rows = {
        (method, compiled): benchmark.measure_training(method, compiled, *inputs[method], one_second_each)
        for method in benchmark.PEERS for compiled in (False, True)
    }
    assert len(pretend_gpu) == 3 * 2  # both towers of the compiled ones
    for (method, _), row in rows.items():
        assert row["images/s"] == (12 if method == "arf" else 6) and row["peak memory, GB"] == 5
    mfu = {method: rows[method, False]["MFU"] for method in benchmark.PEERS}
    assert 0 < mfu["finetune"] < mfu["flyp"]
    assert 1.9 < mfu["arf"] / mfu["flyp"] < 3  # images twice, texts three times
    assert all(rows[method, True]["MFU"] == mfu[method] for method in mfu)


def test_no_mfu_of_an_unknown_gpu(inputs, pretend_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert benchmark.measure_training("flyp", False, *inputs["flyp"], one_second_each)["MFU"] == ""


def test_the_captioner_has_blip2s_shape():
    model = benchmark.new_captioner(torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.74e9, rel=0.01)
    assert model.config.num_query_tokens == 32


def test_captions_have_30_tokens_by_5_beams(pretend_gpu, monkeypatch, tiny_blip2):
    from transformers import Blip2ForConditionalGeneration

    model, calls = Blip2ForConditionalGeneration.from_pretrained(tiny_blip2), []
    monkeypatch.setattr(benchmark, "new_captioner", lambda device: model)

    def watch(named_calls):
        calls.append(named_calls["step"])
        return one_second_each(named_calls)

    row = benchmark.measure_captions(2, torch.device("cpu"), watch)
    assert row == {"images/s": 2, "peak memory, GB": 5, "MFU": ""}
    assert calls[0].keywords["num_beams"] == 5
    assert calls[0]().shape == (2, 4 + 1 + 30)  # the image, the start of the text, the caption
