"""Messages -> token ids and labels, with labels only on what the assistant says.

The conversation is rendered with the model's own chat template and tokenised whole, once; characters of
assistant turns, their end token included, become labels. So the ids are what inference sees, and the
model learns to stop. Plain text (`training.formats.PLAIN_TEXT`) is trained whole, without a template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from training.exceptions import DataError
from training.formats import PLAIN_TEXT, Messages

IGNORE = -100
"""Label of a token that is not supervised, as in PyTorch's cross-entropy."""

_DATE = datetime(2024, 7, 26)  # the day that Llama 3's template takes where it can ask for none
_DIRECTIVES = "A a B b d -d H I j M m -m p S Y y".split()

# Templates such as Llama 3.2's and gpt-oss's write today's date: the same data would have other tokens,
# and another hash, every day, and no sweep could be promoted tomorrow. Transformers gives a template
# texts only, never a function of ours, so the fixed date is a macro in front of the template, which
# hides the function of that name. Its line break is the one that `trim_blocks` takes away.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{code}', '{_DATE.strftime('%' + code)}')" for code in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the characters of it that are supervised."""

    text: str
    spans: list[Span]
    """`[start, end)` in characters, in order."""
    is_plain: bool


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template.

    Args:
        end_tokens: tokens that end an answer (`training.model.end_token_ids`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[str]):
        self.tokenizer = tokenizer
        self.end_tokens = list(end_tokens)
        self.template: str | None = None
        """None is the tokenizer's own."""

    def render(self, messages: Messages, where: str) -> Rendered:
        """Text and supervised spans.

        Raises:
            DataError: there is no template, it refuses the messages, or the text of a turn changes
                with the turns after it, so that what the assistant says cannot be told apart.
        """
        if messages[0]["role"] == PLAIN_TEXT:
            text = messages[0]["content"] + str(self.tokenizer.eos_token)
            return Rendered(text, [(0, len(text))], is_plain=True)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{where}: is a conversation, but {self.tokenizer.name_or_path} has no chat template"
            )
        rendered = self._render_turns(messages, where)
        if rendered is None and self.template is None:
            self.template = self._training_template(where)
            rendered = self._render_turns(messages, where)
        if rendered is None:
            raise DataError(f"{where}: {self._changing_template()}")
        return rendered

    def _render_turns(self, messages: Messages, where: str) -> Rendered | None:
        """None if an earlier turn's text depends on what follows it."""
        text = self._apply(messages, where)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:index], where, add_generation_prompt=True)
            after = self._apply(messages[: index + 1], where)
            if not (after.startswith(before) and text.startswith(after)):
                return None
            end = self._end_of_answer(text, len(before), len(after))
            if end is None and index == len(messages) - 1:
                # A template that does not end an answer would never teach the model to stop.
                text = text[: len(after)].rstrip() + str(self.tokenizer.eos_token)
                end = len(text)
            spans.append((len(before), len(after) if end is None else end))
        return Rendered(text, spans, is_plain=False)

    def _end_of_answer(self, text: str, start: int, end: int) -> int | None:
        """Where the turn's last end token ends: what the template writes after it is not said."""
        places = [text.rfind(token, start, end) for token in self.end_tokens]
        ends = [
            place + len(token)
            for place, token in zip(places, self.end_tokens, strict=True)
            if place >= 0
        ]
        return max(ends, default=None)

    def _apply(self, messages: Messages, where: str, *, add_generation_prompt: bool = False) -> str:
        try:
            template = self.tokenizer.get_chat_template(self.template)
            if "strftime_now" in template:
                template = _FIXED_DATE + template
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise DataError(
                f"{where}: the chat template of {self.tokenizer.name_or_path} refuses these "
                f"messages: {str(error).splitlines()[0]}"
            ) from error
        assert isinstance(text, str)
        return text

    def _training_template(self, where: str) -> str:
        """TRL's variant of a well-known template, in which a turn does not depend on later ones."""
        from trl.chat_template_utils import get_training_chat_template  # seconds to import

        try:
            template = get_training_chat_template(self.tokenizer)
        except ValueError:
            template = None
        if template is None:
            raise DataError(f"{where}: {self._changing_template()}")
        return template

    def _changing_template(self) -> str:
        return (
            f"the chat template of {self.tokenizer.name_or_path} writes a turn differently once "
            "others follow, so the assistant's words cannot be told from the rest; "
            "use one-answer conversations, or a model with another template"
        )


def tokenize(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Rendered]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`(input_ids, labels)` of each conversation, both int32 [T], not yet cut to `max_length`.

    A token that lies only partly in a supervised span is supervised if it begins there.
    """
    examples: list[Any] = [None] * len(batch)
    # A template writes its own special tokens (BOS among them); plain text has the tokenizer's.
    for is_plain in (False, True):
        indices = [n for n, item in enumerate(batch) if item.is_plain == is_plain]
        if not indices:
            continue
        encoded = tokenizer(
            [batch[n].text for n in indices],
            add_special_tokens=is_plain,
            return_offsets_mapping=True,
            verbose=False,
        )
        for row, n in enumerate(indices):
            ids = np.asarray(encoded["input_ids"][row], dtype=np.int32)
            offsets = np.asarray(encoded["offset_mapping"][row], dtype=np.int64).reshape(-1, 2)
            if is_plain:
                ids, offsets = _end_once(ids, offsets, tokenizer.eos_token_id)
            examples[n] = (ids, _labels(ids, offsets, batch[n].spans))
    return examples


def _end_once(ids: np.ndarray, offsets: np.ndarray, eos: Any) -> tuple[np.ndarray, np.ndarray]:
    """Without the second end token of a tokenizer that adds one itself."""
    if len(ids) > 1 and ids[-1] == eos and ids[-2] == eos:
        return ids[:-1], offsets[:-1]
    return ids, offsets


def _labels(ids: np.ndarray, offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    labels = np.full_like(ids, IGNORE)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for start, end in spans:
        # Tokens without characters (an added BOS) have an empty offset and stay unsupervised.
        inside = (starts >= start) & (starts < end) & (ends > starts)
        labels[inside] = ids[inside]
    return labels
