"""Named starting points of a configuration. Fields that are given beside a preset win."""

from __future__ import annotations

from typing import Any

# "we set the masking ratio to 10%" (Sec. 3.2); the start and the ranking by magnitude are the published code's.
_PUBLISHED = {
    "selection": "topk",
    "rank_by": "abs",
    "init_std": 0.02,
    "sparsity": 0.1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        **_PUBLISHED,
        "init_scores": "normal",
    },
    # Meant for all layers and learning rate 3e-4: docs/learners.md.
    "recommended": {
        **_PUBLISHED,
        "init_scores": "magnitude",
    },
    # After Deletion Tuning (https://arxiv.org/abs/2611.10866), of which only the abstract was read: the start (Wanda's
    # order learned less) and the constants are ours. Without the price a hundred times as many weights are removed.
    "deletion_tuning": {
        "target_modules": ["gate_proj"],
        "selection": "logit",
        "gradient": "sigmoid",
        "init_scores": "magnitude",
        "init_std": 0.02,
        "init_value": 0.04,
        "price": 1.0,
        "sharpness": 10.0,
        "sharpness_end": 100.0,
    },
}
