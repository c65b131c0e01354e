"""`manifest.json` beside each output: what the rows are, and which models made them."""

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cvmatch import __version__
from cvmatch import config as configs
from cvmatch.data import schema, storage

NAME = "manifest.json"

_VOLATILE = {"_name_or_path", "_diffusers_version", "transformers_version"}
"""JSON keys that say where a model came from or which library saved it, not what it computes."""


class Manifest(TypedDict):
    """What `manifest.json` says of an output."""

    cvmatch: str
    """Version that wrote it."""
    schema: int
    """Version of the rows."""
    rows: int
    config: dict[str, Any]
    """Settings of the job, as `config.plain` returns them."""
    models: dict[str, str]
    """Fingerprint of each model that made the rows, by name."""
    source: str
    """Location that the rows were made from."""
    created: str
    """Date and time, ISO 8601."""


def fingerprint(directory: str) -> str:
    """SHA-256 (hex) of a model directory's tensors and settings, whatever its files are called.

    Hashes name, dtype, shape and bytes of each tensor of all `*.safetensors` below, in the order of
    the names, and the content of all `*.json` (keys sorted; paths and library versions left out).

    Raises:
        FileNotFoundError: no `*.safetensors` there.
    """
    parts, found = [], False
    for path in _files(storage.local_directory(directory)):
        if path.endswith(".safetensors"):
            parts += _tensors(path).values()
            found = True
        elif path.endswith(".json") and not path.endswith(".index.json"):  # lists file names
            parts.append("json " + _canonical(path))
    if not found:
        raise FileNotFoundError(
            f"{storage.describe_local(directory)}: expected a model directory with *.safetensors, "
            "found none. Pass the directory (or URI) that training published or that the hub's "
            "files were downloaded to."
        )
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def weights(*modules: nn.Module) -> str:
    """SHA-256 (hex) of the tensors of modules in memory, by name: for models without a directory.

    A hub's revision may move, and a directory may be renamed; the weights say what was computed.
    """
    states = [module.state_dict() for module in modules]
    return digest([_line(name, state[name]) for state in states for name in sorted(state)])


def tensors(directory: str) -> dict[str, str]:
    """Return name, dtype, shape and hash of each tensor of all `*.safetensors` below, by name."""
    paths = [path for path in _files(directory) if path.endswith(".safetensors")]
    return {name: line for path in paths for name, line in _tensors(path).items()}


def settings(value: Any) -> Any:
    """Drop from a model's configuration where it came from and which library saved it."""
    if isinstance(value, dict):
        return {k: settings(v) for k, v in value.items() if k not in _VOLATILE}
    if isinstance(value, list):
        return [settings(item) for item in value]
    return value


def digest(plain: Any) -> str:
    """SHA-256 (hex) of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write(output: str, *, rows: int, config: Any, models: Mapping[str, str], source: str) -> None:
    """Write `<output>/manifest.json`. Write it last: its presence marks the output as complete.

    The arguments are as in `Manifest`.
    """
    value = Manifest(
        cvmatch=__version__,
        schema=schema.VERSION,
        rows=rows,
        config=configs.plain(config),
        models=dict(models),
        source=source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    storage.write_json(storage.join(output, NAME), value)


def read(output: str) -> Manifest:
    """Read the manifest of an output.

    Raises:
        FileNotFoundError: none there, so the job that makes the output did not finish.
        ValueError: of another schema version.
    """
    location = storage.join(output, NAME)
    if not storage.exists(location):
        raise FileNotFoundError(
            f"{output}: expected {NAME}, found none. Run the job that writes it to the end "
            "(the same command again resumes it), or pass another location."
        )
    value = storage.read_json(location)
    if value.get("schema") != schema.VERSION:
        raise ValueError(
            f"{location}: expected schema version {schema.VERSION}, got {value.get('schema')}. "
            "Make the rows again with this version of cvmatch, into an empty directory."
        )
    return value


def check_model(manifest: Manifest, name: str, directory: str) -> None:
    """Check that the rows were made by the model in `directory`.

    Raises:
        ValueError: by another one, or by none of that name; gives both fingerprints.
    """
    made_by = manifest["models"].get(name, f"none of that name, only {sorted(manifest['models'])}")
    here = fingerprint(directory)
    if made_by != here:
        raise ValueError(
            f"rows from {manifest['source']}: expected {name} {here} (of {directory}), got "
            f"{made_by}. Pass the {name} that made them, or make them again with this one."
        )


def _files(directory: str) -> list[str]:
    return [
        os.path.join(folder, name)
        for folder, _, names in os.walk(directory)
        for name in names
        if name != NAME
    ]


def _tensors(path: str) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return {name: _line(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _line(name: str, tensor: Tensor) -> str:
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return f"tensor {name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _canonical(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return json.dumps(settings(json.load(file)), sort_keys=True)
