"""Data sets on disk: their description, folders {domain}/{class}/*, ImageNet's {part}/{class}/*."""

import json
import os
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from utils import ROOT, fail, one_line, only_one_process, run_command

from data import Location, Meta
from sets.webdataset import IMAGE_ENDINGS, read_webdatasets


def read_meta(name, root="data"):
    """(folder, Meta) of a data set: sets/NAME.json, and what a dataset.json in the folder changes.

    The folder is root/NAME, or `root` itself where it has all domains; no image is read.
    Exits with status 2 where there is no description, or none that can be.
    """
    folder, shipped = Path(root, name), ROOT / "sets" / f"{name}.json"
    if Path(name).name != name:  # splits and run folders go by the name
        fail(f"{name} is a path, not a data set's name. Say: {folder.name} --data {folder.parent}")
    description = json.loads(shipped.read_text()) if shipped.exists() else {}
    needed = [*description.get("phrases", ["dataset.json"])]
    if not (folder / needed[0]).exists() and all(Path(root, entry).exists() for entry in needed):
        folder = Path(root)
    file = folder / "dataset.json"
    if not description and not file.exists():
        known = {f.stem for f in (ROOT / "sets").glob("*.json")}
        known |= {f.parent.name for f in Path(root).glob("*/dataset.json")}
        fail(
            f"unknown data set {name!r}. Known: {', '.join(sorted(known))}. "
            f"Your own: a folder {folder} with a dataset.json (DATA.md)."
        )
    # commands, and what only ImageNet has, are for sets/ alone to say
    keys = {f.name for f in fields(Meta)} - {"made_by", "pool_made_by", "shifted", "zero_shot"}
    try:
        own = json.loads(file.read_text(encoding="utf-8-sig")) if file.exists() else {}
        if unknown := {*own} - keys:
            raise ValueError(f"{min(unknown)!r} is none of {', '.join(sorted(keys))}")
        meta, means = Meta(**{**description, **own}), {"OOD mean", "extended", "unseen mean"}
        if odd := {*meta.templates, *meta.counts} - {*meta.phrases} | means & {*meta.phrases}:
            raise ValueError(f"{min(odd)!r} is no domain with a phrase, or is the name of a mean")
        return folder, meta
    except (OSError, TypeError, ValueError, RecursionError) as error:
        fail(f"{file} does not describe a data set: {one_line(error)}. DATA.md shows one.")


def make(folder, command):
    """Run the `command` by which a description makes the data set, or the pool, in `folder`."""
    only_one_process(folder)
    run_command(f"{command} --data {shlex.quote(str(folder.parent.absolute()))}")


def shards_of(config, meta):
    """The pool's shards; without --pool they are made, or fetched, where there are none."""
    pool = Path(config.pool or config.data / (meta.pool or "cc3m")).absolute()
    if not any(pool.glob("*.tar")):
        if config.pool is None and meta.pool_made_by:
            make(pool, meta.pool_made_by)
        elif pool.name == "cc3m":
            from sets.hub import fetch_cc3m

            fetch_cc3m(pool)
        else:
            fail(f"--pool {pool}: no webdataset shards there (0.tar with KEY.jpg, KEY.txt).")
    shards = sorted(pool.glob("*.tar"))
    for shard in shards:
        if not shard.is_file():
            fail(f"{shard} is no file, nor a link to one. Remove it.")
    return shards


def get(name, folder, meta):
    """Make or fetch a data set that is not there; exits with status 2 where that cannot be."""
    needed = ["train", "val"] if meta.shifted else [*meta.phrases]
    if any((folder / entry).is_dir() for entry in needed):
        return
    if folder.is_symlink() and not folder.exists():
        fail(f"{folder} is a link to what is not there. Mend or remove it.")
    others = ", ".join(sorted(f.name for f in folder.glob("[!.]*") if f.is_dir())[:5])
    if meta.made_by and not others:
        make(folder, meta.made_by)
    elif meta.hub and not others:
        from sets.hub import fetch

        fetch(meta.hub["repository"], folder, ["*.parquet"], meta)
    else:
        fail(
            f"the data set {name} is not in {folder}{others and f', which holds {others}'}. Put "
            f"{', '.join(needed)} there, each with a folder per class, or link to where they lie: "
            f"ln -s /their/folder {folder}. {meta.by_hand}"
        )


