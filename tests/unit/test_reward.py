"""The reward is pycocoevalcap's CIDEr and BLEU-4, of any captions of any images in any batch."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from captioning.data import vocabulary as vocab
from captioning.data.tokenizer import TOKENIZERS
from captioning.evaluation.results import Reference, ScoredCaptions
from captioning.metrics import references as counted
from captioning.metrics.ptb import CHARACTERS, CUTS, TOKENIZER, tokenizer_for, words_for_scoring
from captioning.metrics.references import References
from captioning.metrics.reward import CaptionWords, Reward, TokenWords, Words, token_words
from tests.conftest import coco_references
from tests.scripts import captions_in
from tests.unit.test_metrics import WORDS, as_theirs, corpus


def numbered_words(captions: list[list[str]], references: References) -> Words:
    numbers = {word: i for i, word in enumerate(references.words)}
    flat = [numbers.setdefault(word, len(numbers)) for caption in captions for word in caption]
    return Words(np.array(flat, dtype=np.int64), np.array([len(caption) for caption in captions], dtype=np.int64))


def samples(seed: int, count: int = 3):
    """``count`` candidates for each image, [count][images], and their references."""
    drawn = [corpus(seed)]
    references = drawn[0][1]
    rng = random.Random(seed)
    for _ in range(1, count):
        drawn.append(([rng.sample(rng.choice(refs) + WORDS[:5], rng.randint(0, 5)) for refs in references], None))
    return [candidates for candidates, _ in drawn], references


def theirs(candidates, references, with_end: bool) -> tuple[np.ndarray, np.ndarray]:
    """pycocoevalcap's CIDEr and BLEU-4 of each image."""
    end = ["<end>"] * with_end
    texts = as_theirs([c + end for c in candidates], [[r + end for r in refs] for refs in references])
    return Cider().compute_score(*texts)[1], np.array(Bleu(4).compute_score(*texts, verbose=0)[1][3])


