"""Actors that embed tiles and queries."""

import numpy as np
import pytest
import torch

from cvmatch.data import schema
from cvmatch.match.infer import EmbedQuery, EmbedTile
from cvmatch.match.model import Matcher
from cvmatch.match.settings import MODALITIES
from tests.helpers.matcher import (
    HIGH,
    SIZE,
    WIDE,
    columns,
    network,
    row,
)


def test_embed_tile_passes_failed_rows_through_and_drops_pictures(tmp_path):
    model = network()
    model.save(str(tmp_path))
    given = columns(row("a", shade=9), row("b", error="earlier"), row("c", aerial=b"no picture"))
    found = EmbedTile(str(tmp_path), 4)(given)
    assert set(found) == {"pair_id", "latitude", "longitude", "error", "tile_vector"}
    assert found["error"][:2].tolist() == [None, "earlier"]
    assert found["error"][2].startswith("embed tile: aerial: ")
    with torch.no_grad():
        expected = model.embed_tiles(torch.full((1, 3, SIZE, SIZE), 9 / 255))[0].half().numpy()
    assert found["tile_vector"].dtype == np.float16
    assert np.array_equal(found["tile_vector"][0], expected)
    assert not found["tile_vector"][1:].any()


@pytest.mark.parametrize("score", ["sum", "joint"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_embed_query_reads_what_its_modality_names(tmp_path, modality, score):
    model = network(score=score)
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
        expected = model.embed_queries(ground, synthetic, classes)
    assert found["error"].tolist() == [None]
    np.testing.assert_allclose(found["query_vector"], expected.numpy(), atol=1e-5)


def test_embed_query_without_a_column_it_reads_says_so(tmp_path):
    network().save(str(tmp_path))
    given = columns(row())
    del given[schema.SYNTHETIC]
    with pytest.raises(ValueError, match=r"embed query: expected columns \['synthetic'\]"):
        EmbedQuery(str(tmp_path), "G+A")(given)


def test_embed_query_embeds_the_rows_on_which_the_network_does_not_fail(tmp_path, monkeypatch):
    network().save(str(tmp_path))
    batch = columns(row("a", shade=9), row("b", shade=99), row("c", shade=9))
    actor = EmbedQuery(str(tmp_path), "G")
    whole = actor(batch)
    embed = Matcher.embed_queries

    def failing(self, ground, *others):
        if ground.max() > 0.3:
            raise RuntimeError("no kernel\nfor this picture")
        return embed(self, ground, *others)

    monkeypatch.setattr(Matcher, "embed_queries", failing)
    result = actor(batch)
    assert result["error"].tolist() == [
        None, "embed query: RuntimeError: no kernel for this picture", None,
    ]  # fmt: skip
    vectors = result["query_vector"]
    np.testing.assert_allclose(vectors[[0, 2]], whole["query_vector"][[0, 2]], atol=1e-6)
    assert not vectors[1].any()
    with pytest.raises(RuntimeError, match="no kernel"):
        actor({name: values[[1, 1]] for name, values in batch.items()})
