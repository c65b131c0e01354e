"""The matcher's training step: no leak through A, dropout of modalities, DDP, training ids."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cvmatch.match import losses
from cvmatch.match.model import Matcher
from cvmatch.match.settings import TrainMatcher
from cvmatch.match.task import IDS, MatcherTask, read_training_ids
from cvmatch.training.task import VALIDATION_BATCH
from tests.helpers.matcher import (
    WIDE,
    branch_heads,
    copy_of_a,
    joined,
    joint_heads,
    network,
    rows,
    task_of,
    validate,
    views,
)
from tests.helpers.present import present

JOINT: dict[str, Any] = {"score": "joint"}
ALONE: dict[str, Any] = {"branches": ("direct",)}


def test_scores_of_training_are_cosines_of_the_branches_embeddings():
    batch, model = rows(4), network()
    found = task_of(model).train().scores(batch)
    assert set(found) == {"direct", "aerial"}  # a layout is not trained
    seen, heads = views(batch), branch_heads(model)
    with torch.no_grad():
        features = {
            "direct": model.ground_features(seen.ground),
            "aerial": model.aerial_features(present(seen.synthetic)),
        }
        tile = model.aerial_features(seen.aerial)
        for name, feature in features.items():
            query, own = heads.query[name](feature), heads.tile[name](tile)
            expected = F.cosine_similarity(query[:, None], own[None], dim=2)
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)


def test_scores_of_joint_training_embed_every_tile_with_the_querys_own_aerial():
    batch, model = rows(4), network(**JOINT)
    task = task_of(model, modality_dropout=(0.0, 0.0, 0.0)).train()
    found = task.scores(batch)
    joint, direct = found["joint"], found["direct"]
    seen, heads = views(batch), joint_heads(model)
    with torch.no_grad():
        a, c = model.aerial_features(present(seen.synthetic)), model.aerial_features(seen.aerial)
        g, s = model.ground_features(seen.ground), model.mask_features(present(seen.synthetic_mask))
        whole, alone = heads.fuse(g, a, s).embedding, heads.fuse(g, None, None).embedding
        null = heads.null_synthetic
        expected = [[whole[i] @ joined(heads, a[i], c[j]) for j in range(4)] for i in range(4)]
        own = [[alone[i] @ joined(heads, null, c[j]) for j in range(4)] for i in range(4)]
    torch.testing.assert_close(joint, torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(direct, torch.tensor(own), atol=1e-6, rtol=0)


@pytest.mark.parametrize("score", ["sum", "joint"])
def test_scores_of_training_pass_each_picture_through_its_tower_once(score):
    model, passed = network(score=score), {}
    towers = ["ground_tower", "aerial_tower", *(["mask_tower"] if score == "joint" else [])]
    for name in towers:

        def count(tower, given, features, name=name):
            passed[name] = passed.get(name, 0) + len(given[0])

        getattr(model, name).register_forward_hook(count)
    for found in task_of(model).train().scores(rows(5)).values():
        assert found.shape == (5, 5)
    # The aerial tower sees each A and each C; a tower pass for each pair would make it 25 or more.
    assert passed == {name: 10 if name == "aerial_tower" else 5 for name in towers}


@pytest.mark.parametrize(("name", "chance"), [("triplet", 0.3), ("infonce", math.log(6))])
def test_loss_does_not_reward_a_joint_model_that_looks_at_a_alone(name, chance):
    model = network(**JOINT)
    heads = copy_of_a(joint_heads(model))
    task = task_of(model, loss=name, margin=0.3).eval()
    batch = rows(6)
    with torch.no_grad():
        a = model.aerial_features(batch["synthetic"].float() / 255)
        query = heads.fuse(None, a, None)
        # What the leak would give: each tile embedded with its *own* pair's A finds itself.
        candidate = heads.candidate_embedding(torch.zeros(6, 10), query.query_proj)
        leak = query.embedding @ candidate.T
        assert torch.allclose(leak.diagonal(), torch.ones(6))
        assert losses.triplet(leak, 0.3) < 0.25
    named = validate(task, batch)
    assert named["joint"] >= chance - 1e-5
    assert named["recall_at_1"] == 0  # all tiles tie


@pytest.mark.parametrize("score", ["sum", "joint"])
def test_loss_reaches_every_weight(score):
    task = task_of(
        network(score=score), loss="infonce", augment=True, modality_dropout=(0.5, 0.5, 0.5)
    ).train()
    task(rows(12))["loss"].backward()
    without = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_groups_hold_every_weight_once_at_the_rate_of_its_part():
    task = task_of(network(), loss="infonce", lr_towers=1e-5, lr_heads=1e-2)
    grouped = [id(p) for group in task.groups() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in task.parameters())
    rate = {id(p): group["lr"] for group in task.groups() for p in group["params"]}
    assert rate[id(next(task.model.aerial_tower.parameters()))] == 1e-5
    assert rate[id(next(task.model.heads.parameters()))] == 1e-2
    assert all(rate[id(scale)] == 1e-2 for scale in task.log_scale.values())


def test_dropped_synthetic_aerial_has_no_part_in_the_loss():
    task = task_of(network(**JOINT), modality_dropout=(0.1, 1.0, 0.5)).train()
    batch = rows(4)
    other = batch | {"synthetic": rows(4, seed=9)["synthetic"]}
    assert torch.equal(task(batch)["loss"], task(other)["loss"])
    assert validate(task, batch)["loss"] != validate(task, other)["loss"]


def test_dropped_rows_keep_ground_or_synthetic():
    task = task_of(network(**JOINT), modality_dropout=(1.0, 0.5, 0.5)).train()
    heads = joint_heads(task.model)
    heads.null_ground.data.fill_(7.0)
    heads.null_synthetic.data.fill_(7.0)
    zero, batch = torch.zeros(64, 12), rows(64)
    ground, synthetic, _ = task._drop_modalities(heads, (zero, zero, zero), batch)
    no_ground, no_synthetic = ground[:, 0] == 7, synthetic[:, 0] == 7
    assert torch.equal(no_ground, ~no_synthetic)
    assert 16 <= int(no_synthetic.sum()) <= 48  # 4 standard deviations around a half


def test_loss_of_a_row_does_not_depend_on_draws_of_its_neighbours():
    task = task_of(network(), augment=True).train()
    batch = rows(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {k: v if k == "epoch" else v[order] for k, v in batch.items()}
    torch.testing.assert_close(task(batch)["loss"], task(shuffled)["loss"])
    assert not torch.equal(task(batch)["loss"], task(batch | {"epoch": torch.tensor(1)})["loss"])


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_have_the_loss_and_gradient_of_the_whole_batch(chunk):
    whole, parts = (task_of(network(), chunk=size).train() for size in (0, chunk))
    for task in (whole, parts):
        task(rows(5))["loss"].backward()
    expected = {name: weight.grad for name, weight in whole.named_parameters()}
    assert all(grad is not None for grad in expected.values())
    for name, weight in parts.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_direct_branch_alone_needs_neither_a_nor_s_and_refuses_them():
    model = network(**ALONE)
    task = task_of(model).train()
    batch = rows(5)
    named = task({k: batch[k] for k in ("ground", "aerial", "key", "epoch")})
    assert named["loss"].item() == named["direct"].item()
    ground, tile = (batch[name].float() / 255 for name in ("ground", "aerial"))
    with pytest.raises(ValueError, match=r"modality G.*--modalities G"):
        model.embed_queries(ground, synthetic=tile)
    direct = task.eval().scores(batch)["direct"]
    product = model.embed_queries(ground) @ model.embed_tiles(tile).T
    torch.testing.assert_close(direct, product, atol=1e-5, rtol=0)


def test_shared_tower_sees_both_views(tmp_path):
    model = network(shared=True, score="joint")
    task_of(model).train()(rows(5))["loss"].backward()
    towers = {name.split(".")[0] for name, _ in model.named_parameters() if "_tower" in name}
    assert towers == {"aerial_tower", "mask_tower"}
    seen = views(rows(2))
    before = model.ground_features(seen.ground)
    model.save(str(tmp_path))
    again = Matcher.load(str(tmp_path))
    torch.testing.assert_close(again.ground_features(seen.ground), before)
    next(again.aerial_tower.parameters()).data.mul_(2)
    assert not torch.allclose(again.ground_features(seen.ground), before)


@pytest.mark.parametrize(
    "view", [{"fov": (90.0,)}, {"fov": (70.0, 70.0)}, {"unknown_heading": True}]
)
def test_limited_views_are_trained_without_a_and_s(view):
    with pytest.raises(ValueError, match="G alone: expected --branches direct"):
        TrainMatcher(**view)
    task = task_of(network(**ALONE), **ALONE, **view).train()
    whole = task_of(network(**ALONE), **ALONE).train()
    batch = rows(6)
    assert not torch.equal(task(batch)["loss"], whole(batch)["loss"])


def test_narrow_view_hides_what_lies_behind():
    task = task_of(network(**ALONE), **ALONE, fov=(90.0,)).train()
    batch = rows(6)
    south = batch["ground"].clone()
    south[..., : WIDE // 4] = 0  # behind a camera that looks north
    assert torch.equal(task(batch)["loss"], task(batch | {"ground": south})["loss"])


def count_seen(task, batch, monkeypatch):
    """Columns of each panorama that the tower of G sees; the others have the tower's mean."""
    seen = []

    def look(ground):
        mean = torch.tensor(task.model.ground_mean)[:, None, None]
        seen.append((ground != mean).any(dim=(1, 2)).sum(dim=1))
        return features(ground)

    features = task.model.ground_features
    monkeypatch.setattr(task.model, "ground_features", look)
    task(batch)
    return seen[0] / WIDE * 360


