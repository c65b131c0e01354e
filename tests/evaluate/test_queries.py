import os

import numpy as np
import pyarrow as pa
import pytest
import torch

from cvmatch.data import images, schema
from cvmatch.evaluate.queries import QueryView, draw_headings, embed_queries
from cvmatch.evaluate.settings import Evaluate
from cvmatch.match.augment import crop_fov
from cvmatch.match.infer import EmbedQuery
from cvmatch.match.settings import MODALITIES
from cvmatch.nn.backbones import MEAN
from tests.helpers import index as tiny


def test_embed_queries_modalities_equal_the_actors(index, model, folder):
    config = Evaluate(queries=os.path.join(folder, "queries"))
    queries = embed_queries(config, model)
    for modality in MODALITIES:
        batch = EmbedQuery(index.matcher_dir, modality)(tiny.columns(tiny.rows(10)))
        query = queries[QueryView(360.0, False), modality]
        np.testing.assert_allclose(query.numpy(), batch["query_vector"], atol=1e-4)


def test_embed_queries_limited_views_have_g_alone(model, folder):
    config = Evaluate(
        queries=os.path.join(folder, "queries"), fov=(360.0, 90.0), unknown_heading=True
    )
    queries = embed_queries(config, model)
    names = [(view.name, modality) for view, modality in queries]
    limited = [("360-unknown", "G"), ("90-north", "G"), ("90-unknown", "G")]
    assert sorted(names) == sorted([("360-north", modality) for modality in MODALITIES] + limited)
    whole = queries[QueryView(360.0, False), "G"]
    for view in (QueryView(360.0, True), QueryView(90.0, False), QueryView(90.0, True)):
        assert not torch.allclose(queries[view, "G"], whole, atol=1e-3)
    with pytest.raises(ValueError, match="limited views need modality G"):
        Evaluate(modalities=("A",), fov=(90.0,))


def test_queries_of_unknown_heading_have_a_vector_of_each_that_is_tried(index, model, folder):
    config = Evaluate(
        queries=os.path.join(folder, "queries"),
        fov=(180.0,),
        unknown_heading=True,
        headings=4,
        modalities=("G",),
    )
    queries = embed_queries(config, model)
    assert queries[QueryView(180.0, False), "G"].ndim == 2
    found = queries[QueryView(180.0, True), "G"]
    rows = tiny.rows(10)
    turns = draw_headings(rows[schema.PAIR_ID].to_pylist(), config.seed)
    ground = torch.from_numpy(
        np.stack(
            [images.decode(data, model.config.panorama) for data in rows[schema.GROUND].to_pylist()]
        )
    )
    ground = ground.permute(0, 3, 1, 2).float() / 255
    seen = crop_fov(ground, 180.0, turns, model.ground_mean)
    assert found.shape[:2] == (10, 4)
    for number in range(4):
        turned = seen.roll(number * seen.shape[-1] // 4, dims=-1)
        torch.testing.assert_close(found[:, number], model.embed_queries(turned), atol=1e-5, rtol=0)


def test_embed_queries_rows_without_synthetic_say_which_job(model, tmp_path):
    rows = tiny.rows(4)
    column = rows.column_names.index(schema.SYNTHETIC)
    rows = rows.set_column(column, schema.SYNTHETIC, pa.nulls(4, pa.binary()))
    tiny.write(rows, str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"\['synthetic'\] in every row.*synthesize"):
        embed_queries(Evaluate(queries=str(tmp_path / "rows")), model)
    queries = embed_queries(Evaluate(queries=str(tmp_path / "rows"), modalities=("G",)), model)
    assert [modality for _, modality in queries] == ["G"]


def test_limited_narrow_view_keeps_the_middle_and_blanks_the_rest():
    ground = torch.arange(8.0).expand(1, 3, 4, 8) / 10  # column j holds j / 10; north is column 4
    mean = torch.tensor(MEAN)[:, None]
    north = crop_fov(ground, 90.0, torch.tensor([0.0]))[0, :, 0]
    torch.testing.assert_close(north[:, 3:5], torch.tensor([[0.3, 0.4]] * 3))
    torch.testing.assert_close(north[:, :3], mean.expand(3, 3))
    torch.testing.assert_close(north[:, 5:], mean.expand(3, 3))
    east = crop_fov(ground, 90.0, torch.tensor([90.0]))[0, 0, 0]  # two columns clockwise
    torch.testing.assert_close(east[3:5], torch.tensor([0.5, 0.6]))
    turned = crop_fov(ground, 360.0, torch.tensor([180.0]))[0, 0, 0]
    torch.testing.assert_close(turned, torch.tensor([0.4, 0.5, 0.6, 0.7, 0.0, 0.1, 0.2, 0.3]))
    torch.testing.assert_close(crop_fov(ground, 360.0, torch.tensor([0.0])), ground)
