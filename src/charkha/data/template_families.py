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

FAMILY_TEXTS: dict[str, str] = {"chatml": _CHATML, "llama-3": _LLAMA_3, "alpaca": _ALPACA, "plain": _PLAIN}
