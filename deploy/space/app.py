"""A chat with a GGUF on a CPU, its base model beside it: a Hugging Face Space, or a page on this machine.

On a Space, `space.json` or the environment names the files of a model repo. Here, `python app.py DIRECTORY`
takes a promoted version and listens on 127.0.0.1. Chat template and end token are the GGUF's own. The base
is a GGUF of its own, or the tuned model with its adapter applied at scale -1, which takes it off again.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import llama_cpp

CONTEXT_LENGTH = int(os.environ.get("CONTEXT_LENGTH", "4096"))
NAMES = {
    "title": "TITLE",
    "model_repo": "MODEL_REPO",
    "model_file": "MODEL_FILE",
    "adapter_file": "ADAPTER_FILE",
    "base_file": "BASE_FILE",
}
"""Keys of space.json, and the environment variables that overrule them."""

Messages = list[dict[str, str]]


@dataclass
class Files:
    """What to load; without `adapter` and `base` the tuned model is alone."""

    title: str
    model: Path
    adapter: Path | None = None
    base: Path | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", help="a promoted version; none: see space.json")
    parser.add_argument("--port", type=int, help="port on 127.0.0.1; none is the first free one")
    options = parser.parse_args()
    if options.directory:
        files = local_files(Path(options.directory))
        page(files).launch(server_name="127.0.0.1", server_port=options.port, footer_links=[])
    else:
        page(hub_files(Path(__file__).parent / "space.json")).launch(footer_links=[])


def local_files(directory: Path) -> Files:
    """Files of a promoted version, or of a sweep's current one."""
    current = directory / "promoted" / "current"
    if current.is_file():
        directory = current.parent / current.read_text("utf-8").strip()
    if not (directory / "manifest.json").is_file():
        raise SystemExit(f"{directory} holds no manifest.json, so it is no promoted version")
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    adapter = directory / "adapter.gguf"
    return Files(
        manifest["name"],
        directory / next(iter(manifest["ggufs"].values())),
        adapter=adapter if adapter.is_file() else None,
    )


def hub_files(config: Path) -> Files:
    """The files that space.json and the environment name, downloaded once."""
    from huggingface_hub import hf_hub_download

    settings = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    settings |= {key: os.environ[name] for key, name in NAMES.items() if name in os.environ}
    missing = [NAMES[key] for key in ("model_repo", "model_file") if not settings.get(key)]
    if missing:
        raise SystemExit(f"{config.name} and the environment lack {' and '.join(missing)}")

    def download(key: str) -> Path | None:
        name = settings.get(key)
        return Path(hf_hub_download(settings["model_repo"], name)) if name else None

    model = download("model_file")
    assert model is not None
    title = settings.get("title") or settings["model_repo"]
    return Files(title, model, download("adapter_file"), download("base_file"))


def load(files: Files) -> dict[str, llama_cpp.Llama]:
    """The models by the name of their column."""
    models = {}
    if files.base is not None:
        models["Base"] = _open(files.base)
    elif files.adapter is not None:
        models["Base"] = _open(files.model, lora_path=str(files.adapter), lora_scale=-1.0)
    models["Tuned"] = _open(files.model)
    return models


def answers(
    models: dict[str, llama_cpp.Llama],
    chats: list[Messages],
    system: str,
    max_tokens: int,
    temperature: float,
) -> Iterator[list[Messages]]:
    """The chats as their answers grow, a token of each model in turn: they share the cores."""
    chats = [[*chat, {"role": "assistant", "content": ""}] for chat in chats]
    streams = [
        _stream(model, chat[:-1], system, int(max_tokens), temperature)
        for model, chat in zip(models.values(), chats, strict=True)
    ]
    running = list(zip(streams, chats, strict=True))
    while running:
        for stream, chat in list(running):
            piece = next(stream, None)
            if piece is None:
                running.remove((stream, chat))
            else:
                chat[-1]["content"] += piece
                yield chats
    yield chats


