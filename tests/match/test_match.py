"""The matcher: factorised scores, losses by hand, no leak through A, DDP, augmentation, rows."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import ray.data
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pyarrow import Table, parquet
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cvmatch import config as configs
from cvmatch.data import geometry, images, manifest, schema, storage
from cvmatch.data.color import color_jitter
from cvmatch.match import losses
from cvmatch.match.augment import Views, augmented, blurred, turned
from cvmatch.match.batches import decode, decode_batch, synthesized
from cvmatch.match.fusion import Query
from cvmatch.match.hard_negatives import GROUP, grouped, mined, nearest
from cvmatch.match.infer import EmbedQuery, EmbedTile, embed_tiles
from cvmatch.match.model import Matcher, MatcherConfig, load_fusion
from cvmatch.match.scoring import joint_scores
from cvmatch.match.settings import MODALITIES, Embed, TrainMatcher
from cvmatch.match.task import IDS, MatcherTask, training_ids
from cvmatch.match.train import build_task, train
from cvmatch.nn import rng
from cvmatch.nn.backbones import Tower, TowerSpec, save_tower
from cvmatch.runtime.output_directory import SOURCE
from cvmatch.runtime.settings import Pool
from cvmatch.training.settings import Fit

SIZE, HIGH, WIDE = 16, 8, 32
SPEC = TowerSpec(arch="vgg", layers=(4, "M", 8), grid=(2, 4), dim=12)
CONFIG = MatcherConfig(
    ground=SPEC,
    aerial=SPEC,
    classes=SPEC,
    panorama=(HIGH, WIDE),
    polar=(HIGH, WIDE),
    square=SIZE,
    hidden=10,
)


def network(seed=0, **changes):
    torch.manual_seed(seed)
    model = Matcher(dataclasses.replace(CONFIG, **changes))
    # As training leaves them; zeros, with which they begin, would hide what is forgotten.
    for null in (model.null_ground, model.null_synthetic, model.null_classes):
        torch.nn.init.normal_(null)
    for layer in (model.query_linear, model.query_aerial_linear):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model.eval()


def rows(count, seed=0):
    """A batch as the training loop gives it."""
    random = torch.Generator().manual_seed(seed)

    def pixels(*shape):
        return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)

    return {
        "ground": pixels(count, 3, HIGH, WIDE),
        "aerial": pixels(count, 3, SIZE, SIZE),
        "synthetic": pixels(count, 3, SIZE, SIZE),
        "classes": torch.randint(0, 5, (count, SIZE, SIZE), generator=random).byte(),
        "key": torch.tensor([rng.row_key(str(index)) for index in range(count)]),
        "epoch": torch.tensor(0),
    }


def views(batch):
    pictures = [batch[name].float() / 255 for name in ("ground", "aerial", "synthetic")]
    return Views(pictures[0], pictures[1], pictures[2], batch["classes"])


def joined(model, synthetic, tile):
    """FFN_C of the issue: one linear layer over the concatenation [a; c]."""
    weight = torch.cat([model.query_aerial_linear.weight, model.tile_linear.weight], dim=1)
    first = F.linear(torch.cat([synthetic, tile]), weight, model.query_aerial_linear.bias)
    rest = model.candidate_mlp
    return F.normalize(first + rest.last(rest.middle(first.relu()).relu()), dim=0)


# --- model ---


@torch.no_grad()
def test_scores_split_equal_the_concatenated_form():
    model, seen = network(), views(rows(5))
    query = model.query(seen.ground, seen.synthetic, seen.classes)
    scores = joint_scores(model, query, model.tile(seen.aerial), chunk=3)
    a, c = model.aerial_features(seen.synthetic), model.aerial_features(seen.aerial)
    expected = [
        [query.embedding[i] @ joined(model, a[i], c[j]) for j in range(5)] for i in range(5)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 4, 6, 7, 1000])
def test_scores_chunked_equal_those_of_one_piece(chunk):
    model = network()
    query = Query(F.normalize(torch.randn(4, 10), dim=1), torch.randn(4, 10))
    tile_proj = torch.randn(6, 10)
    torch.testing.assert_close(
        joint_scores(model, query, tile_proj, chunk=chunk), model.pair_scores(query, tile_proj)
    )


@torch.no_grad()
def test_scores_of_tiles_stored_in_half_precision_stay_close():
    model = network()
    query = Query(F.normalize(torch.randn(4, 10), dim=1), torch.randn(4, 10))
    tile_proj = torch.randn(50, 10)
    scores = joint_scores(model, query, tile_proj.half())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model.pair_scores(query, tile_proj), atol=5e-3, rtol=0)


@torch.no_grad()
def test_scores_in_bf16_are_near_and_keep_the_best_in_reach():
    model = network(hidden=64)
    query = Query(F.normalize(torch.randn(4, 64), dim=1), torch.randn(4, 64))
    tile_proj = torch.randn(500, 64)
    exact = joint_scores(model, query, tile_proj)
    found = joint_scores(model, query, tile_proj, torch.bfloat16)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.02
    best = found.topk(20).indices
    assert all(row in kept for row, kept in zip(exact.argmax(1), best, strict=True))


@torch.no_grad()
def test_shortlist_times_a_ground_query_is_its_exact_score():
    model, seen = network(), views(rows(5))
    query, tile_proj = model.query(seen.ground), model.tile(seen.aerial)
    torch.testing.assert_close(
        query.embedding @ model.shortlist(tile_proj).T, joint_scores(model, query, tile_proj)
    )


@torch.no_grad()
def test_query_of_each_modality_depends_on_its_own_pictures_only():
    model, seen, other = network(), views(rows(3)), views(rows(3, seed=1))
    named = {"G": "ground", "A": "synthetic", "S": "classes"}
    for modality in MODALITIES:
        used = [named[letter] for letter in modality.split("+")]
        before = model.query(**{name: getattr(seen, name) for name in used})
        assert torch.allclose(before.embedding.norm(dim=1), torch.ones(3))
        for name in used:
            changed = {n: getattr(other if n == name else seen, n) for n in used}
            assert not torch.allclose(model.query(**changed).embedding, before.embedding)


def test_query_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one of ground, synthetic and classes"):
        network().query()


@torch.no_grad()
def test_square_view_and_polar_view_read_the_same_tile_differently():
    seen = views(rows(3))
    polar, square = network(polar=(SIZE, SIZE)), network(view="square")
    square.load_state_dict(polar.state_dict())
    unrolled = geometry.to_polar(seen.aerial, SIZE, SIZE)
    torch.testing.assert_close(square.tile(unrolled), polar.tile(seen.aerial))
    assert not torch.allclose(square.tile(seen.aerial), polar.tile(seen.aerial))


def test_model_saved_and_loaded_scores_the_same(tmp_path):
    model, seen = network(), views(rows(3))
    model.save(str(tmp_path))
    again = Matcher.load(str(tmp_path))
    assert again.config == model.config
    with torch.no_grad():
        first, second = (
            joint_scores(m, m.query(seen.ground, seen.synthetic, seen.classes), m.tile(seen.aerial))
            for m in (model, again)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("alone", [False, True])
@torch.no_grad()
def test_heads_loaded_without_towers_score_as_the_whole_model(tmp_path, alone):
    model, seen = network(alone=alone), views(rows(3))
    model.save(str(tmp_path))
    heads = load_fusion(str(tmp_path))
    assert heads.training is False
    features = {"ground": model.ground_features(seen.ground), "synthetic": None, "classes": None}
    if not alone:
        features["synthetic"] = model.aerial_features(seen.synthetic)
        features["classes"] = model.class_features(seen.classes)
    tile_proj = model.tile(seen.aerial)
    first, second = (joint_scores(m, m.fuse(**features), tile_proj) for m in (model, heads))
    assert torch.equal(first, second)
    assert torch.equal(model.shortlist(tile_proj), heads.shortlist(tile_proj))


@pytest.mark.parametrize("load", [Matcher.load, load_fusion])
def test_model_directory_absent_is_refused_with_advice(tmp_path, load):
    with pytest.raises(ValueError, match=r"jobs/train_matcher.py published\), found none"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [Matcher.load, load_fusion])
def test_model_of_an_older_format_is_refused(tmp_path, load):
    network().save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 1}))
    with pytest.raises(ValueError, match="format 1, this version reads 2"):
        load(str(tmp_path))


def test_model_of_another_preprocessing_is_refused(tmp_path):
    network(preprocess="opencv-linear-0").save(str(tmp_path))
    with pytest.raises(ValueError, match=rf"opencv-linear-0.*{images.PREPROCESS}"):
        Matcher.load(str(tmp_path))


# --- losses ---

# Own pairs 0.5, 0.3; the others 0.4 (query 0, tile 1) and 0.1 (query 1, tile 0).
SCORE = torch.tensor([[0.5, 0.4], [0.1, 0.3]])


def test_triplet_by_hand():
    # Rows: 0.2 - 0.5 + 0.4 = 0.1; 0.2 - 0.3 + 0.1 = 0. Columns: 0.2 - 0.5 + 0.1 < 0, so 0;
    # 0.2 - 0.3 + 0.4 = 0.3. The mean of 0.1, 0, 0 and 0.3.
    assert losses.triplet(SCORE, 0.2).item() == pytest.approx(0.1)


# One query's row and column of interest; own scores 0.5 everywhere.
THREE = torch.tensor([[0.5, 0.7, 0.4], [0.2, 0.5, 0.3], [0.1, 0.6, 0.5]])


@pytest.mark.parametrize(
    ("negatives", "rows_by_hand", "columns_by_hand"),
    [
        # margin 0.2: hinge = score - 0.3. All: (0.4 0.1 | 0 0 | 0 0.3), (0 0 | 0.4 0.3 | 0.1 0).
        ("all", 0.8 / 6, 0.8 / 6),
        ("hardest", (0.4 + 0 + 0.3) / 3, (0 + 0.4 + 0.1) / 3),
        # Farther than 0.5: 0.4 | 0.3 | 0.1 in rows; 0.2 | none, so the farthest, 0.6 | 0.4.
        ("semi-hard", (0.1 + 0 + 0) / 3, (0 + 0.3 + 0.1) / 3),
    ],
)
def test_triplet_negatives_by_hand(negatives, rows_by_hand, columns_by_hand):
    expected = (rows_by_hand + columns_by_hand) / 2
    assert losses.triplet(THREE, 0.2, negatives).item() == pytest.approx(expected, abs=1e-6)


def test_soft_margin_by_hand():
    # d = 2 - 2 cos, so d_own - d_other = 2 (other - own): rows -0.2, -0.4; columns -0.8, 0.2.
    gaps = (-0.2, -0.4, -0.8, 0.2)
    expected = sum(math.log1p(math.exp(10 * gap)) for gap in gaps) / 4
    assert losses.soft_margin(SCORE).item() == pytest.approx(expected)


def test_info_nce_by_hand():
    def entropy(own, other):
        return math.log(1 + math.exp(2 * (other - own)))

    expected = (entropy(0.5, 0.4) + entropy(0.3, 0.1) + entropy(0.5, 0.1) + entropy(0.3, 0.4)) / 4
    assert losses.info_nce(SCORE, torch.tensor(2.0)).item() == pytest.approx(expected)


def test_info_nce_smoothing_gives_others_their_share():
    # With own 1, other 0, scale 1: -log p is log(1 + 1/e) for the own and 1 more for the other.
    expected = 0.95 * math.log1p(math.exp(-1)) + 0.05 * (1 + math.log1p(math.exp(-1)))
    got = losses.info_nce(torch.eye(2), torch.tensor(1.0), smoothing=0.1)
    assert got.item() == pytest.approx(expected)


@pytest.mark.parametrize("negatives", ["all", "hardest", "semi-hard"])
def test_losses_of_a_single_pair_are_zero_and_have_a_gradient(negatives):
    score = torch.tensor([[0.3]], requires_grad=True)
    total = losses.triplet(score, 0.2, negatives) + losses.soft_margin(score)
    total = total + losses.info_nce(score, torch.tensor(5.0))
    total.backward()
    assert total.item() == pytest.approx(0)
    assert score.grad is not None


# --- training ---


def task_of(model, **changes):
    return MatcherTask(model, dataclasses.replace(TrainMatcher(augment=False), **changes))


def test_scores_of_training_embed_every_tile_with_the_querys_own_aerial():
    batch, model = rows(4), network()
    task = task_of(model, drop_ground=0.0, drop_synthetic=0.0, drop_classes=0.0).train()
    found = task.scores(batch)
    joint, direct = found["joint"], found["direct"]
    seen = views(batch)
    with torch.no_grad():
        a, c = model.aerial_features(seen.synthetic), model.aerial_features(seen.aerial)
        whole = model.query(seen.ground, seen.synthetic, seen.classes).embedding
        alone = model.query(seen.ground).embedding
        null = model.null_synthetic
        expected = [[whole[i] @ joined(model, a[i], c[j]) for j in range(4)] for i in range(4)]
        own = [[alone[i] @ joined(model, null, c[j]) for j in range(4)] for i in range(4)]
    torch.testing.assert_close(joint, torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(direct, torch.tensor(own), atol=1e-6, rtol=0)


def test_scores_of_training_pass_each_picture_through_its_tower_once():
    model, passed = network(), {}
    for name in ("ground_tower", "aerial_tower", "classes_tower"):

        def count(tower, given, features, name=name):
            passed[name] = passed.get(name, 0) + len(given[0])

        getattr(model, name).register_forward_hook(count)
    joint = task_of(model).train().scores(rows(5))["joint"]
    assert joint.shape == (5, 5)
    # The aerial tower sees each A and each C; a tower pass for each pair would make it 25 or more.
    assert passed == {"ground_tower": 5, "aerial_tower": 10, "classes_tower": 5}


def copy_of_a(model):
    """Weights with which both embeddings are a code of A, and the tile is never looked at."""
    width = model.aerial_tower.dim
    with torch.no_grad():
        heads = (model.query_linear, model.query_mlp, model.tile_linear, model.query_aerial_linear)
        for part in (*heads, model.candidate_mlp):
            for weight in part.parameters():
                weight.zero_()
        code = torch.randn(model.config.hidden, width, generator=torch.Generator().manual_seed(3))
        model.query_aerial_linear.weight.copy_(code)
        model.query_linear.weight[:, width : 2 * width].copy_(code)  # a stands between g and s
    return model


@pytest.mark.parametrize(
    ("name", "chance"), [("triplet", 0.3), ("soft-margin", math.log(2)), ("infonce", math.log(6))]
)
def test_loss_does_not_reward_a_model_that_looks_at_a_alone(name, chance):
    model = copy_of_a(network())
    task = task_of(model, loss=name, margin=0.3, smoothing=0.0).eval()
    batch = rows(6)
    with torch.no_grad():
        a = model.aerial_features(batch["synthetic"].float() / 255)
        query = model.fuse(None, a, None)
        # What the leak would give: each tile embedded with its *own* pair's A finds itself.
        leak = query.embedding @ model.joint(torch.zeros(6, 10), query.query_proj).T
        assert torch.allclose(leak.diagonal(), torch.ones(6))
        assert losses.triplet(leak, 0.3) < 0.25
        named = task(batch)
    assert named["joint"].item() >= chance - 1e-5
    assert named["batch_recall_at_1"].item() == 0  # all tiles tie


def test_loss_reaches_every_weight():
    task = task_of(network(), loss="infonce", augment=True, drop_ground=0.5).train()
    task(rows(12))["loss"].backward()
    without = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_groups_hold_every_weight_once_at_the_rate_of_its_part():
    task = task_of(network(), loss="infonce", lr_towers=1e-5, lr_heads=1e-2)
    grouped = [id(p) for group in task.groups() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in task.parameters())
    rate = {id(p): group["lr"] for group in task.groups() for p in group["params"]}
    assert rate[id(next(task.model.aerial_tower.parameters()))] == 1e-5
    assert rate[id(task.model.null_ground)] == rate[id(task.log_scale)] == 1e-2


def test_dropped_synthetic_aerial_has_no_part_in_the_loss():
    task = task_of(network(), drop_synthetic=1.0).train()
    batch = rows(4)
    other = batch | {"synthetic": rows(4, seed=9)["synthetic"]}
    assert torch.equal(task(batch)["loss"], task(other)["loss"])
    task.eval()
    assert not torch.equal(task(batch)["loss"], task(other)["loss"])


def test_dropped_rows_keep_ground_or_synthetic():
    task = task_of(network(), drop_ground=1.0, drop_synthetic=0.5).train()
    task.model.null_ground.data.fill_(7.0)
    task.model.null_synthetic.data.fill_(7.0)
    zero, batch = torch.zeros(64, 12), rows(64)
    ground, synthetic, _ = task._dropped(zero, zero, zero, batch)
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
    model = network(alone=True)
    task = task_of(model, w_joint=0.0, w_direct=1.0).train()
    batch = rows(5)
    named = task({k: batch[k] for k in ("ground", "aerial", "key", "epoch")})
    assert named["loss"].item() == named["direct"].item()
    query = model.query(batch["ground"].float() / 255)
    with pytest.raises(ValueError, match=r"modality G.*--modalities G"):
        model.fuse(torch.zeros(2, 12), torch.zeros(2, 12), None)
    with pytest.raises(ValueError, match="trained on G alone"):
        model.query(batch["ground"].float() / 255, classes=batch["classes"])
    tile_proj = model.tile(batch["aerial"].float() / 255)
    direct = task.eval().scores(batch)["direct"]
    torch.testing.assert_close(direct, joint_scores(model, query, tile_proj), atol=1e-5, rtol=0)


def test_shared_tower_sees_both_views(tmp_path):
    model = network(shared=True)
    task_of(model).train()(rows(5))["loss"].backward()
    towers = {name.split(".")[0] for name, _ in model.named_parameters() if "_tower" in name}
    assert towers == {"aerial_tower", "classes_tower"}
    seen = views(rows(2))
    before = model.ground_features(seen.ground)
    model.save(str(tmp_path))
    again = Matcher.load(str(tmp_path))
    torch.testing.assert_close(again.ground_features(seen.ground), before)
    next(again.aerial_tower.parameters()).data.mul_(2)
    assert not torch.allclose(again.ground_features(seen.ground), before)


@pytest.mark.parametrize("view", [{"fov": 90.0}, {"unknown_heading": True}])
def test_limited_views_are_trained_without_a_and_s(view):
    with pytest.raises(ValueError, match="G alone: expected w_joint 0"):
        TrainMatcher(**view)
    task = task_of(network(alone=True), w_joint=0.0, **view).train()
    whole = task_of(network(alone=True), w_joint=0.0).train()
    batch = rows(6)
    assert not torch.equal(task(batch)["loss"], whole(batch)["loss"])


def test_narrow_view_hides_what_lies_behind():
    task = task_of(network(alone=True), w_joint=0.0, fov=90.0).train()
    batch = rows(6)
    south = batch["ground"].clone()
    south[..., : WIDE // 4] = 0  # behind a camera that looks north
    assert torch.equal(task(batch)["loss"], task(batch | {"ground": south})["loss"])


def test_unknown_heading_of_a_row_is_another_in_each_epoch():
    task = task_of(network(alone=True), w_joint=0.0, unknown_heading=True).train()
    batch = rows(6)
    losses = {task(batch | {"epoch": torch.tensor(n)})["loss"].item() for n in range(4)}
    assert len(losses) == 4
    same = batch | {"ground": batch["ground"][..., :1].expand_as(batch["ground"]).contiguous()}
    losses = {task(same | {"epoch": torch.tensor(n)})["loss"].item() for n in range(2)}
    assert len(losses) == 1  # a panorama of equal columns looks the same from every heading


# --- batches of near pairs ---


def test_grouped_rows_follow_their_nearest_free_ones():
    place = np.arange(40)  # on a line; the nearest of each, itself first
    near = np.abs(place[:, None] - place).argsort(axis=1, kind="stable")[:, :8]
    order = grouped(near, 4, seed=0)
    assert sorted(order) == list(place)
    first = order[:4]
    assert np.ptp(first) == 3  # a row and its three nearest
    assert list(order) != list(grouped(near, 4, seed=1))
    unknown = grouped(np.full((40, 8), -1), 4, seed=0)
    assert sorted(unknown) == list(place)


def test_nearest_are_those_of_largest_product():
    query, tile = np.random.default_rng(0).normal(size=(2, 12, 5))
    expected = (-(query @ tile.T)).argsort(axis=1)[:, :3]
    assert (nearest(query, tile, 3) == expected).all()
    assert (nearest(query[:1], tile[:2], 3)[0, 2:] == -1).all()


@pytest.mark.ray
def test_mined_rows_near_in_space_or_for_the_model_follow_each_other(tmp_path, ray_session):
    names = [f"p{number:02}" for number in range(64)]
    directory = synthesized_rows(str(tmp_path / "rows"), names, towns=4)
    pool = Pool(batch=16)
    kept = mined(synthesized(directory), "", pool, seed=0).take_all()
    ids = [item[schema.PAIR_ID] for item in kept]
    assert sorted(ids) == names  # the row with an error is left out
    nearby = mined(synthesized(directory), "", pool, seed=0)
    assert decode(nearby, (HIGH, WIDE), SIZE).count() == 64
    towns = np.array([int(name[1:]) % 4 for name in ids]).reshape(-1, GROUP)
    assert (towns == towns[:, :1]).all()

    model = network(alone=True)
    model.save(str(tmp_path / "model"))
    row_of = {item[schema.PAIR_ID]: item for item in kept}
    learnt = mined(synthesized(directory), str(tmp_path / "model"), pool, seed=0).take_all()
    ids = [item[schema.PAIR_ID] for item in learnt]
    assert sorted(ids) == names
    batch = decode_batch(columns(*(row_of[name] for name in ids)), (HIGH, WIDE), SIZE)
    with torch.no_grad():
        query = model.query(torch.from_numpy(batch["ground"]).float() / 255)
        tile = model.shortlist(model.tile(torch.from_numpy(batch["aerial"]).float() / 255))
    score = query.embedding @ tile.T
    places = (-score[0]).argsort()
    assert set(places[: GROUP + 1].tolist()) >= set(range(1, GROUP))  # the first row's best tiles


RECIPES = {
    "joint": {"w_direct": 0.7},
    "chunks": {"chunk": 3},
    "alone": {"w_joint": 0.0},
}


def worker(rank, world, directory, recipe):
    """One of `world` DDP workers on its share of the rows; rank 0 keeps loss and gradients."""
    torch.set_num_threads(1)
    address = f"file://{directory}/rendezvous{world}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    task = task_of(network(alone=recipe == "alone"), **RECIPES[recipe]).train()
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
    task = task_of(network(alone=recipe == "alone"), **RECIPES[recipe]).train()
    named = task(rows(8))
    named["loss"].backward()
    assert named["loss"].item() == pytest.approx(found.pop("total").item(), abs=1e-5)
    for name, weight in task.named_parameters():
        if weight.grad is None:
            assert found[name] is None or not found[name].any(), name
        else:
            torch.testing.assert_close(found[name], weight.grad, atol=1e-5, rtol=1e-4)


# --- augmentation ---


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("mirror", [False, True])
def test_turned_pair_has_the_polar_view_of_the_turned_tile(turns, mirror):
    # A smooth tile (as real ones, after resizing), whose polar view stands in for the panorama.
    coarse = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    tile = F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)
    pair = Views(geometry.to_polar(tile, 32, 64), tile, tile, (tile[:, 0] * 4).byte())
    chosen = torch.tensor([turns, turns]), torch.tensor([mirror, mirror])
    ground, aerial, synthetic, classes = turned(pair, *chosen)
    torch.testing.assert_close(geometry.to_polar(aerial, 32, 64), ground, atol=1e-5, rtol=0)
    expected = torch.rot90(tile, turns, (-2, -1))
    expected = expected.flip(-1) if mirror else expected
    assert torch.equal(aerial, expected)
    assert torch.equal(synthetic, expected)
    assert torch.equal(classes, (expected[:, 0] * 4).byte())


def test_blurred_by_half_lies_between_the_picture_and_its_mean():
    picture = torch.zeros(2, 3, 5, 5)
    picture[:, :, 2, 2] = 0.9
    found = blurred(picture, torch.tensor([0.0, 0.5]))
    assert torch.equal(found[0], picture[0])
    torch.testing.assert_close(found[1, :, 2, 2], torch.full((3,), 0.5))  # 0.9 / 2 + 0.1 / 2
    torch.testing.assert_close(found[1, :, 1, 1], torch.full((3,), 0.05))
    flat = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(blurred(flat, torch.ones(1)), flat)  # the border is not darkened


def test_augmented_rows_turn_each_by_its_own_draw():
    batch = rows(64)
    whole = augmented(views(batch), batch["key"], seed=0, epoch=0)
    again = augmented(Views(*(v[:5] for v in views(batch))), batch["key"][:5], seed=0, epoch=0)
    assert all(torch.allclose(a[:5], b) for a, b in zip(whole, again, strict=True))
    assert all(v.min() >= 0 and v.max() <= 1 for v in whole[:3])
    turns = {
        (k, flip)
        for before, after in zip(batch["classes"], whole.classes, strict=True)
        for k in range(4)
        for flip in (False, True)
        if torch.equal(after, before.rot90(k).flip(-1) if flip else before.rot90(k))
    }
    assert len(turns) == 8


def test_jittered_colours_differ_by_row_and_stream_and_keep_a_grey_picture_flat():
    key = torch.tensor([rng.row_key("a"), rng.row_key("b")])
    grey = torch.full((2, 3, 4, 4), 0.5)
    first, second = color_jitter(grey, key, 1), color_jitter(grey, key, 2)
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first, second)
    assert torch.equal(first, first[..., :1, :1].expand(2, 3, 4, 4))


# --- rows ---


def row(pair_id="0000001", shade=128, error=None, **changes):
    ground = np.full((HIGH, WIDE, 3), shade, dtype=np.uint8)
    tile = np.full((SIZE, SIZE, 3), shade, dtype=np.uint8)
    whole = {
        schema.PAIR_ID: pair_id,
        schema.GROUND: images.encode(ground),
        schema.AERIAL: images.encode(tile),
        schema.CLASSES: None,
        schema.SYNTHETIC: images.encode(tile),
        schema.SYNTHETIC_CLASSES: images.encode(np.full((SIZE, SIZE), 2, dtype=np.uint8)),
        schema.LATITUDE: 1.0,
        schema.LONGITUDE: 2.0,
        schema.ERROR: error,
    }
    return whole | changes


def columns(*items):
    return {name: np.array([item[name] for item in items], dtype=object) for name in items[0]}


def test_decode_leaves_failed_rows_out_and_keeps_ids_of_classes():
    batch = decode_batch(
        columns(row("a"), row("b", error="broken", ground=None), row("c", shade=3)),
        panorama=(HIGH, WIDE),
        square=SIZE,
    )
    assert batch["key"].tolist() == [rng.row_key("a"), rng.row_key("c")]
    assert batch["ground"].shape == (2, 3, HIGH, WIDE)
    assert (batch["aerial"][1] == 3).all()
    assert (batch["classes"] == 2).all()


def test_decode_of_failed_rows_only_gives_empty_tensors():
    batch = decode_batch(columns(row(error="broken")), panorama=(HIGH, WIDE), square=SIZE)
    assert batch["synthetic"].shape == (0, 3, SIZE, SIZE)
    assert batch["classes"].shape == (0, SIZE, SIZE)


def test_embed_tile_passes_failed_rows_through_and_drops_pictures(tmp_path):
    model = network()
    model.save(str(tmp_path))
    given = columns(row("a", shade=9), row("b", error="earlier"), row("c", aerial=b"no picture"))
    found = EmbedTile(str(tmp_path), 4)(given)
    assert set(found) == {"pair_id", "latitude", "longitude", "error", "tile_proj"}
    assert found["error"][:2].tolist() == [None, "earlier"]
    assert found["error"][2].startswith("embed tile: aerial: ")
    with torch.no_grad():
        expected = model.tile(torch.full((1, 3, SIZE, SIZE), 9 / 255))[0].half().numpy()
    assert found["tile_proj"].dtype == np.float16
    assert np.array_equal(found["tile_proj"][0], expected)
    assert not found["tile_proj"][1:].any()


@pytest.mark.parametrize("modality", MODALITIES)
def test_embed_query_reads_what_its_modality_names(tmp_path, modality):
    model = network()
    model.save(str(tmp_path))
    named = {"G": schema.GROUND, "A": schema.SYNTHETIC, "S": schema.SYNTHETIC_CLASSES}
    unread = {name: None for letter, name in named.items() if letter not in modality.split("+")}
    found = EmbedQuery(str(tmp_path), modality)(columns(row("a", shade=50, **unread)))
    grey = {"G": (1, 3, HIGH, WIDE), "A": (1, 3, SIZE, SIZE)}
    ground, synthetic = (
        torch.full(grey[k], 50 / 255) if k in modality.split("+") else None for k in "GA"
    )
    classes = torch.full((1, SIZE, SIZE), 2, dtype=torch.uint8) if "S" in modality else None
    with torch.no_grad():
        expected = model.query(ground, synthetic, classes)
    assert found["error"].tolist() == [None]
    np.testing.assert_allclose(found["embedding"], expected.embedding.numpy(), atol=1e-6)
    np.testing.assert_allclose(found["query_proj"], expected.query_proj.numpy(), atol=1e-5)


def test_embed_query_without_a_column_it_reads_says_so(tmp_path):
    network().save(str(tmp_path))
    given = columns(row())
    del given[schema.SYNTHETIC]
    with pytest.raises(ValueError, match=r"embed query: expected columns \['synthetic'\]"):
        EmbedQuery(str(tmp_path), "G+A")(given)


def test_recipe_of_sample4geo_trains_a_shared_tower_without_a_and_s(tmp_path):
    save_tower(Tower(SPEC), str(tmp_path))
    preset = os.path.join(
        os.path.dirname(__file__), os.pardir, os.pardir, "jobs", "sample4geo.yaml"
    )
    recipe = configs.parse(TrainMatcher, ["--config", preset, "--tower", str(tmp_path)])
    task = build_task(recipe).train()
    pictures = torch.randint(0, 256, (3, 3, 384, 384), dtype=torch.uint8)
    ground = torch.randint(0, 256, (3, 3, 140, 768), dtype=torch.uint8)
    batch = {"ground": ground, "aerial": pictures, "key": torch.arange(3), "epoch": torch.tensor(0)}
    task(batch)["loss"].backward()
    assert task.model.ground_tower is None
    assert all(weight.grad.any() for weight in task.model.aerial_tower.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"w_joint": -1.0}, "w_joint and w_direct of at least 0"),
        ({"w_joint": 0.0, "w_direct": 0.0}, "one of them above"),
        ({"smoothing": 1.0}, "smoothing is in"),
        ({"chunk": -1}, "chunk of at least 0"),
        ({"mine_every": 2, "fit": Fit(storage="s3://bucket/runs")}, "that all nodes mount"),
    ],
)
def test_recipe_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainMatcher(**wrong)


def test_training_ids_are_those_of_the_task_and_changed_lists_are_refused(tmp_path):
    MatcherTask(network(), TrainMatcher(), ("0000003", "0000007")).save(str(tmp_path))
    assert training_ids(str(tmp_path)) == {"0000003", "0000007"}
    (tmp_path / IDS).write_text("0000003\n")
    with pytest.raises(ValueError, match=r"is not the list that its training\.json"):
        training_ids(str(tmp_path))


def synthesized_rows(directory, ids, towns=1):
    """Places that differ in their grey level, in three views; each in the next of `towns`."""
    shades = np.linspace(10, 245, len(ids)).astype(int)
    items = [
        row(name, shade=int(shade), latitude=0.01 * (number % towns) + 1e-6 * number)
        for number, (name, shade) in enumerate(zip(ids, shades, strict=True))
    ]
    items.append(row("broken", error="generate: ground: empty file", synthetic=None))
    os.makedirs(directory)
    table = Table.from_pylist(items, schema=schema.SYNTHESIZED)
    parquet.write_table(table, os.path.join(directory, "part-0.parquet"))
    fit = Fit()
    manifest.write(directory, rows=len(items), config=fit, models={}, source="test")
    return directory


@pytest.mark.ray
def test_train_publishes_a_model_that_beats_chance_and_knows_its_pairs(
    tmp_path, monkeypatch, ray_session
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_tower(Tower(SPEC), str(tmp_path / "tower"))
    config = TrainMatcher(
        pairs=synthesized_rows(str(tmp_path / "pairs"), [f"t{i:02}" for i in range(64)]),
        val=synthesized_rows(str(tmp_path / "val"), [f"v{i}" for i in range(8)]),
        tower=str(tmp_path / "tower"),
        panorama=(HIGH, WIDE),
        polar=(HIGH, WIDE),
        square=SIZE,
        hidden=16,
        loss="triplet",
        augment=False,
        lr_towers=1e-2,
        lr_heads=1e-2,
        output=str(tmp_path / "model"),
        fit=Fit(epochs=6, batch=8, cache=True, storage=str(tmp_path / "runs"), name="matcher"),
    )
    result = train(config)
    # At chance all scores of a batch are equal, and each of the two terms is the margin.
    assert result.metrics is not None
    assert result.metrics["val/joint"] < config.margin / 2
    assert training_ids(config.output) == {f"t{i:02}" for i in range(64)}
    tiles = embed_tiles(ray.data.read_parquet(config.val), Embed(model=config.output))
    found = tiles.take_all()
    assert [item["error"] is None for item in found].count(False) == 1
    assert found[0]["tile_proj"].shape == (16,)
    assert train(config).metrics == result.metrics  # a finished run is taken as it is
    storage.write_json(storage.join(config.pairs, SOURCE), {"sampling": {"steps": 50}})
    with pytest.raises(ValueError, match="rows made from"):
        train(config)


@pytest.mark.slow
@pytest.mark.ray
def test_train_with_two_workers_and_near_pairs_in_a_batch_runs_to_its_end(
    tmp_path, monkeypatch, ray_session
):
    monkeypatch.chdir(tmp_path)
    save_tower(Tower(SPEC), str(tmp_path / "tower"))
    config = TrainMatcher(
        pairs=synthesized_rows(str(tmp_path / "pairs"), [f"t{i:02}" for i in range(32)], towns=4),
        tower="tower",  # the workers are in another directory
        weights="tower/model.safetensors",
        panorama=(HIGH, WIDE),
        polar=(HIGH, WIDE),
        square=SIZE,
        hidden=16,
        mine_every=2,
        chunk=4,
        output=str(tmp_path / "model"),
        fit=Fit(epochs=3, batch=16, workers=2, storage=str(tmp_path / "runs"), name="near"),
    )
    result = train(config)
    assert result.metrics_dataframe is not None
    assert list(result.metrics_dataframe["epoch"]) == [1, 2, 3]
    assert result.metrics_dataframe["train/loss"].between(0, 10).all()
    assert len(training_ids(config.output)) == 32


@pytest.mark.ray
def test_train_refuses_validation_pairs_among_its_training_pairs(tmp_path, ray_session):
    config = TrainMatcher(
        pairs=synthesized_rows(str(tmp_path / "pairs"), ["a", "b"]),
        val=synthesized_rows(str(tmp_path / "val"), ["b", "c"]),
    )
    with pytest.raises(ValueError, match="expected validation pairs apart from training, got 1"):
        train(config)
