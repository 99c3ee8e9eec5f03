"""evaluate.py: accuracies, figure 4's measures and the table against values worked out by hand."""

import json

import pytest
import torch

import data
import evaluate


def test_accuracies_and_their_means(tiny_data):
    """A head that knows photos, and names every sketch and cartoon a cat: a third of them are."""
    dataset = data.load("tiny", tiny_data)

    def features_of(domain, items):
        right = torch.eye(3)[[y for _, y in items]]
        return right if domain == "photo" else torch.eye(3)[[0] * len(items)]

    rows = evaluate.accuracies(dataset, "photo", 0, features_of, lambda domain: torch.eye(3), "m")
    third = pytest.approx(100 / 3)
    assert rows == [
        ("m", "photo", "val", "accuracy", 100, 3, 0),
        ("m", "photo", "test", "accuracy", 100, 9, 0),
        ("m", "sketch", "test", "accuracy", third, 30, 0),
        ("m", "cartoon", "test", "accuracy", third, 30, 0),
        ("m", "OOD mean", "test", "accuracy", third, 60, 0),
        ("m", "extended", "test", "accuracy", pytest.approx((100 + 100 / 3) / 2), 60, 0),
    ]


def test_unseen_classes_and_their_mean(tiny_data):
    dataset = data.load("tiny", tiny_data)

    def features_of(domain, items):  # sketches all look like cats
        return torch.eye(3)[[y * (domain != "sketch") for _, y in items]]

    rows = evaluate.unseen_accuracies(dataset, 2, features_of, lambda domain: torch.eye(3), "m")
    third = pytest.approx(100 / 3)
    expected = {"unseen photo": 100, "unseen sketch": third, "unseen cartoon": 100, "unseen mean": pytest.approx(700 / 9)}
    assert {row[1]: row[4] for row in rows} == expected and all(row[6] == 2 for row in rows)


def test_interpolated_weights_lie_on_the_line():
    """WiSE-FT: the ends are the ends, the middle is the mean, and counters are the finetuned model's."""
    a, b = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(1)}, {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(3)}
    for alpha, w in ((0, [0.0, 2.0]), (0.5, [0.5, 3.0]), (0.25, [0.25, 2.5]), (1, [1.0, 4.0])):
        mix = evaluate.interpolate(a, b, alpha)
        assert mix["w"].tolist() == w and mix["n"].item() == 3


def test_frozen_features_are_encoded_by_the_weights_of_the_moment(tiny_data):
    """The encoder that keeps the frozen stages' output, against encoding images anew after the weights moved."""
    import features

    dataset = data.load("tiny", tiny_data)
    name = f"local-dir:{data.Path(evaluate.__file__).parent / 'emoji_clip'}"
    clip = features.load_clip(data.arguments("").parse_args(["tiny", "photo", "--model", name]), dataset)
    features.freeze_stages(clip, 6)
    encode, items = evaluate.encoder(clip), dataset.images["sketch"][3:7]
    first = encode(dataset, "sketch", items)
    with torch.no_grad():
        clip.model.visual.head.proj.weight[:100] *= 2
    second = encode(dataset, "sketch", items)
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.allclose(second, features.encode_images(clip, dataset.folder, items), atol=1e-5)


def test_caption_quality_of_known_captions(tiny_data, monkeypatch):
    dataset = data.load("tiny", tiny_data)
    items = dataset.images["photo"]
    (tiny_data / "tiny" / "descriptions.jsonl").write_text("".join(
        json.dumps({"path": path, "caption": f"A thing{i}, some tag"}) + "\n" for i, (path, _) in enumerate(items)
    ))
    captions = ["a Red House"] * 25 + [f"a thing{i}" for i in range(25, 30)]  # classes: 10 cats, 10 dogs, 10 red houses
    said = {text: torch.eye(8)[i] for i, text in enumerate(dict.fromkeys(captions))}

    monkeypatch.setattr(evaluate, "encode_texts", lambda clip, texts: torch.stack([said[t] for t in texts]))
    got = evaluate.caption_quality(dataset, "photo", captions, torch.eye(8)[[0] * 30], None)
    assert got["names the class"] == pytest.approx(100 * 5 / 30)
    assert got["names class or thing"] == pytest.approx(100 * 10 / 30)
    assert got["CLIP score"] == pytest.approx(100 * 25 / 30)


def test_consistency_of_known_neighbours():
    target = torch.eye(4)[:2], torch.tensor([0, 1])   # real sketches of class 0 and 1
    source = torch.eye(4)[2:], torch.tensor([0, 1])   # real photos
    z_hat = torch.tensor([[1.0, 0, 0, 0], [0.9, 0, 0, 0], [0, 0.5, 0.6, 0], [0.1, 0, 0, 0.9]])
    got = evaluate.consistency(z_hat, torch.tensor([0, 1, 1, 1]), target, source)
    assert got == {"domain consistency": 50, "class consistency": 50, "unique neighbours": 50}


ARGS = {"train": "head", "init": "text", "model": "m", "schedule": {"epochs": 2, "batch_size": 8, "lr": 0.1}}


def write(run, *rows):
    run.mkdir()
    base = {"dataset": "d", "source": "photo", "split": "test", "metric": "accuracy", "n": 9}
    base["args"] = ARGS
    (run / "results.jsonl").write_text("".join(json.dumps(base | r) + "\n" for r in rows))


