"""The built-in chat templates. Each marks what is trained with `{% generation %}`."""

from __future__ import annotations

_CHATML = r"""{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else -%}
{{ message.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""

_LLAMA_3 = r"""{{- bos_token -}}
{%- for message in messages -%}
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
