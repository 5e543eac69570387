"""BLEU, with the values of the COCO caption evaluation."""

from functools import partial

import numpy as np

from captioning.metrics.metric import Metric, TokenizedCaptions
from captioning.metrics.ngrams import Floats, looked_up, most_of_each

BLEU_ORDERS = 4


def bleu(captions: TokenizedCaptions) -> list[Metric]:
    """Corpus BLEU-1..4, brevity against the closest reference length (Papineni et al., ACL 2002)."""
    counted = captions.counted
    images = len(counted.candidate_lengths)
    matched, guessed = [], []
    for n, order in enumerate(counted.orders[:BLEU_ORDERS], start=1):
        ours, theirs = order.candidates, order.references
        keys, most = most_of_each(counted.image_index[theirs.caption] * order.grams + theirs.gram, theirs.count)
        clipped = np.minimum(ours.count, looked_up(keys, most, ours.caption * order.grams + ours.gram))
        matched.append(np.bincount(ours.caption, clipped, minlength=images))
        guessed.append(np.maximum(0, counted.candidate_lengths - n + 1))
    # The closest length, the shorter of two equally close: the least of (distance, length), as one number.
    length, longest = counted.reference_lengths, int(counted.reference_lengths.max()) + 1
    distance = np.abs(length - counted.candidate_lengths[counted.image_index])
    closest = counted.per_image(np.minimum, distance * longest + length) % longest
    sums = np.stack([*matched, *guessed, counted.candidate_lengths, closest], axis=1).astype(np.float64)
    totals = [partial(bleu_of_sums, n) for n in range(1, BLEU_ORDERS + 1)]
    return [Metric(f"BLEU-{n}", total(sums), sums, total) for n, total in enumerate(totals, start=1)]


def bleu_of_sums(n: int, sums: Floats) -> Floats:
    """BLEU-n of sums [..., 10]: n-grams matched and guessed of orders 1 to 4, length, closest reference length."""
    # The tiny terms are the evaluation server's own, so that values agree to rounding also where nothing matches.
    tiny, small = 1e-15, 1e-9
    precisions = (sums[..., :n] + tiny) / (sums[..., BLEU_ORDERS : BLEU_ORDERS + n] + small)
    ratio = (sums[..., -2] + tiny) / (sums[..., -1] + small)
    brevity = np.where(ratio < 1, np.exp(np.minimum(0, 1 - 1 / ratio)), 1.0)
    return precisions.prod(axis=-1) ** (1 / n) * brevity
