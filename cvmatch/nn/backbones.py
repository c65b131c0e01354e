"""Picture -> feature vector: torchvision backbones without their classifier, by name or directory.

The matcher's towers, the toy base models and LPIPS's VGG stack all come from here.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cvmatch.nn import hub

MEAN = (0.485, 0.456, 0.406)
"""Mean (R, G, B) of ImageNet in [0, 1]: what torchvision's weights expect subtracted."""

STD = (0.229, 0.224, 0.225)
"""Standard deviation (R, G, B) of ImageNet in [0, 1]: what they expect divided by."""

RANDOM = "random"
"""Value of `weights` for an untrained backbone: no file and no hub."""

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """Architecture of a tower; its JSON is the `config.json` of a tower directory."""

    arch: str = "vgg16"
    """A torchvision classification model, or "vgg": torchvision's VGG with the fields below."""
    layers: tuple[int | str, ...] = ()
    """"vgg" only: widths of the 3 x 3 convolutions, "M" for a 2 x 2 max pooling."""
    batch_norm: bool = False
    """"vgg" only: batch normalisation behind each convolution."""
    grid: tuple[int, int] = (7, 7)
    """"vgg" only: (rows, columns) of the average pooling in front of the head."""
    dim: int = 128
    """"vgg" only: width of the head, and of the feature vector."""

    def __post_init__(self) -> None:
        if self.arch == "vgg" and not any(isinstance(layer, int) for layer in self.layers):
            raise ValueError(
                f"tower: arch 'vgg' needs convolution widths in layers, got {self.layers}"
            )

    def plain(self) -> dict[str, object]:
        """What `read` takes, ready for JSON; only the name for a torchvision model."""
        whole = dataclasses.asdict(self) | {"layers": list(self.layers), "grid": list(self.grid)}
        return whole if self.arch == "vgg" else {"arch": self.arch}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> "TowerSpec":
        """The spec of `plain`, where JSON has made lists of tuples."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()
        }
        return cls(**fields)


class Tower(nn.Module):
    """A normalised picture -> a feature vector of `dim` numbers.

    `net` is the torchvision model itself, its last linear layer replaced by the identity: VGG16
    gives fc7 (4096, after the ReLU; its dropout acts in training only), ConvNeXt its pooled
    features. For "vgg" it is `torchvision.models.VGG` with a linear layer and a ReLU as head.
    """

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.net, self.dim = _small(spec) if spec.arch == "vgg" else _named(spec.arch)

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Features of pictures that `normalise` gave."""
        # 1.5 times faster for the small towers on a CPU (measured, forward and backward).
        return self.net(image.contiguous(memory_format=torch.channels_last))


