"""Are probabilities of answers right on worlds that their calibration has not seen?

On the matcher and the index of "sum (default)" of matching.py, which `--keep` finds again.
"""

import os
import tempfile
from dataclasses import replace

import matching
import numpy as np
import torch
from _harness import fill_sizes, parse_flags, write_results
from matching import GALLERY, MatchingBench, Rows, find

from cvmatch.evaluate.queries import embed_queries, read_query_ids
from cvmatch.evaluate.settings import Evaluate
from cvmatch.index.reader import Index
from cvmatch.match.model import Matcher
from cvmatch.match.settings import Modality
from cvmatch.nn.calibration import TOP, Answers, calibrate, measure_auroc, measure_error
from cvmatch.runtime import hardware, session

MODALITIES: tuple[Modality, ...] = ("G", "G+A")


def collect_answers(rows: Rows, queries: str) -> dict[Modality, list[Answers]]:
    """Return the answers of each gallery's queries, which are ranked in their gallery alone."""
    index = Index.open(f"{rows.at}/{matching.DEFAULT}/index")
    vectors = embed_queries(
        Evaluate(queries=queries, modalities=MODALITIES), Matcher.load(index.matcher_dir)
    )
    tiles, ids = index.live_ids.to_pylist(), read_query_ids(queries)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    own = torch.tensor([tiles.index(ids[row]) for row in order])
    found: dict[Modality, list[Answers]] = {}
    for (_, modality), query in vectors.items():
        scores = torch.cat([*index.iter_scores(query[order])], dim=1)[:, own]
        found[modality] = [
            _rank(scores[at : at + GALLERY, at : at + GALLERY])
            for at in range(0, len(scores), GALLERY)
        ]
    return found


def _rank(scores: torch.Tensor) -> Answers:
    best, order = scores.topk(min(TOP, scores.shape[1]))
    own = order == torch.arange(len(scores))[:, None]
    places = torch.where(own.any(1), own.int().argmax(1), best.shape[1])
    return Answers(best.double().cpu().numpy(), places.cpu().numpy())


def judge(fitted_on: Answers, judged: Answers) -> dict[str, float]:
    """Fit on the queries of one gallery, and measure on those of another."""
    fitted = calibrate(fitted_on)
    assert fitted is not None
    both = [(judged.scores, judged.places == 0)]
    both.append((judged.without_own(), np.zeros(len(judged.places), bool)))
    confidence = np.concatenate([fitted.probabilities(scores)[:, 0] for scores, _ in both])
    here, away = (fitted.present(scores) for scores, _ in both)
    return {
        "error": measure_error(confidence, np.concatenate([right for _, right in both])),
        "auroc": measure_auroc(here, away),
        "error said at build": fitted.error,
        "auroc said at build": fitted.auroc,
    }


def main(bench: MatchingBench) -> None:
    """Measure each modality on each gallery with the calibration of the next one."""
    bench = fill_sizes(bench, matching.SIZES[bench.quick])
    session.start(logical_cpus=4)
    hardware.keep_freed_memory()
    table, figures = [], {}
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        for seed in bench.seeds:
            rows = Rows(bench, matching.place_of(bench, at, seed), seed)
            find(bench, rows, matching.DEFAULT)
            for modality, galleries in collect_answers(rows, f"{rows.synthesized}/val").items():
                for number, judged in enumerate(galleries):
                    fitted_on = galleries[(number + 1) % len(galleries)]
                    values = judge(fitted_on, judged)
                    row = {"seed": seed, "modality": modality, "gallery": number}
                    right = float((judged.places == 0).mean())
                    table.append(row | {"R@1, %": f"{100 * right:.1f}"} | _round(values))
                    for name in ("error", "auroc"):
                        figures[f"{seed}.{modality}.{number}.{name}"] = values[name]
    notes = (
        f"The matcher `{matching.DEFAULT}` of matching.py. Each query is ranked in a gallery of "
        f"{GALLERY} tiles, once with its own and once without it; probabilities are fitted on the "
        "queries of another gallery, of other worlds. error: expected calibration error of the "
        "best tile's probability, over ten groups of equal size; auroc: of the probability that "
        "the index holds the place. Said at build: by halves of the queries it was fitted on.",
    )
    write_results(replace(bench, only=()), "Calibration", table, figures, notes)


def _round(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in values.items()}


if __name__ == "__main__":
    main(parse_flags(MatchingBench))
