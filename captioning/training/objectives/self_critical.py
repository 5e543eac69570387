"""Self-critical training: captions are sampled, and those that score above a baseline become likelier.

Rennie et al., https://arxiv.org/abs/1612.00563 (the baseline is the reward of the greedy caption); Luo,
https://arxiv.org/abs/2003.09971 (it is the mean reward of the image's other samples). The gradient's expectation is the
gradient of the mean expected reward over the step's images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from captioning.config import Config
from captioning.data.collate import CaptionBatch
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.tokenizer import Whitespace, Words
from captioning.data.vocabulary import SPECIAL, Vocabulary
from captioning.metrics.degenerate import distinct_captions, ends_badly, repeats
from captioning.metrics.ptb import CUTS
from captioning.metrics.references import References, about_saved, load
from captioning.metrics.reward import CaptionWords, Reward, TokenWords, token_words
from captioning.model.decoders.protocol import Decoder
from captioning.model.draws import caption_keys
from captioning.model.features import Features
from captioning.model.losses import token_loss
from captioning.model.sampling import Samples, policy, sample
from captioning.training.objectives.objective import Losses, StepScope
from shards.hashing import key_of

if TYPE_CHECKING:
    from captioning.training.experiment import Experiment


def advantages(rewards: Tensor, greedy: Tensor | None = None) -> Tensor:
    """How much better each sample is than its baseline: rewards [B, K] -> [B, K].

    The baseline is the reward ``greedy`` [B] of the image's greedy caption, or without one the mean reward of the
    image's other samples, at least one: a baseline that depends on the sample would bias the gradient.
    """
    if greedy is not None:
        return rewards - greedy.unsqueeze(1)
    captions = rewards.shape[1]
    if captions < 2:
        raise ValueError("the mean of the other samples needs two samples or more")
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (captions / (captions - 1))


def policy_loss(
    logits: Tensor, captions: PaddedCaptions, advantage: Tensor, step_images: float, world_size: int
) -> tuple[Tensor, Tensor]:
    """A micro-batch's part of the step's loss: minus the samples' log-probabilities, weighted by their advantage.

    Divided by the samples of the *whole* global step, so that its gradient is the same however the step was cut.

    Args:
        logits: [M, V] of one teacher-forced pass over the samples.
        captions: the B * K samples, image by image, <end> a target of those that ended.
        advantage: [B, K]; no gradient flows into it.
        step_images: images of the global step, over all ranks and micro-batches.
        world_size: ranks, over which DDP averages gradients.

    Returns:
        The loss [], and the samples' log-probabilities [B * K] without gradient, both float32 at least.
    """
    by_word = policy(logits).gather(1, captions.targets.unsqueeze(1)).squeeze(1)
    of_caption = captions.target_index // max(1, captions.token_ids.shape[1])
    log_probabilities = by_word.new_zeros(len(captions)).index_add(0, of_caption, by_word)
    weights = advantage.detach().to(by_word.dtype).flatten()
    per_image = max(1, advantage.shape[1])
    loss = -(weights * log_probabilities).sum() * (world_size / (max(1.0, step_images) * per_image))
    return loss, log_probabilities.detach()


def sample_words(
    vocabulary: Vocabulary, references: References, cut: Callable[[str], Sequence[str]]
) -> TokenWords | CaptionWords:
    """What finds the words, by ``cut``, of captions drawn as ids of this vocabulary."""
    if isinstance(vocabulary.tokenizer, Words | Whitespace):
        return token_words(vocabulary.words, references, len(SPECIAL), cut)
    return CaptionWords(vocabulary.decode, references, cut)


@dataclass(frozen=True)
class _Sampler:
    """Called by the model with its decoder and the features it just computed: captions for the teacher-forced pass."""

    keys: Tensor
    with_greedy: bool
    max_words: int
    references: PaddedCaptions | None
    drawn: list[tuple[Samples, PaddedCaptions]]

    def __call__(self, decoder: Decoder, features: Features) -> PaddedCaptions:
        samples = sample(decoder, features.detach(), self.keys, self.with_greedy, self.max_words).cpu()
        captions = samples.first(self.keys.shape[1]).padded()
        self.drawn.append((samples, captions))
        if self.references is not None:
            captions = captions.followed_by(self.references)
        return captions.each(lambda tensor: tensor.to(features.device, non_blocking=True))


@dataclass(frozen=True)
class SelfCritical:
    """``samples`` captions an image; the baseline is ``greedy`` or the mean of the others.

    ``cross_entropy`` is the share of the loss that stays cross-entropy on people's captions, from the same features.
    """

    needs_references: ClassVar[bool] = True

    reward: Reward
    sample_words: TokenWords | CaptionWords
    seed: int
    max_words: int
    samples: int = 5
    greedy: bool = False
    end_is_a_word: bool = True
    cross_entropy: float = 0.0

    @classmethod
    def of(cls, config: Config, experiment: "Experiment") -> "SelfCritical":
        asked = config.self_critical
        assert experiment.references is not None, "prepare counts what needs_references"
        references = load(experiment.references)
        reward = Reward(references, asked.cider_weight, asked.bleu4_weight)
        cut = CUTS[about_saved(experiment.references)["tokenizer"]]
        return cls(
            reward, sample_words(experiment.vocabulary, references, cut), config.seed,
            config.data.max_words, asked.samples, asked.baseline == "greedy", asked.end_is_a_word, asked.cross_entropy,
        )  # fmt: skip

    def losses(self, model: nn.Module, batch: CaptionBatch, scope: StepScope) -> Losses:
        images = np.array(batch.samples, dtype=np.int64)
        if not len(images):
            logits, _ = model(batch.inputs, batch.captions, batch.valid)
            nothing = torch.zeros((), device=logits.device)
            return Losses(logits.sum(), dict.fromkeys(_SUMS, nothing))
        keys = caption_keys(key_of("step", self.seed, scope.step), batch.samples, self.samples, batch.inputs.device)
        mixed = batch.captions.each(Tensor.cpu) if self.cross_entropy else None
        sampler = _Sampler(keys, self.greedy, self.max_words, mixed, [])
        logits, _ = model(batch.inputs, sampler, batch.valid)
        # The device still computes the logits while the rewards are computed here.
        ((drawn, captions),) = sampler.drawn
        rewards, watched = self._rewards(drawn, images)
        sampled, baseline = rewards[:, : self.samples], rewards[:, -1] if self.greedy else None
        advantage = advantages(sampled, baseline)
        targets = len(captions.target_index)
        captions = captions.each(lambda tensor: tensor.to(logits.device))
        loss, log_probabilities = policy_loss(
            logits[:targets], captions, advantage.to(logits.device), scope.images, scope.world_size
        )
        if self.cross_entropy:
            wanted = batch.captions.targets
            likelihood, _ = token_loss(logits[targets:], wanted, scope.targets, scope.world_size)
            loss = (1 - self.cross_entropy) * loss + self.cross_entropy * likelihood
        sums = watched | _sums(loss, sampled, advantage, log_probabilities)
        return Losses(loss, {name: value.to(loss.device) for name, value in sums.items()})

    def _rewards(self, drawn: Samples, images: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards float64 [B, K or K + 1], and what tells how the K samples go wrong."""
        per_image = drawn.token_ids.shape[1]
        words = self.sample_words.of(drawn.token_ids.flatten(0, 1).numpy(), drawn.lengths.flatten().numpy())
        of_image = images.repeat(per_image)
        rewarded = words.with_end(drawn.ended.flatten().numpy()) if self.end_is_a_word else words
        rewards = torch.from_numpy(self.reward.of(rewarded, of_image)).view(-1, per_image)
        sampled = np.arange(len(of_image)) % per_image < self.samples
        counted = {
            "words": drawn.lengths[:, : self.samples].sum(),
            "ended_badly": ends_badly(words, self.reward.references)[sampled].sum(),
            "repeated": repeats(words)[sampled].sum(),
            "distinct": distinct_captions(words.subset(sampled), of_image[sampled]),
            "cut": (~drawn.ended[:, : self.samples]).sum(),
        }
        return rewards, {name: torch.tensor(float(value)) for name, value in counted.items()}

    def scalars(self, sums: Mapping[str, float], scope: StepScope) -> dict[str, float]:
        samples = max(1.0, sums["samples"])
        means = {name: sums[name] / samples for name in _SUMS if name not in ("objective", "samples")}
        return {
            "train/objective": sums["objective"] / scope.world_size,
            "train/reward": means["reward"],
            "train/baseline": means["baseline"],
            "train/advantage": means["absolute_advantage"],
            "train/log_probability": means["log_probability"],
            "train/caption_length": means["words"],
            "train/distinct_fraction": means["distinct"],
            "train/bad_ending_fraction": means["ended_badly"],
            "train/repetition_fraction": means["repeated"],
            "train/cut_fraction": means["cut"],
        }


_SUMS = (
    "objective", "samples", "reward", "baseline", "absolute_advantage", "log_probability", "words", "ended_badly",
    "repeated", "distinct", "cut",
)  # fmt: skip


def _sums(loss: Tensor, rewards: Tensor, advantage: Tensor, log_probabilities: Tensor) -> dict[str, Tensor]:
    return {
        "objective": loss.detach(),
        "samples": torch.tensor(float(rewards.numel())),
        "reward": rewards.sum(),
        "baseline": (rewards - advantage).sum(),
        "absolute_advantage": advantage.abs().sum(),
        "log_probability": log_probabilities.sum(),
    }
