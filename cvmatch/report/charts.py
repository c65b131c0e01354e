"""Numbers in, small SVG charts out; the page's CSS colours them, for light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Number = float | int  # beartype does not take an int for a float
Point = tuple[Number, Number]

WIDTH, HEIGHT = 380, 230
"""Size of a chart in its own units, about CSS pixels."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
_NAME, _CHARACTER = 28, 6.6  # room for the name of the upward axis, and for a digit at 11 px
_LOG_FROM = 30.0  # ratio of largest to smallest value from which an axis is logarithmic
_TICKS = 5


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    name: str
    """What the legend calls it, such as "train"."""
    points: Sequence[Point]
    """(x, y), in order of x; points that are not finite are left out."""


@dataclass(frozen=True)
class _Axis:
    """Values -> positions between `start` and `end`, in the chart's units."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool
    ticks: tuple[Number, ...]

    def __call__(self, value: Number) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def lines(curves: Sequence[Curve], x: str, y: str) -> str:
    """SVG of `curves` over common axes named `x` and `y`; an empty string without finite points."""
    kept = [(curve.name, _finite(curve.points)) for curve in curves]
    every = [point for _, points in kept for point in points]
    if not every:
        return ""
    across, up = _axes(every, whole=all(float(p[0]).is_integer() for p in every))
    marks = []
    for index, (name, points) in enumerate(kept):
        if not points:
            continue
        places = [f"{across(a):.1f},{up(b):.1f}" for a, b in points]
        kind = f"series s{index % 4}"
        marks.append(f'<polyline class="{kind}" points="{" ".join(places)}"/>')
        if len(points) <= 40:  # more would be a thick line
            marks += [
                f'<circle class="{kind}" cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.4">'
                f"<title>{escape(name)}: {number(b)} at {number(a)}</title></circle>"
                for p, (a, b) in zip(places, points, strict=True)
            ]
    label = f"{y} over {x}: " + "; ".join(
        f"{name} from {number(points[0][1])} to {number(points[-1][1])}"
        for name, points in kept
        if points
    )
    return _svg("".join(marks), across, up, x, y, label)


def scatter(points: Sequence[Point], best: int, x: str, y: str) -> str:
    """SVG of `points` with number `best` marked; an empty string without finite points."""
    kept = [(index, point) for index, point in enumerate(points) if _is_finite(point)]
    if not kept:
        return ""
    across, up = _axes([point for _, point in kept])
    marks = [
        f'<circle class="dot{" best" if index == best else ""}" cx="{across(a):.1f}" '
        f'cy="{up(b):.1f}" r="{6 if index == best else 4}">'
        f"<title>{number(b)} at {number(a)}</title></circle>"
        for index, (a, b) in sorted(kept, key=lambda item: item[0] == best)  # the best on top
    ]
    return _svg("".join(marks), across, up, x, y, f"{y} over {x}, {len(kept)} points")


def number(value: Number) -> str:
    """A number for a person: about three digits, no exponent where it can be helped."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2g}"


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if _is_finite(point)]


def _axes(points: Sequence[Point], whole: bool = False) -> tuple[_Axis, _Axis]:
    up = _axis([p[1] for p in points], HEIGHT - _BOTTOM, _TOP, whole=False)
    widest = max((len(number(tick)) for tick in up.ticks), default=0)
    left = max(_LEFT, _NAME + _CHARACTER * widest)  # ticks lie beside the axis' name, not on it
    return _axis([p[0] for p in points], left, WIDTH - _RIGHT, whole), up


def _axis(values: Sequence[Number], start: Number, end: Number, whole: bool) -> _Axis:
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM and not whole:
        low, high = low / 1.15, high * 1.15
        return _Axis(low, high, start, end, True, tuple(_decades(low, high)))
    if not whole:
        room = 0.06 * (high - low) or 0.1 * abs(low) or 1.0
        low, high = low - room, high + room
    step = _step((high - low) / _TICKS)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return _Axis(low, high, start, end, False, tuple(i * step for i in range(first, last + 1)))


def _step(rough: Number) -> float:
    """The nearest round step (1, 2, 5 or 10 times a power of ten) that is not below `rough`."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _decades(low: Number, high: Number) -> list[float]:
    """Round values of a logarithmic axis: powers of ten, and 2 and 5 of them where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [m * 10.0**p for p in powers for m in factors if low <= m * 10.0**p <= high]


def _svg(marks: str, across: _Axis, up: _Axis, x: str, y: str, label: str) -> str:
    left, floor = across.start, HEIGHT - _BOTTOM
    middle = (left + WIDTH - _RIGHT) / 2
    parts = [
        f'<line class="grid" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{up(t):.1f}" y2="{up(t):.1f}"/>'
        f'<text x="{left - 7}" y="{up(t) + 4:.1f}" text-anchor="end">{number(t)}</text>'
        for t in up.ticks
    ]
    parts += [
        f'<text x="{across(t):.1f}" y="{floor + 16}" text-anchor="middle">{number(t)}</text>'
        for t in across.ticks
    ]
    parts.append(
        f'<line class="axis" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'
        f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x)}{_scale(across)}</text>"
        f'<text class="name" transform="translate(11 {(_TOP + floor) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y)}{_scale(up)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}{marks}</svg>"
    )


def _scale(axis: _Axis) -> str:
    return " (log)" if axis.log else ""
