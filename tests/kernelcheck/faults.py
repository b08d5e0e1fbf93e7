"""What the PTX executor says of a kernel that breaks a rule."""


class ExecutionError(RuntimeError):
    """The kernel cannot be run on, or must not be trusted."""


class OutOfBounds(ExecutionError):
    pass


class Misaligned(ExecutionError):
    pass


class Uninitialised(ExecutionError):
    """Shared memory is read that nobody has written."""


class Race(ExecutionError):
    """Two threads touch one place, one of them writes, and nothing orders them."""


class Divergence(ExecutionError):
    """Threads that must meet at a barrier or a shuffle do not."""


class Deadlock(ExecutionError):
    """Threads wait for ever."""


class Unsupported(ExecutionError):
    """PTX that the executor does not know."""
