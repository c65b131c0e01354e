"""Towers: saved and loaded, reshaped, torchvision's and timm's, and refused with advice."""

import urllib.error

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import nn

from cvmatch.nn import backbones
from cvmatch.nn.backbones import Tower, TowerSpec

SMALL = TowerSpec(arch="vgg", layers=(4, "M", 8), grid=(2, 4), dim=6)


def picture(height=16, width=32):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def weight(model, layer):
    return model.net.state_dict()[f"{layer}.weight"]


def test_tower_saved_and_loaded_gives_the_same_features(tmp_path):
    model = Tower(SMALL)
    backbones.save_tower(model, str(tmp_path))
    again = backbones.load_tower(str(tmp_path))
    assert again.spec == SMALL
    assert torch.equal(again(picture()), model(picture()))


def test_tower_saved_in_half_precision_loads_as_float32(tmp_path):
    backbones.save_tower(Tower(SMALL).half(), str(tmp_path))
    assert {p.dtype for p in backbones.load_tower(str(tmp_path)).parameters()} == {torch.float32}


def test_tower_given_another_grid_keeps_convolutions_and_starts_a_new_head(tmp_path):
    model = Tower(SMALL)
    backbones.save_tower(model, str(tmp_path))
    wide = backbones.load_tower(str(tmp_path), grid=(1, 2))
    assert wide(picture()).shape == (2, 6)
    assert torch.equal(weight(wide, "features.0"), weight(model, "features.0"))


def test_tower_given_a_grid_of_as_many_cells_keeps_the_head(tmp_path):
    model = Tower(SMALL)
    backbones.save_tower(model, str(tmp_path))
    tall = backbones.load_tower(str(tmp_path), grid=(4, 2))
    assert tall.spec.grid == (4, 2)
    assert torch.equal(weight(tall, "classifier.0"), weight(model, "classifier.0"))


def test_tower_loaded_can_be_trained_in_every_weight(tmp_path):
    torch.manual_seed(0)  # by chance, none of four channels looks at a picture
    backbones.save_tower(Tower(SMALL), str(tmp_path))
    model = backbones.load_tower(str(tmp_path))
    model(picture()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_tower_vgg16_gives_fc7_behind_its_relu():
    with torch.device("meta"):
        model = Tower(TowerSpec())
    assert model.dim == 4096
    kinds = [type(layer) for layer in model.net.get_submodule("classifier").children()]
    assert kinds == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Identity]


@pytest.mark.parametrize(
    ("name", "dim"), [("convnext_tiny", 768), ("resnet18", 512), ("vit_b_16", 768)]
)
def test_tower_of_torchvision_loses_its_classifier_only(name, dim):
    with torch.device("meta"):
        model = Tower(TowerSpec(arch=name))
        whole = torchvision.models.get_model(name)
    assert model.dim == dim
    lost = set(whole.state_dict()) - set(model.net.state_dict())
    assert sorted(whole.state_dict()[key].shape[0] for key in lost) == [1000, 1000]


def test_tower_weights_from_a_file_are_used_without_their_classifier(tmp_path):
    whole = torchvision.models.resnet18(weights=None).eval()
    path = str(tmp_path / "resnet18.safetensors")
    save_file(whole.state_dict(), path)
    model = backbones.load_tower("resnet18", path).eval()
    expected = whole.fc(model(picture(32, 32)))
    torch.testing.assert_close(expected, whole(picture(32, 32)))


def test_tower_of_a_model_without_linear_classifier_is_refused():
    with pytest.raises(ValueError, match="no linear classifier"):
        Tower(TowerSpec(arch="squeezenet1_1"))


