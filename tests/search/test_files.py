import dataclasses
import json
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from cvmatch import config as configs
from cvmatch.data import images, schema, tables
from cvmatch.demo import models as base_models
from cvmatch.generate.infer import GenerateAerial
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning, Sampling
from cvmatch.index import ranking, shard
from cvmatch.index.build import publish
from cvmatch.index.ranking import rank
from cvmatch.index.reader import Index
from cvmatch.index.settings import BuildIndex
from cvmatch.index.shard import Store
from cvmatch.match.fusion import Query
from cvmatch.match.infer import EmbedQuery
from cvmatch.match.model import Matcher
from cvmatch.report.search_page import write_search_page
from cvmatch.search import files
from cvmatch.search.files import query_of
from cvmatch.search.rows import search_rows
from cvmatch.search.settings import SearchFiles, SearchRows
from tests.helpers import index as tiny

COUNT = 24


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return tiny.index(str(tmp_path_factory.mktemp("search")), COUNT)


@pytest.fixture(scope="module")
def query(index):
    batch = EmbedQuery(index.heads, "G+A+S")(tiny.columns(tiny.rows(6)))
    return query_of(batch, index)


@torch.inference_mode()
def unsplit(index, query):
    """Scores by FFN_C([a; c]) as one network, each tile from its picture."""
    model, rows = Matcher.load(index.heads), tiny.rows(COUNT)

    def features(column):
        pixels = np.stack([images.decode(data) for data in rows[column].to_pylist()])
        return model.aerial_features(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)

    c, a = features(schema.AERIAL), features(schema.SYNTHETIC)[: len(query.query_proj)]
    first = torch.cat([model.query_aerial_linear.weight, model.tile_linear.weight], dim=1)
    both = torch.cat([a[:, None].expand(-1, COUNT, -1), c.expand(len(a), -1, -1)], dim=2)
    hidden = F.linear(both, first, model.query_aerial_linear.bias)
    rest = model.candidate_mlp
    last = hidden + rest.last(rest.middle(hidden.relu()).relu())
    return (F.normalize(last, dim=2) * query.embedding[:, None]).sum(2)


