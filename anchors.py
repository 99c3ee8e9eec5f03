"""ARF's anchors: captions of the finetuning images, and image-text pairs like those that CLIP was pretrained on.

    python anchors.py caption pacs photo                       # TCAG: captions.jsonl beside the data; LDFS reads it too
    python anchors.py retrieve pacs photo --pool data/cc3m     # ITAR: runs/pacs-photo/retrieved/*.tar
    python anchors.py caption,retrieve emoji 3d                # both
    torchrun --nproc-per-node 8 -- anchors.py caption …        # the work is split over eight processes

Both look at images of the source only (ITAR at all others, too, but only to keep them out of what it retrieves). Both can
be killed at any moment and go on where they stopped.
"""

import functools
import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import data
from data import fail
from features import (
    BROKEN,
    cached_features,
    encode_batch,
    encode_head,
    image_batches,
    in_order,
    load_clip,
    open_image,
    precision,
    ranks,
    read_member,
    the_device,
)
from methods import chosen, recipes_of

DEFAULT_CAPTIONER = "Salesforce/blip2-opt-2.7b"

# ---------------------------------------------------------------------------------------------------------------------
# TCAG: a caption for each image


def load_captioner(name, device):
    """(model, processor) of an image-to-text model on the Hugging Face hub, or saved in a folder.

    Any that AutoModelForImageTextToText knows and that brings a processor: BLIP, BLIP-2, LLaVA's kind.
    Exits with status 2 where it cannot be had, or is of another kind.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=precision(device)).to(device).eval()
        processor = AutoProcessor.from_pretrained(name)
        processor.tokenizer.padding_side = "left"  # what is generated goes on from the prompt's last token
    except Exception as error:  # whatever the hub, a damaged file or a bad config raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fail(
            f"--captioner {name}: could not be loaded ({reason}). It is the name of an image-to-text model on the Hugging Face "
            "hub, cached after the first time, or a folder that save_pretrained wrote."
        )
    return model, processor


@torch.no_grad()
def caption_images(model, processor, images, prompt="", beams=5, max_tokens=30):
    """One string for each PIL image: what the model says of it, without the prompt. "" where it says nothing.

    CHOICE: one caption an image by beam search, no hint of the class; alternative: several sampled ones, a prompt.
    """
    text = prompt
    if getattr(processor, "chat_template", None):  # LLaVA's kind wants its own words around image and prompt
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=images, text=[text] * len(images), padding=True, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    said = model.generate(**inputs, num_beams=beams, max_new_tokens=max_tokens, do_sample=False)
    asked = inputs["input_ids"]
    if said.shape[1] >= asked.shape[1] and torch.equal(said[:, :asked.shape[1]], asked):
        said = said[:, asked.shape[1]:]  # a decoder-only language model (OPT) returns the prompt, too
    return [c.strip().removeprefix(prompt).strip() for c in processor.batch_decode(said, skip_special_tokens=True)]


def repeats_itself(caption):
    """Whether words come three times in a row, as in "a cat a cat a cat": how beam search fails."""
    return re.search(r"\b(\w[\w ]*?)\b(?:,? \1\b){2}", caption) is not None


def caption(args):
    """Write a caption for every image of the source domain that has none from this captioner, or from somewhere else."""
    if args.methods and not any(m.needs_captions for m in chosen(args).values()):
        return  # no method asks for captions
    dataset, _ = data.prepare(args, data.load(args.dataset, args.data))
    if args.methods and recipes_of(chosen(args)):
        dataset.styles(args.source)  # before hours of captions that no mapper could use
    path = Path(args.captions) if args.captions else dataset.captions or dataset.folder / "captions.jsonl"
    rank, world = ranks()
    name = args.captioner or dataset.about.get("captioner") or DEFAULT_CAPTIONER
    by = f"{name}, prompt {args.prompt!r}, beam {args.beams}, {args.max_tokens} tokens"

    def good(rows):  # people's captions (they have no "by") stay; another captioner's give way to one that was asked for
        return {p: row for p, row in rows.items() if row["caption"] and (not args.captioner or row.get("by", by) == by)}

    def parts():
        return sorted(path.parent.glob(f".{path.name}.part*"))

    finished = good(data.read_captions(path)) if path.exists() else {}
    for part in parts():
        finished |= good(read_part(part))
    labels = dict(dataset.trainable(args.source))
    todo = [p for p in list(labels)[rank::world] if p not in finished]
    if world > 1:
        torch.distributed.barrier()  # nobody writes before all have read
    if todo:
        device = the_device()
        model, processor = load_captioner(name, device)
        class_prompts = data.class_texts(dataset, args.source)
        mine = path.with_name(f".{path.name}.part{rank}")
        rows = read_part(mine) if mine.exists() else {}
        try:
            data.write_atomically(mine, lambda new: new.write_text(lines(rows.values())))  # less a line that a kill cut short
        except OSError as error:
            fail(f"{path}: captions cannot be written there ({error.strerror}). Name another file with --captions.")
        with open(mine, "a") as file, tqdm(total=len(todo), desc="captions", unit="img", disable=rank > 0) as bar:
            for i in range(0, len(todo), args.caption_batch):
                batch = todo[i:i + args.caption_batch]
                images = []
                for p in batch:
                    try:
                        images.append(open_image(dataset.folder, p))
                    except BROKEN:
                        fail(f"{dataset.folder / p}: not a readable image. Replace or remove it; what is captioned is kept.")
                texts = caption_images(model, processor, images, args.prompt, args.beams, args.max_tokens)
                for p, text in zip(batch, texts):
                    row = {"path": p, "caption": text, "by": by}
                    if not text or repeats_itself(text):
                        # CHOICE: the class prompt in place of a caption that says nothing; alternative: leave the image out
                        row |= {"caption": class_prompts[labels[p]], "instead of": text}
                    file.write(lines([row]))
                file.flush()
                bar.update(len(batch))
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        before = data.read_captions(path) if path.exists() else {}
        rows = before | {p: row for part in parts() for p, row in good(read_part(part)).items()}
        if rows != before:
            data.write_atomically(path, lambda new: new.write_text(lines(rows[p] for p in sorted(rows))))
        for part in parts():
            part.unlink()
        of_source = [rows[p] for p in labels]
        fallen = [row["instead of"] for row in of_source if "instead of" in row]
        others = sum("by" not in row for row in of_source)
        print(
            f"{path}: {len(labels)} captions of {args.source}, {len({row['caption'] for row in of_source})} different; "
            f"{others} not by a captioner; the class prompt instead of {sum(not f for f in fallen)} that were empty and "
            f"{sum(map(bool, fallen))} that repeated themselves"
        )
    if world > 1:
        torch.distributed.barrier()  # from here on the file is there for all


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_part(path):
    """{image path: row} of a file that a killed run may have left with half a line at its end."""
    whole = path.read_text().rpartition("\n")[0]
    return {row["path"]: row for row in map(json.loads, whole.splitlines())}


# ---------------------------------------------------------------------------------------------------------------------
# ITAR: image-text pairs from a pool


def asks_for_pairs(args):
    """Whether one of --methods takes retrieved pairs, or none is named."""
    return not args.methods or any(m.retrieved for m in chosen(args).values())


def make_pool(args, dataset):
    """The folder of the pool, made where this repository knows how: CC3M from the hub, that of the emoji benchmark.

    Exits with status 2 where it does not.
    """
    pool = Path(args.pool or dataset.folder.parent / dataset.about.get("pool", "cc3m"))
    if any(pool.glob("*.tar")):
        return pool
    if pool.name == "cc3m":
        data.fetch_cc3m(pool)
    elif pool.name == "emoji_pool":
        data.make_emoji("pool", pool.parent)
    else:
        fail(
            f"--pool {pool}: no webdataset shards there (00000.tar with KEY.jpg, KEY.txt). Name another folder; or none, "
            "and CC3M is fetched."
        )
    return pool


def embed(clip, shard, out):
    """Features of the images of one shard, written to `out` once: {"keys", "z" (n, d) fp16, "bad"}, in the shard's order."""
    if out.exists():
        return
    pairs, bad = data.read_shard(shard)
    unreadable, features, rows = [], [], []
    items = [(where, i) for i, (_, where, _, _) in enumerate(pairs)]
    batches = in_order(len(items), 256)
    for images, labels in image_batches(shard.parent, items, clip.preprocess, batches, clip.device, unreadable):
        features.append(encode_batch(clip, images).half().cpu())
        rows += labels.tolist()
    bad += [f"{shard.name}: {pairs[i][0]} (not a readable image)" for i in unreadable]
    z = torch.cat(features) if features else torch.empty(0, 0, dtype=torch.float16)
    state = {"keys": [pairs[i][0] for i in rows], "z": z, "bad": bad}
    data.write_atomically(out, lambda part: torch.save(state, part))


