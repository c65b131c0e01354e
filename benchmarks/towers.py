"""The matcher's towers at full size: training samples a second, and the share of the peak."""

import statistics
from dataclasses import dataclass

import _full_size
import torch
from _harness import Bench, parse_flags, write_results

from cvmatch.match.model import MatcherConfig
from cvmatch.nn import backbones
from cvmatch.runtime import hardware

ROUNDS = 3
"""Timed rounds; medians are reported."""


@dataclass(frozen=True, kw_only=True)
class TowersBench(Bench):
    """One tower, forward and backward, on noise as panoramas of the matcher's default size."""

    names: tuple[str, ...] = ("vgg16", "convnext_base")
    """Which of torchvision's models, with random weights."""
    batch: int = 0
    """Pictures a step; 0: on a GPU 128, else 4, quick 1."""


def measure_training(name: str, batch: int, top: float) -> dict[str, float | str]:
    """A row of the table. `top`: FLOP/s of the device."""
    device = hardware.device()
    tower = backbones.load_tower(name, backbones.RANDOM).to(device).train()
    pictures = torch.randn(batch, 3, *MatcherConfig().panorama, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = tower(pictures).float().square().mean()
        value.backward()
        tower.zero_grad(set_to_none=True)

    # On the way back torch counts depthwise convolutions as dense ones: for ConvNeXt three times
    # too much.
    needed = 3 * _full_size.count_flops(lambda: tower(pictures)) / batch
    step()
    speed = batch / statistics.median(_full_size.time_call(step, device) for _ in range(ROUNDS))
    return {
        "tower": name,
        "batch": batch,
        "samples/s": speed,
        "GFLOP a sample": needed / 1e9,
        "share of the peak": speed * needed / top,
    }


def main(bench: TowersBench) -> None:
    """Each in turn."""
    on_gpu = hardware.device().type == "cuda"
    batch = bench.batch or (128 if on_gpu else 1 if bench.quick else 4)
    top = _full_size.peak_flops(hardware.device())
    rows = [measure_training(name, batch, top) for name in bench.names]
    figures = {"peak.tflops": top / 1e12}
    figures |= {f"{row['tower']}.samples_per_s": float(row["samples/s"]) for row in rows}
    height, width = MatcherConfig().panorama
    notes = (
        f"Pictures of {height} x {width}, {'bf16' if on_gpu else 'fp32'}, forward and backward "
        f"without an optimizer step, medians of {ROUNDS}. The device's peak by a large matrix "
        f"product: {top / 1e12:.3g} TFLOP/s.",
    )
    write_results(bench, "Towers at full size", rows, figures, notes)


if __name__ == "__main__":
    main(parse_flags(TowersBench))
