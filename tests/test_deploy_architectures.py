"""Every named family through the real converter and the real llama.cpp: tokens, chat, logits, rope, heads.

Models are random and tiny. Their tokenizers are SmolLM2's, or a SentencePiece one that is trained here and
saved as Transformers 5 saves it, without tokenizer.model, or the real ones of Llama 2, Llama 3, Phi-3 and
Qwen 2, whose vocabularies and templates llama.cpp's sources carry for its own tests.
"""

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.export_gguf import (
    check_architecture,
    complete_model_dir,
    export_gguf,
    gguf_name,
    known_architectures,
)
from deploy.gguf_model import GgufModel, open_gguf
from deploy.llama_cpp_source import download_sdist, runtime_version
from deploy.modelfile import ollama_template
from deploy.verify import STRINGS, check_template, check_tokens
from training.config import TrialConfig
from training.exceptions import GateError, ModelError
from training.model import load_tokenizer

LENGTH = 700
"""Tokens compared: beyond the original context of the scaled ropes and the sliding windows."""
MAX_KL = 2e-4
"""Nats a token, mean: f16 weights stay several times below; a wrong rope or window is far above."""
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
    "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Family:
    """One architecture: the settings that are its own, its tokenizer, and its chat template."""

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    sentencepiece: str = ""
    """Class in Transformers of a tokenizer that is trained here."""
    vocab: str = ""
    """A vocabulary among llama.cpp's sources; without one or the other it is SmolLM2's."""
    template: str = ""
    """A chat template, or the name of one among llama.cpp's sources."""
    tokens: tuple[str, ...] = ()
    """Special tokens beyond BOS and EOS."""
    takes_system: bool = True


