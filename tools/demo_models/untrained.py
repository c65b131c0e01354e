"""The toy diffusion model before its training: shapes, and the schedule of its noise."""

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

TILE = 64
"""Side of the tiles that the VAE, the UNet and CLIP see, in pixels."""


def build_vae() -> AutoencoderKL:
    """An AutoencoderKL of factor 4 with random weights.

    Layers and attention as Stable Diffusion's: a decoder of one layer a block draws grids where a
    discriminator asks for texture. AutoencoderKL gives the encoder as many, though it needs them
    less: it costs 2.5 of the UNet's passes (with one layer 1.4, as Stable Diffusion's).
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore
        block_out_channels=(32, 64, 64),  # pyright: ignore
        layers_per_block=2,
        latent_channels=8,  # 4 keep less of a tile (23.1 dB, 8: 23.8), and of its class map in A
        norm_num_groups=8,
        sample_size=TILE,
    )


def build_unet(latent_channels: int) -> UNet2DConditionModel:
    """A UNet for those latents with random weights."""
    return UNet2DConditionModel(
        sample_size=TILE // 4,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(48, 80, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_noise_scheduler() -> DDPMScheduler:
    """Stable Diffusion's betas, and v-prediction."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )
