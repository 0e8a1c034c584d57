"""The Modelfile with which Ollama runs a promoted GGUF.

Ollama wants the chat template in Go's notation. It is derived by rendering the tokenizer's template with
markers and seeing what stands around them; where that is not enough (a template that is no plain
sequence of turns), TEMPLATE is left out and Ollama goes by the GGUF's own.
"""

from typing import Any

from jinja2 import TemplateError

SYSTEM, USER, ASSISTANT, NEXT = "\u241fS\u241f", "\u241fU\u241f", "\u241fA\u241f", "\u241fN\u241f"


def write_modelfile(gguf_name: str, tokenizer: Any, end_tokens: list[str]) -> str:
    """Text of the Modelfile: FROM, TEMPLATE, SYSTEM, and a stop parameter for each end token."""
    lines = [f"FROM ./{gguf_name}"]
    template = ollama_template(tokenizer)
    if template is not None:
        go, system = template
        lines.append(f'TEMPLATE """{go}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{token}"' for token in end_tokens]
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: Any) -> tuple[str, str] | None:
    """Go template of one turn, and the default system text; None where it cannot be derived."""
    system = {"role": "system", "content": SYSTEM}
    turn = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
    if "strftime_now" in str(tokenizer.chat_template):
        return (
            None  # it says what day it is (Llama 3), and would go on saying that of the promotion
        )
    try:
        with_system = _render(tokenizer, [system, *turn])
        without = _render(tokenizer, turn)
        two_turns = _render(tokenizer, [*turn, {"role": "user", "content": NEXT}])
        head, rest = with_system.split(SYSTEM)
        to_user, rest = rest.split(USER)
        to_answer, tail = rest.split(ASSISTANT)
        start = without.split(USER)[0]
        between = two_turns.split(ASSISTANT)[1].split(NEXT)[0]
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    user_head = between.removeprefix(tail)
    if not between.startswith(tail) or not to_user.endswith(user_head) or "{{" in with_system:
        return None
    system_text = head + "{{ .System }}" + to_user.removesuffix(user_head)
    turn_text = user_head + "{{ .Prompt }}" + to_answer + "{{ .Response }}" + tail
    optional = "{{ if .System }}" + system_text + "{{ end }}"
    if start == user_head:
        return optional + turn_text, ""
    if start == head + to_user:
        return system_text + turn_text, ""
    if start.startswith(head) and start.endswith(to_user):
        return optional + turn_text, start.removeprefix(head).removesuffix(to_user)
    return None


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS in front of plain text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    # Ollama adds the BOS itself, as the GGUF says.
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text
