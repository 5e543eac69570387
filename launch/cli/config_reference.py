"""Every setting in words, for ``train --help`` and for configs/REFERENCE.md, which this writes again:
python -m launch.cli.config_reference > configs/REFERENCE.md
"""

import sys
import textwrap

from captioning.config import SETTINGS, Config

_MARKDOWN = """# Settings

Written by `python -m launch.cli.config_reference > configs/REFERENCE.md` from `captioning/config/sections.py`.
A config file holds what differs from these defaults; `key=value` behind it on the command line goes before both.
What is marked *fixed* belongs to the run: one that is resumed must keep it.
"""


def help_text() -> str:
    """Each key with its default; below it what it means and what it may be."""
    return "\n".join(
        f"  {key}={_yaml(one.default)}\n"
        + textwrap.fill(f"{one.meaning} ({one.values})", 80, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for key, one in SETTINGS.items()
    )


def markdown() -> str:
    """A table for each section."""
    lines: list[str] = [_MARKDOWN]
    section = None
    for key, one in SETTINGS.items():
        name = key.rpartition(".")[0]
        if name != section:
            section, about = name, type(getattr(Config(), name)).__doc__ if name else Config.__doc__
            lines.append(f"\n## {name or 'run'}\n\n{about}\n")
            lines += ["| key | default | values | meaning | |", "|---" * 5 + "|"]
        fixed = "*fixed*" if one.identity else "*required*" if one.required else ""
        meaning = one.meaning.replace("<", "\\<")
        lines.append(f"| `{key}` | {_code(one.default)} | {one.values} | {meaning} | {fixed} |")
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _code(value: object) -> str:
    return f"`{_yaml(value)}`" if _yaml(value) else ""


if __name__ == "__main__":
    sys.stdout.write(markdown())
