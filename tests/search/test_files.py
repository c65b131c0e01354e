import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cvmatch import config as configs
from cvmatch.data import images, schema
from cvmatch.data.photos.reading import read_photo
from cvmatch.demo import models as base_models
from cvmatch.generate.infer import GenerateAerial
from cvmatch.generate.model import Generator
from cvmatch.generate.settings import Conditioning, Sampling
from cvmatch.index.manifest import QueryOrigin
from cvmatch.index.reader import Index, rank
from cvmatch.match.infer import EmbedQuery
from cvmatch.report.search_page import write_search_page
from cvmatch.search import files
from cvmatch.search.settings import SearchFiles
from tests.helpers import index as tiny
from tests.helpers.photo import exif_of, save, xmp_of
from tests.helpers.present import present

SPHERE = xmp_of(ProjectionType="equirectangular")


def index_folder(index):
    return index.matcher_dir.split("/matcher/")[0]


def test_search_names_the_panoramas_that_it_cannot_search_and_searches_the_others(
    index, tmp_path, caplog
):
    good = images.encode(tiny.picture(np.random.default_rng(0), 16, 64))
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "cut.png").write_bytes(good[:50])
    locations = tuple(str(tmp_path / name) for name in ("cut.png", "good.png", "absent.png"))
    folder = index_folder(index)
    config = SearchFiles(panorama=locations, index=folder)
    cut, searched, absent = files.search_files(config)
    assert (cut.query, searched.query, absent.query) == locations
    assert "cannot be decoded" in present(cut.error)
    assert "absent.png" in present(absent.error)
    assert searched.error is None
    assert cut.tiles == absent.tiles == []
    (alone,) = files.search_files(SearchFiles(panorama=locations[1:2], index=folder))
    assert searched == alone
    for text in ("2 of 3", "cut.png: cannot be decoded", "absent.png"):
        assert text in caplog.text
    with pytest.raises(ValueError, match=r"(?s)2 of 2.*cut\.png: cannot be decoded.*absent\.png"):
        files.search_files(SearchFiles(panorama=(locations[0], locations[2]), index=folder))


def test_search_goes_on_where_a_model_fails_on_some_panoramas(index, tmp_path, monkeypatch, caplog):
    rows = tiny.rows(4)
    locations = []
    for number in range(4):
        locations.append(str(tmp_path / f"{number}.png"))
        (tmp_path / f"{number}.png").write_bytes(rows[schema.GROUND][number].as_py())
    config = SearchFiles(panorama=tuple(locations), index=index_folder(index))
    whole = list(files.search_files(config))
    embed = EmbedQuery.__call__

    def failing(self, batch):
        if {"1", "2"} & set(batch[schema.PAIR_ID]):
            raise RuntimeError("no kernel for this picture")
        return embed(self, batch)

    monkeypatch.setattr(EmbedQuery, "__call__", failing)
    results = list(files.search_files(config))
    assert [result.error is None for result in results] == [True, False, False, True]
    for number in (0, 3):
        names = [tile["tile"] for tile in results[number].tiles]
        assert names == [tile["tile"] for tile in whole[number].tiles]
    assert "2 of 4 panoramas cannot be searched" in caplog.text
    assert "1.png: RuntimeError: no kernel for this picture" in caplog.text
    monkeypatch.setattr(files, "_BATCH", 2)
    assert [len(one.tiles) > 0 for one in files.search_files(config)] == [True, False, False, True]
    two = SearchFiles(panorama=tuple(locations[1:3]), index=index_folder(index))
    with pytest.raises(ValueError, match=r"(?s)2 of 2 panoramas cannot be searched.*no kernel"):
        list(files.search_files(two))


def test_search_of_a_photo_that_cannot_be_placed_is_refused_with_the_flag(tmp_path):
    data = images.encode(tiny.picture(np.random.default_rng(0), 16, 24))
    (tmp_path / "other.png").write_bytes(data)
    config = SearchFiles(panorama=(str(tmp_path / "other.png"),), index=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"24 x 16 pixels, no panorama .* --fov"):
        files.search_files(config)


