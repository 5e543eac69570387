"""Words for scoring: the rules of Stanford's PTBTokenizer, and how often they agree with it on real captions."""

import csv
import shutil

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captioning.metrics.ptb import words_for_scoring
from tests.conftest import DATA, coco_references


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ('A "big" dog\'s ball, red -- and wet..', "a big dog 's ball red and wet"),
        ("A dog. The dog runs.It barks!", "a dog the dog runs.it barks"),
        (
            "He can't and cannot, they WON'T; it's gonna 5:54pm",
            "he ca n't and can not they wo n't it 's gon na 5:54 pm",
        ),
        ("a T.V. on Main St. near Washington D.C.", "a t.v. on main st. near washington d.c."),
        ("a sign for Ky. and Mass. and mass. of people", "a sign for ky. and mass. and mass of people"),
        ("plan B. The next, by J. Smith", "plan b the next by j. smith"),
        ("no. 5 and no.", "no. 5 and no"),
        ("rock 'n' roll at 5 o'clock for ma'am", "rock 'n' roll at 5 o'clock for ma'am"),
        ("multi- colored, t-shirt's black/white w/ -foo", "multi colored t-shirt 's black/white w / foo"),
        ("(two) [three] :)", "-lrb- two -rrb- -lsb- three -rsb- :-rrb-"),
        ("M&M's & R&B, salt&pepper #7 $5.00 100%", "m&m 's & r&b salt & pepper # 7 $ 5.00 100 %"),
        ("it\u2019s a \u201ccaf\u00e9\u201d\u2026 a\u2013b", "it 's a caf\u00e9 a b"),
        ("", ""),
        (" \n . ... -- ", ""),
    ],
)
def test_the_rules(caption, words):
    assert words_for_scoring(caption) == words.split()


def agreement(captions: list[str]) -> float:
    """The share of captions whose words are exactly those of PTBTokenizer, which needs Java."""
    if shutil.which("java") is None:
        pytest.skip("Stanford's PTBTokenizer runs in Java, which is not installed here")
    theirs = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    same = sum(" ".join(words_for_scoring(caption)) == theirs[i][0] for i, caption in enumerate(captions))
    return same / len(captions)


def test_agreement_with_stanford_on_coco():
    captions = [caption for of_image in coco_references().values() for caption in of_image]
    assert len(captions) == 25014
    assert agreement(captions) > 0.9995


def test_agreement_with_stanford_on_flickr8k():
    path = DATA / "flickr8k-text" / "captions.txt"
    if not path.is_file():
        pytest.skip(f"the Flickr8k captions are not here ({path}): this test runs where the developers' data is")
    with path.open(encoding="utf-8", newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    assert len(captions) == 40455
    assert agreement(captions) > 0.9995
