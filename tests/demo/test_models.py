"""The toy base models: real formats, small, and trained to do what their names say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from transformers import SegformerForSemanticSegmentation

from cvmatch.data.schema import LABELS
from cvmatch.demo import models as base_models
from cvmatch.demo.procedural.pairs import render_pairs, world_seed
from cvmatch.demo.samples import SIZES
from cvmatch.generate.conditioning import Condition
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning
from cvmatch.nn import metrics
from cvmatch.nn.backbones import load_vgg_features, normalise
from cvmatch.segment.batches import Preprocess
from cvmatch.segment.model import Segmenter
from tools.demo_models import pretrain, untrained
from tools.demo_models.__main__ import Pretrain
from tools.demo_models.adversary import Adversary, Discriminator, balance
from tools.demo_models.autoencoder import encode, pretrain_vae, scale_pixels
from tools.demo_models.decoder import Latents, pretrain_decoder, sample_latents
from tools.demo_models.optimise import optimise

MEGABYTE = 1e6


@pytest.fixture(scope="module")
def place():
    """Pairs of one world that neither the models nor the demo saw: tiles, classes, small tiles."""
    found = list(render_pairs(world_seed(987, 0), 8, SIZES))
    tiles = torch.from_numpy(np.stack([p.aerial for p in found])).permute(0, 3, 1, 2)
    classes = torch.from_numpy(np.stack([p.classes for p in found]))
    return tiles, classes, F.avg_pool2d(tiles.float(), 2).round().byte()


@pytest.fixture(scope="module")
def generator():
    return Generator.base(base_models.DIFFUSION, base_models.CLIP, Conditioning(panorama_width=256))


def test_toy_models_fit_in_fifteen_megabytes():
    size = sum(
        path.stat().st_size for path in Path(base_models.MODELS).rglob("*") if path.is_file()
    )
    assert 1 * MEGABYTE < size <= 15 * MEGABYTE


def test_toy_models_load_in_single_precision(generator):
    for model in (generator, load_vgg_features(base_models.TOWER)):
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_toy_vae_keeps_a_tile(generator, place):
    image = place[2].float() / 255
    with torch.no_grad():
        latent = generator.encoders.encode_tile(image)
        again = generator.encoders.decode(latent).clamp(0, 1)
    flat = image.mean(dim=(2, 3), keepdim=True).expand_as(image)
    assert metrics.psnr(again, image).mean() > metrics.psnr(flat, image).mean() + 4  # dB
    assert latent.std().item() == pytest.approx(1, abs=0.3)
    roofs = F.avg_pool2d((place[1] == LABELS.index("building")).float()[:, None], 2)
    middles = F.avg_pool2d(roofs, 3, 1) > 0.99
    lost, all_lost = (
        (F.avg_pool2d(found - image, 3, 1).square() * middles).sum() for found in (again, flat)
    )
    assert lost < 0.05 * all_lost  # blocks of four pixels: 0.15, of eight: 0.43


def test_toy_vae_keeps_few_nats_of_a_tile(generator, place):
    with torch.no_grad():
        latent = generator.encoders.vae.encode(scale_pixels(place[2])).latent_dist
    assert latent.kl().mean() < 500  # with an eighth of that weight on nats: 1,400


def test_toy_latents_are_told_by_their_coarse_part(generator, place):
    latents = generator.encoders.encode_tile(place[2].float() / 255)
    latents = latents - latents.mean(dim=(0, 2, 3), keepdim=True)
    kept = F.avg_pool2d(latents, 2).square().mean() / latents.square().mean()
    assert kept > 0.5  # white noise: 0.25; a VAE that need not give shrunk tiles: 0.38


def test_toy_vae_draws_as_finely_as_a_tile(generator, place):
    image = place[2].float() / 255
    with torch.no_grad():
        again = generator.encoders.decode(generator.encoders.encode_tile(image))
    assert 0.85 < _fine(again) / _fine(image) < 1.15  # trained for errors alone: 0.7


def _fine(image):
    """Standard deviation of pixels about their blocks of 4 x 4."""
    blocks = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4)
    return (image - blocks).std()


def test_toy_unet_denoises_tiles(generator, place):
    latents = generator.encoders.encode_tile(place[2].float() / 255)
    step = torch.full((len(latents),), 300)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = generator.schedule.add_noise(latents, noise, step)
    channels, rows = generator.conditioning.bev_channels, len(latents)
    nothing = Condition(torch.zeros(rows, 4, 64), torch.zeros(rows, channels, 16, 16))
    with torch.no_grad():
        told = generator.predict(noisy, step, nothing)
    target = generator.schedule.target(latents, noise, step)
    assert F.mse_loss(told, target) < 0.7 * target.square().mean()


def test_toy_segformer_knows_the_classes(place):
    tiles, classes, _ = place
    model = SegformerForSemanticSegmentation.from_pretrained(
        base_models.SEGFORMER, dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(normalise(tiles.float() / 255)).logits
    told = F.interpolate(logits, classes.shape[-2:], mode="bilinear").argmax(1)
    matrix = metrics.confusion(told, classes, 6)
    assert metrics.miou(matrix)[0] > 0.3


def test_toy_segformer_gets_a_new_head_for_five_classes():
    segmenter = Segmenter.from_base(base_models.SEGFORMER, Preprocess(size=64, num_classes=5))
    assert segmenter.logits(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1] == 5


def test_discriminator_learns_to_tell_blurred_tiles(place):
    true = scale_pixels(place[2][:4])
    blurred = F.interpolate(F.avg_pool2d(true, 4), scale_factor=4)
    torch.manual_seed(0)
    adversary = Adversary(100, true.device)
    for _ in range(40):
        adversary.learn(blurred, true)
    with torch.no_grad():
        assert adversary.discriminator(true).mean() > adversary.discriminator(blurred).mean() + 1


def test_adversary_leads_up_its_score_and_counts_more_when_it_can_tell(place):
    true = scale_pixels(place[2][:4])
    blurred = F.interpolate(F.avg_pool2d(true, 4), scale_factor=4).requires_grad_()
    torch.manual_seed(0)
    adversary = Adversary(100, true.device)
    pulls = []
    for _ in range(2):
        error = 0.5 * blurred.square().sum()
        joined = adversary.joined(error, blurred, true, share=0.5)
        pulls.append(torch.autograd.grad(joined, blurred)[0] - blurred)
        for _ in range(60):
            adversary.learn(blurred, true)
    shares = [(pull.norm() / blurred.norm()).item() for pull in pulls]
    assert shares[0] < 0.1
    assert shares[1] == pytest.approx(0.5, rel=1e-3)
    better = blurred - 0.01 * pulls[1] / pulls[1].norm() * blurred.norm()
    with torch.no_grad():
        score = adversary.discriminator
        assert score(better).mean() > score(blurred).mean()


def test_discriminator_scores_patches_of_36_pixels():
    picture = torch.zeros(1, 3, 64, 64, requires_grad=True)
    Discriminator()(picture)[0, 0, 8, 8].backward()
    assert picture.grad is not None
    seen = picture.grad[0].abs().sum(dim=0) > 0
    assert (seen.any(0).sum(), seen.any(1).sum()) == (36, 36)


def test_adversarial_gradient_is_a_share_of_the_errors():
    drawn = torch.ones(1, 3, 64, 64, requires_grad=True)
    balance((2 * drawn).sum(), (8 * drawn[:, 0]).sum(), drawn, share=0.5).backward()
    assert drawn.grad is not None
    adverse = drawn.grad - 2
    torch.testing.assert_close(adverse.norm(), 0.5 * torch.full_like(drawn, 2).norm())
    assert adverse[:, 0].min() > 0
    torch.testing.assert_close(adverse[:, 1:], torch.zeros(1, 2, 64, 64))


def test_vae_training_starts_from_random_weights_and_sets_the_scale(place):
    _, classes, tiles = place
    torch.manual_seed(0)
    vae = untrained.build_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    pretrain_vae(vae, tiles, classes[:, ::2, ::2], load_vgg_features(base_models.TOWER), steps=4)
    same = {name for name, value in vae.state_dict().items() if torch.equal(value, before[name])}
    assert not same
    scaled_latents = encode(vae, tiles).float() * vae.config["scaling_factor"]
    assert scaled_latents.std().item() == pytest.approx(1, abs=0.01)


def test_decoder_training_leaves_the_encoder(generator, place):
    _, classes, tiles = place
    vae = AutoencoderKL.from_pretrained(base_models.DIFFUSION, subfolder="vae").float()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    classes, panoramas = classes[:, ::2, ::2], torch.zeros(8, 3, 64, 256, dtype=torch.uint8)
    torch.manual_seed(0)
    own = Latents(tiles, classes, encode(vae, tiles))
    drawn = sample_latents(generator, panoramas, tiles, classes)
    assert drawn.latent.shape == own.latent.shape
    pretrain_decoder(vae, own, drawn, load_vgg_features(base_models.TOWER), steps=2)
    changed = {n for n, value in vae.state_dict().items() if not torch.equal(value, before[n])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}


def test_tiles_with_buildings_are_decoded_often():
    classes = torch.zeros(100, 64, 64, dtype=torch.uint8)
    classes[:10, :32] = LABELS.index("building")
    tiles = Latents(
        torch.zeros(100, 3, 64, 64, dtype=torch.uint8), classes, torch.zeros(100, 1, 16, 16)
    )
    torch.manual_seed(0)
    often = (tiles.rows(1000) < 10).float().mean()
    assert often == pytest.approx(0.6 + 0.4 * 0.1, abs=0.05)


def test_decoder_without_a_generator_says_which_flag():
    with pytest.raises(ValueError, match=r"--generator.*cvmatch train-generator"):
        Pretrain(models=("decoder",))


def test_mean_of_the_weights_forgets_the_first_ones():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 100.0)  # far from the answer, 3
    optimise(
        model,
        lambda rows: (model.weight - 3).square().sum(),
        1,
        800,
        batch=1,
        rate=1.0,
        decay=0.998,
    )
    assert model.weight.item() == pytest.approx(3, abs=3)


def test_pretraining_worlds_are_no_data_worlds():
    pretrain_seeds = {world_seed(0, index, "pretrain") for index in range(200)}
    data_seeds = {world_seed(seed, index) for seed in range(5) for index in range(200)}
    assert not pretrain_seeds & data_seeds


def test_pretraining_is_repeatable(place):
    tiles, classes, _ = place
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(pretrain.pretrain_segformer(tiles, classes, steps=1).state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
