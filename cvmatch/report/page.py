"""The page: results, pictures, curves, trials and times as HTML.

It loads nothing from elsewhere: its style is inline, its pictures are data URIs. All text in it is
escaped, since pair ids come from files that we did not write.
"""

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template

import torch

from cvmatch.data import storage
from cvmatch.data.schema import LABELS, PALETTE
from cvmatch.report import charts
from cvmatch.report.charts import Curve, Number, number
from cvmatch.report.scores import Score
from cvmatch.report.sheet import Example, Pixels, Tile, data_uri

_PACKAGES = ("ray", "torch", "torchvision", "diffusers", "transformers", "faiss-cpu", "mlflow")
_WIDEST = {"ground": 640}  # pixels; with 192 for tiles, ten examples stay near a megabyte
_SCATTERS = 3  # parameters of a search that get a picture; the table has them all


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a search over hyper-parameters."""

    params: Mapping[str, Number | str]
    """What was tried, by dotted name."""
    value: Number
    """What came out; NaN where the trial failed."""
    state: str = "finished"
    """Such as "finished", "stopped early", "failed"."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report shows. Empty parts are left out."""

    title: str
    """Its first line."""
    summary: str = ""
    """A paragraph under the title."""
    run: Mapping[str, str] = field(default_factory=dict)
    """What was run, by name: see `provenance`."""
    config: str = ""
    """The configuration, as YAML."""
    results: Sequence[Score] = ()
    """See `scores.scores`."""
    examples: Sequence[Example] = ()
    """Panoramas, and what was found for them."""
    places: str = "Held-out places"
    """What they are."""
    curves: Mapping[str, Sequence[Curve]] = field(default_factory=dict)
    """Loss against epoch, by title of the chart: a curve for training, one for validation."""
    trials: Sequence[Trial] = ()
    """Of a search over hyper-parameters."""
    objective: str = "val/loss"
    """What the search was about."""
    maximise: bool = False
    """Whether the best trial is the one with the largest value."""
    seconds: Mapping[str, Number] = field(default_factory=dict)
    """Wall-clock time of each stage, in seconds."""
    limits: Sequence[str] = ()
    """Sentences on what the numbers do not say."""


def report(page: Page, output: str) -> str:
    """Write the page to a file, whole or not at all; gives its location back."""
    storage.write_text(output, html(page))
    return output


def html(page: Page) -> str:
    """The page as one HTML document in UTF-8 that needs no other file and no network."""
    template = resources.files("cvmatch.report").joinpath("page.html").read_text("utf-8")
    parts = [
        ("results", "Results", _results(page.results)),
        ("places", page.places, _examples(page.examples)),
        ("learning", "Learning", _curves(page.curves)),
        ("search", "Search", _trials(page)),
        ("time", "Time", _seconds(page.seconds)),
        ("run", "What was run", _run(page)),
        ("limits", "Limits", "".join(f"<p>{escape(text)}</p>" for text in page.limits)),
    ]
    parts = [part for part in parts if part[2]]
    return Template(template).substitute(
        title=escape(page.title),
        summary=f'<p class="summary">{escape(page.summary)}</p>' if page.summary else "",
        links="".join(f'<a href="#{name}">{title}</a>' for name, title, _ in parts),
        sections="".join(
            f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in parts
        ),
    )


