"""A minimal chat template for a published directory that has none.

Servers refuse a chat without a template. This one has the form that the model card of DeepSeek-V2
Chat gives: a system message as it is, then turns that begin with "User: " or "Assistant: ". The
names of the marks are spelled out, so that it does not depend on settings beside it.
"""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

FILE = "chat_template.jinja"
_OTHERS = ("chat_template.json", "tokenizer_config.json")  # JSON objects that may hold one
_KEY = "chat_template"


def text(bos: str | None, eos: str) -> str:
    """The template for a tokenizer with these marks."""
    begin = "" if bos is None else f"{{{{ {_quoted(bos)} }}}}"
    return (
        f"{begin}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ 'Assistant: ' + message['content'] + {_quoted(eos)} }}}}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )


def exists(names: Collection[str], read: Callable[[str], Mapping[str, Any]]) -> bool:
    """Whether a file of a directory is a template or holds one.

    Args:
      names: names of the files.
      read: gives the JSON object in a file.
    """
    return FILE in names or any(bool(read(name).get(_KEY)) for name in _OTHERS if name in names)


def _quoted(name: str) -> str:
    """A string of Jinja; its escapes are those of JSON."""
    return json.dumps(name, ensure_ascii=False)
