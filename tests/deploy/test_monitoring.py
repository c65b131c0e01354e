import json
import re

import promql_parser
import pytest
import yaml
from ray._private import ray_constants

from cvmatch.runtime.gauges import GAUGES
from tests.helpers.documents import ROOT

BOARDS = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in (ROOT / "deploy" / "grafana").iterdir()
}
RAY = "ray_"
"""What Ray puts before the name of a metric."""


def queries(board: dict) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """Name and labels of each series that a query reads."""
    found = re.findall(r"\b(ray_\w+)(?:\{(.*?)\})?", query)
    return [(name, set(re.findall(r"(\w+)=", labels))) for name, labels in found]


def grouped_by(query: str) -> set[str]:
    return {tag for tags in re.findall(r"\bby \((.*?)\)", query) for tag in tags.split(", ")}


def test_boards_show_every_metric_and_no_other():
    shown = {
        name
        for board in BOARDS.values()
        for query in queries(board)
        for name, _ in selectors(query)
    }
    assert shown == {RAY + name for name in GAUGES}


@pytest.mark.parametrize("name", BOARDS)
def test_queries_are_promql_and_name_tags_that_the_metrics_have(name):
    for query in queries(BOARDS[name]):
        promql_parser.parse(query)
        for metric, labels in selectors(query):
            tags = set(GAUGES[metric.removeprefix(RAY)][1])
            assert labels <= tags, query
            assert grouped_by(query) == tags, query  # or series of other tags would be one


@pytest.mark.parametrize("name", BOARDS)
def test_no_query_takes_a_gauge_for_a_counter(name):
    wrong = re.compile(r"\b(rate|irate|increase)\(")
    assert [query for query in queries(BOARDS[name]) if wrong.search(query)] == []


@pytest.mark.parametrize("name", BOARDS)
def test_legends_name_the_tags_of_their_query(name):
    for panel in BOARDS[name]["panels"]:
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown == grouped_by(target["expr"]), panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_boards_leave_the_choice_of_the_server_to_the_viewer(name):
    board = BOARDS[name]
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    sources = re.findall(r'"uid": "([^"]*)"', json.dumps(board))
    assert set(sources) == {board["uid"], "${datasource}"}
    assert "://" not in json.dumps(board)
    used = set(re.findall(r"\$(\w+)", " ".join(queries(board))))
    assert used == set(variables) - {"datasource"}


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_numbers_of_their_own_and_do_not_overlap(name):
    panels = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (column, row)
        for place in (panel["gridPos"] for panel in panels)
        for column in range(place["x"], place["x"] + place["w"])
        for row in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) < 24


def test_prometheus_reads_the_file_that_ray_writes():
    scrapes = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text("utf-8"))[
        "scrape_configs"
    ]
    (files,) = [one["file_sd_configs"][0]["files"] for one in scrapes if "file_sd_configs" in one]
    assert files == [f"/tmp/ray/{ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
