"""Features as others store them, a file an image: .npy, or .npz with one array that matters."""

import io
import zipfile
from typing import Any

import numpy as np

_NAMES = ("features", "feat", "feats", "x", "arr_0", "att", "grid")  # of the array in an .npz; else its only one


def read_array(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy or .npz file; nothing is unpickled.

    Raises:
        ValueError: when they are neither, or an .npz of several arrays does not tell which is meant.
    """
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        names = [name for name in _NAMES if name in loaded.files] or loaded.files
        if len(loaded.files) > 1 and names == loaded.files:
            raise ValueError(f"it holds {', '.join(loaded.files)[:80]}, none of them called {', '.join(_NAMES)}")
        return loaded[names[0]]
    except (OSError, EOFError, IndexError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"no .npy or .npz file ({error})") from error


def as_places(array: np.ndarray) -> np.ndarray:
    """[D] as it is; [P, D]; a feature map [D, h, w] or [h, w, D] (the two sides are the ones alike, or [1, ...]) -> its
    places row by row, [h * w, D].

    Raises:
        ValueError: for what is none of these, or no finite numbers.
    """
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3:
        if array.shape[1] == array.shape[2] != array.shape[0]:
            array = array.transpose(1, 2, 0)
        array = array.reshape(-1, array.shape[-1])
    if array.ndim not in (1, 2) or not array.size or array.dtype.kind not in "fiu":
        raise ValueError(f"an array {array.dtype} {list(array.shape)}; [D], [P, D] or [D, h, w] of numbers is wanted")
    if not np.isfinite(array).all():
        raise ValueError("it holds numbers that are not finite")
    return array


def stored_array(data: bytes, features: dict[str, Any]) -> bytes:
    """The bytes of a file of features -> those of the .npy that is stored, of the form, width and type that
    ``features`` tells.

    Raises:
        ValueError: when they are of another form or width, or too large for the type.
    """
    array = as_places(read_array(data))
    form = "pooled" if array.ndim == 1 else "grid"
    if (form, array.shape[-1]) != (features["form"], features["size"]):
        raise ValueError(
            f"{form} features of {array.shape[-1]}, not {features['form']} of {features['size']} as others"
        )
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array, dtype=features["dtype"])
    if not np.isfinite(stored).all():
        raise ValueError(f"a number is too large for {features['dtype']}: pack with --dtype float32")
    file = io.BytesIO()
    np.save(file, stored, allow_pickle=False)
    return file.getvalue()
