#!/bin/bash
# containernetworking/cni#60 and #141, aws/amazon-vpc-cni-k8s#1248: a plugin succeeds, and prints
# more or other than the protocol says. Expected: ADD and DEL succeed.
. "$(dirname "$0")/lib.sh" || exit

table "$(defaults f)"
network 10-f.conflist '{"cniVersion":"1.0.0","name":"f","plugins":[{"type":"fake"}]}'
result='{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"x"}],
  "ips":[{"address":"10.1.2.3/24","interface":0}]}'
nulls='{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24"}],"routes":null,"interfaces":null,
  "dns":{"nameservers":null}}'

count=0
try() {
  count=$((count + 1))
  plugin fake <<< "$2"
  pod a
  must add "c$count" a
  expect "$1" del "c$count" a
  [ ! -s "$work/out" ] || fault "$1: DEL prints $(answer)"
  end_pod a
}
try "text on stdout of DEL" "[ \$CNI_COMMAND = DEL ] && { echo deleted; exit 0; }; echo '$result'"
try "{} on stdout of DEL" "[ \$CNI_COMMAND = DEL ] && { echo '{}'; exit 0; }; echo '$result'"
try "20 MB on stderr" "head -c 20000000 /dev/zero | tr '\\0' x >&2; echo '$result'"
try "a byte order mark before the result" "printf '\\xef\\xbb\\xbf'; echo '$result'"
try "null for lists" "echo '$nulls'"
finish
