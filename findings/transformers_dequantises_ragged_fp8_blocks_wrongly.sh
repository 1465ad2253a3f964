#!/usr/bin/env bash
# transformers 5.24.0: FP8 weights with weight_block_size [128, 128] whose rows are no multiple of 128, loaded
# with dequantize=true. The format, which DeepSeek's own files use (kv_a_proj_with_mqa has 576 rows and 5 rows
# of scales), cuts blocks of 128 rows and leaves a short last one. transformers takes rows / rows of scales as
# the height of a block and does not read weight_block_size: 192 rows with 2 rows of scales become two blocks of
# 96, so rows 96 to 127 are multiplied by the scale of the next block, without a word. Where the division
# leaves a rest (576 / 5, in every layer of V3 itself) the model does not load.
#
# Output, torch 2.13.0 on Python 3.11.7: q_b_proj (192, 128): wrong rows 96 to 127; 576 rows: RuntimeError,
# "We encountered some issues during automatic conversion of the weights".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.24.0" "accelerate==1.12.0" "safetensors>=0.6" "numpy==2.3.5"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

transformers.utils.logging.set_verbosity_error()


def saved(folder, latent):
    """A small DeepSeek-V3 whose two query and key-value projections are FP8 in blocks of 128x128."""
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
        num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, q_lora_rank=128,
        kv_lora_rank=latent, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    )
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    file = pathlib.Path(folder, "model.safetensors")
    tensors, exact, kept = load_file(file), {}, []
    for name in list(tensors):
        weight = tensors[name]
        if not name.endswith("_proj.weight") or weight.dim() != 2:
            if name.endswith(".weight") and weight.dim() == 2:
                kept.append(name.removesuffix(".weight"))
            continue
        rows, columns = (-(-size // 128) for size in weight.shape)
        scales = 2.0 ** torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
        values = torch.ones_like(weight, dtype=torch.float32)
        tensors[name] = values.to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales
        whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        exact[name] = whole[: weight.shape[0], : weight.shape[1]]
    save_file(tensors, file, {"format": "pt"})
    path = pathlib.Path(folder, "config.json")
    found = json.loads(path.read_text())
    found["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128], "dequantize": True, "modules_to_not_convert": kept,
    }
    path.write_text(json.dumps(found))
    return exact


def read(folder, exact):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("q_b_proj.weight"):
            return tuple(parameter.shape), (parameter != exact[name]).any(1).nonzero().flatten()


print("torch", torch.__version__, "transformers", transformers.__version__)
shape, wrong = read("whole", saved("whole", latent=224))  # 224 + 32 = 256 rows in kv_a_proj_with_mqa
print("q_b_proj", shape, "with 2 rows of scales: wrong rows", wrong.min().item(), "to", wrong.max().item())
assert wrong.tolist() == list(range(96, 128)), "transformers has changed"
try:
    read("ragged", saved("ragged", latent=544))  # 544 + 32 = 576 rows, as in V3
    said = "nothing"
except Exception as error:
    said = f"{type(error).__name__}: {error}"
print("kv_a_proj_with_mqa of 576 rows with 5 rows of scales:", said[:300])
assert said != "nothing", "transformers has changed"
PYTHON
