"""The embedded dataset: drawn scenes whose captions are exact, so that a caption can be checked word by word.

A scene is one or two coloured shapes on a light or dark background, with five captions that name the same objects in
different words. Written in COCO's own layout (a folder of images and one captions json for each split), it is packed
by the very code that packs COCO, and needs no download. Every scene is a pure function of (seed, split, number).
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 128  # pixels, width and height
OVERSAMPLING = 3  # shapes are drawn this much larger, then reduced: smooth edges

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 208, 30),
    "green": (56, 160, 70),
    "blue": (38, 90, 210),
    "purple": (125, 50, 165),
    "pink": (247, 130, 185),
    "brown": (120, 72, 36),
}
BACKGROUNDS = {"light": ((250, 248, 242), (214, 222, 232)), "dark": ((44, 48, 62), (16, 18, 26))}
Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """One drawn object: ``x`` and ``y`` are fractions of the picture's width and height, ``radius`` of its shorter
    side; ``angle`` is in radians."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        """With its article: "a red heart", "an orange moon"."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is drawn; ``aspect`` is the picture's width by its height, its shorter side always SIZE pixels."""

    things: tuple[Thing, ...]
    background: str
    aspect: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return round(SIZE * max(1.0, self.aspect)), round(SIZE * max(1.0, 1 / self.aspect))


def _regular(corners: int, inner: float = 1.0, start: float = -math.pi / 2) -> list[Point]:
    """Corners on the unit circle; with ``inner`` < 1 a star, its inner corners at that radius."""
    count = corners if inner == 1.0 else 2 * corners
    radii = [1.0 if i % 2 == 0 else inner for i in range(count)] if inner != 1.0 else [1.0] * count
    angles = [start + 2 * math.pi * i / count for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _circle(radius: float = 1.0, x: float = 0.0) -> list[Point]:
    return [(x + radius * px, radius * py) for px, py in _regular(48)]


def _heart() -> list[Point]:
    turns = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


def _cross() -> list[Point]:
    a, b = 0.34, 0.98
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


def _moon() -> list[Point]:
    """A crescent: the left arc of the unit circle and back along a smaller circle's left arc."""
    outer = [math.pi * (0.30 + 1.40 * i / 40) for i in range(41)]
    tip = (math.cos(outer[0]), math.sin(outer[0]))
    centre = 0.55
    radius, half = math.hypot(tip[0] - centre, tip[1]), math.atan2(tip[1], tip[0] - centre)
    inner = [2 * math.pi - half - (2 * math.pi - 2 * half) * i / 40 for i in range(41)]
    return [(math.cos(a), math.sin(a)) for a in outer] + [
        (centre + radius * math.cos(a), radius * math.sin(a)) for a in inner
    ]


# Outline, and for the ring the gap in it, on a unit circle around the origin; y points down, as in the image.
SHAPES: dict[str, tuple[Callable[[], list[Point]], float]] = {
    "circle": (_circle, 0.0),
    "square": (lambda: [(1.1 * x, 1.1 * y) for x, y in _regular(4, start=-math.pi / 4)], 0.0),
    "triangle": (lambda: _regular(3), 0.0),
    "star": (lambda: _regular(5, inner=0.42), 0.0),
    "heart": (_heart, 0.0),
    "cross": (_cross, 0.0),
    "ring": (_circle, 0.55),
    "moon": (_moon, 0.0),
}


def scene(seed: int, split: str, number: int) -> Scene:
    """The ``number``-th scene of ``split``: the same arguments give the same scene, for ever."""
    rng = random.Random(f"{seed}/{split}/{number}")
    background = rng.choice(sorted(BACKGROUNDS))
    if rng.random() < 0.8:
        radius = rng.choice((rng.uniform(0.24, 0.28), rng.uniform(0.37, 0.43)))
        spots = [(rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius), radius)]
    else:
        # Two things are drawn in opposite halves, so that "above" and "to the left of" are never in doubt.
        sides = ((0.26, rng.uniform(0.3, 0.7)), (0.74, rng.uniform(0.3, 0.7)))
        upright = rng.random() < 0.5
        spots = [(*(pos[::-1] if upright else pos), rng.uniform(0.22, 0.25)) for pos in sides]
    names = rng.sample([(c, s) for c in sorted(COLOURS) for s in sorted(SHAPES)], len(spots))
    things = tuple(
        Thing(colour, shape, x, y, radius, rng.uniform(-0.25, 0.25))
        for (colour, shape), (x, y, radius) in zip(names, spots, strict=True)
    )
    return Scene(things, background)


