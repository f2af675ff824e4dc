"""The chat page's routes: types, revalidation, and a policy that lets nothing foreign in."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette

from specinfer_router.gateway.page import page_routes


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=Starlette(routes=page_routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
        yield client


async def test_the_page_and_all_that_it_names_are_served(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert len(named) > 10
    for path in named:
        response = await http.get(f"/{path}")
        assert response.status_code == 200, path
        assert response.headers["x-content-type-options"] == "nosniff"
        for imported in re.findall(r'from "\./([a-z]+\.js)"', response.text):
            assert f"page/{imported}" in named, f"{imported} is loaded late"


async def test_nothing_inline_and_nothing_foreign(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]* src=)|<style|\son[a-z]+=|\sstyle=", page.text)
    for route in page_routes():
        text = (await http.get(route.path)).text.replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"(?m)(^|\s)//.*$", "", text).replace("://page", "")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


async def test_an_unchanged_file_costs_no_second_transfer(http: httpx.AsyncClient) -> None:
    first = await http.get("/page/app.js")
    tag = first.headers["etag"]
    again = await http.get("/page/app.js", headers={"if-none-match": f'"other", W/{tag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert (await http.get("/page/app.js", headers={"if-none-match": '"x"'})).status_code == 200


async def test_only_the_pages_own_files_are_served(http: httpx.AsyncClient) -> None:
    for path in ("/page/__init__.py", "/page/", "/page/..%2f..%2frouter.py", "/page/index.html"):
        assert (await http.get(path)).status_code == 404
