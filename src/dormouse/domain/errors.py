"""The one error tree. The API maps it to HTTP by class; the CLI prints the message.

DormouseError
├── RequestError                 the sender's mistake; nothing else is affected
│   ├── InvalidRequest           malformed, out of range, or names an unsupported field
│   │   └── ContextLengthExceeded
│   ├── RequestTooLarge          the body is over the limit
│   ├── ModelNotFound
│   ├── AgentNotFound
│   ├── ResponseNotFound
│   ├── AgentExists
│   ├── AgentBusy
│   ├── CheckpointNotFound
│   ├── ArchiveInvalid           an agent's file is damaged, cut, or none at all
│   ├── ArchiveMismatch          it is of another model, format or block size
│   ├── UploadStalled            the sender of a body or a file stopped sending
│   ├── DocumentsFull            a bound on what is kept for good
│   ├── SwapRefused              the new model cannot be served here; nothing was touched
│   ├── SwapInProgress           models are swapped one after the other
│   ├── KeyNotFound
│   ├── Unauthorized             no valid API key
│   ├── AddressRefused           a foreign name or web page, and a server without keys
│   └── Forbidden                a valid key, which may not do this
├── Unavailable                  the request was fine; try again later
│   ├── QueueFull
│   ├── RateLimited              more than the key or the agent may ask
│   ├── ShuttingDown
│   ├── ModelSwapped             another model is served now; what was generated is saved
│   ├── EngineStalled            a step does not end
│   ├── PromptStalled            a prompt or a grammar is not made in time
│   └── DeadlineExceeded
├── ModelError                   a model cannot be loaded or imported
│   ├── UnsupportedModel
│   └── ModelFilesMissing
├── StoreError                   the data folder cannot be used as it is
│   ├── StoreLocked
│   ├── StoreTooNew
│   ├── EncryptionMismatch       encrypted without its key given, or the other way round
│   ├── SealBroken               an encrypted value was changed or moved
│   │   ├── KeyDestroyed         its tenant was deleted
│   │   └── KeyUnknown
│   ├── DamagedBlock
│   │   └── SealedBlock          an encrypted block where none is
│   ├── DamagedCatalog
│   └── BlockMissing
├── SwapFailed                   the new model could not be loaded; the old one is back if it could be
├── ModelOutputInvalid           the model computed NaN for this request; the others go on
├── StepFailed                   the runtime raised for this request, alone, too; the others go on
├── ConstraintBroken             a reply's grammar gave up; the others go on
├── CannotListen                 the address to serve on is not to be had
├── BadSettings                  flags, environment or file say what cannot be
└── EngineDead                   the engine loop ended by an error of ours

Every message says what happened and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable


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


class AgentExists(RequestError):
    """The name is taken."""


class AgentBusy(RequestError):
    """The agent is replying; what was asked for would be undone by the end of the reply."""


class CheckpointNotFound(RequestError):
    """The agent has no checkpoint of that name."""


class ArchiveInvalid(RequestError):
    """What was sent as an agent's file is damaged, cut, or something else; nothing was imported."""


class ArchiveMismatch(RequestError):
    """An agent's file is of another model, KV format or block size; the message names both sides."""


class UploadStalled(RequestError):
    """Nothing more came of a body or a file for too long; nothing was done with it."""


class DocumentsFull(RequestError):
    """No more documents of this kind are kept for the tenant, or this one alone is too large."""


class ResponseNotFound(RequestError):
    """No stored response of that id belongs to the caller."""


class SwapRefused(RequestError):
    """The new model cannot be served here: unsupported, damaged or too large. Nothing was touched."""


class SwapInProgress(RequestError):
    """Models are swapped one after the other; ask again when this swap has ended."""


class KeyNotFound(RequestError):
    """No API key of that id."""


class Unauthorized(RequestError):
    """No API key came with the request, or one that is not (any more) valid."""


class Forbidden(RequestError):
    """The key is valid, but what it asks for needs an admin key."""


class AddressRefused(RequestError):
    """A server without keys was called by a name that is not its own, or from another site's web page."""


class Unavailable(DormouseError):
    """The request was fine, the moment was not. `retry_after_s` is in whole seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable):
    """The bounded queue of waiting requests is full."""


class RateLimited(Unavailable):
    """The key or the agent asks more often than it may."""


class ShuttingDown(Unavailable):
    """The server stops; what was generated so far is saved."""


class ModelSwapped(Unavailable):
    """The model of the request is being replaced; what was generated so far is saved."""


class DeadlineExceeded(Unavailable):
    """The request did not finish within its deadline."""


class EngineStalled(Unavailable):
    """The engine has been at one step for longer than the request may take."""


class PromptStalled(Unavailable):
    """What is needed before a request can be submitted was not made in time: `seconds` had passed."""

    def __init__(self, what: str, seconds: float, *, has_begun: bool) -> None:
        super().__init__(
            f"{what} was still being made after {seconds:g} s; send less, or simplify it"
            if has_begun
            else f"{what} had to wait for others for {seconds:g} s; retry later",
            retry_after_s=5,
        )
        self.has_begun = has_begun


class ModelError(DormouseError):
    """A model cannot be loaded or imported."""


class UnsupportedModel(ModelError):
    """The model needs something this runtime does not have; the message names it."""


class ModelFilesMissing(ModelError):
    """A model folder lacks files; the message lists them."""


class SwapFailed(DormouseError):
    """The new model could not be loaded; the message says why, and what is served now."""


class ModelOutputInvalid(DormouseError):
    """The model computed NaN or infinity for one request; the others go on."""

    def __init__(self) -> None:
        super().__init__(
            "the model computed NaN for this request; try --dtype fp32, and check or download the "
            "model's weights again if it stays"
        )


class StepFailed(DormouseError):
    """The runtime raised when it computed a request, and again when it computed that one alone."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"the model could not be computed for this request ({error!r}); ask again, with a shorter prompt "
            "if memory is short; the server's log has more"
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


class EncryptionMismatch(StoreError):
    """The data folder is encrypted and its key is not given or another one, or it is not and should be; it is
    left untouched."""


class SealBroken(StoreError):
    """An encrypted value does not open: it was changed, or belongs elsewhere."""


class KeyDestroyed(SealBroken):
    """An encrypted value does not open any more: its tenant was deleted."""


class KeyUnknown(SealBroken):
    """An encrypted value names a key that its store never had, as far as is known."""


class DamagedBlock(StoreError):
    """A block file failed its checksum, its key or its shape. Costs time, never text."""


class SealedBlock(DamagedBlock):
    """A block file is encrypted, and the store that it was found in is not."""


class DamagedCatalog(StoreError):
    """The catalog cannot be read; it is set aside and rebuilt from the block files."""


class BlockMissing(StoreError):
    """The store does not hold this block's KV (any more): a plain miss."""


class CannotListen(DormouseError):
    """The address is in use, not ours, or not allowed; choose another host or port."""


class BadSettings(DormouseError):
    """Settings that are unknown or out of range. `problems` has a line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class EngineDead(DormouseError):
    """The engine loop ended by an unexpected error; restart the server."""
