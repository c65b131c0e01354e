"""SegFormer with its preprocessing: base models, flips, saving and loading."""

import json
import os
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from cvmatch.segment.batches import FILE, Preprocess
from cvmatch.segment.model import BASES, Segmenter, check_base
from tests.helpers.segmenter import SIZE, picture, planes, segformer


def test_scores_flip_is_the_mean_over_picture_and_mirror(lively: Segmenter):
    tiles = torch.stack([planes(1), planes(2)])
    with torch.no_grad():
        plain, mirrored = (lively.scores(t) for t in (tiles, tiles.flip(-1)))
        flipped = lively.scores(tiles, flip=True)
    torch.testing.assert_close(flipped, (plain + mirrored.flip(-1)) / 2, atol=1e-4, rtol=0)
    assert (plain - mirrored.flip(-1)).abs().max() > 1  # without it, the mirror matters


def test_scores_flip_of_the_mirror_are_the_mirrored_scores(lively: Segmenter):
    tiles = torch.stack([planes(1), planes(2)])
    with torch.no_grad():
        scores, mirrored = (lively.scores(t, flip=True) for t in (tiles, tiles.flip(-1)))
    torch.testing.assert_close(mirrored.flip(-1), scores, atol=1e-4, rtol=0)
    maps = [lively.predict(t, flip=True) for t in (tiles, tiles.flip(-1))]
    assert (maps[0] == maps[1].flip(-1)).float().mean() > 0.999  # but for ties


@pytest.mark.parametrize("change", [{"mean": [0.0, 0.0, 0.0]}, {"std": [1.0, 1.0, 1.0]}])
def test_segmenter_inference_normalises_as_the_saved_file_says(
    published: str, change: dict[str, list[float]]
):
    tile = torch.from_numpy(picture(1, SIZE, SIZE).transpose(2, 0, 1).copy())[None]
    before = Segmenter.load(published).logits(tile)
    path = os.path.join(published, FILE)
    with open(path) as stream:
        saved = json.load(stream)
    with open(path, "w") as stream:
        json.dump(saved | change, stream)
    assert not torch.equal(Segmenter.load(published).logits(tile), before)


def test_segmenter_tile_of_another_size_is_refused(published: str):
    with pytest.raises(ValueError, match=r"64 x 64 pixels.*got \(32, 32\)"):
        Segmenter.load(published).predict(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_segmenter_bare_segformer_is_refused(base: str):
    with pytest.raises(ValueError, match=r"preprocess\.json.*--base"):
        Segmenter.load(base)


def test_segmenter_saved_and_loaded_keeps_preprocessing(published: str):
    assert Segmenter.load(published).preprocess == Preprocess(size=SIZE)


@pytest.mark.parametrize("num_classes", [5, 6])
def test_from_base_other_number_of_classes_gets_a_new_head_only(base: str, num_classes: int):
    net = Segmenter.from_base(base, Preprocess(size=SIZE, num_classes=num_classes)).net
    assert net.decode_head.classifier.weight.shape[0] == num_classes
    before = segformer(150).state_dict()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"decode_head.classifier.weight", "decode_head.classifier.bias"}


def test_from_base_right_number_of_classes_keeps_its_head(tmp_path: os.PathLike):
    segformer(5).save_pretrained(tmp_path)
    kept = Segmenter.from_base(str(tmp_path), Preprocess(size=SIZE)).net.state_dict()
    before = segformer(5).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in kept.items())


def test_from_base_missing_model_says_what_to_download():
    with pytest.raises(ValueError, match=r"--base /nowhere/b3.*hf download.*--base DIR"):
        Segmenter.from_base("/nowhere/b3", Preprocess())


def test_from_base_pickled_weights_are_not_read(base: str, tmp_path: os.PathLike):
    net = segformer(150)
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), os.path.join(tmp_path, "pytorch_model.bin"))
    with pytest.raises(ValueError, match="safetensors"):
        Segmenter.from_base(str(tmp_path), Preprocess())


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("b0", "nvidia/segformer-b0-finetuned-ade-512-512"),
        ("b3", "nvidia/segformer-b3-finetuned-ade-512-512"),
        ("b5", "nvidia/segformer-b5-finetuned-ade-640-640"),
    ],
)
def test_from_base_short_name_is_looked_for_on_the_hub(
    name: str, repository: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    with pytest.raises(ValueError, match=f"--base {repository}: .*hf download {repository}"):
        Segmenter.from_base(name, Preprocess())


# Xie et al. 2021: widths and depths from table 6, millions of parameters from table 1 (encoder,
# decoder, and both rounded to one digit; all weights and biases, with the head's 150 classes).
PUBLISHED = {
    "b0": ([32, 64, 160, 256], [2, 2, 2, 2], 256, 3.4, 0.4),
    "b1": ([64, 128, 320, 512], [2, 2, 2, 2], 256, 13.1, 0.6),
    "b2": ([64, 128, 320, 512], [3, 4, 6, 3], 768, 24.2, 3.3),
    "b3": ([64, 128, 320, 512], [3, 4, 18, 3], 768, 44.0, 3.3),
    "b4": ([64, 128, 320, 512], [3, 8, 27, 3], 768, 60.8, 3.3),
    "b5": ([64, 128, 320, 512], [3, 6, 40, 3], 768, 81.4, 3.3),
}


@pytest.mark.parametrize("name", BASES)
def test_segformer_has_the_published_number_of_parameters(name: str):
    widths, depths, head, *millions = PUBLISHED[name]
    sizes: dict[str, Any] = {"hidden_sizes": widths, "depths": depths, "decoder_hidden_size": head}
    sizes |= {"num_attention_heads": [1, 2, 5, 8], "num_labels": 150}
    with torch.device("meta"):
        net = SegformerForSemanticSegmentation(SegformerConfig(**sizes))
    counts = [
        sum(weight.numel() for weight in part.parameters()) / 1e6
        for part in (net.segformer, net.decode_head)
    ]
    assert counts == pytest.approx(millions, abs=0.1)
    assert sum(counts) == pytest.approx(sum(millions), abs=0.1)  # B3: 47.3


@pytest.mark.parametrize("lost", ["segformer.", "decode_head.batch_norm.weight"])
def test_segmenter_base_whose_weights_do_not_fit_is_refused(tmp_path, lost: str):
    segformer(150).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    kept = {name: value for name, value in state.items() if not name.startswith(lost)}
    save_file(kept, file, {"format": "pt"})
    for load in (check_base, Segmenter.from_base):
        with pytest.raises(ValueError, match=f"--base .*expected all weights.*{lost}"):
            load(str(tmp_path), Preprocess(size=SIZE))
    save_file({f"model.{name}": value for name, value in state.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"begin with 'model\.'"):
        check_base(str(tmp_path), Preprocess(size=SIZE))


def test_segmenter_base_of_the_encoder_alone_gets_a_head(tmp_path):
    whole = segformer(150)
    whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if k.startswith("segformer.")}
    save_file(state, file, {"format": "pt"})
    check_base(str(tmp_path), Preprocess(size=SIZE))
    net = Segmenter.from_base(str(tmp_path), Preprocess(size=SIZE)).net
    torch.testing.assert_close(net.segformer.state_dict(), whole.segformer.state_dict())
