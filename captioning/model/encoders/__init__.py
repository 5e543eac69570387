"""Image encoders, one file a family. The table of their names is ``captioning.config.ENCODERS``."""

from pkgutil import resolve_name

from captioning.config import ENCODERS, EncoderConfig
from captioning.model.encoders.protocol import Encoder


def build_encoder(config: EncoderConfig, image_size: int = 224) -> Encoder:
    """The encoder ``config.name``, randomly initialised, for images of ``image_size`` pixels a side.

    Raises:
        InputError: when it cannot take images of that size, or has no stage ``config.trainable``.
    """
    return resolve_name(f"{__name__}.{ENCODERS[config.name].builder}")(config, image_size)