def provenance() -> dict[str, str]:
    """Date, machine and versions, for `Page.run`."""
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


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _results(rows: Sequence[Score]) -> str:
    if not rows:
        return ""
    body, group = [], ""
    for row in rows:
        if row.group != group:
            group = row.group
            body.append(f'<tr class="group"><th colspan="5">{escape(group)}</th></tr>')
        show = _percent if row.share else number
        between = " to ".join(map(show, row.interval)) if row.interval else ""
        guess = "" if row.chance is None else show(row.chance)
        body.append(
            f'<tr><th scope="row"><code>{escape(row.name)}</code></th>'
            f'<td class="value">{show(row.value)}</td>'
            f'<td data-label="95 % interval">{between}</td>'
            f'<td data-label="by chance">{guess}</td>'
            f'<td class="words">{escape(row.meaning)}</td></tr>'
        )
    names = ("measure", "value", "95 % interval", "by chance", "what it says")
    return f'<table class="results">{_head(names)}<tbody>{"".join(body)}</tbody></table>'


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    key = "".join(
        f'<li><i style="background:rgb{colour}"></i>{name}</li>'
        for name, colour in zip(LABELS, PALETTE, strict=True)
    )
    mapped = any(example.classes is not None for example in examples)
    return (
        f"<p>{_explain(examples)}</p>"
        + (f'<ul class="key" aria-label="colours of the classes">{key}</ul>' if mapped else "")
        + "".join(_example(example) for example in examples)
    )


def _explain(examples: Sequence[Example]) -> str:
    """What the pictures are, of those that are there."""
    made = {
        "the tile <b>A</b> made from it": any(one.synthetic is not None for one in examples),
        "the classes <b>S</b> of that": any(one.classes is not None for one in examples),
        "the true tile <b>C</b>": any(one.aerial is not None for one in examples),
        "the first tiles that the search found": True,
    }
    *first, last = [words for words, there in made.items() if there]
    listed = f"{', '.join(first)}, and {last}" if first else last
    known = any(tile.pair_id == one.pair_id for one in examples for tile in one.top)
    right = " The right one has a frame and a tick." if known else ""
    return f"A row for each panorama <b>G</b>: {listed}, with their scores.{right}"


def _example(example: Example) -> str:
    name = escape(example.pair_id)
    place = "" if example.rank is None else f"right tile at place {example.rank:,}"
    place = escape(", ".join(part for part in (example.note, place) if part))
    cells = [
        _figure(example.ground, "ground", f"Street panorama of {name}", "G panorama"),
        _figure(example.synthetic, "tile", f"Generated tile of {name}", "A generated"),
        _figure(example.class_colours, "classes", f"Classes of the tile of {name}", "S classes"),
        _figure(example.aerial, "true", f"True tile of {name}", "C true", absent="not known"),
    ]
    for answer, tile in enumerate(_pictured(example.top), 1):
        right = tile.pair_id == example.pair_id
        alt = f"Answer {answer}, {'right' if right else 'wrong'}: {escape(tile.pair_id)}"
        caption = f"{'&#10003; ' if right else ''}{answer} <small>{tile.score:.2f}</small>"
        kind = "right" if right else "answer"
        cells.append(_figure(tile.picture, kind, alt, caption, absent="not at hand"))
    return (
        f"<article><h3>{name} <span>{place}</span></h3>"
        f'<div class="row">{"".join(cells)}</div>{_answers(example.top)}{_map(example)}</article>'
    )


def _pictured(tiles: Sequence[Tile]) -> Sequence[Tile]:
    """The tiles, where any has a picture: a row of nothing but empty frames says nothing."""
    return tiles if any(tile.picture is not None for tile in tiles) else ()


def _answers(tiles: Sequence[Tile]) -> str:
    """A table of the tiles, where it says more than the pictures do."""
    if _pictured(tiles) and not any(tile.place for tile in tiles):
        return ""
    body = "".join(
        f"<tr>{''.join(map(_cell, (str(rank), tile.pair_id, f'{tile.score:.3f}', *_place(tile))))}"
        "</tr>"
        for rank, tile in enumerate(tiles, 1)
    )
    names = ("rank", "tile", "score", "latitude", "longitude")
    return f'<div class="wide answers"><table>{_head(names)}<tbody>{body}</tbody></table></div>'


def _place(tile: Tile) -> tuple[str, str]:
    """Latitude and longitude to a decimetre or so, as maps are asked for them."""
    if tile.place is None:
        return "not known", "not known"
    latitude, longitude = tile.place
    return f"{latitude:.6f}", f"{longitude:.6f}"


