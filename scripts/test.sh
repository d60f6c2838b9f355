#!/usr/bin/env bash
# Runs the tests, and says at the end how many passed, failed and were skipped, and why. A test that cannot run here
# (no GPU, data that is not ours to publish) prints "SKIPPED name: reason" or "SKIPPED: reason" and returns. cargo counts it as passed and
# hides what it printed, unless it wrote to stderr past the harness: hence `--show-output`. The exit status is cargo's.
# usage: scripts/test.sh [arguments of cargo test]
set -uo pipefail
cd "$(dirname "$0")/.."

# Reads cargo's output: shows all of it but what passing tests printed, and ends with the counts.
summarise() {
    local line where='' block='' name passed=0 failed=0 results=0 in_successes=0 reason
    declare -A skipped=() reasons=()
    while IFS= read -r line; do
        case $line in
            *"Running "* | *"Doc-tests "*) where=$line ;;
            "---- "*" stdout ----") block=${line#---- } block=${block% stdout ----} ;;
            "successes:") in_successes=1 ;;
            "failures:" | "test result: "*) in_successes=0 ;;
        esac
        if [[ $line =~ ^"test result: ".*\ ([0-9]+)\ passed\;\ ([0-9]+)\ failed\; ]]; then
            ((results++, passed += BASH_REMATCH[1], failed += BASH_REMATCH[2]))
        fi
        if [[ $line =~ (^|\.\.\.\ )SKIPPED(\ ([A-Za-z0-9_:]+))?:\ (.*)$ ]]; then
            name=${BASH_REMATCH[3]:-$block} reason=${BASH_REMATCH[4]}
            # A test may say it twice.
            if [ -z "${skipped[$where $name]:-}" ]; then
                skipped[$where $name]=1
                reasons[$reason]=$((${reasons[$reason]:-0} + 1))
            fi
        elif ! ((in_successes)); then
            printf '%s\n' "$line"
        fi
    done
    ((results)) || return 0
    for reason in "${!reasons[@]}"; do
        printf 'skipped %d: %s\n' "${reasons[$reason]}" "$reason"
    done
    printf '%d passed, %d failed, %d skipped\n' $((passed - ${#skipped[@]})) "$failed" "${#skipped[@]}"
}

cargo test --no-run "$@" || exit
cargo test --no-fail-fast "$@" -- --show-output 2>&1 | summarise
exit "${PIPESTATUS[0]}"
