"""The dashboards as files: as built, as Grafana reads them, with all that an operator needs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard as GrafanaDashboard

from build_dashboards import DASHBOARDS, FOLDER, RUNBOOK, built
from specinfer.metrics.catalogue import CATALOGUE
from specinfer_dashboards import promql
from specinfer_dashboards.grafana import uid, variables_of
from specinfer_dashboards.panels import Dashboard, Kind, Panel, Unit
from specinfer_dashboards.runbook import read_entries

PROVISIONING = FOLDER.parent / "provisioning"
FILES = sorted(FOLDER.glob("*.json"))
PANELS = [(board, panel) for board in DASHBOARDS for panel in board.panels]
# What Grafana puts in by itself.
BUILT_IN = {"__rate_interval", "__range"}
DEPRECATED = {"graph", "singlestat", "table-old", "heatmap-new", "worldmap"}


def each_panel(case: Any) -> str:
    return case.name if isinstance(case, Dashboard) else getattr(case, "title", str(case))


def reread(dashboard: dict[str, Any]) -> Any:
    """What is left of a dashboard when Grafana's own schema has read and written it."""
    plugins.register_default_plugins()
    return json.loads(JSONEncoder().encode(GrafanaDashboard.from_json(dashboard)))


def test_the_files_are_what_is_built() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in FILES} == built()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_grafana_s_schema_knows_every_field(path: Path) -> None:
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    assert reread(dashboard) == dashboard


@pytest.mark.parametrize(
    ("where", "field"),
    [
        ((), "titel"),
        (("panels", 1), "descripton"),
        (("panels", 1, "fieldConfig", "defaults"), "units"),
        (("panels", 8, "fieldConfig", "defaults", "custom"), "lineWitdh"),
        (("panels", 1, "options"), "colourMode"),
        (("panels", 1, "targets", 0), "legend"),
        (("templating", "list", 0), "labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_misspelt_field_would_be_seen(where: tuple[str | int, ...], field: str) -> None:
    """The control of the test above."""
    dashboard = json.loads((FOLDER / "overview.json").read_text(encoding="utf-8"))
    place: Any = dashboard
    for step in where:
        place = place[step]
    place[field] = "x"
    assert reread(dashboard) != dashboard


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=each_panel)
def test_each_panel_says_what_to_do(board: Dashboard, panel: Panel) -> None:
    file = json.loads((FOLDER / f"{board.name}.json").read_text(encoding="utf-8"))
    panels = [each for each in file["panels"] if each["type"] != "row"]
    (there,) = [each for each in panels if each["title"] == panel.title]
    assert there["fieldConfig"]["defaults"]["unit"] == panel.unit.value
    assert len(there["description"]) > 40
    (link,) = there["links"]
    entry = read_entries(RUNBOOK)[panel.runbook]
    number = link["url"].removeprefix(f"/d/{uid('runbook')}/runbook?viewPanel=panel-")
    texts = json.loads((FOLDER / "runbook.json").read_text(encoding="utf-8"))["panels"]
    (text,) = [each for each in texts if str(each["id"]) == number]
    assert text["options"]["content"] == entry.text
    assert there["type"] not in DEPRECATED
    assert all(target["datasource"]["uid"] == "${datasource}" for target in there["targets"])


@pytest.mark.parametrize("board", DASHBOARDS, ids=each_panel)
def test_each_variable_is_there_and_used(board: Dashboard) -> None:
    file = json.loads((FOLDER / f"{board.name}.json").read_text(encoding="utf-8"))
    named = {each["name"] for each in file["templating"]["list"]} - {"datasource"}
    used = {
        name
        for panel in board.panels
        for query in panel.queries
        for name in variables_of(query.expression)
    }
    assert used - BUILT_IN == named
    ids = [each["id"] for each in file["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("board", DASHBOARDS, ids=each_panel)
def test_panels_do_not_lie_on_each_other(board: Dashboard) -> None:
    file = json.loads((FOLDER / f"{board.name}.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in file["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_metric_is_on_a_dashboard() -> None:
    text = " ".join(built().values())
    missing = [metric.shown for metric in CATALOGUE if metric.shown not in text]
    assert missing == []


def test_units_are_grafana_s_own() -> None:
    known = {value for value in vars(units).values() if isinstance(value, str)}
    assert {unit.value for unit in Unit if not unit.startswith("suffix:")} <= known


@pytest.mark.parametrize(
    "ask",
    [
        lambda: promql.rate("request"),
        lambda: promql.rate("requests", 'outcom="stop"'),
        lambda: promql.rate("requests", by="reason"),
        lambda: promql.rate("num_requests_running"),
        lambda: promql.quantile(0.5, "requests"),
        lambda: promql.now("num_sessions"),
    ],
)
def test_no_panel_can_ask_for_what_nobody_shows(ask: Any) -> None:
    with pytest.raises(KeyError):
        ask()


def test_what_provisions_them_is_in_step() -> None:
    source = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())
    (datasource,) = source["datasources"]
    assert (datasource["type"], datasource["isDefault"]) == ("prometheus", True)
    provider = yaml.safe_load((PROVISIONING / "dashboards" / "specinfer.yml").read_text())
    compose = (FOLDER.parents[2] / "docker-compose.yml").read_text(encoding="utf-8")
    folder = provider["providers"][0]["options"]["path"]
    assert f"./deploy/grafana/dashboards:{folder}:ro" in compose
    assert re.search(r"image: grafana/grafana:11\.6\.", compose)


def test_the_kinds_of_panels_are_all_used() -> None:
    assert {panel.kind for _, panel in PANELS} == set(Kind)
