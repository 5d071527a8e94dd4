#!/bin/sh
# Token level: variants and seeds, judged together on the same test problems.
# usage: [SEEDS="0 1 2"] [VARIANTS="..."] recipes/table5/run.sh OUT CONFIG.toml TRAINING.toml [OPTION ...]
# Configuration and options are for training and judging, TRAINING.toml on top of them for training. An interrupted run
# continues; --dry-run as an option shows what all of it would take.
set -eu
out=$1 config=$2 training=$3
shift 3
adapters=""
for seed in ${SEEDS:-0 1 2}; do
    first=""
    for variant in ${VARIANTS:-with-budget without-budget entropy-only}; do
        case $variant in
            with-budget) more="" ;;
            without-budget) more="--no-with-budget" ;;
            entropy-only) more="--features entropy" ;;
            pass@1) more="--objective pass@1" ;;
            *) echo "VARIANTS: unknown variant $variant" >&2 && exit 2 ;;
        esac
        run="$out/$variant-$seed"
        if [ ! -e "$run/adapter/adapter.json" ]; then
            # the initial pass rates of the training prompts are those of the uniform policy, the same for every variant
            if [ -d "$first/rollouts" ] && [ ! -d "$run/rollouts" ]; then
                mkdir -p "$run" && cp -r "$first/rollouts" "$run/"
            fi
            rheostat train token --config "$config" --config "$training" "$@" $more \
                --seed "$seed" --out "$run"
        fi
        first=${first:-$run}
        adapters="$adapters $run/adapter"
    done
done
rheostat evaluate --config "$config" "$@" --out "$out/judged" --adapter $adapters
