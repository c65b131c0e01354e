"""A region of the earth, from GeoJSON."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from jaxtyping import Bool, Float

from cvmatch.data import storage
from cvmatch.gallery.grid import Bounds

_AREAS = ("Polygon", "MultiPolygon")


@dataclass(frozen=True, eq=False)
class Region:
    """Polygons, in degrees."""

    shape: shapely.Geometry
    """A Polygon or MultiPolygon."""

    @property
    def bounds(self) -> Bounds:
        """West, south, east and north, in degrees."""
        west, south, east, north = shapely.bounds(self.shape).tolist()
        return west, south, east, north

    def contains(
        self, latitude: Float[np.ndarray, " place"], longitude: Float[np.ndarray, " place"]
    ) -> Bool[np.ndarray, " place"]:
        """Return whether each place (degrees) lies in it; a `geography.Area`."""
        shapely.prepare(self.shape)
        return shapely.contains_xy(self.shape, longitude, latitude)


def read_region(location: str) -> Region:
    """Read a GeoJSON file: a Polygon, a MultiPolygon, or features of these, which are joined.

    Raises:
        ValueError: it holds something else, or positions that are no degrees.
    """
    try:
        shapes = [_read_shape(one) for one in _geometries(json.loads(storage.read_text(location)))]
    except (ValueError, TypeError, KeyError, AttributeError, shapely.GEOSException) as error:
        raise ValueError(
            f"{location}: expected GeoJSON of Polygons or MultiPolygons, got {error}."
        ) from error
    region = Region(shapely.union_all(shapes))
    west, south, east, north = region.bounds if shapes else (np.nan,) * 4
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise ValueError(
            f"{location}: expected areas in degrees (longitude, latitude, as GeoJSON has them), "
            f"got bounds {(west, south, east, north)}. Reproject it: `ogr2ogr -t_srs EPSG:4326`."
        )
    return region


def _geometries(tree: Any) -> list[Any]:
    if tree["type"] == "FeatureCollection":
        return [feature["geometry"] for feature in tree["features"]]
    return [tree["geometry"] if tree["type"] == "Feature" else tree]


def _read_shape(geometry: Any) -> shapely.Geometry:
    if geometry["type"] not in _AREAS:
        raise ValueError(f"a {geometry['type']}")
    return shapely.make_valid(shapely.from_geojson(json.dumps(geometry)))
