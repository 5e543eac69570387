"""What a kind of dataset is to `pack`: its arguments, and how they become records. The seam for adding one."""

import argparse
from pathlib import Path
from typing import Protocol

from shards.sources.records import Source


class Kind(Protocol):
    """A kind of dataset that ``pack NAME`` reads. Adding one is a file beside this and a line in KINDS."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its subcommand; the first is shown, the others stay for scripts."""

    @property
    def help(self) -> str:
        """Its line in ``pack --help``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what tells where the dataset is. What all kinds share (--out, --split ...) is added by the command."""

    def read(self, arguments: argparse.Namespace, scratch: Path) -> dict[str, Source]:
        """The dataset's splits by name, or its one split under WHOLE, which the user then names or has divided.

        Args:
            scratch: an empty folder that is there until everything is packed, for images that lie in no file yet.

        Raises:
            InputError: when the dataset is not what it should be.
        """


def add_images(parser: argparse.ArgumentParser) -> None:
    """The argument that most kinds have."""
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="DIR|ZIP", help="folder(s) or zip(s) of the images"
    )
