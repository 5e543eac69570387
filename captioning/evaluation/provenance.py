"""Where scores come from: the data they were computed on and trained on, what the two share, and the code."""

import json
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from captioning.version import __version__
from shards.errors import InputError
from shards.files import write_atomically
from shards.index import Index
from shards.overlap import Overlap, overlap

FILE = "provenance.json"  # in a run folder


def provenance(train_fingerprint: str, split: Index, tokenizer: str, shared: Overlap | None) -> dict[str, Any]:
    """For JSON: both splits' fingerprints, what they share (None: unknown), the model's tokenizer, version, commit."""
    return {
        "train_fingerprint": train_fingerprint,
        "split_fingerprint": split.fingerprint,
        "overlap": None if shared is None else shared.numbers(),
        "tokenizer": tokenizer,
        "version": __version__,
        "commit": commit(),
    }


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit of the checkout this code runs from; None where it was installed otherwise."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def keep(run: Path, about: dict[str, Any]) -> None:
    """Write it to the run folder."""
    write_atomically(run / FILE, json.dumps(about, indent=1, ensure_ascii=False).encode())


def kept(run: Path) -> dict[str, Any] | None:
    """What the run folder holds of its validation split; None where it holds nothing that can be read."""
    try:
        about = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None


def of_run(run: Path, train: Index | None, split: Index, tokenizer: str) -> dict[str, Any]:
    """The provenance of a run's scores on any split; compared with the training split where that can be read."""
    known = kept(run)
    if known and known.get("split_fingerprint") == split.fingerprint:
        return {**known, "version": __version__, "commit": commit()}
    shared = None
    if train is not None and train.fingerprint != split.fingerprint:
        try:
            shared = overlap(train, split)
        except (InputError, OSError):  # a file beside a tar is away: the scores can be had all the same
            shared = None
    return provenance(train.fingerprint if train else "", split, tokenizer, shared)


def in_words(about: dict[str, Any]) -> str:
    """One sentence for people."""
    shared = about.get("overlap")
    told = "what the splits share is not known"
    if shared:
        near = shared["near_duplicates"]
        told = f"{shared['same']:,} images are also in the training split"
        told += ", near duplicates were not looked for" if near is None else f", {near:,} look like one of it"
    return (
        f"Data {about['split_fingerprint'][:12]}, trained on {about['train_fingerprint'][:12]}; {told}. "
        f"captioning-shards {about['version']}" + (f", commit {about['commit'][:12]}." if about["commit"] else ".")
    )
