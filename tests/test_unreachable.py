"""Servers that are there and servers that are not, on loopback."""

from __future__ import annotations

import socket

import pytest

from graft.config import Judge, JudgeModel
from graft.unreachable import unreachable_judges


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


@pytest.fixture
def closed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1"  # nobody listens there any more


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_servers_that_take_connections_are_not_mentioned(listening):
    assert unreachable_judges(Judge(base_url=listening), ["a", "b"]) == []
    assert unreachable_judges(Judge(base_url="http://nowhere.invalid"), []) == []


def test_each_server_that_does_not_is_named_once_with_its_models(listening, closed):
    settings = Judge(base_url=listening, models={name: JudgeModel(base_url=closed) for name in ("b", "c")})
    [line] = unreachable_judges(settings, ["a", "b", "c", "b"])
    assert line.startswith(f"the judge b and c at {closed} takes no connection now (")
    assert "refused" in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/v1", "http://nowhere.invalid/v1", "no url"])
def test_addresses_that_are_none(url):
    assert len(unreachable_judges(Judge(base_url=url), ["a"])) == 1


def test_behind_a_proxy_nothing_is_tried(closed, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert unreachable_judges(Judge(base_url=closed), ["a"]) == []
