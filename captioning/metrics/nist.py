"""NIST, with the values of nltk."""

from functools import partial

import numpy as np

from captioning.metrics.metric import Metric, TokenizedCaptions
from captioning.metrics.ngrams import Corpus, Floats, Integers, looked_up

NIST_ORDERS = 5


def nist(captions: TokenizedCaptions) -> list[Metric]:
    """Corpus NIST-1..5 (Doddington, HLT 2002), with the values of nltk's ``corpus_nist``.

    The information an n-gram carries is taken from all references, also where an image is scored alone.
    """
    counted = captions.counted
    references = len(counted.image_index)
    information, guessed, chosen_lengths = [], [], []
    before = np.array([counted.reference_lengths.sum()])
    for n, order in enumerate(counted.orders[:NIST_ORDERS], start=1):
        ours, theirs = order.candidates, order.references
        occurrences = np.bincount(theirs.gram, theirs.count, minlength=order.grams)
        prefix = order.prefix if n > 1 else np.zeros(order.grams, dtype=np.int64)
        weight = np.zeros(order.grams)
        seen = np.flatnonzero(occurrences)
        weight[seen] = np.log2(before[prefix[seen]] / occurrences[seen])
        keys = ours.caption * order.grams + ours.gram
        wanted = counted.image_index[theirs.caption] * order.grams + theirs.gram
        both = np.minimum(theirs.count, looked_up(keys, ours.count, wanted))
        overlap = np.bincount(theirs.caption, both * weight[theirs.gram], minlength=references)
        best = _best_reference(counted, overlap)
        information.append(overlap[best])
        guessed.append(np.maximum(0, counted.candidate_lengths - n + 1))
        chosen_lengths.append(counted.reference_lengths[best])
        before = occurrences
    sums = np.stack([*information, *guessed, *chosen_lengths, counted.candidate_lengths], axis=1).astype(np.float64)
    totals = [partial(_nist, n) for n in range(1, NIST_ORDERS + 1)]
    return [Metric(f"NIST-{n}", total(sums), sums, total) for n, total in enumerate(totals, start=1)]


def _best_reference(counted: Corpus, overlap: np.ndarray) -> Integers:
    """Each image's reference with the most information in common, the longest of those."""
    order = np.lexsort((counted.reference_lengths, overlap, counted.image_index))
    return order[np.cumsum(np.bincount(counted.image_index)) - 1]


def _nist(n: int, sums: Floats) -> Floats:
    information, guessed = sums[..., :n], sums[..., NIST_ORDERS : NIST_ORDERS + n]
    reference_length = sums[..., 2 * NIST_ORDERS : 2 * NIST_ORDERS + n].sum(axis=-1)
    ratio = np.minimum(1.0, n * sums[..., -1] / np.maximum(1.0, reference_length))
    beta = np.log(0.5) / np.log(1.5) ** 2
    brevity = np.where(ratio > 0, np.exp(beta * np.log(np.maximum(ratio, 1e-300)) ** 2), 0.0)
    return (information / np.maximum(1.0, guessed)).sum(axis=-1) * brevity
