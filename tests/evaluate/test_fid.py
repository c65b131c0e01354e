import numpy as np
import pytest

from cvmatch.data import images, schema
from cvmatch.demo import models as base_models
from cvmatch.evaluate.fid import build_fid
from cvmatch.evaluate.generation import measure_generation
from tests.helpers import index as tiny
from tests.helpers.present import present


def pictures(count, drawn):
    return [
        {schema.SYNTHETIC: drawn(number), schema.AERIAL: tile(number)} for number in range(count)
    ]


def tile(number):
    return images.encode(tiny.picture(np.random.default_rng(number), 128, 128))


def tower_fid():
    return build_fid(base_models.TOWER)


def test_fid_is_small_for_the_same_pictures_in_another_order_and_not_for_others():
    def brighter(number):
        pixels = images.decode(tile(number)).astype(int) + 60
        return images.encode(pixels.clip(0, 255).astype(np.uint8))

    moved = measure_generation(
        pictures(12, lambda n: tile((n + 1) % 12)),
        bootstrap=5,
        fid=tower_fid(),
    )
    other = measure_generation(pictures(12, brighter), bootstrap=5, fid=tower_fid())
    assert present(present(moved).fid) < 0.01 * present(present(other).fid)


def test_build_fid_of_a_network_that_is_not_here_says_what_to_do(monkeypatch):
    def missing(**_):
        raise ModuleNotFoundError("no torch-fidelity")

    monkeypatch.setattr("cvmatch.evaluate.fid.FrechetInceptionDistance", missing)
    with pytest.raises(ValueError, match=r"pip install torch-fidelity.*--fid vgg16"):
        build_fid("inception")
