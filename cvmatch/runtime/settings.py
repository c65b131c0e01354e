"""Settings of the actors that run a stage of a stream."""

from dataclasses import dataclass


class DryRun(Exception):
    """Says what a job would do, in place of doing it."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Actors that run one stage of a stream."""

    size: int = 1
    """Actors."""
    max_size: int | None = None
    """Largest number of actors; more than `size` lets Ray add some under load. None: `size`."""
    batch: int = 16
    """Rows a call; a block of rows should be a multiple. A network behind `FixedBatch` always gets
    so many, and the last bits of its results depend on how many they are."""
    calls: int = 1
    """Calls at a time in an actor. A network behind `FixedBatch` runs for one of them; others
    decode and encode meanwhile, so that a GPU does not wait for them. Each holds a batch of
    pictures."""
    cpus: float = 0.5
    """Logical CPUs an actor; below 1 so that readers find room."""
    gpus: float = 0.0
    """GPUs an actor; 0.5 puts two on one."""
    label: str | None = None
    """Value of the node label `pool` (cluster.yaml) to run on; None: anywhere."""

    def __post_init__(self) -> None:
        if min(self.size, self.batch, self.calls) < 1 or self.largest < self.size:
            raise ValueError(
                "Pool: expected size >= 1, batch >= 1, calls >= 1 and max_size >= size, got size "
                f"{self.size}, batch {self.batch}, calls {self.calls}, max_size {self.max_size}."
            )

    @property
    def largest(self) -> int:
        """Actors at most."""
        return self.size if self.max_size is None else self.max_size
