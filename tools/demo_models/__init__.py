"""Make the base weights of the demo again: `python -m tools.demo_models`."""
