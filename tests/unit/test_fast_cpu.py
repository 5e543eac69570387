"""What decoders compute with on a CPU while nothing is differentiated, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captioning.model.decoders.fast_cpu import Linear, linear, lstm_step, tanh
from captioning.model.decoders.recurrence import Lstm, LstmCell
from tests.unit.test_model import KINDS
from tests.unit.test_search import peaked, pictures

INPUTS = {
    "rows": torch.randn(7, 20),
    "words": torch.randn(3, 2, 20),
    "transposed": torch.randn(20, 7).t(),
    "expanded": torch.randn(3, 1, 20).expand(3, 4, 20),
    "none": torch.randn(0, 20),
}


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("bias", [None, torch.randn(11)], ids=["without bias", "with bias"])
def test_a_product_is_torchs_to_rounding(x, bias):
    weight = torch.randn(11, 20)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_caption_that_is_not_finite_leaves_the_others_alone():
    x, weight = torch.randn(6, 20), torch.randn(11, 20)
    x[2, 3], x[4, 0] = torch.nan, torch.inf
    with torch.inference_mode():
        said, expected = linear(x, weight), F.linear(x, weight)
    assert not said[[2, 4]].isfinite().any()
    torch.testing.assert_close(said[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])


def test_tanh_is_torchs_to_rounding_however_large():
    x = torch.cat([torch.linspace(-20, 20, 999), torch.tensor([0.0, 1e-8, 1e38, 3e38, -3e38, torch.inf, -torch.inf])])
    with torch.inference_mode():
        torch.testing.assert_close(tanh(x.clone()), torch.tanh(x), atol=3e-7, rtol=0)
        assert tanh(torch.tensor([torch.nan])).isnan()


def test_a_step_of_an_lstm_is_torchs_to_rounding():
    cell, whole = LstmCell(20, 8), Lstm(20, 8, num_layers=2, dropout=0.5).eval()
    x, hidden = torch.randn(5, 20), torch.randn(2, 2, 5, 8)
    with torch.inference_mode():
        torch.testing.assert_close(lstm_step(x, *hidden[0], cell), nn.LSTMCell.forward(cell, x, tuple(hidden[0])))
    words = torch.randn(5, 4, 20)
    _, state = whole(words[:, :1])
    expected, _ = whole(words)
    with torch.inference_mode():
        for t in range(1, 4):
            said, state = whole(words[:, t : t + 1], state)
            torch.testing.assert_close(said, expected[:, t : t + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_say_the_same_with_and_without_gradients(kind):
    model, x = peaked(kind), pictures(3)
    said = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            logits, state = model.decoder.step(model.decoder.start(model.encode(x)), torch.tensor([1, 1, 1]))
            said += [logits, model.decoder.step(state, torch.tensor([4, 5, 6]))[0]]
    torch.testing.assert_close(said[:2], [logits.detach() for logits in said[2:]], atol=1e-4, rtol=1e-4)


def test_training_and_autocast_have_torchs_own_bits():
    layer, x = Linear(300, 40), torch.randn(33, 300)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(tanh(x.clone()), torch.tanh(x))
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and layer(x).dtype == torch.bfloat16


def test_a_graph_can_be_compiled_of_it():
    layer, x = Linear(20, 11), torch.randn(7, 20)
    compiled = torch.compile(lambda x: tanh(layer(x)), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), torch.tanh(layer(x)))
