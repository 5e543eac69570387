"""Every training caption as word ids, tokenized once a run and memory-mapped by every process that reads it.

Tokenizing an image's five captions costs as much as decoding its JPEG; doing it on the fly would halve the loader.
"""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from captioning.data import vocabulary as vocab
from captioning.data.tokenizer import kind_of
from captioning.data.vocabulary import Vocabulary
from shards.files import sha256_of, write_atomically
from shards.index import Index, read_texts

_ARRAYS = ("ids", "caption_starts", "sample_starts")


@dataclass(frozen=True)
class EncodedCaptions:
    """A folder of three arrays: word ids of all captions end to end, where each caption and each sample begins."""

    folder: Path

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self.folder}  # a loader process maps the files itself rather than being sent their contents

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        paths = [self.folder / f"{name}.npy" for name in _ARRAYS]
        # Plain arrays over the mapped files: a memmap takes ten times as long to slice.
        return [np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray) for path in paths]

    def __len__(self) -> int:
        return len(self._arrays[2]) - 1

    def of(self, sample: int) -> list[np.ndarray]:
        """The captions of one sample, each an int32 array of at most ``max_words`` word ids, without <end>."""
        ids, caption_starts, sample_starts = self._arrays
        starts = caption_starts[sample_starts[sample] : sample_starts[sample + 1] + 1].tolist()
        return [ids[a:b] for a, b in pairwise(starts)]


def encode(
    index: Index,
    folder: Path,
    threshold: int,
    max_words: int,
    vocabulary: Vocabulary | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    tokenizer: str = "words",
    vocabulary_size: int | None = None,
) -> Vocabulary:
    """Tokenize a split once: build the vocabulary (unless one is given) and write the EncodedCaptions folder.

    A given vocabulary brings its tokenizer; else ``tokenizer`` names it, and both are made from this split alone. A
    folder that already holds this split in this vocabulary, as its hashes tell, is left alone. Returns the vocabulary.

    Raises:
        InputError: when there is no such tokenizer, or the vocabulary covers less than half of the tokens.
    """
    if vocabulary is not None and _is_up_to_date(folder, _about(index, vocabulary, max_words)):
        return vocabulary
    if vocabulary is None:
        by = kind_of(tokenizer).train(captions_of(index), vocabulary_size, threshold)
    else:
        by = vocabulary.tokenizer
    numbers: dict[str, int] = {}
    counts: Counter[int] = Counter()
    ids, caption_starts, sample_starts = array("i"), array("q", [0]), array("q", [0])
    done = 0
    for shard in index.shards:
        for text in read_texts(shard):
            for caption in text.captions:
                words = [numbers.setdefault(word, len(numbers)) for word in by.tokenize(caption)]
                counts.update(words)
                ids.extend(words[:max_words])
                caption_starts.append(len(ids))
            sample_starts.append(len(caption_starts) - 1)
        done += shard.nsamples
        on_progress(done, len(index))
    spellings = list(numbers)
    if vocabulary is None:
        occurring = Counter({spellings[number]: count for number, count in counts.items()})
        vocabulary = vocab.build(occurring, threshold, vocabulary_size, by)
        vocab.check_coverage(vocabulary, occurring, threshold, vocabulary_size)
    final = np.array([vocabulary.ids.get(word, vocab.UNK) for word in spellings] or [0], dtype=np.int32)
    _write(folder, (final[np.asarray(ids, dtype=np.int64)], np.asarray(caption_starts), np.asarray(sample_starts)))
    about = _about(index, vocabulary, max_words) | {"arrays": _hashes(folder)}
    write_atomically(folder / "about.json", json.dumps(about).encode())
    return vocabulary


def captions_of(index: Index) -> Iterator[str]:
    """Every caption of a split, in its order, a shard in memory at a time."""
    for shard in index.shards:
        for text in read_texts(shard):
            yield from text.captions


def hash_of_captions(index: Index) -> str:
    """Of the caption files beside its shards, in order: the same tars can have others."""
    return hashlib.sha256("\n".join(shard.sidecars[-1] for shard in index.shards).encode()).hexdigest()


def _write(folder: Path, arrays: tuple[np.ndarray, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)
    for name, values in zip(_ARRAYS, arrays, strict=True):
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())  # before about.json says that they are there


def _about(index: Index, vocabulary: Vocabulary, max_words: int) -> dict[str, object]:
    """What the arrays are made of: the data and the very caption files of its shards, in order."""
    about = {"fingerprint": index.fingerprint, "captions": hash_of_captions(index), "max_words": max_words}
    return {**about, "vocabulary": vocabulary.to_json()}


def _hashes(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / f"{name}.npy") for name in _ARRAYS}


def _is_up_to_date(folder: Path, about: dict[str, object]) -> bool:
    """Whether the arrays are made of this, and still as they were written."""
    try:
        stored = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        return stored == about | {"arrays": _hashes(folder)}
    except (OSError, ValueError, RecursionError):
        return False
