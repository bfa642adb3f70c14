"""A fine-tuned model mixed with the one it was made from."""

import torch
from transformers import AutoModelForCausalLM

from maskft.training.method_arguments import SHARES
from maskft.training.record import read_record


def test_the_held_out_rows_choose_the_share(base, call, tmp_path):
    """One step at a rate that ruins the model: the less of it is taken, the better."""
    assert call("ruined", method="full", max_steps=2, learning_rate=0.3, load_best_model_at_end=False)[0] == 0
    status, err = call(method="interpolate", model_name_or_path=tmp_path / "ruined", before_model=base)
    assert status == 0, err
    summary = read_record(tmp_path / "out").summary
    losses = {row["value"]: row["eval_loss"] for row in summary.history}
    assert tuple(losses) == SHARES and len(set(losses.values())) == len(SHARES)
    assert summary.best_loss == losses[0.1] == min(losses.values()) and "0.1 is the best of 10 shares" in err
    before, after, mixed = (
        dict(AutoModelForCausalLM.from_pretrained(place).named_parameters())
        for place in (base, tmp_path / "ruined", tmp_path / "out")
    )
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * after[name])
