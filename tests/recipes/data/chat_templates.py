"""Chat templates in the manner of well-known families, each with what is special about it."""

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Every turn alike."""

LLAMA3 = """
{{- bos_token }}
{%- set today = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{{- "<|start_header|>system<|end_header|>\\n\\nToday Date: " + today + "\\n" }}
{%- if tools %}
    {{- "You may call:\\n" }}
    {%- for tool in tools %}{{- tool | tojson(indent=2) + "\\n" }}{% endfor %}
{%- endif %}
{{- "<|im_end|>" }}
{%- for m in messages %}
    {%- if m.role == "tool" %}
        {{- "<|start_header|>ipython<|end_header|>\\n\\n" + (m.content | tojson) + "<|im_end|>" }}
    {%- elif m.tool_calls %}
        {{- "<|start_header|>assistant<|end_header|>\\n\\n" }}
        {%- for call in m.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' + (call.function.arguments | tojson) + '}' }}
        {%- endfor %}
        {{- "<|im_end|>" }}
    {%- else %}
        {{- "<|start_header|>" + m.role + "<|end_header|>\\n\\n" + m.content | trim + "<|im_end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header|>assistant<|end_header|>\\n\\n" }}{% endif %}
"""
"""Begin token, date, tools in the system turn, results as JSON, trimmed contents."""

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
"""No prompt for an answer, no system turn, roles that alternate."""

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""Another name for the assistant, the system's words in the first user turn, an end of turn that ends no text."""

QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == "user" %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == "assistant" %}
        {%- set thought = m.reasoning_content or "" %}{%- set said = m.content %}
        {%- if "</think>" in said %}
            {%- set thought = said.split("</think>")[0].split("<think>")[-1].strip("\\n") %}
            {%- set said = said.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.index0 > ns.last %}{{- "<think>\\n" + thought + "\\n</think>\\n\\n" }}{%- endif %}
        {{- said + "<|im_end|>\\n" }}
    {%- else %}
        {{- "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
"""
"""Reasoning, which is taken out of turns before the last question."""

ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
"""Line breaks of the template itself in the text."""

MARKED = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Says itself what is generated."""

OPENS_THINKING = CHATML.replace(
    "assistant\\n' }}{% endif %}",
    "assistant\\n' + ('' if thinking is defined and not thinking else '<think>\\n') }}{% endif %}",
)
"""Asks for reasoning that it then leaves out where there is none: the prompt is not how answers begin."""
