"""A session's terms as JSON, for stores that keep text, and back.

This module knows nothing of where the text is kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

from specinfer.messages import Grammar, SpeculationOptions
from specinfer.sampling import SamplingParams, StopConditions
from specinfer_router.store.interface import SessionTerms


def terms_to_json(terms: SessionTerms) -> str:
    """The terms as text; equal terms give equal texts."""
    plain = {field.name: getattr(terms, field.name) for field in fields(terms)}
    # The bias is a read-only view, which asdict cannot copy.
    sampling = {field.name: getattr(terms.sampling, field.name) for field in fields(terms.sampling)}
    plain["sampling"] = sampling | {"logit_bias": dict(terms.sampling.logit_bias)}
    plain["stop"] = asdict(terms.stop)
    plain["speculation"] = asdict(terms.speculation)
    plain["grammar"] = None if terms.grammar is None else asdict(terms.grammar)
    return json.dumps(plain, sort_keys=True)


def terms_from_json(text: str | bytes) -> SessionTerms:
    """The terms of a text that `terms_to_json` made."""
    plain: dict[str, Any] = json.loads(text)
    sampling, stop = plain["sampling"], plain["stop"]
    sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    stop |= {"stop": tuple(stop["stop"]), "stop_token_ids": tuple(stop["stop_token_ids"])}
    speculation = SpeculationOptions(**plain["speculation"])
    return SessionTerms(
        **plain
        | {
            "sampling": SamplingParams(**sampling),
            "stop": StopConditions(**stop),
            "speculation": replace(speculation, widths=tuple(speculation.widths)),
            "grammar": None if plain["grammar"] is None else Grammar(**plain["grammar"]),
            "prediction": tuple(plain["prediction"]),
        }
    )
