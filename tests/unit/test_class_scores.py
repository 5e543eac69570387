"""The class a caption names; precision, recall, F1, confusion and BLEU-4 of the classes, against hand-made values."""

import numpy as np
import pytest

from captioning.evaluation.results import Reference, ScoredCaptions
from captioning.evaluation.scores import evaluate
from captioning.metrics import measure
from captioning.metrics.class_scores import class_named, name_words, score_classes
from captioning.metrics.ptb import words_for_scoring

CLASSES = {name_words(name): k for k, name in enumerate(["Hot_dog", "dog", "polar bear", "bear"])}


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("a dog runs", 1),
        ("a hot dog on a plate", 0),  # the longest name
        ("a bear and a dog", 3),  # of equally long ones the first to come
        ("a dog and a polar bear", 2),
        ("a hotdog", None),  # whole words only
        ("a polar dog", 1),
        ("", None),
    ],
)
def test_the_class_named_in_a_caption(caption, found):
    assert class_named(caption.split(), CLASSES) == found


@pytest.mark.parametrize(
    "label",
    ["Shih-Tzu", "n02085620-Chihuahua", "black-footed_ferret", "St._Bernard", "U.S. flag", "dog & cat", "car_(2010)"],
)
def test_a_name_of_any_signs_is_found_in_the_caption_that_holds_it(label):
    caption = words_for_scoring(f"A photo of a {label.replace('_', ' ')}.")
    assert class_named(caption, {name_words(label): 0}) == 0


# cat: 3 images, 2 named right, 1 named dog; dog: 2 images, 1 right, 1 names nothing; owl: 1 image, named cat.
LABELS = ["cat", "cat", "cat", "dog", "dog", "owl", None]
CAPTIONS = ["a cat sits here", "the cat sits here", *["a dog sits here"] * 2, "a thing sits", "a cat", "a cat"]


def scored():
    words = [caption.split() for caption in CAPTIONS]
    references = [[f"a {label or 'cat'} sits here".split()] for label in LABELS]
    bleu4 = next(metric for metric in measure(words, references) if metric.name == "BLEU-4")
    return score_classes(LABELS, words, bleu4), words, references


def test_values_counted_by_hand():
    found, words, references = scored()
    assert found is not None and found.names == ("cat", "dog", "owl")
    assert found.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]
    values = {metric.name: metric.value for metric in found.metrics}
    assert values == pytest.approx(
        {
            "class_accuracy": 3 / 6,  # the image without a label does not count
            "class_precision_macro": (2 / 3 + 1 / 2 + 0) / 3,
            "class_recall_macro": (2 / 3 + 1 / 2 + 0) / 3,
            "class_F1_macro": (2 / 3 + 1 / 2 + 0) / 3,
        }
    )
    cats = next(metric for metric in measure(words[:3], references[:3]) if metric.name == "BLEU-4")
    assert found.bleu4[0] == pytest.approx(cats.value)
    assert [name for name, _ in found.by_bleu4] == ["dog", "cat", "owl"]
    assert found.table()[0] == pytest.approx(
        {"class": "cat", "images": 3, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "BLEU-4": cats.value}
    )


def test_precision_and_recall_differ_where_they_should():
    """Everything is called a cat: recall of cats 1, precision 1/2."""
    words = [["a", "cat"]] * 4
    bleu4 = measure(words, [[["a", "cat"]]] * 4)[3]
    found = score_classes(["cat", "cat", "dog", "dog"], words, bleu4)
    assert found is not None
    values = {metric.name: metric.value for metric in found.metrics}
    assert values["class_precision_macro"] == pytest.approx(0.25)
    assert values["class_recall_macro"] == pytest.approx(0.5)
    assert values["class_F1_macro"] == pytest.approx((2 * 0.5 / 1.5) / 2)


def test_labels_of_the_same_words_are_one_class():
    words = [["a", "cat"], ["a", "cat"], ["a", "sea", "lion"], ["a", "cat"]]
    bleu4 = measure(words, [[["a", "cat"]]] * 4)[3]
    found = score_classes(["cat", "Cat", "sea_lion", "sea lion"], words, bleu4)
    assert found is not None and found.names == ("Cat", "sea lion")
    assert found.confusion.tolist() == [[2, 0, 0], [1, 1, 0]]


def test_classes_are_part_of_an_evaluation_only_where_there_are_labels():
    references = tuple(Reference((f"a {label}",), label) for label in LABELS)
    captioned = ScoredCaptions(tuple(range(7)), tuple(CAPTIONS), references)
    found = evaluate(captioned)
    assert found.classes is not None and found.scores["class_accuracy"] == pytest.approx(0.5)
    low, high = found.intervals["class_accuracy"]
    assert 0 <= low < 0.5 < high <= 1
    assert [row["class_accuracy"] for row in found.per_image()] == [1, 1, 0, 1, 0, 0, None]
    assert found.document()["classes"]["confusion"] == found.classes.confusion.tolist()
    unlabelled = tuple(Reference(reference.captions) for reference in references)
    assert evaluate(ScoredCaptions(tuple(range(7)), tuple(CAPTIONS), unlabelled)).classes is None
    assert not np.isnan(list(found.scores.values())).any()