def test_rank_exact_equals_the_unsplit_network_over_all_tiles(index, query):
    brute = unsplit(index, query)
    ranked = rank(index, query, top_k=COUNT, mode="exact")
    assert sorted(ranked.rows[0]) == list(range(COUNT))
    own = np.take_along_axis(brute.numpy(), ranked.rows, 1)
    np.testing.assert_allclose(
        ranked.scores, own, atol=2e-3
    )  # tile_proj is stored in half precision
    assert (np.diff(ranked.scores) <= 0).all()
    assert np.ptp(brute.numpy(), axis=1).min() > 0.02  # the scores do tell tiles apart


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_rank_exact_in_bf16_gives_the_best_of_fp32(index, query, monkeypatch, spread):
    monkeypatch.setattr(ranking, "fastest_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(ranking, "_SPARE", 8)
    centre = index.tile_proj.take(np.arange(COUNT)).astype(np.float32).mean(axis=0)
    noise = np.random.default_rng(0).normal(size=(400, len(centre)))
    # With the small spread, bf16 cannot tell the tiles apart.
    tile_proj = (centre + spread * noise).astype(np.float16)
    many = Index(**{**vars(index), "tile_proj": Store([tile_proj])})
    expected = torch.cat(list(many.scores(query)), dim=1).topk(2)
    ranked = rank(many, query, top_k=2, mode="exact")
    np.testing.assert_allclose(ranked.scores, expected.values, atol=1e-6)


def test_rank_two_stage_over_all_tiles_equals_exact(index, query):
    exact = rank(index, query, top_k=10, mode="exact")
    staged = rank(index, query, top_k=10, mode="two-stage", shortlist=COUNT)
    np.testing.assert_allclose(staged.scores, exact.scores, atol=1e-5)
    assert (staged.rows == exact.rows).mean() > 0.95  # but for ties within rounding


def test_rank_two_stage_gives_exact_scores_of_the_shortlist_alone(index, query):
    ranked = rank(index, query, top_k=3, mode="two-stage", shortlist=5)
    near = index.nearest(query, 5)
    scores = torch.cat(list(index.scores(query)), dim=1).numpy()
    for row in range(len(query.query_proj)):
        expected = near[row][np.argsort(-scores[row, near[row]])][:3]
        np.testing.assert_array_equal(ranked.rows[row], expected)
    np.testing.assert_allclose(ranked.scores, np.take_along_axis(scores, ranked.rows, 1), atol=1e-5)


def test_rank_of_a_gallery_in_pieces_equals_the_whole(index, query, monkeypatch):
    whole = rank(index, query, top_k=10, mode="exact")
    monkeypatch.setattr(shard, "CHUNK", 7)
    pieces = rank(index, query, top_k=10, mode="exact")
    np.testing.assert_allclose(pieces.scores, whole.scores, atol=1e-5)
    assert (pieces.rows == whole.rows).mean() > 0.95


def test_rank_auto_of_a_large_gallery_is_two_stage(index, query, monkeypatch):
    exact = rank(index, query, 5, shortlist=5)
    monkeypatch.setattr(ranking, "EXHAUSTIVE", COUNT - 1)
    staged = rank(index, query, 5, shortlist=5)
    np.testing.assert_array_equal(np.sort(staged.rows), np.sort(index.nearest(query, 5)))
    assert (np.sort(staged.rows) != np.sort(exact.rows)).any()


def test_rank_more_than_there_are_gives_all(index, query):
    for mode in ("exact", "two-stage"):
        assert rank(index, query, top_k=100, mode=mode).rows.shape == (len(query.query_proj), COUNT)


def test_rank_of_lists_with_too_few_tiles_marks_the_end(tmp_path):
    model = tiny.matcher(str(tmp_path / "model"))
    parts = tiny.parts(tiny.rows(COUNT), model, str(tmp_path / "parts"))
    config = BuildIndex(model=model, output=str(tmp_path / "index"), key="IVF8,Flat", probes=1)
    publish(parts, config)
    index = Index.open(config.output)
    (part,) = index.ann
    assert isinstance(part.index, faiss.IndexIVF)
    assert part.index.nprobe == 1
    ranked = rank(index, Query(torch.eye(16)[:2], torch.zeros(2, 16)), COUNT, "two-stage")
    ends = (ranked.rows == -1).sum(1)
    assert (ends > 0).all()
    for rows, scores, end in zip(ranked.rows, ranked.scores, ends, strict=True):
        assert (rows[: COUNT - end] >= 0).all()
        assert np.isinf(scores[COUNT - end :]).all()


@pytest.mark.parametrize("mode", ["exact", "two-stage"])
def test_rank_equal_tiles_are_ordered_by_row(index, query, mode):
    same = Index(
        **{**vars(index), "tile_proj": Store([index.tile_proj.take(np.zeros(COUNT, int))])}
    )
    ranked = rank(same, query, top_k=COUNT, mode=mode)
    assert np.ptp(ranked.scores, axis=1).max() < 1e-6
    order = np.lexsort((ranked.rows, -ranked.scores))
    assert (order == np.arange(COUNT)).all()


def test_rank_cut_between_equal_tiles_takes_the_first_rows(index, query):
    many = 1000
    same = Index(**{**vars(index), "tile_proj": Store([index.tile_proj.take(np.arange(many) % 2)])})
    whole = rank(same, query, top_k=many, mode="exact")
    for few in (1, 3, COUNT):
        part = rank(same, query, top_k=few, mode="exact")
        assert (part.rows == whole.rows[:, :few]).all()
        assert (part.scores == whole.scores[:, :few]).all()


def test_search_names_the_panoramas_that_it_cannot_search_and_searches_the_others(
    index, tmp_path, caplog
):
    good = images.encode(tiny.picture(np.random.default_rng(0), 16, 64))
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "cut.png").write_bytes(good[:50])
    places = tuple(str(tmp_path / name) for name in ("cut.png", "good.png", "absent.png"))
    folder = index.heads.split("/heads/")[0]
    found = list(files.search_files(SearchFiles(panorama=places, index=folder)))
    assert [answer.query for answer in found] == [places[1]]
    for text in ("2 of 3", "cut.png: cannot be decoded", "absent.png"):
        assert text in caplog.text
    with pytest.raises(ValueError, match=r"(?s)2 of 2.*cut\.png: cannot be decoded.*absent\.png"):
        files.search_files(SearchFiles(panorama=(places[0], places[2]), index=folder))


