"""Self-critical training's gradient is that of the expected reward, of the right captions of the right images."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider
from torch import nn

from captioning.data.collate import CaptionBatch, pad_captions
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.tokenizer import TOKENIZERS
from captioning.data.vocabulary import END, SPECIAL, Vocabulary
from captioning.metrics import references as counted
from captioning.metrics.ptb import CUTS, tokenizer_for
from captioning.metrics.reward import Reward, token_words
from captioning.model.decoders.lstm import LstmDecoder
from captioning.model.decoders.recurrence import Lstm
from captioning.model.features import Features
from captioning.model.sampling import Samples, policy
from captioning.training.objectives import OBJECTIVES, CrossEntropy, SelfCritical, StepScope, self_critical
from captioning.training.objectives.self_critical import advantages, policy_loss, sample_words
from tests.unit.test_draws import varied
from tests.unit.test_model import KINDS, tiny_decoder
from tests.unit.test_search import pictures, word_bias

MAX_WORDS = 2
EVERY = [(), (4,), (5,), (4, 4), (4, 5), (5, 4), (5, 5)]  # all captions of two words, the longest cut
SCOPE = StepScope(step=3, images=2, targets=1, world_size=1)


def as_samples(captions: list[list[tuple[int, ...]]], max_words: int = MAX_WORDS) -> Samples:
    ids = torch.zeros(len(captions), len(captions[0]), max_words, dtype=torch.int64)
    for of_image, row in zip(captions, ids, strict=True):
        for caption, place in zip(of_image, row, strict=True):
            place[: len(caption)] = torch.tensor(caption, dtype=torch.int64)
    return Samples(ids, torch.tensor([[len(c) for c in of_image] for of_image in captions]), max_words)


class Tiny:
    """Two images, a decoder of two words, and a reward for each of the seven captions of each image."""

    def __init__(self):
        torch.manual_seed(1)
        self.decoder = LstmDecoder(config := tiny_decoder("lstm", num_layers=1, dropout=0.0), config.embedding_size, 6)
        self.features = Features(torch.randn(2, 12))
        self.rewards = torch.rand(2, len(EVERY), dtype=torch.float64)
        self.captions = as_samples([EVERY]).padded()
        starts = self.captions.lengths.cumsum(0) - self.captions.lengths
        self.rows = [
            list(range(a, a + n)) for a, n in zip(starts.tolist(), self.captions.lengths.tolist(), strict=True)
        ]

    def logits(self, image: int) -> torch.Tensor:
        """[M, V] of all captions of an image."""
        return self.decoder(self.features[image : image + 1], self.captions)[0]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        by_word = policy(logits).gather(1, self.captions.targets.unsqueeze(1)).squeeze(1)
        return torch.stack([by_word[rows].sum() for rows in self.rows]).exp()

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        parameters = list(self.decoder.parameters())
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    def of_expected_reward(self) -> torch.Tensor:
        """Autograd's gradient of the mean expected reward of the two images."""
        expected = [self.probabilities(self.logits(i)) @ self.rewards[i].float() for i in range(2)]
        return self.gradient(torch.stack(expected).mean())

    def of_estimator(self, samples: int, greedy: bool, wrong: str | None = None) -> torch.Tensor:
        """The estimator's gradient, its expectation over all tuples of samples."""
        total = torch.zeros(())
        for image in range(2):
            logits = self.logits(image)
            probabilities = self.probabilities(logits).detach()
            rewards = self.rewards[1 - image if wrong == "image" else image]
            best = rewards[int(probabilities.argmax())].unsqueeze(0) if greedy else None
            for chosen in itertools.product(range(len(EVERY)), repeat=samples):
                captions = as_samples([[EVERY[i] for i in chosen]]).padded()
                own = [row for i in chosen for row in self.rows[i]]
                if wrong == "end":
                    captions, own = without_end(captions, own)
                advantage = advantages(rewards[list(chosen)].unsqueeze(0), best)
                loss, _ = policy_loss(logits[own], captions, advantage, step_images=2, world_size=1)
                total = total + probabilities[list(chosen)].prod() * loss
        return self.gradient(total if wrong == "sign" else -total)


def without_end(captions: PaddedCaptions, rows: list[int]) -> tuple[PaddedCaptions, list[int]]:
    kept = [i for i, word in enumerate(captions.targets.tolist()) if word != END]
    lengths = captions.lengths - (captions.token_ids == END).sum(dim=1)
    return PaddedCaptions.of(captions.token_ids, lengths, captions.image_index), [rows[i] for i in kept]


ESTIMATORS = [(1, True), (2, True), (2, False), (3, False)]


