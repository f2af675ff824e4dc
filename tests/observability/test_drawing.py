"""Pictures of the dashboards, from what answers like Prometheus: one panel of each kind."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from specinfer_dashboards.drawing import draw, unit_label
from specinfer_dashboards.overview import OVERVIEW
from specinfer_dashboards.panels import Dashboard, Kind, Panel, Query, Row, Unit
from specinfer_dashboards.reading import Reader

QUERY = Query('x{model_name=~"$model_name"}[$__rate_interval]', "{{le}}")
STATES = (("0", "away", "red"), ("1", "answers", "green"))


def panel_of(kind: Kind) -> Panel:
    return Panel(kind.value, Unit.SECONDS, "advice", "entry", (QUERY,), kind, states=STATES)


class Answers(BaseHTTPRequestHandler):
    """Two buckets, of which one has a gap; keeps what was asked."""

    asked: list[dict[str, list[str]]]

    def do_GET(self) -> None:
        """Answer any query."""
        url = urlparse(self.path)
        self.asked.append(parse_qs(url.query))
        many = url.path.endswith("query_range")
        points = [[1000.0, "1"], [1010.0, "NaN"], [1020.0, "0"]]
        found = [
            {"metric": {"le": le}, **({"values": points} if many else {"value": points[0]})}
            for le in ("10", "2.5")
        ]
        body = json.dumps({"status": "success", "data": {"result": found}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    Answers.asked = []
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_series_come_in_order_with_their_legends_and_gaps(url: str) -> None:
    found = Reader(url, 1000.0, 1020.0, 10.0).read(panel_of(Kind.HEAT))
    assert [each.legend for each in found] == ["2.5", "10"]
    assert found[0].times == (0.0, 10.0, 20.0)
    assert math.isnan(found[0].values[1])
    (asked,) = Answers.asked
    assert asked["query"] == ['x{model_name=~".*"}[20s]']


def test_every_kind_of_panel_is_drawn(url: str, tmp_path: Path) -> None:
    panels = tuple(panel_of(kind) for kind in Kind)
    board = Dashboard("all", "All", "about", (Row("row", panels),))
    reader = Reader(url, 1000.0, 1020.0, 10.0)
    place = tmp_path / "all.png"
    draw(board, {panel: reader.read(panel) for panel in panels}, place)
    assert place.read_bytes().startswith(b"\x89PNG")
    nothing = tmp_path / "nothing.png"
    draw(board, {panel: [] for panel in panels}, nothing)
    assert nothing.read_bytes() != place.read_bytes()


def test_units_have_words() -> None:
    found = {unit_label(panel.unit) for panel in OVERVIEW.panels}
    assert {"seconds", "share", "times", "requests/s", "tokens/s", ""} <= found
