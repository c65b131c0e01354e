"""The page: results, pictures, curves, trials and times as HTML, from the template page.html.

It loads nothing from elsewhere: its style is inline, its pictures are data URIs. All text in it is
escaped, since pair ids come from files that we did not write.
"""

import base64
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources

import torch
from PIL import Image

from cvmatch.data import images, storage
from cvmatch.data.schema import LABELS, PALETTE
from cvmatch.report import charts
from cvmatch.report.charts import Curve, Number, format_number
from cvmatch.report.examples import Example, Pixels, Tile
from cvmatch.report.image_grid import resize
from cvmatch.report.scores import Score

_PACKAGES = ("ray", "torch", "torchvision", "diffusers", "transformers", "faiss-cpu", "mlflow")
_WIDEST = {"ground": 640}  # pixels; with 192 for tiles, ten examples stay near a megabyte
_SMALL = 128 * 128  # pictures of at most this many pixels stay lossless
_GOOD = 0.25  # share of the trials that stand out over parallel axes


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a search over hyper-parameters."""

    params: Mapping[str, Number | str]
    """What was tried, by dotted name."""
    value: Number
    """What came out; NaN where the trial failed."""
    state: str = "finished"
    """Such as "finished", "stopped early", "failed"."""
    history: Sequence[tuple[Number, Number]] = ()
    """(epoch, value) after each of its epochs."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much of the differences between good and other trials a setting explains."""

    name: str
    """Dotted name of the setting."""
    share: Number
    """In [0, 1]; over all settings they sum to 1."""
    low: Number
    """Lower end of its interval."""
    high: Number
    """Upper end."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a search."""

    title: str
    note: str
    """What its numbers are."""
    head: Sequence[str]
    """Names of the columns."""
    rows: Sequence[Sequence[Number | str]]


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report shows. Empty parts are left out."""

    title: str
    """Its first line."""
    summary: str = ""
    """A paragraph under the title."""
    run: Mapping[str, str] = field(default_factory=dict)
    """What was run, by name: see `describe_run`."""
    config: str = ""
    """The configuration, as YAML."""
    results: Sequence[Score] = ()
    """See `scores.collect_scores`."""
    examples: Sequence[Example] = ()
    """Panoramas, and what was found for them."""
    examples_title: str = "Held-out places"
    """What they are."""
    curves: Mapping[str, Sequence[Curve]] = field(default_factory=dict)
    """Loss against epoch, by title of the chart: a curve for training, one for validation."""
    trials: Sequence[Trial] = ()
    """Of a search over hyper-parameters."""
    tables: Sequence[Table] = ()
    """What was chosen from them, and how."""
    objective: str = "val/loss"
    """What the search was about."""
    maximise: bool = False
    """Whether the best trial is the one with the largest value."""
    importance: Sequence[Importance] = ()
    """Of the searched settings, the most important one first."""
    importance_note: str = ""
    """What these numbers are."""
    cost: Mapping[str, str] = field(default_factory=dict)
    """What the search cost, by name."""
    command: str = ""
    """The command that trains the best."""
    seconds: Mapping[str, Number] = field(default_factory=dict)
    """Wall-clock time of each stage, in seconds."""
    limits: Sequence[str] = ()
    """Sentences on what the numbers do not say."""


def write_page(page: Page, output: str) -> str:
    """Write the page to a file, whole or not at all; returns its location."""
    storage.write_text(output, render_page(page))
    return output


def render_page(page: Page) -> str:
    """Return the page as one HTML document in UTF-8 that needs no other file and no network."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 (only where a page is made)
    from markupsafe import Markup  # noqa: PLC0415

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": format_number,
        "percent": _format_percent,
        "duration": _format_duration,
        "cell": _format_cell,
    }
    template = resources.files("cvmatch.report").joinpath("page.html").read_text("utf-8")
    best = _find_best(page.trials, page.maximise)
    return environment.from_string(template).render(
        page=page,
        classes=list(zip(LABELS, PALETTE, strict=True)),
        rows=[_Row(example) for example in page.examples],
        charts=[
            (title, curves, Markup(chart))
            for title, curves in page.curves.items()
            if (chart := charts.draw_curves(curves, "epoch", "loss"))
        ],
        parameters=list(dict.fromkeys(name for trial in page.trials for name in trial.params)),
        parallel=Markup(_draw_parallel(page, best)),
        progress=[(title, Markup(chart)) for title, chart in _draw_progress(page, best) if chart],
        scatters=[Markup(chart) for chart in _draw_trials(page, best)],
        best=best,
        draw_map=lambda example: Markup(_draw_map(example)),
    )


