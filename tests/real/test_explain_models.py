"""``explain`` accounts for every operator that torch.export wrote: the zoo, and architectures of transformers."""

from __future__ import annotations

import operator
import warnings

import pytest
import torch
from torch.fx import GraphModule

import zeropoint as zp
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_default_quantization_config
from zoo import architectures, crepe, efficientnet_lite0, minilm, silero_vad, waifu2x

IDS = torch.arange(1, 9).reshape(1, 8)
PICTURE = torch.rand(1, 3, 32, 32)
SOUND = torch.rand(1, 2000)
CONVOLUTIONS = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
SEEING = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
TRANSFORMERS = {
    "bert": (SMALL, IDS),
    "roberta": (SMALL, IDS),
    "electra": ({**SMALL, "embedding_size": 16}, IDS),
    "albert": ({**SMALL, "embedding_size": 8}, IDS),
    "distilbert": ({"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}, IDS),
    "gpt2": ({"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "use_cache": False}, IDS),
    "gpt_neox": ({**SMALL, "use_cache": False}, IDS),
    "opt": ({**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16, "use_cache": False, "pad_token_id": 0}, IDS),
    "llama": ({**SMALL, "use_cache": False}, IDS),
    "mistral": ({**SMALL, "num_key_value_heads": 1, "use_cache": False}, IDS),
    "qwen2": ({**SMALL, "num_key_value_heads": 1, "use_cache": False}, IDS),
    "gemma": ({**SMALL, "num_key_value_heads": 1, "head_dim": 8, "use_cache": False, "pad_token_id": 0}, IDS),
    "phi": ({**SMALL, "use_cache": False}, IDS),
    "vit": (SEEING, PICTURE),
    "deit": (SEEING, PICTURE),
    "dinov2": (SEEING, PICTURE),
    "convnext": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, PICTURE),
    "resnet": ({**STAGES, "embedding_size": 8, "layer_type": "basic"}, PICTURE),
    "mobilenet_v2": ({"depth_multiplier": 0.25, "image_size": 32}, PICTURE),
    "segformer": ({"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}, PICTURE),
    "swin": ({"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 4}, PICTURE),
    "wav2vec2": (
        {**SMALL, **CONVOLUTIONS, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}, SOUND,
    ),
}  # fmt: skip
ZOO = {
    "resnet18": lambda: architectures.resnet18(size=64),
    "mobilenet_v2": lambda: architectures.mobilenet_v2(size=64),
    "crepe": crepe.load,
    "efficientnet_lite0": lambda: efficientnet_lite0.load(1),
    "minilm": minilm.load,
    "silero_vad": silero_vad.load,
    "waifu2x": lambda: waifu2x.load(1),
}


def quantizer() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_default_quantization_config())


def of_transformers(name: str) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        settings, x = TRANSFORMERS[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **settings)).eval()
        return torch.export.export(model, (x,)).module()


def computing(model: GraphModule) -> set[str]:
    """Returns the operators that an export calls on something that an input reaches, found without zeropoint."""
    reached = {node for node in model.graph.nodes if node.op == "placeholder"}
    found: set[str] = set()
    for node in model.graph.nodes:
        if node.op != "call_function" or not any(source in reached for source in node.all_input_nodes):
            continue
        reached.add(node)
        value = node.meta.get("val")
        tensors = value if isinstance(value, (list, tuple)) else [value]
        is_tensor = any(isinstance(each, torch.Tensor) for each in tensors)
        if is_tensor and node.target not in (operator.getitem, torch.ops.aten._assert_tensor_metadata.default):
            found.add(node.name)
    return found


def accounted_for(explanation: zp.Explanation) -> set[str]:
    nodes = {node.exported_as or node.name for node in explanation.nodes}
    return nodes | {node.name for node in explanation.gone}


def check(model: GraphModule) -> None:
    explanation = zp.explain(model, quantizer())
    assert computing(model) - accounted_for(explanation) == set()
    assert all(node.is_quantized or len(node.reason) > 10 for node in explanation.nodes)
    assert all(node.pattern for node in explanation.quantized)
    assert all(node.how for node in explanation.gone)
    assert len(str(explanation).splitlines()) < 250
    for node in explanation.nodes:
        assert node.name in str(explanation[node.name])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_architectures_of_transformers(name):
    check(of_transformers(name))


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name):
    model, inputs = ZOO[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(torch.export.export(model.eval(), inputs).module())
