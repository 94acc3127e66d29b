#!/bin/bash
# Seen with Weave: the daemon of the plugin is down, so that its DEL fails as its ADD did. With
# `cni: ""` genie had chosen it. Expected: the next best network is tried, and the pod starts.
. "$(dirname "$0")/lib.sh" || exit

plugin down 0.3.0 0.3.1 <<'S'
echo "$CNI_COMMAND $CNI_IFNAME" >> "$work/calls"
echo '{"code":100,"msg":"dial tcp 127.0.0.1:6784: connect: connection refused"}'
exit 1
S
network 10-first.conflist '{"cniVersion":"0.3.1","name":"first","plugins":[{"type":"down"}]}'
bridge second 10.61.0.0/24 '{"isDefaultGateway":true}'
table '[select]
candidates = ["first", "second"]
[select.weights]
occupancy = 0
response_time = 0
subnets = 0'

pod a
expect "attached" add a a "$(genie_selecting '')"
expect "the first choice was tried" grep -q ADD "$work/calls"
expect DEL del a a
expect_no_lease
finish
