"""Where images have classes: which class a caption names, and how often it is the right one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import regex

from captioning.metrics.metric import Metric
from captioning.metrics.ngrams import Floats, Integers, Tokens
from captioning.metrics.ptb import words_for_scoring

NO_CLASS = "no class"


@dataclass(frozen=True)
class ClassScores:
    """The K classes of the labelled images; what their captions name; BLEU-4 of each class's captions.

    ``confusion`` [K, K + 1]: row the image's class, column the class its caption names, the last one none.
    """

    names: tuple[str, ...]
    confusion: Integers
    bleu4: Floats
    metrics: tuple[Metric, ...]  # accuracy, macro precision, recall and F1, over the labelled images

    @cached_property
    def by_bleu4(self) -> list[tuple[str, float]]:
        """Classes and their BLEU-4, best first: ``[:10]`` the best ten, ``[-10:]`` the worst."""
        order = sorted(range(len(self.names)), key=lambda k: (-self.bleu4[k], self.names[k]))
        return [(self.names[k], float(self.bleu4[k])) for k in order]

    def table(self) -> list[dict[str, object]]:
        """A row a class: name, images, precision, recall, F1, BLEU-4."""
        confusion = self.confusion.astype(np.float64)
        images = confusion.sum(axis=1)
        of_each = _of_each_class(np.diag(confusion), confusion[:, :-1].sum(axis=0), images)
        keys = ("class", "images", "precision", "recall", "F1", "BLEU-4")
        columns = (self.names, images.astype(int).tolist(), *(values.tolist() for values in (*of_each, self.bleu4)))
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def class_named(caption: Sequence[str], classes: dict[tuple[str, ...], int]) -> int | None:
    """The class whose name occurs in a caption: of several the longest, of equally long ones the first to come.
    ``classes`` are numbers by ``name_words``."""
    caption = _parts(caption)
    longest = max(map(len, classes), default=0)
    for length in range(min(longest, len(caption)), 0, -1):
        for start in range(len(caption) - length + 1):
            if (found := classes.get(caption[start : start + length])) is not None:
                return found
    return None


def name_words(label: str, words: Callable[[str], Sequence[str]] = words_for_scoring) -> tuple[str, ...]:
    """``Black-footed_ferret`` -> black, footed, ferret: cut as captions are, and further at every sign."""
    return _parts(words(label.replace("_", " ")))


def _parts(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for word in words for part in regex.findall(r"(?:[^\W_]|\p{M})+", word))


def score_classes(
    labels: Sequence[str | None],
    captions: Sequence[Tokens],
    bleu4: Metric,
    words: Callable[[str], Sequence[str]] = words_for_scoring,
) -> ClassScores | None:
    """Score the class named in each caption against the image's label; None when no image has one.

    Precision, recall and F1 are averaged over the classes that images have (macro); a class never named has
    precision 0. Images without a label do not count. Labels of the same words (``Cat``, ``cat``) are one class, under
    the first of these names: no caption could tell them apart. ``words`` cuts a label as the captions were cut.
    """
    named_by: dict[tuple[str, ...], str] = {}
    for name in sorted({label for label in labels if label is not None}):
        named_by.setdefault(name_words(name, words), name)
    if not named_by:
        return None
    names, classes = tuple(named_by.values()), {words: k for k, words in enumerate(named_by)}
    images = np.zeros((len(labels), len(names)))
    named = np.zeros((len(labels), len(names) + 1))
    for i, label in enumerate(labels):
        if label is not None:
            column = class_named(captions[i], classes)
            images[i, classes[name_words(label, words)]] = named[i, len(names) if column is None else column] = 1
    confusion = (images.T @ named).astype(np.int64)
    return ClassScores(names, confusion, bleu4.total(images.T @ bleu4.sums), tuple(_metrics(images, named[:, :-1])))


def _metrics(images: Floats, named: Floats) -> list[Metric]:
    """From one-hot rows [N, K], empty for images without a label: these get no score of their own, and sum to none."""
    right = images * named
    labelled = images.sum(axis=1)
    each = np.where(labelled > 0, right.sum(axis=1), np.nan)
    sums = np.concatenate([right, named, images], axis=1)
    accuracy = Metric("class_accuracy", each, np.stack([right.sum(axis=1), labelled], axis=1), _share)
    macro = [
        Metric(f"class_{what}_macro", each, sums, partial(_macro, which))
        for which, what in enumerate(("precision", "recall", "F1"))
    ]
    return [accuracy, *macro]


def _share(sums: Floats) -> Floats:
    return sums[..., 0] / np.maximum(1, sums[..., 1])


def _macro(which: int, sums: Floats) -> Floats:
    right, named, images = np.split(sums, 3, axis=-1)
    of_each = _of_each_class(right, named, images)[which]
    return of_each.sum(axis=-1) / np.maximum(1, (images > 0).sum(axis=-1))


def _of_each_class(right: Floats, named: Floats, images: Floats) -> tuple[Floats, Floats, Floats]:
    """Precision, recall and F1 of each class; 0 where nothing is there to divide by, and for classes without images."""
    precision = np.where(images > 0, right / np.maximum(1, named), 0.0)
    recall = right / np.maximum(1, images)
    return precision, recall, 2 * precision * recall / np.maximum(1e-300, precision + recall)
