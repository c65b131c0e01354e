import json
import math

from cvmatch.evaluate.results import (
    DistanceResult,
    GenerationResult,
    IndexSummary,
    NearResult,
    PictureRetrieval,
    Recall,
    Results,
    RetrievalResult,
    SegmentationResult,
    TwoStageResult,
)
from tests.helpers.present import present

RECALL = Recall(value=0.5, low=0.25, high=0.75)


def results(**changes):
    retrieval = RetrievalResult(
        gallery=12,
        recalls={"recall@1": RECALL, "recall@1%": Recall(value=0.5, low=0.0, high=1.0, k=1)},
        median_rank=5.5,
        one_of_ten={"top1": 0.1, "top5": 0.5},
        near=NearResult(
            recalls={"recall@1": 0.25}, chance={"recall@1": 0.2}, gallery=6.0, queries=11
        ),
        distance=DistanceResult(within={"25m": 0.5, "50m": 0.75}, median=7.5, p90=60.0, mean=9.0),
        two_stage=TwoStageResult(
            recalls={"recall@1": 0.5}, exact_top1_kept=1.0, exact_top10_kept=0.75, shortlist=5
        ),
        ms={"exact": 2.0, "two-stage": 1.0},
    )
    pictures = PictureRetrieval(
        gallery=12.0, recalls={"recall@10%": Recall(value=0.5, low=0.0, high=1.0, k=1.0)}
    )
    parts = {
        "index": IndexSummary(
            version="v000001", model="33a5", rows=12, recall={"top1": 1.0}, created="2026-11-29"
        ),
        "queries": 12,
        "failed": 3,
        "retrieval": {"360-north": {"G+A": retrieval}},
        "generation": GenerationResult(
            similarity={"psnr": 11.5, "psnr_shuffled": 11.0, "ncc": 0.5},
            retrieval={"luminance": pictures, "chroma": pictures},
            fid=3.5,
        ),
        "segmentation": SegmentationResult(
            miou=0.5, miou_shuffled=0.25, accuracy=0.75, ignored=0.0, iou={"tree": math.nan},
            confusion=[[1, 2], [3, 4]],
        ),
    }  # fmt: skip
    return Results(**{**parts, **changes})


def test_to_json_names_each_number_as_results_json_does():
    tree = results().to_json()
    assert tree["retrieval"]["360-north"]["G+A"] == {
        "recall@1": 0.5, "recall@1_low": 0.25, "recall@1_high": 0.75,
        "recall@1%": 0.5, "recall@1%_low": 0.0, "recall@1%_high": 1.0, "recall@1%_k": 1,
        "median_rank": 5.5, "gallery": 12, "one_of_ten_top1": 0.1, "one_of_ten_top5": 0.5,
        "near_recall@1": 0.25, "near_recall@1_chance": 0.2, "near_gallery": 6.0,
        "near_queries": 11, "within_25m": 0.5, "within_50m": 0.75,
        "distance_m": 7.5, "distance_m_p90": 60.0, "distance_m_mean": 9.0,
        "two-stage": {
            "recall@1": 0.5, "exact_top1_kept": 1.0, "exact_top10_kept": 0.75, "shortlist": 5
        },
        "ms": {"exact": 2.0, "two-stage": 1.0},
    }  # fmt: skip
    assert tree["generation"]["psnr"] == 11.5
    assert tree["generation"]["recall@10%_k"] == tree["generation"]["chroma/recall@10%_k"] == 1.0
    assert tree["generation"]["fid"] == 3.5
    assert tree["segmentation"]["iou"] == {"tree": None}  # JSON has no NaN
    assert (tree["queries"], tree["failed"], tree["index"]["rows"]) == (12, 3, 12)


def test_results_that_are_read_are_those_that_were_written(tmp_path):
    results().write(str(tmp_path))
    loaded = Results.read(str(tmp_path))
    assert loaded.to_json() == results().to_json()
    assert loaded.retrieval == results().retrieval
    assert loaded.generation == results().generation
    assert math.isnan(present(loaded.segmentation).iou["tree"])
    assert json.loads((tmp_path / "results.json").read_text()) == results().to_json()


def test_results_without_pictures_or_rivals_are_read_too():
    alone = RetrievalResult(gallery=1, recalls={"recall@1": RECALL}, median_rank=1.0)
    small = results(retrieval={"360-north": {"G": alone}}, generation=None, segmentation=None)
    assert small.to_json()["generation"] == small.to_json()["segmentation"] == {}
    assert Results.from_json(small.to_json()) == small
