#!/bin/bash
# podman-container-tools/podman#348, #8048, #8571: firewalld was reloaded, so the plugins' chains
# are gone; then come DEL, and ADD with the same address. Expected: the DEL succeeds, at the latest
# when it is repeated, and the ADD forwards the port again.
. "$(dirname "$0")/lib.sh" || exit

plugin_list=$(jq -nc --argjson ipam "{$(host_local 10.88.0.0/24)}" '[
  ({type: "bridge", bridge: "brpod", isGateway: true, ipMasq: true} + $ipam
    + {capabilities: {ips: true}}),
  {type: "portmap", capabilities: {portMappings: true}}, {type: "firewall"}, {type: "tuning"}]')
network 10-pod.conflist "{\"cniVersion\":\"0.4.0\",\"name\":\"pod\",\"plugins\":$plugin_list}"
table "$(defaults pod)"
version=0.4.0
port='"portMappings":[{"hostPort":8088,"containerPort":80,"protocol":"tcp"}]'
rules() { on_node iptables -w -t nat -S; }

pod a
must add c1 a "$none" "{\"runtimeConfig\":{$port}}"
address=$(addresses)
for name in nat filter; do
  on_node iptables -w -t "$name" -F
  on_node iptables -w -t "$name" -X
done
if ! del c1 a; then
  note "first DEL: $(error | cut -c1-120)"
  must del c1 a
fi
expect_no_lease

must add c1 a "$none" "{\"runtimeConfig\":{$port,\"ips\":[\"${address%/*}\"]}}"
same "the address again" "$(addresses)" "$address"
expect "the port is forwarded again" grep -q '10.88.0.*:80' <<< "$(rules)"
expect DEL del c1 a
expect "the rules of the port are gone" not grep -q 'dport 8088' <<< "$(rules)"
finish
