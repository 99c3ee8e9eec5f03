"""Webdataset shards: tars of KEY.jpg and KEY.txt; evaluation sets in clip-benchmark's layout."""

import json
import tarfile
from dataclasses import replace
from utils import fail, warn

from data import Location

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_shard(path, text_ending="txt"):
    """[(key, Location, text, json)] of a shard, and [name] of what in it cannot be used.

    An image is KEY.jpg, .png or .webp, its text KEY.txt (or another ending), what else is known of
    it KEY.json (optional). Only tar headers, texts and JSON are read.
    """
    images, texts, extras, bad, end = {}, {}, {}, [], 0
    damage = "{}: what begins at byte {} (damaged header)"
    try:
        # tarfile takes a damaged header for the tar's end, unless it is to ignore zeros
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for member in tar:
                if member.offset > end and not tar.pax_headers:  # (they are no member)
                    bad.append(damage.format(path.name, end))
                end = tar.offset
                key, _, ending = member.name.rpartition(".")
                if f".{ending}" in IMAGE_ENDINGS:
                    at = member.offset_data, member.size
                    images[key] = Location(str(path.parent), path.name, *at)
                elif ending == text_ending:
                    texts[key] = tar.extractfile(member).read().decode(errors="replace").strip()
                elif ending == "json":
                    try:
                        extras[key] = json.loads(tar.extractfile(member).read())
                    except ValueError:
                        bad.append(f"{path.name}: {member.name} (not JSON)")
            tar.fileobj.seek(end)
            if tar.fileobj.read().strip(b"\0"):
                bad.append(damage.format(path.name, end))
    except OSError as error:  # of the disk, not of the shard: it may be whole the next time
        fail(f"{path} cannot be read ({error.strerror}). Put it back, or check its permissions.")
    except (tarfile.TarError, EOFError) as error:
        bad.append(f"{path.name} after {len(images)} images ({error})")
    bad += [f"{path.name}: {key} (no text)" for key in images if not texts.get(key)]
    whole = [key for key in images if texts.get(key)]
    return [(key, images[key], texts[key], extras.get(key, {})) for key in whole], bad


def read_webdatasets(root, sets):
    """{domain: items}, {domain: (classnames, templates)}, {absent domain: how to get it}.

    sets: {domain: {"folder" in root, "count" of test images, maybe "border", "by_hand"}}. A folder
    holds test/0.tar … (KEY.webp, .jpg or .png with KEY.cls, a number), test/nshards.txt,
    classnames.txt, zeroshot_classification_templates.txt.
    Exits with status 2 where one is there, but not whole.
    """
    images, heads, absent = {}, {}, {}
    for domain, entry in sets.items():
        folder = root / entry["folder"]
        if not folder.is_dir():
            fetched = f"fetched from clip-benchmark/{folder.name} by: python data.py imagenet"
            absent[domain] = f"{folder} is not there; it is {entry.get('by_hand', fetched)}"
            continue
        try:
            names = (folder / "classnames.txt").read_text().splitlines()
            templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
            n_shards = int((folder / "test/nshards.txt").read_text())
        except (OSError, ValueError) as error:
            fail(f"{folder} is not a webdataset of clip-benchmark ({error}). Fetch it again.")
        pairs, bad = [], [] if templates else ["no templates"]
        for shard in (folder / "test" / f"{n}.tar" for n in range(n_shards)):
            found, damaged = read_shard(shard, "cls")
            pairs += found
            bad += damaged
        nameless = [y for _, _, y, _ in pairs if not y.isdigit() or int(y) >= len(names)]
        bad += [f"labels without a name, {y}" for y in nameless]
        if bad or not pairs:
            fail(f"{folder} is damaged: {[*bad, 'no images'][0]}. Fetch it again, or remove it.")
        if len(pairs) != entry["count"]:
            warn(f"{folder} holds {len(pairs)} test images, {entry['count']} are published")
        # CHOICE: ObjectNet's red frame is cut off; alternative: leave it
        border = entry.get("border", 0)
        images[domain] = [(replace(at, border=border), int(y)) for _, at, y, _ in pairs]
        # CHOICE: the templates that clip-benchmark gives to each set; alternative: one of ours
        heads[domain] = names, [template.replace("{c}", "{}") for template in templates]
    return images, heads, absent
