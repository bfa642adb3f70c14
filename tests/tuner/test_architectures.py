"""The table of docs/compatibility.md: what is masked in which model, and that it trains, saves and merges there."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from maskft import MaskConfig, current_masks
from tiny import token_ids

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
TABLE = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# What an architecture calls otherwise, or has beside.
OWN = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoXForCausalLM": {},
    "FalconForCausalLM": {},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "MambaForCausalLM": {"state_size": 4, "time_step_rank": 4, "expand": 2},
}


def model_of(name):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    given = {**SIZES, **OWN.get(name, {})}
    known = set(model_class.config_class().to_dict()) | {"head_dim", "num_hidden_layers", "hidden_size"}
    known -= {key for key in known if isinstance(getattr(model_class.config_class, key, None), property)}
    return model_class(model_class.config_class(**{key: value for key, value in given.items() if key in known})).eval()


def test_there_are_fifteen():
    assert len(TABLE) >= 15


def test_experts_that_are_no_linear_layers_are_left_out_with_a_warning():
    mixtral = model_of("MixtralForCausalLM")
    with pytest.warns(UserWarning, match="not linear layers are left out: MixtralExperts"):
        get_peft_model(mixtral, MaskConfig())


@pytest.mark.filterwarnings("ignore:experts that are not linear layers")
@pytest.mark.parametrize("name", TABLE)
def test_row(name, tmp_path):
    plain, ids = model_of(name), token_ids(length=7)
    peft = get_peft_model(copy.deepcopy(plain), MaskConfig(sparsity=0.2, task_type="CAUSAL_LM"))
    assert sorted(peft.peft_config["default"].target_modules) == TABLE[name].split()
    start = current_masks(peft)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=10.0)
    peft(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    trained = current_masks(peft)
    assert any(not torch.equal(trained[module], start[module]) for module in start)
    peft.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = peft(input_ids=ids).logits
        merged = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
        assert torch.equal(merged(input_ids=ids).logits, expected)
