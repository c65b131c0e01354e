"""Names of the metrics that jobs report to Ray; in Prometheus `ray_` stands before each."""

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cvmatch_stream_rows": (
        "Rows of the output that are done, those of earlier runs of the job included.",
        ("job",),
    ),
    "cvmatch_stream_rows_expected": ("Rows that the output will have.", ("job",)),
    "cvmatch_stream_rows_failed": ("Rows done so far that hold an error.", ("job",)),
    "cvmatch_stage_rows_per_second": (
        "Rows a second that a stage makes while it has work.",
        ("job", "stage"),
    ),
    "cvmatch_stage_queued_blocks": ("Blocks that wait for a stage.", ("job", "stage")),
    "cvmatch_stage_seconds": (
        "Seconds that a stage's finished tasks have taken, of all together.",
        ("job", "stage"),
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
