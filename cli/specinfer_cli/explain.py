"""`specinfer explain`: where the time of one request went, round by round.

This module asks the router that ran the request; it knows nothing of how the answer is drawn.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from specinfer import Client
from specinfer_cli import arguments
from specinfer_cli.console import friendly, output, print_json
from specinfer_cli.timeline import WIDE_COLUMNS, picture, totals, words

DEFAULT_ROUNDS = 40

_RequestId = Annotated[
    str,
    typer.Argument(
        metavar="REQUEST_ID",
        help="Id of the request, as `generate --stats` and the chat's /stats print it.",
    ),
]
_Rounds = Annotated[
    int, typer.Option("--rounds", min=1, help="Most rounds to show; the last ones are taken.")
]


@friendly
def explain(
    request_id: _RequestId,
    router: arguments.Router = arguments.DEFAULT_ADDRESS,
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
    tls_certificate: arguments.TlsCertificate = None,
    tls_key: arguments.TlsKey = None,
    rounds: _Rounds = DEFAULT_ROUNDS,
    json: arguments.Json = False,
) -> None:
    """Tell where the time of a request went: waiting, drafting, verifying, the way, the store."""
    tls = arguments.connection([router], api_key, tls_ca, tls_certificate, tls_key)
    with Client(router, tls=tls, api_key=api_key) as client:
        report = client.explain(request_id)
    if json:
        found = totals(report)
        parts = {f"{part.name}_seconds": seconds for part, seconds in found.parts}
        told = dataclasses.asdict(report)
        for one in told["rounds"]:
            # A named tuple still, whose names would be lost.
            one["facts"] = one["facts"]._asdict()
        print_json(told | {"totals": parts})
        return
    console = output()
    for line in words(report):
        console.print(line, markup=False, soft_wrap=True)
    if report.rounds:
        # A file or a pipe is as wide as one likes.
        if not console.is_terminal:
            console.width = max(console.width, WIDE_COLUMNS)
        console.print()
        console.print(picture(report, rounds, wide=console.width >= WIDE_COLUMNS))
