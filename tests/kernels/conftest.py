"""One thread for the kernel tests: threads that wait by spinning are slow on a busy machine."""

from tests.kit.threads import one_thread as one_thread
