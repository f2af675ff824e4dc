"""Grafana's JSON of the dashboards, every field that Grafana 11 would add itself included.

So reading it with Grafana's own schema and writing it again changes nothing, and a misspelt field
shows. This module knows nothing of any particular panel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from specinfer_dashboards.panels import Dashboard, Kind, Panel, Query, Row
from specinfer_dashboards.runbook import Entry

Json = dict[str, Any]

SCHEMA_VERSION = 41
DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
RUNBOOK_NAME = "runbook"
_PANEL: Json = {"transparent": False, "repeatDirection": "h"}
_VARIABLE: Json = {
    "skipUrlSync": False,
    "auto": False,
    "auto_count": 30,
    "auto_min": "10s",
    "allowCustomValue": True,
}
_LINK: Json = {
    "type": "link",
    "tooltip": "",
    "icon": "",
    "url": "",
    "tags": [],
    "asDropdown": False,
    "targetBlank": False,
    "includeVars": False,
    "keepTime": False,
}
_NUMBERS: Json = {"reduceOptions": {"calcs": ["lastNotNull"], "values": False, "fields": ""}}


def uid(name: str) -> str:
    """The id by which others link to a dashboard."""
    return f"specinfer-{name}"


def dashboard_json(dashboard: Dashboard, entries: Mapping[str, Entry]) -> Json:
    """The whole of one dashboard; `entries` are the runbook's, by title."""
    panels = list(_laid_out(dashboard.rows, entries))
    return _frame(dashboard.name, dashboard.title, dashboard.about, panels, _variables(dashboard))


