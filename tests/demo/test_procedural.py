import dataclasses
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvmatch.data.images import classes_of, colours_of
from cvmatch.data.schema import IGNORE, PALETTE
from cvmatch.demo.procedural.paints import PLANTS, ROAD, SKY
from cvmatch.demo.procedural.pairs import Sizes, render_pairs, render_tiles, world_seed
from cvmatch.demo.procedural.panorama import render_panorama
from cvmatch.demo.procedural.world import EDGE, SPACING, build_world, place_cameras
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import Difficulty, MakeWorld

SMALL = Sizes(aerial=128, panorama=(64, 256))
TINY = Sizes(aerial=64, panorama=(16, 64))
CAMERAS = 8
SEEDS = (world_seed(0, 0), world_seed(0, 1), world_seed(0, 2))


@pytest.fixture(scope="module")
def worlds():
    """The pairs of three worlds."""
    return [list(render_pairs(seed, CAMERAS, SMALL)) for seed in SEEDS]


@pytest.fixture(scope="module")
def every(worlds):
    return [pair for world in worlds for pair in world]


def same(a, b):
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(a)
    )


def test_pairs_same_seed_gives_the_same_pictures_whatever_the_number_of_cameras(worlds):
    again = list(render_pairs(SEEDS[0], 3, SMALL))
    assert len(again) == 3
    assert all(same(a, b) for a, b in zip(again, worlds[0], strict=False))


def test_pairs_other_seed_gives_other_pictures(worlds):
    assert not np.array_equal(worlds[0][0].classes, worlds[1][0].classes)


def test_tiles_alone_are_those_of_the_pairs():
    seed, sizes = world_seed(31, 0), Sizes(aerial=64, panorama=(16, 64))
    alone = list(render_tiles(seed, 3, sizes.aerial))
    assert len(alone) == 3
    for (tile, classes), pair in zip(alone, render_pairs(seed, 3, sizes), strict=True):
        np.testing.assert_array_equal(tile, pair.aerial)
        np.testing.assert_array_equal(classes, pair.classes)


def test_pairs_more_cameras_than_fit_apart_still_gives_as_many_as_asked():
    cameras = 40  # about 25 discs of 62 m fit where cameras may stand
    found = list(render_pairs(SEEDS[0], cameras, TINY))
    assert len(found) == cameras
    assert len({(pair.east, pair.north) for pair in found}) == cameras


def test_cameras_of_many_worlds_keep_the_margin_and_stand_on_roads():
    for seed in range(6):
        world = build_world(seed)
        where = np.array(list(itertools.islice(place_cameras(world), 60)))
        assert where.shape == (60, 2)
        assert where.min() >= EDGE
        assert where.max() <= 512 - EDGE
        col, row = (where / 0.5).astype(int).T
        on_road = world.paints.ground[world.paint[row, col]] == ROAD
        assert on_road.mean() > 0.95


def test_cameras_first_ones_keep_the_wanted_spacing():
    where = np.array(list(itertools.islice(place_cameras(build_world(SEEDS[0])), 5)))
    apart = np.hypot(*(where[:, None] - where[None]).transpose(2, 0, 1))
    assert apart[np.triu_indices(5, 1)].min() >= SPACING


def test_pair_position_moves_with_its_tile(worlds):
    """Where two tiles overlap, positions tell the shift under which their class maps agree."""
    agreements = []
    for a, b in itertools.combinations(worlds[0], 2):
        right, up = round(b.east - a.east), round(b.north - a.north)  # 1 m pixels
        if max(abs(right), abs(up)) > 90:
            continue
        rows = slice(max(-up, 0), 128 + min(-up, 0)), slice(max(up, 0), 128 + min(up, 0))
        cols = slice(max(right, 0), 128 + min(right, 0)), slice(max(-right, 0), 128 - max(right, 0))
        here, there = a.classes[rows[0], cols[0]], b.classes[rows[1], cols[1]]
        agreements.append((here == there).mean())
    assert agreements
    assert min(agreements) > 0.93  # cars differ


