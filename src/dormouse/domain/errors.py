"""The one error tree. The API maps it to HTTP by class; the CLI prints the message.

DormouseError
├── RequestError                 the sender's mistake; nothing else is affected
│   ├── InvalidRequest           malformed, out of range, or names an unsupported field
│   │   └── ContextLengthExceeded
│   ├── RequestTooLarge          the body is over the limit
│   ├── ModelNotFound
│   └── AgentNotFound
├── Unavailable                  the request was fine; try again later
│   ├── QueueFull
│   ├── ShuttingDown
│   └── DeadlineExceeded
├── ModelError                   a model cannot be loaded or imported
│   ├── UnsupportedModel
│   └── ModelFilesMissing
├── StoreError                   the data folder cannot be used as it is
│   ├── StoreLocked
│   ├── StoreTooNew
│   ├── DamagedBlock
│   ├── DamagedCatalog
│   └── BlockMissing
├── ModelOutputInvalid           the model computed NaN for this request; the others go on
├── ConstraintBroken             a reply's grammar gave up; the others go on
├── CannotListen                 the address to serve on is not to be had
└── EngineDead                   the engine loop ended by an error of ours

Every message says what happened and what to do next.
"""

from __future__ import annotations


class DormouseError(Exception):
    """Base of every error that Dormouse raises on purpose."""


class RequestError(DormouseError):
    """The sender's mistake. `param` names the offending field where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A request that is malformed, out of range, or asks for what is not supported."""


class ContextLengthExceeded(InvalidRequest):
    """A prompt that can never fit; carries both numbers."""

    def __init__(self, num_tokens: int, limit: int, why: str) -> None:
        super().__init__(
            f"prompt is too long: {num_tokens} tokens > {limit} maximum ({why}); "
            "send a shorter prompt or start the server with more room",
            param="messages",
        )
        self.num_tokens = num_tokens
        self.limit = limit


class RequestTooLarge(RequestError):
    """The body is larger than the server reads."""


class ModelNotFound(RequestError):
    """The request names a model that this server does not serve."""


class AgentNotFound(RequestError):
    """No agent of that name belongs to the caller."""


class Unavailable(DormouseError):
    """The request was fine, the moment was not. `retry_after_s` is in whole seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable):
    """The bounded queue of waiting requests is full."""


class ShuttingDown(Unavailable):
    """The server stops; what was generated so far is saved."""


class DeadlineExceeded(Unavailable):
    """The request did not finish within its deadline."""


class ModelError(DormouseError):
    """A model cannot be loaded or imported."""


class UnsupportedModel(ModelError):
    """The model needs something this runtime does not have; the message names it."""


class ModelFilesMissing(ModelError):
    """A model folder lacks files; the message lists them."""


class ModelOutputInvalid(DormouseError):
    """The model computed NaN or infinity for one request; the others go on."""

    def __init__(self) -> None:
        super().__init__(
            "the model computed NaN for this request; try --dtype fp32, and check or download the "
            "model's weights again if it stays"
        )


class ConstraintBroken(DormouseError):
    """The grammar of one reply allows no token any more, or gave up; the others go on."""

    def __init__(self) -> None:
        super().__init__(
            "the reply cannot be kept to its format: the grammar became too complex or allows nothing more; "
            "simplify the schema, or ask without it"
        )


class StoreError(DormouseError):
    """The data folder cannot be used as it is."""


class StoreLocked(StoreError):
    """Another process owns the data folder."""


class StoreTooNew(StoreError):
    """The data folder was written by a newer version; it is left untouched."""


class DamagedBlock(StoreError):
    """A block file failed its checksum, its key or its shape. Costs time, never text."""


class DamagedCatalog(StoreError):
    """The catalog cannot be read; it is set aside and rebuilt from the block files."""


class BlockMissing(StoreError):
    """The store does not hold this block's KV (any more): a plain miss."""


class CannotListen(DormouseError):
    """The address is in use, not ours, or not allowed; choose another host or port."""


class EngineDead(DormouseError):
    """The engine loop ended by an unexpected error; restart the server."""
