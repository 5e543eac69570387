"""The n-grams of many captions, counted in arrays: what BLEU, CIDEr and NIST are computed from.

A word is a number, an n-gram is a number, and a count is a row of three integers; no n-gram is ever a tuple of words.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = list[str]
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Row i: caption ``caption[i]`` holds n-gram ``gram[i]`` ``count[i]`` times. Sorted, each pair once."""

    caption: Integers
    gram: Integers
    count: Integers


@dataclass(frozen=True)
class Order:
    """All n-grams of one order: those of the candidates, those of the references, and how they are numbered."""

    candidates: Counts
    references: Counts
    grams: int  # n-grams are numbered 0..grams-1
    prefix: Integers  # the (n-1)-gram each begins with; empty for words


@dataclass(frozen=True)
class Corpus:
    """One candidate for each of N images, and their R references; ``image_index`` [R] is a reference's image."""

    orders: tuple[Order, ...]
    candidate_lengths: Integers
    reference_lengths: Integers
    image_index: Integers

    def per_image(self, reduce: np.ufunc, values: np.ndarray) -> np.ndarray:
        """Values of the references [R, ...] reduced to one an image [N, ...]; ``np.add``, ``np.maximum`` ..."""
        return reduce.reduceat(values, np.searchsorted(self.image_index, np.arange(len(self.candidate_lengths))))


def corpus(candidates: list[Tokens], references: list[list[Tokens]], orders: int) -> Corpus:
    """Count the n-grams of orders 1..orders.

    Raises:
        ValueError: when there is no image, an image has no reference, or the lists differ in length.
    """
    if not candidates or len(candidates) != len(references) or not all(references):
        raise ValueError("at least one image is wanted, each with a candidate and one reference or more")
    captions = [*candidates, *(reference for of_image in references for reference in of_image)]
    lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(w, len(numbers)) for c in captions for w in c], dtype=np.int64)
    image_index = np.repeat(np.arange(len(references)), [len(of_image) for of_image in references])
    counted = _orders(
        words, np.repeat(np.arange(len(captions)), lengths), max(1, len(numbers)), len(candidates), orders
    )
    return Corpus(tuple(counted), lengths[: len(candidates)], lengths[len(candidates) :], image_index)


def _orders(words: Integers, caption_of: Integers, vocabulary: int, candidates: int, orders: int) -> list[Order]:
    start, gram, prefix = np.arange(len(words)), words, np.empty(0, dtype=np.int64)
    grams, counted = vocabulary, []
    for n in range(1, orders + 1):
        pairs, count = np.unique(caption_of[start] * grams + gram, return_counts=True)
        caption, gram_of_pair = np.divmod(pairs, grams)
        cut = int(np.searchsorted(caption, candidates))
        of_candidates = Counts(caption[:cut], gram_of_pair[:cut], count[:cut])
        of_references = Counts(caption[cut:] - candidates, gram_of_pair[cut:], count[cut:])
        counted.append(Order(of_candidates, of_references, grams, prefix))
        # An n-gram that begins at a word goes on with the word n further, if that is of the same caption.
        inside = start + n < len(words)
        start, gram = start[inside], gram[inside]
        inside = caption_of[start + n] == caption_of[start]
        start, gram = start[inside], gram[inside]
        names, gram = np.unique(gram * vocabulary + words[start + n], return_inverse=True)
        grams, prefix = max(1, len(names)), names // vocabulary
    return counted


def looked_up(keys: Integers, values: np.ndarray, wanted: Integers) -> np.ndarray:
    """For each wanted key its value, 0 where it is not among ``keys`` (ascending, each once)."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=values.dtype)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def most_of_each(keys: Integers, values: Integers) -> tuple[Integers, Integers]:
    """The distinct keys, ascending, and the largest value of each."""
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.maximum.reduceat(values, first) if len(first) else values