def test_search_reads_any_picture_of_a_directory_as_the_same_band(index, tmp_path, caplog):
    band = tiny.picture(np.random.default_rng(3), 64, 352)
    band[:, -8:] = band[:, :8]  # the edges meet
    sphere = np.pad(band, ((56, 56), (0, 0), (0, 0)), "edge")
    turned = np.roll(sphere, -88, axis=1)
    pose = xmp_of(ProjectionType="equirectangular", PoseHeadingDegrees=90)
    # Each is the same panorama, so that each has the same scores, to the bit.
    (tmp_path / "1.PNG").write_bytes(images.encode(band))
    (tmp_path / "2.webp").write_bytes(save(band, "WEBP", lossless=True))
    (tmp_path / "3.png").write_bytes(save(turned, xmp=pose))
    (tmp_path / "4.png").write_bytes(
        save(sphere[::-1, ::-1], exif=exif_of(orientation=3), xmp=SPHERE)
    )
    (tmp_path / "notes.txt").write_text("not a picture")
    folder = index_folder(index)
    with caplog.at_level("INFO", logger="cvmatch.search"):
        config = SearchFiles(panorama=(str(tmp_path),), index=folder, headings=1)
        results = list(files.search_files(config))
    plain, *others = [[(tile["tile"], tile["score"]) for tile in one.tiles] for one in results]
    assert len(plain) == 10
    assert others == [plain] * 3
    readings = [
        "band 352 x 64, north assumed in the middle",
        "band 352 x 64, north assumed in the middle",
        "sphere 352 x 176 (by its XMP), heading 90.0 (XMP)",
        "sphere 352 x 176 (by its XMP), north assumed in the middle, orientation 3 applied",
    ]
    for result, reading in zip(results, readings, strict=True):
        assert [tile["read"] for tile in result.tiles] == [reading] * 10
        assert f"{result.query}: {reading}" in caplog.text
    page = Path(write_search_page(results, str(tmp_path / "page.html"))).read_text("utf-8")
    assert "heading 90.0 (XMP)" in page


@pytest.fixture
def turned_sphere(tmp_path):
    """A whole sphere of which nothing says where it looks, and the band that is its part."""
    sphere = tiny.picture(np.random.default_rng(5), 176, 352)
    (tmp_path / "sphere.png").write_bytes(save(sphere, xmp=SPHERE))
    photo = read_photo((tmp_path / "sphere.png").read_bytes())
    return str(tmp_path / "sphere.png"), images.decode(photo.data)


def test_search_tries_the_headings_of_a_photo_that_does_not_say_where_it_looks(
    index, turned_sphere, tmp_path
):
    location, band = turned_sphere
    small = images.decode(images.encode(band), (16, 64))  # as the model sees it
    scores: dict[tuple[str, float], float] = {}
    for number in range(8):  # each turn as if it were a file that says it looks north
        turned = images.encode(np.roll(small, 8 * number, axis=1))
        batch = {schema.GROUND: schema.object_array([turned]), schema.ERROR: np.array([None])}
        vector = EmbedQuery(index.matcher_dir, "G")(batch)["query_vector"]
        found = rank(index, torch.from_numpy(vector), len(index))
        for row, score in zip(found.rows[0], found.scores[0], strict=True):
            name = index.tiles[schema.PAIR_ID][int(row)].as_py()
            scores[name, 45.0 * number] = float(score)
    best = sorted(scores, key=lambda key: -scores[key])
    headings: dict[str, float] = {}
    for name, heading in best:
        headings.setdefault(name, heading)
    expected = [*headings.items()][:5]

    config = SearchFiles(panorama=(location,), index=index_folder(index), headings=8, top_k=5)
    (result,) = files.search_files(config)
    assert [one["tile"] for one in result.tiles] == [name for name, _ in expected]
    assert [one["heading"] for one in result.tiles] == [heading for _, heading in expected]
    assert [one["score"] for one in result.tiles] == pytest.approx(
        [scores[key] for key in expected], abs=1e-4
    )
    read = present(result.read)
    assert (read.heading, read.heading_source) == (expected[0][1], "search")
    assert result.tiles[0]["read"].endswith(f"heading {expected[0][1]:.1f} (search)")
    assert result.absent is None


