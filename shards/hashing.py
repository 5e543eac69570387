"""Randomness without state: every random number is a hash of what it is for.

Nothing is drawn from a generator, so nothing needs saving: the order of an epoch, a crop and a flip depend on their
names alone (seed, epoch, sample ...), never on how many processes or workers asked before. The mixing function is
SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014); it is
spelled out here because a library's generator may change its stream from one release to the next.
"""

import hashlib

import numpy as np

_MASK = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key_of(*parts: object) -> int:
    """A 64-bit key for a purpose, e.g. ``key_of("order", fingerprint, seed, epoch)``."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def hash64(key: int, counter: np.ndarray) -> np.ndarray:
    """Uniform 64-bit values [N] (uint64) for ``counter`` [N] (non-negative integers) under ``key``."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        z = counter.astype(np.uint64) * _GOLDEN + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(key: int, counter: np.ndarray) -> np.ndarray:
    """Uniform floats in [0, 1) [N] (float64), one for each counter."""
    return (hash64(key, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniforms(key: int, count: int) -> list[float]:
    """``uniform(key, [0 .. count - 1])`` as numbers: for a few, arrays take ten times as long."""
    found = []
    for counter in range(count):
        z = (counter * 0x9E3779B97F4A7C15 + key) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        found.append(((z ^ (z >> 31)) >> 11) * 2.0**-53)
    return found
