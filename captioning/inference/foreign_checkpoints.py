"""The two state dicts of the widely used PyTorch image-captioning tutorial, turned into a captioner of ours.

Their EncoderCNN is nn.Sequential of a ResNet's children, a Linear and a BatchNorm; their DecoderRNN an Embedding, an
LSTM whose first input is the image, and a Linear. Many projects began as copies of it, under names of their own: what
a layer is shows in its tensors. Nothing is unpickled.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from captioning.config import Config, DataConfig, DecoderConfig, EncoderConfig, TrainConfig
from captioning.data.vocabulary import SPECIAL, Vocabulary
from captioning.inference.model_bundle import ModelBundle
from captioning.model.captioner import Captioner
from shards.errors import InputError, listed
from shards.files import parse_json

# Kind of block and number of blocks in layer1 .. layer4.
_RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
# Place in nn.Sequential(*list(resnet.children())[:-1]) -> our name; 2, 3 and 8 (ReLU and pools) have no parameters.
_CHILDREN = {"0": "layer1.0.0", "1": "layer1.0.1", "4": "layer1.1", "5": "layer2", "6": "layer3", "7": "layer4"}
# torchvision's own names of these places, and how the first block of the first of them is recognised.
_CHILD_NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
_FIRST_BLOCK = re.compile(r"(.*?)(?:4|layer1)\.0\.conv1\.weight")
_SPECIAL_SPELLINGS = {
    "<pad>": "<pad>", "<start>": "<start>", "<sos>": "<start>", "<bos>": "<start>", "<s>": "<start>",
    "<end>": "<end>", "<eos>": "<end>", "</s>": "<end>", "<unk>": "<unk>",
}  # fmt: skip
_NEVER = -1e4  # bias of a word the imported model did not have: a logit that no search and no softmax notices


def from_tutorial(encoder: Path, decoder: Path, vocabulary: Path) -> ModelBundle:
    """A captioner from the tutorial's two files and its vocabulary.

    | theirs | ours |
    |---|---|
    | encoder ``resnet.0`` conv1, ``resnet.1`` bn1, ``resnet.4`` .. ``resnet.7`` layer1 .. layer4 | ``encoder.stages`` |
    | encoder ``linear`` (or ``embed``), ``bn`` (may be absent) | ``projection.0``, ``projection.1`` |
    | decoder ``embed`` (or ``embedding``, ``word_embeddings``) | ``decoder.embedding``, rows in our order of words |
    | decoder ``lstm`` | ``decoder.lstm`` |
    | decoder ``linear`` (or ``fc``) | ``decoder.classifier``, rows in our order of words |

    Layers of other names are taken by what they hold: a ResNet's blocks under any prefix, numbered or under
    torchvision's names, and beside it one Linear and one BatchNorm; an LSTM, a table without bias, a Linear.

    Their model predicts <start> from the image and only then the caption; ours is given <start>. From there on the
    logits are the same. Images are squeezed to a square, as theirs are.

    Raises:
        InputError: when a file cannot be read without unpickling, or names or shapes are not the tutorial's.
    """
    words = read_words(vocabulary)
    encoder_state = _encoder_by_shape(_state_dict(encoder))
    decoder_state = _by_shape(_state_dict(decoder), {"embed", "lstm", "linear"})
    resnet = _resnet_name(encoder_state, encoder)
    renamed = _encoder_weights(encoder_state, encoder)
    order = _our_order(words)
    ours = tuple(SPECIAL) + tuple(words[i] for i in order[len(SPECIAL) :] if i is not None)
    renamed |= _decoder_weights(decoder_state, decoder, order, len(words), vocabulary)
    config = _config_of(renamed, resnet, decoder)
    _check_fit(renamed, config, len(ours), f"{encoder} and {decoder}")
    origin = f"Imported from {encoder.name}, {decoder.name} and {vocabulary.name}; not trained by this project."
    return ModelBundle(config, Vocabulary(ours), renamed, step=0, origin=origin)


def read_words(path: Path) -> list[str]:
    """A vocabulary's words in the order of their ids: a word a line, or JSON (a list; {"words": [...]}; word -> id;
    {"word2idx": word -> id}; {"idx2word": id -> word}).

    Raises:
        InputError: when it is none of these, or pickled.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if data[:1] == b"\x80" or path.suffix in (".pkl", ".pickle"):
        raise InputError(
            f"{path} is a pickle, which could run any code; it is not opened. Where you trust it, and its class can\n"
            "be imported (the tutorial's folder), convert it once:\n"
            f"  python -c \"import json, pickle; v = pickle.load(open('{path.name}', 'rb')); "
            "json.dump(v.word2idx, open('vocab.json', 'w'))\""
        )
    try:
        text = data.decode()
        words = _words_in(parse_json(text)) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
        if not words or not all(isinstance(word, str) for word in words):
            raise ValueError("words are wanted")
        if len(set(words)) != len(words):
            raise ValueError("a word stands in it twice")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no vocabulary ({error}): a JSON list, or a word a line, in id order.") from error
    return words


