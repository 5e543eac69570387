"""A trained model as a folder to hand on.

The folder holds ``model.safetensors``, ``vocabulary.json``, ``config.json`` (all settings, where the model comes from,
and the other files' sha256) and a ``README.md`` for people. ``Predictor`` loads it alone. Nothing is unpickled.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from captioning import config as configuration
from captioning.config import Config
from captioning.data import vocabulary as vocab
from captioning.data.vocabulary import Vocabulary
from shards.errors import InputError, reason_of
from shards.files import parse_json, sha256_of, write_atomically

KIND = "image captioner 1"
_HASHED = ("model.safetensors", "vocabulary.json")


@dataclass(frozen=True)
class ModelBundle:
    """What a model folder holds: weights by our names, and what is needed to use them."""

    config: Config
    vocabulary: Vocabulary
    weights: dict[str, Tensor]
    step: int  # optimizer steps it was trained for; 0: not known
    origin: str  # where it comes from, for people


def write(bundle: ModelBundle, folder: Path) -> None:
    """Write a model folder; config.json last, so that a folder without it is one that was not finished.

    Raises:
        InputError: when the folder holds something else already.
    """
    names = {*_HASHED, "config.json", "README.md"}
    # Captions that `captioning evaluate` left next to an earlier export are no reason to refuse.
    files = list(folder.iterdir()) if folder.is_dir() else []
    if folder.is_file() or {path.name for path in files if not path.match("captions-*.json")} - names:
        raise InputError(f"{folder} holds other things. Give a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in bundle.weights.items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(weights))
    write_atomically(folder / "vocabulary.json", bundle.vocabulary.to_json().encode())
    write_atomically(folder / "README.md", _read_me(bundle, folder.name).encode())
    document = {
        "kind": KIND,
        "origin": bundle.origin,
        "step": bundle.step,
        "sha256": {name: sha256_of(folder / name) for name in _HASHED},
        "config": configuration.to_dict(bundle.config),
    }
    write_atomically(folder / "config.json", json.dumps(document, indent=1).encode())


def is_model_folder(folder: Path) -> bool:
    """Whether it looks like what ``write`` wrote, rather than like a run."""
    return (folder / "config.json").is_file()


def read(folder: Path) -> ModelBundle:
    """A model folder, every file as it was written.

    Raises:
        InputError: when a file is missing, damaged or of another kind.
    """
    path = folder / "config.json"
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        if document["kind"] != KIND:
            raise ValueError(f"its kind is {document['kind']!r}, not {KIND!r}")
        hashes = {name: str(document["sha256"][name]) for name in _HASHED}
        step, origin, values = int(document["step"]), str(document["origin"]), document["config"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path} was not written by `captioning export` ({reason_of(error)}).") from error
    for name, expected in hashes.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise InputError(f"{folder / name} is missing or not what was exported. Copy the folder again.")
    try:
        text = (folder / "vocabulary.json").read_text(encoding="utf-8")
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder} was not written by `captioning export` ({reason_of(error)}).") from error
    vocabulary = vocab.from_json(text, f"{folder}/vocabulary.json")
    return ModelBundle(configuration.from_dict(values, str(path)), vocabulary, weights, step, origin)


def _read_me(bundle: ModelBundle, name: str) -> str:
    config = bundle.config
    return (
        f"# {name}\n\nAn image captioner: {config.encoder.name} and a decoder of kind {config.decoder.name}, "
        f"{len(bundle.vocabulary):,} words, images of {config.data.image_size} pixels. {bundle.origin}\n\n"
        "```\nfrom captioning.inference.predictor import Predictor\n\n"
        f'print(Predictor.from_checkpoint("{name}").caption(["photo.jpg"])[0])\n```\n\n'
        f"or `captioning caption {name} photo.jpg`.\n"
    )
