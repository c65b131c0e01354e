"""Many rows of few pictures, for what depends on their number alone."""

import os


def link_rows(root: str, to: str, rows: int) -> None:
    """A training split of `rows` pairs below `to`, whose pictures are links to those at `root`."""
    folders = {"bingmap": "input{}.png", "streetview": "{}.jpg", "segmap": "output{}.png"}
    count = len(os.listdir(f"{root}/bingmap"))
    for folder, name in folders.items():
        os.makedirs(f"{to}/{folder}")
        for row in range(rows):
            source = os.path.join(root, folder, name.format(f"{row % count + 1:07d}"))
            os.link(source, os.path.join(to, folder, name.format(f"{row + 1:07d}")))
    ids = [f"{row + 1:07d}" for row in range(rows)]
    lines = [f"bingmap/input{i}.png,streetview/{i}.jpg,segmap/output{i}.png\n" for i in ids]
    with open(f"{to}/train-19zl.csv", "w", encoding="utf-8") as file:
        file.writelines(lines)
