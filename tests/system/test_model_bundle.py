"""Models handed on: the export folder, and the tutorial's two state dicts against its modules written out here."""

import json
import pickle
import shutil

import pytest
import torch
import torchvision
from torch import nn

from captioning.config import from_dict
from captioning.data import vocabulary as vocab
from captioning.data.vocabulary import START, Vocabulary
from captioning.inference import model_bundle
from captioning.inference.foreign_checkpoints import from_tutorial, read_words
from captioning.inference.model_bundle import ModelBundle
from captioning.inference.predictor import Predictor
from captioning.model.captioner import Captioner
from shards.errors import InputError
from tests.conftest import module, run_command

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat", "dog", "on", "the", "mat"]


class EncoderCNN(nn.Module):
    """The tutorial's encoder."""

    def __init__(self, embed_size):
        super().__init__()
        resnet = torchvision.models.resnet18(weights=None)
        self.resnet = nn.Sequential(*list(resnet.children())[:-1])
        self.linear = nn.Linear(resnet.fc.in_features, embed_size)
        self.bn = nn.BatchNorm1d(embed_size, momentum=0.01)

    def forward(self, images):
        return self.bn(self.linear(self.resnet(images).flatten(1)))


class DecoderRNN(nn.Module):
    """The tutorial's decoder; ``forward`` gives logits [B, 1 + T, V], the first of which is to be <start>."""

    def __init__(self, embed_size, hidden_size, vocab_size, num_layers):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.lstm = nn.LSTM(embed_size, hidden_size, num_layers, batch_first=True)
        self.linear = nn.Linear(hidden_size, vocab_size)

    def forward(self, features, captions):
        inputs = torch.cat([features.unsqueeze(1), self.embed(captions)], dim=1)
        return self.linear(self.lstm(inputs)[0])


def saved(folder, words=WORDS, layers=1):
    """The tutorial's models, tuned a little so that BatchNorm's statistics count, and their three files."""
    torch.manual_seed(3)
    encoder, decoder = EncoderCNN(12), DecoderRNN(12, 20, len(words), layers)
    encoder(torch.randn(4, 3, 64, 64))
    folder.mkdir(exist_ok=True)
    files = folder / "encoder-5-3000.pkl", folder / "decoder-5-3000.pkl", folder / "vocab.json"
    torch.save(encoder.state_dict(), files[0])
    torch.save(decoder.state_dict(), files[1])
    files[2].write_text(json.dumps(words))
    return encoder.eval(), decoder.eval(), files