def test_table_means_deviations_and_raw_seeds(tmp_path):
    write(tmp_path / "run", *(
        {"method": "ldfs", "domain": domain, "seed": seed, "value": value}
        for domain, values in {"photo": (90, 92), "sketch": (40, 50), "OOD mean": (40, 50)}.items()
        for seed, value in enumerate(values)
    ), {"method": "lads", "domain": "photo", "seed": 0, "value": 1.0}, *(
        {"method": "finetune", "domain": "OOD mean", "seed": seed, "value": value} for seed, value in enumerate((35, 47))
    ))
    lines = evaluate.table(evaluate.read_results(tmp_path / "run")).splitlines()
    assert lines[2] == "| method | ID (photo) | sketch | OOD mean | less finetune | less lads | OOD mean, seed by seed |"
    assert lines[4] == "| ldfs | 91.0 ± 1.4 | 45.0 ± 7.1 | 45.0 ± 7.1 | 4.0 ± 1.4 |  | 40.0 50.0 |"
    assert lines[5] == "| lads | 1.0 | not run | not run |  |  |  |"


def test_table_compares_with_flyp_at_the_same_alpha(tmp_path):
    values = {"flyp": (50, 10), "arf": (53, 14), "flyp α=0.5": (60, 20), "arf α=0.5": (61, 22), "arf α=0.3": (0, 0)}
    write(tmp_path / "run", *(
        {"method": method, "domain": domain, "seed": 0, "value": value}
        for method, pair in values.items() for domain, value in zip(("OOD mean", "unseen mean"), pair)
    ), {"method": "arf", "domain": "unseen sketch", "seed": 0, "value": 1})
    lines = evaluate.table(evaluate.read_results(tmp_path / "run")).splitlines()
    assert lines[2].startswith("| method | OOD mean | unseen mean | OOD less flyp | unseen less flyp | OOD mean, seed by")
    assert lines[4:8] == [
        "| flyp | 50.0 | 10.0 |  |  | 50.0 | 10.0 |", "| arf | 53.0 | 14.0 | 3.0 | 4.0 | 53.0 | 14.0 |",
        "| flyp α=0.5 | 60.0 | 20.0 |  |  | 60.0 | 20.0 |", "| arf α=0.5 | 61.0 | 22.0 | 1.0 | 2.0 | 61.0 | 22.0 |",
    ]
    assert len(lines) == 8 or not lines[8]


def test_of_a_stage_run_twice_the_last_result_counts(tmp_path):
    row = {"method": "ldfs", "domain": "photo", "seed": 0}
    other = {"args": ARGS | {"train": "all"}}
    write(tmp_path / "run", row | {"value": 1}, row | {"value": 2}, row | {"value": 3} | other)
    assert [r["value"] for r in evaluate.read_results(tmp_path / "run")] == [2, 3]


def test_table_of_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.read_results(tmp_path)
    assert stop.value.code == 2 and "results.jsonl is not there" in capsys.readouterr().err


def test_unfinished_or_foreign_checkpoints_are_refused(tiny_data, tiny_clip, tmp_path, monkeypatch, capsys):
    import finetune

    common = ["tiny", "photo", "--data", str(tiny_data), "--model", tiny_clip, "--seeds", "1", "--run", str(tmp_path / "run")]
    common += ["--methods", "finetune", "--epochs", "1"]
    monkeypatch.setattr("sys.argv", ["finetune.py", *common])
    finetune.main()
    path = tmp_path / "run" / "checkpoints" / "head-scratch-finetune-seed0.pt"
    whole = torch.load(path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "run", *common])
    for broken in (whole | {"epoch": 0}, whole | {"made_of": whole["made_of"] | {"model": "another"}}):
        torch.save(broken, path)
        with pytest.raises(SystemExit) as stop:
            evaluate.main()
        assert stop.value.code == 2 and "unfinished, or of another model" in capsys.readouterr().err


def test_only_evaluate_reads_target_images(tiny_data, tiny_clip, tmp_path, monkeypatch):
    """With the images of all targets broken, mapper.py and finetune.py do not notice."""
    import finetune
    import mapper

    for domain in ("sketch", "cartoon"):
        for image in (tiny_data / "tiny" / domain).glob("*/*.png"):
            image.write_bytes(b"broken")
    common = ["tiny", "photo", "--data", str(tiny_data), "--model", tiny_clip, "--seeds", "1", "--run", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["mapper.py", *common, "--mapper-steps", "2"])
    mapper.main()
    for train in ("head", "visual", "all"):
        monkeypatch.setattr("sys.argv", ["finetune.py", *common, "--epochs", "1", "--train", train])
        finetune.main()
    monkeypatch.setattr("sys.argv", ["evaluate.py", "run", *common])
    with pytest.raises(SystemExit):
        evaluate.main()


def test_the_curve_is_of_the_weights_in_between_whatever_was_measured_since(tmp_path, capsys):
    args = {"model": "m", "train": "visual", "init": "text", "schedule": {"epochs": 1, "batch_size": 2, "lr": 1}}
    row = {"dataset": "tiny", "source": "photo", "split": "test", "metric": "accuracy", "seed": 0, "n": 1, "args": args}
    rows = [
        row | {"method": method, "domain": domain, "value": 50}
        for method in ("zero-shot", "flyp", "flyp α=0.5") for domain in ("photo", "OOD mean")
    ]
    rows += [row | {"method": "finetune", "domain": "photo", "value": 50}]  # has no OOD mean
    rows += [row | {"method": "finetune", "domain": "photo", "value": 1, "args": args | {"train": "head"}}]
    write(tmp_path / "run", *rows)
    evaluate.curve(tmp_path / "run")
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
