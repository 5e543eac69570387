"""Greedy and beam search, diverse beams, sampling and ensembles, against plain searches over everything."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import END, PAD, START, UNK
from captioning.model import search as search_module
from captioning.model.hypotheses import Hypothesis
from captioning.model.search import SearchOptions, search, search_features
from tests.unit.test_model import KINDS, tiny

WORDS = [4, 5, 6, 7, 8]
BEAM3 = SearchOptions(beam_size=3)


class Patches(nn.Module):
    """An encoder that is quick, and tells the patches of ``pictures`` apart as no untrained ResNet does."""

    def __init__(self):
        super().__init__()
        self.colours = nn.Conv2d(3, 512, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.colours(nn.functional.adaptive_avg_pool2d(images.float() / 64 - 2, 3))

    def pooled(self, images: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        return self(images).mean(dim=(2, 3))


def pictures(count: int) -> torch.Tensor:
    patches = torch.randint(0, 256, (count, 3, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return nn.functional.interpolate(patches, 9)


def peaked(kind: str = "lstm", seed: int = 0):
    """A tiny model whose word probabilities differ enough for searches to disagree, and depend on the image."""
    model = tiny(kind)
    torch.manual_seed(seed)
    model.encoder = Patches()
    for name, parameter in model.decoder.named_parameters():
        if "classifier" in name or name in ("bias", "embedding.weight"):
            nn.init.normal_(parameter)
    word_bias(model)[END] = 1.0
    return model.eval()


def word_bias(model) -> torch.Tensor:
    decoder = model.decoder
    return (decoder.bias if hasattr(decoder, "bias") else decoder.classifier.bias).data


@torch.no_grad()
def log_probabilities(model, image: torch.Tensor, captions: list[tuple[int, ...]]) -> list[float]:
    """Of each caption of one image [3, S, S], by teacher forcing; <end> counts where the caption has it."""
    lengths = torch.tensor([len(caption) for caption in captions])
    words = nn.utils.rnn.pad_sequence([torch.tensor(caption) for caption in captions], batch_first=True)
    logits, _ = model.decoder(model.encode(image[None]), PaddedCaptions.of(words, lengths, torch.zeros_like(lengths)))
    wanted = torch.tensor([word for caption in captions for word in caption])
    by_word = logits.log_softmax(dim=1).gather(1, wanted[:, None]).squeeze(1)
    return [float(part.sum()) for part in by_word.split(lengths.tolist())]


@torch.no_grad()
def first_word(model, image: torch.Tensor) -> torch.Tensor:
    """Logits [V] of a caption's first word."""
    return model.decoder.step(model.decoder.start(model.encode(image[None])), torch.tensor([START]))[0][0]


def every_caption(longest: int, shortest: int = 0):
    for length in range(shortest, longest + 1):
        yield from itertools.product(WORDS, repeat=length)


def ranked(model, image, captions, penalty: float) -> list[tuple[tuple[int, ...], float]]:
    """Captions with their log-probabilities, <end> counted, the best first."""
    found = zip(captions, log_probabilities(model, image, [(*c, END) for c in captions]), strict=True)
    return sorted(found, key=lambda pair: -pair[1] / (len(pair[0]) + 1) ** penalty)


