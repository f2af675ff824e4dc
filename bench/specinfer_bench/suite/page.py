"""Puts results into documents, between marks that say where.

    <!-- speed: begin -->
    <!-- speed: end -->

What stands between two marks is made from the files and from nothing else; all other text is its
authors'. This module knows nothing of how results are made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from specinfer.errors import InvalidRequest
from specinfer_bench.peers.table import peers_table
from specinfer_bench.suite.parts import KERNEL_PREFIX
from specinfer_bench.suite.pictures import OPEN, RATES, SPEED, SWEEP, expected_digest
from specinfer_bench.suite.results import Results
from specinfer_bench.suite.running import DONE
from specinfer_bench.suite.tables import (
    agreement_table,
    open_table,
    overlap_table,
    printed,
    rates_table,
    router_table,
    speed_table,
    sweep_table,
    table,
)

PICTURES = "images/performance"
NOTHING = "*Not measured yet: `make bench` fills this in.*"
BUSY_CORES = 0.3
_MARK = "<!-- {name}: {side} -->"


def filled(text: str, results: Results, pictures: str = PICTURES) -> str:
    """A document with every section that it has marks for, `pictures` being their folder.

    Raises:
        InvalidRequest: naming a section that does not exist, or has no end.
    """
    for name in re.findall(r"<!-- ([a-z-]+): begin -->", text):
        if name not in SECTIONS:
            raise InvalidRequest(f"there is no section {name} to fill", field="document")
        begin, end = (_MARK.format(name=name, side=side) for side in ("begin", "end"))
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise InvalidRequest(f"section {name} has no end", field="document")
        body = SECTIONS[name](results, pictures).strip()
        text = f"{before}{begin}\n{body}\n{end}{after}"
    return text


def _speed(results: Results, pictures: str) -> str:
    documents = results.named("speed-")
    body = speed_table(documents) if documents else ""
    return _whole(results, "speed-", body, _picture(results, pictures, SPEED, "Speed by target"))


def _sweep(results: Results, pictures: str) -> str:
    found = results.documents.get("load-sweep")
    body = sweep_table(found) if found else ""
    picture = _picture(results, pictures, SWEEP, "Speed by number of sessions")
    return _whole(results, "load-sweep", body, picture)


def _simulated(results: Results, pictures: str) -> str:
    found = results.documents.get("load-simulated")
    return _whole(results, "load-simulated", sweep_table(found) if found else "")


def _open(results: Results, pictures: str) -> str:
    documents = results.named("load-open")
    body = open_table(documents) if documents else ""
    picture = _picture(results, pictures, OPEN, "Shares of requests by first token and end")
    return _whole(results, "load-open", body, picture)


def _rates(results: Results, pictures: str) -> str:
    found = results.documents.get("load-rates")
    body = rates_table(found) if found else ""
    picture = _picture(results, pictures, RATES, "Goodput by arrival rate")
    return _whole(results, "load-rates", body, picture)


def _agreement(results: Results, pictures: str) -> str:
    documents = results.named("load-open")
    return agreement_table(documents) if documents else NOTHING


def _arms_of(prefix: str) -> Callable[[Results, str], str]:
    def section(results: Results, pictures: str) -> str:
        tables = [peers_table(each) for each in results.named(prefix).values()]
        return _whole(results, prefix, *tables)

    return section


def _router(results: Results, pictures: str) -> str:
    documents = list(results.named("router-").values())
    return _whole(results, "router-", router_table(documents) if documents else "")


def _overlap(results: Results, pictures: str) -> str:
    found = results.documents.get("overlap")
    return _whole(results, "overlap", overlap_table(found) if found else "")


def _kernels(results: Results, pictures: str) -> str:
    blocks = [
        f"**{results.parts[name].title.removeprefix('kernels: ')}**\n\n{printed(each)}"
        for name, each in results.named(KERNEL_PREFIX).items()
    ]
    return _whole(results, KERNEL_PREFIX, *blocks)


def _parts(results: Results, pictures: str) -> str:
    """What ran, on what machine, how busy it was, and what did not run and why."""
    if not results.parts:
        return NOTHING
    rows = [
        (
            name,
            f"`{part.command}`",
            f"{part.state}: {_cell(part.reason)}" if part.reason else part.state,
            f"{part.seconds:.0f}",
            f"{part.busy_cores:.1f}",
            part.commit,
        )
        for name, part in results.parts.items()
    ]
    head = ("part", "command", "how it went", "seconds", "cores busy before", "commit")
    return f"{_machine(results)}\n\n{table(head, rows)}"


def _machine(results: Results) -> str:
    setups = [each.get("setup", {}) for each in results.documents.values()]
    machines = [setup["machine"] for setup in setups if "machine" in setup]
    different = [facts for at, facts in enumerate(machines) if facts not in machines[:at]]
    names = "; ".join(
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items())
        for facts in different
    )
    return f"Machine: {names}. {_state(results)}"


def _state(results: Results) -> str:
    """What else the machine did."""
    busiest = max((part.busy_cores for part in results.parts.values()), default=0.0)
    if busiest <= BUSY_CORES:
        return (
            f"Other work kept at most {busiest:.1f} of the machine's cores busy just before each "
            "part."
        )
    return (
        f"**Other work kept up to {busiest:.1f} of the machine's cores busy meanwhile**: numbers "
        "are low and wander, and only what was run in turn can be compared at all."
    )


def _whole(results: Results, prefix: str, *blocks: str) -> str:
    """The blocks that there are, and what of it did not run."""
    missing = [
        f"*{part.title}: {part.state}, {_cell(part.reason)}.*"
        for name, part in results.parts.items()
        if name.startswith(prefix) and part.state != DONE
    ]
    found = [block for block in (*blocks, *missing) if block]
    return "\n\n".join(found) if found else NOTHING


def _picture(results: Results, folder: str, name: str, title: str) -> str:
    return f"![{title}]({folder}/{name})" if expected_digest(results, name) else ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _readme_speed(results: Results, pictures: str) -> str:
    documents = results.named("speed-")
    return f"{speed_table(documents)}\n\n{_state(results)}" if documents else NOTHING


def _readme_sweep(results: Results, pictures: str) -> str:
    return _picture(results, pictures, SWEEP, "Speed by number of sessions") or NOTHING


SECTIONS: Mapping[str, Callable[[Results, str], str]] = {
    "speed": _speed,
    "sweep": _sweep,
    "simulated": _simulated,
    "open": _open,
    "rates": _rates,
    "agreement": _agreement,
    "plain": _arms_of("plain-"),
    "peers": _arms_of("peers-"),
    "ablations": _arms_of("ablations"),
    "router": _router,
    "overlap": _overlap,
    "kernels": _kernels,
    "parts": _parts,
    "readme-speed": _readme_speed,
    "readme-sweep": _readme_sweep,
}
