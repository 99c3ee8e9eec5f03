"""How fast are training steps, mappers, search and evaluation beside others' (report/peers.py)?

    python -m report.benchmark                                   # ViT-B/16, batch 512: on a GPU
    python -m report.benchmark --model local-dir:emoji/clip --batch-size 64 --classes 37   # laptop
    python -m report.benchmark … --growth                        # also how costs grow

Prints tables, and writes them to --out. What is compared takes turns, and the median counts. On a
CPU it is the CPU time of one thread (--threads), for other work on the machine spoils wall time.
Pixels are random, and so are weights, but those of a local-dir: or hf-hub: model.
"""

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from utils import fail, one_line, write_atomically

import open_clip
import torch
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from batches import Batch
from config import DEFAULT_MODEL, Parser, number
from distributed import the_device
from features import Clip, autocast, precision
from finetune import ce_step, contrastive_step
from report import parts, peers
from report.parts import against, medians
from report.tables import markdown

PEERS = {"finetune": "WiSE-FT's", "flyp": "FLYP's", "arf": "three forwards"}
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # bf16, dense, FLOP/s, as NVIDIA says
MEASURES = "images/s", "peak memory, GB", "MFU"


def only(method, batch):
    """The Batch without what `method` does not use."""
    return batch if method == "arf" else replace(batch, captions=None, retrieved=None)


# -------------------------------------------------------------------------------------------------
# Training steps


