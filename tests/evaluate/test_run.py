import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from cvmatch.data import geography, images, schema
from cvmatch.demo import models as base_models
from cvmatch.evaluate import retrieval
from cvmatch.evaluate.fid import distance
from cvmatch.evaluate.generation import generation, segmentation
from cvmatch.evaluate.run import View, check_unseen, embedded, evaluate, flat, true_rows
from cvmatch.evaluate.settings import Evaluate
from cvmatch.index.reader import Index
from cvmatch.index.settings import DeleteTiles
from cvmatch.index.shard import Store
from cvmatch.index.shortlist_head import MatcherHead
from cvmatch.index.update import delete
from cvmatch.match.augment import limited
from cvmatch.match.fusion import Fusion, Query
from cvmatch.match.infer import EmbedQuery
from cvmatch.match.model import Matcher
from cvmatch.match.settings import MODALITIES
from cvmatch.nn.backbones import MEAN
from cvmatch.report import evaluation
from tests.helpers import index as tiny

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluate")
    tiny.index(str(place), COUNT)
    tiny.write(tiny.rows(10), str(place / "queries"))
    return str(place)


@pytest.fixture(scope="module")
def index(folder):
    return Index.open(os.path.join(folder, "index"))


@pytest.fixture(scope="module")
def model(index):
    return Matcher.load(index.heads)


def of_equal_tiles(index, model):
    """The index with zeros for all tiles, and another model."""
    tile_proj = Store([np.zeros_like(array) for array in index.tile_proj.arrays])
    return Index(**{**vars(index), "matcher": model, "tile_proj": tile_proj})


def plane(angles, places=None, dead=()):
    """An index of tiles at angles (degrees) of a plane, whose score is the cosine of the angle."""
    model = Fusion(ground=4, aerial=4, classes=4, hidden=2).eval()
    for weight in model.candidate_mlp.parameters():
        torch.nn.init.zeros_(weight)
    places = places or [(0.01 * number, 0.0) for number in range(len(angles))]
    tiles = pa.table(
        {
            schema.PAIR_ID: [str(number) for number in range(len(angles))],
            schema.LATITUDE: pa.array([place[0] for place in places], pa.float64()),
            schema.LONGITUDE: pa.array([place[1] for place in places], pa.float64()),
        }
    )
    tile_proj = directions(angles).numpy().astype(np.float16)
    about = {"shortlist": len(tile_proj)}
    return Index(
        Store([tile_proj]),
        tiles,
        [],
        MatcherHead(model),
        np.array(dead, np.int64),
        model,
        about,
        "",
    )


def directions(angles):
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def looking(*angles):
    return Query(directions(angles), torch.zeros(len(angles), 2))


def test_exhaustive_angles_in_a_plane_give_the_ranks_one_can_see():
    index = plane([0.0, 30.0, 60.0, 90.0])
    # 20 degrees sees tiles 1 (10 away), 0 (20), 2 (40), 3 (70); 80 sees 3 (10), 2 (20), 1, 0.
    found = retrieval.exhaustive(index, looking(20.0, 80.0), torch.tensor([0, 3]), near_m=1500.0)
    assert found.rank.tolist() == [1, 0]
    assert found.best.tolist() == [[1, 0, 2, 3], [3, 2, 1, 0]]
    assert found.score.tolist() == pytest.approx(
        [math.cos(math.radians(20)), math.cos(math.radians(10))], abs=1e-3
    )
    degree = 2 * math.pi * 6_371_008.8 / 360
    assert found.distance.tolist() == pytest.approx([0.01 * degree, 0.0], abs=1e-3)
    assert found.near.tolist() == [2, 2]  # itself and the neighbour 1,112 m away
    assert found.near_rank.tolist() == [1, 0]
    assert found.ten == {}
    numbers = retrieval.summary(found, 4, draws=200)
    assert numbers["recall@1"] == 0.5
    assert numbers["recall@5"] == numbers["near_recall@5"] == 1.0
    assert (numbers["recall@1%"], numbers["recall@1%_k"]) == (0.5, 1)
    assert numbers["median_rank"] == 1.5
    assert numbers["recall@1_low"] <= 0.5 <= numbers["recall@1_high"]


