"""Which family's way to call tools a model knows, by what its template and its vocabulary contain."""

from __future__ import annotations

from collections.abc import Callable

from dormouse.models.tool_formats.base import ToolFormat
from dormouse.models.tool_formats.function_gemma import FunctionGemma
from dormouse.models.tool_formats.gemma import Gemma3
from dormouse.models.tool_formats.hermes import Hermes
from dormouse.models.tool_formats.llama import Llama3
from dormouse.models.tool_formats.mistral import Mistral
from dormouse.models.tool_formats.qwen_xml import QwenXml

_GEMMA_4 = FunctionGemma("<|tool_call>", "<tool_call|>", '<|"|>')


def taught_format(template: str) -> ToolFormat | None:
    """The format that a template which renders tools teaches; None when it is none of ours."""
    if "<start_function_call>" in template:
        return FunctionGemma()
    if "<|tool_call>" in template:
        return _GEMMA_4
    if "[TOOL_CALLS]" in template:
        return Mistral(is_named="[ARGS]" in template)
    if "<function=" in template and "<parameter=" in template:
        return QwenXml()
    if "<tool_call>" in template:
        return Hermes()
    if '"parameters": ' in template and ("<|python_tag|>" in template or "ipython" in template):
        return Llama3()
    return None


def fitting_format(template: str, has_token: Callable[[str], bool]) -> ToolFormat:
    """The format to teach a model whose template does not: that of the family which shares its markers."""
    if has_token("<start_function_call>"):
        return FunctionGemma()
    if has_token("<|tool_call>"):
        return _GEMMA_4
    if has_token("[TOOL_CALLS]"):
        return Mistral(is_named=has_token("[ARGS]"))
    if has_token("<tool_call>"):
        return Hermes()
    if has_token("<|python_tag|>"):
        return Llama3()
    if "<start_of_turn>" in template:
        return Gemma3()
    return Hermes(is_list=True)
