"""The report's section on classes, for images that have labels: what was named, what was confused, best and worst."""

import numpy as np

from captioning.metrics.class_scores import NO_CLASS, ClassScores
from captioning.metrics.ngrams import Integers
from captioning.report.facts import Facts
from captioning.report.markup import escape, table

_MOST_IN_MATRIX, _MOST_CONFUSIONS, _BEST_AND_WORST = 60, 15, 10
OTHER = "another class"


def class_section(facts: Facts) -> str:
    """Empty where images have no classes."""
    if facts.evaluation is None or facts.evaluation.classes is None:
        return ""
    classes, intervals = facts.evaluation.classes, facts.evaluation.intervals
    rows = [
        [escape(metric.name), f"{metric.value:.4f}", " – ".join(f"{end:.4f}" for end in intervals[metric.name])]
        for metric in classes.metrics
    ]
    matrix = _matrix(classes)
    if len(classes.names) > _MOST_IN_MATRIX:
        matrix = _confusions(classes) + matrix
    return (
        f"<p>The class named in each caption against the image's own, {len(classes.names)} classes.</p>"
        f"{table(('metric', 'score', '95% interval'), rows, numbers=(1, 2))}{matrix}{_best_and_worst(classes)}"
    )


def _matrix(classes: ClassScores) -> str:
    """Rows are the images' classes, columns what was named; the deeper the colour, the larger the row's share. Of many
    classes those with the most mistakes; the others are named in a column together."""
    names, confusion = _most_confused(classes)
    columns = [*names, *([OTHER] if len(names) < len(classes.names) else []), NO_CLASS]
    head = "".join(f'<th scope="col"><span>{escape(_spaced(name))}</span></th>' for name in columns)
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    body = ""
    for name, counts, of_row in zip(names, confusion.tolist(), shares.tolist(), strict=True):
        cells = "".join(
            f'<td style="background:rgba(var(--heat),{0.55 * share:.3f})" title="{escape(_spaced(name))} named '
            f'{escape(_spaced(column))}: {count}">{count or ""}</td>'
            for column, count, share in zip(columns, counts, of_row, strict=True)
        )
        body += f'<tr><th scope="row">{escape(_spaced(name))}</th>{cells}</tr>\n'
    return (
        '<h3>Confusion <span class="soft small">rows: the image\'s class; columns: the class named</span></h3>'
        f'<div class="scroll tall"><table class="confusion"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _most_confused(classes: ClassScores) -> tuple[list[str], Integers]:
    """At most _MOST_IN_MATRIX classes, by name, and their confusion [K, K + 1]; with a column before the last for what
    was named of the others, where there are others."""
    if len(classes.names) <= _MOST_IN_MATRIX:
        return list(classes.names), classes.confusion
    right = np.diag(classes.confusion)
    mistakes = classes.confusion.sum(axis=1) + classes.confusion[:, :-1].sum(axis=0) - 2 * right
    kept = np.sort(np.argsort(-mistakes, kind="stable")[:_MOST_IN_MATRIX])
    rows = classes.confusion[kept]
    others = rows[:, :-1].sum(axis=1) - rows[:, kept].sum(axis=1)
    return [classes.names[k] for k in kept], np.column_stack([rows[:, kept], others, rows[:, -1]])


def _confusions(classes: ClassScores) -> str:
    """The most frequent mistakes, where a matrix would not fit."""
    columns = [*classes.names, NO_CLASS]
    wrong = classes.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSIONS]
    places = [np.unravel_index(i, wrong.shape) for i in order]
    rows = [
        [escape(_spaced(classes.names[r])), escape(_spaced(columns[c])), f"{wrong[r, c]}"]
        for r, c in places
        if wrong[r, c]
    ]
    return f"<h3>Most frequent confusions</h3>{table(('class', 'named', 'images'), rows, numbers=(2,))}" if rows else ""


def _best_and_worst(classes: ClassScores) -> str:
    of_class = {row["class"]: row for row in classes.table()}
    ranked = [name for name, _ in classes.by_bleu4]
    keys = ("precision", "recall", "F1", "BLEU-4")

    def rows(names: list[str]) -> list[list[str]]:
        return [
            [escape(_spaced(n)), str(of_class[n]["images"]), *(f"{of_class[n][key]:.3f}" for key in keys)]
            for n in names
        ]

    head, numbers = ("class", "images", *keys), tuple(range(1, 6))
    if len(ranked) <= 2 * _BEST_AND_WORST:
        return f"<h3>Every class, by BLEU-4</h3>{table(head, rows(ranked), numbers)}"
    best, worst = ranked[:_BEST_AND_WORST], ranked[-_BEST_AND_WORST:][::-1]
    return (
        f"<h3>Best {_BEST_AND_WORST} classes, by BLEU-4</h3>{table(head, rows(best), numbers)}"
        f"<h3>Worst {_BEST_AND_WORST}</h3>{table(head, rows(worst), numbers)}"
    )


def _spaced(name: str) -> str:
    return name.replace("_", " ")
