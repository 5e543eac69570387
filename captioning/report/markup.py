"""What the pages share: one self-contained HTML document, light or dark as the reader's system is, no script."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from captioning.inference.predictor import Caption
from captioning.report.pictures import GREY, shade
from shards.errors import printable


def escape(text: str) -> str:
    """A text from elsewhere, for a page: neither markup nor what would act on the reader's screen."""
    return html.escape(printable(text))


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --paper: #ffffff; --card: #f6f8fa;
  --accent: #0b62c4; --c0: #0b62c4; --c1: #b35900; --c2: #1a7f37; --c3: #8250df; --heat: 11, 98, 196; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --line: #30363d; --paper: #0d1117;
  --card: #161b22; --accent: #6cb2ff; --c0: #6cb2ff; --c1: #f0a35e; --c2: #56d364; --c3: #c297ff;
  --heat: 88, 166, 255; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; margin: 0.4rem 0 0.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 0.8rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 0.5rem; }
p { max-width: 72ch; margin: 0.5rem 0; } .soft { color: var(--soft); } small, .small { font-size: 0.86rem; }
a { color: var(--accent); } nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 0.8rem 0 0; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.88em; }
.scroll { overflow-x: auto; } .tall { overflow: auto; max-height: 80vh; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.32rem 0.9rem 0.32rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: 0.86rem; } td.number, th.number { text-align: right;
  white-space: nowrap; }
@media (max-width: 520px) { td, th { padding-right: 0.55rem; } td { font-size: 0.9rem; } }
tr.own td { font-weight: 650; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0.8rem; margin: 1.1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.75rem 0.9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; } .tile span { color: var(--soft); font-size: 0.86rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(310px, 100%), 1fr)); gap: 1.6rem 2rem;
  align-items: end; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 0.88rem; margin-bottom: 0.2rem; }
svg.chart { width: 100%; height: auto; display: block; } .chart text { fill: var(--soft); font-size: 11px; }
.chart .grid { stroke: var(--line); stroke-width: 1; } .chart path { fill: none; stroke-width: 2; }
.key { white-space: nowrap; margin-left: 0.7em; }
.key i { display: inline-block; width: 1.1em; height: 3px; border-radius: 2px; vertical-align: 0.25em;
  margin-right: 0.35em; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 1.1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 360px; }
.card > img { width: 100%; aspect-ratio: 4 / 3; object-fit: contain; display: block; background: #0002; }
.card .text { padding: 0.7rem 0.9rem 0.9rem; overflow-wrap: anywhere; } .card .said { font-weight: 600; margin: 0; }
.card ul { margin: 0.4rem 0 0; padding-left: 1.1rem; color: var(--soft); font-size: 0.9rem; }
.card .meta { color: var(--soft); font-size: 0.84rem; margin: 0.35rem 0 0; }
.looks { display: grid; grid-template-columns: repeat(auto-fill, minmax(70px, 1fr)); gap: 0.5rem; margin: 0.8rem 0 0;
  padding: 0; list-style: none; }
.looks li { text-align: center; font-size: 0.78rem; line-height: 1.3; }
.looks .seen { display: block; aspect-ratio: 1; border-radius: 6px; background: var(--picture) 0 0 / cover;
  overflow: hidden; margin-bottom: 0.15rem; }
.looks img { width: 100%; height: 100%; display: block; }
details { margin: 0.8rem 0; } summary { cursor: pointer; color: var(--accent); }
.confusion td, .confusion th { border: 0; padding: 0; font-size: 0.72rem; text-align: center; min-width: 1.75rem;
  height: 1.75rem; vertical-align: middle; color: var(--ink); } .confusion tbody th { text-align: right;
  position: sticky; left: 0; background: var(--paper); padding-right: 0.5rem; white-space: nowrap; font-weight: 400; }
.confusion thead th { vertical-align: bottom; position: sticky; top: 0; background: var(--paper); height: auto;
  font-weight: 400; } .confusion thead span { writing-mode: vertical-rl; transform: rotate(180deg);
  padding-top: 0.3rem; white-space: nowrap; }
.note { border-left: 3px solid var(--accent); padding: 0.1rem 0 0.1rem 0.9rem; }
@media print { .card { break-inside: avoid; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document; nothing in it is fetched from anywhere."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), own: int | None = None
) -> str:
    """Cells are HTML; ``numbers`` are the columns set flush right, ``own`` the row set in bold."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    own_row = ' class="own"'
    body = "\n".join(
        f"<tr{own_row if number == own else ''}>{row(cells, 'td')}</tr>" for number, cells in enumerate(rows)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{row(head, "th")}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def data_url(image: Image.Image, kind: str = "JPEG", **options: int) -> str:
    """An image as a data: URL."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def smaller(image: Image.Image, longest: int) -> Image.Image:
    """A copy that fits into ``longest`` pixels each way."""
    copy = image.copy()
    copy.thumbnail((longest, longest))
    return copy


def looks(picture: str, caption: Caption) -> str:
    """Word by word where the model looked: ``picture``, the URL of the square image it saw, greyed elsewhere.

    Empty where the decoder does not look. The picture stands in the page once; each word adds a small veil.
    """
    if caption.attention is None or not caption.words:
        return ""
    items = "\n".join(
        f'<li><span class="seen"><img alt="where it looked for {escape(word)}" src="{_veil(weights)}"></span>'
        f"{escape(word)}</li>"
        for word, weights in zip(caption.words, caption.attention.numpy(), strict=True)
    )
    return f'<ol class="looks" style="--picture: url(\'{picture}\')">\n{items}\n</ol>'


def _veil(weights: np.ndarray) -> str:
    """Grey of the opacity ``shade`` gives, as a PNG of 32 pixels."""
    alpha = (255 * shade(weights, 32)).round().astype(np.uint8)
    grey = np.full_like(alpha, round(255 * GREY))
    return data_url(Image.fromarray(np.stack([grey, alpha], axis=-1), "LA"), "PNG", compress_level=9)