def describe_run() -> dict[str, str]:
    """Return date, machine and versions, for `Page.run`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    return {
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Machine": f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory",
        "GPU": ", ".join(gpus) or "none",
        "Python": f"{platform.python_version()} on {platform.system()}",
        "Packages": ", ".join(versions),
    }


@dataclass(frozen=True)
class _Figure:
    """A picture of an example, with its caption."""

    kind: str
    """Class in the style sheet."""
    uri: str | None
    alt: str
    caption: str
    absent: str = "not made"
    """What is said where there is no picture."""
    score: str = ""
    branches: Mapping[str, float] = field(default_factory=dict)
    """What each branch adds to the score."""
    right: bool = False


class _Row:
    """What the template needs of an example."""

    def __init__(self, example: Example) -> None:
        self.example = example
        name = example.pair_id
        self.figures = [
            _figure(example.ground, "ground", f"Street panorama of {name}", "G panorama"),
            _figure(example.synthetic, "tile", f"Generated tile of {name}", "A generated"),
            _figure(example.class_colors, "classes", f"Classes of the tile of {name}", "S classes"),
            _figure(example.aerial, "true", f"True tile of {name}", "C true", absent="not known"),
        ]
        # A row of nothing but empty frames says nothing.
        pictured = any(tile.picture is not None for tile in example.top)
        if pictured:
            self.figures += [
                _answer(tile, number, example.pair_id) for number, tile in enumerate(example.top, 1)
            ]
        self.listed = not pictured or any(tile.coordinates for tile in example.top)
        """Whether a table says more than the pictures do."""


def _figure(
    picture: Pixels | None, kind: str, alt: str, caption: str, absent: str = "not made"
) -> _Figure:
    return _Figure(kind, encode_uri(picture, kind), alt, caption, absent)


def _answer(tile: Tile, number: int, true_id: str) -> _Figure:
    right = tile.pair_id == true_id
    alt = f"Answer {number}, {'right' if right else 'wrong'}: {tile.pair_id}"
    kind = "right" if right else "answer"
    uri = encode_uri(tile.picture, kind)
    score = f"{tile.score:.2f}"
    return _Figure(kind, uri, alt, str(number), "not at hand", score, tile.branches, right)


def encode_uri(picture: Pixels | None, kind: str) -> str | None:
    """Return a picture as a data URI; None where there is none.

    Args:
        picture: RGB.
        kind: what it shows: a panorama (`ground`) may be wider than others, and a map of classes
            (`classes`) keeps its colours.
    """
    if picture is None:
        return None
    height, width = picture.shape[:2]
    widest, exact = _WIDEST.get(kind, 192), kind == "classes"
    if width > widest:
        method = Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS
        picture = resize(picture, (max(1, round(height * widest / width)), widest), method)
    form = "PNG" if exact or picture.shape[0] * picture.shape[1] <= _SMALL else "JPEG"
    text = base64.b64encode(images.encode(picture, form)).decode()
    return f"data:image/{form.lower()};base64,{text}"


def _draw_map(example: Example) -> str:
    """Draw where the best tiles lie; the first one is marked."""
    axes = ("metres east of the first tile", "metres north")
    return charts.draw_scatter(example.offsets, 0, *axes)


def _draw_trials(page: Page, best: int) -> list[str]:
    """Draw the objective against each parameter that varies."""
    drawings = []
    for column in _read_columns(page.trials):
        points = [(x, trial.value) for x, trial in zip(column.values, page.trials, strict=True)]
        drawings.append(
            charts.draw_scatter(points, best, column.name, page.objective, column.choices)
        )
    return [drawing for drawing in drawings if drawing]


def _draw_progress(page: Page, best: int) -> list[tuple[str, str]]:
    """Draw the best so far, and the values after each epoch."""
    values = [trial.value for trial in page.trials]
    curves = [
        Curve(name=f"trial {number}", points=trial.history)
        for number, trial in enumerate(page.trials, 1)
    ]
    stopped = [trial.state != "finished" for trial in page.trials]
    return [
        ("The best so far", charts.draw_best_so_far(values, page.maximise, "trial", page.objective))
        if len(page.trials) > 1
        else ("", ""),
        (
            "After each epoch; a cross: stopped there",
            charts.draw_runs(curves, stopped, best, "epoch", page.objective),
        ),
    ]


def _draw_parallel(page: Page, best: int) -> str:
    """Draw all trials over an axis for each parameter that varies, and one for the objective."""
    columns = _read_columns(page.trials)
    known = [trial.value for trial in page.trials]
    columns.append(_Column(page.objective, known))
    order = sorted((value for value in known if math.isfinite(value)), reverse=page.maximise)
    if not order or len(columns) < 3:  # one parameter has its own chart
        return ""
    bound = order[max(0, math.ceil(_GOOD * len(order)) - 1)]
    good = [value >= bound if page.maximise else value <= bound for value in known]
    places = [column.places for column in columns]
    return charts.draw_parallel(
        [[place[row] for place in places] for row in range(len(known))],
        good,
        best,
        [column.label for column in columns],
    )


def _find_best(trials: Sequence[Trial], maximise: bool) -> int:
    """Return the number of the best trial; -1 where none has a finite value."""
    sign = 1 if maximise else -1
    finite = [(sign * t.value, -i) for i, t in enumerate(trials) if math.isfinite(t.value)]
    return -max(finite)[1] if finite else -1


@dataclass(frozen=True)
class _Column:
    """A parameter that varies: its value of each trial, NaN where a trial has none."""

    name: str
    values: Sequence[Number]
    choices: Sequence[str] = ()
    """What values, from 0, stand for where they are no numbers."""

    @property
    def label(self) -> str:
        """Name and ends of its axis."""
        if self.choices:
            return f"{self.name}\n{' / '.join(self.choices)}"
        known = [value for value in self.values if math.isfinite(value)]
        return f"{self.name}\n{format_number(min(known))} to {format_number(max(known))}"

    @property
    def places(self) -> list[float]:
        """Places on an axis from 0 to 1, logarithmic as a chart of them would be."""
        known = [value for value in self.values if math.isfinite(value)]
        scale = math.log if charts.is_logarithmic(known) and not self.choices else float
        low, high = scale(min(known)), scale(max(known))
        return [
            (scale(value) - low) / (high - low or 1) if math.isfinite(value) else math.nan
            for value in self.values
        ]


def _read_columns(trials: Sequence[Trial]) -> list[_Column]:
    """Return the parameters that vary, in their order."""
    columns = []
    for name in dict.fromkeys(name for trial in trials for name in trial.params):
        values = [trial.params.get(name, math.nan) for trial in trials]
        if any(isinstance(value, str | bool) for value in values):
            choices = sorted({str(v) for v in values if isinstance(v, str | bool)})
            numbers = [
                float(choices.index(str(v))) if isinstance(v, str | bool) else math.nan
                for v in values
            ]
            column = _Column(name, numbers, choices)
        else:
            column = _Column(name, [float(v) for v in values if isinstance(v, int | float)])
        if len({value for value in column.values if math.isfinite(value)}) > 1:
            columns.append(column)
    return columns


def _format_cell(value: Number | str) -> str:
    return str(value) if isinstance(value, str | bool) else format_number(value)


def _format_percent(share: Number) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def _format_duration(seconds: Number) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
