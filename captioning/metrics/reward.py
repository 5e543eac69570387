"""The reward of self-critical training: CIDEr of sampled captions, on word numbers, many captions at a time.

Which words count: those that evaluation scores, Penn Treebank words or characters without punctuation (ptb.py), of
references and of samples, so that the reward is the metric. A sample is token ids of the training vocabulary. Where
tokens are words, each id's are looked up in a table made once (``token_words``); where they are characters or parts of
words, the ids become a text again, which is cut as evaluation cuts it (``CaptionWords``). Punctuation has no words: it
is neither rewarded nor punished. <end> is one word more, of references and of samples that ended by themselves: without
it a caption that breaks off in "on a" shares as many n-grams with the references as one that goes on, and self-critical
training finds that out (Rennie et al., https://arxiv.org/abs/1612.00563; CIDEr: Vedantam et al.,
https://arxiv.org/abs/1411.5726).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from captioning.metrics.bleu import bleu_of_sums
from captioning.metrics.ngrams import Floats, Integers
from captioning.metrics.ptb import words_for_scoring
from captioning.metrics.references import END_WORD, ORDERS, References, child_keys, ranges

_SIGMA = 6.0  # of CIDEr's penalty on a difference in length, in words


@dataclass(frozen=True)
class Words:
    """N captions as word numbers: ``numbers`` int64 [M], caption after caption, and ``lengths`` int64 [N]."""

    numbers: Integers
    lengths: Integers

    @cached_property
    def caption(self) -> Integers:
        """The caption of each word, [M]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def left(self) -> Integers:
        """How many words of its caption there are from each word on, itself counted, [M]."""
        return np.repeat(np.cumsum(self.lengths), self.lengths) - np.arange(len(self.numbers))

    def subset(self, kept: np.ndarray) -> "Words":
        """The captions ``kept``, bool [N]."""
        return Words(self.numbers[kept[self.caption]], self.lengths[kept])

    def with_end(self, ended: np.ndarray) -> "Words":
        """With <end> as the last word of those captions that ``ended``, bool [N]."""
        lengths = self.lengths + ended
        numbers = np.full(int(lengths.sum()), END_WORD)
        last = np.zeros(len(numbers), dtype=bool)
        last[np.cumsum(lengths)[ended] - 1] = True
        numbers[~last] = self.numbers
        return Words(numbers, lengths)


@dataclass(frozen=True)
class TokenWords:
    """The words of every token id: those of id i are ``numbers[starts[i] : starts[i] + counts[i]]``."""

    numbers: Integers
    starts: Integers
    counts: Integers

    def of(self, token_ids: Integers, lengths: Integers) -> Words:
        """Words of captions given as token ids [N, T], each row's first ``lengths`` [N]."""
        inside = np.arange(token_ids.shape[1]) < lengths[:, None]
        counts = np.where(inside, self.counts[token_ids], 0)
        return Words(
            self.numbers[ranges(self.starts[token_ids[inside]], self.counts[token_ids[inside]])], counts.sum(axis=1)
        )


def token_words(
    vocabulary: Sequence[str],
    references: References,
    special: int,
    cut: Callable[[str], Sequence[str]] = words_for_scoring,
) -> TokenWords:
    """The words, by ``cut``, of every token of a vocabulary whose tokens are words or punctuation, the first
    ``special`` none.

    Words that no reference has get numbers of their own.
    """
    numbers = {word: number for number, word in enumerate(references.words)}
    numbered: list[list[int]] = [
        [numbers.setdefault(word, len(numbers)) for word in (cut(token) if i >= special else ())]
        for i, token in enumerate(vocabulary)
    ]
    counts = np.array([len(words) for words in numbered], dtype=np.int64)
    flat = np.array([number for words in numbered for number in words], dtype=np.int64)
    return TokenWords(flat, np.cumsum(counts) - counts, counts)


