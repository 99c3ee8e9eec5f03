"""finetune.py: what is trained and what is not, schedules, killing and resuming, and that it learns."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import data
import features
import finetune
from finetune import SCHEDULES, Anchors, Schedule, lr_at, step_loss, with_synthesised
from mapper import Mapper
from methods import Method, parse_method

SHORT = {train: Schedule(3, 8, 1e-2 if train == "head" else 1e-3) for train in SCHEDULES}


@pytest.fixture
def clip(tiny_data, tiny_clip):
    dataset = data.load("tiny", tiny_data)
    args = data.arguments("").parse_args(["tiny", "photo", "--model", tiny_clip])
    return features.load_clip(args, dataset), dataset


def run(
    clip, dataset, path, train="head", mappers=(), schedule=None, seed=0, init="text", method="finetune", anchors=None,
    kept=None, made_of="test",
):
    finetune.finetune(
        clip, dataset, "photo", seed, train, parse_method(method), list(mappers), anchors or Anchors(),
        schedule or SHORT[train], init, path.parent, path, made_of, {} if kept is None else kept,
    )
    return torch.load(path)["modules"]


def changed(before, after):
    return {k.split(".")[0] for k in after if not torch.equal(before[k], after[k])}


TEXT_TOWER = {"transformer", "token_embedding", "positional_embedding", "text_projection", "ln_final", "logit_scale"}


@pytest.mark.parametrize("train, moves", [("head", set()), ("visual", {"visual"}), ("all", {"visual"} | TEXT_TOWER)])
def test_only_what_is_trained_moves(clip, tmp_path, train, moves):
    clip, dataset = clip
    before = copy.deepcopy(clip.model.state_dict())
    frozen = Mapper(32).requires_grad_(False)
    mapper_before = copy.deepcopy(frozen.state_dict())
    modules = run(clip, dataset, tmp_path / "c.pt", train, [frozen])
    assert changed(before, clip.model.state_dict()) == moves
    assert not changed(mapper_before, frozen.state_dict()) and all(p.grad is None for p in frozen.parameters())
    head = F.normalize(modules["head.weight"], dim=-1)
    start = features.encode_texts(clip, data.class_texts(dataset, "photo"))
    assert torch.allclose(head, start, atol=1e-6) == (train == "all")  # there, the head is the text tower's


@pytest.mark.parametrize("train", SCHEDULES)
def test_a_killed_run_resumes_to_the_same_bits(clip, tmp_path, train, monkeypatch):
    clip, dataset = clip
    original = copy.deepcopy(clip.model.state_dict())
    whole = run(clip, dataset, tmp_path / "whole.pt", train)

    clip.model.load_state_dict(original)
    calls, true_loss = [], finetune.step_loss

    def dies(*args):
        calls.append(1)
        if len(calls) == 8:  # within the third epoch of three steps
            raise KeyboardInterrupt
        return true_loss(*args)

    monkeypatch.setattr(finetune, "step_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        run(clip, dataset, tmp_path / "killed.pt", train)
    monkeypatch.setattr(finetune, "step_loss", true_loss)
    clip.model.load_state_dict(original)
    resumed = run(clip, dataset, tmp_path / "killed.pt", train)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_finished_run_is_left_alone_and_another_one_is_not(clip, tmp_path, monkeypatch):
    clip, dataset = clip
    path = tmp_path / "c.pt"
    first = run(clip, dataset, path)
    stamp = path.stat().st_mtime_ns
    run(clip, dataset, path)
    assert path.stat().st_mtime_ns == stamp
    run(clip, dataset, path, seed=1, made_of="other")
    assert not torch.equal(first["head.weight"], torch.load(path)["modules"]["head.weight"])


def test_finetuning_learns_the_source(clip, tmp_path):
    clip, dataset = clip
    items = data.split(dataset, "photo", "photo", "train", 0)
    z, labels = features.encode_images(clip, dataset.folder, items), torch.tensor([y for _, y in items])
    head = run(clip, dataset, tmp_path / "c.pt", schedule=Schedule(100, 18, 1e-2))["head.weight"]
    assert (z @ head.T).argmax(1).eq(labels).all()


def test_both_starts_of_the_head_differ_and_are_seeded(clip, tmp_path):
    clip, dataset = clip
    still = Schedule(1, 18, 0.0)
    text = run(clip, dataset, tmp_path / "a.pt", schedule=still)["head.weight"]
    assert torch.allclose(text, features.encode_texts(clip, data.class_texts(dataset, "photo")))
    scratch = [
        run(clip, dataset, tmp_path / f"{n}.pt", schedule=still, seed=seed, init="scratch")["head.weight"]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(scratch[0], scratch[1]) and not torch.equal(scratch[0], scratch[2])


def test_step_loss_is_the_sum_over_original_and_synthesised():
    z, w = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(3, 8), dim=-1)
    y, mappers = torch.tensor([0, 1, 2, 0]), [Mapper(8), Mapper(8)]
    parts = [F.cross_entropy(9 * x @ w.T, y) for x in (z, mappers[0](z), mappers[1](z))]
    assert torch.allclose(step_loss(with_synthesised(z, mappers), y, w, 9.0), sum(parts))


def test_the_encoder_learns_through_the_frozen_mapper():
    z = F.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
    m = Mapper(8).requires_grad_(False)
    step_loss(with_synthesised(z, [m])[1:], torch.tensor([0, 1, 2, 0]), torch.eye(8)[:3], 9.0).backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in m.parameters())


def test_the_schedule_warms_up_and_ends_at_zero():
    schedule = Schedule(epochs=1, batch_size=1, lr=2.0, warmup=0.1)
    rates = [lr_at(step, 100, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_data_set_may_bring_its_schedule_and_flags_come_first(tiny_data, tiny_clip, tmp_path, script):
    about = tiny_data / "tiny" / "dataset.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"schedules": {"head": {"lr": 0.5, "epochs": 2}}}))
    common = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", tmp_path / "run", "--seeds", 1]
    script("finetune.py", *common, "--methods", "finetune", "--lr", 0.25)
    made_of = torch.load(tmp_path / "run" / "checkpoints" / "head-scratch-finetune-seed0.pt")["made_of"]
    assert (made_of["schedule"]["lr"], made_of["schedule"]["epochs"], made_of["schedule"]["batch_size"]) == (0.25, 2, 256)


def test_a_loss_that_is_not_finite_stops_the_run(clip, tmp_path):
    clip, dataset = clip
    with pytest.raises(FloatingPointError, match="step 0"):
        broken = Mapper(32)
        broken.net[0].weight.data.fill_(float("nan"))
        run(clip, dataset, tmp_path / "c.pt", mappers=[broken])


# ---------------------------------------------------------------------------------------------------------------------
# FLYP and ARF


@pytest.mark.parametrize("text, method", [
    ("finetune", Method()), ("ldfs:sigma=0", Method(recipe="ldfs:sigma=0")), ("flyp", Method(True)),
    ("flyp+captions", Method(True, captions=True)), ("arf", Method(True, True, True)),
    ("arf+ldfs", Method(True, True, True, "ldfs")),
])
def test_methods_are_named_by_what_they_are_made_of(text, method):
    assert parse_method(text) == method


@pytest.mark.parametrize("text", ["finetune+captions", "ldfs+retrieved", "flyp+lads+ldfs", "arff", ""])
def test_methods_that_are_none_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_method(text)
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_arf_loss_is_the_weighted_sum_of_open_clips_losses():
    import open_clip

    def unit(n):
        return F.normalize(torch.randn(n, 16), dim=-1)

    z, z_hat, prompts, captions, images, texts = unit(6), unit(6), unit(6), unit(6), unit(4), unit(4)
    loss = open_clip.ClipLoss()
    got = finetune.arf_loss([z, z_hat], prompts, captions, (images, texts), 14.0, Anchors(lambda_cap=0.5, lambda_ret=2.0))
    expected = loss(z, prompts, 14.0) + loss(z_hat, prompts, 14.0)
    expected = expected + 0.5 * loss(z, captions, 14.0) + 2 * loss(images, texts, 14.0)
    assert torch.allclose(got, expected, atol=1e-6)
    assert torch.equal(finetune.arf_loss([z], prompts, None, None, 14.0, Anchors()), loss(z, prompts, 14.0))


@pytest.fixture
def anchors_of(clip, tmp_path):
    """Anchors for the 18 training photos: a caption each, and 7 retrieved pairs."""
    from conftest import square, write_shard

    from data import read_shard

    write_shard(tmp_path / "0.tar", {f"{i}.{e}": c for i in range(7) for e, c in (("png", square(i)), ("txt", b"w%d" % i))})
    retrieved = [(where, text) for _, where, text, _ in read_shard(tmp_path / "0.tar")[0]]
    return Anchors([f"a thing with number {i}" for i in range(18)], retrieved)


@pytest.mark.parametrize("method, images, texts", [
    ("flyp", 1, 1), ("flyp+captions", 1, 2), ("flyp+retrieved", 2, 2), ("arf", 2, 3),
])
def test_an_image_is_encoded_once_for_both_of_its_texts(clip, anchors_of, tmp_path, monkeypatch, method, images, texts):
    clip, dataset = clip
    calls = {"encode_image": 0, "encode_text": 0}

    def counted(name, true_call):
        def call(*args, **more):
            calls[name] += torch.is_grad_enabled()
            return true_call(*args, **more)
        return call

    for name in calls:
        monkeypatch.setattr(clip.model, name, counted(name, getattr(clip.model, name)))
    before = copy.deepcopy(clip.model.state_dict())
    run(clip, dataset, tmp_path / "c.pt", "all", schedule=Schedule(1, 18, 1e-3), method=method, anchors=anchors_of)
    assert calls == {"encode_image": images, "encode_text": texts}
    assert changed(before, clip.model.state_dict()) == {"visual"} | TEXT_TOWER


def test_each_anchor_changes_what_is_learned(clip, anchors_of, tmp_path):
    clip, dataset = clip
    original, heads = copy.deepcopy(clip.model.state_dict()), []
    for i, method in enumerate(["flyp", "flyp+captions", "flyp+retrieved", "arf", "arf+ldfs"]):
        clip.model.load_state_dict(original)
        torch.manual_seed(0)
        mappers = [Mapper(32).requires_grad_(False)] if "ldfs" in method else []
        heads.append(run(clip, dataset, tmp_path / f"{i}.pt", "all", mappers, method=method, anchors=anchors_of)["head.weight"])
    assert all(not torch.allclose(a, b) for i, a in enumerate(heads) for b in heads[:i])


def test_a_killed_arf_run_resumes_to_the_same_bits(clip, anchors_of, tmp_path, monkeypatch):
    """Retrieved pairs, too, go on where they were in their endless passes."""
    clip, dataset = clip
    original = copy.deepcopy(clip.model.state_dict())
    whole = run(clip, dataset, tmp_path / "whole.pt", "all", method="arf", anchors=anchors_of)
    clip.model.load_state_dict(original)
    calls, true_loss = [], finetune.arf_loss

    def dies(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return true_loss(*args)

    monkeypatch.setattr(finetune, "arf_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        run(clip, dataset, tmp_path / "killed.pt", "all", method="arf", anchors=anchors_of)
    monkeypatch.setattr(finetune, "arf_loss", true_loss)
    clip.model.load_state_dict(original)
    resumed = run(clip, dataset, tmp_path / "killed.pt", "all", method="arf", anchors=anchors_of)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_passes_are_whole_and_without_end():
    batches = finetune.passes(5, 7, seed=0)
    stream = [i for _ in range(10) for i in next(batches)]
    assert len(stream) == 70 and all(sorted(stream[i:i + 5]) == list(range(5)) for i in range(0, 70, 5))
    assert stream[:5] != stream[5:10] or stream[5:10] != stream[10:15]


EMOJI_CLIP = f"local-dir:{finetune.data.Path(finetune.__file__).parent / 'emoji_clip'}"


@pytest.fixture
def small_cnn(tiny_data):
    """The committed mini CLIP, whose tower has stages, on the tiny data set."""
    dataset = data.load("tiny", tiny_data)
    return features.load_clip(data.arguments("").parse_args(["tiny", "photo", "--model", EMOJI_CLIP]), dataset), dataset


def test_frozen_stages_are_the_same_function_cut_in_two(small_cnn):
    clip, dataset = small_cnn
    items = dataset.images["photo"][:5]
    whole = features.encode_images(clip, dataset.folder, items)
    features.freeze_stages(clip, 6)
    assert torch.allclose(features.encode_images(clip, dataset.folder, items), whole, atol=1e-5)
    front = features.front_features(clip, dataset.folder, items, clip.preprocess)
    assert front.shape == (5, 192, 2, 2)
    assert torch.allclose(features.encode_batch(clip, front), whole, atol=1e-5)
    assert not any(p.requires_grad for p in clip.front.parameters())


def test_towers_without_stages_are_refused(clip, small_cnn, capsys):
    for (model, _), stages, says in ((clip, 1, "EfficientNet"), (small_cnn, 8, "8 stages of 7")):
        with pytest.raises(SystemExit) as stop:
            features.freeze_stages(model, stages)
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_views_kept_for_several_methods_are_those_each_would_see(small_cnn, anchors_of, tmp_path):
    """ARF after FLYP with the same kept views, and alone: the same bits, and the stages that are frozen stay."""
    clip, dataset = small_cnn
    features.freeze_stages(clip, 6)
    original, front, kept = copy.deepcopy(clip.model.state_dict()), copy.deepcopy(clip.front.state_dict()), {}
    outcomes = []
    for i, (method, views) in enumerate([("flyp", kept), ("arf", kept), ("arf", {})]):
        clip.model.load_state_dict(original)
        how = {"schedule": Schedule(2, 9, 1e-3), "method": method, "anchors": anchors_of, "kept": views}
        outcomes.append(run(clip, dataset, tmp_path / f"{i}.pt", "all", **how))
    assert all(torch.equal(outcomes[1][k], outcomes[2][k]) for k in outcomes[1])
    assert not changed(front, clip.front.state_dict())


def train_in_process(rank, world, tiny_data, tiny_clip, anchors, path, method):
    """What one of `world` processes does: a short run, without augmentation, of which each process draws its own."""
    import os

    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    torch.set_num_threads(1)
    dataset = data.load("tiny", tiny_data)
    clip = features.load_clip(data.arguments("").parse_args(["tiny", "photo", "--model", tiny_clip]), dataset)
    clip.augment = clip.preprocess
    run(clip, dataset, path, "all", schedule=Schedule(2, 6, 1e-3), method=method, anchors=anchors)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["finetune", "arf"])
def test_two_processes_train_as_one_on_the_same_global_batch(tiny_data, tiny_clip, anchors_of, tmp_path, method):
    about = tiny_data / "tiny" / "dataset.json"  # two templates: which is drawn must not hang on the process
    about.write_text(json.dumps(json.loads(about.read_text()) | {"templates": {"photo": ["a photo of {}", "look, a {}!"]}}))
    arguments = (tiny_data, tiny_clip, anchors_of)
    train_in_process(0, 1, *arguments, tmp_path / "one" / "c.pt", method)
    torch.multiprocessing.spawn(train_in_process, (2, *arguments, tmp_path / "two" / "c.pt", method), nprocs=2)
    one, two = (torch.load(tmp_path / n / "c.pt")["modules"] for n in ("one", "two"))
    args = data.arguments("").parse_args(["tiny", "photo", "--model", tiny_clip])
    start = features.load_clip(args, data.load("tiny", tiny_data))
    for name, before in start.model.state_dict().items():
        far, moved = (one[f"clip.{name}"] - two[f"clip.{name}"]).abs(), (one[f"clip.{name}"] - before).abs()
        if name.endswith("in_proj_bias"):  # a key's bias has no gradient but rounding noise, of which Adam makes full steps
            far[len(far) // 3:2 * len(far) // 3] = 0
        assert far.mean() < 1e-4 * moved.mean() + 1e-9, name


def test_coops_prompt_with_the_embeddings_of_words_is_these_words(clip):
    """Context vectors set to the embeddings of "X": the text tower says the same as of "X X X X cat."; only they learn."""
    clip, dataset = clip
    context = finetune.Context(clip, dataset.names, torch.Generator().manual_seed(0))
    assert context.vectors.shape == (4, 32) and [name for name, _ in context.named_parameters()] == ["vectors"]
    for words in ("X X X X", "X to be X"):
        texts = [f"{words} {name}." for name in dataset.names]
        context.vectors.data[:] = clip.model.token_embedding.weight[clip.tokenizer(texts)[0, 1:5]]
        assert torch.allclose(context(), features.encode_texts(clip, texts), atol=1e-6)
    context()[:, 0].sum().backward()
    assert (context.vectors.grad.abs().sum(1) > 0).all() and clip.model.token_embedding.weight.grad is None


def test_coop_learns_the_classes(clip, tmp_path):
    """On features of three colours, the trained prompt classifies better than the untrained: its head is in the checkpoint."""
    clip, dataset = clip
    run(clip, dataset, tmp_path / "p.pt", "prompt", schedule=Schedule(40, 8, 3e-2, weight_decay=0))
    items = data.split(dataset, "photo", "photo", "train", 0)
    z = features.encode_images(clip, dataset.folder, items)
    head = torch.load(tmp_path / "p.pt")["modules"]["head.weight"]
    right = (z @ head.T).argmax(1).eq(torch.tensor([y for _, y in items])).float().mean()
    assert right > 0.9 and torch.allclose(head.norm(dim=1), torch.ones(3), atol=1e-5)


def test_a_long_gradient_is_cut(clip, tmp_path, monkeypatch):
    clip, dataset = clip
    lengths, step = [], torch.optim.AdamW.step

    def look(self, *args, **kwargs):
        lengths.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    run(clip, dataset, tmp_path / "a.pt", schedule=Schedule(2, 8, 1e-3))
    free = max(lengths)
    lengths.clear()
    run(clip, dataset, tmp_path / "b.pt", schedule=Schedule(2, 8, 1e-3, max_norm=free / 2))
    assert max(lengths) == pytest.approx(free / 2, rel=1e-4)


@pytest.mark.parametrize("train", ["visual", "head"])
def test_a_checkpoint_is_a_model(tiny_data, tiny_clip, tmp_path, script, capsys, train):
    """--model takes what finetune.py wrote: its tower's features, under the name of the file; a head alone is refused."""
    common = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--run", tmp_path / "run", "--seeds", 1]
    script("finetune.py", *common, "--methods", "finetune", "--train", train, "--epochs", 1, "--lr", 1e-2)
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    dataset = data.load("tiny", tiny_data)
    args = data.arguments("").parse_args(["tiny", "photo", "--model", str(path)])
    if train == "head":
        with pytest.raises(SystemExit) as stop:
            features.load_clip(args, dataset)
        assert stop.value.code == 2 and "holds a head alone" in capsys.readouterr().err
        return
    tuned, state = features.load_clip(args, dataset), torch.load(path)["modules"]
    assert all(torch.equal(v, state[f"clip.{k}"]) for k, v in tuned.model.state_dict().items())
    original = features.load_clip(data.arguments("").parse_args(["tiny", "photo", "--model", tiny_clip]), dataset)
    assert tuned.name == str(path) and tuned.fingerprint != original.fingerprint
    (tmp_path / "other.pt").write_bytes(b"not a checkpoint")
    for name, says in (("nowhere.pt", "no such file"), ("other.pt", "not a checkpoint of finetune.py")):
        with pytest.raises(SystemExit):
            features.load_clip(data.arguments("").parse_args(["tiny", "--model", str(tmp_path / name)]), dataset)
        assert says in capsys.readouterr().err
