"""Kernels over pages of quantized KV. Thin: use `dormouse.runtimes.torch.native`.

Arrays are CPU tensors or their DLPack capsules: wrong dtypes raise TypeError, wrong shapes ValueError.
"""

Array = object

class Layer:
    """Where the K and V of one layer lie in a page."""

    @staticmethod
    def make(
        k: tuple[int, int, int, int, int],
        v: tuple[int, int, int, int, int],
        kv_heads: int,
        block_size: int,
        group_size: int,
        block_nbytes: int,
    ) -> Layer:
        """Each half is (bits, head size, offset of data, of scales, of biases)."""

def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """Those that this machine runs, best first."""

def set_isa(name: str) -> None:
    """Use another one, for tests and benchmarks."""

def write_kv(arena: Array, layer: Layer, k: Array, v: Array, slots: Array, num_threads: int) -> None: ...
def attend(
    arena: Array,
    layer: Layer,
    q: Array,
    out: Array,
    row_offsets: Array,
    starts: Array,
    page_table: Array,
    scale: float,
    window: int,
    num_threads: int,
) -> None: ...
def norm(
    x: Array,
    residual: Array | None,
    weight: Array,
    out: Array,
    eps: float,
    add_one: bool,
    num_threads: int,
) -> None: ...
def rope(x: Array, cos: Array, sin: Array, positions: Array, num_threads: int) -> None: ...
def gate(gate_up: Array, out: Array, gelu: bool, num_threads: int) -> None: ...
def packed_nbytes(outputs: int, inputs: int, bits: int) -> int: ...
def pack_weight(weight: Array, bits: int, packed: Array, num_threads: int) -> float:
    """Quantize; gives the relative root mean square error."""

def linear(x: Array, weight: Array, bits: int, bias: Array | None, out: Array, num_threads: int) -> None: ...

class DecoderLayer:
    """A layer whose linear layers are all quantized."""

    @staticmethod
    def make(
        kv: Layer,
        linears: tuple[tuple[Array, int, Array | None], ...],
        norms: tuple[Array | None, ...],
        cos: Array | None,
        sin: Array | None,
        hidden: int,
        ffn: int,
        heads: int,
        window: int,
        scale: float,
        eps: float,
        add_one: bool,
        gelu: bool,
    ) -> DecoderLayer: ...
    def project(
        self, x: Array, positions: Array, slots: Array, arena: Array, qkv: Array, num_threads: int
    ) -> None: ...
    def complete(
        self,
        arena: Array,
        q: Array,
        row_offsets: Array,
        starts: Array,
        page_table: Array,
        residual: Array,
        next_norm: Array,
        out: Array,
        num_threads: int,
    ) -> None: ...