@pytest.mark.parametrize("width", [16, 32])
def test_search_of_a_tile_or_a_whole_sphere_is_refused(tmp_path, width):
    data = images.encode(tiny.picture(np.random.default_rng(0), 16, width))
    (tmp_path / "other.png").write_bytes(data)
    config = SearchFiles(panorama=(str(tmp_path / "other.png"),), index=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=rf"{width} x 16 pixels, expected .*2\.5 times as wide"):
        files.search_files(config)


def test_search_files_gives_ranked_tiles_with_places(index, tmp_path):
    rows = tiny.rows(6)
    places = []
    for number in (3, 1):
        places.append(str(tmp_path / f"{number}.png"))
        (tmp_path / f"{number}.png").write_bytes(rows[schema.GROUND][number].as_py())
    folder = index.heads.split("/heads/")[0]
    config = SearchFiles(panorama=tuple(places), index=folder, top_k=4)
    found = list(files.search_files(config))
    assert [one.pictures for one in found] == [
        {schema.GROUND: rows[schema.GROUND][number].as_py()} for number in (3, 1)
    ]
    answers = [json.loads(json.dumps(tile)) for one in found for tile in one.tiles]
    batch = EmbedQuery(index.heads, "G")(tiny.columns(rows))
    ranked = rank(index, query_of(batch, index), top_k=4)
    assert [answer["query"] for answer in answers] == [places[0]] * 4 + [places[1]] * 4
    assert [answer["rank"] for answer in answers] == [1, 2, 3, 4] * 2
    for answer, row, score in zip(
        answers, ranked.rows[[3, 1]].ravel(), ranked.scores[[3, 1]].ravel(), strict=True
    ):
        assert answer["tile"] == f"{row:07d}"
        assert answer["latitude"] == pytest.approx(0.01 * row)
        assert answer["score"] == pytest.approx(score, abs=1e-4)
        assert answer["modality"] == "G"


def test_search_files_flags_repeat_and_name_what_is_missing():
    config = configs.parse(SearchFiles, ["--panorama", "a.jpg", "--panorama", "b.jpg"])
    assert config.panorama == ("a.jpg", "b.jpg")
    assert configs.parse(SearchFiles, ["--panorama", "a.jpg", "--generator", "g"]).modality == "G+A"
    with pytest.raises(ValueError, match="at least one --panorama"):
        SearchFiles()
    with pytest.raises(ValueError, match="give --generator too"):
        SearchFiles(panorama=("a.jpg",), segmenter="models/segmenter")


def test_search_in_an_area_gives_the_best_of_the_tiles_there(index, tmp_path):
    rows = tiny.rows(6)
    (tmp_path / "panoramas").mkdir()
    for number in range(3):
        path = tmp_path / "panoramas" / f"{number}.png"
        path.write_bytes(rows[schema.GROUND][number].as_py())
    (tmp_path / "panoramas" / "notes.txt").write_text("not a picture")
    folder = index.heads.split("/heads/")[0]
    asked = {"panorama": (str(tmp_path / "panoramas"),), "index": folder, "top_k": COUNT}
    everywhere = list(files.search_files(SearchFiles(**asked)))
    assert len(everywhere) == 3
    # Tiles lie 0.01 degrees (1,112 m) apart, going north from the equator.
    areas = {"near": (0.05, 0.0, 1_200.0), "box": (0.035, -1.0, 0.065, 1.0)}
    for name, area in areas.items():
        found = list(files.search_files(SearchFiles(**asked, **{name: area})))
        for one, whole in zip(found, everywhere, strict=True):
            inside = [
                t["tile"] for t in whole.tiles if t["tile"] in ("0000004", "0000005", "0000006")
            ]
            assert [tile["tile"] for tile in one.tiles] == inside
    with pytest.raises(ValueError, match=r"none of 24 tiles lies in .*24 have coordinates"):
        files.search_files(SearchFiles(**asked, near=(50.0, 0.0, 1_000.0)))
    with pytest.raises(ValueError, match="--near or --box, got both"):
        SearchFiles(**asked, **areas)


