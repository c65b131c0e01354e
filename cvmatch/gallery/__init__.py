"""Imagery -> a gallery: square cells of the ground, as rows that an index is built of.

`grid` says where the cells lie, `sources` opens the imagery (`stores` and `tiles`: map tiles;
`raster`: GeoTIFF), `cutting` reads it by window and cuts the cells, `run` does so on Ray.
"""
