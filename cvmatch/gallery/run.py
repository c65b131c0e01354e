"""Imagery -> rows of a gallery, in one pass that can resume.

First a survey finds the cells that the imagery shows, and lists them beside the output; then a
stream cuts them, window by window, in tasks of Ray.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import shapely
from jaxtyping import Float
from ray.data import Dataset

from cvmatch.data import images, manifest, schema, storage
from cvmatch.data.schema import AERIAL, ERROR, LATITUDE, LONGITUDE, PAIR_ID
from cvmatch.gallery import resampling
from cvmatch.gallery.cutting import Cutter
from cvmatch.gallery.grid import Bounds, Cells, format_bounds
from cvmatch.gallery.imagery.sources import detect_format
from cvmatch.gallery.region import Region, read_region
from cvmatch.gallery.settings import MakeGallery
from cvmatch.runtime import pools, session
from cvmatch.runtime.streams.output_directory import OutputDirectory
from cvmatch.runtime.streams.write import Stream, write_stream

OUTLINE, VINTAGE = "outline", "vintage"

GEO = {
    "version": "1.1.0",
    "primary_column": OUTLINE,
    "columns": {OUTLINE: {"encoding": "WKB", "geometry_types": ["Polygon"]}},
}
"""Metadata of GeoParquet; without a `crs` it is longitude and latitude of WGS84 (OGC:CRS84)."""

COLUMNS = pa.schema(
    [
        *(schema.PAIRS.field(name) for name in (PAIR_ID, AERIAL, LATITUDE, LONGITUDE)),
        pa.field(OUTLINE, pa.binary()),  # the cell, a WKB polygon
        pa.field(VINTAGE, pa.string()),  # of the imagery; null where not told
        schema.PAIRS.field(ERROR),
    ],
    metadata={"geo": json.dumps(GEO)},
)
"""Columns of the rows."""

PLAN, COUNTS = "cells.parquet", "counts.json"
"""Beside an unfinished output: the cells to cut, and `Counts`."""

SURVEY = 4096
"""Cells of a task that looks where imagery is."""

BLOCK = 64
"""Cells of a task that cuts: what a resumed run repeats at most."""

Part = tuple[Cutter, Cells]
"""Some cells, and what cuts them."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the cells of the region."""

    cells: int
    """That are cut."""
    outside: int
    """That the imagery does not show at all."""
    sparse: int
    """That it shows less of than `min_coverage`."""
    metres_per_pixel: float
    """Of the pictures, on the ground."""
    levels: tuple[str, ...]
    """Of the imagery, that are read."""

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> "Counts":
        """Take them from JSON."""
        return cls(**{**plain, "levels": tuple(plain["levels"])})

    def describe(self, metres: float) -> str:
        """Say it in a line."""
        every = max(1, self.cells + self.outside + self.sparse)
        sparse = f", {self.sparse / every:.1%} too little of it" if self.sparse else ""
        return (
            f"{self.cells:,} cells of {metres:g} m ({self.metres_per_pixel:.3g} m a pixel, "
            f"{', '.join(self.levels)}), {self.outside / every:.1%} outside the imagery{sparse}"
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the manifest says of the job."""

    gallery: MakeGallery
    """Settings."""
    counts: Counts
    """Of cells."""


def make_gallery(config: MakeGallery) -> manifest.Manifest:
    """Write the rows of COLUMNS and a manifest; returns the manifest.

    An output that is whole already is left as it is.

    Raises:
        ValueError: the imagery or the region cannot be used, no cell of it has imagery, or see
            `write_stream`.
    """
    imagery = storage.absolute(config.imagery).rstrip("/")
    kind = detect_format(imagery) if config.format == "auto" else config.format
    cutter = Cutter.of(config, kind, imagery)
    region = read_region(config.region) if config.region else None
    directory = OutputDirectory(storage.absolute(config.output).rstrip("/"))
    provenance = _provenance(config, cutter, region)
    if directory.is_complete(provenance) and not config.retry_rejected:
        return manifest.read(directory.output)
    directory.begin(provenance)  # which would delete a plan that was left before
    counts = _plan(config, cutter, region, directory.partial)
    write_stream(_stream(config, cutter, directory, counts, provenance))
    return manifest.read(directory.output)


def list_cells(cutter: Cutter, region: Region | None) -> Cells:
    """Return the cells whose middles lie in the region, or in the imagery's bounds, by window."""
    cells = cutter.grid.within(region.bounds if region else cutter.source.find_bounds())
    if region:
        cells = cells.take(region.contains(*cutter.grid.middles(cells)))
    return cutter.sort(cells)


def survey(
    cutter: Cutter,
    cells: Cells,
    min_coverage: float,
    run: Callable[[Any, Sequence[Part]], list[Any]],
) -> tuple[Cells, Counts]:
    """Find the cells that the imagery shows enough of, and count the others.

    Args:
        cutter: cuts them.
        cells: by window.
        min_coverage: least share of a cell that must be shown.
        run: maps a function over parts of the cells, such as `pools.map_tasks`.
    """
    near = _meet(cutter.grid.boxes(cells), cutter.source.find_bounds())
    close = cells.take(near)
    parts = [
        (cutter, close.take(np.arange(start, min(start + SURVEY, len(close)))))
        for start in range(0, len(close), SURVEY)
    ]
    shares = np.concatenate([np.zeros(0), *run(measure_part, parts)])
    shown = shares > 0
    kept = close.take(shown & (shares >= min_coverage))
    return kept, Counts(
        cells=len(kept),
        outside=len(cells) - int(shown.sum()),
        sparse=int(shown.sum()) - len(kept),
        metres_per_pixel=cutter.grid.metres / cutter.size,
        levels=tuple(
            cutter.source.levels[n].name for n in np.unique(cutter.levels_of(kept)).tolist()
        ),
    )


def measure_part(part: Part) -> Float[np.ndarray, " cell"]:
    """Return the share of each cell that the imagery shows; a task."""
    cutter, cells = part
    return cutter.measure_coverage(cells)


def cut_cells(rows: pa.Table, cutter: Cutter, encoding: str, vintage: str) -> pa.Table:
    """Cut the cells of rows of the plan, as rows of COLUMNS; one that fails says why in `error`."""
    cells = Cells(rows["row"].to_numpy(), rows["column"].to_numpy())
    pictures = cutter.cut(cells)
    latitude, longitude = cutter.grid.middles(cells)
    west, south, east, north = cutter.grid.boxes(cells).T
    columns = {
        PAIR_ID: rows[PAIR_ID],
        AERIAL: [
            None if isinstance(one, str) else images.encode(one, encoding.upper())
            for one in pictures
        ],
        LATITUDE: latitude,
        LONGITUDE: longitude,
        OUTLINE: shapely.to_wkb(shapely.box(west, south, east, north), byte_order=1),
        VINTAGE: [vintage or None] * len(rows),
        ERROR: [one if isinstance(one, str) else None for one in pictures],
    }
    return pa.table(columns, schema=COLUMNS)


def _plan(config: MakeGallery, cutter: Cutter, region: Region | None, partial: str) -> Counts:
    """Survey the cells and leave them beside the output, or take the survey of a killed run."""
    state = storage.join(partial, COUNTS)
    if storage.exists(state):
        return Counts.read(storage.read_json(state))
    session.start()
    cells = list_cells(cutter, region)
    kept, counts = survey(cutter, cells, config.min_coverage, pools.map_tasks)
    if not len(kept):
        raise ValueError(_explain_nothing(config, cutter, region, counts))
    table = pa.table({PAIR_ID: cutter.grid.ids(kept), "row": kept.row, "column": kept.column})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes(storage.join(partial, PLAN), sink.getvalue().to_pybytes())
    storage.write_json(state, asdict(counts))  # last: it vouches for the other
    return counts


def _explain_nothing(
    config: MakeGallery, cutter: Cutter, region: Region | None, counts: Counts
) -> str:
    shown = format_bounds(cutter.source.find_bounds())
    wanted = f"{config.region} ({format_bounds(region.bounds)})" if region else "the imagery itself"
    text = (
        f"{config.imagery}: expected cells of {wanted} with imagery, got none: {counts.outside} "
        f"lie outside of it (it has {shown}), and of {counts.sparse} it shows less than "
        f"--min-coverage {config.min_coverage:g}."
    )
    if cutter.format in ("xyz", "tms"):
        other = {"xyz": "tms", "tms": "xyz"}[cutter.format]
        text += f" Where the tiles' rows count from the other side, pass --format {other}."
    return text


def _stream(
    config: MakeGallery,
    cutter: Cutter,
    directory: OutputDirectory,
    counts: Counts,
    provenance: dict[str, object],
) -> Stream:
    plan = storage.join(directory.partial, PLAN)
    cut = partial(cut_cells, cutter=cutter, encoding=config.encoding, vintage=config.vintage)

    def rows() -> Dataset:
        filesystem, path = storage.resolve(plan)
        # One read task for the one file: left to itself, Ray cuts it into other blocks.
        found = ray.data.read_parquet(path, filesystem=filesystem, override_num_blocks=1)
        found = found.repartition(target_num_rows_per_block=BLOCK)
        return found.map_batches(cut, batch_size=None, batch_format="pyarrow")

    return Stream(
        label="gallery",
        output=directory.output,
        provenance=provenance,
        rows=rows,
        total=lambda: counts.cells,
        columns=COLUMNS,
        pools={},
        operators={"cut": cut_cells.__name__},
        max_rejected=config.max_rejected,
        retry_rejected=config.retry_rejected,
        manifest={
            "config": Record(gallery=config, counts=counts),
            "models": {},
            "source": config.imagery,
        },
    )


def _provenance(config: MakeGallery, cutter: Cutter, region: Region | None) -> dict[str, object]:
    """What the rows depend on."""
    return {
        "imagery": cutter.source.fingerprint(),
        "format": cutter.format,
        "region": manifest.digest(shapely.to_geojson(region.shape)) if region else "",
        "cells": [config.metres, config.overlap, config.size, config.zoom, config.min_coverage],
        "encoding": config.encoding,
        "vintage": config.vintage,
        "resampling": resampling.VERSION,
    }


def _meet(boxes: Float[np.ndarray, "cell 4"], bounds: Bounds) -> np.ndarray:
    """Return which boxes have a part in the bounds."""
    west, south, east, north = boxes.T
    return (west < bounds[2]) & (east > bounds[0]) & (south < bounds[3]) & (north > bounds[1])
