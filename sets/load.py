"""Load a data set by its name: find it on disk, or fetch or make it, and read it.

    python -m sets.load pacs        # only fetches or makes it; cc3m: the pool of image-text pairs
"""

import shlex
from dataclasses import replace
from pathlib import Path

from core.config import Parser, resolve
from core.distributed import require_one_process
from core.utils import fail, run_command, warn
from data import Dataset, Meta, base_to_new
from sets.describe import read_meta
from sets.folders import read_domains, read_imagenet
from sets.hub import fetch, fetch_cc3m
from sets.webdataset import read_webdatasets


def load_run(args):
    """Return (Settings, Dataset) of a command line that core.config.parse has parsed."""
    dataset = load_dataset(args.dataset, args.data, args.captions, args.shots)
    if args.base_to_new:
        dataset = base_to_new(dataset)
    settings = resolve(args, dataset)
    unseen = load_unseen(dataset)
    dataset = replace(dataset, unseen=unseen)
    if unseen and settings.source not in unseen.meta.phrases and not dataset.meta.zero_shot:
        fail(f"{unseen.name}, the unseen classes of {dataset.name}, lacks {settings.source}.")
    return settings, dataset


def load_dataset(name, root="data", captions=None, shots=None):
    """Return the Dataset `name` in the folder `root`; fetch or make it if it is missing.

    Exits with status 2 if that is not possible, or if the data set is not valid.
    """
    folder, meta = read_meta(name, root)
    require_on_disk(name, folder, meta)
    paths = [folder / "captions.jsonl", Path(root, f"{name}_captions.jsonl")]
    captions = captions or next((path for path in paths if path.exists()), paths[0])
    read = read_imagenet if meta.shifted else read_domains
    fields = read(folder, meta)
    dataset = Dataset(name, folder, captions=Path(captions), shots=shots, **fields)
    for domain, items in dataset.images.items():
        published = meta.counts.get(domain, len(items))
        if len(items) != published:
            warn(f"{name}, {domain}: {len(items)} images in {folder}, {published} are published")
    if meta.official_split and len(dataset.official) < len(dataset.images):
        warn(f"{folder}: domains without an official list {{domain}}_test.txt are split at random")
    for domain, remedy in dataset.absent.items():
        warn(f"{name}, {domain} will not be run: {remedy}")
    return dataset


def load_unseen(dataset):
    """Return the Dataset of other classes that measures zero-shot ability, None if there is none.

    With --base-to-new it is the rest of its own classes. Otherwise ImageNet's are its `zero_shot`
    sets, each a domain; another's is the one it names as `unseen`.
    """
    if dataset.new:
        return dataset.new
    root, meta = dataset.folder.parent, dataset.meta
    if meta.zero_shot:
        images, heads, absent = read_webdatasets(root, meta.zero_shot)
        meta = Meta(phrases=dict.fromkeys(meta.zero_shot, "a photo"))
        return Dataset("zero-shot", root, meta, [], [], images, heads=heads, absent=absent)
    if meta.unseen in (dataset.name, dataset.folder.name):
        fail(f"{dataset.name}: its unseen classes cannot be its own. Name another data set.")
    return load_dataset(meta.unseen, root) if meta.unseen else None


def require_on_disk(name, folder, meta):
    """Make or fetch a data set that is missing; exit with status 2 if that is not possible."""
    entries = ["train", "val"] if meta.shifted else [*meta.phrases]
    if any((folder / entry).is_dir() for entry in entries):
        return
    if folder.is_symlink() and not folder.exists():
        fail(f"{folder} is a link to a folder that does not exist. Correct or remove it.")
    content = ", ".join(sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())[:5])
    if meta.made_by and not content:
        make(folder, meta.made_by)
    elif meta.hub and not content:
        fetch(meta.hub["repository"], folder, ["*.parquet"], meta)
    else:
        fail(
            f"the data set {name} is not in {folder}{content and f', which holds {content}'}. Put "
            f"{', '.join(entries)} there, each with a folder per class, or link to their folder: "
            f"ln -s /their/folder {folder}. {meta.by_hand}"
        )


def make(folder, command):
    """Run the command by which a description makes a data set, or its pool, in `folder`."""
    command = f"{command} --data {shlex.quote(str(folder.parent.absolute()))}"
    require_one_process(f"Making {folder} ({command})")
    run_command(command)


def pool_shards(settings, meta):
    """Return the paths of the pool's shards; make or fetch the default pool if it is missing."""
    pool = Path(settings.pool or Path(settings.data, meta.pool or "cc3m")).absolute()
    if not any(pool.glob("*.tar")):
        if settings.pool is None and meta.pool_made_by:
            make(pool, meta.pool_made_by)
        elif pool.name == "cc3m":
            fetch_cc3m(pool)
        else:
            fail(f"--pool {pool} has no webdataset shards (0.tar with KEY.jpg, KEY.txt).")
    shards = sorted(path for path in pool.glob("*.tar") if not path.name.startswith("."))
    for shard in shards:
        if not shard.is_file():
            fail(f"{shard} is neither a file nor a link to one. Remove it.")
    return shards


def main():
    """Fetch or make the data set that the command line names."""
    parser = Parser(description="Fetch a data set from the Hugging Face hub, or make it.")
    parser.add_argument("dataset", help="a name in sets/ (imagenet: its test sets), or cc3m")
    parser.add_argument("--data", default="data", type=Path, help="its folder (default: data)")
    args = parser.parse_args()
    if args.dataset == "cc3m":
        folder = args.data / "cc3m"
        if not any(folder.glob("*.tar")):
            fetch_cc3m(folder)
        print(f"{folder}: {len([*folder.glob('*.tar')])} shards")
        return
    _, meta = read_meta(args.dataset, args.data)
    for entry in [*meta.shifted.values(), *meta.zero_shot.values()]:
        folder = args.data / entry["folder"]
        if "by_hand" not in entry and not folder.is_dir():
            fetch(f"clip-benchmark/{folder.name}", folder, ["test/*", "*.txt"])
    dataset = load_dataset(args.dataset, args.data)
    counts = [f"{domain} {len(items)} images" for domain, items in dataset.images.items()]
    print(f"{dataset.folder}: {', '.join(counts)}")


if __name__ == "__main__":
    main()
