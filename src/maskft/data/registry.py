"""The paper's training sets (Table 3) by name: where each is on the hub, and in which format.

Their titles, domains and licences are in docs/datasets.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from .formats import (
    Formats,
    from_instruction,
    from_messages,
    from_question_answer,
    from_system_question,
)

# The format of Tulu 3's sets: conversations.
MESSAGES: Formats = {("messages",): from_messages}
TULU_MIXTURE = "allenai/tulu-3-sft-mixture"


@dataclass(frozen=True)
class TrainingSet:
    """One set of Table 3, https://arxiv.org/abs/2503.22764, appendix A.

    Attributes:
        hub_id: Data set on the hub.
        formats: The columns that its rows may have, each with the function that converts them.
        config: Configuration on the hub, where no other is asked for.
        heldout_split: Split on the hub that is held-out data, where no other is asked for.
        data_files: The file to take where the hub data set holds more than is meant.
        source: The value of the column ``source`` of the rows that are meant, where the hub data set is a mixture.
    """

    hub_id: str
    formats: Formats
    config: str | None = None
    data_files: str | None = None
    source: str | None = None
    heldout_split: str = "train"


# Name, as in recipes and in data_dir -> the set.
TRAINING_SETS: dict[str, TrainingSet] = {
    "tulu3_persona_math": TrainingSet("allenai/tulu-3-sft-personas-math", MESSAGES),
    "tulu3_persona_gsm": TrainingSet("allenai/tulu-3-sft-personas-math-grade", MESSAGES),
    "tulu3_persona_algebra": TrainingSet("allenai/tulu-3-sft-personas-algebra", MESSAGES),
    "metamathqa": TrainingSet(
        "meta-math/MetaMathQA",
        {("query", "response"): from_instruction},
    ),
    # Tulu 3's decontaminated selection, as the published count tells, not the 72,441 rows of AI-MO/NuminaMath-TIR.
    "numinamath_tir": TrainingSet(
        TULU_MIXTURE,
        MESSAGES,
        source="ai2-adapt-dev/numinamath_tir_math_decontaminated",
    ),
    # Tulu 3's selection of theblackcat102/evol-codealpaca-v1, without rows that resemble HumanEval.
    "evol_codealpaca": TrainingSet(
        TULU_MIXTURE,
        MESSAGES,
        source="ai2-adapt-dev/evol_codealpaca_heval_decontaminated",
    ),
    "code_alpaca": TrainingSet(
        "sahil2801/CodeAlpaca-20k",
        {("instruction", "output"): from_instruction},
    ),
    "tulu3_persona_python": TrainingSet("allenai/tulu-3-sft-personas-code", MESSAGES),
    # Tulu 3's selection of OpenAssistant/oasst1.
    "oasst_guanaco": TrainingSet(TULU_MIXTURE, MESSAGES, source="ai2-adapt-dev/oasst1_converted"),
    "tulu3_persona_if": TrainingSet("allenai/tulu-3-sft-personas-instruction-following", MESSAGES),
    # The paper does not say which 30,000 rows; those of GPT-4 are taken, as earlier Tulu mixtures took 30,000 of them.
    "open_orca": TrainingSet(
        "Open-Orca/OpenOrca",
        {("system_prompt", "question", "response"): from_system_question},
        data_files="1M-GPT4-Augmented.parquet",
    ),
    # Not in Table 3; the small studies train on it.
    "gsm8k": TrainingSet(
        "openai/gsm8k",
        {("question", "answer"): from_question_answer},
        config="main",
        heldout_split="test",
    ),
}
