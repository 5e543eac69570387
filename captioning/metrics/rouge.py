"""ROUGE-L, with the values of the COCO caption evaluation."""

from captioning.metrics.metric import Metric, TokenizedCaptions, mean_of
from captioning.metrics.ngrams import Tokens


def rouge(captions: TokenizedCaptions) -> list[Metric]:
    """The mean of ``rouge_l`` over the images."""
    return [mean_of("ROUGE-L", rouge_l(captions.candidates, captions.references))]


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
    """Lengths, a column of the dynamic program's table at a time as the bits of one number (Hyyrö, AWOCA 2004)."""
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
