"""The training captions' n-grams, counted once a run beside the encoded captions; every rank maps them."""

from collections.abc import Iterator
from pathlib import Path

from captioning.data.captions import captions_of, hash_of_captions
from captioning.metrics import references
from captioning.metrics.ptb import CUTS, tokenizer_for
from captioning.runs.progress import Progress
from shards.index import Index, read_texts


def count_references(index: Index, folder: Path, with_end: bool, on_progress: Progress) -> Path:
    """Count the split's captions as evaluation cuts them into words, in the split's order, one entry a sample.

    What it was cut by stays in the folder's ``about``. A folder that already holds this split's is left as it is.
    ``with_end``: <end> is a word. Returns the folder.
    """
    about = {"fingerprint": index.fingerprint, "captions": hash_of_captions(index), "with_end": with_end}
    if any(references.is_saved(folder, {**about, "tokenizer": tokenizer}) for tokenizer in CUTS):
        return folder
    tokenizer = tokenizer_for(captions_of(index))

    def texts() -> Iterator[list[list[str]]]:
        done = 0
        for shard in index.shards:
            for text in read_texts(shard):
                yield [CUTS[tokenizer](caption) for caption in text.captions]
            done += shard.nsamples
            on_progress(done, len(index))

    references.save(references.count(texts(), with_end), folder, {**about, "tokenizer": tokenizer})
    return folder
