"""Search the settings of a training with Ray Tune."""
