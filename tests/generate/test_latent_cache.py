"""The latent cache: what it depends on, rows that fail, and mirrored pairs."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from pyarrow import parquet
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from cvmatch.data import images, schema
from cvmatch.data.pairs import PairDataset
from cvmatch.data.settings import Ingest
from cvmatch.generate.batches import ImageSizes, augment, decode_pairs, read_latents, to_tensors
from cvmatch.generate.conditioning import (
    resize_panorama,
)
from cvmatch.generate.encoders import read_sizes
from cvmatch.generate.latent_cache import EncodePairs, cache_latents, input_provenance
from cvmatch.generate.settings import Conditioning, Encode
from cvmatch.nn import geometry, rng
from cvmatch.runtime.settings import Pool
from cvmatch.runtime.streams.output_directory import OutputDirectory
from tests.helpers.generator import (
    CONDITIONING,
    make_generator,
    make_vae,
)

WIDE = (128, 512)
"""Larger than the view of the BEV network, 64 x 256."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Tiny base models in their on-disk formats: of the UNet the sizes alone."""
    at = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    vae = make_vae((8, 8), layers_per_block=1, norm_num_groups=4)
    vae.save_pretrained(at / "diffusion" / "vae")
    UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).save_config(at / "diffusion" / "unet")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=WIDE[0],
            patch_size=32,
        )
    ).save_pretrained(at / "clip")
    CLIPImageProcessor().save_pretrained(at / "clip")
    return at


def settings(base: Path, data: Ingest | None = None, output: str = "") -> Encode:
    return Encode(
        data=data or Ingest(),
        diffusion=str(base / "diffusion"),
        clip=str(base / "clip"),
        conditioning=Conditioning(panorama_width=WIDE[1]),
        mirror=True,
        latent_cache=output,
    )


def actor(asked: Encode) -> tuple[EncodePairs, ImageSizes]:
    sizes = read_sizes(asked.diffusion, asked.clip, WIDE[1])
    return EncodePairs(asked, sizes), sizes


def pairs(rows: int) -> dict[str, np.ndarray]:
    """Rows of PAIRS with pictures of noise and no class map."""
    noise = np.random.default_rng(0)
    kinds = {schema.GROUND: WIDE, schema.AERIAL: (32, 32)}
    drawn = {
        name: [images.encode(noise.integers(0, 256, (*size, 3), np.uint8)) for _ in range(rows)]
        for name, size in kinds.items()
    }
    return {
        schema.PAIR_ID: np.array([f"{row:07d}" for row in range(rows)], dtype=object),
        **{name: np.array(values, dtype=object) for name, values in drawn.items()},
        schema.CLASSES: np.full(rows, None, dtype=object),
        schema.ERROR: np.full(rows, None, dtype=object),
    }


def read(table) -> dict[str, np.ndarray]:
    """A batch as Ray gives it."""
    return {name: table[name].to_numpy() for name in table.column_names}


# Mirrored pairs


def test_mirrored_view_is_that_of_the_mirrored_panorama_where_it_is_smaller(base):
    encoder, sizes = actor(settings(base))
    rows = pairs(16)
    live = {name: torch.from_numpy(array) for name, array in decode_pairs(rows, sizes).items()}
    cached = {
        name: torch.from_numpy(a.copy()) for name, a in to_tensors(read(encoder(rows))).items()
    }
    found = augment(cached | {"epoch": torch.tensor(0)}, mirror=True, seed=0)
    assert 0 < found.mirrored.sum() < 16
    no_turns = torch.zeros(16, dtype=torch.int64)
    tile = geometry.rotate90_tile(live["aerial"].float() / 255, no_turns, found.mirrored)
    torch.testing.assert_close(found.tile, tile)
    ground = geometry.rotate90_panorama(live["ground"].float() / 255, no_turns, found.mirrored)
    half = 0.5 / 255 + 1e-6  # the cached view is of whole numbers
    torch.testing.assert_close(found.ground_view, resize_panorama(ground), atol=half, rtol=0)


# Rows that fail


