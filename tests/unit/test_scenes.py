"""The embedded dataset says what it draws."""

import numpy as np

from shards.sources import scenes


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
