"""The metadata of a split that holds features instead of images: which encoder made them, of which pixels.

It is in NAME.json under ``packing.features``; ``captioning encode`` writes it. Nothing here imports torch.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from captioning.config import Config
from shards.errors import InputError, listed, reason_of
from shards.hashing import key_of
from shards.index import Index

# Settings of the preprocessing that change what is seen in training alone, not of features of one plain view.
TRAINING_ONLY = ("flip", "random_resized_crop", "color_jitter", "rand_augment")
FORMS = ("pooled", "grid")
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class StoredFeatures:
    """Features of each image: ``pooled`` [D] or ``grid`` [P, D], in files KEY.npy, of N views KEY.0.npy and so on. Of
    padded images' grids the places with image in them, [h, w, D]: the larger of h and w is the square grid's side."""

    encoder: str  # encoder.name
    weights_sha256: str | None  # of the encoder's weights; None: others' features, of an encoder that is not here
    last_stage: str | None
    form: str
    grid_size: int | None  # the side that the encoder's own grid was pooled to
    size: int  # D
    preprocessing: dict[str, Any]  # settings of the data section, and their values
    views: int  # 1: as images are evaluated; else each is one epoch's random crop
    seed: int  # of the views
    dtype: str
    batch_size: int  # images encoded together

    def view_of(self, seed: int, epoch: int, sample: int) -> int:
        """Which view training sees: each image begins at a random one and has seen all of them after as many epochs."""
        return (key_of("view", seed, sample) + epoch) % self.views

    @property
    def padded(self) -> bool:
        """Whether they are grids [h, w, D] of padded images."""
        return self.form == "grid" and self.preprocessing.get("crop_mode") == "pad"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stored_features(index: Index) -> StoredFeatures | None:
    """What a split says of its features; None for a split of images.

    Raises:
        InputError: when it says nonsense.
    """
    packing = index.document.get("packing")
    values = packing.get("features") if isinstance(packing, dict) else None
    if values is None:
        return None
    try:
        stored = StoredFeatures(**{field.name: values[field.name] for field in fields(StoredFeatures)})
        right = (
            stored.form in FORMS
            and stored.dtype in DTYPES
            and all(type(n) is int and n >= 1 for n in (stored.size, stored.views, stored.batch_size))
            and isinstance(stored.preprocessing, dict)
            and isinstance(stored.encoder, str)
        )
        if not right:
            raise ValueError("a form, dtype, size or number of views that there is not")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{index.path}: what it says of its features is wrong ({reason_of(error)}).") from error
    return stored


def check_settings(index: Index, config: Config, in_training: bool) -> None:
    """Refuse features that a run of this config could not have computed itself, as far as settings tell.

    Raises:
        InputError: naming every setting that differs, or when the encoder is to be trained.
    """
    stored = stored_features(index)
    if stored is None:
        return
    if in_training and config.encoder.trainable != "none":
        raise InputError(
            f"encoder.trainable={config.encoder.trainable}, and data.train={index.path} holds features: an encoder "
            "learns from pixels, and these were computed once, before training. Set encoder.trainable=none, or train "
            "on the images."
        )
    if not in_training and stored.views > 1:
        raise InputError(
            f"{index.path} holds {stored.views} random views of each image; captions are scored on the plain one. "
            "Encode it without --views, or name the images' own split."
        )
    wanted = {
        "encoder.name": (stored.encoder, config.encoder.name),
        "encoder.last_stage": (stored.last_stage, config.encoder.last_stage),
        **{f"data.{key}": (value, getattr(config.data, key, None)) for key, value in stored.preprocessing.items()},
    }
    if stored.form == "grid":
        wanted["encoder.grid_size"] = (stored.grid_size, config.encoder.grid_size)
    differing = [f"{key}: {theirs} there, {ours} here" for key, (theirs, ours) in wanted.items() if theirs != ours]
    if differing:
        raise InputError(
            f"{index.path} holds features of another encoder or other pixels than this run's:\n{listed(differing)}\n"
            "Change these settings, or encode the images with this config (`captioning encode`)."
        )
