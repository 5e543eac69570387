"""Words for scoring, as Stanford's PTBTokenizer and the COCO evaluation's list of punctuation leave them; no Java.

The rules follow the behaviour of the tokenizer that pycocoevalcap runs (CoreNLP 3.4.1, ``-preserveLines -lowerCase``,
https://nlp.stanford.edu/software/tokenizer.html), found by asking it. tests/test_ptb.py measures the agreement.
"""

import html
import re

TOKENIZER = "PTB rules in Python"

# What pycocoevalcap removes. Its list names the brackets as -LRB-, but the tokenizer writes them in lower case: they
# stay in its captions as words, so they stay here.
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BRACKET = re.compile(r"[()\[\]{}]")
_ODD = str.maketrans(
    {
        **dict.fromkeys("\u2018\u201b", "`"), **dict.fromkeys("\u2019\u0092", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'), **dict.fromkeys("\u2013\u2014\u2015", "--"),
        "\u2026": "...", "\u00bd": " 1/2 ", "\u00bc": " 1/4 ", "\u00be": " 3/4 ", "\u00a3": "#", "\u20ac": "$",
        "\u00a2": " cents ", "\u00ad": "", "\u200b": " ",
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


def _any_of(words: str) -> str:
    return "|".join(words.split())


_CAPITALISED = "|".join(f"{word}|{word.upper()}" for word in _STATES.split())
_L = r"[^\W\d_]"  # a letter
_END = rf"(?!{_L})"
_FULL_STOP = r"\.(?![^\W_])"
_TOKEN = re.compile(
    "|".join(
        [
            # Most of all words are nothing but letters; the rest of the rules is tried only on what is not.
            r"(?!(?i:cannot|gonna|gotta|wanna|lemme|gimme)\b)[A-Za-z]{2,}(?=,?\s|$)",
            r"(?:https?://|www\.)\S*[^\s\"'<>.,:;!?)\]]",
            r"[\w.+-]+@\w[\w-]*(?:\.\w+)+",
            rf"[#@]{_L}\w*",
            r"</?[A-Za-z][^<>\s]*>",
            rf"[<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]]{_END}",  # smileys
            # Abbreviations, initials and acronyms with their full stops.
            rf"(?i:{_any_of(_ABBREVIATIONS)}){_FULL_STOP}",
            rf"(?:{_CAPITALISED}){_FULL_STOP}",
            rf"(?i:{_any_of(_NUMBERED)})\.(?=\s*\d)",
            rf"{_L}(?:\.{_L})+{_FULL_STOP}",
            rf"[Pp]h\.[Dd]{_FULL_STOP}",
            rf"{_L}\.(?!{_L})(?!\s+(?:{_any_of(_SENTENCE_STARTS)})\b)",
            # Words joined by hyphens, by a slash or two, by an ampersand.
            r"\w+(?:-[A-Za-z]+){0,2}(?:/\w+(?:-[A-Za-z]+){0,2}){1,2}(?![-'])",
            r"\d+-\d+/\d+",
            r"[^\W_][\w.,]*(?:-[^\W_]+)+",
            r"[A-Z]+(?:&[A-Z]+)+",
            # Contractions: each half is a word.
            rf"{_L}+?(?=[nN]['`][tT]{_END})", rf"[nN]['`][tT]{_END}", rf"'(?i:[sdm]|re|ve|ll){_END}",
            r"(?i:can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b)|lem(?=me\b)|gim(?=me\b)|'t(?=(?:is|was)\b))",
            # Words with an apostrophe of their own.
            rf"'[nN](?:'|{_END})", r"'[2-9]0s\b", r"(?i:'em|'till?|'cause|o'clock|ma'am|ol'|y')(?=\W|all\b|know\b|$)",
            r"(?i:[a-z]*[aeiou]'[aeiou][a-z]*)", rf"[dDoOlL]'{_L}\w*",
            rf"[A-HJ-XZa-hj-xz]'{_L}{{2}}\w*",
            # Numbers, words, and what is left.
            r"[-+]?(?:\d+/\d+(?![\w/])|\d*(?:[.:,]\d+)+|\d+(?!\w))",
            rf"{_L}\w*(?:[.!?]{_L}\w*)*", r"\w+",
            r"\.+|[?!]+|-+|\*+|''|``|[^\s\U00010000-\U0010ffff]",
        ]
    )
)  # fmt: skip


def words_for_scoring(caption: str) -> list[str]:
    """Lower-case Penn Treebank words of a caption, without punctuation."""
    if "&" in caption:
        caption = html.unescape(caption)
    words = []
    for token in _TOKEN.findall(caption.translate(_ODD)):
        if token in _PUNCTUATION or token.strip(".") == "" or token.strip("-") == "" or token == '"':
            continue
        words.append(token.lower() if token[0].isalnum() else _BRACKET.sub(lambda b: _BRACKETS[b[0]], token.lower()))
    return words
