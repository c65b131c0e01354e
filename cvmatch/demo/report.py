"""The demo's results.json and report.html: what each stage measured, and some searches."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import pandas as pd

from cvmatch import config as configs
from cvmatch.data import schema, storage
from cvmatch.demo.plan import Plan
from cvmatch.demo.settings import Demo
from cvmatch.evaluate.results import Number, Recall, Results, RetrievalResult
from cvmatch.evaluate.run import QUERIES_FILE
from cvmatch.match.batches import read_pair_ids
from cvmatch.report.charts import Curve
from cvmatch.report.examples import Answer, Example, build_example, read_pictures
from cvmatch.report.page import Page, Trial, describe_run, write_page
from cvmatch.report.scores import Score, collect_scores, format_table
from cvmatch.search.files import search_files
from cvmatch.search.settings import SearchFiles
from cvmatch.training.checkpoints import TrainResult
from cvmatch.tune.run import TrialSummary, TuneResult

LIMITS = (
    "The embedded data set is drawn by a program. It shows that the stages work together and that "
    "each learns from the one before; its numbers are never results on CVUSA, nor a forecast of "
    "them.",
)
"""What the numbers of the demo do not say."""

SHOWN = 10
"""Held-out pairs in the report."""

Tree = Mapping[str, object]
"""Numbers by name, or trees of them: see `scores.collect_scores`."""


class Numbers(TypedDict):
    """The tree of results.json."""

    pairs: Mapping[str, int]
    """By split."""
    segment: Tree
    generate: Tree
    match: Tree
    index: Mapping[str, int]
    search: Mapping[str, Number]
    tune: Tree
    """How many trials there were, and the best one's settings and value."""
    seconds: Mapping[str, float]
    """Of each stage."""


