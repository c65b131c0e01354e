"""The ranks of a validation: those of the whole gallery, whatever the batches and the workers."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cvmatch.match import validation
from cvmatch.match.heads.branches import BranchHeads
from cvmatch.match.heads.joint import JointScorer
from cvmatch.training import loop
from cvmatch.training.settings import TrainConfig
from tests.helpers.matcher import (
    branch_heads,
    copy_of_a,
    joint_heads,
    network,
    rows,
    task_of,
    validate,
    views,
)
from tests.helpers.present import present

FORMS: dict[str, dict[str, Any]] = {"sum": {}, "joint": {"score": "joint"}}
PAIRS = 100


def select(batch, chosen):
    return {name: value if name == "epoch" else value[chosen] for name, value in batch.items()}


def reciprocal_rank(scores, query, own):
    """By hand: every tile that is not worse than the own one is before it."""
    before = sum(scores[query][tile] >= scores[query][own] for tile in range(len(scores[query])))
    return 1 / before


@torch.no_grad()
def test_ranks_of_a_joint_model_are_those_of_each_query_among_all_tiles():
    model, batch = network(**FORMS["joint"]), rows(40)
    seen = views(batch)
    pictures = seen.ground, present(seen.synthetic), present(seen.synthetic_mask)
    query, tile = model.embed_queries(*pictures), model.embed_tiles(seen.aerial)
    scores = JointScorer(joint_heads(model))(query, tile).tolist()
    expected = np.mean([reciprocal_rank(scores, pair, pair) for pair in range(40)])
    found = validate(task_of(model, **FORMS["joint"]), batch)
    assert found["mrr"] == pytest.approx(expected, abs=1e-9)
    alone = (model.embed_queries(seen.ground)[:, :10] @ tile[:, :10].T).tolist()
    expected = np.mean([reciprocal_rank(alone, pair, pair) for pair in range(40)])
    assert found["mrr_direct"] == pytest.approx(expected, abs=1e-9)


@torch.no_grad()
def test_ranks_of_a_branch_are_those_of_its_cosines():
    model, batch = network(), rows(40)
    seen, heads = views(batch), branch_heads(model)
    query = heads.query_parts(model.query_features(seen.ground, seen.synthetic))
    tile = heads.tile_parts(model.tile_features(seen.aerial))
    found = validate(task_of(model), batch)
    for name in ("direct", "aerial", "layout"):
        scores = (query[name] @ tile[name].T).tolist()
        ranks = [reciprocal_rank(scores, pair, pair) for pair in range(40)]
        assert found[f"mrr_{name}"] == pytest.approx(np.mean(ranks), abs=1e-9)
        first = np.mean([rank == 1 for rank in ranks])
        assert found[f"recall_at_1_{name}"] == pytest.approx(first, abs=1e-9)


def vectors(good, noise, seed=0):
    """A branch that tells pairs and one that does not, of 60 pairs."""
    random = torch.Generator().manual_seed(seed)
    own = torch.nn.functional.normalize(torch.randn(60, 12, generator=random), dim=1)
    near = torch.nn.functional.normalize(own + 0.2 * torch.randn(60, 12, generator=random), dim=1)
    other = torch.nn.functional.normalize(torch.randn(60, 12, generator=random), dim=1)
    return {
        f"query/{good}": own,
        f"tile/{good}": near,
        f"query/{noise}": own,
        f"tile/{noise}": other,
    }


@pytest.mark.parametrize("branches", [("direct", "layout"), ("layout", "direct")])
def test_rank_of_a_sum_trusts_the_branch_that_tells_pairs(branches):
    heads = BranchHeads(("direct", "layout"), 4, 4, 12)
    found = validation.rank(validation.EmbeddedPairs(heads, vectors(*branches)))
    alone = found[f"mrr_{branches[0]}"]
    assert alone > 0.9
    assert found["mrr"] == pytest.approx(alone, abs=0.02)
    assert found[f"mrr_{branches[1]}"] < 0.2


def test_weights_of_a_query_do_not_know_its_own_tile():
    # Of two halves each finds its own pairs by one branch alone, by which the other finds none.
    eye, far = torch.eye(40), torch.eye(40).roll(1, 0)
    even = (torch.arange(40) % 2 == 0)[:, None]
    heads = BranchHeads(("direct", "layout"), 4, 4, 40)
    pairs = validation.EmbeddedPairs(
        heads,
        {
            "query/direct": torch.where(even, eye, far),
            "tile/direct": eye,
            "query/layout": torch.where(even, far, eye),
            "tile/layout": eye,
        },
    )
    found = validation.rank(pairs)
    assert found["recall_at_1_direct"] == found["recall_at_1_layout"] == 0.5
    assert found["recall_at_1"] == 0.0


@pytest.mark.parametrize("score", FORMS)
def test_ties_count_against_the_query(score):
    model = network(**FORMS[score])
    if score == "joint":
        copy_of_a(joint_heads(model))
    batch = rows(20)
    same = batch | {"aerial": batch["aerial"][:1].expand_as(batch["aerial"])}
    found = validate(task_of(model, **FORMS[score]), same)
    assert found["mrr"] == pytest.approx(1 / 20)
    assert found["recall_at_1"] == 0


def test_gallery_of_one_pair_is_found():
    found = validate(task_of(network()), rows(1))
    assert found["mrr"] == found["recall_at_1"] == 1
    assert np.isfinite(found["loss"])


class Shard:
    """Rows in memory, as a worker's shard of a data set."""

    def __init__(self, batch):
        self.batch = batch

    def iter_torch_batches(self, batch_size, **options):
        for begin in range(0, len(self.batch["key"]), batch_size):
            part = select(self.batch, slice(begin, begin + batch_size))
            yield {name: value for name, value in part.items() if name != "epoch"}


