"""Encoder, decoder, captioner and greedy search."""

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from captioning.config import Config, DecoderConfig, EncoderConfig
from captioning.data.vocabulary import END, PAD, START, UNK
from captioning.model.captioner import Captioner
from captioning.model.decoder import LstmDecoder, is_target
from captioning.model.encoder import Encoder, load_pretrained
from captioning.model.search import greedy
from shards.errors import InputError

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2"]


def images(count=2, size=64):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def tiny(**encoder) -> Captioner:
    torch.manual_seed(0)
    config = Config(encoder=EncoderConfig("resnet18", **encoder), decoder=DecoderConfig("lstm", 8, 12, 1))
    return Captioner(config, vocabulary_size=9)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_computes_what_torchvision_does(name, tmp_path):
    """Weights saved from torchvision's own model give its own features, so pretrained files mean what they say."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    config = EncoderConfig(name, weights=str(tmp_path / "weights.pth"))
    ours = Encoder(config)
    load_pretrained(ours, config)
    x = images()
    normalised = torchvision.transforms.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    head = "classifier" if name == "mobilenet_v2" else "fc"
    setattr(theirs, head, nn.Identity())
    with torch.no_grad():
        expected, got = theirs(normalised), ours.eval()(x)
    assert got.shape == (2, ours.feature_size)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_safetensors_weights_and_files_that_do_not_fit(tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    safetensors.torch.save_file(state, tmp_path / "resnet18.safetensors")
    config = EncoderConfig("resnet18", weights=str(tmp_path / "resnet18.safetensors"))
    encoder = Encoder(config)
    load_pretrained(encoder, config)
    assert torch.equal(encoder.stages["layer4"][1].conv2.weight, state["layer4.1.conv2.weight"])
    with pytest.raises(InputError, match=r"does not fit encoder\.name=resnet50"):
        load_pretrained(Encoder(EncoderConfig("resnet50")), EncoderConfig("resnet50", weights=config.weights))


def test_bad_weights_are_refused_and_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "whole.pth")
    cases = (("evil.pth", "cannot be read"), ("whole.pth", "it holds model, epoch"))
    for weights, message in (*cases, ("nowhere.pth", "neither a file nor weights of resnet18")):
        config = EncoderConfig("resnet18", weights=str(tmp_path / weights))
        with pytest.raises(InputError, match=message):
            load_pretrained(Encoder(config), config)
    assert not (tmp_path / "ran").exists()


def test_weights_without_a_network_say_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    config = EncoderConfig("resnet18", weights="IMAGENET1K_V1")
    with pytest.raises(InputError) as error:
        load_pretrained(Encoder(config), config)
    message = str(error.value)
    assert "https://download.pytorch.org/models/resnet18-" in message
    assert str(tmp_path / "hub" / "checkpoints") in message and "encoder.weights=FILE" in message


@pytest.mark.parametrize(
    ("trainable", "trained"), [("none", 0), ("layer4", 1), ("layer3", 2), ("layer2", 3), ("all", 4)]
)
def test_frozen_means_frozen(trainable, trained):
    """After a training step of the whole model: frozen stages keep parameters and statistics, trained ones do not."""
    model = tiny(trainable=trainable).train()
    before = {name: value.clone() for name, value in model.encoder.stages.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    words = torch.tensor([[4, 5, END], [6, END, PAD]])
    model(images(), words, torch.tensor([3, 2]), torch.tensor([0, 1])).sum().backward()
    optimizer.step()
    changed = {
        name.split(".")[0] for name, v in model.encoder.stages.state_dict().items() if not torch.equal(v, before[name])
    }
    assert changed == set(("layer1", "layer2", "layer3", "layer4")[4 - trained :])


@pytest.mark.parametrize("count", [4, 1])  # one image alone is normalised by the stored statistics
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(count):
    words, lengths = torch.tensor([[4, 5, END]] * count), torch.tensor([3] * count)
    x, owner = images(count, 32), torch.arange(count)
    results = []
    for checkpointing in (False, True):
        model = tiny(trainable="layer2", gradient_checkpointing=checkpointing).train()
        model(x, words, lengths, owner).square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((gradients, dict(model.named_buffers())))
        assert all(m.training for m in model.encoder.stages["layer4"].modules())
    for plain, checkpointed in zip(*results, strict=True):
        assert plain.keys() == checkpointed.keys()
        for name, value in plain.items():
            torch.testing.assert_close(checkpointed[name], value, msg=name)
    model.eval()(x, words, lengths, owner)


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
    model(images(), torch.tensor([[4, END]]), torch.tensor([2]), torch.tensor([0]))
    changed = {name.split(".")[0] for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"projection"}


def test_teacher_forcing_and_search_are_one_model():
    """forward's logits for a caption are those of start and step, word by word."""
    torch.manual_seed(0)
    decoder = LstmDecoder(DecoderConfig("lstm", 8, 12, 2), vocabulary_size=9).eval()
    features = torch.randn(2, 8)
    words, lengths = torch.tensor([[4, 5, 6, END], [7, END, PAD, PAD]]), torch.tensor([4, 2])
    logits = decoder(features, words, lengths)
    assert logits.shape == (6, 9)
    state, previous, stepped = decoder.start(features), torch.tensor([START, START]), []
    for t in range(4):
        step, state = decoder.step(state, previous)
        stepped.append(step)
        previous = words[:, t]
    torch.testing.assert_close(logits, torch.stack(stepped, dim=1)[is_target(words, lengths)])


def test_padding_does_not_matter():
    decoder = LstmDecoder(DecoderConfig("lstm", 8, 12, 1), vocabulary_size=9)
    features, lengths = torch.randn(1, 8), torch.tensor([2])
    short = decoder(features, torch.tensor([[4, END]]), lengths)
    torch.testing.assert_close(short, decoder(features, torch.tensor([[4, END, PAD, PAD]]), lengths))


def test_the_image_reaches_every_word():
    model = tiny().eval()
    words, lengths = torch.tensor([[4, 5, END], [4, 5, END]]), torch.tensor([3, 3])
    logits = model(images(), words, lengths, torch.tensor([0, 1]))
    assert not torch.allclose(logits[2], logits[5], atol=1e-6)


def test_an_empty_micro_batch_gives_zero_gradients_everywhere():
    model = tiny(trainable="all").train()
    nothing = torch.empty(0, dtype=torch.int64)
    logits = model(images(0), nothing.view(0, 0), nothing, nothing)
    assert logits.shape == (0, 9)
    nn.functional.cross_entropy(logits, nothing, reduction="sum").backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_one_image_trains_without_batch_statistics():
    model = tiny(trainable="all").train()
    model(images(1, 32), torch.tensor([[4, END]]), torch.tensor([2]), torch.tensor([0])).sum().backward()
    assert all(module.training for module in model.modules()), "the mode is as before"


@torch.no_grad()
def test_greedy_takes_the_best_word_and_stops_at_end():
    model = tiny().eval()
    x = images(3)
    words = greedy(model, x, max_words=6)
    for row, image in zip(words.tolist(), x, strict=True):
        state, previous = model.decoder.start(model.encode(image[None])), torch.tensor([START])
        for word in row:
            logits, state = model.decoder.step(state, previous)
            allowed = [w for w in range(9) if w not in (PAD, START, UNK)]
            assert word == max(allowed, key=lambda w: float(logits[0, w]))
            previous = torch.tensor([word])
            if word == END:
                break
    model.decoder.classifier.bias[END] = 100.0
    assert greedy(model, x, max_words=6).tolist() == [[END]] * 3