def test_headings_are_tried_by_themselves_for_photos_alone(index, turned_sphere, tmp_path):
    location, band = turned_sphere
    (tmp_path / "band.png").write_bytes(images.encode(band))
    folder = index_folder(index)
    config = SearchFiles(panorama=(location, str(tmp_path / "band.png")), index=folder)
    sphere, plain = files.search_files(config)
    assert present(sphere.read).heading_source == "search"
    assert present(plain.read).heading_source == "assumed"
    assert [one["heading"] for one in plain.tiles] == [None] * 10
    (known,) = files.search_files(SearchFiles(panorama=(location,), index=folder, heading=20.0))
    assert [one["heading"] for one in known.tiles] == [20.0] * 10
    (band_tried,) = files.search_files(
        SearchFiles(panorama=(str(tmp_path / "band.png"),), index=folder, headings=4)
    )
    assert present(band_tried.read).heading_source == "search"
    with pytest.raises(ValueError, match="generator draws the aerial of a panorama that looks"):
        SearchFiles(panorama=(location,), generator="models/generator", headings=4)


def test_search_flags_say_what_a_photo_does_not(index, tmp_path, caplog):
    (tmp_path / "photo.png").write_bytes(
        images.encode(tiny.picture(np.random.default_rng(3), 48, 64))
    )
    where = {"panorama": (str(tmp_path / "photo.png"),), "index": index_folder(index)}
    (result,) = files.search_files(SearchFiles(**where, fov=70.0, heading=45.0))
    read = present(result.read)
    assert (read.projection, read.fov, read.heading) == ("photo", 70.0, 45.0)
    assert len(result.tiles) == 10


def test_search_files_gives_ranked_tiles_with_places(index, tmp_path):
    rows = tiny.rows(6)
    places = []
    for number in (3, 1):
        places.append(str(tmp_path / f"{number}.png"))
        (tmp_path / f"{number}.png").write_bytes(rows[schema.GROUND][number].as_py())
    folder = index_folder(index)
    config = SearchFiles(panorama=tuple(places), index=folder, top_k=4)
    found = list(files.search_files(config))
    assert [one.pictures for one in found] == [
        {schema.GROUND: rows[schema.GROUND][number].as_py()} for number in (3, 1)
    ]
    answers = [json.loads(json.dumps(tile)) for one in found for tile in one.tiles]
    batch = EmbedQuery(index.matcher_dir, "G")(tiny.columns(rows))
    ranked = rank(index, torch.from_numpy(batch["query_vector"]), top_k=4)
    assert [answer["query"] for answer in answers] == [places[0]] * 4 + [places[1]] * 4
    assert [answer["rank"] for answer in answers] == [1, 2, 3, 4] * 2
    for answer, row, score in zip(
        answers, ranked.rows[[3, 1]].ravel(), ranked.scores[[3, 1]].ravel(), strict=True
    ):
        assert answer["tile"] == f"{row:07d}"
        assert answer["latitude"] == pytest.approx(0.01 * row)
        assert answer["score"] == pytest.approx(score, abs=1e-4)
        assert answer["modality"] == "G"
        assert set(answer["branches"]) == {"direct", "aerial"}
        assert answer["branches"]["aerial"] == 0  # A was not there
        assert sum(answer["branches"].values()) == pytest.approx(score, abs=1e-4)


def test_search_files_flags_repeat_and_name_what_is_missing():
    config = configs.parse(SearchFiles, ["--panorama", "a.jpg", "--panorama", "b.jpg"])
    assert config.panorama == ("a.jpg", "b.jpg")
    assert configs.parse(SearchFiles, ["--panorama", "a.jpg", "--generator", "g"]).modality == "G+A"
    with pytest.raises(ValueError, match="at least one panorama"):
        SearchFiles()
    with pytest.raises(ValueError, match="pass --generator too"):
        SearchFiles(panorama=("a.jpg",), segmenter="models/segmenter")


def test_search_in_an_area_gives_the_best_of_the_tiles_there(index, tmp_path):
    rows = tiny.rows(6)
    (tmp_path / "panoramas").mkdir()
    for number in range(3):
        path = tmp_path / "panoramas" / f"{number}.png"
        path.write_bytes(rows[schema.GROUND][number].as_py())
    (tmp_path / "panoramas" / "notes.txt").write_text("not a picture")
    folder = index_folder(index)
    asked = {"panorama": (str(tmp_path / "panoramas"),), "index": folder, "top_k": 24}
    everywhere = list(files.search_files(SearchFiles(**asked)))
    assert len(everywhere) == 3
    # Tiles lie 0.01 degrees (1,112 m) apart, going north from the equator.
    areas = {"near": (0.05, 0.0, 1_200.0), "box": (0.035, -1.0, 0.065, 1.0)}
    for name, area in areas.items():
        found = list(files.search_files(SearchFiles(**asked, **{name: area})))
        for one, whole in zip(found, everywhere, strict=True):
            inside = [
                t["tile"] for t in whole.tiles if t["tile"] in ("0000004", "0000005", "0000006")
            ]
            assert [tile["tile"] for tile in one.tiles] == inside
    with pytest.raises(ValueError, match=r"none of 24 tiles lies in .*24 have coordinates"):
        files.search_files(SearchFiles(**asked, near=(50.0, 0.0, 1_000.0)))
    with pytest.raises(ValueError, match="--near or --box, got both"):
        SearchFiles(**asked, **areas)