def road_profile(pair):
    """Share of impervious cells along each azimuth of the tile, 5 to 45 m from the centre."""
    azimuth = np.pi + 2 * np.pi * np.arange(256) / 256  # column 0 looks south, then clockwise
    radius = np.arange(5, 45, 0.5)
    row = 64 - radius * np.cos(azimuth)[:, None]
    col = 64 + radius * np.sin(azimuth)[:, None]
    return np.isin(pair.classes[row.astype(int), col.astype(int)], (0, 5)).mean(axis=1)


def test_panorama_roads_lie_at_their_azimuths_in_the_tile(every):
    straight, mirrored, turned = [], [], []
    for pair in every:
        tile, street = road_profile(pair), (pair.annotation == ROAD).mean(axis=0)
        if min(tile.std(), street.std()) < 0.05:
            continue
        flipped = np.roll(street[::-1], 1)  # about north: column j becomes -j
        straight.append(np.corrcoef(tile, street)[0, 1])
        mirrored.append(np.corrcoef(tile, flipped)[0, 1])
        turned += [np.corrcoef(tile, np.roll(street, shift))[0, 1] for shift in (64, -64)]
    assert len(straight) > len(every) / 2
    assert np.mean(straight) > 0.55
    assert np.mean(mirrored) < np.mean(straight) - 0.3
    assert np.mean(turned) < np.mean(straight) - 0.3


def test_annotation_has_sky_above_and_ground_below(every):
    for pair in every:
        assert (pair.annotation[-4:] != SKY).all()
        # No sky pixel lies under a ground pixel of the same column, except under crowns.
        ground = np.isin(pair.annotation, (ROAD,))
        below_ground = np.cumsum(ground, axis=0) > 0
        assert (pair.annotation[below_ground] != SKY).mean() > 0.999
    assert np.mean([(pair.annotation == SKY).mean() for pair in every]) > 0.15
    assert np.mean([(pair.annotation == PLANTS).mean() for pair in every]) > 0.1


def test_panorama_whole_sphere_has_the_band_in_its_middle_rows():
    world = build_world(world_seed(0, 5))
    at = next(place_cameras(world))

    def annotate(height, **fov):
        return render_panorama(np.random.default_rng(1), world, at, (height, 352), **fov)[1]

    band, sphere = annotate(64), annotate(176, vertical_fov=180.0)
    middle = sphere[56:120]
    # But for the ragged edges of crowns, which are drawn anew.
    assert (middle == band).mean() > 0.98
    assert (sphere[:8] == SKY).mean() > 0.9
    assert (sphere[-8:] != SKY).all()


def test_photometry_brightness_of_the_road_in_one_view_does_not_tell_the_other(worlds):
    levels = []
    for world in worlds:
        paved = [p for p in world if (p.classes == 0).sum() > 200]
        here = [
            (p.aerial[p.classes == 0].mean(), p.panorama[p.annotation == ROAD].mean())
            for p in paved
        ]
        levels.append(np.array(here) - np.mean(here, axis=0))  # asphalt's tone is the world's
    above, street = np.concatenate(levels).T
    assert min(above.std(), street.std()) > 3
    assert abs(np.corrcoef(above, street)[0, 1]) < 0.4


def test_class_shares_are_those_of_the_specification(every):
    share = np.bincount(np.concatenate([p.classes.ravel() for p in every]), minlength=6)
    share = share / share.sum()
    assert len(share) == len(PALETTE)
    assert (share[:5] > 0.03).all()
    assert 0.003 < share[5] < 0.03


