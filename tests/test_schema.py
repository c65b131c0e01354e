import numpy as np
import pyarrow as pa
import pytest

from cvmatch import schema


def test_synthesized_has_all_of_pairs_and_the_two_made_pictures():
    added = set(schema.SYNTHESIZED.names) - set(schema.PAIRS.names)
    assert added == {schema.SYNTHETIC, schema.SYNTHETIC_CLASSES}
    for field in schema.PAIRS:
        assert schema.SYNTHESIZED.field(field.name) == field


def test_pairs_failed_row_fits_without_pictures_but_not_without_an_id():
    failed = dict.fromkeys(schema.PAIRS.names) | {"pair_id": "0000008", "error": "no such file"}
    pa.Table.from_pylist([failed], schema=schema.PAIRS).validate(full=True)
    assert [field.name for field in schema.PAIRS if not field.nullable] == ["pair_id"]


def test_palette_has_a_colour_of_its_own_for_each_label():
    assert len(set(schema.PALETTE)) == len(schema.PALETTE) == len(schema.LABELS)
    assert len(schema.LABELS) <= schema.IGNORE


def test_conform_types_a_column_without_any_value_and_no_other():
    rows = pa.table({"pair_id": ["a", "b"], "error": [float("nan")] * 2, "ground": pa.nulls(2)})
    found = schema.conform(rows, schema.PAIRS)
    assert found.schema == schema.PAIRS
    assert found["error"].to_pylist() == found["ground"].to_pylist() == [None, None]
    with pytest.raises(pa.ArrowNotImplementedError):
        schema.conform(pa.table({"pair_id": ["a"], "ground": [0.5]}), schema.PAIRS)


@pytest.mark.parametrize("nothing", [None, float("nan"), np.float64("nan")])
def test_rows_without_a_reason_have_not_failed(nothing):
    batch = {"error": np.array([nothing, "no picture", nothing], dtype=object)}
    assert schema.read_errors(batch["error"]) == [None, "no picture", None]
    assert schema.good_rows(batch) == [0, 2]


def test_require_missing_columns_says_where_expected_and_got():
    schema.require(["pair_id", "ground", "more"], ["ground", "pair_id"], "generate")
    with pytest.raises(ValueError, match=r"match: expected columns \['classes', 'synthetic'\]"):
        schema.require(iter(["pair_id"]), ["synthetic", "classes", "pair_id"], "match")
    with pytest.raises(ValueError, match=r"got only \['pair_id'\]"):
        schema.require(["pair_id"], ["synthetic"], "match")
