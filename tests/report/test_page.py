import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import ray
from PIL import Image

from cvmatch.data.schema import IGNORE, PALETTE
from cvmatch.report.charts import Curve
from cvmatch.report.examples import Example, Tile
from cvmatch.report.page import Page, Trial, describe_run, render_page, write_page
from cvmatch.report.scores import collect_scores
from tests.helpers.report import example, plain

HOSTILE = '"><script>alert(1)</script>&$x'
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


def full_page():
    return Page(
        title="A title",
        summary="A summary",
        run={"Machine": "a laptop"},
        config="seed: 0\n",
        results=collect_scores({"retrieval": {"gallery": 50, "recall@1": 0.5}}),
        examples=[example()],
        curves={"Matcher": [Curve(name="train", points=[(0, 2.0), (1, 1.0)])]},
        trials=[
            Trial(params={"margin": 0.1}, value=0.4),
            Trial(params={"margin": 0.3}, value=0.2),
        ],
        seconds={"index": 2.0},
        limits=["One seed."],
    )


def test_render_page_full_page_shows_every_part_and_is_well_formed():
    page = Document(render_page(full_page()))
    sections = page.attributes("section", "id")
    assert sections == ["results", "places", "learning", "search", "time", "run", "limits"]
    assert page.attributes("a", "href") == [f"#{name}" for name in sections]
    for text in ("A summary", "a laptop", "seed: 0\n", "One seed.", "margin"):
        assert text in page.texts


def test_render_page_empty_page_says_nothing_of_its_own():
    page = Document(render_page(Page(title="Nothing yet")))
    assert page.attributes("section", "id") == []
    assert not any("CVUSA" in text or "Limits" in text for text in page.texts)


def test_render_page_answers_without_pictures_are_a_table_of_ids_scores_and_places():
    top = [
        Tile(pair_id="0000003", picture=None, score=0.75, coordinates=(46.9481234, 7.4474)),
        Tile(pair_id="0000005", picture=None, score=0.5),
    ]
    page = Document(render_page(Page(title="t", examples=[example(top=top, aerial=None)])))
    cells = [text for text in page.texts if text.strip()]
    for text in ("0000003", "0.750", "46.948123", "7.447400", "0000005", "0.500"):
        assert text in cells
    assert cells.count("not known") == 3  # both coordinates of a tile, and the true tile
    assert "answer" not in page.attributes("figure", "class")
    assert not any("the true tile" in text or "a tick" in text for text in cells)


def test_render_page_answers_with_pictures_have_a_table_where_their_places_are_known():
    placed = Tile(pair_id="0000003", picture=plain((9, 9, 9)), score=0.75, coordinates=(46.0, 7.0))
    pages = [Document(render_page(Page(title="t", examples=[example(top=[placed])])))]
    pages.append(Document(render_page(Page(title="t", examples=[example()]))))
    assert ["latitude" in page.texts for page in pages] == [True, False]
    assert all("answer" in page.attributes("figure", "class") for page in pages)


def test_render_page_answers_say_what_each_branch_added_where_that_is_known():
    top = [
        Tile(pair_id="a", picture=None, score=0.75, branches={"direct": 0.521, "layout": 0.229}),
        Tile(pair_id="b", picture=None, score=0.5, branches={"direct": 0.4, "layout": 0.1}),
    ]
    table = Document(render_page(Page(title="t", examples=[example(top=top)])))
    for text in ("direct", "layout", "0.521", "0.229", "0.400", "0.100"):
        assert text in table.texts
    pictured = [Tile(pair_id="a", picture=plain((9, 9, 9)), score=0.75, branches={"layout": 0.2})]
    captions = Document(render_page(Page(title="t", examples=[example(top=pictured)])))
    assert "layout 0.20" in captions.texts
    without = render_page(Page(title="t", examples=[example()]))
    assert ["branch" in page for page in (without, "".join(captions.texts))] == [False, True]


def test_render_page_any_page_needs_nothing_from_elsewhere():
    page = Document(render_page(full_page()))
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    sources = page.attributes("img", "src")
    assert len(sources) == 6  # G, A, S, C and two answers
    assert all(source.startswith("data:image/") for source in sources)
    assert "url(" not in render_page(full_page())
    assert "@import" not in render_page(full_page())


