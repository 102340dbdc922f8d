"""The host: which model answers a request, now and after a swap."""

from __future__ import annotations

from dormouse.domain.errors import ModelNotFound
from dormouse.models.served import ServedModel


class ModelHost:
    """Owns what is served."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    @property
    def served(self) -> ServedModel:
        """The model that answers right now."""
        return self._served

    async def serve(self, name: str) -> ServedModel:
        """The model that answers a request for `name`.

        Raises ModelNotFound for a name that nothing here answers to, Unavailable while models are swapped.
        """
        if name != self._served.name:
            raise ModelNotFound(
                f"model '{name}' is not served here; this server has '{self._served.name}'", param="model"
            )
        return self._served
