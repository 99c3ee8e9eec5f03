"""ARF's anchors: captions of the source's images, and pairs like those CLIP was pretrained on.

    python anchors.py caption pacs photo     # TCAG: captions.jsonl beside the images, for LDFS too
    python anchors.py retrieve pacs photo    # ITAR: runs/pacs-photo/pairs/
    torchrun --nproc-per-node 8 -- anchors.py caption …       # the work is split over the ranks

Both use the source's images only; ITAR compares what it retrieves with the test images to leave
them out. A killed run goes on where it stopped.
"""

import functools
import hashlib
import json
import os
import sys
from collections import Counter

import torch
import torch.nn.functional as F

import data
from batches import image_batches, in_order
from core.artifacts import artifact, artifact_path, digest, file_stamp, load, stamps
from core.config import make_parser, parse
from core.distributed import (
    agree,
    barrier,
    gather_to_main,
    get_device,
    leave,
    main_print,
    main_process_first,
    progress_bar,
    rank_and_world,
)
from core.results import record
from core.utils import fail, is_out_of_memory, warn
from data import Location
from features import (
    cached_features,
    encode_in_halves,
    features_key,
    load_captioner,
    load_clip,
    zero_shot_head,
)
from sets.load import load_run, pool_shards
from sets.webdataset import read_shard

# -------------------------------------------------------------------------------------------------
# TCAG: a caption of each image


@torch.no_grad()
def caption_images(model, processor, images, prompt="", beams=5, max_tokens=30):
    """Return the model's caption of each PIL image, without the prompt: B strings.

    CHOICE: one caption by beam search, without a hint of the class; alternative: several, sampled.
    """
    text = prompt
    if getattr(processor, "chat_template", None):  # models such as LLaVA wrap image and text
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
    batch = {"images": images, "text": [text] * len(images)}
    inputs = processor(**batch, padding=True, return_tensors="pt").to(model.device, model.dtype)
    out = model.generate(**inputs, num_beams=beams, max_new_tokens=max_tokens, do_sample=False)
    prompt_ids = inputs["input_ids"]                                                # (B, L)
    length = prompt_ids.shape[1]
    if out.shape[1] >= length and torch.equal(out[:, :length], prompt_ids):
        out = out[:, length:]  # a decoder-only language model (OPT) returns the prompt, too
    captions = processor.batch_decode(out, skip_special_tokens=True)
    return [caption.strip().removeprefix(prompt).strip() for caption in captions]


def captioner_of(settings):
    """Return a text that identifies the captioner and its decoding, as stored in captions.jsonl."""
    return (
        f"{settings.captioner}, prompt {settings.prompt!r}, beam {settings.beams}, "
        f"{settings.max_tokens} tokens"
    )


def caption_source(settings, dataset):
    """Caption the source's images that have no valid caption. People's captions always stay.

    Lines are appended to captions.jsonl as they are made, so a killed run loses one batch. Under
    torchrun each rank captions its share.
    """
    path, items = dataset.captions, dataset.trainable(settings.source)
    if settings.captions and not path.exists() and not settings.replace_captions:
        fail(f"--captions {path}: no such file. To write a new one, pass --captioner as well.")
    rows, by = data.read_captions(path) if path.exists() else {}, captioner_of(settings)

    def valid(location):
        row = rows.get(data.image_key(location.path))
        by_another = settings.replace_captions and row and row.get("by", by) != by
        return row is not None and data.valid_caption(row, location) and not by_another

    missing = agree([i for i, (location, _) in enumerate(items) if not valid(location)])
    if not missing:
        return
    name, images = settings.captioner, {data.image_key(at.path) for at, _ in items}
    main_print(f"{path}: {len(missing)} of {len(items)} captions are missing; {name} writes them")
    if unmatched := rows.keys() - images:
        main_print(f"{path}: {len(unmatched)} rows match no image of {settings.source}")
    write_captions(settings, [items[i][0] for i in missing], path, by)
    barrier()


def end_last_line(path):
    """Let a captions file end with a whole line. If a killed run left half a row, remove it; add a
    missing line end to a whole row.
    """
    content = path.read_bytes() if path.exists() else b""
    last = content.split(b"\n")[-1]
    if not last.strip():
        return
    try:
        json.loads(last)
    except ValueError:
        if path.stat().st_size == len(content):  # otherwise another run is writing it now
            os.truncate(path, len(content) - len(last))
    else:
        with open(path, "ab") as file:
            file.write(b"\n")


