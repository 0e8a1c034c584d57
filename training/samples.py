"""Answers of a trial to the fixed prompts of its sweep, kept beside its evaluations: a look, not a measure.

The prompts are the first validation examples up to their last answer, so they are the same in all trials of
the same data. Answers are greedy, of the base model with the trial's adapter as PEFT itself computes it; a
trial's training neither knows nor feels that it was sampled.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from training.chat import IGNORE
from training.config import TrialConfig
from training.data import content_hash
from training.exceptions import ModelError
from training.formats import PLAIN_TEXT, Messages, to_messages
from training.job import Job
from training.model import end_token_ids, resolve_model
from training.paths import write_json
from training.prepared import Prepared
from training.sources import iter_records

MAX_NEW_TOKENS = 64
PLAIN_PROMPT = 32
"""Most first tokens of a plain text that are its prompt; the model goes on from there."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    text: str
    """The user's last message, or the beginning of a plain text."""
    ids: list[int]
    """All that the model reads: the conversation up to where its answer begins."""


class Sampler:
    """Samples the trials of one process.

    Args:
        num_samples: prompts; fewer where the validation split is smaller.
        say: prints a line.
    """

    def __init__(self, num_samples: int, say: Callable[[str], None]):
        self.num_samples, self.say = num_samples, say
        self.known: dict[tuple[str, str], tuple[list[Prompt], dict[str, Any]]] = {}
        """Prompts and the base model's answers, by base model and data."""

    def write(
        self, job: Job, prepared: Prepared, step: int, opened: AbstractContextManager[PeftModel]
    ) -> None:
        """Writes the trial's answers at `step`, and the base model's. A fault is told in a line: no trial
        fails for its samples.

        Args:
            job: the trial.
            prepared: its data and tokenizer.
            step: where it stands.
            opened: gives the base model with the trial's adapter, and takes it back.
        """
        try:
            with opened as model, _eval_mode(model), torch.no_grad():
                prompts, base = self._known(job.config, prepared, model)
                answers = _answers(model, prompts, job.config, prepared.tokenizer, step)
            write_json(job.paths.sample(0), base)
            write_json(job.paths.sample(step), answers)
        except Exception as error:  # noqa: BLE001 - whatever it is, the trial goes on
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            self.say(f"  {job.label or job.name}: no samples at step {step}: {reason}")
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()

    def _known(
        self, config: TrialConfig, prepared: Prepared, model: PeftModel
    ) -> tuple[list[Prompt], dict[str, Any]]:
        key = (prepared.model_key, prepared.data_key)
        if key not in self.known:
            prompts = read_prompts(config, prepared, self.num_samples)
            with model.disable_adapter():
                base = _answers(model, prompts, config, prepared.tokenizer, 0)
            self.known[key] = prompts, base
        return self.known[key]


def read_prompts(config: TrialConfig, prepared: Prepared, num: int) -> list[Prompt]:
    """The first `num` validation examples that leave room for an answer, each up to its last answer.

    Raises:
        ModelError: there is none.
    """
    limit = getattr(
        prepared.model.config.get_text_config(), "max_position_embeddings", None
    ) or float("inf")
    validation, ids = prepared.validation, prepared.validation.ids
    messages = _messages_of(config, set(ids))
    prompts = []
    for index in range(len(validation)):
        if len(prompts) == num:
            break
        tokens, labels = validation[index]
        prompt = _prompt(tokens, labels, messages.get(ids[index]), prepared.tokenizer)
        if 0 < len(prompt.ids) <= limit - MAX_NEW_TOKENS:
            prompts.append(prompt)
    if not prompts:
        raise ModelError(
            f"no validation example leaves room for {MAX_NEW_TOKENS} tokens in {limit} positions"
        )
    return prompts


def _messages_of(config: TrialConfig, example_ids: set[str]) -> dict[str, Messages]:
    """The conversations behind these examples, read from the data set again: examples are tokens only."""
    found: dict[str, Messages] = {}
    for where, record in iter_records(config):
        messages = to_messages(record, where)
        example_id = content_hash(messages)[:16]
        if example_id in example_ids:
            found[example_id] = messages
            if len(found) == len(example_ids):
                break
    return found


def _prompt(
    tokens: np.ndarray,
    labels: np.ndarray,
    messages: Messages | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompt:
    if messages is None or messages[0]["role"] == PLAIN_TEXT:
        ids = tokens[: min(PLAIN_PROMPT, len(tokens) // 2)].tolist()
        return Prompt(_text(tokenizer, ids), ids)
    # What is supervised is what the assistant says, turn after turn; `max_length` may have cut some off.
    supervised = np.flatnonzero(labels != IGNORE)
    starts = supervised[np.diff(supervised, prepend=-2) > 1]
    ids = tokens[: starts[-1]].tolist()
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    asked = [m["content"] for m in messages[: turns[len(starts) - 1]] if m["role"] == "user"]
    return Prompt(asked[-1] if asked else _text(tokenizer, ids), ids)


def _answers(
    model: PeftModel,
    prompts: list[Prompt],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
) -> dict[str, Any]:
    """The file's content."""
    ends = end_token_ids(tokenizer, resolve_model(config))
    samples = []
    for prompt, ids in zip(prompts, generate(model, prompts, ends), strict=True):
        sample = {
            "prompt": prompt.text,
            "response": _text(tokenizer, ids),
            "num_tokens": len(ids),
            "ended": bool(ids) and ids[-1] in ends,
        }
        samples.append(sample)
    return {"step": step, "max_new_tokens": MAX_NEW_TOKENS, "samples": samples}


def generate(model: PeftModel, prompts: list[Prompt], end_ids: set[int]) -> list[list[int]]:
    """Greedy answers, an end token included where one was said; all prompts in one batch."""
    longest = max(len(prompt.ids) for prompt in prompts)
    pad = min(end_ids)  # masked before a prompt, cut off behind an answer
    ids_ST = torch.full((len(prompts), longest), pad)
    mask_ST = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_ST[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask_ST[row, longest - len(prompt.ids) :] = 1
    # All that the model's own generation config may set otherwise is said, or it would not be greedy.
    settings = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=sorted(end_ids),
        pad_token_id=pad,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        use_cache=True,
    )
    said_ST = model.generate(
        input_ids=ids_ST.to(model.device),
        attention_mask=mask_ST.to(model.device),
        generation_config=settings,
    )[:, longest:]
    return [_up_to_end(row, end_ids) for row in said_ST.tolist()]


def _up_to_end(ids: list[int], end_ids: set[int]) -> list[int]:
    place = next((n for n, index in enumerate(ids) if index in end_ids), len(ids))
    return ids[: place + 1]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Module by module: the base model may be in another mode than what PEFT has put around it."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True
