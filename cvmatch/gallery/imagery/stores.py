"""Where map tiles lie: in a folder, in MBTiles (SQLite) or in PMTiles; encoded, by zoom and place.

In all of them tiles are asked for as in XYZ: column from the west, row from the north, from 0.
"""

import functools
import gzip
import re
import sqlite3
import urllib.parse
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from pmtiles import tile as pm

from cvmatch.data import manifest, storage
from cvmatch.gallery.grid import Bounds
from cvmatch.gallery.mercator import tile_bounds

_TILE_NAME = re.compile(r"(\d+)\.(png|jpe?g|webp)", re.IGNORECASE)
_PMTILES_HEADER = 127  # bytes, by version 3 of its specification


@runtime_checkable
class TileStore(Protocol):
    """Encoded map tiles."""

    @property
    def zooms(self) -> Sequence[int]:
        """Levels that it has, ascending."""
        ...

    def find_bounds(self) -> Bounds:
        """Return west, south, east and north of the tiles of the finest level, in degrees."""
        ...

    def fingerprint(self) -> str:
        """Hash names and sizes, which stand for the content."""
        ...

    def tile(self, zoom: int, column: int, row: int) -> bytes | None:
        """Return a tile; None where there is none.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def sample(self, zoom: int, count: int) -> list[tuple[int, int]]:
        """Return column and row of up to `count` tiles of a level."""
        ...


class TileFolder:
    """`{zoom}/{column}/{row}.png` (or .jpg, .webp); a name that is no number is passed over."""

    def __init__(self, location: str, from_south: bool) -> None:
        self.location, self.from_south = location, from_south
        self.zooms = _numbers(storage.names(location, directories=True))
        if not self.zooms:
            raise ValueError(
                f"{location}: expected a folder of map tiles, {{z}}/{{x}}/{{y}}.png, .jpg or "
                ".webp, got no folder named by a zoom level. Pass the folder above these."
            )
        self._column = functools.lru_cache(4096)(self._list_column)

    def tile(self, zoom: int, column: int, row: int) -> bytes | None:
        """See `TileStore`."""
        name = self._column(zoom, column).get(self._flip(zoom, row))
        if name is None:
            return None
        return storage.read_bytes(storage.join(self.location, str(zoom), str(column), name))

    def find_bounds(self) -> Bounds:
        """See `TileStore`."""
        zoom = self.zooms[-1]
        columns = [one for one in self._columns(zoom) if self._column(zoom, one)]
        if not columns:
            raise ValueError(f"{self.location}/{zoom}: expected map tiles, found none.")
        rows = [self._flip(zoom, row) for one in columns for row in self._column(zoom, one)]
        return _bounds(zoom, min(columns), min(rows), max(columns), max(rows))

    def fingerprint(self) -> str:
        """See `TileStore`."""
        from pyarrow import fs  # noqa: PLC0415 (see storage)

        filesystem, path = storage.resolve(self.location)
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        listed = ((one.path.removeprefix(path), one.size) for one in found if one.is_file)
        return manifest.digest(sorted(listed))

    def sample(self, zoom: int, count: int) -> list[tuple[int, int]]:
        """See `TileStore`."""
        columns = self._columns(zoom)
        some = columns[:: -(-len(columns) // count)] if columns else []
        pairs = [
            (one, self._flip(zoom, row)) for one in some for row in sorted(self._column(zoom, one))
        ]
        return pairs[:: max(1, len(pairs) // count)][:count]

    def _columns(self, zoom: int) -> list[int]:
        return _numbers(storage.names(storage.join(self.location, str(zoom)), directories=True))

    def _list_column(self, zoom: int, column: int) -> dict[int, str]:
        """Return the file of each row of a column, rows as they are counted there."""
        names = storage.names(storage.join(self.location, str(zoom), str(column)))
        found = {name: _TILE_NAME.fullmatch(name) for name in names}
        return {int(match[1]): name for name, match in found.items() if match}

    def _flip(self, zoom: int, row: int) -> int:
        return 2**zoom - 1 - row if self.from_south else row


class MBTiles:
    """A file of SQLite, whose rows count from the south."""

    def __init__(self, location: str) -> None:
        self.location = location
        path = urllib.parse.quote(storage.local_file(location))
        self._database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)
        metadata = dict(self._ask("SELECT name, value FROM metadata"))
        if metadata.get("format") == "pbf":
            raise ValueError(f"{location}: expected pictures, got vector tiles (format pbf).")
        found = self._ask("SELECT DISTINCT zoom_level FROM tiles ORDER BY zoom_level")
        self.zooms = [zoom for (zoom,) in found]
        if not self.zooms:
            raise ValueError(f"{location}: expected map tiles, found none.")

    def tile(self, zoom: int, column: int, row: int) -> bytes | None:
        """See `TileStore`."""
        key = (zoom, column, 2**zoom - 1 - row)
        wanted = "zoom_level = ? AND tile_column = ? AND tile_row = ?"
        found = self._ask(f"SELECT tile_data FROM tiles WHERE {wanted}", key)
        return bytes(found[0][0]) if found else None

    def find_bounds(self) -> Bounds:
        """See `TileStore`."""
        zoom = self.zooms[-1]
        ends = "min(tile_column), max(tile_row), max(tile_column), min(tile_row)"
        found = self._ask(f"SELECT {ends} FROM tiles WHERE zoom_level = ?", (zoom,))
        left, top, right, bottom = found[0]
        return _bounds(zoom, left, 2**zoom - 1 - top, right, 2**zoom - 1 - bottom)

    def fingerprint(self) -> str:
        """See `TileStore`."""
        return file_fingerprint(self.location)

    def sample(self, zoom: int, count: int) -> list[tuple[int, int]]:
        """See `TileStore`."""
        wanted = "SELECT tile_column, tile_row FROM tiles WHERE zoom_level = ? LIMIT ?"
        found = self._ask(wanted, (zoom, count))
        return [(column, 2**zoom - 1 - row) for column, row in found]

    def _ask(self, query: str, values: tuple[int, ...] = ()) -> list[Any]:
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.location}: expected MBTiles, a database of SQLite with the tables tiles "
                f"and metadata, got {error}. Copy or convert it again."
            ) from error


class PMTiles:
    """A file of version 3, read by ranges, so that one in an object store stays there."""

    def __init__(self, location: str) -> None:
        self.location = location
        filesystem, path = storage.resolve(location)
        self._file = filesystem.open_input_file(path)
        self._header = self._read_header()
        self._directory = functools.lru_cache(256)(self._read_directory)
        self.zooms = range(self._header["min_zoom"], self._header["max_zoom"] + 1)

    def tile(self, zoom: int, column: int, row: int) -> bytes | None:
        """See `TileStore`."""
        wanted = pm.zxy_to_tileid(zoom, column, row)
        offset, length = self._header["root_offset"], self._header["root_length"]
        while entry := pm.find_tile(self._directory(offset, length), wanted):
            if entry.run_length:
                data = self._read(self._header["tile_data_offset"] + entry.offset, entry.length)
                gzipped = self._header["tile_compression"] == pm.Compression.GZIP
                return gzip.decompress(data) if gzipped else data
            offset, length = self._header["leaf_directory_offset"] + entry.offset, entry.length
        return None

    def find_bounds(self) -> Bounds:
        """See `TileStore`; as the header says them."""
        sides: Any = ("min_lon_e7", "min_lat_e7", "max_lon_e7", "max_lat_e7")
        west, south, east, north = (self._header[side] / 1e7 for side in sides)
        return west, south, east, north

    def fingerprint(self) -> str:
        """See `TileStore`."""
        return file_fingerprint(self.location)

    def sample(self, zoom: int, count: int) -> list[tuple[int, int]]:
        """See `TileStore`."""
        offset, length = self._header["root_offset"], self._header["root_length"]
        first = pm.zxy_to_tileid(zoom, 0, 0)
        entries = self._directory(offset, length)
        while not entries[-1].run_length:
            last = entries[-1]
            entries = self._directory(
                self._header["leaf_directory_offset"] + last.offset, last.length
            )
        found = [pm.tileid_to_zxy(one.tile_id) for one in entries if one.tile_id >= first]
        return [(column, row) for level, column, row in found if level == zoom][:count]

    def _read_header(self) -> pm.HeaderDict:
        size = self._file.size()
        start = self._file.read_at(min(size, _PMTILES_HEADER), 0)
        if len(start) < _PMTILES_HEADER or start[:8] != b"PMTiles\x03":
            raise ValueError(
                f"{self.location}: expected PMTiles of version 3, got {size} bytes that begin with "
                f"{start[:8]!r}. Convert it (`pmtiles convert`), or copy it again."
            )
        header = pm.deserialize_header(start)
        whole = max(
            header["tile_data_offset"] + header["tile_data_length"],
            header["leaf_directory_offset"] + header["leaf_directory_length"],
            header["root_offset"] + header["root_length"],
        )
        if size < whole:
            raise ValueError(
                f"{self.location}: expected {whole} bytes, as its header says, got {size}: it is "
                "cut short. Copy it again."
            )
        self._check_kind(header)
        return header

    def _check_kind(self, header: pm.HeaderDict) -> None:
        if header["tile_type"] not in (pm.TileType.PNG, pm.TileType.JPEG, pm.TileType.WEBP):
            raise ValueError(
                f"{self.location}: expected tiles of type png, jpeg or webp, got "
                f"{header['tile_type'].name.lower()}. Convert them to one of these."
            )
        plain = (pm.Compression.NONE, pm.Compression.UNKNOWN, pm.Compression.GZIP)
        if header["internal_compression"] != pm.Compression.GZIP or (
            header["tile_compression"] not in plain
        ):
            raise ValueError(
                f"{self.location}: expected directories compressed by gzip and tiles by gzip or "
                f"not, got {header['internal_compression'].name.lower()} and "
                f"{header['tile_compression'].name.lower()}. Write it again by `pmtiles convert`."
            )

    def _read_directory(self, offset: int, length: int) -> list[pm.Entry]:
        return pm.deserialize_directory(self._read(offset, length))

    @storage.retry_passing
    def _read(self, offset: int, length: int) -> bytes:
        return self._file.read_at(length, offset)


def file_fingerprint(*locations: str) -> str:
    """Hash the sizes of files."""
    sizes = []
    for location in locations:
        filesystem, path = storage.resolve(location)
        sizes.append(filesystem.get_file_info(path).size)
    return manifest.digest(sizes)


def _numbers(names: Sequence[str]) -> list[int]:
    return sorted(int(name) for name in names if name.isdecimal())


def _bounds(zoom: int, left: int, top: int, right: int, bottom: int) -> Bounds:
    """Return the bounds of tiles, of which the last ones count."""
    west, south, east, north = tile_bounds(zoom, left, top, right + 1, bottom + 1)
    return west, south, east, north
