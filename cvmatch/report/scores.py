"""Numbers of results.json -> table rows with chance levels and plain words."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from rich.console import Console
from rich.table import Table

from cvmatch.report.charts import Number


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of a table of results."""

    group: str
    """Path of its tree, such as "retrieval / 360-north / G+A+S"."""
    name: str
    """Its key in results.json."""
    value: Number
    """As in results.json: shares in [0, 1]."""
    interval: tuple[Number, Number] | None = None
    """95 % interval, in the unit of `value`."""
    chance: Number | None = None
    """What a guess scores, in the unit of `value`; None where that is not defined."""
    share: bool = False
    """Whether to show it in percent."""
    meaning: str = ""
    """The same in plain words."""


@dataclass(frozen=True)
class _Kind:
    """Keys that `pattern` matches whole: {first} is "among the first 5", {gallery} a number."""

    pattern: str
    meaning: str
    share: bool = False
    chance: float | None = None


_RECALL = r"recall@((?P<k>\d+)|(?P<percent>[\d.]+)%)"
_KINDS = (
    _Kind(_RECALL, "the right tile comes {first} of {gallery}", True),
    _Kind(rf"chroma/{_RECALL}", "by colour alone, the right tile comes {first} of {gallery}", True),
    _Kind(
        rf"gradient/{_RECALL}", "by edges alone, the right tile comes {first} of {gallery}", True
    ),
    _Kind(r"near_recall@(?P<near>\d+)", "it comes {first} of the tiles nearby ({gallery})", True),
    _Kind(r"(one_of_ten_)?top(?P<ten>\d+)", "it comes {first} of 10: itself and 9 random", True),
    _Kind(r"(?P<middle>median_rank)", "half of the panoramas have their tile here or before"),
    _Kind(r"distance_m", "from the first answer to the right place, in metres, median"),
    _Kind(r"distance_m_p90", "nine of ten first answers are not further"),
    _Kind(r"distance_m_mean", "the same, mean"),
    _Kind(r"within_\d+m", "first answers that are not further from the right place", True),
    _Kind(r"exact_top1_kept", "first answers of exhaustive search that two stages keep", True),
    _Kind(r"exact_top10_kept", "of its first ten answers", True),
    _Kind(r"shortlist", "tiles that the first stage hands to the second"),
    _Kind(r"tiles", "tiles that can be found"),
    _Kind(r"failed", "panoramas that failed in synthesis, which no number counts"),
    _Kind(r"exact|ms_per_query_exact", "milliseconds for a panorama, scoring every tile"),
    _Kind(r"two-stage|ms_per_query", "milliseconds for a panorama, by shortlist and re-ranking"),
    _Kind(r"loss_correct", "noise error of the generator, with the right panorama"),
    _Kind(r"miou", "overlap of predicted and true classes, mean over the classes", True),
    _Kind(r"accuracy", "pixels of the right class", True),
    _Kind(r"ignored", "pixels of no class, which nothing counts", True),
    _Kind(r"psnr", "likeness of generated and true tile, pixel by pixel, in dB; higher is better"),
    _Kind(r"ssim", "likeness of generated and true tile in structure, at most 1"),
    _Kind(r"ncc", "correlation of brightness of generated and true tile, at most 1", False, 0.0),
    _Kind(r"lpips", "perceived difference of generated and true tile; lower is better"),
    _Kind(r"fid", "distance between the sets of generated and true tiles; lower is better"),
)

_SHUFFLED = "the same with another place's picture: worse, if the model looks at its panorama"
_GROUPS = {
    "iou": (_Kind(r".+", "overlap of predicted and true pixels of this class", True),),
    "ablation": (
        _Kind(r"(?P<first>.+)", "recall@1 of queries made of these pictures alone", True),
    ),
    "minus_G": (_Kind(r"recall@1", "more often than G alone, in pairs of one panorama", True),),
    "recall": (
        _Kind(r"top1", "first answers of exhaustive search that the shortlist holds", True),
        _Kind(r"top10", "of its first ten answers", True),
        _Kind(r"queries", "panoramas for which the build measured that"),
    ),
}
"""Meaning of keys below such a key, before _KINDS: classes, modalities, a shortlist."""
_PARTS = re.compile(r".*(_low|_high|_k|_chance)|(near_|\w+/)?gallery|near_queries")


