#!/bin/sh
# Both levels together: the sequence level, a token level that starts from it and reads it, and one by itself, judged on the same test problems.
# usage: [SEEDS="0 1 2"] [SEQUENCE="OPTION ..."] [TOKEN="OPTION ..."] recipes/table5/levels.sh OUT CONFIG.toml TRAINING.toml [OPTION ...]
# TRAINING.toml is for training the token level, on top of the configuration; SEQUENCE and TOKEN are options for training one level;
# options are for judging. An interrupted run continues; --dry-run in all three shows what all of it would take.
set -eu
out=$1 config=$2 training=$3
shift 3
adapters=""
for seed in ${SEEDS:-0 1 2}; do
    start="$out/sequence-$seed/adapter" both="$out/both-$seed" token="$out/token-$seed"
    [ -e "$start/adapter.json" ] ||
        rheostat train sequence --config "$config" --pooling last ${SEQUENCE:-} --seed "$seed" --out "$out/sequence-$seed"
    [ -e "$both/adapter/adapter.json" ] ||
        rheostat train token --config "$config" --config "$training" --start "$start" ${TOKEN:-} --seed "$seed" --out "$both"
    # the initial pass rates of the training prompts are those of the uniform policy, the same for both
    if [ -d "$both/rollouts" ] && [ ! -d "$token" ]; then
        mkdir -p "$token" && cp -r "$both/rollouts" "$token/"
    fi
    [ -e "$token/adapter/adapter.json" ] ||
        rheostat train token --config "$config" --config "$training" ${TOKEN:-} --seed "$seed" --out "$token"
    adapters="$adapters $start $both/adapter $token/adapter"
done
rheostat evaluate --config "$config" --budgets 1 8 "$@" --out "$out/judged" --adapter $adapters
