"""Scheduled sampling: which words are read, that any cut reads the same, and that the decoder reads them."""

from dataclasses import replace

import pytest
import torch

from captioning.data.collate import CaptionBatch, pad_captions
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import PAD, START, UNK
from captioning.training.objectives import CrossEntropy, StepScope
from captioning.training.objectives.scheduled_sampling import ScheduledSampling
from tests.unit.test_model import KINDS, images, random_captions, tiny

NUMBERS = (70, 3, 12, 5)


def captions_of_four_images(seed: int = 0) -> PaddedCaptions:
    torch.manual_seed(seed)
    return PaddedCaptions.of(*random_captions(9, images=5))


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_reads_the_words_in_place_of_the_true_ones(kind):
    model, said = tiny(kind).eval(), captions_of_four_images()
    features = model.encode(images(4, 96))
    read = torch.randint(4, 9, said.token_ids.shape)
    logits, _ = model.decoder(features, replace(said, read_ids=read))
    stepped = []
    for row, (length, image) in enumerate(zip(said.lengths.tolist(), said.image_index.tolist(), strict=True)):
        state = model.decoder.start(features[image : image + 1])
        for word in [START, *read[row, : length - 1].tolist()]:
            step, state = model.decoder.step(state, torch.tensor([word]))
            stepped.append(step[0])
    torch.testing.assert_close(logits, torch.stack(stepped), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_drawn_alike_however_the_batch_is_cut(kind):
    model, said, x = tiny(kind).eval(), captions_of_four_images(), images(4, 96)
    features = model.encode(x)
    whole = ScheduledSampling(said, NUMBERS, seed=7, probability=0.5)(model.decoder, features)
    assert torch.equal(whole.token_ids, said.token_ids), "the targets stay people's"
    assert not torch.equal(whole.read_ids, said.token_ids)
    for image in range(4):
        rows = said.image_index == image
        if not rows.any():
            continue
        part = PaddedCaptions.of(said.token_ids[rows], said.lengths[rows], torch.zeros_like(said.lengths[rows]))
        alone = ScheduledSampling(part, NUMBERS[image : image + 1], 7, 0.5)(model.decoder, features[image : image + 1])
        assert torch.equal(alone.read_ids, whole.read_ids[rows])
    other = ScheduledSampling(said, NUMBERS, seed=8, probability=0.5)(model.decoder, features)
    assert not torch.equal(other.read_ids, whole.read_ids)


def test_as_many_words_as_asked_are_the_models_own():
    model = tiny("lstm").eval()
    with torch.no_grad():
        model.decoder.classifier.bias[8] = 50.0  # what it expects everywhere
    words = [[torch.full((6,), 4).numpy() for _ in range(5)] for _ in range(40)]
    said, features = pad_captions(words), model.encode(images(40, 32))
    for probability in (0.0, 0.25, 1.0):  # of the words, <end> too
        read = ScheduledSampling(said, tuple(range(40)), 0, probability)(model.decoder, features).read_ids
        assert float((read == 8).float().mean()) == pytest.approx(probability, abs=0.03)
    assert not torch.isin(read, torch.tensor([PAD, START, UNK])).any()


def test_the_share_grows_from_nothing_and_an_empty_micro_batch_takes_part():
    said, x = captions_of_four_images(), images(4, 96)
    batch = CaptionBatch(0, 0, x, said, ("k",) * 4, (), NUMBERS)
    objective = CrossEntropy(scheduled_sampling=0.9, total_steps=10)
    losses = []
    for step in (0, 1, 9):
        scope = StepScope(step, 4, batch.targets, 1)
        losses.append(
            [float(o.losses(tiny("lstm").eval(), batch, scope).loss.detach()) for o in (CrossEntropy(), objective)]
        )
    assert losses[0][0] == losses[0][1] and losses[2][0] != losses[2][1]
    empty = replace(batch, inputs=x[:0], captions=pad_captions([]), samples=())
    model = tiny("lstm", trainable="all").train()
    objective.losses(model, empty, StepScope(9, 4, 1, 1)).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
