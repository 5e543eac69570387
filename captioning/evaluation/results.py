"""Captions beside the references they are scored against: a run's own, or anyone's file in COCO's results format."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from captioning.metrics.ngrams import Tokens
from captioning.metrics.ptb import CUTS, tokenizer_for
from shards import index as shard_index
from shards import sources
from shards.errors import InputError, listed
from shards.files import parse_json
from shards.index import Index

ImageId = int | str


@dataclass(frozen=True)
class Reference:
    """What is known of an image: its captions, and its class where there are classes."""

    captions: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True)
class ScoredCaptions:
    """What is scored: N images, a caption each, their references; and which images lack a caption, or references."""

    image_ids: tuple[ImageId, ...]
    captions: tuple[str, ...]
    references: tuple[Reference, ...]
    missing: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def tokenizer(self) -> str:
        """What its words are cut by; the references choose it, since a model could choose its scores."""
        return tokenizer_for(text for known in self.references for text in known.captions)

    def words(self, caption: str) -> Tokens:
        return CUTS[self.tokenizer](caption)

    @cached_property
    def candidate_words(self) -> list[Tokens]:
        return [self.words(caption) for caption in self.captions]

    @cached_property
    def reference_words(self) -> list[list[Tokens]]:
        return [[self.words(caption) for caption in known.captions] for known in self.references]

    @property
    def empty(self) -> list[ImageId]:
        """Images whose caption has no word; they are scored like any other."""
        return [i for i, words in zip(self.image_ids, self.candidate_words, strict=True) if not words]

    def subset(self, rows: list[int]) -> "ScoredCaptions":
        """Some of the images."""
        chosen = (tuple(values[i] for i in rows) for values in (self.image_ids, self.captions, self.references))
        return ScoredCaptions(*chosen)  # type: ignore[arg-type]

    def results(self) -> list[dict[str, ImageId]]:
        """COCO results format (https://cocodataset.org/#format-results): a list of image_id and caption."""
        return [{"image_id": i, "caption": c} for i, c in zip(self.image_ids, self.captions, strict=True)]


def read_references(path: Path) -> dict[ImageId, Reference]:
    """References by image id, from COCO captions (captions_val2017.json) or a split's NAME.json.

    Raises:
        InputError: when the file is neither, or two images have one id.
    """
    document = _json(path)
    if isinstance(document, dict) and "shardlist" in document:
        return references_of(shard_index.load(path))
    return {record.image_id: Reference(record.captions) for record in sources.coco(Path(), path).records}


def references_of(index: Index) -> dict[ImageId, Reference]:
    """A split's references by image id; those of an image that has none are empty.

    Raises:
        InputError: when two images have one id.
    """
    texts = index.texts()
    twice = [repr(i) for i, count in Counter(text.image_id for text in texts).items() if count > 1]
    if twice:
        raise InputError(f"{index.path}: {len(twice)} image id(s) belong to several images:\n{listed(twice)}")
    return {text.image_id: Reference(text.captions, text.label) for text in texts}


def read_results(path: Path) -> dict[ImageId, str]:
    """Captions by image id from a file in COCO's results format.

    Raises:
        InputError: when it is not a list of ``{"image_id": ..., "caption": ...}``, is empty, or has an id twice.
    """
    document = _json(path)
    wanted = 'a list of {"image_id": 42, "caption": "A cat."} is wanted (COCO results format)'
    if not isinstance(document, list):
        raise InputError(f"{path} holds no list; {wanted}.")
    for number, entry in enumerate(document):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("caption"), str)
            or not isinstance(entry.get("image_id"), int | str)
            or isinstance(entry["image_id"], bool)
        ):
            raise InputError(f"{path}: entry {number} is {json.dumps(entry)[:120]}; {wanted}.")
    if not document:
        raise InputError(f"{path} holds no caption; {wanted}.")
    twice = [repr(i) for i, count in Counter(entry["image_id"] for entry in document).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {len(twice)} image id(s) have several captions:\n{listed(twice)}\nKeep one each.")
    return {entry["image_id"]: entry["caption"] for entry in document}


def match_references(
    captions: Mapping[ImageId, str], references: Mapping[ImageId, Reference], where: Path
) -> ScoredCaptions:
    """Captions beside their references, in the references' order; missing: images that lack the one or the other.

    Raises:
        InputError: listing the captioned images that the references do not know; when nothing is left to score.
    """
    unknown = [image for image in captions if image not in references]
    if unknown:
        known = next(iter(references))
        of_other_kind = all(isinstance(image, str) for image in unknown) and isinstance(known, int)
        hint = " The references number their images; these ids are texts." if of_other_kind else ""
        raise InputError(
            f"{where}: {len(unknown):,} of its {len(captions):,} images have no references (an image id of the "
            f"references is {known!r}):\n{listed(map(repr, unknown))}\nAre these the captions of another split?{hint}"
        )
    with_references = [image for image, known in references.items() if known.captions]
    images = [image for image in with_references if image in captions]
    if not images:
        raise InputError(f"No image of {where} has a caption to compare with: there is nothing to score.")
    missing = [str(image) for image in with_references if image not in captions]
    missing += [f"{image}: it has no references" for image in captions if not references[image].captions]
    return ScoredCaptions(
        tuple(images), tuple(captions[i] for i in images), tuple(references[i] for i in images), tuple(missing)
    )


def in_common(a: ScoredCaptions, b: ScoredCaptions) -> tuple[ScoredCaptions, ScoredCaptions]:
    """Both sets of captions, for the images that have a caption in both, in one order.

    Raises:
        InputError: when they have no image in common, or an image has other references in one than in the other.
    """
    places = {image: i for i, image in enumerate(b.image_ids)}
    pairs = [(i, places[image]) for i, image in enumerate(a.image_ids) if image in places]
    if not pairs:
        raise InputError("The two have no image in common: there is nothing to compare.")
    differing = [a.image_ids[i] for i, j in pairs if a.references[i].captions != b.references[j].captions]
    if differing:
        raise InputError(
            f"{len(differing)} images have other references in the one than in the other:\n{listed(differing)}\n"
            "Compare captions of one split; --captions gives both the same references."
        )
    return a.subset([i for i, _ in pairs]), b.subset([j for _, j in pairs])


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read as JSON: {why}.") from error
