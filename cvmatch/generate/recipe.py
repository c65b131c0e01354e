"""What a generator learns, and from which terms: the settings of a training step."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a generator learns, and from which terms."""

    w_noise: float = 1.0
    """Weight of the squared error of the noise, or velocity."""
    w_clip: float = 2.0
    """Weight of 1 - cos of CLIP's vectors of the predicted and the true tile; 0: not computed."""
    w_vae: float = 1.0
    """Weight of LPIPS between the decoded prediction and the true tile; 0: not computed."""
    w_map: float = 1.0
    """Weight of the squared error of the tile that the geometry map draws."""
    w_classes: float = 0.5
    """Weight of the cross-entropy of the tile's class map that the geometry map tells; pairs
    without a class map do not count."""
    w_contrast: float = 0.05
    """Weight of telling the true tile from the batch's others by that drawing."""
    w_identify: float = 0.0
    """Weight of telling it by what the UNet predicts of the picture; 0: not computed."""
    identify_noise: float = 0.75
    """Least noise for that term, as a share of the schedule; with less, the input tells it all."""
    rivals: int = 512
    """True tiles of earlier steps that w_contrast and w_identify tell the own one from, too."""
    image_rows: int = 4
    """Rows of a step (of one worker) that the two image terms, w_clip and w_vae, look at."""
    image_every: int = 2
    """Every how many steps the image terms act, then with as many times their weight."""
    image_signal: float = 0.3
    """Least share of signal in the noisy latent, in variance, for the image terms to act."""
    min_snr: float = 0.0
    """Gamma of Min-SNR weighting of the noise term (Hang et al. 2023 use 5); 0: none."""
    drop: float = 0.1
    """Share of rows whose whole condition becomes the null, for classifier-free guidance."""
    turns: bool = False
    """Turn tiles by quarters, and the panoramas with them, at random."""
    mirror: bool = False
    """Mirror pairs at random."""
    lr: float = 1e-5
    """Learning rate of the base's weights."""
    lr_rays: float = 1e-3
    """Learning rate of what starts from random weights: projection, null and rays."""
    train_unet: Literal["all", "attention", "lora"] = "all"
    """attention: only the cross-attention and the input convolution. lora: low-rank adapters of all
    attention, and the input convolution; they are merged when the model is saved."""
    lora_rank: int = 16
    """Rank of the adapters."""
    train_clip: int = 0
    """Last layers of CLIP that are trained; needs --encode live."""
    ema: float = 0.0
    """Decay of the running mean of the weights that is validated and published; 0: none."""
    save_memory: bool = False
    """Recompute the UNet's activations in the backward pass: a third slower, much less memory."""
    freeze_rays: bool = False
    """Keep the rays as `pretrain_rays` left them: a step takes a third less time."""
    judge: int = 64
    """Validation rows (of each worker) that are drawn after each epoch, for the measures of
    pictures; 0: none."""

    def __post_init__(self) -> None:
        if self.image_rows < 1 or self.image_every < 1:
            raise ValueError(
                f"train_generator: expected image_rows and image_every of at least 1, got "
                f"{self.image_rows} and {self.image_every}; to leave the image terms out, set "
                "w_clip and w_vae to 0."
            )
        if self.rivals < 0:
            raise ValueError(f"train_generator: expected rivals of at least 0, got {self.rivals}.")
        if not 0 <= self.drop < 1 or not 0 <= self.ema < 1:
            raise ValueError(
                f"train_generator: drop and ema are in [0, 1), got {self.drop} and {self.ema}."
            )

    def total(self, named: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms; one without a weight of its own counts once."""
        return torch.stack([getattr(self, f"w_{n}", 1.0) * v for n, v in named.items()]).sum()
