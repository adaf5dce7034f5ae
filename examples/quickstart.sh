#!/usr/bin/env bash
# The main job in one command, on any machine: fine-tunes a tiny CogVideoX on eight drawn clips, then generates a video
# with the result. Needs Python 3.11 and nothing else; no GPU.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
source examples/environment.sh

MODEL=examples/tiny_model   # random weights, made here: everything runs, the pictures are noise
OUT=outputs/quickstart
rm -rf "$OUT"
[[ -f "$MODEL/model_index.json" ]] || python -m tests.tiny_models 2b "$MODEL" 17x64x64

bash train_ddp_t2v.sh \
    --model_path "$MODEL" --data_root examples/dataset --output_dir "$OUT" \
    --train_resolution 17x64x64 --train_steps 40 --mixed_precision no --rank 16 --learning_rate 1e-3 \
    --lr_warmup_steps 5 --num_workers 1 --checkpointing_steps 20 \
    --do_validation true --validation_dir examples/validation --validation_steps 20 --num_inference_steps 10

python cli_demo.py --model_path "$MODEL" --lora_path "$OUT/checkpoint-40" --output_path "$OUT/demo.mp4" \
    --prompt "a red circle moves left on a white background" --num_inference_steps 20

cat <<EOF

The quick start is done.
  checkpoint         $OUT/checkpoint-40
  log                $OUT/metrics.jsonl   (tensorboard --logdir $OUT/logs)
  validation videos  $OUT/validation/
  demo video         $OUT/demo.mp4
Next: put your clips into a folder like examples/dataset and edit train_ddp_t2v.sh.
EOF