def test_views_become_narrow_in_the_first_half_of_a_training(monkeypatch):
    config = TrainMatcher(**ALONE, augment=False, fov=(360.0, 90.0))
    model = network(**ALONE)
    task = MatcherTask(model, config, seed=3, epochs=9).train()
    batch = rows(64)
    for epoch, narrowest in ((0, 360.0), (2, 225.0), (4, 90.0), (8, 90.0)):
        with monkeypatch.context() as patch:
            seen = count_seen(task, batch | {"epoch": torch.tensor(epoch)}, patch)
        step = 360 / WIDE
        assert seen.max() > min(360.0, narrowest + 0.9 * (360 - narrowest)) - step
        assert narrowest - step <= seen.min() < narrowest + 0.1 * (360 - narrowest) + step


def test_views_of_a_validation_are_those_of_the_end(monkeypatch):
    config = TrainMatcher(**ALONE, augment=False, fov=(360.0, 90.0))
    task = MatcherTask(network(**ALONE), config, seed=3, epochs=9).eval()
    batch = rows(VALIDATION_BATCH)
    seen = count_seen(task, batch, monkeypatch)
    assert seen.min() < 180
    assert len(set(seen.tolist())) > 4


@pytest.mark.parametrize("wrong", [(70.0, 360.0), (360.0, 90.0, 70.0), (0.0,), (400.0, 70.0)])
def test_views_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="train-matcher: "):
        TrainMatcher(**ALONE, fov=wrong)


