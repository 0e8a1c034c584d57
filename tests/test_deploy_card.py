"""The model card and the Modelfile."""

import pytest
import yaml
from deploy_sweep import promoted
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from deploy.card import fallback_note
from deploy.modelfile import ollama_template, write_modelfile
from training.paths import PromotionPaths, SweepPaths, read_json

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture
def version(tmp_path_factory: pytest.TempPathFactory) -> PromotionPaths:
    """The promoted version, shared: not to be changed."""
    return promoted(tmp_path_factory.getbasetemp())


def test_the_card_tells_losses_sizes_data_settings_and_the_sweep(version: PromotionPaths) -> None:
    card = version.card.read_text("utf-8")
    result = read_json(SweepPaths(version.root.parent.parent).trial(0).result)

    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["tags"] == ["lora", "gguf", "llama.cpp", "loraloom"]
    assert "base_model" not in yaml.safe_load(front)  # A local directory is no hub id.
    assert f"| test | {result['base_test/loss']:.4f} | {result['test/loss']:.4f} |" in body
    assert "| tiny-Q4_K_M.gguf | Q4_K_M | 12.8 | −7" in body
    assert f"hash `{result['test_hash']}`" in body
    assert "| 0 | baseline (this model) | 0.01 | complete | 60 |" in body
    assert "| `lora_r` | 16 |" in body
    assert "does not divide" not in body


def test_the_card_has_the_measured_table_the_recommendation_and_the_picture(
    version: PromotionPaths,
) -> None:
    card = version.card.read_text("utf-8")
    found = read_json(version.verification)["quantization"]

    section = card.split("## Quantisation\n")[1].split("\n## ")[0]
    assert f"**recommended: {found['recommended']}: {found['reason']}.**" in section
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    assert lines[0].startswith(
        "| type | MB | bits/weight | KL | KL 99 % | same top-1 | perplexity |"
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| Q4_K_M", "| F16"]  # by size
    numbers = found["types"]["Q4_K_M"]
    perplexity = numbers["perplexity"]
    assert (
        f"| {numbers['kl_divergence']['estimate']:.2g} "
        f"| {numbers['kl_divergence_99th_percentile']:.2g} | {numbers['top_1_agreement']:.1%} "
        f"| {perplexity['estimate']:.3f} [{perplexity['low']:.3f}, {perplexity['high']:.3f}] "
        f"| {numbers['tokens_per_s']['generation']:.0f} "
    ) in lines[2]
    assert f"at {found['num_positions']:,} supervised positions" in section
    assert "![KL divergence against file size](quantization.png)" in section


def test_the_card_explains_fallback_types_where_rows_do_not_divide_by_256() -> None:
    note = fallback_note(576, ["Q4_K_M", "F16"])

    assert "576, does not divide by 256" in note
    assert "Q4_K_M 4.9" in note
    assert fallback_note(576, ["Q8_0", "F16", "BF16"]) == fallback_note(2048, ["Q4_K_M"]) == ""


def test_the_modelfile_names_the_gguf_and_the_end_token(version: PromotionPaths) -> None:
    text = version.modelfile.read_text("utf-8")

    assert text.startswith("FROM ./tiny-Q4_K_M.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM' in text


@pytest.mark.parametrize("template", [None, LLAMA_3])
def test_the_derived_template_renders_what_transformers_renders(
    version: PromotionPaths, template: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(version.merged)
    if template:
        # As Llama 3 does: the template and the tokenizer both put a BOS in front; Ollama adds one itself.
        tokenizer.chat_template = template
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    derived = ollama_template(tokenizer)
    assert derived is not None
    go, default_system = derived

    for system in ("Be brief.", ""):
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
        expected = expected.removeprefix("<|im_start|>") if template else expected
        assert _go(go, system or default_system, "Hi?", "Yes.") == expected


def test_a_template_that_cannot_be_derived_is_left_out(version: PromotionPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(version.merged)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"

    assert write_modelfile("x.gguf", tokenizer, ["</s>"]) == (
        'FROM ./x.gguf\nPARAMETER stop "</s>"\n'
    )


def _go(template: str, system: str, prompt: str, response: str) -> str:
    """What Ollama makes of such a template: one condition, three values."""
    if "{{ if .System }}" in template:
        inside, after = template.removeprefix("{{ if .System }}").split("{{ end }}")
        template = inside + after if system else after
    for name, value in (("System", system), ("Prompt", prompt), ("Response", response)):
        template = template.replace("{{ ." + name + " }}", value)
    return template


def test_a_template_that_says_what_day_it_is_goes_into_no_modelfile() -> None:
    class Tokenizer:
        chat_template = "{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}"

    assert ollama_template(Tokenizer()) is None
