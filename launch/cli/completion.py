"""Shell completion, made from the commands' own parsers: their names, subcommands and options; else file names."""

import argparse
from collections.abc import Mapping

SHELLS = ("bash", "zsh", "fish")

_BASH = """_captioning() {
    local words
    case "$COMP_CWORD,${COMP_WORDS[1]}" in
        1,*) words="%(commands)s --help --version --quiet --completion" ;;
%(cases)s
    esac
    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _captioning captioning"""


def completion(shell: str, commands: Mapping[str, str], parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """A script for the shell to evaluate. ``commands``: what each is for; ``parsers``: its arguments."""
    if shell == "fish":
        return "\n".join(
            [f"complete -c captioning -n __fish_use_subcommand -a {n} -d '{what}'" for n, what in commands.items()]
            + [line for name, parser in parsers.items() for line in _fish(name, parser)]
        )
    cases = "\n".join(f'        *,{name}) words="{" ".join(_words(parser))}" ;;' for name, parser in parsers.items())
    script = _BASH % {"commands": " ".join(commands), "cases": cases}
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def _fish(name: str, parser: argparse.ArgumentParser) -> list[str]:
    seen = f"complete -c captioning -n '__fish_seen_subcommand_from {name}'"
    words = _words(parser)
    options = [word.removeprefix("--") for word in words if word.startswith("--")]
    return [f"{seen} -a {word}" for word in words if not word.startswith("-")] + [f"{seen} -l {o}" for o in options]


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """The subcommands and long options that a parser takes, those of its subcommands too."""
    words: dict[str, None] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                words |= dict.fromkeys([name, *_words(below)])
        words |= dict.fromkeys(option for option in action.option_strings if option.startswith("--"))
    return list(words)
