"""Hashes by which images are known again: of a file's bytes, and of what it shows.

The perceptual hash is the sign of the 16 x 16 lowest DCT coefficients of the picture's luminance at 32 x 32 (after
Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, with signs in place of a median, so
that the hash of the mirrored picture follows from the hash). On 901 photographs, copies encoded again or resized differ
in at most 51 of 255 bits, other pictures in at least 87: ``tests/unit/test_overlap.py`` looks at 300 of them.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

BITS = 255  # of 16 x 16 signs, all but the first, the mean brightness
NEAR_BITS = 64  # two pictures that differ in no more are taken for copies of one
_SIDE, _LOW, _SAMPLES, _LARGE = 32, 16, 96, 256
_FLAT = 1.0  # gray levels: a picture that varies by less is flat, and its signs are noise
_DCT = np.cos(np.pi * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)).astype(np.float32)


class ImageHashes(NamedTuple):
    """Of one image: the first 128 bits of its file's sha256, and its perceptual hash; hexadecimal digits."""

    sha256: str
    perceptual: str | None  # None for a flat picture, or where nobody decoded it


def bytes_hash(data: bytes) -> str:
    """The first 128 bits of the sha256, as 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def thumbnail(image: Image.Image) -> bytes:
    """What the perceptual hash of an upright RGB image is made from: its gray levels at 32 x 32, 1,024 bytes."""
    if (shrink := min(image.size) // _LARGE) > 1:
        image = image.reduce(shrink)
    # Nine samples a cell are as good as all pixels and cost a third.
    sampled = image.resize((_SAMPLES, _SAMPLES), Image.Resampling.NEAREST).convert("L")
    return sampled.resize((_SIDE, _SIDE), Image.Resampling.BOX).tobytes()


def perceptual_hashes(thumbnails: Sequence[bytes]) -> list[str | None]:
    """The perceptual hash of each thumbnail as 64 hexadecimal digits; None of a flat picture. All at once: for one,
    the calls cost more than the arithmetic."""
    gray = np.frombuffer(b"".join(thumbnails), dtype=np.uint8).reshape(-1, _SIDE, _SIDE).astype(np.float32)
    signs = np.packbits((_DCT @ gray @ _DCT.T > 0).reshape(len(gray), _LOW * _LOW), axis=1)
    flat = gray.std(axis=(1, 2)) < _FLAT
    return [None if is_flat else row.tobytes().hex() for row, is_flat in zip(signs, flat, strict=True)]


def perceptual_hash(image: Image.Image) -> str | None:
    """``perceptual_hashes`` of one upright RGB image."""
    return perceptual_hashes([thumbnail(image)])[0]


def split_signs(hashes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Perceptual hashes as float32 of -1 and 1: [N, 127] that stay and [N, 128] that change where a picture is mirrored
    left to right. The product of two hashes' signs is BITS - 2 * the bits that differ."""
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(len(hashes), -1)
    signs = np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
    return signs[:, 2::2], signs[:, 1::2]
