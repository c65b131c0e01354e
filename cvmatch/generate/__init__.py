"""Generate: panorama G -> synthetic aerial A, by a latent diffusion model conditioned on G.

`model.Generator` conditions and samples, `train.train` fine-tunes it, `infer.generate` adds the
column `synthetic` to rows.
"""