@pytest.mark.parametrize(("samples", "greedy"), ESTIMATORS)
def test_the_estimators_expectation_is_the_gradient_of_the_expected_reward(samples, greedy):
    tiny = Tiny()
    expected = tiny.of_expected_reward()
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(tiny.of_estimator(samples, greedy), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", ["sign", "end", "image"])
@pytest.mark.parametrize(("samples", "greedy"), ESTIMATORS[:3])
def test_a_wrong_estimator_is_told_from_the_right_one(samples, greedy, wrong):
    tiny = Tiny()
    difference = (tiny.of_estimator(samples, greedy, wrong) - tiny.of_expected_reward()).abs().max()
    assert float(difference) > 1e-3


def test_a_baseline_does_not_depend_on_the_sample_it_is_for():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    assert advantages(rewards).tolist() == [[-3, -1.5, 4.5], [0, 0, 0]]
    assert advantages(rewards, torch.tensor([2.0, -1.0])).tolist() == [[-1, 0, 4], [1, 1, 1]]
    with pytest.raises(ValueError, match="two samples or more"):
        advantages(rewards[:, :1])


WORDS = (*SPECIAL, "cat", "dog", "a", "on", ".")
REFERENCES = [
    [["a", "cat"], ["a", "cat", "on", "a", "dog"]],
    [["dog", "on", "dog"], ["a", "dog"]],
    [["cat"], ["on", "a", "cat"]],
]
COUNTED = counted.count(REFERENCES)
OBJECTIVE = SelfCritical(Reward(COUNTED), token_words(WORDS, COUNTED, 4), seed=5, max_words=4, samples=3)


def batch_of(images: torch.Tensor, samples: list[int]) -> CaptionBatch:
    """With people's captions, as token ids: [cat, a] and such."""
    captions = [[np.array([4 + i, 6]), np.array([7, 5, 4 + i])] for i in samples]
    return CaptionBatch(3, 0, images, pad_captions(captions), tuple(map(str, samples)), (), tuple(samples))


def model_of(kind: str):
    """Deterministic also in training: its dropout is nothing, and there is no BatchNorm to see a batch."""
    model = varied(kind, seed=3).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, Lstm):
            module.dropout = 0.0
    if kind == "lstm":
        model.projection[1] = nn.Identity()
    if kind == "transformer":
        model.decoder.embedding.weight.data *= 0.4
    word_bias(model)[END] = 0.0  # samples of some words, that some reference has
    return model


def reward_of(ids: tuple[int, ...], image: int, max_words: int) -> float:
    """pycocoevalcap's, of all three images' captions, of which this image's is the one in question."""
    words = [WORDS[i] for i in ids if WORDS[i] != "."] + ["<end>"] * (len(ids) < max_words)
    candidates = {i: [" ".join(words if i == image else ["nothing"])] for i in range(3)}
    references = {i: [" ".join([*ref, "<end>"]) for ref in refs] for i, refs in enumerate(REFERENCES)}
    return float(Cider().compute_score(references, candidates)[1][image])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("greedy", [True, False])
