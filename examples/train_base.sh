#!/usr/bin/env bash
# Trains a tiny base model with the toolkit's full fine-tuning, from random weights or from another model:
#
#   bash examples/train_base.sh t2v             writes examples/tiny/t2v
#   bash examples/train_base.sh i2v t2v         starts from the weights of t2v, as the published I2V models did
#
# Models: t2v, i2v, t2v-1.5, i2v-1.5. Run it again to resume. Further arguments are flags of train.py and override those
# below: bash examples/train_base.sh t2v "" --train_steps 500
set -euo pipefail
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$ROOT"
NAME=$1 START=${2:-}
shift $(($# < 2 ? $# : 2))
OUT=${OUT:-outputs/tiny}    # intermediate files: clips, VAE, checkpoints
VAE=$OUT/vae/vae WORLD=$OUT/world UNTRAINED=$OUT/untrained/$NAME RUN=$OUT/base-$NAME
STEPS=${STEPS:-12000}
# The matrices are too small to keep two cores busy in one process. On a GPU, set NUM_PROCESSES=1.
export NUM_PROCESSES=${NUM_PROCESSES:-2}

[[ -d "$VAE" ]] || python -m examples.train_vae "$OUT/vae"
[[ -f "$WORLD/videos.txt" ]] || python -m examples.world "$WORLD" --known 1600
[[ -f "$UNTRAINED/model_index.json" ]] || python -m examples.make_base "$NAME" "$VAE" "$UNTRAINED" \
    ${START:+--transformer "examples/tiny/$START/transformer"}

bash "train_ddp_${NAME%-1.5}.sh" --model_path "$UNTRAINED" --data_root "$WORLD" --output_dir "$RUN" \
    --training_type sft --train_resolution 9x64x64 --fps 8 --caption_dropout 0.1 --batch_size $((16 / NUM_PROCESSES)) \
    --train_steps "$STEPS" --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 200 --mixed_precision no \
    --gradient_checkpointing false --num_workers 1 --report_to none --checkpointing_steps 1000 --checkpointing_limit 2 \
    --do_validation false "$@"

python -m examples.make_base "$NAME" "$VAE" "examples/tiny/$NAME" \
    --transformer "$(ls -d "$RUN"/checkpoint-* | sort -V | tail -1)/transformer" --exact