@torch.no_grad()
def their_logits(encoder, decoder, images, captions):
    """Logits that follow <start> and each word of ``captions`` [B, T], of uint8 images normalised as theirs are."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    features = encoder((images / 255 - mean) / std)
    start = torch.full((len(images), 1), 1)
    return decoder(features, torch.cat([start, captions], dim=1))[:, 1:]


@torch.no_grad()
def our_logits(model, images, captions):
    logits, state = [], model.decoder.start(model.encode(images))
    for words in [torch.full((len(images),), START), *captions.T]:
        following, state = model.decoder.step(state, words)
        logits.append(following)
    return torch.stack(logits, dim=1)


def model_of(bundle: ModelBundle) -> Captioner:
    model = Captioner(bundle.config, len(bundle.vocabulary))
    model.load_state_dict(bundle.weights)
    return model.eval()


@pytest.mark.parametrize("layers", [1, 2])
def test_an_imported_model_gives_the_tutorials_logits(tmp_path, layers):
    encoder, decoder, files = saved(tmp_path, layers=layers)
    model = model_of(from_tutorial(*files))
    images, captions = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8), torch.randint(4, 10, (3, 5))
    expected = their_logits(encoder, decoder, images, captions)
    assert expected.std() > 0.05, "logits that differ"
    torch.testing.assert_close(our_logits(model, images, captions), expected, atol=2e-5, rtol=1e-4)


def test_words_in_another_order_and_special_words_that_are_missing(tmp_path):
    """<SOS> and <EOS> last, no <pad>, no <unk>: rows move to our ids, and what was missing is never said."""
    theirs = ["a", "cat", "dog", "on", "the", "<SOS>", "mat", "<EOS>"]
    encoder, decoder, files = saved(tmp_path, theirs)
    imported = from_tutorial(*files)
    ours = imported.vocabulary
    assert ours.words == ("<pad>", "<start>", "<end>", "<unk>", "a", "cat", "dog", "on", "the", "mat")
    images, said = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), ["the", "cat", "on", "a", "mat"]
    captions = torch.tensor([[ours.ids[word] for word in said]] * 2)
    got = our_logits(model_of(imported), images, captions).log_softmax(-1)
    with torch.no_grad():
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        words = torch.tensor([[theirs.index(word) for word in ["<SOS>", *said]]] * 2)
        expected = decoder(encoder((images / 255 - mean) / std), words)[:, 1:].log_softmax(-1)
    places = [ours.ids[{"<SOS>": "<start>", "<EOS>": "<end>"}.get(word, word)] for word in theirs]
    torch.testing.assert_close(got[:, :, places], expected, atol=2e-5, rtol=1e-4)
    assert got[:, :, [0, 3]].max() < -1000


def test_names_of_relatives_and_data_parallel(tmp_path):
    """No BatchNorm, embed for linear, a prefix of DataParallel, files from before BatchNorm counted batches."""
    _, _, files = saved(tmp_path)
    encoder, decoder = (torch.load(file, weights_only=True) for file in files[:2])
    encoder = {name.replace("linear.", "embed."): value for name, value in encoder.items() if not name.startswith("bn")}
    torch.save({f"module.{n}": v for n, v in encoder.items() if "num_batches" not in n}, files[0])
    torch.save({name.replace("linear.", "fc."): value for name, value in decoder.items()}, files[1])
    imported = from_tutorial(*files)
    assert not imported.config.encoder.projection_batch_norm and imported.config.encoder.name == "resnet18"
    model_of(imported)


@pytest.mark.parametrize("torchvisions_names", [False, True])
def test_layers_of_other_names_are_known_by_what_they_hold(tmp_path, torchvisions_names):
    """resnet_module, linear_layer, batch_norm; embedding_layer, lstm_layer, linear_layer: the same model."""
    _, _, files = saved(tmp_path)
    expected = from_tutorial(*files).weights
    encoder, decoder = (torch.load(file, weights_only=True) for file in files[:2])
    children = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

    def theirs(name: str) -> str:
        layer, _, rest = name.partition(".")
        if layer == "resnet" and torchvisions_names:
            child, _, leaf = rest.partition(".")
            rest = f"{children[child]}.{leaf}"
        return f"{ {'resnet': 'resnet_module', 'bn': 'batch_norm'}.get(layer, layer + '_layer') }.{rest}"

    torch.save({theirs(name): value for name, value in encoder.items()}, files[0])
    names = {"embed": "embedding_layer", "lstm": "lstm_layer", "linear": "linear_layer"}
    torch.save({f"{names[n.split('.')[0]]}.{n.split('.')[1]}": value for n, value in decoder.items()}, files[1])
    imported = from_tutorial(*files)
    assert imported.config.data.crop_mode == "squash"
    assert expected.keys() == imported.weights.keys()
    assert all(torch.equal(value, imported.weights[name]) for name, value in expected.items())


def test_vocabulary_files(tmp_path):
    path = tmp_path / "words"
    by_id = {str(number): word for number, word in enumerate(WORDS)}
    by_word = {word: number for number, word in enumerate(WORDS)}
    for text in (
        "\n".join(WORDS) + "\n",
        *map(json.dumps, (WORDS, {"words": WORDS}, {"idx2word": by_id}, {"word2idx": by_word}, by_word)),
    ):
        path.write_text(text)
        assert read_words(path) == WORDS
    for text, expected in (
        ("", "words are wanted"),
        ("a\nb\na\n", "twice"),
        ('{"a": 0, "b": 2}', "not 0 to 1"),
        ('{"a": 0, "b": 0}', "one id"),
        ("[1, 2]", "words are wanted"),
        ("[", "no vocabulary"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=expected):
            read_words(path)
    path.write_bytes(pickle.dumps(by_word))
    with pytest.raises(InputError, match=r"is a pickle[\s\S]*convert it once"):
        read_words(path)


def test_what_is_not_the_tutorials_is_refused(tmp_path):
    encoder, _, files = saved(tmp_path)
    good = [torch.load(file, weights_only=True) for file in files[:2]]

    def refused(expected, which, state):
        other = tmp_path / "other.pkl"
        torch.save(state, other)
        given = [other if i == which else file for i, file in enumerate(files)]
        with pytest.raises(InputError, match=expected):
            from_tutorial(*given)

    refused("without unpickling", 0, encoder)  # a whole pickled module
    refused("it holds epoch, model", 0, {"epoch": 3, "model": good[0]})
    refused("not the tutorial's encoder", 0, good[1])
    refused("not the tutorial's decoder", 1, good[0])
    refused("attention.weight", 1, {**good[1], "attention.weight": torch.zeros(3)})
    refused("nothing for decoder.classifier.bias", 1, {n: v for n, v in good[1].items() if n != "linear.bias"})
    refused("projection.0.weight is missing", 0, {n: v for n, v in good[0].items() if n != "linear.weight"})
    narrow = {"linear.weight": torch.zeros(13, 512), "linear.bias": torch.zeros(13)}
    refused(r"shape \[13, 512\], not \[12, 512\]", 0, good[0] | narrow)
    refused(
        "layer1.1.0.conv2.weight is missing", 0, {n: v for n, v in good[0].items() if n != "resnet.4.0.conv2.weight"}
    )
    files[2].write_text(json.dumps(WORDS[:-1]))
    with pytest.raises(InputError, match="trained with 10 words"):
        from_tutorial(*files)
    files[2].write_text(json.dumps([*WORDS[3:], "x", "y", "z"]))
    with pytest.raises(InputError, match="no <start> and no <end>"):
        from_tutorial(*files)


def test_export_and_convert_commands(tmp_path):
    """From the tutorial's files to captions, as a user would; the folder alone is enough, and damage is noticed."""
    _, _, files = saved(tmp_path / "theirs")
    folder = tmp_path / "model"
    convert = ["--encoder", files[0], "--decoder", files[1], "--vocabulary", files[2]]
    done = run_command(module("launch.import_checkpoint", *convert, folder))
    assert done.returncode == 0 and "resnet18, 1 LSTM layer(s) of 20, 10 words" in done.stdout, done.stderr
    again = tmp_path / "again"
    again.mkdir()
    (again / "captions-val-step-4.json").write_text("[]")  # launch.evaluate's, of an export that was here before
    done = run_command(module("launch.export", folder, again))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder)
    assert {path.name for path in again.iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocabulary.json",
        "README.md",
        "captions-val-step-4.json",
    }
    predictor = Predictor.from_checkpoint(again, device="cpu")
    torch.testing.assert_close(dict(predictor.model.state_dict()), from_tutorial(*files).weights)
    with pytest.raises(InputError, match="holds other things"):
        model_bundle.write(model_bundle.read(again), tmp_path / "theirs")
    weights = again / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(InputError, match="not what was exported"):
        Predictor.from_checkpoint(again)
    (again / "config.json").write_text('{"kind": "something else"}')
    with pytest.raises(InputError, match=r"not written by .captioning export"):
        Predictor.from_checkpoint(again)


def test_a_folder_of_another_config_is_refused(tmp_path):
    config = from_dict(
        {"run": "x", "data": {"train": "x"}, "train": {"epochs": 1}, "encoder": {"name": "resnet18"}}, ""
    )
    vocabulary = Vocabulary((*vocab.SPECIAL, "cat"))
    weights = Captioner(config, 5).state_dict()
    model_bundle.write(
        ModelBundle(config, Vocabulary((*vocabulary.words, "dog")), weights, 3, "A test's."), tmp_path / "m"
    )
    with pytest.raises(InputError, match=r"another architecture or vocabulary[\s\S]*classifier"):
        Predictor.from_checkpoint(tmp_path / "m")