def write_captions(settings, locations, path, by):
    """Append a line {"path", "caption", "by", "size", "time"} to `path` for each image.

    Under torchrun each rank captions its share, and rank 0 writes, because several machines cannot
    append to one file of a network file system.
    """
    (rank, world), size = rank_and_world(), settings.caption_batch
    own, rounds = locations[rank::world], -(-len(locations[::world]) // size)
    decoding, device = (settings.prompt, settings.beams, settings.max_tokens), get_device()
    try:
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            end_last_line(path)
            append_lines(path, [])  # before the captioner is loaded: fails if this cannot work
        model, processor = load_captioner(settings.captioner, device)
        batches = image_batches(in_order(own, size), None, device)
        for _ in progress_bar(range(rounds), desc="captions"):
            images, places = next(batches, ([], []))  # a rank may have none in the last round
            captions = caption_images(model, processor, images, *decoding) if images else []
            lines = [caption_line(at, caption, by) for at, caption in zip(places, captions)]
            lines = gather_to_main(lines)
            if rank == 0:
                append_lines(path, lines)
    except OSError as error:
        fail(f"{path}: could not be written ({error.strerror}). Make room, or pass --captions.")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory with --caption-batch {size}. Pass {max(1, size // 4)}; it goes on.")


def append_lines(path, lines):
    """Append lines to a file in one write, so that a kill leaves all of them or none."""
    content = "".join(lines).encode()
    with open(path, "ab", buffering=0) as file:
        written = file.write(content)
        if written < len(content):  # the disk is full, and a second write raises the reason
            file.write(content[written:])


def caption_line(location, caption, by):
    size, time = file_stamp(location.file)
    row = {"path": location.path, "caption": caption, "by": by, "size": size, "time": time}
    return json.dumps(row) + "\n"


def caption_summary(settings, dataset):
    """Return a line about the source's captions, and warn about flags that changed nothing."""
    rows, items = data.read_captions(dataset.captions), dataset.trainable(settings.source)
    texts, by = data.captions(dataset, items), captioner_of(settings)
    used = [rows[data.image_key(location.path)] for location, _ in items]
    by_another = sum(row.get("by") != by for row in used)
    parser = make_parser()
    flags = ("prompt", "beams", "max_tokens")
    if by_another and any(getattr(settings, f) != parser.get_default(f) for f in flags):
        warn(f"{by_another} captions existed before, not by --prompt, --beams, --max-tokens")
    replaced = sum(text != row["caption"] for text, row in zip(texts, used))
    return (
        f"{dataset.captions}: {len(texts)} captions, {len(set(texts))} different, "
        f"{sum('by' not in row for row in used)} not by a captioner; the class prompt replaces "
        f"{replaced} that are empty or repeat themselves"
    )


# -------------------------------------------------------------------------------------------------
# ITAR: image-text pairs from a pool


def shard_stamps(shards):
    """Return what changes when a shard of the pool does; its folder is not part of it."""
    return [(shard.name, *file_stamp(shard)) for shard in shards]


@torch.no_grad()
def embed_shard(clip, shard, folder):
    """Return a shard's features {"z": (n, d), "rows": positions in read_shard, "damaged": names}.

    They are stored in `folder`, in half precision.
    """

    def encode():
        pairs, damaged = read_shard(shard)
        row_of = {location: row for row, (_, location, _, _) in enumerate(pairs)}
        unreadable, z, rows = {}, [], []
        keys = in_order([*row_of], 256)
        for images, places in image_batches(keys, clip.preprocess, clip.device, unreadable):
            z.append(encode_in_halves(clip, images).half())
            rows += [row_of[location] for location in places]
        damaged += [
            f"{shard.name}: {pairs[row_of[location]][0]} ({reason})"
            for location, reason in unreadable.items()
        ]
        return {"z": torch.cat(z) if z else torch.empty(0, 0), "rows": rows, "damaged": damaged}

    inputs = (*features_key(clip, []), shard_stamps([shard]))
    content = artifact(artifact_path(folder, f"pool-{shard.stem}", inputs), encode)
    return {**content, "z": F.normalize(content["z"].float(), dim=-1)}  # half precision rounded


def search(queries, parts, k):
    """Return scores and ids, both (Q, k), of the k rows of the pool nearest to each query, exactly.

    queries: (Q, d), unit norm. parts: tensors (n, d), unit norm, so that a pool larger than memory
    can be searched; ids count through all parts. k is at most the pool's size. The search runs on
    the device of the queries; what is returned is on the CPU. On a CPU, FAISS is faster from some
    400 queries on.
    """
    import faiss

    def nearest_of_parts():
        for z in (z for part in parts for z in part.split(50_000) if len(z)):
            n = min(k, len(z))
            if queries.is_cuda or len(queries) < 400:
                scores, ids = top_k(queries, z.to(queries.device), n)
            else:
                scores, ids = map(torch.from_numpy, faiss.knn(
                    queries.numpy(), z.numpy(), n, faiss.METRIC_INNER_PRODUCT
                ))
            yield scores, ids, len(z)

    return merge(nearest_of_parts(), len(queries), k)


def top_k(queries, z, k):
    """Return the k largest cosines of each query, (Q, k), and their rows of z; on the CPU.

    Of equal cosines the lower row comes first, as torch.topk does not promise.
    """
    parts = []
    for block in queries.split(max(1, 2**25 // len(z))):
        cosines = block @ z.T                                                            # (b, n)
        # a float's bits, read as an integer, are in the float's order; those below 0 are mirrored
        order = cosines.view(torch.int32).long()
        order = torch.where(order < 0, -(order & 0x7FFFFFFF), order)
        keys = order * 2**32 - torch.arange(len(z), device=z.device)
        ids = -keys.topk(k, dim=1).values % 2**32
        parts.append((cosines.gather(1, ids).cpu(), ids.cpu()))
    return tuple(map(torch.cat, zip(*parts)))


def merge(parts, n_queries, k):
    """Return scores and ids, both (Q, k), of the k nearest in the pool, from those of its parts.

    parts: iterator of (scores (Q, ≤ k), ids (Q, ≤ k) within the part, length of the part).
    """
    scores, ids = torch.empty(n_queries, 0), torch.empty(n_queries, 0, dtype=torch.long)
    start = 0
    for part_scores, part_ids, length in parts:
        candidates = torch.cat([scores, part_scores], 1)
        scores, order = candidates.sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, part_ids + start], 1).gather(1, order)
        scores, ids, start = scores[:, :k], ids[:, :k], start + length
    return scores, ids


def search_shard(clip, shard, folder, queries, key, k):
    """Return (scores, ids, length) of `search` in one shard, a part of `merge`; it is stored in
    `folder`. key: a hash of the queries.
    """

    def find():
        z = embed_shard(clip, shard, folder)["z"]
        scores, ids = search(queries, [z], k)
        return scores, ids.int(), len(z)

    inputs = (*features_key(clip, []), shard_stamps([shard]), key, k)
    return artifact(artifact_path(folder, f"nearest-{shard.stem}", inputs), find)


def query_names(settings, dataset):
    """Return what pairs are retrieved for: paths of the source's images, or class folders."""
    if settings.query == "text":
        return dataset.classes
    return [location.path for location, _ in dataset.trainable(settings.source)]


def query_features(settings, dataset, clip):
    """Return the features (Q, d) of the queries.

    CHOICE: image to image by the same frozen CLIP, exact, k = 1; alternative: --query text, by the
    class prompts; a larger --k.
    """
    if settings.query == "text":
        return zero_shot_head(clip, *data.prompt_templates(dataset, settings.source))
    items = dataset.trainable(settings.source)
    return cached_features(clip, dataset, settings.source, items, settings.cache)


def retrieve_pairs(settings, dataset, clip):
    """Return {"pairs": [{"shard", "offset", "size", "text", "queries": {name: score}}], "counts"}.

    Every image of the source is a query; a seed trains on the pairs of its own training images. The
    outcome is stored in the run folder. Under torchrun each rank searches its share of the shards.
    """
    shards = pool_shards(settings, dataset.meta)
    test_sets = [tested for tested in (dataset, dataset.unseen) if tested]
    classnames, templates = data.prompt_templates(dataset, settings.source)
    inputs = (
        clip.key, stamps(dataset.trainable(settings.source)), shard_stamps(shards),
        settings.query, settings.k, settings.same,
        [template(name) for template in templates for name in classnames],
        [stamps(items) for tested in test_sets for items in tested.images.values()],
    )
    path = artifact_path(settings.run / "pairs", "retrieved", inputs, ".json")
    if not agree(path.exists()):
        queries = query_features(settings, dataset, clip)
        key = digest(queries)
        queries = queries.to(clip.device)
        rank, world = rank_and_world()
        for shard in progress_bar(shards[rank::world], desc="searching the pool"):
            search_shard(clip, shard, settings.cache, queries, key, settings.k)
        barrier()
        choose = functools.partial(
            choose_pairs, settings, dataset, clip, shards, queries, key, test_sets
        )
        main_process_first(lambda: artifact(path, choose))
    return load(path)


def choose_pairs(settings, dataset, clip, shards, queries, key, test_sets):
    """Return the content of `retrieve_pairs` from the shards' nearest pairs."""
    nearest = (
        search_shard(clip, shard, settings.cache, queries, key, settings.k) for shard in shards
    )
    scores, ids = merge(nearest, len(queries), settings.k)
    bench = [
        cached_features(clip, tested, domain, items, settings.cache)
        for tested in test_sets for domain, items in tested.images.items()
    ]
    queries_of = {}  # {id in the pool: {query: score}}
    names = query_names(settings, dataset)
    for name, query_scores, query_ids in zip(names, scores.tolist(), ids.tolist()):
        for score, i in zip(query_scores, query_ids):
            queries_of.setdefault(i, {})[name] = round(score, 4)
    embedded = ((shard, embed_shard(clip, shard, settings.cache)) for shard in shards)
    pairs, counts = deduplicate(queries_of, embedded, bench, settings.same)
    if not pairs:
        summary = ", ".join(f"{n} {name}" for name, n in counts.items())
        fail(f"the pool has no pair to train on ({summary}). Pass another --pool, or a larger --k.")
    return {"pairs": pairs, "counts": counts}


def deduplicate(queries_of, embedded, bench, same):
    """Return the retrieved pairs without test images and duplicates, and counts.

    queries_of: {id in the pool: {query: score}}. embedded: (shard, its features) in the pool's
    order. bench: tensors (n, d) of all test images.
    CHOICE: a pair counts as a test image at a cosine of 0.99 with one, and is dropped without
    replacement; alternative: --same; hashes of pixels, which a new JPEG escapes.
    """
    pairs, counts = {}, Counter(available=0, damaged=0, retrieved=0)  # pairs: {hash of image: pair}
    for shard, part in embedded:
        start = counts["available"]
        rows = [row for row in range(len(part["rows"])) if start + row in queries_of]
        nearest = search(part["z"][rows], bench, 1)[0] if rows else ()
        members = read_shard(shard)[0] if rows else ()
        for row, cosine in zip(rows, nearest):
            _, location, text, _ = members[part["rows"][row]]
            queries = queries_of[start + row]
            content = hashlib.sha256(location.read()).hexdigest()
            if cosine >= same:
                counts["also a test image"] += 1
            elif content in pairs:
                counts["found twice"] += 1
                pairs[content]["queries"] |= queries
            else:
                pairs[content] = {
                    "shard": shard.name, "offset": location.offset, "size": location.size,
                    "text": text, "queries": dict(queries),
                }
        counts.update(available=len(part["rows"]), damaged=len(part["damaged"]))
        for name in part["damaged"]:
            warn(f"damaged: {name}")
    counts["retrieved"] = len(pairs)
    return [*pairs.values()], dict(counts)


def pair_location(settings, dataset, pair):
    """Return the Location of a retrieved pair's image in the pool."""
    folder = pool_shards(settings, dataset.meta)[0].parent
    return Location(str(folder), pair["shard"], pair["offset"], pair["size"])


def pairs_of(settings, dataset, clip, items):
    """Return [(Location, text)] of the pairs retrieved for these training items, or for a class."""
    queries = {location.path for location, _ in items} | {*dataset.classes}
    pairs = retrieve_pairs(settings, dataset, clip)["pairs"]
    own = [pair for pair in pairs if queries & pair["queries"].keys()]
    if not own:
        fail("no retrieved pair belongs to these training images. Pass a larger --k.")
    folder = str(pool_shards(settings, dataset.meta)[0].parent)
    return [
        (Location(folder, pair["shard"], pair["offset"], pair["size"]), pair["text"])
        for pair in own
    ]


def pair_records(settings, dataset, clip):
    """Return a record of how many pairs were available, damaged, dropped and retrieved."""
    counts = retrieve_pairs(settings, dataset, clip)["counts"]
    return [record(settings, "pairs", "retrieved", 0, counts, counts["available"])]


def main():
    """Run one stage: anchors.py caption|retrieve DATASET [SOURCE] [flags]."""
    stage, *argv = sys.argv[1:] or [""]
    if stage in ("-h", "--help"):
        print(f"{__doc__}\npython anchors.py caption --help, retrieve --help: the flags of a stage")
        return
    if stage not in ("caption", "retrieve"):
        fail("name a stage: python anchors.py caption|retrieve DATASET [SOURCE] [flags]")
    settings, dataset = load_run(parse(__doc__, argv, stage))
    if stage == "caption":
        caption_source(settings, dataset)
        if rank_and_world()[0] == 0:
            print(caption_summary(settings, dataset))
    else:
        counts = retrieve_pairs(settings, dataset, load_clip(settings))["counts"]
        main_print("pairs: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    leave()


if __name__ == "__main__":
    main()
