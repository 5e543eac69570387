"""Words <-> ids. Made from the training captions alone, kept as JSON beside every checkpoint."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.treebank import TreebankWordDetokenizer

from shards.errors import InputError

PAD, START, END, UNK = 0, 1, 2, 3
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")

_tokenizer, _detokenizer = NLTKWordTokenizer(), TreebankWordDetokenizer()


def tokenize(caption: str) -> list[str]:
    """Lower-case Penn Treebank tokens, punctuation included (nltk's word tokenizer, which needs no data files)."""
    return _tokenizer.tokenize(caption.lower())


@dataclass(frozen=True)
class Vocabulary:
    """Words by id; ids 0..3 are <pad>, <start>, <end> and <unk>."""

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def decode(self, ids: Sequence[int]) -> str:
        """The text a person would write, up to <end>: no space before punctuation, first letter large."""
        words = []
        for number in ids:
            if number == END:
                break
            if number not in (PAD, START):
                words.append(self.words[number])
        text = _detokenizer.detokenize(words)
        return text[:1].upper() + text[1:]

    def to_json(self) -> str:
        return json.dumps({"words": self.words}, ensure_ascii=False, indent=0)


def from_json(text: str, where: str) -> Vocabulary:
    """Read what ``to_json`` wrote.

    Raises:
        InputError: when the text is no vocabulary.
    """
    try:
        words = tuple(json.loads(text)["words"])
        if words[: len(SPECIAL)] != SPECIAL or len(set(words)) != len(words) or not all(map(_is_text, words)):
            raise ValueError(f"the words must be distinct texts that begin with {', '.join(SPECIAL)}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} is not a vocabulary: {error}") from error
    return Vocabulary(words)


def _is_text(word: object) -> bool:
    return isinstance(word, str)


def build(counts: Counter[str], threshold: int) -> Vocabulary:
    """The words that occur at least ``threshold`` times, the most frequent first (ties by spelling)."""
    kept = sorted((word for word, count in counts.items() if count >= threshold), key=lambda w: (-counts[w], w))
    return Vocabulary(SPECIAL + tuple(word for word in kept if word not in SPECIAL))
