"""The events about layers that the page gets while a model is quantised."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def host(plugin: ModuleType) -> ModuleType:
    return sys.modules[f"{plugin.__name__}.nodes.host"]


@pytest.fixture
def sent(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list:
    """The events sent to the page; time passes only when a test sets `sent.clock`."""
    events = Events()
    server = SimpleNamespace(client_id="page", send_sync=lambda *event: events.append(event))
    monkeypatch.setattr(host.PromptServer, "instance", server, raising=False)
    monkeypatch.setattr(host.time, "monotonic", lambda: events.clock)
    events.server = server
    return events


class Events(list):
    clock = 100.0
    server: SimpleNamespace


def describe(name: str) -> dict | None:
    return {"format": "nf16_b64", "sqnr_db": 21.5} if name.startswith("layer") else None


def test_layers_are_sent_with_the_time_left_at_a_limited_rate(host: ModuleType, sent: Events) -> None:
    progress = host.LayerProgress("7", describe)
    for second, name in ((1.0, "layer.0"), (1.05, "layer.1"), (1.2, "norm"), (2.0, "layer.2")):
        sent.clock = 100.0 + second
        progress(int(second * 100), 400, name)
    wanted = {"node": "7", "total": 400, "format": "nf16_b64", "sqnr_db": 21.5}
    assert sent == [
        ("nfq.layer", {**wanted, "done": 100, "name": "layer.0", "seconds_left": 3.0}, "page"),
        ("nfq.layer", {**wanted, "done": 200, "name": "layer.2", "seconds_left": 2.0}, "page"),
    ]


def test_without_a_page_nothing_is_sent(host: ModuleType, sent: Events) -> None:
    sent.server.client_id = None
    sent.clock += 1
    host.LayerProgress("7", describe)(1, 2, "layer.0")
    assert sent == []


def test_an_interrupt_comes_through(host: ModuleType, sent: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise InterruptedError

    monkeypatch.setattr(host.comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(InterruptedError):
        host.LayerProgress("7", describe)(1, 2, "layer.0")
    assert sent == []


def test_ratios_that_json_cannot_hold(host: ModuleType) -> None:
    values = (None, float("inf"), float("nan"), 21.12345)
    assert [host.json_decibels(value) for value in values] == [None, None, None, 21.123]


def test_empty_tensors_first_leave_the_time_open(host: ModuleType, sent: Events) -> None:
    sent.clock += 1
    host.LayerProgress("7", describe)(0, 400, "layer.0")
    assert sent[0][1]["seconds_left"] is None


def test_a_total_of_nothing_is_a_full_bar(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    class Bar:
        def __init__(self, total: int) -> None:
            shown.append(total)

        def update_absolute(self, done: int, total: int) -> None:
            shown.append(done / total)

    monkeypatch.setattr(host.comfy.utils, "ProgressBar", Bar)
    host.NodeProgress()(0, 0, "empty")
    assert shown == [1, 1.0]
