"""Tiny data sets with CVUSA's quirks, by hand, to share no error with the embedded world."""

import io
from pathlib import Path

from PIL import Image


def picture(colour=(10, 20, 30), size=(16, 8), kind="PNG", mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def colour_of(number: int) -> tuple[int, int, int]:
    return (number % 256, 7 * number % 256, 200)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_pair(root: Path, number: int, segmap: bool = True) -> None:
    """One place of the subset, under the files' true names."""
    put(root / f"bingmap/input{number:07d}.png", picture(colour_of(number)))
    put(root / f"streetview/{number:07d}.jpg", picture(colour_of(number), kind="JPEG"))
    if segmap:
        put(root / f"segmap/output{number:07d}.png", picture((0, 255, 0)))


def subset_line(number: int, ending: str = "jpg") -> str:
    """As the published CSVs have it: an `input` too many, column 3 repeats column 2."""
    ground = f"streetview/input{number:07d}.{ending}"
    return f"bingmap/input{number:07d}.png,{ground},{ground}"


def write_tables(root: Path, train: list[str], val: list[str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "train-19zl.csv").write_bytes("\r\n".join(train).encode())  # no newline at the end
    (root / "val-19zl.csv").write_bytes("".join(f"{line}\r\n" for line in val).encode())


def write_subset(tmp_path: Path) -> Path:
    """Eight training pairs, in no order and one without a segmap; two val pairs, rows say .png."""
    root = tmp_path / "a b%20é" / "CVUSA_subset" / "CVUSA_subset"
    train = [44192, 8, 300, 12, 9, 10, 11, 7]
    for number in [*train, 1, 2]:
        write_pair(root, number, segmap=number != 12)
    put(root / "streetview/._0000008.jpg", b"\0\5\x16\7 Mac OS X")
    put(root / "bingmap/._input0000008.png", b"\0\5\x16\7 Mac OS X")
    put(root.parent / "__MACOSX/CVUSA_subset/train-19zl.csv", b"\0\5\x16\7 Mac OS X")
    write_tables(root, [subset_line(n) for n in train], [subset_line(n, "png") for n in (1, 2)])
    return root


def write_official(tmp_path: Path) -> Path:
    root = tmp_path / "CVPR_subset"
    for number in (1, 2, 3, 5):
        put(root / f"bingmap/19/{number:07d}.jpg", picture(colour_of(number), kind="JPEG"))
        put(root / f"bingmap/18/{number:07d}.jpg", picture((0, 0, 0), kind="JPEG"))
        put(root / f"streetview/panos/{number:07d}.jpg", picture(colour_of(number), kind="JPEG"))
        put(root / f"streetview/annotations/{number:07d}.png", picture(mode="L"))
    lines = [
        f"bingmap/19/{n:07d}.jpg,streetview/panos/{n:07d}.jpg,streetview/annotations/{n:07d}.png\n"
        for n in (3, 1, 5, 2)
    ]
    put(root / "splits/train-19zl.csv", "".join(lines[:3]).encode())
    put(root / "splits/val-19zl.csv", lines[3].encode())
    places = [f"{30 + i}.5,-{100 + i}.25,1.0,2.0,0" for i in range(4)]
    put(root / "split_locations/all.csv", "\n".join(places).encode())
    return root
