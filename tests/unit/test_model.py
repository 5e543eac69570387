"""Encoder, decoders and captioner."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from captioning import config as configuration
from captioning.config import Config, DecoderConfig, EncoderConfig
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import END, PAD, START
from captioning.model.captioner import Captioner
from shards.errors import InputError

KINDS = ["lstm", "attention", "transformer", "updown"]
LOOKING = KINDS[1:]


def images(count=2, size=64):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def tiny(kind="lstm", **encoder) -> Captioner:
    torch.manual_seed(0)
    config = Config(encoder=EncoderConfig("resnet18", **encoder), decoder=tiny_decoder(kind))
    return Captioner(config, vocabulary_size=9)


def tiny_decoder(kind: str, **changes) -> DecoderConfig:
    sizes = {
        "embedding_size": 12,
        "hidden_size": 12,
        "num_heads": 3,
        "num_layers": 1 if kind in ("attention", "updown") else 2,
    }
    return DecoderConfig(kind, **{**sizes, **changes})


@pytest.mark.parametrize(
    ("trainable", "trained"), [("none", 0), ("layer4", 1), ("layer3", 2), ("layer2", 3), ("all", 4)]
)
def test_frozen_means_frozen(trainable, trained):
    """After a training step of the whole model: frozen stages keep parameters and statistics, trained ones do not."""
    model = tiny(trainable=trainable).train()
    before = {name: value.clone() for name, value in model.encoder.stages.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    words = torch.tensor([[4, 5, END], [6, END, PAD]])
    model(images(), PaddedCaptions.of(words, torch.tensor([3, 2]), torch.tensor([0, 1])))[0].sum().backward()
    optimizer.step()
    changed = {
        name.split(".")[0] for name, v in model.encoder.stages.state_dict().items() if not torch.equal(v, before[name])
    }
    assert changed == set(("layer1", "layer2", "layer3", "layer4")[4 - trained :])


@pytest.mark.parametrize("count", [4, 1])  # one image alone is normalised by the stored statistics
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(count):
    words, lengths = torch.tensor([[4, 5, END]] * count), torch.tensor([3] * count)
    x, image_index = images(count, 32), torch.arange(count)
    results = []
    for checkpointing in (False, True):
        model = tiny(trainable="layer2", gradient_checkpointing=checkpointing).train()
        model(x, PaddedCaptions.of(words, lengths, image_index))[0].square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((gradients, dict(model.named_buffers())))
        assert all(m.training for m in model.encoder.stages["layer4"].modules())
    for plain, checkpointed in zip(*results, strict=True):
        assert plain.keys() == checkpointed.keys()
        for name, value in plain.items():
            torch.testing.assert_close(checkpointed[name], value, msg=name)
    model.eval()(x, PaddedCaptions.of(words, lengths, image_index))


def test_a_backbone_is_thawed_and_frozen_again():
    model = tiny(trainable="layer3").train()
    model.encoder.train_from("none")
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert not any(module.training for module in model.encoder.stages["layer4"].modules())
    model.encoder.train_from("layer3")
    assert model.encoder.frozen == ("layer1", "layer2")
    assert all(p.requires_grad for name in ("layer3", "layer4") for p in model.encoder.stages[name].parameters())
    assert all(module.training for module in model.encoder.stages["layer3"].modules())


def test_frozen_batch_norm_keeps_its_statistics_in_trained_stages():
    model = tiny(trainable="all", freeze_batch_norm=True).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(images(), PaddedCaptions.of(torch.tensor([[4, END]]), torch.tensor([2]), torch.tensor([0])))
    changed = {name.split(".")[0] for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"projection"}


def random_captions(count: int, images: int, longest: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded words ending in <end>, lengths, and owners in no order; the last image has no caption."""
    lengths = torch.randint(1, longest + 1, (count,))
    words = torch.full((count, int(lengths.max())), PAD)
    for row, length in zip(words, lengths, strict=True):
        row[:length] = torch.cat([torch.randint(4, 9, (int(length) - 1,)), torch.tensor([END])])
    return words, lengths, torch.randint(0, images - 1, (count,))


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forcing_and_search_are_one_model(kind):
    """forward's logits for a caption are those of start and step alone, word by word: no caption sees its neighbours,
    its padding or a later word."""
    model = tiny(kind).eval()
    words, lengths, image_index = random_captions(9, images=4)
    features = model.encode(images(4, 96))
    logits, _ = model.decoder(features, PaddedCaptions.of(words, lengths, image_index))
    assert logits.shape == (int(lengths.sum()), 9)
    stepped = []
    for caption, length, image in zip(words, lengths, image_index, strict=True):
        state, previous = model.decoder.start(features[image : image + 1]), START
        for word in caption[:length].tolist():
            step, state = model.decoder.step(state, torch.tensor([previous]))
            stepped.append(step[0])
            previous = word
    torch.testing.assert_close(logits, torch.stack(stepped), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_can_be_copied_and_reordered_within_an_image(kind):
    """What beam search does: two captions an image, exchanged after a word, go on as each would alone."""
    model = tiny(kind).eval()
    features = model.encode(images(2, 96))
    said = torch.tensor([[4, 5, 6], [7, 8, 4], [5, 5, 7], [6, 4, 8]])  # two captions for each of two images
    alone = []
    for image, caption in zip((0, 0, 1, 1), said, strict=True):
        state = model.decoder.start(features[image : image + 1])
        for word in caption:
            logits, state = model.decoder.step(state, word[None])
        alone.append(logits[0])
    state = model.decoder.start(features).select(torch.tensor([0, 0, 1, 1]))
    _, state = model.decoder.step(state, said[:, 0])
    swap = torch.tensor([1, 0, 3, 2])
    state = state.select(swap)
    for t in (1, 2):
        logits, state = model.decoder.step(state, said[swap, t])
    torch.testing.assert_close(logits, torch.stack(alone)[swap], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_can_leave_images_behind(kind, masked):
    """What search does with finished images: the captions of the others go on as they would have."""
    model = tiny(kind).eval()
    features = model.encode(images(3, 96))
    if masked and model.decoder.uses_grid:
        features = replace(features, mask=torch.arange(9) < torch.tensor([[9], [5], [2]]))
    said = torch.tensor([[4, 5], [7, 8], [5, 5], [6, 4], [8, 8], [4, 7]])  # two captions for each of three images
    state = model.decoder.start(features).select(torch.arange(6) // 2)
    _, state = model.decoder.step(state, said[:, 0])
    expected, _ = model.decoder.step(state, said[:, 1])
    rows = torch.tensor([5, 4, 0, 1])
    logits, after = model.decoder.step(state.select(rows, torch.tensor([2, 0])), said[rows, 1])
    torch.testing.assert_close(logits, expected[rows], rtol=1e-4, atol=1e-5)
    assert after.weights is None or len(after.weights) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_does_not_depend_on_its_batch(kind):
    """Loss and penalty of a batch are the sums over its captions one by one, whatever their number and padding."""
    model = tiny(kind).eval()
    words, lengths, image_index = random_captions(6, images=3)
    features = model.encode(images(3, 96))
    logits, penalty = model.decoder(features, PaddedCaptions.of(words, lengths, image_index))
    single = []
    for row in range(6):
        image = features[image_index[row] : image_index[row] + 1]
        padded = torch.cat([words[row : row + 1], torch.full((1, 3), PAD)], dim=1)
        single.append(model.decoder(image, PaddedCaptions.of(padded, lengths[row : row + 1], torch.tensor([0]))))
    torch.testing.assert_close(logits, torch.cat([each for each, _ in single]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(penalty, sum(each for _, each in single))
    assert bool(penalty > 0) == (kind == "attention")


def test_the_penalty_is_the_papers():
    """lambda * mean over places of (1 - sum of weights)^2, a caption counted once for each of its words."""
    model = tiny("attention").eval()
    features, words = model.encode(images(1, 96)), torch.tensor([[4, 5, END]])
    _, penalty = model.decoder(features, PaddedCaptions.of(words, torch.tensor([3]), torch.tensor([0])))
    state, looked = model.decoder.start(features), torch.zeros(9)
    for word in (START, 4, 5):
        _, state = model.decoder.step(state, torch.tensor([word]))
        looked += state.weights[0]
    torch.testing.assert_close(penalty, 3 * (1 - looked).square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_reaches_every_word(kind):
    model = tiny(kind).eval()
    words, lengths = torch.tensor([[4, 5, END], [4, 5, END]]), torch.tensor([3, 3])
    logits, _ = model(images(), PaddedCaptions.of(words, lengths, torch.tensor([0, 1])))
    assert not torch.isclose(logits[:3], logits[3:], atol=1e-6).all(dim=1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = tiny(kind, trainable="all").train()
    logits, penalty = model(images(3, 96), PaddedCaptions.of(*random_captions(5, images=3)))
    (logits.square().sum() + penalty).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_micro_batch_gives_zero_gradients_everywhere(kind):
    model = tiny(kind, trainable="all").train()
    nothing = torch.empty(0, dtype=torch.int64)
    logits, penalty = model(images(0), PaddedCaptions.of(nothing.view(0, 0), nothing, nothing))
    assert logits.shape == (0, 9)
    (nn.functional.cross_entropy(logits, nothing, reduction="sum") + penalty).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_trains_without_batch_statistics(kind):
    model = tiny(kind, trainable="all").train()
    one = PaddedCaptions.of(torch.tensor([[4, END]]), torch.tensor([2]), torch.tensor([0]))
    model(images(1, 32), one)[0].sum().backward()
    assert all(module.training for module in model.modules()), "the mode is as before"


@pytest.mark.parametrize("kind", LOOKING)
def test_the_grid_is_the_feature_map_row_by_row(kind):
    """A bright corner of the image is nearest in the same corner of the grid, and the size is as configured."""
    model = tiny(kind, grid_size=4).eval()
    assert model.encode(images(2, 64)).grid.shape == (2, 16, 512)
    native = tiny(kind).eval()
    dark, bright = torch.zeros(1, 3, 256, 256, dtype=torch.uint8), torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    bright[:, :, 32:64, 192:224] = 255  # row 1, column 6 of 8
    changed = (native.encode(bright).grid - native.encode(dark).grid).norm(dim=2)[0]
    assert changed.argmax() == 8 + 6


def test_a_decoder_that_cannot_be_is_refused():
    cases = (
        ({"encoder": {"grid_size": 7}}, "encoder.grid_size"),
        ({"decoder": {"name": "attention", "num_layers": 2}}, "decoder.num_layers"),
        ({"decoder": {"name": "updown", "num_layers": 2}}, "decoder.num_layers"),
        ({"decoder": {"name": "updown", "encoder_layers": 2}}, "decoder.encoder_layers"),
        ({"decoder": {"dropout_at": "layers"}}, "decoder.dropout_at"),
        ({"decoder": {"name": "transformer"}}, "decoder.embedding_size"),
        ({"decoder": {"name": "transformer", "embedding_size": 36, "hidden_size": 36}}, "decoder.num_heads"),
    )
    for sections, message in cases:
        values = {"run": "r", "data": {"train": "t"}, "train": {"epochs": 1}, **sections}
        with pytest.raises(InputError, match=message):
            configuration.from_dict(values, "test")
