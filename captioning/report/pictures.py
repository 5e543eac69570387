"""Pictures of what a model says, as image files."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import regex
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")  # no display is needed, and none is looked for

from matplotlib import pyplot
from matplotlib.figure import Figure

from captioning.inference.predictor import Caption
from captioning.report.fonts import font_file, readable

_LONGEST_SIDE, _SHORTEST_SIDE = 1600, 240  # pixels of an annotated image
# A caption's dollar signs are no formula's: ``parse_math=False`` wherever matplotlib writes what others wrote.
GREY, _SHADE = 0.5, 0.85  # what covers places the model did not look at, and how much of it at most


def caption_figure(
    images: Sequence[Image.Image], captions: Sequence[str], right: Sequence[bool | None], title: str
) -> Figure:
    """Images in rows of four with their captions below; green for right, red for wrong, black where unknown."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.1 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, caption, verdict in zip(axes.flat, images, captions, right, strict=False):
        axis.imshow(image)
        colour = {None: "#222222", True: "#1a7f37", False: "#c62828"}[verdict]
        text, families = readable(caption)
        axis.set_title(
            "\n".join(_wrapped(text, _columns, 32)),
            y=-0.04,
            va="top",
            fontsize=10,
            fontfamily=families,
            color=colour,
            parse_math=False,
        )
    title, families = readable(title)
    figure.suptitle(title, fontsize=13, fontfamily=families, parse_math=False)
    figure.tight_layout(h_pad=3.0)
    return figure


def caption_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], right: Sequence[bool | None], path: Path, title: str
) -> None:
    """``caption_figure`` as an image file."""
    _save(caption_figure(images, captions, right, title), path)


def annotated(image: Image.Image, caption: str) -> Image.Image:
    """The image, at most 1,600 pixels long, with its caption on a band below; a small one is doubled until its
    longer side has 240."""
    image = image.copy()
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    while max(image.size) < _SHORTEST_SIDE:
        image = image.resize((2 * image.width, 2 * image.height))
    width = max(_SHORTEST_SIDE, image.width)
    size = max(13, width // 32)
    caption, path = font_file(caption)
    font, margin, line = ImageFont.truetype(path, size), size * 3 // 4, size * 4 // 3
    lines = _wrapped(caption, font.getlength, width - 2 * margin)
    sheet = Image.new("RGB", (width, image.height + 2 * margin + line * len(lines)), "white")
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(lines):
        draw.text((margin, image.height + margin + number * line), text, fill="#111111", font=font)
    return sheet


def _wrapped(text: str, length: Callable[[str], float], width: int) -> list[str]:
    """Lines that are no longer than ``width``, a word at least in each; a longer word is cut."""
    lines: list[str] = []
    for word in (part for long in text.split() for part in _fitting(long, length, width)):
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _fitting(word: str, length: Callable[[str], float], width: int) -> list[str]:
    """A word, or its parts that are no longer than ``width``: some languages set no spaces to break at."""
    parts = [""]
    for character in regex.findall(r"\X", word):
        if parts[-1] and length(parts[-1] + character) > width:
            parts.append("")
        parts[-1] += character
    return parts


def _columns(text: str) -> int:
    """How many Latin letters' places a text takes: a Chinese character's two, a mark's none."""
    marks = sum(unicodedata.category(character)[0] == "M" for character in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def shade(attention: np.ndarray, size: int) -> np.ndarray:
    """How much of each pixel of a square image is covered: float [size, size], 0 where the model looked most.

    ``attention`` [rows, columns], any scale; between the middles of its places it is interpolated.
    """
    strength = Image.fromarray((attention / max(float(attention.max()), 1e-12)).astype(np.float32))
    smooth = np.asarray(strength.resize((size, size), Image.Resampling.BICUBIC))
    return _SHADE * (1 - smooth.clip(0, 1))


def attention_sheet(images: Sequence[Image.Image], captions: Sequence[Caption], path: Path, title: str = "") -> None:
    """A row an image: the image as the model saw it, then for each word what it looked at, the rest greyed.
    ``title`` says what is known of how far that can be believed."""
    longest = max(len(caption.words) for caption in captions)
    figure, axes = pyplot.subplots(
        len(images), longest + 1, figsize=(1.5 * (longest + 1), 1.8 * len(images)), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, image, caption in zip(axes, images, captions, strict=True):
        seen = np.asarray(image, dtype=np.float32) / 255
        row[0].imshow(seen)
        if caption.attention is None:
            continue
        for axis, word, weights in zip(row[1:], caption.words, caption.attention.numpy(), strict=False):
            cover = shade(weights, seen.shape[0])[:, :, None]
            axis.imshow(seen * (1 - cover) + GREY * cover)
            text, families = readable(word)
            axis.set_title(text, fontsize=10, fontfamily=families, parse_math=False)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    _save(figure, path)


def curve(series: dict[str, list[tuple[int, float]]], path: Path, title: str, label: str) -> None:
    """Lines over steps: name -> (step, value)."""
    figure, axis = pyplot.subplots(figsize=(7.2, 4.2))
    for name, points in series.items():
        axis.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 12 else None, markersize=4)
    axis.set(xlabel="optimizer step", ylabel=label)
    axis.set_title(title, parse_math=False)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axis.legend(frameon=False)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
