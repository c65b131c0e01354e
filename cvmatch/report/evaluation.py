"""The page of an evaluation: its numbers, and its best, worst and some random queries."""

import io

import numpy as np
import pandas as pd

from cvmatch.data import schema, storage
from cvmatch.evaluate.results import Results
from cvmatch.report import places
from cvmatch.report.page import Page, provenance, report
from cvmatch.report.scores import scores
from cvmatch.report.sheet import Example

SHOWN = 5
"""Queries of each kind."""


def evaluation(output: str, location: str, seed: int = 0) -> str:
    """Write `report.html` beside what `evaluate` wrote in `output`; returns its location.

    `location` has the synthesized rows. Queries are shown at the first view and its fullest level;
    tiles of other places than those rows' have no picture.
    """
    results = Results.read(output)
    content = storage.read_bytes(storage.join(output, "queries.parquet"))
    queries = pd.read_parquet(io.BytesIO(content))
    view = next(iter(results.retrieval))
    level = max(results.retrieval[view], key=len)
    rows = queries.loc[(queries["view"] == view) & (queries["modality"] == level)]
    failed = results.failed
    lost = f"; {failed} more failed in synthesis, and no number counts them" if failed else ""
    page = Page(
        title="cvmatch: evaluation",
        summary=f"{len(rows)} panoramas of places that the matcher was not trained on{lost}. "
        f"The places below were searched by {level} (view {view}).",
        run=provenance(),
        results=scores(results.to_json()),
        examples=_examples(rows, location, seed),
    )
    return report(page, storage.join(output, "report.html"))


def chosen(rows: pd.DataFrame, seed: int = 0, shown: int = SHOWN) -> dict[str, list[int]]:
    """Positions of the best, the worst and some of the other queries; each at most once.

    By the right tile's place, then by its score.
    """
    order = np.lexsort((-rows["score"].to_numpy(), rows["rank"].to_numpy()))
    best, worst = order[:shown], order[shown:][-shown:][::-1]
    others = order[shown : len(order) - len(worst)]
    drawn = np.random.default_rng(seed).permutation(others)[:shown]
    picked = {"one of the best": best, "one of the worst": worst, "drawn at random": np.sort(drawn)}
    return {note: positions.tolist() for note, positions in picked.items()}


def _examples(rows: pd.DataFrame, location: str, seed: int) -> list[Example]:
    picked = [
        (note, rows.iloc[at]) for note, positions in chosen(rows, seed).items() for at in positions
    ]
    wanted = {name for _, row in picked for name in (row[schema.PAIR_ID], *row["best"])}
    found = places.pictures(location, wanted)
    return [
        places.example(
            row[schema.PAIR_ID],
            list(zip(row["best"], row["best_score"], strict=True)),
            found,
            int(row["rank"]),
            note,
        )
        for note, row in picked
    ]