def page(files: Files) -> gr.Blocks:
    """The page, its models loaded."""
    models = load(files)
    with gr.Blocks(title=files.title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {files.title}\n`{files.model.name}` on a CPU, through llama.cpp")
        with gr.Row():
            chats = [
                gr.Chatbot(label=name, elem_id=name.lower(), height=380, buttons=["copy"])
                for name in models
            ]
        prompt = gr.Textbox(label="Prompt", placeholder="Ask something; Enter sends it", lines=1)
        with gr.Row():
            send = gr.Button("Send", variant="primary")
            stop = gr.Button("Stop")
            clear = gr.Button("Clear")
        with gr.Accordion("Settings", open=False):
            system = gr.Textbox(label="System prompt (empty: the model's own)", lines=2, value="")
            max_tokens = gr.Slider(16, 1024, value=200, step=1, label="Longest answer in tokens")
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: most likely)")

        def ask(question: str, *histories: Any) -> tuple[Any, ...]:
            if not question.strip():
                return (question, gr.skip(), *histories)
            turn = {"role": "user", "content": question.strip()}
            closed = gr.update(interactive=False)  # a second question meanwhile would get lost
            return (
                gr.update(value="", interactive=False),
                closed,
                *([*_plain(history), turn] for history in histories),
            )

        def reopen() -> tuple[Any, Any]:
            return gr.update(interactive=True), gr.update(interactive=True)

        def answer(
            system: str, max_tokens: int, temperature: float, *histories: Any
        ) -> Iterator[Any]:
            plain = [_plain(history) for history in histories]
            if not plain[0] or plain[0][-1]["role"] != "user":
                yield tuple(plain) if len(plain) > 1 else plain[0]
                return
            for grown in answers(models, plain, system or "", max_tokens, temperature):
                yield tuple(grown) if len(grown) > 1 else grown[0]

        running: Any = [
            event(
                ask, [prompt, *chats], [prompt, send, *chats], queue=False, api_visibility="private"
            ).then(
                answer,
                [system, max_tokens, temperature, *chats],
                chats,
                # llama.cpp's contexts take one conversation at a time.
                concurrency_id="llama.cpp",
                concurrency_limit=1,
                api_visibility="private",
            )
            for event in (prompt.submit, send.click)
        ]
        inputs: Any = [prompt, send]
        for event in running:
            event.then(reopen, None, inputs, api_visibility="private")
        stop.click(reopen, None, inputs, cancels=running, api_visibility="private")
        clear.click(
            lambda: (*reopen(), *([] for _ in chats)),
            None,
            [*inputs, *chats],
            cancels=running,
            api_visibility="private",
        )
    return blocks


def _open(path: Path, **adapter: Any) -> llama_cpp.Llama:
    cores = len(os.sched_getaffinity(0))
    return llama_cpp.Llama(
        str(path),
        n_ctx=CONTEXT_LENGTH,
        n_threads=cores,
        n_threads_batch=cores,
        chat_format="chat_template.default",  # the GGUF's own, and no guess
        verbose=False,
        **adapter,
    )


def _stream(
    model: llama_cpp.Llama, messages: Messages, system: str, max_tokens: int, temperature: float
) -> Iterator[str]:
    """Pieces of an answer; the oldest turns go when the context is full."""
    head = [{"role": "system", "content": system.strip()}] if system.strip() else []
    while True:
        chunks: Any = model.create_chat_completion(
            [*head, *messages],  # pyright: ignore[reportArgumentType]
            max_tokens=max_tokens,
            temperature=temperature,
            stream=True,
        )
        try:
            for chunk in chunks:
                piece = chunk["choices"][0]["delta"].get("content")
                if piece:
                    yield piece
            return
        except ValueError:  # "Requested tokens exceed context window", before the first piece
            if len(messages) == 1:
                yield "(The prompt is longer than the model's context.)"
                return
            messages = messages[2:]


def _plain(history: Any) -> Messages:
    """Roles and texts of what the chat component holds."""
    return [{"role": turn["role"], "content": _text(turn["content"])} for turn in history or []]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


if __name__ == "__main__":
    main()
