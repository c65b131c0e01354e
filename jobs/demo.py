"""Run the whole pipeline on an embedded data set: `python jobs/demo.py` (see the README)."""

from cvmatch import config
from cvmatch.data import storage
from cvmatch.demo import run as demo
from cvmatch.demo.plan import settings
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import Demo
from cvmatch.generate import train as generator
from cvmatch.index.build import build
from cvmatch.match import train as matcher
from cvmatch.runtime import progress, session
from cvmatch.segment import train as segmenter
from cvmatch.synthesize.run import synthesize
from cvmatch.tune import run as tune

if __name__ == "__main__":
    progress.to_console()
    asked = config.parse(Demo)
    plan, step, runs = settings(asked), demo.Steps(), {}
    with step("world"):
        session.start(logical_cpus=4)  # each worker imports torch for itself
        counts = make_world(plan.world)
    with step("segmenter"):
        runs["segmenter"] = segmenter.train(plan.segmenter)
    with step("generator"):
        runs["generator"] = generator.train(plan.generator)
    with step("synthesize"):
        made = [synthesize(part) for part in plan.synthesize]
    with step("tune"):
        tuned = tune.search(plan.tune, plan.trial)
    with step("matcher"):
        runs["matcher"] = matcher.train(config.override(plan.matcher, tuned.params))
    with step("index"):
        build(plan.index)
    with step("evaluate"):
        measured = demo.measure(plan)
    with step("search"):
        examples = demo.look_up(asked, plan)
    numbers = demo.results(counts, runs, tuned, measured, step.seconds)
    page = demo.write(asked, numbers, examples, runs, tuned)
    print(demo.table(numbers))
    print(f"results  {storage.absolute(asked.output)}/results.json")
    print(f"report   {storage.absolute(page)}")
