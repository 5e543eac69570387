"""Tokens <-> ids. Made from the training captions alone, kept as JSON beside every checkpoint with its tokenizer."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from captioning.data.tokenizer import Tokenizer, Words, kind_of, name_of
from shards.errors import InputError
from shards.files import parse_json
from shards.scripts import is_spaceless, scripts_of

PAD, START, END, UNK = 0, 1, 2, 3
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
LEAST_COVERAGE = 0.5  # of the training tokens; with less, most of what a model is taught is <unk>


@dataclass(frozen=True)
class Vocabulary:
    """Words (whatever tokens the tokenizer makes) by id; ids 0..3 are <pad>, <start>, <end> and <unk>."""

    words: tuple[str, ...]
    tokenizer: Tokenizer = field(default_factory=Words)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def decode(self, ids: Sequence[int]) -> str:
        """The text a person would write, up to <end>."""
        words = []
        for number in ids:
            if number == END:
                break
            if number not in (PAD, START):
                words.append(self.words[number])
        return self.tokenizer.detokenize(words)

    def coverage(self, counts: Counter[str]) -> float:
        """The share of the tokens counted that it has; 1 where there are none."""
        return sum(counts[word] for word in self.words[len(SPECIAL) :]) / max(1, counts.total()) if counts else 1.0

    def to_json(self) -> str:
        document = {"tokenizer": name_of(self.tokenizer), "learned": self.tokenizer.learned(), "words": self.words}
        return json.dumps(document, ensure_ascii=False, indent=0)


def from_json(text: str, where: str) -> Vocabulary:
    """Read what ``to_json`` wrote.

    Raises:
        InputError: when the text is no vocabulary.
    """
    try:
        document = parse_json(text)
        words = tuple(document["words"])
        if words[: len(SPECIAL)] != SPECIAL or len(set(words)) != len(words) or not all(map(_is_text, words)):
            raise ValueError(f"the words must be distinct texts that begin with {', '.join(SPECIAL)}")
        tokenizer = kind_of(document.get("tokenizer", "words")).from_learned(document.get("learned", {}))
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{where} is not a vocabulary: {error}") from error
    return Vocabulary(words, tokenizer)


def _is_text(word: object) -> bool:
    return isinstance(word, str)


def build(
    counts: Counter[str], threshold: int, size: int | None = None, tokenizer: Tokenizer | None = None
) -> Vocabulary:
    """The tokens that occur at least ``threshold`` times, the most frequent first (ties by spelling); at most ``size``
    with the special ones."""
    kept = sorted((word for word, count in counts.items() if count >= threshold), key=lambda w: (-counts[w], w))
    words = SPECIAL + tuple(word for word in kept if word not in SPECIAL)
    return Vocabulary(words if size is None else words[: max(size, len(SPECIAL))], tokenizer or Words())


def check_coverage(vocabulary: Vocabulary, counts: Counter[str], threshold: int, size: int | None) -> None:
    """See that a vocabulary can say what the training captions say.

    Raises:
        InputError: where it has less than half of their tokens: why, and which setting to change.
    """
    covered = vocabulary.coverage(counts)
    if covered >= LEAST_COVERAGE:
        return
    name = name_of(vocabulary.tokenizer)
    raise InputError(
        f"The vocabulary, {len(vocabulary) - len(SPECIAL):,} of the {len(counts):,} different tokens of the training "
        f"captions, covers {covered:.1%} of what they say; the rest would be <unk>.\n"
        f"{_remedy(counts, name, threshold, size)}"
    )


def _remedy(counts: Counter[str], name: str, threshold: int, size: int | None) -> str:
    if name in ("words", "whitespace") and is_spaceless(counts):
        script = next(iter(scripts_of(counts)))
        return (
            f"data.tokenizer={name} cuts at spaces, and these captions ({script}) set none between words: "
            "set data.tokenizer=characters."
        )
    if size is not None and build(counts, threshold).coverage(counts) >= LEAST_COVERAGE:
        return f"data.vocabulary_size={size} leaves them out. Raise it, or set it to null."
    return f"Most tokens occur fewer than data.min_word_freq={threshold} times. Lower it" + (
        ", or set data.tokenizer=bpe, which makes words from parts." if name in ("words", "whitespace") else "."
    )
