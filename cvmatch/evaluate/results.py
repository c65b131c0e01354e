"""Results of an evaluation, and their JSON form: `results.json`, one flat name for each number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cvmatch.data import storage

Number = int | float
V = TypeVar("V")

FILE = "results.json"
"""Name of the file in the output directory of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of queries, in [0, 1], whose true item is among the first k of a gallery."""

    value: Number
    low: Number
    """Lower end of the 95 % interval of the bootstrap."""
    high: Number
    """Upper end."""
    k: Number | None = None
    """The number that a share of the gallery, such as 1 %, means; None where the name says it."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two recalls of the same queries."""

    value: Number
    low: Number
    """Lower end of the 95 % interval of the bootstrap over queries, paired."""
    high: Number
    """Upper end."""


@dataclass(frozen=True, kw_only=True)
class NearResult:
    """Retrieval among the tiles near the true one, of queries that have such rivals."""

    recalls: Mapping[str, Number]
    """By name ("recall@1"), in [0, 1]."""
    chance: Mapping[str, Number]
    """The same by chance: each query guesses among its own number of tiles nearby."""
    gallery: Number
    """Mean number of tiles nearby, the true one included."""
    queries: int


@dataclass(frozen=True, kw_only=True)
class TwoStageResult:
    """Search by shortlist and re-ranking, compared with exact search."""

    recalls: Mapping[str, Number]
    """By name ("recall@1"), in [0, 1]; a tile that the shortlist lacks is not found."""
    exact_top1_kept: Number
    """Share of exact first answers that come first here too, in [0, 1]."""
    exact_top10_kept: Number
    """Share of exact first ten answers that are among the first ten here."""
    shortlist: int
    """Tiles that the first stage hands to the second."""


