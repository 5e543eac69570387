"""Words, ids, and captions tokenized once."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from captioning.data import captions as encoded
from captioning.data import vocabulary as vocab
from captioning.data.captions import EncodedCaptions
from captioning.data.dataset import choose_captions
from captioning.data.vocabulary import END, UNK, Vocabulary, tokenize
from shards import index as shard_index
from shards.errors import InputError
from tests.conftest import DATA


def test_the_threshold_decides_and_frequency_orders():
    vocabulary = vocab.build(Counter({"cat": 3, "dog": 5, "rare": 1, "also": 3}), threshold=3)
    assert vocabulary.words == ("<pad>", "<start>", "<end>", "<unk>", "dog", "also", "cat")


def test_captions_go_to_ids_and_back_as_a_person_would_write_them():
    caption = "A man's dog, wet and happy, can't stop running."
    vocabulary = vocab.build(Counter(tokenize(caption)), threshold=1)
    ids = [*(vocabulary.ids[word] for word in tokenize(caption)), END]
    assert vocabulary.decode(ids) == caption
    assert vocabulary.decode([*ids, 4, 5]) == caption, "nothing after <end> is text"


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


@pytest.mark.parametrize("text", ["", "[]", '{"words": ["a"]}', '{"words": ["<pad>", "<start>", "<end>", "<unk>", 5]}'])
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
    monkeypatch.setattr(vocab, "tokenize", lambda caption: pytest.fail("tokenized again"))
    assert encoded.encode(index, tmp_path / "encoded", 1, 20, vocabulary) is vocabulary


def test_captions_rotate_over_the_epochs():
    captions = [np.array([number]) for number in range(7)]
    chosen = [[int(c[0]) for c in choose_captions(captions, 5, epoch)] for epoch in range(7)]
    assert chosen[0] == [0, 1, 2, 3, 4] and chosen[1] == [5, 6, 0, 1, 2]
    assert Counter(number for epoch in chosen for number in epoch) == dict.fromkeys(range(7), 5)
    assert len(choose_captions(captions[:3], 5, 4)) == 3
