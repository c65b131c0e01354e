"""Settings of the generator's stage: training, the pass that encodes pairs, and sampling.

It imports no network: a command's help reads them alone.
"""

from dataclasses import dataclass, field
from typing import Literal

from cvmatch.data.settings import Ingest, check_disjoint
from cvmatch.runtime.settings import Pool
from cvmatch.training.settings import TrainConfig

DIFFUSION = "CompVis/stable-diffusion-v1-4"
CLIP = "openai/clip-vit-base-patch32"

Mode = Literal["pooled", "tokens", "tokens+geometry"]
Prediction = Literal["base", "epsilon", "v_prediction"]
"""What a UNet answers: the noise, or the velocity a noise - s x_0; base: as it was trained."""

Way = Literal["once", "live"]
"""When the frozen networks see a pair: before training, or in every step."""

Trained = Literal["all", "attention", "lora"]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the UNet sees of the panorama; saved with the weights."""

    mode: Mode = "tokens+geometry"
    """pooled: one CLIP vector, as in the published prototype (which repeated it 77 times; attention
    over equal tokens is the same as over one). tokens: all tokens with their azimuth. +geometry:
    also a north-up map in the UNet's input."""
    panorama_width: int = 1232
    """Columns of the panorama, in pixels, at the height of CLIP's input (CVUSA: 1232 at 224)."""
    crops: int = 6
    """Square crops around the azimuth, each as high as CLIP's input, that cover all columns."""
    harmonics: int = 4
    """Multiples of the azimuth whose sine and cosine each token is told."""
    channels: int = 24
    """Channels of the geometry map."""
    gain: float = 30.0
    """Factor of the map at the UNet's entry, whose new weights start at zero. Adam moves a weight
    by the learning rate, however small its gradient, so this is how fast the map is heard. After 90
    steps at 5e-4, A found its tile among 320 (R@1, guidance 3 or 4) in 12 % with a factor of 1,
    16 % with 10, 18 % with 30; the loss was 0.634, 0.629 and 0.630 (toy models)."""

    coarse: int = 8
    """Cells a side of the tile: what is larger in a picture is pulled to what the rays draw, while
    the UNet draws the rest (generate/coarse.py); 0: it draws all. A sample of what may be there
    lies further from the truth than its mean."""

    def __post_init__(self) -> None:
        if min(self.panorama_width, self.crops, self.harmonics, self.channels) < 1:
            raise ValueError(f"conditioning: expected sizes of at least 1, got {self}")
        if not self.gain > 0:
            raise ValueError(f"conditioning: expected a gain above 0, got {self.gain}.")
        if self.coarse < 0:
            raise ValueError(f"conditioning: expected coarse of at least 0, got {self.coarse}.")

    @property
    def geometry(self) -> bool:
        """Whether the map joins the UNet's input."""
        return self.mode == "tokens+geometry"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Solver steps, guidance and seed. benchmarks/sampler.py shows others beside the defaults."""

    steps: int = 6
    """Solver steps."""
    guidance: float = 8.0
    """Guidance scale; 1: none, half the time."""
    guided: float = 0.45
    """Down to which share of the noise schedule guidance acts; below, the plain model answers, in
    half the time. 0: guidance in every step (limited interval: Kynkaanniemi et al. 2024)."""
    seed: int = 0
    """Other seeds draw other pictures of the same panorama."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"generate: expected steps of at least 1, got {self.steps}.")
        if not 0 <= self.guided <= 1:
            raise ValueError(
                f"generate: expected guided in [0, 1], a share of the noise schedule, got "
                f"{self.guided}."
            )

    def scale(self, noise: float) -> float:
        """Guidance scale at a share of the noise schedule, from 0 (clean) to 1."""
        return self.guidance if noise >= self.guided else 1.0

    def named(self) -> str:
        """For a table."""
        if self.guidance == 1 or not self.guided:
            return f"{self.steps} steps, guidance {self.guidance:g}"
        above = f"above {100 * self.guided:g} % of the schedule"
        return f"{self.steps} steps, guidance {self.guidance:g} {above}"


SAMPLER_VERSION = 6
"""Version of the sampler: another one draws other pictures with the same settings."""

DEFAULT = Sampling()
"""The sampler that is taken where none is named."""


@dataclass(frozen=True, kw_only=True)
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
    train_unet: Trained = "all"
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


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Run the frozen networks over pairs, and keep what they give."""

    data: Ingest
    """Pairs."""
    diffusion: str
    """Whose VAE: hub id or local directory."""
    revision: str
    """Revision of `diffusion` on the hub."""
    clip: str
    """CLIP with a vision tower: hub id or local directory."""
    conditioning: Conditioning
    """How CLIP looks at panoramas."""
    turns: bool
    """Also of tiles turned by one, two and three quarters."""
    mirror: bool
    """Also of mirrored ones."""
    output: str
    """Directory of encoded data sets; this one's name is a fingerprint of all it depends on."""
    pool: Pool
    """Actors."""


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling):
    """Draw synthetic aerials with a trained generator."""

    model: str = "models/generator"
    """Local directory that train_generator published."""
    pool: Pool = field(default_factory=lambda: Pool(batch=32, calls=2))
    """Actors."""


@dataclass(frozen=True, kw_only=True)
class TrainGenerator(Recipe):
    """Fine-tune a latent diffusion model to draw the tile of a panorama."""

    data: Ingest = field(default_factory=Ingest)
    """Pairs to train on."""
    val: Ingest | None = None
    """Pairs for the validation loss."""
    diffusion: str = DIFFUSION
    """Base model in Stable Diffusion's layout: hub id or local directory."""
    revision: str = "main"
    """Revision of `diffusion` on the hub."""
    clip: str = CLIP
    """CLIP with a vision tower: hub id or local directory."""
    perceptual: str = "vgg16"
    """Network of LPIPS: vgg16 (ImageNet), or a local tower directory of a VGG."""
    perceptual_weights: str = ""
    """Local file with vgg16's weights; empty: torchvision's hub."""
    conditioning: Conditioning = field(default_factory=Conditioning)
    """What the UNet sees of the panorama."""
    prediction: Prediction = "base"
    """What the UNet learns to answer; base: what the base model answers."""
    encode: Way = "once"
    """once: a pass before training keeps what the frozen networks give of every pair, as Parquet.
    live: they run in every step."""
    encoded: str = "data/encoded"
    """Directory, or URI, of what that pass keeps; runs with the same data and encoders share it."""
    encode_pool: Pool = field(default_factory=Pool)
    """Actors of that pass."""
    pretrain_rays: int = 0
    """Epochs that train the rays alone before; many times cheaper than diffusion's. 0: none."""
    output: str = "models/generator"
    """Directory of the published model."""
    fit: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_disjoint(self.data, self.val)
        if self.freeze_rays and not self.pretrain_rays:
            raise ValueError(
                "train_generator: expected pretrain_rays of at least 1 with freeze_rays, got 0: "
                "the rays would stay random. Set --pretrain-rays 5, or do not freeze them."
            )
        if not self.w_map and self.conditioning.geometry and self.conditioning.coarse:
            raise ValueError(
                "train_generator: expected w_map above 0, since A is pulled to what the rays "
                "draw, got 0: that would stay random. Or set --conditioning.coarse 0."
            )
        if self.train_clip and self.encode == "once":
            raise ValueError(
                f"train_generator: expected encode live with train_clip {self.train_clip}, got "
                "once: stored states are of a CLIP that does not learn. Set --encode live."
            )
