"""The pointing game: does attention peak on the thing that its word names?

After Zhang et al., "Top-down Neural Attention by Excitation Backprop" (https://arxiv.org/abs/1608.00507). An attention
map is drawn from a model that may not look there at all: what its peaks hit says whether the picture can be believed.

Why it can mislead, from drawn scenes (configs/demo.yaml, resnet18, 300 steps of 32 scenes on a CPU, 200 new scenes):

- Each place of a 2 x 2 grid sees all of the picture (its receptive field has 435 pixels, the image 64): any place
  answers as well as another, and its peaks hit the shape's quadrant no more often than chance (24 %).
- Begun from the mean feature, the LSTM knows the answer before it looks. On a grid of 8 x 8 its peaks hit 59 % of the
  boxes, chance 37 %; begun from zero (``decoder.initial_state=zero``) 92 %, and more of its captions were right.
  The demo as it is (752 steps, 600 scenes): 99 %.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from captioning.inference.predictor import Caption
from shards.errors import InputError
from shards.files import write_atomically

Box = tuple[float, float, float, float]  # left, top, right, bottom: fractions of the square that the model saw
BELIEVABLE = 0.7  # share of peaks that hit, below which no attention is drawn
_FILE = "pointing.json"  # in the run folder


@dataclass(frozen=True)
class Pointing:
    """``hits`` of ``words`` attention peaks lie in the box of what the word names; ``chance`` is the share that places
    drawn at random would hit."""

    hits: int
    words: int
    chance: float
    rows: int
    columns: int

    @property
    def share(self) -> float:
        return self.hits / max(1, self.words)

    @property
    def is_believable(self) -> bool:
        return self.share >= BELIEVABLE

    def __str__(self) -> str:
        return (
            f"attention peaks in the box of the thing named for {self.share:.1%} of {self.words:,} words "
            f"(by chance {self.chance:.1%}; a grid of {self.rows} x {self.columns})"
        )

    def save(self, run: Path) -> None:
        """Keep it in a run folder, where the run's report finds it."""
        write_atomically(run / _FILE, json.dumps(asdict(self)).encode())


def load(run: Path) -> Pointing | None:
    """What ``save`` kept there; None where nothing was measured.

    Raises:
        InputError: when the file holds something else.
    """
    path = run / _FILE
    if not path.exists():
        return None
    try:
        return Pointing(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not what `captioning demo` writes. Delete it.") from error


def peak(weights: Tensor) -> tuple[float, float]:
    """The middle of the place of the greatest weight: x, y as fractions of the square; weights [rows, columns]."""
    rows, columns = weights.shape
    row, column = divmod(int(weights.argmax()), columns)
    return (column + 0.5) / columns, (row + 0.5) / rows


def pointing(captions: Iterable[Caption], boxes: Iterable[Mapping[str, Box]]) -> Pointing:
    """The game over all words of ``captions`` that have a box in their image: ``boxes`` has an entry an image, of word
    -> where it is.

    Raises:
        ValueError: when no caption has attention and a word with a box.
    """
    hits, areas, shape = 0, [], (0, 0)
    for caption, known in zip(captions, boxes, strict=True):
        if caption.attention is None:
            continue
        for word, weights in zip(caption.words, caption.attention, strict=True):
            if word not in known:
                continue
            (x, y), (left, top, right, bottom) = peak(weights), known[word]
            hits += left <= x <= right and top <= y <= bottom
            areas.append((right - left) * (bottom - top))
            shape = weights.shape[0], weights.shape[1]
    if not areas:
        raise ValueError("no word of these captions has both attention and a box")
    return Pointing(hits, len(areas), sum(areas) / len(areas), *shape)
