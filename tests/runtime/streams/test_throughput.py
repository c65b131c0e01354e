"""Counts of a stream's stages while it runs."""

import time

import numpy as np
import pytest
import ray.data

from cvmatch.runtime import pools
from cvmatch.runtime.settings import Pool
from cvmatch.runtime.streams.throughput import StageThroughput, call_each_step


class Slow:
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(0.01 * len(batch["id"]))
        return batch


class Quick:
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return batch


def stream(rows: int):
    """Rows of which one actor makes 100 a second and the next as many as Ray hands on."""
    numbers = ray.data.range(rows, override_num_blocks=4)
    slow = pools.map_actors(numbers, Slow, Pool(batch=8))
    return pools.map_actors(slow, Quick, Pool(batch=8))


@pytest.mark.ray
def test_throughput_tells_rows_a_second_of_each_stage_and_the_slowest(ray_session):
    throughput = StageThroughput({"first": "Slow", "second": "Quick"})
    rows = stream(64)
    with call_each_step(rows, throughput.update):
        rows.materialize()
    first, second = throughput.stages["first"], throughput.stages["second"]
    assert (first.rows, second.rows) == (64, 64)
    assert 30 < first.rate <= 100  # below on a loaded machine
    assert second.rate > first.rate
    assert throughput.slowest == "first"
    assert throughput.summary().startswith("first ")
    assert "(slowest)  second" in throughput.summary()


def test_throughput_before_anything_is_done_says_nothing():
    throughput = StageThroughput({"first": "Slow"})
    assert (throughput.summary(), throughput.slowest) == ("", "")


@pytest.mark.ray
def test_step_that_raises_ends_the_stream(ray_session):
    def full(_):
        raise ValueError("enough")

    rows = stream(64)
    with pytest.raises(ValueError, match="enough"), call_each_step(rows, full):
        rows.materialize()
