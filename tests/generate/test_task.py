"""Training steps: losses with gradient, EMA, LoRA, and what a validation says."""

import numpy as np
import pytest
import torch
from ray.train import Checkpoint

from cvmatch.generate import task as task_module
from cvmatch.generate.batches import augment
from cvmatch.generate.losses import LPIPS
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import TrainGenerator
from cvmatch.generate.task import VALIDATION_LEVELS, BEVTask, GeneratorTask, load_bev
from cvmatch.nn import metrics
from cvmatch.training.metrics import LossCurve
from tests.helpers.generator import (
    condition_of,
    encode,
    ground_of,
    make_batch,
    make_generator,
    make_informative,
    make_task,
    make_trainer,
    raw_batch,
    summarise,
)
from tests.helpers.present import present

TERMS = ("noise", "clip", "lpips", "bev", "bev_nce", "bev_class", "x0_nce")


@pytest.fixture(autouse=True)
def every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows of all noise levels take part in all losses."""
    monkeypatch.setattr(task_module, "MIN_SIGNAL", 0.0)
    monkeypatch.setattr(task_module, "X0_NCE_MIN_LEVEL", 0.0)


@pytest.mark.parametrize("term", TERMS)
def test_loss_each_term_alone_has_gradient_into_what_it_trains(
    generator: Generator, lpips: LPIPS, term: str
):
    weights = {f"{name}_weight": 0.0 for name in TERMS} | {f"{term}_weight": 1.0}
    task = make_task(generator, lpips, **weights, conditioning_dropout=0.0)
    task(make_batch(generator, 4))["loss"].backward()
    trained = generator.conditioner.bev if term.startswith("bev") else generator.unet
    gradient = [weight.grad for weight in trained.parameters() if weight.grad is not None]
    total = torch.stack([part.abs().sum() for part in gradient]).sum()
    assert torch.isfinite(total)
    assert total > 1e-6
    assert all(weight.grad is None for weight in generator.encoders.clip.parameters())
    assert all(weight.grad is None for weight in generator.encoders.vae.parameters())


def test_loss_gradient_reaches_projection_and_bev_once_the_map_has_weight(generator: Generator):
    task = make_task(
        generator,
        clip_weight=0.0,
        lpips_weight=0.0,
        bev_weight=0.0,
        bev_nce_weight=0.0,
        bev_class_weight=0.0,
        conditioning_dropout=0.0,
    )
    task(make_batch(generator, 4))["loss"].backward()
    conditioner = generator.conditioner
    assert present(conditioner.project.weight.grad).abs().sum() > 0
    # Zero-initialised: a step later.
    assert present(conditioner.bev.proj_out.weight.grad).abs().sum() == 0
    assert present(generator.unet.conv_in.weight.grad)[:, 4:].abs().sum() > 0
    with torch.no_grad():
        generator.unet.conv_in.weight[:, 4:] += 0.01
    task(make_batch(generator, 4))["loss"].backward()
    assert present(conditioner.bev.proj_out.weight.grad).abs().sum() > 0


def test_loss_every_trained_weight_takes_part_in_every_step(generator: Generator, lpips: LPIPS):
    task = make_task(generator, lpips)
    for _ in range(2):  # DDP hangs or raises where a worker leaves a weight out
        task.zero_grad()
        task(make_batch(generator, 2))["loss"].backward()
        groups = [weight for group in task.groups() for weight in group["params"]]
        assert all(weight.grad is not None for weight in groups)
        trained = {id(weight) for weight in task.parameters() if weight.requires_grad}
        assert trained == {id(weight) for weight in groups}


def test_loss_attention_only_trains_cross_attention_and_the_input(generator: Generator):
    task = make_task(generator, lpips_weight=0.0, train_unet="attention")
    trained = [n for n, weight in generator.unet.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".attn2." in name or name.startswith("conv_in.") for name in trained)
    assert len(task.groups()[0]["params"]) == len(trained)


def test_loss_of_decoded_images_acts_every_second_step(generator: Generator, lpips: LPIPS):
    task = make_task(generator, lpips, image_rows=2)
    names = [set(task(make_batch(generator, 3))) for _ in range(3)]
    assert [{"clip", "lpips"} <= set(terms) for terms in names] == [True, False, True]


def test_loss_of_a_row_does_not_depend_on_its_batch(generator: Generator):
    task = make_task(generator, clip_weight=0.0, lpips_weight=0.0, bev_nce_weight=0.0)
    whole = task(make_batch(generator, 4, epoch=3))["noise"]
    rows = [task(make_batch(generator, 1, first=row, epoch=3))["noise"] for row in range(4)]
    torch.testing.assert_close(torch.stack(rows).mean(), whole, atol=1e-5, rtol=1e-4)
    other = task(make_batch(generator, 4, epoch=4))["noise"]
    assert (other - whole).abs() > 1e-4  # another epoch draws other noise


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
    task = make_task(generator, clip_weight=0.0, lpips_weight=0.0, lr=1e-2, ema_decay=0.9)
    optimizer = torch.optim.SGD(task.groups(), lr=1e-2)
    seen = []
    for _ in range(3):
        seen.append(generator.unet.conv_out.weight.detach().clone())
        optimizer.zero_grad()
        task(make_batch(generator, 2))["loss"].backward()
        optimizer.step()
    mean = _running_mean(seen)
    task.save(str(tmp_path))
    saved = Generator.load(str(tmp_path)).unet.conv_out.weight
    torch.testing.assert_close(saved, mean)
    again = GeneratorTask(generator, task.config)
    again.load_state_dict(task.state_dict())
    torch.testing.assert_close(again.eval_model().unet.conv_out.weight, mean)
    assert torch.equal(generator.unet.conv_out.weight, task.generator.unet.conv_out.weight)


def test_average_counts_weights_once_however_many_steps_make_a_move(generator: Generator, tmp_path):
    task = make_task(generator, clip_weight=0.0, lpips_weight=0.0, lr=1e-2, ema_decay=0.9)
    batches = [make_batch(generator, 2, first=2 * step) for step in range(6)]
    trainer = make_trainer(task, batches, batch=2, accumulate=4)
    weight, seen = generator.unet.conv_out.weight, []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    trainer.train(0, LossCurve(str(tmp_path), steps=6, epochs=1, writes=False))
    assert len(seen) == 2  # of four steps, and of two
    assert (seen[1] - seen[0]).abs().max() > 1e-3
    torch.testing.assert_close(task.eval_model().unet.conv_out.weight, _running_mean(seen))


def test_state_holds_every_trained_weight_and_no_frozen_one(
    generator: Generator, lpips: LPIPS, tmp_path
):
    task = make_task(generator, lpips)
    trainer = make_trainer(task)
    trainer.save(str(tmp_path), 1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    weights = dict(task.named_parameters(remove_duplicate=False))
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    assert weights.keys() & state["model"].keys() == trained
    state["model"] |= {name: weights[name] for name in weights.keys() - trained}
    torch.save(state, tmp_path / "state.pt")  # as it was written before
    before = generator.unet.conv_out.weight.detach().clone()
    with torch.no_grad():
        generator.unet.conv_out.weight.add_(1)
    assert trainer.load(Checkpoint(str(tmp_path))) == 1
    assert torch.equal(generator.unet.conv_out.weight, before)


def test_loss_training_on_one_batch_makes_the_right_panorama_better_than_a_shuffled_one(
    generator: Generator,
):
    torch.manual_seed(3)
    task = make_task(
        generator,
        clip_weight=0.0,
        lpips_weight=0.0,
        lr=2e-3,
        conditioning_dropout=0.0,
        noise_weight=1.0,
    )
    optimizer = torch.optim.Adam(task.groups())
    for epoch in range(40):
        optimizer.zero_grad()
        task(make_batch(generator, 4, epoch=epoch))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        means = task.eval()(make_batch(generator, 4))
    assert means["loss_shuffled"] > means["loss_correct"]
    assert task.summary(means)["gap"] > 0.005


def test_loss_validation_is_the_same_every_time(generator: Generator):
    task = make_task(generator, lpips_weight=0.0).eval()
    with torch.no_grad():
        first, second = (
            task(make_batch(generator, 2, epoch=0)),
            task(make_batch(generator, 2, epoch=5)),
        )
    assert torch.equal(first["loss_correct"], second["loss_correct"])
    averaged = {name for name in first if not name.startswith("rows/")}
    levels = {f"loss_{kind}/{at}" for kind in ("correct", "shuffled") for at in VALIDATION_LEVELS}
    whole = {"loss", "compared", "loss_correct", "loss_shuffled", "bev", "bev_nce", "bev_class"}
    assert averaged == whole | levels


def test_gap_is_of_the_rows_that_have_another_row_in_their_batch(generator: Generator):
    make_informative(generator)
    task = make_task(generator, lpips_weight=0.0).eval()
    both, first, second = (
        make_batch(generator, 2),
        make_batch(generator, 1),
        make_batch(generator, 1, first=1),
    )
    pair, alone = summarise(task, both), summarise(task, first, second)
    mixed = summarise(task, both, first, second)  # the same rows again, each alone
    assert abs(pair["gap"]) > 1e-3
    for name in ("gap", "gap/0.8", "loss_shuffled", "loss_correct"):
        assert mixed[name] == pytest.approx(pair[name], rel=1e-3), name
    assert alone["loss_correct"] == pytest.approx(pair["loss_correct"], rel=1e-3)
    assert not [name for name in alone if "gap" in name or "shuffled" in name]


def test_bev_task_learns_and_its_weights_fit_the_generator(generator: Generator, tmp_path):
    torch.manual_seed(0)
    task = BEVTask(TrainGenerator(), 16)
    optimizer = torch.optim.Adam(task.groups())
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(task(raw_batch(4))["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    task.save(str(tmp_path))
    load_bev(generator.conditioner.bev, str(tmp_path))
    found = generator.conditioner.bev.to_rgb.weight
    assert torch.equal(found, task.network.to_rgb.weight)


def test_pretrained_bev_stays_as_they_were_pretrained(generator: Generator):
    task = make_task(generator, lpips_weight=0.0, pretrain_bev=1)
    task(make_batch(generator, 4))["loss"].backward()
    assert all(weight.grad is None for weight in generator.conditioner.bev.parameters())
    gradient = present(generator.unet.conv_in.weight.grad)
    assert gradient[:, 4:].abs().max() > 0  # the map is still looked at


def test_validation_samples_the_chosen_rows_whatever_the_batches_and_shows_them(
    generator: Generator,
):
    whole = make_batch(generator, 6)
    chosen = [1, 4, 5]
    keys = whole["key"][chosen]
    task = make_task(generator, lpips_weight=0.0, sampled=keys.tolist()).eval()
    halves = [make_batch(generator, 4), make_batch(generator, 2, first=4)]
    found = [summarise(task, *batches) for batches in ([whole], halves, halves[::-1])]
    chosen = [chosen[index] for index in keys.argsort()]
    ground, true, keys = (whole[name][chosen] for name in ("ground_view", "aerial", "key"))
    drawn = generator.sample(ground.float() / 255, keys)
    scores = metrics.retrieval_by_ncc(metrics.planes(drawn), metrics.planes(true.float() / 255))
    before = (scores >= scores.diagonal()[:, None]).sum(dim=1)
    for summary in found:
        expected = metrics.psnr(drawn, true.float() / 255).mean().item()
        assert summary["psnr"] == pytest.approx(expected, abs=1e-2)
        assert summary["retrieval_mrr"] == pytest.approx((1 / before).mean().item(), abs=1e-6)
        assert summary["gallery"] == 3
        samples = summary["samples"]
        assert samples.shape == (3 * 64, 256 + 64 + 64, 3)
        np.testing.assert_array_equal(samples[:64, -64:], true[0].permute(1, 2, 0))
        np.testing.assert_array_equal(samples[64:128, :256], ground[1].permute(1, 2, 0))


def test_lora_trains_adapters_and_publishes_a_plain_unet(generator: Generator, tmp_path):
    before = generator.unet.state_dict()
    task = make_task(
        generator, clip_weight=0.0, lpips_weight=0.0, train_unet="lora", lora_rank=2, lr=1e-2
    )
    trained = [n for n, weight in generator.unet.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name or name.startswith("conv_in.") for name in trained)
    optimizer = torch.optim.Adam(task.groups())
    for _ in range(3):
        optimizer.zero_grad()
        task(make_batch(generator, 2))["loss"].backward()
        optimizer.step()
    task.save(str(tmp_path))
    plain = Generator.load(str(tmp_path))
    assert plain.unet.state_dict().keys() == before.keys()
    condition = condition_of(generator.eval(), ground_of(2))
    noisy, step = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    found = plain.predict(noisy, step, condition)
    torch.testing.assert_close(found, generator.predict(noisy, step, condition))
    generator.unet.disable_adapters()
    assert (found - generator.predict(noisy, step, condition)).abs().max() > 1e-3


def test_loss_of_a_mirrored_pair_is_that_of_the_pair_as_it_is_mirrored(toy: str):
    generator = make_generator(toy, prediction="v_prediction")  # whose target has the latent in it
    generator.encoders.vae.register_to_config(scaling_factor=10.0)  # about unit variance

    def loss(batch: dict[str, torch.Tensor], mirror: bool) -> torch.Tensor:
        # A new one has no tiles of earlier steps.
        task = make_task(generator, mirror=mirror, clip_weight=0.0, lpips_weight=0.0)
        generator.conditioner.bev.eval()  # no dropout
        return task(batch)["loss"]

    batch = make_batch(generator, 6)
    mirrored = augment(batch, mirror=True, seed=0).mirrored
    assert 0 < mirrored.sum() < 6
    raw = raw_batch(6)
    for name, flipped in (
        ("ground_view", raw["ground_view_mirrored"]),
        ("aerial", raw["aerial"].flip(-1)),
        ("aerial_mask", raw["aerial_mask"].flip(-1)),
    ):
        rows = mirrored.view(-1, *(1,) * (flipped.ndim - 1))
        raw[name] = torch.where(rows, flipped, raw[name])
    expected = loss(encode(generator, raw), mirror=False)
    torch.testing.assert_close(loss(batch, mirror=True), expected, rtol=1e-5, atol=1e-5)
    assert (loss(batch, mirror=False) - expected).abs() > 1e-3
