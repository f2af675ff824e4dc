"""Real certificates for 127.0.0.1, made with the openssl command and valid for a day."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Identity:
    """A certificate and its private key, PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Certificates:
    """What a test of TLS needs.

    Attributes:
        ca: who signed `server` and `client`.
        server: for 127.0.0.1 and localhost.
        client: for a caller that `ca` vouches for.
        stranger: signed by itself.
    """

    ca: Path
    server: Identity
    client: Identity
    stranger: Identity


def make_certificates(folder: Path) -> Certificates:
    """A new authority and what it signs; skips where there is no openssl, and fails in CI."""
    if shutil.which("openssl") is None:
        if os.environ.get("CI"):
            pytest.fail("openssl is not installed, and CI must have it")
        pytest.skip("openssl is not installed")
    authority = _make(folder, "ca", None, "basicConstraints=critical,CA:TRUE")
    leaf = "basicConstraints=critical,CA:FALSE"
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    return Certificates(
        ca=authority.certificate,
        server=_make(folder, "server", authority, leaf, names),
        client=_make(folder, "client", authority, leaf),
        stranger=_make(folder, "stranger", None, leaf),
    )


def _make(folder: Path, name: str, signer: Identity | None, *extensions: str) -> Identity:
    made = Identity(folder / f"{name}.pem", folder / f"{name}.key")
    command = ["openssl", "req", "-x509", *_NEW_KEY, "-days", "1", "-subj", f"/CN={name}"]
    command += ["-config", str(_empty_configuration(folder))]
    for extension in extensions:
        command += ["-addext", extension]
    if signer is not None:
        command += ["-CA", str(signer.certificate), "-CAkey", str(signer.key)]
    command += ["-out", str(made.certificate), "-keyout", str(made.key)]
    subprocess.run(command, check=True, capture_output=True)
    return made


def _empty_configuration(folder: Path) -> Path:
    """The machine's own configuration would add extensions twice on some machines."""
    path = folder / "openssl.cnf"
    path.write_text("[req]\ndistinguished_name = names\n[names]\n")
    return path
