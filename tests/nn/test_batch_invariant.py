"""Results of a network as a function of the row, with rows on which it fails."""

import numpy as np
import pytest
import torch

from cvmatch.data import images, schema
from cvmatch.demo import models as base_models
from cvmatch.generate.infer import GenerateAerial
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning, Sampling
from cvmatch.nn.batch_invariant import FixedBatch, error_line


def double(rows: list[int]) -> list[int]:
    """Fails on any batch with a 13 in it."""
    if 13 in rows:
        raise RuntimeError("thirteen\nis unlucky")
    return [2 * row for row in rows]


def test_rowwise_calls_the_network_with_batches_of_one_size():
    sizes = []

    def network(rows: list[int]) -> list[int]:
        sizes.append(len(rows))
        return double(rows)

    assert FixedBatch(network, 4)([1, 2, 3, 4, 5]) == [2, 4, 6, 8, 10]
    assert sizes == [4, 4]
    assert FixedBatch(network, 4)([]) == []


def test_rowwise_result_has_the_same_bits_in_every_batch():
    # The number of rows decides in which order a matrix product adds up.
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(300, 500), torch.nn.ReLU(), torch.nn.Linear(500, 9)
    )
    rows = list(torch.randn(24, 300))

    def apply(batch: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(layers(torch.stack(batch)).detach())

    def joined(results: list[torch.Tensor | Exception]) -> torch.Tensor:
        return torch.stack([result for result in results if isinstance(result, torch.Tensor)])

    network = FixedBatch(apply, 8)
    whole = joined(network(rows))
    assert whole.shape == (24, 9)
    assert torch.equal(whole, joined([network([row])[0] for row in rows]))
    assert torch.equal(whole, joined(network(rows[::-1])[::-1]))


def test_rowwise_row_that_fails_takes_no_other_with_it():
    first, failed, last = FixedBatch(double, 2)([1, 13, 3])
    assert (first, last) == (2, 6)
    assert isinstance(failed, Exception)
    assert error_line(failed) == "RuntimeError: thirteen is unlucky"


def test_rowwise_batch_of_one_row_tells_its_failure():
    (failed,) = FixedBatch(double, 4)([13])
    assert isinstance(failed, RuntimeError)


def test_rowwise_network_that_fails_on_every_row_raises():
    with pytest.raises(RuntimeError, match="unlucky"):
        FixedBatch(double, 2)([13, 13])

    def broken(rows: list[int]) -> list[Exception]:
        return [ArithmeticError("not finite")] * len(rows)

    with pytest.raises(ArithmeticError, match="not finite"):
        FixedBatch(broken, 2)([1, 2])


def test_rowwise_without_memory_raises_at_once():
    calls = []

    def network(rows: list[int]) -> list[int]:
        calls.append(rows)
        raise torch.OutOfMemoryError("take smaller batches")

    with pytest.raises(torch.OutOfMemoryError, match="smaller"):
        FixedBatch(network, 4)([1, 2, 3, 4])
    assert len(calls) == 1


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> str:
    place = str(tmp_path_factory.mktemp("generator"))
    Generator.base(base_models.DIFFUSION, base_models.CLIP, Conditioning(panorama_width=256)).save(
        place
    )
    return place


def pairs(count: int) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 64, 256, 3), dtype=np.uint8)
    return {
        schema.PAIR_ID: np.array([f"{row:07d}" for row in range(count)], dtype=object),
        schema.GROUND: np.array([images.encode(pixels) for pixels in noise], dtype=object),
        schema.ERROR: np.full(count, None, dtype=object),
    }


def test_generated_picture_has_the_same_bytes_in_every_batch(generator):
    actor = GenerateAerial(
        generator,
        Sampling(num_inference_steps=2, guidance_scale=2.0, guidance_interval=0.0),
        batch=3,
    )
    rows = pairs(5)
    whole = list(actor(rows)[schema.SYNTHETIC])
    assert len(set(whole)) == 5
    alone = [actor({k: v[i : i + 1] for k, v in rows.items()})[schema.SYNTHETIC] for i in range(5)]
    assert [picture for (picture,) in alone] == whole
    rows[schema.GROUND][1] = b"no picture"
    beside = actor({name: values[::-1] for name, values in rows.items()})
    assert list(beside[schema.SYNTHETIC][::-1]) == [whole[0], None, *whole[2:]]


def test_generator_whose_weights_are_not_finite_stops_the_job(generator):
    actor = GenerateAerial(generator, Sampling(num_inference_steps=1, guidance_scale=1.0), batch=2)
    with torch.no_grad():
        actor.generator.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="not finite"):
        actor(pairs(2))
