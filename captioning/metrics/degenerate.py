"""Signs that captions go wrong while they are trained for their metric: broken ends, repetition, sameness.

All on word numbers of scoring (reward.py), without <end>, many captions at a time; in no language in particular.
"""

import numpy as np

from captioning.metrics.ngrams import Integers
from captioning.metrics.references import References
from captioning.metrics.reward import Words


def ends_badly(captions: Words, references: References) -> np.ndarray:
    """bool [N]: captions whose last word is one that hardly any reference ends with, "a" or "with", or that are empty.

    Of COCO's own validation captions 0.3 % are such.
    """
    bad = captions.lengths == 0
    last = captions.numbers[np.cumsum(captions.lengths)[~bad] - 1]
    known = np.minimum(last, len(references.words) - 1)
    bad[~bad] = (known == last) & references.rarely_ends[known]
    return bad


def repeats(captions: Words) -> np.ndarray:
    """bool [N]: captions that say a word twice in a row, or any three words in a row twice.

    Of COCO's own validation captions 0.4 % do.
    """
    words, left, caption = captions.numbers, captions.left, captions.caption
    at = np.flatnonzero(left > 1)
    twice = caption[at[words[at] == words[at + 1]]]
    at = np.flatnonzero(left > 2)
    triples = np.stack([caption[at], words[at], words[at + 1], words[at + 2]])
    distinct, times = np.unique(triples, axis=1, return_counts=True)
    repeating = np.zeros(len(captions.lengths), dtype=bool)
    repeating[twice] = True
    repeating[distinct[0, times > 1]] = True
    return repeating


def distinct_captions(captions: Words, images: Integers) -> int:
    """How many different captions there are, the same words for two images counted twice."""
    parts = np.split(captions.numbers, np.cumsum(captions.lengths))[:-1]
    return len({(image, part.tobytes()) for image, part in zip(images.tolist(), parts, strict=True)})
