"""A patch discriminator, and the game that a decoder plays against it.

After Rombach et al. 2022, appendix G (patches, the weight of the term), and Jolicoeur-Martineau
2019 (relativistic pairs, as in Huang et al. 2024).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from cvmatch.runtime import hardware
from tools.demo_models.optimise import descend, make_schedule

_RATE = 1e-3
"""The discriminator's learning rate, five times and more a decoder's."""

_BLIND, _SURE = 0.68, 0.38
"""Discriminator's losses at which its term counts a tenth, and all. One that cannot tell (log 2 =
0.693) has nothing to teach; followed at once, it stays blind."""


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

        Spectral normalisation bounds the slope; times 10, scores can differ by enough to be sure.
        """
        return 10 * self.layers(picture).float()


class Adversary:
    """A discriminator that learns while a decoder is trained against it."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.discriminator = Discriminator().to(device)
        self.recent = _BLIND
        self._plan = make_schedule(self.discriminator, _RATE, steps)

    def joined(
        self,
        error: Float[Tensor, ""],
        drawn: Float[Tensor, "row 3 64 64"],
        true: Float[Tensor, "row 3 64 64"],
        share: float,
    ) -> Float[Tensor, ""]:
        """The decoder's loss: the error, and the adversarial term as far as it can be trusted.

        `share`: of the error's gradient, where the discriminator is sure.
        """
        trust = min(1.0, max(0.1, (_BLIND - self.recent) / (_BLIND - _SURE)))
        with hardware.autocast(drawn.device):
            adversarial = relativistic_loss(self.discriminator, drawn, true)
        return balance(error, adversarial, drawn, share * trust)

    def learn(
        self, drawn: Float[Tensor, "row 3 64 64"], true: Float[Tensor, "row 3 64 64"]
    ) -> None:
        """A step of the discriminator."""
        with hardware.autocast(drawn.device):
            loss = relativistic_loss(self.discriminator, true, drawn.detach())
        descend(self._plan, loss)
        self.recent += 0.03 * (loss.item() - self.recent)


def relativistic_loss(
    discriminator: nn.Module,
    better: Float[Tensor, "row 3 64 64"],
    worse: Float[Tensor, "row 3 64 64"],
) -> Float[Tensor, ""]:
    """Less where patches of one picture score above the same patches of the other; log 2: equal.

    The two show the same place, so what they share cancels. With other places' tiles as the true
    ones, the discriminator stayed near blind at equal steps.
    """
    return F.softplus(discriminator(worse) - discriminator(better)).mean()


def balance(
    error: Float[Tensor, ""],
    adversarial: Float[Tensor, ""],
    drawn: Float[Tensor, "row 3 64 64"],
    share: float,
) -> Float[Tensor, ""]:
    """A loss with the error's gradient and, `share` times as long, the adversarial term's.

    As equation 7 of Esser et al. 2021, but both gradients are taken at the pictures, not at the
    decoder's last weights: each is needed there anyway, and so neither is computed twice.
    """
    slope, adverse = (
        torch.autograd.grad(loss, drawn, retain_graph=True)[0] for loss in (error, adversarial)
    )
    weight = share * slope.norm() / (adverse.norm() + 1e-8)
    return ((slope + weight * adverse) * drawn).sum()
