#!/bin/bash
# Seen with Calico 1.11 on etcd: one endpoint per workload, whatever the interface. The ADD of a
# second interface answers with the same address and takes the first interface away; its undo takes
# the rest, and a running pod has no interface at all. Expected: the second is refused before the
# plugin runs, with the reason.
. "$(dirname "$0")/lib.sh" || exit

mkdir "$work/ids"
plugin calico 0.1.0 0.2.0 0.3.0 0.3.1 <<'S'
id=$CNI_CONTAINERID
case $CNI_COMMAND in
ADD)
  if [ ! -f "$work/ids/$id" ]; then
    n=2
    while grep -qx "10.65.0.$n" "$work"/ids/*; do n=$((n+1)); done
    echo "10.65.0.$n" > "$work/ids/$id"
  fi
  address=$(cat "$work/ids/$id")
  link=cali${address##*.}
  ip link del "$link"
  ip link add "$link" type veth peer name "$CNI_IFNAME" netns "$ns"
  ip link set "$link" up
  ip -n "$ns" addr add "$address/32" dev "$CNI_IFNAME"
  ip -n "$ns" link set "$CNI_IFNAME" up
  ip -n "$ns" route add 169.254.1.1 dev "$CNI_IFNAME" scope link
  ip -n "$ns" route add default via 169.254.1.1 dev "$CNI_IFNAME"
  ip="\"version\":\"4\",\"address\":\"$address/32\""
  echo "{\"cniVersion\":\"0.3.1\",\"ips\":[{$ip}],\"dns\":{}}" ;;
DEL)
  address=$(cat "$work/ids/$id")
  rm -f "$work/ids/$id"
  [ -z "$address" ] || ip link del "cali${address##*.}"
  exit 0 ;;
*) echo '{"code":100,"msg":"unknown CNI_COMMAND"}'; exit 1 ;;
esac
S
for name in calico canal; do
  network "10-$name.conflist" \
    "{\"cniVersion\":\"0.3.1\",\"name\":\"$name\",\"plugins\":[{\"type\":\"calico\"}]}"
done
table "$(defaults calico)"

pod a
must add a a "$(genie_selecting calico)"
expect "a switch to a second one is refused" not operator switch demo/a --to canal@net5
expect "the pod keeps eth0" grep -q 10.65.0.2/32 <<< "$(ip_of a addr show eth0)"
expect "and its default route" grep -q 169.254.1.1 <<< "$(ip_of a route show default)"
expect "and its address" [ -f "$work/ids/a" ]
for both in calico,calico calico,canal; do
  pod b
  must not add b b "$(genie_selecting "$both")"
  expect "$both is refused, with the reason" answers "one interface"
  must del b b
  end_pod b
done
must del a a
same "addresses left" "$(ls "$work/ids")" ""
finish
