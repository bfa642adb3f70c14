"""Run by test_distributed.py in two processes that talk over gloo; each writes what it saw to a file of its own.

usage: torchrun --nproc_per_node 2 distributed_worker.py FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard

import maskft.training.build
import maskft.training.train
import tiny
from maskft.masks.fingerprints import base_fingerprint
from maskft.training.checkpoints import trainable_state
from maskft.training.checks import check_processes
from maskft.tuner import MaskConfig, adapter_layers, current_masks, set_mask_progress
from maskft.tuner.scores import Float32ParameterDict
from maskft_common import processes
from maskft_common.errors import UserError
from maskft_lab.cli.train import parse

LENGTH = 9


def build(**config):
    """A masked model whose MLP has 49 rows, which two ranks cannot share evenly."""
    settings = {"init_scores": "normal", "target_modules": ["q_proj", "up_proj", "down_proj"]}
    settings |= {} if "selection" in config else {"sparsity": 0.3}
    return get_peft_model(tiny.tiny_llama(intermediate_size=49), MaskConfig(**{**settings, **config}))


def saved_base(folder):
    """A model of the same shapes and other weights, as a folder."""
    if dist.get_rank() == 0:
        tiny.tiny_llama(intermediate_size=49, seed=3).save_pretrained(folder / "base")
    dist.barrier()
    return str(folder / "base")


def shard(model):
    """As accelerate does under TRANSFORMER_BASED_WRAP."""
    names = model._no_split_modules
    for module in reversed(list(model.modules())):
        if type(module).__name__ in names:
            fully_shard(module, reshard_after_forward=True)
    return fully_shard(model)


def error_of(function):
    try:
        function()
    except UserError as error:
        return str(error)


def train(model, batches, num_steps=3):
    """Losses, gradients and the logits at the end, of steps on all of ``batches``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses, gradients = [], []
    model.train()
    for step in range(num_steps):
        set_mask_progress(model, step / num_steps)
        loss = sum(model(input_ids=batch, labels=batch).loss for batch in batches) / len(batches)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return losses, gradients, model(input_ids=batches[0]).logits


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(**config):
    """Sharded training, each rank on half of the batch, against one process on all of it."""
    one, many = build(**config), shard(build(**config))
    before = base_fingerprint(adapter_layers(one).values())
    rank, batch = dist.get_rank(), tiny.token_ids(batch=4, length=LENGTH)
    losses, gradients, _ = train(one, [batch])
    sharded_losses, sharded_gradients, logits = train(many, [batch[2 * rank : 2 * rank + 2]])
    mean_losses = [processes.reduce_(loss.clone()) / 2 for loss in sharded_losses]
    masks, sharded_masks = current_masks(one), current_masks(many)
    with torch.no_grad(), many.disable_adapter(), one.disable_adapter():
        unmasked = torch.equal(many(input_ids=batch).logits, one(input_ids=batch).logits)
    with torch.no_grad():
        masked_again = torch.equal(many(input_ids=batch[2 * rank : 2 * rank + 2]).logits, logits)
    scores = [module for module in many.modules() if isinstance(module, Float32ParameterDict)]
    groups = [group for module in scores for group in module._get_fsdp_state()._fsdp_param_groups]
    state = trainable_state(many)
    wanted = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
    return {
        "loss_difference": max(abs(float(a - b)) for a, b in zip(losses, mean_losses, strict=True)),
        "gradient_difference": max(
            float((whole(sharded[name]) - plain[name]).abs().max() / plain[name].abs().max())
            for plain, sharded in zip(gradients, sharded_gradients, strict=True)
            for name in plain
        ),
        "masks_different": sum(int((masks[name] != sharded_masks[name]).sum()) for name in masks),
        "counts_equal": all(masks[name].sum() == sharded_masks[name].sum() for name in masks),
        "base_fingerprint_kept": base_fingerprint(adapter_layers(many).values()) == before,
        "unmasked_without_adapter": unmasked,
        "masked_again": masked_again,
        "num_score_units": len(groups),
        "scores_never_gathered": not any(hasattr(p, "_unsharded_param") for g in groups for p in g.fsdp_params),
        "gathered_state": sorted(state) == (sorted(wanted) if rank == 0 else []),
    }


def backward_after_unmasking():
    """A forward pass without the mask, as of a reference model, between forward and backward."""
    model = shard(build()).train()
    loss = model(input_ids=tiny.token_ids(), labels=tiny.token_ids()).loss
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=tiny.token_ids())
    loss.backward()


def refusals():
    """Messages that every rank must see alike, though only one of them is at fault."""
    rank = dist.get_rank()
    rows = [0] * 8
    mixed, away = build(), build()
    if rank == 1:
        mixed.base_model.model.lm_head.to(torch.bfloat16)
        away.base_model.model.model.layers[1].mlp.up_proj.base_layer.to("meta")

    def fail():
        raise UserError("only the main process looks")

    return {
        "mixed_dtypes": error_of(lambda: check_processes(mixed, rows, rows)),
        "meta": error_of(lambda: check_processes(away, rows, rows)),
        "data": error_of(lambda: check_processes(build(), rows * (1 + rank), rows)),
        "by_main": error_of(lambda: processes.decided_by_main(fail)),
        "in_the_root_unit": error_of(lambda: fully_shard(build())(input_ids=tiny.token_ids())),
        "a_part": error_of(lambda: shard(build()).base_model.model.model.layers[0](torch.zeros(1, 2, 32))),
        "merge": error_of(lambda: shard(build()).merge_adapter()),
        "unmasked_before_backward": error_of(backward_after_unmasking),
        "all_well": error_of(lambda: check_processes(build(), rows, rows)),
        "decided": processes.decided_by_main(lambda: "yes"),
    }


def run(arguments):
    """Train, by DDP, as the lines of a file say."""
    maskft.training.train.train(parse(arguments.read_text().split("\n")))


def nan_on_one_rank(folder):
    """Message of a run whose third training forward is NaN on rank 1, and the step whose model was kept."""
    load, rank = maskft.training.build.load_model, dist.get_rank()

    def load_and_break(*args, **kwargs):
        model, calls = load(*args, **kwargs), []

        def hook(module, inputs, output):
            calls.append(module.training)
            return output * float("nan") if rank == 1 and sum(calls) == 3 else output

        model.get_input_embeddings().register_forward_hook(hook)
        return model

    maskft.training.build.load_model = load_and_break
    message = error_of(lambda: run(folder / "nan.txt"))
    maskft.training.build.load_model = load
    return message


def main():
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    seen = {
        "matrix": compare(),
        "threshold": compare(selection="threshold", threshold=-0.02, rank_by="signed"),
        "ramp": compare(sparsity_ramp=0.9),
        "gumbel": compare(selection="gumbel", init_value=0.5),
        "hard_concrete": compare(selection="hard_concrete", init_value=0.5, price=1.0),
        "base": compare(removed_value="base", removed_value_model=saved_base(folder)),
        "refusals": refusals(),
        "ddp": error_of(lambda: run(folder / "ddp.txt")),
        "nan": nan_on_one_rank(folder),
    }
    torch.save(seen, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
