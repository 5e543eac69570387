"""Words for scoring: the rules of Stanford's PTBTokenizer, and how often they agree with it on real captions."""

import csv
import shutil
import unicodedata

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captioning.metrics.ptb import words_for_scoring
from tests.conftest import DATA, coco_references
from tests.scripts import WORDS, captions_in

pytestmark = pytest.mark.slow


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
        (
            "rock \u2019n\u2019 roll, l\u2019homme d\u2019\u00e9t\u00e9, WE\u2019LL",
            "rock \u2019n\u2019 roll l\u2019homme d\u2019\u00e9t\u00e9 we 'll",
        ),
        ("\ufeffune\u200bfe\u0301e nai\u0308ve", "une f\u00e9e na\u00efve"),
        ("एक आदमी है। क्\u200dया", "एक आदमी है । क् या"),
        ("رَجُلٌ، می\u200cدود", "رَجُلٌ ، می دود"),
        ("кот.пёс и т.д. Санкт-Петербург", "кот.пёс и т.д санкт-петербург"),
        ("une grand-mère d'eau-forêt, एक-दो", "une grand-mère d'eau-forêt एक-द ो"),
        ("น้ำ 猫。狗 ½ ２只", "น้ำ 猫 。 狗 1/2 ２只"),
        ("", ""),
        (" \n . ... -- ", ""),
    ],
)
def test_the_rules(caption, words):
    assert words_for_scoring(caption) == words.split()


def equal(captions: list[str]) -> list[bool]:
    """Whether a caption's words are exactly those of PTBTokenizer, which needs Java."""
    if shutil.which("java") is None:
        pytest.skip("Stanford's PTBTokenizer runs in Java, which is not installed here")
    theirs = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    return [" ".join(words_for_scoring(caption)) == theirs[i][0] for i, caption in enumerate(captions)]


def test_agreement_with_stanford_in_every_script(monkeypatch):
    """1,000 captions of each language, a seventh of them decomposed; Stanford's tokenizer gets them as NFC."""
    monkeypatch.setenv("JDK_JAVA_OPTIONS", "-Dfile.encoding=UTF-8")  # else Java reads as the locale says
    captions = {language: captions_in(language, 1000) for language in WORDS}
    everything = [unicodedata.normalize("NFC", caption) for of_one in captions.values() for caption in of_one]
    same = iter(equal(everything))
    assert {language: [c for c in of_one if not next(same)][1:] for language, of_one in captions.items()} == {
        language: [] for language in captions
    }, "more than one caption in 1,000 differs"


@pytest.mark.parametrize("language", WORDS)
def test_decomposed_captions_have_the_same_words(language):
    for caption in captions_in(language, 50):
        composed, decomposed = (unicodedata.normalize(form, caption) for form in ("NFC", "NFD"))
        assert words_for_scoring(composed) == words_for_scoring(decomposed)


def test_agreement_with_stanford_on_coco():
    captions = [caption for of_image in coco_references().values() for caption in of_image]
    assert len(captions) == 25014
    assert sum(equal(captions)) >= 25009


def test_agreement_with_stanford_on_flickr8k():
    path = DATA / "flickr8k-text" / "captions.txt"
    if not path.is_file():
        pytest.skip(f"the Flickr8k captions are not here ({path}): this test runs where the developers' data is")
    with path.open(encoding="utf-8", newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    assert len(captions) == 40455
    assert all(equal(captions))
