"""Tiny pre-trained base models in the real on-disk formats, for machines without a GPU or a hub.

`python -m tools.demo_models` makes them from worlds of a seed family that no data set draws from.
A demo fine-tunes them as a user fine-tunes Stable Diffusion, CLIP, SegFormer and VGG16.
"""

import os

MODELS = os.path.dirname(os.path.abspath(__file__))
"""Directory of the base models that the package carries."""

DIFFUSION = os.path.join(MODELS, "diffusion")
"""Stable Diffusion's layout (`unet/ vae/ scheduler/`): 64 x 64 tiles, 8 x 16 x 16 latents."""

CLIP = os.path.join(MODELS, "clip")
"""A CLIP vision tower: 64 x 64 pictures, patches of 8."""

SEGFORMER = os.path.join(MODELS, "segformer")
"""A SegFormer with six classes: 128 x 128 tiles."""

TOWER = os.path.join(MODELS, "tower")
"""A VGG-type tower: convolutions for panoramas and polar views of 64 x 256."""

SPACE = os.path.join(MODELS, "space.yaml")
"""What the demo's search varies: the weight of the matcher's joint term."""
