"""A world small enough for a test: a CLIP of random weights, and a data set of coloured squares in three domains."""

import io
import json
import os
import subprocess
import sys
import tarfile
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


@pytest.fixture(scope="session")
def tiny_blip2(tmp_path_factory):
    """Folder of a BLIP-2 of random weights (250 kB): a ViT for 28 px, a Q-Former of 4 queries, an OPT of 65 words."""
    import tokenizers
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", *(f"w{i}" for i in range(57))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    start = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = start
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    image_processor = BlipImageProcessor(size={"height": 28, "width": 28})
    processor = Blip2Processor(image_processor, tokenizer, num_query_tokens=4)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**small, "intermediate_size": 64, "image_size": 28, "patch_size": 14},
        qformer_config={**small, "intermediate_size": 64, "vocab_size": 8, "encoder_hidden_size": 32},
        text_config={
            **small, "model_type": "opt", "vocab_size": len(tokenizer), "ffn_dim": 64, "word_embed_proj_dim": 32,
            "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        num_query_tokens=4, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    folder = tmp_path_factory.mktemp("blip2")
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def write_shard(path, members):
    """Write {name: bytes} as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def square(seed, size=16):
    """PNG of a noisy square of one colour."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (1, 1, 3), generator=generator) + torch.randint(-30, 30, (size, size, 3), generator=generator)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def tiny_pool(tmp_path):
    """Folder of two webdataset shards of 20 image-text pairs each."""
    for shard in range(2):
        members = {}
        for i in range(20):
            name = f"{shard}{i:03d}"
            about = json.dumps({"key": name}).encode()
            members |= {f"{name}.png": square(100 * shard + i), f"{name}.txt": f"a thing {name}".encode()}
            members[f"{name}.json"] = about
        write_shard(tmp_path / "pool" / f"{shard:05d}.tar", members)
    return tmp_path / "pool"


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
