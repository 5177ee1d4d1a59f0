"""What stops an emulation."""


class EmulationError(Exception):
    """The program does what a GPU would refuse or leave undefined."""


class Unsupported(EmulationError):
    """The program uses what the emulator does not model."""
