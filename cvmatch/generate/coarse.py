"""What is coarse in a picture: drawn by the rays, and kept while the UNet draws the rest.

As ILVR (Choi et al. 2021) keeps the low frequencies of a reference, on latents.
"""

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cvmatch.generate.frozen import Frozen
from cvmatch.generate.noise import Noise

_STRENGTH = 0.85
"""How much of the way, in every step. Two toy generators, each on its 500 held-out tiles, found by
A's among the first tenth in 92.0 and 90.2 % with 0.7, in 93.0 and 91.0 with 0.85, in 92.6 and 91.0
with 1; Frechet distance by the toy CLIP 2.6 and 2.9, 2.9 and 3.4, 3.2 and 3.8. Without the last of
six steps 0.85 gives 91.6 and 88.6 %, 2.4 and 2.7."""


def reference(
    frozen: Frozen, drawing: Float[Tensor, "row 3 cell cell"], tile: int, cells: int
) -> Float[Tensor, "row c {cells} {cells}"]:
    """Coarse latents, `cells` a side, of drawings in [0, 1] of tiles of `tile` pixels."""
    enlarged = F.interpolate(drawing, (tile, tile), mode="bicubic").clamp(0, 1)
    return shrunk(frozen.encode(enlarged).float(), cells)


def pulled(
    clean: Float[Tensor, "row c h w"], wanted: Float[Tensor, "row c cell cell"]
) -> Float[Tensor, "row c h w"]:
    """Clean latents, whose coarse part is moved towards `wanted`."""
    apart = wanted - shrunk(clean, wanted.shape[-1])
    return clean + _STRENGTH * F.interpolate(apart, clean.shape[-2:], mode="bicubic")


def steered(
    noise: Noise,
    noisy: Float[Tensor, "row c h w"],
    answer: Float[Tensor, "row c h w"],
    step: Int64[Tensor, " row"],
    wanted: Float[Tensor, "row c cell cell"] | None,
) -> Float[Tensor, "row c h w"]:
    """The UNet's answer, whose picture is pulled to `wanted` unless that is None."""
    if wanted is None:
        return answer
    return noise.implied(noisy, pulled(noise.clean(noisy, answer, step), wanted), step)


def shrunk(latent: Float[Tensor, "row c h w"], size: int) -> Float[Tensor, "row c {size} {size}"]:
    """What is coarse in latents, `size` cells a side."""
    return F.interpolate(latent, (size, size), mode="bilinear", antialias=True)
