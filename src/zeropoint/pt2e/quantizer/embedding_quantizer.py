"""As in ``torchao.quantization.pt2e.quantizer.embedding_quantizer``."""

from zeropoint.annotate.embedding_quantizer import EmbeddingQuantizer, get_embedding_operators_config

__all__ = ["EmbeddingQuantizer", "get_embedding_operators_config"]