class CaptionWords:
    """The words of captions whatever their tokens are: ``decode`` makes a text of ids, and ``cut`` words of that."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], references: References, cut: Callable[[str], Sequence[str]]
    ):
        self._decode, self._cut = decode, cut
        self._numbers = {word: number for number, word in enumerate(references.words)}

    def of(self, token_ids: Integers, lengths: Integers) -> Words:
        """Words of captions given as token ids [N, T], each row's first ``lengths`` [N].

        Words that no reference has get numbers of their own, at every call anew: models make up ever more of them.
        """
        known, unseen, numbers, counts = self._numbers, dict[str, int](), list[int](), list[int]()
        for ids, length in zip(token_ids.tolist(), lengths.tolist(), strict=True):
            words = self._cut(self._decode(ids[:length]))
            for word in words:
                number = known.get(word)
                numbers.append(unseen.setdefault(word, len(known) + len(unseen)) if number is None else number)
            counts.append(len(words))
        return Words(np.array(numbers, dtype=np.int64), np.array(counts, dtype=np.int64))


@dataclass(frozen=True)
class _Grams:
    """Distinct n-grams of N captions, sorted by ``row``, which is 4 * caption + order - 1; all [D]."""

    row: Integers
    gram: Integers
    count: Integers


@dataclass(frozen=True)
class _Shared:
    """Where captions and references of their images hold the same n-gram: D n-grams of captions, S shared pairs."""

    counts: Integers  # [D], references that hold it
    gram: Integers  # [S], the place among the D
    entry: Integers  # [S], the place among the references' entries


@dataclass(frozen=True)
class Reward:
    """``cider`` * CIDEr + ``bleu`` * BLEU-4 of captions against the references of their images.

    CIDEr is 0 to 10 and BLEU-4 0 to 1, as in evaluation. Document frequencies are those of ``references``.
    """

    references: References
    cider: float = 1.0
    bleu: float = 0.0

    def of(self, captions: Words, images: Integers) -> Floats:
        """float64 [N]: rewards of N captions, each of the image ``images`` [N] of the references.

        Captions may be empty. A caption of an image without references gets 0.
        """
        grams = self._grams(captions)
        shared = self._shared(grams, images)
        rewards = np.zeros(len(images))
        if self.cider:
            rewards += self.cider * self._cider(captions, images, grams, shared)
        if self.bleu:
            rewards += self.bleu * self._bleu(captions, images, grams, shared)
        return rewards

    def _grams(self, captions: Words) -> _Grams:
        keys = self.references.keys
        at, prefix = np.arange(len(captions.numbers)), np.full(len(captions.numbers), -1)
        rows, grams, fresh = [], [], len(keys)
        for n in range(ORDERS):
            inside = captions.left[at] > n
            at, prefix = at[inside], prefix[inside]
            wanted = child_keys(prefix, captions.numbers[at + n])
            gram = np.searchsorted(keys, wanted)
            unheard = keys[np.minimum(gram, len(keys) - 1)] != wanted if len(keys) else np.ones(len(at), dtype=bool)
            # N-grams of no reference are numbered on, so that the n-grams they begin are none of theirs either.
            names, number = np.unique(wanted[unheard], return_inverse=True)
            gram[unheard] = number + fresh
            fresh += len(names)
            rows.append(captions.caption[at] * ORDERS + n)
            grams.append(gram)
            prefix = gram
        pairs, count = np.unique(np.concatenate(rows) * max(1, fresh) + np.concatenate(grams), return_counts=True)
        row, gram = np.divmod(pairs, max(1, fresh))
        return _Grams(row, gram, count)

    def _shared(self, grams: _Grams, images: Integers) -> _Shared:
        ours = self.references
        distinct, image = np.unique(images, return_inverse=True)
        first, last = ours.entry_starts[distinct], ours.entry_starts[distinct + 1]
        entries = ranges(first, last - first)
        stride = int(grams.gram.max(initial=0)) + len(ours.keys) + 1
        held = np.repeat(np.arange(len(distinct)), last - first) * stride + ours.entry_gram[entries]
        wanted = image[grams.row // ORDERS] * stride + grams.gram
        begin = np.searchsorted(held, wanted)
        counts = np.searchsorted(held, wanted, side="right") - begin
        return _Shared(counts, np.repeat(np.arange(len(counts)), counts), entries[ranges(begin, counts)])

    def _cider(self, captions: Words, images: Integers, grams: _Grams, shared: _Shared) -> Floats:
        ours, number = self.references, len(images)
        rarity = ours.rarity(grams.gram)
        weights = grams.count * rarity
        norms = np.sqrt(np.bincount(grams.row, weights**2, minlength=number * ORDERS))
        row, reference = grams.row[shared.gram], ours.entry_reference[shared.entry]
        theirs = ours.entry_count[shared.entry] * rarity[shared.gram]
        products = np.minimum(weights[shared.gram], theirs) * theirs
        scale = norms[row] * ours.reference_norms[reference, row % ORDERS]
        caption = row // ORDERS
        # CIDEr takes the number of word pairs for the length.
        longer = np.maximum(0, captions.lengths - 1)[caption] - np.maximum(1, ours.reference_lengths[reference]) + 1.0
        similar = products / np.where(scale > 0, scale, 1.0) * np.exp(-(longer**2) / (2 * _SIGMA**2))
        per_image = ours.reference_starts[images + 1] - ours.reference_starts[images]
        return 10.0 / ORDERS * np.bincount(caption, similar, minlength=number) / np.maximum(1, per_image)

    def _bleu(self, captions: Words, images: Integers, grams: _Grams, shared: _Shared) -> Floats:
        ours, number = self.references, len(images)
        most = np.zeros(len(grams.gram))
        begin = np.cumsum(shared.counts) - shared.counts
        held = shared.counts > 0
        if held.any():
            most[held] = np.maximum.reduceat(ours.entry_count[shared.entry], begin[held])
        clipped = np.minimum(grams.count, most)
        matched = np.bincount(grams.row, clipped, minlength=number * ORDERS).reshape(number, ORDERS)
        guessed = np.maximum(0, captions.lengths[:, None] - np.arange(ORDERS))
        closest = self._closest_lengths(captions.lengths, images)
        sums = np.concatenate([matched, guessed, captions.lengths[:, None], closest[:, None]], axis=1)
        return np.where(closest < 0, 0.0, bleu_of_sums(ORDERS, sums.astype(np.float64)))

    def _closest_lengths(self, lengths: Integers, images: Integers) -> Integers:
        """Of each caption's references the length closest to its own, the shorter of two; -1 without references."""
        first = self.references.reference_starts[images]
        counts = self.references.reference_starts[images + 1] - first
        theirs = self.references.reference_lengths[ranges(first, counts)].astype(np.int64)
        longest = int(theirs.max(initial=0)) + 1
        far = np.abs(theirs - np.repeat(lengths, counts)) * longest + theirs  # (distance, length) as one number
        closest = np.full(len(images), -1)
        if (counts > 0).any():
            closest[counts > 0] = np.minimum.reduceat(far, (np.cumsum(counts) - counts)[counts > 0]) % longest
        return closest
