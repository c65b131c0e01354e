"""Noise schedule, velocity, their closed forms, and low-frequency guidance."""

import pytest
import torch
from torch.nn import functional as F

from cvmatch.generate.diffusion import blend_low_freq
from tests.helpers.generator import Prediction, make_generator, write_base


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_x0_of_the_true_target_is_the_latent(tmp_path, prediction: Prediction):
    write_base(str(tmp_path), prediction)
    model = make_generator(str(tmp_path))
    latent, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    step = torch.tensor([5, 400, 800])
    noisy = model.schedule.add_noise(latent, noise, step)
    a = model.schedule.alphas_cumprod[step][:, None, None, None]
    torch.testing.assert_close(noisy, a.sqrt() * latent + (1 - a).sqrt() * noise)
    target = model.schedule.target(latent, noise, step)
    velocity = a.sqrt() * noise - (1 - a).sqrt() * latent
    torch.testing.assert_close(target, velocity if prediction == "v_prediction" else noise)
    x0 = model.schedule.predict_x0(noisy, target, step)
    torch.testing.assert_close(x0, latent, atol=1e-4, rtol=1e-3)


def test_blend_low_freq_keeps_high_frequencies():
    torch.manual_seed(0)
    wide, target = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    fine = torch.randn(2, 4, 32, 32)
    fine -= F.interpolate(F.adaptive_avg_pool2d(fine, 2), (32, 32), mode="nearest")
    clean = F.interpolate(wide, (32, 32), mode="bicubic") + fine
    found = blend_low_freq(clean, target)
    before, after = ((F.adaptive_avg_pool2d(x, 2) - target).abs().mean() for x in (clean, found))
    assert after < 0.6 * before
    # What changed is smooth: neighbours of 32 cells changed alike.
    moved = found - clean
    assert moved.diff(dim=-1).abs().max() < 0.15 * (moved.max() - moved.min())


def test_prediction_from_x0_is_the_one_that_implies_x0(toy: str):
    torch.manual_seed(0)
    step = torch.tensor([50, 500, 999])
    noisy, clean = torch.randn(2, 3, 4, 8, 8)
    for prediction in ("epsilon", "v_prediction"):
        noise = make_generator(toy, prediction=prediction).schedule
        model_pred = noise.prediction_from_x0(noisy, clean, step)
        torch.testing.assert_close(
            noise.predict_x0(noisy, model_pred, step)[:2], clean[:2], atol=1e-4, rtol=1e-4
        )
