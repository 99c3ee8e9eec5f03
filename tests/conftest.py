"""A world small enough for a test: a CLIP of random weights, coloured squares in three domains."""

import functools
import io
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"cat": (220, 60, 60), "dog": (60, 200, 60), "red_house": (60, 60, 220)}
DOMAINS = {"photo": "a photo", "sketch": "a sketch", "cartoon": "a cartoon"}


def pytest_configure(config):
    if config.option.markexpr != "gpu":  # all other tests are about the CPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def tiny_data(tmp_path):
    """Folder of data sets with one, "tiny": 3 domains, 3 classes, 10 images each, with captions."""
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
    fractions = {"train": 0.6, "val": 0.1, "test": 0.3}
    description = json.dumps({"phrases": DOMAINS, "fractions": fractions})
    (folder / "dataset.json").write_text(description)
    return tmp_path / "data"


@pytest.fixture
def five_classes(tiny_data):
    """The folder of `tiny_data`, whose tiny has five classes: cat, cow, dog, owl, red_house.

    Cows are cats' images and owls are dogs', in other colours.
    """
    folder = tiny_data / "tiny"
    captions = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    for new, like in (("cow", "cat"), ("owl", "dog")):
        for domain in DOMAINS:
            (folder / domain / new).mkdir()
            for path in (folder / domain / like).glob("*.png"):
                swapped = Image.merge("RGB", Image.open(path).split()[::-1])
                swapped.save(folder / domain / new / path.name)
                row = {"path": f"{domain}/{new}/{path.name}", "caption": f"a {new} {path.stem}"}
                captions.append(row)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    return tiny_data


@pytest.fixture
def classless(tiny_data):
    """The folder of `tiny_data`, whose tiny has no classes: its images are in the domains' folders.

    The set with classes is beside it, as "labelled", and is its unseen one.
    """
    folder = tiny_data / "tiny"
    shutil.copytree(folder, tiny_data / "labelled")
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**description, "unseen": "labelled"}))
    for path in sorted(folder.glob("*/*/*.png")):
        path.rename(path.parent.with_name(path.parent.name + path.name))
    for path in folder.glob("*/*/"):
        path.rmdir()
    captions = (folder / "captions.jsonl").read_text()
    for name in COLOURS:
        captions = captions.replace(f"/{name}/", f"/{name}")
    (folder / "captions.jsonl").write_text(captions)
    return tiny_data


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """"local-dir:" name of an open_clip model of random weights: 16 px, 12 tokens, 32 numbers."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 16}
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    both = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(both))
    with pytest.MonkeyPatch.context() as patch:  # to make one takes longer than most tests
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield f"local-dir:{folder}"


@pytest.fixture(scope="session")
def tiny_blip2(tmp_path_factory):
    """Folder of a BLIP-2 of random weights (250 kB): 28 px, 4 queries, an OPT of 65 words."""
    import tokenizers
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", *(f"w{i}" for i in range(57))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
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
        qformer_config={
            **small, "intermediate_size": 64, "vocab_size": 8, "encoder_hidden_size": 32,
        },
        text_config={
            **small, "model_type": "opt", "vocab_size": len(tokenizer), "ffn_dim": 64,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
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
    pixels = torch.randint(256, (1, 1, 3), generator=generator)
    pixels = pixels + torch.randint(-30, 30, (size, size, 3), generator=generator)
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
            members[f"{name}.png"] = square(100 * shard + i)
            members[f"{name}.txt"] = f"a thing {name}".encode()
            members[f"{name}.json"] = json.dumps({"key": name}).encode()
        write_shard(tmp_path / "pool" / f"{shard:05d}.tar", members)
    return tmp_path / "pool"


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Run a script of the repository as python3 would: script("mapper.py", …) -> what it printed.

    run_ldfs.sh and run_arf.sh stand for the call of run.py in them. All runs in this process, which
    has imported torch, open_clip and transformers; test_scripts.py starts a few shells for real.
    """

    def call(name, *arguments, code=0):
        monkeypatch.chdir(tmp_path)
        arguments, status = [*map(str, arguments)], 0
        capsys.readouterr()
        if name.endswith(".sh"):
            [line] = [x for x in (ROOT / name).read_text().splitlines() if x.startswith("exec ")]
            flags = line.partition('run.py"')[2].split()[:-1]  # without "$@"
            name, arguments = "run.py", [*flags, *arguments]
        monkeypatch.setattr("sys.argv", [name, *arguments])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        done = subprocess.CompletedProcess(name, status, *capsys.readouterr())
        assert status == code, f"exit {status}:\n{done.stdout}\n{done.stderr}"
        return done

    return call


def in_processes(n, target, *arguments):
    """Call target(*arguments) in n processes that find each other as those of torchrun do.

    They are forked from a server that has imported the packages that take seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slow = ["torch.distributed.nn", "torch._dynamo", "open_clip", "transformers"]
    multiprocessing.set_forkserver_preload([*slow, "pandas", "matplotlib.figure"])
    arguments = n, port, target, arguments
    torch.multiprocessing.start_processes(one_of, arguments, n, start_method="forkserver")


def one_of(rank, n, port, target, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    torch.set_num_threads(1)
    target(*arguments)
