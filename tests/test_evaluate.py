"""evaluate.py and quality.py: accuracies, α, the figures' measures, against values worked out by
hand.
"""

import json
import os
from types import SimpleNamespace

import pytest
import torch

import config
import data
import evaluate
import quality
from report import results


def by_class(dataset, domain, items):
    return torch.eye(3)[[label for _, label in items]]


def known(domain):
    return torch.eye(3), None


def test_accuracies_and_their_means(tiny_data):
    """A head that knows photos to test on, and names all else a cat: a third of them are."""
    dataset = data.load("tiny", tiny_data)

    def features_of(one, domain, items):
        tested = items == dataset.split("photo", "photo", "test", 0)
        return by_class(one, domain, items) if tested else torch.eye(3)[[0] * len(items)]

    rows = evaluate.accuracies(dataset, "photo", 0, features_of, known)
    third = pytest.approx(100 / 3)
    assert [(r["domain"], r.get("split", "test"), r["value"], r["n"]) for r in rows] == [
        ("photo", "val", third, 3), ("photo", "test", 100, 9), ("sketch", "test", third, 30),
        ("cartoon", "test", third, 30), ("OOD mean", "test", third, 60),
        ("extended", "test", pytest.approx((100 + 100 / 3) / 2), 60),
    ]


def test_a_bias_counts(tiny_data):
    dataset = data.load("tiny", tiny_data)
    head = torch.eye(3), torch.tensor([2.0, 0, 0])  # … and all are cats
    rows = evaluate.accuracies(dataset, "photo", 0, by_class, lambda domain: head)
    assert all(row["value"] == pytest.approx(100 / 3) for row in rows)


def test_unseen_classes_and_their_mean(tiny_data):
    dataset = data.load("tiny", tiny_data)

    def features_of(one, domain, items):  # sketches all look like cats
        return torch.eye(3)[[label * (domain != "sketch") for _, label in items]]

    rows = evaluate.unseen_accuracies(dataset, features_of, known)
    third = pytest.approx(100 / 3)
    expected = {"unseen photo": 100, "unseen sketch": third, "unseen cartoon": 100}
    assert {r["domain"]: r["value"] for r in rows} == {**expected, "unseen mean": pytest.approx(700 / 9)}


def test_interpolated_weights_lie_on_the_line():
    """WiSE-FT: the ends are the ends, the middle is the mean, and counters are the finetuned
    model's.
    """
    a = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(1)}
    b = {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(3)}
    for alpha, w in ((0, [0.0, 2.0]), (0.5, [0.5, 3.0]), (0.25, [0.25, 2.5]), (1, [1.0, 4.0])):
        mix = evaluate.interpolate(a, b, alpha)
        assert mix["w"].tolist() == w and mix["n"].item() == 3


def test_caption_quality_of_known_captions(tiny_data, monkeypatch):
    dataset = data.load("tiny", tiny_data)
    items = dataset.images["photo"]
    (tiny_data / "tiny" / "descriptions.jsonl").write_text("".join(
        json.dumps({"path": location.path, "caption": f"A thing{i}, some tag"}) + "\n"
        for i, (location, _) in enumerate(items)
    ))
    captions = ["a Red House"] * 25 + [f"a thing{i}" for i in range(25, 30)]  # 10 cats, dogs, houses
    features = {text: torch.eye(8)[i] for i, text in enumerate(dict.fromkeys(captions))}
    encode = lambda clip, texts: torch.stack([features[t] for t in texts])  # noqa: E731
    monkeypatch.setattr(quality, "encode_texts", encode)
    got = quality.caption_quality(dataset, items, captions, torch.eye(8)[[0] * 30], None)
    assert got["names the class"] == pytest.approx(100 * 5 / 30)
    assert got["names class or thing"] == pytest.approx(100 * 10 / 30)
    assert got["CLIP score"] == pytest.approx(100 * 25 / 30)


def test_consistency_of_known_neighbours():
    target = torch.eye(4)[:2], torch.tensor([0, 1])   # real sketches of class 0 and 1
    source = torch.eye(4)[2:], torch.tensor([0, 1])   # real photos
    z_hat = torch.tensor([[1.0, 0, 0, 0], [0.9, 0, 0, 0], [0, 0.5, 0.6, 0], [0.1, 0, 0, 0.9]])
    got = quality.consistency(z_hat, torch.tensor([0, 1, 1, 1]), target, source)
    assert got == {"domain consistency": 50, "class consistency": 50, "unique neighbours": 50}
    got = quality.consistency(z_hat[:3], torch.tensor([0, 1, 1]), target, source)
    assert got["domain consistency"] == pytest.approx(100 * 2 / 3)  # the third is nearest to a photo


