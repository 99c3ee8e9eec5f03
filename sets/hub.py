"""The Hugging Face hub: data sets, ImageNet's test sets, and the pool CC3M."""

import shutil
import sys
import tempfile
from pathlib import Path

from filelock import FileLock
from pyarrow.parquet import ParquetFile
from tqdm import tqdm

from core.distributed import require_one_process
from core.utils import fail, one_line
from data import is_hidden, is_image


def fetch_cc3m(folder):
    """Fetch Conceptual Captions as webdataset shards: 2.9 of its 3.3 million pairs were left."""
    fetch("pixparse/cc3m-wds", folder, ["cc3m-train-*.tar"])


def fetch(repository, folder, patterns, meta=None):
    """Download the files of a dataset repository that match the patterns into `folder`.

    The folder appears when it is complete. What an interrupted download left is not fetched again.
    A second process waits, and then uses what the first one has fetched.
    With a `meta`, the files are parquet tables, of which one is checked before the download; they
    become image folders. Exits with status 2 if the hub does not answer or the disk is too small.
    """
    require_one_process(f"Fetching {folder} (python -m sets.load NAME)")
    path = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            if not is_fetched(folder, patterns, meta):
                fetch_files(repository, folder, patterns, meta)
            path.unlink(missing_ok=True)  # who waits for it finds the data set
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror}"
        fail(f"{folder} could not be written ({reason}). Pass another folder as --data.")


def is_fetched(folder, patterns, meta):
    """Return whether `folder` has what `fetch` makes, by a process that held the lock before."""
    if meta:
        return any((folder / domain).is_dir() for domain in meta.phrases)
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def fetch_files(repository, folder, patterns, meta):
    """Do what `fetch` does, as the only process that does."""
    from huggingface_hub import HfFileSystem, snapshot_download
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.utils import disable_progress_bars

    if not meta and folder.is_dir() and any(folder.iterdir()):
        fail(f"{folder} exists, but has no files of {repository} to use. Move it away.")
    part = folder.with_name(f".{folder.name}.part")
    request = {"repo_type": "dataset", "allow_patterns": patterns, "local_dir": part}
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        files = snapshot_download(repository, **request, dry_run=True)
        part.mkdir(parents=True, exist_ok=True)
        size, free = sum(file.file_size for file in files), shutil.disk_usage(part).free
        copies = 2 if meta else 1  # the tables, and then the images
        missing = copies * size - sum(file.file_size for file in files if file.is_cached)
        if missing > free:
            sizes = f"{missing / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} are free"
            fail(f"{repository} needs {sizes}. Make room.")
        smallest = min(files, key=lambda file: file.file_size)
        if meta:
            path = f"datasets/{repository}@{smallest.commit_hash}/{smallest.filename}"
            with HfFileSystem().open(path) as file:
                table_features(ParquetFile(file), meta)
        print(f"fetching {repository}: {len(files)} files, {size / 1e9:.2f} GB", flush=True)
        snapshot_download(repository, **request, revision=smallest.commit_hash)
    except Exception as error:  # no network, no such repository, HF_HUB_OFFLINE, a full disk
        cause = error.__cause__ if isinstance(error, DryRunError) else error
        fail(
            f"could not fetch {repository} from the Hugging Face hub: {one_line(cause)}. Run "
            f"again to continue; or put the data into {folder} by hand (docs/DATA.md)."
        )
    paths = sorted(part / file.filename for file in files)
    if meta:
        write_folders(part, paths, folder, meta)
    else:
        for path in {*part.rglob("*")} - {*paths}:  # of another revision, which a kill left
            if path.is_file():
                path.unlink()
        part.rename(folder)


def table_features(table, meta):
    """Return the datasets.Features of a parquet table, which name the numbers in its columns.

    Exits with status 2 if the first rows show other columns, other domains, or classes that are
    numbers.
    """
    from datasets import Features

    features = Features.from_arrow_schema(table.schema_arrow)
    columns = [meta.hub["domain"], meta.hub["class"]]
    for row in table.read_row_group(0, columns).to_pylist():
        domain, cls = row_names(row, features, meta)
        complete = {"image", *columns} <= features.keys()
        if not complete or domain not in meta.phrases or cls.isdigit():
            fail(
                f"{meta.hub['repository']}: its columns image, {', '.join(columns)} should hold "
                f"images, names of domains ({', '.join(meta.phrases)}), of classes; not {row}."
            )
    return features


def row_names(row, features, meta):
    """Return the names of a row's domain and class, "" for a null or a number without a name."""
    names = []
    for column in (meta.hub["domain"], meta.hub["class"]):
        name_of = getattr(features.get(column), "int2str", str)
        try:
            names.append("" if row.get(column) is None else name_of(row[column]))
        except ValueError:
            names.append("")
    return names


def write_folders(part, parquet_files, folder, meta):
    """Turn parquet tables (columns: image, domain, class), downloaded to `part`, into image folders
    in `folder`, and remove `part`.
    """
    images = folder.with_name(f".{folder.name}.images")
    shutil.rmtree(images, ignore_errors=True)
    try:
        for number, (split, row, features) in enumerate(table_rows(parquet_files, meta)):
            unique = f"{split}_{number:06d}"
            path = row_path(row, features, unique, meta)
            if (images / path).exists():
                path = path.with_name(f"{unique}_{path.name}")
            (images / path).parent.mkdir(parents=True, exist_ok=True)
            (images / path).write_bytes(row["image"]["bytes"])
            if meta.official_split:
                with open(images / f"{path.parts[0]}_{split}.txt", "a", encoding="utf-8") as lines:
                    lines.write(f"{path.as_posix()}\n")
        # The folder has no domain, but it may have captions. A kill may have left some in `part`.
        for old in [*part.glob("replaced-*"), folder]:
            if old.exists():
                shutil.copytree(old, images, dirs_exist_ok=True)
        if folder.exists():
            folder.rename(tempfile.mkdtemp(prefix="replaced-", dir=part))
        images.rename(folder)
    except OSError as error:
        fail(f"{folder}: could not be written ({error.strerror}). Make room.")
    shutil.rmtree(part)


def table_rows(parquet_files, meta):
    """Yield (split, row, the table's features) of all tables."""
    for file in parquet_files:
        table = ParquetFile(file)
        features = table_features(table, meta)
        rows = (row for batch in table.iter_batches(64) for row in batch.to_pylist())
        for row in tqdm(rows, f"writing {file.name}", table.metadata.num_rows, unit="img"):
            yield file.name.split("-")[0], row, features


def row_path(row, features, unique, meta):
    """Return domain/class/file of a table's row, the path to write its image to.

    Exits with status 2 if the row has no image, or no name of a domain and a class: a repository
    must not write outside of the data set's folder.
    """
    domain, cls = row_names(row, features, meta)
    cls, image = cls.replace("/", "_"), row["image"] or {}
    usable = domain in meta.phrases and cls and cls.isprintable() and not is_hidden(cls)
    if not usable or not image.get("bytes"):
        content = {**row, "image": len(image.get("bytes") or b"")}
        problem = f"row {unique} has no image, domain or class to use"
        fail(f"{meta.hub['repository']}: {problem}: {content}.")
    name = Path(image["path"] or "").name
    return Path(domain, cls, name if is_image(name) and name.isprintable() else f"{unique}.jpg")