def test_the_whole_objective_is_what_it_is_by_hand(kind, greedy, monkeypatch):
    """Rewards by pycocoevalcap of each image's own references, probabilities a caption at a time."""
    model, samples = model_of(kind), [2, 0]
    batch, drawn = batch_of(pictures(2), samples), []
    monkeypatch.setattr(self_critical, "sample", recorded(self_critical.sample, drawn))
    found = replace(OBJECTIVE, greedy=greedy).losses(model, batch, SCOPE)
    ids, lengths = drawn[0].token_ids.tolist(), drawn[0].lengths.tolist()
    expected, rewards = torch.zeros(()), []
    for row, image in enumerate(samples):
        captions = [tuple(c[:n]) for c, n in zip(ids[row], lengths[row], strict=True)]
        assert len(captions) == 3 + greedy
        scores = [reward_of(c, image, 4) for c in captions]
        rewards.append(scores[:3])
        for k, caption in enumerate(captions[:3]):
            baseline = scores[3] if greedy else (sum(scores) - scores[k]) / 2
            padded = as_samples([[caption]], 4).padded()
            logits, _ = model(batch.inputs[row : row + 1], padded)
            logits = logits[:, [END, 4, 5, 6, 7, 8]].log_softmax(dim=1)
            column = torch.tensor([[END, 4, 5, 6, 7, 8].index(word) for word in padded.targets.tolist()])
            expected = expected - (scores[k] - baseline) * logits.gather(1, column.unsqueeze(1)).sum() / 6
    assert len({reward for of_image in rewards for reward in of_image}) > 2
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert float(found.sums["reward"]) == pytest.approx(sum(map(sum, rewards)), abs=1e-9)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(found.loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not any(value.requires_grad for value in found.sums.values())


def recorded(function, drawn: list):
    def called(*arguments):
        drawn.append(function(*arguments))
        return drawn[-1]

    return called


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"greedy": True, "cross_entropy": 0.3}], ids=["mean", "greedy, mixed"])
def test_any_cut_of_the_step_has_the_same_gradient(kind, changes):
    model, x, samples = model_of(kind), pictures(3), [1, 2, 0]
    objective, scope = replace(OBJECTIVE, **changes), StepScope(7, images=3, targets=21, world_size=1)
    whole = gradients(model, [objective.losses(model, batch_of(x, samples), scope)])
    parts = [objective.losses(model, batch_of(x[i : i + 1], samples[i : i + 1]), scope) for i in range(3)]
    parts.append(objective.losses(model, batch_of(x[:0], []), scope))  # a rank with nothing to do
    assert parts[0].sums.keys() == parts[-1].sums.keys()
    assert max(float(each.abs().max()) for each in whole) > 0.01
    for one, other in zip(gradients(model, parts), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def gradients(model, losses) -> list[torch.Tensor]:
    model.zero_grad()
    for each in losses:
        each.loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_another_step_draws_others_and_the_encoder_runs_once():
    model, x = model_of("attention"), pictures(3)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    found = [OBJECTIVE.losses(model, batch_of(x, [0, 1, 2]), replace(SCOPE, step=step)) for step in (1, 2, 1)]
    assert len(calls) == 3
    values = [float(each.sums["log_probability"]) for each in found]
    assert values[0] == values[2] != values[1]


def test_what_is_logged_are_means_over_samples():
    model = model_of("lstm")
    found = OBJECTIVE.losses(model, batch_of(pictures(3), [0, 1, 2]), SCOPE)
    sums = {name: float(value) for name, value in found.sums.items()}
    assert sums["samples"] == 9 and 3 <= sums["distinct"] <= 9
    scalars = OBJECTIVE.scalars(sums, SCOPE)
    assert scalars["train/reward"] == pytest.approx(sums["reward"] / 9)
    assert scalars["train/reward"] == pytest.approx(scalars["train/baseline"]), "of the others, so alike"
    assert all(0 <= value <= 1 for name, value in scalars.items() if name.endswith("fraction"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_single_precision_losses(dtype):
    captions = as_samples([[(4,), (5, 4)]]).padded()
    logits = torch.randn(len(captions.target_index), 6)
    advantage = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    loss, log_probabilities = policy_loss(logits.to(dtype).requires_grad_(), captions, advantage, 1, 1)
    assert loss.dtype == log_probabilities.dtype == torch.float32
    expected, _ = policy_loss(logits.to(dtype).float(), captions, advantage, 1, 1)
    assert float(loss.detach()) == float(expected)


@pytest.mark.parametrize("captions", [("Two dogs, a red one.", "A ball isn't red"), ("两只 黑狗，", "一只 猫 跑")])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_words_of_samples_are_those_of_the_captions_they_become(tokenizer, captions):
    """By every tokenizer, in languages with spaces and without."""
    cut = CUTS[tokenizer_for(captions)]
    known = TOKENIZERS[tokenizer].train(captions, 60, 1)
    vocabulary = Vocabulary(
        (*SPECIAL, *dict.fromkeys(token for text in captions for token in known.tokenize(text))), known
    )
    ours = counted.count([[cut(caption)] for caption in captions])
    ids = [[vocabulary.ids[token] for token in known.tokenize(caption)] for caption in captions]
    padded = np.array([row + [0] * (60 - len(row)) for row in ids])
    found = sample_words(vocabulary, ours, cut).of(padded, np.array([len(row) for row in ids]))
    expected = [cut(vocabulary.decode(row)) for row in ids]
    assert [ours.words[number] for number in found.numbers] == [word for words in expected for word in words]
    assert found.lengths.tolist() == [len(words) for words in expected]


def test_a_step_of_self_critical_training_raises_the_reward():
    """Plain gradient steps, from samples to samples: the seam does what it is for."""
    model = model_of("lstm")
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=0.02)
    curve = []
    for step in range(60):
        found = OBJECTIVE.losses(model, batch_of(pictures(3), [0, 1, 2]), StepScope(step, 3, 1, 1))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        curve.append(float(found.sums["reward"] / found.sums["samples"]))
    assert np.mean(curve[-10:]) > np.mean(curve[:10]) + 0.5


def test_cross_entropy_is_todays_loss():
    model, batch = model_of("attention"), batch_of(pictures(2), [0, 1])
    scope = StepScope(0, images=2, targets=batch.targets, world_size=1, detailed=True)
    found = CrossEntropy().losses(model, batch, scope)
    logits, penalty = model(batch.inputs, batch.captions)
    expected = nn.functional.cross_entropy(logits, batch.captions.targets)
    assert float(found.loss.detach()) == pytest.approx(float((expected + penalty / batch.targets).detach()), rel=1e-5)
    scalars = CrossEntropy().scalars({name: float(value) for name, value in found.sums.items()}, scope)
    assert (
        scalars["train/loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
        and scalars["train/top5_accuracy"] <= 1
    )


def test_objectives_are_found_by_their_names():
    assert {"cross_entropy": CrossEntropy, "self_critical": SelfCritical} == OBJECTIVES
