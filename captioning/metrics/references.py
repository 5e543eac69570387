"""A split's references as n-grams, counted once and memory-mapped by every process that computes rewards from them.

N-grams are the nodes of a trie: an n-gram's number is its place in ``keys``, which are ascending, and its key holds the
number of the (n-1)-gram it begins with and the number of its last word. Looking one up is a binary search per word.
"""

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from captioning.metrics.ngrams import Floats, Integers
from shards.files import write_atomically

ORDERS = 4
END_WORD = 0  # the number of <end> among the words; its spelling there is "", which no word has
# A word that ends fewer than this share of the captions it occurs in is not one to end with ("a", "with", "very") ...
_RARELY_ENDS = 0.005
_SEEN_ENOUGH = 50  # ... if it occurs this often; of rarer words nothing is said


@dataclass(frozen=True)
class References:
    """R references of I images and their G distinct n-grams of orders 1 to 4; W distinct words.

    An image's entries say which of its references holds which n-gram how often; they are sorted by n-gram.
    """

    keys: Integers  # int64 [G], ascending: (number of the prefix + 1) << 32 | number of the last word
    document_frequency: Integers  # [G], images with a reference that holds it
    entry_starts: Integers  # [I + 1]
    entry_gram: Integers  # [E]
    entry_reference: Integers  # [E], 0..R-1
    entry_count: Integers  # [E]
    reference_starts: Integers  # [I + 1]
    reference_lengths: Integers  # [R], words
    reference_norms: Floats  # float64 [R, 4], of the tf-idf vector of each order
    rarely_ends: np.ndarray  # bool [W]: the words that hardly any reference ends with
    words: tuple[str, ...]  # [W]

    @property
    def documents(self) -> int:
        """Images that have a reference."""
        return int(np.count_nonzero(np.diff(self.reference_starts)))

    def rarity(self, grams: Integers) -> Floats:
        """Logarithm of the inverse document frequency; numbers from G on are n-grams that no reference holds."""
        known = np.minimum(grams, len(self.keys) - 1)
        frequency = np.where(grams == known, self.document_frequency[known], 1)
        return np.log(max(1, self.documents)) - np.log(frequency.astype(np.float64))  # of narrow integers it is narrow


_ARRAYS = tuple(field.name for field in fields(References) if field.name != "words")


def child_keys(prefix: Integers, word: Integers) -> Integers:
    """Keys of the n-grams that go on from ``prefix`` (-1: from nothing) with ``word``."""
    return ((prefix + 1) << 32) | word


def ranges(starts: Integers, counts: Integers) -> Integers:
    """``starts[0], starts[0] + 1, ...``, ``counts[0]`` of them, then those from ``starts[1]`` on, and so forth."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def count(images: Iterable[Sequence[Sequence[str]]], with_end: bool = True) -> References:
    """Count the n-grams of references: for each image its references, each a sequence of words.

    ``with_end`` adds <end> to every reference as its last word.
    """
    numbers: dict[str, int] = {"": END_WORD}
    words, lengths, per_image = array("q"), array("q"), array("q")
    for references in images:
        for reference in references:
            words.extend([numbers.setdefault(word, len(numbers)) for word in reference])
            if with_end:
                words.append(END_WORD)
            lengths.append(len(reference) + with_end)
        per_image.append(len(references))
    as_arrays = [np.array(values, dtype=np.int64) for values in (words, lengths, per_image)]
    rarely_ends = _rarely_end(as_arrays[0], as_arrays[1], with_end, len(numbers))
    return References(**_counted(*as_arrays), rarely_ends=rarely_ends, words=tuple(numbers))


def _counted(words: Integers, lengths: Integers, per_image: Integers) -> dict[str, Any]:
    image_of = np.repeat(np.arange(len(per_image)), per_image)  # [R]
    reference_of = np.repeat(np.arange(len(lengths)), lengths)  # [M]
    left = np.cumsum(lengths)[reference_of] - np.arange(len(words))  # words from here to the reference's end
    documents = max(1, int(np.count_nonzero(per_image)))
    at, prefix, grams = np.arange(len(words)), np.full(len(words), -1), 0
    keys, frequencies, entries, norms = [], [], [], []
    for n in range(ORDERS):
        inside = left[at] > n
        at, prefix = at[inside], prefix[inside]
        names, gram = np.unique(child_keys(prefix, words[at + n]), return_inverse=True)
        size = max(1, len(names))
        pairs, times = np.unique(reference_of[at] * size + gram, return_counts=True)
        reference, held = np.divmod(pairs, size)
        seen = np.unique(image_of[reference] * size + held) % size
        frequency = np.bincount(seen, minlength=len(names))
        weights = times * (np.log(documents) - np.log(frequency[held]))
        norms.append(np.sqrt(np.bincount(reference, weights**2, minlength=len(lengths))))
        keys.append(names)
        frequencies.append(frequency)
        entries.append(np.stack([held + grams, reference, times]))
        prefix, grams = gram + grams, grams + len(names)
    gram, reference, times = np.concatenate(entries, axis=1)
    order = np.lexsort((reference, gram, image_of[reference]))
    return {
        "keys": np.concatenate(keys),
        "document_frequency": _small(np.concatenate(frequencies)),
        "entry_starts": np.searchsorted(image_of[reference[order]], np.arange(len(per_image) + 1)),
        "entry_gram": _small(gram[order]),
        "entry_reference": _small(reference[order]),
        "entry_count": _small(times[order]),
        "reference_starts": np.concatenate([[0], np.cumsum(per_image)]),
        "reference_lengths": _small(lengths),
        "reference_norms": np.stack(norms, axis=1),
    }


def _rarely_end(words: Integers, lengths: Integers, with_end: bool, vocabulary: int) -> np.ndarray:
    last = np.cumsum(lengths) - 1 - with_end
    spoken = lengths > with_end
    ends = np.bincount(words[last[spoken]], minlength=vocabulary)
    seen = np.bincount(words, minlength=vocabulary)
    seen[END_WORD] = 0
    return (seen >= _SEEN_ENOUGH) & (ends < _RARELY_ENDS * seen)


def _small(values: Integers) -> Integers:
    """The same in the narrowest unsigned integers that hold them: the entries of a large split are most of the file."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def save(references: References, folder: Path, about: dict[str, object]) -> None:
    """Write the references, and last ``about``: which split and settings they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)
    write_atomically(folder / "words.json", json.dumps(references.words, ensure_ascii=False).encode())
    for name in _ARRAYS:
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, getattr(references, name), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())  # before about.json says that they are there
    write_atomically(folder / "about.json", json.dumps(about).encode())


def is_saved(folder: Path, about: dict[str, object]) -> bool:
    """Whether ``folder`` holds what ``save`` wrote with this ``about``."""
    try:
        return about_saved(folder) == about
    except (OSError, ValueError):
        return False


def about_saved(folder: Path) -> dict[str, Any]:
    """The ``about`` that ``save`` wrote."""
    return json.loads((folder / "about.json").read_text(encoding="utf-8"))


def load(folder: Path) -> References:
    """Map what ``save`` wrote into memory: processes of one machine share it."""
    arrays: dict[str, Any] = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in _ARRAYS
    }
    return References(**arrays, words=tuple(json.loads((folder / "words.json").read_text(encoding="utf-8"))))
