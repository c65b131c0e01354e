"""Embed rows with a trained matcher: the vectors of tiles and of queries."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cvmatch.data import images, schema
from cvmatch.data.schema import QUERY_VECTOR, TILE_VECTOR
from cvmatch.match.model import Matcher
from cvmatch.match.settings import Embed, Modality
from cvmatch.nn import geometry
from cvmatch.nn.batch_invariant import FixedBatch, call_rows, error_line, require_any
from cvmatch.runtime import hardware

if TYPE_CHECKING:  # it takes three seconds of a core, and the search of a file needs none of it
    from ray.data import Dataset

_TURNS = 8  # turns of a panorama that a tower sees at a time

_PICTURES = (
    schema.GROUND,
    schema.AERIAL,
    schema.CLASSES,
    schema.SYNTHETIC,
    schema.SYNTHETIC_CLASSES,
)


class EmbedTile:
    """`aerial` (encoded) -> `tile_vector` (width, float16); pictures are dropped.

    A row with `error`, or with a picture that cannot be decoded, gets zeros. The network takes
    `batch` tiles at a time: a vector depends on the tile and on this number, on nothing else.
    """

    def __init__(self, model: str, batch: int) -> None:
        hardware.keep_freed_memory()
        self.device = hardware.device()
        self.model = Matcher.load(model, self.device)
        self.tiles = FixedBatch(self._tiles, batch)

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Embed one batch; failed rows keep the reason in `error`."""
        config = self.model.config
        side = (config.tile_size, config.tile_size)
        decoders = {schema.AERIAL: lambda data: images.decode(data, side, config.preprocess)}
        good, errors, (aerial,) = _decode(batch, decoders, "embed tile")
        vectors = np.zeros((len(errors), config.width), dtype=np.float16)
        for row, vector in zip(good, self.tiles(aerial), strict=True):
            if isinstance(vector, Exception):
                errors[row] = f"embed tile: {error_line(vector)}"
            else:
                vectors[row] = vector
        return _drop_pictures(batch) | {TILE_VECTOR: vectors, schema.ERROR: errors}

    def _tiles(self, aerial: list[np.ndarray]) -> list[np.ndarray]:
        return [*self.model.embed_tiles(_planes(aerial, self.device)).cpu().half().numpy()]


class EmbedQuery:
    """`ground`, `synthetic`, `synthetic_classes` -> `query_vector` (width, float32).

    Reads what `modality` names, and drops pictures. A row with `error`, or with a picture that
    cannot be decoded, gets zeros.
    """

    def __init__(self, model: str, modality: Modality) -> None:
        hardware.keep_freed_memory()
        self.device = hardware.device()
        self.model = Matcher.load(model, self.device)
        self.modality = modality

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Embed one batch; failed rows keep the reason in `error`."""
        config = self.model.config
        side = (config.tile_size, config.tile_size)
        every = {
            "G": lambda data: images.decode(data, config.panorama, config.preprocess),
            "A": lambda data: images.decode(data, side, config.preprocess),
            "S": lambda data: images.decode_ids(data, side),
        }
        letters = self.modality.split("+")
        columns = schema.query_columns(self.modality)
        decoders = {name: every[letter] for name, letter in zip(columns, letters, strict=True)}
        good, errors, pictures = _decode(batch, decoders, "embed query")
        vectors = np.zeros((len(errors), config.width), dtype=np.float32)
        rows = [dict(zip(letters, row, strict=True)) for row in zip(*pictures, strict=True)]
        # All at once, not in batches of one size: a query need not wait for padding.
        results = require_any(call_rows(self._embed, rows)) if rows else []
        for row, result in zip(good, results, strict=True):
            if isinstance(result, Exception):
                errors[row] = f"embed query: {error_line(result)}"
            else:
                vectors[row] = result
        return _drop_pictures(batch) | {QUERY_VECTOR: vectors, schema.ERROR: errors}

    @torch.inference_mode()
    def try_headings(self, panorama: bytes, count: int) -> Float[np.ndarray, "count width"]:
        """Embed a panorama (encoded) as if its middle looked along each of `geometry.tried`.

        Raises:
            BadImage: it cannot be decoded.
        """
        config = self.model.config
        pixels = images.decode(panorama, config.panorama, config.preprocess)
        turned = geometry.try_headings(_planes([pixels], self.device), count)[0]
        vectors = [self.model.embed_queries(part) for part in turned.split(_TURNS)]
        return torch.cat(vectors).cpu().numpy()

    def _embed(self, rows: Sequence[dict[str, np.ndarray]]) -> list[np.ndarray]:
        """Return the vectors of rows; a row holds pictures by their letters."""
        pictures = {letter: [row[letter] for row in rows] for letter in rows[0]}
        ground, synthetic = (
            _planes(pictures[letter], self.device) if letter in pictures else None
            for letter in ("G", "A")
        )
        ids = pictures.get("S")
        mask = None if ids is None else torch.from_numpy(np.stack(ids)).to(self.device)
        return [*self.model.embed_queries(ground, synthetic, mask).cpu().numpy()]


def embed_tiles(rows: "Dataset", config: Embed) -> "Dataset":
    """Add `tile_vector` to rows with `aerial`; drop pictures."""
    from cvmatch.runtime import pools  # noqa: PLC0415 (Ray)

    size = config.pool.batch
    return pools.map_actors(rows, EmbedTile, config.pool, model=config.model, batch=size)


def embed_queries(rows: "Dataset", config: Embed) -> "Dataset":
    """Add `query_vector` to rows with what `config.modality` reads; drop pictures."""
    from cvmatch.runtime import pools  # noqa: PLC0415 (Ray)

    return pools.map_actors(
        rows, EmbedQuery, config.pool, model=config.model, modality=config.modality
    )


def _decode(
    batch: dict[str, np.ndarray],
    decoders: dict[str, Callable[[bytes], np.ndarray]],
    stage: str,
) -> tuple[list[int], np.ndarray, tuple[list[np.ndarray], ...]]:
    """Return the good rows, every row's error, and the good rows' pictures of each column."""
    schema.require(batch, [*decoders, schema.ERROR], stage)
    errors = np.array(schema.read_errors(batch[schema.ERROR]), dtype=object)
    good: list[int] = []
    pictures: dict[str, list[np.ndarray]] = {column: [] for column in decoders}
    for index in range(len(errors)):
        if errors[index] is not None:
            continue
        column = ""
        try:
            row = {}
            for column, decode in decoders.items():
                row[column] = decode(batch[column][index] or b"")
        except images.BadImage as error:
            errors[index] = f"{stage}: {column}: {error}"
            continue
        good.append(index)
        for name, picture in row.items():
            pictures[name].append(picture)
    return good, errors, tuple(pictures.values())


def _drop_pictures(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in batch.items() if name not in _PICTURES}


def _planes(pictures: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 255
