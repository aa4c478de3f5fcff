"""Templates that would never end or fill the memory stop with a reason, soon."""

from __future__ import annotations

import time

import pytest

from charkha.data.jinja_sandbox import TemplateFault, render_template

LETTERS = {"messages": [{"role": "user", "content": "x" * 3000}]}


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(2000) %}{% for b in range(2000) %}{{ '' }}{% endfor %}{% endfor %}",
        "{% set s = messages[0].content %}{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s | replace('a', n.s) %}{% endfor %}",
        "{{ 'a' | center(3000000000) }}",
        "{{ 'a'.ljust(3000000000) }}",
        "{{ 'a'.zfill(3000000000) }}",
        "{{ '%3000000000d' % 1 }}",
        "{{ '%*d' | format(3000000000, 1) }}",
        "{{ 'a' * 3000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_that_means_harm_is_stopped(template: str) -> None:
    begun = time.process_time()
    with pytest.raises(TemplateFault):
        render_template(template, LETTERS, 3000)
    assert time.process_time() - begun < 10


def test_loops_know_their_place_and_strings_join_as_ever() -> None:
    template = (
        "{% for m in items %}{{ loop.index ~ '/' ~ loop.length }}{{ ' last' if loop.last }}{{ ';' if not loop.last }}"
        "{% else %}none{% endfor %}{{ '%s-%d' % ('a', 1) }}{{ [1] + [2] }}{{ 'x'.ljust(3) }}"
        "{{ 'aba' | replace('a', 'c') }}"
    )
    assert render_template(template, {"items": ["a", "b"]}, 2) == "1/2;2/2 lasta-1[1, 2]x  cbc"
    assert render_template(template, {"items": []}, 2).startswith("none")