def normalise(
    image: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """RGB in [0, 1] -> zero mean, unit deviation over ImageNet, as torchvision's weights expect."""
    mean, std = (image.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image - mean) / std


def tower(
    name: str, weights: str = "", grid: tuple[int, int] | None = None, dim: int | None = None
) -> Tower:
    """The tower of a directory that `save_tower` wrote, or of a torchvision model with its weights.

    `weights` is a local .safetensors or .pth state dict (torchvision's key names); "" takes the
    directory's own file, or torchvision's ImageNet weights from its hub; "random" takes none.
    `grid` and `dim` reshape the head of a "vgg" directory: convolutions are always taken over, the
    head where its shapes still fit, so a base trained on square tiles serves panoramas too.

    Raises:
        ValueError: unknown model, weights of another architecture, or hub out of reach; says what
            to download and which flag takes it.
    """
    if not os.path.isdir(name):
        if grid or dim:
            raise ValueError(
                f"tower {name!r}: grid and dim reshape a tower directory, not a hub model"
            )
        return _loaded(
            TowerSpec(arch=name), "" if weights == RANDOM else weights or _from_hub(name)
        )
    with open(os.path.join(name, _CONFIG)) as file:
        spec = TowerSpec.read(json.load(file))
    spec = dataclasses.replace(spec, grid=grid or spec.grid, dim=dim or spec.dim)
    return _loaded(spec, "" if weights == RANDOM else weights or os.path.join(name, _WEIGHTS))


def resolve_paths(name: str, weights: str) -> tuple[str, str]:
    """`name` and `weights` of `tower` so that they mean the same in every process.

    A directory, and a file, that are there become absolute: Ray's workers change directory.
    """
    return hub.absolute_or_hub_id(name), os.path.abspath(weights) if os.path.isfile(
        weights
    ) else weights


def save_tower(model: Tower, directory: str) -> None:
    """Write `config.json` and `model.safetensors`, which `tower(directory)` reads."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, _CONFIG), "w") as file:
        json.dump(model.spec.plain(), file, indent=2)
    state = {name: value.contiguous() for name, value in model.net.state_dict().items()}
    save_file(state, os.path.join(directory, _WEIGHTS))


def features(name: str, weights: str = "") -> nn.Sequential:
    """The convolution stack of a VGG (`name` and `weights` as in `tower`), as LPIPS uses it.

    Raises:
        ValueError: the model has no plain stack of convolutions.
    """
    stack = getattr(tower(name, weights).net, "features", None)
    if not isinstance(stack, nn.Sequential) or not isinstance(stack[0], nn.Conv2d):
        raise ValueError(f"{name!r} is not a VGG; LPIPS needs vgg16 or a 'vgg' tower directory.")
    return stack


def _small(spec: TowerSpec) -> tuple[nn.Module, int]:
    models = _models()
    stack = models.vgg.make_layers(list(spec.layers), spec.batch_norm)
    for layer in stack:
        if isinstance(layer, nn.Conv2d):  # as VGG does it
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):  # VGG's own head, replaced below, would draw 120 M weights (2 s)
        net = models.VGG(nn.Sequential(), init_weights=False)
    net.features = stack
    net.avgpool = nn.AdaptiveAvgPool2d(spec.grid)
    width = [layer for layer in spec.layers if isinstance(layer, int)][-1]
    head = nn.Linear(width * spec.grid[0] * spec.grid[1], spec.dim)
    net.classifier = nn.Sequential(head, nn.ReLU())
    return net, spec.dim


def _named(name: str) -> tuple[nn.Module, int]:
    models = _models()
    if name not in models.list_models(models):
        raise ValueError(
            f"tower {name!r}: expected a directory with {_CONFIG}, or a torchvision classification "
            "model such as vgg16, convnext_tiny, convnext_base, resnet50."
        )
    net = models.get_model(name, weights=None)
    # The classifier is the linear layer defined last, in all of torchvision's families but a few.
    linear = {path: part for path, part in net.named_modules() if isinstance(part, nn.Linear)}
    if not linear:
        raise ValueError(
            f"tower {name!r}: has no linear classifier to take off; use vgg16 or convnext_tiny."
        )
    path, last = list(linear.items())[-1]
    parent, _, child = path.rpartition(".")
    setattr(net.get_submodule(parent), child, nn.Identity())
    return net, last.in_features


def _models() -> ModuleType:
    # Imported where a backbone is made: it takes a second and 90 MiB of memory (torch 2.13's
    # compiler comes with it), and a process that searches an index makes none.
    from torchvision import models  # noqa: PLC0415 (see above)

    return models


def _loaded(spec: TowerSpec, weights: str | Mapping[str, Tensor]) -> Tower:
    if not weights:
        return Tower(spec)
    with torch.device("meta"):  # random values of VGG16's 138 M weights would cost seconds
        shapes = Tower(spec)
    state = _read(weights) if isinstance(weights, str) else weights
    model = shapes if spec.arch != "vgg" else Tower(spec)
    wanted = model.net.state_dict()
    taken = {  # `assign` below takes the values' type over, and files may hold half precision
        name: value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if name in wanted and value.shape == wanted[name].shape
    }
    missing = sorted(set(wanted) - set(taken))
    if spec.arch == "vgg":
        missing = [name for name in missing if not name.startswith("classifier.")]
    if missing or not taken:
        where = weights if isinstance(weights, str) else "torchvision's hub"
        raise ValueError(
            f"tower {spec.arch!r}: weights of {where} lack {missing[:3]} or have them in another "
            f"shape ({len(missing)} of {len(wanted)}); give the state dict of this architecture."
        )
    model.net.load_state_dict(taken, strict=False, assign=True)
    return model


def _read(path: str) -> Mapping[str, Tensor]:
    if not os.path.isfile(path):
        raise ValueError(
            f"tower weights {path!r}: no such file (a .safetensors or .pth state dict)."
        )
    if path.endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _from_hub(name: str) -> Mapping[str, Tensor]:
    models = _models()
    if name not in models.list_models(models):
        _named(name)  # raises with the names
    url = models.get_model_weights(name)["DEFAULT"].url
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        raise ValueError(
            f"tower {name!r}: cannot download {url} ({error}). Download it on another machine and "
            f"copy it into {torch.hub.get_dir()}/checkpoints, or pass --weights FILE; or name a "
            "local tower directory with --tower DIR. (train_generator calls these flags "
            "--perceptual-weights and --perceptual.)"
        ) from error
