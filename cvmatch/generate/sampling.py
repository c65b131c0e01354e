"""How a picture is drawn: the settings of a sampler."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Solver steps, guidance and seed. benchmarks/sampler.py shows others beside the defaults."""

    steps: int = 6
    """Solver steps."""
    guidance: float = 8.0
    """Guidance scale; 1: none, half the time."""
    guided: float = 0.45
    """Down to which share of the noise schedule guidance acts; below, the plain model answers, in
    half the time. 0: guidance in every step (limited interval: Kynkaanniemi et al. 2024)."""
    seed: int = 0
    """Other seeds draw other pictures of the same panorama."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"generate: expected steps of at least 1, got {self.steps}.")
        if not 0 <= self.guided <= 1:
            raise ValueError(
                f"generate: expected guided in [0, 1], a share of the noise schedule, got "
                f"{self.guided}."
            )

    def scale(self, noise: float) -> float:
        """Guidance scale at a share of the noise schedule, from 0 (clean) to 1."""
        return self.guidance if noise >= self.guided else 1.0

    def named(self) -> str:
        """For a table."""
        if self.guidance == 1 or not self.guided:
            return f"{self.steps} steps, guidance {self.guidance:g}"
        above = f"above {100 * self.guided:g} % of the schedule"
        return f"{self.steps} steps, guidance {self.guidance:g} {above}"


VERSION = 6
"""Version of the sampler: another one draws other pictures with the same settings."""

DEFAULT = Sampling()
"""The sampler that is taken where none is named."""