def test_search_with_another_generator_than_the_queries_of_the_index_is_refused(
    index, tmp_path, monkeypatch
):
    known = {**index.manifest, "queries": {"generator": "abc"}}
    monkeypatch.setattr(Index, "open", lambda uri: Index(**{**vars(index), "manifest": known}))
    (tmp_path / "g.png").write_bytes(tiny.rows(1)[schema.GROUND][0].as_py())
    config = SearchFiles(
        panorama=(str(tmp_path / "g.png"),), generator=tiny.matcher(str(tmp_path / "m"))
    )
    with pytest.raises(ValueError, match=r"the generator that made .* \(abc\), got [0-9a-f]{64}"):
        files.search_files(config)


def test_search_draws_as_the_queries_of_the_index_were_drawn_unless_told(
    index, tmp_path, monkeypatch
):
    model = str(tmp_path / "generator")
    torch.manual_seed(0)
    Generator.base(
        base_models.DIFFUSION, base_models.CLIP, Conditioning(panorama_width=256, crops=4)
    ).save(model)
    (tmp_path / "0000002.png").write_bytes(tiny.rows(3)[schema.GROUND][2].as_py())
    own = {"steps": 4, "guidance": 3.0, "guided": 0.7}
    known = {**index.manifest, "queries": own}
    monkeypatch.setattr(Index, "open", lambda uri: Index(**{**vars(index), "manifest": known}))
    rows = tiny.columns(tiny.rows(3).slice(2))

    def drawn(**flags):
        asked = SearchFiles(panorama=(str(tmp_path / "0000002.png"),), generator=model, **flags)
        (answer,) = files.search_files(asked)
        return answer.pictures[schema.SYNTHETIC]

    other = {"steps": 3, "guidance": 2.0, "guided": 0.0}
    for flags, sampling in (({}, own), (other, other)):
        actor = GenerateAerial(model, Sampling(**sampling), batch=1)
        assert drawn(**flags) == actor(rows)[schema.SYNTHETIC][0]


def test_page_of_a_search_shows_each_panorama_its_tiles_and_where_they_are(index, tmp_path):
    rows = tiny.rows(COUNT)
    location = tiny.write(rows, str(tmp_path / "rows"))
    (tmp_path / "street <1>.png").write_bytes(rows[schema.GROUND][2].as_py())
    folder = index.heads.split("/heads/")[0]
    config = SearchFiles(panorama=(str(tmp_path / "street <1>.png"),), index=folder, top_k=3)
    place = write_search_page(
        list(files.search_files(config)), str(tmp_path / "page.html"), location
    )
    page = Path(place).read_text(encoding="utf-8")
    assert page.count("<img ") == 4  # the panorama and three tiles
    assert "street &lt;1&gt;.png" in page
    assert "metres north" in page
    assert "not known" in page


@pytest.mark.ray
def test_search_rows_on_ray_gives_what_a_search_here_gives(ray_session, index, tmp_path):
    rows = tiny.rows(7)
    broken = rows[schema.GROUND].to_pylist()
    broken[3] = b"no picture"
    column = rows.column_names.index(schema.GROUND)
    location = tiny.write(
        rows.set_column(column, schema.GROUND, pa.array(broken)), f"{tmp_path}/rows"
    )
    folder = index.heads.split("/heads/")[0]
    config = SearchRows(
        rows=location, index=folder, output=str(tmp_path / "found"), modality="G", top_k=4
    )
    assert search_rows(config)["rows"] == 7
    written = pa.concat_tables(
        tables.batches(config.output, ["pair_id", "tiles", "scores", "error"])
    )
    written = written.sort_by("pair_id").to_pylist()
    batch = EmbedQuery(index.heads, "G")(tiny.columns(rows))
    ranked = rank(index, query_of(batch, index), top_k=4)
    for number, row in enumerate(written):
        if number == 3:
            assert "not a PNG or JPEG" in row["error"]
            assert row["tiles"] == []
        else:
            assert row["tiles"] == [f"{tile:07d}" for tile in ranked.rows[number]]
            np.testing.assert_allclose(row["scores"], ranked.scores[number], atol=1e-4)
    assert search_rows(config)["rows"] == 7  # whole already
    with pytest.raises(ValueError, match="expected rows made from"):
        search_rows(dataclasses.replace(config, top_k=5))
