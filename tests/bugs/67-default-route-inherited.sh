#!/bin/bash
# Seen with Weave: its result names no route, and the kernel has its default route. After a switch
# away from it no other network took the default route over, though another one has a gateway.
# Expected: it does.
. "$(dirname "$0")/lib.sh" || exit

plugin quiet 0.2.0 0.3.0 <<'S'
case $CNI_COMMAND in
ADD)
  ip link add qh type veth peer name "$CNI_IFNAME" netns "$ns"
  ip link set qh up
  ip -n "$ns" addr add 10.32.0.2/12 dev "$CNI_IFNAME"
  ip -n "$ns" link set "$CNI_IFNAME" up
  ip -n "$ns" route add default via 10.32.0.1 dev "$CNI_IFNAME"
  echo '{"ips":[{"version":"4","address":"10.32.0.2/12","gateway":"10.32.0.1"}],"dns":{}}' ;;
DEL) [ -z "$ns" ] || ip -n "$ns" link del "$CNI_IFNAME" ;;
esac
exit 0
S
network 10-quiet.conflist '{"cniVersion":"0.3.0","name":"quiet","plugins":[{"type":"quiet"}]}'
bridge plain 10.77.0.0/24
bridge blue 10.78.0.0/24 '{"isDefaultGateway":true}'
table "$(defaults plain)"
default_route() { ip_of a route show default | xargs; }

pod a
must add a a "$(genie_selecting plain,quiet@net1,blue@net2)"
same "the default route" "$(default_route)" "default via 10.32.0.1 dev net1"
expect "switch" operator switch demo/a --from quiet
same "the default route afterwards" "$(default_route)" "default via 10.78.0.1 dev net2"
must del a a
finish
