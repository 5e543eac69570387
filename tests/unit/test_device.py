"""What a GPU would be asked, on a machine without one: PyTorch's meta device, whose tensors have a shape and no values.

Everything that asks a tensor on the device for its value fails there (a mask's length, a maximum, a number for Python):
a GPU would have to finish all its work before it answers. So do operations between that device and the CPU.
"""

import pytest
import torch

from captioning.config import Config, DecoderConfig, EncoderConfig
from captioning.data.padded_captions import PaddedCaptions
from captioning.model import search as search_module
from captioning.model.captioner import Captioner
from captioning.model.hypotheses import Paths
from captioning.model.losses import count_in_top, token_loss
from captioning.model.sampling import sample
from captioning.model.search import SearchOptions, search
from captioning.training.ema import WeightAverage

KINDS = ["lstm", "attention", "transformer", "updown"]
DEVICE = torch.device("meta")


def captions() -> PaddedCaptions:
    """Five captions of three images, 14 words: counted on the CPU, then moved."""
    words = torch.tensor([[4, 5, 2, 0], [4, 5, 6, 2], [5, 2, 0, 0], [6, 2, 0, 0], [6, 5, 2, 0]])
    said = PaddedCaptions.of(words, torch.tensor([3, 4, 2, 2, 3]), torch.tensor([0, 0, 1, 2, 2]))
    return said.each(lambda tensor: tensor.to(DEVICE))


def captioner(kind: str) -> Captioner:
    config = DecoderConfig(kind, 12, 12, 1 if kind in ("attention", "updown") else 2, num_heads=3, dropout=0.1)
    return Captioner(Config(encoder=EncoderConfig("resnet18", trainable="layer4"), decoder=config), 9).to(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_asks_the_device_for_nothing(kind):
    model, said = captioner(kind).train(), captions()
    average = WeightAverage(model, 0.9)
    logits, penalty = model(torch.empty(3, 3, 64, 64, dtype=torch.uint8, device=DEVICE), said)
    assert logits.shape == (14, 9)
    objective, _ = token_loss(logits, said.targets, 14.0, 1, label_smoothing=0.1)
    count_in_top(5, logits.detach(), said.targets)
    (objective + penalty).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert {p.grad.device for p in model.parameters() if p.requires_grad} == {DEVICE}
    average.update(3)


OPTIONS = [
    SearchOptions(),
    SearchOptions(4, min_words=2, no_repeat_ngram=2),
    SearchOptions(4, beam_groups=2, length_penalty=0.7),
    SearchOptions(3, temperature=1.0, top_k=4, top_p=0.9),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "beam", "groups", "drawn"])
@pytest.mark.parametrize("kind", KINDS)
def test_search_asks_the_device_every_few_words_and_reads_the_captions_once(kind, options, monkeypatch):
    asked, read = [], []

    def unfinished(beams, divisor) -> torch.Tensor:
        asked.append(beams.total)
        return torch.arange(3 if len(asked) == 1 else 1, device=DEVICE)  # a third goes on after the second time

    monkeypatch.setattr(search_module._Beams, "unfinished", unfinished)
    monkeypatch.setattr(Paths, "hypotheses", lambda paths: read.append(paths))
    images = torch.empty(3, 3, 64, 64, dtype=torch.uint8, device=DEVICE)
    search([captioner(kind).eval()], images, options, max_words=10)
    assert [total.shape for total in asked] == [(3, options.beam_size)] * 2, "after 4 and 8 words of 10"
    (paths,) = read
    assert paths.ids.shape == (3, options.beam_size, 10) and paths.ids.device == DEVICE
    assert kind == "lstm" or paths.weights.shape == (3, options.beam_size, 10, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_asks_the_device_every_few_words(kind):
    """Whether all captions have ended, after the fourth word."""
    model, keys = captioner(kind), torch.empty(3, 5, dtype=torch.int64, device=DEVICE)
    features = model.encode(torch.empty(3, 3, 64, 64, dtype=torch.uint8, device=DEVICE))
    samples = sample(model.decoder, features, keys, True, max_words=3)
    assert samples.token_ids.shape == (3, 6, 3) and samples.ended.device == DEVICE
    with pytest.raises(RuntimeError):
        sample(model.decoder, features, keys, True, max_words=4)


def test_asking_would_be_noticed():
    numbers = torch.empty(4, device=DEVICE)
    for asked in (lambda: numbers[numbers > 0], lambda: int(numbers.max()), lambda: numbers + torch.ones(4)):
        with pytest.raises(RuntimeError):
            asked()


def test_where_the_words_are_is_counted_right():
    """Owners in no order, an image without captions, more captions of one than of another."""
    words = torch.tensor([[4, 2, 0], [5, 6, 2], [6, 2, 0], [7, 8, 2], [2, 0, 0]])
    said = PaddedCaptions.of(words, torch.tensor([2, 3, 2, 3, 1]), torch.tensor([3, 0, 3, 1, 3]))
    assert said.targets.tolist() == [4, 2, 5, 6, 2, 6, 2, 7, 8, 2, 2]
    assert said.caption_index.tolist() == [0, 0, 1, 0, 2] and said.max_captions_per_image == 3
    assert said.active_images == (3, 3, 2), "images 0 and 1 have three words to say, image 3 has two, image 2 none"
    assert said.row_offset.tolist() == [0, 9, 18]