def test_figure_4_measures_each_domain_by_its_own_images(tiny_data, tmp_path, monkeypatch):
    """Features that name domain and class; a mapper that goes all the way to sketches, not to
    cartoons.
    """
    argv = ["tiny", "--data", str(tiny_data), "--run", str(tmp_path), "--methods", "ldfs", "--seeds", "1"]
    settings, dataset = config.parse("", argv)
    domains, found = list(dataset.images), []

    def cached(one, domain, items):
        return torch.eye(9)[[3 * domains.index(domain) + label for _, label in items]]

    def load_synthesiser(config, dataset, clip, name, domain, seed, items):
        return lambda z: z.roll(3 * (domain == "sketch"), 1)

    monkeypatch.setattr(quality, "load_synthesiser", load_synthesiser)
    monkeypatch.setattr(quality.figures, "draw_figure4", lambda path, rows: None)
    monkeypatch.setattr(quality.results, "append", lambda config, rows: found.extend(rows))
    quality.figure4(settings, dataset, SimpleNamespace(device="cpu"), cached)
    got = {(r["method"], r["domain"], r["measure"]): r["value"] for r in found}
    assert got["ldfs", "sketch", "domain consistency"] == got["ldfs", "sketch", "class consistency"] == 100
    assert got["ldfs", "cartoon", "domain consistency"] == 0
    assert got["not mapped", "sketch", "domain consistency"] == 0


def test_a_head_of_fewer_classes_is_a_masked_head():
    """ImageNet-A and -R: the argmax among their own names is that of the whole head, all others
    masked.
    """
    generator = torch.Generator().manual_seed(0)
    weight, z = torch.randn(10, 4, generator=generator), torch.randn(50, 4, generator=generator)
    bias = torch.randn(10, generator=generator)
    names, some = [f"c{i}" for i in range(10)], ["c7", "c2", "c5"]
    others = torch.tensor([i for i in range(10) if f"c{i}" not in some])
    masked = (z @ weight.T + bias).index_fill(1, others, -torch.inf).argmax(1)
    part, part_bias = evaluate.restricted((weight, bias), names, some)
    found = (z @ part.T + part_bias).argmax(1)
    assert [some[i] for i in found] == [names[i] for i in masked]

    def rows(names, own):
        return evaluate.restricted((weight[:len(names)], None), names, own)

    assert rows(names, ["c1", "alarm clock"]) is None
    twice = ["crane", "missile", "tank", "missile"]  # as ImageNet's 657 and 744: told apart by order
    assert torch.equal(rows(twice, twice)[0], weight[:4])
    assert torch.equal(rows(twice, ["missile", "tank"])[0], weight[1:3])
    assert torch.equal(rows(twice, ["tank", "missile"])[0], weight[2:4])


@pytest.fixture
def run(tiny_data, tiny_clip, tmp_path, monkeypatch):
    """call(main, …): a stage as its script would run it."""
    def call(main, *more):
        common = ["tiny", "photo", "--data", str(tiny_data), "--model", tiny_clip, "--seeds", "1"]
        common += ["--run", str(tmp_path / "run"), "--epochs", "1", "--mapper-steps", "2"]
        monkeypatch.setattr("sys.argv", ["script.py", *common, *more])
        main()

    return call


def rows_of(tmp_path):
    return (tmp_path / "run" / "results.jsonl").read_text()


def test_unfinished_or_foreign_checkpoints_are_refused(run, tmp_path, capsys):
    import finetune

    run(finetune.main, "--methods", "finetune")
    [path] = (tmp_path / "run" / "checkpoints").iterdir()
    whole = torch.load(path)
    for broken in (whole | {"optimizer": {}}, whole | {"fingerprint": "another"}):
        torch.save(broken, path)
        with pytest.raises(SystemExit) as stop:
            run(evaluate.main, "--methods", "finetune")
        assert stop.value.code == 2 and "unfinished, or of another model" in capsys.readouterr().err
    torch.save(whole | {"classes": ["cat", "dog", "zebra"]}, path)
    with pytest.raises(SystemExit):
        run(evaluate.main, "--methods", "finetune")
    assert "trained on other classes" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        run(evaluate.main, "--methods", "finetune")
    assert f"{path} is damaged" in capsys.readouterr().err