@pytest.mark.parametrize("with_end", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_pycocoevalcap_in_any_batch(seed, with_end):
    candidates, references = samples(seed)
    ours = counted.count(references, with_end)
    expected = [theirs(of_images, references, with_end) for of_images in candidates]
    asked = [(k, i) for k in range(len(candidates)) for i in range(len(references))]
    random.Random(seed).shuffle(asked)
    for batch in (asked, asked[:1], asked[1:8], asked[8:50]):
        words = numbered_words([candidates[k][i] for k, i in batch], ours)
        if with_end:
            words = words.with_end(np.ones(len(batch), dtype=bool))
        images = np.array([i for _, i in batch])
        cider, bleu = (np.array([expected[k][metric][i] for k, i in batch]) for metric in (0, 1))
        np.testing.assert_allclose(Reward(ours).of(words, images), cider, rtol=0, atol=1e-9)
        np.testing.assert_allclose(Reward(ours, 0.5, 2.0).of(words, images), 0.5 * cider + 2 * bleu, rtol=0, atol=1e-9)


def test_values_on_real_captions_are_those_of_pycocoevalcap():
    captions = [[words_for_scoring(c) for c in of_image] for of_image in coco_references().values()][:400]
    ours = counted.count([c[1:] for c in captions])
    words = numbered_words([c[0] for c in captions], ours).with_end(np.ones(len(captions), dtype=bool))
    cider, bleu = theirs([c[0] for c in captions], [c[1:] for c in captions], with_end=True)
    np.testing.assert_allclose(Reward(ours, 1, 1).of(words, np.arange(400)), cider + bleu, rtol=0, atol=1e-9)


def test_only_a_caption_that_ended_by_itself_gets_the_end():
    references = [[["a", "cat", "on", "a", "mat"]], [["two", "dogs", "on", "a", "lawn"]], [["a", "red", "bus"]]]
    ours = counted.count(references)
    words = numbered_words([references[0][0], references[0][0], []], ours)
    ended = words.with_end(np.array([True, False, True]))
    assert ended.lengths.tolist() == [6, 5, 1]
    whole, cut, empty = Reward(ours).of(ended, np.array([0, 0, 0]))
    assert whole == pytest.approx(10) and cut < 9 and empty == 0


def test_a_caption_that_breaks_off_pays_for_it_with_the_end_alone():
    """Without <end> in the n-grams "on a" costs nothing: what they are there for."""
    references = [[["a", "cat", "sits", "on", "a", "mat"], ["a", "cat", "on", "a", "rug"]], [["two", "dogs"]], [["x"]]]
    good, broken = ["a", "cat", "sits"], ["a", "cat", "sits", "on", "a"]
    gained = {}
    for with_end in (False, True):
        ours = counted.count(references, with_end)
        words = numbered_words([good, broken], ours).with_end(np.array([with_end] * 2))
        good_reward, broken_reward = Reward(ours).of(words, np.array([0, 0]))
        gained[with_end] = broken_reward - good_reward
    assert gained[True] < gained[False]


def test_empty_batches_images_without_references_and_captions_of_unknown_words():
    ours = counted.count([[], [["a", "cat"]], [["a", "dog"], []]])
    assert ours.documents == 2
    nothing = Words(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    assert Reward(ours, 1, 1).of(nothing, np.empty(0, dtype=np.int64)).shape == (0,)
    words = numbered_words([["a", "cat"], ["owl", "owl"], []], ours).with_end(np.array([True] * 3))
    rewards = Reward(ours, 1, 1).of(words, np.array([0, 1, 1]))
    assert rewards[0] == 0 and np.isfinite(rewards).all() and (rewards[1:] < 0.05).all()


def test_saved_and_mapped_it_is_the_same_and_is_bound_to_what_it_was_made_of(tmp_path):
    candidates, references = corpus(1)
    ours = counted.count(references)
    counted.save(ours, tmp_path, {"fingerprint": "f", "end": True})
    assert counted.is_saved(tmp_path, {"fingerprint": "f", "end": True})
    assert not counted.is_saved(tmp_path, {"fingerprint": "g", "end": True})
    words, images = numbered_words(candidates, ours), np.arange(len(candidates))
    mapped = counted.load(tmp_path)
    np.testing.assert_array_equal(Reward(mapped, 1, 1).of(words, images), Reward(ours, 1, 1).of(words, images))
    (tmp_path / "about.json").unlink()
    assert not counted.is_saved(tmp_path, {"fingerprint": "f", "end": True})


def test_a_tokens_words_are_those_that_evaluation_scores():
    """Of all COCO captions: token by token, as whole texts, and through the text that a model's caption becomes."""
    texts = [c for of_image in coco_references().values() for c in of_image][:3000]
    ours = counted.count([[words_for_scoring(c)] for c in texts])
    tokens = [TOKENIZERS["words"]().tokenize(c) for c in texts]
    vocabulary = vocab.Vocabulary((*vocab.SPECIAL, *dict.fromkeys(itertools.chain(*tokens))))
    table = token_words(vocabulary.words, ours, len(vocab.SPECIAL))
    ids = [[vocabulary.ids[token] for token in of_caption] for of_caption in tokens]
    found = spelled(table, ids, [*ours.words, *(f"unseen {i}" for i in range(99))])
    said = [words_for_scoring(vocabulary.decode(caption)) for caption in ids]
    assert sum(a == b for a, b in zip(found, said, strict=True)) > 0.995 * len(texts)
    assert sum(a == words_for_scoring(b) for a, b in zip(found, texts, strict=True)) > 0.99 * len(texts)
    assert spelled(table, [[vocab.PAD, vocab.START, vocab.UNK, vocabulary.ids["."]]], ours.words) == [[]]


@pytest.mark.parametrize(
    ("tokenizer", "language", "by"),
    [("bpe", "Turkish", TOKENIZER), ("characters", "Chinese", CHARACTERS), ("characters", "French", TOKENIZER)],
    ids=["Turkish", "Chinese", "French"],
)
@pytest.mark.parametrize("with_end", [True, False])
def test_captions_of_any_tokens_get_what_the_evaluation_says_of_their_texts(tokenizer, language, by, with_end):
    """pycocoevalcap's CIDEr and BLEU-4 of the decoded captions, as the evaluation cuts them. Captions are references
    broken off, in which tokens were exchanged, among them for one of no reference."""
    texts = captions_in(language, 240)
    texts = [text.replace(" ", "") for text in texts] if language == "Chinese" else texts
    known = TOKENIZERS[tokenizer].train(texts, 200, 1)
    counts = Counter(token for text in [*texts, "Ł犬"] for token in known.tokenize(text))
    vocabulary, rng = vocab.build(counts, 1, None, known), random.Random(0)
    references = tuple(Reference(tuple(texts[4 * i : 4 * i + 4])) for i in range(60))

    def drawn(text: str) -> list[int]:
        ids = [vocabulary.ids[token] for token in known.tokenize(text)][: rng.randint(0, 40)]
        return [i if rng.random() < 0.9 else rng.randrange(len(vocab.SPECIAL), len(vocabulary)) for i in ids]

    ids = [drawn(reference.captions[0]) for reference in references]
    said = ScoredCaptions(tuple(range(60)), tuple(map(vocabulary.decode, ids)), references)
    assert said.tokenizer == by == tokenizer_for(texts)
    ours = counted.count(said.reference_words, with_end)
    assert len({word for words in said.candidate_words for word in words} - set(ours.words)) > 0
    found, padded = CaptionWords(vocabulary.decode, ours, CUTS[by]), np.zeros((60, 41), dtype=np.int64)
    for row, caption in zip(padded, ids, strict=True):
        row[: len(caption)] = caption
    cider, bleu = theirs(said.candidate_words, said.reference_words, with_end)
    assert cider.max() > 1
    lengths = np.array([len(caption) for caption in ids])
    for rows in (np.arange(60), np.arange(60)[::-1][:7], np.arange(0)):
        words = found.of(padded[rows], lengths[rows])
        words = words.with_end(np.ones(len(rows), dtype=bool)) if with_end else words
        rewards = Reward(ours, 1, 2).of(words, rows)
        np.testing.assert_allclose(rewards, cider[rows] + 2 * bleu[rows], rtol=0, atol=1e-9)


def spelled(table: TokenWords, captions: list[list[int]], words) -> list[list[str]]:
    longest = max(map(len, captions))
    padded = np.array([caption + [0] * (longest - len(caption)) for caption in captions])
    found = table.of(padded, np.array([len(caption) for caption in captions], dtype=np.int64))
    parts = np.split(found.numbers, np.cumsum(found.lengths)[:-1])
    return [[words[number] for number in part] for part in parts]


@pytest.mark.parametrize("with_end", [True, False])
def test_words_that_hardly_any_reference_ends_with(with_end):
    references = [[["a", "red", "cat", "on", "a", "mat"]] * 6 for _ in range(50)] + [[["rare", "a"], ["red"] * 2]] * 3
    ours = counted.count(references, with_end)
    named = {word for word, rarely in zip(ours.words, ours.rarely_ends, strict=True) if rarely}
    assert named == {"cat", "on", "a"}, "a mat ends captions, red 1 in 100, rare was hardly seen"
