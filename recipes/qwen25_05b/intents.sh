#!/usr/bin/env bash
# What: a mask for Banking77's 77 intents over Qwen2.5-Coder-0.5B-Instruct as its published Q4_K_M file holds it (gates in
# Q5_0), merged into that file. One setting, one seed.
# Hardware, time: one CPU core with bfloat16 instructions, half an hour; 6 GB of memory.
# First: python recipes/qwen25_05b/make_model.py runs/qwen --from_hub
#        python recipes/smollm2/make_curve_inputs.py SOURCES runs/curve
# Launch: recipes/qwen25_05b/intents.sh runs/qwen runs/curve runs/qwen-intents
set -euo pipefail
gguf=qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

maskft train --method mask --model_name_or_path "$1" --gguf_file "$gguf" --dtype float32 --bf16 true \
  --dataset_name "$2/banking77_train.jsonl.gz" --as_chat false --eval_split_size 150 --max_length 64 \
  --mask_preset deletion_tuning --kl_to_base 0.1 \
  --learning_rate 2e-3 --lr_scheduler_type linear --max_steps 96 --gradient_checkpointing false \
  --per_device_train_batch_size 16 --per_device_eval_batch_size 50 --eval_steps 0.25 --save_steps 0.25 \
  --logging_steps 8 --save_only_model true --report_to none --resume_from_checkpoint auto --output_dir "$3"

# A second call continues: a training that is finished is not repeated, and merging writes over no file.
if [ ! -e "$3/intents-q4_k_m.gguf" ]; then
  maskft merge "$3" --gguf "$1/$gguf" --output "$3/intents-q4_k_m.gguf"
fi
maskft verify "$3" --gguf "$3/intents-q4_k_m.gguf"
