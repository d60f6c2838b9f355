#!/usr/bin/env bash
# Runs the tests, and says at the end how many passed, failed and were skipped, and why. A test that cannot run
# here (no GPU, data that is not ours to publish) prints a line "SKIPPED reason" and returns; cargo counts it as
# passed, so the lines are counted per test from `--show-output`. The exit status is cargo's.
# usage: scripts/test.sh [arguments of cargo test]
set -uo pipefail
cd "$(dirname "$0")/.."

# Reads cargo's output: shows all of it but what passing tests printed, and ends with the counts.
summarise() {
    local line passed=0 failed=0 skipped=0 results=0 in_successes=0 counted=0
    declare -A reasons=()
    while IFS= read -r line; do
        case $line in
            "successes:") in_successes=1 counted=0 && continue ;;
            "failures:" | "test result: "*) in_successes=0 ;;
        esac
        if [[ $line =~ ^"test result: ".*\ ([0-9]+)\ passed\;\ ([0-9]+)\ failed\; ]]; then
            ((results++, passed += BASH_REMATCH[1], failed += BASH_REMATCH[2]))
        fi
        if ((in_successes)); then
            # A new block for each test: "---- name stdout ----".
            [[ $line == "---- "*" ----" ]] && counted=0
            if [[ $line =~ ^SKIPPED[\ :]*(.*)$ ]] && ! ((counted)); then
                counted=1
                ((skipped++))
                reasons["${BASH_REMATCH[1]:-no reason given}"]=$((${reasons["${BASH_REMATCH[1]:-no reason given}"]:-0} + 1))
            fi
            continue
        fi
        printf '%s\n' "$line"
    done
    ((results)) || return 0
    local reason
    for reason in "${!reasons[@]}"; do
        printf 'skipped %d: %s\n' "${reasons[$reason]}" "$reason"
    done
    printf '%d passed, %d failed, %d skipped\n' $((passed - skipped)) "$failed" "$skipped"
}

cargo test --no-fail-fast "$@" -- --show-output | summarise
exit "${PIPESTATUS[0]}"