def test_what_is_measured_is_not_measured_again_but_changed_images_are(
    run, tiny_data, tmp_path, monkeypatch, capsys
):
    import finetune

    def read_only(*paths):
        raise OSError(30, "Read-only file system")

    methods = ["--methods", "finetune", "--train", "full", "--alphas", "0.5"]
    run(finetune.main, *methods)
    run(evaluate.main, *methods)
    first = rows_of(tmp_path)
    with monkeypatch.context() as here:
        here.setattr("os.replace", read_only)
        run(evaluate.main, *methods)  # and still says what it found
    out, err = capsys.readouterr()
    assert rows_of(tmp_path) == first and out.count("| finetune α=0.5 |") == 2
    assert err.count("could not be written (Read-only file system)") == 2  # figure and table

    def tested():
        return {row["tested"] for row in results.read(tmp_path / "run") if row["measure"] == "accuracy"}

    [before], sketches = tested(), sorted((tiny_data / "tiny" / "sketch").glob("*/*.png"))
    whole = {image: (image.read_bytes(), image.stat().st_mtime_ns) for image in sketches}
    for image in sketches:
        image.write_bytes(sketches[0].read_bytes())
    run(evaluate.main, *methods)
    assert rows_of(tmp_path) != first and tested() != {before}
    for image, (content, changed) in whole.items():  # and back again
        image.write_bytes(content)
        os.utime(image, ns=(changed, changed))
    run(evaluate.main, *methods)
    assert tested() == {before}


def test_other_test_parts_are_measured_anew_and_no_table_mixes_them(run, tiny_data, tmp_path):
    """… neither those of a list, nor of things that are the same in all domains."""
    import finetune

    def tested(*methods):
        run(finetune.main, "--methods", *methods)
        run(evaluate.main, "--methods", *methods)
        rows = [r for r in results.read(tmp_path / "run") if r["domain"] == "sketch" and not r["trained"]]
        assert {r["tested"] for r in rows} == {rows[0]["tested"]}
        return [(r["method"], r["n"]) for r in rows if r["measure"] == "accuracy"]

    assert tested("finetune") == [("zero-shot", 30)]
    (tiny_data / "tiny" / "sketch_test.txt").write_text("sketch/cat/0.png\nsketch/dog/0.png\n")
    assert tested("finetune") == [("zero-shot", 2)]
    both = {row["method"] for row in results.read(tmp_path / "run")}
    (tiny_data / "tiny" / "sketch_test.txt").unlink()
    about = tiny_data / "tiny" / "dataset.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"same_stem_same_thing": True}))
    assert tested("coop") == [("zero-shot", 9)]
    assert "finetune" in both and "finetune" not in {r["method"] for r in results.read(tmp_path / "run")}


def test_heads_and_unseen_classes_are_in_the_sources_words(tiny_data, tiny_clip, tmp_path):
    """… at evaluation, too, whatever domain is looked at; unseen classes have a head of their own
    names.
    """
    import shutil

    import features

    shutil.copytree(tiny_data / "tiny", tiny_data / "others")
    for domain in ("photo", "sketch", "cartoon"):
        (tiny_data / "others" / domain / "cat").rename(tiny_data / "others" / domain / "tiger")
    dataset, others = data.load("tiny", tiny_data), data.load("others", tiny_data)
    argv = ["tiny", "--data", str(tiny_data), "--model", tiny_clip, "--run", str(tmp_path / "run")]
    clip = features.load_clip(config.parse("", argv)[0])
    for one, names in ((dataset, ["cat", "dog", "red house"]), (others, ["dog", "red house", "tiger"])):
        text = features.encode_texts(clip, [f"a photo of a {name}" for name in names])
        for domain in ("photo", "sketch"):
            weight, bias = evaluate.heads(clip, one, "photo")(domain)
            assert torch.allclose(weight, text, atol=1e-6) and bias is None
    trained = torch.zeros(3, 32), torch.ones(3)
    assert evaluate.heads(clip, dataset, "photo", trained)("sketch") is trained


