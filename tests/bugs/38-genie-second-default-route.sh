#!/bin/bash
# cni-genie/CNI-Genie#213 (Calico and AWS beside another: "add default route: file exists"), #52 and
# #181 (Calico's /32 beside Flannel), PR #60. Expected: one default route, the first network's, as
# its plugin made it; what cannot work with the bare plugins either fails, and leaves nothing.
. "$(dirname "$0")/lib.sh" || exit

# As Calico: a /32, a link route to 169.254.1.1, and the default route through it, which is refused
# where there is one; no route in the result. AWS replaces the link route where Calico adds it.
plugin cal 0.3.0 0.3.1 <<'S'
fail() { echo "{\"cniVersion\":\"0.3.1\",\"code\":999,\"msg\":\"$1\"}"; exit 1; }
[ "$CNI_COMMAND" = ADD ] || exit 0
address=$(jq -r .host <<< "$config")
verb=$(jq -r .verb <<< "$config")
link=cal$(md5sum <<< "$CNI_CONTAINERID$CNI_IFNAME" | cut -c1-9)
ip link add "$link" type veth peer name "$CNI_IFNAME" netns "$ns" || fail veth
ip link set "$link" up
ip -n "$ns" link set "$CNI_IFNAME" up
ip -n "$ns" addr add "$address/32" dev "$CNI_IFNAME"
ip -n "$ns" route "$verb" 169.254.1.1 dev "$CNI_IFNAME" scope link || fail "link route"
ip -n "$ns" route add default via 169.254.1.1 dev "$CNI_IFNAME" || fail "default route"
ip route add "$address" dev "$link"
echo 1 > "/proc/sys/net/ipv4/conf/$link/proxy_arp"
ip addr add 169.254.1.1/32 dev "$link"
echo "{\"cniVersion\":\"0.3.1\",\"interfaces\":[{\"name\":\"$link\"}],
  \"ips\":[{\"version\":\"4\",\"address\":\"$address/32\"}]}"
S
network 10-calico.conflist '{"cniVersion":"0.3.1","name":"calico","plugins":[
  {"type":"cal","host":"10.61.0.9","verb":"add"}]}'
network 10-aws.conflist '{"cniVersion":"0.3.1","name":"aws","plugins":[
  {"type":"cal","host":"10.71.0.9","verb":"replace"}]}'
network 20-flannel.conflist '{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"bridge",
  "bridge":"brflannel","mtu":1450,"hairpinMode":true,"isDefaultGateway":true,"ipam":{
  "type":"host-local","dataDir":"'"$work/ipam"'","ranges":[[{"subnet":"10.244.1.0/24"}]],
  "routes":[{"dst":"10.244.0.0/16"}]}}]}'
table
ip -n "$node" addr add 192.0.2.1/32 dev lo

is_as_made() { [ "$(wc -l <<< "$1")" = 1 ] && [[ $1 == *"dev eth0"* && $1 != *metric* ]]; }
count=0
# try NETWORKS [ROUTE ADDRESS]: another route that there is, and an address that is reached.
try() {
  count=$((count + 1))
  pod a
  expect "$1" add "c$count" a "$(genie_selecting "$1")"
  cp "$work/out" "$work/result"
  expect "$1: default route" is_as_made "$(ip_of a route show default)"
  if [ $# -gt 1 ]; then
    expect "$1: $2" grep -q "$2" <<< "$(ip_of a route)"
    expect "$1: reaches $3" in_pod a ping -c1 -W2 -q "$3"
  fi
  [ "$1" = calico,aws ] || expect "$1: CHECK" check "c$count" a "$work/result"
  must del "c$count" a
  end_pod a
}
try calico,flannel '10.244.0.0/16 via 10.244.1.1 dev eth1' 192.0.2.1
try flannel,calico '10.244.0.0/16 via 10.244.1.1 dev eth0' 10.244.1.1
try aws,flannel '10.244.0.0/16 via' 192.0.2.1
# Both want 169.254.1.1: AWS takes the link route of Calico, as it would without genie, so that
# CHECK may miss it.
try calico,aws

# Calico behind AWS is refused its own link route.
pod a
expect "refused: aws,calico" not add x a "$(genie_selecting aws,calico)"
must del x a
expect_no_lease
finish
