"""ARF's anchors: captions of the source's images, and pairs like those CLIP was pretrained on.

    python anchors.py caption pacs photo     # TCAG: captions.jsonl beside the images, for LDFS too
    python anchors.py retrieve pacs photo    # ITAR: runs/pacs-photo/retrieved.jsonl
    torchrun --nproc-per-node 8 -- anchors.py caption …       # the work is split over processes

Both look at the source's images only (ITAR at others to keep them out of what it retrieves), and
can be killed at any moment: they go on where they stopped.
"""

import hashlib
import json
import os
import re
import sys
import time
import utils
from collections import Counter
from pathlib import Path
from utils import fail, short_hash, write_atomically

import torch
import torch.nn.functional as F

import data
import features
from batches import image_batches, in_order
from config import flags, parse
from distributed import barrier, first_alone, leave, progress, ranks, the_device
from features import load_captioner
from report import results
from sets.folders import shards_of
from sets.webdataset import read_shard

# -------------------------------------------------------------------------------------------------
# TCAG: a caption for each image


@torch.no_grad()
def caption_images(model, processor, images, prompt="", beams=5, max_tokens=30):
    """What the model says of each PIL image, without the prompt: B strings, "" where nothing.

    CHOICE: one caption by beam search, no hint of the class; alternative: several, sampled.
    """
    text = prompt
    if getattr(processor, "chat_template", None):  # LLaVA's kind wants its own words around both
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
    batch = {"images": images, "text": [text] * len(images)}
    inputs = processor(**batch, padding=True, return_tensors="pt").to(model.device, model.dtype)
    out = model.generate(**inputs, num_beams=beams, max_new_tokens=max_tokens, do_sample=False)
    asked = inputs["input_ids"]                                                     # (B, L)
    if out.shape[1] >= asked.shape[1] and torch.equal(out[:, :asked.shape[1]], asked):
        out = out[:, asked.shape[1]:]  # a decoder-only language model (OPT) returns the prompt, too
    captions = processor.batch_decode(out, skip_special_tokens=True)
    return [caption.strip().removeprefix(prompt).strip() for caption in captions]


def repeats_itself(caption):
    """Whether words come three times in a row, "a cat a cat a cat": how beam search fails."""
    return re.search(r"\b(\w[\w ]*?)\b(?:,? \1\b){2}", caption) is not None


def caption(config, dataset):
    """Caption the source's images that lack one: as they are now, by the --captioner named."""
    if not any(method.needs_captions for method in config.methods.values()):
        return
    path = Path(config.captions or dataset.captions or dataset.folder / "captions.jsonl")
    utils.lock(lock := path.with_name(f".{path.name}.lock"), f".{path.name}.*.part")
    name = config.captioner or dataset.meta.captioner or "Salesforce/blip2-opt-2.7b"
    by = f"{name}, prompt {config.prompt!r}, beam {config.beams}, {config.max_tokens} tokens"
    items, (rank, world) = dataset.trainable(config.source), ranks()

    def stays(location, row):  # people's captions, which have neither "by" nor "bytes", always do
        its_own = row.get("bytes") in (None, os.path.getsize(location.file))  # of today's image
        return row["caption"] and its_own and (not config.captioner or row.get("by", by) == by)

    empty, there = {"caption": ""}, data.read_rows(path)[0]
    todo = [(x, y) for x, y in items[rank::world] if not stays(x, there.get(x.path, empty))]
    if todo:
        say, first = utils.warn if config.captions else print, todo[0][0].path
        say(f"{path}: {len(todo)} of {len(items)} captions missing ({first} …), asking {name}")
        part = path.with_name(f".{path.name}.part{time.time_ns()}-{rank}")
        write_captions(config, todo, data.class_texts(dataset, config.source), name, by, part)
    barrier()
    if rank > 0:
        return
    merged, parts = data.read_rows(path)
    if parts:
        data.write_rows(path, [merged[image] for image in sorted(merged)])
    for part in parts:
        part.unlink()
    utils.unlock(lock)  # for runs on other domains, of other methods
    rows = [merged[location.path] for location, _ in items]
    print(
        f"{path}: {len(rows)} captions, {len({row['caption'] for row in rows})} different, "
        f"{sum('by' not in row for row in rows)} not by a captioner; the class prompt instead of "
        f"{sum('instead of' in row for row in rows)} that were empty or repeated themselves"
    )
    default, decoding = flags("").get_default, ("prompt", "beams", "max_tokens")
    others = sum(row.get("by") != by for row in rows)
    if others and any(getattr(config, flag) != default(flag) for flag in decoding):
        utils.warn(f"{others} captions were there already, not by --prompt, --beams, --max-tokens")


