"""Everything a report tells, gathered from a run folder; what is not to be had is a note, not an error."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from captioning.data.splits import saved_split
from captioning.data.stored_features import stored_features
from captioning.evaluation.results import match_references, read_results, references_of
from captioning.evaluation.scores import Evaluation, evaluate
from captioning.inference import pointing
from captioning.inference.pointing import Pointing
from captioning.inference.predictor import Caption, Predictor, opened
from captioning.runs.run_folder import RunFolder
from shards import index as shard_index
from shards.errors import InputError
from shards.files import parse_json
from shards.index import Index
from shards.reader import Sample, UnreadableSample, read_sample

SELECTION = "CIDEr"  # what images are ranked by
_CAPTIONS = re.compile(r"captions-val-step-(\d+)\.json")


@dataclass(frozen=True)
class Example:
    """An image of the validation split, what was said of it and what people said."""

    image_id: int | str
    image: Image.Image
    caption: Caption
    references: tuple[str, ...]
    scored: str  # the caption that was scored, which training may have written in another precision
    score: float  # CIDEr of it alone
    label: str | None


@dataclass(frozen=True)
class Facts:
    """A run as its report shows it."""

    run: Path
    predictor: Predictor
    status: tuple[str, str]
    curves: dict[str, list[tuple[int, float]]]  # TensorBoard tag -> (step, value)
    validations: list[dict[str, Any]]  # lines of scores.jsonl
    train: Index | None
    val: Index | None
    evaluation: Evaluation | None
    evaluated_step: int | None
    pointing: Pointing | None = None  # where somebody measured what attention points at
    best: list[Example] = field(default_factory=list)
    typical: list[Example] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def examples(self) -> list[Example]:
        return [*self.best, *self.typical, *self.worst]

    @property
    def shows_attention(self) -> bool:
        """Whether attention is drawn: not where it was measured to point beside what is named."""
        looks = any(example.caption.attention is not None and example.caption.words for example in self.examples)
        return looks and (self.pointing is None or self.pointing.is_believable)


def read_run(run: Path, which: str = "best", examples: int = 6, device: str | None = None) -> Facts:
    """Facts of a run and of its checkpoint ``which``; ``examples`` images each are shown as best, typical and worst.

    Raises:
        InputError: when it is no run folder, or has no such checkpoint.
    """
    if not (run / "checkpoints").is_dir():
        raise InputError(f"{run} is not a run folder: it has no checkpoints. A report tells of a run.")
    notes: list[str] = []
    predictor = Predictor.from_checkpoint(run, which, device)
    config = predictor.config
    train, val = _index(config.data.train, notes), _index(config.data.val, notes)
    evaluation, step = _evaluation(run, predictor.step, val, notes)
    facts = Facts(
        run, predictor, RunFolder(run).status(), curves_of(run), validations_of(run), train, val, evaluation, step,
        pointing.load(run), notes=notes,
    )  # fmt: skip
    if val is not None and stored_features(val) is not None:
        notes.append(f"No images are shown: {config.data.val} holds features of them.")
    elif evaluation is not None and val is not None:
        chosen = _chosen(evaluation, examples)
        if step != predictor.step:
            notes.append(f"The scores are of step {step}, the captions shown with attention of step {predictor.step}.")
        for rows, shown in zip(chosen, (facts.best, facts.typical, facts.worst), strict=True):
            shown += _examples(rows, evaluation, predictor, val, notes)
    return facts


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of RUN/tensorboard by tag, as TensorBoard itself reads them: steps a resumed run repeated count once."""
    if not (run / "tensorboard").is_dir():
        return {}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={SCALARS: 0})
    events.Reload()
    points_of = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()[SCALARS]}
    return {tag: sorted(points.items()) for tag, points in points_of.items()}


def validations_of(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/scores.jsonl; one that is half written is left out."""
    path, entries = run / "scores.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entries.append(parse_json(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]


def _index(path: str | None, notes: list[str]) -> Index | None:
    try:
        return shard_index.load(path) if (path := saved_split(path)) else None
    except InputError as error:
        notes.append(f"Left out, since a split is not here: {error}")
        return None


def _evaluation(run: Path, step: int, val: Index | None, notes: list[str]) -> tuple[Evaluation | None, int | None]:
    """Scores of the checkpoint's captions of the validation split; of the newest captions where it has none."""
    captioned = {int(found[1]): path for path in run.iterdir() if (found := _CAPTIONS.fullmatch(path.name))}
    if val is None or not captioned:
        if not captioned:
            notes.append(f"No captions of the validation split: `captioning evaluate {run}` writes them.")
        return None, None
    chosen = step if step in captioned else max(captioned)
    try:
        results = read_results(captioned[chosen])
        return evaluate(match_references(results, references_of(val), captioned[chosen])), chosen
    except InputError as error:
        notes.append(f"Scores left out: {error}")
        return None, None


def _chosen(evaluation: Evaluation, count: int) -> tuple[list[int], list[int], list[int]]:
    """Rows of the best, the middle and the worst images, no image twice."""
    each = next(metric.each for metric in evaluation.metrics if metric.name == SELECTION)
    order = sorted(range(len(each)), key=lambda row: (-float(each[row]), row))
    count = min(count, len(order) // 3) or 1
    middle = (len(order) - count) // 2
    rest = order[count:]
    return order[:count], order[middle : middle + count] if len(order) > 2 else [], rest[-count:][::-1]


def _examples(
    rows: list[int], evaluation: Evaluation, predictor: Predictor, val: Index, notes: list[str]
) -> list[Example]:
    captioned = evaluation.captioned
    each = next(metric.each for metric in evaluation.metrics if metric.name == SELECTION)
    samples = {text.image_id: number for number, text in enumerate(val.texts())}
    images: list[tuple[int, Any]] = []
    for row in rows:
        sample = _sample(val, samples[captioned.image_ids[row]])
        if isinstance(sample, UnreadableSample | InputError):
            notes.append(f"An image is not shown: {sample}")
        else:
            images.append((row, sample.image_bytes))
    said = predictor.each(data for _, data in images)
    examples = []
    for (row, data), caption in zip(images, said, strict=True):
        if isinstance(caption, InputError):
            notes.append(f"An image is not shown: {caption}")
            continue
        known = captioned.references[row]
        image_id, scored, score = captioned.image_ids[row], captioned.captions[row], float(each[row])
        examples.append(Example(image_id, opened(data), caption, known.captions, scored, score, known.label))
    return examples


def _sample(index: Index, number: int) -> Sample | UnreadableSample | InputError:
    try:
        return read_sample(index, number)
    except InputError as error:  # its shard is gone
        return error
