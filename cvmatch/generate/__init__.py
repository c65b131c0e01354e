"""Generate: panorama G -> synthetic aerial A, a latent diffusion model that keeps to the rays of G.

`model.Generator` conditions and samples, `train.train` fine-tunes it, `infer.generate` adds the
column `synthetic` to rows.
"""
