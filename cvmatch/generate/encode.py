"""Encode once: what the frozen networks give of every pair, as Parquet, which training streams.

A row has the tile and its class map (ids) at the size of training, the view that the rays take of
the panorama and, for each variant (turned or mirrored), the latent of the tile and CLIP's states of
the panorama, in half precision: rounding of 5e-4, against noise of 1 that training adds. `encoded`
reads them.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvmatch import engine, geometry, hardware, images, manifest, progress, schema, storage
from cvmatch.flow import Flow, each_step
from cvmatch.generate import parts, rays, variants
from cvmatch.generate.condition import Conditioning
from cvmatch.generate.encoded import npy
from cvmatch.generate.frozen import Frozen
from cvmatch.generate.pairs import Sizes, decode_batch
from cvmatch.ingest import Ingest, accepted, fingerprint, ingest, read_pictures
from cvmatch.written import Judge, Written

VERSION = 4  # 1 had no class maps, 2 kept arrays as lists of numbers, 3 pictures as files
"""Version of the rows on disk."""

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode:
    """Run the frozen networks over pairs, and keep what they give."""

    data: Ingest
    """Pairs."""
    diffusion: str
    """Whose VAE: hub id or local directory."""
    revision: str
    """Revision of `diffusion` on the hub."""
    clip: str
    """CLIP with a vision tower: hub id or local directory."""
    conditioning: Conditioning
    """How CLIP looks at panoramas."""
    turns: bool
    """Also of tiles turned by one, two and three quarters."""
    mirror: bool
    """Also of mirrored ones."""
    output: str
    """Directory of encoded data sets; this one's name is a fingerprint of all it depends on."""
    pool: engine.Pool
    """Actors."""


class EncodePairs:
    """Rows of PAIRS -> `pair_id`, `key` and what a stored row has; no failed rows."""

    def __init__(self, config: Encode, sizes: Sizes) -> None:
        encoders = parts.load_encoders(config.diffusion, config.clip, config.revision)
        self.frozen = Frozen(encoders, config.conditioning).to(hardware.device())
        self.config, self.sizes = config, sizes

    def __call__(self, batch: Batch) -> Batch:
        """Encode the pairs of one batch; pictures that ingest passed are there."""
        pairs = decode_batch(batch, self.sizes)
        good = [i for i, error in enumerate(batch[schema.ERROR]) if not error]
        latents, states, view = self._look(
            torch.from_numpy(pairs["ground"]), torch.from_numpy(pairs["aerial"])
        )
        return {
            schema.PAIR_ID: np.array([str(batch[schema.PAIR_ID][i]) for i in good], dtype=object),
            "key": pairs["key"],
            schema.GROUND: npy(view),
            schema.AERIAL: npy(pairs["aerial"]),
            schema.CLASSES: npy(pairs["classes"]),
            "latent": npy(latents),
            "states": npy(states),
        }

    @torch.inference_mode()
    def _look(self, ground: Tensor, tile: Tensor) -> tuple[np.ndarray, ...]:
        at = self.frozen.mean.device
        ground, tile = ground.to(at) / 255, tile.to(at) / 255
        latents, states = [], []
        for variant in range(variants.count(self.config.turns, self.config.mirror)):
            chosen = torch.full((len(tile),), variant, device=at)
            how = variants.change(chosen, self.config.turns)
            latents.append(self.frozen.encode(geometry.turned_tile(tile, *how)))
            states.append(self.frozen.look(geometry.turned_panorama(ground, *how)).states)
        halves = [torch.stack(some, dim=1).half().cpu().numpy() for some in (latents, states)]
        view = (rays.view(ground) * 255).round().byte().cpu().numpy()
        return halves[0], halves[1], view


def encode(config: Encode) -> str:
    """Write the encoded rows, or find them there; gives their directory.

    A pass that was killed goes on where it stopped.

    Raises:
        ValueError: a base model or the data is not there, or the directory holds other rows.
    """
    ingest(config.data)  # lazy, but for its check of the files, which the fingerprint is of
    made_from = _made_from(config)
    name = f"{config.data.split}-{manifest.digest(made_from)[:12]}"
    written = Written(storage.join(storage.absolute(config.output), name))
    if written.claim(made_from):
        return written.output
    with engine.resumable(storage.join(written.partial, "checkpoint")):
        _stream(config, written)
    models = {"encoders": made_from["encoders"]}
    source = config.data.root
    manifest.write(written.output, rows=written.rows, config=config, models=models, source=source)
    storage.remove(written.partial)
    return written.output


def _stream(config: Encode, written: Written) -> None:
    engine.preflight(config.pool)
    looks = config.conditioning
    sizes = parts.sizes(config.diffusion, config.clip, looks.panorama_width, config.revision)
    rows = ingest(config.data)
    total = accepted(config.data)
    rows = engine.map_actors(rows, EncodePairs, config.pool, config=config, sizes=sizes)
    filesystem, path = storage.resolve(written.output)
    flow = Flow({"read": read_pictures.__name__, "encode": EncodePairs.__name__, "write": "Write"})
    with (
        progress.watch(f"encode {config.data.split}", total, lambda: written.rows, flow.note),
        each_step(rows, flow.update, Judge(written, total, max_share=0.0)),
    ):
        rows.write_parquet(path, filesystem=filesystem)
    written.update()


def _made_from(config: Encode) -> dict[str, Any]:
    """What the rows depend on."""
    encoders = parts.load_encoders(config.diffusion, config.clip, config.revision)
    looks = config.conditioning
    return {
        "version": VERSION,
        "encoders": manifest.weights(encoders.clip, encoders.vae),
        "tokens": looks.mode != "pooled",
        "panorama": [looks.panorama_width, looks.crops],
        "variants": [config.turns, config.mirror],
        "decoder": images.PREPROCESS,
        "pictures": fingerprint(config.data),
    }
