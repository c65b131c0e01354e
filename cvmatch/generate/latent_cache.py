"""Encode once: what the frozen networks give of every pair, as Parquet, which training streams.

A row has the tile and its class map (ids) at the size of training, the view that the rays take of
the panorama (and of the mirrored one) and, for each variant (turned or mirrored), the latent of the
tile and CLIP's states of the panorama, in half precision: rounding of 5e-4, against noise of 1 that
training adds. A row that failed has its reason in `error` alone. `encoded` reads the others.
"""

import functools
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray.data import Dataset
from torch import Tensor

from cvmatch.data import geometry, images, manifest, schema, storage
from cvmatch.data.pairs import PairDataset, read_pictures
from cvmatch.generate import augment, pretrained
from cvmatch.generate.batches import Sizes, decode_batch
from cvmatch.generate.encoders import Frozen
from cvmatch.generate.latent_rows import ROWS, npy
from cvmatch.generate.settings import Encode
from cvmatch.runtime import hardware, pools
from cvmatch.runtime.output_directory import REJECTED
from cvmatch.runtime.stream import Stream, write_stream

VERSION = 5  # 1 had no class maps, 2 arrays as lists, 3 pictures as files, 4 no mirrored views
"""Version of the rows on disk."""

Batch = dict[str, np.ndarray]

_log = logging.getLogger(__name__)


class EncodePairs:
    """Rows of PAIRS -> rows of `encoded.ROWS`; one that failed keeps its reason in `error`."""

    def __init__(self, config: Encode, sizes: Sizes) -> None:
        hardware.keep_freed_memory()
        encoders = pretrained.load_encoders(config.diffusion, config.clip, config.revision)
        self.frozen = Frozen(encoders, config.conditioning).to(hardware.device())
        self.config, self.sizes = config, sizes

    def __call__(self, batch: Batch) -> pa.Table:
        """Encode the pairs of one batch."""
        pairs, errors = _decoded(batch, self.sizes)
        columns: dict[str, Any] = {
            schema.PAIR_ID: [str(name) for name in batch[schema.PAIR_ID]],
            schema.ERROR: errors,
        }
        good = [row for row, error in enumerate(errors) if error is None]
        found = self._encoded(pairs) if good else {}  # networks take no empty batch
        for name, values in found.items():
            columns[name] = np.full(len(errors), None, dtype=object)
            columns[name][good] = values
        return schema.conform(pa.table(columns), ROWS)

    def _encoded(self, pairs: Batch) -> Batch:
        views, latents, states = self._look(
            torch.from_numpy(pairs["ground"]), torch.from_numpy(pairs["aerial"])
        )
        return {
            "key": pairs["key"],
            schema.GROUND: npy(views),
            schema.AERIAL: npy(pairs["aerial"]),
            schema.CLASSES: npy(pairs["classes"]),
            "latent": npy(latents),
            "states": npy(states),
        }

    @torch.inference_mode()
    def _look(self, ground: Tensor, tile: Tensor) -> tuple[np.ndarray, ...]:
        at = self.frozen.mean.device
        ground, tile = ground.to(at) / 255, tile.to(at) / 255
        views, latents, states = [], [], []
        for variant in range(augment.count(self.config.turns, self.config.mirror)):
            chosen = torch.full((len(tile),), variant, device=at)
            turns, mirror = augment.change(chosen, self.config.turns)
            latents.append(self.frozen.encode(geometry.rotate90_tile(tile, turns, mirror)))
            seen = self.frozen.look(geometry.rotate90_panorama(ground, turns, mirror))
            states.append(seen.states)
            if not turns.any():  # a view can be turned later, but not mirrored: `variants.varied`
                views.append((seen.view * 255).round().byte())
        halves = [torch.stack(some, dim=1).half() for some in (latents, states)]
        views, latents, states = (x.cpu().numpy() for x in (torch.stack(views, dim=1), *halves))
        return views, latents, states


def _decoded(batch: Batch, sizes: Sizes) -> tuple[Batch, list[str | None]]:
    """`decode_batch` of the good rows, and of each row why it failed, or None."""
    errors = schema.read_errors(batch[schema.ERROR])
    found = [decode_batch({name: values[:0] for name, values in batch.items()}, sizes)]
    for row in range(len(errors)):
        try:
            alone = {name: values[row : row + 1] for name, values in batch.items()}
            found.append(decode_batch(alone, sizes))
        except images.BadImage as error:  # the file has changed since ingest's check
            errors[row] = f"encode: {error}"
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}, errors


def encode(config: Encode, pairs: PairDataset | None = None) -> str:
    """Write the encoded rows, or find them there; returns their directory.

    `pairs`: those of `config.data`, where they are open. A pass that was killed goes on where it
    stopped. Rows that failed are named in rejected.jsonl.

    Raises:
        ValueError: a base model or the data is not there, or see `write_stream`.
    """
    stream = _stream(config, pairs or PairDataset.open(config.data))
    write_stream(stream)
    _tell_failed(stream.output)
    return stream.output


def _stream(config: Encode, pairs: PairDataset) -> Stream:
    depends = input_provenance(config, pairs)
    name = f"{config.data.split}-{manifest.digest(depends)[:12]}"
    models = {"encoders": depends["encoders"]}
    return Stream(
        label=f"encode {config.data.split}",
        output=storage.join(storage.absolute(config.output), name),
        provenance=depends,
        rows=functools.partial(_rows, config, pairs),
        total=lambda: pairs.count,
        columns=ROWS,
        pools={"encode-pool": config.pool},
        operators={"read": read_pictures.__name__, "encode": EncodePairs.__name__},
        max_rejected=config.data.max_rejected,
        manifest={"config": config, "models": models, "source": config.data.root},
    )


def _rows(config: Encode, pairs: PairDataset) -> Dataset:
    looks = config.conditioning
    sizes = pretrained.sizes(config.diffusion, config.clip, looks.panorama_width, config.revision)
    return pools.map_actors(pairs.rows(), EncodePairs, config.pool, config=config, sizes=sizes)


def _tell_failed(output: str) -> None:
    """Say how many rows an output lacks, to who makes it and to who finds it."""
    place = storage.join(output, REJECTED)
    failed = storage.read_text(place).count("\n")
    if failed:
        rows = manifest.read(output)["rows"]
        _log.warning(
            "%d of %d rows failed and are left out of training; see %s. To try them again, delete "
            "its directory.",
            *(failed, rows, place),
        )


def input_provenance(config: Encode, pairs: PairDataset) -> dict[str, Any]:
    """What the rows depend on.

    Raises:
        ValueError: a base model or the data is not there.
    """
    encoders = pretrained.load_encoders(config.diffusion, config.clip, config.revision)
    looks = config.conditioning
    sizes = pretrained.sizes(config.diffusion, config.clip, looks.panorama_width, config.revision)
    configs = [encoders.clip.config.to_diff_dict(), dict(encoders.vae.config)]
    return {
        "version": VERSION,
        "encoders": manifest.weights(encoders.clip, encoders.vae),
        "settings": manifest.digest(manifest.settings(configs)),
        "colours": [list(encoders.processor.image_mean), list(encoders.processor.image_std)],
        "tokens": looks.mode != "pooled",
        "panorama": [*sizes.panorama, looks.crops],
        "tile": sizes.tile,
        "variants": [config.turns, config.mirror],
        "decoder": images.PREPROCESS,
        "pictures": pairs.fingerprint,
    }
