"""Every training caption as word ids, tokenized once a run and memory-mapped by every process that reads it.

Tokenizing an image's five captions costs as much as decoding its JPEG; doing it on the fly would halve the loader.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from captioning.data import vocabulary as vocab
from captioning.data.vocabulary import Vocabulary
from shards.files import write_atomically
from shards.index import Index, read_texts

_ARRAYS = ("ids", "caption_starts", "sample_starts")


@dataclass(frozen=True)
class EncodedCaptions:
    """A folder of three arrays: word ids of all captions end to end, where each caption and each sample begins."""

    folder: Path

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self.folder}  # a loader process maps the files itself rather than being sent their contents

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        paths = [self.folder / f"{name}.npy" for name in _ARRAYS]
        # Plain arrays over the mapped files: a memmap takes ten times as long to slice.
        return [np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray) for path in paths]

    def __len__(self) -> int:
        return len(self._arrays[2]) - 1

    def of(self, sample: int) -> list[np.ndarray]:
        """The captions of one sample, each an int32 array of at most ``max_words`` word ids, without <end>."""
        ids, caption_starts, sample_starts = self._arrays
        starts = caption_starts[sample_starts[sample] : sample_starts[sample + 1] + 1].tolist()
        return [ids[a:b] for a, b in pairwise(starts)]


def encode(
    index: Index,
    folder: Path,
    threshold: int,
    max_words: int,
    vocabulary: Vocabulary | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Vocabulary:
    """Tokenize a split once: build the vocabulary (unless one is given) and write the EncodedCaptions folder.

    A folder that already holds this split in this vocabulary is left as it is. Returns the vocabulary.
    """
    if vocabulary is not None and _up_to_date(folder, _about(index, vocabulary, max_words)):
        return vocabulary
    numbers: dict[str, int] = {}
    counts: Counter[int] = Counter()
    ids, caption_starts, sample_starts = array("i"), array("q", [0]), array("q", [0])
    done = 0
    for shard in index.shards:
        for text in read_texts(shard):
            for caption in text.captions:
                words = [numbers.setdefault(word, len(numbers)) for word in vocab.tokenize(caption)]
                counts.update(words)
                ids.extend(words[:max_words])
                caption_starts.append(len(ids))
            sample_starts.append(len(caption_starts) - 1)
        done += shard.nsamples
        on_progress(done, len(index))
    spellings = list(numbers)
    if vocabulary is None:
        vocabulary = vocab.build(Counter({spellings[number]: count for number, count in counts.items()}), threshold)
    final = np.array([vocabulary.ids.get(word, vocab.UNK) for word in spellings] or [0], dtype=np.int32)
    arrays = (final[np.asarray(ids, dtype=np.int64)], np.asarray(caption_starts), np.asarray(sample_starts))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").unlink(missing_ok=True)
    for name, values in zip(_ARRAYS, arrays, strict=True):
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())  # before about.json says that they are there
    write_atomically(folder / "about.json", json.dumps(_about(index, vocabulary, max_words)).encode())
    return vocabulary


def _about(index: Index, vocabulary: Vocabulary, max_words: int) -> dict[str, object]:
    return {"fingerprint": index.fingerprint, "max_words": max_words, "words": list(vocabulary.words)}


def _up_to_date(folder: Path, about: dict[str, object]) -> bool:
    try:
        return json.loads((folder / "about.json").read_text(encoding="utf-8")) == about
    except (OSError, ValueError):
        return False
