"""Any common chat format -> messages `[{"role": ..., "content": ...}, ...]`.

ShareGPT (`conversations` of from/value), `messages` of role/content, Alpaca (instruction/input/output),
prompt-completion (texts or messages) and plain `text`, which becomes one assistant message without a
template around it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from training.exceptions import DataError, nearest

Messages = list[dict[str, str]]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
FORMATS = "conversations, messages, instruction/output, prompt/completion or text"

PLAIN_TEXT = "text"
"""Role of the one message of a plain-text record: no chat template is applied to it."""


def to_messages(record: Mapping[str, Any], where: str) -> Messages:
    """Messages of one record.

    Args:
        record: a row of the dataset.
        where: file and line, for the error.

    Raises:
        DataError: the format is unknown, a role is unknown, or a content is not text.
    """
    present = {key for key, value in record.items() if value is not None}
    if "messages" in present:
        return _from_turns(record["messages"], "role", "content", f"{where}: messages")
    if "conversations" in present:
        turns = record["conversations"]
        first = turns[0] if isinstance(turns, Sequence) and len(turns) else {}
        if isinstance(first, Mapping) and "role" in first:
            return _from_turns(turns, "role", "content", f"{where}: conversations")
        return _from_turns(turns, "from", "value", f"{where}: conversations")
    if {"instruction", "output"} <= present:
        prompt = _text(record["instruction"], f"{where}: instruction")
        if record.get("input"):
            prompt += "\n\n" + _text(record["input"], f"{where}: input")
        system = record.get("system")
        head = [{"role": "system", "content": _text(system, f"{where}: system")}] if system else []
        return head + _question(prompt, _text(record["output"], f"{where}: output"))
    if {"prompt", "completion"} <= present:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str):
            return _question(prompt, _text(completion, f"{where}: completion"))
        return _from_turns(prompt, "role", "content", f"{where}: prompt") + _from_turns(
            completion, "role", "content", f"{where}: completion"
        )
    if "text" in present:
        return [{"role": PLAIN_TEXT, "content": _text(record["text"], f"{where}: text")}]
    names = ", ".join(sorted(record)) or "none"
    raise DataError(f"{where}: the record's fields are {names}, but must be {FORMATS}")


def _from_turns(turns: Any, role_key: str, content_key: str, where: str) -> Messages:
    if isinstance(turns, str) or not isinstance(turns, Sequence) or len(turns) == 0:
        raise DataError(f"{where} is {_short(turns)}, but must be a list of messages")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            raise DataError(
                f"{where}[{number}] is {_short(turn)}, but must have {role_key} and {content_key}"
            )
        role = str(turn[role_key])
        if role not in ROLES:
            raise DataError(
                f"{where}[{number}].{role_key} is {role!r}, but must be one of "
                f"{', '.join(ROLES)}{nearest(role, ROLES)}"
            )
        content = _text(turn[content_key], f"{where}[{number}].{content_key}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _question(prompt: str, answer: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {_short(value)}, but must be text")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
