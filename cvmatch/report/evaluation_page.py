"""The page of an evaluation: its numbers, and its best, worst and some random queries."""

import io

import numpy as np
import pandas as pd

from cvmatch.data import schema, storage
from cvmatch.evaluate.results import Results
from cvmatch.evaluate.run import QUERIES_FILE
from cvmatch.report.examples import Answer, Example, build_example, read_pictures
from cvmatch.report.page import Page, describe_run, write_page
from cvmatch.report.scores import collect_scores

SHOWN = 5
"""Queries of each kind."""


def write_evaluation_page(output: str, queries: str, seed: int = 0) -> str:
    """Write `report.html` beside what `evaluate` wrote; returns its location.

    Queries are of the first view and its fullest modality; tiles of other places than the queries'
    have no picture.

    Args:
        output: directory of the evaluation.
        queries: location of the synthesized rows.
        seed: of the choice of the random queries.
    """
    results = Results.read(output)
    content = storage.read_bytes(storage.join(output, QUERIES_FILE))
    rankings = pd.read_parquet(io.BytesIO(content))
    view = next(iter(results.retrieval))
    modality = max(results.retrieval[view], key=len)
    rows = rankings.loc[(rankings["view"] == view) & (rankings["modality"] == modality)]
    failed = results.failed
    lost = f"; {failed} more failed in synthesis, and no number counts them" if failed else ""
    page = Page(
        title="cvmatch: evaluation",
        summary=f"{len(rows)} panoramas of places that the matcher was not trained on{lost}. "
        f"The places below were searched by {modality} (view {view}).",
        run=describe_run(),
        results=collect_scores(results.to_json()),
        examples=_build_examples(rows, queries, seed),
    )
    return write_page(page, storage.join(output, "report.html"))


def select_queries(rows: pd.DataFrame, seed: int = 0, shown: int = SHOWN) -> dict[str, list[int]]:
    """Return positions of the best, the worst and some of the other queries; each at most once.

    Args:
        rows: with the right tile's `rank`, then its `score`, by which they are ordered.
        seed: of the choice of the others.
        shown: queries of each kind.
    """
    order = np.lexsort((-rows["score"].to_numpy(), rows["rank"].to_numpy()))
    best, worst = order[:shown], order[shown:][-shown:][::-1]
    others = order[shown : len(order) - len(worst)]
    sample = np.random.default_rng(seed).permutation(others)[:shown]
    kinds = {"one of the best": best, "one of the worst": worst, "drawn at random": np.sort(sample)}
    return {note: positions.tolist() for note, positions in kinds.items()}


def _build_examples(rows: pd.DataFrame, queries: str, seed: int) -> list[Example]:
    selected = [
        (note, rows.iloc[position])
        for note, positions in select_queries(rows, seed).items()
        for position in positions
    ]
    names = {name for _, row in selected for name in (row[schema.PAIR_ID], *row["best"])}
    pictures = read_pictures(queries, names)
    return [
        build_example(
            row[schema.PAIR_ID],
            [Answer(*found) for found in zip(row["best"], row["best_score"], strict=True)],
            pictures,
            int(row["rank"]),
            note,
        )
        for note, row in selected
    ]