def test_unknown_heading_of_a_row_is_another_in_each_epoch():
    task = task_of(network(**ALONE), **ALONE, unknown_heading=True).train()
    batch = rows(6)
    losses = {task(batch | {"epoch": torch.tensor(n)})["loss"].item() for n in range(4)}
    assert len(losses) == 4
    same = batch | {"ground": batch["ground"][..., :1].expand_as(batch["ground"]).contiguous()}
    losses = {task(same | {"epoch": torch.tensor(n)})["loss"].item() for n in range(2)}
    assert len(losses) == 1  # a panorama of equal columns looks the same from every heading


RECIPES = {"joint": {"direct_weight": 0.7}, "chunks": {"chunk": 3}, "ground_only": {}, "sum": {}}


def recipe_network(recipe):
    return network(**{"ground_only": ALONE, "joint": JOINT}.get(recipe, {}))


def worker(rank, world, directory, recipe):
    """One of `world` DDP workers on its share of the rows; rank 0 keeps loss and gradients."""
    torch.set_num_threads(1)
    address = f"file://{directory}/rendezvous{world}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    task = task_of(recipe_network(recipe), **RECIPES[recipe]).train()
    batch = rows(8)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    own = {name: v if name == "epoch" else v[share] for name, v in batch.items()}
    parallel = DistributedDataParallel(
        task, find_unused_parameters=True
    )  # its gradient hooks live as long as it does
    named = parallel(own)
    named["loss"].backward()
    if rank == 0:
        found = {name: p.grad for name, p in task.named_parameters()}
        torch.save(found | {"total": named["loss"].detach()}, f"{directory}/grads.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_workers_have_the_loss_and_gradient_of_one_with_the_whole_batch(tmp_path, recipe):
    mp.start_processes(worker, args=(2, str(tmp_path), recipe), nprocs=2, start_method="spawn")
    found = torch.load(tmp_path / "grads.pt", weights_only=True)
    task = task_of(recipe_network(recipe), **RECIPES[recipe]).train()
    named = task(rows(8))
    named["loss"].backward()
    assert named["loss"].item() == pytest.approx(found.pop("total").item(), abs=1e-5)
    for name, weight in task.named_parameters():
        if weight.grad is None:
            assert found[name] is None or not found[name].any(), name
        else:
            torch.testing.assert_close(found[name], weight.grad, atol=1e-5, rtol=1e-4)


def test_training_ids_are_those_of_the_task_and_changed_lists_are_refused(tmp_path):
    MatcherTask(network(), TrainMatcher(), ("0000003", "0000007")).save(str(tmp_path))
    assert read_training_ids(str(tmp_path)) == {"0000003", "0000007"}
    (tmp_path / IDS).write_text("0000003\n")
    with pytest.raises(ValueError, match=r"is not the list that its training\.json"):
        read_training_ids(str(tmp_path))
