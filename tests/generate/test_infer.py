"""Sampling of rows: bad ones keep their reason, and the rest go on."""

import numpy as np

from cvmatch.data import images, schema
from cvmatch.generate import infer
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Sampling
from tests.helpers.generator import make_rows, sample


def test_generate_aerial_bad_rows_keep_their_reason_and_the_rest_go_on(
    generator: Generator, tmp_path
):
    generator.save(str(tmp_path))
    actor = infer.GenerateAerial(str(tmp_path), Sampling(num_inference_steps=2))
    out = actor(make_rows())
    assert list(out[schema.PAIR_ID]) == ["0000000", "0000001", "0000002"]
    assert [value is None for value in out[schema.SYNTHETIC]] == [False, True, True]
    assert out[schema.ERROR][0] is None
    assert out[schema.ERROR][1].startswith("generate: ground: cannot be decoded")
    assert out[schema.ERROR][2] == "ingest: no tile"
    expected = sample(generator, 1, num_inference_steps=2)[0].permute(1, 2, 0).numpy() * 255
    drawn = images.decode(out[schema.SYNTHETIC][0])
    assert np.abs(drawn - expected).max() < 1.5
    backwards = actor({name: values[::-1] for name, values in make_rows().items()})
    assert [value is None for value in backwards[schema.SYNTHETIC]] == [True, True, False]
    assert (images.decode(backwards[schema.SYNTHETIC][2]) == drawn).all()