@dataclass(frozen=True, kw_only=True)
class DistanceResult:
    """How far the best tiles are from the true ones, of the queries whose places are known."""

    within: Mapping[str, Number]
    """Shares, in [0, 1], by the most that they are away: "25m", "50m", "100m"."""
    median: Number
    """Metres, as the others."""
    p90: Number
    """That nine queries of ten are not beyond."""
    mean: Number


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """How well queries of one view and modality find their tiles."""

    gallery: int
    """Tiles searched."""
    recalls: Mapping[str, Recall]
    """By name: "recall@1", "recall@5", "recall@10", "recall@1%"."""
    median_rank: Number
    """From 1."""
    minus_g: Difference | None = None
    """recall@1 less that of G alone; None of G itself, or where that was not measured."""
    one_of_ten: Mapping[str, Number] = field(default_factory=dict)
    """"top1" and "top5" among the true tile and nine random ones; empty for a small gallery."""
    near: NearResult | None = None
    """None where no tile has a neighbour."""
    distance: DistanceResult | None = None
    """None without coordinates."""
    two_stage: TwoStageResult | None = None
    """None where it was not measured."""
    heading_error: Number | None = None
    """Median degrees by which the heading of a first answer is wrong; None where none was tried."""
    ms: Mapping[str, Number] = field(default_factory=dict)
    """Median milliseconds of one query's search, by mode: "exact", "two-stage"."""

    def to_json(self) -> Mapping[str, Number | Mapping[str, Number] | None]:
        """Return the numbers under their names in results.json."""
        tree: dict[str, Number | Mapping[str, Number] | None] = {**_flatten_recalls(self.recalls)}
        tree |= {"median_rank": self.median_rank, "gallery": self.gallery}
        tree |= {f"one_of_ten_{name}": value for name, value in self.one_of_ten.items()}
        if self.minus_g:
            tree["minus_G"] = {
                "recall@1": self.minus_g.value,
                "recall@1_low": self.minus_g.low,
                "recall@1_high": self.minus_g.high,
            }
        if self.near:
            tree |= {f"near_{name}": value for name, value in self.near.recalls.items()}
            tree |= {f"near_{name}_chance": value for name, value in self.near.chance.items()}
            tree |= {"near_gallery": self.near.gallery, "near_queries": self.near.queries}
        if self.distance:
            tree |= {f"within_{name}": share for name, share in self.distance.within.items()}
            tree |= {
                "distance_m": self.distance.median,
                "distance_m_p90": self.distance.p90,
                "distance_m_mean": self.distance.mean,
            }
        if self.two_stage:
            kept = {
                "exact_top1_kept": self.two_stage.exact_top1_kept,
                "exact_top10_kept": self.two_stage.exact_top10_kept,
                "shortlist": self.two_stage.shortlist,
            }
            tree["two-stage"] = {**self.two_stage.recalls, **kept}
        if self.heading_error is not None:
            tree["heading_error"] = self.heading_error
        return tree | {"ms": dict(self.ms)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "RetrievalResult":
        """Read what `to_json` returns."""
        return cls(
            gallery=tree["gallery"],
            recalls=_read_recalls(tree),
            median_rank=tree["median_rank"],
            one_of_ten=_below(tree, "one_of_ten_"),
            minus_g=_read_difference(tree["minus_G"]) if "minus_G" in tree else None,
            near=_read_near(tree) if "near_gallery" in tree else None,
            distance=_read_distance(tree) if "distance_m" in tree else None,
            two_stage=_read_two_stage(tree["two-stage"]) if "two-stage" in tree else None,
            heading_error=tree.get("heading_error"),
            ms=tree["ms"],
        )


@dataclass(frozen=True, kw_only=True)
class PictureRetrieval:
    """How well pictures find their true ones among all by correlation, no model in between."""

    gallery: Number
    """True pictures."""
    recalls: Mapping[str, Recall]
    """By name: "recall@1", "recall@1%", "recall@10%"."""

    def to_json(self) -> Mapping[str, Number]:
        """Return the numbers under their names in results.json."""
        return {"gallery": self.gallery, **_flatten_recalls(self.recalls)}


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """How well generated tiles show the true ones."""

    similarity: Mapping[str, Number]
    """Means of psnr (dB), ssim and ncc; "_shuffled": against the tile of the row before."""
    retrieval: Mapping[str, PictureRetrieval]
    """By what is compared: luminance, chroma, gradient."""
    fid: Number | None = None
    """Frechet inception distance of all generated from all true tiles; None: not measured."""

    def to_json(self) -> Mapping[str, Number]:
        """Return the numbers under their names in results.json; luminance bears no prefix."""
        tree = dict(self.similarity)
        for channel, result in self.retrieval.items():
            prefix = "" if channel == "luminance" else f"{channel}/"
            tree |= {prefix + name: value for name, value in result.to_json().items()}
        return tree | ({} if self.fid is None else {"fid": self.fid})

    @classmethod
    def from_json(cls, tree: Mapping[str, Number]) -> "GenerationResult":
        """Read what `to_json` returns."""
        channels = {"luminance": {k: v for k, v in tree.items() if "/" not in k}}
        for name in tree:
            channel, slash, _ = name.partition("/")
            if slash and channel not in channels:
                channels[channel] = _below(tree, f"{channel}/")
        retrieval = {
            channel: PictureRetrieval(gallery=part["gallery"], recalls=_read_recalls(part))
            for channel, part in channels.items()
        }
        measures = {
            name: value
            for name, value in channels["luminance"].items()
            if name.removesuffix("_shuffled") in ("psnr", "ssim", "ncc")
        }
        return cls(similarity=measures, retrieval=retrieval, fid=tree.get("fid"))


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """How well predicted class maps agree with the true ones; shares in [0, 1]."""

    miou: Number
    """Mean intersection over union, of the classes that occur."""
    miou_shuffled: Number
    """The same against the true map of the row before."""
    accuracy: Number
    ignored: Number
    """Share of pixels of no class, which nothing counts."""
    iou: Mapping[str, Number]
    """By class; NaN where it does not occur."""
    confusion: Sequence[Sequence[int]]
    """Pixels by true (row) and predicted class (column)."""

    def to_json(self) -> Mapping[str, Any]:
        """Return the numbers under their names in results.json."""
        return {
            "miou": self.miou,
            "miou_shuffled": self.miou_shuffled,
            "accuracy": self.accuracy,
            "ignored": self.ignored,
            "iou": dict(self.iou),
            "confusion": [list(row) for row in self.confusion],
        }


@dataclass(frozen=True, kw_only=True)
class IndexSummary:
    """Which index was searched."""

    version: str
    model: str
    """Fingerprint of the matcher."""
    rows: int
    recall: Mapping[str, Number] | None
    """What the build measured of its shortlist; None without queries."""
    created: str
    """Date and time, ISO 8601."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All numbers of an evaluation."""

    index: IndexSummary
    queries: int
    """Queries that were measured."""
    failed: int
    """Rows that failed in synthesis, which no number counts."""
    retrieval: Mapping[str, Mapping[str, RetrievalResult]]
    """By view ("360-north"), then by modality ("G+A+S")."""
    generation: GenerationResult | None
    """None where no row has both pictures."""
    segmentation: SegmentationResult | None
    """None where no row has both maps."""

    def to_json(self) -> Mapping[str, Any]:
        """Return the tree of results.json; numbers that are not finite are None."""
        tree = {
            "index": dict(vars(self.index)),
            "queries": self.queries,
            "failed": self.failed,
            "retrieval": {
                view: {modality: result.to_json() for modality, result in results.items()}
                for view, results in self.retrieval.items()
            },
            "generation": self.generation.to_json() if self.generation else {},
            "segmentation": self.segmentation.to_json() if self.segmentation else {},
        }
        return {name: storage.replace_non_finite(value) for name, value in tree.items()}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Results":
        """Read what `to_json` returns; None is NaN again."""
        names = ("retrieval", "generation", "segmentation")
        retrieval, generation, segmentation = (_restore_nan(tree[name]) for name in names)
        return cls(
            index=IndexSummary(**tree["index"]),
            queries=tree["queries"],
            failed=tree["failed"],
            retrieval={
                view: {name: RetrievalResult.from_json(part) for name, part in parts.items()}
                for view, parts in retrieval.items()
            },
            generation=GenerationResult.from_json(generation) if generation else None,
            segmentation=SegmentationResult(**segmentation) if segmentation else None,
        )

    def write(self, directory: str) -> None:
        """Write results.json below `directory`."""
        storage.write_json(storage.join(directory, FILE), dict(self.to_json()))

    @classmethod
    def read(cls, directory: str) -> "Results":
        """Read results.json of `directory`."""
        return cls.from_json(storage.read_json(storage.join(directory, FILE)))


def _flatten_recalls(recalls: Mapping[str, Recall]) -> dict[str, Number]:
    tree: dict[str, Number] = {}
    for name, recall in recalls.items():
        tree |= {name: recall.value, f"{name}_low": recall.low, f"{name}_high": recall.high}
        tree |= {} if recall.k is None else {f"{name}_k": recall.k}
    return tree


def _read_recalls(tree: Mapping[str, Any]) -> dict[str, Recall]:
    return {
        name: Recall(
            value=tree[name],
            low=tree[f"{name}_low"],
            high=tree[f"{name}_high"],
            k=tree.get(f"{name}_k"),
        )
        for name in tree
        if f"{name}_low" in tree
    }


def _read_difference(tree: Mapping[str, Any]) -> Difference:
    value, low, high = (tree[f"recall@1{end}"] for end in ("", "_low", "_high"))
    return Difference(value=value, low=low, high=high)


def _read_near(tree: Mapping[str, Any]) -> NearResult:
    near = _below(tree, "near_")
    names = [name for name in near if f"{name}_chance" in near]
    return NearResult(
        recalls={name: near[name] for name in names},
        chance={name: near[f"{name}_chance"] for name in names},
        gallery=near["gallery"],
        queries=near["queries"],
    )


def _read_two_stage(tree: Mapping[str, Any]) -> TwoStageResult:
    recalls = {name: value for name, value in tree.items() if name.startswith("recall@")}
    rest = {name: value for name, value in tree.items() if name not in recalls}
    return TwoStageResult(recalls=recalls, **rest)


def _read_distance(tree: Mapping[str, Any]) -> DistanceResult:
    return DistanceResult(
        within=_below(tree, "within_"),
        median=tree["distance_m"],
        p90=tree["distance_m_p90"],
        mean=tree["distance_m_mean"],
    )


def _below(tree: Mapping[str, V], prefix: str) -> dict[str, V]:
    return {k.removeprefix(prefix): v for k, v in tree.items() if k.startswith(prefix)}


def _restore_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _restore_nan(part) for name, part in value.items()}
    return math.nan if value is None else value
