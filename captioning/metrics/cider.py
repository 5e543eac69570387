"""CIDEr, as the COCO caption evaluation prints it (CIDEr-D by its definition), and plain."""

import numpy as np

from captioning.metrics.metric import Metric, TokenizedCaptions, mean_of
from captioning.metrics.ngrams import Corpus, Floats, looked_up

CIDER_ORDERS = 4


def ciders(captions: TokenizedCaptions) -> list[Metric]:
    """Means over the images of ``cider``, with and without its penalties."""
    return [
        mean_of("CIDEr", cider(captions.counted, penalised=True)),
        mean_of("CIDEr-plain", cider(captions.counted, penalised=False)),
    ]


def cider(counted: Corpus, penalised: bool, sigma: float = 6.0) -> Floats:
    """CIDEr per image (Vedantam et al., https://arxiv.org/abs/1411.5726); document frequencies of the references.

    ``penalised`` gives CIDEr-D, which clips repeated n-grams and penalises another length; it is what the COCO
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
        found = looked_up(ours.caption * order.grams + ours.gram, weights, image * order.grams + theirs.gram)
        products = (np.minimum(found, their_weights) if penalised else found) * their_weights
        scale = norms[counted.image_index] * their_norms
        total += np.bincount(theirs.caption, products, minlength=references) / np.where(scale > 0, scale, 1.0)
    if penalised:
        ours_long, theirs_long = (np.maximum(0, n - 1) for n in (counted.candidate_lengths, counted.reference_lengths))
        total *= np.exp(-((ours_long[counted.image_index] - theirs_long) ** 2) / (2 * sigma**2))
    return 10.0 * counted.per_image(np.add, total) / CIDER_ORDERS / np.bincount(counted.image_index)
