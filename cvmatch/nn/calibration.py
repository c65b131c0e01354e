"""Scores of a search -> probabilities: of each tile, and that the place is not in the index.

A query's tile may not be there at all. So the best tile's probability is that of two things at
once: the index holds the place (a logistic regression on the best score and its lead over the next
one), and it is this tile (the softmax of the scores, by a fitted temperature: Guo et al., "On
Calibration of Modern Neural Networks", 2017). Both are fitted on queries whose tiles the index
holds, each once with its tile and once without it.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

TOP = 64
"""Best tiles that take part in a softmax; the others' share of it is not seen."""

FEWEST = 40
"""Queries that a calibration needs at least, of which each half judges the other's."""

BINS = 10
"""Groups of equal size of the calibration error."""

_PENALTY = 1e-3  # of the squared weights: separable queries would let them grow for ever


@dataclass(frozen=True)
class Calibration:
    """How the scores of queries of one modality become probabilities."""

    temperature: float
    """What scores are divided by in the softmax."""
    bias: float
    """Of the logit that the index holds the place."""
    best: float
    """Weight of the best score, by the temperature, in that logit."""
    lead: float
    """Weight of its lead over the next one."""
    queries: int
    """That it was fitted on."""
    error: float = 0.0
    """Expected calibration error of the best tile's probability, in [0, 1], of queries that a fit
    has not seen: half of them with their tile, half without."""
    auroc: float = 0.0
    """How well the two are told apart, of the same queries: area under the ROC curve, in [0, 1]."""

    def present(self, scores: Float[np.ndarray, "query k"]) -> Float[np.ndarray, " query"]:
        """Return the probability that the index holds the place.

        Args:
            scores: of the best tiles, best first; -inf where there is none.
        """
        return np.exp(_log_sigmoid(_features(scores, self.temperature) @ self._weights))

    def probabilities(self, scores: Float[np.ndarray, "query k"]) -> Float[np.ndarray, "query k"]:
        """Return the probability of each tile; with that of no tile (1 - `present`) they sum to 1.

        Args:
            scores: of the best tiles, best first; -inf where there is none.
        """
        return self.present(scores)[:, None] * np.exp(_log_softmax(scores / self.temperature))

    @property
    def _weights(self) -> Float[np.ndarray, "3"]:
        return np.array([self.bias, self.best, self.lead])


class Answers(NamedTuple):
    """The best tiles of queries whose tiles the index holds."""

    scores: Float[np.ndarray, "query k"]
    """Best first."""
    places: Int64[np.ndarray, " query"]
    """Where each query's own tile is among them, from 0; k: behind them."""

    def without_own(self) -> Float[np.ndarray, "query rest"]:
        """Return the scores as they are where the own tile is not in the index."""
        count = self.scores.shape[1]
        kept = np.arange(count)[None] != np.minimum(self.places, count - 1)[:, None]
        return self.scores[kept].reshape(len(self.scores), count - 1)

    def take(self, rows: Int64[np.ndarray, " row"]) -> "Answers":
        """Return some of the queries."""
        return Answers(self.scores[rows], self.places[rows])


def calibrate(answers: Answers, seed: int = 0) -> Calibration | None:
    """Fit on all queries, and judge by halves of them; None where there are too few."""
    count = len(answers.scores)
    if count < FEWEST or answers.scores.shape[1] < 3:
        return None
    order = np.random.default_rng(seed).permutation(count)
    halves = order[: count // 2], order[count // 2 :]
    confidence, right, here = [], [], []
    for own, other in (halves, halves[::-1]):
        fitted, judged = _fit(answers.take(own)), answers.take(other)
        for scores, present in ((judged.scores, True), (judged.without_own(), False)):
            confidence.append(fitted.probabilities(scores)[:, 0])
            right.append((judged.places == 0) & present)
            here.append(fitted.present(scores))
    whole = _fit(answers)
    present = np.concatenate([here[0], here[2]])
    absent = np.concatenate([here[1], here[3]])
    return replace(
        whole,
        error=measure_error(np.concatenate(confidence), np.concatenate(right)),
        auroc=measure_auroc(present, absent),
    )


def measure_error(
    confidence: Float[np.ndarray, " answer"], right: Bool[np.ndarray, " answer"]
) -> float:
    """Return the expected calibration error: the mean distance of confidence from the share right.

    Over BINS groups of answers of like confidence, of equal size (Nixon et al., "Measuring
    Calibration in Deep Learning", 2019).
    """
    order = np.argsort(confidence, kind="stable")
    groups = np.array_split(order, BINS)
    gaps = [
        abs(confidence[one].mean() - right[one].mean()) * len(one) for one in groups if len(one)
    ]
    return float(sum(gaps) / len(confidence))


def measure_auroc(
    positive: Float[np.ndarray, " positive"], negative: Float[np.ndarray, " negative"]
) -> float:
    """Return the share of pairs in which the positive has the larger value; ties count half."""
    ordered = np.sort(negative)
    wins = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(wins.mean() / 2 / len(negative))


def _fit(answers: Answers) -> Calibration:
    from scipy import optimize  # noqa: PLC0415 (a second, which a search does not need)

    temperature = _fit_temperature(answers)
    inputs = np.concatenate(
        [_features(answers.scores, temperature), _features(answers.without_own(), temperature)]
    )
    labels = np.repeat([1.0, -1.0], len(answers.scores))

    def loss(weights: np.ndarray) -> float:
        logits = labels * (inputs @ weights)
        return float(-_log_sigmoid(logits).mean() + _PENALTY * (weights**2).sum())

    weights = optimize.minimize(loss, np.zeros(inputs.shape[1]), method="BFGS").x.tolist()
    return Calibration(temperature, *weights, queries=len(answers.scores))


def _fit_temperature(answers: Answers) -> float:
    """Return the temperature of least cross entropy of the tiles that are among the best."""
    found = np.flatnonzero(answers.places < answers.scores.shape[1])
    if not len(found):
        return 1.0
    from scipy import optimize  # noqa: PLC0415 (see above)

    scores, places = answers.scores[found], answers.places[found]

    def loss(logarithm: float) -> float:
        logs = _log_softmax(scores / np.exp(logarithm))
        return float(-logs[np.arange(len(places)), places].mean())

    best: Any = optimize.minimize_scalar(loss, bounds=(-9.0, 2.0))
    return float(np.exp(best.x))


def _features(
    scores: Float[np.ndarray, "query k"], temperature: float
) -> Float[np.ndarray, "query 3"]:
    """Return 1, the best score, and its lead; an only tile leads as if the next scored 0."""
    best = scores[:, 0]
    second = scores[:, 1] if scores.shape[1] > 1 else np.zeros_like(best)
    lead = best - np.where(np.isfinite(second), second, 0.0)
    return np.stack([np.ones_like(best), best / temperature, lead / temperature], axis=1)


def _log_sigmoid(logits: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    return -np.logaddexp(0.0, -logits)


def _log_softmax(logits: Float[np.ndarray, "query k"]) -> Float[np.ndarray, "query k"]:
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
