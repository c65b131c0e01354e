"""Distances and areas on the earth."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

EARTH_M = 6_371_008.8
"""Mean radius of the earth in metres (IUGG)."""


def haversine_distance(
    first: Float[Tensor, "*row 2"], second: Float[Tensor, "*row 2"]
) -> Float[Tensor, "*row"]:
    """Return great-circle distances in metres between (latitude, longitude) in degrees."""
    a, b = torch.deg2rad(first), torch.deg2rad(second)
    half = torch.sin((b - a) / 2).square()
    chord = half[..., 0] + torch.cos(a[..., 0]) * torch.cos(b[..., 0]) * half[..., 1]
    return 2 * EARTH_M * torch.asin(chord.clamp(0, 1).sqrt())


def offset_m(start: tuple[float, float], to: tuple[float, float]) -> tuple[float, float]:
    """Return metres east and north from one (latitude, longitude) in degrees to another.

    Equirectangular, at the start's latitude; of two sides of the date line, the short way.
    """
    degree = math.radians(1) * EARTH_M
    east = (to[1] - start[1] + 180) % 360 - 180
    return east * degree * math.cos(math.radians(start[0])), (to[0] - start[0]) * degree


@runtime_checkable
class Area(Protocol):
    """A part of the earth."""

    def contains(
        self, latitude: Float[np.ndarray, " place"], longitude: Float[np.ndarray, " place"]
    ) -> Bool[np.ndarray, " place"]:
        """Return whether each place (degrees; NaN: unknown, which is in no area) lies in it."""
        ...


@dataclass(frozen=True)
class Circle:
    """All within a distance of a place."""

    latitude: float
    """Degrees north."""
    longitude: float
    """Degrees east."""
    radius_m: float
    """Metres."""

    def contains(
        self, latitude: Float[np.ndarray, " place"], longitude: Float[np.ndarray, " place"]
    ) -> Bool[np.ndarray, " place"]:
        """See `Area`."""
        places = torch.from_numpy(np.stack([latitude, longitude], axis=1).astype(np.float64))
        centre = torch.tensor([self.latitude, self.longitude], dtype=torch.float64)
        return (
            haversine_distance(places, centre.expand_as(places)) <= self.radius_m
        ).numpy()  # NaN compares false


@dataclass(frozen=True)
class Box:
    """Between two parallels and two meridians, in degrees; `west` may be the larger one."""

    south: float
    """Least latitude."""
    west: float
    """Where it begins, going east."""
    north: float
    """Largest latitude."""
    east: float
    """Where it ends."""

    def __post_init__(self) -> None:
        if not (-180 <= self.west <= 180 and -180 <= self.east <= 180):
            raise ValueError(
                f"box: expected meridians in [-180, 180], got {self.west} to {self.east}. Over the "
                "date line, west is the larger one, such as 170 and -170."
            )

    def contains(
        self, latitude: Float[np.ndarray, " place"], longitude: Float[np.ndarray, " place"]
    ) -> Bool[np.ndarray, " place"]:
        """See `Area`."""
        tall = (latitude >= self.south) & (latitude <= self.north)
        if self.west <= self.east:
            return tall & (longitude >= self.west) & (longitude <= self.east)
        return tall & ((longitude >= self.west) | (longitude <= self.east))


def utm_to_degrees(
    easting: Float[np.ndarray, " place"],
    northing: Float[np.ndarray, " place"],
    zone: int,
    south: bool,
) -> tuple[Float[np.ndarray, " place"], Float[np.ndarray, " place"]]:
    """Return latitude and longitude, in degrees, of places of UTM, in metres; to 1 mm.

    The inverse of Krueger's series to the third order of the flattening (Karney 2011, equations 7
    and 11 to 20), on WGS84.

    Args:
        easting: with the false easting of 500 km.
        northing: from the equator, or with the false northing of 10,000 km.
        zone: 1 to 60.
        south: whether it is the southern half.
    """
    flattening = 1 / 298.257223563
    n = flattening / (2 - flattening)
    eccentricity = math.sqrt(flattening * (2 - flattening))
    radius = 6_378_137.0 / (1 + n) * (1 + n**2 / 4 + n**4 / 64)
    xi = (northing - 1e7 * south) / (0.9996 * radius)
    eta = (easting - 5e5) / (0.9996 * radius)
    beta = (
        n / 2 - 2 * n**2 / 3 + 37 * n**3 / 96,
        n**2 / 48 + n**3 / 15,
        17 * n**3 / 480,
    )
    terms = [(2 * (order + 1), one) for order, one in enumerate(beta)]
    xi_ = xi - sum(one * np.sin(k * xi) * np.cosh(k * eta) for k, one in terms)
    eta_ = eta - sum(one * np.cos(k * xi) * np.sinh(k * eta) for k, one in terms)
    conformal = np.sin(xi_) / np.hypot(np.sinh(eta_), np.cos(xi_))
    tangent = conformal
    for _ in range(4):  # Newton's steps; two reach the last bit
        root = np.hypot(1, tangent)
        sigma = np.sinh(eccentricity * np.arctanh(eccentricity * tangent / root))
        now = tangent * np.hypot(1, sigma) - sigma * root
        slope = (1 - eccentricity**2) * root * np.hypot(1, now)
        slope = slope / (1 + (1 - eccentricity**2) * tangent**2)
        tangent = tangent + (conformal - now) / slope
    meridian = 6 * zone - 183
    longitude = meridian + np.degrees(np.arctan2(np.sinh(eta_), np.cos(xi_)))
    return np.degrees(np.arctan(tangent)), longitude