def search(queries, parts, k):
    """Scores and ids, both (Q, k), of the k rows of the pool nearest to each query, exactly; ids count through all parts.

    queries: (Q, d), unit norm. parts: (n, d) float32 tensors, unit norm, one after another, so that a pool larger than memory
    can be searched; each is searched with FAISS's IndexFlatIP, and the best of all parts are kept. k is cut to the pool's size.
    """
    import faiss

    scores, ids, seen = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long), 0
    for z in parts:
        if len(z):
            index = faiss.IndexFlatIP(z.shape[1])
            index.add(z.numpy())
            found = index.search(queries.numpy(), min(k, len(z)))
            scores = torch.cat([scores, torch.from_numpy(found[0])], 1)
            ids = torch.cat([ids, torch.from_numpy(found[1]) + seen], 1)
            best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
            scores, ids = scores.gather(1, best), ids.gather(1, best)
        seen += len(z)
    return scores, ids


def retrieve(args):
    """Embed the pool, search it, and write runs/…/retrieved/*.tar: the pairs nearest to the source's images or classes."""
    if not asks_for_pairs(args):
        return
    dataset, run = data.prepare(args, data.load(args.dataset, args.data))
    pool = make_pool(args, dataset)
    shards = sorted(pool.glob("*.tar"))
    rank, world = ranks()
    clip = load_clip(args, dataset)
    cached = {}  # shard: its features' file, whose name hangs on the model and the shard
    for shard in shards:
        stat = shard.stat()
        key = repr((clip.fingerprint, str(shard.resolve()), stat.st_size, stat.st_mtime_ns))
        cached[shard] = run.parent / ".features" / f"pool-{pool.name}-{shard.stem}-{data.sha(key)}.pt"
    for shard in tqdm(shards[rank::world], desc=f"encoding {pool.name}", unit="shard", disable=rank > 0):
        embed(clip, shard, cached[shard])
    if world > 1:
        torch.distributed.barrier()
    if rank > 0:
        return

    # CHOICE: image→image by the same frozen CLIP, exact, k = 1; alternative: --query text, by the class prompts; a larger --k
    if args.query == "image":
        row, z = cached_features(clip, dataset, args.source, run)
        names = [path for path, _ in dataset.trainable(args.source)]
        z = z[[row[path] for path in names]]
    else:
        names, z = dataset.classes, encode_head(clip, data.prompts(dataset, args.source))
    tested = [one for one in (dataset, data.load_unseen(dataset)) if one]
    bench = [cached_features(clip, one, domain, run)[1] for one in tested for domain in one.images]
    final, parts = run / "retrieved", [path.name for path in cached.values()]
    made_of = data.sha(repr((parts, args.k, args.same, names, data.digest([z, *bench]))))
    if (final / "made_of.json").exists() and json.loads((final / "made_of.json").read_text())["made_of"] == made_of:
        print(f"{final} is there already")
        return

    def load(shard):
        part = torch.load(cached[shard])
        return {**part, "z": torch.nn.functional.normalize(part["z"].float(), dim=-1)}  # fp16 has rounded the lengths

    bar = tqdm(shards, desc=f"searching {pool.name}", unit="shard")
    scores, ids = search(z, (load(shard)["z"] for shard in bar), args.k)
    wanted = {}  # id in the pool: {query: score}
    for name, some_scores, some_ids in zip(names, scores.tolist(), ids.tolist()):
        for score, i in zip(some_scores, some_ids):
            wanted.setdefault(i, {})[name] = round(score, 4)

    dropped, bad, start, pairs = Counter(), [], 0, {}  # pairs: {hash of the image: (name, where, text, about)}
    for shard in tqdm(shards, desc="choosing", unit="shard"):
        part = load(shard)
        bad += part["bad"]
        here = [i for i in range(start, start + len(part["keys"])) if i in wanted]
        if here:
            of_shard = {key: rest for key, *rest in data.read_shard(shard)[0]}
            nearest = search(part["z"][[i - start for i in here]], bench, 1)[0][:, 0]
            for i, closest in zip(here, nearest.tolist()):
                key = part["keys"][i - start]
                where, text, about = of_shard[key]
                content = hashlib.sha256(read_member(where)).digest()
                # CHOICE: a pair is a benchmark image at a cosine of 0.99 with one, and dropped without replacement;
                # alternative: --same; hashes of pixels, which a new JPEG of the same picture escapes
                if closest >= args.same:
                    dropped["also a benchmark image"] += 1
                elif content in pairs:
                    dropped["found twice"] += 1
                    queries = pairs[content][-1]["retrieved"]["queries"]
                    queries |= {query: max(score, queries.get(query, -1)) for query, score in wanted[i].items()}
                else:
                    about = {**about, "retrieved": {"from": shard.name, "queries": wanted[i]}}
                    pairs[content] = f"{shard.stem}-{key}", where, text, about
        start += len(part["keys"])
    counts = {"available": start, "damaged": len(bad), "retrieved": len(pairs), **dropped}
    write_retrieved(final, [*pairs.values()], {"made_of": made_of, **counts})
    data.append_results(run, args, [("retrieved", args.source, "train", name, n, start, 0) for name, n in counts.items()])
    for name in bad:
        print(f"damaged: {name}", file=sys.stderr)
    said = ", ".join(f"{n} {name}" for name, n in counts.items())
    print(f"{final}: {said} ({len(names)} queries by {args.query}, k = {args.k})")


