"""What comes from the Hugging Face hub: data sets, ImageNet's evaluation sets, the pool CC3M."""

import shutil
import sys
from pathlib import Path
from utils import fail, one_line, only_one_process, write_atomically, writing

from pyarrow.parquet import ParquetFile
from tqdm import tqdm

import data
from sets.folders import read_meta


def fetch(repository, folder, patterns, meta=None):
    """Download files of these patterns of a dataset repository into `folder`, there when whole.

    Says first how large they are; what an earlier try left is not fetched again. With a `meta` they
    are parquet files, looked into before all are fetched, and become image folders.
    Exits with status 2 where they cannot be had, or the disk has no room.
    """
    from huggingface_hub import HfFileSystem, snapshot_download
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.utils import disable_progress_bars

    only_one_process(folder)
    if not meta and folder.is_dir() and any(folder.iterdir()):
        fail(f"{folder} is there, but holds nothing of {repository}'s to use. Move it away.")
    part = folder.with_name(f".{folder.name}.part")
    wanted = {"repo_type": "dataset", "allow_patterns": patterns, "local_dir": part}
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        files = snapshot_download(repository, **wanted, dry_run=True)
        part.mkdir(parents=True, exist_ok=True)
        size, free = sum(f.file_size for f in files), shutil.disk_usage(part).free
        more = size * (2 if meta else 1) - sum(f.file_size for f in files if f.is_cached)
        if more > free:
            fail(f"{repository} takes {more / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} are free.")
        first = min(files, key=lambda f: f.file_size)
        if meta:
            place = f"datasets/{repository}@{first.commit_hash}/{first.filename}"
            with HfFileSystem().open(place) as file:
                read_names(ParquetFile(file), meta)
        print(f"fetching {repository}: {len(files)} files, {size / 1e9:.2f} GB", flush=True)
        snapshot_download(repository, **wanted, revision=first.commit_hash)
    except Exception as error:  # no network, no such repository, HF_HUB_OFFLINE, a full disk
        cause = error.__cause__ if isinstance(error, DryRunError) else error
        fail(
            f"could not fetch {repository} from the Hugging Face hub: {one_line(cause)}. Run "
            f"again, it goes on where it stopped; or put the data into {folder} by hand (DATA.md)."
        )
    if meta:
        write_folders(part, folder, meta)
    else:
        part.rename(folder)


def fetch_cc3m(folder):
    """Conceptual Captions as webdataset shards: what was left when the hub's copy was made."""
    fetch("pixparse/cc3m-wds", folder, ["cc3m-train-*.tar"])


def write_folders(parquet, folder, meta):
    """Turn parquet files (columns: image, domain, class) into image folders in `folder`."""
    part, number = folder.with_name(f".{folder.name}.images"), 0
    shutil.rmtree(part, ignore_errors=True)
    for file in sorted(parquet.rglob("*.parquet")):
        split, table = file.name.split("-")[0], ParquetFile(file)
        domain_of, class_of = read_names(table, meta)
        rows = (row for batch in table.iter_batches(64) for row in batch.to_pylist())
        for row in tqdm(rows, f"writing {file.name}", table.metadata.num_rows, unit="img"):
            image, unique = row["image"], f"{split}_{number:06d}"
            domain, cls = domain_of(row[meta.hub["domain"]]), class_of(row[meta.hub["class"]])
            name = Path(image["path"] or f"{unique}.jpg").name
            path = Path(domain, cls.replace("/", "_"), name)
            if (part / path).exists():
                path = path.with_name(f"{unique}_{name}")
            write_atomically(part / path, lambda new: new.write_bytes(image["bytes"]))
            if meta.official_split:
                with writing(part), open(part / f"{domain}_{split}.txt", "a") as lines:
                    lines.write(f"{path.as_posix()}\n")
            number += 1
    if folder.exists():  # with captions in it, say, but none of its domains
        shutil.copytree(folder, part, dirs_exist_ok=True)
        folder.rename(parquet / "replaced")
    part.rename(folder)
    shutil.rmtree(parquet)


def read_names(table, meta):
    """[domain, class]: functions from what a parquet file's columns of these hold to its name.

    Exits with status 2, after a look at the first rows, at other columns, other domains, and
    classes that are numbers.
    """
    from datasets import Features

    features = Features.from_arrow_schema(table.schema_arrow)
    columns = [meta.hub["domain"], meta.hub["class"]]
    names = [getattr(features.get(column), "int2str", str) for column in columns]
    for row in table.read_row_group(0, columns).to_pylist():
        domain, cls = (name(row.get(column)) for name, column in zip(names, columns))
        whole = {"image", *columns} <= features.keys()
        if not whole or domain not in meta.phrases or cls.isdigit():
            fail(
                f"{meta.hub['repository']}: its columns image, {', '.join(columns)} should hold "
                f"images, names of domains ({', '.join(meta.phrases)}), of classes; not {row}."
            )
    return names


def main():
    """Fetch or make what the command line names."""
    from config import Parser

    parser = Parser(description="Fetch what the Hugging Face hub has of a data set, or make it.")
    parser.add_argument("dataset", help="a name in sets/ (imagenet: its evaluation sets), or cc3m")
    parser.add_argument("--data", default="data", type=Path, help="folder for it (default: data)")
    args = parser.parse_args()
    if args.dataset == "cc3m":
        return fetch_cc3m(args.data / "cc3m")
    _, meta = read_meta(args.dataset, args.data)
    for entry in [*meta.shifted.values(), *meta.zero_shot.values()]:
        folder = args.data / entry["folder"]
        if "by_hand" not in entry and not folder.is_dir():
            fetch(f"clip-benchmark/{folder.name}", folder, ["test/*", "*.txt"])
    dataset = data.load(args.dataset, args.data)
    counts = [f"{domain} {len(items)} images" for domain, items in dataset.images.items()]
    print(f"{dataset.folder}: {', '.join(counts)}")
