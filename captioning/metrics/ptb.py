"""Words for scoring, as Stanford's PTBTokenizer and the COCO evaluation's list of punctuation leave them; no Java.

The rules follow the behaviour of the tokenizer that pycocoevalcap runs (CoreNLP 3.4.1, ``-preserveLines -lowerCase``,
https://nlp.stanford.edu/software/tokenizer.html), found by asking it. tests/unit/test_ptb.py measures the agreement.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache

import regex

from shards.scripts import is_spaceless

TOKENIZER = "PTB rules in Python"
CHARACTERS = "characters, words of other scripts by PTB rules in Python"  # for languages that set no spaces

# What pycocoevalcap removes. Its list names the brackets as -LRB-, but the tokenizer writes them in lower case: they
# stay in its captions as words, so they stay here. The odd apostrophes it writes as plain ones where they stand alone.
_PUNCTUATION = {
    "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"',
    "\u2019", "\u2018", "\u201b", "\x91", "\x92", "\u2010", "\u2011", "\u058a",
}  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BRACKET = re.compile(r"[()\[\]{}]")
_ODD = str.maketrans(
    {
        **dict.fromkeys("\u201c\u201d\x93\x94\u00ab\u00bb\u2039\u203a", '"'),
        **dict.fromkeys("\u2013\u2014\u2015\x96\x97", "--"), **dict.fromkeys("\u20ac\u20a0\xa4\x80", "$"),
        "\u2026": "...", "\u00bd": " 1/2 ", "\u00bc": " 1/4 ", "\u00be": " 3/4 ", "\u2153": " 1/3 ", "\u2154": " 2/3 ",
        "\u00a3": "#", "\u00a2": " cents ", "\u00ad": "",
    }
)  # fmt: skip

# Abbreviations keep their full stop; these in any case, those of states that are also words only when capitalised,
# and those of numbers only before one.
_ABBREVIATIONS = """
    adm al ala apr ariz assn assoc asst atty aug ave bldg blvd brig bros calif capt cf cmdr co col colo comdr conn corp
    cos cpl ct dak dec dept det dr est etc ext feb fla fri ft ga gen gov hon inc ind insp intl jan jr jul jun kan kans
    ky lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc
    ph plc pres prof pvt rd rep reps rev rt sen sens sep sept sgt sq sr st ste supt tel tenn thurs treas tue tues univ
    va vs vt wed wis wisc wm wyo"""
_STATES = "Ark Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBERED = "art ca fig no nos op pp prop"
_SENTENCE_STARTS = """
    A About According Additionally After An And As At But Earlier He Her Here However If In It Last Many More Now Once
    One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet You"""


# What the tokenizer's grammar counts as letters besides Unicode's: the marks that carry vowels, tones and accents in
# the scripts its authors knew. Marks of other scripts (Sinhala, Khmer, Burmese ...) it drops, and so do we.
_MARKS = (
    "\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0384\u0385\u03f6\u0483-\u0487"
    "\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4"
    "\u06e7-\u06ed\u06fd\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e"
    "\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u09e2\u09e3"
    "\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd"
    "\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
# Signs it keeps, each a word; whatever is neither letter, digit nor one of these it drops.
_SIGNS = (
    "!-/:-@\\[-`{-~\xa1\xa5-\xa9\xac\xae-\xb4\xb6-\xb9\xbf\xd7\xf7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4"
    "\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f"
    "\u0e4f\u1fbd\u2016\u2017\u201a\u201e\u201f-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e\u2080-\u208e"
    "\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129\u212e\u213a\u213b"
    "\u2140-\u2144\u214a-\u214d\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20"
    "\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)


def _any_of(words: str) -> str:
    return "|".join(words.split())


def _ranges(of: Callable[[str], bool]) -> str:
    """The characters of the Basic Multilingual Plane that are so, as ranges for a character class."""
    held = [of(chr(code)) for code in range(0x10000)]
    edges = [code for code in range(0x10000) if held[code] != (code > 0 and held[code - 1])]
    return "".join(f"{chr(a)}-{chr(b - 1)}" for a, b in zip(edges[::2], [*edges[1::2], 0x10000], strict=False))


def _rules(alphabet: str, marks: str, digits: str, signs: str) -> re.Pattern[str]:
    """The tokenizer's rules, in their order, over these characters (the insides of character classes)."""
    letter, word = f"[{alphabet}{marks}]", f"[{alphabet}{marks}{digits}]"
    end = f"(?!{letter})"
    # Of a hyphenated word: no marks, and of French elisions these three.
    part = rf"(?:[dDlLoO]{_QUOTE}[{alphabet}{digits}]{{2}}|[{alphabet}{digits}_])[{alphabet}{digits}_]*"
    full_stop = rf"\.(?!{word})"
    capitalised = "|".join(f"{state}|{state.upper()}" for state in _STATES.split())
    rules = [
        # Most of all words are nothing but letters; the rest of the rules is tried only on what is not.
        r"(?!(?i:cannot|gonna|gotta|wanna|lemme|gimme)\b)[A-Za-z]{2,}(?=,?\s|$)",
        r"(?:https?://|www\.)\S*[^\s\"'<>.,:;!?)\]]",
        r"[A-Za-z0-9][\w.+-]*@\w[\w-]*(?:\.\w+)+",
        rf"#{letter}(?:{word}|_)*", r"@[A-Za-z]\w*",
        r"</?[A-Za-z][^<>\s]*>",
        rf"[<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]]{end}",  # smileys
        # Abbreviations, initials and acronyms with their full stops.
        rf"(?i:{_any_of(_ABBREVIATIONS)}){full_stop}",
        rf"(?:{capitalised}){full_stop}",
        rf"(?i:{_any_of(_NUMBERED)})\.(?=\s*\d)",
        rf"[A-Za-z](?:\.[A-Za-z])+{full_stop}",
        rf"[Pp]h\.[Dd]{full_stop}",
        rf"[A-Za-z]\.(?!{letter})(?!\s+(?:{_any_of(_SENTENCE_STARTS)})\b)",
        # Words joined by hyphens, by a slash or two, by an ampersand.
        r"[A-Za-z0-9_]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9_]+(?:-[A-Za-z]+){0,2}){1,2}(?![-'])",
        r"\d+-\d+/\d+",
        rf"{part}(?:[-\u058a\u2010\u2011]{part})+",
        r"[A-Za-z0-9][A-Za-z0-9_.,]*(?:-[A-Za-z0-9]+)+(?![^\W_])",
        r"[A-Z]+(?:&[A-Z]+)+",
        # Contractions: each half is a word.
        rf"{letter}+?(?=[nN]{_QUOTE}[tT]{end})", rf"[nN]{_QUOTE}[tT]{end}",
        rf"'(?i:[sdm]|re|ve|ll){end}", r"[\u2019\x92](?i:[sdm]|re|ve|ll)",
        r"(?i:can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b)|lem(?=me\b)|gim(?=me\b)|'t(?=(?:is|was)\b))",
        # Words with an apostrophe of their own.
        rf"'[nN](?:{_APOSTROPHE}|{end})", rf"[\u2019\x92][nN]{_APOSTROPHE}?", rf"{_APOSTROPHE}[2-9]0s\b",
        rf"(?i:{_APOSTROPHE}(?:em|till?|cause)|ol{_APOSTROPHE})(?=\W|$)", rf"[cC]{_APOSTROPHE}est{end}",
        rf"{letter}+[aeiouyAEIOUY]{_QUOTE}(?!(?i:[sdm]|re|ve|ll){end})[aeiouA-Z]{letter}*", rf"[oO]{_QUOTE}[oO]{end}",
        rf"[A-HJ-XZdlno]{_QUOTE}{letter}{{2}}{word}*", rf"[dDjJlLyY]{_APOSTROPHE}",
        # Numbers, words, and what is left.
        r"[-+]?(?:\d+/\d+(?![\w/])|\d*(?:[.:,]\d+)+|\d+(?!\w))",
        rf"{letter}{word}*(?:[.!?]{letter}{word}*)*", rf"[{alphabet}{digits}_]+", rf"{letter}+",
        rf"\.+|[?!]+|-+|\*+|''|``|[{signs}]",
    ]  # fmt: skip
    return re.compile("|".join(rules))