def runbook_json(entries: Mapping[str, Entry]) -> Json:
    """The runbook as a dashboard of texts, so that panels can link to its entries."""
    panels = [
        {
            **_PANEL,
            "id": entry.number,
            "type": "text",
            "title": entry.title,
            "gridPos": {"h": 14, "w": 12, "x": 12 * (index % 2), "y": 14 * (index // 2)},
            "options": {"mode": "markdown", "content": entry.text},
        }
        for index, entry in enumerate(entries.values())
    ]
    about = "What each alert means and what to do about it; the text of docs/runbook.md."
    return _frame(RUNBOOK_NAME, "Runbook", about, panels, [])


def _frame(name: str, title: str, about: str, panels: list[Json], variables: list[Json]) -> Json:
    others = {
        **_LINK,
        "title": "specinfer",
        "type": "dashboards",
        "tags": ["specinfer"],
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
    }
    return {
        "uid": uid(name),
        "title": title,
        "description": about,
        "tags": ["specinfer"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": False,
        "timezone": "browser",
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "annotations": {},
        "links": [others],
        "templating": {"list": variables},
        "panels": panels,
    }


def _variables(dashboard: Dashboard) -> list[Json]:
    text = " ".join(query.expression for panel in dashboard.panels for query in panel.queries)
    info = "specinfer_build_info"
    source = {
        **_VARIABLE,
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "multi": False,
        "includeAll": False,
    }
    variables = [source, _query_variable("model_name", "Model", f"{info}, model_name")]
    for tier, label in (("router", "Router"), ("verify", "Verify worker"), ("draft", "Drafter")):
        if f"${tier}" in text:
            series = f'{info}{{source="{tier}",model_name=~"$model_name"}}'
            variables.append(_query_variable(tier, label, f"{series}, instance"))
    return variables


def _query_variable(name: str, label: str, of: str) -> Json:
    return {
        **_VARIABLE,
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({of})", "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
    }


def _laid_out(rows: tuple[Row, ...], entries: Mapping[str, Entry]) -> Iterator[Json]:
    number, y = 0, 0
    for row in rows:
        number += 1
        grid = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        head = {"id": number, "type": "row", "title": row.title, "gridPos": grid}
        yield {**head, "collapsed": False, "panels": []}
        x, y, lowest = 0, y + 1, y + 1
        for panel in row.panels:
            number += 1
            if x + panel.width > COLUMNS:
                x, y = 0, lowest
            place = {"h": panel.height, "w": panel.width, "x": x, "y": y}
            yield _panel(number, panel, place, entries[panel.runbook])
            x, lowest = x + panel.width, max(lowest, y + panel.height)
        y = lowest


def _panel(number: int, panel: Panel, place: Json, entry: Entry) -> Json:
    url = f"/d/{uid(RUNBOOK_NAME)}/runbook?viewPanel=panel-{entry.number}"
    return {
        **_PANEL,
        "id": number,
        "type": panel.kind.value,
        "title": panel.title,
        "description": panel.advice,
        "gridPos": place,
        "datasource": DATASOURCE,
        "links": [{**_LINK, "title": f"Runbook: {entry.title}", "url": url}],
        "targets": [
            _target(letter, query, panel)
            for letter, query in zip("ABCDEFGH", panel.queries, strict=False)
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _target(letter: str, query: Query, panel: Panel) -> Json:
    at_once = panel.kind is Kind.BARS
    return {
        "refId": letter,
        "datasource": DATASOURCE,
        "expr": query.expression,
        "legendFormat": query.legend,
        "format": "heatmap" if panel.kind is Kind.HEAT else "time_series",
        "instant": at_once,
        "range": not at_once,
        "exemplar": panel.kind is Kind.LINES and query.expression.startswith("histogram_quantile"),
    }


def _field(panel: Panel) -> Json:
    field: Json = {"unit": panel.unit.value, "min": 0}
    if panel.maximum is not None:
        field["max"] = panel.maximum
    if panel.steps:
        steps = [{"value": step.value, "color": step.color} for step in panel.steps]
        field["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.states:
        field["mappings"] = [_states(panel)]
    if panel.kind is Kind.LINES:
        field["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    if panel.kind is Kind.STATES:
        field["custom"] = {"lineWidth": 0, "fillOpacity": 80}
    if panel.kind is Kind.HEAT:
        field["custom"] = {}
    return field


def _states(panel: Panel) -> Json:
    options = {
        value: {"text": text, "color": color, "index": index}
        for index, (value, text, color) in enumerate(panel.states)
    }
    return {"type": "value", "options": options}


def _options(panel: Panel) -> Json:
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    match panel.kind:
        case Kind.NUMBER:
            return {**_NUMBERS, **_STAT}
        case Kind.BARS:
            return {**_NUMBERS, **_BARS}
        case Kind.HEAT:
            return {**_HEAT, "yAxis": {"unit": panel.unit.value}}
        case Kind.STATES:
            return {"legend": legend, "tooltip": {"mode": "single", "sort": "none"}, **_TIMELINE}
        case Kind.LINES:
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


_STAT: Json = {
    "colorMode": "value",
    "graphMode": "area",
    "justifyMode": "auto",
    "orientation": "auto",
    "percentChangeColorMode": "standard",
    "showPercentChange": False,
    "textMode": "auto",
    "wideLayout": True,
}
_BARS: Json = {
    "displayMode": "basic",
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
    "maxVizHeight": 300,
    "minVizHeight": 16,
    "minVizWidth": 8,
    "namePlacement": "auto",
    "orientation": "horizontal",
    "showUnfilled": True,
    "sizing": "auto",
    "valueMode": "color",
}
_HEAT: Json = {
    "calculate": False,
    "cellGap": 1,
    "color": {
        "mode": "scheme",
        "scheme": "Oranges",
        "steps": 64,
        "reverse": False,
        "fill": "",
        "exponent": 0,
    },
    "exemplars": {"color": "rgba(255,0,255,0.7)"},
    "filterValues": {"le": 1e-9},
    "legend": {"show": True},
    "selectionMode": "x",
    "showValue": "auto",
    "tooltip": {"mode": "single"},
}
_TIMELINE: Json = {
    "alignValue": "left",
    "mergeValues": True,
    "perPage": 20,
    "rowHeight": 0.9,
    "showValue": "auto",
}


def variables_of(expression: str) -> set[str]:
    """The names of the variables that an expression has in it."""
    return set(re.findall(r"\$\{?(\w+)", expression))