def format_table(rows: Iterable[Score], title: str) -> str:
    """Return the rows as a table for a terminal, with what a guess would score."""
    table = Table(title=title)
    for name in ("", "value", "95 %", "chance"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        low_high = " to ".join(f"{end:.3f}" for end in row.interval) if row.interval else ""
        chance = "" if row.chance is None else f"{row.chance:.3f}"
        table.add_row(f"{row.group} / {row.name}", f"{row.value:.3f}", low_high, chance)
    console = Console(width=100)
    with console.capture() as text:
        console.print(table)
    return text.get()


def collect_scores(results: Mapping[str, Any], gallery: Number = 0) -> list[Score]:
    """Return a row for each number in a tree of results, such as results.json, in its order.

    Keys beside a name belong to its row: "gallery" (tiles searched, also for trees below),
    "<name>_95" ([low, high]) or "<name>_low" and "<name>_high" (95 % interval), "<name>_k",
    "<name>_chance"; "<name>_shuffled" is a row of its own. Text, lists, booleans and None are no
    scores and are left out.
    """
    return list(_walk(results, (), gallery))


def _walk(tree: Mapping[str, Any], above: tuple[str, ...], gallery: Number) -> Iterator[Score]:
    gallery = tree.get("gallery", gallery)
    deeper = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            deeper.append((name, value))
        elif _is_number(value) and not _PARTS.fullmatch(name):
            yield _score(" / ".join(above), name, tree, gallery)
    for name, value in deeper:  # last, so that a group's rows stay together
        yield from _walk(value, (*above, name), gallery)


def _score(group: str, name: str, tree: Mapping[str, Any], gallery: Number) -> Score:
    base = name.removesuffix("_shuffled")
    kinds = _GROUPS.get(group.rpartition(" / ")[2], ())
    kind, chance, blanks = None, None, {"first": "", "gallery": ""}
    for candidate in (*kinds, *_KINDS):
        if match := re.fullmatch(candidate.pattern, base):
            blanks, guess = _guess(match.groupdict(), tree, gallery)
            kind, chance = candidate, candidate.chance if guess is None else guess
            break
    low, high = tree.get(f"{name}_95") or (tree.get(f"{name}_low"), tree.get(f"{name}_high"))
    stated = tree.get(f"{name}_chance")
    words = kind.meaning.format(**blanks) if kind else ""
    return Score(
        group=group,
        name=name,
        value=tree[name],
        interval=(low, high) if _is_number(low) and _is_number(high) else None,
        chance=stated if _is_number(stated) else chance,
        share=kind is not None and kind.share,
        meaning=words if base == name else _SHUFFLED,
    )


def _guess(
    groups: Mapping[str, str | None], tree: Mapping[str, Any], gallery: Number
) -> tuple[dict[str, str], float | None]:
    """Return the words of a recall, and what a guess scores: k of n, or the middle rank."""
    size, words = gallery, f"{gallery:,.0f}" if gallery else "all"
    if ten := groups.get("ten"):
        k, size = int(ten), 10
    elif near := groups.get("near"):
        # No guess from the mean: 2 and 100 tiles give 25.5 %, 51 give 2.0 %. See "<name>_chance".
        k, size, mean = int(near), 0, tree.get("near_gallery", 0)
        words = f"{mean:.1f} on average" if mean else "not counted"
    elif percent := groups.get("percent"):  # as metrics.recall_share counts
        k = max(1, int(float(percent) / 100 * gallery + 1e-9))
    elif groups.get("middle"):
        return {}, (gallery + 1) / 2 if gallery else None
    elif number := groups.get("k") or (groups.get("first") and "1"):
        k = int(number)
    else:
        return {}, None
    first = "first" if k == 1 else f"among the first {k:,}"
    return {"first": first, "gallery": words}, min(1.0, k / size) if size else None


def _is_number(value: Any) -> TypeGuard[Number]:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isinf(value)
