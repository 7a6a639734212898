"""The errors that a user sees."""


class LLMDropError(Exception):
    """A mistake or a limit that the user can act on. The message says what was expected, what was found, what to do."""


class NotAvailable(LLMDropError):
    """Something this machine cannot get (no hub, a gated model). A run over many models reports it as *not run*."""


class DiskFull(LLMDropError):
    """Nothing more can be written: a run stops, whatever else it could still do."""