def test_heading_noise_turns_the_panorama_and_leaves_the_tile(worlds):
    noisy = list(render_pairs(SEEDS[0], 3, SMALL, Difficulty(heading_noise=30.0)))
    shifts = []
    for clean, turned in zip(worlds[0], noisy, strict=False):
        assert np.array_equal(clean.aerial, turned.aerial)
        agreement = [
            (np.roll(clean.annotation, shift, axis=1) == turned.annotation).mean()
            for shift in range(256)
        ]
        assert max(agreement) > 0.9
        shifts.append(int(np.argmax(agreement)))
    assert len(set(shifts)) == 3
    assert 0 not in shifts


def test_camera_offset_moves_the_panorama_and_leaves_the_tile(worlds):
    moved = next(render_pairs(SEEDS[0], 1, SMALL, Difficulty(camera_offset=4.0)))
    assert np.array_equal(moved.classes, worlds[0][0].classes)
    assert not np.array_equal(moved.annotation, worlds[0][0].annotation)
    assert (moved.east, moved.north) == (worlds[0][0].east, worlds[0][0].north)


def test_native_sizes_are_those_of_cvusa():
    pair = next(render_pairs(SEEDS[1], 1, Sizes()))
    assert pair.aerial.shape == (370, 370, 3)
    assert pair.classes.shape == (370, 370)
    assert pair.panorama.shape == (224, 1232, 3)
    assert pair.annotation.shape == (224, 1232)


def test_world_seed_families_and_data_sets_share_no_world():
    seeds = [
        world_seed(seed, index, family)
        for seed in range(4)
        for index in range(50)
        for family in ("data", "pretrain")
    ]
    assert len(set(seeds)) == len(seeds)
    assert {seed % 2 for seed in seeds[::2]} != {seed % 2 for seed in seeds[1::2]}


@pytest.fixture(scope="module")
def subset(ray_session, tmp_path_factory):
    root = tmp_path_factory.mktemp("subset")
    config = MakeWorld(output=str(root), preset="tiny", train=7, val=6, polar=True)
    return root, make_world(config)


