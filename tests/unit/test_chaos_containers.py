"""What the harness tells the engine, with an engine that only writes it down."""

from __future__ import annotations

import json

import pytest

from specinfer_bench.chaos import containers
from specinfer_bench.chaos.containers import ContainerCluster, drop, drop_no_more, narrow


class Engine:
    """Answers as `docker` does for a project with two running containers of each service."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    async def run(self, *command: str) -> str:
        if command[0] == "nsenter":
            self.entered.append(" ".join(command))
        if command[:2] == ("docker", "ps"):
            (service,) = (one[len(LABEL) :] for one in command if one.startswith(LABEL))
            return f"{service}1 {service}2"
        if command[:2] == ("docker", "inspect"):
            return json.dumps([_facts(one) for one in command[2:]])
        return ""


LABEL = "label=com.docker.compose.service="


def _facts(container: str) -> dict[str, object]:
    return {
        "Id": container,
        "Config": {"Labels": {"com.docker.compose.container-number": container[-1]}},
        "State": {"Pid": f"pid-{container}", "Paused": False, "Running": True},
    }


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr(containers, "run", engine.run)

    async def at_once(self: ContainerCluster, **wanted: float) -> float:
        return 0.0

    monkeypatch.setattr(ContainerCluster, "until", at_once)
    return engine


async def test_what_is_dropped_is_passed_again_by_the_same_rule(engine: Engine) -> None:
    cluster = ContainerCluster("any")
    await drop("verify", share=0.2).run(cluster)
    await drop_no_more("verify", share=0.2).run(cluster)
    begun, ended = engine.entered
    assert "--target pid-verify1 --net iptables -A INPUT -p tcp --dport 50071" in begun
    assert "--probability 0.2 -j DROP" in begun
    assert ended == begun.replace(" -A ", " -D ")
    await cluster.heal()
    assert len(engine.entered) == 2


async def test_healing_takes_back_what_a_row_that_broke_off_left(engine: Engine) -> None:
    cluster = ContainerCluster("any")
    await drop("draft").run(cluster)
    await narrow("draft").run(cluster)
    await narrow("verify").run(cluster)
    await cluster.heal()
    took_back = sorted(engine.entered[3:])
    assert [line.split(" --net ")[1].split(" dev ")[0] for line in took_back] == [
        "iptables -D INPUT -p tcp --dport 50061 -j DROP",
        "sh -c tc qdisc del",
        "sh -c tc qdisc del",
    ]
    assert [line.split()[2] for line in took_back] == ["pid-draft1", "pid-draft1", "pid-verify1"]
