"""Chat templates: the Jinja sources that turn a conversation into a model's prompt text."""

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """A chat template as model folders hold it, with what such templates expect to find.

    Templates come with downloaded models, so they run in Jinja's sandbox and see strings only.

    Args:
        source (str): The template, in Jinja.
        special_tokens (dict[str, str]): Texts of ``bos_token``, ``eos_token`` and so on.

    Raises:
        ValueError: If the source is not a valid template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error
        self._special_tokens = special_tokens

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Write a conversation as the model reads it.

        Args:
            messages (list[dict[str, str]]): ``role`` and ``content`` of each message.
            add_generation_prompt (bool): Whether to end with the header of an answer to come.

        Returns:
            str: the text, special tokens spelled out.

        Raises:
            ValueError: If the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the chat template refuses a conversation of ({roles}): {error}"
            ) from error


class _GenerationTag(Extension):
    """``{% generation %}`` marks the answers in some templates; here it only passes them on."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
