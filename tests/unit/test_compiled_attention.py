"""torch.compile around attention over places, whose shapes change from word to word."""

import copy
from typing import Any

import pytest
import torch
import torch._dynamo

from captioning.data.padded_captions import PaddedCaptions
from captioning.model.captioner import Captioner
from captioning.model.features import Features
from captioning.model.search import SearchOptions, search_features
from tests.unit.test_model import random_captions, tiny


def trained_on(model: Captioner, sizes: list[int], masked: bool) -> list[torch.Tensor]:
    """The decoder's gradients over batches of so many images."""
    for images in sizes:
        torch.manual_seed(images)
        mask = torch.arange(6) < torch.randint(1, 7, (images, 1)) if masked else None
        features = Features(torch.randn(images, 6, 512), mask)
        logits, _ = model.decoder.train()(features, PaddedCaptions.of(*random_captions(3 * images, images)))
        logits.square().mean().backward()
    return [parameter.grad for parameter in model.decoder.parameters()]


def captioned(model: Captioner, sizes: list[int]) -> list[Any]:
    """What is found greedily and with three beams in batches of so many images."""
    found = []
    for images in sizes:
        torch.manual_seed(images)
        features = Features(torch.randn(images, 6, 512))
        for beams in (1, 3):
            best = search_features([model.eval()], [features], SearchOptions(beam_size=beams), max_words=6)
            found += [[hypothesis.ids for hypothesis in of_image] for of_image in best]
    return found


@pytest.mark.parametrize("kind", ["attention", "updown"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_computes_the_same_and_has_few_graphs_for_all_sizes(kind, masked):
    torch._dynamo.reset()
    plain, graphs = tiny(kind), []
    compiled = copy.deepcopy(plain)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled.compile_parts(4, 4, backend=backend)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for mine, theirs in zip(
            trained_on(compiled, [6, 5, 4], masked), trained_on(plain, [6, 5, 4], masked), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
        assert captioned(compiled, [4, 3]) == captioned(plain, [4, 3])
        # One image, one caption an image, and several of either are graphs of their own; no more come of other sizes.
        trained_on(compiled, [9, 7, 3], masked)
        captioned(compiled, [5, 2])
        known = len(graphs)
        trained_on(compiled, [8, 10, 2], masked)
        captioned(compiled, [6, 7])
    assert 0 < len(graphs) == known <= 12
