"""How a host finds, loads and unloads models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dormouse.models.chat import ChatModel
from dormouse.models.folder import ModelFolder
from dormouse.models.progress import Progress
from dormouse.models.served import ServedModel


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that was found and that the runtime supports, before its weights are loaded.

    `needed_nbytes` is the estimate of the memory that serving it takes.
    """

    folder: ModelFolder
    chat: ChatModel
    needed_nbytes: int


class Loader(Protocol):
    """Called from worker threads, except `knows`. All models share one store, which stays open."""

    def knows(self, name: str) -> bool:
        """Whether a model of that name is on this machine. Cheap."""

    def models(self) -> list[ModelFolder]:
        """The models on this machine, by name."""

    def find(self, reference: str, on_progress: Progress) -> Candidate:
        """The model that `reference` means, checked as far as that goes without loading weights.

        Raises ModelNotFound, or ModelError when it cannot be served.
        """

    def free_nbytes(self) -> int:
        """Memory that a model may take now."""

    def held_nbytes(self, served: ServedModel) -> int:
        """Memory that unloading gives back, at least."""

    def load(self, candidate: Candidate) -> ServedModel:
        """Load the weights and start an engine. Raises whatever loading raises."""

    def unload(self, served: ServedModel) -> None:
        """Save what its agents have, free weights and arena. Its engine has been stopped. Idempotent."""
