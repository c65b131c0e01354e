"""The generator: conditioning, losses with gradient, sampling by key, and the real sizes."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as reference
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from ray.train import Checkpoint
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers
from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip import CLIPConfig, CLIPTextConfig

from cvmatch.data import geometry, images, schema
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.generate import finetune, infer, losses, low_freq_guidance, pretrained
from cvmatch.generate.augment import varied
from cvmatch.generate.batches import decode, decode_batch
from cvmatch.generate.bev import Rays, token_places
from cvmatch.generate.bev_task import RaysTask
from cvmatch.generate.conditioning import Condition, Seen
from cvmatch.generate.diffusion import Noise
from cvmatch.generate.encoders import Frozen
from cvmatch.generate.latent_cache import encode
from cvmatch.generate.latent_rows import encoded
from cvmatch.generate.model import Generator, widen
from cvmatch.generate.negatives import Rivals, told_apart
from cvmatch.generate.perceptual import Lpips, published_weights
from cvmatch.generate.settings import (
    Conditioning,
    Encode,
    Generate,
    Prediction,
    Recipe,
    Sampling,
    TrainGenerator,
)
from cvmatch.generate.task import VALIDATION, GeneratorTask
from cvmatch.generate.train import build_task, located, train
from cvmatch.nn import backbones, metrics, rng
from cvmatch.runtime.settings import Pool
from cvmatch.training import loop
from cvmatch.training.metrics import LossCurve, MeanMetrics
from cvmatch.training.settings import TrainConfig

PANORAMA = (64, 256)
# gain 1: these tests give the map's weights themselves, or their own learning rate. coarse 0: they
# look at what the UNet draws.
TOY = Conditioning(panorama_width=256, crops=4, gain=1.0, coarse=0)


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
    )


def _clip_sizes() -> dict[str, int]:
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": 32,
    }


def _write(directory: str, prediction: str = "epsilon") -> None:
    _unet().save_pretrained(os.path.join(directory, "diffusion", "unet"))
    _vae().save_pretrained(os.path.join(directory, "diffusion", "vae"))
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    scheduler.save_pretrained(os.path.join(directory, "diffusion", "scheduler"))
    clip = os.path.join(directory, "clip")
    CLIPVisionModel(CLIPVisionConfig(**_clip_sizes())).save_pretrained(clip)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)
    processor.save_pretrained(clip)


def _base(
    directory: str, conditioning: Conditioning = TOY, prediction: Prediction = "base"
) -> Generator:
    folders = (os.path.join(directory, name) for name in ("diffusion", "clip"))
    return Generator.base(*folders, conditioning, prediction=prediction)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    directory = str(tmp_path_factory.mktemp("base"))
    _write(directory)
    return directory


@pytest.fixture
def generator(toy: str) -> Generator:
    torch.manual_seed(1)
    return _base(toy)


@pytest.fixture(scope="module")
def perceptual() -> Lpips:
    torch.manual_seed(2)
    return Lpips(make_layers([8, "M", 16, "M"], batch_norm=False))


def _batch(rows: int, first: int = 0, epoch: int = 0) -> dict[str, torch.Tensor]:
    keys = [rng.row_key(f"{first + row:07d}") for row in range(rows)]
    key = torch.tensor(keys, dtype=torch.int64)
    pixels = rng.uniform(key, 7, 3, 8, 8)
    tile = torch.nn.functional.interpolate(pixels, (64, 64), mode="bilinear")
    ground = torch.nn.functional.interpolate(pixels, PANORAMA, mode="bilinear")
    return {
        "ground": (ground * 255).byte(),
        "aerial": (tile * 255).byte(),
        "classes": (tile[:, 0] * len(schema.PALETTE)).byte(),
        "key": key,
        "epoch": torch.tensor(epoch),
    }


def _ground(rows: int, first: int = 0) -> torch.Tensor:
    return _batch(rows, first)["ground"].float() / 255


def _condition(generator: Generator, ground: torch.Tensor) -> Condition:
    return generator.condition(generator.frozen.look(ground))


def _train(
    generator: Generator, perceptual: Lpips | None = None, **changes: object
) -> GeneratorTask:
    options = {
        "conditioning": generator.conditioning,
        "image_every": 1,
        "image_signal": 0.0,
    } | changes
    return GeneratorTask(generator, TrainGenerator(**options), perceptual).train()


class Alone:
    """The place of a worker that has these batches, and whose checkpoints go nowhere."""

    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self, batches: Sequence[dict[str, torch.Tensor]]):
        self.batches = batches

    def shard(self, name):
        return SimpleNamespace(iter_torch_batches=lambda **options: iter(self.batches))

    def commit(self, metrics, directory):
        pass

    def latest(self):
        return None


def _trainee(
    task: GeneratorTask, batches: Sequence[dict[str, torch.Tensor]] = (), **options: object
) -> loop.Trainer:
    job = loop.TrainJob(
        build=lambda: task,
        fit=TrainConfig(shuffle=0, **options),
        steps=len(batches),
        validate=False,
        directory="",
        resume=0,
        until=1,
    )
    return loop.Trainer(job, Alone(batches))


def _summary(task: GeneratorTask, *batches: dict[str, torch.Tensor]) -> dict:
    means = MeanMetrics()
    with torch.no_grad():
        for batch in batches:
            means.add(task(batch), len(batch["key"]))
    return task.summary(means.reduce(1))


# Conditioning


def test_unet_widened_for_the_map_answers_as_the_base_unet(toy: str, generator: Generator):
    base = UNet2DConditionModel.from_pretrained(os.path.join(toy, "diffusion", "unet")).eval()
    condition = _condition(generator, _ground(2))
    noisy, step = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    expected = base(noisy, step, encoder_hidden_states=condition.tokens).sample
    assert condition.map is not None
    assert condition.map.abs().max() > 0.01  # the map is there, and does not matter yet
    assert torch.equal(generator.eval().predict(noisy, step, condition), expected)


def test_gain_is_a_louder_map(toy: str, generator: Generator):
    _informative(generator)
    loud = _base(toy, replace(TOY, gain=3.0))
    loud.load_state_dict(generator.state_dict())
    condition = _condition(generator, _ground(2))
    assert condition.map is not None
    tripled = Condition(condition.tokens, 3 * condition.map)
    noisy, step = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    found = loud.eval().predict(noisy, step, condition)
    torch.testing.assert_close(found, generator.eval().predict(noisy, step, tripled))
    assert (found - generator.predict(noisy, step, condition)).abs().max() > 0.01


def test_gain_that_would_silence_the_map_is_refused():
    with pytest.raises(ValueError, match="gain above 0, got 0"):
        Conditioning(gain=0.0)
    with pytest.raises(ValueError, match="coarse of at least 0, got -1"):
        Conditioning(coarse=-1)


def test_unet_with_more_inputs_than_the_mode_needs_is_refused(generator: Generator):
    with pytest.raises(ValueError, match="28 input channels, expected at most 4"):
        widen(generator.unet, 4)


def test_condition_has_all_tokens_of_all_crops(toy: str, generator: Generator):
    assert _condition(generator, _ground(2)).tokens.shape == (2, 4 * (64 + 1), 64)
    pooled = _base(toy, Conditioning(mode="pooled", panorama_width=256, crops=4))
    assert _condition(pooled, _ground(2)).tokens.shape == (2, 1, 64)
    assert _condition(pooled, _ground(2)).map is None


def test_condition_each_crop_has_tokens_of_its_own(generator: Generator):
    ground = _ground(1)
    painted = ground.clone()
    painted[..., 32:96] = 1 - painted[..., 32:96]  # the second of four crops, which looks west
    before, after = (_condition(generator, g).tokens.view(4, 65, 64) for g in (ground, painted))
    changed = (after - before).abs().amax(-1) > 1e-4
    assert changed[1].all()
    assert not changed[[0, 2, 3]].any()


def test_condition_of_stored_states_equals_that_of_the_panorama(generator: Generator):
    ground = _ground(2)
    stored = generator.condition(Seen(*(value.clone() for value in generator.frozen.look(ground))))
    assert torch.equal(stored.tokens, _condition(generator, ground).tokens)


def test_condition_of_another_panorama_size_says_which_is_expected(generator: Generator):
    with pytest.raises(ValueError, match=r"expected panoramas of \(64, 256\)"):
        _condition(generator, torch.zeros(1, 3, 64, 128))


def test_conditioning_with_crops_that_leave_a_gap_is_refused(toy: str):
    with pytest.raises(ValueError, match=r"--conditioning\.crops 4"):
        _base(toy, Conditioning(panorama_width=256, crops=3))


def test_token_places_look_south_west_north_east_at_the_crop_centres():
    azimuth, elevation = token_places(64, 256, 4, 8)
    heading = azimuth.view(4, 65)[:, 0].rad2deg() % 360
    torch.testing.assert_close(heading, torch.tensor([180.0, 270.0, 0.0, 90.0]))
    first = azimuth.view(4, 65)[0, 1:].view(8, 8)
    torch.testing.assert_close(first.diff(dim=1), torch.full((8, 7), 8 / 256 * 2 * torch.pi))
    rows = elevation.view(4, 65)[0, 1:].view(8, 8)[:, 0]
    torch.testing.assert_close(rows[[0, -1]], torch.tensor([0.875, -0.875]))


def test_rays_of_a_turned_panorama_are_the_turned_map():
    torch.manual_seed(0)
    rays, ground = Rays(4).eval(), _ground(2)
    turned = rays(torch.roll(ground, -64, dims=-1), 16)
    torch.testing.assert_close(turned, rays(ground, 16).rot90(1, (-2, -1)), atol=1e-4, rtol=1e-3)


def test_rays_bright_northern_columns_change_only_the_northern_part_most():
    torch.manual_seed(0)
    rays, ground = Rays(4).eval(), torch.full((1, 3, *PANORAMA), 0.5)
    changed = ground.clone()
    changed[..., 120:136] = 1.0  # around the middle column: north
    difference = (rays(changed, 16) - rays(ground, 16)).abs().mean(dim=1)[0]
    assert difference[:4, 6:10].mean() > 2 * difference[-4:, 6:10].mean()


def test_dropped_condition_is_the_null_and_an_empty_map(generator: Generator):
    with torch.no_grad():
        generator.conditioner.null.copy_(torch.arange(64.0))
    condition = _condition(generator, _ground(2))
    half = generator.conditioner.dropped(condition, torch.tensor([True, False]))
    assert half.map is not None
    assert torch.equal(half.tokens[0], condition.tokens[0])
    assert torch.equal(half.tokens[1], torch.arange(64.0).expand(260, 64))
    assert half.map[0].abs().sum() > 0
    assert half.map[1].abs().sum() == 0


def test_clip_of_a_whole_checkpoint_gives_the_vision_tower(tmp_path):
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
    )
    both = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=CLIPVisionConfig(**_clip_sizes()).to_dict(),
        projection_dim=32,
    )
    whole = CLIPModel(both).eval()
    whole.save_pretrained(tmp_path)
    vision = CLIPVisionModel.from_pretrained(tmp_path, use_safetensors=True).eval()
    pixels = torch.randn(1, 3, 64, 64)
    expected = whole.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(vision(pixels).last_hidden_state, expected)
    assert CLIPVisionConfig.from_pretrained(tmp_path).image_size == 64


# Noise, velocity and their closed forms


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clean_of_the_true_answer_is_the_latent(tmp_path, prediction: str):
    _write(str(tmp_path), prediction)
    model = _base(str(tmp_path))
    latent, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    step = torch.tensor([5, 400, 800])
    noisy, target = model.noise.add(latent, noise, step), model.noise.target(latent, noise, step)
    torch.testing.assert_close(noisy, model.noise.scheduler.add_noise(latent, noise, step))
    if prediction == "v_prediction":
        torch.testing.assert_close(target, model.noise.scheduler.get_velocity(latent, noise, step))
    torch.testing.assert_close(model.noise.clean(noisy, target, step), latent, atol=1e-4, rtol=1e-3)


def test_scheduler_that_predicts_the_sample_is_refused(tmp_path):
    _write(str(tmp_path), "sample")
    with pytest.raises(ValueError, match="expected 'epsilon' or 'v_prediction'"):
        _base(str(tmp_path))


# Losses


TERMS = ("noise", "clip", "vae", "map", "contrast", "classes", "identify")


@pytest.mark.parametrize("term", TERMS)
def test_loss_each_term_alone_has_gradient_into_what_it_trains(
    generator: Generator, perceptual: Lpips, term: str
):
    weights = {f"w_{name}": 0.0 for name in TERMS} | {f"w_{term}": 1.0}
    task = _train(generator, perceptual, **weights, identify_noise=0.0, drop=0.0)
    task(_batch(4))["loss"].backward()
    of_rays = term in ("map", "contrast", "classes")
    trained = generator.conditioner.rays if of_rays else generator.unet
    gradient = [weight.grad for weight in trained.parameters() if weight.grad is not None]
    total = sum(part.abs().sum() for part in gradient)
    assert torch.isfinite(total)
    assert total > 1e-6
    assert all(weight.grad is None for weight in generator.frozen.clip.parameters())
    assert all(weight.grad is None for weight in generator.frozen.vae.parameters())


def test_loss_gradient_reaches_projection_and_rays_once_the_map_has_weight(generator: Generator):
    task = _train(
        generator, w_clip=0.0, w_vae=0.0, w_map=0.0, w_contrast=0.0, w_classes=0.0, drop=0.0
    )
    task(_batch(4))["loss"].backward()
    conditioner = generator.conditioner
    assert conditioner.project.weight.grad.abs().sum() > 0
    assert conditioner.rays.leave.weight.grad.abs().sum() == 0  # zero-initialised: a step later
    assert generator.unet.conv_in.weight.grad[:, 4:].abs().sum() > 0
    with torch.no_grad():
        generator.unet.conv_in.weight[:, 4:] += 0.01
    task(_batch(4))["loss"].backward()
    assert conditioner.rays.leave.weight.grad.abs().sum() > 0


def test_loss_every_trained_weight_takes_part_in_every_step(
    generator: Generator, perceptual: Lpips
):
    task = _train(generator, perceptual, image_every=2)
    for _ in range(2):  # DDP hangs or raises where a worker leaves a weight out
        task.zero_grad()
        task(_batch(2))["loss"].backward()
        groups = [weight for group in task.groups() for weight in group["params"]]
        assert all(weight.grad is not None for weight in groups)
    trained = {id(weight) for weight in task.parameters() if weight.requires_grad}
    assert trained == {id(weight) for weight in groups}


def test_loss_attention_only_trains_cross_attention_and_the_input(generator: Generator):
    task = _train(generator, w_vae=0.0, train_unet="attention")
    trained = [n for n, weight in generator.unet.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".attn2." in name or name.startswith("conv_in.") for name in trained)
    assert len(task.groups()[0]["params"]) == len(trained)


def test_loss_image_terms_act_every_few_steps_on_a_few_rows(
    generator: Generator, perceptual: Lpips
):
    task = _train(generator, perceptual, image_every=2, image_rows=2)
    names = [set(task(_batch(3))) for _ in range(3)]
    assert [{"clip", "vae"} <= found for found in names] == [True, False, True]


def test_image_rows_leave_out_rows_of_little_signal():
    signal, draw = torch.tensor([0.1, 0.9, 0.5, 0.4]), torch.tensor([0.0, 0.7, 0.2, 0.9])
    rows, strength = losses.image_rows(signal, draw, 2, 0.3)
    assert rows.tolist() == [2, 1]
    torch.testing.assert_close(strength, torch.tensor([0.5, 0.9]))
    rows, strength = losses.image_rows(signal, draw, 2, 0.6)
    assert rows.tolist() == [1, 0]
    torch.testing.assert_close(strength, torch.tensor([0.9, 0.0]))


def test_loss_of_a_row_does_not_depend_on_its_batch(generator: Generator):
    task = _train(generator, w_clip=0.0, w_vae=0.0, w_contrast=0.0, image_every=1)
    whole = task(_batch(4, epoch=3))["noise"]
    rows = [task(_batch(1, first=row, epoch=3))["noise"] for row in range(4)]
    torch.testing.assert_close(torch.stack(rows).mean(), whole, atol=1e-5, rtol=1e-4)
    other = task(_batch(4, epoch=4))["noise"]
    assert (other - whole).abs() > 1e-4  # another epoch draws other noise


def test_loss_with_stored_latents_and_states_equals_the_live_one(generator: Generator):
    task, batch = _train(generator, w_clip=0.0, w_vae=0.0, rivals=0), _batch(2)
    generator.conditioner.rays.eval()  # no dropout
    live = task(batch)["loss"]
    batch["latent"] = generator.frozen.encode(batch["aerial"].float() / 255)[:, None]
    batch["states"] = generator.frozen.look(batch["ground"].float() / 255).states[:, None]
    torch.testing.assert_close(task(batch)["loss"], live)


def test_told_apart_rewards_drawings_nearest_to_their_own_tile():
    true = torch.nn.functional.adaptive_avg_pool2d(_batch(6)["aerial"].float() / 127.5 - 1, 8)
    everyone = torch.ones(6, dtype=torch.bool)
    assert told_apart(true, true, everyone) < 0.1
    assert told_apart(true.roll(1, 0), true, everyone) > 2
    # A drawing that is left out neither counts nor rivals: here, row 0 is a copy of row 1's.
    copied = torch.cat([true[1:2], true[1:]])
    others = everyone.clone()
    others[0] = False
    assert told_apart(copied, true, others) < 0.1 < told_apart(copied, true, everyone)
    assert told_apart(true, true, ~everyone) == 0


def test_rivals_of_earlier_steps_make_a_drawing_like_theirs_worse_but_not_the_own_tile():
    tiles = _batch(4)["aerial"].float() / 255
    drawn, mine = tiles[:2] * 0.5 + tiles[2:] * 0.5, torch.ones(2, dtype=torch.bool)
    rivals = Rivals(tiles=2, size=16)
    keys = torch.tensor([1, 2])

    def seen_as(keys: torch.Tensor) -> float:
        return float(told_apart(drawn, tiles[:2], mine, rivals.known(keys)))

    alone = float(told_apart(drawn, tiles[:2], mine))
    assert seen_as(keys) == pytest.approx(alone)  # empty
    rivals.remember(torch.tensor([3, 4]), tiles[2:])
    both = seen_as(keys)
    assert both > alone + 0.01
    assert seen_as(torch.tensor([3, 4])) < both  # a tile is no rival of its own panorama
    rivals.remember(torch.tensor([5, 6]), 1 - tiles[2:])  # two fit: the first ones are gone
    assert seen_as(keys) < both


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_clean_latent(toy: str, prediction: str):
    noise = _base(toy, prediction=prediction).noise
    latent, step = torch.randn(3, 4, 4, 4), torch.tensor([20, 500, 980])
    error = torch.randn_like(latent)
    other = torch.randn_like(latent)
    answer = noise.target(latent, other, step) + error
    wrong = noise.clean(noise.add(latent, other, step), answer, step) - latent
    ratio = noise.signal[step] / (1 - noise.signal[step])
    expected = ratio.clamp(max=5) * wrong.square().mean(dim=(1, 2, 3))
    found = noise.weight(step, 5.0) * error.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(noise.weight(step, 0.0), torch.ones(3))


def test_variant_of_a_row_turns_its_latent_panorama_and_tile_alike(toy: str):
    """Stored variants and live encoding of the turned pair give the same loss."""
    generator = _base(toy, prediction="v_prediction")  # whose target is made of the latent
    generator.frozen.vae.register_to_config(scaling_factor=10.0)  # about unit variance
    task = _train(generator, w_clip=0.0, w_vae=0.0, rivals=0, turns=True, mirror=True)
    plain = _train(generator, w_clip=0.0, w_vae=0.0, rivals=0)
    generator.conditioner.rays.eval()  # no dropout
    batch = _batch(6)
    live = task(batch)["loss"]
    ground, tile = batch["ground"].float() / 255, batch["aerial"].float() / 255
    latents, states = [], []
    for mirror in (False, True):
        for turns in range(4):
            how = torch.full((6,), turns), torch.full((6,), mirror)
            latents.append(generator.frozen.encode(geometry.rotate90_tile(tile, *how)))
            states.append(generator.frozen.look(geometry.rotate90_panorama(ground, *how)).states)
    stored = {"latent": torch.stack(latents, 1), "states": torch.stack(states, 1)}
    torch.testing.assert_close(task(batch | stored)["loss"], live, rtol=1e-5, atol=1e-5)
    other = stored | {"latent": stored["latent"].roll(1, 1)}
    assert (task(batch | other)["loss"] - live).abs() > 1e-3
    assert (plain(batch)["loss"] - live).abs() > 1e-3


def test_variant_of_a_row_turns_its_class_map_with_its_tile():
    batch = _batch(8)
    batch["classes"] = batch["aerial"][:, 0]
    pairs = varied(batch, Recipe(turns=True, mirror=True), seed=0)
    assert len(pairs.variant.unique()) > 3
    assert torch.equal(pairs.classes, (pairs.tile[:, 0] * 255).round().byte())
    assert not torch.equal(pairs.classes, batch["classes"])


def _running_mean(seen: list[torch.Tensor]) -> torch.Tensor:
    """With a decay of 0.9."""
    mean = seen[0]
    for count, value in enumerate(seen):
        decay = min(0.9, (1 + count) / (10 + count))
        mean = decay * mean + (1 - decay) * value
    return mean


def test_average_is_what_is_validated_and_saved_and_survives_a_resume(
    generator: Generator, tmp_path
):
    task = _train(generator, w_clip=0.0, w_vae=0.0, lr=1e-2, ema=0.9, judge=0)
    optimizer = torch.optim.SGD(task.groups(), lr=1e-2)
    seen = []
    for _ in range(3):
        seen.append(generator.unet.conv_out.weight.detach().clone())
        optimizer.zero_grad()
        task(_batch(2))["loss"].backward()
        optimizer.step()
    mean = _running_mean(seen)
    task.save(str(tmp_path))
    saved = Generator.load(str(tmp_path)).unet.conv_out.weight
    torch.testing.assert_close(saved, mean)
    again = GeneratorTask(generator, task.recipe)
    again.load_state_dict(task.state_dict())
    torch.testing.assert_close(again.published().unet.conv_out.weight, mean)
    assert torch.equal(generator.unet.conv_out.weight, task.generator.unet.conv_out.weight)


def test_average_counts_weights_once_however_many_steps_make_a_move(generator: Generator, tmp_path):
    task = _train(generator, w_clip=0.0, w_vae=0.0, lr=1e-2, ema=0.9)
    batches = [_batch(2, first=2 * step) for step in range(6)]
    trainee = _trainee(task, batches, batch=2, accumulate=4)
    weight, seen = generator.unet.conv_out.weight, []
    trainee.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    trainee.train(0, LossCurve(str(tmp_path), steps=6, epochs=1, writes=False))
    assert len(seen) == 2  # of four steps, and of two
    assert (seen[1] - seen[0]).abs().max() > 1e-3
    torch.testing.assert_close(task.published().unet.conv_out.weight, _running_mean(seen))


def test_average_of_clip_is_what_is_validated(generator: Generator, tmp_path):
    _informative(generator)
    options = {"w_clip": 0.0, "w_vae": 0.0, "encode": "live", "judge": 0}
    task = _train(generator, train_clip=1, ema=0.9, **options)
    task(_batch(2))
    with torch.no_grad():  # after the step that the mean knows
        for weight in generator.frozen.clip.encoder.layers[-1].parameters():
            weight.add_(torch.randn_like(weight))
    task.save(str(tmp_path))
    published = _train(Generator.load(str(tmp_path)), **options)
    found, expected = (_summary(t.eval(), _batch(2))["loss_correct"] for t in (task, published))
    assert found == pytest.approx(expected, rel=1e-4)


def test_state_holds_every_trained_weight_and_no_frozen_one(
    generator: Generator, perceptual: Lpips, tmp_path
):
    task = _train(generator, perceptual)
    trainee = _trainee(task)
    trainee.save(str(tmp_path), 1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    weights = dict(task.named_parameters(remove_duplicate=False))  # CLIP and VAE have two names
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    assert weights.keys() & state["model"].keys() == trained
    state["model"] |= {name: weights[name] for name in weights.keys() - trained}
    torch.save(state, tmp_path / "state.pt")  # as it was written before
    before = generator.unet.conv_out.weight.detach().clone()
    with torch.no_grad():
        generator.unet.conv_out.weight.add_(1)
    assert trainee.load(Checkpoint(str(tmp_path))) == 1
    assert torch.equal(generator.unet.conv_out.weight, before)


def test_lora_trains_adapters_and_publishes_a_plain_unet(generator: Generator, tmp_path):
    before = generator.unet.state_dict()
    task = _train(generator, w_clip=0.0, w_vae=0.0, train_unet="lora", lora_rank=2, lr=1e-2)
    trained = [n for n, weight in generator.unet.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name or name.startswith("conv_in.") for name in trained)
    optimizer = torch.optim.Adam(task.groups())
    for _ in range(3):
        optimizer.zero_grad()
        task(_batch(2))["loss"].backward()
        optimizer.step()
    task.save(str(tmp_path))
    plain = Generator.load(str(tmp_path))
    assert plain.unet.state_dict().keys() == before.keys()
    condition = _condition(generator.eval(), _ground(2))
    noisy, step = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    found = plain.predict(noisy, step, condition)
    torch.testing.assert_close(found, generator.predict(noisy, step, condition))
    generator.unet.disable_adapters()
    assert (found - generator.predict(noisy, step, condition)).abs().max() > 1e-3


def test_last_layers_of_clip_learn_where_asked_and_do_not_judge(
    generator: Generator, perceptual: Lpips
):
    task = _train(generator, perceptual, train_clip=1, encode="live", drop=0.0)
    task(_batch(2))["loss"].backward()
    layers = generator.frozen.clip.encoder.layers
    assert sum(weight.grad.abs().sum() for weight in layers[-1].parameters()) > 0
    assert all(weight.grad is None for weight in layers[0].parameters())
    assert all(weight.grad is None for weight in task.judging.parameters())
    grouped = {id(weight) for group in task.groups() for weight in group["params"]}
    assert {id(weight) for weight in layers[-1].parameters()} <= grouped
    with pytest.raises(ValueError, match="at most 2"):
        finetune.choose(generator, "all", 4, 3)
    with pytest.raises(ValueError, match="--encode live"):
        TrainGenerator(train_clip=1)


def test_loss_training_on_one_batch_makes_the_right_panorama_better_than_a_shuffled_one(
    generator: Generator,
):
    torch.manual_seed(3)
    task = _train(generator, w_clip=0.0, w_vae=0.0, lr=2e-3, drop=0.0, w_noise=1.0)
    optimizer = torch.optim.Adam(task.groups())
    for epoch in range(40):
        optimizer.zero_grad()
        task(_batch(4, epoch=epoch))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        means = task.eval()(_batch(4))
    assert means["loss_shuffled"] > means["loss_correct"]
    assert task.summary(means)["gap"] > 0.005


def test_loss_validation_is_the_same_every_time(generator: Generator):
    task = _train(generator, w_vae=0.0).eval()
    with torch.no_grad():
        first, second = task(_batch(2, epoch=0)), task(_batch(2, epoch=5))
    assert torch.equal(first["loss_correct"], second["loss_correct"])
    averaged = {name for name in first if not name.startswith("rows/")}
    levels = {f"loss_{kind}/{at}" for kind in ("correct", "shuffled") for at in VALIDATION}
    whole = {"loss", "compared", "loss_correct", "loss_shuffled", "map", "contrast", "classes"}
    assert averaged == whole | levels


def test_gap_is_of_the_rows_that_have_another_row_in_their_batch(generator: Generator):
    _informative(generator)
    task = _train(generator, w_vae=0.0, judge=0).eval()
    both, first, second = _batch(2), _batch(1), _batch(1, first=1)
    pair, alone = _summary(task, both), _summary(task, first, second)
    mixed = _summary(task, both, first, second)  # the same rows again, each alone
    assert abs(pair["gap"]) > 1e-3
    for name in ("gap", "gap/0.8", "loss_shuffled", "loss_correct"):
        assert mixed[name] == pytest.approx(pair[name], rel=1e-3), name
    assert alone["loss_correct"] == pytest.approx(pair["loss_correct"], rel=1e-3)
    assert not [name for name in alone if "gap" in name or "shuffled" in name]


def test_drawing_of_rays_is_more_vivid_around_the_mean_colour_of_training():
    torch.manual_seed(0)
    rays = Rays(4)
    drawn, mean = torch.randn(6, 4, 8, 8), torch.tensor([0.7, 0.4, 0.2])
    tile = mean[:, None, None] + 0.1 * torch.randn(6, 3, 32, 32)
    mean = tile.mean(dim=(0, 2, 3))
    none = torch.full((6, 32, 32), schema.IGNORE, dtype=torch.uint8)
    for _ in range(120):  # fewer steps than the demo takes
        losses.map_terms(rays, drawn, tile, none)
    losses.map_terms(rays.eval(), drawn, 0 * tile, none)  # a validation, of which nothing is learnt
    with torch.no_grad():
        pale = rays.picture(drawn) / 2 + 0.5 - mean[:, None, None]
        vivid = rays.drawing(drawn) - mean[:, None, None]
    torch.testing.assert_close(vivid, 1.4 * pale, atol=2e-3, rtol=0)


def test_map_terms_of_the_true_tile_are_best():
    batch, kinds = _batch(6), len(schema.PALETTE)
    tile, classes = batch["aerial"].float() / 255, batch["classes"]
    named = F.one_hot(classes.long(), kinds).movedim(-1, 1).float()
    drawn = torch.cat([F.adaptive_avg_pool2d(tile * 2 - 1, 64), named], dim=1)
    rays = Rays(3 + kinds)  # whose map is the tile's colours, and its classes
    with torch.no_grad():
        for part, first in ((rays.picture, 0), (rays.classes, 3)):
            part.bias.zero_()
            part.weight.zero_()[:, first : first + len(part.weight), 0, 0] = torch.eye(
                len(part.weight)
            )
        rays.classes.weight.mul_(20)
    right = losses.map_terms(rays, drawn, tile, classes)
    wrong = losses.map_terms(rays, drawn.roll(1, 0), tile, classes)
    assert right["map"] < 1e-6 < wrong["map"]
    assert right["contrast"] < 0.1
    assert wrong["contrast"] > 2
    assert right["classes"] < 1e-6
    assert wrong["classes"] > 2


def test_class_term_is_the_cross_entropy_of_the_pixels_that_have_a_class():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4, 4)
    classes = torch.randint(0, 6, (2, 8, 8)).byte()
    classes[0, :3] = schema.IGNORE
    pixels = logits.repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected = F.cross_entropy(pixels, classes.long(), ignore_index=schema.IGNORE)
    torch.testing.assert_close(losses.class_term(logits, classes), expected)
    classes[:] = schema.IGNORE
    assert losses.class_term(logits, classes) == 0


def test_rays_task_learns_and_its_weights_fit_the_generator(generator: Generator, tmp_path):
    torch.manual_seed(0)
    task = RaysTask(Recipe(), 16, TOY.channels)
    optimizer = torch.optim.Adam(task.groups())
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(task(_batch(4))["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    task.save(str(tmp_path))
    from_task = task.rays.state_dict()
    generator.conditioner.rays.load_state_dict(from_task)


def test_frozen_rays_stay_as_they_were_pretrained(generator: Generator):
    task = _train(generator, w_vae=0.0, pretrain_rays=1, freeze_rays=True)
    task(_batch(4))["loss"].backward()
    assert all(weight.grad is None for weight in generator.conditioner.rays.parameters())
    assert generator.unet.conv_in.weight.grad[:, 4:].abs().max() > 0  # the map is still looked at
    with pytest.raises(ValueError, match="would stay random"):
        TrainGenerator(freeze_rays=True)


def test_lpips_equals_torchmetrics_with_the_same_random_weights():
    torch.manual_seed(0)
    features = make_layers(cfgs["D"], batch_norm=False)
    theirs = reference._LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    numbered = {
        name.split(".")[-2] + "." + name.split(".")[-1]: name for name in theirs.net.state_dict()
    }
    theirs.net.load_state_dict(
        {long: features.state_dict()[short] for short, long in numbered.items()}
    )
    ours = Lpips(features, published_weights())
    first, second = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    expected = theirs(first, second, normalize=True).flatten()
    assert expected.min() > 0
    torch.testing.assert_close(ours(first, second), expected, atol=1e-6, rtol=1e-4)


def test_lpips_of_equal_pictures_is_zero_and_of_others_is_not(perceptual: Lpips):
    picture = torch.rand(2, 3, 32, 32)
    assert perceptual(picture, picture).abs().max() == 0
    assert perceptual(picture, picture.flip(0)).min() > 0


# Sampling


def _draw(generator: Generator, rows: int = 2, first: int = 0, **options: object) -> torch.Tensor:
    batch = _batch(rows, first)
    sampling = Sampling(**{"steps": 3, **options})
    return generator.eval().sample(batch["ground"].float() / 255, batch["key"], sampling)


def _informative(generator: Generator) -> None:
    """Give the random toy a condition that matters, as training would."""
    with torch.no_grad():
        generator.conditioner.project.weight.mul_(20)
        generator.unet.conv_in.weight[:, 4:] += 0.05
        generator.conditioner.rays.leave.weight.mul_(20)


def test_sample_is_a_picture_of_the_tiles_size(generator: Generator):
    picture = _draw(generator)
    assert picture.shape == (2, 3, 64, 64)
    assert 0 <= picture.min() < picture.max() <= 1


def test_sample_does_not_depend_on_the_batch(generator: Generator):
    _informative(generator)
    whole = _draw(generator, 4)
    alone = torch.cat([_draw(generator, 1, first=row) for row in range(4)])
    torch.testing.assert_close(alone, whole, atol=1e-3, rtol=0)
    assert (whole[0] - whole[1]).abs().max() > 0.01


def test_sample_asks_the_unet_once_a_step_for_all_rows_and_both_conditions(generator: Generator):
    asked = []
    generator.unet.register_forward_pre_hook(lambda unet, given: asked.append(len(given[0])))
    _draw(generator, 3, steps=4, guidance=2.0, guided=0.0)
    assert asked == [6] * 4
    asked.clear()
    _draw(generator, 3, steps=4, guidance=2.0, guided=0.7)
    assert asked == [6, 6, 3, 3]  # at 100, 75, 50 and 25 % of the schedule
    asked.clear()
    _draw(generator, 3, steps=2, guidance=1.0)
    assert asked == [3] * 2
    usual = Generate()  # the prototype drew one picture at a time, in 50 steps
    assert usual.pool.batch >= 8
    assert usual.steps <= 20


def test_sample_with_another_seed_or_key_differs(generator: Generator):
    ground, keys = _ground(1), _batch(1)["key"]
    three = Sampling(steps=3)
    first = generator.eval().sample(ground, keys, three)
    assert torch.equal(first, generator.sample(ground, keys, three))
    other = generator.sample(ground, keys, Sampling(steps=3, seed=1))
    assert (first - other).abs().max() > 0.01
    assert (first - generator.sample(ground, keys + 1, three)).abs().max() > 0.01


def test_sample_goes_through_the_trained_projection(generator: Generator):
    _informative(generator)
    before = _draw(generator)
    with torch.no_grad():
        generator.conditioner.project.weight.neg_()
    assert (_draw(generator) - before).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["pooled", "tokens", "tokens+geometry"])
def test_sample_of_another_panorama_differs(toy: str, mode: str):
    torch.manual_seed(1)
    generator = _base(toy, Conditioning(mode=mode, panorama_width=256, crops=4)).eval()
    with torch.no_grad():
        generator.conditioner.project.weight.mul_(20)
    ground, keys = _ground(2), _batch(2)["key"]
    right = generator.sample(ground, keys, Sampling(steps=3))
    shuffled = generator.sample(ground.roll(1, 0), keys, Sampling(steps=3))
    assert (right - shuffled).abs().max() > 1e-3


def test_sample_guidance_moves_away_from_the_null(generator: Generator):
    _informative(generator)
    one, two = _draw(generator, guidance=1.0), _draw(generator, guidance=2.0)
    zero = _draw(generator, guidance=0.0, guided=0.0)
    assert (one - two).abs().max() > 0.01
    with torch.no_grad():  # at guidance 0 the condition has no say
        generator.conditioner.project.weight.neg_()
    torch.testing.assert_close(_draw(generator, guidance=0.0, guided=0.0), zero)


def test_sample_below_its_least_noise_has_no_guidance(generator: Generator):
    _informative(generator)
    plain, strong = _draw(generator, guidance=1.0), {"guidance": 3.0, "guided": 1.0}
    assert torch.equal(_draw(generator, **strong), plain)  # pure noise is just under 100 %
    assert (_draw(generator, guidance=3.0, guided=0.9) - plain).abs().max() > 0.01
    for guided in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"guided in \[0, 1\]"):
            Sampling(guided=guided)


@torch.no_grad()
def test_sample_that_nothing_guides_or_pulls_is_the_solvers_alone(toy: str):
    torch.manual_seed(1)
    generator = _base(toy, prediction="v_prediction").eval()
    noisy: list[torch.Tensor] = []
    hook = generator.unet.register_forward_pre_hook(lambda unet, given: noisy.append(given[0]))
    drawn = _draw(generator, steps=12, guidance=1.0)
    hook.remove()
    solver = generator.noise.solver(12)
    latent, condition = noisy[0][:, :4], _condition(generator, _ground(2))
    for step in solver.timesteps:
        answer = generator.predict(latent, step.expand(2), condition)
        latent = solver.step(answer, step, latent).prev_sample
    torch.testing.assert_close(drawn, generator.frozen.decode(latent).clamp(0, 1))


def test_sample_is_pulled_to_what_the_rays_draw_of_the_coarse(toy: str):
    torch.manual_seed(0)
    plain = _base(toy).eval()
    mixed = _base(toy, replace(TOY, coarse=8)).eval()
    mixed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        seen = plain.frozen.look(_ground(3))
        drawing = plain.conditioner.rays.drawing(plain.condition(seen).map)
        wanted = low_freq_guidance.reference(plain.frozen, drawing, plain.tile, 8)
    latents = []
    for model in (plain, mixed):
        decoder = model.frozen.vae.post_quant_conv
        hook = decoder.register_forward_pre_hook(lambda part, given: latents.append(given[0]))
        _draw(model, 3)
        hook.remove()
    scale = plain.frozen.vae.config["scaling_factor"]
    apart = [(F.adaptive_avg_pool2d(x * scale, 8) - wanted).abs().mean() for x in latents]
    assert apart[1] < 0.5 * apart[0]


@pytest.mark.parametrize(("steps", "pulled"), [(2, True), (8, False)])
def test_last_step_of_a_sample_is_pulled_if_it_is_noisy_alone(toy: str, steps: int, pulled: bool):
    torch.manual_seed(0)
    model = _base(toy, replace(TOY, coarse=8)).eval()
    seen: dict[str, torch.Tensor] = {}
    model.unet.register_forward_hook(
        lambda unet, given, out: seen.update(noisy=given[0], step=given[1], answer=out.sample)
    )
    model.frozen.vae.post_quant_conv.register_forward_pre_hook(
        lambda part, given: seen.update(drawn=given[0])
    )
    _draw(model, 2, steps=steps, guidance=1.0)
    answered = model.noise.clean(seen["noisy"][:, :4], seen["answer"], seen["step"])
    drawn = seen["drawn"] * model.frozen.vae.config["scaling_factor"]
    assert ((drawn - answered).abs().max() > 0.05) == pulled


def test_pulled_latents_keep_what_is_fine():
    torch.manual_seed(0)
    wide, wanted = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    fine = torch.randn(2, 4, 32, 32)
    fine -= F.interpolate(F.adaptive_avg_pool2d(fine, 2), (32, 32), mode="nearest")
    clean = F.interpolate(wide, (32, 32), mode="bicubic") + fine
    found = low_freq_guidance.pulled(clean, wanted)
    before, after = ((F.adaptive_avg_pool2d(x, 2) - wanted).abs().mean() for x in (clean, found))
    assert after < 0.6 * before
    # What changed is smooth: neighbours of 32 cells changed alike.
    moved = found - clean
    assert moved.diff(dim=-1).abs().max() < 0.15 * (moved.max() - moved.min())


def test_noise_implied_answer_is_the_one_that_gives_the_clean_latent(toy: str):
    torch.manual_seed(0)
    step = torch.tensor([50, 500, 999])
    noisy, clean = torch.randn(2, 3, 4, 8, 8)
    for prediction in ("epsilon", "v_prediction"):
        noise = _base(toy, prediction=prediction).noise
        answer = noise.implied(noisy, clean, step)
        torch.testing.assert_close(
            noise.clean(noisy, answer, step)[:2], clean[:2], atol=1e-4, rtol=1e-4
        )


def test_rays_that_do_not_learn_to_draw_give_no_coarse_part():
    with pytest.raises(ValueError, match=r"w_map above 0.*--conditioning.coarse 0"):
        TrainGenerator(w_map=0.0)
    TrainGenerator(w_map=0.0, conditioning=Conditioning(coarse=0))
    TrainGenerator(w_map=0.0, conditioning=Conditioning(mode="tokens"))


# Files


def test_generator_saved_and_loaded_draws_the_same(generator: Generator, tmp_path):
    _informative(generator)
    expected = _draw(generator)
    generator.save(str(tmp_path))
    loaded = Generator.load(str(tmp_path))
    assert loaded.conditioning == TOY
    assert not loaded.training
    torch.testing.assert_close(_draw(loaded), expected)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["unet", "vae", "scheduler", "clip", "conditioner.json", "conditioner.safetensors"]
    )


def test_generator_load_of_a_base_model_says_what_is_expected(toy: str):
    with pytest.raises(ValueError, match="train_generator"):
        Generator.load(os.path.join(toy, "diffusion"))


@pytest.mark.parametrize("flag", ["--diffusion", "--clip"])
def test_generator_base_out_of_reach_names_the_flag(
    toy: str, flag: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"--diffusion": os.path.join(toy, "diffusion"), "--clip": os.path.join(toy, "clip")}
    names[flag] = "nobody/no-such-model"
    with pytest.raises(ValueError, match=f"{flag} nobody/no-such-model"):
        Generator.base(names["--diffusion"], names["--clip"], TOY)


def test_build_in_another_directory_finds_what_the_config_located(
    toy: str, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    tower = backbones.Tower(
        backbones.TowerSpec(arch="vgg", layers=(8, "M", 16, "M"), grid=(1, 1), dim=8)
    )
    for name in ("tower", "other"):
        backbones.save_tower(tower, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    config = TrainGenerator(
        diffusion=os.path.relpath(os.path.join(toy, "diffusion")),
        clip=os.path.relpath(os.path.join(toy, "clip")),
        perceptual="tower",
        perceptual_weights=os.path.join("other", "model.safetensors"),
        conditioning=TOY,
    )
    config = located(config)
    (tmp_path / "of a worker").mkdir()
    monkeypatch.chdir("of a worker")
    first = build_task(config).perceptual.stages[0][0].weight
    assert torch.equal(first, tower.net.get_submodule("features")[0].weight)


def test_sizes_come_from_the_config_files(toy: str):
    found = pretrained.sizes(os.path.join(toy, "diffusion"), os.path.join(toy, "clip"), 256)
    assert found == pretrained.Sizes(panorama=PANORAMA, tile=64, latent=16)


# Rows


def _rows() -> dict[str, np.ndarray]:
    batch = _batch(3)
    ground = [images.encode(picture.permute(1, 2, 0).numpy()) for picture in batch["ground"]]
    aerial = [images.encode(picture.permute(1, 2, 0).numpy()) for picture in batch["aerial"]]
    ground[1] = ground[1][:100]  # truncated
    return {
        schema.PAIR_ID: np.array(["0000000", "0000001", "0000002"], dtype=object),
        schema.GROUND: np.array(ground, dtype=object),
        schema.AERIAL: np.array(aerial, dtype=object),
        schema.CLASSES: np.full(3, None, dtype=object),
        schema.ERROR: np.array([None, None, "ingest: no tile"], dtype=object),
    }


def test_generate_aerial_bad_rows_keep_their_reason_and_the_rest_go_on(
    generator: Generator, tmp_path
):
    generator.save(str(tmp_path))
    actor = infer.GenerateAerial(str(tmp_path), Sampling(steps=2))
    out = actor(_rows())
    assert list(out[schema.PAIR_ID]) == ["0000000", "0000001", "0000002"]
    assert [value is None for value in out[schema.SYNTHETIC]] == [False, True, True]
    assert out[schema.ERROR][0] is None
    assert out[schema.ERROR][1].startswith("generate: ground: cannot be decoded")
    assert out[schema.ERROR][2] == "ingest: no tile"
    expected = _draw(generator, 1, steps=2)[0].permute(1, 2, 0).numpy() * 255
    drawn = images.decode(out[schema.SYNTHETIC][0])
    assert np.abs(drawn - expected).max() < 1.5
    backwards = actor({name: values[::-1] for name, values in _rows().items()})
    assert [value is None for value in backwards[schema.SYNTHETIC]] == [True, True, False]
    assert (images.decode(backwards[schema.SYNTHETIC][2]) == drawn).all()


def test_decode_batch_leaves_failed_rows_out_and_keys_the_rest():
    rows = {name: values[[0, 2]] for name, values in _rows().items()}
    out = decode_batch(rows, pretrained.Sizes(PANORAMA, 32, 8))
    assert out["key"].tolist() == [rng.row_key("0000000")]
    assert out["ground"].shape == (1, 3, *PANORAMA)
    assert out["aerial"].shape == (1, 3, 32, 32)
    assert (out["classes"] == schema.IGNORE).all()  # it has no map
    assert out["classes"].shape == (1, 32, 32)
    np.testing.assert_array_equal(out["ground"], _batch(1)["ground"].numpy())
    nothing = decode_batch({k: v[1:] for k, v in rows.items()}, pretrained.Sizes(PANORAMA, 32, 8))
    assert nothing["ground"].shape == (0, 3, *PANORAMA)


def test_decode_batch_reads_class_maps_by_their_colours_cars_too():
    ids = np.arange(len(schema.PALETTE)).repeat(8)[:, None].repeat(48, axis=1).astype(np.uint8)
    ids[:8, :8] = schema.IGNORE
    rows = {name: values[[0, 0]] for name, values in _rows().items()}
    rows[schema.CLASSES][0] = images.encode(images.colours_of(ids))
    out = decode_batch(rows, pretrained.Sizes(PANORAMA, 48, 12))["classes"]
    np.testing.assert_array_equal(out[0], ids)
    assert (out[1] == schema.IGNORE).all()


def test_decode_batch_stops_at_a_picture_that_ingest_let_through():
    with pytest.raises(images.BadImage):
        decode_batch(_rows(), pretrained.Sizes(PANORAMA, 64, 16))


def test_validation_judges_its_first_rows_and_shows_them(generator: Generator):
    task = _train(generator, w_vae=0.0, judge=3).eval()
    batches = [_batch(2), _batch(2, first=2), _batch(2, first=4)]
    summary = _summary(task, *batches)
    judged = torch.cat([batch["aerial"] for batch in batches])[:3]
    ground = torch.cat([batch["ground"] for batch in batches])[:3]
    keys = torch.cat([batch["key"] for batch in batches])[:3]
    drawn = generator.sample(ground.float() / 255, keys)
    expected = metrics.psnr(drawn, judged.float() / 255).mean().item()
    assert summary["psnr"] == pytest.approx(expected, abs=1e-3)
    assert summary["gallery"] == 3
    samples = summary["samples"]
    assert samples.shape == (3 * 64, 256 + 64 + 64, 3)
    np.testing.assert_array_equal(samples[:64, -64:], judged[0].permute(1, 2, 0))
    np.testing.assert_array_equal(samples[64:128, :256], ground[1].permute(1, 2, 0))


# The stage on Ray


@pytest.mark.ray
def test_train_publishes_a_generator_that_draws_every_pair(toy: str, world_root: str, tmp_path):
    tower = backbones.Tower(
        backbones.TowerSpec(arch="vgg", layers=(8, "M", 16, "M"), grid=(1, 1), dim=8)
    )
    backbones.save_tower(tower, str(tmp_path / "tower"))
    held_out = Ingest(root=world_root, split="val")
    config = TrainGenerator(
        data=Ingest(root=world_root, limit=12),
        val=held_out,
        diffusion=os.path.join(toy, "diffusion"),
        clip=os.path.join(toy, "clip"),
        perceptual=str(tmp_path / "tower"),
        conditioning=TOY,
        pretrain_rays=1,
        mirror=True,
        encoded=str(tmp_path / "encoded"),
        output=str(tmp_path / "generator"),
        fit=TrainConfig(
            epochs=1,
            batch=6,
            storage=str(tmp_path / "runs"),
            best="val/psnr",  # which the rays alone do not have
            best_mode="max",
        ),
    )
    result = train(config)
    found = result.metrics or {}
    names = ["train/noise", "train/clip", "train/vae", "val/loss_correct", "val/loss_shuffled"]
    assert all(np.isfinite(found[name]) and found[name] > 0 for name in [*names, "val/lpips"])
    assert 0 <= found["val/recall_at_10_percent"] <= 1
    assert os.path.exists(os.path.join(result.checkpoint, "samples.png"))
    rows = PairDataset.open(held_out).rows()
    drawn = infer.generate(
        rows, Generate(model=config.output, steps=2, pool=Pool(batch=8))
    ).take_all()
    given = {row[schema.PAIR_ID]: row[schema.GROUND] for row in rows.take_all()}
    assert len(drawn) == len(given) == 12
    assert all(row[schema.ERROR] is None for row in drawn)
    assert len({row[schema.SYNTHETIC] for row in drawn}) == 12
    # Each picture is that of its own pair, whatever the batches were.
    row = drawn[7]
    model = Generator.load(config.output)
    ground = images.decode(given[row[schema.PAIR_ID]], PANORAMA)
    alone = model.sample(
        torch.from_numpy(ground.copy()).permute(2, 0, 1)[None].float() / 255,
        torch.tensor([rng.row_key(row[schema.PAIR_ID])]),
        Sampling(steps=2),
    )
    difference = images.decode(row[schema.SYNTHETIC]) - alone[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(difference).max() < 1.5


@pytest.mark.ray
def test_encode_keeps_what_live_training_would_compute(toy: str, world_root: str, tmp_path):
    data = Ingest(root=world_root, split="val", block=4)
    asked = Encode(
        data=data,
        diffusion=os.path.join(toy, "diffusion"),
        revision="main",
        clip=os.path.join(toy, "clip"),
        conditioning=TOY,
        turns=False,
        mirror=True,
        output=str(tmp_path / "encoded"),
        pool=Pool(batch=4),
    )
    directory = encode(asked)
    sizes = pretrained.sizes(asked.diffusion, asked.clip, TOY.panorama_width)
    stored = {row["key"]: row for row in encoded(directory).take_all()}
    live = {row["key"]: row for row in decode(PairDataset.open(data).rows(), sizes).take_all()}
    assert stored.keys() == live.keys()
    model = _base(toy)
    for key, row in live.items():
        found = stored[key]
        np.testing.assert_array_equal(found["ground"], row["ground"])
        np.testing.assert_array_equal(found["aerial"], row["aerial"])
        np.testing.assert_array_equal(found["classes"], row["classes"])
        assert len(np.unique(found["classes"])) > 2
        ground, tile = (torch.from_numpy(row[n].copy())[None] / 255 for n in ("ground", "aerial"))
        mirrored = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
        tiles = torch.cat([tile, geometry.rotate90_tile(tile, *mirrored)])
        views = torch.cat([ground, geometry.rotate90_panorama(ground, *mirrored)])
        latent, states = (torch.from_numpy(found[name].copy()) for name in ("latent", "states"))
        torch.testing.assert_close(latent.float(), model.frozen.encode(tiles), atol=5e-3, rtol=2e-3)
        seen = model.frozen.look(views).states
        torch.testing.assert_close(states.float(), seen, atol=5e-3, rtol=2e-3)
    parquet = os.path.join(directory, sorted(os.listdir(directory))[0])
    before = os.stat(parquet).st_mtime_ns
    assert encode(asked) == directory  # found, and left as it is
    assert os.stat(parquet).st_mtime_ns == before
    assert encode(replace(asked, mirror=False)) != directory
    # Other pictures at the same place are not taken for these.
    copied = tmp_path / "world"
    shutil.copytree(world_root, copied)
    moved = replace(asked, data=replace(data, root=str(copied)))
    assert encode(moved) == directory  # the same pictures elsewhere are
    picture = next((copied / "bingmap").iterdir())
    images.open_image(picture.read_bytes()).transpose(0).save(picture)
    assert encode(replace(moved, data=replace(moved.data, recheck=True))) != directory


# The real architecture


def _count(model: torch.nn.Module) -> float:
    return round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1)


def test_generator_of_stable_diffusion_and_clip_has_the_published_sizes():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(320, 640, 1280, 1280),
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        clip = CLIPVisionModel(CLIPVisionConfig(patch_size=32))
    assert (_count(unet), _count(vae), _count(clip)) == (859.5, 83.7, 87.5)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    frozen = Frozen(pretrained.Encoders(clip, CLIPImageProcessor(), vae), Conditioning())
    model = Generator(frozen, unet, Noise(scheduler))
    assert (model.tile, model.latent, model.panorama_size) == (512, (4, 64, 64), (224, 1232))
    assert model.unet.conv_in.weight.shape == (320, 4 + 24, 3, 3)
    assert model.conditioner.project.weight.shape == (768, 768)
    assert model.conditioner.places.shape[0] == 6 * (7 * 7 + 1)
