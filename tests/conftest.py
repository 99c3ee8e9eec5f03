"""A world small enough for a test: a CLIP of random weights, and a data set of coloured squares in three domains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the CPU, where there is a GPU too
ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"cat": (220, 60, 60), "dog": (60, 200, 60), "red_house": (60, 60, 220)}
DOMAINS = {"photo": "a photo", "sketch": "a sketch", "cartoon": "a cartoon"}


@pytest.fixture
def tiny_data(tmp_path):
    """Folder of data sets with one, "tiny": 3 domains, 3 classes, 10 images each, a caption for every image."""
    folder = tmp_path / "data" / "tiny"
    generator = torch.Generator().manual_seed(0)
    captions = []
    for number, domain in enumerate(DOMAINS):
        for cls, colour in COLOURS.items():
            (folder / domain / cls).mkdir(parents=True)
            for i in range(10):
                noise = torch.randint(-30, 30, (16, 16, 3), generator=generator)
                pixels = (torch.tensor(colour) * (1 - 0.25 * number) + noise).clamp(0, 255).byte()
                path = Path(domain, cls, f"{i}.png")
                Image.fromarray(pixels.numpy()).save(folder / path)
                captions.append({"path": str(path), "caption": f"a {cls} number {i}"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions))
    (folder / "dataset.json").write_text(json.dumps({"phrases": DOMAINS, "fractions": {"train": 0.6, "val": 0.1, "test": 0.3}}))
    return tmp_path / "data"


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """"local-dir:" name of an open_clip model with random weights: 16 px images, 12 tokens, 32 dimensions."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"local-dir:{folder}"


@pytest.fixture
def script(tmp_path):
    """Run a script of the repository as its user would: script("mapper.py", …) -> the finished process."""

    def call(name, *arguments, cwd=tmp_path, code=0):
        command = ["bash" if name.endswith(".sh") else sys.executable, str(ROOT / name), *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == code, f"exit {done.returncode}, not {code}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done

    return call
