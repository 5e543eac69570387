"""All that is to be said of a set of captions: scores, intervals, each image's own, classes, and what was left out."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from captioning.evaluation.results import ScoredCaptions
from captioning.metrics import Metric, measure
from captioning.metrics.cider import CIDER_ORDERS, cider
from captioning.metrics.class_scores import ClassScores, score_classes
from captioning.metrics.intervals import LEVEL, RESAMPLES, SEED, Difference, Interval, differences, intervals
from captioning.metrics.java import measure_in_java
from captioning.metrics.metric import mean_of
from captioning.metrics.ngrams import corpus

SHUFFLED = "CIDEr-shuffled"


@dataclass(frozen=True)
class Evaluation:
    """``metrics[i].each`` [N] are the images' own scores, in the order of ``captioned``."""

    captioned: ScoredCaptions
    metrics: tuple[Metric, ...]
    classes: ClassScores | None
    skipped: dict[str, str]  # metric -> why it is not among them

    @property
    def scores(self) -> dict[str, float]:
        return {metric.name: metric.value for metric in self.metrics}

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % bootstrap interval of every score."""
        return intervals(self.metrics)

    def per_image(self) -> list[dict[str, Any]]:
        """For each image its id, its caption and every metric of it alone; None where a metric does not concern it."""
        each = {
            metric.name: [None if math.isnan(value) else value for value in metric.each.tolist()]
            for metric in self.metrics
        }
        return [
            {**result, **{name: values[i] for name, values in each.items()}}
            for i, result in enumerate(self.captioned.results())
        ]

    def document(self) -> dict[str, Any]:
        """All of it, for JSON."""
        document = {
            "images": len(self.captioned),
            "tokenizer": self.captioned.tokenizer,
            "scores": self.scores,
            "intervals": self.intervals,
            "intervals_are": f"{LEVEL:.0%} percentile bootstrap over images, {RESAMPLES} resamples, seed {SEED}",
            "skipped": self.skipped,
            "missing": list(self.captioned.missing),
            "empty_captions": self.captioned.empty,
            "per_image": self.per_image(),
        }
        if self.classes is not None:
            document["classes"] = {
                "names": self.classes.names,
                "confusion": self.classes.confusion.tolist(),
                "each": self.classes.table(),
            }
        return document


def evaluate(captioned: ScoredCaptions, java_seconds: float = 0.0) -> Evaluation:
    """Score captions; METEOR and SPICE too when they may take ``java_seconds`` each and Java is there.

    The last metric, SHUFFLED, scores the same captions against each next image's references: what a model gets that
    writes plausible captions without looking. A model that looks scores well above it.
    """
    candidates, references = captioned.candidate_words, captioned.reference_words
    metrics = measure(candidates, references)
    java, skipped = measure_in_java(candidates, references, java_seconds) if java_seconds > 0 else ([], {})
    wrong = corpus(candidates, references[1:] + references[:1], CIDER_ORDERS)
    labels = [reference.label for reference in captioned.references]
    bleu4 = next(metric for metric in metrics if metric.name == "BLEU-4")
    classes = score_classes(labels, candidates, bleu4, captioned.words)
    return Evaluation(
        captioned,
        (
            *metrics,
            *java,
            *(classes.metrics if classes else ()),
            mean_of(SHUFFLED, cider(wrong, penalised=True)),
        ),
        classes,
        skipped,
    )


def compare(
    a: ScoredCaptions, b: ScoredCaptions, java_seconds: float = 0.0
) -> tuple[Evaluation, Evaluation, list[Difference]]:
    """Score two sets of captions of the same images in the same order (see ``in_common``), and test what differs."""
    of_a, of_b = evaluate(a, java_seconds), evaluate(b, java_seconds)
    names = [name for name in of_a.scores if name in of_b.scores and name != SHUFFLED]
    chosen = ([next(m for m in of.metrics if m.name == name) for name in names] for of in (of_a, of_b))
    return of_a, of_b, differences(*chosen)