def _words_in(value: Any) -> list[str]:
    match value:
        case list():
            return value
        case {"words": list() as words}:
            return words
        case {"idx2word": dict() as by_id}:
            ids = {int(number): word for number, word in by_id.items()}
        case {"word2idx": dict() as by_word} | by_word:
            ids = {int(number): word for word, number in by_word.items()}
            if len(ids) != len(by_word):
                raise ValueError("two words have one id")
    if sorted(ids) != list(range(len(ids))):
        raise ValueError(f"its {len(ids)} ids are not 0 to {len(ids) - 1}")
    return [ids[number] for number in range(len(ids))]


def _our_order(words: list[str]) -> list[int | None]:
    """For each of our ids the row in their tables; None for a special word they do not have."""
    special = {_SPECIAL_SPELLINGS[w.lower()]: i for i, w in enumerate(words) if w.lower() in _SPECIAL_SPELLINGS}
    missing = [word for word in ("<start>", "<end>") if word not in special]
    if missing:
        raise InputError(f"The vocabulary has no {' and no '.join(missing)}: captions could not begin or end.")
    taken = set(special.values())
    return [special.get(word) for word in SPECIAL] + [i for i in range(len(words)) if i not in taken]


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from torch.save's file (never unpickled) or safetensors; DataParallel's ``module.`` cut off."""
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # torch and safetensors raise their own kinds for a file that is something else
        first = str(error).splitlines()[0][:160]
        raise InputError(
            f"{path} is no state dict that can be read without unpickling ({first}).\n"
            "Where it was saved, write torch.save(model.state_dict(), FILE), not torch.save(model, FILE)."
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        holds = ", ".join(map(str, list(state)[:6])) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path} is no state dict of tensors: it holds {holds or 'nothing'}. Save that part alone.")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _encoder_by_shape(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tutorial's names for an encoder's layers: resnet.*, linear.*, bn.*; what is none of these keeps its own."""
    first = next((match for name in state if (match := _FIRST_BLOCK.fullmatch(name))), None)
    prefix = first[1] if first else ""
    renamed, others = {}, {}
    for name, value in state.items():
        child, _, rest = name.removeprefix(prefix).partition(".")
        number = _CHILD_NUMBERS.get(child, child)
        if first and name.startswith(prefix) and number in _CHILDREN:
            renamed[f"resnet.{number}.{rest}"] = value
        else:
            others[name] = value
    return renamed | _by_shape(others, {"linear", "bn"})


