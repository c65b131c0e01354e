"""The generator: its UNet, sampling by key, files, and the real sizes."""

import json
import os
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from cvmatch.generate.conditioning import (
    Condition,
)
from cvmatch.generate.diffusion import NoiseSchedule
from cvmatch.generate.encoders import FrozenEncoders
from cvmatch.generate.model import FORMAT, Generator, expand_conv_in
from cvmatch.generate.settings import Conditioning, Generate, Sampling
from tests.helpers.generator import (
    CONDITIONING,
    condition_of,
    ground_of,
    make_generator,
    make_informative,
    make_vae,
    raw_batch,
    sample,
)
from tests.helpers.present import present


def _count(model: torch.nn.Module) -> float:
    return round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1)


def test_unet_widened_for_the_map_answers_as_the_base_unet(toy: str, generator: Generator):
    base = UNet2DConditionModel.from_pretrained(os.path.join(toy, "diffusion", "unet")).eval()
    condition = condition_of(generator, ground_of(2))
    noisy, step = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    expected = base(noisy, step, encoder_hidden_states=condition.tokens).sample
    assert condition.bev.abs().max() > 0.01  # the map is there, and does not matter yet
    assert torch.equal(generator.eval().predict(noisy, step, condition), expected)


def test_bev_gain_is_a_factor_of_the_map(toy: str, generator: Generator):
    make_informative(generator)
    loud = make_generator(toy, replace(CONDITIONING, bev_gain=3.0))
    loud.load_state_dict(generator.state_dict())
    condition = condition_of(generator, ground_of(2))
    tripled = Condition(condition.tokens, 3 * condition.bev)
    noisy, step = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    found = loud.eval().predict(noisy, step, condition)
    torch.testing.assert_close(found, generator.eval().predict(noisy, step, tripled))
    assert (found - generator.predict(noisy, step, condition)).abs().max() > 0.01


def test_unet_with_more_inputs_than_the_condition_needs_is_refused(generator: Generator):
    with pytest.raises(ValueError, match="at most 4 input channels, got 28"):
        expand_conv_in(generator.unet, 4)


def test_sample_is_a_picture_of_the_tiles_size(generator: Generator):
    picture = sample(generator)
    assert picture.shape == (2, 3, 64, 64)
    assert 0 <= picture.min() < picture.max() <= 1


def test_sample_does_not_depend_on_theraw_batch(generator: Generator):
    make_informative(generator)
    whole = sample(generator, 4)
    alone = torch.cat([sample(generator, 1, first=row) for row in range(4)])
    torch.testing.assert_close(alone, whole, atol=1e-3, rtol=0)
    assert (whole[0] - whole[1]).abs().max() > 0.01


def test_sample_asks_the_unet_once_a_step_for_all_rows_and_both_conditions(generator: Generator):
    asked = []
    generator.unet.register_forward_pre_hook(lambda unet, given: asked.append(len(given[0])))
    sample(generator, 3, num_inference_steps=4, guidance_scale=2.0, guidance_interval=0.0)
    assert asked == [6] * 4
    asked.clear()
    sample(generator, 3, num_inference_steps=4, guidance_scale=2.0, guidance_interval=0.7)
    assert asked == [6, 6, 3, 3]  # at 100, 75, 50 and 25 % of the schedule
    asked.clear()
    sample(generator, 3, num_inference_steps=2, guidance_scale=1.0)
    assert asked == [3] * 2
    usual = Generate()  # the prototype drew one picture at a time, in 50 steps
    assert usual.pool.batch >= 8
    assert usual.num_inference_steps <= 20


def test_sample_with_another_seed_or_key_differs(generator: Generator):
    ground, keys = ground_of(1), raw_batch(1)["key"]
    three = Sampling(num_inference_steps=3)
    first = generator.eval().sample(ground, keys, three)
    assert torch.equal(first, generator.sample(ground, keys, three))
    other = generator.sample(ground, keys, Sampling(num_inference_steps=3, seed=1))
    assert (first - other).abs().max() > 0.01
    assert (first - generator.sample(ground, keys + 1, three)).abs().max() > 0.01


def test_sample_goes_through_the_trained_projection(generator: Generator):
    make_informative(generator)
    before = sample(generator)
    with torch.no_grad():
        generator.conditioner.project.weight.neg_()
    assert (sample(generator) - before).abs().max() > 0.01


def test_sample_of_another_panorama_differs(toy: str):
    torch.manual_seed(1)
    generator = make_generator(toy, Conditioning(panorama_width=256)).eval()
    with torch.no_grad():
        generator.conditioner.project.weight.mul_(20)
    ground, keys = ground_of(2), raw_batch(2)["key"]
    right = generator.sample(ground, keys, Sampling(num_inference_steps=3))
    shuffled = generator.sample(ground.roll(1, 0), keys, Sampling(num_inference_steps=3))
    assert (right - shuffled).abs().max() > 1e-3


def test_sample_guidance_moves_away_from_the_null(generator: Generator):
    make_informative(generator)
    one, two = sample(generator, guidance_scale=1.0), sample(generator, guidance_scale=2.0)
    zero = sample(generator, guidance_scale=0.0, guidance_interval=0.0)
    assert (one - two).abs().max() > 0.01
    with torch.no_grad():  # at guidance 0 the condition has no say
        generator.conditioner.project.weight.neg_()
    torch.testing.assert_close(sample(generator, guidance_scale=0.0, guidance_interval=0.0), zero)