def write_captions(config, items, class_prompts, name, by, part):
    """Caption `items` with the captioner `name`, a line each in the file `part`."""
    write_atomically(part, Path.touch)  # fails in one line where nothing can be written
    model, processor = load_captioner(name, the_device())
    decoding = config.prompt, config.beams, config.max_tokens
    with utils.writing(part), part.open("a", buffering=1) as file:  # line by line
        batches = in_order(len(items), config.caption_batch)
        for indices in progress(batches, desc="captions"):
            batch, images = [items[i] for i in indices], []
            for location, _ in batch:
                try:
                    images.append(location.open())
                except data.UNREADABLE:
                    fail(f"{location}: not a readable image. Replace or remove it.")
            texts = caption_images(model, processor, images, *decoding)
            for (location, label), text in zip(batch, texts):
                row = {"path": location.path, "caption": text, "by": by}
                row["bytes"] = os.path.getsize(location.file)
                if not text or repeats_itself(text):
                    # CHOICE: the class prompt in place of a caption that says nothing;
                    # alternative: leave the image out
                    row |= {"caption": class_prompts[label], "instead of": text}
                file.write(json.dumps(row) + "\n")


# -------------------------------------------------------------------------------------------------
# ITAR: image-text pairs from a pool


def shard_stamps(shards):
    """What changes when one of the pool's files does."""
    return features.stamps([(data.Location("", str(shard)), 0) for shard in shards])


@torch.no_grad()
def embed(clip, shard, folder):
    """A shard's features, cached in `folder`: {"z": (n, d), "rows": of read_shard, "damaged"}."""
    cache = folder / f"pool-{shard.stem}-{short_hash(clip.fingerprint, shard_stamps([shard]))}.pt"

    def encode():
        pairs, damaged = read_shard(shard)
        items, unreadable, z, rows = [(pair[1], row) for row, pair in enumerate(pairs)], [], [], []
        load = items, clip.preprocess, in_order(len(items), 256), clip.device, unreadable
        for images, labels in image_batches(*load):
            z.append(clip.encode_image(images).half().cpu())
            rows += labels.tolist()
        damaged += [f"{shard.name}: {pairs[row][0]} (not a readable image)" for row in unreadable]
        z = torch.cat(z) if z else torch.empty(0, 0)
        return {"z": z, "rows": rows, "damaged": damaged}

    part = utils.cached(cache, encode)
    return {**part, "z": F.normalize(part["z"].float(), dim=-1)}  # fp16 has rounded the lengths


def search(queries, parts, k):
    """Scores and ids, both (Q, k), of the k rows of the pool nearest to each query, exactly.

    queries: (Q, d), unit norm. parts: (n, d), likewise, one after another, so that a pool larger
    than memory can be searched; ids count through all of them. k is cut to the pool's size.
    """
    import faiss

    def found():
        yield torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long), 0
        for z in (z for part in parts for z in part.split(50_000) if len(z)):
            nearest = queries.numpy(), z.numpy(), min(k, len(z)), faiss.METRIC_INNER_PRODUCT
            yield *map(torch.from_numpy, faiss.knn(*nearest)), len(z)

    return merge(found(), k)


def merge(found, k):
    """Of the k nearest in each part of a pool, the k nearest in the whole: scores and ids.

    found: iterator of scores and ids, both (Q, k or less), in one part, and the part's length.
    """
    scores, ids, start = next(found)
    for some, rows, n in found:
        scores, order = torch.cat([scores, some], 1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, rows + start], 1).gather(1, order)
        scores, ids, start = scores[:, :k], ids[:, :k], start + n
    return scores, ids


def search_shard(clip, shard, folder, queries, k, hashed):
    """`search` in one shard, cached in `folder`, and the shard's length: a part for `merge`.
    hashed: short_hash(queries), which takes a while of many.
    """

    def find():
        z = embed(clip, shard, folder)["z"]
        scores, ids = search(queries, [z], k)
        return scores, ids.int(), len(z)

    key = short_hash(clip.fingerprint, shard_stamps([shard]), hashed, k)
    return utils.cached(folder / f"found-{shard.stem}-{key}.pt", find)


def queries_of(config, dataset, clip):
    """What pairs are retrieved for: Q names of images or classes, and their features (Q, d)."""
    # CHOICE: image→image by the same frozen CLIP, exact, k = 1; alternative: --query text, by the
    # class prompts; a larger --k
    if config.query == "text":
        prompts = data.prompt_templates(dataset, config.source)
        return dataset.classes, features.zero_shot_head(clip, *prompts)
    items = dataset.trainable(config.source)
    queries = features.cached_features(clip, dataset, config.source, config.run)(items)
    return [location.path for location, _ in items], queries


