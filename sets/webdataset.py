"""Webdataset shards: tars of KEY.jpg and KEY.txt; test sets in clip-benchmark's layout."""

import json
import posixpath
import tarfile
from dataclasses import replace

from core.utils import fail, warn
from data import IMAGE_SUFFIXES, Location, is_hidden


def read_shard(path, text_suffix=".txt"):
    """Return [(key, Location, text, json)] of a shard, and a list of what cannot be used.

    An image is KEY.jpg, .png …, its text KEY.txt (or another suffix), and what else is known of it
    is KEY.json, if there is one. Suffixes are in upper or lower case. Only tar headers, texts and
    JSON are read. Exits with status 2 if the disk cannot be read.
    """
    images, texts, extras = {}, {}, {}
    try:
        members, skipped, damages = read_members(path)
        with open(path, "rb") as file:
            for name, member in members.items():
                key, suffix = posixpath.splitext(name)
                suffix = suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    place = member.offset_data, member.size
                    images[key] = Location(str(path.parent), path.name, *place)
                elif suffix == text_suffix:
                    texts[key] = read_member(file, member).decode(errors="replace").strip()
                elif suffix == ".json":
                    try:
                        extras[key] = json.loads(read_member(file, member))
                    except (ValueError, RecursionError):
                        damages.append(f"{name} (not JSON)")
    except OSError as error:  # of the disk; the shard may be undamaged
        fail(f"{path} cannot be read ({error.strerror}). Put it back, or check its permissions.")
    reasons = {key: "no text" for key in images if not texts.get(key)}
    reasons |= {key: "no image" for key in texts if key not in images}
    reasons |= {posixpath.splitext(name)[0]: "not a file" for name in skipped}
    damages += [f"{key} ({reason})" for key, reason in reasons.items()]
    pairs = [
        (key, location, texts[key], extras.get(key, {}))
        for key, location in images.items() if texts.get(key)
    ]
    return pairs, [f"{path.name}: {damage}" for damage in damages]


def read_member(file, member):
    """Return the bytes of a tar's member, b"" if the tar is cut off in it."""
    file.seek(member.offset_data)
    content = file.read(member.size)
    return content if len(content) == member.size else b""


def read_members(path):
    """Return {name: TarInfo} of a tar's files, a list of names that are no files, and of damages.

    A link to a member stands for that member. Folders and hidden files are left out.
    """
    files, links, skipped, damages, end = {}, {}, [], [], 0
    try:
        # Without ignore_zeros, tarfile takes a damaged header for the end of the tar.
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for member in tar:
                if member.offset > end and not tar.pax_headers:  # pax headers are no members
                    damages.append(f"what begins at byte {end} (damaged header)")
                end = tar.offset
                name = posixpath.normpath(member.name)
                if member.isdir() or any(is_hidden(part) for part in name.split("/")):
                    continue
                if member.isreg():
                    files[name] = member
                elif member.issym() or member.islnk():
                    folder = posixpath.dirname(name) if member.issym() else ""
                    links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
                else:
                    skipped.append(name)
            tar.fileobj.seek(end)
            if tar.fileobj.read().strip(b"\0"):
                damages.append(f"what begins at byte {end} (damaged header)")
    except (tarfile.TarError, EOFError) as error:
        damages.append(f"what follows {len(files)} files ({error})")
    files |= {name: files[target] for name, target in links.items() if target in files}
    skipped += sorted(links.keys() - files.keys())
    return files, skipped, damages


def read_webdatasets(root, sets):
    """Return {domain: items}, {domain: (classnames, templates)}, {absent domain: how to get it}.

    sets: {domain: {"folder" in root, "count" of test images, maybe "border", "by_hand"}}.
    """
    images, heads, absent = {}, {}, {}
    for domain, entry in sets.items():
        folder = root / entry["folder"]
        if not folder.is_dir():
            hub = f"fetched from clip-benchmark/{folder.name} by: python -m sets.load imagenet"
            absent[domain] = f"{folder} does not exist; it is {entry.get('by_hand', hub)}"
            continue
        names, templates, items = read_webdataset(folder)
        if len(items) != entry["count"]:
            warn(f"{folder} has {len(items)} test images, {entry['count']} are published")
        # CHOICE: ObjectNet's red frame is cut off; alternative: keep it.
        border = entry.get("border", 0)
        images[domain] = [(replace(location, border=border), y) for location, y in items]
        # CHOICE: the templates that clip-benchmark gives each set; alternative: one of ours.
        heads[domain] = names, [template.replace("{c}", "{}") for template in templates]
    return images, heads, absent


def read_webdataset(folder):
    """Return (class names, templates, items) of one of clip-benchmark's sets.

    The folder has test/0.tar … (KEY.webp, .jpg or .png with KEY.cls, a number), test/nshards.txt,
    classnames.txt, zeroshot_classification_templates.txt. Exits with status 2 if the set is damaged
    or incomplete.
    """
    try:
        names = (folder / "classnames.txt").read_text("utf-8").splitlines()
        templates = (folder / "zeroshot_classification_templates.txt").read_text("utf-8")
        n_shards = int((folder / "test/nshards.txt").read_text("utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{folder} is not a webdataset of clip-benchmark ({error}). Fetch it again.")
    damages, items = [] if templates else ["no templates"], []
    for n in range(n_shards):
        pairs, unusable = read_shard(folder / "test" / f"{n}.tar", ".cls")
        damages += unusable
        for _, location, label, _ in pairs:
            if label.isdigit() and int(label) < len(names):
                items.append((location, int(label)))
            else:
                damages.append(f"labels without a name, {label}")
    if damages or not items:
        fail(f"{folder} is damaged: {[*damages, 'no images'][0]}. Fetch it again, or remove it.")
    return names, templates.splitlines(), items
