#!/bin/bash
# k8snetworkplumbingwg/multus-cni#1195 (a trailing comma) and its kind: empty values in an element
# of the annotation. Expected: what Multus takes as absent is absent, what it refuses is refused.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24
start_api
table "$(defaults blue)" "$(credentials 'status = "off"')"
network_object red '{"cniVersion":"1.0.0","name":"red","plugins":[
  {"type":"bridge","bridge":"brred","capabilities":{"ips":true,"mac":true},
    '"$(host_local 10.62.0.0/24)"'},
  {"type":"portmap","capabilities":{"portMappings":true}}]}'

count=0
try() {
  count=$((count + 1))
  pod a
  expect "$1" add "c$count" a "$(selecting "$1")"
  must del "c$count" a
  end_pod a
}
try '[{"name":"red","namespace":"","cni-args":null}]'
try '[{"name":"red","mac":""}]'
try '[{"name":"red","interface":""}]'
try '[{"name":"red","ips":[]}]'
try '[{"name":"red","ips":null}]'
try '[{"name":"red","portMappings":[]}]'
try '[{"name":"red","bandwidth":null}]'
try '[{"name":"red","default-route":null}]'
try '[{"name":"red","interfaceRequest":"foo0"}]'
try '[{"name":"red","cni-args":{},"infiniband-guid":"","ipam-claim-reference":null}]'
try '[{"name":"red","portMappings":[{"hostPort":80,"containerPort":8,"protocol":"","hostIP":""}]}]'
try '[{"name":"red","bandwidth":{"ingressRate":0,"ingressBurst":0,"egressRate":null}}]'
try '[]'

refuses() {
  pod a
  expect "refused: $1" not add refused a "$(selecting "$1")"
  must del refused a
  end_pod a
}
refuses 'red,'
refuses '[{"name":"red"},null]'
refuses '[{"name":""}]'
refuses '[{"name":"red","ips":[""]}]'
refuses '[{"name":"red","default-route":[""]}]'
refuses '[{"name":"red","portMappings":[{}]}]'
finish
