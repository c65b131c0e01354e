"""Embedded data set: procedural 2.5-D places.

Each place gives an aerial tile (north up, sun shadow, 0.5 m cells, 128 m), its class map in the
ISPRS palette with cars yellow, a 360-degree panorama (north in the middle column, column 0 south,
W/4 west; CVUSA's vertical field of view), and so the polar view. Photometry, season, sun and cars
are drawn independently for the two views, so colour is not a shortcut. Splits are by world. Each
world is one Ray Data read task and a pure function of (seed, camera).
"""
