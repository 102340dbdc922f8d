"""What `docs/benchmarks.md` says between its tables."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.compare import agents, decode, density, mixed, prefill, restart


def _paragraph(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Section:
    """A workload: what it is, and the metric that its chart shows for `cases`, or for all of them."""

    workload: str
    text: str
    metric: str
    cases: tuple[str, ...] = ()


MACHINE = _paragraph("""
    Taken on {cores} cores of {cpu} ({isa}), {memory_gib} GiB, {system}, Dormouse at commit {commit}.
    `make peers` installs the other servers; `make compare` takes the figures again and writes this page.
""")

METHOD = _paragraph("""
    One harness drives every server over HTTP: the same prompts (the language reference that ships with
    Python, as text, through `/v1/completions`), streamed, greedy, the end of text ignored, with the same
    number of threads. All servers are up at once, and stopped with SIGSTOP while it is another's turn.
    Rounds go from server to server, so that a slow moment of the machine hits all of them. Figures are
    medians, with the least and the largest sample. The weights are the same, SmolLM2-135M-Instruct, each
    in the form that a user of the server has: a GGUF file of 4-bit weights for llama.cpp, and a folder in
    Hugging Face's layout made of that file for Dormouse (which by default finds the four bits again), for
    vLLM (bf16) and for all that computes with mlx (fp32, the only precision in which it uses a fast BLAS on a
    processor).
    llama.cpp runs with its flash attention, which was the faster one here; with quantized KV it is measured
    in `decode` only. Dormouse speculates by prompt lookup, as it does by default.
""")

LIMITS = _paragraph("""
    A server stops repeating a case once it spent {case_limit_s:g} s on it; a request is given up after
    {request_limit_s:g} s, and the turns of `agents` after {agents_limit_s:g} s. Memory for KV in `agents`
    and `restart` is {tight_mb:.0f} MB for every server, {tight_tokens} tokens in bf16; each fills it in
    its own format. For llama.cpp this is one slot, and a cache of prompts in memory for the rest of it.
    In the other workloads it is {roomy_mb:.0f} MB, which is more than they need.
""")

NOT_MEASURED = _paragraph("""
    CUDA and Metal: there was no such machine. Larger models, other processors and more than two cores:
    the ratios will differ there. Speed is compared here, not quality: what Dormouse's formats of weights
    and of KV cost is in [performance.md](performance.md).
""")

SECTIONS = (
    Section(
        "prefill",
        _paragraph("""
            Prompts that no server has seen, one at a time, from the request to the first token.
        """),
        prefill.SPEED,
    ),
    Section(
        "decode",
        _paragraph("""
            Streams at contexts that were read before, all generating: tokens of all of them per second,
            while all are at it. A case is called by its batch and its context. The texts are natural: a
            server that speculates gains from them what it would gain for a user.
        """),
        decode.SPEED,
    ),
    Section(
        "mixed",
        _paragraph("""
            Streams decode, and a long prompt arrives: the longest gap between two tokens of a stream
            while that prompt is computed, and what a normal step took before it came.
        """),
        mixed.GAP,
    ),
    Section(
        "agents",
        _paragraph("""
            Agents take turns in rotation, one after the other, each sending its whole conversation; a
            turn is 32 tokens of input and 32 generated. Together they need more memory for KV than there
            is. First contact is every agent's first prompt; the percentiles are over all later turns;
            asked again at once is the prompt of the agent that spoke last, once more. Tokens per second
            are over everything that was generated, first contacts included.
        """),
        agents.TTFT,
        (agents.FIRST, agents.ROTATION, agents.WARM),
    ),
    Section(
        "restart",
        _paragraph("""
            The server is stopped and started, then every agent's conversation is sent for one more token.
            A slot restored by hand is llama.cpp's endpoint that saves one conversation to a file:
            somebody has to name the slot, save it before the stop and restore it before the request.
            Restore and first token are counted together.
        """),
        agents.TTFT,
        (restart.WAKE, restart.BY_HAND),
    ),
    Section(
        "density",
        _paragraph("""
            Agents per GiB: in memory by the bytes of a token in the server's format, on disk by what lies
            there. Asleep: a server that was started on a store of sleeping agents, before anybody asked
            for one. The weights and the touched part of the arena are taken off; the libraries that Python
            imports count.
        """),
        density.PER_RAM,
        (density.AGENTS,),
    ),
)
