"""Settings of a search over the settings of a training."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["generator", "segmenter", "matcher"]

METRICS = {
    "generator": ("val/loss", "min"),
    "segmenter": ("val/miou", "max"),
    "matcher": ("val/mrr", "max"),
}
"""What trials are compared by, and whether small or large values are good.

None changes by itself with what is searched. A training loss would: the least margin has the least.
(The generator's val/loss is the error of the noise alone, without the weights.)
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
    metric: str = ""
    """Metric of an epoch by which trials are compared; empty: val/loss of the generator, val/miou
    of the segmenter, val/mrr of the matcher."""
    mode: Literal["min", "max"] = "min"
    """Whether small or large values of `metric` are good; not read where it is empty."""
    seed: int = 0
    """Seed of the proposals. (The trials' own is `fit.seed`.)"""
    storage: str = "runs"
    """Directory or URI of searches, shared by all nodes."""
    name: str = ""
    """Name of the search: the same name and storage go on with it. Empty: a new one every time."""
    output: str = "tuned"
    """Directory of best.yaml, which the stage's job takes as --config, and of trials.json."""

    def __post_init__(self) -> None:
        if min(self.trials, self.concurrent, self.grace) < 1 or self.epochs < self.grace:
            raise ValueError(
                "tune: expected trials, concurrent and grace >= 1 and epochs >= grace, got "
                f"{self.trials}, {self.concurrent}, {self.grace} and {self.epochs}."
            )

    @property
    def goal(self) -> tuple[str, str]:
        """Metric by which trials are compared, and `min` or `max`."""
        return (self.metric, self.mode) if self.metric else METRICS[self.stage]
