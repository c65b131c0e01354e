"""Whether the installed versions still have each private API. A failure names the entry to mend."""

import logging
from types import SimpleNamespace

import pytest
import ray.data
import torch

from cvmatch.runtime import internals, session


@pytest.fixture(autouse=True)
def forget_warnings():
    internals._warn.cache_clear()


@pytest.fixture
def executors(ray_session):
    """The executors that a small stream with an actor called us with, and what they had done."""
    seen = []

    class Watch(internals.ExecutionCallback):
        def on_execution_step(self, executor):
            seen.append((executor._consumer_idling(), internals.operator_counts(executor)))

    class Identity:
        def __call__(self, batch):
            return batch

    rows = ray.data.range(32, override_num_blocks=4).map_batches(
        Identity, batch_size=8, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5
    )
    before = internals.callback_classes(rows.context)
    assert before is not None, "DataContext.custom_execution_callback_classes"
    internals.set_callback_classes(rows.context, [Watch])
    try:
        rows.materialize()
    finally:
        internals.set_callback_classes(rows.context, before)
    return seen


@pytest.mark.ray
def test_ray_data_calls_our_callbacks_and_counts_rows(executors, caplog):
    assert executors, "ExecutionCallback.on_execution_step"
    assert isinstance(executors[-1][0], bool), "StreamingExecutor._consumer_idling"
    assert not caplog.records, "counts of operators"
    (counts,) = [one for one in executors[-1][1] if "Identity" in one.name]
    assert (counts.rows, counts.busy_s > 0) == (32, True)
    assert max(one.slots for _, seen in executors for one in seen if "Identity" in one.name) >= 1


@pytest.mark.ray
def test_ray_knows_the_most_that_the_cluster_may_have(ray_session, caplog):
    assert isinstance(internals.max_cluster_resources(), dict)
    assert not caplog.records, "state.get_max_resources_from_cluster_config"


@pytest.mark.ray
def test_a_started_ray_data_is_throttled_once(ray_session):
    session.start()
    session.start()
    classes = internals.callback_classes(ray.data.DataContext.get_current())
    assert classes is not None
    assert classes.count(internals.SchedulerThrottle) == 1


def test_torchmetrics_holds_the_weights_of_lpips():
    state = torch.load(internals.lpips_weights_file(), map_location="cpu", weights_only=True)
    assert "lin0.model.1.weight" in state


def test_a_version_without_an_entry_is_named_once_and_done_without(caplog):
    executor, context = SimpleNamespace(_topology=[1]), object()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert internals.operator_counts(executor) == []
            assert internals.callback_classes(context) is None
            internals.set_callback_classes(context, None)
            internals.SchedulerThrottle().on_execution_step(executor)
    assert len(caplog.records) == 3
    assert all("seen in" in record.message for record in caplog.records)


def test_a_callback_does_nothing_where_a_version_calls_another_method():
    assert internals.ExecutionCallback().before_a_new_step(1, executor=2) is None
    assert not hasattr(internals.ExecutionCallback(), "_private")


def test_ray_train_has_what_joins_its_workers_to_a_group(caplog):
    backend = internals.torch_backend()
    assert hasattr(backend, "on_start"), "ray.train.torch.config._TorchBackend"
    assert not caplog.records
