"""Text to calibrate on and to judge by, all of it from the test data of gensim, in sequences of equal length."""

from __future__ import annotations

import bz2
import importlib
import re
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.pretrained import folder_of

LENGTH = 256
CALIBRATION = 64  # sequences that every method may use, 16,384 tokens
HELD_OUT = 19  # sequences of each kind, 4,864 tokens: the Lee documents hold no more
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
ARTICLE = 4_000  # characters at least; shorter pages are lists and redirections
EACH = 1_600  # characters taken of an article, so that there are many


def calibration(tokenizer: Any, seed: int) -> Tensor:
    """Sequences of the Lee background corpus, drawn without replacement, int64, shape (64, 256)."""
    whole = in_sequences(tokenizer, news("lee_background.cor"))
    drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    return whole[drawn]


def held_out(tokenizer: Any) -> dict[str, Tensor]:
    """Sequences that no method sees: news like the calibration text, and encyclopedia articles, each (19, 256)."""
    texts = {"news": news("lee.cor"), "wikipedia": articles()}
    return {kind: in_sequences(tokenizer, text)[:HELD_OUT] for kind, text in texts.items()}


def in_sequences(tokenizer: Any, text: str) -> Tensor:
    """All tokens of a text but the last few, int64, shape (n, LENGTH)."""
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def news(corpus: str) -> str:
    text = (folder_of("gensim") / "test" / "test_data" / corpus).read_text(encoding="utf-8", errors="replace")
    return "\n".join(line for line in text.splitlines() if line.strip())


def articles() -> str:
    """The openings of the first long articles of a shortened Wikipedia, without markup."""
    library = importlib.import_module("gensim.corpora.wikicorpus")
    found: list[str] = []
    with bz2.open(folder_of("gensim") / "test" / "test_data" / WIKIPEDIA) as file:
        for _, raw, _ in library.extract_pages(file, filter_namespaces=("0",)):
            plain = re.sub(r"\s*\n\s*", "\n", re.sub(r"\([\s,;]*\)|'{2,}", "", library.filter_wiki(raw))).strip()
            if len(plain) >= ARTICLE:
                found.append(plain[:EACH])
            if len(found) == 2 * HELD_OUT:
                break
    return "\n".join(found)
