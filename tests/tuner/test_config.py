"""MaskConfig: presets, values that it refuses with what to do instead, and the limits where it begins to."""

import copy
import json
import math
import pickle
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
from peft import get_peft_model
from torch import nn

from maskft import MaskConfig
from maskft.tuner import MaskPeftType
from maskft.tuner.config import _option
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_CONFIG


def test_presets():
    paper = MaskConfig(preset="paper")
    found = (paper.selection, paper.rank_by, paper.init_scores, paper.init_std, paper.sparsity)
    assert found == ("topk", "abs", "normal", 0.02, 0.1)
    recommended = MaskConfig(preset="recommended")
    assert (recommended.sparsity, recommended.rank_by, recommended.layers_to_transform) == (0.1, "abs", None)
    assert recommended.init_scores == "magnitude"
    deletion = MaskConfig(preset="deletion_tuning")
    assert (deletion.target_modules, deletion.selection, deletion.gradient) == (["gate_proj"], "logit", "sigmoid")
    assert deletion.init_scores == "magnitude" and deletion.sharpness < deletion.sharpness_end
    assert (deletion.init_value, deletion.price) == (0.04, 1.0)
    assert copy.copy(deletion) == deletion == pickle.loads(pickle.dumps(deletion))
    assert recommended.beside_preset == deletion.beside_preset == {}


def test_options_beside_a_preset_win():
    beside = MaskConfig(preset="recommended", sparsity=0.2, init_scores="normal")  # the latter a default, asked for
    assert (beside.sparsity, beside.init_scores, beside.init_std) == (0.2, "normal", 0.02)
    assert beside.beside_preset == {"sparsity": 0.2, "init_scores": "normal"}
    priced = MaskConfig(preset="deletion_tuning", price=2.0, target_modules=["up_proj"])
    assert (priced.price, priced.target_modules, priced.selection) == (2.0, ["up_proj"], "logit")
    other = MaskConfig(preset="deletion_tuning", selection="topk")
    assert (other.selection, other.init_scores, other.gradient) == ("topk", "magnitude", "straight_through")
    # What was saved stands, also where a preset has other values by then.
    saved = MaskConfig(preset="deletion_tuning").to_dict() | {"mask_sha256": "0" * 64, "sharpness": 11.0}
    assert MaskConfig(**saved).sharpness == 11.0


