"""How a caption becomes tokens and tokens become a caption again.

A tokenizer is one class that fits the protocol and one line in ``TOKENIZERS``; ``data.tokenizer`` names it, and
``vocabulary.json`` carries its name and what it learned.
"""

import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import regex
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.treebank import TreebankWordDetokenizer

from shards.errors import InputError

BPE_TOKENS = 8000  # learned where data.vocabulary_size is null


class Tokenizer(Protocol):
    """Cuts and joins. Two of one kind that learned the same are equal, and work alike on every machine."""

    @classmethod
    def train(cls, captions: Iterable[str], most_tokens: int | None, least_count: int) -> "Tokenizer":
        """One that learned from the training captions alone; the same captions in any order give the same."""

    @classmethod
    def from_learned(cls, learned: dict) -> "Tokenizer":
        """From what ``learned`` gave; raises ValueError, KeyError or TypeError for anything else."""

    def learned(self) -> dict:
        """What it learned, for JSON; empty where there is nothing to learn."""

    def tokenize(self, caption: str) -> list[str]: ...

    def detokenize(self, tokens: Sequence[str]) -> str:
        """The text a person would write."""


@dataclass(frozen=True)
class _Unlearned:
    """What tokenizers share that work by rules alone."""

    @classmethod
    def train(cls, captions: Iterable[str], most_tokens: int | None, least_count: int) -> Any:
        return cls()

    @classmethod
    def from_learned(cls, learned: dict) -> Any:
        return cls()

    def learned(self) -> dict:
        return {}


_nltk, _nltk_join = NLTKWordTokenizer(), TreebankWordDetokenizer()


class Words(_Unlearned):
    """Lower-case Penn Treebank tokens, punctuation included (nltk's word tokenizer, which needs no data files)."""

    def tokenize(self, caption: str) -> list[str]:
        return _nltk.tokenize(_composed(caption).lower())

    def detokenize(self, tokens: Sequence[str]) -> str:
        """No space before punctuation, first letter large."""
        text = _nltk_join.detokenize(list(tokens))
        return text[:1].upper() + text[1:]


class Whitespace(_Unlearned):
    """What stands between spaces, as it is written: for captions that are tokenized already."""

    def tokenize(self, caption: str) -> list[str]:
        return _composed(caption).split()

    def detokenize(self, tokens: Sequence[str]) -> str:
        return " ".join(tokens)


class Characters(_Unlearned):
    """Characters as a reader sees them, marks with their letters (grapheme clusters, https://unicode.org/reports/tr29),
    case kept, a space being one too: for languages that write no spaces between words."""

    def tokenize(self, caption: str) -> list[str]:
        return regex.findall(r"\X", _spaced(caption))

    def detokenize(self, tokens: Sequence[str]) -> str:
        return "".join(tokens).strip()


@dataclass(frozen=True)
class BytePairEncoding:
    """Parts of words, merged from characters by frequency (Sennrich et al., https://arxiv.org/abs/1508.07909), case
    kept. A token that begins a word begins with ``▁``; punctuation is a token of its own.

    ``tokens`` by id, the first being for characters unseen; ``merges`` in their order.
    """

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    @classmethod
    def train(cls, captions: Iterable[str], most_tokens: int | None, least_count: int) -> "BytePairEncoding":
        from tokenizers import trainers

        # Threads of the library's would have it warn at every fork of ours, and the order of counting is nobody's.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        tokenizer = _bpe()
        trainer = trainers.BpeTrainer(
            vocab_size=most_tokens or BPE_TOKENS,
            min_frequency=least_count,
            special_tokens=[_UNSEEN],
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_spaced, captions), trainer)
        vocabulary = tokenizer.get_vocab()
        learned = json.loads(tokenizer.to_str())["model"]["merges"]
        return cls.from_learned({"tokens": sorted(vocabulary, key=vocabulary.__getitem__), "merges": learned})

    @classmethod
    def from_learned(cls, learned: dict) -> "BytePairEncoding":
        tokens, merges = learned["tokens"], [tuple(pair) for pair in learned["merges"]]
        texts = [*tokens, *(part for pair in merges for part in pair)]
        if not all(isinstance(text, str) for text in texts) or any(len(pair) != 2 for pair in merges):
            raise ValueError("tokens must be texts, and merges pairs of them")
        made = cls(tuple(tokens), tuple(merges))
        _ = made._tokenizer  # the library checks that merges are made of tokens
        return made

    def learned(self) -> dict:
        return {"tokens": list(self.tokens), "merges": [list(pair) for pair in self.merges]}

    @cached_property
    def _tokenizer(self) -> Any:
        return _bpe({token: number for number, token in enumerate(self.tokens)}, list(self.merges))

    def tokenize(self, caption: str) -> list[str]:
        return self._tokenizer.encode(_spaced(caption)).tokens

    def detokenize(self, tokens: Sequence[str]) -> str:
        return "".join(tokens).replace(_SPACE, " ").strip()


_SPACE, _UNSEEN = "▁", "<unk>"


def _bpe(tokens: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None) -> Any:
    """The library's tokenizer (https://huggingface.co/docs/tokenizers), with what no merge of ours crosses."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    try:
        model = models.BPE(tokens, merges, unk_token=_UNSEEN, fuse_unk=False)
    except Exception as error:  # the library raises bare ones
        raise ValueError(f"no byte-pair encoding: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement=_SPACE), pre_tokenizers.Punctuation()]
    )
    return tokenizer


def _composed(caption: str) -> str:
    """Unicode NFC: a letter and its marks are one spelling, however they were typed."""
    return caption if caption.isascii() else unicodedata.normalize("NFC", caption)


def _spaced(caption: str) -> str:
    return " ".join(_composed(caption).split())


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "words": Words,
    "whitespace": Whitespace,
    "characters": Characters,
    "bpe": BytePairEncoding,
}


def kind_of(name: str) -> type[Tokenizer]:
    """The class of a tokenizer.

    Raises:
        InputError: for a name that is none.
    """
    if name not in TOKENIZERS:
        raise InputError(f"data.tokenizer={name} is not one of {', '.join(TOKENIZERS)}.")
    return TOKENIZERS[name]


def name_of(tokenizer: Tokenizer) -> str:
    """What ``TOKENIZERS`` calls it."""
    return next(name for name, kind in TOKENIZERS.items() if isinstance(tokenizer, kind))
