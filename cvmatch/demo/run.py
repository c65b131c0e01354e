"""Run the whole pipeline on the embedded data set, saying which stage is at work."""

import contextlib
import logging
import time
from collections.abc import Iterator

from cvmatch.config import override
from cvmatch.data import storage
from cvmatch.demo import report
from cvmatch.demo.plan import make_plan
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import Demo
from cvmatch.evaluate.run import evaluate
from cvmatch.generate import train as generator
from cvmatch.index.build import build
from cvmatch.match import train as matcher
from cvmatch.report.evaluation_page import write_evaluation_page
from cvmatch.runtime import session
from cvmatch.segment import train as segmenter
from cvmatch.synthesize.run import synthesize
from cvmatch.tune import run as tune

EXPECTED = {
    "world": 35,
    "segmenter": 51,
    "generator": 211,
    "synthesize": 84,
    "tune": 47,
    "matcher": 109,
    "index": 8,
    "evaluate": 7,
    "search": 1,
}
"""Seconds of each stage of the demo preset on two cores, for the estimate of what is left."""

_log = logging.getLogger(__name__)


def run(config: Demo) -> str:
    """Run the whole pipeline, and write results.json and report.html.

    Returns the results as a table for a terminal, and where the files are.
    """
    plan, clock, runs = make_plan(config), StageClock(), {}
    with clock.time("world"):
        session.start(logical_cpus=4)  # each worker imports torch for itself
        counts = make_world(plan.world)
    with clock.time("segmenter"):
        runs["segmenter"] = segmenter.train(plan.segmenter)
    with clock.time("generator"):
        runs["generator"] = generator.train(plan.generator)
    with clock.time("synthesize"):
        for split in plan.synthesize:
            synthesize(split)
    with clock.time("tune"):
        tuned = tune.search(plan.tune, plan.trial)
    with clock.time("matcher"):
        runs["matcher"] = matcher.train(override(plan.matcher, tuned.params))
    with clock.time("index"):
        build(plan.index)
    with clock.time("evaluate"):
        evaluation = evaluate(plan.evaluate)
        write_evaluation_page(plan.evaluate.output, plan.evaluate.queries, plan.evaluate.seed)
    with clock.time("search"):
        examples = report.search_examples(config, plan)
    numbers = report.summarize(counts, runs, tuned, evaluation, clock.seconds)
    page = report.write_report(config, numbers, examples, runs, tuned)
    return (
        f"{report.format_results(numbers)}\n"
        f"results  {storage.absolute(config.output)}/results.json\n"
        f"report   {storage.absolute(page)}"
    )


class StageClock:
    """Announce stages, take their time, and estimate what is left."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time one stage, named as in EXPECTED."""
        done = list(self.seconds)
        expected = sum(EXPECTED[stage] for stage in done)
        pace = sum(self.seconds.values()) / expected if expected else 1.0
        left = pace * sum(s for stage, s in EXPECTED.items() if stage not in done)
        text = f"[{len(done) + 1}/{len(EXPECTED)}] {name}"
        _log.info("%s  (about %d:%02d left in all)", text, left // 60, left % 60)
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin
        _log.info("%s  done in %.0f s", text, self.seconds[name])
