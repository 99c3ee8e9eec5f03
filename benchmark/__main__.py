"""How fast are training steps, mappers, search and evaluation beside transcriptions of others'?

    python -m benchmark                                              # ViT-B/16, on a GPU
    python -m benchmark --model local-dir:emoji/clip --classes 37    # on a laptop: two minutes

Every row is stored in --out as soon as it is measured. What is compared takes turns, and the median
of --rounds counts. On a CPU time is the CPU time of one thread (--threads), because other work on
the machine changes wall time. Pixels are random, and so are weights unless --model brings them
(local-dir:, hf-hub:).
"""

import gc
import re
import statistics
import tempfile
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from anchors import search
from batches import Batch, image_batches, in_order
from benchmark import peers
from core.artifacts import load, save, write_atomically
from core.config import DEFAULT_MODEL, Parser, number
from core.distributed import get_device, require_one_process
from core.methods import parse_recipe
from core.utils import ROOT, fail, is_out_of_memory, one_line
from data import Location
from features import (
    Clip,
    autocast,
    compile_towers,
    encode_images,
    precision,
    resolve_local,
    split_transforms,
)
from finetune import arf_losses, ldfs_losses
from mapper import new_mapper, train_mapper
from report.tables import aligned
from strategies.towers import BothTowers, FullFinetuning

PEERS = {"finetune": "WiSE-FT's", "flyp": "FLYP's", "arf": "three forwards"}
PAGES = ROOT / "docs/results"
TABLES = ("steps", "evaluation", "mappers", "search", "gpu")
MAPPERS = ("lads", "ldfs", "global")
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, from NVIDIA's sheets


def measure(calls, rounds, clock):
    """Return ({name: median seconds}, {name: result of its first call}) of {name: function}.

    The functions take turns, so that a drift of the machine's speed affects all of them.
    """
    results = {name: call() for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}, results


def print_table(content, path, title, rows):
    """Measure and print the rows {what: function that returns {column: value}} of a table.

    Each row is added to `content`, which is stored in `path`, as soon as it is measured. If the
    memory does not suffice for a row, the row says so, and the next ones follow. A GPU's tables
    also go to its page in docs/results/.
    """
    table = content["tables"][title] = []
    for what, measure_row in rows.items():
        try:
            table.append({"what": what, **measure_row()})
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
            if not is_out_of_memory(error):
                raise
            table.append({"what": f"{what}: out of memory"})
        save(content, path)
        gc.collect()  # models that a traceback has kept, before the next ones are made
        torch.cuda.empty_cache()
    print(f"\n{title}:\n\n{text_table(table)}", flush=True)
    if content.get("device", "CPU") != "CPU":
        write_page(path.parent, content["device"])


def text_table(table):
    """Return a table [{column: value}] as text."""
    columns = [*dict.fromkeys(column for row in table for column in row)]
    lines = []
    for row in table:
        values = [row.get(column, "") for column in columns]
        lines.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    return aligned([textwrap.fill(head, 13, break_long_words=False) for head in columns], lines)


def write_page(folder, device):
    """Write docs/results/gpu-DEVICE.md: all that `folder` has of benchmarks on this device."""
    lines = [f"# {device}", "", "Written by `python -m benchmark`; see [GPU.md](../GPU.md)."]
    contents = [load(path) for path in folder.glob("*.json")]
    own = [content for content in contents if content.get("device") == device]
    for content in sorted(own, key=lambda content: content["batch"]):
        tables = content.pop("tables")
        about = ", ".join(f"{name} {value}" for name, value in content.items())
        lines += ["", f"## Batch {content['batch']}", "", about]
        for title, table in tables.items():
            lines += ["", f"{title}:", "", "```text", text_table(table), "```"]
    page = PAGES / f"gpu-{slug(device)}.md"
    write_atomically(page, lambda part: part.write_text("\n".join(lines) + "\n", "utf-8"))


