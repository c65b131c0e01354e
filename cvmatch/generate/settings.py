"""Settings of the generator: training, latent cache, sampling. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cvmatch.data.settings import Ingest, Validation, check_disjoint
from cvmatch.runtime.settings import Pool
from cvmatch.training.settings import TrainConfig

DIFFUSION = "CompVis/stable-diffusion-v1-4"
CLIP = "openai/clip-vit-base-patch32"

TrainedWeights = Literal["all", "attention", "lora"]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the UNet sees of the panorama; saved with the weights."""

    panorama_width: int = 1232
    """Columns of the panorama, in pixels, at the height of CLIP's input (CVUSA: 1232 at 224)."""
    bev_channels: int = 24
    """Channels of the BEV map in the UNet's input."""
    bev_gain: float = 30.0
    """Factor of the BEV map in the UNet's input, whose new weights start at zero: how fast the UNet
    learns to use it (docs/decisions.md#bev-gain)."""
    low_freq_cells: int = 8
    """Cells a side of the tile below which sampling follows the BEV map's colours, as ILVR does;
    0: the UNet draws all frequencies (docs/decisions.md#low-frequency-guidance)."""

    def __post_init__(self) -> None:
        if min(self.panorama_width, self.bev_channels) < 1:
            raise ValueError(
                "conditioning: expected panorama_width and bev_channels of at least 1, got "
                f"{self.panorama_width} and {self.bev_channels}."
            )
        if not self.bev_gain > 0:
            raise ValueError(f"conditioning: expected bev_gain above 0, got {self.bev_gain}.")
        if self.low_freq_cells < 0:
            raise ValueError(
                f"conditioning: expected low_freq_cells of at least 0, got {self.low_freq_cells}."
            )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """DPM-Solver++ steps, classifier-free guidance and seed."""

    num_inference_steps: int = 6
    """Solver steps."""
    guidance_scale: float = 8.0
    """Scale of classifier-free guidance; 1: none, in half the time."""
    guidance_interval: float = 0.45
    """Guide only while t / T >= this value in [0, 1] (limited interval: Kynkaanniemi et al. 2024);
    0: in every step."""
    seed: int = 0
    """Seed of the noise: another one samples other pictures of the same panoramas."""

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(
                "generate: expected num_inference_steps of at least 1, got "
                f"{self.num_inference_steps}."
            )
        if not 0 <= self.guidance_interval <= 1:
            raise ValueError(
                "generate: expected guidance_interval in [0, 1], a share of the noise schedule, "
                f"got {self.guidance_interval}."
            )

    def scale_at(self, noise_level: float) -> float:
        """Return the guidance scale at a noise level t / T, from 0 (clean) to 1."""
        return self.guidance_scale if noise_level >= self.guidance_interval else 1.0

    def describe(self) -> str:
        """Return the settings as words for a table."""
        text = f"{self.num_inference_steps} steps, guidance {self.guidance_scale:g}"
        if self.guidance_scale == 1 or not self.guidance_interval:
            return text
        return f"{text} above {100 * self.guidance_interval:g} % of the schedule"


SAMPLER_VERSION = 6
"""Version of the sampler: another one draws other pictures with the same settings."""

