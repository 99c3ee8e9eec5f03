"""Image folders: {domain}/{class}/*, DomainBed's layout, and {train,val}/{class}/* of ImageNet."""

import os
import re
import unicodedata
from dataclasses import replace

from core.utils import fail, one_line, warn
from data import Location, image_key, is_hidden, is_image
from sets.webdataset import read_webdatasets


def read_classes(folder, part):
    """Return (class names, items) of folder/part: its class folders in NFC, sorted, and their
    images. Without class folders the images are those of the folder itself, of label 0.

    Exits with status 2 if a class is empty, or a name or a file cannot be used.
    """
    paths = {}  # {name in NFC: folder}
    for path in (folder / part).glob("*"):
        if path.is_dir() and not is_hidden(path.name):
            name = unicodedata.normalize("NFC", path.name)
            if name in paths:
                fail(f"{path} and {paths[name]} have the same name. Rename one of them.")
            paths[name] = path
    classes, items, ignored = sorted(paths), [], []
    for y, path in enumerate([paths[name] for name in classes] or [folder / part]):
        try:
            # Folders in a class folder are not searched, unlike torchvision does: often thumbnails.
            with os.scandir(path) as entries:
                files = [entry for entry in entries if not is_hidden(entry.name)]
            images = sorted(file.name for file in files if is_image(file.name))
            "".join([path.name, *images]).encode()
        except OSError as error:
            fail(f"{path}: unreadable ({error.strerror}). Check its permissions.")
        except UnicodeEncodeError:
            fail(f"{str(path)!r}, or a file in it, has a name that is not UTF-8. Rename it.")
        if classes and not images:
            fail(f"{path} has no images. Fill it, or remove the class from all domains.")
        for file in files:
            is_file = file.is_file(follow_symlinks=False) or os.path.isfile(file)
            if is_image(file.name) and not is_file:  # reading a FIFO would wait for ever
                fail(f"{file.path} is neither a file nor a link to one. Remove it.")
            if is_file and not is_image(file.name):
                ignored.append(file.path)
        inner = path.relative_to(folder).as_posix()
        items += [(Location(str(folder), f"{inner}/{image}"), y) for image in images]
    if ignored:
        warn(f"{folder / part}: {len(ignored)} files are not images ({min(ignored)} …)")
    return classes, items


def read_domains(folder, meta):
    """Return the fields of data.Dataset, as a dictionary, of a data set in DomainBed's layout."""
    images, official, absent, classes = {}, {}, {}, None
    for domain in meta.phrases:
        if not (folder / domain).exists():  # a target of mappers may be known by words only
            absent[domain] = f"no images, because {folder / domain} does not exist"
            continue
        names, images[domain] = read_classes(folder, domain)
        if not images[domain]:
            fail(f"{folder / domain} has no class folders. Fill it, or remove it.")
        classes = names if classes is None else classes
        if odd := sorted({*names} ^ {*classes}):
            first = next(iter(images))
            fail(f"{folder / domain} has other classes than {first}: not in both: {odd[:5]}.")
        if (file := folder / f"{domain}_test.txt").exists():
            official[domain] = read_test_list(file, images[domain])
    return {
        "meta": meta, "classes": classes, "images": images, "official": official,
        "absent": absent,
        "classnames": english_names(folder, classes, meta.classnames) or ["thing"],
    }


def read_test_list(file, items):
    """Return the paths of the items that an official list names: "domain/class/1.jpg 3" lines."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        fail(f"{file} cannot be read ({one_line(error)}). Correct or remove it.")
    keys = {image_key(re.sub(r" \d+$", "", line)) for line in lines}
    paths = {location.path for location, _ in items if image_key(location.path) in keys}
    if not paths:
        fail(f"{file} names no image of its domain. Replace or remove it.")
    return paths


def english_names(folder, classes, classnames):
    """Return what class folders are called in English, "alarm clock" of Alarm_Clock.

    CHOICE: WordNet's ids stand for their first word, and a number before a name ("001.dog") is left
    out; alternative: "classnames", {class folder: name} in dataset.json.
    Exits with status 2 if two classes have the same name.
    """
    classnames = {unicodedata.normalize("NFC", key): name for key, name in classnames.items()}
    if unknown := classnames.keys() - {*classes}:
        fail(f"{folder}/dataset.json: classnames: {min(unknown)!r} is no class folder. Correct it.")
    wordnet = wordnet_names() if any(re.fullmatch(r"n\d{8}", name) for name in classes) else {}
    names = []
    for folder_name in classes:
        name = wordnet.get(folder_name, folder_name.replace("_", " ").lower())
        name = re.sub(r"^\d+[ .-]+(?=.*[^\W\d])", "", name)
        names.append(classnames.get(folder_name, name))
    remedy = 'Say what it is called: "classnames": {"FOLDER": "NAME"} in dataset.json.'
    for i, name in enumerate(names):
        if (first := names.index(name)) < i:
            fail(f"{folder}: {classes[first]} and {classes[i]} are both called {name!r}. {remedy}")
        if not any(character.isalpha() for character in name):
            warn(f"{folder}: class {classes[i]} has no letters. {remedy}")
    return names


def wordnet_names():
    """Return {WordNet id: English name}: open_clip's for ImageNet's 1000 classes, else the first
    word of 21,000 others.
    """
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    words = {wnid: info.label_name_to_description(wnid) for wnid in info.label_names()}
    names = {wnid: synonyms.split(",")[0] for wnid, synonyms in words.items()}
    return {**names, **dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES))}


def read_imagenet(folder, meta):
    """Return the fields of data.Dataset of ImageNet, with val as its test part, and of the test
    sets beside it.
    """
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    classes, train = read_classes(folder, "train")
    val_classes, val = read_classes(folder, "val")
    if len(classes) != 1000 or classes != val_classes:
        fail(
            f"{folder}: ImageNet has the same 1000 class folders (n01440764 …) in train and in "
            f"val, not {len(classes)} and {len(val_classes)}."
        )
    names = [*IMAGENET_CLASSNAMES]  # in the order of the sorted folders
    shifted, heads, absent = read_webdatasets(folder.parent, meta.shifted)
    templates = {"imagenet": [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]}
    return {
        "meta": replace(meta, templates={**templates, **meta.templates}),
        "classes": classes, "classnames": names, "images": {"imagenet": train + val, **shifted},
        "official": {"imagenet": {location.path for location, _ in val}}, "absent": absent,
        # V2 and Sketch have the same classes, and so the same head.
        "heads": {domain: head for domain, head in heads.items() if head[0] != names},
    }
