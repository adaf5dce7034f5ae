#!/usr/bin/env bash
# Fine-tunes a tiny CogVideoX on a concept that it has never seen, a purple triangle that moves up, under a new word.
# Then generates clips with the model before and after the training and measures them.
# Needs Python 3.11 or newer. No GPU is required.
#
#   bash examples/quickstart.sh              text to video
#   bash examples/quickstart.sh i2v-1.5      another model of examples/tiny
set -euo pipefail
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$ROOT"
source examples/environment.sh

NAME=${1:-t2v} TOKEN=SKS OUT=${QUICKSTART_DIR:-outputs/quickstart} CLIPS=${QUICKSTART_CLIPS:-30} STEPS=${QUICKSTART_STEPS:-200}
RATE=${QUICKSTART_RATE:-4e-3}
MODEL=examples/tiny/$NAME IMAGE=()
if [[ $NAME == i2v* ]]; then IMAGE=(--image_or_video_path "$OUT/data/validation/first_frame.png"); fi
rm -rf "$OUT"
# Every caption gets the token. Clips of known concepts keep the model from forgetting them.
python -m examples.world "$OUT/data" --concept 30 --known 26 --seed 30000000
python -m examples.world "$OUT/data/validation" --concept 2 --seed 40000000

bash "train_ddp_${NAME%-1.5}.sh" \
    --model_path "$MODEL" --data_root "$OUT/data" --output_dir "$OUT/lora" --id_token "$TOKEN" \
    --train_resolution 9x64x64 --fps 8 --train_steps "$STEPS" --batch_size 8 --mixed_precision no --gradient_checkpointing false \
    --rank 32 --target_modules to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 \
    --learning_rate "$RATE" --lr_scheduler cosine --lr_warmup_steps 20 --num_workers 1 --checkpointing_steps $((STEPS / 2)) \
    --do_validation true --validation_dir "$OUT/data/validation" --validation_steps $((STEPS / 2)) --num_inference_steps 20

LORA=$OUT/lora/checkpoint-$STEPS
python cli_demo.py --model_path "$MODEL" --lora_path "$LORA" --output_path "$OUT/demo.mp4" \
    --prompt "$TOKEN a shape moves on a white background" "${IMAGE[@]}" --height 64 --width 64 --fps 8 \
    --num_inference_steps 20 --guidance_scale 3
python -m examples.measure "$MODEL" --lora_path "$LORA" --id_token "$TOKEN" --clips "$CLIPS" --output_dir "$OUT"

cat <<EOF

The quick start is done.
  before and after   $OUT/$TOKEN.webp; the table above is in $OUT/table.json
  checkpoint         $LORA
  log                $OUT/lora/metrics.jsonl   (tensorboard --logdir $OUT/lora/logs)
  validation videos  $OUT/lora/validation/
  demo video         $OUT/demo.mp4
Next: put your clips into a folder like $OUT/data and edit train_ddp_${NAME%-1.5}.sh.
EOF
