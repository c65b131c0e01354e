"""Picture -> feature vector: backbones of torchvision, timm or a directory, without classifier.

The matcher's towers, the demo's base models and LPIPS's VGG stack all come from here.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from cvmatch.nn import hub

MEAN = (0.485, 0.456, 0.406)
"""Mean (R, G, B) of ImageNet in [0, 1]: what torchvision's weights expect subtracted."""

STD = (0.229, 0.224, 0.225)
"""Standard deviation (R, G, B) of ImageNet in [0, 1]: what they expect divided by."""

RANDOM = "random"
"""Value of `weights` for an untrained backbone: no file and no hub."""

TIMM = "timm:"
"""Prefix of the names of timm's models, such as timm:convnext_base.fb_in22k_ft_in1k_384."""

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """Architecture of a tower; its JSON is the `config.json` of a tower directory."""

    arch: str = "vgg16"
    """A torchvision classification model, timm:NAME, or "vgg" with the fields below."""
    layers: tuple[int | str, ...] = ()
    """"vgg" only: widths of the 3 x 3 convolutions, "M" for a 2 x 2 max pooling."""
    batch_norm: bool = False
    """"vgg" only: batch normalisation behind each convolution."""
    grid: tuple[int, int] = (7, 7)
    """"vgg" only: (rows, columns) of the average pooling in front of the head."""
    dim: int = 128
    """"vgg" only: width of the head, and of the feature vector."""
    mean: tuple[float, float, float] = MEAN
    """timm only: mean (R, G, B) in [0, 1] that its weights expect subtracted."""
    std: tuple[float, float, float] = STD
    """timm only: standard deviation (R, G, B) in [0, 1] that they expect divided by."""

    def __post_init__(self) -> None:
        if self.arch == "vgg" and not any(isinstance(layer, int) for layer in self.layers):
            raise ValueError(
                f"tower: arch 'vgg' needs convolution widths in layers, got {self.layers}"
            )

    def to_json(self) -> dict[str, object]:
        """Return what `from_json` reads: the fields that this architecture has."""
        names = ["arch"]
        if self.arch == "vgg":
            names += ["layers", "batch_norm", "grid", "dim"]
        elif self.arch.startswith(TIMM):
            names += ["mean", "std"]
        values = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "TowerSpec":
        """Read a spec, in whose JSON tuples are lists."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return cls(**values)


class Tower(nn.Module):
    """A normalised picture -> a feature vector of `dim` numbers.

    `net` is the model of torchvision or timm without its classifier: VGG16 gives fc7 (4096, after
    the ReLU; its dropout acts in training only), ConvNeXt its pooled features. For "vgg" it is a
    stack of convolutions with a linear layer and a ReLU as head.
    """

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.arch == "vgg":
            self.net, self.dim = VGG(spec), spec.dim
        elif spec.arch.startswith(TIMM):
            self.net, self.dim = _build_timm(spec.arch)
        else:
            self.net, self.dim = _build_torchvision(spec.arch)

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Return the features of pictures that `normalise` returned."""
        # 1.5 times faster for the small towers on a CPU (docs/decisions.md#channels-last).
        return self.net(image.contiguous(memory_format=torch.channels_last))

    def normalise(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Normalise RGB in [0, 1] as the weights of this tower expect it."""
        return normalise(image, self.spec.mean, self.spec.std)


class VGG(nn.Module):
    """A VGG of any widths (Simonyan and Zisserman 2015) with one linear layer and a ReLU as head.

    Its parameters have the names that torchvision's VGG gives them.
    """

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        stack: list[nn.Module] = []
        width = 3
        for layer in spec.layers:
            if isinstance(layer, str):
                stack.append(nn.MaxPool2d(2))
                continue
            stack.append(nn.Conv2d(width, layer, 3, padding=1))
            stack += [nn.BatchNorm2d(layer)] if spec.batch_norm else []
            stack.append(nn.ReLU(inplace=True))
            width = layer
        for module in stack:
            if isinstance(module, nn.Conv2d):  # as torchvision does it
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        self.features = nn.Sequential(*stack)
        self.avgpool = nn.AdaptiveAvgPool2d(spec.grid)
        head = nn.Linear(width * spec.grid[0] * spec.grid[1], spec.dim)
        self.classifier = nn.Sequential(head, nn.ReLU())

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Return the features, after the ReLU."""
        return self.classifier(self.avgpool(self.features(image)).flatten(1))


def normalise(
    image: Float[Tensor, "batch 3 height width"],
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Float[Tensor, "batch 3 height width"]:
    """Normalise RGB in [0, 1] to zero mean and unit deviation (over ImageNet by default)."""
    center, scale = (image.new_tensor(values)[:, None, None] for values in (mean, std))
    return (image - center) / scale


def load_tower(name: str, weights: str = "", grid: tuple[int, int] | None = None) -> Tower:
    """Load the tower of a directory that `save_tower` wrote, or of torchvision or timm.

    Args:
        name: Directory, torchvision model, or timm:NAME.
        weights: Local .safetensors, .pth or .bin state dict with the key names of the model's
            library, or a directory with such a file; "" takes the directory's own file, or the
            hub's pretrained weights; "random" takes none.
        grid: Rows and columns of features that the head of a "vgg" directory sees. Convolutions are
            always taken over, the head where its shape still fits, so a base trained on square
            tiles serves panoramas too.

    Raises:
        ValueError: unknown model, weights of another architecture, or hub out of reach; says what
            to download and which flag takes it.
    """
    directory = os.path.isdir(name)
    spec = _read_spec(name) if directory else TowerSpec(arch=name)
    if grid and spec.arch != "vgg":
        raise ValueError(
            f"tower {name!r}: expected no grid, which reshapes the head of a 'vgg' tower "
            f"directory, got {grid}. Leave out --grid."
        )
    spec = dataclasses.replace(spec, grid=grid or spec.grid)
    if spec.arch.startswith(TIMM) and not directory:
        spec = dataclasses.replace(spec, **_timm_statistics(spec.arch))
    if weights == RANDOM:
        return Tower(spec)
    if weights or directory:
        return _load_state(spec, weights or os.path.join(name, _WEIGHTS))
    return _load_state(spec, _download_timm(name) if name.startswith(TIMM) else _download(name))


def resolve_paths(name: str, weights: str) -> tuple[str, str]:
    """Make `name` and `weights` of `load_tower` absolute where they are local paths.

    Ray's workers change directory.
    """
    path = os.path.abspath(weights) if weights and os.path.exists(weights) else weights
    return hub.absolute_or_hub_id(name), path


def save_tower(model: Tower, directory: str) -> None:
    """Write `config.json` and `model.safetensors`, which `load_tower(directory)` reads."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, _CONFIG), "w") as file:
        json.dump(model.spec.to_json(), file, indent=2)
    state = {name: value.contiguous() for name, value in model.net.state_dict().items()}
    save_file(state, os.path.join(directory, _WEIGHTS))


def load_vgg_features(name: str, weights: str = "") -> nn.Sequential:
    """Load the convolution stack of a VGG (arguments as of `load_tower`), as LPIPS uses it.

    Raises:
        ValueError: the model has no plain stack of convolutions.
    """
    stack = getattr(load_tower(name, weights).net, "features", None)
    if not isinstance(stack, nn.Sequential) or not isinstance(stack[0], nn.Conv2d):
        raise ValueError(f"{name!r} is not a VGG; LPIPS needs vgg16 or a 'vgg' tower directory.")
    return stack


def _read_spec(directory: str) -> TowerSpec:
    path = os.path.join(directory, _CONFIG)
    if not os.path.isfile(path):
        raise ValueError(
            f"tower {directory!r}: expected {_CONFIG} and {_WEIGHTS} in it, found none. A tower "
            "directory is what save_tower writes; weights of a hub go to --weights."
        )
    with open(path) as file:
        return TowerSpec.from_json(json.load(file))


def _build_torchvision(name: str) -> tuple[nn.Module, int]:
    models = _models()
    if name not in models.list_models(models):
        raise ValueError(
            f"tower {name!r}: expected a directory with {_CONFIG}, or a torchvision classification "
            "model such as vgg16, convnext_tiny, convnext_base, resnet50, or timm:NAME."
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


def _build_timm(arch: str) -> tuple[nn.Module, int]:
    net = _create_timm(arch)
    # Where a model has layers between pooling and classifier, these stay.
    return net, getattr(net, "head_hidden_size", None) or net.num_features


def _create_timm(arch: str, pretrained: bool = False) -> Any:
    # Imported where it is used, like torchvision's models: it takes a second or two.
    import timm  # noqa: PLC0415 (see above)

    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        raise ValueError(
            f"tower {arch!r}: expected the name of a model of timm {timm.__version__}, got "
            f"{name!r}. Names like it: {near}."
        )
    with torch.device("cpu"):  # on "meta", buffers that no file holds would have no values
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0)
        except RuntimeError as error:  # an unknown tag behind the dot
            tags = timm.list_pretrained(f"{name.split('.')[0]}*")[:8]
            raise ValueError(
                f"tower {arch!r}: timm cannot make it ({error}). With weights there are {tags}."
            ) from error


def _timm_statistics(arch: str) -> dict[str, tuple[float, ...]]:
    from timm.data import resolve_model_data_config  # noqa: PLC0415 (see `_create_timm`)

    config = resolve_model_data_config(_create_timm(arch))
    return {name: tuple(map(float, config[name])) for name in ("mean", "std")}


def _models() -> ModuleType:
    # Imported where a backbone is made: it takes a second and 90 MiB of memory (torch 2.13's
    # compiler comes with it), and a process that searches an index makes none.
    from torchvision import models  # noqa: PLC0415 (see above)

    return models


def _load_state(spec: TowerSpec, weights: str | Mapping[str, Tensor]) -> Tower:
    """Build a tower with a state dict, or with that of a file."""
    with torch.device("meta"):  # random values of VGG16's 138 M weights would cost seconds
        shapes = Tower(spec)
    model = shapes if spec.arch != "vgg" else Tower(spec)
    expected = model.net.state_dict()
    state = _read_state(weights) if isinstance(weights, str) else weights
    state = hub.strip_prefix(state, expected)
    taken = {  # `assign` below takes the values' type over, and files may hold half precision
        name: value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if name in expected and value.shape == expected[name].shape
    }
    missing = sorted(set(expected) - set(taken))
    if spec.arch == "vgg":
        missing = [name for name in missing if not name.startswith("classifier.")]
    if missing or not taken:
        source = weights if isinstance(weights, str) else "the hub"
        raise ValueError(
            f"tower {spec.arch!r}: weights of {source} lack {missing[:3]} or have them in another "
            f"shape ({len(missing)} of {len(expected)}); give the state dict of this architecture."
        )
    model.net.load_state_dict(taken, strict=False, assign=True)
    return model


def _read_state(path: str) -> Mapping[str, Tensor]:
    if os.path.isdir(path):
        names = (_WEIGHTS, "pytorch_model.bin")
        files = [os.path.join(path, name) for name in names]
        path = next((file for file in files if os.path.isfile(file)), path)
    if not os.path.isfile(path):
        raise ValueError(
            f"tower weights {path!r}: expected a .safetensors or .pth state dict, or a directory "
            "that holds one, got neither."
        )
    return hub.read_state(path, "tower weights")


def _download(name: str) -> Mapping[str, Tensor]:
    """Download the weights of a torchvision model from its hub, or take them from the cache."""
    models = _models()
    if name not in models.list_models(models):
        _build_torchvision(name)  # raises with the names
    url = models.get_model_weights(name)["DEFAULT"].url
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        raise ValueError(
            f"tower {name!r}: cannot download {url} ({error}). Download it on another machine and "
            f"copy it into {torch.hub.get_dir()}/checkpoints, or name a local "
            "tower directory, or a local file of weights, in its place."
        ) from error


def _download_timm(arch: str) -> Mapping[str, Tensor]:
    """Download the weights of a timm model from the Hugging Face hub, or take its cache's."""
    config = _create_timm(arch).pretrained_cfg
    source = config.get("hf_hub_id") or config.get("url")
    if not source:
        raise ValueError(
            f"tower {arch!r}: timm has no pretrained weights of it. Pass --weights FILE, or "
            "--weights random."
        )
    try:
        return _create_timm(arch, pretrained=True).state_dict()
    except Exception as error:
        # Each transport of the hub has its own errors (httpx, requests, OSError).
        raise ValueError(
            f"tower {arch!r}: cannot download its weights of {source} ({error}). On a machine with "
            f"access run `hf download {source} model.safetensors --local-dir DIR`, copy DIR here, "
            "and pass --weights DIR."
        ) from error
