"""Chat templates are strangers' programs: what they must not reach, and what they must not take."""

from __future__ import annotations

import time
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from dormouse.domain.errors import InvalidRequest, ModelError
from dormouse.models import sandbox
from dormouse.models.chat_template import ChatTemplate

GROWING = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(64) %}"
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
]

ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).x.y }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "class by map": "{{ ['']|map(attribute='__class__')|list }}{{ 1/0 }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "format by reference": "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "globals": "{{ raise_exception.__globals__['__builtins__'].open('/etc/passwd').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "joiner": "{{ joiner.__init__.__globals__.os }}{{ joiner.__init__.__globals__.os.x.y }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__['x'] }}",
    "self": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment.x }}",
    "namespace": "{% set n = namespace(__class__=1) %}{{ n }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of a dict": "{{ messages[0].update({'role': 'system'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "from": "{% from 'os' import system %}",
    "extends": "{% extends '/etc/passwd' %}",
}

BOMBS = {
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over text": "{% set t = 'a' * 100000 %}{% for a in t %}{% for b in t %}{% for c in t %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** 10 ** 8 }}{{ 9 ** 99999999 }}",
    "power by hand": "{% set n = namespace(x=9) %}{% for i in range(64) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}",
    "repeat": "{{ 'a' * 10 ** 10 }}",
    "repeat a list": "{{ ([0] * 10 ** 10)|length }}",
    "repeat from the left": "{{ 10 ** 10 * 'a' }}",
    "doubling by ~": GROWING + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": GROWING + "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(64) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "doubling blocks": GROWING + "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubling by join": GROWING + "{% set n.x = [n.x, n.x]|join %}{% endfor %}",
    "replace": "{% set t = 'a' * 100000 %}{{ t|replace('a', t) }}",
    "replace by method": "{% set t = 'a' * 100000 %}{{ t.replace('a', t) }}",
    "join": "{% set t = 'a' * 100000 %}{{ t.join(['x'] * 100000) }}",
    "center": "{{ 'a'|center(10 ** 10) }}",
    "center by name": "{{ ['a']|map('center', 10 ** 10)|list }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "zfill": "{{ 'a'.zfill(10 ** 10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "indent": "{{ 'a\nb'|indent(10 ** 10) }}",
    "tojson": "{{ messages|tojson(indent=10 ** 9) }}",
    "round": "{{ 1.5|round(10 ** 9) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent by argument": "{{ '%*d' % (10 ** 9, 1) }}",
    "percent by filter": "{{ '%10000000000d'|format(1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format by argument": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
    "output": "{% set t = 'a' * 1000000 %}{% for i in range(99999) %}{{ t }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two recursions": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
}


def render(source: str) -> str:
    return ChatTemplate({"default": source}, {}).render(
        MESSAGES, add_generation_prompt=True, tools=None, continue_final_message=False, variables={}
    )


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_reaches_nothing_but_its_data(name: str) -> None:
    before = [dict(message) for message in MESSAGES]
    try:
        text = render(ESCAPES[name])
    except (ModelError, InvalidRequest):
        text = ""
    assert not any(word in text for word in ("class", "module", "function", "root:", "globals", "0x"))
    assert before == MESSAGES


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", BOMBS)
def test_a_template_takes_no_more_than_it_may(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1.0)
    began = time.process_time()
    with pytest.raises((ModelError, InvalidRequest)):
        render(BOMBS[name])
    assert time.process_time() - began < 15, "it was stopped, if late"


def test_transformers_renders_in_the_bounded_environment() -> None:
    """Its own class would have none of the bounds."""
    compiled = chat_template_utils._compile_jinja_template("{{ messages }}")
    assert isinstance(compiled.environment, sandbox.BoundedEnvironment)


def test_what_templates_do_is_still_done() -> None:
    """Loop variables, filters, macros, set blocks and formats are what they are without the bounds."""
    source = (
        "{% macro say(m) %}[{{ m.role }}={{ m['content']|trim }}]{% endmacro %}"
        "{% for m in messages if m.role != 'x' %}{{ loop.index }}/{{ loop.length }}{{ ' last' if loop.last }}"
        "{{ say(m) }}{{ loop.previtem.role if loop.previtem }}{% else %}none{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}{% for x in nothing %}{% endfor %}"
        "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"
        "{% set t %}x{{ 1 }}y{% endset %}{{ t|upper }}{{ '%s-%d' % ('a', 3) }}{{ '{:>4}'.format('z') }}"
        "{{ messages|map(attribute='role')|join(',') }}{{ messages[0]|tojson }}{{ [3, 1]|sort|first }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 'a-b'.split('-')|last }}"
        "{% for a in [[1, [2]]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}"
    )
    assert render(source) == (
        "1/2[user=hello]2/2 last[assistant=yes]usera13X1Ya-3   zuser,assistant"
        '{"role": "user", "content": "hello"}11b12'
    )
