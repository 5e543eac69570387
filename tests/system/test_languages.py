"""Captions in other languages, all the way: refused or trained, spoken, scored and looked at."""

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from captioning.config import IDENTITY
from captioning.data.vocabulary import from_json
from captioning.doctor import split
from captioning.evaluation.results import Reference, ScoredCaptions, match_references, read_results, references_of
from captioning.evaluation.scores import evaluate
from captioning.inference.predictor import Predictor
from captioning.metrics.ptb import CHARACTERS, TOKENIZER, characters_for_scoring
from captioning.report import fonts, pictures
from shards import index as shard_index
from shards import sources
from shards.index import Index
from shards.packing.packer import Settings, pack
from shards.scripts import is_spaceless, scripts_of
from tests.conftest import run_command, settings, train_command, write_coco
from tests.scripts import captions_in
from tests.system.test_pack import jpeg


def splits(folder, language: str, count: int = 12) -> Index:
    """train.json and val.json of images with two captions each."""
    for name, seed in (("train", 0), ("val", 1)):
        captions = captions_in(language, 2 * count, seed)
        if language == "Chinese":
            captions = [caption.replace(" ", "") for caption in captions]
        of_image = {f"{n}.jpg": captions[2 * n : 2 * n + 2] for n in range(count)}
        images, annotations = write_coco(folder / name, of_image, jpeg())
        pack(sources.coco(images, annotations), name, folder, Settings())
    return shard_index.load(folder / "train.json")


def test_a_chinese_table_is_refused_by_words_and_trained_by_characters(tmp_path, empty_config):
    splits(tmp_path / "shards", "Chinese")
    run = tmp_path / "run"
    changes = {"data__val": tmp_path / "shards" / "val.json", "train__total_steps": 2, "data__min_word_freq": 9}
    changes["data__allow_overlap"] = "true"  # one grey image is all of them
    done = run_command(train_command(1, settings(tmp_path / "shards", run, **changes), empty_config))
    assert done.returncode == 2 and "set data.tokenizer=characters" in done.stderr, done.stderr[-2000:]
    changes |= {"data__min_word_freq": 1, "data__tokenizer": "characters"}
    overrides = settings(tmp_path / "shards", run, **changes)
    done = run_command(train_command(1, overrides, empty_config))
    assert done.returncode == 0, f"the refused run's folder is free for other settings: {done.stderr[-2000:]}"
    predictor = Predictor.from_checkpoint(run)
    assert "狗" in predictor.vocabulary.words
    said = predictor.caption([jpeg()])[0]
    assert said.text == "".join(said.words).strip(), "no spaces between characters"
    results = run / "captions-val-step-2.json"
    captioned = match_references(read_results(results), references_of(shard_index.load(changes["data__val"])), results)
    assert captioned.tokenizer == CHARACTERS and len(captioned) == 12


def test_a_run_of_word_parts_resumes_with_what_it_learned(tmp_path, empty_config):
    splits(tmp_path / "shards", "Turkish")
    run = tmp_path / "run"
    for steps in (4, 6):
        changes = {"train__total_steps": steps, "data__tokenizer": "bpe", "data__vocabulary_size": 60}
        done = run_command(train_command(1, settings(tmp_path / "shards", run, **changes), empty_config))
        assert done.returncode == 0, done.stderr[-2000:]
    vocabulary = from_json((run / "vocabulary.json").read_text(encoding="utf-8"), "x")
    assert len(vocabulary) <= 60 and vocabulary.tokenizer.learned()["merges"]
    assert {"data.tokenizer", "data.vocabulary_size"} <= set(IDENTITY), "another is another run"


@pytest.mark.parametrize(
    ("language", "spaceless", "script"),
    [
        ("Chinese", True, "Chinese characters"), ("Japanese", True, "Hiragana"), ("Thai", True, "Thai"),
        ("Korean", False, "Hangul"), ("Hindi", False, "Devanagari"), ("Arabic", False, "Arabic"),
        ("French", False, "Latin"), ("Greek", False, "Greek"),
    ],
)  # fmt: skip
def test_scripts_are_told_apart(language, spaceless, script):
    captions = captions_in(language, 50)
    assert is_spaceless(captions) == spaceless
    assert script in list(scripts_of(captions))[:2]


