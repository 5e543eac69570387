"""Line charts as SVG in the page: they take the page's colours, light or dark, and its width."""

import math
from collections.abc import Mapping, Sequence

from captioning.report.markup import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 230, 46, 10, 8, 24
_MOST_POINTS = 240


def chart(title: str, series: Mapping[str, Points], about: str = "", may_be_log: bool = False) -> str:
    """A figure of lines over optimizer steps, at most four; logarithmic, if it may be, where values spread
    more than tenfold.

    Long series are averaged over neighbours. Empty where there is nothing to draw.
    """
    drawn = {
        name: _thinned([(x, y) for x, y in points if math.isfinite(y)]) for name, points in list(series.items())[:4]
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    values = [y for points in drawn.values() for _, y in points]
    logarithmic = may_be_log and min(values) > 0 and max(values) / min(values) > 10
    ticks = _log_ticks(min(values), max(values)) if logarithmic else _ticks(min(values), max(values), 4)
    low, high = (math.log(ticks[0]), math.log(ticks[-1])) if logarithmic else (ticks[0], ticks[-1])
    steps = [x for points in drawn.values() for x, _ in points]
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x_of(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        height = (math.log(value) if logarithmic else value) - low
        return _HEIGHT - _BOTTOM - height / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in _ticks(first, last, 4):
        if first <= tick <= last:
            anchor = "end" if tick > last - (last - first) * 0.05 else "middle"
            parts.append(f'<text x="{x_of(tick):.1f}" y="{_HEIGHT - 7}" text-anchor="{anchor}">{_short(tick)}</text>')
    for number, (name, points) in enumerate(drawn.items()):
        places = [(x_of(x), y_of(y)) for x, y in points]
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<path d="{path}" stroke="var(--c{number})"><title>{escape(name)}</title></path>')
        if len(points) <= 20:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--c{number})">'
                f"<title>{escape(name)} at step {step:g}: {value:.4g}</title></circle>"
                for (x, y), (step, value) in zip(places, points, strict=True)
            ]
    says = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in drawn.items())
    keys = "".join(
        f' <span class="key"><i style="background:var(--c{number})"></i>{escape(name)}</span>'
        for number, name in enumerate(drawn)
    )
    notes = "".join(f" · {escape(note)}" for note in (about, "logarithmic" if logarithmic else "") if note)
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong>{notes}{keys if len(drawn) > 1 else ''}</figcaption>\n"
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over steps: '
        f'{escape(says)}">{"".join(parts)}</svg></figure>'
    )


def _thinned(points: Points) -> Points:
    """At most _MOST_POINTS points, each the mean of its neighbours."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    spread = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(spread / about))
    step = next(unit * m for m in (1, 2, 5, 10) if spread / (unit * m) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _short(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.6g}" if size >= 1e-3 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
