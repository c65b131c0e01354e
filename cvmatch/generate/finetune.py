"""Which of a base model's weights are trained, and in which form they are kept and published."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Trained


def choose(generator: Generator, trained: Trained, rank: int, clip_layers: int) -> None:
    """Freeze what is not trained; `lora` adds adapters of `rank` to the UNet.

    Raises:
        ValueError: CLIP has fewer layers than `clip_layers`.
    """
    unet: Any = generator.unet
    if trained == "lora":
        # Not at the top: importing it takes 2 s in every process that trains or encodes.
        from peft import LoraConfig  # noqa: PLC0415

        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    if trained != "all":
        for name, weight in unet.named_parameters():
            chosen = ".attn2." in name if trained == "attention" else "lora_" in name
            weight.requires_grad_(chosen or name.startswith("conv_in."))
    layers = generator.frozen.clip.encoder.layers
    if clip_layers > len(layers):
        raise ValueError(
            f"train_generator: expected train_clip of at most {len(layers)}, the layers of CLIP, "
            f"got {clip_layers}."
        )
    for layer in layers[len(layers) - clip_layers :]:
        layer.requires_grad_(True)


def merged(generator: Generator) -> Generator:
    """The generator with its adapters, if any, merged into a copy of the UNet."""
    unet: Any = generator.unet
    if not getattr(unet, "peft_config", None):
        return generator
    unet = copy.deepcopy(unet)
    unet.fuse_lora()
    unet.unload_lora()
    found = Generator(generator.frozen, unet, generator.noise)
    found.conditioner = generator.conditioner
    return found


class Average(nn.Module):
    """Running mean of trained weights; with a decay of 0.99 of about their last 100 moves.

    It is state, but neither parameter nor buffer: DDP would send it around in every step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay, self.steps = decay, 0
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor]) -> None:
        """Count the weights after a move; the first ones are forgotten sooner than later ones."""
        now = [weight.detach() for weight in weights]
        if not self.values:
            self.values = [weight.clone() for weight in now]
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.values = [value.to(new.device) for value, new in zip(self.values, now, strict=True)]
        torch._foreach_lerp_(self.values, now, 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def of(self, generator: Generator) -> Generator:
        """A copy of the generator with the mean weights, or the generator before any step."""
        if not self.values:
            return generator
        found = copy.deepcopy(generator)
        self.copy_to(trained_weights(found))
        return found

    @torch.no_grad()
    def copy_to(self, weights: Iterable[Tensor]) -> None:
        """Set the weights, in the order of `update`, to their means."""
        for weight, value in zip(weights, self.values, strict=True):
            weight.copy_(value)

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"steps": self.steps, "values": self.values}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_extra_state`."""
        self.steps, self.values = state["steps"], state["values"]


def trained_weights(module: nn.Module) -> list[nn.Parameter]:
    """Its parameters that are not frozen, in their order."""
    return [weight for weight in module.parameters() if weight.requires_grad]
