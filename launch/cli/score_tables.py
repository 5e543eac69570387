"""Scores as tables for the terminal."""

from rich.console import Console
from rich.table import Table

from captioning.evaluation.results import ScoredCaptions
from captioning.evaluation.scores import Evaluation
from captioning.metrics.class_scores import ClassScores
from captioning.metrics.intervals import Difference
from shards.errors import listed, printable

_MOST_CLASSES = 10  # shown at either end

console = Console(highlight=False, markup=False)


def show_scores(title: str, evaluation: Evaluation) -> None:
    """Every score with its interval; below, what was left out and why."""
    table = Table("metric", "score", "95 % interval", title=title, title_justify="left")
    for metric in evaluation.metrics:
        low, high = evaluation.intervals[metric.name]
        table.add_row(metric.name, f"{metric.value:.4f}", f"{low:.4f} to {high:.4f}")
    console.print(table)
    words = evaluation.captioned.tokenizer
    console.print(f"CIDEr is what the COCO evaluation calls CIDEr. Words by {words}, intervals by bootstrap.")
    if evaluation.classes:
        _show_classes(evaluation.classes)
    show_left_out(evaluation)


def show_left_out(evaluation: Evaluation) -> None:
    """What was not scored, or not as it should be."""
    for name, reason in evaluation.skipped.items():
        console.print(f"{name} skipped: {printable(reason)}", soft_wrap=True)
    missing, empty = evaluation.captioned.missing, evaluation.captioned.empty
    if missing:
        console.print(f"{len(missing):,} images not scored:\n{listed(missing)}", soft_wrap=True)
    if empty:
        console.print(f"{len(empty):,} captions without a word, scored as they are:\n{listed(empty)}", soft_wrap=True)


def show_teacher_forcing(forced: dict[str, float]) -> None:
    """Loss, perplexity and accuracy on the references themselves, which are no scores of the captions."""
    said = ", ".join(f"{name} {value:.4f}" for name, value in forced.items())
    console.print(f"Teacher forcing, no score, a word of the references: {said}.")


def show_differences(names: tuple[str, str], captioned: ScoredCaptions, differences: list[Difference]) -> None:
    """Two sets of captions side by side."""
    console.print(f"A  {names[0]}\nB  {names[1]}", soft_wrap=True)
    table = Table(
        "metric", "A", "B", "B - A", "95 % interval", "p", title=f"{len(captioned):,} images", title_justify="left"
    )
    for d in differences:
        interval = f"{d.interval[0]:+.4f} to {d.interval[1]:+.4f}"
        table.add_row(d.name, f"{d.a:.4f}", f"{d.b:.4f}", f"{d.b - d.a:+.4f}", interval, f"{d.p_value:.4f}")
    console.print(table)
    console.print(f"Words by {captioned.tokenizer}, intervals by paired bootstrap, p by approximate randomisation.")


def _show_classes(classes: ClassScores) -> None:
    rows = {str(row["class"]): row for row in classes.table()}
    ranked = [name for name, _ in classes.by_bleu4]
    for title, names in _ends(ranked):
        table = Table("class", "images", "precision", "recall", "F1", "BLEU-4", title=title, title_justify="left")
        for name in names:
            _, images, *scores = rows[name].values()
            table.add_row(name, str(images), *(f"{score:.4f}" for score in scores))
        console.print(table)
    unnamed = int(classes.confusion[:, -1].sum())
    console.print(
        f"{len(ranked):,} classes; {unnamed:,} of {int(classes.confusion.sum()):,} captions name none of them"
    )


def _ends(ranked: list[str]) -> list[tuple[str, list[str]]]:
    if len(ranked) <= 2 * _MOST_CLASSES:
        return [("classes by BLEU-4", ranked)]
    best, worst = ranked[:_MOST_CLASSES], ranked[-_MOST_CLASSES:]
    return [(f"best {_MOST_CLASSES} classes by BLEU-4", best), (f"worst {_MOST_CLASSES}", worst)]
