#!/bin/bash
# Seen with Calico and Flannel: one of a pod's two interfaces is lost, and `genie repair` attached
# the healthy one anew too, so that its address changed. Expected: a repair mends what CHECK finds
# broken, and nothing else.
. "$(dirname "$0")/lib.sh" || exit

# Another address each time.
plugin fresh 0.3.0 0.3.1 <<'S'
case $CNI_COMMAND in
ADD)
  n=$(($(cat "$work/count" || echo 1) + 1))
  echo $n > "$work/count"
  ip link add "kh$n" type veth peer name "$CNI_IFNAME" netns "$ns"
  ip link set "kh$n" up
  ip -n "$ns" addr add "10.65.0.$n/32" dev "$CNI_IFNAME"
  ip -n "$ns" link set "$CNI_IFNAME" up
  interface="\"name\":\"$CNI_IFNAME\",\"sandbox\":\"$CNI_NETNS\""
  ip="\"version\":\"4\",\"interface\":0,\"address\":\"10.65.0.$n/32\""
  echo "{\"cniVersion\":\"0.3.1\",\"interfaces\":[{$interface}],\"ips\":[{$ip}]}" ;;
DEL)
  [ -z "$ns" ] || ip -n "$ns" link del "$CNI_IFNAME"
  exit 0 ;;
*) echo '{"code":100,"msg":"unknown CNI_COMMAND"}'; exit 1 ;;
esac
S
network 10-first.conflist '{"cniVersion":"0.3.1","name":"first","plugins":[{"type":"fresh"}]}'
bridge second 10.66.0.0/24
table "$(defaults first)"

pod a
must add a a "$(genie_selecting first,second)"
ip_of a link del eth1
expect "repair" operator repair demo/a
expect "the healthy eth0 keeps its address" grep -q 10.65.0.2/32 <<< "$(ip_of a addr show eth0)"
expect "eth1 is back with its address" grep -q 10.66.0.2/24 <<< "$(ip_of a addr show eth1)"
must del a a
finish
