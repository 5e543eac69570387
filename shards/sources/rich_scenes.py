"""Drawn scenes for telling systems apart: wide and tall pictures of up to five small shapes, with exact captions.

Each scene asks for one thing that a captioner may fail at: to *count* alike shapes to four, to say where of two shapes
the one is (*relation*), which is the larger (*size*), or where a single one is, up to the very corners (*place*). A
picture is one and a half times as long as it is high, or the other way round: what a square crop of it cannot show
cannot be said. Scenes are pure functions of (seed, split, number), drawn and written as those of scenes.py.
"""

import math
import random
import re
from collections import Counter

from shards.sources import scenes
from shards.sources.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

ASPECTS = ("count", "relation", "size", "place")
LENGTH = 1.5  # longer by shorter side
SMALL, MEDIUM, LARGE = (0.10, 0.12), (0.13, 0.15), (0.20, 0.23)  # radii in shorter sides
_NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
_MARGIN, _APART = 0.02, 0.03  # shorter sides that shapes keep from the edge, and from each other
_MENTION = rf"(an?|two|three|four) (?:(large|small) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:e?s)?\b"
_RELATION = re.compile(rf"{_MENTION} (to the left of|to the right of|above|below|larger than|smaller than) {_MENTION}")
_PLACE = re.compile(r"in the (?:middle|(?:top|bottom) (?:left|right) corner)|at the (?:top|bottom|left|right) edge")


def scene(seed: int, split: str, number: int) -> Scene:
    """The ``number``-th scene of ``split``: the same arguments give the same scene, for ever."""
    rng = random.Random(f"rich/{seed}/{split}/{number}")
    background, aspect = rng.choice(sorted(BACKGROUNDS)), rng.choice((LENGTH, 1 / LENGTH))
    first, second = rng.sample([(colour, shape) for colour in sorted(COLOURS) for shape in sorted(SHAPES)], 2)
    match rng.choice(ASPECTS):
        case "count":
            kinds = [first] * rng.randint(2, 4) + [second] * rng.randint(0, 1)
            return Scene(_scattered(rng, kinds, [SMALL] * len(kinds), aspect), background, aspect)
        case "size":
            radii = rng.sample([SMALL, LARGE], 2)
            return Scene(_scattered(rng, [first, second], radii, aspect), background, aspect)
        case "relation":
            return Scene(_opposite(rng, [first, second], aspect), background, aspect)
        case _:
            (x, y), radius = (
                (rng.choice(((0, 0), (0, 2), (2, 0), (2, 2), (0, 1), (2, 1), (1, 0), (1, 2), (1, 1)))),
                MEDIUM,
            )
            return Scene((_placed(rng, first, x, y, radius, aspect),), background, aspect)


def asked(drawn: Scene) -> str:
    """The one of ASPECTS that a scene asks for."""
    if len(drawn.things) == 1:
        return "place"
    if len({(thing.colour, thing.shape) for thing in drawn.things}) < len(drawn.things):
        return "count"
    radii = [thing.radius for thing in drawn.things]
    return "size" if max(radii) > 1.5 * min(radii) else "relation"


def captions(drawn: Scene) -> list[str]:
    """Five captions of a scene; each names every shape with its colour and says what the scene asks for."""
    aspect, on = asked(drawn), f"on a {drawn.background} background"
    if aspect == "relation":
        return scenes.captions(drawn)
    if aspect == "place":
        name, place = drawn.things[0].name, _place(drawn.things[0])
        said = [
            f"{name} {place}",
            f"{name} {place} {on}",
            f"there is {name} {place}",
            f"the picture shows {name} {place}",
        ]
        said.append(f"{place} is {name}")
    elif aspect == "size":
        small, large = sorted(drawn.things, key=lambda thing: thing.radius)
        a, b = f"a small {small.colour} {small.shape}", f"a large {large.colour} {large.shape}"
        said = [f"{small.name} smaller than {large.name}", f"{large.name} larger than {small.name}"]
        said += [f"{a} and {b}", f"there is {b} and {a}", f"the picture shows {a} and {b} {on}"]
    else:
        groups = Counter((thing.colour, thing.shape) for thing in drawn.things).most_common()
        names = [_counted(kind, count) for kind, count in groups]
        both, turned = " and ".join(names), " and ".join(names[::-1])
        said = [both, f"{both} {on}", f"there are {both}", f"the picture shows {turned}", f"{turned} {on}"]
    return [f"{text[:1].upper()}{text[1:]}." for text in said]


def aspects_right(caption: str, drawn: Scene) -> dict[str, bool]:
    """What a caption gets right: ``things`` (every shape with its colour, no other), and under its name what the scene
    asks for, which has to be said and true; nothing else that is said of it may be wrong."""
    text = caption.lower().replace(".", " ")
    things = Counter((thing.colour, thing.shape) for thing in drawn.things)
    mentions = re.findall(_MENTION, text)
    named = {(colour, shape) for _, _, colour, shape in mentions}
    if named != set(things):
        return {"things": False, asked(drawn): False}
    radius = {(thing.colour, thing.shape): thing.radius for thing in drawn.things}
    is_large = {kind: size > max(MEDIUM) for kind, size in radius.items()}
    counts = all(_NUMBERS[things[c, s]] == number.replace("an", "a") for number, _, c, s in mentions)
    sizes = all((size == "large") == is_large[c, s] for _, size, c, s in mentions if size)
    relations = [_holds(found, drawn) for found in _RELATION.findall(text)]
    places = [place == _place(drawn.things[0]) for place in _PLACE.findall(text)] if len(drawn.things) == 1 else []
    is_said = {
        "count": True,
        "relation": bool(relations),
        "size": bool(relations) or any(size for _, size, _, _ in mentions),
        "place": bool(places),
    }
    right = is_said[asked(drawn)] and counts and sizes and all(relations) and all(places)
    return {"things": True, asked(drawn): right}


