"""Captions in the forms people store them: texts, lists of texts or of objects, lists written as text."""

import ast
import io
import tokenize
from collections.abc import Mapping
from typing import Any

from shards.files import parse_json

# Fields of a json or columns of a table that hold captions; an earlier one is taken before a later one.
CAPTION_FIELDS = (
    *("captions", "caption", "sentences", "text", "texts", "comment", "sentence", "raw", "alt", "alt_text"),
    *("description", "title"),
)


def captions_in(value: Any) -> list[str]:
    """The captions a value holds, as they were written: a text, a list of texts or of objects with a caption field.

    What is neither (a table's missing caption is a number, NaN) holds none.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [caption for entry in value for caption in captions_in(entry)]
    if isinstance(value, Mapping):
        field = caption_field(value)
        return [] if field is None else captions_in(value[field])
    return []


def caption_field(about: Mapping[str, Any]) -> str | None:
    """The field of an object that holds its captions: the first of CAPTION_FIELDS, in any case, that has some."""
    by_name = {str(field).lower(): field for field in about}
    known = (by_name[name] for name in CAPTION_FIELDS if name in by_name)
    return next((field for field in known if any(map(str.strip, captions_in(about[field])))), None)


def captions_in_cell(cell: str) -> list[str]:
    """The captions in a table's cell: several where it is a list as JSON, Python or NumPy writes it."""
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return [cell]
    try:
        return captions_in(parse_json(text))
    except (ValueError, RecursionError):
        found = _python_list(text)
        return [cell] if found is None else found


def _python_list(text: str) -> list[str] | None:
    """The texts of ``['a', "b"]`` or, as NumPy prints an array, ``['a' 'b']``; None when it is no such list."""
    found: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.STRING:
                found.append(ast.literal_eval(token.string))
            elif token.string not in ("[", ",", "]", "", "\n", "None"):
                return None
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    return found if all(isinstance(caption, str) for caption in found) else None
