#!/bin/sh
# Sequence level, everything against everything: the adapters of sequence.sh, the entropy-only ablation, AutoDeco's heads, TURN,
# EDT, dynamic temperature, min-p and top-nσ, judged together, seed by seed.
# usage: [SEEDS="0 1 2"] recipes/rivals.sh OUT CONFIG.toml AUTODECO.toml
# An interrupted run continues.
set -eu
out=$1 config=$2 heads=$3
for seed in ${SEEDS:-0 1 2}; do
    run="$out/seed-$seed"
    for kind in with-budget without-budget entropy-only; do
        [ -e "$run/$kind/adapter.json" ] && continue
        case $kind in
            with-budget) flags="" ;;
            without-budget) flags="--no-with-budget" ;;
            entropy-only) flags="--features entropy" ;;
        esac
        rheostat train sequence --config "$config" $flags --seed "$seed" --out "$run"
        mv "$run/training.json" "$run/adapter/"
        mv "$run/adapter" "$run/$kind"
    done
    [ -e "$run/autodeco/adapter/adapter.json" ] || rheostat train autodeco --config "$heads" --seed "$seed" --out "$run/autodeco"
    rheostat evaluate --config "$config" --seed "$seed" --out "$run" --baselines turn edt dynamic \
        --strategies T=1,m=0.1 T=1,s=1 \
        --adapter "$run/with-budget" "$run/without-budget" "$run/entropy-only" "$run/autodeco/adapter"
done