@pytest.mark.parametrize(
    "page",
    [
        Page(title=HOSTILE, summary=HOSTILE, config=HOSTILE, limits=[HOSTILE]),
        Page(title="t", run={HOSTILE: HOSTILE}, seconds={HOSTILE: 1.0}),
        Page(title="t", examples=[example(HOSTILE, top=(HOSTILE, HOSTILE + "2"))]),
        Page(title="t", results=collect_scores({HOSTILE: {HOSTILE: 1.0}})),
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
def test_render_page_hostile_text_stays_text(page):
    text = render_page(page)
    document = Document(text)  # also: no attribute is broken out of
    assert "script" not in {tag for tag, _ in document.tags}
    everything = "".join(document.texts) + "".join(
        value or "" for _, attrs in document.tags for value in attrs.values()
    )
    assert HOSTILE in everything


def test_render_page_right_answer_alone_is_framed_and_said_in_words():
    page = Document(render_page(Page(title="t", examples=[example(top=("0000003", "0000007"))])))
    assert page.attributes("figure", "class")[4:] == ["answer", "right"]
    assert page.attributes("img", "alt")[4:] == [
        "Answer 1, wrong: 0000003",
        "Answer 2, right: 0000007",
    ]


def test_render_page_stage_that_did_not_run_is_said():
    page = Document(render_page(Page(title="t", examples=[example(synthetic=None, classes=None)])))
    assert page.texts.count("not made") == 2
    assert len(page.attributes("img", "src")) == 4


def test_render_page_class_map_keeps_its_exact_colours():
    ids = np.array([[0, 1], [4, IGNORE]], dtype=np.uint8)
    page = Document(render_page(Page(title="t", examples=[example(classes=ids)])))
    encoded = page.attributes("img", "src")[2].partition("base64,")[2]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    assert shown.tolist() == [
        [list(PALETTE[0]), list(PALETTE[1])],
        [list(PALETTE[4]), [0, 0, 0]],
    ]


def test_render_page_large_pictures_are_shrunk_in_proportion():
    page = Document(render_page(Page(title="t", examples=[example(ground=plain(0, (224, 1232)))])))
    encoded = page.attributes("img", "src")[0].partition("base64,")[2]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (640, 116)


@pytest.mark.parametrize(("maximise", "best"), [(True, "0.4"), (False, "0.2")])
def test_render_page_best_trial_follows_the_direction_of_the_search(maximise, best):
    trials = [
        Trial(params={"margin": float(i)}, value=value)
        for i, value in enumerate((0.3, 0.4, float("nan"), 0.2))
    ]
    text = render_page(Page(title="t", trials=trials, maximise=maximise))
    row = re.findall(r'<tr class="best">(.*?)</tr>', text)
    assert len(row) == 1
    assert f"<td>{best}</td><td>finished, best</td>" in row[0]


def test_render_page_search_of_failed_trials_names_no_best():
    page = render_page(Page(title="t", trials=[Trial(params={"a": 1.0}, value=float("nan"))]))
    assert 'class="best"' not in page


def test_write_page_writes_the_page_and_returns_its_location(tmp_path):
    output = str(tmp_path / "deep" / "report.html")
    assert write_page(full_page(), output) == output
    with open(output, encoding="utf-8") as file:
        assert file.read() == render_page(full_page())


def test_describe_run_names_the_versions_that_run():
    run = describe_run()
    assert f"ray {ray.__version__}," in run["Packages"]
    assert "cores" in run["Machine"]


def test_tile_whose_picture_is_elsewhere_is_named_without_one():
    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    near = Tile(pair_id="0000008", picture=grey, score=0.6)
    far = Tile(pair_id="0000009", picture=None, score=0.5)
    example = Example(
        pair_id="0000001", ground=grey, aerial=grey, top=[near, far], note="of the worst"
    )
    page = render_page(Page(title="t", examples=[example]))
    assert page.count("not at hand") == 1
    assert page.count("not made") == 2  # neither A nor S
    assert "of the worst" in page
