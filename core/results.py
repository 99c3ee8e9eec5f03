"""Records: what was measured, and of what. Tables and figures are made of records alone.

A record is a dict of one measurement. A run stores each as a file in its folder scores/;
docs/results/NAME/rows.jsonl stores those of a run as lines, after a first line with the fields that
all of them share:

    {"kind": "accuracy", "dataset": "emoji", "source": "3d", "model": "local-dir:emoji/clip",
     "method": "arf", "trained": "both towers", "seed": 0, "alpha": 1.0,
     "schedule": {"epochs": 5, …}, "options": {"lambda_cap": 0.5},
     "values": {"3d": 76.1, "flat": 74.7, …, "OOD mean": 69.4}, "n": {"3d": 332, …},
     "ece": {"3d": 9.7, …, "OOD mean": 14.2}}

kind: "accuracy" (values by domain, and their means; None: not run), "synthesis" and "mapper"
(measures of synthesised features, "domain" is the target), "captions", "pairs". trained is "" for
zero-shot. "ece" is missing in older records. options are the settings that matter to the method
and differ from the defaults.
"""

import json
from pathlib import Path

from core.artifacts import load, write_atomically
from core.utils import fail

ROWS = "rows.jsonl"
DEFAULTS = {"trained": "", "seed": 0, "alpha": 1.0, "schedule": None, "options": {}}
IDENTITY = (
    "kind", "dataset", "source", "model", "method", "trained", "options", "domain", "alpha", "seed",
)


def record(settings, kind, method, seed, values, n, ece=None, **fields):
    """Return a record. Values are rounded to 6 digits because float32 has no more.

    fields: what differs from DEFAULTS, and a "domain" or "validation" accuracy.
    """
    def rounded(values):
        return {k: None if v is None else round(v, 6) for k, v in values.items()}

    if ece:
        fields["ece"] = rounded(ece)
    return {
        "kind": kind,
        "dataset": settings.dataset, "source": settings.source, "model": settings.model,
        **DEFAULTS, "method": method, "seed": seed, "values": rounded(values), "n": n, **fields,
    }


def newest(records):
    """Return the last of the records about the same thing, at the place of the first."""
    last = {}
    for r in records:
        identity = json.dumps([r.get(name) for name in IDENTITY], sort_keys=True)
        if r["method"] == "zero-shot" and identity in last:  # unseen classes, of an earlier run
            earlier = last[identity]
            r = {**r, **{k: earlier.get(k, {}) | r.get(k, {}) for k in ("values", "n", "ece")}}
        last[identity] = r
    return [*last.values()]


def read_records(path):
    """Return the records of a run folder, of a folder with rows.jsonl or of a .jsonl file: of each
    thing the newest. Exits with status 2 if there is none.
    """
    path, records = Path(path), []
    path = path / ROWS if (path / ROWS).exists() else path
    if path.is_dir():
        files = [(file.stat().st_mtime_ns, file) for file in (path / "scores").glob("*.json")]
        for _, file in sorted(files):
            content = load(file)
            records += content if isinstance(content, list) else [content]
    elif path.exists():
        shared = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                content = json.loads(line)
            except ValueError:
                fail(f"{path}, line {number}: this is not JSON. Delete the line.")
            if "values" in content:
                records.append({**shared, **content})
            else:
                shared = content
    if not records:
        fail(f"{path}: there are no results here. Run something first: bash run_ldfs.sh emoji 3d")
    return newest({**DEFAULTS, **record} for record in records)


def write_records(records, path):
    """Write records into a .jsonl file: a line of the fields that all share, then one of each."""
    def line(fields):
        fields = {k: v for k, v in fields.items() if k not in DEFAULTS or v != DEFAULTS[k]}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n"

    same = [k for k, v in records[0].items() if all(r.get(k) == v for r in records)]
    shared = {k: records[0][k] for k in same if k != "values"}
    lines = [line(shared)]
    lines += [line({k: v for k, v in r.items() if k not in shared}) for r in records]
    write_atomically(Path(path), lambda part: part.write_text("".join(lines), encoding="utf-8"))
