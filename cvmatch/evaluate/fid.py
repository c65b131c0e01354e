"""Build the Frechet inception distance (FID) of two sets of pictures, by a network's name."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from cvmatch.nn import backbones

INCEPTION = "inception"
"""Name of the network of the published FID."""


def build_fid(network: str) -> FrechetInceptionDistance:
    """Return torchmetrics' FID (Heusel et al. 2017) in the features of a network.

    `inception` is the published one. With the name or directory of a tower (`backbones.tower`), the
    distance compares only with others by the same tower.

    Raises:
        ValueError: the network or its weights are not here; says what to do.
    """
    if network != INCEPTION:
        return FrechetInceptionDistance(feature=_Features(backbones.load_tower(network).eval()))
    try:
        return FrechetInceptionDistance(feature=2048)
    except (ImportError, OSError) as error:  # no torch-fidelity; no network to fetch its weights
        raise ValueError(
            "fid inception: expected torch-fidelity (`pip install torch-fidelity`) and its "
            f"weights, fetched into torch's hub directory. Got: {error}. Without a network "
            "copy that directory, or pass the name or directory of a tower: --fid vgg16."
        ) from error


class _Features(nn.Module):
    """uint8 pictures -> a tower's features, as torchmetrics asks for them."""

    def __init__(self, tower: backbones.Tower) -> None:
        super().__init__()
        self.tower, self.num_features = tower, tower.dim

    @torch.no_grad()
    def forward(self, pictures: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n feature"]:
        return self.tower(backbones.normalise(pictures.float() / 255))
