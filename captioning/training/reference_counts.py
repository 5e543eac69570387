"""The training captions' n-grams, counted once a run beside the encoded captions; every rank maps them."""

from collections.abc import Iterator
from pathlib import Path

from captioning.metrics import references
from captioning.metrics.ptb import TOKENIZER, words_for_scoring
from captioning.runs.progress import Progress
from shards.index import Index, read_texts


def count_references(index: Index, folder: Path, with_end: bool, on_progress: Progress) -> Path:
    """Count the split's captions as evaluation cuts them into words, in the split's order, one entry a sample.

    A folder that already holds this split's is left as it is. ``with_end``: <end> is a word. Returns the folder.
    """
    about: dict[str, object] = {"fingerprint": index.fingerprint, "tokenizer": TOKENIZER, "with_end": with_end}
    if references.is_saved(folder, about):
        return folder

    def texts() -> Iterator[list[list[str]]]:
        done = 0
        for shard in index.shards:
            for text in read_texts(shard):
                yield [words_for_scoring(caption) for caption in text.captions]
            done += shard.nsamples
            on_progress(done, len(index))

    references.save(references.count(texts(), with_end), folder, about)
    return folder
