"""The C++ library behind the `native` backend. First version: none is built."""


def native_failure() -> str | None:
    """Why the native library cannot be used, or None when it can."""
    return "the native library is not built"