def slug(device):
    """Return a device's name as part of a file's name: "nvidia-h100-80gb-hbm3"."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def compare(ours, peers):
    """Return the columns of two times in seconds."""
    return {"ours, ms": 1e3 * ours, "peer's, ms": 1e3 * peers, "peer's / ours": peers / ours}


def unit(*shape):
    """Return random vectors (…, d) of unit norm."""
    return F.normalize(torch.randn(*shape), dim=-1)


# -------------------------------------------------------------------------------------------------
# Training steps


def new_clip(name, device):
    """Return a Clip as features.load_clip does; its weights are random if `name` brings none."""
    place = resolve_local(name)
    try:
        model, augment, preprocess = open_clip.create_model_and_transforms(place, device=device)
        tokenizer = open_clip.get_tokenizer(place)
    except Exception as error:  # whatever the hub or a bad config raises
        fail(f"--model {name}: {one_line(error)}. Name a model of open_clip, or local-dir:PATH.")
    model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    augment, _, _ = split_transforms(augment)
    preprocess, mean, std = split_transforms(preprocess)
    normalisation = mean.to(device), std.to(device)
    return Clip(model, preprocess, augment, tokenizer, device, name, *normalisation)


def image_size(clip):
    """Return [height, width] of the model's input."""
    return torch.tensor(clip.model.visual.image_size).expand(2).tolist()


def new_batch(method, clip, n, classes):
    """Return a Batch of n images of `classes` classes, for ARF with captions and n pairs."""
    def new_images():
        shape = n, 3, *image_size(clip)
        return torch.randint(256, shape, dtype=torch.uint8, device=clip.device)

    def tokens(text, numbers):
        return clip.tokenizer([text.format(i) for i in numbers])  # on the CPU, as a loader's are

    labels = torch.arange(n) % classes
    prompts = tokens("a photo of {}", labels.tolist())
    batch = Batch(labels.to(clip.device), images=new_images(), prompts=prompts)
    if method == "arf":
        batch.captions = tokens("a dog {} on a table", range(n))
        batch.pool_images, batch.n_pairs = new_images(), n
        batch.pool_texts = tokens("a cat {} on a table", range(n))
    return batch


def new_strategy(method, clip, class_text, memory_format=torch.channels_last):
    """Return the Strategy of a method, which trains its own copy of the model."""
    clip = clip.copy()
    clip.model.to(memory_format=memory_format)
    if method == "finetune":
        return FullFinetuning(clip, class_text)
    return BothTowers(clip, class_tokens=None)  # the contrastive losses use no head


def our_step(method, strategy, batch):
    """Return a function that takes a step as finetune.train does and returns its loss."""
    parameters = [p for p in strategy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-5, weight_decay=0.1, fused=True)

    def step():
        if method == "finetune":
            losses = ldfs_losses(strategy, batch)
        else:
            losses = arf_losses(strategy.clip, batch)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        if method == "finetune":
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        strategy.after_step()
        return loss.item()

    return step


def peer_step(method, strategy, batch):
    """Return a function that takes the peer's step from the same start and returns its loss.

    The peer gets images and texts as its loader would make them: normalised, on the device.
    """
    clip = strategy.clip
    model, changes = clip.model, {}
    for name in ("images", "pool_images", "prompts", "captions", "pool_texts"):
        if (rows := getattr(batch, name)) is not None:
            is_image = name.endswith("images")
            changes[name] = clip.normalise(rows) if is_image else rows.to(clip.device)
    batch = replace(batch, **changes)
    optimizer = torch.optim.AdamW(strategy.parameters(), 1e-5, weight_decay=0.1)

    @autocast(strategy.clip.device)
    def step():
        if method == "finetune":
            inputs = peers.wise_ft_loss, model, strategy.head, batch
            return peers.step(optimizer, *inputs, max_norm=1.0)
        loss_fn = peers.flyp_loss if method == "flyp" else peers.arf_loss
        return peers.step(optimizer, loss_fn, model, batch)

    return step


def compare_steps(method, clip, class_text, batch, watch):
    """Return a row: our step beside the peer's, as it is written and in our memory format.

    images/s: of all images of a step, including retrieved ones, which the loader has to deliver.
    """
    default_format = new_strategy(method, clip, class_text, torch.contiguous_format)
    seconds, losses = watch({
        "ours": our_step(method, new_strategy(method, clip, class_text), batch),
        "as written": peer_step(method, default_format, batch),
        "channels_last": peer_step(method, new_strategy(method, clip, class_text), batch),
    })
    return {
        **compare(seconds["ours"], seconds["as written"]),
        "peer's / ours in channels_last": seconds["channels_last"] / seconds["ours"],
        "images/s": (len(batch.labels) + batch.n_pairs) / seconds["ours"],
        "loss differs by": abs(losses["ours"] - losses["as written"]),
    }