def test_languages_without_spaces_are_scored_by_characters():
    assert characters_for_scoring("一只黑狗，穿T恤。 IBM 2只") == [*"一只黑狗穿t恤", "ibm", *"2只"]
    assert characters_for_scoring("ผู้ชาย") == ["ผู้", "ช", "า", "ย"]
    references = (Reference(("一只黑狗在草地上跑",)), Reference(("两个孩子在海边玩球",)))
    chinese = ScoredCaptions((1, 2), ("一只白狗在草地上跑", "两个孩子在海边玩球"), references)
    assert chinese.tokenizer == CHARACTERS and evaluate(chinese).document()["tokenizer"] == CHARACTERS
    assert evaluate(chinese).scores["BLEU-1"] == pytest.approx(17 / 18)
    english = ScoredCaptions((1,), ("狗",), (Reference(("a dog",)),))
    assert english.tokenizer == TOKENIZER, "what is said does not choose: a model could choose its scores"


@pytest.mark.parametrize(
    ("language", "suggested"),
    [("Chinese", "data.tokenizer=characters"), ("French", "data.tokenizer=words"), ("Thai", "data.max_words=")],
)
def test_the_doctor_says_script_length_and_tokenizer(tmp_path, language, suggested):
    index = splits(tmp_path, language, 60)
    seen = {check.what: check.seen for check in split.captions(index, lambda done, total: None)}
    assert suggested in seen["suggested"]
    assert next(iter(scripts_of(captions_in(language, 120)))) in seen["scripts"]
    assert ("characters a caption" in seen) == (language != "French")


def test_the_doctor_suggests_parts_of_words_where_most_words_are_rare(tmp_path):
    captions = {f"{n}.jpg": [f"prefix{n}ending runs"] for n in range(20)}
    index = pack(sources.coco(*write_coco(tmp_path / "coco", captions, jpeg())), "train", tmp_path / "s", Settings())
    seen = {check.what: check.seen for check in split.captions(index, lambda done, total: None)}
    assert seen["suggested"].startswith("data.tokenizer=bpe: words seen 4+ times are 50% of the text")


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Installs nothing but DejaVu Sans, and what a test makes: a family with a black square for each character."""

    def clear():
        for cached in (fonts._others, fonts._warn, fonts._glyphs, fonts._entry):
            cached.cache_clear()

    known = [e for e in font_manager.fontManager.ttflist if Path(e.fname).name == "DejaVuSans.ttf"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", known)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path) for path in tmp_path.glob("*.ttf")])

    def install(name: str, characters: str) -> None:
        names = [".notdef", *(f"u{ord(character):x}" for character in characters)]
        builder = FontBuilder(1000, isTTF=True)
        builder.setupGlyphOrder(names)
        builder.setupCharacterMap({ord(character): f"u{ord(character):x}" for character in characters})
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0)), pen.lineTo((0, 900)), pen.lineTo((900, 900)), pen.lineTo((900, 0)), pen.closePath()
        builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
        builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
        builder.setupHorizontalHeader(ascent=900, descent=-100)
        builder.setupNameTable({"familyName": name, "styleName": "Regular"})
        builder.setupOS2(), builder.setupPost()
        builder.save(tmp_path / f"{name}.ttf")
        clear()

    clear()
    yield install
    clear()


def test_without_a_font_a_message_stands_for_the_text_and_is_logged_once(installed, caplog):
    for _ in range(2):
        assert fonts.readable("一只狗")[0] == fonts.font_file("一只狗")[0] == "(no font for Chinese characters here)"
    assert len(caplog.records) == 1 and "fonts-noto-cjk" in caplog.text
    assert fonts.readable("A dog \U0001f9f6 runs.")[0] == "A dog  runs.", "a sign that no font has is left out"
    assert fonts.readable("Ένας σκύλος, собака, كلب") == ("Ένας σκύλος, собака, كلب", ["DejaVu Sans"])


def test_fonts_that_have_the_letters_are_found(installed, tmp_path, recwarn):
    installed("Chinese", "一只狗")
    installed("Thai", "ผู้ชาย")
    assert fonts.readable("A 狗, ผู้ชาย") == ("A 狗, ผู้ชาย", ["DejaVu Sans", "Chinese", "Thai"])
    assert fonts.font_file("一只狗") == ("一只狗", str(tmp_path / "Chinese.ttf"))
    image = Image.new("RGB", (64, 64), "white")
    pictures.caption_sheet([image], ["一只狗"], [None], tmp_path / "sheet.png", "狗")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    band = np.asarray(pictures.annotated(image, "一只狗").convert("L"))[240:]
    assert (band < 64).mean() > 0.02, "black squares"


def test_long_lines_of_languages_without_spaces_are_broken(installed):
    installed("Chinese", "一只狗")
    image = Image.new("RGB", (240, 240), "white")
    assert pictures.annotated(image, "一只狗" * 20).height > pictures.annotated(image, "一只狗").height
