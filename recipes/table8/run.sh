#!/bin/sh
# Four actions, trained for pass@1 alone and for all parallel budgets, judged together, seed by seed.
# usage: [SEEDS="0 1 2"] recipes/table8/run.sh OUT CONFIG.toml [OPTION ...]
# Configuration and options are for training and judging. An interrupted run continues; --dry-run as an option shows what
# all of it would take.
set -eu
out=$1 config=$2
shift 2
for seed in ${SEEDS:-0 1 2}; do
    run="$out/seed-$seed" # one store of rollouts for training and judging
    for kind in pass-at-1 all-budgets; do
        [ -e "$run/$kind/adapter.json" ] && continue
        [ "$kind" = pass-at-1 ] && more="--bandit.budgets 1 --no-with-budget" || more="--bandit.budgets 1 2 4 8"
        rheostat train sequence --config "$config" --strategies table14 "$@" $more \
            --seed "$seed" --out "$run"
        if [ -e "$run/adapter/adapter.json" ]; then
            mv "$run/training.json" "$run/adapter/"
            mv "$run/adapter" "$run/$kind"
        fi
    done
    rheostat evaluate --config "$config" --strategies table14 --budgets 1 2 4 8 "$@" --seed "$seed" --out "$run" \
        --adapter "$run/all-budgets" "$run/pass-at-1"
done