def _map(example: Example) -> str:
    """Where the best tiles lie; the first one is marked."""
    axes = ("metres east of the first tile", "metres north")
    drawing = charts.scatter(example.positions, 0, *axes)
    return f'<div class="charts"><figure>{drawing}</figure></div>' if drawing else ""


def _figure(
    picture: Pixels | None, kind: str, alt: str, caption: str, absent: str = "not made"
) -> str:
    """`alt` and `caption` are HTML already."""
    body = f'<div class="absent">{absent}</div>'
    if picture is not None:
        uri = data_uri(picture, _WIDEST.get(kind, 192), classes=kind == "classes")
        body = f'<img src="{uri}" alt="{alt}">'
    return f'<figure class="{kind}">{body}<figcaption>{caption}</figcaption></figure>'


def _curves(curves: Mapping[str, Sequence[Curve]]) -> str:
    figures = []
    for title, several in curves.items():
        drawing = charts.lines(several, "epoch", "loss")
        key = "".join(
            f'<span class="s{i % 4}"><i></i>{escape(c.name)}</span>' for i, c in enumerate(several)
        )
        if drawing:
            caption = f'<figcaption>{escape(title)}<span class="lines">{key}</span></figcaption>'
            figures.append(f"<figure>{caption}{drawing}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _trials(page: Page) -> str:
    if not page.trials:
        return ""
    names = list(dict.fromkeys(name for trial in page.trials for name in trial.params))
    best = _best(page.trials, page.maximise)
    body = []
    for index, trial in enumerate(page.trials):
        state = f"{trial.state}, best" if index == best else trial.state
        cells = [trial.params.get(name, "") for name in names] + [trial.value, state]
        mark = ' class="best"' if index == best else ""
        body.append(f"<tr{mark}>{''.join(map(_cell, cells))}</tr>")
    drawings = [
        charts.scatter(
            [(x, t.value) for x, t in zip(column, page.trials, strict=True)], best, *axes
        )
        for name in names
        if (column := _column(page.trials, name)) and (axes := (name, page.objective))
    ]
    figures = "".join(f"<figure>{drawing}</figure>" for drawing in drawings[:_SCATTERS] if drawing)
    return (
        (f'<div class="charts">{figures}</div>' if figures else "")
        + f'<div class="wide"><table>{_head((*names, page.objective, "state"))}'
        + f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _best(trials: Sequence[Trial], maximise: bool) -> int:
    """Number of the best trial; -1 where none gave a finite value."""
    sign = 1 if maximise else -1
    finite = [(sign * t.value, -i) for i, t in enumerate(trials) if math.isfinite(t.value)]
    return -max(finite)[1] if finite else -1


def _column(trials: Sequence[Trial], name: str) -> list[float]:
    """A parameter's values, NaN where a trial has none; empty if text, or if all are equal."""
    values = [trial.params.get(name, math.nan) for trial in trials]
    numbers = [float(v) for v in values if isinstance(v, int | float)]
    different = len({v for v in numbers if math.isfinite(v)}) > 1
    return numbers if len(numbers) == len(values) and different else []


def _seconds(seconds: Mapping[str, Number]) -> str:
    if not seconds:
        return ""
    longest, total = max(*seconds.values(), 1e-9), _duration(sum(seconds.values()))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar">'
        f'<i style="width:{100 * value / longest:.1f}%"></i></td><td>{_duration(value)}</td></tr>'
        for name, value in seconds.items()
    )
    rows += f'<tr class="total"><th scope="row">all</th><td></td><td>{total}</td></tr>'
    return f'<table class="bars"><tbody>{rows}</tbody></table>'


def _run(page: Page) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in page.run.items())
    config = (
        f"<details><summary>Configuration</summary><pre>{escape(page.config)}</pre></details>"
        if page.config
        else ""
    )
    return (f"<dl>{rows}</dl>" if rows else "") + config


def _head(names: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _cell(value: Number | str) -> str:
    text = str(value) if isinstance(value, str | bool) else number(value)
    return f"<td>{escape(text)}</td>"


def _percent(share: Number) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def _duration(seconds: Number) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