def retrieve(config, dataset):
    """Embed the pool, search it, and write the pairs nearest to the source's images or classes."""
    if not any(method.retrieved for method in config.methods.values()):
        return
    shards, (rank, world) = shards_of(config, dataset.meta), ranks()
    clip, cache = features.load_clip(config), config.run.parent / ".features"
    names, queries = first_alone(lambda: queries_of(config, dataset, clip))
    hashed = short_hash(queries)
    for shard in progress(shards[rank::world], desc="searching the pool"):
        search_shard(clip, shard, cache, queries, config.k, hashed)
    barrier()
    if rank > 0:
        return
    sets = [tested for tested in (dataset, data.load_unseen(dataset)) if tested]
    bench = [
        features.cached_features(clip, tested, domain, config.run)(items)
        for tested in sets for domain, items in tested.images.items()
    ]
    made_with = {flag: getattr(config, flag) for flag in ("k", "same", "query", "model", "pool")}
    inputs = clip.fingerprint, shard_stamps(shards), names, made_with
    config_hash, path = short_hash(inputs, [queries, *bench]), config.run / "retrieved.jsonl"
    if path.exists() and config_hash in path.open(errors="replace").readline():
        return print(f"{path} is there already")
    parts = (search_shard(clip, shard, cache, queries, config.k, hashed) for shard in shards)
    scores, ids = merge(parts, config.k)
    found = {}  # id in the pool: {query: score}
    for name, some_scores, some_ids in zip(names, scores.tolist(), ids.tolist()):
        for score, i in zip(some_scores, some_ids):
            found.setdefault(i, {})[name] = round(score, 4)
    embedded = ((shard, embed(clip, shard, cache)) for shard in shards)
    pairs, counts = choose(found, embedded, bench, config.same)
    said = ", ".join(f"{n} {name}" for name, n in counts.items())
    if not pairs:
        fail(f"the pool gives no pair to train on ({said}). Name another --pool, or a larger --k.")
    row = dict(method="retrieved", domain=config.source, split="train", n=counts["available"])
    results.append(config, [{**row, "measure": name, "value": n} for name, n in counts.items()])
    data.write_rows(path, [{"config_hash": config_hash, "made_with": made_with, **counts}, *pairs])
    print(f"{path}: {said} ({len(names)} queries by {config.query}, k = {config.k})")


def choose(found, parts, bench, same):
    """The pairs `found`, {id in the pool: {query: score}}, less benchmark images and duplicates, as
    lines of retrieved.jsonl; and counts. bench: [(n, d)], features of what is tested on.
    """
    chosen, counts = {}, Counter(available=0, damaged=0, retrieved=0)  # chosen: {hash: line}
    for shard, part in parts:
        ids = range(counts["available"], counts["available"] + len(part["rows"]))
        hits = [(row, found[i]) for row, i in enumerate(ids) if i in found]
        nearest = search(part["z"][[row for row, _ in hits]], bench, 1)[0] if hits else ()
        pairs = read_shard(shard)[0] if hits else ()
        for (row, queries), cosine in zip(hits, nearest):
            _, location, text, extra = pairs[part["rows"][row]]
            content = hashlib.sha256(location.read()).hexdigest()
            # CHOICE: a pair is a benchmark image at a cosine of 0.99 with one, and dropped without
            # replacement; alternative: --same; hashes of pixels, which a new JPEG escapes
            if cosine >= same:
                counts["also a benchmark image"] += 1
            elif content in chosen:
                counts["found twice"] += 1
                chosen[content]["queries"] |= queries
            else:
                place = {"path": location.file, "offset": location.offset, "size": location.size}
                place["sha256"] = content
                chosen[content] = {**place, "text": text, "queries": queries, "json": extra}
        counts.update(available=len(ids), damaged=len(part["damaged"]))
        for name in part["damaged"]:
            utils.warn(f"damaged: {name}")
    counts["retrieved"] = len(chosen)
    return [*chosen.values()], counts


def main(*argv):
    """Run a stage, main("caption", *flags), or the one that the command line names."""
    stages = {"caption": caption, "retrieve": retrieve}
    stage, *argv = argv or sys.argv[1:] or [None]
    if stage not in stages:
        fail("say what to do: python anchors.py caption|retrieve DATASET [SOURCE] [flags]")
    if stage == "retrieve":  # ARF alone takes pairs: for its methods unless others are named
        argv = ["--paper", "arf", *argv]
    stages[stage](*parse(__doc__, argv))
    leave()


if __name__ == "__main__":
    main()
