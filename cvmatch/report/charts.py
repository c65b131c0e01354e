"""Numbers in, small SVG charts out, drawn by matplotlib; the page's CSS colours them.

Each colour of a chart is a CSS variable of the page, so that it is legible on light and dark.
"""

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Number = float | int  # beartype does not take an int for a float
Point = tuple[Number, Number]

_INCHES = (3.9, 2.35)  # about 380 x 230 CSS pixels at most
_LOG_FROM = 30.0  # ratio of largest to smallest value from which an axis is logarithmic
_DOTS = 40  # points of a curve up to which each gets a dot; more would be a thick line
_COLORS = {
    "text": ("#000001", "var(--soft)"),
    "grid": ("#000002", "var(--line)"),
    "card": ("#000003", "var(--card)"),
    "best": ("#000004", "var(--right)"),
    "s0": ("#000010", "var(--s0)"),
    "s1": ("#000011", "var(--s1)"),
    "s2": ("#000012", "var(--s2)"),
    "s3": ("#000013", "var(--s3)"),
}
"""Colours in matplotlib's SVG, and what the page has in their place."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "cvmatch",  # the same numbers give the same bytes
    "text.parse_math": False,  # a name with $ is a name
    "font.size": 8.5,
    "text.color": _COLORS["text"][0],
    "axes.labelcolor": _COLORS["text"][0],
    "axes.edgecolor": _COLORS["text"][0],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _COLORS["grid"][0],
    "xtick.color": _COLORS["text"][0],
    "ytick.color": _COLORS["text"][0],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    name: str
    """What the legend calls it, such as "train"."""
    points: Sequence[Point]
    """(x, y), in order of x; points that are not finite are left out."""


def draw_curves(curves: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Draw curves over common axes; returns SVG, or an empty string without finite points."""
    series = [(curve.name, _select_finite(curve.points)) for curve in curves]
    points = [point for _, part in series for point in part]
    if not points:
        return ""
    chart = _Chart(points, x_label, y_label, whole=all(float(x).is_integer() for x, _ in points))
    for number, (name, part) in enumerate(series):
        chart.add_line(part, f"s{number % 4}", dashed=number % 4 == 1)
        for x, y in part if len(part) <= _DOTS else ():
            title = f"{name}: {format_number(y)} at {format_number(x)}"
            chart.add_dot((x, y), f"s{number % 4}", title, size=4.0)
    return chart.to_svg(
        f"{y_label} over {x_label}: "
        + "; ".join(
            f"{name} from {format_number(part[0][1])} to {format_number(part[-1][1])}"
            for name, part in series
            if part
        )
    )


def draw_scatter(
    points: Sequence[Point], best: int, x_label: str, y_label: str, choices: Sequence[str] = ()
) -> str:
    """Draw points, number `best` marked; returns SVG, or an empty string without finite points.

    With `choices`, x are numbers of these, from 0.
    """
    finite = [(number == best, point) for number, point in enumerate(points) if _is_finite(point)]
    if not finite:
        return ""
    chart = _Chart([point for _, point in finite], x_label, y_label, whole=bool(choices))
    if choices:
        chart.set_choices(choices)
    for is_best, (x, y) in sorted(finite, key=lambda item: item[0]):  # the best on top
        title = f"{format_number(y)} at {format_number(x)}" + (", best" if is_best else "")
        chart.add_dot((x, y), "best" if is_best else "s0", title, size=8.0 if is_best else 5.5)
    return chart.to_svg(f"{y_label} over {x_label}, {len(finite)} points")


def draw_runs(
    curves: Sequence[Curve], stopped: Sequence[bool], best: int, x_label: str, y_label: str
) -> str:
    """Draw many curves, faint, those that were stopped with a cross at their end.

    Number `best` stands out. Returns SVG, or an empty string without finite points.
    """
    series = [_select_finite(curve.points) for curve in curves]
    points = [point for part in series for point in part]
    if not points:
        return ""
    whole = all(float(x).is_integer() for x, _ in points)
    chart = _Chart(points, x_label, y_label, whole=whole)
    for number in sorted(range(len(series)), key=lambda number: number == best):
        if part := series[number]:
            chart.add_run(part, curves[number].name, stopped[number], number == best)
    return chart.to_svg(f"{y_label} over {x_label} of {len(curves)} runs")


