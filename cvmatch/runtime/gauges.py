"""Gauges that jobs report to Ray, which Prometheus scrapes on each node, with `ray_` before each.

Boards for Grafana are in deploy/grafana.
"""

import functools

import ray
from ray.util.metrics import Gauge

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cvmatch_stream_rows": (
        "Rows of the output that are done, those of earlier runs of the job included.",
        ("stream",),
    ),
    "cvmatch_stream_rows_expected": ("Rows that the output will have.", ("stream",)),
    "cvmatch_stream_rows_failed": ("Rows done so far that hold an error.", ("stream",)),
    "cvmatch_stage_rows_per_second": (
        "Rows a second that a stage makes while it has work.",
        ("stream", "stage"),
    ),
    "cvmatch_stage_queued_blocks": ("Blocks that wait for a stage.", ("stream", "stage")),
    "cvmatch_stage_seconds": (
        "Seconds that a stage's finished tasks have taken, of all together.",
        ("stream", "stage"),
    ),
    "cvmatch_train_steps": ("Steps of a training that are done.", ("run",)),
    "cvmatch_train_epoch": ("Epochs of a training that are done.", ("run",)),
    "cvmatch_train_loss": ("Loss of a training's last steps.", ("run",)),
    "cvmatch_validation": ("Value of a metric after the last epoch.", ("run", "name")),
    "cvmatch_shortlist_recall": (
        "Share, in [0, 1], of the exact first answers that an index's shortlist holds.",
        ("index",),
    ),
}
"""Name of a gauge -> what it says, and its tags."""


def set_gauge(name: str, value: float | int, /, **tags: str) -> None:
    """Set a gauge; nothing where no Ray is there to report it."""
    if ray.is_initialized():
        _gauge(name).set(value, tags)


@functools.cache
def _gauge(name: str) -> Gauge:
    description, tags = GAUGES[name]
    return Gauge(name, description, tag_keys=tags)
