"""BLEU, ROUGE-L, CIDEr, CIDEr and NIST on tokenized captions, with the values of the COCO caption evaluation.

Candidates are one token list per image, references a list of token lists per image. Every score of a set of captions
is a function of sums over its images, and every metric keeps what it sums: that is what intervals are drawn from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from captioning.metrics.ngrams import Corpus, Floats, Integers, Tokens, corpus, looked_up, most_of_each

BLEU_ORDERS, CIDER_ORDERS, NIST_ORDERS = 4, 4, 5


@dataclass(frozen=True)
class Metric:
    """One metric of a set of captions.

    ``sums`` [images, k] are its sufficient statistics; ``total`` turns them, summed over any images, [..., k], into
    scores [...]. ``each`` [images] is what every image gets alone.
    """

    name: str
    each: Floats
    sums: Floats
    total: Callable[[Floats], Floats]

    @property
    def value(self) -> float:
        """The score of all images together."""
        return float(self.total(self.sums.sum(axis=0)))


def mean_of(name: str, each: Sequence[float] | Floats) -> Metric:
    """A metric whose total is the mean over the images."""
    values = np.asarray(each, dtype=np.float64)
    return Metric(name, values, np.stack([values, np.ones_like(values)], axis=1), _mean)


def _mean(sums: Floats) -> Floats:
    return sums[..., 0] / sums[..., 1]


def measure(candidates: list[Tokens], references: list[list[Tokens]]) -> list[Metric]:
    """Every metric of a set of captions; fractions, not percent (CIDEr reaches 10, NIST has no limit).

    Raises:
        ValueError: when there is no image, or an image has no reference.
    """
    counted = corpus(candidates, references, NIST_ORDERS)
    return [
        *bleu(counted),
        mean_of("ROUGE-L", rouge_l(candidates, references)),
        mean_of("CIDEr", cider(counted, penalised=True)),
        mean_of("CIDEr-plain", cider(counted, penalised=False)),
        *nist(counted),
    ]


def bleu(counted: Corpus) -> list[Metric]:
    """Corpus BLEU-1..4, brevity against the closest reference length (Papineni et al., ACL 2002)."""
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


def rouge_l(candidates: list[Tokens], references: list[list[Tokens]], beta: float = 1.2) -> list[float]:
    """ROUGE-L per image: F-measure of the best precision and best recall over its references (Lin, ACL 2004)."""
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        # The COCO evaluation takes a caption without words for one empty word.
        candidate, refs = candidate or [""], [ref or [""] for ref in refs]
        common = _longest_common_subsequences(candidate, refs)
        precision = max(common) / len(candidate)
        recall = max(c / len(ref) for c, ref in zip(common, refs, strict=True))
        both = precision and recall
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if both else 0.0)
    return scores


def _longest_common_subsequences(candidate: Tokens, references: list[Tokens]) -> list[int]:
    """Lengths, a column of the usual table at a time as the bits of one number (Hyyrö, AWOCA 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(candidate):
        places[word] = places.get(word, 0) | 1 << i
    everything = (1 << len(candidate)) - 1
    lengths = []
    for reference in references:
        column = everything
        for word in reference:
            matches = column & places.get(word, 0)
            column = (column + matches) | (column - matches)
        lengths.append(len(candidate) - (column & everything).bit_count())
    return lengths


def cider(counted: Corpus, penalised: bool, sigma: float = 6.0) -> Floats:
    """CIDEr per image (Vedantam et al., https://arxiv.org/abs/1411.5726); document frequencies of the references.

    ``penalised`` gives CIDEr, which clips repeated n-grams and penalises another length; it is what the COCO
    evaluation prints as CIDEr.
    """
    images, references = len(counted.candidate_lengths), len(counted.image_index)
    total = np.zeros(references)
    for order in counted.orders[:CIDER_ORDERS]:
        ours, theirs = order.candidates, order.references
        image = counted.image_index[theirs.caption]
        documents = np.unique(image * order.grams + theirs.gram) % order.grams
        frequency = np.bincount(documents, minlength=order.grams)
        rarity = np.log(images) - np.log(np.maximum(1, frequency))
        weights, their_weights = ours.count * rarity[ours.gram], theirs.count * rarity[theirs.gram]
        norms = np.sqrt(np.bincount(ours.caption, weights**2, minlength=images))
        their_norms = np.sqrt(np.bincount(theirs.caption, their_weights**2, minlength=references))
        matched = looked_up(ours.caption * order.grams + ours.gram, weights, image * order.grams + theirs.gram)
        products = (np.minimum(matched, their_weights) if penalised else matched) * their_weights
        scale = norms[counted.image_index] * their_norms
        total += np.bincount(theirs.caption, products, minlength=references) / np.where(scale > 0, scale, 1.0)
    if penalised:
        ours_long, theirs_long = (np.maximum(0, n - 1) for n in (counted.candidate_lengths, counted.reference_lengths))
        total *= np.exp(-((ours_long[counted.image_index] - theirs_long) ** 2) / (2 * sigma**2))
    return 10.0 * counted.per_image(np.add, total) / CIDER_ORDERS / np.bincount(counted.image_index)


def nist(counted: Corpus) -> list[Metric]:
    """Corpus NIST-1..5 (Doddington, HLT 2002), with the values of nltk's ``corpus_nist``.

    The information an n-gram carries is taken from all references, also where an image is scored alone.
    """
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