def summarize(
    counts: Mapping[str, int],
    runs: Mapping[str, TrainResult],
    tuned: TuneResult,
    evaluation: Results,
    seconds: Mapping[str, float],
) -> Numbers:
    """Return the numbers of results.json, in [0, 1] where they are shares.

    All but the counts and the search are of held-out worlds. An interval (95 %) of "name" is
    "name_95".
    """
    ablation = evaluation.retrieval["360-north"]
    best = ablation["G+A+S"]
    generation, segmentation = evaluation.generation, evaluation.segmentation
    assert best.near, "places of the demo lie near each other"
    assert best.two_stage, "the demo measures both searches"
    assert generation, "the demo has pictures"
    assert segmentation, "the demo has class maps"
    pictures = generation.retrieval["luminance"]
    segmenter, generator = (runs[name].metrics or {} for name in ("segmenter", "generator"))
    return {
        "pairs": {"train": counts["train"], "test": counts["val"]},
        "segment": {
            "miou": segmenter["val/miou"],
            "agreement": {
                "miou": segmentation.miou,
                "miou_shuffled": segmentation.miou_shuffled,
            },
        },
        "generate": {
            "loss_correct": generator["val/loss_correct"],
            "loss_shuffled": generator["val/loss_shuffled"],
            "retrieval": {
                "gallery": int(pictures.gallery),
                **_with_intervals(pictures.recalls, ("recall@1", "recall@10%")),
            },
        },
        "match": {
            "gallery": int(best.gallery),
            **_with_intervals(best.recalls, ("recall@1", "recall@5", "recall@10", "recall@1%")),
            "median_rank": best.median_rank,
            "ablation": {name: part.recalls["recall@1"].value for name, part in ablation.items()},
            "minus_G": _read_gain(best),
            "one_of_ten": {name: best.one_of_ten[name] for name in ("top1", "top5")},
            "near": {
                "gallery": best.near.gallery,
                "recall@1": best.near.recalls["recall@1"],
                "recall@1_chance": best.near.chance["recall@1"],
            },
            "distance_m": best.distance.median if best.distance else None,
        },
        "index": {"tiles": evaluation.index.rows},
        "search": {
            "gallery": evaluation.index.rows,
            "recall@1": best.two_stage.recalls["recall@1"],
            "exact_top1_kept": best.two_stage.exact_top1_kept,
            "ms_per_query": best.ms["two-stage"],
            "ms_per_query_exact": best.ms["exact"],
        },
        "tune": {"trials": len(tuned.trials), "best": {**tuned.params, tuned.metric: tuned.value}},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _read_gain(result: RetrievalResult) -> dict[str, Number | list[Number]]:
    assert result.minus_g, "the demo measures G alone"
    gain = result.minus_g
    return {"recall@1": gain.value, "recall@1_95": [gain.low, gain.high]}


def search_examples(config: Demo, plan: Plan) -> list[Example]:
    """Search the index for ten held-out panoramas, as a user does, and read their pictures."""
    location = plan.evaluate.queries
    ids = read_pair_ids(location)
    queries = ids[:: max(1, len(ids) // SHOWN)][:SHOWN]
    files = {f"{config.output}/world/streetview/{pair_id}.jpg": pair_id for pair_id in queries}
    held_out = plan.synthesize[1]
    search = SearchFiles(
        panorama=tuple(files),
        index=plan.index.output,
        generator=held_out.generate.model,
        segmenter=held_out.segment.model,
        seed=held_out.generate.seed,
        top_k=5,
    )
    tiles: dict[str, list[Answer]] = {pair_id: [] for pair_id in queries}
    for answer in search_files(search):
        tiles[files[answer.query]] = [
            Answer(tile["tile"], tile["score"], tile["branches"]) for tile in answer.tiles
        ]
    ranks = _read_ranks(plan.evaluate.output)
    names = {tile.pair_id for answer in tiles.values() for tile in answer} | {*tiles}
    pictures = read_pictures(location, names)
    return [
        build_example(pair_id, answer, pictures, ranks.get(pair_id))
        for pair_id, answer in tiles.items()
    ]


def write_report(
    config: Demo,
    numbers: Numbers,
    examples: Sequence[Example],
    runs: Mapping[str, TrainResult],
    tuned: TuneResult,
) -> str:
    """Write results.json and report.html; returns the report's location."""
    storage.write_json(f"{config.output}/results.json", numbers)
    seconds = numbers["seconds"]
    page = Page(
        title="cvmatch: the demo",
        summary=(
            f"{numbers['pairs']['train']} procedural street panoramas and satellite tiles to learn "
            f"from, {numbers['pairs']['test']} of unseen places to test on; every stage ran on "
            f"this machine in {sum(seconds.values()) / 60:.1f} minutes."
        ),
        run=describe_run(),
        config=configs.dump(config),
        results=_select_scores(numbers),
        examples=examples,
        curves={name: _read_curves(run.history) for name, run in runs.items()},
        trials=[_describe_trial(trial, tuned) for trial in tuned.trials],
        objective=tuned.metric,
        maximise=tuned.maximise,
        seconds=seconds,
        limits=LIMITS,
    )
    return write_page(page, f"{config.output}/report.html")


def format_results(numbers: Numbers) -> str:
    """Return the results as a table for a terminal, with what a guess would score."""
    return format_table(_select_scores(numbers), "Held-out places")


def _select_scores(numbers: Numbers) -> list[Score]:
    """Return what was measured; the page has times, trials and counts elsewhere."""
    return collect_scores(
        {k: v for k, v in numbers.items() if k not in ("seconds", "tune", "pairs")}
    )


def _with_intervals(
    recalls: Mapping[str, Recall], names: Sequence[str]
) -> dict[str, Number | list[Number]]:
    tree: dict[str, Number | list[Number]] = {}
    for name in names:
        tree[name] = recalls[name].value
        tree[f"{name}_95"] = [recalls[name].low, recalls[name].high]
    return tree


def _describe_trial(trial: TrialSummary, tuned: TuneResult) -> Trial:
    metrics = trial["metrics"]
    last = max(other["metrics"].get("epoch", 0) for other in tuned.trials)
    state = "finished" if metrics.get("epoch", 0) == last else "stopped early"
    return Trial(
        params=trial["params"] or {},
        value=metrics.get(tuned.metric, np.nan),
        state="failed" if trial["error"] else state,
    )


def _read_curves(frame: pd.DataFrame | None) -> list[Curve]:
    if frame is None:
        return []
    return [
        Curve(name=name, points=list(zip(frame["epoch"], frame[f"{name}/loss"], strict=True)))
        for name in ("train", "val")
        if f"{name}/loss" in frame
    ]


def _read_ranks(evaluation: str) -> dict[str, int]:
    rows = pd.read_parquet(f"{evaluation}/{QUERIES_FILE}")
    rows = rows[(rows["modality"] == "G+A+S") & (rows["view"] == "360-north")]
    return dict(zip(rows[schema.PAIR_ID], rows["rank"].astype(int), strict=True))
