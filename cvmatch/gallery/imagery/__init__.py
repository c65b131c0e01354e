"""Imagery as it comes: `sources` opens it; `stores` and `tiles` are map tiles, `raster` GeoTIFF."""