def draw_best_so_far(values: Sequence[Number], maximise: bool, x_label: str, y_label: str) -> str:
    """Draw values in their order and a line of the best up to each; empty without finite ones."""
    points = _select_finite([(number, value) for number, value in enumerate(values, 1)])
    if not points:
        return ""
    choose = max if maximise else min
    line = [(x, choose(y for _, y in points[: index + 1])) for index, (x, _) in enumerate(points)]
    chart = _Chart([*points, *line], x_label, y_label, whole=True)
    for x, y in points:
        chart.add_dot((x, y), "s0", f"{format_number(y)} at {x}", size=4.0)
    steps = itertools.pairwise(line)
    corners = [corner for (_, old), (x, new) in steps for corner in ((x, old), (x, new))]
    chart.add_line([line[0], *corners], "best", dashed=False)
    return chart.to_svg(f"{y_label} of {len(points)}, and the best so far {line[-1][1]}")


def draw_parallel(
    rows: Sequence[Sequence[Number]], good: Sequence[bool], best: int, names: Sequence[str]
) -> str:
    """Draw each row as a line over parallel axes; returns SVG, or an empty string without two axes.

    Args:
        rows: places on the axes, in [0, 1]; NaN where a row has none: its line goes past.
        good: whether a row is one of the better.
        best: number of the best row.
        names: of the axes, with what stands at their ends: "lr\\n1e-5 to 1e-3".
    """
    if len(names) < 2 or not rows:
        return ""
    ends: list[Point] = [(0, 0), (len(names) - 1, 1)]
    chart = _Chart(ends, "", "", whole=True, inches=(max(5.0, 1.45 * len(names)), 2.9))
    chart.set_parallel(names)
    order = sorted(range(len(rows)), key=lambda number: (number == best, good[number]))
    for number in (row for row in order if any(map(math.isfinite, rows[row]))):
        style = "best" if number == best else "s0" if good[number] else "grid"
        chart.add_row(rows[number], style)
    return chart.to_svg(f"{len(rows)} rows over {len(names)} axes")


