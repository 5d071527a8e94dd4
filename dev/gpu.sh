#!/bin/sh
# What waits for a GPU: the tests, the benchmarks and the experiments whose rows say "not run". Every step ends within ten
# minutes on one large GPU or goes on where it was stopped; what is done is not done again.
# usage: [STEPS="tests sampler ..."] dev/gpu.sh OUT [MODEL] [DATA]
# MODEL: a name or folder, qwen2.5-coder-1.5b unless given. DATA: a folder with math_train.jsonl and math500.jsonl; else
# the Hub is asked for MATH.
# Rehearsed on a CPU with `dev/gpu.sh OUT smollm2`, where the steps say what they lack.
set -u
out=$1 model=${2:-qwen2.5-coder-1.5b} data=${3:+--data train=$3/math_train.jsonl test=$3/math500.jsonl}
cd "$(dirname "$0")/.."
mkdir -p "$out"

step() { # NAME COMMAND ...: its stdout becomes OUT/NAME.json once it ends well
    name=$1
    shift
    case " ${STEPS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    [ -e "$out/$name.json" ] && return 0
    printf '%s: ' "$name"
    if timeout "${LIMIT:-540}" "$@" >"$out/$name.part" 2>"$out/$name.log"; then
        mv "$out/$name.part" "$out/$name.json" && echo done
    else
        echo "stopped ($?): $(tail -n 1 "$out/$name.log")"
    fi
}

step tests python -m pytest -q tests/gpu
step sampler rheostat bench sampler --repeats 5 --json
step engine rheostat bench engine --model "$model" --repeats 3 --json
step vllm rheostat bench vllm --model "$model" --repeats 3 --json
# one token-level iteration of 512 rollouts x 1,024 tokens: metrics.jsonl has the seconds of its phases
step iteration rheostat train token --model "$model" --task math $data --max-tokens 1024 --prompts 32 --group 16 \
    --filter-samples 0 --steps 1 --validate-every 1 --validation-samples 1 --problems.train 64 --problems.validation 8 \
    --out "$out/iteration" --json
for seed in 0 1 2; do
    step "table1-$seed" env SEEDS=$seed recipes/sequence.sh "$out/table1" recipes/table1/qwen2.5-coder-1.5b.toml --model "$model" $data
    step "table5-$seed" env SEEDS=$seed VARIANTS=with-budget recipes/table5/run.sh "$out/table5" \
        recipes/table5/qwen2.5-coder-1.5b.toml recipes/table5/qwen2.5-coder-1.5b-training.toml --model "$model" $data
done
