"""The model card: what the model was made from and for, and where it ends, said from the facts of the run.

After Mitchell et al., "Model Cards for Model Reporting" (https://arxiv.org/abs/1810.03993).
"""

from collections import Counter

from captioning.data.vocabulary import SPECIAL
from captioning.evaluation.scores import SHUFFLED
from captioning.report.facts import Facts


def card(facts: Facts) -> dict[str, list[str]]:
    """Heading -> sentences, plain text."""
    return {
        "Model": _model(facts),
        "Training data": _data(facts),
        "Intended use": [
            "A draft of an English sentence about a photograph or drawing like those it was trained on: for search, "
            "for sorting, as a first version of a text that a person reads before it is used."
            if _is_english(facts)
            else "A draft of a sentence about an image like those it was trained on, in their captions' language.",
            "Not for decisions about people, for safety, or as the only description given to someone who cannot see "
            "the image: a caption is fluent also where it is wrong.",
        ],
        "Limits": _limits(facts),
    }


def _model(facts: Facts) -> list[str]:
    config, words = facts.predictor.config, len(facts.predictor.vocabulary)
    weights = f"begun from {config.encoder.weights}" if config.encoder.weights else "begun from random weights"
    trained = "frozen" if config.encoder.trainable == "none" else f"trained from {config.encoder.trainable} up"
    if config.encoder.trainable == "all":
        trained = "trained in all its stages"
    kinds = {
        "lstm": "an LSTM that sees the image once, as one vector",
        "attention": "an LSTM that looks at a place of the image for every word (soft attention)",
        "updown": "an attention LSTM below a language LSTM (Up-Down)",
        "transformer": "a Transformer that attends to the image for every word",
    }
    search = (
        f"beam search over {config.evaluate.beam_size} captions" if config.evaluate.beam_size > 1 else "greedy search"
    )
    return [
        f"{config.encoder.name} ({weights}, {trained}) and {kinds[config.decoder.name]}; "
        f"{words - len(SPECIAL):,} words.",
        f"Trained for {facts.predictor.step:,} optimizer steps of {config.train.global_batch_size} images, seed "
        f"{config.seed}. Captions by {search}.",
    ]


def _data(facts: Facts) -> list[str]:
    said = []
    for name, index in (("training", facts.train), ("validation", facts.val)):
        if index is None:
            continue
        texts = index.texts()
        captions = sum(len(text.captions) for text in texts)
        classes = len({text.label for text in texts if text.label is not None})
        labels = f" of {classes} classes" if classes else ""
        said.append(
            f"{name.capitalize()}: {len(index):,} images{labels} with {captions:,} captions; "
            f"fingerprint {index.fingerprint[:12]}."
        )
        skipped = len(index.document.get("skipped", []))
        if skipped:
            said.append(f"{skipped:,} unreadable images were skipped when the {name} split was packed.")
    least = facts.predictor.config.data.min_word_freq
    often = f", words seen at least {least} times" if least > 1 else ""
    said.append(f"The vocabulary comes from the training captions alone{often}.")
    return said


def _limits(facts: Facts) -> list[str]:
    data, said = facts.predictor.config.data, []
    if facts.evaluation is not None:
        captioned = facts.evaluation.captioned
        vocabulary = facts.predictor.vocabulary
        known, tokenize = set(vocabulary.words), vocabulary.tokenizer.tokenize
        words = Counter(
            word for known_of in captioned.references for text in known_of.captions for word in tokenize(text)
        )
        unknown = sum(count for word, count in words.items() if word not in known)
        said.append(
            "Every word people used for the validation images is in its vocabulary."
            if not unknown
            else f"{unknown / max(1, words.total()):.1%} of the words people used for the validation images are not in "
            "its vocabulary: it can never say them."
        )
        distinct, used = len(set(captioned.captions)), {w for text in captioned.captions for w in tokenize(text)}
        said.append(
            f"For {len(captioned):,} validation images it wrote {distinct:,} different captions with {len(used):,} "
            f"different words; people used {len(words):,}."
        )
        scores = facts.evaluation.scores
        if scores.get(SHUFFLED):
            said.append(
                f"The same captions beside the wrong images score {scores[SHUFFLED]:.2f} CIDEr, beside the right "
                f"ones {scores['CIDEr']:.2f}: the difference is what it owes to looking."
            )
    said += [
        f"It sees the central square of an image at {data.image_size} x {data.image_size} pixels: what lies at the "
        "ends of a wide or tall image, or is small, is not seen.",
        f"Captions end after {data.max_words} words.",
        "It repeats what its training captions say, their errors and their prejudices about people included.",
    ]
    return said


def _is_english(facts: Facts) -> bool:
    return {"a", "the"} <= set(facts.predictor.vocabulary.words)
