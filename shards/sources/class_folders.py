"""Class folders, ``root/class/*.jpg``, as image classification has them; captions from a table or a template."""

import argparse
from pathlib import Path, PurePosixPath

from shards.errors import InputError, listed
from shards.sources.image_files import ImageFiles
from shards.sources.records import WHOLE, Record, Source, source_of
from shards.sources.table import captions_by_image
from shards.tars import is_image

TEMPLATE = "a photo of a {class}"


class Classes:
    """``pack classes``."""

    names = ("classes",)
    help = "class folders: root/class/image.jpg"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--root", type=Path, required=True, metavar="DIR|ZIP", help="folder or zip of class folders"
        )
        texts = parser.add_mutually_exclusive_group()
        texts.add_argument("--captions", type=Path, metavar="CSV", help="captions of class/image.jpg")
        texts.add_argument(
            "--template", default=TEMPLATE, metavar="TEXT", help=f'caption of every image ("{TEMPLATE}")'
        )

    def read(self, arguments: argparse.Namespace, scratch: Path) -> dict[str, Source]:
        return {WHOLE: classes(arguments.root, arguments.captions, arguments.template)}


def classes(root: Path, captions: Path | None = None, template: str = TEMPLATE) -> Source:
    """The images below ``root`` (a folder or a zip), each labelled with the name of its first folder.

    Args:
        captions: a table (see ``table``) that names images as class/name.jpg, or name.jpg where that is unambiguous.
        template: without a table, what every image is captioned; ``{class}`` stands for its class, "_" as a space.

    Raises:
        InputError: when there are no class folders, or captions fit no image.
    """
    if captions is None and "{class}" not in template:
        raise InputError(f"--template {template!r} holds no {{class}}: every image would be captioned alike.")
    every = ImageFiles(root).names()
    names = [name for name in every if "/" in name and is_image(PurePosixPath(name).suffix[1:])]
    if not names:
        raise InputError(f"{root} holds no images in class folders: root/class/image.jpg is wanted.")
    left_out = {"files that are no image of a class": len(every) - len(names)}
    labels = _labels(names)
    texts: dict[str, tuple[str, ...]]
    if captions is None:
        texts = {name: (template.replace("{class}", labels[name].replace("_", " ")),) for name in names}
    else:
        by_image, left_out["captions without text"] = captions_by_image(captions)
        texts = {name: tuple(found) for name, found in _matched(by_image, names, captions).items() if found}
        left_out["images without a caption"] = len(names) - len(texts)
    records = [Record(name, texts[name], name, labels[name]) for name in names if name in texts]
    return source_of(root, records, left_out, captions or root)


def _labels(names: list[str]) -> dict[str, str]:
    """The class of each image: its first folder, or its second where all are in one (as in a zip of the root)."""
    parts = {name: name.split("/") for name in names}
    wrapped = len({first for first, *_ in parts.values()}) == 1 and all(len(path) > 2 for path in parts.values())
    return {name: path[1 if wrapped else 0] for name, path in parts.items()}


def _matched(by_image: dict[str, list[str]], names: list[str], path: Path) -> dict[str, list[str]]:
    by_last: dict[str, list[str]] = {}
    for name in names:
        by_last.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    known = set(names)
    matched: dict[str, list[str]] = {}
    ambiguous = []
    for image, captions in by_image.items():
        fitting = [image] if image in known else by_last.get(image, [])
        if len(fitting) > 1:
            ambiguous.append(f"{image}: {', '.join(fitting)}")
        elif fitting:
            matched.setdefault(fitting[0], []).extend(captions)
    if ambiguous:
        raise InputError(
            f"{path} names images that stand in several classes:\n{listed(ambiguous)}\nName the class too."
        )
    return matched
