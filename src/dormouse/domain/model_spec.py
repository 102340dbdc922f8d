"""What the engine and the store need to know of a model; nothing about how it computes."""

from __future__ import annotations

from dataclasses import dataclass

from dormouse.domain.blocks import Namespace, namespace_of
from dormouse.domain.cache_spec import CacheSpec, KVFormat


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A loaded model, as numbers.

    `fingerprint` is a hex digest of the weights' bytes, the effective config and the tokenizer: two
    fine-tunes of one shape differ in it, two copies of one model in different folders do not.
    `context_length` is in tokens.
    """

    name: str
    architecture: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    vocab_size: int
    context_length: int

    def cache_spec(self, format: KVFormat, block_size: int) -> CacheSpec:
        """The cache of this model in `format`. Raises as `CacheSpec.for_heads` does."""
        return CacheSpec.for_heads(
            format,
            block_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            k_head_dim=self.k_head_dim,
            v_head_dim=self.v_head_dim,
        )


def cache_namespace(model: ModelSpec, cache: CacheSpec, tenant: str) -> Namespace:
    """Under which block keys are valid: nothing of another model, format or tenant can match."""
    return namespace_of(model.fingerprint, cache.fingerprint(), tenant)