def _by_shape(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Layers under the tutorial's names, where one alone holds what such a layer does; the others keep theirs."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = value
    kinds = {layer: _kind(tensors) for layer, tensors in layers.items()}
    alone = {kind for kind in wanted if list(kinds.values()).count(kind) == 1}
    return {
        f"{kinds[layer] if kinds[layer] in alone else layer}.{leaf}": value
        for layer, tensors in layers.items()
        for leaf, value in tensors.items()
    }


def _kind(tensors: dict[str, Tensor]) -> str:
    """What a layer is, by its tensors: lstm, bn, linear, embed, or nothing known."""
    if "weight_ih_l0" in tensors:
        return "lstm"
    if "running_mean" in tensors:
        return "bn"
    matrix = "weight" in tensors and tensors["weight"].dim() == 2
    return {("bias", "weight"): "linear", ("weight",): "embed"}.get(tuple(sorted(tensors)), "") if matrix else ""


def _resnet_name(state: dict[str, Tensor], path: Path) -> str:
    places = [name.split(".") for name in state if name.startswith("resnet.")]
    blocks = tuple(len({p[2] for p in places if p[1] == layer}) for layer in ("4", "5", "6", "7"))
    kind = "bottleneck" if "resnet.4.0.conv3.weight" in state else "basic"
    if (kind, blocks) not in _RESNETS:
        raise InputError(
            f"{path} is not the tutorial's encoder: its names begin {', '.join(list(state)[:4])}, and no ResNet "
            f"has {blocks} blocks.\nWanted are resnet.0.weight, ... of nn.Sequential(*list(resnet.children())[:-1])."
        )
    return _RESNETS[kind, blocks]


def _encoder_weights(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, value in state.items():
        match name.split("."):
            case ["resnet", place, *rest] if place in _CHILDREN:
                renamed[".".join(["encoder.stages", _CHILDREN[place], *rest])] = value
            case ["linear" | "embed", rest]:
                renamed[f"projection.0.{rest}"] = value
            case ["bn", rest]:
                renamed[f"projection.1.{rest}"] = value
            case _:
                unknown.append(name)
    if unknown:
        raise InputError(
            f"{path} has {len(unknown)} name(s) the tutorial's encoder has not:\n{listed(unknown, limit=6)}\n"
            "Wanted are resnet.*, linear.* (or embed.*) and bn.*."
        )
    return renamed


def _decoder_weights(
    state: dict[str, Tensor], path: Path, order: list[int | None], count: int, vocabulary: Path
) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, value in state.items():
        match name.split("."):
            case ["embed" | "embedding" | "word_embeddings", "weight"]:
                renamed["decoder.embedding.weight"] = value
            case ["lstm", rest]:
                kind, _, layer = rest.rpartition("_l")
                renamed[f"decoder.lstm.{layer}.{kind}_l0"] = value
            case ["linear" | "fc", "weight" | "bias" as rest]:
                renamed[f"decoder.classifier.{rest}"] = value
            case _:
                unknown.append(name)
    wanted = ["decoder.embedding.weight", "decoder.classifier.weight", "decoder.classifier.bias"]
    missing = [name for name in [*wanted, "decoder.lstm.0.weight_hh_l0"] if name not in renamed]
    if unknown or missing:
        raise InputError(
            f"{path} is not the tutorial's decoder: it has {', '.join(list(state)[:6])}"
            + (f"; not known: {', '.join(unknown[:6])}" if unknown else f"; nothing for {', '.join(missing)}")
            + ".\nWanted are embed.weight, lstm.weight_ih_l0 ..., linear.weight and linear.bias."
        )
    for name, absent in zip(wanted, (0.0, 0.0, _NEVER), strict=True):
        if len(renamed[name]) != count:
            raise InputError(
                f"{path} was trained with {len(renamed[name]):,} words, {vocabulary} has {count:,}: another one's."
            )
        renamed[name] = _reordered(renamed[name], order, absent)
    return renamed


def _reordered(table: Tensor, order: list[int | None], absent: float) -> Tensor:
    """Rows of ``table`` in our order; rows they did not have are filled with ``absent``."""
    rows = [torch.full_like(table[0], absent) if i is None else table[i] for i in order]
    return torch.stack(rows)


def _config_of(weights: dict[str, Tensor], resnet: str, decoder: Path) -> Config:
    """The config whose model these weights fit; training settings are the defaults, and mean nothing."""
    layers = sum(name.startswith("decoder.lstm.") and name.endswith(".weight_hh_l0") for name in weights)
    return Config(
        run=decoder.stem,
        data=DataConfig(train=f"imported from {decoder.name}", crop_mode="squash", image_size=224),
        encoder=EncoderConfig(name=resnet, projection_batch_norm="projection.1.weight" in weights),  # type: ignore[arg-type]
        decoder=DecoderConfig(
            embedding_size=weights["decoder.embedding.weight"].shape[1],
            hidden_size=weights["decoder.lstm.0.weight_hh_l0"].shape[1],
            num_layers=layers,
        ),
        train=replace(TrainConfig(), epochs=1),
    )


def _check_fit(weights: dict[str, Tensor], config: Config, words: int, where: str) -> None:
    """Every tensor the model has, in its shape; counters of BatchNorm, which old files lack, are added.

    Raises:
        InputError: listing what is missing, too many or of another shape.
    """
    with torch.device("meta"):
        own = Captioner(config, words).state_dict()
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, torch.zeros((), dtype=tensor.dtype))
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is too many" for name in weights if name not in own]
    wrong += [
        f"{name} has shape {list(weights[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        raise InputError(f"{where} do not make a {config.encoder.name} captioner:\n{listed(wrong, limit=8)}")
