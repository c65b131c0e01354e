"""Encode pairs once with the frozen CLIP and VAE, as Parquet files that training streams.

A row has the tile and its class map (ids) at the size of training, the BEV network's view of the
panorama, the tile's latent and CLIP's tokens of the panorama, in half precision: rounding of 5e-4,
against noise of 1 that training adds. Where pairs are mirrored it has the mirrored ones' too. A row
that failed has its reason in `error` alone. `batches.read_latents` reads the others.
"""

import functools
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray.data import Dataset
from torch import Tensor

from cvmatch.data import images, manifest, schema, storage
from cvmatch.data.pairs import PairDataset, read_pictures
from cvmatch.generate.batches import (
    AERIAL,
    AERIAL_MASK,
    CLIP_TOKENS,
    GROUND_VIEW,
    LATENT,
    LATENT_ROWS,
    ImageSizes,
    decode_pairs,
    to_npy,
)
from cvmatch.generate.conditioning import count_crops
from cvmatch.generate.encoders import FrozenEncoders, read_sizes
from cvmatch.generate.settings import Encode
from cvmatch.nn import geometry
from cvmatch.runtime import hardware, pools
from cvmatch.runtime.settings import Pool
from cvmatch.runtime.streams.output_directory import REJECTED
from cvmatch.runtime.streams.write import Stream, write_stream

VERSION = 6
"""Version of the rows on disk; rows of another one lie in another directory."""

Batch = dict[str, np.ndarray]

_log = logging.getLogger(__name__)


class EncodePairs:
    """Rows of PAIRS -> LATENT_ROWS; one that failed keeps its reason in `error`."""

    def __init__(self, config: Encode, sizes: ImageSizes) -> None:
        hardware.keep_freed_memory()
        self.encoders = _load_encoders(config).to(hardware.device())
        self.mirror, self.sizes = config.mirror, sizes

    def __call__(self, batch: Batch) -> pa.Table:
        """Encode the pairs of one batch."""
        pairs, errors = _decode(batch, self.sizes)
        columns: dict[str, Any] = {
            schema.PAIR_ID: [str(name) for name in batch[schema.PAIR_ID]],
            schema.ERROR: errors,
        }
        good = [row for row, error in enumerate(errors) if error is None]
        arrays = self._encode(pairs) if good else {}  # networks take no empty batch
        for name, values in arrays.items():
            columns[name] = np.full(len(errors), None, dtype=object)
            columns[name][good] = values
        return schema.conform(pa.table(columns), LATENT_ROWS)

    def _encode(self, pairs: Batch) -> Batch:
        ground, tile = torch.from_numpy(pairs[schema.GROUND]), torch.from_numpy(pairs[AERIAL])
        views, latents, tokens = self._run_networks(ground, tile)
        return {
            "key": pairs["key"],
            GROUND_VIEW: to_npy(views),
            AERIAL: to_npy(pairs[AERIAL]),
            AERIAL_MASK: to_npy(pairs[AERIAL_MASK]),
            LATENT: to_npy(latents),
            CLIP_TOKENS: to_npy(tokens),
        }

    @torch.inference_mode()
    def _run_networks(self, ground: Tensor, tile: Tensor) -> tuple[np.ndarray, ...]:
        device = self.encoders.mean.device
        ground, tile = ground.to(device) / 255, tile.to(device) / 255
        views, latents, tokens = [], [], []
        for mirrored in (False, True) if self.mirror else (False,):
            no_turns = torch.zeros(len(tile), dtype=torch.int64, device=device)
            mirror = torch.full((len(tile),), mirrored, device=device)
            latents.append(self.encoders.encode_tile(tile.flip(-1) if mirrored else tile))
            # Columns of a view average those from an azimuth on: a mirrored view is its own.
            features = self.encoders.encode_panorama(
                geometry.rotate90_panorama(ground, no_turns, mirror)
            )
            tokens.append(features.clip_tokens)
            views.append((features.view * 255).round().byte())
        arrays = (
            torch.stack(views, 1),
            torch.stack(latents, 1).half(),
            torch.stack(tokens, 1).half(),
        )
        return tuple(array.cpu().numpy() for array in arrays)


