#!/bin/sh
# Sequence level: an adapter with and one without the parallel budget, judged beside every static strategy, seed by seed.
# usage: [SEEDS="0 1 2"] recipes/sequence.sh OUT CONFIG.toml [OPTION ...]
# Configuration and options are for training and judging. An interrupted run continues; --dry-run as an option shows what
# all of it would take.
set -eu
out=$1 config=$2
shift 2
for seed in ${SEEDS:-0 1 2}; do
    run="$out/seed-$seed" # one store of rollouts for training and judging
    for kind in with-budget without-budget; do
        [ -e "$run/$kind/adapter.json" ] && continue
        [ "$kind" = with-budget ] && flag=--with-budget || flag=--no-with-budget
        rheostat train sequence --config "$config" "$@" "$flag" \
            --seed "$seed" --out "$run"
        if [ -e "$run/adapter/adapter.json" ]; then
            mv "$run/training.json" "$run/adapter/"
            mv "$run/adapter" "$run/$kind"
        fi
    done
    rheostat evaluate --config "$config" "$@" --seed "$seed" --out "$run" \
        --adapter "$run/with-budget" "$run/without-budget"
done