def test_sample_below_its_least_noise_has_no_guidance(generator: Generator):
    make_informative(generator)
    plain = sample(generator, guidance_scale=1.0)
    late = sample(generator, guidance_scale=3.0, guidance_interval=1.0)
    assert torch.equal(late, plain)  # pure noise is just under 100 %
    strong = sample(generator, guidance_scale=3.0, guidance_interval=0.9)
    assert (strong - plain).abs().max() > 0.01
    for interval in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"guidance_interval in \[0, 1\]"):
            Sampling(guidance_interval=interval)


@torch.no_grad()
def test_sample_that_nothing_guides_is_the_solvers_alone(toy: str):
    torch.manual_seed(1)
    generator = make_generator(toy, prediction="v_prediction").eval()
    noisy: list[torch.Tensor] = []
    hook = generator.unet.register_forward_pre_hook(lambda unet, given: noisy.append(given[0]))
    drawn = sample(generator, num_inference_steps=12, guidance_scale=1.0)
    hook.remove()
    solver = generator.schedule.solver(12)
    latent, condition = noisy[0][:, :4], condition_of(generator, ground_of(2))
    for step in solver.timesteps:
        answer = generator.predict(latent, step.expand(2), condition)
        latent = solver.step(answer, step, latent, return_dict=False)[0]
    torch.testing.assert_close(drawn, generator.encoders.decode(latent).clamp(0, 1))


def test_sample_follows_the_low_frequencies_of_the_bev_map(toy: str):
    torch.manual_seed(0)
    plain = make_generator(toy).eval()
    mixed = make_generator(toy, replace(CONDITIONING, low_freq_cells=8)).eval()
    mixed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        target = present(mixed.low_freq_target(condition_of(mixed, ground_of(3))))
    latents = []
    for model in (plain, mixed):
        decoder = model.encoders.vae.post_quant_conv
        hook = decoder.register_forward_pre_hook(lambda part, given: latents.append(given[0]))
        sample(model, 3)
        hook.remove()
    scale = plain.encoders.vae.config["scaling_factor"]
    apart = [(F.adaptive_avg_pool2d(x * scale, 8) - target).abs().mean() for x in latents]
    assert apart[1] < 0.5 * apart[0]


@pytest.mark.parametrize(("steps", "guided"), [(2, True), (8, False)])
def test_last_step_of_a_sample_is_guided_if_it_is_noisy_alone(toy: str, steps: int, guided: bool):
    torch.manual_seed(0)
    model = make_generator(toy, replace(CONDITIONING, low_freq_cells=8)).eval()
    seen: dict[str, torch.Tensor] = {}
    model.unet.register_forward_hook(
        lambda unet, given, out: seen.update(noisy=given[0], step=given[1], answer=out.sample)
    )
    model.encoders.vae.post_quant_conv.register_forward_pre_hook(
        lambda part, given: seen.update(drawn=given[0])
    )
    sample(model, 2, num_inference_steps=steps, guidance_scale=1.0)
    answered = model.schedule.predict_x0(seen["noisy"][:, :4], seen["answer"], seen["step"])
    drawn = seen["drawn"] * model.encoders.vae.config["scaling_factor"]
    assert ((drawn - answered).abs().max() > 0.05) == guided


def test_generator_saved_and_loaded_draws_the_same(generator: Generator, tmp_path):
    make_informative(generator)
    expected = sample(generator)
    generator.save(str(tmp_path))
    loaded = Generator.load(str(tmp_path))
    assert loaded.conditioning == CONDITIONING
    assert not loaded.training
    torch.testing.assert_close(sample(loaded), expected)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["unet", "vae", "scheduler", "clip", "conditioner.json", "conditioner.safetensors"]
    )


def test_generator_load_of_a_base_model_says_what_is_expected(toy: str):
    with pytest.raises(ValueError, match="train-generator"):
        Generator.load(os.path.join(toy, "diffusion"))


def test_generator_of_stable_diffusion_and_clip_has_the_published_sizes():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(320, 640, 1280, 1280),
        )
        vae = make_vae((128, 256, 512, 512), layers_per_block=2, sample_size=512)
        clip = CLIPVisionModel(CLIPVisionConfig(patch_size=32))
    assert (_count(unet), _count(vae), _count(clip)) == (859.5, 83.7, 87.5)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    encoders = FrozenEncoders(clip, CLIPImageProcessor(), vae, 1232)
    model = Generator(encoders, unet, NoiseSchedule(scheduler), Conditioning())
    assert (model.tile_size, model.latent_shape) == (512, (4, 64, 64))
    assert model.panorama_size == (224, 1232)
    assert model.unet.conv_in.weight.shape == (320, 4 + 24, 3, 3)
    assert model.conditioner.project.weight.shape == (768, 768)
    assert model.conditioner.positions.shape[0] == 6 * (7 * 7 + 1)


def test_generator_of_another_format_says_so(generator: Generator, tmp_path):
    generator.save(str(tmp_path))
    path = tmp_path / "conditioner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT - 1}))
    with pytest.raises(ValueError, match=f"expected format {FORMAT}, got {FORMAT - 1}"):
        Generator.load(str(tmp_path))
