"""The fast step against the plain tuner: the same trajectory, bit for bit, in every setting."""

import pytest
import torch
from peft import get_peft_model

import maskft.fast
import tiny
from maskft import MaskConfig, adapter_layers, current_masks, set_mask_progress
from maskft.tuner import selection

STEPS = 20
LOGIT = {"selection": "logit", "gradient": "sigmoid", "price": 3.0, "sharpness": 10.0, "sharpness_end": 100.0}
SETTINGS = {
    "topk": {"sparsity": 0.1},
    "topk signed": {"sparsity": 0.3, "rank_by": "signed", "init_scores": "magnitude"},
    "ramp": {"sparsity": 0.3, "sparsity_ramp": 0.5},
    "threshold": {"selection": "threshold", "threshold": 0.01},
    "threshold signed": {"selection": "threshold", "rank_by": "signed"},
    "logit": LOGIT,
    "logit straight through": {"selection": "logit", "price": 1.0},
    "gumbel": {"selection": "gumbel", "price": 1.0},
    "hard concrete": {"selection": "hard_concrete", "price": 1.0},
}


def trained(model, accumulation, fused=False, set_to_none=True, dtype=None):
    """Losses, gradients of the last step, scores and masks after some steps."""
    model.train()
    scores = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(scores, lr=3e-3, weight_decay=0.0, fused=fused)
    losses = []
    gradients = []
    for step in range(STEPS):
        set_mask_progress(model, step / STEPS)
        for index in range(accumulation):
            ids = tiny.token_ids(2, 8, seed=step * accumulation + index)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = model(input_ids=ids, labels=ids).loss
            (loss / accumulation).backward()
            losses.append(loss.item())
        gradients = [parameter.grad.clone() for parameter in scores]
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tiny.token_ids()).logits
    return losses, [*gradients, *scores, *current_masks(model).values(), logits]


def check_same(make_model, **options):
    fast = trained(make_model(), **options)
    with maskft.fast.disabled():
        plain = trained(make_model(), **options)
    assert fast[0] == plain[0]
    assert_equal(fast[1], plain[1])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_trajectory_is_that_of_the_plain_tuner(name, accumulation):
    check_same(
        lambda: get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(**SETTINGS[name])), accumulation=accumulation
    )


def _soft_by_magnitude(config, scores, noise):
    """A gate of |s|, with its slope by |s|."""
    gate = torch.sigmoid(10 * (scores.abs() - 0.02))
    return gate, 10 * gate * (1 - gate)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_soft_gate_that_ranks_magnitudes_keeps_its_slope(accumulation, monkeypatch):
    """Also in the second micro-batch, where the fast step may take the weight with the signs of the scores."""
    learner = selection.Learner(options=(), cut=lambda config: 0.02, soft_gate=_soft_by_magnitude)
    monkeypatch.setitem(selection.LEARNERS, "soft", learner)
    check_same(
        lambda: get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(selection="soft")), accumulation=accumulation
    )


@pytest.mark.parametrize("name", ["topk", "logit"])
def test_with_the_fused_optimizer_that_raises_no_version(name):
    check_same(
        lambda: get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(**SETTINGS[name])), accumulation=2, fused=True
    )


@pytest.mark.parametrize("name", ["topk", "logit", "gumbel"])
def test_with_transposed_weights(name):
    check_same(lambda: get_peft_model(tiny.tiny_gpt2(num_layers=1), MaskConfig(**SETTINGS[name])), accumulation=2)


@pytest.mark.parametrize("name", ["topk", "logit", "hard concrete"])
@pytest.mark.parametrize("autocasts", [True, False])
def test_in_bfloat16(name, autocasts):
    def make():
        base = tiny.tiny_llama(num_layers=1)
        return get_peft_model(base if autocasts else base.bfloat16(), MaskConfig(**SETTINGS[name]))

    check_same(make, accumulation=2, dtype=torch.bfloat16 if autocasts else None)


def test_gradients_that_are_zeroed_and_not_dropped():
    check_same(
        lambda: get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(**LOGIT)), accumulation=2, set_to_none=False
    )


