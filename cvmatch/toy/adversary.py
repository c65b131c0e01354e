"""A patch discriminator, and the losses of the game it plays against a decoder.

After Rombach et al. 2022, appendix G, and Esser et al. 2021, section 3.1.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

_SHARE = 0.5
"""Gradient of the adversarial term at the pictures, as a share of the errors'."""


class Discriminator(nn.Module):
    """Score of each patch of 36 x 36 pixels, high where it looks like a true tile's."""

    def __init__(self) -> None:
        super().__init__()
        widths, kernels, strides = (3, 48, 96, 144, 144, 144), (3, 4, 4, 3, 3), (1, 2, 2, 1, 1)
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride in zip(
            widths[:-1], widths[1:], kernels, strides, strict=True
        ):
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1)
            layers += [spectral_norm(conv), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(144, 1, 3, padding=1)))

    def forward(self, picture: Float[Tensor, "row 3 64 64"]) -> Float[Tensor, "row 1 16 16"]:
        """Of RGB in [-1, 1].

        Spectral normalisation bounds the slope; times 10, scores can reach the hinge's margins.
        """
        return 10 * self.layers(picture).float()


def adversarial_loss(
    discriminator: nn.Module, drawn: Float[Tensor, "row 3 64 64"]
) -> Float[Tensor, ""]:
    """The decoder's: less where its pictures look like tiles."""
    return -discriminator(drawn).mean()


def hinge_loss(
    discriminator: nn.Module,
    drawn: Float[Tensor, "row 3 64 64"],
    true: Float[Tensor, "row 3 64 64"],
) -> Float[Tensor, ""]:
    """The discriminator's: 0 if true tiles score above 1 and drawn ones below -1, 2 if blind."""
    return F.relu(1 + discriminator(drawn)).mean() + F.relu(1 - discriminator(true)).mean()


def balanced(
    error: Float[Tensor, ""], adversarial: Float[Tensor, ""], drawn: Float[Tensor, "row 3 64 64"]
) -> Float[Tensor, ""]:
    """A loss with the error's gradient and, _SHARE times as long, the adversarial term's.

    As equation 7 of Esser et al. 2021, but both gradients are taken at the pictures, not at the
    decoder's last weights: each is needed there anyway, and so neither is computed twice.
    """
    slope, adverse = (
        torch.autograd.grad(loss, drawn, retain_graph=True)[0] for loss in (error, adversarial)
    )
    weight = _SHARE * slope.norm() / (adverse.norm() + 1e-8)
    return ((slope + weight * adverse) * drawn).sum()
