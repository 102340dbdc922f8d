"""Contexts other than a model was trained for: shorter ones, or longer ones by scaling its rope."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dormouse.domain.errors import ModelError
from dormouse.runtimes.decoder_config import DecoderConfig, LayerConfig
from dormouse.runtimes.rope import Rope

Scaling = Literal["none", "linear", "yarn"]


@dataclass(frozen=True, slots=True)
class Context:
    """What a server is asked for. `length` in tokens, None is as trained, times `factor` where it is given.

    `factor` None is as much as `length` needs.
    """

    length: int | None = None
    scaling: Scaling = "none"
    factor: float | None = None

    def fit(self, config: DecoderConfig) -> tuple[DecoderConfig, int]:
        """The config with its rope scaled, and the length of the context in tokens.

        A shorter context changes nothing of what is computed, so the config stays as it is: what was stored
        at another length still matches. Raises ModelError when the length cannot be had.
        """
        trained = config.context_length
        if self.scaling == "none":
            return config, self._unscaled(trained)
        if self.length is None and self.factor is None:
            raise ModelError(
                f"--rope-scaling {self.scaling} needs --context-length: how far beyond the trained "
                f"{trained} tokens shall it reach?"
            )
        length = self.length or int(trained * (self.factor or 1.0))
        factor = self.factor or max(1.0, length / trained)
        if self.factor is not None and length > int(trained * factor):
            raise ModelError(
                f"--rope-factor {factor:g} reaches {int(trained * factor)} tokens, not {length}; "
                f"leave it out, or give at least {length / trained:g}"
            )
        if factor == 1:
            return config, length
        return replace(
            config, layers=tuple(self._scaled(layer, trained, factor) for layer in config.layers)
        ), length

    def _unscaled(self, trained: int) -> int:
        if self.factor is not None:
            raise ModelError("--rope-factor is of use only with --rope-scaling linear or yarn")
        if self.length is not None and self.length > trained:
            raise ModelError(
                f"--context-length {self.length} is beyond the {trained} tokens that the model was trained "
                "for; add --rope-scaling yarn (words become somewhat worse), or give a shorter length"
            )
        return self.length or trained

    def _scaled(self, layer: LayerConfig, trained: int, factor: float) -> LayerConfig:
        """The layer with its rope scaled, unless it has none or never looks back that far."""
        if layer.rope is None or (layer.window is not None and layer.window <= trained):
            return layer
        if layer.rope.type != "default":
            raise ModelError(
                f"the model's own rope is scaled already, to {trained} tokens ({layer.rope.type}, factor "
                f"{layer.rope.factor:g}); --rope-scaling cannot be laid over it"
            )
        theta = layer.rope.theta
        rope = Rope.linear(theta, factor) if self.scaling == "linear" else Rope.yarn(theta, factor, trained)
        return replace(layer, rope=rope)


AS_TRAINED = Context()
