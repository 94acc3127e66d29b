#!/bin/bash
# cni-genie/CNI-Genie#161, its PR #92, docs/network-isolation: logical networks on Weave. The list
# that Weave's own manifest installs has no "ipam"; CNI-Genie writes ipam.subnet into its first
# plugin whatever stands there, and weave-net allocates from it. Expected: so does genie.
. "$(dirname "$0")/lib.sh" || exit

# As weave-net: ipam.subnet of the config, else Weave's whole range.
plugin weave-net 0.1.0 0.2.0 0.3.0 <<'S'
[ "$CNI_COMMAND" = ADD ] || exit 0
subnet=$(jq -r '.ipam.subnet // "10.32.0.0/12"' <<< "$config")
echo "$CNI_IFNAME $subnet" >> "$work/asked"
echo "{\"cniVersion\":\"0.3.0\",\"ips\":[{\"version\":\"4\",\"address\":\"${subnet%.*}.7/12\"}]}"
S
network 10-weave.conflist '{"cniVersion":"0.3.0","name":"weave","plugins":[
  {"name":"weave","type":"weave-net","hairpinMode":true},
  {"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}'
plugin flannel 0.3.0 0.3.1 <<'S'
[ "$CNI_COMMAND" = ADD ] || exit 0
echo "$CNI_IFNAME $(jq -r '.ipam.subnet // "none"' <<< "$config")" >> "$work/asked"
echo '{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.244.1.7/24"}]}'
S
network 10-flannel.conflist '{"name":"cbr0","cniVersion":"0.3.1","plugins":[
  {"type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}},
  {"type":"portmap","capabilities":{"portMappings":true}}]}'
start_api
table "$(credentials 'status = "off"')"
logical_network weave-1 '{"plugin":"weave","sub_subnet":"10.35.0.0/24"}'
physical_network phynet1 '{"refer_nic":"eth2",
  "sharedStatus":{"plugin":"weave","subnet":"10.44.0.0/24","dedicatedNet":true}}'
logical_network dedicated '{"physicalNet":"phynet1"}'
logical_network plain-flannel '{"plugin":"flannel"}'

count=0
# try WHAT ANNOTATIONS ASKED: what the plugin is asked for.
try() {
  count=$((count + 1))
  pod a
  rm -f "$work/asked"
  must add "c$count" a "$2"
  same "$1" "$(cat "$work/asked")" "$3"
  must del "c$count" a
  end_pod a
}
try 'plain Weave' "$(genie_selecting weave)" 'eth0 10.32.0.0/12'
try 'a logical network' "$(genie_selecting '' weave-1)" 'eth0 10.35.0.0/24'
try 'a dedicated physical network' "$(genie_selecting '' dedicated)" 'eth0 10.44.0.0/24'
try 'no sub_subnet' "$(genie_selecting '' plain-flannel)" 'eth0 none'
finish