_APOSTROPHE, _QUOTE = "['\u2019\x92]", "['\u2019\x92`\u2018\u201b\x91]"
_CURLY = re.compile("[\u2019\x92]")
_CLITIC = re.compile(r"(?i:n.t|[\u2019\x92](?:[sdm]|re|ve|ll))")
_ASCII = _rules("A-Za-z", "", "0-9", "!-/:-@\\[-`{-~")


@cache
def _every_script() -> re.Pattern[str]:
    return _rules(_ranges(str.isalpha), _MARKS, _ranges(str.isdecimal), _SIGNS)


def words_for_scoring(caption: str) -> list[str]:
    """Lower-case Penn Treebank words of a caption, without punctuation."""
    if "&" in caption:
        caption = html.unescape(caption)
    if caption.isascii():
        tokens = _ASCII.findall(caption)
    else:
        tokens = _every_script().findall(unicodedata.normalize("NFC", caption).translate(_ODD))
        tokens = [_CURLY.sub("'", token) if _CLITIC.fullmatch(token) else token for token in tokens]
    words = []
    for token in tokens:
        if token in _PUNCTUATION or token.strip(".") == "" or token.strip("-") == "":
            continue
        words.append(token.lower() if token[0].isalnum() else _BRACKET.sub(lambda b: _BRACKETS[b[0]], token.lower()))
    return words


def characters_for_scoring(caption: str) -> list[str]:
    """``words_for_scoring``, cut into characters (marks with their letters) where they are not plain ASCII, punctuation
    left out; as captions in Chinese, Japanese and Thai are scored, whose words no space sets apart."""
    found: list[str] = []
    for word in words_for_scoring(caption):
        found += [word] if word.isascii() else [part for part in regex.findall(r"\X", word) if part[0].isalnum()]
    return found


CUTS: dict[str, Callable[[str], list[str]]] = {TOKENIZER: words_for_scoring, CHARACTERS: characters_for_scoring}


def tokenizer_for(references: Iterable[str]) -> str:
    """What of ``CUTS`` captions are scored by: characters where the references are in scripts that set no spaces."""
    return CHARACTERS if is_spaceless(references) else TOKENIZER