def cache_latents(
    config: Encode, pairs: PairDataset | None = None, pool: Pool | None = None
) -> str:
    """Write the latent cache of pairs, or find it; returns its directory.

    A pass that was killed goes on where it stopped. Rows that failed are named in rejected.jsonl.

    Args:
        config: which pairs, and how they are encoded.
        pairs: those of `config.data`, where they are open.
        pool: actors that encode them; None: one.

    Raises:
        ValueError: a base model or the data is not there, or see `write_stream`.
    """
    stream = _stream(config, pairs or PairDataset.open(config.data), pool or Pool())
    write_stream(stream)
    _warn_rejected(stream.output)
    return stream.output


def _stream(config: Encode, pairs: PairDataset, pool: Pool) -> Stream:
    provenance = input_provenance(config, pairs)
    name = f"{config.data.split}-{manifest.digest(provenance)[:12]}"
    return Stream(
        label=f"encode {config.data.split}",
        output=storage.join(storage.absolute(config.latent_cache), name),
        provenance=provenance,
        rows=functools.partial(_rows, config, pairs, pool),
        total=lambda: pairs.count,
        columns=LATENT_ROWS,
        pools={},
        operators={"read": read_pictures.__name__, "encode": EncodePairs.__name__},
        max_rejected=config.data.max_rejected,
        manifest={
            "config": config,
            "models": {"encoders": provenance["encoders"]},
            "source": config.data.root,
        },
    )


def _rows(config: Encode, pairs: PairDataset, pool: Pool) -> Dataset:
    sizes = read_sizes(config.diffusion, config.clip, config.conditioning.panorama_width)
    return pools.map_actors(pairs.rows(), EncodePairs, pool, config=config, sizes=sizes)


def _load_encoders(config: Encode) -> FrozenEncoders:
    return FrozenEncoders.load(config.diffusion, config.clip, config.conditioning.panorama_width)


def _decode(batch: Batch, sizes: ImageSizes) -> tuple[Batch, list[str | None]]:
    """Decode the good rows; returns also why each row failed, or None."""
    errors = schema.read_errors(batch[schema.ERROR])
    decoded = [decode_pairs({name: values[:0] for name, values in batch.items()}, sizes)]
    for row in range(len(errors)):
        try:
            alone = {name: values[row : row + 1] for name, values in batch.items()}
            decoded.append(decode_pairs(alone, sizes))
        except images.BadImage as error:  # the file has changed since ingest's check
            errors[row] = f"encode: {error}"
    arrays = {name: np.concatenate([part[name] for part in decoded]) for name in decoded[0]}
    return arrays, errors


def _warn_rejected(output: str) -> None:
    """Say how many rows an output lacks, to who writes it and to who finds it."""
    path = storage.join(output, REJECTED)
    failed = storage.read_text(path).count("\n")
    if failed:
        rows = manifest.read(output)["rows"]
        _log.warning(
            "%d of %d rows failed and are left out of training; see %s. To try them again, delete "
            "its directory.",
            *(failed, rows, path),
        )


def input_provenance(config: Encode, pairs: PairDataset) -> dict[str, Any]:
    """Return all that the rows depend on.

    Raises:
        ValueError: a base model or the data is not there.
    """
    encoders = _load_encoders(config)
    sizes = read_sizes(config.diffusion, config.clip, config.conditioning.panorama_width)
    configs = [encoders.clip.config.to_diff_dict(), dict(encoders.vae.config)]
    processor = encoders.processor
    return {
        "version": VERSION,
        "encoders": manifest.weights(encoders.clip, encoders.vae),
        "settings": manifest.digest(manifest.settings(configs)),
        "normalisation": [list(processor.image_mean), list(processor.image_std)],
        "panorama": [*sizes.panorama, count_crops(*sizes.panorama)],
        "tile": sizes.tile,
        "mirror": config.mirror,
        "decoder": images.PREPROCESS,
        "pictures": pairs.fingerprint,
    }
