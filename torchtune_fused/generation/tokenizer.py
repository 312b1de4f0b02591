"""A torchtune tokenizer made from the files that come with a Hugging Face model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer
from torchtune.data import Message, truncate
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from torchtune_fused.checkpoint.hub import fetch_side_files
from torchtune_fused.generation.chat_template import ChatTemplate

_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class HFTokenizer(ModelTokenizer, Transform):
    """Tokenizer and chat format of any model whose folder holds a ``tokenizer.json``.

    Special tokens come from ``tokenizer_config.json`` (and ``special_tokens_map.json``), the
    template from ``chat_template.jinja`` or ``tokenizer_config.json``, and further stop tokens
    from ``generation_config.json`` and ``config.json``. All but ``tokenizer.json`` may be absent.

    Args:
        path (str | Path): Folder of the model (``~`` is expanded), or a repository of the Hugging
            Face Hub, of which only the small files are fetched.
        max_seq_len (int | None): Conversations are truncated to this many tokens.
        chat_template (str | None): A Jinja template to use in the place of the model's own, for a
            base model that has none.

    Attributes:
        special_tokens (dict[str, int]): Ids of the special tokens.
        bos_id (int | None): Beginning of sequence; None where the model has none.
        eos_id (int | None): End of sequence; the first stop token where it has no name.
        pad_id (int | None): Padding; the end of sequence where the model has none of its own.
        stop_tokens (list[int]): All tokens that end an answer.
        adds_bos (bool): Whether the model expects plain text to begin with ``bos_id``.
        vocab_size (int): Number of tokens, special ones included.

    Raises:
        FileNotFoundError: If the folder or its ``tokenizer.json`` is absent.
        HubError: If the repository can't be fetched.
        ValueError: If a file is corrupt or names a token that does not exist.
    """

    def __init__(
        self,
        path: str | Path,
        max_seq_len: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        folder = fetch_side_files(path)
        self._folder = folder
        self._tokenizer = _load_tokenizer(folder / "tokenizer.json")
        self.max_seq_len = max_seq_len
        config = _read_json(folder / "special_tokens_map.json")
        config |= _read_json(folder / "tokenizer_config.json")
        names = {key: _text(config[key]) for key in _NAMED_TOKENS if config.get(key)}
        ids = {key: self._token_id(text) for key, text in names.items()}
        self.stop_tokens = _stop_tokens(folder, ids.get("eos_token"))
        self.bos_id = ids.get("bos_token")
        self.eos_id = next(iter(self.stop_tokens), None)
        self.pad_id = ids.get("pad_token", self.eos_id)
        self.special_tokens = {
            token.content: token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self.adds_bos = self.bos_id in self._tokenizer.encode("").ids
        source = chat_template or _chat_template(folder, config)
        self._template = ChatTemplate(source, names) if source else None

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Turn text into token ids.

        Args:
            text (str): The text; special tokens spelled out in it are recognised.
            add_bos (bool): Whether to begin with ``bos_id``, where the model has one and the
                text does not begin with it already.
            add_eos (bool): Whether to end with ``eos_id``, where the model has one.

        Returns:
            list[int]: the ids.
        """
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None and tokens[:1] != [self.bos_id]:
            tokens.insert(0, self.bos_id)
        if add_eos and self.eos_id is not None:
            tokens.append(self.eos_id)
        return tokens

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text.

        Args:
            token_ids (Sequence[int]): The ids.
            skip_special_tokens (bool): Whether to leave special tokens out of the text.

        Returns:
            str: the text; bytes that are no valid UTF-8 come out as U+FFFD.
        """
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def tokenize_messages(
        self, messages: list[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Tokenize a conversation with the model's chat template.

        The tokens are those of the whole rendered text. A token counts for the loss if its text
        begins within an answer, which runs from behind its header to the token that ends it.

        Args:
            messages (list[Message]): The conversation, text only.
            add_end_tokens (bool): True for training. False to generate: the text then ends with
                the header of the answer to come, or within the answer that a last message of the
                role ``assistant`` begins; all of it is masked.

        Returns:
            tuple[list[int], list[bool]]: token ids, and for each whether it is masked out of the
            loss (True). Only answers are not: messages of the role ``assistant`` that are not
            ``masked`` themselves. Longer than ``max_seq_len``, both are cut to it, and the last
            token becomes a masked ``eos_id`` if ``add_end_tokens``.

        Raises:
            ValueError: If the model has no chat template, if its template refuses the messages,
                or if it writes an answer otherwise once more messages follow it, so that the
                answer can't be found.
        """
        chat = [{"role": message.role, "content": _text_of(message)} for message in messages]
        if add_end_tokens:
            text = self._render(chat)
        elif chat and chat[-1]["role"] == "assistant":
            text = self._render(chat[:-1], add_generation_prompt=True) + chat[-1]["content"]
        else:
            text = self._render(chat, add_generation_prompt=True)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens, mask = encoding.ids, [True] * len(encoding.ids)
        for i, message in enumerate(messages):
            if add_end_tokens and message.role == "assistant" and not message.masked:
                for answer_token in self._find_answer(chat[: i + 1], text, encoding):
                    mask[answer_token] = False
        if self.max_seq_len is not None and len(tokens) > self.max_seq_len:
            tokens = truncate(tokens, self.max_seq_len, self.eos_id if add_end_tokens else None)
            mask = truncate(mask, self.max_seq_len, True if add_end_tokens else None)
        return tokens, mask

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> Mapping[str, Any]:
        """Replace the ``messages`` of a sample by its ``tokens`` and ``mask``.

        Args:
            sample (Mapping[str, Any]): A sample with a list of :class:`~torchtune.data.Message`.
            inference (bool): Whether the sample is to be answered, not trained on.

        Returns:
            Mapping[str, Any]: the sample, changed.
        """
        messages = sample.pop("messages")
        sample["tokens"], sample["mask"] = self.tokenize_messages(
            messages, add_end_tokens=not inference
        )
        return sample

    def _render(self, chat: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        if self._template is None:
            raise ValueError(
                f"{self._folder} has no chat template: use plain text, or give this tokenizer a "
                "template as chat_template"
            )
        return self._template.render(chat, add_generation_prompt=add_generation_prompt)

    def _find_answer(self, chat: list[dict[str, str]], text: str, encoding: Encoding) -> list[int]:
        """Indices of the tokens of the last answer of ``chat``, with which ``text`` begins."""
        header = self._render(chat[:-1], add_generation_prompt=True)
        turn = self._render(chat)
        if not (turn.startswith(header) and text.startswith(turn)):
            raise ValueError(
                f"the chat template writes message {len(chat) - 1} otherwise once it knows what "
                "follows, so its answer can't be told from the rest: train on conversations of "
                "one answer, mask this message, or use another chat_template"
            )
        spans = encoding.offsets
        answer = [i for i, (start, _) in enumerate(spans) if len(header) <= start < len(turn)]
        special = set(self.special_tokens.values())
        last = next((i for i in reversed(answer) if encoding.ids[i] in special), None)
        # What follows the token that ends the turn, say a line break, is the template's.
        if last is not None and not turn[spans[last][1] :].strip():
            answer = [i for i in answer if i <= last]
        return answer

    def _token_id(self, text: str) -> int:
        token_id = self._tokenizer.token_to_id(text)
        if token_id is None:
            raise ValueError(
                f"{self._folder / 'tokenizer_config.json'} names the token {text!r}, which "
                "tokenizer.json does not have"
            )
        return token_id


def _text_of(message: Message) -> str:
    if message.contains_media:
        raise ValueError(f"this tokenizer takes text only, but a {message.role} message has media")
    return message.text_content


def _load_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a tokenizer needs it")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # what the library raises has no narrower type
        raise ValueError(f"{file} is not a valid tokenizer: {error}") from error
    # Some files ask for truncation or padding as they were last used; torchtune does both itself.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _text(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each with its name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _stop_tokens(folder: Path, eos_id: int | None) -> list[int]:
    found = [] if eos_id is None else [eos_id]
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids] if ids is not None else []
    return list(dict.fromkeys(found))
