"""RUN/report.html: one run on one page, and its pictures beside it."""

from collections.abc import Callable
from pathlib import Path

from captioning.config import Config, flat
from captioning.evaluation import provenance
from captioning.evaluation.scores import SHUFFLED
from captioning.inference.cost_profile import Profile
from captioning.inference.pointing import Pointing
from captioning.metrics.intervals import LEVEL, RESAMPLES
from captioning.report import pictures
from captioning.report.card import card
from captioning.report.charts import chart
from captioning.report.class_tables import class_section
from captioning.report.facts import Example, Facts
from captioning.report.markup import data_url, escape, looks, page, smaller, table
from captioning.report.reward_charts import reward_charts
from shards.files import write_atomically

_IN_SHEET = 6  # images in attention.png
_NO_WORDS = "(no words)"


def write(facts: Facts, costs: Profile | None) -> list[Path]:
    """Write report.html, loss.png and, where the decoder looks, attention.png into the run folder; their paths."""
    written = []
    if facts.curves.get("train/loss"):
        written.append(facts.run / "loss.png")
        pictures.curve(_curves(facts, "loss"), written[-1], f"Loss of {facts.run.resolve().name}", "nats a word")
    if facts.shows_attention:
        looking = [example for example in facts.examples if example.caption.attention is not None]
        shown = [example for example in looking if example.caption.words][:_IN_SHEET]
        written.append(facts.run / "attention.png")
        seen = [facts.predictor.preprocessing.seen(example.image) for example in shown]
        title = capital(facts.pointing) if facts.pointing else ""
        pictures.attention_sheet(seen, [example.caption for example in shown], written[-1], title)
    elif facts.pointing and not facts.pointing.is_believable:
        (facts.run / "attention.png").unlink(missing_ok=True)  # of an earlier report
    written.insert(0, facts.run / "report.html")
    write_atomically(written[0], html(facts, costs).encode())
    return written


def html(facts: Facts, costs: Profile | None) -> str:
    """The page."""
    sections: list[tuple[str, str, Callable[[], str]]] = [
        ("scores", "Scores", lambda: _scores(facts)),
        ("curves", "Curves", lambda: _charts(facts)),
        ("images", "Images", lambda: _images(facts)),
        ("classes", "Classes", lambda: class_section(facts)),
        ("card", "Model card", lambda: _card(facts)),
        ("cost", "Cost", lambda: _costs(facts, costs)),
        ("configuration", "Configuration", lambda: _configuration(facts)),
    ]
    made = [(name, title, content) for name, title, build in sections if (content := build())]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in made)
    body = "\n".join(f'<section id="{name}"><h2>{title}</h2>\n{content}</section>' for name, title, content in made)
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in facts.notes)
    title = facts.run.resolve().name
    return page(f"{title} – captioning report", f"{_head(facts)}\n<nav>{links}</nav>\n{notes}{body}")


def _head(facts: Facts) -> str:
    config = facts.predictor.config
    state, detail = facts.status
    parameters = sum(p.numel() for p in facts.predictor.model.parameters())
    tiles = [(f"{facts.predictor.step:,}", "optimizer steps"), (f"{parameters / 1e6:.1f} M", "parameters")]
    if facts.train is not None:
        tiles.append((f"{len(facts.train):,}", "training images"))
    if facts.evaluation is not None:
        images = f"{len(facts.evaluation.captioned):,} images"
        tiles += [(f"{facts.evaluation.scores[name]:.3f}", f"{name}, {images}") for name in ("BLEU-4", "CIDEr")]
    cards = "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles)
    return (
        f"<h1>{escape(facts.run.resolve().name)}</h1>\n"
        f'<p class="soft">{config.encoder.name} and {config.decoder.name}, images of {config.data.image_size} pixels, '
        f"{len(facts.predictor.vocabulary):,} words · {escape(state or 'no status')}{', ' if detail else ''}"
        f'{escape(detail)}</p>\n<div class="tiles">{cards}</div>'
    )


def _scores(facts: Facts) -> str:
    evaluation = facts.evaluation
    if evaluation is None:
        return ""
    classes = evaluation.classes  # they have a section of their own
    elsewhere = {metric.name for metric in classes.metrics} if classes else set()
    rows = []
    for metric in (metric for metric in evaluation.metrics if metric.name not in elsewhere):
        low, high = evaluation.intervals[metric.name]
        rows.append([escape(metric.name), f"{metric.value:.4f}", f"{low:.4f} – {high:.4f}"])
    left_out = [
        (len(evaluation.captioned.missing), "images could not be read or have no references, and are not scored"),
        (len(evaluation.captioned.empty), "captions have no word, and are scored as they are"),
    ]
    notes = "".join(f"<p>{count:,} {what}.</p>" for count, what in left_out if count)
    return (
        f"<p>{len(evaluation.captioned):,} validation images at step {facts.evaluated_step:,}, each captioned freely "
        "and scored once against all its references.</p>"
        f"{table(('metric', 'score', f'{LEVEL:.0%} interval'), rows, numbers=(1, 2))}"
        f'<p class="small soft">Intervals: percentile bootstrap over images, {RESAMPLES:,} resamples. Words by '
        f"{escape(evaluation.captioned.tokenizer)}. "
        f"“{SHUFFLED}” is what these captions get against other images' references.{_provenance(facts)}</p>{notes}"
    )


def _provenance(facts: Facts) -> str:
    about = provenance.kept(facts.run)
    return "" if about is None else f" {escape(provenance.in_words(about))}"


