"""export.py: open_clip loads what it writes, and a killed export is simply run again."""

import os
import signal
import sys

import open_clip
import pytest
import torch

import export
import features
import finetune
from core.config import parse
from sets.load import load_run


class Trained:
    """A Clip, and checkpoints of its finetuning: .path(method)."""

    def __init__(self, tiny_data, tiny_clip, run):
        flags = ["--data", tiny_data, "--model", tiny_clip, "--run", run, "--epochs", 1, "--lr", 0.01]
        flags = ["tiny", "photo", *map(str, flags), "--methods", "flyp", "finetune"]
        self.settings, self.dataset = load_run(parse("", flags))
        self.clip = features.load_clip(self.settings)

    def path(self, method):
        inputs = self.settings, self.dataset, self.clip, method, 0
        finetune.finetune(*inputs)
        return finetune.checkpoint_path(*inputs)


@pytest.fixture
def trained(tiny_data, tiny_clip, tmp_path):
    return Trained(tiny_data, tiny_clip, tmp_path / "run")


@pytest.fixture
def flyp(trained):
    return trained.path("flyp")


@pytest.fixture
def export_script(script, flyp, tmp_path):
    """export_script(*flags) runs export.py on FLYP's checkpoint into the folder "out"."""
    return lambda *flags, **more: script("export.py", flyp, tmp_path / "out", *flags, **more)


@pytest.mark.parametrize("alpha", [0, 0.25, 1])
def test_open_clip_loads_the_weights_in_between(trained, flyp, export_script, tmp_path, alpha):
    tuned = features.towers_of(torch.load(flyp)["modules"])
    original = trained.clip.original
    assert any((tuned[name] - original[name]).abs().max() > 1e-3 for name in tuned)
    done = export_script("--alpha", alpha)
    assert f'"local-dir:{tmp_path / "out"}"' in done.stdout
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    mixed = {name: (1 - alpha) * original[name] + alpha * tuned[name] for name in original}
    trained.clip.model.load_state_dict(mixed)
    images, tokens = torch.randn(2, 3, 16, 16), trained.clip.tokenizer(["a cat", "a dog"])
    for expected, got in zip(trained.clip.model(images, tokens), model.eval()(images, tokens)):
        assert torch.allclose(expected, got, atol=1e-6)
    geometry, mean, std = features.split_transforms(preprocess)
    assert str(geometry) == str(trained.clip.preprocess)
    assert torch.equal(mean, trained.clip.mean) and torch.equal(std, trained.clip.std)
    assert not [*tmp_path.glob(".out*")]


@pytest.mark.parametrize("alpha", ["-0.1", "1.1", "nan", "half"])
def test_alpha_is_from_0_to_1(export_script, alpha, tmp_path):
    assert "--alpha" in export_script(f"--alpha={alpha}", code=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_not_written_to_but_an_empty_one_is(export_script, tmp_path):
    (tmp_path / "out").mkdir()
    export_script()
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"open_clip_config.json", "open_clip_model.safetensors"} <= files.keys()
    assert "has files already" in export_script("--alpha", 0, code=2).stderr
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_checkpoint_without_towers_is_refused(trained, script, tmp_path):
    done = script("export.py", trained.path("finetune"), tmp_path / "out", code=2)
    assert "no tower" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    ({"optimizer": {}}, "its training is not finished"),
    ({"weights": "of another model"}, "has other weights than"),
    ({"base": ("local-dir:/nowhere", None)}, "could not be loaded"),
])
def test_a_bad_checkpoint_is_refused(flyp, export_script, tmp_path, change, message):
    torch.save({**torch.load(flyp), **change}, flyp)
    assert message in export_script(code=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["out", "out/inner"])
def test_a_file_in_the_way_is_named(flyp, script, tmp_path, place):
    (tmp_path / "out").touch()
    done = script("export.py", flyp, tmp_path / place, code=2)
    assert f"{place}: could not be written (" in done.stderr
    assert (tmp_path / "out").is_file() and not [*tmp_path.glob(".out*")]


def test_the_folder_gets_its_name_in_one_step(export_script, tmp_path, monkeypatch):
    module, folders = sys.modules["open_clip.push_to_hf_hub"], []
    save = module.save_config_for_hf

    def spy(model, path, config):
        folders.append(path.parent.stat().st_ino)
        assert not (tmp_path / "out").exists()
        save(model, path, config)

    monkeypatch.setattr(module, "save_config_for_hf", spy)
    export_script()
    assert folders == [(tmp_path / "out").stat().st_ino]


def test_a_killed_export_is_run_again(flyp, export_script, tmp_path):
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # a fork has no other threads
        module = sys.modules["open_clip.push_to_hf_hub"]
        module.save_config_for_hf = lambda *inputs: os.kill(os.getpid(), signal.SIGKILL)
        try:
            export.export(str(flyp), tmp_path / "out")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    [leftover] = tmp_path.glob(".out*")
    assert (leftover / "open_clip_model.safetensors").exists() and not (tmp_path / "out").exists()
    export_script()
    open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert not leftover.exists()
