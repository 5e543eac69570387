"""BLEU-1..4, ROUGE-L and CIDEr-D on tokenized captions, with the values of the COCO caption evaluation server.

Candidates are one token list per image, references a list of token lists per image.
"""

import math
from collections import Counter

from captioning.data.vocabulary import tokenize

Tokens = list[str]
NGrams = Counter[tuple[str, ...]]

# What the COCO evaluation removes after tokenizing (Chen et al., "Microsoft COCO Captions", section 4.1,
# https://arxiv.org/abs/1504.00325), and the forms in which this tokenizer writes quotation marks.
_PUNCTUATION = frozenset("'' ' `` ` ( ) { } [ ] -lrb- -rrb- -lcb- -rcb- . ? ! , : - -- ... ;".split(" "))  # noqa: SIM905
TOKENIZER = "nltk Treebank words without punctuation"


def words_for_scoring(caption: str) -> list[str]:
    """Lower-case words without punctuation, close to Stanford's PTBTokenizer, which COCO's evaluation runs."""
    return [word for word in tokenize(caption) if word not in _PUNCTUATION]


def score(candidates: list[Tokens], references: list[list[Tokens]]) -> dict[str, float]:
    """Every metric of a set of captions, by its usual name; fractions, not percent (CIDEr-D reaches 10)."""
    bleus = bleu(candidates, references)
    return {
        **{f"BLEU-{n}": value for n, value in enumerate(bleus, start=1)},
        "ROUGE-L": _mean(rouge_l(candidates, references)),
        "CIDEr-D": _mean(cider_d(candidates, references)),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def ngrams(tokens: Tokens, n: int) -> NGrams:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(candidates: list[Tokens], references: list[list[Tokens]], orders: int = 4) -> list[float]:
    """Corpus BLEU-1..orders, brevity against the closest reference length (Papineni et al., ACL 2002).

    The tiny terms are the evaluation server's own, so that values agree to rounding also where nothing matches.
    """
    tiny, small = 1e-15, 1e-9
    matched, guessed = [0] * orders, [0] * orders
    length = reference_length = 0
    for candidate, refs in zip(candidates, references, strict=True):
        length += len(candidate)
        reference_length += min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]
        for n in range(1, orders + 1):
            most = _most_of_each([ngrams(ref, n) for ref in refs])
            matched[n - 1] += sum(min(count, most[gram]) for gram, count in ngrams(candidate, n).items())
            guessed[n - 1] += max(0, len(candidate) - n + 1)
    ratio = (length + tiny) / (reference_length + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(orders):
        product *= (matched[n] + tiny) / (guessed[n] + small)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def _most_of_each(counters: list[NGrams]) -> NGrams:
    most: NGrams = Counter()
    for counter in counters:
        most |= counter
    return most


def rouge_l(candidates: list[Tokens], references: list[list[Tokens]], beta: float = 1.2) -> list[float]:
    """ROUGE-L per image: F-measure of the best precision and best recall over its references (Lin, ACL 2004)."""
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        common = [_longest_common_subsequence(candidate, ref) for ref in refs]
        precision = max(c / max(1, len(candidate)) for c in common)
        recall = max(c / max(1, len(ref)) for c, ref in zip(common, refs, strict=True))
        both = precision and recall
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if both else 0.0)
    return scores


def _longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def cider_d(
    candidates: list[Tokens], references: list[list[Tokens]], orders: int = 4, sigma: float = 6.0
) -> list[float]:
    """CIDEr-D per image (Vedantam et al., https://arxiv.org/abs/1411.5726); document frequencies of the references."""
    frequency: Counter[tuple[str, ...]] = Counter()
    for refs in references:
        frequency.update({gram for ref in refs for n in range(1, orders + 1) for gram in ngrams(ref, n)})
    log_images = math.log(len(references))

    def weighted(tokens: Tokens) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """tf-idf vector and its norm for each order, and the caption's length in bigrams."""
        vectors = []
        for n in range(1, orders + 1):
            grams = ngrams(tokens, n)
            vectors.append({g: c * (log_images - math.log(max(1, frequency[g]))) for g, c in grams.items()})
        norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors]
        return vectors, norms, max(0, len(tokens) - 1)

    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        vectors, norms, length = weighted(candidate)
        total = 0.0
        for ref in refs:
            ref_vectors, ref_norms, ref_length = weighted(ref)
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * sigma**2))
            for vector, norm, ref_vector, ref_norm in zip(vectors, norms, ref_vectors, ref_norms, strict=True):
                clipped = sum(min(v, ref_vector.get(g, 0.0)) * ref_vector.get(g, 0.0) for g, v in vector.items())
                total += penalty * clipped / (norm * ref_norm or 1.0)
        scores.append(10.0 * total / orders / len(refs))
    return scores
