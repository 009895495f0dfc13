"""Chat templates of a folder: where they may lie, and what they make of a conversation.

transformers' tokenizers read `tokenizer_config.json` (one template, or a list of named ones), `chat_template.jinja` and
`additional_chat_templates/`; `chat_template.json`, which only processors read, is taken where these say nothing.
Templates are text in a sandboxed language: rendering runs no code of the folder's, in bounded time and memory.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prune.data.tokenizer_files import settings_in
from megatron_prune.errors import UserError
from megatron_prune.runtime.bounded import OverrunError, bounded

DEFAULT = "default"
"""transformers' name of the template that is used unless another one is asked for."""

_USER = {"role": "user", "content": "Once upon a time <b>&</b>\n"}
_REPLY = {"role": "assistant", "content": " There was a girl."}
_SYSTEM = {"role": "system", "content": "Be brief."}
_CONVERSATIONS = ([_USER], [_USER, _REPLY, _USER], [_SYSTEM, _USER, _REPLY, _USER])
_SECONDS, _MEMORY = 10, 1 << 30


def chat_templates(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Name -> template, as a folder's tokenizer has them; the only one is called DEFAULT. Empty: none. Raises
    UserError: there is something else in their place."""
    found = tokenizer.chat_template
    if not found:
        file = folder / "chat_template.json"
        found = settings_in(file).get("chat_template")
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    templates = found if isinstance(found, dict) else {DEFAULT: found} if found else {}
    for name, template in templates.items():
        if not _is_text(name) or not _is_text(template):
            raise UserError(f"{folder}: its chat template ({name!a}) is no text")
    return dict(templates)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def as_setting(templates: dict[str, str]) -> str | list[dict[str, str]] | None:
    """What tokenizer_config.json (and GGUF) calls `chat_template`: one template, or a list of named ones."""
    if not templates:
        return None
    if set(templates) == {DEFAULT}:
        return templates[DEFAULT]
    return [{"name": name, "template": template} for name, template in templates.items()]


def render_chats(
    tokenizer: Any, templates: dict[str, str], seconds: int = _SECONDS, memory: int = _MEMORY
) -> dict[str, str]:
    """For each template, what it makes of some conversations; what it refuses is told by the kind of error.

    Args:
        seconds, memory: that a template may take (see `bounded`).

    Raises:
        UserError: one of them does not come to an end, or would fill the memory.
    """
    rendered = {}
    for name, template in templates.items():
        try:
            rendered[name] = bounded(partial(_render, tokenizer, template), seconds, memory)
        except OverrunError as error:
            raise UserError(f"chat template {name!a}: to render some messages it {error}") from error
    return rendered


def _render(tokenizer: Any, template: str) -> str:
    texts = []
    for messages in _CONVERSATIONS:
        for prompt in (False, True):
            try:
                text = tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            except MemoryError:
                raise
            except Exception as error:  # a template may raise whatever it likes, and its language adds its own
                text = f"{type(error).__name__}: {error}"
            texts.append(text)
    return json.dumps(texts)
