"""Settings as dataclass fields. A field says a setting's type, default, bounds and meaning, and values from YAML are
checked against it; errors, help texts and the reference are made of what it says. Which settings there are: config.py.
"""

import difflib
import io
import reprlib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shards.errors import InputError, brief

MOST_BYTES = 1_000_000  # of a config file
DEEPEST = 20  # sections in sections
LARGEST = 10**15 - 1  # no number is larger: beyond it they overflow in one library or another
_WANTED: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
# What PyYAML and OmegaConf raise of a file that is none of theirs: `!!int ""` alone is an IndexError.
_UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, TypeError, AttributeError)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 2


@dataclass(frozen=True)
class Setting:
    """All that is said of one setting."""

    key: str  # dotted, as in data.num_workers
    type: type  # bool, int, float or str
    nullable: bool
    default: Any
    meaning: str
    identity: bool
    required: bool
    choices: tuple[str, ...]
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None

    @property
    def bounds(self) -> str:
        limits = {name: getattr(self, name) for name in ("at_least", "above", "at_most", "below")}
        return " and ".join(f"{name.replace('_', ' ')} {x:,}" for name, x in limits.items() if x is not None)

    @property
    def values(self) -> str:
        """What it may be, in words."""
        kind = ", ".join(self.choices) or _WANTED[self.type].removeprefix("a ")
        return kind + (f", {self.bounds}" if self.bounds else "") + (", or null" if self.nullable else "")

    def problem(self, value: Any, renamed: Mapping[str, str]) -> str | None:
        """Why it cannot have this value; None when it can."""
        if value is None and self.nullable:
            return None
        if self.choices:
            if isinstance(value, str) and value in self.choices:
                return None
            now = renamed.get(value) if isinstance(value, str) else None
            return f"{shown(value)} is not one of {', '.join(self.choices)}" + (f"; it is {now} now" if now else "")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = isinstance(value, self.type) and (self.type is bool or not isinstance(value, bool))
        if not (number if self.type is float else fits):
            return f"{_WANTED[self.type]} is wanted, not {shown(value)}"
        if number and not abs(value) <= LARGEST:
            return f"a finite number, of at most 15 digits, is wanted, not {shown(value)}"
        if self.required and not value:
            return "must be given"
        return f"{value} must be {self.bounds}" if number and not self._within(value) else None

    def _within(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def setting(
    default: Any,
    meaning: str,
    *,
    identity: bool = False,
    required: bool = False,
    choices: Iterable[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """The dataclass field of one setting, annotated ``bool``, ``int``, ``float``, ``str`` or a Literal of texts, each
    also ``| None``.

    ``identity``: a resumed run may not change it. ``required``: not empty. ``choices``: the texts it may be, from a
    table of names. The others are bounds of a number.
    """
    said = {"meaning": meaning, "identity": identity, "required": required, "choices": tuple(choices)}
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(default=default, metadata={**said, **bounds})


@cache
def settings_of(kind: Any) -> dict[str, Setting]:
    """Dotted key -> setting, of a dataclass of settings and of sections, which are dataclasses too."""
    settings, hints = {}, get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            for key, inner in settings_of(hints[item.name]).items():
                settings[f"{item.name}.{key}"] = replace(inner, key=f"{item.name}.{key}")
        else:
            settings[item.name] = _setting(item.name, hints[item.name], item.default, dict(item.metadata))
    return settings


def _setting(key: str, hint: Any, default: Any, said: dict[str, Any]) -> Setting:
    arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    (arm,) = (arm for arm in arms if arm is not type(None))
    if get_origin(arm) is Literal:
        said["choices"], arm = get_args(arm), str
    return Setting(key, arm, type(None) in arms, default, **said)


def build(kind: Any, values: Any, renamed: Mapping[str, str]) -> tuple[Any, list[str]]:
    """A dataclass of settings from nested dictionaries, and every mistake in them, "key: what is wrong"; the settings
    they are in have their defaults. ``renamed`` tells of old keys and choices what they are called now."""
    mistakes: list[str] = []
    known = settings_of(kind)
    built = _section(kind, values, "", known, renamed, mistakes)
    told = {mistake.split(":")[0] for mistake in mistakes}
    required = (key for key, one in known.items() if one.required and key not in told)
    return built, mistakes + [f"{key}: must be given" for key in required if not _value(built, key)]


def _section(
    kind: Any, values: Any, prefix: str, known: dict[str, Setting], renamed: Mapping[str, str], mistakes: list[str]
) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        whole = prefix.rstrip(".") or "the file"
        mistakes.append(f"{whole}: a section of key: value lines is wanted, not {shown(values)}")
        return kind()
    hints, built = get_type_hints(kind), {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            mistakes.append(f"{brief(key, 80)}: unknown key{_instead(key, kind, known, renamed)}")
        elif is_dataclass(hints[name]):
            built[name] = _section(hints[name], value, f"{key}.", known, renamed, mistakes)
        else:
            if value is False and "no" in known[key].choices:
                value = "no"  # which YAML reads as false
            if problem := known[key].problem(value, renamed):
                mistakes.append(f"{key}: {problem}")
            else:
                built[name] = float(value) if known[key].type is float and value is not None else value
    return kind(**built)


def _value(built: Any, key: str) -> Any:
    for name in key.split("."):
        built = getattr(built, name)
    return built


def _instead(key: str, kind: Any, known: dict[str, Setting], renamed: Mapping[str, str]) -> str:
    """The right key: its new name, the closest spelling, else the same name in another section."""
    if key in renamed:
        return f"; it is {renamed[key]} now"
    every = {**known, **{item.name: None for item in fields(kind)}}
    key = key[:200]
    close = difflib.get_close_matches(key, every, n=1, cutoff=0.75)
    name = key.rsplit(".", 1)[-1]
    close = close or [k for k in every if k.rsplit(".", 1)[-1] == name]
    close = close or difflib.get_close_matches(name, [k.rsplit(".", 1)[-1] for k in every], n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any) -> str:
    """A value for a message: cut, however long or deep it is."""
    try:
        return _short.repr(value)
    except ValueError:  # of Python, which writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def read_text(path: Path) -> str:
    """The text of a config file.

    Raises:
        InputError: when there is none, or it is no text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        return data.decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"There is no config file {brief(path)}. The shipped ones are in configs/.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{brief(path)} cannot be read as YAML: {brief(error)}") from error


def merged(text: str, overrides: list[str], where: str, resolve: bool) -> dict[str, Any]:
    """Nested dictionaries from YAML and ``key.name=value`` overrides. With ``resolve`` OmegaConf's ``${...}`` in it is
    replaced: other keys, and with ``oc.env`` the environment's secrets. Without, ``text`` may come from anywhere.

    Raises:
        InputError: when it is no YAML of key: value lines.
    """
    try:
        _check_depth(text)
        changes = OmegaConf.from_dotlist(overrides)
        if resolve:
            loaded = OmegaConf.load(io.StringIO(text))
            if not isinstance(loaded, DictConfig):
                raise ValueError("it holds a list; lines of key: value are wanted")
            return _plain(OmegaConf.merge(loaded, changes))
        values = yaml.safe_load(text) or {}
        if not isinstance(values, dict):
            raise ValueError(f"it holds {shown(values)}; lines of key: value are wanted")
        for name, change in _plain(changes).items():
            before = values.get(name)
            if isinstance(change, dict) and isinstance(before, dict):
                change = {**before, **change}
            values[name] = change
        return values
    except (*_UNREADABLE, OSError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as YAML: {brief(error)}") from error


def _check_depth(text: str) -> None:
    """Refuse nesting that would overflow the C stack of PyYAML's loader, which kills the process."""
    depth = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"its brackets are nested more than {DEEPEST} deep")


def _plain(values: Any) -> dict[str, Any]:
    container: Any = OmegaConf.to_container(values, resolve=True)
    return container