def test_rows_that_fail_keep_their_reason_and_the_rest_is_encoded(base, tmp_path):
    encoder, _ = actor(settings(base))
    rows = pairs(3)
    alone = to_tensors(read(encoder({name: values[2:] for name, values in rows.items()})))
    rows[schema.GROUND][0] = rows[schema.GROUND][0][:100]  # truncated
    rows[schema.ERROR][1] = "aerial 1.png: no such file"
    table = encoder(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    directory = OutputDirectory(str(tmp_path))
    directory.refresh()
    assert directory.rows == 3
    reasons = {row["pair_id"]: row["reason"] for row in directory.failed}
    assert reasons.keys() == {"0000000", "0000001"}
    assert reasons["0000000"].startswith("encode: cannot be decoded")
    assert reasons["0000001"] == "aerial 1.png: no such file"
    good = to_tensors(read(table.slice(2)))
    assert good["key"].tolist() == [rng.row_key("0000002")]
    assert good.keys() == alone.keys()
    for name, values in alone.items():
        np.testing.assert_array_equal(good[name], values)


@pytest.mark.parametrize("count", [0, 2])
def test_batch_without_a_good_row_gives_the_columns_of_any_other(base, count):
    encoder, _ = actor(settings(base))
    rows = pairs(2)
    whole = encoder(rows)
    rows[schema.ERROR][:] = "ground 1.jpg: no such file"
    table = encoder({name: values[:count] for name, values in rows.items()})
    assert table.schema == whole.schema
    assert table[schema.ERROR].to_pylist() == ["ground 1.jpg: no such file"] * count


@pytest.mark.ray
def test_encode_names_rows_that_fail_and_gives_training_the_others(
    base, world_root, tmp_path, caplog
):
    root = tmp_path / "world"
    shutil.copytree(world_root, root)
    data = Ingest(root=str(root), limit=8, block=2, max_rejected=0.3)
    ids = [row[schema.PAIR_ID] for row in PairDataset.open(data).rows().take_all()]
    for name in ids[2:4]:  # a whole block
        (root / "streetview" / f"{name}.jpg").unlink()
    asked = settings(base, data, str(tmp_path / "encoded"))
    directory = cache_latents(asked, pool=Pool(batch=2))
    named = (Path(directory) / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["pair_id"] for line in named] == ids[2:4]
    keys = [row["key"] for row in read_latents(directory).take_all()]
    assert keys == [rng.row_key(name) for name in ids[:2] + ids[4:]]
    assert read_latents(directory).count() == 6
    caplog.clear()
    caplog.set_level("WARNING", "cvmatch")
    assert cache_latents(asked) == directory
    assert "2 of 8 rows" in caplog.text  # who finds them there is told so too
    strict = replace(
        asked, data=replace(data, max_rejected=0.1), latent_cache=str(tmp_path / "other")
    )
    with pytest.raises(ValueError, match="at most 10% of 8 rows to fail, got 2"):
        cache_latents(strict)


# What the rows depend on


@pytest.mark.ray
@pytest.mark.parametrize(
    ("file", "setting", "value"),
    [
        ("diffusion/vae/config.json", "scaling_factor", 0.5),
        ("diffusion/unet/config.json", "sample_size", 8),
        ("clip/config.json", "hidden_act", "gelu"),
        ("clip/preprocessor_config.json", "image_mean", [0.5, 0.5, 0.5]),
        ("clip/preprocessor_config.json", "image_std", [0.5, 0.5, 0.5]),
    ],
)
def test_encodings_with_other_settings_of_a_base_model_are_others(
    base, world_root, tmp_path, file, setting, value
):
    data = Ingest(root=world_root, split="val")
    pairs = PairDataset.open(data)
    before = input_provenance(settings(base, data), pairs)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert input_provenance(settings(other, data), pairs) == before  # the same models elsewhere
    config = json.loads((other / file).read_text())
    (other / file).write_text(json.dumps(config | {setting: value}))
    assert input_provenance(settings(other, data), pairs) != before


@pytest.mark.ray
def test_cache_holds_what_the_encoders_return(toy: str, world_root: str, tmp_path):
    data = Ingest(root=world_root, split="val", block=4)
    asked = Encode(
        data=data,
        diffusion=os.path.join(toy, "diffusion"),
        clip=os.path.join(toy, "clip"),
        conditioning=CONDITIONING,
        mirror=True,
        latent_cache=str(tmp_path / "latents"),
    )
    directory = cache_latents(asked)
    sizes = read_sizes(asked.diffusion, asked.clip, CONDITIONING.panorama_width)
    stored = {row["key"]: row for row in read_latents(directory).take_all()}
    batch = PairDataset.open(data).rows().take_batch(100, batch_format="numpy")
    assert isinstance(batch, dict)
    pairs = decode_pairs(batch, sizes)
    live = {key: {name: pairs[name][row] for name in pairs} for row, key in enumerate(pairs["key"])}
    assert stored.keys() == live.keys()
    model = make_generator(toy)
    for key, row in live.items():
        found = stored[key]
        np.testing.assert_array_equal(found["ground_view"], row["ground"])
        np.testing.assert_array_equal(found["aerial"], row["aerial"])
        np.testing.assert_array_equal(found["aerial_mask"], row["aerial_mask"])
        assert len(np.unique(found["aerial_mask"])) > 2
        ground, tile = (torch.from_numpy(row[n].copy())[None] / 255 for n in ("ground", "aerial"))
        mirrored = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
        tiles = torch.cat([tile, geometry.rotate90_tile(tile, *mirrored)])
        views = torch.cat([ground, geometry.rotate90_panorama(ground, *mirrored)])
        latent, tokens = (torch.from_numpy(found[n].copy()) for n in ("latent", "clip_tokens"))
        expected = model.encoders.encode_tile(tiles)
        torch.testing.assert_close(latent.float(), expected, atol=5e-3, rtol=2e-3)
        expected = model.encoders.encode_panorama(views).clip_tokens
        torch.testing.assert_close(tokens.float(), expected, atol=5e-3, rtol=2e-3)
    parquet = os.path.join(directory, sorted(os.listdir(directory))[0])
    before = os.stat(parquet).st_mtime_ns
    assert cache_latents(asked) == directory  # found, and left as it is
    assert os.stat(parquet).st_mtime_ns == before
    assert cache_latents(replace(asked, mirror=False)) != directory
    # Other pictures at the same place are not taken for these.
    copied = tmp_path / "world"
    shutil.copytree(world_root, copied)
    moved = replace(asked, data=replace(data, root=str(copied)))
    assert cache_latents(moved) == directory  # the same pictures elsewhere are
    picture = next((copied / "bingmap").iterdir())
    images.open_image(picture.read_bytes()).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    shutil.rmtree(copied / ".cvmatch")
    assert cache_latents(moved) != directory