def test_a_saved_configuration_is_not_asked_again_what_has_an_effect():
    """Another version may have had other learners; nor is a warning repeated."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MaskConfig(mask_sha256="0" * 64, price=0.5, sparsity=0.9).price == 0.5


def test_a_field_carries_its_help():
    field = _option(1, "Its help.")
    assert field.default == 1
    assert field.metadata == {"help": "Its help.", "is_option": True, "is_of_removal": True}


def test_names_of_layers_become_what_peft_reads():
    assert MaskConfig().peft_type is MaskPeftType.MASK
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        for given in ({"b", "a", "c"}, ("b", "a", "c")):
            assert getattr(MaskConfig(**{name: given}), name) == ["a", "b", "c"]
        assert getattr(MaskConfig(**{name: ["b", "a"]}), name) == ["b", "a"]
    assert MaskConfig(modules_to_save="lm_head").modules_to_save == ["lm_head"]
    assert MaskConfig(layers_to_transform=range(2, 4)).layers_to_transform == [2, 3]
    assert MaskConfig(layers_to_transform=(1,)).layers_to_transform == [1]
    assert MaskConfig(layers_to_transform={2, 1}).layers_to_transform == [1, 2]
    with pytest.raises(UserError, match="layers_to_transform is empty"):
        MaskConfig(layers_to_transform=set())


def test_names_that_peft_has_shortened_are_saved_in_order(tmp_path):
    names = [f"{block}.{name}" for block in range(5) for name in "dbca"]
    blocks = [nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcde"}) for _ in range(5)]
    get_peft_model(nn.Sequential(*blocks), MaskConfig(target_modules=names)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["target_modules"] == ["a", "b", "c", "d"]


def test_numbers_and_lists_of_other_libraries_become_what_json_has(tmp_path):
    config = MaskConfig(
        target_modules=np.array(["v_proj", "q_proj"]),
        layers_to_transform=list(np.arange(2)),
        sparsity=np.float32(0.25),
        mask_seed=np.int64(3),
    )
    config.save_pretrained(str(tmp_path))
    loaded = MaskConfig.from_pretrained(tmp_path)
    assert (loaded.target_modules, loaded.layers_to_transform) == (["q_proj", "v_proj"], [0, 1])
    assert (loaded.sparsity, loaded.mask_seed) == (0.25, 3)
    assert MaskConfig(layers_to_transform=np.array([2, 1])).layers_to_transform == [1, 2]
    assert type(MaskConfig(layers_to_transform=np.int64(1)).layers_to_transform) is int


def test_a_list_of_a_preset_is_the_configurations_own():
    MaskConfig(preset="deletion_tuning").target_modules.append("up_proj")
    assert MaskConfig(preset="deletion_tuning").target_modules == ["gate_proj"]


def test_a_configuration_is_saved_by_itself(tmp_path):
    MaskConfig(sparsity=0.3).save_pretrained(str(tmp_path), auto_mapping_dict={"base_model_class": "Own"})
    saved = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert (saved["peft_type"], saved["sparsity"]) == ("MASK", 0.3)
    assert saved["auto_mapping"] == {"base_model_class": "Own"}
    assert MaskConfig.from_pretrained(tmp_path).sparsity == 0.3


LOGIT = {"selection": "logit", "init_value": 1.0}
GUMBEL = {"selection": "gumbel", "init_value": 1.0}
LEARNERS = "topk, threshold, logit, gumbel, hard_concrete"
OWN = " (a learner of your own: register it in this process, see docs/learners.md)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # What it is not
        ({"sparsity": 1.0}, "sparsity is 1.0; .*"),
        ({"sparsity": -0.1}, "sparsity is -0.1; .*"),
        ({"selection": "topkk"}, f"selection is 'topkk' (did you mean 'topk'?); choose one of: {LEARNERS}{OWN}"),
        ({"selection": "x", "preset": "paper"}, f"selection is 'x'; choose one of: {LEARNERS}{OWN}"),
        ({"removed_value": "bases"}, "removed_value is 'bases' (did you mean 'base'?); choose one of: zero, base"),
        ({"rank_by": "absolute"}, "rank_by is 'absolute'; choose one of: abs, signed"),
        ({"gradient": "soft"}, "gradient is 'soft'; choose one of: straight_through, sigmoid"),
        ({"init_scores": "zeros"}, "init_scores is 'zeros'; choose one of: normal, constant, magnitude, wanda"),
        (
            {"preset": "papr"},
            "preset is 'papr' (did you mean 'paper'?); choose one of: paper, recommended, deletion_tuning",
        ),
        (
            {"preset": ["paper"]},
            "preset is ['paper'] (did you mean 'paper'?); choose one of: paper, recommended, deletion_tuning",
        ),
        ({"format_version": "2"}, "format_version is '2'; it must be a whole number"),
        (
            {"format_version": 99},
            "the adapter has format version 99, this maskft reads up to 2; use a newer one",
        ),
        # Numbers
        *(
            ({name: "1"}, f"{name} is '1'; it must be a number")
            for name in ("init_std", "sparsity_ramp", "price", "mask_seed", "threshold", "sharpness", "sharpness_end")
        ),
        *(
            ({name: "1"}, f"{name} is '1'; it must be a number")
            for name in ("temperature", "temperature_end", "init_value")
        ),
        ({"price": None}, "price is None; it must be a number"),
        ({"progress": "1"}, "progress is '1'; it must be a number"),
        *(
            ({"progress": bad}, f"progress is {bad}; it is a share of training and must be in [0, 1]")
            for bad in (2.0, -3.0, math.nan)
        ),
        *(
            ({name: True}, f"{name} is True; it must be a number")
            for name in ("init_std", "price", "progress", "mask_seed")
        ),
        ({"save_scores": "no"}, "save_scores is 'no'; it must be true or false"),
        ({"verify_base": 0}, "verify_base is 0; it must be true or false"),
        (
            {"removed_value": "base", "removed_value_model": 3},
            "removed_value_model is 3; it must be a folder or a name on the hub, as text",
        ),
        ({"init_std": 0.0}, "init_std is 0.0; it is a standard deviation and must be > 0"),
        ({"init_std": math.inf}, "init_std is inf; it is a standard deviation and must be > 0"),
        ({"init_std": math.nan}, "init_std is nan; it is a standard deviation and must be > 0"),
        ({"selection": "threshold", "threshold": math.nan}, "threshold is nan; it must be a finite number"),
        ({"init_scores": "constant", "init_value": math.nan}, "init_value is nan; it must be a finite number"),
        ({"sparsity_ramp": 1.5}, "sparsity_ramp is 1.5; it is a share of training and must be in [0, 1]"),
        ({"sparsity_ramp": -0.5}, "sparsity_ramp is -0.5; it is a share of training and must be in [0, 1]"),
        ({**LOGIT, "price": -1.0}, "price is -1.0; it must be 0 or more"),
        ({**LOGIT, "price": math.inf}, "price is inf; it must be 0 or more"),
        ({**LOGIT, "sharpness": -1.0}, "sharpness is -1.0; it must be above 0"),
        ({**LOGIT, "sharpness": math.inf}, "sharpness is inf; it must be above 0"),
        ({**LOGIT, "sharpness_end": 0.0}, "sharpness_end is 0.0; it must be above 0"),
        ({**GUMBEL, "temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({**GUMBEL, "temperature_end": 0.0}, "temperature_end is 0.0; it must be above 0"),
        *(
            ({"mask_seed": value}, f"mask_seed is {value}; it must be a whole number >= 0")
            for value in (-1, 1.5, math.nan, math.inf)
        ),
        # Layers
        *(
            ({name: value}, f"{name} is {value}; give a list of names")
            for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
            for value in (5, [1], [None])
        ),
        *(
            ({"layers_to_transform": value}, f"layers_to_transform is {value!r}; give indices of layers, from 0")
            for value in ("1", ["1"], 1.0, [None])
        ),
        (
            {"target_modules": "("},
            "target_modules '(' is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        ({"exclude_modules": "*"}, "exclude_modules '*' is not a regular expression: nothing to repeat at position 0"),
        (
            {"layers_pattern": "h"},
            "layers_pattern has no effect without layers_to_transform: name layers, or leave it out",
        ),
        (
            {"layers_to_transform": []},
            "layers_to_transform is empty, which PEFT takes for all layers; name one, or leave it out",
        ),
        (
            {"target_modules": "q.*", "layers_to_transform": [1]},
            "layers_to_transform has no effect beside a regular expression in target_modules ('q.*'): name the layers "
            "in the expression, or give a list of names",
        ),
        # What changes nothing
        (
            {"price": 0.1},
            "price=0.1 has no effect with selection='topk'; it goes with logit and gumbel and hard_concrete",
        ),
        (
            {**GUMBEL, "gradient": "sigmoid"},
            "gradient='sigmoid' has no effect with selection='gumbel'; it goes with logit",
        ),
        ({**LOGIT, "temperature": 1.0}, "temperature=1.0 has no effect with selection='logit'; it goes with gumbel"),
        ({**LOGIT, "sparsity": 0.3}, "sparsity=0.3 has no effect with selection='logit'; it goes with topk"),
        ({**LOGIT, "sparsity_ramp": 0.5}, "sparsity_ramp=0.5 has no effect with selection='logit'; it goes with topk"),
        ({"threshold": 0.1}, "threshold=0.1 has no effect with selection='topk'; it goes with threshold"),
        (
            {"init_value": 0.1},
            "init_value=0.1 has no effect with selection='topk' and init_scores='normal'; it goes with logit and "
            "gumbel and hard_concrete, and with init_scores='constant'",
        ),
        # What removes nothing or all, or never trains
        *(
            (
                {"selection": "threshold", **threshold},
                f"threshold is {threshold.get('threshold', -0.035)} and rank_by is 'abs': no magnitude is below it, so "
                "nothing would be removed; set rank_by='signed', or a threshold above 0",
            )
            for threshold in ({}, {"threshold": 0.0})
        ),
        (
            {"selection": "logit", "sharpness": 20.0},
            "sharpness=20.0 has no effect with gradient='straight_through' and price=0; it goes with "
            "gradient='sigmoid', or with a price",
        ),
        (
            {"init_scores": "constant", "init_value": 0.1, "init_std": 0.5},
            "init_std=0.5 has no effect with init_scores='constant' and an init_value; leave one of them out",
        ),
        (
            {"init_scores": "constant"},
            "init_scores='constant' with init_value=0 and rank_by='abs' never trains: the gradient is 0 at score 0; "
            "set init_value or rank_by='signed'",
        ),
        *(
            (
                {name: value},
                f"removed_value is {shown} and removed_value_model {model}; removed_value='base' needs the model "
                "before fine-tuning, and nothing else does",
            )
            for name, value, shown, model in (
                ("removed_value", "base", "'base'", "None"),
                ("removed_value_model", "x", "'zero'", "'x'"),
            )
        ),
        *(
            (
                {"selection": "logit", "init_scores": start, "init_value": value},
                f"selection='logit' removes scores of 0 and less, and with init_scores='{start}' and "
                f"init_value={value} that is every weight; set init_value above 0",
            )
            for start, value in (
                ("constant", 0.0),
                ("constant", -0.01),
                ("normal", -0.12),
                ("normal", -0.13),
                ("magnitude", -0.038),
            )
        ),
    ],
)
def test_settings_that_are_refused(settings, message):
    """The whole message: the value, and what to do."""
    expected = message if message.endswith(".*") else re.escape(message)
    with pytest.raises(UserError, match=f"^{expected}$"):
        MaskConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.0},
        {"sparsity_ramp": 1.0},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 1, "layers_pattern": "h"},
        {"layers_to_transform": [0], "target_modules": "all-linear"},
        {"target_modules": "q.*", "exclude_modules": "k.*"},
        {"init_scores": "constant", "init_value": 0.1},
        {"init_scores": "constant", "rank_by": "signed"},
        {"selection": "threshold", "threshold": 0.5},
        {"selection": "threshold", "rank_by": "signed"},
        {"selection": "logit", "init_value": -0.11},
        {"selection": "logit", "init_scores": "magnitude", "init_value": -0.03},
        {"selection": "logit", "init_scores": "constant", "init_value": 0.01},
        {"selection": "gumbel", "price": 0.5, "sharpness_end": 2.0},
        {"removed_value": "base", "removed_value_model": "before"},
        {"init_value": 0.0},
    ],
    ids=str,
)
def test_settings_at_the_limits_are_taken(settings):
    config = MaskConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_fractions_are_numbers():
    assert MaskConfig(sparsity=Fraction(1, 4)).sparsity == 0.25


def test_a_preset_without_its_slope_is_taken():
    config = MaskConfig(preset="deletion_tuning", gradient="straight_through", price=0)
    assert config.sharpness_end == 100
    # As its file is read, with every field given.
    assert MaskConfig(**config.to_dict()) == config
    constant = MaskConfig(init_scores="constant", init_value=0.1)
    assert MaskConfig(**constant.to_dict()) == constant


def test_a_start_that_keeps_nearly_all_weights():
    assert MaskConfig(init_std=0.5).start_value == 0.0
    assert MaskConfig(selection="threshold", rank_by="signed").start_value == 0.0
    assert MaskConfig(selection="logit", init_std=0.5).start_value == 1.0
    assert MaskConfig(selection="gumbel", sharpness=2.0).start_value == 1.5
    assert MaskConfig(selection="gumbel", sharpness=2.0, init_std=1.0).start_value == 2.0
    assert MaskConfig(selection="hard_concrete", init_value=0.25).start_value == 0.25
    assert MaskConfig(selection="logit").ranks_by == "signed" and MaskConfig().ranks_by == "abs"


def test_sparsity_above_a_half_warns_about_the_released_codes_meaning():
    message = (
        "sparsity 0.9 removes 90% of the target weights. The authors' released code calls the fraction that is KEPT "
        "sparsity; its 0.9 is 0.1 here."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        MaskConfig(sparsity=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MaskConfig(sparsity=0.5).sparsity == 0.5


def test_a_warning_points_at_the_line_of_the_caller():
    with pytest.warns(UserWarning, match="KEPT") as warned:
        MaskConfig(sparsity=0.9)
    assert [each.filename for each in warned] == [__file__]


def test_a_seed_that_is_a_whole_float_is_that_seed():
    """The streams of random numbers are named by it, and 1.0 would be another name than 1."""
    seed = MaskConfig(mask_seed=1.0).mask_seed
    assert (seed, type(seed)) == (1, int)