def test_prompts_are_measured_on_classes_that_they_never_saw(run, tiny_data, tmp_path, monkeypatch):
    import shutil

    import finetune
    from prompts import CoOp

    said, true_call = [], CoOp.classifier
    monkeypatch.setattr(CoOp, "classifier", lambda self, names: said.append(names) or true_call(self, names))

    shutil.copytree(tiny_data / "tiny", tiny_data / "others")
    for domain in ("photo", "sketch", "cartoon"):
        (tiny_data / "others" / domain / "cat").rename(tiny_data / "others" / domain / "tiger")
    about = tiny_data / "tiny" / "dataset.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"unseen": "others"}))
    methods = ["--methods", "finetune", "coop", "cocoop", "maple", "--alphas", "0.5"]
    run(finetune.main, *methods)
    run(evaluate.main, *methods)
    rows = [json.loads(line) for line in rows_of(tmp_path).splitlines()]
    means = {(r["method"], r.get("alpha", 1)): r["values"].get("unseen mean") for r in rows if "split" not in r}
    prompts = {"coop", "cocoop", "maple"}  # no α between words and vectors
    assert means.keys() == {*((name, 1) for name in ("zero-shot", "finetune", *prompts)), ("finetune", 0.5)}
    assert {name for (name, _), mean in means.items() if mean} == {"zero-shot", *prompts}
    assert said == 3 * [["cat", "dog", "red house"], ["dog", "red house", "tiger"]]


def test_images_are_encoded_with_maples_prompts_and_only_its(run, tiny_data, tiny_clip, tmp_path, monkeypatch):
    import features
    import finetune
    from prompts import MaPLe

    seen, true_call = [], evaluate.accuracies

    def look(dataset, source, seed, features_of, head_of):
        seen.append(features_of(dataset, "sketch", dataset.images["sketch"]))
        return true_call(dataset, source, seed, features_of, head_of)

    monkeypatch.setattr(evaluate, "accuracies", look)
    for main in (finetune.main, evaluate.main):
        run(main, "--methods", "maple", "coop")
    zero_shot, maple, coop = seen
    argv = ["tiny", "--data", str(tiny_data), "--model", tiny_clip, "--run", str(tmp_path / "run")]
    cfg, dataset = config.parse("", argv)
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("maple-*")
    state, clip = torch.load(checkpoint)["modules"], features.load_clip(cfg)
    learner = MaPLe(None, clip, dataset.classnames, state["vectors"])
    learner.load_state_dict(state)
    with learner.prompted():
        expected = features.encode_images(clip, dataset.images["sketch"])
    assert torch.allclose(maple, expected, atol=1e-6) and not torch.allclose(maple, zero_shot, atol=1e-2)
    assert torch.equal(coop, zero_shot)


def test_unseen_classes_are_named_by_their_own_names_and_the_tuned_text_tower(
    run, tiny_data, tiny_clip, tmp_path, monkeypatch
):
    import shutil

    import features
    import finetune

    shutil.copytree(tiny_data / "tiny", tiny_data / "others")
    for domain in ("photo", "sketch", "cartoon"):
        (tiny_data / "others" / domain / "cat").rename(tiny_data / "others" / domain / "tiger")
    about = tiny_data / "tiny/dataset.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"unseen": "others"}))
    seen = []  # the head of zero-shot CLIP, then of the finetuned one
    look = lambda one, features_of, head_of: seen.append(head_of("sketch")[0]) or []  # noqa: E731
    monkeypatch.setattr(evaluate, "unseen_accuracies", look)
    for main in (finetune.main, evaluate.main):
        run(main, "--methods", "flyp", "--lr", "0.01")
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    for model, head in zip((tiny_clip, str(checkpoint)), seen, strict=True):
        argv = ["tiny", "--data", str(tiny_data), "--model", model, "--run", str(tmp_path / "run")]
        clip = features.load_clip(config.parse("", argv)[0])
        texts = [f"a photo of a {name}" for name in ("dog", "red house", "tiger")]
        assert torch.allclose(head, features.encode_texts(clip, texts), atol=1e-6)
    assert not torch.allclose(*seen, atol=0.01)


def test_only_evaluate_reads_target_images(run, tiny_data):
    """With the images of all targets broken, mapper.py and finetune.py do not notice."""
    import finetune
    import mapper

    for domain in ("sketch", "cartoon"):
        for image in (tiny_data / "tiny" / domain).glob("*/*.png"):
            image.write_bytes(b"broken")
    run(mapper.main)
    for train in ("linear", "full", "towers"):
        run(finetune.main, "--train", train)
    with pytest.raises(SystemExit):
        run(evaluate.main)