# -------------------------------------------------------------------------------------------------
# On a GPU


def measure_gpu(step, images, watch, flops=None):
    """Return a row. MFU: FLOPs a second, as PyTorch counts them, of what the GPU can do in bf16."""
    name = torch.cuda.get_device_name()
    peak = next((peak for kind, peak in PEAK.items() if kind in name), None)
    torch.cuda.reset_peak_memory_stats()
    seconds = watch({"step": step})[0]["step"]
    return {
        "images/s": images / seconds,
        "peak memory, GB": torch.cuda.max_memory_allocated() / 1e9,
        "MFU": flops / seconds / peak if flops and peak else "",
    }


def measure_training(method, compiled, clip, class_text, batch, watch):
    """Return a row of our step, with or without torch.compile."""
    strategy = new_strategy(method, clip, class_text)
    step = our_step(method, strategy, batch)
    with FlopCounterMode(display=False) as counter:  # before compiling, which hides the operations
        step()
    if compiled:
        compile_towers(strategy.clip.model)
    return measure_gpu(step, len(batch.labels) + batch.n_pairs, watch, counter.get_total_flops())


def new_captioner(device):
    """Return a captioner of random weights, of the shape of Salesforce/blip2-opt-2.7b."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    opt = {
        "model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "word_embed_proj_dim": 2560, "vocab_size": 50304,
    }
    config = Blip2Config(text_config=opt, image_token_index=50265)
    with device:
        return Blip2ForConditionalGeneration._from_config(config, dtype=precision(device)).eval()


def measure_captions(batch_size, device, watch):
    """Return a row of captions by 5 beams, all of them of 30 tokens."""
    model = new_captioner(device)
    config = model.config
    size = config.vision_config.image_size
    pixels = torch.randn(batch_size, 3, size, size, device=device, dtype=precision(device))
    shape = batch_size, config.num_query_tokens + 1  # the image, and the start of the text
    tokens = torch.full(shape, config.image_token_index, device=device)
    tokens[:, -1] = 2
    write = partial(
        model.generate, pixel_values=pixels, input_ids=tokens, num_beams=5, do_sample=False,
        attention_mask=torch.ones_like(tokens), min_new_tokens=30, max_new_tokens=30,
    )
    return measure_gpu(write, batch_size, watch)


# -------------------------------------------------------------------------------------------------
# Mappers, search, loading and evaluation


def compare_mappers(recipe_name, device, watch, n=412, d=384, classes=37):
    """Return a row: the training of one mapper beside LADS's. n, d, classes: emoji's."""
    labels = torch.arange(n) % classes
    features = [unit(n, d), labels, unit(n, d), unit(n, d), unit(classes, d)]  # z, y, t^s, t^k, T
    features = [x.to(device) for x in features]
    seconds, losses = watch({
        "ours": lambda: train_mapper(*features, parse_recipe(recipe_name))[1][0],
        "LADS's": lambda: peers.train_lads(new_mapper(d, 0).to(device).net, *features),
    }, rounds=2)  # a training repeats its step often enough
    row = compare(seconds["ours"], seconds["LADS's"])
    if recipe_name == "lads":
        row["loss differs by"] = abs(sum(losses["ours"].values()) - losses["LADS's"])
    return row


def compare_searches(watch, queries=800, pool=20_000, d=384, k=10):
    """Return a row: a search in four parts, one after another, beside one FAISS index of all."""
    q, z = unit(queries, d), unit(pool, d)
    seconds, results = watch({
        "ours": lambda: search(q, z.split(pool // 4), k),
        "one index": lambda: peers.search(q, z, k),
    })
    same = results["ours"][1].eq(results["one index"][1]).float().mean().item()
    return {"queries": queries, "pool": pool, **compare(*seconds.values()), "same ids": same}


def measure_evaluation(clip, images, copies, watch):
    """Return a row: images/s of evaluation, of the loader alone, with and without augmentation, and
    of the model alone.

    images: (B, 3, H, W), a batch in memory for the model alone. Files are B JPEGs of noise, 1.5
    times as large as the model's input. Each is read `copies` times, by worker processes if there
    is a GPU.
    """
    n, size = len(images), int(1.5 * max(image_size(clip)))

    def load(transform):
        return [None for _ in image_batches(in_order(places, n), transform, clip.device)]

    @torch.no_grad()
    @autocast(clip.device)
    def model_alone():
        return [clip.image_tower(images).cpu() for _ in range(copies)]

    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            Image.effect_noise((size, size), 64).convert("RGB").save(f"{folder}/{i}.jpg")
        places = [Location(folder, f"{i}.jpg") for i in range(n)] * copies
        items = [(location, 0) for location in places]
        seconds, _ = watch({
            "evaluation": lambda: encode_images(clip, items, n),
            "loader": lambda: load(clip.preprocess),
            "loader with augmentation": lambda: load(clip.augment),
            "model alone": model_alone,
        })
    return {name: len(items) / seconds[name] for name in seconds}


# -------------------------------------------------------------------------------------------------


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add, count = parser.add_argument, number(int, 0)
    add("--model", default=DEFAULT_MODEL,
        help=f"open_clip name, hf-hub:…, or local-dir:PATH (default: {DEFAULT_MODEL})")
    add("--batch-size", type=count, default=64, help="images of a step (default: 64)")
    add("--caption-batch", type=count, default=32, help="images at a time (default: 32)")
    add("--classes", type=count, default=1000, help="classes of the images (default: 1000)")
    add("--tables", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE",
        help=f"what to measure: {', '.join(TABLES)} (default: all)")
    add("--rounds", type=count, default=7, help="how often each is measured (default: 7)")
    add("--threads", type=count, default=1, help="of a CPU (default: 1)")
    add("--out", type=Path,
        help="where the numbers are stored (default: runs/benchmark/DEVICE-batchN.json)")
    args = parser.parse_args()
    require_one_process("The benchmark")
    device = get_device()
    gpu = device.type == "cuda"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    watch = partial(measure, rounds=args.rounds, clock=timer if gpu else time.process_time)
    about = {
        "device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__,
        "precision": str(precision(device)).removeprefix("torch."), "threads": args.threads,
        "clock": "wall" if gpu else "CPU time", "model": args.model,
        "batch": args.batch_size, "classes": args.classes, "rounds": args.rounds,
    }
    print(", ".join(f"{name}: {value}" for name, value in about.items()))
    out = args.out or Path(f"runs/benchmark/{slug(about['device'])}-batch{args.batch_size}.json")
    stored = load(out) if out.exists() else {}
    same = {name: value for name, value in stored.items() if name != "tables"} == about
    content = {**about, "tables": stored["tables"] if same else {}}

    def table(name, title, rows):
        if name in args.tables:
            print_table(content, out, title, rows)

    clip = new_clip(args.model, device)
    batches = {m: new_batch(m, clip, args.batch_size, args.classes) for m in PEERS}
    class_text = unit(args.classes, clip.encode_text(batches["flyp"].prompts[:1]).shape[1])

    table("steps", "training steps", {
        f"{m} / {peer}": partial(compare_steps, m, clip, class_text, batches[m], watch)
        for m, peer in PEERS.items()
    })
    copies = 64 if gpu else 4  # enough batches to keep all workers busy
    table("evaluation", "evaluation, images/s", {
        f"{args.batch_size * copies} images": partial(
            measure_evaluation, clip, batches["flyp"].images, copies, watch
        )
    })
    title = "training of a mapper (LADS's real step takes twice as long as the peer's here)"
    table("mappers", title, {
        f"{name} / LADS's": partial(compare_mappers, name, device, watch) for name in MAPPERS
    })
    table("search", "exact search", {"ours / one FAISS index": partial(compare_searches, watch)})
    if not gpu:
        print("\nnot run, because there is no GPU: peak memory, MFU, torch.compile, captions")
        return
    rows = {
        m + ", compiled" * compiled: partial(
            measure_training, m, compiled, clip, class_text, batches[m], watch
        )
        for m in PEERS for compiled in (False, True)
    }
    captions = partial(measure_captions, args.caption_batch, device, watch)
    table("gpu", "our steps on the GPU", {**rows, "captions, as BLIP-2's": captions})


if __name__ == "__main__":
    main()
