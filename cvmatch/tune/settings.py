"""Settings of a search over the settings of a training."""

from dataclasses import dataclass
from typing import Literal

from cvmatch.training.settings import is_score
from cvmatch.tune.trials import Goal

Stage = Literal["generator", "segmenter", "matcher"]

Sampler = Literal["tpe", "cmaes", "random", "grid"]
Scheduler = Literal["asha", "median", "none", "pbt"]

METRICS = {
    "generator": "val/retrieval_mrr",
    "segmenter": "val/miou",
    "matcher": "val/mrr",
}
"""What trials are compared by.

None changes by itself with what is searched. A loss would: the least margin has the least, and the
error of the noise alone, the generator's val/loss, is least where the image losses weigh least.
"""


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search the settings of one stage's training."""

    stage: Stage = "matcher"
    """Whose training."""
    base: str = ""
    """YAML file of the settings that all trials share, for the stage's job; empty: defaults."""
    space: str = ""
    """YAML file of what is searched, a line a field: `margin: {uniform: [0.1, 0.5]}` (or
    loguniform), `fit.batch: {choice: [8, 16]}`; empty: the stage's default."""
    trials: int = 16
    """Settings tried."""
    concurrent: int = 2
    """Trials at a time; their CPUs, and one to read, must fit the cluster."""
    epochs: int = 10
    """Epochs of a trial that is never stopped."""
    grace: int = 1
    """Epochs before a trial may be stopped."""
    metric: tuple[str, ...] = ()
    """Metrics of an epoch by which trials are compared; `seconds` is what a trial took. Of several,
    the search looks for settings that no others beat in all (a Pareto front), and best.yaml is the
    best by the first. Empty: val/retrieval_mrr of the generator, val/miou of the segmenter, val/mrr
    of the matcher. Of losses, errors and seconds small values are good, of scores large ones."""
    sampler: Sampler = "tpe"
    """Who proposes settings: tpe (also where some fields depend on others), cmaes (for ranges: what
    is a choice, it draws at random), random, or grid: every combination of choices, `trials` or
    not."""
    scheduler: Scheduler = "asha"
    """Who stops poor trials: asha (the better third goes on, epoch by epoch), median (what is below
    the median of the others' means), or none. pbt is refused: see docs/tuning.md."""
    enqueue: tuple[str, ...] = ()
    """Settings that are tried first: `defaults` (those of `base`), and trials.json of earlier
    searches, the best ones first; half of `trials` at most."""
    seed: int = 0
    """Seed of the proposals. (The trials' own is `fit.seed`.)"""
    repeats: int = 0
    """Other seeds with which the best few trials, and the settings of `base`, are trained in full
    after the search: the winner is the best by their mean, not the luckiest trial. 0: none."""
    finalists: int = 3
    """Trials that are repeated."""
    test: str = ""
    """YAML file of the stage's settings whose `val` are rows that the search never sees: what is
    repeated is measured on them, too, and nothing is chosen by it. Empty: none."""
    storage: str = "runs"
    """Directory or URI of searches, shared by all nodes."""
    name: str = ""
    """Name of the search: the same name and storage go on with it. Empty: a new one every time."""
    output: str = "tuned"
    """Directory of best.yaml, which the stage's job takes as --config, of trials.json, of the page
    tune.html, and where they are asked for of front/ and repeats.json."""

    def __post_init__(self) -> None:
        if min(self.trials, self.concurrent, self.grace) < 1 or self.epochs < self.grace:
            raise ValueError(
                "tune: expected trials, concurrent and grace >= 1 and epochs >= grace, got "
                f"{self.trials}, {self.concurrent}, {self.grace} and {self.epochs}."
            )
        if self.repeats < 0 or self.finalists < 1 or (self.test and not self.repeats):
            raise ValueError(
                "tune: expected repeats >= 0, at least 1 of them with --test, and finalists >= 1, "
                f"got repeats {self.repeats} and finalists {self.finalists}."
            )
        self._check_goals()
        if self.scheduler == "pbt":
            # A trial's training keeps its checkpoints itself; without those in Tune, PBT exploits
            # nothing and says so only in the log.
            raise ValueError(
                "tune: population-based training (pbt) copies checkpoints between trials, which "
                "Ray Tune cannot do where Ray Train's controller holds them: it would train on "
                "unchanged, without an error. Pass --scheduler asha, median or none."
            )

    def _check_goals(self) -> None:
        if len(self.goals) == 1:
            return
        if self.scheduler != "none":
            raise ValueError(
                f"tune: expected scheduler none beside several metrics ({', '.join(self.metric)}), "
                f"got {self.scheduler}: it stops trials by one of them, and those then cost less. "
                "Pass --scheduler none."
            )
        if self.sampler == "cmaes":
            raise ValueError(
                "tune: CMA-ES searches by one metric, got several. Pass --sampler tpe or random."
            )

    @property
    def goals(self) -> list[Goal]:
        """The metrics by which trials are compared, and whether small or large values are good."""
        metrics = self.metric or (METRICS[self.stage],)
        return [(metric, "max" if is_score(metric) else "min") for metric in metrics]

    @property
    def goal(self) -> Goal:
        """The first of them."""
        return self.goals[0]
