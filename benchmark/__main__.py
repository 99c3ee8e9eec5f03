"""How fast are training steps, mappers, search and evaluation beside transcriptions of others'?

    python -m benchmark                                              # ViT-B/16, on a GPU
    python -m benchmark --model local-dir:emoji/clip --classes 37    # on a laptop: two minutes
    python -m benchmark … --growth                                   # also how costs grow

Every row is stored in --out as soon as it is measured. What is compared takes turns, and the median
of --rounds counts. On a CPU time is the CPU time of one thread (--threads), because other work on
the machine changes wall time. Pixels are random, and so are weights unless --model brings them
(local-dir:, hf-hub:).
"""

import copy
import gc
import math
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
from core.artifacts import save
from core.config import DEFAULT_MODEL, Parser, number
from core.distributed import get_device, require_one_process
from core.methods import parse_recipe
from core.utils import fail, is_out_of_memory, one_line
from data import Location
from features import Clip, autocast, encode_images, precision, resolve_local
from finetune import arf_losses, ldfs_losses
from mapper import new_mapper, train_mapper
from report.tables import aligned
from strategies.base import LinearProbe
from strategies.towers import BothTowers, FullFinetuning

PEERS = {"finetune": "WiSE-FT's", "flyp": "FLYP's", "arf": "three forwards"}
MAPPERS = {
    "lads": " (a kind transcription: its real step takes twice as long)", "ldfs": "", "global": "",
}
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, from NVIDIA's sheets
GROWTH = {"images": 2000, "classes": 250, "targets": 2, "pool": 10_000}  # the smallest sizes


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


