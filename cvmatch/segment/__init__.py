"""Segmentation: an aerial picture -> a map of land-cover classes (SegFormer)."""
