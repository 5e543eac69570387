"""Caption metrics: the table of their names. Adding one is a file beside this one and a line here; metric.py says what
it has to be. Fractions, not percent; CIDEr reaches 10, NIST has no limit."""

from captioning.metrics.bleu import bleu
from captioning.metrics.cider import ciders
from captioning.metrics.metric import Measure, Metric, TokenizedCaptions
from captioning.metrics.ngrams import Tokens
from captioning.metrics.nist import nist
from captioning.metrics.rouge import rouge

METRICS: dict[str, Measure] = {"BLEU": bleu, "ROUGE-L": rouge, "CIDEr": ciders, "NIST": nist}


def measure(candidates: list[Tokens], references: list[list[Tokens]]) -> list[Metric]:
    """Every metric of a set of captions: one token list an image, and its references, a list of token lists.

    Raises:
        ValueError: when there is no image, or an image has no reference.
    """
    captions = TokenizedCaptions(candidates, references)
    return [metric for of_name in METRICS.values() for metric in of_name(captions)]