DEFAULT_SAMPLING = Sampling()
"""The sampler where none is given."""


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling):
    """Sample synthetic aerials with a trained generator."""

    model: str = "models/generator"
    """Directory or URI that train-generator published."""
    pool: Pool = field(default_factory=lambda: Pool(batch=32, calls=2))
    """Actors."""


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Encode pairs with the frozen CLIP and VAE, once, before training."""

    data: Ingest = field(default_factory=Ingest)
    """Pairs to train on."""
    diffusion: str = DIFFUSION
    """Base model in Stable Diffusion's layout: local directory or hub id, whose revision may follow
    (id@revision)."""
    clip: str = CLIP
    """CLIP with a vision tower: hub id or local directory."""
    conditioning: Conditioning = field(default_factory=Conditioning)
    """What the UNet sees of the panorama."""
    mirror: bool = False
    """Mirror half of the training pairs at random."""
    latent_cache: str = "data/latents"
    """Directory, or URI, of the encoded pairs; runs with the same data and encoders share them."""


@dataclass(frozen=True, kw_only=True)
class GeneratorLossConfig:
    """Weights of the generator's losses."""

    noise_weight: float = 1.0
    """Weight of the squared error of the predicted noise, or velocity."""
    clip_weight: float = 2.0
    """Weight of 1 - cos of CLIP's vectors of the predicted and the true tile; 0: not computed."""
    lpips_weight: float = 1.0
    """Weight of LPIPS between the decoded prediction and the true tile; 0: not computed."""
    bev_weight: float = 1.0
    """Weight of the squared error of the tile's colours, read off the BEV map."""
    bev_class_weight: float = 0.5
    """Weight of the cross-entropy of the tile's class map, read off the BEV map; pairs without a
    class map do not count."""
    bev_nce_weight: float = 0.05
    """Weight of the InfoNCE loss that tells the true tile by the BEV map's colours."""
    x0_nce_weight: float = 0.0
    """Weight of the InfoNCE loss that tells the true tile by the UNet's predicted x0; 0: not
    computed."""
    image_rows: int = 4
    """Rows of every second step (of one worker) that the losses of decoded images, CLIP and LPIPS,
    see: what caps their cost."""

    def __post_init__(self) -> None:
        if self.image_rows < 1:
            raise ValueError(
                f"train-generator: expected image_rows of at least 1, got {self.image_rows}; to "
                "leave these losses out, set clip_weight and lpips_weight to 0."
            )


@dataclass(frozen=True, kw_only=True)
class TrainGenerator(GeneratorLossConfig, Encode):
    """Fine-tune a latent diffusion model to draw the tile of a panorama."""

    val: Validation | None = None
    """Pairs for the validation loss."""
    lpips_vgg: str = "vgg16"
    """Network of LPIPS: vgg16 of torchvision, a local file of its weights, or a local tower
    directory of a VGG."""
    lr: float = 1e-5
    """Learning rate of the base model's weights."""
    lr_conditioner: float = 1e-3
    """Learning rate of what starts from random weights: projection, null condition and BEV."""
    train_unet: TrainedWeights = "all"
    """attention: only the cross-attention and the input convolution. lora: low-rank adapters of all
    attention, and the input convolution; they are merged when the model is saved."""
    lora_rank: int = 16
    """Rank of the adapters."""
    conditioning_dropout: float = 0.1
    """Share of rows whose condition becomes the null, for classifier-free guidance."""
    pretrain_bev: int = 0
    """Epochs that train the BEV network alone before, many times cheaper than the UNet's; it is
    frozen afterwards, and a step takes a third less time. 0: it learns together with the UNet."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that is validated and published; 0: none."""
    gradient_checkpointing: bool = False
    """Recompute the UNet's activations in the backward pass: a third slower, much less memory."""
    validation_images: int = 64
    """Validation rows that are sampled after each epoch, the same ones whatever the workers, for
    val/retrieval_mrr, PSNR, SSIM and the like; 0: none."""
    output: str = "models/generator"
    """Directory of the published model."""
    fit: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_disjoint(self.data, self.val)
        for name in ("conditioning_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"train-generator: expected {name} in [0, 1), got {getattr(self, name)}."
                )
        if not self.bev_weight and self.conditioning.low_freq_cells:
            raise ValueError(
                "train-generator: expected bev_weight above 0, since sampling follows the BEV "
                "map's colours, got 0: they would stay random. Or set "
                "--conditioning.low-freq-cells 0."
            )

    def encoding(self, **changes: Any) -> Encode:
        """Return the part of the settings that says how pairs are encoded, with `changes`."""
        values = {part.name: getattr(self, part.name) for part in fields(Encode)}
        return Encode(**values | changes)
