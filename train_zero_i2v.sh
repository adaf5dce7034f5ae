#!/usr/bin/env bash
# Fine-tunes all weights of a CogVideoX image-to-video model under DeepSpeed ZeRO, one process a GPU.
#
#   bash train_zero_i2v.sh                                   with the values below and the template that
#                                                            configs/accelerate_config.yaml names
#   ZERO=zero3_offload bash train_zero_i2v.sh                another template: zero2, zero2_offload, zero3, zero3_offload;
#                                                            configs/README.md says what each costs
#   NUM_PROCESSES=2 bash train_zero_i2v.sh                   two processes instead of one a visible GPU
#   bash train_zero_i2v.sh --learning_rate 2e-5              flags given here win over the lines below
#   bash train_zero_i2v.sh --dry_run                         checks everything, prints the plan, trains nothing
#
# Several machines, the same command on each (here the second of two), with the same paths on a shared disk:
#   NUM_MACHINES=2 MACHINE_RANK=1 MAIN_PROCESS_IP=10.0.0.1 bash train_zero_i2v.sh
#
# `python train.py --help` explains every flag.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL_ARGS=(
    --model_path "THUDM/CogVideoX-5b-I2V"  # folder or hub id; also: CogVideoX1.5-5B-I2V
    --model_type "i2v"                      # must suit the checkpoint
    --training_type "sft"                   # sft: all weights; lora: adapters, which train_ddp_i2v.sh does with less
)

OUTPUT_ARGS=(
    --output_dir "outputs/i2v-sft"          # a new folder for every run; holds checkpoints, metrics.jsonl, videos
    --report_to "tensorboard"               # tensorboard, wandb, all or none; metrics.jsonl is written in any case
)

DATA_ARGS=(
    --data_root "data"                      # the data folder: the line files below and the clips they name
    --caption_column "prompts.txt"          # one caption a line
    --video_column "videos.txt"             # one clip a line, relative to the data folder
    # --image_column "images.txt"           # one image a line; without it the clips' first frames are used
    --id_token ""                           # a rare word put before every caption; helps to bind a new concept
    --train_resolution "49x480x720"         # frames x height x width; 81x768x1360 for CogVideoX1.5-5B-I2V
                                            # several, "49x480x720" "49x720x480": each clip goes where most is kept
    --resize_mode "stretch"                 # crop: keep the aspect ratio of clips of another shape
    --clips_per_video 1                     # more: several samples of long clips, which do not overlap
    --skip_bad_samples false                # true: go on without clips that cannot be used, in place of stopping
    --caption_dropout 0.0                   # 0.1: keeps the model good without a prompt, at guidance above 1
)

TRAIN_ARGS=(                                # the templates say "auto" for what stands here
    --train_epochs 10                       # passes over the clips; --train_steps N counts optimizer updates instead
    --batch_size 1                          # samples a GPU; raise it only if memory is left over
    --gradient_accumulation_steps 1         # 2-8: a larger effective batch at the same memory; smoother, slower updates
    # --mixed_precision "bf16"              # default: fp16 for CogVideoX-2b on a GPU, bf16 for everything else
    --learning_rate 1e-5                    # 1e-5 to 2e-5; more than that destroys what the model knows
    --lr_scheduler "constant_with_warmup"   # cosine: goes to zero at the end, for runs of known length
    --lr_warmup_steps 100                   # updates until the full learning rate; fewer for short runs
    --optimizer "adamw"
    --weight_decay 1e-4
    --max_grad_norm 1.0                     # lower it if the loss jumps
    --gradient_checkpointing full           # selective: faster, for 2 GiB (2b) to 11 GiB (1.5) more; none: several times
                                            # the memory
    --offload_activations false             # true: what is kept waits in host memory; both true: fast and small
    --seed 42                               # order of clips, noise and timesteps
)

SYSTEM_ARGS=(
    --num_workers 4                         # processes that decode clips and read the cache; 0 on very small machines
    --pin_memory true
    --nccl_timeout 1800                     # seconds that processes wait for each other; raise it for huge datasets
)

CHECKPOINT_ARGS=(
    --checkpointing_steps 500               # updates between checkpoints, 14 bytes a parameter each; one at the end
    --checkpointing_limit 2                 # checkpoints kept
    --resume_from_checkpoint latest         # goes on where a stopped run was; starts anew if there is none
    # --export_dtype "fp32"                 # of transformer/ in the last checkpoint; default: that of the training
)

VALIDATION_ARGS=(
    --do_validation false                   # true: sample videos and held-out loss; needs the memory of VAE and sampling
    --validation_dir "data/validation"      # a folder of the same form as the data folder
    --validation_steps 500                  # updates between validations
    # --validation_images "images.txt"      # one image a line; without it the clips' first frames are used
    --num_inference_steps 50                # of a validation video
)

# `accelerate launch`, without its stack trace when train.py ends with a sentence on what is wrong
exec python "$HERE/utils/commands/launch.py" --config_file "$HERE/configs/accelerate_config.yaml" "$HERE/train.py" \
    "${MODEL_ARGS[@]}" "${OUTPUT_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAIN_ARGS[@]}" \
    "${SYSTEM_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${VALIDATION_ARGS[@]}" "$@"
