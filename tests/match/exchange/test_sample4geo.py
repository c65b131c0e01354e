"""Weights as Sample4Geo publishes them -> a matcher of the same vectors, and what is refused."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cvmatch.data import images, schema
from cvmatch.data.schema import QUERY_VECTOR, TILE_VECTOR
from cvmatch.evaluate.run import check_unseen
from cvmatch.index.build import publish
from cvmatch.index.reader import Index, rank
from cvmatch.index.settings import BuildIndex
from cvmatch.match.exchange.sample4geo import import_sample4geo
from cvmatch.match.exchange.settings import ImportSample4Geo
from cvmatch.match.heads.branches import BranchHeads
from cvmatch.match.infer import EmbedQuery, EmbedTile
from cvmatch.match.model import Matcher, MatcherConfig
from cvmatch.match.task import read_training, read_training_ids
from tests.helpers import index as tiny
from tests.helpers import peer
from tests.helpers.cvusa import write_official

PANORAMA, TILE = (42, 192), 64


def settings(tmp_path: Path, name: str = "test_convnext", **changes) -> ImportSample4Geo:
    fields = {
        "weights": str(tmp_path / "weights.pth"), "tower": f"timm:{name}", "panorama": PANORAMA,
        "tile_size": TILE, "output": str(tmp_path / "model"),
    }  # fmt: skip
    return ImportSample4Geo(**(fields | changes))


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def rows(column: str, some: np.ndarray) -> dict[str, np.ndarray]:
    return {
        column: schema.object_array([images.encode(picture) for picture in some]),
        schema.ERROR: np.full(len(some), None),
    }


@pytest.mark.parametrize("name", ["test_convnext", "convnext_atto"])
def test_imported_weights_give_the_vectors_of_the_peer(tmp_path, name):
    model = peer.save(tmp_path / "weights.pth", name)
    done = import_sample4geo(settings(tmp_path, name))
    ground, tiles = pictures(3, *PANORAMA), pictures(3, TILE, TILE)
    query = EmbedQuery(done.output, "G")(rows(schema.GROUND, ground))[QUERY_VECTOR]
    expected = model.vectors(ground).numpy()
    assert expected.shape == (3, done.width)
    np.testing.assert_allclose(query, expected, atol=1e-5, rtol=0)
    matcher = Matcher.load(done.output)
    with torch.no_grad():
        tile = matcher.embed_tiles(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255)
    np.testing.assert_allclose(tile.numpy(), model.vectors(tiles).numpy(), atol=1e-5, rtol=0)
    stored = EmbedTile(done.output, 2)(rows(schema.AERIAL, tiles))[TILE_VECTOR]
    np.testing.assert_allclose(stored, tile.numpy(), atol=1e-3, rtol=0)  # in half precision


def test_imported_matcher_resizes_as_the_peer_everywhere(tmp_path):
    model = peer.save(tmp_path / "weights.pth")
    done = import_sample4geo(settings(tmp_path))
    ground, tiles = pictures(2, 51, 201), pictures(2, 150, 150)

    def resized(some: np.ndarray, size: tuple[int, int], way: str) -> np.ndarray:
        return np.stack([images.decode(images.encode(one), size, way) for one in some])

    query = EmbedQuery(done.output, "G")(rows(schema.GROUND, ground))[QUERY_VECTOR]
    stored = EmbedTile(done.output, 2)(rows(schema.AERIAL, tiles))[TILE_VECTOR]
    for way, same in ((images.LINEAR_EXACT, True), (images.PREPROCESS, False)):
        expected = model.vectors(resized(ground, PANORAMA, way)).numpy()
        assert np.allclose(query, expected, atol=1e-5, rtol=0) == same
        expected = model.vectors(resized(tiles, (TILE, TILE), way)).numpy()
        assert np.allclose(stored, expected, atol=1e-3, rtol=0) == same


def test_published_form_has_the_sizes_and_the_backbone_of_the_paper():
    published = ImportSample4Geo(weights="weights.pth")
    assert published.tower == "timm:convnext_base.fb_in22k_ft_in1k_384"
    assert (published.panorama, published.tile_size) == ((140, 768), 384)


def test_index_of_an_imported_matcher_finds_the_peers_best_tiles(tmp_path):
    model = peer.save(tmp_path / "weights.pth")
    done = import_sample4geo(settings(tmp_path))
    tiles = pictures(12, TILE, TILE)
    table = pa.table(
        {
            schema.PAIR_ID: [f"{number:07d}" for number in range(12)],
            schema.AERIAL: [images.encode(tile) for tile in tiles],
            schema.LATITUDE: [None] * 12,
            schema.LONGITUDE: [None] * 12,
            schema.ERROR: pa.nulls(12, pa.string()),
        }
    )
    embedded = tiny.parts(table, done.output, str(tmp_path / "parts"))
    config = BuildIndex(model=done.output, output=str(tmp_path / "index"))
    publish(embedded, config)
    index = Index.open(config.output)
    assert index.manifest.preprocess == images.LINEAR_EXACT
    query = model.vectors(pictures(4, *PANORAMA))
    found = rank(index, query.to(index.device), 3, "exact").rows
    best = (query @ model.vectors(tiles).T).topk(1).indices
    ids = [[index.tiles[schema.PAIR_ID][row].as_py() for row in some] for some in found]
    assert [some[0] for some in ids] == [f"{int(row):07d}" for row in best]


def test_training_pairs_of_the_peer_are_refused_in_an_evaluation(tmp_path, caplog):
    peer.save(tmp_path / "weights.pth")
    root = write_official(tmp_path)
    done = import_sample4geo(settings(tmp_path, trained_on=str(root)))
    ids = sorted(read_training_ids(done.output))
    assert done.training_ids == len(ids) > 0
    assert read_training(done.output)["data"] == "CVUSA train"
    with pytest.raises(ValueError, match=f"trained on 1 of 2 queries.*{ids[0]}"):
        check_unseen([ids[0], "9999999"], done.output)
    assert f"expected the 35532 training pairs of official CVUSA, got {len(ids)}" in caplog.text


def test_training_pairs_that_are_not_known_are_said_at_the_import_and_at_the_evaluation(
    tmp_path, caplog
):
    peer.save(tmp_path / "weights.pth")
    done = import_sample4geo(settings(tmp_path, data="VIGOR train"))
    assert done.training_ids is None
    assert "--trained-on" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cvmatch"):
        check_unseen(["0000001"], done.output)
    assert "trained on: VIGOR train" in caplog.text


def test_wrappers_prefix_and_half_precision_are_taken_off(tmp_path):
    model = peer.save(tmp_path / "weights.pth")
    state = {f"module.{name}": value.half() for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    done = import_sample4geo(settings(tmp_path))
    weights = list(Matcher.load(done.output).parameters())
    assert {weight.dtype for weight in weights} == {torch.float32}


class Hostile:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("was-unpickled"),))


def test_file_that_would_run_code_is_refused_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.stem.weight": torch.zeros(1), "x": Hostile()}, "weights.pth")
    with pytest.raises(ValueError, match=r"import sample4geo .*expected a state dict"):
        import_sample4geo(settings(tmp_path))
    assert not Path("was-unpickled").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.head.norm.weight"), r"1 lack: \['head.norm.weight'\]"),
        (
            lambda state: state.update({"model.neck.weight": torch.zeros(2)}),
            r"1 are not of it: \['neck.weight'\]",
        ),
        (
            lambda state: state.update({"model.head.norm.weight": torch.zeros(7)}),
            r"1 have another shape: \['head.norm.weight \(7,\) for \(64,\)'\].*Pass the backbone",
        ),
        (
            lambda state: state.update({"decoder.weight": torch.zeros(2)}),
            r"names that begin with 'model.'.*1 others of .*'decoder.weight'",
        ),
    ],
    ids=["missing", "unexpected", "shape", "names"],
)
def test_weights_of_another_form_are_refused_with_their_names(tmp_path, change, message):
    state = dict(peer.Peer().state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        import_sample4geo(settings(tmp_path))
    assert not (tmp_path / "model").exists()


def test_weights_of_another_backbone_name_the_flag(tmp_path):
    peer.save(tmp_path / "weights.pth")
    message = (
        r"weights of timm:convnext_atto, got .* Pass the backbone that was trained with --tower"
    )
    with pytest.raises(ValueError, match=message):
        import_sample4geo(settings(tmp_path, "convnext_atto"))
    with pytest.raises(ValueError, match="expected a --tower of timm"):
        import_sample4geo(settings(tmp_path, tower="convnext_base"))


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file of weights.*weights\.pth"):
        import_sample4geo(settings(tmp_path))


def test_directory_of_something_else_is_not_replaced(tmp_path):
    peer.save(tmp_path / "weights.pth")
    done = import_sample4geo(settings(tmp_path))
    import_sample4geo(settings(tmp_path))  # a matcher is
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds \['notes.txt'\]"):
        import_sample4geo(settings(tmp_path))
    assert (Path(done.output) / "notes.txt").read_text() == "mine"


def test_model_without_heads_needs_features_as_wide_as_its_vectors():
    heads = BranchHeads(("direct",), 12, 12, 12, "none")
    assert not list(heads.parameters())
    with pytest.raises(ValueError, match="expected hidden 256 of both, got 12 of G and 12 of C"):
        BranchHeads(("direct",), 12, 12, 256, "none")
    with pytest.raises(ValueError, match="expected the branch direct alone"):
        MatcherConfig(head="none")