def read_classes(folder, part):
    """(class folders of folder/part, items), sorted; exits with status 2 where one is empty."""
    classes, items = sorted(f.name for f in (folder / part).glob("*") if f.is_dir()), []
    for y, name in enumerate(classes):
        # No deeper, unlike torchvision's make_dataset: what lies there is thumbnails and copies
        try:
            with os.scandir(folder / part / name) as entries:
                found = [entry for entry in entries if entry.name.lower().endswith(IMAGE_ENDINGS)]
            "".join([name, *(entry.name for entry in found)]).encode()
        except OSError as error:
            fail(f"{folder / part / name}: unreadable ({error.strerror}). Check its permissions.")
        except UnicodeEncodeError:
            fail(f"{str(folder / part / name)!r}, or a file in it, has a name that is not UTF-8. "
                 "Rename it.")
        if not found:
            fail(f"{folder / part / name} holds no images. Fill it, or remove the class from all.")
        for entry in found:  # a FIFO would hang, a link may lead nowhere
            if not entry.is_file(follow_symlinks=False) and not os.path.isfile(entry):
                fail(f"{entry.path} is no file, nor a link to one. Remove it.")
        files = sorted(entry.name for entry in found)
        items += [(Location(str(folder), f"{part}/{name}/{file}"), y) for file in files]
    return classes, items


def read_domains(folder, meta):
    """What data.Dataset says of a data set in DomainBed's layout, as a dictionary of its fields."""
    images, official, first, classes = {}, {}, next(iter(meta.phrases)), None
    for domain in meta.phrases:
        found, images[domain] = read_classes(folder, domain)
        if not found:
            fail(f"{folder / domain} holds no class folders. Get it, as {', '.join(meta.phrases)}.")
        classes = classes or found
        if odd := sorted({*found} ^ {*classes}):
            fail(f"{folder / domain} has other classes than {first}: not in both: {odd[:5]}.")
        if (file := folder / f"{domain}_test.txt").exists():  # a line: path, number of its class
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                fail(f"{file} cannot be read ({one_line(error)}). Mend or remove it.")
            official[domain] = {re.sub(r" \d+$", "", line) for line in lines}
            if official[domain].isdisjoint(location.path for location, _ in images[domain]):
                fail(f"{file} names no image of {folder / domain}. Put another there, or none.")
    return {
        "meta": meta, "classes": classes, "images": images, "official": official,
        "classnames": [name.replace("_", " ").lower() for name in classes],  # "alarm clock"
    }


def read_imagenet(folder, meta):
    """Likewise of ImageNet, whose val is its test part, and of the evaluation sets beside it."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    (classes, train), (others, val) = (read_classes(folder, part) for part in ("train", "val"))
    if len(classes) != 1000 or classes != others:
        fail(
            f"{folder}: ImageNet has the same 1000 class folders (n01440764 …) in train and in "
            f"val, not {len(classes)} and {len(others)}."
        )
    names = [*IMAGENET_CLASSNAMES]  # in the order of the sorted folders
    shifted, heads, absent = read_webdatasets(folder.parent, meta.shifted)
    templates = {"imagenet": [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]}
    return {
        "meta": replace(meta, templates={**templates, **meta.templates}),
        "classes": classes, "classnames": names, "images": {"imagenet": train + val, **shifted},
        "official": {"imagenet": {location.path for location, _ in val}}, "absent": absent,
        # V2 and Sketch have the same classes, and so the same head
        "heads": {domain: head for domain, head in heads.items() if head[0] != names},
    }
