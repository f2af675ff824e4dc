"""The two errors of this package. It refuses to know models, schedulers and transports."""


class KernelInputError(ValueError):
    """A tensor or number given to an op has the wrong shape, stride, dtype, device or range."""


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run here, and why."""
