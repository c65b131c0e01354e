"""Sample4Geo's model as it is published: one backbone of timm for both views, and a temperature.

Built from timm alone: nothing of cvmatch takes part in what is expected of an import.
"""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn


class Peer(nn.Module):
    """Random weights of a backbone, saved under the names that Sample4Geo saves."""

    def __init__(self, name: str = "test_convnext", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = timm.create_model(name, pretrained=False, num_classes=0)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        with torch.no_grad():  # timm starts its norms and biases alike, which would hide a mix-up
            for weight in self.model.parameters():
                if weight.ndim == 1:
                    weight.normal_(1.0 if weight.mean() else 0.0, 0.2)
        self.eval()

    @torch.no_grad()
    def vectors(self, pictures: np.ndarray) -> Tensor:
        """Unit vectors of RGB pictures (row, height, width, 3) of the size that it sees.

        They are normalised by what timm says of the backbone: ImageNet's numbers for the published.
        """
        known: Any = self.model.pretrained_cfg
        normal = (pictures / 255 - np.array(known["mean"])) / np.array(known["std"])
        features = self.model(torch.from_numpy(normal).permute(0, 3, 1, 2).float())
        return features / features.square().sum(dim=1, keepdim=True).sqrt()


def save(path: Path, name: str = "test_convnext", **extra: Tensor) -> Peer:
    """Write the weights of a random model, and return it."""
    peer = Peer(name)
    torch.save({**peer.state_dict(), **extra}, path)
    return peer
