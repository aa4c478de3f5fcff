"""The built-in chat templates. Each marks what is trained with `{% generation %}`."""

from __future__ import annotations

# Tools as Nous Research's Hermes and Qwen write them: functions in the system turn, calls as <tool_call> JSON, answers
# as <tool_response> in a user turn.
_CHATML = r"""{%- if tools -%}
{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' -%}{{ messages[0].content + '\n\n' }}{%- endif -%}
{{ '# Tools\n\nYou may call one or more functions. Their signatures are within <tools></tools>:\n<tools>' }}
{%- for tool in tools -%}{{ '\n' + tool | tojson }}{%- endfor -%}
{{ '\n</tools>\n\nAnswer a call as JSON within <tool_call></tool_call>:\n<tool_call>\n' }}
{{- '{"name": <function name>, "arguments": <object of arguments>}\n</tool_call><|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' and tools and loop.first -%}
{%- elif message.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- elif message.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' }}
{%- generation -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{{ '\n' if message.content or not loop.first }}{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}
{%- endgeneration -%}
{{ '\n' }}
{%- else -%}
{{ '<|im_start|>' + message.role + '\n' }}
{{- message.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""

_LLAMA_3 = r"""{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ raise_exception('this template has no tool turns: set data.template: chatml') }}
{%- endif -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else -%}
{{ message.content | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""

_ALPACA = r"""{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ raise_exception('this template has no tool turns: set data.template: chatml') }}
{%- endif -%}
{%- if message.role == 'system' -%}
{{ message.content | trim + '\n\n' }}
{%- elif message.role == 'user' -%}
{{ '### Instruction:\n' + message.content | trim + '\n\n' }}
{%- else -%}
{{ '### Response:\n' }}{% generation %}{{ message.content | trim + eos_token }}{% endgeneration %}{{ '\n\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\n' }}
{%- endif -%}
"""

_PLAIN = r"""{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ raise_exception('this template has no tool turns: set data.template: chatml') }}
{%- endif -%}
{%- if message.role == 'system' -%}
{{ message.content | trim + '\n\n' }}
{%- elif message.role == 'user' -%}
{{ '### User:\n' + message.content | trim + '\n\n' }}
{%- else -%}
{{ '### Assistant:\n' }}{% generation %}{{ message.content | trim + eos_token }}{% endgeneration %}{{ '\n\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Assistant:\n' }}
{%- endif -%}
"""

# Qwen 2.5 says who it is where nobody else does.
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_QWEN_2_5 = (
    "{%- if not tools and messages[0].role != 'system' -%}{{ '<|im_start|>system\\n" + _QWEN + "<|im_end|>\\n' }}"
    "{%- endif -%}\n"
) + _CHATML.replace(
    "{{ messages[0].content + '\\n\\n' }}{%- endif -%}",
    "{{ messages[0].content + '\\n\\n' }}{%- else -%}{{ '" + _QWEN + "\\n\\n' }}{%- endif -%}",
)

_IN_TURNS = r"""{%- if messages[0].role == 'system' -%}
{%- set system, turns = SYSTEM, messages[1:] -%}
{%- else -%}
{%- set system, turns = '', messages -%}
{%- endif -%}
{{- START -}}
{%- for message in turns -%}
{%- if message.role == 'tool' -%}
{{ raise_exception('this template has no tool turns: set data.template: chatml') }}
{%- elif (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('this template needs user and assistant in turns, the user first') }}
{%- endif -%}
{%- set first = system if loop.first else '' -%}
{%- set text = message.content | trim -%}
{%- if message.role == 'user' -%}
{{ USER }}
{%- else -%}
{{ HEAD }}{% generation %}{{ ANSWER }}{% endgeneration %}{{ TAIL }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ HEAD }}
{%- endif -%}
"""


def _in_turns(
    user: str,
    answer: str,
    *,
    system: str = "messages[0].content | trim + '\\n\\n'",
    start: str = "system",
    head: str = "''",
    tail: str = "''",
) -> str:
    """A template of turns that alternate, from Jinja expressions over `text`, `system` and, in the first turn, `first`.

    `head` stands before an answer and is what the model is asked with; `answer` is trained, the `tail` after it is not.
    """
    parts = {"SYSTEM": system, "START": start, "USER": user, "HEAD": head, "ANSWER": answer, "TAIL": tail}
    made = _IN_TURNS
    for name, expression in parts.items():
        made = made.replace(name, expression)
    return made


_FALCON_TEXT = "message.content.replace('\\r\\n', '\\n').replace('\\n\\n', '\\n') | trim"
_LLAMA_2_SYSTEM = "'<<SYS>>\\n' + messages[0].content | trim + '\\n<</SYS>>\\n\\n'"

FAMILY_TEXTS: dict[str, str] = {
    "chatml": _CHATML,
    "qwen2.5": _QWEN_2_5,
    "llama-3": _LLAMA_3,
    "llama-2": _in_turns(
        "bos_token + '[INST] ' + (first + message.content) | trim + ' [/INST]'",
        "' ' + text + ' ' + eos_token",
        system=_LLAMA_2_SYSTEM,
        start="''",
    ),
    "mistral": _in_turns("'[INST] ' + text + ' [/INST]'", "' ' + text + eos_token", start="bos_token + system"),
    "gemma": _in_turns(
        "'<start_of_turn>user\\n' + (first + message.content) | trim + '<end_of_turn>\\n'",
        "text + '<end_of_turn>'",
        start="''",
        head="'<start_of_turn>model\\n'",
        tail="'\\n'",
    ),
    "phi-3": _in_turns(
        "'<|user|>\\n' + text + '<|end|>\\n'",
        "text + '<|end|>'",
        system="'<|system|>\\n' + messages[0].content | trim + '<|end|>\\n'",
        head="'<|assistant|>\\n'",
        tail="'\\n'",
    ),
    "zephyr": _in_turns(
        "'<|user|>\\n' + text + eos_token + '\\n'",
        "text + eos_token",
        system="'<|system|>\\n' + messages[0].content | trim + eos_token + '\\n'",
        head="'<|assistant|>\\n'",
        tail="'\\n'",
    ),
    "vicuna": _in_turns(
        "'USER: ' + text + '\\n'",
        "' ' + text + eos_token",
        start="bos_token + system",
        head="'ASSISTANT:'",
        tail="'\\n'",
    ),
    "falcon": _in_turns(
        "'\\n\\nUser: ' + " + _FALCON_TEXT,
        "' ' + " + _FALCON_TEXT,
        system="messages[0].content | trim",
        head="'\\n\\nAssistant:'",
    ),
    "alpaca": _ALPACA,
    "plain": _PLAIN,
}
