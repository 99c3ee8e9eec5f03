"""evaluate.py: accuracies, weight interpolation and scores, against values computed by hand."""

import copy
import json
import shutil

import pytest
import torch

import data
import evaluate
import features
import finetune
from core.config import parse
from core.results import read_records
from sets.load import load_dataset, load_run
from strategies.prompts import CoOp, MaPLe

THIRD = pytest.approx(100 / 3)


def by_class(dataset, domain, items):
    return torch.eye(3)[[label for _, label in items]]


def identity_head(domain):
    return torch.eye(3), None


def test_accuracies_and_their_means(tiny_data):
    """Features that tell the classes of the source's test images, and look like cats elsewhere."""
    dataset = load_dataset("tiny", tiny_data)

    def features_of(one, domain, items):
        tested = items == dataset.split("photo", "photo", "test", 0)
        return by_class(one, domain, items) if tested else torch.eye(3)[[0] * len(items)]

    scores = evaluate.domain_accuracies(dataset, "photo", 0, features_of, identity_head)
    assert scores["values"] == {
        "photo": 100, "sketch": THIRD, "cartoon": THIRD, "OOD mean": THIRD,
        "extended": pytest.approx((100 + 100 / 3) / 2),
    }
    assert scores["n"] == {"photo": 9, "sketch": 30, "cartoon": 30, "OOD mean": 60, "extended": 60}
    assert scores["validation"] == THIRD
    wrong = 200 / 3 * 0.5761 - 100 / 3 * (1 - 0.5761)  # e / (e + 2) = 0.5761: too confident by this
    assert scores["ece"] == pytest.approx({"photo": 42.39, "sketch": wrong, "cartoon": wrong, "OOD mean": wrong}, abs=0.01)


def test_the_ood_mean_is_over_domains_not_images(tiny_data):
    for path in sorted((tiny_data / "tiny" / "sketch").glob("*/*.png"))[::2]:
        path.unlink()
    dataset = load_dataset("tiny", tiny_data)

    def features_of(one, domain, items):  # sketches all look like cats
        return torch.eye(3)[[label * (domain != "sketch") for _, label in items]]

    values = evaluate.domain_accuracies(dataset, "photo", 0, features_of, identity_head)["values"]
    assert values["OOD mean"] == pytest.approx((values["sketch"] + 100) / 2)


def test_without_a_head_for_a_domain_there_is_no_mean(tiny_data):
    dataset = load_dataset("tiny", tiny_data)
    head_of = lambda domain: None if domain == "sketch" else identity_head(domain)  # noqa: E731
    values = evaluate.domain_accuracies(dataset, "photo", 0, by_class, head_of)["values"]
    assert values["sketch"] is None and values["cartoon"] == 100
    assert values["OOD mean"] is None and values["extended"] is None


def test_a_bias_counts(tiny_data):
    head = torch.eye(3), torch.tensor([2.0, 0, 0])  # all become cats
    dataset = load_dataset("tiny", tiny_data)
    values = evaluate.domain_accuracies(dataset, "photo", 0, by_class, lambda domain: head)["values"]
    assert all(value == THIRD for value in values.values())


def test_unseen_classes_and_their_mean(tiny_data):
    dataset = load_dataset("tiny", tiny_data)

    def features_of(one, domain, items):
        return torch.eye(3)[[label * (domain != "sketch") for _, label in items]]

    scores = evaluate.unseen_accuracies(dataset, dataset.images, features_of, identity_head)
    assert scores["ece"].keys() == scores["n"].keys() == scores["values"].keys()
    errors = scores["ece"]
    assert errors["unseen photo"] == pytest.approx(42.39, abs=0.01)
    assert errors["unseen mean"] == pytest.approx(sum(errors[f"unseen {d}"] for d in dataset.images) / 3)
    assert scores["values"] == {
        "unseen photo": 100, "unseen sketch": THIRD, "unseen cartoon": 100, "unseen mean": pytest.approx(700 / 9),
    }
    assert scores["n"]["unseen mean"] == 90


