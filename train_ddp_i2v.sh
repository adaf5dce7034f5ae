#!/usr/bin/env bash
# Fine-tunes a CogVideoX image-to-video model with DDP, one process per GPU.
#
#   bash train_ddp_i2v.sh                                    uses the values below
#   bash train_ddp_i2v.sh --learning_rate 5e-5 --rank 64     flags given here override the values below
#   NUM_PROCESSES=2 bash train_ddp_i2v.sh                    two processes; default: one per visible GPU
#   bash train_ddp_i2v.sh --dry_run                          runs all checks, prints the plan, trains nothing
#
# Several machines: run the same command on each, with the same paths on a shared disk. On the second of two:
#   NUM_MACHINES=2 MACHINE_RANK=1 MAIN_PROCESS_IP=10.0.0.1 bash train_ddp_i2v.sh
#
# `python train.py --help` explains every flag.
set -euo pipefail
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

MODEL_ARGS=(
    --model_path "THUDM/CogVideoX-5b-I2V"   # folder or model hub id; also: CogVideoX1.5-5B-I2V
    --model_type "i2v"                      # must match the checkpoint
    # --learned_positions "interpolate"     # or drop: CogVideoX-5b-I2V at other sizes than 480x720; docs/training.md
    # --variant "fp16"                      # loads weights such as model.fp16.safetensors
    --training_type "lora"                  # lora: adapters, least memory; sft: all weights, several times the memory
)

OUTPUT_ARGS=(
    --output_dir "outputs/i2v-lora"         # use a new folder per run; holds checkpoints, metrics.jsonl and videos
    --report_to "tensorboard"               # tensorboard, wandb, all or none; metrics.jsonl is always written
)

DATA_ARGS=(
    --data_root "data"                      # data folder with the line files below and the clips; several folders,
                                            # such as "data" "more", are mixed; docs/data.md
    --caption_column "prompts.txt"          # one caption per line
    --video_column "videos.txt"             # one clip or image per line, relative to the data folder
    # --image_column "images.txt"           # one image per line; default: the first frame of each clip
    # --condition_frames first first_last   # also learns to take last frames (or prefix:9: first 9 frames); docs/training.md
    --id_token ""                           # a rare word to put before every caption; helps to learn a new concept
    --train_resolution "49x480x720"         # frames x height x width; 81x768x1360 for CogVideoX1.5-5B-I2V
                                            # with several, such as "49x480x720" "49x720x480", each clip uses the
                                            # resolution that preserves most of it
    --resize_mode "stretch"                 # crop: keep the aspect ratio and crop the centre
    --clips_per_video 1                     # 2 or more: several non-overlapping samples from a long clip
    --skip_bad_samples false                # true: continue without unusable clips instead of stopping
    --caption_dropout 0.0                   # 0.1 preserves the unconditional model, which guidance above 1 uses
)

TRAIN_ARGS=(
    --train_epochs 10                       # passes over the clips; --train_steps N sets the number of updates instead
    --batch_size 1                          # samples per GPU; raise it only if memory is left
    --gradient_accumulation_steps 1         # 2-8: larger effective batch in the same memory; smoother, slower updates
    # --mixed_precision "bf16"              # default: fp16 for CogVideoX-2b on a GPU, bf16 otherwise
    --learning_rate 1e-4                    # 5e-5 to 5e-4 for LoRA, 1e-5 to 2e-5 for sft
    --lr_scheduler "constant_with_warmup"   # cosine: decays to zero at the end of the run
    --lr_warmup_steps 100                   # updates until the full learning rate; use fewer for short runs
    --optimizer "adamw"
    --weight_decay 1e-4
    --max_grad_norm 1.0                     # lower it if the loss jumps
    # --ema_decay 0.999                     # averages the weights; checkpoint-N/ema holds the average
    --gradient_checkpointing full           # selective: faster, 2 GiB (2b) to 11 GiB (1.5) more memory; none: several
                                            # times the memory
    --offload_activations false             # true: keep checkpointed tensors in host memory; works well with selective
    # --compile_blocks false                # default on a GPU: true; adds minutes to the first update, then is faster
    # --vram_budget_gib 16                  # or auto; chooses settings predicted to fit; README, section Less memory
    # --quantize_optimizer 8bit             # sft: 8-bit Adam, bf16 weights; --offload_optimizer: Adam on the host
    --seed 42                               # for clip order, noise, timesteps and adapter initialization
)

LORA_ARGS=(
    --rank 128                              # 64 or more for a new concept; file size and memory grow with it
    # --lora_alpha 64                       # scale is alpha / rank; default: the rank; half works too, 1 works badly
    --target_modules to_q to_k to_v to_out.0
    # --init_lora "style.safetensors"       # starts from a LoRA, of any tool, with this rank and these target modules
    --quantize_base "none"                  # int8: half the memory of the frozen weights; int4: a third; approximate
)

SYSTEM_ARGS=(
    --num_workers 4                         # processes per GPU that decode clips before training
    --pin_memory true
    --nccl_timeout 1800                     # seconds that processes wait for each other; raise it for huge datasets
)

CHECKPOINT_ARGS=(
    --checkpointing_steps 100               # updates between checkpoints; the last update always writes one
    --checkpointing_limit 3                 # maximum number of checkpoints to keep
    # --lora_format both                    # also writes LoRAs for ComfyUI, which ignores the format of diffusers
    --resume_from_checkpoint latest         # continues a stopped run; starts a new one if there is no checkpoint
)

VALIDATION_ARGS=(
    --do_validation false                   # true: videos and held-out loss; takes a few minutes each time
    --validation_dir "data/validation"      # same layout as the data folder
    --validation_steps 100                  # updates between validations
    # --validation_images "images.txt"      # one image per line; default: the first frame of each clip
    # --validation_last_images "last.txt"   # likewise, for --condition_frames first_last
    --num_inference_steps 50                # denoising steps per validation video
)

# Like `accelerate launch`, but without a stack trace when train.py reports a user error
exec python "$HERE/utils/commands/launch.py" --config_file "$HERE/configs/accelerate_ddp.yaml" "$HERE/train.py" \
    "${MODEL_ARGS[@]}" "${OUTPUT_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAIN_ARGS[@]}" "${LORA_ARGS[@]}" \
    "${SYSTEM_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${VALIDATION_ARGS[@]}" "$@"
