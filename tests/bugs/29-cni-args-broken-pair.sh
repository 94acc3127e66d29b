#!/bin/bash
# hashicorp/nomad#24658 and its kind: words of a job reach CNI_ARGS, and Nomad tries an ADD three
# times, with no DEL between. The plugins refuse a pair that is none. Expected: each try says the
# same, DEL succeeds, and the node's GC does not fail because of them.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24
table "$(defaults blue)"

count=0
try() {
  count=$((count + 1))
  local id=c$count args=$1 first
  pod "$id"
  must not add "$id" "$id"
  must answers '"code"'
  first=$(error)
  must not add "$id" "$id"
  same "$1, again" "$(error)" "$first"
  expect "$1, DEL" del "$id" "$id"
}
try 'IgnoreUnknown=true;FOO=a=b'
try 'IgnoreUnknown=true;FOO'
try 'a;b=;;=c'
try 'IgnoreUnknown=yes'
try 'IgnoreUnknown=1;IP=300.1.1.1'
try 'a'
try 'a;'
try 'a==b'
try '=x'
# No pair at all is none that is broken.
pod none
args=';' expect "a semicolon alone" add none none
must del none none
version=1.1.0 expect GC call GC "" "" "" '{"cni.dev/valid-attachments":[]}'
finish
