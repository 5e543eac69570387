"""Samples for training: the captions that search draws, and probabilities that add up to one."""

import itertools
from collections import Counter

import pytest
import torch

from captioning.data.vocabulary import END, PAD, START, UNK
from captioning.model import sampling
from captioning.model.draws import caption_keys
from captioning.model.sampling import Samples, policy, sample
from captioning.model.search import SearchOptions, search
from tests.unit.test_draws import varied
from tests.unit.test_search import KINDS, WORDS, pictures, word_bias


def captions_of(samples: Samples) -> list[list[tuple[int, ...]]]:
    return [
        [tuple(ids[:length]) for ids, length in zip(*of_image, strict=True)]
        for of_image in zip(samples.token_ids.tolist(), samples.lengths.tolist(), strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_words", [1, 2, 7])
def test_samples_are_those_of_the_search_and_the_last_is_greedy(kind, max_words):
    model, x = varied(kind, seed=7), pictures(4)
    drawn = search([model], x, SearchOptions(beam_size=3, temperature=1.0, seed=8), max_words, [5, 1, 9, 2])
    keys = caption_keys(8, [5, 1, 9, 2], 3, x.device)
    model.decoder.train()
    found = sample(model.decoder, model.encode(x), keys, True, max_words)
    assert model.decoder.training, "left as it was"
    greedy = [of_image[0].ids for of_image in search([model], x, SearchOptions(), max_words)]
    for of_image, ours, best in zip(drawn, captions_of(found), greedy, strict=True):
        assert Counter(h.ids for h in of_image) == Counter(ours[:3]) and ours[3] == best
    assert captions_of(found.first(3)) == captions_of(sample(model.decoder, model.encode(x), keys, False, max_words))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_go_on_after_all_have_ended_are_the_same(kind, monkeypatch):
    """As on a GPU, which is asked every few words alone."""
    model, x = varied(kind, seed=7), pictures(4)
    word_bias(model)[END] = 12.0
    keys, found = caption_keys(8, range(4), 3, x.device), []
    for words in (1, 6):
        monkeypatch.setattr(sampling, "words_between_asks", lambda device, words=words: words)
        found.append(sample(model.decoder, model.encode(x), keys, True, 12))
    assert found[0].token_ids.shape[2] < found[1].token_ids.shape[2] == 6
    assert captions_of(found[0]) == captions_of(found[1])
    targets = [samples.padded() for samples in found]
    assert torch.equal(targets[0].token_ids, targets[1].token_ids) and torch.equal(*(t.lengths for t in targets))


def test_as_targets_captions_have_the_end_they_drew():
    ids = torch.tensor([[[5, 6, 7], [5, PAD, PAD]], [[PAD, PAD, PAD], [8, 4, PAD]]])
    captions = Samples(ids, torch.tensor([[3, 1], [0, 2]]), max_words=3).padded()
    assert captions.token_ids.tolist() == [[5, 6, 7], [5, END, PAD], [END, PAD, PAD], [8, 4, END]]
    assert captions.lengths.tolist() == [3, 2, 1, 3] and captions.image_index.tolist() == [0, 0, 1, 1]
    assert captions.targets.tolist() == [5, 6, 7, 5, END, END, 8, 4, END]
    shorter = Samples(ids[:, 1:, :2], torch.tensor([[1], [2]]), max_words=9).padded()
    assert shorter.token_ids.tolist() == [[5, END, PAD], [8, 4, END]]
    assert len(Samples(ids[:0], torch.empty(0, 2, dtype=torch.int64), 3).padded()) == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_captions_add_up_to_one_and_samples_follow_them(kind):
    """The policy that log-probabilities are taken of is the one that captions are drawn from."""
    model, x = varied(kind, seed=3), pictures(1)
    every = [caption for length in range(3) for caption in itertools.product(WORDS, repeat=length)]
    probabilities = dict(zip(every, probabilities_of(model, x, every, max_words=2).tolist(), strict=True))
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    keys = caption_keys(1, [0], 4000, x.device)
    drawn = Counter(captions_of(sample(model.decoder, model.encode(x), keys, False, max_words=2))[0])
    assert drawn.total() == 4000
    for caption in every:
        assert drawn[caption] / 4000 == pytest.approx(probabilities[caption], abs=0.03)


def probabilities_of(model, x, captions, max_words: int) -> torch.Tensor:
    """Of captions of one image, by teacher forcing."""
    ids = torch.zeros(1, len(captions), max_words, dtype=torch.int64)
    for i, caption in enumerate(captions):
        ids[0, i, : len(caption)] = torch.tensor(caption, dtype=torch.int64)
    padded = Samples(ids, torch.tensor([[len(caption) for caption in captions]]), max_words).padded()
    logits, _ = model.decoder(model.encode(x), padded)
    by_word = policy(logits).gather(1, padded.targets.unsqueeze(1)).squeeze(1)
    return torch.stack([part.sum() for part in by_word.split(padded.lengths.tolist())]).exp()


def test_what_is_never_said_has_no_probability():
    scores = policy(torch.randn(3, 9, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32 and scores[:, [PAD, START, UNK]].isneginf().all()
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(3))
