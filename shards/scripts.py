"""What captions are written in, and whether their words are set apart by spaces."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

# Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters.
_SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)
_NAMES = {"CJK": "Chinese characters", "IDEOGRAPHIC": "Chinese characters"}
_WIDTHS = ("FULLWIDTH", "HALFWIDTH")


def scripts_of(texts: Iterable[str]) -> dict[str, float]:
    """Script -> its share of the letters, the largest first: ``{"Latin": 0.98, "Greek": 0.02}``."""
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    counts: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            words = unicodedata.name(character, "OTHER").replace("-", " ").split()
            name = words[1] if words[0] in _WIDTHS and len(words) > 1 else words[0]
            counts[_NAMES.get(name, name.capitalize())] += count
    return {name: count / counts.total() for name, count in counts.most_common()}


def is_spaceless(texts: Iterable[str]) -> bool:
    """Whether most letters are of scripts that set no spaces between words, as Chinese, Japanese and Thai."""
    letters = spaceless = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        if not text.isascii():
            spaceless += sum(map(str.isalpha, _SPACELESS.findall(text)))
    return 2 * spaceless > letters