@pytest.mark.parametrize("name", ["topk", "logit", "gumbel"])
def test_removed_weights_with_values(name):
    def make():
        config = MaskConfig(**SETTINGS[name])
        model = get_peft_model(tiny.tiny_llama(num_layers=1), config)
        config = model.peft_config["default"]
        config.removed_value = "base"
        other = dict(tiny.tiny_llama(num_layers=1, seed=5).named_parameters())
        for layer in adapter_layers(model).values():
            layer.removed_values["default"] = other[f"{layer.module_name}.weight"].detach()
        return model

    check_same(make, accumulation=2)


def test_two_masks_trained_at_once():
    def make():
        model = get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(sparsity=0.2))
        model.add_adapter("other", MaskConfig(selection="threshold", rank_by="signed", mask_seed=1))
        model.base_model.set_adapter(["default", "other"])
        return model

    check_same(make, accumulation=2)


def test_a_block_that_is_used_twice_in_one_forward_pass():
    """Its price is paid once per optimizer step."""

    def make():
        base = tiny.tiny_llama(num_layers=2)
        base.model.layers[1].mlp = base.model.layers[0].mlp
        config = MaskConfig(**LOGIT, target_modules=["up_proj", "gate_proj"], layers_to_transform=[0])
        return get_peft_model(base, config)

    check_same(make, accumulation=2)


def check_same_gradients(gradients):
    fast = gradients()
    with maskft.fast.disabled():
        plain = gradients()
    assert all(bool(gradient.any()) for gradient in plain)
    assert_equal(fast, plain)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["logit", "gumbel"])
def test_a_gradient_that_is_dropped_without_a_step_takes_its_price_along(name, set_to_none):
    """As trainers do with a gradient that is not finite. The third micro-batch is accumulated and adds no price."""

    def gradients():
        model = get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(**SETTINGS[name])).train()
        set_mask_progress(model, 0.5)
        ids = tiny.token_ids(2, 8)
        for is_dropped in (True, True, False):
            if is_dropped:
                model.zero_grad(set_to_none=set_to_none)
            model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    check_same_gradients(gradients)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_evaluation_between_forward_and_backward_changes_no_gradient(name):
    def gradients():
        model = get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(**SETTINGS[name])).train()
        set_mask_progress(model, 0.5)
        ids = tiny.token_ids(2, 8)
        loss = model(input_ids=ids, labels=ids).loss
        with torch.no_grad():
            model.eval()(input_ids=ids)
        loss.backward()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    check_same_gradients(gradients)


# A learner, and options that a callback may change between two steps.
CHANGES = {
    "topk": {"sparsity": 0.4, "sparsity_ramp": 0.9, "rank_by": "signed"},
    "threshold": {"threshold": 0.02, "rank_by": "signed"},
    "logit": {"gradient": "straight_through", "sharpness": 3.0, "sharpness_end": 30.0},
    "gumbel": {"temperature": 1.0, "temperature_end": 0.5, "mask_seed": 7},
    "hard concrete": {"mask_seed": 7},
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in CHANGES for option in CHANGES[name]])
def test_an_option_that_changes_between_two_steps_counts(name, option):
    value = CHANGES[name][option]

    def before_and_after():
        model = get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(**SETTINGS[name])).train()
        set_mask_progress(model, 0.5)
        before = logits_and_gradients(model)
        setattr(model.peft_config["default"], option, value)
        return before, logits_and_gradients(model)

    fast = before_and_after()
    with maskft.fast.disabled():
        plain = before_and_after()
    assert_equal(fast[0], plain[0])
    assert_equal(fast[1], plain[1])
    # The option changes something.
    assert not all(map(torch.equal, *plain))


def logits_and_gradients(model):
    model.zero_grad()
    logits = model(input_ids=tiny.token_ids()).logits
    logits.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [logits, *gradients]


def assert_equal(found, wanted):
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_step_of_another_optimizer_does_not_add_the_price_again():
    """Between two micro-batches, as where two models are trained in turns."""

    def gradients():
        model = get_peft_model(tiny.tiny_llama(num_layers=1), MaskConfig(**LOGIT)).train()
        set_mask_progress(model, 0.5)
        other = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([other], lr=0.1)
        for seed in range(3):
            ids = tiny.token_ids(2, 8, seed=seed)
            model(input_ids=ids, labels=ids).loss.backward()
            other.sum().backward()
            optimizer.step()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    check_same_gradients(gradients)
