"""The example of a language model runs from a folder of transformers to text of the pruned model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "language_model.py"
WORDS = [f"word{i}" for i in range(60)]


@pytest.mark.slow
def test_it_prunes_saves_loads_and_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=3, max_position_embeddings=512, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    drawn = torch.randint(0, len(WORDS), (40 * 256,)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(WORDS[i] for i in drawn))
    command = [sys.executable, str(EXAMPLE), "model", "text.txt", "70%", "6", "small"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "perplexity" in ended.stdout
    assert ended.stdout.count("word") > 30
    whole, small = (
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("model", "small")
    )
    assert small < 0.8 * whole
