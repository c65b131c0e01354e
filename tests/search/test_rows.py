import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from cvmatch.data import schema, tables
from cvmatch.index.reader import rank
from cvmatch.match.infer import EmbedQuery
from cvmatch.search.rows import search_rows
from cvmatch.search.settings import SearchRows
from tests.helpers import index as tiny


@pytest.mark.ray
@pytest.mark.parametrize(("modality", "read"), [("G", schema.GROUND), ("A", schema.SYNTHETIC)])
def test_search_rows_on_ray_gives_what_a_search_here_gives(
    ray_session, index, tmp_path, modality, read
):
    rows = tiny.rows(7)
    broken = rows[read].to_pylist()
    broken[3] = b"no picture"
    rows = rows.set_column(rows.column_names.index(read), read, pa.array(broken))
    unread = [name for name in (schema.GROUND, schema.SYNTHETIC) if name != read]
    location = tiny.write(rows.drop_columns(unread), f"{tmp_path}/rows")
    folder = index.matcher_dir.split("/matcher/")[0]
    config = SearchRows(
        rows=location, index=folder, output=str(tmp_path / "found"), modality=modality, top_k=4
    )
    assert search_rows(config)["rows"] == 7
    written = pa.concat_tables(
        tables.batches(config.output, ["pair_id", "tiles", "scores", "error"])
    )
    written = written.sort_by("pair_id").to_pylist()
    batch = EmbedQuery(index.matcher_dir, modality)(tiny.columns(rows))
    ranked = rank(index, torch.from_numpy(batch["query_vector"]), top_k=4)
    for number, row in enumerate(written):
        if number == 3:
            assert "not a PNG, JPEG" in row["error"]
            assert row["tiles"] == []
        else:
            assert row["tiles"] == [f"{tile:07d}" for tile in ranked.rows[number]]
            np.testing.assert_allclose(row["scores"], ranked.scores[number], atol=1e-4)
    assert search_rows(config)["rows"] == 7  # whole already
    with pytest.raises(ValueError, match="expected rows made from"):
        search_rows(dataclasses.replace(config, top_k=5))
