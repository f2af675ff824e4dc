"""Builds, trains and grows the demo pair: a target and a drafter that read Python's own docs.

This package refuses to know the services: it writes ordinary Hugging Face folders and the
engine reads them like any other checkpoint.
"""

__all__: list[str] = []
