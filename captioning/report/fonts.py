"""Fonts that have the letters of a text, out of those installed; a message where none has, never empty boxes."""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.font_manager import FontEntry
from matplotlib.ft2font import FT2Font

from shards.scripts import scripts_of

DEFAULT = "DejaVu Sans"  # comes with matplotlib; has Latin, Greek, Cyrillic, Arabic, Hebrew, Georgian, Armenian
# Tried first, where installed: made for reading, and one look for all scripts.
_PREFERRED = ("Noto Sans", "Source Han Sans", "WenQuanYi", "Arial Unicode MS")
_NOT_FOR_TEXT = ("Last Resort", "Emoji", "STIX", "cm", "Display", "Mono")
_log = logging.getLogger(__name__)


def readable(text: str) -> tuple[str, list[str]]:
    """What can be drawn of a text, and the font families that have it, for matplotlib's ``fontfamily``.

    Signs that no font has are left out; where letters are missing, a message stands for the text.
    """
    lacking, families = _lacking(text, DEFAULT), [DEFAULT]
    for entry in _others() if lacking else ():
        if lacking & _glyphs(entry.fname):
            families.append(entry.name)
            lacking -= _glyphs(entry.fname)
        if not lacking:
            break
    return _without(text, lacking), families


def font_file(text: str) -> tuple[str, str]:
    """What one font file can draw of a text, and its path: for Pillow, which takes one font at a time."""
    best = _entry(DEFAULT)
    lacking = _lacking(text, DEFAULT)
    for entry in _others() if lacking else ():
        left = _drawn(text) - _glyphs(entry.fname)
        if _letters(left) < _letters(lacking) or (_letters(left) == _letters(lacking) and len(left) < len(lacking)):
            best, lacking = entry, left
        if not lacking:
            break
    return _without(text, lacking), best.fname


def _drawn(text: str) -> set[int]:
    """Characters that leave ink: joiners and spaces need no glyph."""
    return {ord(character) for character in text if character.isprintable() and not character.isspace()}


def _lacking(text: str, family: str) -> set[int]:
    return set() if text.isascii() else _drawn(text) - _glyphs(_entry(family).fname)


def _letters(codes: set[int]) -> int:
    return sum(chr(code).isalpha() for code in codes)


def _without(text: str, lacking: set[int]) -> str:
    if not _letters(lacking):
        return "".join(character for character in text if ord(character) not in lacking) if lacking else text
    script = next(iter(scripts_of(chr(code) for code in lacking)))
    _warn(script)
    return f"(no font for {script} here)"


@cache  # once for a script, not for each picture
def _warn(script: str) -> None:
    _log.warning(
        "No installed font has %s: pictures show a message instead; pages leave it to the browser. Install one, as "
        "Noto (Debian: fonts-noto-core, fonts-noto-cjk).",
        script,
    )


@cache
def _entry(family: str) -> FontEntry:
    path = Path(font_manager.findfont(family)).name
    return next(entry for entry in font_manager.fontManager.ttflist if Path(entry.fname).name == path)


@cache
def _others() -> Sequence[FontEntry]:
    """Upright fonts for text besides the default, the preferred first."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:  # installed after matplotlib made its list
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError, ValueError):  # a format it cannot draw
                continue
    upright = {
        entry.name: entry
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal" and entry.weight in (400, "normal", "regular")
        if not any(word in entry.name for word in _NOT_FOR_TEXT)
    }

    def rank(name: str) -> tuple[int, str]:
        return next((i for i, start in enumerate(_PREFERRED) if name.startswith(start)), len(_PREFERRED)), name

    return [upright[name] for name in sorted(upright, key=rank) if name != DEFAULT]


@cache
def _glyphs(path: str) -> frozenset[int]:
    """Code points that a font file has."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
