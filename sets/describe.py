"""Descriptions of data sets: sets/NAME.json, and a dataset.json in the folder of the data set."""

import json
import re
from dataclasses import fields
from pathlib import Path

from core.utils import ROOT, fail, one_line
from data import Meta

# A dataset.json may not name commands to run, nor what only ImageNet has.
OWN_KEYS = {f.name for f in fields(Meta)} - {"made_by", "pool_made_by", "shifted", "zero_shot"}
MEANS = {"OOD mean", "extended", "unseen mean", "H mean"}  # columns beside the domains


def read_meta(name, root="data"):
    """Return (folder, Meta) of a data set, from sets/NAME.json and the dataset.json that overrides
    it. No image is read.

    Exits with status 2 if there is no description, or if it is not valid.
    """
    if Path(name).name != name:  # splits and run folders depend on the name
        path = Path(name) if Path(name).is_dir() else Path(root, name)
        fail(f"{name} is a path, not the name of a data set. Pass {path.name} --data {path.parent}")
    shipped = ROOT / "sets" / f"{name}.json"
    description = json.loads(shipped.read_text(encoding="utf-8")) if shipped.exists() else {}
    folder = find_folder(name, Path(root), [*description.get("phrases", ["dataset.json"])])
    file = folder / "dataset.json"
    if not description and not file.exists():
        names = {path.stem for path in (ROOT / "sets").glob("*.json")}
        names |= {path.parent.name for path in Path(root).glob("*/dataset.json")}
        fail(
            f"unknown data set {name!r}. Known: {', '.join(sorted(names))}. "
            f"Your own: a folder {folder} with a dataset.json (docs/DATA.md)."
        )
    try:
        overrides = json.loads(file.read_text(encoding="utf-8-sig")) if file.exists() else {}
        return folder, make_meta(description, overrides)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        fail(f"{file} does not describe a data set: {one_line(error)}. docs/DATA.md shows one.")


def find_folder(name, root, entries):
    """Return root/NAME, in upper or lower case, or `root` itself if it alone has all entries."""
    folder = root / name
    if not folder.exists() and not folder.is_symlink():
        matches = sorted(path for path in root.glob("*") if path.name.lower() == name.lower())
        folder = matches[0] if matches else folder
    if not (folder / entries[0]).exists() and all((root / entry).exists() for entry in entries):
        return root
    return folder


def make_meta(description, overrides):
    """Return the Meta of a description; raise TypeError or ValueError if it is not valid."""
    if not isinstance(overrides, dict):
        raise TypeError("not a mapping of keys to values")
    if unknown := overrides.keys() - OWN_KEYS:
        raise ValueError(f"{min(unknown)!r} is none of {', '.join(sorted(OWN_KEYS))}")
    values = {**description, **overrides}
    if isinstance(values.get("phrases"), dict):
        values["phrases"] = {domain: phrase(text) for domain, text in values["phrases"].items()}
    meta = Meta(**values)
    for key in ("templates", "counts"):
        if unknown := getattr(meta, key).keys() - meta.phrases.keys():
            raise ValueError(f"{key}: {min(unknown)!r} is no domain with a phrase")
    if names := MEANS & meta.phrases.keys():
        raise ValueError(f"phrases: {min(names)!r} is the name of a mean")
    return meta


def phrase(text):
    """Return "a photo" of the template "a photo of a {}.", as LADS names domains; else the text."""
    return re.sub(r" of( an?)? \{\}\.?$", "", text) if isinstance(text, str) else text
