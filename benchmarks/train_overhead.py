"""Ray Train against the same steps without Ray; two workers against one with the whole batch."""

import functools
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace

import torch
from _harness import Bench, parse_flags, write_results
from matching import ALONE, MatchingBench, Rows, make_config
from ray.data import Dataset
from torch import Tensor, nn

from cvmatch.data import storage
from cvmatch.match.batches import decode, read_pairs
from cvmatch.match.settings import TrainMatcher
from cvmatch.match.task import MatcherTask
from cvmatch.match.train import build_task
from cvmatch.runtime import hardware, progress, session
from cvmatch.training import launch
from cvmatch.training.metrics import to_tensors

WARM = 3
"""Steps that are not counted: memory is taken, and the first batches wait for the stream."""

TIMES = "times.json"


@dataclass(frozen=True, kw_only=True)
class OverheadBench(Bench):
    """Samples a second of the matcher's training: a plain loop, this process, Ray Train."""

    pairs: int = 0
    """Training pairs; 0: 960, quick 320."""
    rounds: int = 0
    """How often all run, in turns; medians are reported. 0: 3, quick 1."""
    steps: int = 0
    """Steps of the two loss curves; 0: 20, quick 6."""


class TimedMatcherTask(MatcherTask):
    """Notes when its training steps begin."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A step, and its time."""
        self.times = [*getattr(self, "times", []), time.perf_counter()]
        return super().forward(batch)

    def save(self, directory: str) -> None:
        """Also `times.json`."""
        super().save(directory)
        storage.write_json(os.path.join(directory, TIMES), {"times": self.times})


def decode_pairs(config: TrainMatcher) -> Dataset:
    """The decoded training pairs."""
    return decode(read_pairs(config.pairs, config.letters), config.panorama, config.tile_size)


def build_timed_task(config: TrainMatcher) -> TimedMatcherTask:
    """The task of `build_task`, with a clock."""
    task = build_task(config)
    return TimedMatcherTask(task.model, config, (), config.fit.seed)


def compute_rate(times: list[float], batch: int) -> float:
    """Samples a second from the first step that counts to the start of the last."""
    return batch * (len(times) - 1 - WARM) / (times[-1] - times[WARM])


def run_loop(config: TrainMatcher) -> float:
    """Samples a second of a loop over batches in memory: no Ray, no stream."""
    batches = [
        {**batch, "epoch": torch.tensor(0)}
        for batch in decode_pairs(config).iter_torch_batches(
            batch_size=config.fit.batch, collate_fn=to_tensors, drop_last=True
        )
    ]
    task = build_timed_task(config).train()
    weights = list(task.parameters())
    optimizer = torch.optim.AdamW(task.groups(), weight_decay=config.fit.weight_decay)
    for batch in batches:
        task(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(weights, config.fit.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return compute_rate(task.times, config.fit.batch)


def run_train(config: TrainMatcher, workers: int) -> float:
    """Samples a second of `launch.train`."""
    fit = replace(config.fit, workers=workers)
    result = launch.train(
        functools.partial(build_timed_task, config), decode_pairs(config), None, fit
    )
    assert result.checkpoint is not None
    with open(os.path.join(result.checkpoint, "model", TIMES)) as file:
        return compute_rate(json.load(file)["times"], config.fit.batch)


def read_loss_curve(config: TrainMatcher, workers: int, steps: int) -> list[float]:
    """Losses of steps that all see the same pairs: a global batch is the whole data."""
    fit = replace(config.fit, workers=workers, epochs=steps)
    rows = decode_pairs(config).limit(fit.batch)
    result = launch.train(functools.partial(build_task, config), rows, None, fit)
    table = result.history
    return table["train/loss"].tolist()


def main(bench: OverheadBench) -> None:
    """All three in turns, then the two curves."""
    pairs = bench.pairs or (320 if bench.quick else 960)
    rounds = bench.rounds or (1 if bench.quick else 3)
    steps = bench.steps or (6 if bench.quick else 20)
    session.start(logical_cpus=6)
    hardware.keep_freed_memory()
    torch.set_num_threads(1)  # as a worker has
    found: dict[str, list[float]] = {"plain": [], "here": [], "train": []}
    with tempfile.TemporaryDirectory() as at:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at}/mlflow.db")
        matching = MatchingBench(pairs=pairs, held_out=16, epochs=1)
        config = make_config(matching, Rows(matching, at).plain, ALONE, at)
        with progress.watch("training", 3 * rounds, lambda: sum(map(len, found.values()))):
            for _ in range(rounds):
                found["plain"].append(run_loop(config))
                found["here"].append(run_train(config, workers=0))
                found["train"].append(run_train(config, workers=1))
        one, two = (read_loss_curve(config, workers, steps) for workers in (1, 2))
    rates = {name: statistics.median(values) for name, values in found.items()}
    apart = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
    names = {
        "plain": "plain loop, batches in memory",
        "here": "fit in this process",
        "train": "fit in one worker of Ray Train",
    }
    table = [
        {"loop": names[name], "samples/s": value, "of the plain loop": value / rates["plain"]}
        for name, value in rates.items()
    ]
    notes = (
        f"The matcher's direct branch with the toy tower, {pairs} pairs, batches of "
        f"{config.fit.batch}, one thread, medians of {rounds} rounds in turns. Counted from the "
        f"{WARM + 1}th step of an epoch to its last; the start of Ray's workers is not in it.",
        f"Two workers against one, the same {config.fit.batch} pairs in each of {steps} steps: "
        f"losses {one[0]:.4f} to {one[-1]:.4f}, apart by at most {apart:.1e} of their value.",
    )
    figures = {f"samples_per_s.{name}": value for name, value in rates.items()}
    figures |= {name: rates[name] / rates["plain"] for name in ("here", "train")}
    write_results(
        bench, "Overhead of training on Ray", table, figures | {"curve_apart": apart}, notes
    )


if __name__ == "__main__":
    main(parse_flags(OverheadBench))
