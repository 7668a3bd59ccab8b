"""What goes wrong inside a core. Silicon returns wrong numbers or hangs; the emulated core says which instruction."""


class CoreError(RuntimeError):
    """A kernel that this core cannot run, or that a real one would run to a wrong result."""


class BufferOverflow(CoreError):
    """More bytes asked of a buffer than it has left."""


class Misaligned(CoreError):
    """An address or a size that is no multiple of what the buffer demands: 32 B in UB, a fractal in L1 and L0."""


class IllegalPath(CoreError):
    """A transfer between two buffers that no wire joins on this chip, or an instruction that this core does not have."""


class WrongOperand(CoreError):
    """Shapes, dtypes or layouts that do not fit the instruction."""


class DataRace(CoreError):
    """Two pipes use the same bytes, one of them writes, and no flag says who comes first."""


class ReadBeforeWrite(DataRace):
    """A local buffer is read where nothing has been written."""


class FlagError(CoreError):
    """A flag set more often than it can count, or left set when the kernel ends."""


class Deadlock(CoreError):
    """Every pipe that still has instructions waits for a flag; the message shows the chain."""
