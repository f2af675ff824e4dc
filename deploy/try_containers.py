"""Bring the compose cluster up, use it, break it, scale it, and write down what was seen.

    python deploy/try_containers.py [--build] [--keep] [--report FILE]

Needs docker and docker-compose on the PATH, and takes a free project name and free ports, so that
it stands beside a cluster that runs. Exit status 0 means that every check held. It knows the
compose file and the SDK, and nothing of how the processes work inside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from specinfer import AsyncClient, Client

ROOT = Path(__file__).resolve().parent.parent
TIERS = ("router", "draft", "verify")
NUM_STREAMS = 8
MAX_TOKENS = 192
NUM_TRIES = 20
JOIN_SECONDS = 2.0
PROMPTS = ("Write a function that reverses a list.", "What does textwrap.dedent do?", "def fib(n):")


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A compose project of this script's own."""

    project: str
    ports: dict[str, int]
    lines: list[str] = field(default_factory=list)
    failed: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """What compose is told beside what this process was."""
        ports = {name: str(port) for name, port in self.ports.items()}
        return {**os.environ, **ports, "COMPOSE_PROJECT_NAME": self.project}

    def run(self, *command: str, check: bool = True) -> str:
        """What a command says; its errors too when it need not succeed."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout + ("" if check else done.stderr)

    def compose(self, *arguments: str) -> str:
        """docker-compose in this project."""
        return self.run("docker-compose", *arguments)

    def containers(self, service: str) -> list[str]:
        """Ids of a service's running containers."""
        return self.compose("ps", "-q", service).split()

    def say(self, good: bool, what: str) -> None:
        """Write one finding down."""
        self.failed |= not good
        self.lines.append(f"- {'ok' if good else '**failed**'}: {what}")
        print(self.lines[-1], flush=True)

    def wait(self, what: str, is_so: Callable[[], bool], seconds: float = 300.0) -> float:
        """Poll until something is so; returns the seconds it took."""
        begin = time.monotonic()
        while not is_so():
            if time.monotonic() - begin > seconds:
                raise RuntimeError(f"not within {seconds:g} s: {what}")
            time.sleep(0.1)
        return time.monotonic() - begin

    def healthy(self, service: str, number: int = 1) -> bool:
        """Whether a service has so many containers and all report themselves healthy."""
        ids = self.containers(service)
        states = [self.inspect(one, "{{.State.Health.Status}}") for one in ids]
        return len(states) == number and set(states) == {"healthy"}

    def inspect(self, container: str, template: str) -> str:
        """One field of a container or an image."""
        return self.run("docker", "inspect", "--format", template, container).strip()

    def http(self, path: str, body: object = None, port: str = "SPECINFER_HTTP_PORT") -> Any:
        """An answer of a published HTTP port."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[port]}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    @property
    def address(self) -> str:
        """The published gRPC port."""
        return f"127.0.0.1:{self.ports['SPECINFER_GRPC_PORT']}"


def check_containers(cluster: Cluster) -> None:
    """Users, file systems, capabilities and sizes of our containers."""
    for tier in TIERS:
        (container, *_) = cluster.containers(tier)
        user = cluster.run("docker", "exec", container, "id", "-u").strip()
        cluster.say(user == "10001", f"{tier} runs as user {user}")
        said = cluster.run("docker", "exec", container, "touch", "/opt/specinfer/x", check=False)
        cluster.say("Read-only file system" in said, f"{tier}: {said.strip()}")
        said = cluster.run("docker", "exec", container, "sh", "-c", "touch /tmp/x && echo written")
        cluster.say("written" in said, f"{tier} may write to /tmp")
        dropped = cluster.inspect(container, "{{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}}")
        cluster.say(dropped == "[ALL] [no-new-privileges:true]", f"{tier} dropped {dropped}")
        size = int(cluster.inspect(cluster.inspect(container, "{{.Image}}"), "{{.Size}}"))
        base = int(cluster.inspect("python:3.11-slim", "{{.Size}}"))
        cluster.say(True, f"{tier} image: {size / 1e6:.0f} MB, {base / 1e6:.0f} MB of it the base")
    (router, *_) = cluster.containers("router")
    said = cluster.run("docker", "exec", router, "python", "-c", "import torch", check=False)
    cluster.say("ModuleNotFoundError" in said, "the router's image holds no torch")
    (verify, *_) = cluster.containers("verify")
    code = "import specinfer_kernels as k; print(*k.available_backends())"
    said = cluster.run("docker", "exec", verify, "python", "-c", code).strip()
    cluster.say("native" in said, f"kernels of the verify image: {said}")
    said = cluster.run("docker", "exec", verify, "sh", "-c", "command -v g++ pip || echo none")
    cluster.say(said.strip() in ("none", "/usr/bin/pip", "/usr/local/bin/pip"), "no compiler in it")


def check_chat(cluster: Cluster) -> None:
    """A chat through HTTP, one through the SDK, one through the command line."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": PROMPTS[0]}],
        "max_tokens": 32,
        "temperature": 0,
    }
    text = cluster.http("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    cluster.say(bool(text), f"POST /v1/chat/completions: {text[:60]!r}")
    with Client(cluster.address, timeout=60) as client:
        again = client.chat(PROMPTS[0], max_tokens=32, temperature=0)
        rounds = again.completion.speculation
        for _ in range(NUM_TRIES):  # a machine that was just started may be late with its trees
            if rounds.num_accepted_tokens:
                break
            time.sleep(1.0)
            rounds = client.chat(PROMPTS[0], max_tokens=32, temperature=0).completion.speculation
    cluster.say(again.text == text, "the SDK, over gRPC, says the same")
    cluster.say(
        rounds.num_accepted_tokens > 0,
        f"{rounds.num_accepted_tokens} of {rounds.num_draft_tokens} guesses accepted in "
        f"{rounds.num_rounds} rounds",
    )
    command = [
        str(Path(sys.executable).parent / "specinfer"),
        "generate",
        "--router",
        cluster.address,
    ]
    said = cluster.run(*command, "--max-tokens", "8", "def fib(n):")
    cluster.say(bool(said.strip()), f"specinfer generate: {said!r:.80}")


def check_prometheus(cluster: Cluster) -> None:
    """Every process is scraped, and what it shows can be asked for."""
    cluster.compose("--profile", "observability", "up", "--detach", "--no-deps", "prometheus")
    cluster.wait("prometheus healthy", lambda: cluster.healthy("prometheus"))

    def all_up() -> bool:
        jobs = [row["metric"]["job"] for row in ask(cluster, "up == 1")]
        return set(TIERS) <= set(jobs) and jobs.count("draft") == 3 and jobs.count("verify") == 2

    taken = cluster.wait("every target up", all_up, 60.0)
    targets = sorted(
        f"{row['metric']['job']} {row['metric']['instance']}" for row in ask(cluster, "up == 1")
    )
    cluster.say(True, f"Prometheus scrapes after {taken:.1f} s: {', '.join(targets)}")
    for name in ("specinfer_generation_tokens_total", "specinfer_kv_blocks"):
        cluster.say(len(ask(cluster, name)) > 0, f"`{name}` has {len(ask(cluster, name))} series")


def ask(cluster: Cluster, query: str) -> list[Any]:
    """What Prometheus answers to an instant query."""
    path = "/api/v1/query?" + urllib.parse.urlencode({"query": query})
    found: list[Any] = cluster.http(path, port="PROMETHEUS_PORT")["data"]["result"]
    return found


def check_use(cluster: Cluster) -> None:
    """Every drafter that was scaled up has been asked for trees, the killed one before its end."""
    query = 'max_over_time(specinfer_proposed_tokens_total{job="draft"}[15m]) > 0'
    cluster.wait("three drafters used", lambda: len(ask(cluster, query)) == 3, 60.0)
    used = sorted(
        f"{row['metric']['instance']} {float(row['value'][1]):.0f}" for row in ask(cluster, query)
    )
    cluster.say(True, f"tokens guessed by each drafter, as last scraped: {', '.join(used)}")


def check_scale(cluster: Cluster) -> None:
    """Two more drafters: how long from being ready to being asked by the router."""
    before = set(cluster.containers("draft"))
    cluster.compose("up", "--detach", "--no-recreate", "--scale", "draft=3", "--scale", "verify=2")
    cluster.wait("three drafters", lambda: cluster.healthy("draft", 3))
    cluster.wait("two verifiers", lambda: cluster.healthy("verify", 2))
    (router,) = cluster.containers("router")
    for container in set(cluster.containers("draft")) - before:
        address = cluster.inspect(
            container, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        )
        ready = moment(cluster, container, "ready on port")
        joined = moment(cluster, router, f"{address}:50061 connected")
        cluster.say(
            joined - ready < JOIN_SECONDS,
            f"drafter {address}: ready to joined {joined - ready:.2f} s",
        )


def moment(cluster: Cluster, container: str, text: str) -> float:
    """When a container first logged a line with `text`, by the engine's clock."""
    for line in cluster.run("docker", "logs", "--timestamps", container, check=False).splitlines():
        if text in line:
            stamp = line.split(" ", 1)[0]
            return datetime.fromisoformat(stamp[:26] + "+00:00").timestamp()
    raise RuntimeError(f"{container} never said {text!r}")


async def check_faults(cluster: Cluster) -> None:
    """A drafter and a verifier are killed under load; nobody may notice but in time."""
    async with AsyncClient(cluster.address, timeout=240) as client:

        async def one(number: int) -> tuple[int, ...]:
            prompt = PROMPTS[number % len(PROMPTS)]
            done = await client.generate(
                prompt, max_tokens=MAX_TOKENS, seed=number, temperature=0.8, ignore_eos=True
            )
            return tuple(done.token_ids)

        async def all_streams() -> list[tuple[int, ...] | BaseException]:
            return await asyncio.gather(
                *(one(number) for number in range(NUM_STREAMS)), return_exceptions=True
            )

        begin = time.monotonic()
        unbroken = await all_streams()
        quiet = time.monotonic() - begin
        for tier in ("draft", "verify"):
            victim = cluster.containers(tier)[0]
            begin = time.monotonic()
            load = asyncio.create_task(all_streams())
            await asyncio.sleep(quiet / 3)
            await asyncio.to_thread(cluster.run, "docker", "kill", "--signal", "KILL", victim)
            running = not load.done()
            broken = await load
            taken = time.monotonic() - begin
            failures = [error for error in broken if isinstance(error, BaseException)]
            different = sum(a != b for a, b in zip(unbroken, broken, strict=True))
            cluster.say(
                running and not failures and not different,
                f"a {tier} worker killed under {NUM_STREAMS} streams of {MAX_TOKENS} tokens: "
                f"{len(failures)} failed, {different} different; {taken:.1f} s, "
                f"{quiet:.1f} s unbroken {failures[:1] or ''}",
            )


async def try_all(cluster: Cluster, *, build: bool) -> None:
    """Everything in order; what cannot go on raises RuntimeError."""
    cluster.run(str(ROOT / "deploy/secrets.sh"))
    if build:
        cluster.compose("build", "draft", "verify", "router")
    begin = time.monotonic()
    cluster.compose("up", "--detach")
    cluster.wait("healthy", lambda: all(cluster.healthy(name) for name in ("redis", *TIERS)))
    cluster.say(True, f"all healthy {time.monotonic() - begin:.1f} s after `up`")
    check_containers(cluster)
    await asyncio.to_thread(check_chat, cluster)
    check_scale(cluster)
    await asyncio.to_thread(check_prometheus, cluster)
    await check_faults(cluster)
    await asyncio.to_thread(check_use, cluster)


def main() -> int:
    """Exit status of the try."""
    parser = argparse.ArgumentParser(description="Try the compose cluster out.")
    parser.add_argument("--build", action="store_true", help="build the images first")
    parser.add_argument("--keep", action="store_true", help="leave the cluster up")
    parser.add_argument("--report", type=Path, help="write the findings to this file too")
    given = parser.parse_args()
    names = ("SPECINFER_GRPC_PORT", "SPECINFER_HTTP_PORT", "PROMETHEUS_PORT")
    cluster = Cluster(f"specinfertry{os.getpid()}", {name: free_port() for name in names})
    try:
        asyncio.run(try_all(cluster, build=given.build))
    except RuntimeError as error:
        cluster.say(False, str(error))
        print(cluster.run("docker-compose", "logs", "--tail", "20", "--no-color", check=False))
    finally:
        if not given.keep:
            cluster.compose("--profile", "observability", "down", "--volumes", "--timeout", "5")
    if given.report:
        given.report.write_text("\n".join(cluster.lines) + "\n", encoding="utf-8")
    return 1 if cluster.failed else 0


if __name__ == "__main__":
    sys.exit(main())
