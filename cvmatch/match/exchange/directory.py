"""Which files a matcher's directory holds, so that nothing else is replaced by one."""

from cvmatch.data import storage

FILES = {
    "config.json",
    "model.safetensors",
    "fusion.json",
    "training.json",
    "training_ids.txt",
    "README.md",
    "onnx",
}
"""Names in the directory of a matcher, trained, imported or published."""


def require_replaceable(location: str, flag: str) -> None:
    """Check that a location holds nothing, or only what a matcher consists of.

    Raises:
        ValueError: it holds something else, which would be lost.
    """
    if not storage.is_directory(location):
        return
    names = {*storage.names(location), *storage.names(location, directories=True)}
    if others := sorted(names - FILES):
        raise ValueError(
            f"{flag} {location}: expected a new directory, or one of a matcher, which is replaced, "
            f"got one that also holds {others[:5]}. Pass another directory."
        )
