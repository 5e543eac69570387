"""Pictures of what a model says."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image

matplotlib.use("Agg")  # no display is needed, and none is looked for

from matplotlib import pyplot


def caption_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], right: Sequence[bool | None], path: Path, title: str
) -> None:
    """Images in rows of four with their captions below; green for right, red for wrong, black where nobody judged."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.1 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, caption, judged in zip(axes.flat, images, captions, right, strict=False):
        axis.imshow(image)
        colour = {None: "#222222", True: "#1a7f37", False: "#c62828"}[judged]
        axis.set_title("\n".join(textwrap.wrap(caption, 32)), y=-0.04, va="top", fontsize=10, color=colour)
    figure.suptitle(title, fontsize=13)
    figure.tight_layout(h_pad=3.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
