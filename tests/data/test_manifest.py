import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cvmatch.data import manifest, schema


@dataclasses.dataclass(frozen=True)
class Settings:
    size: int = 64


WEIGHTS = {
    "conv.weight": torch.arange(6.0).reshape(2, 3),
    "conv.bias": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
    "steps": torch.tensor(3),
}


def model(directory, weights=WEIGHTS, settings=None, name="model.safetensors"):
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / name)
    (directory / "config.json").write_text(json.dumps(settings or {"width": 8, "layers": [1, 2]}))
    return str(directory)


def test_fingerprint_ignores_file_names_shards_key_order_and_versions(tmp_path):
    one = model(tmp_path / "one")
    two = tmp_path / "elsewhere"
    two.mkdir()
    first, *rest = WEIGHTS
    save_file({first: WEIGHTS[first]}, two / "a.safetensors", metadata={"format": "pt"})
    save_file({name: WEIGHTS[name] for name in rest}, two / "b.safetensors")
    (two / "model.safetensors.index.json").write_text('{"weight_map": {"steps": "b.safetensors"}}')
    settings = {"layers": [1, 2], "transformers_version": "5.0", "_name_or_path": "/x", "width": 8}
    (two / "config.json").write_text(json.dumps(settings, indent=4))
    assert manifest.fingerprint(str(two)) == manifest.fingerprint(one)


@pytest.mark.parametrize(
    "change",
    [
        {"conv.weight": WEIGHTS["conv.weight"] + 1e-6},
        {"conv.weight": WEIGHTS["conv.weight"].reshape(3, 2)},
        {"conv.weight": WEIGHTS["conv.weight"].view(torch.int32)},
        {"extra": torch.zeros(1)},
    ],
)
def test_fingerprint_changes_with_value_shape_dtype_and_name(tmp_path, change):
    before = manifest.fingerprint(model(tmp_path / "before"))
    assert manifest.fingerprint(model(tmp_path / "after", WEIGHTS | change)) != before


def test_fingerprint_changes_with_settings(tmp_path):
    before = manifest.fingerprint(model(tmp_path / "before"))
    after = model(tmp_path / "after", settings={"width": 9, "layers": [1, 2]})
    assert manifest.fingerprint(after) != before


def test_weights_of_modules_change_with_a_value_and_with_a_name():
    torch.manual_seed(0)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert manifest.weights(one) == manifest.weights(other)
    assert manifest.weights(one) != manifest.weights(nn.Sequential(one))
    with torch.no_grad():
        other.bias[0] += 1e-6
    assert manifest.weights(one) != manifest.weights(other)
    assert manifest.weights(one, other) != manifest.weights(other, one)


def test_fingerprint_of_a_directory_without_weights_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none"):
        manifest.fingerprint(str(tmp_path))


def test_read_gives_what_write_wrote(tmp_path):
    output = str(tmp_path / "rows")
    models = {"generator": "ab12"}
    manifest.write(output, rows=7, config=Settings(size=32), models=models, source="data/train")
    value = manifest.read(output)
    assert value["rows"] == 7
    assert value["config"] == {"size": 32}
    assert value["models"] == models
    assert value["source"] == "data/train"
    assert value["schema"] == schema.VERSION


def test_read_of_an_unfinished_output_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="the same command again resumes"):
        manifest.read(str(tmp_path))


def test_read_of_another_schema_version_gives_both(tmp_path):
    other = schema.VERSION + 1
    (tmp_path / manifest.NAME).write_text(json.dumps({"schema": other}))
    with pytest.raises(ValueError, match=f"version {schema.VERSION}, got {other}"):
        manifest.read(str(tmp_path))


def test_check_model_refuses_another_model_with_both_fingerprints(tmp_path):
    directory = model(tmp_path / "generator")
    made_by = manifest.fingerprint(directory)
    manifest.write(
        str(tmp_path), rows=1, config=Settings(), models={"generator": made_by}, source="data"
    )
    value = manifest.read(str(tmp_path))
    manifest.check_model(value, "generator", directory)
    model(tmp_path / "generator", WEIGHTS | {"steps": torch.tensor(4)})
    with pytest.raises(ValueError, match=f"{manifest.fingerprint(directory)}.*{made_by}"):
        manifest.check_model(value, "generator", directory)
    with pytest.raises(ValueError, match="none of that name"):
        manifest.check_model(value, "segmenter", directory)
