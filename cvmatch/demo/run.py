"""What the demo adds to the pipeline: which stage is at work, its results, and its report."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from ray.train import Result

from cvmatch import config as configs
from cvmatch.data import schema, storage
from cvmatch.demo.plan import Settings, settings
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import Demo
from cvmatch.evaluate.results import Recall, Results
from cvmatch.evaluate.run import evaluate
from cvmatch.generate import train as generator
from cvmatch.index.build import build
from cvmatch.match import train as matcher
from cvmatch.match.batches import read_pair_ids
from cvmatch.report import (
    Curve,
    Example,
    Page,
    Score,
    Trial,
    evaluation,
    places,
    provenance,
    report,
    score_table,
    scores,
)
from cvmatch.runtime import session
from cvmatch.search.files import search_files
from cvmatch.search.settings import SearchFiles
from cvmatch.segment import train as segmenter
from cvmatch.synthesize.run import synthesize
from cvmatch.tune import run as tune
from cvmatch.tune.run import TuneResult

EXPECTED = {
    "world": 35,
    "segmenter": 51,
    "generator": 211,
    "synthesize": 84,
    "tune": 47,
    "matcher": 109,
    "index": 8,
    "evaluate": 7,
    "search": 1,
}
"""Seconds of each stage of the demo preset on two cores: how long is left is reckoned from them."""

LIMITS = (
    "The embedded data set is drawn by a program. It shows that the stages work together and that "
    "each learns from the one before; its numbers are never results on CVUSA, nor a forecast of "
    "them.",
)
"""What the numbers of the demo do not say."""

SHOWN = 10
"""Held-out pairs in the report."""

_log = logging.getLogger(__name__)


def run(config: Demo) -> str:
    """Run the whole pipeline, and write results.json and report.html.

    Returns the results as a table for a terminal, and where the files are.
    """
    plan, step, runs = settings(config), Steps(), {}
    with step("world"):
        session.start(logical_cpus=4)  # each worker imports torch for itself
        counts = make_world(plan.world)
    with step("segmenter"):
        runs["segmenter"] = segmenter.train(plan.segmenter)
    with step("generator"):
        runs["generator"] = generator.train(plan.generator)
    with step("synthesize"):
        for part in plan.synthesize:
            synthesize(part)
    with step("tune"):
        tuned = tune.search(plan.tune, plan.trial)
    with step("matcher"):
        runs["matcher"] = matcher.train(configs.override(plan.matcher, tuned.params))
    with step("index"):
        build(plan.index)
    with step("evaluate"):
        measured = measure(plan)
    with step("search"):
        examples = look_up(config, plan)
    numbers = summarize(counts, runs, tuned, measured, step.seconds)
    page = write(config, numbers, examples, runs, tuned)
    return (
        f"{table(numbers)}\n"
        f"results  {storage.absolute(config.output)}/results.json\n"
        f"report   {storage.absolute(page)}"
    )


class Steps:
    """Announces stages, takes their time, and reckons what is left."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One stage, named as in EXPECTED."""
        done = list(self.seconds)
        expected = sum(EXPECTED[stage] for stage in done)
        pace = sum(self.seconds.values()) / expected if expected else 1.0
        left = pace * sum(s for stage, s in EXPECTED.items() if stage not in done)
        text = f"[{len(done) + 1}/{len(EXPECTED)}] {name}"
        _log.info("%s  (about %d:%02d left in all)", text, left // 60, left % 60)
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin
        _log.info("%s  done in %.0f s", text, self.seconds[name])


def summarize(
    counts: Mapping[str, int],
    runs: Mapping[str, Result],
    tuned: TuneResult,
    measured: Results,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return the numbers of results.json, in [0, 1] where they are shares.

    All but the counts and the search are of held-out worlds. An interval (95 %) of "name" is
    "name_95".
    """
    ablation = measured.retrieval["360-north"]
    best = ablation["G+A+S"]
    generation, segmentation = measured.generation, measured.segmentation
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
            "one_of_ten": {name: best.one_of_ten[name] for name in ("top1", "top5")},
            "near": {
                "gallery": best.near.gallery,
                "recall@1": best.near.recalls["recall@1"],
                "recall@1_chance": best.near.chance["recall@1"],
            },
            "distance_m": best.distance_m,
        },
        "index": {"tiles": measured.index.rows},
        "search": {
            "gallery": measured.index.rows,
            "recall@1": best.two_stage.recalls["recall@1"],
            "exact_top1_kept": best.two_stage.exact_top1_kept,
            "ms_per_query": best.ms["two-stage"],
            "ms_per_query_exact": best.ms["exact"],
        },
        "tune": {"trials": len(tuned.trials), "best": {**tuned.params, tuned.metric: tuned.value}},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def look_up(config: Demo, settings: Settings) -> list[Example]:
    """Search the index for ten held-out panoramas, as a user does, and gather the pictures."""
    location = settings.evaluate.queries
    ids = read_pair_ids(location)
    queries = ids[:: max(1, len(ids) // SHOWN)][:SHOWN]
    files = {f"{config.output}/world/streetview/{pair_id}.jpg": pair_id for pair_id in queries}
    flags = settings.synthesize[1]
    asked = SearchFiles(
        panorama=tuple(files),
        index=settings.index.output,
        generator=flags.generate.model,
        segmenter=flags.segment.model,
        seed=flags.generate.seed,
        top_k=5,
    )
    found: dict[str, list[dict[str, Any]]] = {pair_id: [] for pair_id in queries}
    for answer in search_files(asked):
        found[files[answer.query]] = answer.tiles
    ranks = _ranks(settings.evaluate.output)
    pictures = places.pictures(
        location, {row["tile"] for rows in found.values() for row in rows} | {*found}
    )
    return [
        places.example(
            pair_id,
            [(row["tile"], row["score"]) for row in rows],
            pictures,
            ranks.get(pair_id),
        )
        for pair_id, rows in found.items()
    ]


def write(
    config: Demo,
    numbers: dict[str, Any],
    examples: Sequence[Example],
    runs: Mapping[str, Result],
    tuned: TuneResult,
) -> str:
    """Write results.json and report.html; gives the report's location."""
    storage.write_json(f"{config.output}/results.json", numbers)
    seconds = numbers["seconds"]
    page = Page(
        title="cvmatch: the demo",
        summary=(
            f"{numbers['pairs']['train']} procedural street panoramas and satellite tiles to learn "
            f"from, {numbers['pairs']['test']} of unseen places to test on; every stage ran on "
            f"this machine in {sum(seconds.values()) / 60:.1f} minutes."
        ),
        run=provenance(),
        config=configs.dump(config),
        results=_scores(numbers),
        examples=examples,
        curves={name: _curves(run.metrics_dataframe) for name, run in runs.items()},
        trials=[_trial(trial, tuned) for trial in tuned.trials],
        objective=tuned.metric,
        maximise=tuned.maximise,
        seconds=seconds,
        limits=LIMITS,
    )
    return report(page, f"{config.output}/report.html")


def measure(plan: Settings) -> Results:
    """Evaluate, and write the page of it; returns the results."""
    results = evaluate(plan.evaluate)
    evaluation(plan.evaluate.output, plan.evaluate.queries, plan.evaluate.seed)
    return results


def table(numbers: Mapping[str, Any]) -> str:
    """The results as a table for a terminal, with what a guess would score."""
    return score_table(_scores(numbers), "Held-out places")


def _scores(numbers: Mapping[str, Any]) -> list[Score]:
    """What was measured; the page shows times, trials and counts in places of their own."""
    return scores({k: v for k, v in numbers.items() if k not in ("seconds", "tune", "pairs")})


def _with_intervals(recalls: Mapping[str, Recall], names: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name in names:
        tree[name] = recalls[name].value
        tree[f"{name}_95"] = [recalls[name].low, recalls[name].high]
    return tree


def _trial(trial: Mapping[str, Any], tuned: TuneResult) -> Trial:
    metrics = trial["metrics"]
    last = max(other["metrics"].get("epoch", 0) for other in tuned.trials)
    state = "finished" if metrics.get("epoch", 0) == last else "stopped early"
    return Trial(
        params=trial["params"],
        value=metrics.get(tuned.metric, np.nan),
        state="failed" if trial["error"] else state,
    )


def _curves(frame: pd.DataFrame | None) -> list[Curve]:
    if frame is None:
        return []
    return [
        Curve(name=name, points=list(zip(frame["epoch"], frame[f"{name}/loss"], strict=True)))
        for name in ("train", "val")
        if f"{name}/loss" in frame
    ]


def _ranks(evaluation: str) -> dict[str, int]:
    rows = pd.read_parquet(f"{evaluation}/queries.parquet")
    level = rows[(rows["modality"] == "G+A+S") & (rows["view"] == "360-north")]
    return dict(zip(level[schema.PAIR_ID], level["rank"].astype(int), strict=True))