def is_right(caption: str, drawn: Scene) -> bool:
    """Whether a caption is right in all that a scene asks for."""
    return all(aspects_right(caption, drawn).values())


def _holds(found: tuple[str, ...], drawn: Scene) -> bool:
    """Whether a relation that was said between two of a scene's shapes is so."""
    of = {(thing.colour, thing.shape): thing for thing in drawn.things}
    a, relation, b = of[found[2], found[3]], found[4], of[found[7], found[8]]
    return {
        "to the left of": a.x < b.x - 0.2, "to the right of": a.x > b.x + 0.2,
        "above": a.y < b.y - 0.2, "below": a.y > b.y + 0.2,
        "larger than": a.radius > 1.5 * b.radius, "smaller than": 1.5 * a.radius < b.radius,
    }[relation]  # fmt: skip


def _place(thing: Thing) -> str:
    """Where a single shape is, in words."""
    down, across = (("low", "middle", "high")[(at > 1 / 3) + (at > 2 / 3)] for at in (thing.y, thing.x))
    names = {"low": ("top", "left"), "high": ("bottom", "right")}
    if down == across == "middle":
        return "in the middle"
    if "middle" in (down, across):
        return f"at the {names[down][0] if across == 'middle' else names[across][1]} edge"
    return f"in the {names[down][0]} {names[across][1]} corner"


def _counted(kind: tuple[str, str], count: int) -> str:
    colour, shape = kind
    if count == 1:
        return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
    return f"{_NUMBERS[count]} {colour} {shape}{'es' if shape.endswith('s') else 's'}"


def _room(radius: float, aspect: float) -> tuple[float, float]:
    """The least x and y, as fractions, at which a shape lies wholly inside a picture."""
    width, height = max(1.0, aspect), max(1.0, 1 / aspect)
    return (1.12 * radius + _MARGIN) / width, (1.12 * radius + _MARGIN) / height  # a turned square's corners: 1.1 radii


def _thing(rng: random.Random, kind: tuple[str, str], x: float, y: float, radius: float) -> Thing:
    return Thing(*kind, x, y, radius, rng.uniform(-0.25, 0.25))


def _placed(
    rng: random.Random, kind: tuple[str, str], column: int, row: int, radii: tuple[float, float], aspect: float
) -> Thing:
    """A shape against the edges of a third of the picture: column and row 0, 1 or 2."""
    radius = rng.uniform(*radii)
    near = [
        (edge + rng.uniform(0, 0.03), rng.uniform(0.46, 0.54), 1 - edge - rng.uniform(0, 0.03))[third]
        for edge, third in zip(_room(radius, aspect), (column, row), strict=True)
    ]
    return _thing(rng, kind, near[0], near[1], radius)


def _opposite(rng: random.Random, kinds: list[tuple[str, str]], aspect: float) -> tuple[Thing, ...]:
    """Two shapes of one size, the first to the left of or above the second, often against opposite edges."""
    radius, upright = rng.uniform(*MEDIUM), rng.random() < 0.5
    edges = _room(radius, aspect)
    edge, other = edges[::-1] if upright else edges
    first, across = rng.uniform(edge, edge + 0.08), rng.uniform(max(other, 0.3), min(1 - other, 0.7))
    spots = [(first, across), (1 - rng.uniform(edge, edge + 0.08), across + rng.uniform(-0.1, 0.1))]
    spots = [(main, min(max(side, other), 1 - other)) for main, side in spots]
    return tuple(
        _thing(rng, kind, *(spot[::-1] if upright else spot), radius) for kind, spot in zip(kinds, spots, strict=True)
    )


def _scattered(
    rng: random.Random, kinds: list[tuple[str, str]], radii: list[tuple[float, float]], aspect: float
) -> tuple[Thing, ...]:
    """Shapes anywhere, no two of them touching."""
    width, height = max(1.0, aspect), max(1.0, 1 / aspect)
    while True:
        things: list[Thing] = []
        for kind, between in zip(kinds, radii, strict=True):
            radius = rng.uniform(*between)
            x0, y0 = _room(radius, aspect)
            thing = _thing(rng, kind, rng.uniform(x0, 1 - x0), rng.uniform(y0, 1 - y0), radius)
            gaps = (
                math.hypot((thing.x - one.x) * width, (thing.y - one.y) * height) - 1.12 * (radius + one.radius)
                for one in things
            )
            if any(gap < _APART for gap in gaps):
                break
            things.append(thing)
        if len(things) == len(kinds):
            return tuple(things)
