"""Settings of the job that synthesizes rows."""

from dataclasses import dataclass, field

from cvmatch.data.settings import Ingest
from cvmatch.generate.settings import Generate
from cvmatch.segment.settings import Segment


@dataclass(frozen=True, kw_only=True)
class Synthesize:
    """Draw and segment the synthetic aerial of every pair."""

    data: Ingest = field(default_factory=Ingest)
    """Pairs."""
    generate: Generate = field(default_factory=Generate)
    """The generator and its actors."""
    segment: Segment = field(default_factory=Segment)
    """The segmenter and its actors."""
    output: str = "data/synthesized/train"
    """URI of the directory of rows; the same command goes on where a killed one stopped."""
    max_rejected: float = 0.05
    """Largest share of rows that may fail, in [0, 1]."""
    retry_rejected: bool = False
    """Make the rows again that failed in an earlier run, also where the output is complete."""
    dry_run: bool = False
    """Say what would be done, where, and what is done already; then stop."""
