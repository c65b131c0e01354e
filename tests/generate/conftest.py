"""Base models with random weights, and a generator on them."""

import pytest
import torch
from torchvision.models.vgg import make_layers

from cvmatch.generate.losses import LPIPS
from cvmatch.generate.model import Generator
from tests.helpers.generator import make_generator, write_base


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    directory = str(tmp_path_factory.mktemp("base"))
    write_base(directory)
    return directory


@pytest.fixture
def generator(toy: str) -> Generator:
    torch.manual_seed(1)
    return make_generator(toy)


@pytest.fixture
def lpips() -> LPIPS:
    torch.manual_seed(2)
    return LPIPS(make_layers([8, "M", 16, "M"], batch_norm=False))
