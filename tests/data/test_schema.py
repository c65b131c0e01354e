import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray.data

from cvmatch.data import schema


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


@pytest.mark.parametrize(
    "column",
    [
        [None, "no file"],
        np.array([None, "no file"], dtype=object),
        np.array([np.nan, "no file"], dtype=object),
        pd.Series([None, "no file"]),
        pd.Series([pd.NA, "no file"]),
        pa.array([None, "no file"]),
        pa.chunked_array([pa.nulls(1, pa.string()), pa.array(["no file"])]),
    ],
)
def test_read_errors_of_any_kind_of_batch_are_text_or_none(column):
    assert schema.read_errors(column) == [None, "no file"]


@pytest.mark.parametrize(
    "column", [np.full(2, np.nan, np.float32), pd.Series([np.nan] * 2), pa.nulls(2)]
)
def test_read_errors_of_a_column_without_a_type_are_none(column):
    assert schema.read_errors(column) == [None, None]


def test_read_errors_that_are_no_text_are_refused():
    with pytest.raises(TypeError):
        schema.read_errors(np.array([0, 1]))


def test_good_rows_of_a_column_without_a_type_are_all():
    for errors in (pa.nulls(2), pa.array([np.nan, None]), pa.nulls(2, pa.string())):
        assert len(schema.good_rows(pa.table({"pair_id": ["a", "b"], "error": errors}))) == 2
    mixed = pa.table({"pair_id": ["a", "b"], "error": ["no file", None]})
    assert schema.good_rows(mixed)["pair_id"].to_pylist() == ["b"]


def test_with_nulls_are_text_and_pictures_but_numbers_stay():
    nan = np.full(2, np.nan, np.float32)
    batch = {
        "classes": nan,
        "error": nan,
        "latitude": nan,
        "u": nan,
        "pair_id": np.array(["a", "b"]),
    }
    found = schema.with_nulls(batch)
    assert [*found] == [*batch]
    for name in ("classes", "error"):
        assert found[name].tolist() == [None, None]
    for name in ("latitude", "u", "pair_id"):
        assert found[name] is batch[name]


def test_conform_makes_nulls_of_what_numpy_made_of_them():
    nan = np.full(2, np.nan, np.float32)
    table = pa.table(
        {"pair_id": ["a", "b"], "classes": nan, "latitude": [np.nan, 1.5], "error": nan}
    )
    found = schema.conform(table)
    assert found.schema == schema.SYNTHESIZED
    for name in ("classes", "error", "synthetic"):
        assert found[name].to_pylist() == [None, None]
    assert found["latitude"].to_pylist() == [None, 1.5]


@pytest.mark.ray
def test_conform_of_what_two_actors_hand_on_has_its_nulls_and_its_numbers(ray_session):
    def hand_on(batch):
        u = np.arange(2 * len(batch["id"]), dtype=np.float16).reshape(-1, 2)
        empty = {"error": np.full(len(u), None), "classes": np.full(len(u), None)}
        return {"pair_id": batch["id"].astype(str), "u": u, **empty, **batch}

    kind = pa.large_list(pa.float16())
    fields = [schema.SYNTHESIZED.field(name) for name in ("pair_id", "classes", "error")]
    wanted = pa.schema([*fields, pa.field("u", kind)])
    rows = ray.data.range(2, override_num_blocks=1).map_batches(hand_on)
    rows = rows.repartition(1).map_batches(hand_on)
    # Ray Data's references are not of the type that ray.get is annotated with.
    (block,) = ray.get(rows.to_arrow_refs())  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert schema.conform(block, wanted).to_pylist() == [
        {"pair_id": "0", "classes": None, "error": None, "u": [0.0, 1.0]},
        {"pair_id": "1", "classes": None, "error": None, "u": [2.0, 3.0]},
    ]
