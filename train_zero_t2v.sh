#!/usr/bin/env bash
# Fine-tunes all weights of a CogVideoX text-to-video model with DeepSpeed ZeRO, one process per GPU.
#
#   bash train_zero_t2v.sh                                   uses the values below and the template set in
#                                                            configs/accelerate_config.yaml
#   ZERO=zero3_offload bash train_zero_t2v.sh                another template: zero2, zero2_offload, zero3 or
#                                                            zero3_offload; configs/README.md compares them
#   NUM_PROCESSES=2 bash train_zero_t2v.sh                   two processes; default: one per visible GPU
#   bash train_zero_t2v.sh --learning_rate 2e-5              flags given here override the values below
#   bash train_zero_t2v.sh --dry_run                         runs all checks, prints the plan, trains nothing
#
# Several machines: run the same command on each, with the same paths on a shared disk. On the second of two:
#   NUM_MACHINES=2 MACHINE_RANK=1 MAIN_PROCESS_IP=10.0.0.1 bash train_zero_t2v.sh
#
# `python train.py --help` explains every flag.
set -euo pipefail
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

MODEL_ARGS=(
    --model_path "THUDM/CogVideoX-5b"       # folder or model hub id; also: CogVideoX-2b, CogVideoX1.5-5B
    --model_type "t2v"                      # must match the checkpoint
    # --variant "fp16"                      # loads weights such as model.fp16.safetensors
    --training_type "sft"                   # sft: all weights; lora: adapters, simpler with train_ddp_t2v.sh
)

OUTPUT_ARGS=(
    --output_dir "outputs/t2v-sft"          # use a new folder per run; holds checkpoints, metrics.jsonl and videos
    --report_to "tensorboard"               # tensorboard, wandb, all or none; metrics.jsonl is always written
)

DATA_ARGS=(
    --data_root "data"                      # data folder with the line files below and the clips; several folders,
                                            # such as "data" "more", are mixed; docs/data.md
    --caption_column "prompts.txt"          # one caption per line
    --video_column "videos.txt"             # one clip or image per line, relative to the data folder
    --id_token ""                           # a rare word to put before every caption; helps to learn a new concept
    --train_resolution "49x480x720"         # frames x height x width; 81x768x1360 for CogVideoX1.5-5B
                                            # with several, such as "49x480x720" "49x720x480", each clip uses the
                                            # resolution that preserves most of it
    --resize_mode "stretch"                 # crop: keep the aspect ratio and crop the centre
    --clips_per_video 1                     # 2 or more: several non-overlapping samples from a long clip
    --skip_bad_samples false                # true: continue without unusable clips instead of stopping
    --caption_dropout 0.0                   # 0.1 preserves the unconditional model, which guidance above 1 uses
)

TRAIN_ARGS=(                                # the templates have "auto" for these values
    --train_epochs 10                       # passes over the clips; --train_steps N sets the number of updates instead
    --batch_size 1                          # samples per GPU; raise it only if memory is left
    --gradient_accumulation_steps 1         # 2-8: larger effective batch in the same memory; smoother, slower updates
    # --mixed_precision "bf16"              # default: fp16 for CogVideoX-2b on a GPU, bf16 otherwise
    --learning_rate 1e-5                    # 1e-5 to 2e-5; higher rates make the model forget
    --lr_scheduler "constant_with_warmup"   # cosine: decays to zero at the end of the run
    --lr_warmup_steps 100                   # updates until the full learning rate; use fewer for short runs
    --optimizer "adamw"
    --weight_decay 1e-4
    --max_grad_norm 1.0                     # lower it if the loss jumps
    # --ema_decay 0.999                     # averages the weights; checkpoint-N/ema holds the average
    --gradient_checkpointing full           # selective: faster, 2 GiB (2b) to 11 GiB (1.5) more memory; none: several
                                            # times the memory
    --offload_activations false             # true: keep checkpointed tensors in host memory; works well with selective
    --seed 42                               # for clip order, noise and timesteps
)

SYSTEM_ARGS=(
    --num_workers 4                         # processes per GPU that decode clips before training
    --pin_memory true
    --nccl_timeout 1800                     # seconds that processes wait for each other; raise it for huge datasets
)

CHECKPOINT_ARGS=(
    --checkpointing_steps 500               # updates between checkpoints of 14 bytes per parameter; one at the end
    --checkpointing_limit 2                 # maximum number of checkpoints to keep
    --resume_from_checkpoint latest         # continues a stopped run; starts a new one if there is no checkpoint
    # --export_dtype "fp32"                 # dtype of transformer/ in the last checkpoint; default: training precision
)

VALIDATION_ARGS=(
    --do_validation false                   # true: videos and held-out loss; needs memory for the VAE and sampling
    --validation_dir "data/validation"      # same layout as the data folder
    --validation_steps 500                  # updates between validations
    --num_inference_steps 50                # denoising steps per validation video
)

# Like `accelerate launch`, but without a stack trace when train.py reports a user error
exec python "$HERE/utils/commands/launch.py" --config_file "$HERE/configs/accelerate_config.yaml" "$HERE/train.py" \
    "${MODEL_ARGS[@]}" "${OUTPUT_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAIN_ARGS[@]}" \
    "${SYSTEM_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${VALIDATION_ARGS[@]}" "$@"
