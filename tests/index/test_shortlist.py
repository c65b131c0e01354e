import faiss
import numpy as np
import pytest

from cvmatch.index.shortlist import (
    default_factory_key,
    encode,
    merge_codes,
    train_empty_index,
)


def test_default_factory_key_by_size_follows_the_table():
    assert [default_factory_key(rows, 256) for rows in (1, 2_000, 2_001, 10**7)] == [
        "Flat", "Flat", "PQ64x4", "PQ64x4",
    ]  # fmt: skip
    assert default_factory_key(10**7 + 1, 256) == "IVF16384,PQ64x4"
    assert default_factory_key(10**8 + 1, 256) == "IVF65536,PQ64x4"
    assert default_factory_key(10**5, 64) == "PQ32x4"
    assert default_factory_key(10**5, 30) == "Flat"


@pytest.mark.parametrize(
    ("key", "kind"),
    [("PQ32x4", faiss.IndexPQFastScan), ("IVF8,PQ32x4", faiss.IndexIVFPQFastScan)],
)
def test_ann_of_coded_vectors_holds_nearest_among_its_best(key, kind):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 64))
    vectors = centres[rng.integers(0, 50, 2_100)] + 0.5 * rng.normal(size=(2_100, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    empty_index = train_empty_index(key, vectors)
    shards = [encode(empty_index, [vectors[at : at + 700]]) for at in (0, 700, 1_400)]
    found = merge_codes(empty_index, shards)
    assert isinstance(found, kind)
    assert found.ntotal == 2_100
    if isinstance(found, faiss.IndexIVF):
        found.nprobe = 8
    queries = vectors[:100] + 0.03 * rng.normal(size=(100, 64)).astype(np.float32)
    best = (queries @ vectors.T).argmax(1)
    near = found.search(queries, 20)[1]
    assert (near == best[:, None]).any(1).mean() > 0.95


def test_ann_of_unknown_key_says_which_would_do():
    with pytest.raises(ValueError, match=r"'PQ7x4' does not fit vectors of 16.*--key auto"):
        train_empty_index("PQ7x4", np.ones((10, 16), np.float32))


@pytest.mark.parametrize("key", ["Flat", "PQ8x4", "IVF4,PQ8x4", "SQ8"])
def test_codes_merged_from_shards_are_the_bytes_of_one_shard(key):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)).astype(np.float32)
    empty_index = train_empty_index(key, vectors)
    pieces = [encode(empty_index, [vectors[a:b]]) for a, b in ((0, 90), (90, 91), (91, 300))]
    whole = encode(empty_index, [vectors[:150], vectors[150:]])
    merged, single = (
        faiss.serialize_index(merge_codes(empty_index, codes)) for codes in (pieces, [whole])
    )
    np.testing.assert_array_equal(merged, single)


@pytest.mark.parametrize("key", ["PQ8x4", "IVF4,PQ8x4"])
def test_codes_of_another_empty_index_are_refused(key):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)).astype(np.float32)
    empty_index, other = train_empty_index(key, vectors), train_empty_index(key, vectors[::-1] + 1)
    codes = [encode(empty_index, [vectors]), encode(other, [vectors])]
    with pytest.raises(ValueError, match="codes of shard 1 were not made with the empty index"):
        merge_codes(empty_index, codes)


@pytest.mark.parametrize("key", ["PQ8x4fs", "IVF4,PQ8x4fs", "HNSW32", "PQ8x4,Refine(SQfp16)"])
def test_kinds_whose_shards_cannot_be_merged_are_refused(key):
    with pytest.raises(ValueError, match=r"cannot be merged.*--key auto"):
        train_empty_index(key, np.ones((64, 16), np.float32))