def slow_ece(logits, labels):
    """Guo et al., equation 3, bin by bin and image by image."""
    total = 0.0
    for b in range(15):
        inside = []
        for row, label in zip(logits.double(), labels):
            confidence = (row.exp() / row.exp().sum()).max().item()
            if b / 15 < confidence <= (b + 1) / 15:
                inside.append((float(row.argmax() == label), confidence))
        if inside:
            accuracy = sum(hit for hit, _ in inside) / len(inside)
            confidence = sum(confidence for _, confidence in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return 100 * total


@pytest.mark.parametrize("scale", [0.1, 1, 3, 10])
def test_the_calibration_error_is_that_of_a_slow_loop(scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(200, 5, generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    assert evaluate.ece(logits, labels) == pytest.approx(slow_ece(logits, labels), abs=1e-9)


def test_calibration_errors_known_by_hand():
    """Certain and right: 0. Certain and wrong: 100. Two logits of the same value are right half of the time."""
    certain, labels = 1000 * torch.eye(4), torch.arange(4)
    assert evaluate.ece(certain, labels) == 0 and evaluate.ece(certain, labels.roll(1)) == 100
    assert evaluate.ece(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == 0
    assert evaluate.ece(torch.zeros(4, 2), torch.tensor([0, 0, 0, 0])) == 50


def test_interpolated_weights_are_on_the_line():
    """WiSE-FT: the ends are the ends, the middle is the mean, and counters are the finetuned ones."""
    a = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(1)}
    b = {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(3)}
    for alpha, w in ((0, [0.0, 2.0]), (0.5, [0.5, 3.0]), (0.25, [0.25, 2.5]), (1, [1.0, 4.0])):
        mix = evaluate.interpolate(a, b, alpha)
        assert mix["w"].tolist() == w and mix["n"].item() == 3


def test_a_head_of_fewer_classes_is_a_masked_head():
    """ImageNet-A and -R: the argmax among their own names is that of the whole head with all other
    classes masked.
    """
    generator = torch.Generator().manual_seed(0)
    weight, z = torch.randn(10, 4, generator=generator), torch.randn(50, 4, generator=generator)
    bias = torch.randn(10, generator=generator)
    names, own = [f"c{i}" for i in range(10)], ["c7", "c2", "c5"]
    others = torch.tensor([i for i in range(10) if f"c{i}" not in own])
    masked = (z @ weight.T + bias).index_fill(1, others, -torch.inf).argmax(1)
    part, part_bias = evaluate.restrict_head((weight, bias), names, own)
    predicted = (z @ part.T + part_bias).argmax(1)
    assert [own[i] for i in predicted] == [names[i] for i in masked]

    def rows(names, own):
        return evaluate.restrict_head((weight[:len(names)], None), names, own)

    assert rows(names, ["c1", "alarm clock"]) is None
    twice = ["crane", "missile", "tank", "missile"]  # as ImageNet's 657 and 744: told apart by order
    assert torch.equal(rows(twice, twice)[0], weight[:4])
    assert torch.equal(rows(twice, ["missile", "tank"])[0], weight[1:3])
    assert torch.equal(rows(twice, ["tank", "missile"])[0], weight[2:4])


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_data, tiny_clip, tmp_path):
    """run("--methods", …) evaluates and returns {(method, α): record} of seed 0."""

    class Run:
        flags = [
            "tiny", "photo", "--data", str(tiny_data), "--model", tiny_clip, "--seeds", "1",
            "--run", str(tmp_path / "run"), "--epochs", "1", "--mapper-steps", "2",
        ]

        def __call__(self, *flags):
            self.settings, self.dataset = load_run(parse("", [*self.flags, *flags]))
            self.clip = features.load_clip(self.settings)
            records = evaluate.evaluate(self.settings, self.dataset, self.clip)
            return {(r["method"], r["alpha"]): r for r in records}

        def checkpoint(self, name):
            return finetune.checkpoint_path(self.settings, self.dataset, self.clip, name, 0)

    return Run()


def test_harmonic_means_by_hand():
    values = {
        "photo": 60.0, "sketch": 90.0, "cartoon": 0.0, "OOD mean": 45.0, "extended": 1.0,
        "unseen photo": 30.0, "unseen sketch": None, "unseen cartoon": 50.0, "unseen mean": 40.0,
    }
    assert evaluate.harmonic_means(values) == {"H photo": 40, "H sketch": None, "H cartoon": 0, "H mean": 20}


def test_base_to_new_by_hand(five_classes, run):
    """Of each class, those images count that are tested without the flag; its captions are shared."""
    records = run("--methods", "finetune", "flyp", "--base-to-new", "--lr", "0.003")
    undivided = load_dataset("tiny", five_classes)
    names = {"cat": "cat", "cow": "cow", "dog": "dog", "owl": "owl", "red_house": "red house"}
    halves = [*names][:3], [*names][3:]
    tuned = features.towers_of(torch.load(run.checkpoint("flyp"))["modules"])
    for method, state in (("zero-shot", run.clip.original), ("flyp", tuned)):
        run.clip.model.load_state_dict(state)
        values, means = records[method, 1.0]["values"], []
        for domain in ("photo", "sketch", "cartoon"):
            accuracies = []
            for half in halves:
                paths = [at for at, _ in undivided.split("photo", domain, "test", 0) if at.path.split("/")[1] in half]
                z = features.encode_images(run.clip, [(at, 0) for at in paths])
                t = features.encode_texts(run.clip, [f"a photo of a {names[name]}" for name in half])
                guesses = [half[i] for i in (z @ t.T).argmax(1).tolist()]
                hits = [guess == at.path.split("/")[1] for guess, at in zip(guesses, paths)]
                accuracies.append(100 * sum(hits) / len(hits))
            base, new = accuracies
            means.append(2 * base * new / (base + new) if base + new else 0)
            assert [values[domain], values[f"unseen {domain}"], values[f"H {domain}"]] == pytest.approx([base, new, means[-1]], abs=1e-4)
        assert values["H mean"] == pytest.approx(sum(means) / 3, abs=1e-4)
    n = records["flyp", 1.0]["n"]
    assert [n[key] for key in ("photo", "unseen photo", "sketch", "unseen sketch")] == [9, 6, 30, 20]
    assert {r["dataset"] for r in records.values()} == {"tiny base-to-new"}
    head = torch.load(run.checkpoint("finetune"))["modules"]["head.weight"]
    assert len(head) == 3 and not any(key[:2] in ("un", "H ") for key in records["finetune", 1.0]["values"])
    run.clip.reset()


def test_base_to_new_and_the_undivided_set_can_share_a_folder(five_classes, run):
    """Neither takes the other's checkpoints, scores or features for its own."""
    methods = "--methods", "flyp", "ldfs"
    divided = run(*methods, "--base-to-new")
    checkpoints = {run.checkpoint(name) for name in ("flyp", "ldfs")}
    undivided = run(*methods)
    assert not checkpoints & {run.checkpoint(name) for name in ("flyp", "ldfs")}
    assert undivided["flyp", 1.0]["n"]["photo"] == 15 and "unseen mean" not in undivided["flyp", 1.0]["values"]
    assert run(*methods, "--base-to-new") == divided
    fresh = run(*methods, "--base-to-new", "--run", f"{run.settings.run}/fresh/run")
    assert fresh == divided


def test_an_official_list_without_new_classes_leaves_their_domain_out(five_classes, run):
    (five_classes / "tiny" / "sketch_test.txt").write_text("sketch/cat/0.png\n")
    values = run("--methods", "flyp", "--base-to-new")["flyp", 1.0]["values"]
    assert values["sketch"] is not None and values["unseen sketch"] is values["H sketch"] is None
    assert values["unseen mean"] == pytest.approx((values["unseen photo"] + values["unseen cartoon"]) / 2, abs=1e-4)


@pytest.fixture
def others(tiny_data):
    """A data set of unseen classes: dog, red house, tiger."""
    shutil.copytree(tiny_data / "tiny", tiny_data / "others")
    for domain in ("photo", "sketch", "cartoon"):
        (tiny_data / "others" / domain / "cat").rename(tiny_data / "others" / domain / "tiger")
    description = tiny_data / "tiny" / "dataset.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"unseen": "others"}))


def test_scores_of_full_finetuning_and_between_the_weights(run):
    """By hand: towers and head at α = 1 and 0.5, where the original head is s · T with bias 0."""
    records = run("--methods", "finetune", "--train", "full", "--alphas", "0.5", "--lr", "0.003")
    clip, dataset = run.clip, run.dataset
    modules = torch.load(run.checkpoint("finetune"))["modules"]
    text = features.encode_texts(clip, [f"a photo of a {name}" for name in dataset.classnames])
    for alpha in (1.0, 0.5):
        towers = features.towers_of(modules)
        mixed = {k: torch.lerp(clip.original[k], v, alpha) for k, v in towers.items()}
        clip.model.load_state_dict(mixed)
        weight = torch.lerp(clip.logit_scale * text, modules["head.weight"], alpha)
        bias = alpha * modules["head.bias"]
        expected = {}
        for domain in ("photo", "sketch", "cartoon"):
            items = dataset.split("photo", domain, "test", 0)
            logits = features.encode_images(clip, items) @ weight.T + bias
            hits = logits.argmax(1) == torch.tensor([y for _, y in items])
            expected[domain] = 100 * hits.float().mean().item()
        expected["OOD mean"] = (expected["sketch"] + expected["cartoon"]) / 2
        values = records["finetune", alpha]["values"]
        assert {k: values[k] for k in expected} == pytest.approx(expected, abs=1e-4)
        clip.reset()
    assert records["finetune", 1.0]["trained"] == "image tower, head"
    assert records["finetune", 1.0]["options"] == {"epochs": 1, "lr": 0.003}


def test_an_image_is_decoded_once_for_all_alphas(run, monkeypatch):
    run("--methods", "flyp", "--lr", "0.01")
    decoded, true_decode = [], data.Location.decode

    def decode(location):
        decoded.append(location)
        return true_decode(location)

    monkeypatch.setattr(data.Location, "decode", decode)
    records = run("--methods", "flyp", "--lr", "0.01", "--alphas", "0.2", "0.5", "0.8")
    assert len({str(records["flyp", alpha]["ece"]) for alpha in (0.2, 0.5, 0.8, 1.0)}) == 4
    assert decoded and len(decoded) == len(set(decoded))


def test_calibration_is_measured_at_the_temperature_of_training(run):
    """By hand: s · cosine of CLIP's and CLIPood's heads and of prompts, s · W z of a probe, W z + b of a tower's head."""
    methods = ["linear", "coop", "full", "clipood", "flyp"]
    records = run("--methods", *methods, "--alphas", "0.5", "--lr", "0.01")
    clip, dataset = run.clip, run.dataset
    items = dataset.split("photo", "sketch", "test", 0)
    labels = torch.tensor([y for _, y in items])
    s = clip.original["logit_scale"].exp()
    text = features.encode_texts(clip, [f"a photo of a {name}" for name in dataset.classnames])
    z = features.encode_images(clip, items)
    saved = {name: torch.load(run.checkpoint(name))["modules"] for name in methods}
    learner = CoOp(clip, dataset.classnames, "a photo")
    learner.load_state_dict(saved["coop"])
    expected = {
        ("zero-shot", 1.0): s * z @ text.T,
        ("linear", 1.0): s * z @ saved["linear"]["head.weight"].T,
        ("linear", 0.5): s * z @ (saved["linear"]["head.weight"] + text).T / 2,
        ("coop", 1.0): s * z @ learner.encode(learner.vectors, learner.tokens).detach().T,
    }
    for name in methods[2:]:
        clip.model.load_state_dict(features.towers_of(saved[name]))
        z = features.encode_images(clip, items)
        if name == "full":
            logits = z @ saved[name]["head.weight"].T + saved[name]["head.bias"]
        else:
            texts = features.encode_texts(clip, [f"a photo of a {name}" for name in dataset.classnames])
            logits = clip.model.logit_scale.exp() * z @ texts.T
        expected[name, 1.0] = logits
    assert saved["flyp"]["towers.logit_scale"].exp() != s
    for key, logits in expected.items():
        assert records[key]["ece"]["sketch"] == pytest.approx(slow_ece(logits, labels), abs=1e-3), key
        assert records[key]["ece"].keys() == {"photo", "sketch", "cartoon", "OOD mean"}
    clip.reset()


def test_recalls_are_those_of_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.nn.functional.normalize(torch.randn(2, 1200, 16, generator=generator), dim=-1)
    t = torch.nn.functional.normalize(z + 2 * noise, dim=-1)
    t[1] = t[0]  # the same caption twice: either is right
    values = evaluate.retrieval_recalls(z, t)
    for name, cosines in (("image→text", z @ t.T), ("text→image", t @ z.T)):
        for k in (1, 5, 10):
            hits = 0
            for i, row in enumerate(cosines.tolist()):
                hits += sum(other > row[i] + 1e-6 for other in row) < k
            assert values[f"{name} R@{k}"] == pytest.approx(100 * hits / 1200, abs=1e-4)
    assert set(evaluate.retrieval_recalls(z, z).values()) == {100}


def test_pairs_without_classes_by_hand(classless, run, tiny_pool, script):
    """Retrieval among the held-out pairs, and accuracy on the labelled set, before and after."""
    flags = "--methods", "captions", "captions+retrieved", "--alphas", "0.5", "--lr", "0.01"
    flags = *flags, "--pool", str(tiny_pool), "--same", "0.999999"
    records = run(*flags)
    clip, dataset = run.clip, run.dataset
    test = dataset.split("photo", "photo", "test", 0)
    texts = [f"a {name} number {i}" for at, _ in test for name, i in [(at.path[6:-5], at.path[-5])]]
    labelled = load_dataset("labelled", classless)
    tuned = features.towers_of(torch.load(run.checkpoint("captions"))["modules"])
    half = {k: torch.lerp(v, tuned[k], 0.5) for k, v in clip.original.items()}
    for key, state in ((("zero-shot", 1), clip.original), (("captions", 1), tuned), (("captions", 0.5), half)):
        clip.model.load_state_dict(state)
        z, t = features.encode_images(clip, test), features.encode_texts(clip, texts)
        values = evaluate.retrieval_recalls(z, t)
        head = features.encode_texts(clip, ["a photo of a cat", "a photo of a dog", "a photo of a red house"])
        z = features.encode_images(clip, labelled.images["sketch"])
        hits = (z @ head.T).argmax(1) == torch.tensor([y for _, y in labelled.images["sketch"]])
        values["unseen sketch"] = 100 * hits.float().mean().item()
        measured = records[key]["values"]
        assert {k: measured[k] for k in values} == pytest.approx(values, abs=1e-4)
        assert measured.keys() - values == {"unseen photo", "unseen cartoon", "unseen mean"}
    clip.reset()
    out = script("run.py", *run.flags, *flags)
    assert "image→text R@1" in out.stdout and " ID " not in out.stdout and "no figure" not in out.stderr
    rows = [json.loads(line) | {"caption": "a thing"} for line in dataset.captions.read_text().splitlines()]
    dataset.captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--methods", "captions")["zero-shot", 1.0]["values"]["image→text R@1"] == 100  # all are right


def test_what_is_scored_is_not_scored_again_but_changed_images_are(run, tiny_data, tmp_path, monkeypatch):
    methods = "--methods", "finetune", "--train", "full", "--alphas", "0.5"
    first = run(*methods)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "measure", lambda *args, **options: pytest.fail("scored again"))
        assert run(*methods) == first
    sketches = sorted((tiny_data / "tiny" / "sketch").glob("*/*.png"))
    for image in sketches:
        image.write_bytes(sketches[0].read_bytes())  # all are cats now
    second = run(*methods)
    assert second.keys() == first.keys()
    assert all(second[key]["values"]["sketch"] == THIRD for key in second)
    assert {r["method"] for r in read_records(tmp_path / "run")} == {"zero-shot", "finetune"}


def test_other_test_parts_are_scored_anew(run, tiny_data):
    """Parts by an official list, or by things that are the same in all domains."""
    assert run("--methods", "finetune")["zero-shot", 1.0]["n"]["sketch"] == 30
    (tiny_data / "tiny" / "sketch_test.txt").write_text("sketch/cat/0.png\nsketch/dog/0.png\n")
    assert run("--methods", "finetune")["zero-shot", 1.0]["n"]["sketch"] == 2
    (tiny_data / "tiny" / "sketch_test.txt").unlink()
    description = tiny_data / "tiny" / "dataset.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"same_stem_same_thing": True}))
    assert run("--methods", "finetune")["zero-shot", 1.0]["n"]["sketch"] == 9


def test_heads_are_in_the_sources_words(run, others, tiny_data):
    """Whatever domain is scored; unseen classes have a head of their own names."""
    run("--methods", "finetune")
    unseen = load_dataset("others", tiny_data)
    for dataset, names in ((run.dataset, ["cat", "dog", "red house"]), (unseen, ["dog", "red house", "tiger"])):
        text = features.encode_texts(run.clip, [f"a photo of a {name}" for name in names])
        for domain in ("photo", "sketch"):
            weight, bias = evaluate.head_function(run.clip, dataset, "photo")(domain)
            assert torch.allclose(weight, run.clip.logit_scale * text, atol=1e-5) and bias is None
    trained = torch.zeros(3, 32), torch.ones(3)
    assert evaluate.head_function(run.clip, run.dataset, "photo", trained)("sketch") is trained


def test_prompts_are_scored_on_unseen_classes_and_not_interpolated(run, others, monkeypatch):
    named, true_classifier = [], CoOp.classifier
    monkeypatch.setattr(
        CoOp, "classifier", lambda self, names: named.append(names) or true_classifier(self, names)
    )
    records = run("--methods", "finetune", "coop", "cocoop", "maple", "--alphas", "0.5")
    assert records.keys() == {
        *((name, 1.0) for name in ("zero-shot", "finetune", "coop", "cocoop", "maple")), ("finetune", 0.5),
    }
    prompts = {"coop", "cocoop", "maple"}
    assert {name for (name, _), r in records.items() if "unseen mean" in r["values"]} == {"zero-shot", *prompts}
    assert named == 3 * [["cat", "dog", "red house"], ["dog", "red house", "tiger"]]


def test_images_are_encoded_with_maples_prompts_and_only_its(run, monkeypatch):
    seen, true_accuracies = [], evaluate.domain_accuracies

    def look(dataset, source, seed, features_of, head_of):
        seen.append(features_of(dataset, "sketch", dataset.images["sketch"]))
        return true_accuracies(dataset, source, seed, features_of, head_of)

    monkeypatch.setattr(evaluate, "domain_accuracies", look)
    run("--methods", "maple", "coop")
    zero_shot, maple, coop = seen
    modules = torch.load(run.checkpoint("maple"))["modules"]
    learner = MaPLe(run.clip, run.dataset.classnames, "a photo")
    learner.load_state_dict(modules)
    with learner.prompted():
        expected = features.encode_images(run.clip, run.dataset.images["sketch"])
    assert torch.allclose(maple, expected, atol=1e-6) and not torch.allclose(maple, zero_shot, atol=1e-2)
    assert torch.equal(coop, zero_shot)


def test_unseen_classes_are_named_by_the_finetuned_text_tower(run, others, monkeypatch):
    heads, true_accuracies = [], evaluate.unseen_accuracies

    def look(dataset, images, features_of, head_of):
        heads.append(head_of("sketch")[0])
        return true_accuracies(dataset, images, features_of, head_of)

    monkeypatch.setattr(evaluate, "unseen_accuracies", look)
    run("--methods", "flyp", "--lr", "0.01")
    texts = [f"a photo of a {name}" for name in ("dog", "red house", "tiger")]
    tuned = features.towers_of(torch.load(run.checkpoint("flyp"))["modules"])
    for state, head in zip((run.clip.original, tuned), heads, strict=True):
        run.clip.model.load_state_dict(state)
        scaled = run.clip.logit_scale * features.encode_texts(run.clip, texts)
        assert torch.allclose(head, scaled, atol=1e-5)
    assert not torch.allclose(*heads, atol=0.01)


def test_only_evaluation_reads_target_images(tiny_data, script, tiny_clip, tmp_path):
    """With the images of all targets broken, mapper.py and finetune.py do not notice."""
    for domain in ("sketch", "cartoon"):
        for image in (tiny_data / "tiny" / domain).glob("*/*.png"):
            image.write_bytes(b"broken")
    flags = ["tiny", "photo", "--data", tiny_data, "--model", tiny_clip, "--seeds", 1, "--run", tmp_path / "run"]
    flags += ["--epochs", 1, "--mapper-steps", 2]
    script("mapper.py", *flags)
    for train in ("linear", "full", "towers"):
        script("finetune.py", *flags, "--train", train)
    assert "not a readable image" in script("evaluate.py", *flags, code=2).stderr


def test_a_damaged_checkpoint_is_one_line(run, capsys):
    run("--methods", "finetune")
    path = run.checkpoint("finetune")
    path.write_bytes(path.read_bytes()[:1000])
    for score in path.parent.parent.glob("scores/finetune*"):
        score.unlink()
    with pytest.raises(SystemExit) as stop:
        run("--methods", "finetune")
    assert stop.value.code == 2 and f"{path} cannot be read" in capsys.readouterr().err


def test_the_model_has_its_original_weights_after_everything(run):
    run("--methods", "flyp", "maple", "--alphas", "0.5", "--lr", "0.01")
    state = copy.deepcopy(run.clip.model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in run.clip.original.items())