def new_clip(name, device):
    """A Clip as features.load_clip makes it, but of random weights where they lie on the hub."""
    try:
        model, augment, preprocess = open_clip.create_model_and_transforms(
            name, device=device, aug_cfg={"scale": (0.9, 1.0)}
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # whatever the hub or a bad config raises
        fail(f"--model {name}: {one_line(error)}. Name one of open_clip's, or local-dir:PATH.")
    model.to(memory_format=torch.channels_last).eval()  # peers, too: batch normalisation differs
    return Clip(model, preprocess, augment, tokenizer, device, name)


def new_batch(clip, n, classes):
    """A Batch of n images of `classes` classes, with prompts, captions and retrieved pairs."""
    size = torch.tensor(clip.model.visual.image_size).expand(2).tolist()
    images, more = torch.randn(2, n, 3, *size, device=clip.device)
    labels = torch.arange(n) % classes
    texts = [[f"a photo of {y}" for y in labels.tolist()]]
    texts += [[f"{thing} {i} on a table" for i in range(n)] for thing in ("a dog", "a cat")]
    prompts, captions, about = (clip.tokenizer(text).to(clip.device) for text in texts)
    return Batch(labels.to(clip.device), None, images, prompts, captions, (more, about, n))


def our_step(method, clip, head, batch):
    """A step of `method` as training.fit takes it: () -> loss."""
    towers = [*clip.model.parameters()]
    image = [*clip.model.visual.parameters(), *head.parameters()]
    trained = image if method == "finetune" else towers
    optimizer = torch.optim.AdamW(trained, 1e-5, weight_decay=0.1, fused=True)

    def step():
        if method == "finetune":
            loss = ce_step([clip.encode_image(batch.images)], batch.labels, head)
        else:
            loss = contrastive_step(clip, batch)
        value = loss.item()  # fit asks whether it is finite
        optimizer.zero_grad()
        loss.backward()
        if method == "finetune":
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return value

    return step


def peer_step(method, clip, head, batch):
    """Likewise as others take it."""
    model, towers = clip.model, [*clip.model.parameters()]
    image = [*model.visual.parameters(), *head.parameters()]
    optimizer = peers.adamw(image if method == "finetune" else towers)

    def step():
        with autocast(clip.device):
            if method == "finetune":
                return peers.wise_ft_step(model, head, optimizer, batch.images, batch.labels)
            if method == "flyp":
                return peers.flyp_step(model, optimizer, batch.images, batch.prompts)
            return peers.arf_step(model, optimizer, batch)

    return step


def training(clip, head, batch, rounds, clock):
    """Rows: our steps against peers', as these write them and in our memory format."""
    layouts = {"ours": torch.channels_last, "as written": torch.contiguous_format}
    layouts["in channels_last"], rows = torch.channels_last, []
    for method, peer in PEERS.items():
        calls = {}
        for name, layout in layouts.items():
            model = copy.deepcopy(clip.model).to(memory_format=layout)
            new = our_step if name == "ours" else peer_step
            own = replace(clip, model=model), copy.deepcopy(head)
            calls[name] = new(method, *own, only(method, batch))
        found = medians(calls, rounds, clock)
        row = against(f"{method} / {peer}", found["ours"], found["as written"])
        row["… in channels_last"] = found["in channels_last"][0] / found["ours"][0]
        rows.append({**row, "images/s": len(batch.labels) / found["ours"][0]})
    return rows


def on_a_gpu(name, clip, head, batch, caption_batch, rounds):
    """Rows of steps with and without torch.compile, and of captions, on the GPU `name`, if any.

    MFU: the towers' FLOPs, as PyTorch counts them, over the time and what the GPU could do in
    bfloat16; a captioner's are not counted.
    """
    captions = "captions, BLIP-2-opt-2.7b's shape"
    steps = [(method, compiled) for method in PEERS for compiled in ("", ", compiled")]
    if not name:
        names = [*map("".join, steps), captions]
        return [{"what": one, **dict.fromkeys(MEASURES, "not run")} for one in names]
    peak, rows = next((v for k, v in PEAK.items() if k in name), None), []

    def measure(what, n, step, flops=None):
        torch.cuda.reset_peak_memory_stats()
        seconds = medians({what: step}, rounds, timer)[what][0]
        share = flops / seconds / peak if flops and peak else None
        memory = torch.cuda.max_memory_allocated() / 1e9
        rows.append({"what": what, **dict(zip(MEASURES, (n / seconds, memory, share)))})

    for method, compiled in steps:
        model = copy.deepcopy(clip.model)
        new = replace(clip, model=model), copy.deepcopy(head), only(method, batch)
        step = our_step(method, *new)
        with FlopCounterMode(display=False) as counter:
            step()
        for encode in ("encode_image", "encode_text") if compiled else ():
            setattr(model, encode, torch.compile(getattr(model, encode)))
        measure(method + compiled, len(batch.labels), step, counter.get_total_flops())
        del new, step, model  # the next one wants their memory
    measure(captions, caption_batch, captioning(caption_batch, clip.device))
    return rows


def captioning(batch_size, device, beams=5, length=30):
    """Captions, all of one length, by a model of the shape of Salesforce/blip2-opt-2.7b."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    opt = {
        "model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "word_embed_proj_dim": 2560, "vocab_size": 50304,
    }
    config = Blip2Config(text_config=opt, image_token_index=50265)
    with device:
        model = Blip2ForConditionalGeneration._from_config(config, dtype=precision(device)).eval()
    pixels = torch.randn(batch_size, 3, 224, 224, device=device, dtype=precision(device))
    tokens = torch.full((batch_size, config.num_query_tokens + 1), 50265, device=device)
    tokens[:, -1] = 2  # the image's 32 tokens and the start of the text
    return lambda: model.generate(
        pixel_values=pixels, input_ids=tokens, attention_mask=torch.ones_like(tokens),
        num_beams=beams, min_new_tokens=length, max_new_tokens=length, do_sample=False,
    )


# -------------------------------------------------------------------------------------------------


def show(title, rows):
    """Print rows as a table, whose columns are the first row's."""
    def cell(value):
        return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [[cell(value) for value in row.values()] for row in rows]
    print(f"\n{title}:\n\n{markdown([*rows[0]], lines)}", flush=True)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add, count = parser.add_argument, number(int, 0)
    add("--model", default=DEFAULT_MODEL, help="open_clip's name of one, or local-dir:PATH")
    add("--batch-size", type=count, default=512, help="images a step (default: 512)")
    add("--caption-batch", type=count, default=32, help="images at a time (default: 32)")
    add("--classes", type=count, default=1000, help="classes of the images (default: 1000)")
    add("--rounds", type=count, default=7, help="how often each is measured (default: 7)")
    add("--threads", type=count, default=1, help="of a CPU (default: 1)")
    add("--growth", action="store_true", help="also how costs grow with sizes")
    add("--out", type=Path, default=Path("runs/benchmark.json"), help="where the numbers go, too")
    args, device = parser.parse_args(), the_device()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = timer if gpu else time.process_time
    record = {
        "device": gpu or "CPU", "torch": torch.__version__,
        "precision": str(precision(device)).removeprefix("torch."), "threads": args.threads,
        "clock": "wall" if gpu else "CPU time", "model": args.model,
        "batch": args.batch_size, "classes": args.classes, "rounds": args.rounds,
    }
    print(", ".join(f"{name}: {value}" for name, value in record.items()))
    clip = new_clip(args.model, device)
    batch = new_batch(clip, args.batch_size, args.classes)
    dim = clip.encode_text(batch.prompts[:1]).shape[1]
    head = torch.nn.Linear(dim, args.classes, device=device)
    tables, how = {}, (args.rounds, clock)

    def note(title, rows):
        tables[title] = rows
        show(title, rows)

    steps = training(clip, head, batch, *how)
    note("training steps, ours / another's", steps)
    note("loading of images", parts.loading(clip, steps, args.batch_size, *how))
    note("mappers, ours / LADS's (CPU)", parts.mappers(args.rounds))
    note("exact search, ours / one index (CPU)", parts.searching(args.rounds))
    note("evaluation", parts.evaluation(clip, head, args.batch_size, *how))
    note("on a GPU", on_a_gpu(gpu, clip, head, batch, args.caption_batch, args.rounds))
    if args.growth:
        note("how costs grow, size: ms (CPU)", parts.growth(args.rounds))
    text = json.dumps({**record, "tables": tables}, indent=1) + "\n"
    write_atomically(args.out, lambda part: part.write_text(text))


if __name__ == "__main__":
    main()
