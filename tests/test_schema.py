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


def test_require_missing_columns_says_where_expected_and_got():
    schema.require(["pair_id", "ground", "more"], ["ground", "pair_id"], "generate")
    with pytest.raises(ValueError, match=r"match: expected columns \['classes', 'synthetic'\]"):
        schema.require(iter(["pair_id"]), ["synthetic", "classes", "pair_id"], "match")
    with pytest.raises(ValueError, match=r"got only \['pair_id'\]"):
        schema.require(["pair_id"], ["synthetic"], "match")
