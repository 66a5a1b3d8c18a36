"""Prune a language model of transformers, and let what is left write.

python examples/language_model.py MODEL TEXT [SHARE] [TRIALS] [OUTPUT]: the name or folder of a causal language model, a
file of plain text, the share of the parameters that may stay, the number of candidates, and a folder for the result.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import autoprune
from autoprune.search_spaces import Channels, Depth, Product

LENGTH = 256  # tokens of a sample
EMBEDDING = "*embed*"  # stays as wide as it is, and with it the stream that all blocks read


def main(name: str, text: str, share: str = "80%", trials: str = "40", output: str = "pruned") -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(Path(text).read_text(), return_tensors="pt")["input_ids"][0]
    samples = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    data = [{"input_ids": batch} for batch in samples.split(8)]
    space = Product(Channels(ignore=[EMBEDDING]), Depth())
    result = autoprune.search(model, f"params <= {share}", data, space=space, trials=int(trials))
    print(result)
    written = autoprune.export(result.build(), output, {"input_ids": samples[:2]}, format="hf")
    print(f"\nin {written.path}: load it with autoprune.from_pretrained({str(written.path)!r})")
    small = autoprune.from_pretrained(output)
    prompt = samples[-1:, : LENGTH // 8]
    print(tokenizer.decode(small.generate(prompt, max_new_tokens=24, do_sample=False)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