def format_number(value: Number) -> str:
    """Write a number for a person: about three digits, no exponent where it can be helped."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2g}"


class _Chart:
    """A pair of axes that fit some points, and what is drawn on them."""

    def __init__(
        self,
        points: Sequence[Point],
        x_label: str,
        y_label: str,
        whole: bool = False,
        inches: tuple[float, float] = _INCHES,
    ) -> None:
        # Here, because it takes a second of CPU, and only pages with charts need it.
        import matplotlib  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

        self.titles: list[str] = []
        self.style = matplotlib.rc_context
        with self.style(_STYLE):
            self.figure = Figure(figsize=inches, layout="constrained")
            self.axes: Axes = self.figure.subplots()
            x_values, y_values = [x for x, _ in points], [y for _, y in points]
            x_log = is_logarithmic(x_values) and not whole
            y_log = is_logarithmic(y_values)
            self.axes.set(
                xscale="log" if x_log else "linear",
                yscale="log" if y_log else "linear",
                xlabel=x_label + (" (log)" if x_log else ""),
                ylabel=y_label + (" (log)" if y_log else ""),
            )
            self.axes.margins(0.06)
            _set_ticks(self.axes.xaxis, x_values, whole)
            _set_ticks(self.axes.yaxis, y_values, whole=False)

    def add_line(self, points: Sequence[Point], color: str, dashed: bool) -> None:
        """Draw a line through points in a colour of _COLORS."""
        x, y = [x for x, _ in points], [y for _, y in points]
        style = (0, (2.5, 2)) if dashed else "-"
        self.axes.plot(x, y, color=_COLORS[color][0], linestyle=style, linewidth=1.6)

    def add_run(self, points: Sequence[Point], title: str, stopped: bool, best: bool) -> None:
        """Draw a thin line that ends in a dot or, where it was stopped, in a cross."""
        x, y = [x for x, _ in points], [y for _, y in points]
        color, width = ("best", 2.0) if best else ("s0", 0.7)
        shade = 1.0 if best else 0.55
        self.axes.plot(x, y, color=_COLORS[color][0], linewidth=width, alpha=shade)
        self.axes.plot(
            x[-1:], y[-1:], "x" if stopped else "o", color=_COLORS["s1" if stopped else color][0],
            markersize=5.0 if stopped else 4.0, gid=f"dot{len(self.titles)}",
        )  # fmt: skip
        self.titles.append(f"{title}: {format_number(y[-1])} at {format_number(x[-1])}")

    def add_row(self, places: Sequence[Number], color: str) -> None:
        """Draw a line over parallel axes, past those where a place is NaN."""
        strong = color == "best"
        known = [(axis, place) for axis, place in enumerate(places) if math.isfinite(place)]
        self.axes.plot(
            *zip(*known, strict=True), color=_COLORS[color][0], linewidth=2.2 if strong else 0.8,
            marker="o", markersize=5.0 if strong else 2.2, alpha=1.0 if strong else 0.7,
        )  # fmt: skip

    def set_parallel(self, names: Sequence[str]) -> None:
        """Make the ticks of x vertical axes with names."""
        with self.style(_STYLE):
            self.axes.set(xlim=(-0.3, len(names) - 0.7), ylim=(-0.05, 1.05))
            self.axes.set_xticks(range(len(names)), names)
            self.axes.set_yticks([])
            self.axes.grid(True, axis="x", color=_COLORS["text"][0], linewidth=0.6)

    def set_choices(self, choices: Sequence[str]) -> None:
        """Name the places 0, 1, ... of x."""
        self.axes.set(xlim=(-0.5, len(choices) - 0.5))
        self.axes.set_xticks(range(len(choices)), choices)

    def add_dot(self, point: Point, color: str, title: str, size: float) -> None:
        """Draw a dot with a title that a pointer shows."""
        edge = _COLORS["card" if color == "best" else color][0]
        self.axes.plot(
            *([value] for value in point), "o", color=_COLORS[color][0], markersize=size,
            markeredgecolor=edge, gid=f"dot{len(self.titles)}",
        )  # fmt: skip
        self.titles.append(title)

    def to_svg(self, label: str) -> str:
        """Return the chart as an SVG element of a page, with `label` for those who cannot see."""
        buffer = io.StringIO()
        with self.style(_STYLE):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = _inline(buffer.getvalue())
        for number, title in enumerate(self.titles):
            svg = svg.replace(f'<g id="dot{number}">', f"<g><title>{escape(title)}</title>")
        head = f'<svg role="img" aria-label="{escape(label)}"'
        return svg.replace("<svg", head, 1)


def _inline(document: str) -> str:
    """Return matplotlib's SVG as an element with the font and the colours of the page."""
    svg = document[document.index("<svg") :]
    for pattern in (
        r"<metadata>.*?</metadata>",
        r"<style.*?</style>",  # it would hold for the whole page
        r"<clipPath.*?</clipPath>",  # nothing lies outside the axes
        r' clip-path="[^"]*"',
        r"<!--.*?-->",
        r"(?<=<svg)([^>]*?) width=\"[^\"]*\" height=\"[^\"]*\"",
        r"font-family: [^;\"]*;? ?",
        r' id="(?!m[0-9a-f]{8}|dot\d)[^"]*"',  # would be there again in the next chart
    ):
        svg = re.sub(pattern, r"\1" if "(?<=<svg)" in pattern else "", svg, flags=re.DOTALL)
    for color, variable in _COLORS.values():
        svg = svg.replace(color, variable)
    return re.sub(r"\s*\n\s*", " ", svg).replace("<defs> </defs>", "").strip()


def is_logarithmic(values: Sequence[Number]) -> bool:
    """Return whether an axis of these finite values has a logarithmic scale."""
    return min(values) > 0 and max(values) / min(values) > _LOG_FROM


def _set_ticks(axis: "Axis", values: Sequence[Number], whole: bool) -> None:
    """Put about five ticks with short labels on an axis whose scale is set."""
    from matplotlib import ticker  # noqa: PLC0415 (see _Chart)

    if axis.get_scale() == "log":
        few = max(values) / min(values) < 1e3
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
        axis.set_minor_locator(ticker.NullLocator())
    else:
        axis.set_major_locator(ticker.MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: format_number(value)))


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _select_finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if _is_finite(point)]