def _curves(facts: Facts, name: str) -> dict[str, list[tuple[int, float]]]:
    tags = {"training": f"train/{name}", "validation": f"val/{name}"}
    return {what: facts.curves[tag] for what, tag in tags.items() if facts.curves.get(tag)}


def _charts(facts: Facts) -> str:
    def scores(*names: str) -> dict[str, list[tuple[float, float]]]:
        return {n: [(row["step"], row[n]) for row in facts.validations if row.get(n) is not None] for n in names}

    top_k = facts.predictor.config.evaluate.top_k
    lrs = {tag.removeprefix("train/lr/"): points for tag, points in facts.curves.items() if tag.startswith("train/lr/")}
    charts = [
        *reward_charts(facts.curves),
        chart("Loss", _curves(facts, "loss"), "nats a word"),
        chart("Perplexity", _curves(facts, "perplexity"), may_be_log=True),
        chart(f"Top-{top_k} accuracy", _curves(facts, f"top{top_k}_accuracy"), "teacher forcing"),
        chart("BLEU and ROUGE", scores("BLEU-1", "BLEU-4", "ROUGE-L"), "validation"),
        chart("CIDEr", scores("CIDEr", SHUFFLED), "validation"),
        chart("Class accuracy", scores("class_accuracy"), "the class named in captions, validation"),
        chart("Learning rate", lrs),
        chart("Gradient norm", {"norm": facts.curves.get("train/gradient_norm", [])}, "before clipping"),
        chart("Speed", {"images/s": facts.curves.get("train/images_per_s", [])}, "images a second, all processes"),
        chart("Waiting for data", {"share": facts.curves.get("train/data_wait_fraction", [])}, "share of the time"),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _images(facts: Facts) -> str:
    groups = {
        "Best": (facts.best, "the highest CIDEr of their own"),
        "Typical": (facts.typical, "around the median"),
        "Worst": (facts.worst, "the lowest"),
    }
    if not facts.examples:
        return ""
    parts = []
    measured = f" {capital(facts.pointing)}." if facts.pointing else ""
    if facts.shows_attention:
        parts.append(
            "<p>Under each caption, word by word, where the model looked: the rest is greyed. A picture without grey: "
            f"it looked everywhere alike.{escape(measured)}</p>"
        )
    elif measured:
        parts.append(f"<p>Attention is not drawn, for it misleads here.{escape(measured)}</p>")
    for name, (examples, what) in groups.items():
        cards = "\n".join(_card_of(example, facts) for example in examples)
        parts.append(f'<h3>{name} <span class="soft small">{what}</span></h3>\n<div class="gallery">{cards}</div>')
    return "\n".join(parts)


def _card_of(example: Example, facts: Facts) -> str:
    said = example.caption.text or _NO_WORDS
    references = "".join(f"<li>{escape(text)}</li>" for text in example.references[:5])
    label = f" · {escape(example.label)}" if example.label else ""
    scored = (
        "" if example.scored == example.caption.text else f" of “{escape(example.scored or _NO_WORDS)}”"
    )  # by another device or precision
    looked = ""
    if facts.shows_attention:
        seen = data_url(smaller(facts.predictor.preprocessing.seen(example.image), 160), quality=80)
        looked = looks(seen, example.caption)
    return (
        f'<article class="card"><img alt="{escape(said)}" src="{data_url(smaller(example.image, 420), quality=82)}">'
        f'<div class="text"><p class="said">{escape(said)}</p>{looked}<ul>{references}</ul>'
        f'<p class="meta">{escape(str(example.image_id))}{label} · CIDEr {example.score:.2f}{scored}</p>'
        "</div></article>"
    )


def capital(pointing: Pointing) -> str:
    """What was measured, as the beginning of a sentence."""
    return str(pointing)[:1].upper() + str(pointing)[1:]


def _card(facts: Facts) -> str:
    return "\n".join(
        f"<h3>{heading}</h3>\n<ul>{''.join(f'<li>{escape(text)}</li>' for text in sentences)}</ul>"
        for heading, sentences in card(facts).items()
    )


def _costs(facts: Facts, costs: Profile | None) -> str:
    if costs is None:
        return ""
    own = next(i for i, cost in enumerate(costs.backbones) if cost.name == facts.predictor.config.encoder.name)
    rows = [
        [cost.name, f"{cost.parameters / 1e6:.2f}", f"{cost.flops / 1e9:.2f}", f"{cost.latency_ms:.1f}"]
        for cost in costs.backbones
    ]
    head = ("backbone", "parameters, M", "GFLOPs", "ms an image")
    return (
        f"<p>The whole model has {costs.parameters / 1e6:.2f} million parameters and captions one image in "
        f"{costs.caption_ms:.0f} ms, or {costs.images_per_s:.0f} images a second in batches of {costs.batch_size}.</p>"
        f"{table(head, rows, numbers=(1, 2, 3), own=own)}"
        f'<p class="small soft">One image of {costs.image_size} x {costs.image_size} pixels through each backbone '
        f"without its classifier; a multiplication and an addition are two FLOPs; median time. "
        f"Measured on: {escape(costs.where)}.</p>"
    )


def _configuration(facts: Facts) -> str:
    values, defaults = flat(facts.predictor.config), flat(Config())

    def rows(keys: list[str]) -> list[list[str]]:
        return [[f"<code>{key}</code>", _value(values[key]), _value(defaults[key])] for key in keys]

    differing = [key for key in values if values[key] != defaults[key]]
    return (
        f"{table(('setting', 'this run', 'default'), rows(differing))}\n<details><summary>All {len(values)} settings"
        f"</summary>{table(('setting', 'this run', 'default'), rows(list(values)))}</details>"
    )


def _value(value: object) -> str:
    return escape("null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))
