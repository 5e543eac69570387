"""Which encoder a run has, and whether stored features are this very encoder's."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from captioning.config import Config
from captioning.data.stored_features import StoredFeatures, stored_features
from captioning.model.decoders import DECODERS
from captioning.model.encoders import Encoder, build_encoder
from captioning.model.encoders.weights import weights_sha256
from shards.errors import InputError
from shards.hashing import key_of
from shards.index import Index


def first_encoder(config: Config) -> Encoder:
    """The encoder that a new run of this config begins with, its weights read or, without any, drawn by its seed.

    Raises:
        InputError: when there are no such weights.
    """
    torch.manual_seed(key_of("model", config.seed) >> 1)
    encoder = build_encoder(config.encoder, config.data.image_size)
    encoder.load_pretrained(config.encoder.weights)
    return encoder


def encoder_part(captioner_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's state dict, of a whole captioner's."""
    prefix = "encoder."
    return {name.removeprefix(prefix): value for name, value in captioner_state.items() if name.startswith(prefix)}


def check_encoder(index: Index | None, config: Config, encoder_state: Callable[[], Mapping[str, Tensor]]) -> None:
    """Refuse a split of features that another encoder gave, or that the decoder cannot take. ``check_settings`` comes
    before; ``encoder_state`` is asked for where it is needed.

    Raises:
        InputError: naming what differs.
    """
    stored = None if index is None else stored_features(index)
    if stored is None or index is None:
        return
    uses_grid = DECODERS[config.decoder.name].uses_grid
    if stored.weights_sha256 is None:  # given by others: config and split agree on that
        _check_given(index, stored, config, uses_grid)
        return
    wanted = "grid" if uses_grid else "pooled"
    if stored.form != wanted:
        raise InputError(
            f"{index.path} holds {stored.form} features, and decoder.name={config.decoder.name} takes {wanted} ones: "
            f"encode the images with --{wanted}."
        )
    sha256 = weights_sha256(encoder_state())
    if sha256 != stored.weights_sha256:
        raise InputError(
            f"{index.path} holds features of {stored.encoder} with other weights than this run's: sha256 "
            f"{stored.weights_sha256[:16]} there, {sha256[:16]} here (encoder.weights={config.encoder.weights}"
            f"{f', drawn by seed={config.seed}' if config.encoder.weights is None else ''}).\n"
            "Give the run the weights they were encoded with, or encode the images with this run's."
        )


def _check_given(index: Index, stored: StoredFeatures, config: Config, uses_grid: bool) -> None:
    if stored.size != config.encoder.feature_size:
        raise InputError(f"{index.path} holds features {stored.size} wide: set encoder.feature_size={stored.size}.")
    if uses_grid and stored.form == "pooled":
        raise InputError(
            f"{index.path} holds one vector an image, and decoder.name={config.decoder.name} looks at places. Set "
            "decoder.name=lstm."
        )