def test_exhaustive_in_blocks_equals_one_block(monkeypatch):
    index = plane([7.0 * number for number in range(12)])
    query, truth = looking(*[11.0 * number for number in range(8)]), torch.arange(8)
    whole = retrieval.exhaustive(index, query, truth, near_m=3000.0)
    monkeypatch.setattr(retrieval, "_BLOCK", 36)  # three queries a block
    parts = retrieval.exhaustive(index, query, truth, near_m=3000.0)
    for name in ("rank", "best", "near_rank", "near"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert 0 <= parts.ten["top1"] <= parts.ten["top5"] <= 1


def test_exhaustive_equal_scores_count_against_the_query():
    found = retrieval.exhaustive(
        plane([40.0] * 12), looking(40.0, 40.0), torch.tensor([0, 11]), near_m=100.0
    )
    assert found.rank.tolist() == [11, 11]
    assert found.ten == {"top1": 0.0, "top5": 0.0}


def test_exhaustive_deleted_tiles_are_no_rivals():
    index = plane([0.0, 30.0, 60.0, 90.0], dead=[1])
    # 20 degrees would see tile 1 first; tile 1 is also the only one near tile 0.
    found = retrieval.exhaustive(index, looking(20.0, 80.0), torch.tensor([0, 3]), near_m=1500.0)
    assert found.rank.tolist() == [0, 0]
    assert found.best.tolist() == [[0, 2, 3], [3, 2, 0]]
    assert found.score[1].item() == pytest.approx(math.cos(math.radians(10)), abs=1e-3)
    assert found.near.tolist() == [1, 2]
    assert found.distance.tolist() == [0.0, 0.0]


def test_exhaustive_one_of_ten_draws_no_deleted_tile():
    query, truth = looking(40.0, 40.0), torch.tensor([0, 99])
    index = plane([40.0] * 100, dead=range(6, 94))
    assert retrieval.exhaustive(index, query, truth, 100.0).ten == {"top1": 0.0, "top5": 0.0}
    few = plane([40.0] * 100, dead=range(6, 97))
    assert retrieval.exhaustive(few, query, truth, 100.0).ten == {}


def test_exhaustive_tile_without_coordinates_is_near_nothing():
    nowhere = (math.nan, math.nan)
    index = plane([0.0, 30.0, 60.0], places=[(0.0, 0.0), nowhere, (0.0, 0.001)])
    found = retrieval.exhaustive(index, looking(0.0, 30.0), torch.tensor([0, 1]), near_m=1000.0)
    assert found.near.tolist() == [2, 0]
    assert found.distance.isnan().tolist() == [False, True]
    numbers = retrieval.summary(found, 3, draws=10)
    assert (numbers["near_queries"], numbers["near_gallery"]) == (1, 2.0)
    assert numbers["distance_m"] == 0.0


def test_summary_guess_among_the_tiles_nearby_is_that_of_each_query():
    whole, none = torch.zeros(3, dtype=torch.int64), torch.full((3,), torch.nan)
    found = retrieval.Found(
        rank=whole, score=none, best=whole[:, None], best_score=none[:, None], near_rank=whole,
        near=torch.tensor([2, 100, 1]), distance=none, ten={},
    )  # fmt: skip
    numbers = retrieval.summary(found, 500, draws=5)
    assert (numbers["near_queries"], numbers["near_gallery"]) == (2, 51.0)
    assert numbers["near_recall@1_chance"] == pytest.approx((1 / 2 + 1 / 100) / 2)
    assert numbers["near_recall@5_chance"] == pytest.approx((1 + 5 / 100) / 2)


def test_metres_of_known_arcs():
    pole, equator = torch.tensor([90.0, 0.0]), torch.tensor([0.0, 123.0])
    quarter = math.pi / 2 * 6_371_008.8
    assert geography.haversine_distance(pole, equator).item() == pytest.approx(quarter, rel=1e-6)
    one = torch.tensor([[60.0, 10.0]], dtype=torch.float64)
    other = torch.tensor([[60.0, 10.001]], dtype=torch.float64)
    step = 6_371_008.8 * math.radians(0.001) * math.cos(math.radians(60))
    assert geography.haversine_distance(one, other).item() == pytest.approx(step, rel=1e-6)


def test_two_stage_of_the_whole_gallery_keeps_every_exact_answer(index, folder):
    batch = EmbedQuery(index.heads, "G+A+S")(tiny.columns(tiny.rows(10)))
    query = Query(torch.from_numpy(batch["embedding"]), torch.from_numpy(batch["query_proj"]))
    truth = torch.arange(10)
    found = retrieval.exhaustive(index, query, truth, 1000.0)
    numbers = retrieval.two_stage(index, query, truth, found)
    assert (numbers["exact_top1_kept"], numbers["exact_top10_kept"]) == (1.0, 1.0)
    assert numbers["recall@10"] == (found.rank < 10).double().mean().item()
    few = Index(**{**vars(index), "manifest": {"shortlist": 10}})
    numbers = retrieval.two_stage(few, query, truth, found)
    assert numbers["exact_top10_kept"] < 1
    held = (few.nearest(query, 10) == truth.numpy()[:, None]).any(axis=1)
    assert numbers["recall@10"] == held.mean() < 1


def test_two_stage_equal_scores_count_against_the_query(index, model):
    collapsed = Fusion(ground=4, aerial=4, classes=4, hidden=model.hidden).eval()
    for weight in collapsed.candidate_mlp.parameters():
        torch.nn.init.zeros_(weight)
    opened, truth = of_equal_tiles(index, collapsed), torch.arange(10)
    same = Query(torch.ones(10, model.hidden), torch.zeros(10, model.hidden))
    found = retrieval.exhaustive(opened, same, truth, 1000.0)
    numbers = retrieval.two_stage(opened, same, truth, found)
    for k in retrieval.KS:
        assert numbers[f"recall@{k}"] == (found.rank < k).double().mean().item() == 0.0


def test_constant_embeddings_are_never_above_chance(tmp_path):
    opened = tiny.index(str(tmp_path), COUNT)
    model = Matcher.load(opened.heads)
    opened = of_equal_tiles(opened, model)
    for weight in (model.query_linear.weight, model.query_aerial_linear.weight):
        torch.nn.init.zeros_(weight)
    tiny.write(tiny.rows(COUNT), str(tmp_path / "queries"))
    config = Evaluate(queries=str(tmp_path / "queries"))
    queries = embedded(config, model)
    assert [modality for _, modality in queries] == list(MODALITIES)
    for query in queries.values():
        found = retrieval.exhaustive(opened, query, torch.arange(COUNT), 1000.0)
        numbers = retrieval.summary(found, COUNT, draws=10)
        assert numbers["recall@1"] <= 1 / COUNT
        assert numbers["recall@10"] <= 10 / COUNT
        assert numbers["one_of_ten_top1"] <= 0.1
        assert numbers["one_of_ten_top5"] <= 0.5
        assert numbers["median_rank"] == COUNT


def test_model_that_copies_a_and_ignores_tiles_is_exposed(tmp_path):
    # A query and a tile's embedding with that query's A are equal: in a loss or a protocol that
    # embedded each tile with the A of its own pair, it would find every tile.
    opened = tiny.index(str(tmp_path), COUNT)
    model = Matcher.load(opened.heads)
    g, a = model.null_ground.numel(), model.null_synthetic.numel()
    with torch.no_grad():
        for layer in (model.query_linear, model.query_aerial_linear, model.tile_linear):
            for weight in layer.parameters():
                weight.zero_()
        code = torch.randn(model.hidden, a, generator=torch.Generator().manual_seed(0))
        model.query_aerial_linear.weight.copy_(code)
        model.query_linear.weight[:, g : g + a] = code
        for rest in (model.query_mlp, model.candidate_mlp):
            for weight in rest.parameters():
                weight.zero_()
    opened = of_equal_tiles(opened, model)
    tiny.write(tiny.rows(COUNT), str(tmp_path / "queries"))
    queries = embedded(Evaluate(queries=str(tmp_path / "queries")), model)
    query = queries[View(360.0, False), "G+A"]
    with torch.inference_mode():
        candidate = model.joint(torch.zeros(COUNT, model.hidden), query.query_proj)
    own = (candidate * query.embedding).sum(1)
    torch.testing.assert_close(own, torch.ones(COUNT))  # the leak
    found = retrieval.exhaustive(opened, query, torch.arange(COUNT), 1000.0)
    assert (found.rank == COUNT - 1).all()  # every tile ties


def test_check_unseen_training_ids_are_refused_with_names_and_number(tmp_path):
    text = "0000003\n0000007\n0000040\n"
    (tmp_path / "training_ids.txt").write_text(text)
    about = {"pairs": 3, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "training.json").write_text(json.dumps(about))
    ids = [f"{number:07d}" for number in range(10)]
    with pytest.raises(ValueError, match=r"trained on 2 of 10 queries.*\['0000003', '0000007'\]"):
        check_unseen(ids, str(tmp_path))
    check_unseen(["0000001"], str(tmp_path))


def test_evaluate_on_training_pairs_is_refused(folder, tmp_path):
    model = tiny.matcher(str(tmp_path / "model"))
    text = "0000003\n"
    (tmp_path / "model" / "training_ids.txt").write_text(text)
    about = {"pairs": 1, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "model" / "training.json").write_text(json.dumps(about))
    parts = tiny.parts(tiny.rows(COUNT), model, str(tmp_path / "parts"))
    tiny.publish(parts, tiny.BuildIndex(model=model, output=str(tmp_path / "index")))
    config = Evaluate(
        queries=os.path.join(folder, "queries"), index=str(tmp_path / "index"),
        output=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="trained on 1 of 10 queries, such as"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


def test_true_rows_of_tiles_that_the_index_lacks_are_named(index):
    assert true_rows(["0000005", "0000000"], index).tolist() == [5, 0]
    with pytest.raises(ValueError, match=r"2 of 3 queries, such as \['0000024', 'x'\]"):
        true_rows(["0000024", "0000001", "x"], index)


def test_embedded_modalities_equal_the_actors(index, model, folder):
    config = Evaluate(queries=os.path.join(folder, "queries"))
    queries = embedded(config, model)
    for modality in MODALITIES:
        batch = EmbedQuery(index.heads, modality)(tiny.columns(tiny.rows(10)))
        query = queries[View(360.0, False), modality]
        np.testing.assert_allclose(query.embedding.numpy(), batch["embedding"], atol=1e-4)
        np.testing.assert_allclose(query.query_proj.numpy(), batch["query_proj"], atol=1e-3)


def test_embedded_limited_views_have_g_alone(model, folder):
    config = Evaluate(
        queries=os.path.join(folder, "queries"), fov=(360.0, 90.0), unknown_heading=True
    )
    queries = embedded(config, model)
    names = [(view.name, modality) for view, modality in queries]
    limited = [("360-unknown", "G"), ("90-north", "G"), ("90-unknown", "G")]
    assert sorted(names) == sorted([("360-north", modality) for modality in MODALITIES] + limited)
    whole = queries[View(360.0, False), "G"].embedding
    for view in (View(360.0, True), View(90.0, False), View(90.0, True)):
        assert not torch.allclose(queries[view, "G"].embedding, whole, atol=1e-3)
    with pytest.raises(ValueError, match="limited views need modality G"):
        Evaluate(modalities=("A",), fov=(90.0,))


def test_embedded_rows_without_synthetic_say_which_job(model, tmp_path):
    rows = tiny.rows(4)
    column = rows.column_names.index(schema.SYNTHETIC)
    rows = rows.set_column(column, schema.SYNTHETIC, pa.nulls(4, pa.binary()))
    tiny.write(rows, str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"\['synthetic'\] in every row.*synthesize"):
        embedded(Evaluate(queries=str(tmp_path / "rows")), model)
    queries = embedded(Evaluate(queries=str(tmp_path / "rows"), modalities=("G",)), model)
    assert [modality for _, modality in queries] == ["G"]


def test_limited_narrow_view_keeps_the_middle_and_blanks_the_rest():
    ground = torch.arange(8.0).expand(1, 3, 4, 8) / 10  # column j holds j / 10; north is column 4
    mean = torch.tensor(MEAN)[:, None]
    north = limited(ground, 90.0, torch.tensor([0.0]))[0, :, 0]
    torch.testing.assert_close(north[:, 3:5], torch.tensor([[0.3, 0.4]] * 3))
    torch.testing.assert_close(north[:, :3], mean.expand(3, 3))
    torch.testing.assert_close(north[:, 5:], mean.expand(3, 3))
    east = limited(ground, 90.0, torch.tensor([90.0]))[0, 0, 0]  # two columns clockwise
    torch.testing.assert_close(east[3:5], torch.tensor([0.5, 0.6]))
    turned = limited(ground, 360.0, torch.tensor([180.0]))[0, 0, 0]
    torch.testing.assert_close(turned, torch.tensor([0.4, 0.5, 0.6, 0.7, 0.0, 0.1, 0.2, 0.3]))
    torch.testing.assert_close(limited(ground, 360.0, torch.tensor([0.0])), ground)


def pictures(count, drawn):
    return [
        {schema.SYNTHETIC: drawn(number), schema.AERIAL: tile(number)} for number in range(count)
    ]


def tile(number):
    return images.encode(tiny.picture(np.random.default_rng(number), 128, 128))


def test_generation_of_the_tiles_themselves_is_perfect_and_shuffled_is_not():
    numbers = generation(pictures(12, tile), bootstrap=50)
    assert numbers["ncc"] == pytest.approx(1.0, abs=1e-5)
    assert numbers["ssim"] == pytest.approx(1.0, abs=1e-5)
    assert (numbers["recall@1"], numbers["recall@1_low"]) == (1.0, 1.0)
    assert numbers["ncc_shuffled"] < 0.3
    assert numbers["ssim_shuffled"] < 0.5


def test_generation_of_one_picture_for_all_is_not_above_chance():
    numbers = generation(pictures(12, lambda _: tile(99)), bootstrap=50)
    assert numbers["recall@1"] <= 1 / 12
    grey = images.encode(np.full((128, 128, 3), 90, dtype=np.uint8))
    flat_numbers = generation(pictures(12, lambda _: grey), bootstrap=50)
    assert flat_numbers["recall@1"] == flat_numbers["recall@10%"] == 0.0


def test_generation_in_blocks_equals_one_block(monkeypatch):
    def half(number):
        clear = images.decode(tile(number)).astype(int) + images.decode(tile(number + 50))
        return images.encode((clear // 2).astype(np.uint8))

    whole = generation(pictures(11, half), bootstrap=20)
    monkeypatch.setattr("cvmatch.evaluate.generation._CHUNK", 4)
    assert generation(pictures(11, half), bootstrap=20) == whole
    assert whole["recall@1_low"] <= whole["recall@1"] <= whole["recall@1_high"]


def test_generation_fid_is_small_for_the_same_pictures_in_another_order_and_not_for_others():
    def brighter(number):
        pixels = images.decode(tile(number)).astype(int) + 60
        return images.encode(pixels.clip(0, 255).astype(np.uint8))

    moved = generation(
        pictures(12, lambda n: tile((n + 1) % 12)),
        bootstrap=5,
        distance=distance(base_models.TOWER),
    )
    other = generation(pictures(12, brighter), bootstrap=5, distance=distance(base_models.TOWER))
    assert moved["fid"] < 0.01 * other["fid"]


def test_generation_fid_of_a_network_that_is_not_here_says_what_to_do(monkeypatch):
    def missing(**_):
        raise ModuleNotFoundError("no torch-fidelity")

    monkeypatch.setattr("cvmatch.evaluate.fid.FrechetInceptionDistance", missing)
    with pytest.raises(ValueError, match=r"pip install torch-fidelity.*--fid vgg16"):
        distance("inception")


def test_generation_without_pictures_is_empty():
    assert generation([{schema.SYNTHETIC: None, schema.AERIAL: tile(0)}]) == {}


def test_segmentation_counts_agreement_by_hand():
    truth = np.zeros((4, 8), dtype=np.uint8)
    truth[:, 4:] = 3
    coloured = images.colours_of(truth)
    coloured[0, 0] = (255, 255, 0)  # a car: ignored among five classes
    ids = np.zeros((2, 4), dtype=np.uint8)  # half the resolution
    ids[:, 3] = 3
    rows = [
        {schema.CLASSES: images.encode(coloured), schema.SYNTHETIC_CLASSES: images.encode(ids)},
        {schema.CLASSES: None, schema.SYNTHETIC_CLASSES: images.encode(ids)},
    ]
    numbers = segmentation(rows)
    # Of 31 counted pixels 15 are class 0 (all right) and 16 class 3 (8 right, 8 called 0).
    assert numbers["accuracy"] == pytest.approx(23 / 31)
    assert numbers["iou"]["impervious"] == pytest.approx(15 / 23)
    assert numbers["iou"]["building"] == pytest.approx(0.5)
    assert math.isnan(numbers["iou"]["tree"])
    assert numbers["miou"] == pytest.approx((15 / 23 + 0.5) / 2)
    assert numbers["ignored"] == pytest.approx(1 / 32)


def test_segmentation_of_the_true_maps_beats_shuffled():
    numbers = segmentation(tiny.rows(6).to_pylist())
    assert numbers["miou"] == 1.0
    assert numbers["miou_shuffled"] < 0.5


def test_flat_names_are_what_mlflow_takes():
    results = {
        "retrieval": {"360-north": {"G+A": {"recall@1%": 0.5, "nan": math.nan}}},
        "x": "text",
    }
    assert flat(results) == {"retrieval/360-north/G_A/recall_1pct": 0.5}


def test_evaluate_writes_results_that_agree_query_by_query(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Evaluate(
        queries=os.path.join(folder, "queries"), index=os.path.join(folder, "index"),
        output=str(tmp_path / "out"), bootstrap=50, near_m=3000.0, fov=(360.0, 90.0),
    )  # fmt: skip
    results = evaluate(config)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    table = parquet.read_table(tmp_path / "out" / "queries.parquet").to_pandas()
    for view, modalities in results["retrieval"].items():
        for modality, numbers in modalities.items():
            rows = table[(table["view"] == view) & (table["modality"] == modality)]
            assert len(rows) == 10
            assert numbers["recall@5"] == pytest.approx((rows["rank"] <= 5).mean())
            assert numbers["median_rank"] == pytest.approx(rows["rank"].median())
            first = [best[0] for best in rows["best"]]
            assert [
                one == other for one, other in zip(first, rows["pair_id"], strict=True)
            ] == list(rows["rank"] == 1)
            assert numbers["two-stage"]["exact_top1_kept"] == 1.0  # K holds the whole gallery
            assert set(numbers["ms"]) == {"exact", "two-stage"}
            assert numbers["near_gallery"] <= 6
    assert set(results["retrieval"]) == {"360-north", "90-north"}
    assert list(results["retrieval"]["90-north"]) == ["G"]
    assert results["segmentation"]["miou"] == 1.0
    assert (np.diff(np.stack(table["best_score"])) <= 0).all()
    near = table[table["rank"] <= 5]
    own = [best[rank - 1] for best, rank in zip(near["best_score"], near["rank"], strict=True)]
    assert own
    np.testing.assert_allclose(own, near["score"], atol=1e-6)
    page = Path(evaluation(config.output, config.queries)).read_text()
    assert page.count("<article>") == 10  # five best, five worst, and no other is left
    assert page.count("one of the best") == page.count("one of the worst") == 5
    assert results["generation"]["gallery"] == 10


def test_evaluate_searches_the_tiles_that_were_not_deleted(folder, tmp_path):
    opened = tiny.index(str(tmp_path), COUNT)
    ids = opened.tiles[schema.PAIR_ID].to_pylist()[10:20]
    delete(DeleteTiles(output=str(tmp_path / "index"), ids=tuple(ids)))
    config = Evaluate(
        queries=os.path.join(folder, "queries"), index=str(tmp_path / "index"),
        output=str(tmp_path / "out"), modalities=("G",), modes=("two-stage",), bootstrap=5,
    )  # fmt: skip
    results = evaluate(config)
    numbers = results["retrieval"]["360-north"]["G"]
    assert numbers["gallery"] == COUNT - 10
    assert numbers["two-stage"]["exact_top10_kept"] == 1.0
    table = parquet.read_table(tmp_path / "out" / "queries.parquet").to_pandas()
    assert not set(ids) & {name for best in table["best"] for name in best}


def test_evaluate_on_unfinished_synthesis_is_refused(folder, tmp_path):
    tiny.write(tiny.rows(4), str(tmp_path / "queries"))
    os.remove(tmp_path / "queries" / "manifest.json")
    config = Evaluate(
        queries=str(tmp_path / "queries"), index=os.path.join(folder, "index"),
        output=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"expected manifest.json, found none"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


def test_evaluate_of_rows_that_all_failed_says_why(folder, tmp_path):
    rows = [row | {schema.ERROR: "generate: broken"} for row in tiny.rows(3).to_pylist()]
    table = pa.Table.from_pylist(rows, schema.SYNTHESIZED)
    location = tiny.write(table, str(tmp_path / "queries"))
    with pytest.raises(ValueError, match=r"all 3 rows .* failed .*generate: broken"):
        evaluate(Evaluate(queries=location, index=os.path.join(folder, "index")))


def test_evaluate_counts_the_queries_that_failed_and_says_so(folder, tmp_path):
    rows = tiny.rows(10).to_pylist()
    for row in rows[:3]:
        row |= {schema.SYNTHETIC: None, schema.ERROR: "generate: broken"}
    table = pa.Table.from_pylist(rows, schema.SYNTHESIZED)
    config = Evaluate(
        queries=tiny.write(table, str(tmp_path / "queries")), output=str(tmp_path / "out"),
        index=os.path.join(folder, "index"), modalities=("G",), modes=(), bootstrap=5,
    )  # fmt: skip
    results = evaluate(config)
    assert (results["queries"], results["failed"]) == (7, 3)
    page = Path(evaluation(config.output, config.queries)).read_text()
    assert "3 more failed in synthesis, and no number counts them" in page
