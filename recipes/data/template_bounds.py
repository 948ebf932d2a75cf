"""Chat templates are programs of strangers: what they do is bounded, in a process of its own, before they are used."""

from __future__ import annotations

import functools
import subprocess
import sys

LIMIT_S, LIMIT_BYTES = 5, 1 << 30
"""What a template may take for a chat of one word."""
TOO_LARGE, TOO_DEEP = 3, 4
PROGRAM = f"""
import json, resource, signal, sys
source = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
from jinja2.sandbox import ImmutableSandboxedEnvironment
resource.setrlimit(resource.RLIMIT_AS, ({LIMIT_BYTES}, {LIMIT_BYTES}))
signal.alarm({LIMIT_S})
def refuse(text):
    raise ValueError(text)
options = {{"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}}
environment = ImmutableSandboxedEnvironment(**options)
environment.filters["tojson"] = lambda value, **options: json.dumps(value)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
chat = [{{"role": "user", "content": "probe"}}, {{"role": "assistant", "content": "probe"}}]
try:
    template = environment.from_string(source)
    for messages in (chat[:1], chat):
        template.render(messages=messages, bos_token="", eos_token="", add_generation_prompt=len(messages) == 1)
except MemoryError:
    sys.exit({TOO_LARGE})
except RecursionError:
    sys.exit({TOO_DEEP})
except Exception:
    pass
"""
"""What it writes, and whether it refuses, is for the real rendering to say."""


@functools.cache
def beyond_bounds(template: str) -> str | None:
    """What a template does that no template needs, in words; None where it stays within bounds."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", PROGRAM], input=template.encode("utf-8", "surrogatepass"),
            capture_output=True, timeout=4 * LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:  # also of a machine that does other things
        return f"does not come to an end within {4 * LIMIT_S} s for one word"
    if done.returncode == TOO_LARGE:
        return f"takes more than {LIMIT_BYTES >> 30} GiB for one word"
    if done.returncode == TOO_DEEP:
        return "is nested too deeply"
    return f"does not come to an end within {LIMIT_S} s for one word" if done.returncode < 0 else None