def test_tower_weights_of_another_architecture_are_refused(tmp_path):
    path = str(tmp_path / "other.safetensors")
    save_file({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"lack .* give the state dict of this architecture"):
        backbones.load_tower("resnet18", path)


def test_tower_name_unknown_is_refused_with_what_would_do():
    with pytest.raises(
        ValueError, match=r"expected a directory with config.json, or a torchvision"
    ):
        backbones.load_tower("vgg_seventeen")


def test_tower_hub_out_of_reach_says_what_to_download_and_where_to(monkeypatch):
    def unreachable(*_args, **_options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    advice = r"copy it into .*/checkpoints, or name a local tower directory"
    with pytest.raises(ValueError, match=rf"https://\S+vgg16\S+\.pth .*{advice}"):
        backbones.load_tower("vgg16")


def test_features_of_a_tower_directory_are_its_convolutions(tmp_path):
    model = Tower(SMALL)
    backbones.save_tower(model, str(tmp_path))
    stack = backbones.load_vgg_features(str(tmp_path))
    assert torch.equal(stack(picture()), model.net.get_submodule("features")(picture()))


def test_features_of_a_model_that_is_no_vgg_are_refused():
    with pytest.raises(ValueError, match="is not a VGG"):
        backbones.load_vgg_features("resnet18", "random")


def test_normalise_imagenet_mean_becomes_zero_and_one_deviation_becomes_one():
    mean, std = torch.tensor(backbones.MEAN), torch.tensor(backbones.STD)
    image = torch.stack([mean, mean + std])[:, :, None, None]
    expected = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 1, 1)
    torch.testing.assert_close(backbones.normalise(image), expected, atol=1e-6, rtol=0)


def test_spec_without_convolutions_is_refused():
    with pytest.raises(ValueError, match="needs convolution widths"):
        TowerSpec(arch="vgg", layers=("M",))


def test_spec_survives_json():
    for spec in (SMALL, TowerSpec(), TowerSpec(arch="timm:test_vit", mean=(0.5, 0.5, 0.5))):
        assert TowerSpec.from_json(spec.to_json()) == spec
    assert TowerSpec().to_json() == {"arch": "vgg16"}


def test_vgg_of_given_widths_equals_torchvisions():
    layers = (4, "M", 8, 8, "M")
    for batch_norm in (False, True):
        model = Tower(TowerSpec(arch="vgg", layers=layers, batch_norm=batch_norm)).eval()
        stack = torchvision.models.vgg.make_layers(list(layers), batch_norm)
        stack.load_state_dict(model.net.get_submodule("features").state_dict())
        expected = stack.eval()(picture())
        assert torch.equal(model.net.get_submodule("features")(picture()), expected)


# --- timm ---


def timm_weights(path, name="test_convnext"):
    """Weights as a hub has them: with a classifier."""
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained=False).eval()
    save_file(model.state_dict(), str(path))
    return model


def test_timm_tower_from_a_file_has_the_features_in_front_of_the_classifier(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = timm_weights(path)
    for weights in (str(path), str(tmp_path)):  # the file, or what `hf download` left
        model = backbones.load_tower("timm:test_convnext", weights).eval()
        features = model(picture(32, 64))
        assert features.shape == (2, model.dim)
        torch.testing.assert_close(
            whole.get_submodule("head.fc")(features), whole(picture(32, 64)), atol=1e-5, rtol=1e-4
        )


def test_timm_tower_normalises_as_its_weights_expect_and_is_loaded_without_its_hub(
    tmp_path, monkeypatch
):
    model = backbones.load_tower("timm:test_vit3", backbones.RANDOM).eval()
    known = resolve_model_data_config(timm.create_model("test_vit3"))
    assert (model.spec.mean, model.spec.std) == (known["mean"], known["std"])
    image = picture(160, 160)
    torch.testing.assert_close(
        model.normalise(image)[0, 0], (image[0, 0] - known["mean"][0]) / known["std"][0]
    )
    backbones.save_tower(model, str(tmp_path))
    create = timm.create_model

    def offline(*names, pretrained=False, **options):
        assert not pretrained
        return create(*names, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    again = backbones.load_tower(str(tmp_path)).eval()
    assert again.spec == model.spec
    assert torch.equal(again(model.normalise(image)), model(model.normalise(image)))


def test_timm_tower_out_of_reach_says_what_to_download(monkeypatch):
    create = timm.create_model

    def unreachable(*names, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return create(*names, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"no network.*hf download timm/test_convnext.*--weights"):
        backbones.load_tower("timm:test_convnext.r160_in1k")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:convnext_bass", r"expected the name of a model of timm.*convnext_"),
        ("timm:test_convnext.of_nobody", r"With weights there are .*test_convnext.r160_in1k"),
    ],
)
def test_timm_name_unknown_is_refused_with_names_like_it(name, message):
    with pytest.raises(ValueError, match=message):
        backbones.load_tower(name)


def test_grid_of_another_tower_than_a_vgg_directory_is_refused():
    with pytest.raises(ValueError, match="Leave out --grid"):
        backbones.load_tower("resnet18", backbones.RANDOM, grid=(1, 2))