def assert_same(found: list[list[Hypothesis]], others: list[list[Hypothesis]]):
    assert [[h.ids for h in of_image] for of_image in found] == [[h.ids for h in of_image] for of_image in others]
    for one, other in zip(itertools.chain(*found), itertools.chain(*others), strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_a_wide_beam_finds_what_trying_everything_finds(kind, penalty):
    model, (image,) = peaked(kind), pictures(1)
    expected = ranked(model, image, list(every_caption(longest=3)), penalty)
    options = SearchOptions(beam_size=160, length_penalty=penalty)  # room for all 156 captions
    found = search([model], image[None], options, max_words=3)[0]
    assert [h.ids for h in found] == [caption for caption, _ in expected]
    assert [h.log_probability for h in found] == pytest.approx([value for _, value in expected], abs=1e-4)


def test_rules_hold_as_if_everything_else_were_left_out():
    model, (image,) = peaked(), pictures(1)
    allowed = [c for c in every_caption(3, shortest=2) if len(set(c)) == len(c)]
    options = SearchOptions(beam_size=160, min_words=2, no_repeat_ngram=1)
    found = search([model], image[None], options, max_words=3)[0]
    assert [h.ids for h in found] == [caption for caption, _ in ranked(model, image, allowed, 0.0)]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_best_word_until_the_end(kind):
    lengths = set()
    for model, x in ((peaked(kind, seed), pictures(4)) for seed in range(5)):
        for image, (hypothesis,) in zip(x, search([model], x, SearchOptions(), max_words=6), strict=True):
            state, previous, ids = model.decoder.start(model.encode(image[None])), START, []
            while len(ids) < 6:
                logits, state = model.decoder.step(state, torch.tensor([previous]))
                previous = max((END, *WORDS), key=lambda w: float(logits[0, w]))
                if previous == END:
                    break
                ids.append(previous)
            assert hypothesis.ids == tuple(ids)
            lengths.add(len(ids))
    assert len(lengths) > 1, "captions of one length would leave stopping untested"


def plain_beam_search(model, image, beams: int, penalty: float, max_words: int) -> list[tuple[int, ...]]:
    """The algorithm for one image as a textbook has it, every caption scored anew by teacher forcing."""
    live, ended = [()], []
    for _ in range(max_words):
        grown = [(*caption, word) for caption in live for word in (END, *WORDS)]
        grown = sorted(zip(log_probabilities(model, image, grown), grown, strict=True), reverse=True)
        ended += [caption[:-1] for _, caption in grown[:beams] if caption[-1] == END]
        if len(ended) >= beams:
            break
        live = [caption for _, caption in grown if caption[-1] != END][:beams]
    else:
        ended += live
    return [caption for caption, _ in ranked(model, image, ended, penalty)[:beams]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_beam_is_the_textbooks(kind):
    model, x = peaked(kind), pictures(6)
    found = search([model], x, SearchOptions(beam_size=3, length_penalty=0.7), max_words=5)
    for image, of_image in zip(x, found, strict=True):
        assert [h.ids for h in of_image] == plain_beam_search(model, image, 3, 0.7, max_words=5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [SearchOptions(), BEAM3, SearchOptions(6, 1.0, no_repeat_ngram=2, beam_groups=3)],
    ids=["greedy", "beam", "groups"],
)
def test_a_batch_is_searched_as_its_images_alone(kind, options):
    model, x = peaked(kind, seed=7), pictures(5)
    together = search([model], x, options, max_words=6)
    assert_same(together, [search([model], image[None], options, max_words=6)[0] for image in x])


def test_search_stops_when_all_have_ended():
    model = peaked()
    word_bias(model)[END] = 100.0
    model.decoder.step = counted = Counting(model.decoder.step)
    for options in (SearchOptions(), SearchOptions(temperature=1.0, beam_size=3)):
        counted.calls = 0
        found = search([model], pictures(3), options, max_words=9)
        assert {h.ids for of_image in found for h in of_image} == {()} and counted.calls == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [SearchOptions(), BEAM3, SearchOptions(4, 1.0, beam_groups=2), SearchOptions(3, temperature=1.0)],
    ids=["greedy", "beam", "groups", "drawn"],
)
def test_asking_less_often_whether_all_have_ended_changes_nothing(kind, options, monkeypatch):
    model, x = peaked(kind, seed=5), pictures(8)
    word_bias(model)[END] = 20.0 if kind == "transformer" else 3.0
    model.decoder.step = counted = Counting(model.decoder.step)
    steps, found = [], []
    for words in (1, 4, 100):
        monkeypatch.setattr(search_module, "words_between_asks", lambda device, words=words: words)
        counted.calls = 0
        found.append(search([model], x, options, max_words=20))
        steps.append(counted.calls)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    assert steps[0] <= steps[1] < steps[2] == 21 and steps[1] % 4 == 0, steps


@pytest.mark.parametrize("penalty", [-0.5, 0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "options",
    [SearchOptions(5), SearchOptions(4, min_words=2, beam_groups=2), SearchOptions(4, temperature=1.0)],
    ids=["beam", "groups", "drawn"],
)
def test_the_best_caption_alone_is_certain_sooner(options, penalty):
    options, steps = replace(options, length_penalty=penalty), Counter()
    for seed in range(12):
        model, x = peaked(KINDS[seed % len(KINDS)], seed), pictures(5)
        features = [model.encode(x)]
        model.decoder.step = counted = Counting(model.decoder.step)
        found = {}
        for best_only in (False, True):
            counted.calls = 0
            found[best_only] = search_features([model], features, options, 12, best_only=best_only)
            steps[best_only] += counted.calls
        assert_same(*([of_image[:1] for of_image in found[best_only]] for best_only in (True, False)))
    assert steps[True] <= steps[False] - (penalty < 1), "the mean per word of a long caption may yet be better"


def test_finished_images_are_left_behind():
    """One image's captions end at once, the other's never: it goes on alone, and says what it says alone."""
    model, x = peaked("attention", seed=3), pictures(2)
    model.decoder.step = step = Recorded(model.decoder.step)
    bias = torch.zeros(2, 9)
    bias[0, END], bias[1, END] = 100.0, -100.0
    step.biases = bias
    found = search([model], x, BEAM3, max_words=7)
    assert found[0][0].ids == () and {len(h.ids) for h in found[1]} == {7}
    assert step.rows[0] == 2 and step.rows[-1] == 3, "from both images' first row to one image's three beams"
    step.biases = bias[1:]
    assert_same(found[1:], search([model], x[1:], BEAM3, max_words=7))


class Recorded:
    """A decoder's step with a bias [B, V] for every image, those of the last where fewer are left."""

    def __init__(self, function):
        self.function, self.rows, self.biases = function, [], torch.zeros(1, 1)

    def __call__(self, state, words):
        self.rows.append(len(words))
        logits, after = self.function(state, words)
        images = len(state.places.grid)
        bias = self.biases[-images:].repeat_interleave(len(words) // images, dim=0)
        return logits + bias, after


class Counting:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_attention_says_where_each_word_was_looked_for():
    """Follows each beam back through its parents: equal to the weights of the caption read alone."""
    model, x = peaked("attention", seed=2), pictures(2)
    for image, of_image in zip(x, search([model], x, BEAM3, max_words=5), strict=True):
        for hypothesis in of_image:
            with torch.no_grad():
                state = model.decoder.start(model.encode(image[None]))
                looked = []
                for word in (START, *hypothesis.ids[:-1]):
                    _, state = model.decoder.step(state, torch.tensor([word]))
                    looked.append(state.weights[0])
            assert hypothesis.attention.shape == (len(hypothesis.ids), 9)
            if hypothesis.ids:
                torch.testing.assert_close(hypothesis.attention, torch.stack(looked))
    assert search([peaked("lstm")], x, BEAM3, max_words=5)[0][0].attention is None


def test_groups_pay_for_what_earlier_groups_say():
    model, (image,) = peaked(seed=1), pictures(1)
    alike = search([model], image[None], SearchOptions(3, beam_groups=3, diversity=0.0), max_words=4)[0]
    assert len({h.ids for h in alike}) == 1, "without a price every group of one is greedy search"
    differing = search([model], image[None], SearchOptions(3, beam_groups=3, diversity=100.0), max_words=4)[0]
    assert len({h.ids[:1] for h in differing}) == 3
    for hypothesis in differing:
        assert hypothesis.log_probability == pytest.approx(
            log_probabilities(model, image, [(*hypothesis.ids, END)])[0], abs=1e-4
        )


def test_an_ensemble_votes_by_mean_probability():
    models, image = [peaked("lstm", seed=1), peaked("attention", seed=2)], pictures(1)
    mean = sum(first_word(model, image[0]).softmax(0) for model in models) / 2
    options = SearchOptions(beam_size=8)
    found = {h.ids: h.log_probability for h in search(models, image, options, max_words=1)[0]}
    assert found[()] == pytest.approx(math.log(mean[END]), abs=1e-5)
    assert max((w for w in WORDS), key=lambda w: mean[w]) in {ids[0] for ids in found if ids}
    twice = search([models[0]] * 2, image, BEAM3, max_words=4)
    assert_same(twice, search(models[:1], image, BEAM3, max_words=4))


def test_samples_follow_the_models_probabilities():
    model, (image,) = peaked(), pictures(1)
    logits = first_word(model, image)
    logits[[PAD, START, UNK]] = -torch.inf
    expected = (logits / 2.0).softmax(0)
    options = SearchOptions(beam_size=4000, temperature=2.0, seed=4)
    drawn = Counter(h.ids for h in search([model], image[None], options, max_words=1)[0])
    assert sum(drawn.values()) == 4000
    for word in WORDS:
        assert drawn[(word,)] / 4000 == pytest.approx(float(expected[word]), abs=0.04)
    again = Counter(h.ids for h in search([model], image[None], options, max_words=1)[0])
    assert again == drawn, "the same seed draws the same"


@pytest.mark.parametrize(
    ("cut", "kept"), [({"top_k": 2}, 2), ({"top_p": 1e-6}, 1), ({"top_k": 9, "top_p": 0.999999}, 6)]
)
def test_sampling_is_cut_to_the_likeliest(cut, kept):
    model, (image,) = peaked(), pictures(1)
    logits = first_word(model, image)
    best = sorted((END, *WORDS), key=lambda w: -float(logits[w]))[:kept]
    found = search([model], image[None], SearchOptions(beam_size=3000, temperature=1.0, **cut), max_words=1)[0]
    assert {h.ids for h in found} <= {() if w == END else (w,) for w in best}
    assert len({h.ids for h in found}) >= min(kept, 2)


def test_no_phrase_is_said_twice():
    model, x = peaked(seed=11), pictures(4)
    free = search([model], x, SearchOptions(beam_size=2, min_words=12), max_words=12)
    held = search([model], x, SearchOptions(beam_size=2, min_words=12, no_repeat_ngram=2), max_words=12)

    def repeats(found):
        return any(len(set(itertools.pairwise(h.ids))) < len(h.ids) - 1 for of_image in found for h in of_image)

    assert repeats(free) and not repeats(held)


def test_options_that_cannot_be_are_refused():
    for options in (
        {"beam_size": 0},
        {"beam_size": 3, "beam_groups": 2},
        {"temperature": 0.0},
        {"top_k": 0},
        {"top_p": 0.0},
    ):
        with pytest.raises(ValueError, match="must be"):
            SearchOptions(**options)
