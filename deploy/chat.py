"""Talk to a promoted model through llama.cpp, with the GGUF's own chat template.

`python -m deploy.chat runs/NAME --prompt "..."` answers once; without a prompt it is a conversation that
ends with Ctrl-D. The answer is streamed; Ctrl-C stops it. A line that ends in a backslash goes on with the
next, and what stands between two lines of three quotation marks is one question.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from deploy.gguf_model import last_error, load_llama_cpp, render_chat
from deploy.llama_cpp_wheel import num_cores
from deploy.registry import find_gguf
from training.cli import make_parser, parse, run_command
from training.exceptions import ConfigError, ModelError

Messages = list[dict[str, str]]
QUOTES = '"""'


@dataclass
class ChatOptions:
    """Options of `python -m deploy.chat`."""

    prompt: str = field(default="", metadata={"help": "Answer this once; empty is a conversation."})
    system: str = field(
        default="", metadata={"help": "System prompt; empty is the chat template's own, if any."}
    )
    max_tokens: int = field(default=200, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature; 0 is the most likely answer."}
    )
    context_length: int = field(
        default=4096, metadata={"help": "Longest conversation in tokens, if the model takes it."}
    )


def main() -> None:
    parser = make_parser("deploy.chat", __doc__ or "", [ChatOptions])
    parser.add_argument("promoted", help="a sweep's directory, promoted/NUMBER, or a .gguf file")
    options, positional = parse(parser)
    _check(options)
    model = open_chat(find_gguf(Path(positional.promoted)), options.context_length)
    if options.prompt:
        question = [*_system(options), {"role": "user", "content": options.prompt}]
        _print_answer(model, latest_turns(model, question, options), options)
    else:
        _converse(model, options)


def open_chat(path: Path, context_length: int) -> Any:
    """The model as a `llama_cpp.Llama`.

    Raises:
        ModelError: llama.cpp cannot load it, or it carries no chat template.
    """
    llama_cpp = load_llama_cpp()
    try:
        # The named format is the file's own template; the default would guess among built-in ones.
        model = llama_cpp.Llama(
            str(path),
            n_ctx=context_length,
            n_threads=num_cores(),
            n_threads_batch=num_cores(),
            verbose=False,
            chat_format="chat_template.default",
        )
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{path}: llama.cpp cannot load this file as a GGUF model{last_error()}"
        ) from error
    if "tokenizer.chat_template" not in model.metadata:
        raise ModelError(f"{path} carries no chat template, but chat needs one")
    return model


def stream_answer(model: Any, messages: Messages, options: ChatOptions) -> Iterator[str]:
    """Pieces of the model's answer to the conversation."""
    chunks = model.create_chat_completion(
        messages, max_tokens=options.max_tokens, temperature=options.temperature, stream=True
    )
    for chunk in chunks:
        piece = chunk["choices"][0]["delta"].get("content")
        if piece:
            yield piece


def latest_turns(model: Any, messages: Messages, options: ChatOptions) -> Messages:
    """The end of the conversation that leaves room for an answer, after its system prompt, if any.

    Raises:
        ConfigError: even the last question alone is too long.
    """
    is_system = messages[0]["role"] == "system"
    head, messages = messages[:is_system], messages[is_system:]
    room = min(model.n_ctx(), model._model.n_ctx_train()) - options.max_tokens
    while True:
        num_tokens = len(prompt_tokens(model, [*head, *messages]))
        if num_tokens <= room:
            return [*head, *messages]
        if len(messages) == 1:
            raise ConfigError(
                f"the prompt is {num_tokens} tokens, but must be at most {room} "
                "(the context less --max_tokens)"
            )
        messages = messages[2:]


def prompt_tokens(model: Any, messages: Messages) -> list[int]:
    """Tokens of the conversation as `create_chat_completion` makes them.

    Raises:
        ConfigError: the model's chat template takes no such conversation (Gemma: no system prompt).
    """

    def text(token: int) -> str:
        return model._model.token_get_text(token) if token >= 0 else ""

    template = model.metadata["tokenizer.chat_template"]
    try:
        prompt = render_chat(template, text(model.token_bos()), text(model.token_eos()), messages)
    except (TemplateError, ValueError) as error:
        roles = " and ".join(dict.fromkeys(message["role"] for message in messages))
        raise ConfigError(
            f"the model's chat template takes no conversation of {roles}: {error}"
        ) from error
    return model.tokenize(prompt.encode("utf-8"), add_bos=False, special=True)


def _check(options: ChatOptions) -> None:
    for name, least in (("max_tokens", 1), ("temperature", 0), ("context_length", 16)):
        value = getattr(options, name)
        if not value >= least:
            raise ConfigError(f"--{name} is {value}, but must be >= {least}")
    if options.max_tokens >= options.context_length:
        raise ConfigError(
            f"--max_tokens is {options.max_tokens}, but must be < --context_length "
            f"({options.context_length})"
        )


def _system(options: ChatOptions) -> Messages:
    return [{"role": "system", "content": options.system}] if options.system else []


def _converse(model: Any, options: ChatOptions) -> None:
    """Questions and answers until Ctrl-D; earlier turns are part of the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys, and the questions before
    messages = _system(options)
    print("Ctrl-D ends the conversation.")
    while (question := _read_question()) is not None:
        if not question.strip():
            continue
        turn = [*messages, {"role": "user", "content": question.strip()}]
        try:
            turn = latest_turns(model, turn, options)
        except ConfigError as error:
            print(f"error: {error}")
            continue
        messages = [*turn, {"role": "assistant", "content": _print_answer(model, turn, options)}]
    print()


def _read_question() -> str | None:
    """One line, or several: see the module. None at the end of the input."""
    lines: list[str] = []
    try:
        line = input("> ")
        is_quoted = line.strip() == QUOTES
        if is_quoted:
            line = input(". ")
        while line.strip() != QUOTES if is_quoted else line.endswith("\\"):
            lines.append(line if is_quoted else line[:-1])
            line = input(". ")
    except EOFError:
        return "\n".join(lines) if lines else None
    return "\n".join(lines if is_quoted else [*lines, line])


def _print_answer(model: Any, messages: Messages, options: ChatOptions) -> str:
    """What was said, as far as it was, if Ctrl-C stops it in a conversation."""
    pieces = []
    try:
        for piece in stream_answer(model, messages, options):
            print(piece, end="", flush=True)
            pieces.append(piece)
    except KeyboardInterrupt:
        if options.prompt:
            raise
    print()
    return "".join(pieces)


if __name__ == "__main__":
    run_command(main)
