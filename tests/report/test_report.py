import base64
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import ray
from PIL import Image

from cvmatch.data.schema import IGNORE, PALETTE
from cvmatch.report import (
    Curve,
    Example,
    Page,
    Tile,
    Trial,
    html,
    provenance,
    report,
    retrieval_sheet,
    scores,
)
from cvmatch.report.charts import lines, number, scatter
from cvmatch.report.evaluation import chosen

HOSTILE = '"><script>alert(1)</script>&$x'
GREEN = (22, 150, 72)
VOID = {"meta", "img", "br"}


class Document(HTMLParser):
    """Tags and text of a page; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def attributes(self, tag, name):
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]


def plain(colour, size=(8, 8)):
    return np.full((*size, 3), colour, dtype=np.uint8)


def example(pair_id="0000007", top=("0000003", "0000007"), **changes):
    given = {
        "pair_id": pair_id,
        "ground": plain((10, 20, 30), (8, 32)),
        "synthetic": plain((40, 50, 60)),
        "classes": np.full((8, 8), 2, dtype=np.uint8),
        "aerial": plain((70, 80, 90)),
        "top": [
            name
            if isinstance(name, Tile)
            else Tile(pair_id=name, picture=plain((9 * i, 0, 0)), score=1 - i / 10)
            for i, name in enumerate(top)
        ],
    }
    return Example(**{**given, **changes})


def full_page():
    return Page(
        title="A title",
        summary="A summary",
        run={"Machine": "a laptop"},
        config="seed: 0\n",
        results=scores({"retrieval": {"gallery": 50, "recall@1": 0.5}}),
        examples=[example()],
        curves={"Matcher": [Curve(name="train", points=[(0, 2.0), (1, 1.0)])]},
        trials=[
            Trial(params={"margin": 0.1}, value=0.4),
            Trial(params={"margin": 0.3}, value=0.2),
        ],
        seconds={"index": 2.0},
        limits=["One seed."],
    )


def test_html_full_page_shows_every_part_and_is_well_formed():
    page = Document(html(full_page()))
    sections = page.attributes("section", "id")
    assert sections == ["results", "places", "learning", "search", "time", "run", "limits"]
    assert page.attributes("a", "href") == [f"#{name}" for name in sections]
    for text in ("A summary", "a laptop", "seed: 0\n", "One seed.", "margin"):
        assert text in page.texts


def test_html_empty_page_says_nothing_of_its_own():
    page = Document(html(Page(title="Nothing yet")))
    assert page.attributes("section", "id") == []
    assert not any("CVUSA" in text or "Limits" in text for text in page.texts)


def test_html_answers_without_pictures_are_a_table_of_ids_scores_and_places():
    top = [
        Tile(pair_id="0000003", picture=None, score=0.75, place=(46.9481234, 7.4474)),
        Tile(pair_id="0000005", picture=None, score=0.5),
    ]
    page = Document(html(Page(title="t", examples=[example(top=top, aerial=None)])))
    cells = [text for text in page.texts if text.strip()]
    for text in ("0000003", "0.750", "46.948123", "7.447400", "0000005", "0.500"):
        assert text in cells
    assert cells.count("not known") == 3  # both coordinates of a tile, and the true tile
    assert "answer" not in page.attributes("figure", "class")
    assert not any("the true tile" in text or "a tick" in text for text in cells)


def test_html_answers_with_pictures_have_a_table_where_their_places_are_known():
    placed = Tile(pair_id="0000003", picture=plain((9, 9, 9)), score=0.75, place=(46.0, 7.0))
    pages = [Document(html(Page(title="t", examples=[example(top=[placed])])))]
    pages.append(Document(html(Page(title="t", examples=[example()]))))
    assert ["latitude" in page.texts for page in pages] == [True, False]
    assert all("answer" in page.attributes("figure", "class") for page in pages)


def test_html_any_page_needs_nothing_from_elsewhere():
    page = Document(html(full_page()))
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    sources = page.attributes("img", "src")
    assert len(sources) == 6  # G, A, S, C and two answers
    assert all(source.startswith("data:image/") for source in sources)
    assert "url(" not in html(full_page())
    assert "@import" not in html(full_page())


@pytest.mark.parametrize(
    "page",
    [
        Page(title=HOSTILE, summary=HOSTILE, config=HOSTILE, limits=[HOSTILE]),
        Page(title="t", run={HOSTILE: HOSTILE}, seconds={HOSTILE: 1.0}),
        Page(title="t", examples=[example(HOSTILE, top=(HOSTILE, HOSTILE + "2"))]),
        Page(title="t", results=scores({HOSTILE: {HOSTILE: 1.0}})),
        Page(title="t", curves={HOSTILE: [Curve(name=HOSTILE, points=[(0, 1.0), (1, 2.0)])]}),
        Page(
            title="t",
            objective=HOSTILE,
            trials=[
                Trial(params={HOSTILE: float(i), "b": HOSTILE}, value=1.0, state=HOSTILE)
                for i in range(2)
            ],
        ),
    ],
    ids=["texts", "run", "pair ids", "results", "curves", "trials"],
)
def test_html_hostile_text_stays_text(page):
    text = html(page)
    document = Document(text)  # also: no attribute is broken out of
    assert "script" not in {tag for tag, _ in document.tags}
    everything = "".join(document.texts) + "".join(
        value or "" for _, attrs in document.tags for value in attrs.values()
    )
    assert HOSTILE in everything


def test_html_right_answer_alone_is_framed_and_said_in_words():
    page = Document(html(Page(title="t", examples=[example(top=("0000003", "0000007"))])))
    assert page.attributes("figure", "class")[4:] == ["answer", "right"]
    assert page.attributes("img", "alt")[4:] == [
        "Answer 1, wrong: 0000003",
        "Answer 2, right: 0000007",
    ]


def test_html_stage_that_did_not_run_is_said():
    page = Document(html(Page(title="t", examples=[example(synthetic=None, classes=None)])))
    assert page.texts.count("not made") == 2
    assert len(page.attributes("img", "src")) == 4


def test_html_class_map_keeps_its_exact_colours():
    ids = np.array([[0, 1], [4, IGNORE]], dtype=np.uint8)
    page = Document(html(Page(title="t", examples=[example(classes=ids)])))
    encoded = page.attributes("img", "src")[2].partition("base64,")[2]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    assert shown.tolist() == [
        [list(PALETTE[0]), list(PALETTE[1])],
        [list(PALETTE[4]), [0, 0, 0]],
    ]


def test_html_large_pictures_are_shrunk_in_proportion():
    page = Document(html(Page(title="t", examples=[example(ground=plain(0, (224, 1232)))])))
    encoded = page.attributes("img", "src")[0].partition("base64,")[2]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (640, 116)


@pytest.mark.parametrize(("maximise", "best"), [(True, "0.4"), (False, "0.2")])
def test_html_best_trial_follows_the_direction_of_the_search(maximise, best):
    trials = [
        Trial(params={"margin": float(i)}, value=value)
        for i, value in enumerate((0.3, 0.4, float("nan"), 0.2))
    ]
    text = html(Page(title="t", trials=trials, maximise=maximise))
    row = re.findall(r'<tr class="best">(.*?)</tr>', text)
    assert len(row) == 1
    assert f"<td>{best}</td><td>finished, best</td>" in row[0]


def test_html_search_of_failed_trials_names_no_best():
    page = html(Page(title="t", trials=[Trial(params={"a": 1.0}, value=float("nan"))]))
    assert 'class="best"' not in page


def test_report_writes_the_page_and_gives_its_location_back(tmp_path):
    output = str(tmp_path / "deep" / "report.html")
    assert report(full_page(), output) == output
    with open(output, encoding="utf-8") as file:
        assert file.read() == html(full_page())


def test_provenance_names_the_versions_that_run():
    run = provenance()
    assert f"ray {ray.__version__}," in run["Packages"]
    assert "cores" in run["Machine"]


def test_tile_whose_picture_is_elsewhere_is_named_without_one():
    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    near = Tile(pair_id="0000008", picture=grey, score=0.6)
    far = Tile(pair_id="0000009", picture=None, score=0.5)
    example = Example(
        pair_id="0000001", ground=grey, aerial=grey, top=[near, far], note="of the worst"
    )
    page = html(Page(title="t", examples=[example]))
    assert page.count("not at hand") == 1
    assert page.count("not made") == 2  # neither A nor S
    assert "of the worst" in page


def test_chosen_queries_are_the_best_the_worst_and_others_each_once():
    rank = [1, 9, 1, 3, 2, 7, 1, 5]
    score = [0.9, 0.1, 0.8, 0.5, 0.6, 0.2, 0.7, 0.3]
    rows = pd.DataFrame({"rank": rank, "score": score})
    best, worst, others = chosen(rows, shown=2).values()
    assert best == [0, 2]  # of the three first places, those of the highest scores
    assert worst == [1, 5]
    assert len(others) == 2
    assert set(others) < {3, 4, 6, 7}
    few = chosen(rows[:3], shown=2)
    assert sorted(position for some in few.values() for position in some) == [0, 1, 2]


def test_scores_recalls_know_their_chance():
    rows = scores(
        {
            "gallery": 400,
            "G": {"recall@1": 0.2, "recall@5": 0.3, "recall@1%": 0.25, "median_rank": 9.0},
            "small": {"gallery": 10, "recall@5": 0.9},
            "ten": {"top1": 0.5},
        }
    )
    chance = {(row.group, row.name): row.chance for row in rows}
    assert chance == {
        ("G", "recall@1"): 1 / 400,
        ("G", "recall@5"): 5 / 400,
        ("G", "recall@1%"): 4 / 400,
        ("G", "median_rank"): 200.5,
        ("small", "recall@5"): 0.5,
        ("ten", "top1"): 0.1,
    }
    meanings = {row.name: row.meaning for row in rows if row.group == "G"}
    assert meanings["recall@1"] == "the right tile comes first of 400"
    assert meanings["recall@1%"] == "the right tile comes among the first 4 of 400"


@pytest.mark.parametrize("ends", [{"miou_low": 0.3, "miou_high": 0.5}, {"miou_95": [0.3, 0.5]}])
def test_scores_neighbouring_keys_belong_to_one_row(ends):
    (row,) = scores({"g": {"miou": 0.4, "miou_chance": 0.1, "note": "x", **ends}})
    assert (row.value, row.interval, row.chance, row.share) == (0.4, (0.3, 0.5), 0.1, True)


def test_scores_tiles_nearby_are_guessed_among_themselves():
    tree = {"gallery": 900, "near_recall@1": 0.5, "near_gallery": 51.0, "near_queries": 2}
    (row,) = scores(tree | {"near_recall@1_chance": 0.255})
    assert (row.chance, row.share) == (0.255, True)
    assert row.meaning == "it comes first of the tiles nearby (51.0 on average)"
    (row,) = scores(tree)  # the mean of their numbers says nothing of a guess: 0.02 for 2 and 100
    assert row.chance is None


def test_scores_recalls_by_other_views_than_luminance_are_recalls():
    tree = {"gallery": 40.0}
    for view in ("chroma", "gradient"):
        tree |= {f"{view}/gallery": 40.0, f"{view}/recall@1": 0.3, f"{view}/recall@1_k": 1.0}
        tree |= {f"{view}/recall@1_low": 0.2, f"{view}/recall@1_high": 0.4}
        tree |= {f"{view}/recall@10%": 0.5, f"{view}/recall@10%_k": 4.0}
    rows = scores(tree)
    assert [(row.name, row.chance) for row in rows] == [
        ("chroma/recall@1", 1 / 40),
        ("chroma/recall@10%", 0.1),
        ("gradient/recall@1", 1 / 40),
        ("gradient/recall@10%", 0.1),
    ]
    assert all(row.share for row in rows)
    assert rows[0].interval == (0.2, 0.4)
    assert rows[1].meaning == "by colour alone, the right tile comes among the first 4 of 40"
    assert rows[2].meaning == "by edges alone, the right tile comes first of 40"


def test_scores_of_a_shortlist_are_not_those_of_one_of_ten():
    tree = {"one_of_ten_top1": 0.9, "index": {"recall": {"top1": 1.0, "shortlist": 50}}}
    ten, held, size = scores({"gallery": 320, **tree})
    assert (ten.chance, held.chance, held.share) == (0.1, None, True)
    assert "shortlist holds" in held.meaning
    assert "10" in ten.meaning
    assert size.meaning == "tiles that the first stage hands to the second"


def test_scores_levels_of_an_ablation_are_recalls_of_the_first_place():
    rows = scores({"gallery": 50, "ablation": {"G": 0.5, "G+A": 0.6}})
    assert [(row.name, row.chance, row.share) for row in rows] == [
        ("G", 0.02, True),
        ("G+A", 0.02, True),
    ]


def test_scores_groups_stay_together_below_their_parents():
    tree = {"a": {"psnr": 1.0}, "ncc": 0.2, "b": {"c": {"psnr": 2.0}, "ssim": 0.1}, "none": None}
    assert [(row.group, row.name) for row in scores(tree)] == [
        ("", "ncc"),
        ("a", "psnr"),
        ("b", "ssim"),
        ("b / c", "psnr"),
    ]


def test_scores_shuffled_values_and_classes_get_rows_with_words():
    rows = scores({"ncc": 0.4, "ncc_shuffled": 0.0, "iou": {"tree": 0.5}})
    assert [row.name for row in rows] == ["ncc", "ncc_shuffled", "tree"]
    assert all(row.meaning for row in rows)
    assert [row.share for row in rows] == [False, False, True]


def test_scores_unknown_gallery_gives_no_chance():
    (row,) = scores({"recall@1": 0.4})
    assert row.chance is None
    assert row.group == ""


def test_retrieval_sheet_right_answer_alone_has_a_green_frame():
    sheet = retrieval_sheet([example(top=("a", "0000007", "b"))], side=20)
    side, wide = 20 + 6, 80 + 6  # three pixels of gap or frame on each side
    assert sheet.shape == (side, wide + 6 * side, 3)
    corners = [tuple(sheet[0, wide + i * side].tolist()) for i in range(6)]
    assert [corner == GREEN for corner in corners] == [False, False, False, False, True, False]


def test_retrieval_sheet_uneven_examples_fill_one_picture():
    sheet = retrieval_sheet([example(top=("a", "b")), example(top=("a",), synthetic=None)], side=20)
    assert sheet.shape == (2 * 26, 86 + 5 * 26, 3)
    assert (sheet[26:, -26:] == 255).all()  # no second answer
    assert (sheet[26:, 86 : 86 + 26] == 255).all()  # no A


def test_retrieval_sheet_wide_panorama_keeps_its_shape():
    sheet = retrieval_sheet([example(ground=plain(0, (10, 80)))], side=20)
    dark = (sheet[:, :86] == 0).all(axis=2)
    assert (dark.any(axis=0).sum(), dark.any(axis=1).sum()) == (80, 10)


def test_retrieval_sheet_without_examples_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        retrieval_sheet([])


def points_of(svg):
    line = ET.fromstring(svg).find("polyline")
    assert line is not None
    return [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]


def test_lines_larger_values_are_higher_and_later_ones_further_right():
    (x0, y0), (x1, y1), (x2, y2) = points_of(
        lines([Curve(name="train", points=[(0, 1.0), (1, 3.0), (2, 2.0)])], "epoch", "loss")
    )
    assert x0 < x1 < x2
    assert y1 < y2 < y0  # SVG's y grows downwards
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_lines_tick_labels_leave_room_for_the_name_of_their_axis():
    """About 6.6 units a digit: the labels end left of the axis, the name is 17 units wide."""
    for scale in (1.0, 1e-3, 12_345.0):
        root = ET.fromstring(
            lines([Curve(name="a", points=[(0, scale), (1, 2 * scale)])], "x", "y")
        )
        ticks = [text for text in root.iter("text") if text.get("text-anchor") == "end"]
        assert ticks
        assert all(float(t.get("x")) - 6.6 * len(t.text) > 17 for t in ticks)


def test_lines_points_that_are_not_finite_are_left_out():
    points = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]
    assert len(points_of(lines([Curve(name="a", points=points)], "epoch", "loss"))) == 2
    assert lines([Curve(name="a", points=[(0, float("nan"))])], "epoch", "loss") == ""


def test_lines_single_point_is_drawn():
    assert len(points_of(lines([Curve(name="a", points=[(0, 0.0)])], "epoch", "loss"))) == 1


def test_scatter_wide_ranges_are_logarithmic():
    svg = ET.fromstring(scatter([(1e-5, 1.0), (1e-4, 2.0), (1e-3, 3.0)], 2, "lr", "recall"))
    places = sorted(float(dot.attrib["cx"]) for dot in svg.findall("circle"))
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert "lr (log)" in "".join(svg.itertext())


def test_scatter_best_point_is_drawn_last():
    svg = ET.fromstring(scatter([(1.0, 3.0), (2.0, 1.0), (3.0, 2.0)], 0, "a", "b"))
    assert [dot.attrib["class"] for dot in svg.findall("circle")] == ["dot", "dot", "dot best"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.1, "0.1"),
        (0.12345, "0.123"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (0.0010, "0.001"),
        (3.84e-5, "3.8e-05"),
        (100, "100"),
        (-2.5, "-2.5"),
        (float("nan"), "-"),
    ],
)
def test_number_reads_like_a_person_writes(value, text):
    assert number(value) == text