FAMILIES = {
    "llama-3": Family("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "smollm2-tied": Family("LlamaConfig", {"tie_word_embeddings": True}),
    "smollm3": Family(
        # llama.cpp leaves every fourth layer without rope, as all published ones do.
        "SmolLM3Config",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4},
    ),
    "llama-3.2": Family(
        "LlamaConfig",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
        vocab="llama-bpe",
        template="meta-llama-Llama-3.2-3B-Instruct.jinja",
    ),
    "qwen2": Family("Qwen2Config", vocab="qwen2", template="Qwen-Qwen2.5-7B-Instruct.jinja"),
    "qwen3": Family(
        "Qwen3Config", {"head_dim": 32}, vocab="qwen2", template="Qwen-Qwen3-0.6B.jinja"
    ),
    "phi-3": Family(
        "Phi3Config",
        {"sliding_window": None},
        vocab="phi-3",
        template="microsoft-Phi-3.5-mini-instruct.jinja",
        tokens=PHI_TOKENS,
    ),
    "phi-2": Family(
        "PhiConfig",
        {"num_key_value_heads": 4, "intermediate_size": 512},
        vocab="gpt-2",
        template=PHI,
    ),
    # Phi-4 is a Phi-3 with a byte-level tokenizer; Qwen's stands for it.
    "phi-4": Family("Phi3Config", {"sliding_window": None}, vocab="qwen2", template=PHI),
    "llama-2": Family("LlamaConfig", {}, vocab="llama-spm", template=PLAIN),
    "mistral": Family("MistralConfig", {"sliding_window": None}, "LlamaTokenizer", template=PLAIN),
    "gemma-2": Family(
        "Gemma2Config",
        {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
        "GemmaTokenizer",
        template=GEMMA,
        tokens=("<start_of_turn>", "<end_of_turn>"),
        takes_system=False,
    ),
    "gemma-3": Family(
        "Gemma3TextConfig",
        {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
        "GemmaTokenizer",
        template=GEMMA,
        tokens=("<start_of_turn>", "<end_of_turn>"),
        takes_system=False,
    ),
}
FAST = ("llama-3", "gemma-2")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """llama.cpp's directory `models`, unpacked at the first call."""
    folder = tmp_path_factory.mktemp("sources")
    wanted = {family.vocab for family in FAMILIES.values() if family.vocab}
    files = {f"ggml-vocab-{name}.gguf" for name in wanted}
    files |= {family.template for family in FAMILIES.values() if ".jinja" in family.template}

    def unpack() -> Path:
        if not any(folder.iterdir()):
            with tarfile.open(download_sdist(runtime_version())) as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    name = Path(member.name).name
                    if name in files and content is not None:
                        (folder / name).write_bytes(content.read())
        return folder

    return unpack


@pytest.fixture(scope="module")
def build(
    tmp_path_factory: pytest.TempPathFactory, sources: Callable[[], Path]
) -> Callable[[str], tuple[Path, Path]]:
    """Directory and GGUF of a family, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            directory = _save(FAMILIES[name], root, sources)
            export_gguf(directory, root / "model.gguf", "tiny")
            made[name] = directory, root / "model.gguf"
        return made[name]

    return of


def _names() -> list[Any]:
    return [
        pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in FAMILIES
    ]


@pytest.mark.parametrize("name", _names())
def test_llama_cpp_runs_the_family_as_transformers_does(
    name: str, build: Callable[[str], tuple[Path, Path]]
) -> None:
    directory, path = build(name)
    family, tokenizer = FAMILIES[name], AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    with open_gguf(path, num_ctx=LENGTH + 8) as gguf:
        record = check_tokens(gguf, tokenizer, STRINGS)
        assert record["after_bos"] == (name in ("llama-2", "mistral"))
        assert record["composed"] == (family.vocab == "qwen2")
        check_template(gguf, tokenizer)
        assert gguf.eos_token_id == tokenizer.eos_token_id
        for chat in _chats(family):
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            assert gguf.chat_tokens(chat) == tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in family.tokens:
            assert gguf.tokenize(token, add_special=False) == [
                tokenizer.convert_tokens_to_ids(token)
            ]
        generator = np.random.default_rng(0)
        ids = [
            tokenizer.bos_token_id or 0,
            *generator.integers(300, len(tokenizer) - 10, LENGTH - 1).tolist(),
        ]
        kl_T = _divergence(model, gguf, ids)

    assert kl_T[:64].mean() < MAX_KL
    assert kl_T[-64:].mean() < MAX_KL


def test_a_byte_level_tokenizer_keeps_its_own_splitting(tmp_path: Path) -> None:
    model = tmp_path / "model"
    _byte_level().save_pretrained(model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    pieces = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated"}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{**pieces, "invert": False}, {**bytes_, "use_regex": False}],
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )

    (tmp_path / "completed").mkdir()
    completed: Any = AutoTokenizer.from_pretrained(
        complete_model_dir(model, tmp_path / "completed")
    )

    seen = json.loads(completed.backend_tokenizer.to_str())["pre_tokenizer"]
    assert seen["pretokenizers"][0]["pattern"] == pieces["pattern"]


def test_composed_letters_are_compared_where_the_tokenizer_composes(
    build: Callable[[str], tuple[Path, Path]],
) -> None:
    _, path = build("llama-3")
    tokenizer = _byte_level()
    decomposed = "e\u0301"

    with open_gguf(path, num_ctx=64) as gguf:
        assert not check_tokens(gguf, tokenizer, [decomposed])["composed"]
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        assert gguf.tokenize(decomposed, add_special=False) != tokenizer(decomposed)["input_ids"]
        assert check_tokens(gguf, tokenizer, [decomposed])["composed"]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Lowercase()]
        )
        with pytest.raises(GateError, match="the tokenizer differs from Transformers' on 'Éa'"):
            check_tokens(gguf, tokenizer, ["É" + "a"])


def test_the_name_in_the_file_tells_llama_cpp_of_a_phi_3(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    tokenizer = {"model": {"type": "BPE", "byte_fallback": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert gguf_name(tmp_path, "mine") == "mine (Phi-3)"
    assert gguf_name(tmp_path, "Phi-3.5-mini-mine") == "Phi-3.5-mini-mine"

    # Phi-4's special tokens swallow nothing.
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    assert gguf_name(tmp_path, "mine") == "mine"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert gguf_name(tmp_path, "mine") == "mine"


def test_an_unknown_architecture_is_named_before_the_work(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_model_dir)
    config.architectures = ["NewForCausalLM"]
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()

    with pytest.raises(ModelError, match="its architecture is NewForCausalLM, but must be one"):
        check_architecture(TrialConfig(model_name_or_path=str(tmp_path)))
    check_architecture(TrialConfig(model_name_or_path=str(tiny_model_dir)))


def test_the_converter_knows_every_named_family() -> None:
    assert known_architectures() >= {
        f"{name}ForCausalLM"
        for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3", "Phi3")
    }


def test_ollama_gets_each_families_turns(tmp_path: Path) -> None:
    gemma = _sentencepiece(FAMILIES["gemma-2"], tmp_path)
    plain = _sentencepiece(FAMILIES["mistral"], tmp_path)
    phi = _sentencepiece(
        Family("Phi3Config", {}, "LlamaTokenizer", template=PHI, tokens=PHI_TOKENS), tmp_path
    )

    assert ollama_template(phi) == (
        "{{ if .System }}<|system|>\n{{ .System }}<|end|>\n{{ end }}"
        "<|user|>\n{{ .Prompt }}<|end|>\n<|assistant|>\n{{ .Response }}<|end|>\n",
        "",
    )
    found = ollama_template(plain)
    assert found is not None
    assert found[0].startswith("{{ if .System }}[system]{{ .System }}</s>{{ end }}[user]")
    # A template that refuses a system prompt is left to the GGUF's own.
    assert ollama_template(gemma) is None


def _chats(family: Family) -> list[list[dict[str, str]]]:
    turns = [
        {"role": "user", "content": "What is 2 + 2?\n\n  Say  only the number. 日本 🏳️‍🌈"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And `x = [1, 2]`?"},
    ]
    chats = [turns[:1], turns]
    if family.takes_system:
        chats.append([{"role": "system", "content": "You are terse."}, *turns])
    return chats


def _divergence(model: Any, gguf: GgufModel, ids: list[int]) -> np.ndarray:
    """KL divergence of llama.cpp's next-token distribution from Transformers', by position."""
    rows: dict[int, np.ndarray] = {}

    def keep(_: str, first: int, logits_SV: np.ndarray) -> None:
        rows.update({first + n: row.copy() for n, row in enumerate(logits_SV)})

    example = {"example_id": "a", "input_ids": ids, "labels": ids}
    gguf.example_losses([example], look=keep)
    with torch.inference_mode():
        expected_TV = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    found_TV = torch.from_numpy(np.stack([rows[n] for n in sorted(rows)])).double()
    found_TV = found_TV[:, : expected_TV.shape[1]].log_softmax(-1)
    return (expected_TV.exp() * (expected_TV - found_TV)).sum(-1).numpy()


def _save(family: Family, root: Path, sources: Callable[[], Path]) -> Path:
    directory = root / "model"
    if family.vocab:
        tokenizer = _published(family, root, sources())
    else:
        tokenizer = _sentencepiece(family, root) if family.sentencepiece else _byte_level()
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.1,
            "tie_word_embeddings": "Gemma" in family.config,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **family.settings,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert not (directory / "tokenizer.model").exists()
    return directory


def _byte_level() -> Any:
    return load_tokenizer(TrialConfig())


def _published(family: Family, root: Path, sources: Path) -> Any:
    """The tokenizer of a vocabulary as its model is published with."""
    folder = root / "published"
    name = f"ggml-vocab-{family.vocab}.gguf"
    loaded: Any = AutoTokenizer.from_pretrained(sources, gguf_file=name)
    loaded.save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    if family.vocab == "llama-bpe":
        tokenizer["model"]["ignore_merges"] = True
    if family.vocab == "phi-3":
        for token in tokenizer["added_tokens"]:
            token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    transformers.LlamaConfig().save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    template = sources / family.template
    is_name = family.template.endswith(".jinja")
    loaded.chat_template = template.read_text("utf-8") if is_name else family.template
    return loaded


def _sentencepiece(family: Family, root: Path) -> Any:
    """A tokenizer of 900 pieces from this project's README."""
    folder = root / f"spm-{family.sentencepiece}-{len(family.tokens)}"
    folder.mkdir()
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([line for line in readme.splitlines() if line.strip()]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=family.sentencepiece != "GemmaTokenizer",
        control_symbols=list(family.tokens),
        pad_id=3,
        minloglevel=2,
    )
    transformers.LlamaConfig(vocab_size=900).save_pretrained(folder)
    tokenizer_class = getattr(transformers, family.sentencepiece)
    tokenizer = tokenizer_class.from_pretrained(
        folder,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        add_bos_token=True,
        legacy=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    tokenizer.chat_template = family.template
    return tokenizer
