#!/usr/bin/env bash
# The figures of docs/performance.md that come from kvbench: every run saved as JSON under benchmarks/results/.
#
#   benchmarks/record.sh STEP...     loopback tls flood coded crowd pipeline peers-cubic peers-bbr wan changes; "all" is all of them
#
# A step is one command line per result; EXCLUSIVE="..." stands before each (a wrapper that waits until the machine is idle).
# KVBENCH is the command (default: kvbench), PYTHON runs the scripts (default: python). What has been saved already is skipped: remove the file to measure again.
# Times on two idle cores: loopback 16 x 15 s, tls 3 x 35 s, flood 50 s, coded 3 x 45 s, crowd 30 s, pipeline 40 s, peers 2 x 2 minutes, wan 6 x 4 minutes, changes 3 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${RESULTS:-benchmarks/results}
mkdir -p "$out"

record() { # FILE ARGUMENTS...
    local file=$out/$1.json
    shift
    if [ -s "$file" ]; then return; fi
    # Through a second name: what was cut short is not taken for a result.
    ${EXCLUSIVE:-} ${KVBENCH:-kvbench} "$@" --json "$file.part" && mv "$file.part" "$file"
}

loopback() { # ratios to the C loop
    local n sum
    for n in 1 2 4 8; do
        for sum in checksum no-checksum; do
            record "loopback-$n-contiguous-$sum" loopback --baseline --congestion cubic --repeat 9 --connections "$n" --contiguous "--$sum"
            record "loopback-$n-pages-$sum" loopback --baseline --congestion cubic --repeat 9 --connections "$n" --page-bytes 18432 "--$sum"
        done
    done
}
tls() { # ratios to a C loop over the same OpenSSL, and to the same transfer without TLS
    local n
    for n in 1 2 4; do record "tls-$n" loopback --tls --repeat 7 --connections "$n" --congestion cubic; done
}
script() { # FILE SCRIPT ARGUMENTS...
    local file=$out/$1.json
    shift
    if [ -s "$file" ]; then return; fi
    ${EXCLUSIVE:-} ${PYTHON:-python} "$@" --json "$file.part" && mv "$file.part" "$file"
}
flood() { script flood benchmarks/flood.py; }
coded() {
    local codec
    for codec in lz4 zstd; do script "coded-links-$codec" benchmarks/coded_links.py --codec "$codec" --pairs 5; done
    script coded-links-models benchmarks/coded_links.py --codec zstd --gbps 1 --pairs 5 --models
}
crowd() { record crowd crowd --congestion cubic; }
pipeline() {
    record pipeline-loopback pipeline --congestion cubic
    record pipeline-10ms pipeline --rtt 10 --seconds 3 # slow enough that each layer computes for longer than it travels
}
peers-cubic() { record peers-cubic peers --congestion cubic; }
peers-bbr() { record peers-bbr peers --congestion bbr; }
wan() {
    local rtt loss
    for rtt in 10 30; do
        for loss in 0 0.01 0.1; do record "wan-${rtt}ms-$loss" wan --rtt "$rtt" --loss "$loss" --finals 3 --no-changes; done
    done
}
changes() { # the smallest grid that has every change in it
    record wan-changes wan --rtt 10,30 --loss 0,0.1 --connections 8 --congestion bbr --repeat 3 --finals 1 --no-cold
}

steps="loopback tls flood coded crowd pipeline peers-cubic peers-bbr wan changes"
for step in "${@:-none}"; do
    case " $steps all " in
    *" $step "*) ;;
    *)
        sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
    esac
    if [ "$step" = all ]; then for each in $steps; do "$each"; done; else "$step"; fi
done
