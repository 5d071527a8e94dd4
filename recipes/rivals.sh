#!/bin/sh
# Sequence level, everything against everything: adapters on the configuration's action space and on one that `rheostat select` chose,
# the ablation that reads the entropy only, AutoDeco's heads, TURN, EDT, dynamic temperature, min-p and top-nσ, judged together, seed by seed.
# usage: [SEEDS="0 1 2"] recipes/rivals.sh OUT CONFIG.toml AUTODECO.toml SPACE
# SPACE: an action_space.toml, or the name of one. An interrupted run continues.
set -eu
out=$1 config=$2 heads=$3 space=$4
for seed in ${SEEDS:-0 1 2}; do
    run="$out/seed-$seed" # one store of rollouts for training and judging
    adapters=""
    for kind in chosen chosen-without-budget with-budget without-budget entropy-only; do
        adapters="$adapters $run/$kind"
        [ -e "$run/$kind/adapter.json" ] && continue
        case $kind in
            chosen) flags="--strategies $space" ;;
            chosen-without-budget) flags="--strategies $space --no-with-budget" ;;
            with-budget) flags="" ;;
            without-budget) flags="--no-with-budget" ;;
            entropy-only) flags="--features entropy" ;;
        esac
        rheostat train sequence --config "$config" $flags --seed "$seed" --out "$run"
        if [ -e "$run/adapter/adapter.json" ]; then
            mv "$run/training.json" "$run/adapter/"
            mv "$run/adapter" "$run/$kind"
        fi
    done
    [ -e "$run/autodeco/adapter/adapter.json" ] || rheostat train autodeco --config "$heads" --seed "$seed" --out "$run/autodeco"
    rheostat evaluate --config "$config" --seed "$seed" --out "$run" --baselines turn edt dynamic \
        --strategies T=1,m=0.1 T=1,s=1 --adapter $adapters "$run/autodeco/adapter"
done
