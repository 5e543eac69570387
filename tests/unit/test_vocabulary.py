"""Words, ids, and captions tokenized once."""

import json
import re
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest

from captioning.data import captions as encoded
from captioning.data import vocabulary as vocab
from captioning.data.captions import EncodedCaptions
from captioning.data.dataset import choose_captions
from captioning.data.tokenizer import TOKENIZERS, BytePairEncoding, Words
from captioning.data.vocabulary import END, UNK, Vocabulary
from shards import index as shard_index
from shards import sources
from shards.errors import InputError
from shards.packing.packer import Settings, pack
from tests.conftest import DATA, run_command, write_coco
from tests.scripts import captions_in
from tests.system.test_pack import jpeg

tokenize = Words().tokenize


def test_the_threshold_decides_and_frequency_orders():
    vocabulary = vocab.build(Counter({"cat": 3, "dog": 5, "rare": 1, "also": 3}), threshold=3)
    assert vocabulary.words == ("<pad>", "<start>", "<end>", "<unk>", "dog", "also", "cat")


def test_captions_go_to_ids_and_back_as_a_person_would_write_them():
    caption = "A man's dog, wet and happy, can't stop running."
    vocabulary = vocab.build(Counter(tokenize(caption)), threshold=1)
    ids = [*(vocabulary.ids[word] for word in tokenize(caption)), END]
    assert vocabulary.decode(ids) == caption
    assert vocabulary.decode([*ids, 4, 5]) == caption, "nothing after <end> is text"


@pytest.mark.slow
def test_real_captions_come_back_as_they_were_written():
    """All of COCO val2017's: but for case, spaces before punctuation and lacking ones after it, and odd quotes."""
    path = DATA / "coco-captions-val2017.json"
    if not path.is_file():
        pytest.skip(f"COCO's captions are not here ({path}): this test runs where the developers' data is")
    captions = [entry["caption"].lower() for entry in json.loads(path.read_text())["annotations"]]
    vocabulary = vocab.build(Counter(word for caption in captions for word in tokenize(caption)), threshold=1)
    changed = 0
    for caption in captions:
        decoded = vocabulary.decode([vocabulary.ids[word] for word in tokenize(caption)]).lower()
        assert decoded.split() and " ," not in decoded and not decoded.endswith(" .")
        tidied = re.sub(r"([,;])(?=\w)", r"\1 ", re.sub(r"\s+([.,])", r"\1", " ".join(caption.split())))
        changed += decoded.replace(" ..", "..") != tidied
    assert changed <= 10, "of 25,014"


def test_json_keeps_every_word():
    vocabulary = Vocabulary((*vocab.SPECIAL, "naïve", '"', "a b"))
    assert vocab.from_json(vocabulary.to_json(), "x") == vocabulary


_GOOD = '{"words": ["<pad>", "<start>", "<end>", "<unk>"]'


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"words": ["a"]}', '{"words": ["<pad>", "<start>", "<end>", "<unk>", 5]}',
        _GOOD + ', "tokenizer": "pickle"}', _GOOD + ', "tokenizer": ["bpe"]}', _GOOD + ', "tokenizer": "bpe"}',
        _GOOD + ', "tokenizer": "bpe", "learned": {"tokens": ["<unk>", "a"], "merges": [["a", "b"]]}}',
        _GOOD + ', "tokenizer": "bpe", "learned": {"tokens": [1], "merges": []}}',
    ],
)  # fmt: skip
def test_what_is_no_vocabulary_is_refused(text):
    with pytest.raises(InputError, match=r"words\.json is not a vocabulary"):
        vocab.from_json(text, "words.json")


@pytest.mark.parametrize("max_words", [4, 20])
def test_encoded_captions_are_the_first_words_of_the_captions(scene_shards, tmp_path, max_words):
    index = shard_index.load(scene_shards / "train.json")
    vocabulary = encoded.encode(index, tmp_path / "encoded", threshold=30, max_words=max_words)
    captions = EncodedCaptions(tmp_path / "encoded")
    assert len(captions) == len(index)
    unknown = 0
    for number, text in enumerate(index.texts()):
        expected = [[vocabulary.ids.get(w, UNK) for w in tokenize(caption)[:max_words]] for caption in text.captions]
        assert [caption.tolist() for caption in captions.of(number)] == expected
        unknown += sum(ids.count(UNK) for ids in expected)
    assert unknown > 0, "the threshold is meant to leave words out"


def test_the_vocabulary_comes_from_the_training_split_alone(scene_shards, tmp_path):
    """A word of the validation split that training lacks is <unk>: counting it would leak."""
    train, val = (shard_index.load(scene_shards / f"{split}.json") for split in ("train", "val"))
    vocabulary = encoded.encode(train, tmp_path / "train", threshold=1, max_words=20)
    assert encoded.encode(val, tmp_path / "val", threshold=1, max_words=20, vocabulary=vocabulary) is vocabulary
    words = {word for text in train.texts() for caption in text.captions for word in tokenize(caption)}
    assert set(vocabulary.words[4:]) == words