def captions(drawn: Scene) -> list[str]:
    """Five captions of a scene; each names every thing with its colour, none says what is not there."""
    on = f"on a {drawn.background} background"
    first = drawn.things[0]
    if len(drawn.things) == 1:
        size = "large" if first.radius > 0.32 else "small"
        height = "top" if first.y < 0.4 else "bottom" if first.y > 0.6 else "middle"
        return [
            f"A {size} {first.colour} {first.shape} {on}.",
            f"{_capital(first.name)} at the {height} of the picture.",
            f"The picture shows a {size} {first.colour} {first.shape}.",
            f"There is {first.name} {on}.",
            f"A {size} {first.colour} {first.shape} at the {height}.",
        ]
    second = drawn.things[1]
    sideways = abs(first.x - second.x) > abs(first.y - second.y)
    there, back = ("to the left of", "to the right of") if sideways else ("above", "below")
    return [
        f"{_capital(first.name)} {there} {second.name}.",
        f"{_capital(second.name)} {back} {first.name}.",
        f"There is {first.name} {there} {second.name}.",
        f"{_capital(first.name)} {there} {second.name} {on}.",
        f"The picture shows {first.name} {there} {second.name}.",
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def things_named(caption: str) -> frozenset[tuple[str, str]]:
    """The (colour, shape) pairs a caption names: what makes a caption of a scene right or wrong."""
    words = caption.lower().replace(".", " ").split()
    return frozenset((a, b) for a, b in pairwise(words) if a in COLOURS and b in SHAPES)


def is_right(caption: str, drawn: Scene) -> bool:
    """Whether a caption names every thing of a scene with its colour, and nothing else."""
    return things_named(caption) == {(thing.colour, thing.shape) for thing in drawn.things}


def box(thing: Thing, drawn: Scene) -> tuple[float, float, float, float]:
    """The smallest upright rectangle around one object of a scene: left, top, right, bottom, as fractions of the
    picture's width and height."""
    outline, _ = SHAPES[thing.shape]
    (width, height), points = drawn.size, _placed(outline(), thing, drawn)
    xs, ys = zip(*((x / width, y / height) for x, y in points), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def draw(drawn: Scene) -> Image.Image:
    """The picture of a scene, RGB, its shorter side SIZE pixels."""
    size = (drawn.size[0] * OVERSAMPLING, drawn.size[1] * OVERSAMPLING)
    top, bottom = BACKGROUNDS[drawn.background]
    gradient = Image.linear_gradient("L").resize(size)
    image = Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), gradient)
    background, pencil = image.copy(), ImageDraw.Draw(image)
    for thing in drawn.things:
        outline, hole = SHAPES[thing.shape]
        pencil.polygon(_placed(outline(), thing, drawn, OVERSAMPLING), fill=COLOURS[thing.colour])
        if hole:
            inside = _placed([(hole * x, hole * y) for x, y in outline()], thing, drawn, OVERSAMPLING)
            pencil.polygon(inside, fill=background.getpixel((0, int(thing.y * size[1]))))
    return image.resize(drawn.size, Image.Resampling.LANCZOS)


def _placed(outline: list[Point], thing: Thing, drawn: Scene, times: int = 1) -> list[Point]:
    """An outline turned, scaled and moved to its thing's place, in pixels of a picture ``times`` as large."""
    cos, sin, scale = math.cos(thing.angle), math.sin(thing.angle), thing.radius * SIZE * times
    x0, y0 = thing.x * drawn.size[0] * times, thing.y * drawn.size[1] * times
    return [(x0 + scale * (x * cos - y * sin), y0 + scale * (x * sin + y * cos)) for x, y in outline]


def write(
    folder: Path,
    split: str,
    count: int,
    seed: int,
    scene: Callable[[int, str, int], Scene] = scene,
    captions: Callable[[Scene], list[str]] = captions,
) -> tuple[Path, Path]:
    """Draw ``count`` scenes of a split in COCO's layout; returns its image folder and its captions json."""
    images = folder / split
    images.mkdir(parents=True)
    document: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for number in range(count):
        drawn, name = scene(seed, split, number), f"{split}-{number:06d}.png"
        draw(drawn).save(images / name)
        document["images"].append({"id": number, "file_name": name, "width": drawn.size[0], "height": drawn.size[1]})
        for caption in captions(drawn):
            annotation = {"id": len(document["annotations"]), "image_id": number, "caption": caption}
            document["annotations"].append(annotation)
    annotations = folder / f"captions_{split}.json"
    annotations.write_text(json.dumps(document), encoding="utf-8")
    return images, annotations
