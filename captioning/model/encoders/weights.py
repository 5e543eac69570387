"""Reading pretrained weights of torchvision's models: by name, or from a file. Nothing is unpickled."""

import hashlib
import urllib.error
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from shards.errors import InputError


def read_weights(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict of the torchvision model ``name``: ``weights`` names one of torchvision's (IMAGENET1K_V2, or
    DEFAULT for its best), else a .pth or .safetensors file.

    Raises:
        InputError: for an unknown name, a file that holds something else, or weights that cannot be downloaded.
    """
    known = torchvision.models.get_model_weights(name)
    if weights in known.__members__ or weights == "DEFAULT":
        return _download(known[weights], weights)
    path = Path(weights)
    if not path.is_file():
        names = ", ".join(known.__members__)
        raise InputError(f"encoder.weights={weights} is neither a file nor weights of {name} ({names}).")
    state = _read_file(path)
    if not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(str(key) for key in list(state)[:6])
        raise InputError(f"encoder.weights={weights} is no state dict of tensors: it holds {keys}. Save that part.")
    return state


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """What tells one encoder's weights from another's: the sha256 over names, shapes and values of its state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _download(choice: torchvision.models.WeightsEnum, weights: str) -> dict[str, Tensor]:
    try:
        return choice.get_state_dict(progress=False, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints" / choice.url.rsplit("/", 1)[-1]
        raise InputError(
            f"encoder.weights={weights} could not be downloaded ({error}).\nOn a machine with a network fetch\n"
            f"  {choice.url}\nand put it at\n  {cache}\nor anywhere, and set encoder.weights=FILE."
        ) from error


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch and safetensors raise their own kinds for a file that is something else
        raise InputError(f"encoder.weights={path} cannot be read as a state dict: {error}") from error
