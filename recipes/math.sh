#!/bin/sh
# Mathematics and programs with a larger model: static strategies on MATH-500 and HumanEval, then token-level adapters trained on MATH.
# usage: recipes/math.sh OUT MODEL MATH_TRAIN.jsonl MATH500.jsonl HUMANEVAL.jsonl [SEED ...]     (an interrupted run continues)
# Smaller sizes for a rehearsal: PROBLEMS, SAMPLES, TOKENS, TRAIN, STEPS in the environment.
set -eu
out=$1 model=$2 train=$3 test=$4 programs=$5
shift 5
seeds=${*:-0 1 2}
tokens=${TOKENS:-1024}
rheostat evaluate --task math --data "test=$test" --model "$model" --max-tokens "$tokens" --limit "${PROBLEMS:-500}" \
    --policy greedy T=0.5 T=1 T=1.25 --policy-samples "${SAMPLES:-16}" --out "$out/math500-static"
rheostat evaluate --task humaneval --data "test=$programs" --model "$model" --max-tokens "$tokens" --limit "${HUMANEVAL:-164}" \
    --policy greedy T=0.5 T=1 T=1.25 --policy-samples "${SAMPLES:-16}" --out "$out/humaneval-static"
common="--task math --data train=$train test=$test --model $model --max-tokens $tokens --cot 0.3"
common="$common --problems.train ${TRAIN:-1600} --problems.validation ${VALIDATION:-96} --problems.test ${PROBLEMS:-500}"
adapters=""
for seed in $seeds; do
    for objective in pass@k pass@1; do
        run="$out/token-$objective-$seed"
        [ -e "$run/adapter/adapter.json" ] || rheostat train token $common --budgets 1 8 --objective "$objective" \
            --steps "${STEPS:-60}" --seed "$seed" --out "$run"
        adapters="$adapters $run/adapter"
    done
done
rheostat evaluate $common --samples.test "${SAMPLES:-16}" --adapter $adapters --out "$out/judged"
