"""Options that several commands share, spelled once, with help that is true everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from specinfer.client import DEFAULT_ADDRESS
from specinfer.credentials import is_loopback
from specinfer.errors import InvalidRequest
from specinfer.messages import SpeculationOptions
from specinfer.rpc import TlsSettings

DTYPES = ("float32", "bfloat16", "float64")
KV_DTYPES = ("auto", "fp8")


def check_dtype(value: str) -> str:
    """The number format itself; raises typer.BadParameter when there is no such format."""
    if value not in DTYPES:
        raise typer.BadParameter(f"one of {', '.join(DTYPES)}")
    return value


def check_kv_dtype(value: str) -> str:
    """The number format of keys and values itself; raises typer.BadParameter for any other."""
    if value not in KV_DTYPES:
        raise typer.BadParameter(f"one of {', '.join(KV_DTYPES)}")
    return value


Router = Annotated[
    str,
    typer.Option(
        "--router", metavar="ADDR", envvar="SPECINFER_ROUTER", help="Address of the router."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="SPECINFER_API_KEY",
        help="Sent with each call; better given by the variable, which others cannot list.",
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        metavar="FILE",
        envvar="SPECINFER_TLS_CA",
        help="Speak TLS, and trust the authorities in this PEM file.",
    ),
]
TlsCertificate = Annotated[
    Path | None,
    typer.Option(
        "--tls-certificate",
        metavar="FILE",
        envvar="SPECINFER_TLS_CERTIFICATE",
        help="Our certificate, PEM, for a router that asks for one; with --tls-key.",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        "--tls-key",
        metavar="FILE",
        envvar="SPECINFER_TLS_KEY",
        help="Private key of --tls-certificate, PEM.",
    ),
]
AnyRouter = Annotated[
    str | None,
    typer.Option(
        "--router",
        metavar="ADDR",
        help="Address of a running router; without it a local cluster is started for the run.",
    ),
]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model", metavar="FOLDER", help="Target model's folder; default: the demo pair's."
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="FOLDER",
        help="Drafter's folder, or 'none'; default: the demo pair's, none beside another --model.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", callback=check_dtype, help=f"Number format of the weights: {', '.join(DTYPES)}."
    ),
]
KvDtype = Annotated[
    str,
    typer.Option(
        "--kv-dtype",
        callback=check_kv_dtype,
        help="Keys and values: auto (as --dtype), or fp8, which makes another model.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON document to stdout.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Most tokens to generate; default: the model's length."),
]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0 takes the most probable token each time.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most probable tokens; 0 keeps all.")]
TopP = Annotated[
    float, typer.Option("--top-p", help="Keep the smallest set of tokens with this mass.")
]
MinP = Annotated[
    float,
    typer.Option("--min-p", help="Drop tokens less probable than this share of the best one."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Decides all noise; default: the router chooses.")
]
NoSpeculation = Annotated[
    bool,
    typer.Option("--no-speculation", metavar="", help="Decode plainly; changes no token."),
]
MaxNodes = Annotated[
    int | None, typer.Option("--max-nodes", help="Most guessed tokens a round.", min=0)
]
MaxDepth = Annotated[int | None, typer.Option("--max-depth", help="Deepest guess.", min=0)]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds for the whole call.")]

__all__ = ["DEFAULT_ADDRESS", "DTYPES"]


def tls_settings(
    ca: Path | None, certificate: Path | None = None, key: Path | None = None
) -> TlsSettings | None:
    """TLS that trusts these authorities and shows this certificate, or None for plain text.

    Raises:
        InvalidRequest: a certificate without its key, or a key without its certificate.
    """
    if (certificate is None) != (key is None):
        raise InvalidRequest("--tls-certificate and --tls-key are given together", field="tls")
    return None if ca is None and certificate is None else TlsSettings(ca, certificate, key)


def check_key(addresses: Sequence[str], api_key: str | None, tls: TlsSettings | None) -> None:
    """Raise InvalidRequest when a key would leave this machine in plain text."""
    far = [address for address in addresses if not is_loopback(address)]
    if api_key is not None and tls is None and far:
        raise InvalidRequest(
            f"the key would travel to {far[0]} in plain text, where anybody on the way can read "
            "it; give --tls-ca FILE, or reach the router through a tunnel to 127.0.0.1",
            field="api_key",
        )


def connection(
    addresses: Sequence[str],
    api_key: str | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
) -> TlsSettings | None:
    """TLS of a command's flags; raises InvalidRequest, in words of the flags."""
    tls = tls_settings(ca, certificate, key)
    check_key(addresses, api_key, tls)
    return tls


def speculation_options(
    no_speculation: bool, max_nodes: int | None, max_depth: int | None
) -> SpeculationOptions:
    """How to speculate, from the flags of a command."""
    return SpeculationOptions(enabled=not no_speculation, max_nodes=max_nodes, max_depth=max_depth)
