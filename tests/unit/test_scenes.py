"""The embedded dataset says what it draws."""

from collections import Counter

import numpy as np
import pytest

from shards.sources import rich_scenes, scenes
from shards.sources.scenes import Scene, Thing


def test_a_scene_is_a_function_of_its_number():
    assert scenes.scene(0, "train", 5) == scenes.scene(0, "train", 5)
    different = {scenes.scene(seed, split, n) for seed in (0, 1) for split in ("train", "val") for n in range(50)}
    assert len(different) == 200


def test_captions_name_every_thing_drawn_and_no_other():
    for number in range(200):
        drawn = scenes.scene(0, "train", number)
        truth = {(thing.colour, thing.shape) for thing in drawn.things}
        for caption in scenes.captions(drawn):
            assert scenes.things_named(caption) == truth, caption


def test_above_and_left_are_where_they_are_said_to_be():
    for number in range(200):
        drawn = scenes.scene(0, "train", number)
        if len(drawn.things) == 2:
            first, second = drawn.things
            if " above " in scenes.captions(drawn)[0]:
                assert first.y < second.y
            else:
                assert " to the left of " in scenes.captions(drawn)[0]
                assert first.x < second.x


def test_the_colour_is_in_the_picture():
    for number in range(40):
        drawn = scenes.scene(0, "train", number)
        pixels = np.asarray(scenes.draw(drawn)).reshape(-1, 3).astype(int)
        for thing in drawn.things:
            close = np.abs(pixels - scenes.COLOURS[thing.colour]).sum(axis=1) < 12
            assert close.mean() > 0.01, (number, thing)


def test_every_thing_lies_inside_the_picture():
    for number in range(300):
        for thing in scenes.scene(0, "train", number).things:
            assert thing.x - thing.radius >= 0 and thing.x + thing.radius <= 1
            assert thing.y - thing.radius >= 0 and thing.y + thing.radius <= 1


def test_a_box_is_the_smallest_around_what_is_drawn():
    for number in range(20):
        drawn = scenes.scene(0, "train", number)
        pixels = np.asarray(scenes.draw(drawn)).astype(int)
        for thing in drawn.things:
            close = np.abs(pixels - scenes.COLOURS[thing.colour]).sum(axis=2) < 60
            rows, columns = np.flatnonzero(close.any(axis=1)), np.flatnonzero(close.any(axis=0))
            seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / scenes.SIZE
            if [one.colour for one in drawn.things].count(thing.colour) == 1:
                assert np.abs(seen - scenes.box(thing, drawn)).max() < 0.03, (number, thing)


def test_rich_captions_are_right_in_all_that_their_scene_asks_for():
    asked = Counter()
    for number in range(300):
        drawn = rich_scenes.scene(0, "train", number)
        asked[rich_scenes.asked(drawn)] += 1
        for caption in rich_scenes.captions(drawn):
            assert rich_scenes.aspects_right(caption, drawn) == {"things": True, rich_scenes.asked(drawn): True}, (
                caption
            )
    assert set(asked) == set(rich_scenes.ASPECTS) and min(asked.values()) > 50


def test_rich_shapes_lie_inside_their_picture_and_apart():
    for number in range(300):
        drawn = rich_scenes.scene(0, "train", number)
        boxes = [scenes.box(thing, drawn) for thing in drawn.things]
        assert all(min(box) >= 0 and max(box) <= 1 for box in boxes)
        if number < 10:
            assert sorted(scenes.draw(drawn).size) == [scenes.SIZE, 1.5 * scenes.SIZE]


def rich(*things):
    return Scene(tuple(Thing(colour, shape, x, y, r, 0.0) for colour, shape, x, y, r in things), "light", 1.5)


@pytest.mark.parametrize(
    ("drawn", "right", "wrong"),
    [
        (
            rich(*[("red", "cross", x, 0.5, 0.11) for x in (0.2, 0.5, 0.8)]),
            ["Three red crosses."],
            ["Two red crosses.", "A red cross."],
        ),
        (
            rich(("red", "star", 0.2, 0.5, 0.14), ("blue", "moon", 0.8, 0.5, 0.14)),
            ["A red star to the left of a blue moon.", "A blue moon to the right of a red star."],
            ["A red star to the right of a blue moon.", "A red star above a blue moon.", "A red star and a blue moon."],
        ),
        (
            rich(("red", "star", 0.2, 0.5, 0.22), ("blue", "moon", 0.8, 0.5, 0.11)),
            ["A red star larger than a blue moon.", "A small blue moon and a large red star."],
            ["A red star smaller than a blue moon.", "A large blue moon and a small red star."],
        ),
        (
            rich(("orange", "ring", 0.9, 0.85, 0.14)),
            ["An orange ring in the bottom right corner."],
            ["An orange ring at the right edge.", "An orange ring."],
        ),
    ],
)
def test_a_wrong_count_relation_size_or_place_is_wrong(drawn, right, wrong):
    asked = rich_scenes.asked(drawn)
    assert all(rich_scenes.is_right(caption, drawn) for caption in right)
    for caption in wrong:
        assert rich_scenes.aspects_right(caption, drawn) == {"things": True, asked: False}, caption
    assert rich_scenes.aspects_right("A pink heart.", drawn) == {"things": False, asked: False}