@pytest.fixture(scope="module")
def official(ray_session, tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    config = MakeWorld(output=str(root), preset="tiny", layout="official", train=6, val=6)
    return root, make_world(config)


def ids(text, column=0):
    return [Path(row.split(",")[column]).stem[-7:] for row in text.split()]


@pytest.mark.ray
def test_subset_counts_are_rounded_up_to_whole_worlds_and_ids_are_contiguous(subset):
    root, counts = subset
    assert counts == {"train": 12, "val": 6}  # 6 cameras a world
    train = ids((root / "train-19zl.csv").read_text())
    val = ids((root / "val-19zl.csv").read_text())
    assert sorted(train) == [f"{n:07d}" for n in range(1, 13)]
    assert sorted(val) == [f"{n:07d}" for n in range(13, 19)]
    assert train != sorted(train)


@pytest.mark.ray
def test_subset_lists_have_the_quirks_of_the_published_ones(subset):
    root, _ = subset
    train = (root / "train-19zl.csv").read_bytes()
    val = (root / "val-19zl.csv").read_bytes()
    first = ids(train.decode())[0]
    row = f"bingmap/input{first}.png,streetview/input{first}.jpg,streetview/input{first}.jpg\r\n"
    assert train.startswith(row.encode())
    first = ids(val.decode())[0]
    row = f"bingmap/input{first}.png,streetview/input{first}.png,streetview/input{first}.png\r\n"
    assert val.startswith(row.encode())
    assert train.count(b"\r\n") == train.count(b"\n") == 11  # the last line has none
    assert val.count(b"\r\n") == val.count(b"\n") == 6


@pytest.mark.ray
def test_subset_files_hold_the_pairs_of_their_world(subset):
    root, _ = subset
    sizes = Sizes(aerial=64, panorama=(64, 256))
    for number, pair in enumerate(render_pairs(world_seed(0, 2), 6, sizes), start=13):
        name = f"{number:07d}"
        tile = Image.open(root / f"bingmap/input{name}.png")
        assert np.array_equal(np.asarray(tile), pair.aerial)
        colours = np.asarray(Image.open(root / f"segmap/output{name}.png"))
        assert np.array_equal(colours, colours_of(pair.classes))
        assert np.array_equal(classes_of(colours, 6), pair.classes)
        assert IGNORE not in pair.classes
        street = np.asarray(Image.open(root / f"streetview/{name}.jpg"), np.float32)
        assert np.abs(street - pair.panorama).mean() < 8


@pytest.mark.ray
def test_subset_polar_maps_look_along_the_columns_of_the_panorama(subset):
    root, _ = subset
    tile = np.asarray(Image.open(root / "segmap/output0000001.png"))
    polar = np.asarray(Image.open(root / "polarmap/segmap/output0000001.png"))
    assert polar.shape == (128, 512, 3)
    assert np.array_equal(polar[4, 256], tile[round(32 - 31 * 123 / 124), 32])  # north, far
    assert np.asarray(Image.open(root / "polarmap/normal/input0000001.png")).shape == polar.shape


@pytest.mark.ray
def test_locations_are_near_within_a_world_and_far_between_worlds(subset):
    root, _ = subset
    rows = [line.split(",") for line in (root / "split_locations/all.csv").read_text().split()]
    where = np.array(rows, float)
    assert where.shape == (18, 5)
    assert np.array_equal(where[:, :2], where[:, 2:4])
    world = np.arange(18) // 6
    metres = where[:, :2] * [111_320, 111_320 * np.cos(np.radians(20))]
    apart = np.hypot(*(metres[:, None] - metres[None]).transpose(2, 0, 1))
    together = world[:, None] == world[None]
    assert apart[together].max() < 800
    assert apart[~together].min() > 2000
    # Row i is id i + 1: distances agree with the cameras' own metres.
    own = [(p.east, p.north) for p in render_pairs(world_seed(0, 0), 6, TINY)]
    expected = np.hypot(own[4][0] - own[1][0], own[4][1] - own[1][1])
    assert apart[4, 1] == pytest.approx(expected, rel=1e-2)


@pytest.mark.ray
def test_official_layout_has_its_paths_and_annotations(official):
    root, counts = official
    assert counts == {"train": 6, "val": 6}
    for split, first in (("train", 1), ("val", 7)):
        lines = (root / f"splits/{split}-19zl.csv").read_text().split("\n")
        assert lines.pop() == ""
        assert sorted(ids("\n".join(lines))) == [f"{n:07d}" for n in range(first, first + 6)]
        for line in lines:
            tile, street, annotation = line.split(",")
            assert tile.startswith("bingmap/19/")
            pictures = [Image.open(io.BytesIO((root / p).read_bytes())) for p in line.split(",")]
            assert [p.format for p in pictures] == ["JPEG", "JPEG", "PNG"]
            assert [p.size for p in pictures] == [(64, 64), (256, 64), (256, 64)]
            assert pictures[2].mode == "L"
            assert np.asarray(pictures[2]).max() <= 3
            assert (root / f"segmap/output{Path(tile).stem}.png").exists()
            assert Path(street).stem == Path(annotation).stem == Path(tile).stem


@pytest.mark.ray
def test_near_gallery_takes_held_out_pairs_from_one_world(ray_session, tmp_path):
    config = MakeWorld(
        output=str(tmp_path), preset="tiny", train=6, val=12, near_gallery=True, seed=5
    )
    assert make_world(config) == {"train": 6, "val": 12}
    rows = (tmp_path / "split_locations/all.csv").read_text().split()
    where = np.array([row.split(",") for row in rows], float)[6:, :2]
    assert np.ptp(where, axis=0).max() * 111_320 < 800


def test_make_world_refuses_an_empty_split(tmp_path):
    with pytest.raises(ValueError, match="val=0"):
        make_world(MakeWorld(output=str(tmp_path), val=0))
