"""The whole pipeline on embedded data: procedural places, tiny base models, their settings."""
