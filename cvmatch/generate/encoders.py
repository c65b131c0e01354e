"""The frozen networks: CLIP looks at panoramas, the VAE turns tiles into latents and back."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cvmatch.data import geometry
from cvmatch.generate import bev
from cvmatch.generate.conditioning import Seen
from cvmatch.generate.pretrained import Encoders
from cvmatch.generate.settings import Conditioning


class Frozen(nn.Module):
    """`clip` and `vae`, always in evaluation mode. What they give of a pair may be stored.

    Pictures are RGB in [0, 1]: panoramas of `panorama_size` = (height, width) pixels.
    """

    # Any: diffusers' annotations are unions over flags that are not used here.
    clip: Any
    vae: Any
    mean: Tensor
    deviation: Tensor

    def __init__(self, encoders: Encoders, conditioning: Conditioning) -> None:
        super().__init__()
        self.clip, self.vae, self.processor = encoders.clip, encoders.vae, encoders.processor
        self.conditioning = conditioning
        vision: Any = encoders.clip.config
        self.panorama_size = (vision.image_size, conditioning.panorama_width)
        for name, values in zip(
            ("mean", "deviation"),
            (self.processor.image_mean, self.processor.image_std),
            strict=True,
        ):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in evaluation mode."""
        del mode
        return super().train(False)

    def look(self, panorama: Float[Tensor, "batch 3 height width"]) -> Seen:
        """What CLIP and the rays see of panoramas: the same in every epoch.

        Gradient flows into CLIP's layers where some are trained (`TrainGenerator.train_clip`).

        Raises:
            ValueError: the panoramas have another size than the model was built for.
        """
        if panorama.shape[-2:] != self.panorama_size:
            raise ValueError(
                f"generator: expected panoramas of {self.panorama_size} (height, width) pixels, "
                f"got {tuple(panorama.shape[-2:])}. Decode them to that size, or train with "
                "--conditioning.panorama-width."
            )
        crops = geometry.crop_azimuths(panorama, self.conditioning.crops)
        seen = self.clip(self._normalised(crops.flatten(0, 1)))
        if self.conditioning.mode == "pooled":
            states = seen.pooler_output.unflatten(0, crops.shape[:2]).mean(dim=1, keepdim=True)
        else:
            states = seen.last_hidden_state.unflatten(0, crops.shape[:2]).flatten(1, 2)
        return Seen(states, bev.view(panorama))

    @torch.no_grad()
    def encode(self, tile: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch c h w"]:
        """Latents of tiles, of about unit variance: the VAE's posterior mean, always the same."""
        posterior = self.vae.encode(tile * 2 - 1).latent_dist
        return posterior.mode() * self.vae.config["scaling_factor"]

    def decode(self, latent: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Pictures of latents, in [0, 1] up to the VAE's error (not clamped: gradient flows)."""
        return self.vae.decode(latent / self.vae.config["scaling_factor"]).sample / 2 + 0.5

    def embed(self, picture: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch state"]:
        """CLIP's pooled vector of square pictures; gradient flows into them."""
        size = self.panorama_size[0]
        if picture.shape[-1] != size:
            picture = F.interpolate(picture, (size, size), mode="bilinear", antialias=True)
        return self.clip(self._normalised(picture)).pooler_output

    def _normalised(self, picture: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        return (picture - self.mean) / self.deviation
