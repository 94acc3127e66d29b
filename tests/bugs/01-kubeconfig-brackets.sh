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
try "https://[127.0.0.1]:$port/"
try "HTTPS://[127.0.0.1]:$port"
try "https://[localhost]:$port"

# Brackets belong to IPv6 alone, which must keep them: nothing listens there.
refuses() {
  sed "s#server: https://127.0.0.1:$port#server: $1#" "$kubeconfig" > "$work/kubeconfig"
  pod a
  must not add_by_api c1 a "{\"clusterNetwork\":\"blue\",\"kubeconfig\":\"$work/kubeconfig\"}"
  expect "$1: $(error)" answers "$2"
  must del c1 a
  end_pod a
}
refuses "https://[::1]:$port" "https://[::1]:$port"
refuses "https://[127.0.0.1]" "https://127.0.0.1:"
refuses "https://[[::1]]:$port" "not a URL"
finish
