#!/bin/bash
# containernetworking/cni#670 and #571, aws/amazon-vpc-cni-k8s#1248: a plugin fails and prints
# something else than one error document. Expected: its words are in genie's answer.
. "$(dirname "$0")/lib.sh" || exit

table "$(defaults f)"
network 10-f.conflist '{"cniVersion":"1.0.0","name":"f","plugins":[{"type":"fake"}]}'

count=0
# try WHAT SCRIPT WORDS: what the plugin does in ADD, and what the answer must have of it.
try() {
  count=$((count + 1))
  plugin fake <<< "[ \$CNI_COMMAND = DEL ] && exit 0; $2"
  pod a
  add "c$count" a
  expect "$1" answers "$3"
  must del "c$count" a
  end_pod a
}
failed='echo "{\"code\":100,\"msg\":\"no available addresses\"}"; exit 1'
made='echo "{\"cniVersion\":\"0.3.0\",\"interfaces\":[{\"name\":\"eth0\"}]}"'

try "text on stdout, exit 1" 'echo "FATAL: no free VF on ens1f0"; exit 1' 'no free VF'
try "a log line and an error, exit 1" "echo level=debug; $failed" 'no available addresses'
try "a result and an error, exit 1 (Azure)" "$made; $failed" 'no available addresses'
try "log lines of JSON, exit 1" 'echo "{\"level\":\"error\",\"msg\":\"ipamd not ready\"}"; exit 1' \
  'ipamd not ready'
try "text on stderr, exit 1" 'echo "no addresses" >&2; exit 1' 'no addresses'
try "a log line and a result, exit 0" 'echo "WARNING: old"; echo "{\"cniVersion\":\"1.0.0\"}"' \
  'WARNING: old'
try "no message but details, exit 1" \
  'echo "{\"code\":100,\"msg\":\"\",\"details\":\"the range is full\"}"; exit 1' \
  'failed: the range is full'
try "two errors, exit 1" "echo '{\"code\":100,\"msg\":\"first\"}'; $failed" 'no available addresses'
try "two results, exit 0" 'echo "{\"ips\":[]}"; echo "{\"ips\":[]}"' 'not valid JSON'
try "text alone, exit 0" 'echo "no such bridge"' 'no such bridge'
try "nothing, exit 0" 'exit 0' 'printed no result'
try "a signal" 'kill -KILL $$' 'killed by SIGKILL'
try "a result, then a signal" "$made; kill -SEGV \$\$" 'killed by SIGSEGV'
try "1 MB on stderr and an error" "head -c 1000000 /dev/zero | tr '\\0' x >&2; $failed" \
  'no available addresses'
try "2 MB on stdout" "head -c 2000000 /dev/zero | tr '\\0' x" 'more than 1 MiB'
finish