def test_search_with_another_generator_than_the_queries_of_the_index_is_refused(
    index, tmp_path, monkeypatch
):
    origin = QueryOrigin(generator="abc")
    known = dataclasses.replace(index.manifest, queries=origin)
    opened = dataclasses.replace(index, manifest=known)
    monkeypatch.setattr(Index, "open", lambda uri: opened)
    (tmp_path / "g.png").write_bytes(tiny.rows(1)[schema.GROUND][0].as_py())
    config = SearchFiles(
        panorama=(str(tmp_path / "g.png"),), generator=tiny.matcher(str(tmp_path / "m"))
    )
    with pytest.raises(ValueError, match=r"the generator that made .* \(abc\), got [0-9a-f]{64}"):
        files.search_files(config)


def test_search_draws_as_the_queries_of_the_index_were_drawn_unless_told(
    index, tmp_path, monkeypatch
):
    model = str(tmp_path / "generator")
    torch.manual_seed(0)
    Generator.base(base_models.DIFFUSION, base_models.CLIP, Conditioning(panorama_width=256)).save(
        model
    )
    (tmp_path / "0000002.png").write_bytes(tiny.rows(3)[schema.GROUND][2].as_py())
    own = {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_interval": 0.7}
    origin = QueryOrigin(sampling=own)
    known = dataclasses.replace(index.manifest, queries=origin)
    opened = dataclasses.replace(index, manifest=known)
    monkeypatch.setattr(Index, "open", lambda uri: opened)
    rows = tiny.columns(tiny.rows(3).slice(2))

    def drawn(**flags):
        asked = SearchFiles(panorama=(str(tmp_path / "0000002.png"),), generator=model, **flags)
        (answer,) = files.search_files(asked)
        return answer.pictures[schema.SYNTHETIC]

    other = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": 0.0}
    for flags, sampling in (({}, own), (other, other)):
        actor = GenerateAerial(model, Sampling(**sampling), batch=1)
        assert drawn(**flags) == actor(rows)[schema.SYNTHETIC][0]


def test_page_of_a_search_shows_each_panorama_its_tiles_and_where_they_are(index, tmp_path):
    rows = tiny.rows(24)
    location = tiny.write(rows, str(tmp_path / "rows"))
    (tmp_path / "street <1>.png").write_bytes(rows[schema.GROUND][2].as_py())
    folder = index_folder(index)
    (tmp_path / "cut.png").write_bytes(b"no picture")
    panoramas = (str(tmp_path / "street <1>.png"), str(tmp_path / "cut.png"))
    config = SearchFiles(panorama=panoramas, index=folder, top_k=3)
    place = write_search_page(
        list(files.search_files(config)), str(tmp_path / "page.html"), location
    )
    page = Path(place).read_text(encoding="utf-8")
    assert page.count("<img ") == 4  # the panorama and three tiles
    assert "street &lt;1&gt;.png" in page
    assert "metres north" in page
    assert "not known" in page
    assert "cut.png could not be searched" in page


def test_search_of_a_directory_names_what_it_does_not_search(index, tmp_path, caplog):
    good = images.encode(tiny.picture(np.random.default_rng(0), 16, 64), "JPEG")
    folder = tmp_path / "street"
    (folder / "below").mkdir(parents=True)
    for name in ("a.JPG", "b.jfif", "c.jpe"):
        (folder / name).write_bytes(good)
    for name in ("._a.JPG", ".DS_Store", "d.gif", "e.tif"):
        (folder / name).write_bytes(b"?")
    config = SearchFiles(panorama=(str(folder),), index=index_folder(index))
    found = [Path(result.query).name for result in files.search_files(config)]
    assert found == ["a.JPG", "b.jfif", "c.jpe"]
    assert "holds 3 others: below, d.gif, e.tif" in caplog.text
    for name in found:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"holds 3 others: below, d\.gif, e\.tif\. Convert"):
        files.search_files(config)
