"""What several stages share: backbones, base models, randomness, metrics."""