class Report:
    """Tables, whose rows are stored in a JSON file as soon as they are measured."""

    def __init__(self, path, about):
        self.path = path
        self.content = {**about, "tables": {}}

    def table(self, title, rows):
        """Measure, store and print the rows {what: function that returns {column: value}}.

        If the memory does not suffice for a row, the row says so, and the next ones follow.
        """
        table = self.content["tables"][title] = []
        for what, measure in rows.items():
            try:
                table.append({"what": what, **measure()})
            except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
                if not is_out_of_memory(error):
                    raise
                table.append({"what": f"{what}: out of memory"})
            save(self.content, self.path)
            gc.collect()  # models that a traceback has kept, before the next ones are made
            torch.cuda.empty_cache()
        columns = [*dict.fromkeys(column for row in table for column in row)]
        lines = [
            [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
            for values in ([row.get(column, "") for column in columns] for row in table)
        ]
        heads = [textwrap.fill(column, 13, break_long_words=False) for column in columns]
        print(f"\n{title}:\n\n{aligned(heads, lines)}", flush=True)


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
        model, augment, preprocess = open_clip.create_model_and_transforms(
            place, device=device, aug_cfg={"scale": (0.9, 1.0)}
        )
        tokenizer = open_clip.get_tokenizer(place)
    except Exception as error:  # whatever the hub or a bad config raises
        fail(f"--model {name}: {one_line(error)}. Name a model of open_clip, or local-dir:PATH.")
    model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Clip(model, preprocess, augment, tokenizer, device, name)


def copy_clip(clip, memory_format=torch.channels_last):
    """Return a Clip with its own copy of the model, to be trained."""
    return replace(clip, model=copy.deepcopy(clip.model).to(memory_format=memory_format))


def new_batch(clip, n, classes):
    """Return a Batch of n images, captions and retrieved pairs, of `classes` classes."""
    size = torch.tensor(clip.model.visual.image_size).expand(2).tolist()
    images, pool_images = torch.randn(2, n, 3, *size, device=clip.device)
    labels = torch.arange(n) % classes
    texts = [f"a photo of {y}" for y in labels.tolist()]
    texts += [f"a dog {i} on a table" for i in range(n)]
    texts += [f"a cat {i} on a table" for i in range(n)]
    prompts, captions, pool_texts = clip.tokenizer(texts).to(clip.device).split(n)
    labels = labels.to(clip.device)
    return Batch(labels, None, images, prompts, captions, pool_images, pool_texts, n_pairs=n)


def batch_for(method, batch):
    """Return (the Batch without what `method` does not use, its number of images)."""
    n = len(batch.labels)
    if method == "arf":
        return batch, 2 * n
    return replace(batch, captions=None, pool_images=None, pool_texts=None, n_pairs=0), n


def new_strategy(method, clip, class_text, batch):
    """Return the Strategy of a method, which makes its parameters in `clip` trainable."""
    if method == "finetune":
        return FullFinetuning(clip, class_text)
    return BothTowers(clip, batch.prompts)


def our_step(method, clip, class_text, batch):
    """Return a function that takes a step as finetune.train does and returns its loss."""
    strategy = new_strategy(method, clip, class_text, batch)
    parameters = [p for p in strategy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-5, weight_decay=0.1, fused=True)

    def step():
        if method == "finetune":
            losses = ldfs_losses(strategy, batch)
        else:
            losses = arf_losses(clip, batch)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        if method == "finetune":
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        strategy.after_step()
        return loss.item()

    return step


def peer_step(method, clip, class_text, batch):
    """Return a function that takes the peer's step from the same start and returns its loss."""
    strategy, model = new_strategy(method, clip, class_text, batch), clip.model
    optimizer = peers.adamw(strategy.parameters())

    def step():
        with autocast(clip.device):
            if method == "finetune":
                head = strategy.head
                return peers.wise_ft_step(model, head, optimizer, batch.images, batch.labels)
            if method == "flyp":
                return peers.flyp_step(model, optimizer, batch.images, batch.prompts)
            return peers.arf_step(model, optimizer, batch)

    return step


def compare_steps(method, clip, class_text, batch, loader_rate, watch):
    """Return a row: our step beside the peer's, as it is written and in our memory format.

    images/s: of all images of a step, including retrieved ones, which the loader has to deliver.
    """
    batch, images = batch_for(method, batch)
    layout = torch.contiguous_format  # PyTorch's default
    seconds, losses = watch({
        "ours": our_step(method, copy_clip(clip), class_text, batch),
        "as written": peer_step(method, copy_clip(clip, layout), class_text, batch),
        "channels_last": peer_step(method, copy_clip(clip), class_text, batch),
    })
    return {
        **compare(seconds["ours"], seconds["as written"]),
        "peer's / ours in channels_last": seconds["channels_last"] / seconds["ours"],
        "images/s": images / seconds["ours"],
        "loader's images/s": loader_rate,
        "loss differs by": abs(losses["ours"] - losses["as written"]),
    }


# -------------------------------------------------------------------------------------------------
# On a GPU


def measure_gpu(step, images, watch, flops=None):
    """Return a row. MFU: FLOPs a second, as PyTorch counts them, of what the GPU can do in bf16."""
    name = torch.cuda.get_device_name()
    peak = next((flops for kind, flops in PEAK.items() if kind in name), None)
    torch.cuda.reset_peak_memory_stats()
    seconds = watch({"step": step})[0]["step"]
    return {
        "images/s": images / seconds,
        "peak memory, GB": torch.cuda.max_memory_allocated() / 1e9,
        "MFU": flops / seconds / peak if flops and peak else "",
    }


def measure_training(method, compiled, clip, class_text, batch, watch):
    """Return a row of our step, with or without torch.compile."""
    batch, images = batch_for(method, batch)
    clip = copy_clip(clip)
    step = our_step(method, clip, class_text, batch)
    with FlopCounterMode(display=False) as counter:  # before compiling, which hides the operations
        step()
    if compiled:
        clip.model.encode_image = torch.compile(clip.model.encode_image)
        clip.model.encode_text = torch.compile(clip.model.encode_text)
    return measure_gpu(step, images, watch, counter.get_total_flops())


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


def measure_captions(batch_size, device, watch, beams=5, length=30):
    """Return a row of captions, all of them of `length` tokens."""
    model = new_captioner(device)
    config = model.config
    size = config.vision_config.image_size
    pixels = torch.randn(batch_size, 3, size, size, device=device, dtype=precision(device))
    shape = batch_size, config.num_query_tokens + 1  # the image, and the start of the text
    tokens = torch.full(shape, config.image_token_index, device=device)
    tokens[:, -1] = 2
    write = partial(
        model.generate, pixel_values=pixels, input_ids=tokens,
        attention_mask=torch.ones_like(tokens), num_beams=beams, min_new_tokens=length,
        max_new_tokens=length, do_sample=False,
    )
    return measure_gpu(write, batch_size, watch)


# -------------------------------------------------------------------------------------------------
# Mappers, search, loading and evaluation


def compare_mappers(recipe_name, device, watch, n=412, d=384, classes=37):
    """Return a row: the training of one mapper beside LADS's. n, d, classes: emoji's."""
    labels = torch.arange(n) % classes
    features = [unit(n, d), labels, unit(n, d), unit(n, d), unit(classes, d)]  # z, y, t^s, t^k, T
    features = [x.to(device) for x in features]
    calls = {
        "ours": lambda: train_mapper(*features, parse_recipe(recipe_name))[1][0],
        "LADS's": lambda: peers.train_lads(new_mapper(d, 0).to(device).net, *features),
    }
    seconds, losses = watch(calls, rounds=2)  # a training repeats its step often enough
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


def write_images(clip, n, folder):
    """Return [(Location, 0)] of n JPEG files of noise, 1.5 times as large as the model's input."""
    size = int(1.5 * torch.tensor(clip.model.visual.image_size).max())
    for i in range(n):
        noise = Image.effect_noise((size, size), 64).convert("RGB")
        noise.save(Path(folder, f"{i}.jpg"))
    return [(Location(folder, f"{i}.jpg"), 0) for i in range(n)]


def load(clip, items, transform, batch_size):
    """Load all images as training and evaluation do: by worker processes if there is a GPU."""
    order = in_order(len(items), batch_size)
    for _ in image_batches(items, transform, order, clip.device):
        pass


def compare_evaluation(clip, items, images, watch):
    """Return a row: images/s of evaluation, of the loader alone, and of the model alone.

    images: (B, 3, H, W), a batch in memory for the model alone.
    """
    n = len(images)

    def model_alone():
        with autocast(clip.device):
            peers.raw_features(clip.model, [images] * (len(items) // n))

    seconds, _ = watch({
        "images/s": lambda: encode_images(clip, items, n),
        "loader's images/s": lambda: load(clip, items, clip.preprocess, n),
        "model's images/s": model_alone,
    })
    return {name: len(items) / seconds[name] for name in seconds}


# -------------------------------------------------------------------------------------------------
# Growth


def probe_epoch(clip, n=512, classes=37, targets=0, d=256):
    """Return a function that trains a linear probe for an epoch."""
    z = unit(targets + 1, n, d).to(clip.device)
    labels = (torch.arange(n) % classes).to(clip.device)
    mappers = dict.fromkeys(map(str, range(targets)))  # only their names are used: z contains ẑ
    probe = LinearProbe(clip, unit(classes, d), mappers)
    optimizer = torch.optim.AdamW(probe.parameters(), fused=True)

    def epoch():
        for i in torch.randperm(n, device=clip.device).split(256):
            loss = sum(ldfs_losses(probe, Batch(labels[i], z[:, i])).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def measure_growth(what, clip, watch):
    """Return a row: ms at GROWTH's size and at 2, 4 and 8 times as much; the exponent of growth.

    images, classes, targets: an epoch of a linear probe; pool: a search by 256 queries. exponent:
    the slope of log ms on log size.
    """
    def new_call(size):
        if what == "pool":
            return partial(search, unit(256, 256), unit(size, 256).split(10_000), 10)
        return probe_epoch(clip, **{"n" if what == "images" else what: size})

    factors = (1, 2, 4, 8)
    sizes = [GROWTH[what] * factor for factor in factors]
    seconds, _ = watch({size: new_call(size) for size in sizes})
    x, y = [math.log(size) for size in sizes], [math.log(seconds[size]) for size in sizes]
    columns = {f"x {factor}, ms": 1e3 * seconds[size] for factor, size in zip(factors, sizes)}
    return {"from": sizes[0], **columns, "exponent": statistics.linear_regression(x, y).slope}


# -------------------------------------------------------------------------------------------------


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add, count = parser.add_argument, number(int, 0)
    add("--model", default=DEFAULT_MODEL, help="open_clip name, hf-hub:…, or local-dir:PATH")
    add("--batch-size", type=count, default=64, help="images of a step (default: 64)")
    add("--caption-batch", type=count, default=32, help="images at a time (default: 32)")
    add("--classes", type=count, default=1000, help="classes of the images (default: 1000)")
    add("--rounds", type=count, default=7, help="how often each is measured (default: 7)")
    add("--threads", type=count, default=1, help="of a CPU (default: 1)")
    add("--growth", action="store_true", help="also how costs grow with sizes")
    add("--out", type=Path, default=Path("runs/benchmark.json"),
        help="where the numbers are stored (default: runs/benchmark.json)")
    args = parser.parse_args()
    require_one_process("The benchmark")
    device = get_device()
    gpu = device.type == "cuda"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = timer if gpu else time.process_time
    watch = partial(measure, rounds=args.rounds, clock=clock)
    about = {
        "device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__,
        "precision": str(precision(device)).removeprefix("torch."), "threads": args.threads,
        "clock": "wall" if gpu else "CPU time", "model": args.model,
        "batch": args.batch_size, "classes": args.classes, "rounds": args.rounds,
    }
    print(", ".join(f"{name}: {value}" for name, value in about.items()))
    report = Report(args.out, about)
    clip = new_clip(args.model, device)
    batch = new_batch(clip, args.batch_size, args.classes)
    class_text = unit(args.classes, clip.encode_text(batch.prompts[:1]).shape[1])

    with tempfile.TemporaryDirectory() as folder:
        files = write_images(clip, args.batch_size, folder)
        items = files * (64 if gpu else 4)  # enough batches to keep all workers busy
        loading = partial(load, clip, items, clip.augment, args.batch_size)
        rate = len(items) / watch({"loader": loading})[0]["loader"]
        report.table("training steps", {
            f"{method} / {peer}": partial(
                compare_steps, method, clip, class_text, batch, rate, watch
            )
            for method, peer in PEERS.items()
        })
        report.table("evaluation", {
            f"{len(items)} images": partial(compare_evaluation, clip, items, batch.images, watch)
        })
    report.table("training of a mapper", {
        f"{name} / LADS's{remark}": partial(compare_mappers, name, device, watch)
        for name, remark in MAPPERS.items()
    })
    report.table("exact search", {"ours / one FAISS index": partial(compare_searches, watch)})
    if gpu:
        rows = {
            method + ", compiled" * compiled: partial(
                measure_training, method, compiled, clip, class_text, batch, watch
            )
            for method in PEERS for compiled in (False, True)
        }
        captions = partial(measure_captions, args.caption_batch, device, watch)
        report.table("our steps on the GPU", {**rows, "captions, as BLIP-2's": captions})
    else:
        print("\nnot run, because there is no GPU: peak memory, MFU, torch.compile, captions")
    if args.growth:
        report.table("how costs grow with sizes", {
            what: partial(measure_growth, what, clip, watch) for what in GROWTH
        })


if __name__ == "__main__":
    main()