def test_nothing_is_tokenized_twice(scene_shards, tmp_path, monkeypatch):
    index = shard_index.load(scene_shards / "train.json")
    vocabulary = encoded.encode(index, tmp_path / "encoded", threshold=1, max_words=20)
    monkeypatch.setattr(Words, "tokenize", lambda self, caption: pytest.fail("tokenized again"))
    assert encoded.encode(index, tmp_path / "encoded", 1, 20, vocabulary) is vocabulary


def test_captions_rotate_over_the_epochs():
    captions = [np.array([number]) for number in range(7)]
    chosen = [[int(c[0]) for c in choose_captions(captions, 5, epoch)] for epoch in range(7)]
    assert chosen[0] == [0, 1, 2, 3, 4] and chosen[1] == [5, 6, 0, 1, 2]
    assert Counter(number for epoch in chosen for number in epoch) == dict.fromkeys(range(7), 5)
    assert len(choose_captions(captions[:3], 5, 4)) == 3


def split_of(tmp_path, captions: list[str]):
    """A packed split of images with a caption each."""
    source = sources.coco(*write_coco(tmp_path / "coco", {f"{n}.jpg": [c] for n, c in enumerate(captions)}, jpeg()))
    return pack(source, "train", tmp_path / "shards", Settings())


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("language", ["French", "Russian", "Hindi", "Arabic", "Thai", "Chinese", "Korean"])
def test_every_tokenizer_gives_back_what_a_person_would_write(name, language):
    captions = [" ".join(caption.lstrip("\ufeff").split()) for caption in captions_in(language, 200)]
    tokenizer = TOKENIZERS[name].train(captions, None, 1)
    vocabulary = vocab.build(Counter(t for c in captions for t in tokenizer.tokenize(c)), 1, None, tokenizer)
    read = vocab.from_json(vocabulary.to_json(), "vocabulary.json")
    assert read == vocabulary and hash(read) == hash(vocabulary)
    for caption in captions:
        written = unicodedata.normalize("NFC", caption)
        said = read.decode([read.ids[token] for token in read.tokenizer.tokenize(caption)])
        if name == "words":  # which lets go of case, and of spaces before punctuation
            said, written = (re.sub(r"[\s\W]+", "", text).lower() for text in (said, written))
        assert said == written


def test_characters_keep_their_marks():
    assert TOKENIZERS["characters"]().tokenize("ผู้ชาย e\u0301t 猫") == ["ผู้", "ช", "า", "ย", " ", "é", "t", " ", "猫"]


def test_pairs_are_learned_alike_in_every_process_and_order():
    """Parts of words, from the training captions alone: the same captions give the same bytes."""
    code = (
        "import sys; from captioning.data.tokenizer import BytePairEncoding as B\n"
        "from tests.scripts import captions_in\n"
        "c = captions_in('Turkish', 300) + captions_in('Hindi', 300); c = c[::-1] if sys.argv[1] == '1' else c;"
        "print(repr(B.train(c, 300, 2)))"
    )
    first, second = (run_command([sys.executable, "-c", code, order], PYTHONHASHSEED=order).stdout for order in "01")
    assert first and first == second
    captions = captions_in("Turkish", 300) + captions_in("Hindi", 300)
    learned = BytePairEncoding.train(captions, 300, 2)
    assert repr(learned) == first.strip() and len(learned.tokens) <= 300
    assert max(map(len, learned.tokens)) > 3, "it merges"


def test_a_vocabulary_is_bounded_by_the_most_frequent(tmp_path):
    index = split_of(tmp_path, ["A dog runs."] * 5 + ["A cat runs."] * 3 + ["One zebra."])
    vocabulary = encoded.encode(index, tmp_path / "e", 1, 20, vocabulary_size=8)
    assert vocabulary.words[4:] == (".", "a", "runs", "dog") and len(vocabulary) == 8


@pytest.mark.parametrize(
    ("captions", "settings", "why"),
    [
        (captions_in("Chinese", 60), {"threshold": 40}, "Chinese characters.*data.tokenizer=characters"),
        (captions_in("Thai", 60), {"threshold": 40}, "Thai.*data.tokenizer=characters"),
        ([f"word{n} other{n}" for n in range(20)], {"threshold": 4}, "data.min_word_freq=4 times.*bpe"),
        (["A dog runs fast."] * 9, {"threshold": 1, "vocabulary_size": 6}, "data.vocabulary_size=6"),
    ],
)
def test_a_vocabulary_that_covers_too_little_is_refused(tmp_path, captions, settings, why):
    index = split_of(tmp_path, captions)
    with pytest.raises(InputError, match=f"(?s)covers .*%.*{why}"):
        encoded.encode(index, tmp_path / "e", max_words=20, **settings)
    assert not (tmp_path / "e").exists(), "nothing is written"


def test_chinese_by_characters(tmp_path):
    captions = captions_in("Chinese", 60)
    index = split_of(tmp_path, captions)
    vocabulary = encoded.encode(index, tmp_path / "e", 4, 60, tokenizer="characters")
    ids = EncodedCaptions(tmp_path / "e").of(0)[0].tolist()
    assert "狗" in vocabulary.words and UNK not in ids
    assert vocabulary.decode([*ids, END]) == index.texts()[0].captions[0]


def test_an_unknown_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data\.tokenizer=letters is not one of words, whitespace, characters, bpe"):
        encoded.encode(split_of(tmp_path, ["A dog."]), tmp_path / "e", 1, 20, tokenizer="letters")