def write_retrieved(final, pairs, about, shard_size=10_000):
    """Write (key, where the image is, text, json) as webdataset shards, and made_of.json, in the place of `final`."""
    scratch = final.with_name(f".{final.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for start in range(0, len(pairs), shard_size):
        with tarfile.open(scratch / f"{start // shard_size:05d}.tar", "w") as tar:
            for key, where, text, more in pairs[start:start + shard_size]:
                image = read_member(where)
                ending = {b"\x89PNG": ".png", b"RIFF": ".webp"}.get(image[:4], ".jpg")
                for suffix, content in (ending, image), (".txt", text.encode()), (".json", json.dumps(more).encode()):
                    info = tarfile.TarInfo(key + suffix)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (scratch / "made_of.json").write_text(json.dumps(about, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)


@functools.cache
def read_retrieved(run):
    """[(where, text, {query: score})] of all pairs in run/retrieved; exits with status 2 where there are none."""
    shards = sorted((run / "retrieved").glob("*.tar"))
    if not shards:
        fail(f"{run / 'retrieved'} holds no pairs. Retrieve them: python anchors.py retrieve DATASET SOURCE")
    pairs = [pair for shard in shards for pair in data.read_shard(shard)[0]]
    return [(where, text, about["retrieved"]["queries"]) for _, where, text, about in pairs]


def load_retrieved(run, dataset, items):
    """[(where, text)] of the pairs in run/retrieved that were found by one of the training images `items`, or by a class.

    All images of the source are queries once; a seed's training takes what its own training images found, no more.
    """
    mine = {path for path, _ in items} | {*dataset.classes}
    found = [(where, text) for where, text, queries in read_retrieved(run) if mine & {*queries}]
    if not found:
        fail(f"{run / 'retrieved'} holds no pair that one of these training images found. Retrieve anew, with a larger --k.")
    return found


def main():
    stages = {"caption": caption, "retrieve": retrieve}
    wanted = sys.argv[1].split(",") if len(sys.argv) > 1 else []
    if not wanted or not {*wanted} <= {*stages}:
        fail("say what to do: python anchors.py caption|retrieve|caption,retrieve DATASET SOURCE")
    parser = data.arguments(__doc__)
    parser.prog = f"anchors.py {sys.argv[1]}"
    args = parser.parse_args(sys.argv[2:])
    if "retrieve" in wanted and asks_for_pairs(args):
        make_pool(args, data.load(args.dataset, args.data))  # before hours of captions
    for stage in wanted:
        stages[stage](args)
    if ranks()[1] > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
