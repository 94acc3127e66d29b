#!/bin/bash
# k8snetworkplumbingwg/multus-cni#1452, openshift/multus-cni#297 and #301: the kubeconfigs that
# Multus' installer wrote on every IPv4 cluster have brackets around addresses and host names.
# Expected: a Multus config whose type became genie works with such a file.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24 '{"isDefaultGateway":true}'
start_api
port=${api##*:}
pod_object c1 '{}'
table

try() {
  sed "s#server: https://127.0.0.1:$port#server: $1#" "$kubeconfig" > "$work/kubeconfig"
  pod a
  expect "$1" add_by_api c1 a \
    "{\"clusterNetwork\":\"$work/conf/10-blue.conflist\",\"kubeconfig\":\"$work/kubeconfig\"}"
  must del c1 a
  end_pod a
}
try "https://127.0.0.1:$port"
try "https://127.0.0.1:$port/"
try "https://[127.0.0.1]:$port"
try "https://[localhost]:$port"
finish