class Alone:
    """The only worker."""

    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self, batch):
        self.batch = batch

    def shard(self, name):
        return Shard(self.batch)

    def commit(self, metrics, directory):
        raise AssertionError("nothing is trained")

    def latest(self):
        return None

    def is_preempted(self):
        return False


def validate_alone(score, batch, size):
    task = task_of(network(**FORMS[score]), **FORMS[score])
    job = loop.TrainJob(
        build=lambda: task, fit=TrainConfig(batch=size), rows=size, validate=True, directory="",
        resume=0, until=1,
    )  # fmt: skip
    return loop.Trainer(job, Alone(batch)).validate()[0]


@pytest.mark.parametrize("score", FORMS)
def test_validation_is_the_same_for_every_batch_and_order_of_rows(score):
    batch = rows(PAIRS)
    found = [validate_alone(score, batch, size) for size in (8, 32, 96)]
    shuffled = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(4))
    found.append(validate_alone(score, select(batch, shuffled), 32))
    twice = torch.cat([torch.arange(PAIRS), torch.tensor([3, 7])])
    found.append(validate_alone(score, select(batch, twice), 32))
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-6)
    assert {"val/mrr", "val/recall_at_1", "val/loss"} <= found[0].keys()


def work(rank, directory):
    """One worker of two, and then of four, whose shares of the rows are not equally large."""
    torch.set_num_threads(1 + rank % 2)  # as with other CPUs
    for world in (2, 4):
        if rank >= world:
            continue
        address = f"file://{directory}/rendezvous{world}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
        ends = [PAIRS * part**2 // world**2 for part in range(world + 1)]
        own = Shard(select(rows(PAIRS), slice(ends[rank], ends[rank + 1])))
        for score, shape in FORMS.items():
            task = task_of(network(**shape), **shape)
            batches = own.iter_torch_batches(loop.VALIDATION_BATCH)
            found = task.summary(loop.evaluate(task, batches, world))
            torch.save(found, f"{directory}/{score}{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.slow
def test_validation_is_the_same_for_every_number_of_workers(tmp_path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=4, start_method="spawn")
    for score in FORMS:
        alone = validate_alone(score, rows(PAIRS), 8)
        expected = {name.removeprefix("val/"): value for name, value in alone.items()}
        for world, rank in [(2, 0), (2, 1), (4, 0), (4, 3)]:
            found = torch.load(tmp_path / f"{score}{world}-{rank}.pt", weights_only=True)
            assert found == pytest.approx(expected, abs=1e-6)
